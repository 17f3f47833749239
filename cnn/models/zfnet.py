"""ZFNet."""

from typing import Any

from torch import nn

from ..layers import ConvReLU2d, ConvReLUMaxPool2d
from .alexnet import Tower


class ZFNet(Tower):
    """ZFNet: AlexNet with finer first layers, found by looking at what its features respond to.

    Zeiler and Fergus, "Visualizing and understanding convolutional networks" (2014), figure 3:
    images of 224x224 give maps of 110, 55 (pooled), 26, 13 (pooled), 13, 13, 13 and 6 (pooled)
    pixels a side. A convolution that is pooled, its ReLU and the pooling are one kernel. Parameters
    are named as AlexNet's. With three channels and 1,000 classes it has 62,357,608 parameters and
    takes 2,336,065,792 FLOPs an image of 224x224.

    The figure also normalizes the first two pooled maps across channels. Simonyan and Zisserman
    (2015, section 4.1) gained nothing by that, so here, as in AlexNet, it is left out by default.

    Takes x[N, in_channels, H, W] or one image without N; returns logits [N, num_classes].

    Args:
        contrast: whether to normalize as in the figure, with the constants of AlexNet's paper
            (2012, section 3.3).
        dropout: the share of units that training drops before the first two linear layers.
        image_size: of the images to come, from 9 on. Below 64 the first two convolutions move by
            one pixel, not two, and maps are averaged to 3x3, not 6x6: what 32x32 leaves.
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
        # Numbered as AlexNet's: as if ReLUs and poolings stood apart.
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
    """A freshly initialised ZFNet. ``options`` are the class's."""
    return ZFNet(num_classes, in_channels, **options)
