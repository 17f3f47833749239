"""ZFNet."""

from typing import Any

from torch import nn

from ..layers import ConvReLU2d, ConvReLUMaxPool2d
from .alexnet import Tower


class ZFNet(Tower):
    """ZFNet: AlexNet with finer first layers, the result of looking at its features.

    Zeiler and Fergus, "Visualizing and understanding convolutional networks" (2014), figure 3:
    images of 224x224 give maps with sides of 110, 55 (pooled), 26, 13 (pooled), 13, 13, 13 and 6
    (pooled) pixels. A pooled convolution, its ReLU and the pooling are one kernel. Parameters have
    AlexNet's names. With three channels and 1,000 classes it has 62,357,608 parameters and takes
    2,336,065,792 FLOPs per image of 224x224.

    The figure also normalizes the first two pooled maps across channels. Simonyan and Zisserman
    (2015, section 4.1) gained nothing from it, so here, as in AlexNet, it is off by default.

    Takes x[N, in_channels, H, W] or one image without N; returns logits [N, num_classes].

    Args:
        contrast: whether to normalize as in the figure, with the constants of AlexNet's paper
            (2012, section 3.3).
        dropout: share of units that training drops before the first two linear layers.
        image_size: side of the expected images, at least 9. Below 64 the first two convolutions
            have stride 1 instead of 2, and maps are averaged to 3x3, the rest of 32x32, not 6x6.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        contrast: bool = False,
        dropout: float = 0.5,
        image_size: int = 224,
    ):
        stride, paddings, side = (2, (1, 0), 6) if image_size >= 64 else (1, (3, 2), 3)
        pool: Any = {"pool_kernel_size": 3, "pool_stride": 2}
        # Numbered like AlexNet's, as if ReLUs and poolings were separate layers.
        layers = {
            "0": ConvReLUMaxPool2d(in_channels, 96, 7, stride, paddings[0], pool_padding=1, **pool),
            "norm0": _across_channels() if contrast else nn.Identity(),
            "3": ConvReLUMaxPool2d(96, 256, 5, stride, paddings[1], pool_padding=1, **pool),
            "norm3": _across_channels() if contrast else nn.Identity(),
            "6": ConvReLU2d(256, 384, 3, padding=1),
            "8": ConvReLU2d(384, 384, 3, padding=1),
            "10": ConvReLUMaxPool2d(384, 256, 3, padding=1, **pool),
        }
        super().__init__(layers, side, num_classes, dropout)


def _across_channels() -> nn.LocalResponseNorm:
    return nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2)  # torch divides alpha by 5


def zfnet(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ZFNet:
    """A newly initialized ZFNet. ``options`` are the class's."""
    return ZFNet(num_classes, in_channels, **options)
