"""A small network in VGG's style."""

from typing import Any

from torch import Tensor, nn

from ..layers import ConvReLU2d, ConvReLUMaxPool2d
from .vgg import initialise


class VGGSmall(nn.Module):
    """Four convolutions in VGG's style, for small images.

    It is this library's own, after Simonyan and Zisserman, "Very deep convolutional networks for
    large-scale image recognition" (2015): 3x3 windows, channels doubled when the map is halved,
    dropout before the linear layers. The layout is 32 channels, pool, 64, pool, 128, 128, pool,
    then 256 units. With one channel and ten classes it has 767,370 parameters and takes 39,392,256
    FLOPs per image.

    Takes x[N, in_channels, image_size, image_size] or one image without N; returns logits
    [N, num_classes].

    Args:
        image_size: side of the images, at least 8. The first linear layer depends on it.
        dropout: share of units that training drops before each linear layer.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        *,
        image_size: int = 32,
        dropout: float = 0.25,
    ):
        super().__init__()
        side = image_size // 8
        pooled = {"padding": 1, "pool_kernel_size": 2}
        self.features = nn.Sequential(
            ConvReLUMaxPool2d(in_channels, 32, 3, **pooled),
            ConvReLUMaxPool2d(32, 64, 3, **pooled),
            ConvReLU2d(64, 128, 3, padding=1),
            ConvReLUMaxPool2d(128, 128, 3, **pooled),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(128 * side * side, 256),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(256, num_classes),
        )
        self.features.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(-3))


def vgg_small(num_classes: int = 10, in_channels: int = 1, **options: Any) -> VGGSmall:
    """A newly initialized small network in VGG's style. ``options`` are the class's."""
    return VGGSmall(num_classes, in_channels, **options)
