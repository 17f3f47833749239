"""AlexNet."""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from ..layers import ConvReLU2d, ConvReLUMaxPool2d


class Tower(nn.Module):
    """Named layers, averaging of their 256 maps to ``side`` x ``side``, and three linear layers."""

    def __init__(
        self, layers: dict[str, nn.Module], side: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(OrderedDict(layers))
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * side * side, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(-3))


class AlexNet(Tower):
    """AlexNet in one tower: five convolutions, three of them pooled, and three linear layers.

    Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (2014), as in
    torchvision: 64 filters in the first layer, without the cross-channel normalization of
    Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep convolutional neural
    networks" (2012), figure 2. A pooled convolution, its ReLU and the pooling are one kernel.
    Parameters have torchvision's names and shapes. With three channels and 1,000 classes it has
    61,100,840 parameters and takes 1,428,376,960 FLOPs per image of 224x224.

    Takes x[N, in_channels, H, W] or one image without N; returns logits [N, num_classes].

    Args:
        dropout: share of units that training drops before the first two linear layers.
        image_size: side of the expected images, at least 15. Below 64 the first convolution has
            stride 1 instead of 4, and maps are averaged to 3x3, the rest of 32x32, not 6x6.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        dropout: float = 0.5,
        image_size: int = 224,
    ):
        stride, padding, side = (4, 2, 6) if image_size >= 64 else (1, 5, 3)
        pool: Any = {"pool_kernel_size": 3, "pool_stride": 2}
        # Numbered as if ReLUs and poolings were separate layers, as in checkpoints.
        layers = {
            "0": ConvReLUMaxPool2d(in_channels, 64, 11, stride, padding, **pool),
            "3": ConvReLUMaxPool2d(64, 192, 5, padding=2, **pool),
            "6": ConvReLU2d(192, 384, 3, padding=1),
            "8": ConvReLU2d(384, 256, 3, padding=1),
            "10": ConvReLUMaxPool2d(256, 256, 3, padding=1, **pool),
        }
        super().__init__(layers, side, num_classes, dropout)


def alexnet(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> AlexNet:
    """A newly initialized AlexNet. ``options`` are the class's."""
    return AlexNet(num_classes, in_channels, **options)
