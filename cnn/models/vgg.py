"""VGG."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..layers import Conv2d, ConvReLU2d, ConvReLUMaxPool2d, MaxPool2d

# Filters of the convolutions in each stage: columns A, B, D and E of the paper's table 1.
A = (64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2
B = (64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2
D = (64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3
E = (64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4


class VGG(nn.Module):
    """Stages of 3x3 convolutions, each with a ReLU, and of 2x2 max-pooling; three linear layers.

    Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition"
    (2015), table 1. Without batch normalization each stage's last convolution, its ReLU and the
    pooling are one kernel, and every other convolution is one with its ReLU. Parameters have
    torchvision's names and shapes.

    Takes x[N, in_channels, H, W] or one image without N; returns logits [N, num_classes].

    Args:
        stages: number of filters of each convolution, stage by stage.
        batch_norm: whether batch normalization follows each convolution (Ioffe and Szegedy, 2015);
            the paper has none.
        image_size: side of the expected images. Maps are averaged to 7x7, the rest of 224x224, or
            to the rest of smaller images: one pixel for 32x32. Any size from 32 on works.
        dropout: share of units that training drops after the first two linear layers.
        hidden: width of these layers.
        init_weights: whether to initialize as torchvision does, not as torch's layers do.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        batch_norm: bool = False,
        image_size: int = 224,
        dropout: float = 0.5,
        hidden: int = 4096,
        init_weights: bool = True,
    ):
        super().__init__()
        side = min(7, max(1, image_size >> len(stages)))
        self.features = (_normalized if batch_norm else features)(stages, in_channels)
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Sequential(
            nn.Linear(stages[-1][-1] * side * side, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
        if init_weights:
            self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(-3))


def features(stages: Sequence[Sequence[int]], channels: int) -> nn.Sequential:
    """The convolutions with ReLUs and poolings, numbered as if these were separate layers, as in
    checkpoints.
    """
    layers, number = nn.Sequential(), 0
    for *widths, last in stages:
        for width in widths:
            layers.add_module(str(number), ConvReLU2d(channels, width, 3, padding=1))
            channels, number = width, number + 2
        pooled = ConvReLUMaxPool2d(channels, last, 3, padding=1, pool_kernel_size=2)
        layers.add_module(str(number), pooled)
        channels, number = last, number + 3
    return layers


def _normalized(stages: Sequence[Sequence[int]], channels: int) -> nn.Sequential:
    layers = nn.Sequential()
    for stage in stages:
        for width in stage:
            layers.append(Conv2d(channels, width, 3, padding=1))
            layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
            channels = width
        layers.append(MaxPool2d(2))
    return layers


def initialise(layer: nn.Module) -> None:
    """Initialize a layer's parameters as torchvision does."""
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, std=0.01)
    if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
        nn.init.zeros_(layer.bias)


def vgg11(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> VGG:
    """Column A: 132,863,336 parameters, 15,218,180,096 FLOPs per image. ``options`` are VGG's."""
    return VGG(A, num_classes, in_channels, **options)


def vgg13(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> VGG:
    """Column B: 133,047,848 parameters, 22,616,932,352 FLOPs per image. ``options`` are VGG's."""
    return VGG(B, num_classes, in_channels, **options)


def vgg16(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> VGG:
    """Column D: 138,357,544 parameters, 30,940,528,640 FLOPs per image. ``options`` are VGG's."""
    return VGG(D, num_classes, in_channels, **options)


def vgg19(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> VGG:
    """Column E: 143,667,240 parameters, 39,264,124,928 FLOPs per image. ``options`` are VGG's."""
    return VGG(E, num_classes, in_channels, **options)


def vgg11_bn(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> VGG:
    """vgg11 with batch normalization: 132,868,840 parameters."""
    return VGG(A, num_classes, in_channels, batch_norm=True, **options)


def vgg13_bn(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> VGG:
    """vgg13 with batch normalization: 133,053,736 parameters."""
    return VGG(B, num_classes, in_channels, batch_norm=True, **options)


def vgg16_bn(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> VGG:
    """vgg16 with batch normalization: 138,365,992 parameters."""
    return VGG(D, num_classes, in_channels, batch_norm=True, **options)


def vgg19_bn(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> VGG:
    """vgg19 with batch normalization: 143,678,248 parameters."""
    return VGG(E, num_classes, in_channels, batch_norm=True, **options)
