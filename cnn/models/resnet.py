"""ResNet."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..layers import Conv2d, MaxPool2d


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them: figure 5, left.

    Takes x[N, channels, H, W]; returns [N, width, H / stride, W / stride].
    """

    expansion: ClassVar[int] = 1

    def __init__(self, channels: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels, width, stride)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.downsample(x)
        return self.relu2(y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut around them: figure 5, right.

    The stride is on the 3x3 convolution, not on the 1x1 before it as in the paper: torchvision's
    "v1.5". Takes x[N, channels, H, W]; returns [N, 4 * width, H / stride, W / stride].
    """

    expansion: ClassVar[int] = 4

    def __init__(self, channels: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(channels, 4 * width, stride)
        self.relu3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.downsample(x)
        return self.relu3(y)


class ResNet(nn.Module):
    """A 7x7 convolution and max-pooling, four stages of residual blocks, one linear layer.

    He, Zhang, Ren and Sun, "Deep residual learning for image recognition" (2016), table 1.
    Parameters have torchvision's names and shapes.

    Takes x[N, in_channels, H, W]; returns logits [N, num_classes].

    Args:
        block: BasicBlock or Bottleneck.
        counts: number of blocks in each stage.
        width: width of the stem and of the first stage's 3x3 convolutions; each later stage doubles
            it.
        zero_init_residual: whether each block starts as only its shortcut (Goyal et al., "Accurate,
            large minibatch SGD", 2017, section 5.1).
        image_size: side of the expected images. Below 64 the stem is the one of section 4.2, made
            for 32x32: a 3x3 convolution of stride 1, without pooling.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        counts: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        width: int = 64,
        zero_init_residual: bool = False,
        image_size: int = 224,
    ):
        super().__init__()
        small = image_size < 64
        kernel, stride, padding = (3, 1, 1) if small else (7, 2, 3)
        self.conv1 = Conv2d(in_channels, width, kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else MaxPool2d(3, 2, 1)
        wide = block.expansion * width
        self.layer1 = _stage(block, width, width, counts[0], 1)
        self.layer2 = _stage(block, wide, 2 * width, counts[1], 2)
        self.layer3 = _stage(block, 2 * wide, 4 * width, counts[2], 2)
        self.layer4 = _stage(block, 4 * wide, 8 * width, counts[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * wide, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(layer, BasicBlock):
                nn.init.zeros_(layer.bn2.weight)
            elif zero_init_residual and isinstance(layer, Bottleneck):
                nn.init.zeros_(layer.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _shortcut(channels: int, width: int, stride: int) -> nn.Module:
    """The identity, or if the shape changes a 1x1 convolution: option B of the paper."""
    if stride == 1 and channels == width:
        return nn.Identity()
    convolution = Conv2d(channels, width, 1, stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width))


def _stage(
    block: type[BasicBlock] | type[Bottleneck], channels: int, width: int, count: int, stride: int
) -> nn.Sequential:
    """``count`` blocks, the first of which has ``stride``."""
    rest = [block(width * block.expansion, width) for _ in range(count - 1)]
    return nn.Sequential(block(channels, width, stride), *rest)


def resnet18(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """18 layers: 11,689,512 parameters, 3,628,146,688 FLOPs per image.

    ``options`` are ResNet's.
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels, **options)


def resnet34(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """34 layers: 21,797,672 parameters, 7,327,522,816 FLOPs per image.

    ``options`` are ResNet's.
    """
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, in_channels, **options)


def resnet50(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """50 layers, v1.5: 25,557,032 parameters, 8,178,368,512 FLOPs per image.

    ``options`` are ResNet's.
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, **options)


def resnet101(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """101 layers, v1.5: 44,549,160 parameters, 15,602,810,880 FLOPs per image.

    ``options`` are ResNet's.
    """
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, in_channels, **options)
