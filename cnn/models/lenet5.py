"""LeNet-5."""

from typing import Any

from torch import Tensor, nn

from ..layers import ConvReLUMaxPool2d


class LeNet5(nn.Module):
    """LeNet-5 in its modern form: ReLU for tanh, max-pooling for trained subsampling, logits out.

    The layout is figure 2 of LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied
    to document recognition" (1998): maps of 6x28x28, 6x14x14, 16x10x10 and 16x5x5, then 120 and
    84 units. Each of the 16 maps sees all six below it; the paper's table I omits some. With one
    channel and ten classes it has 61,706 parameters and takes 833,040 FLOPs per image.

    Takes x[N, in_channels, image_size, image_size] or one image without N; returns logits
    [N, num_classes].

    Args:
        image_size: side of the images, at least 16. The first linear layer depends on it.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, *, image_size: int = 32):
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        # Numbered as if the poolings were separate layers, as in checkpoints.
        self.features = nn.Sequential()
        self.features.add_module("0", ConvReLUMaxPool2d(in_channels, 6, 5, pool_kernel_size=2))
        self.features.add_module("2", ConvReLUMaxPool2d(6, 16, 5, pool_kernel_size=2))
        self.classifier = nn.Sequential(
            nn.Linear(16 * side * side, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(-3))


def lenet5(num_classes: int = 10, in_channels: int = 1, **options: Any) -> LeNet5:
    """A newly initialized LeNet-5. ``options`` are the class's."""
    return LeNet5(num_classes, in_channels, **options)
