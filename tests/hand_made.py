"""Small networks in the manner of well-known ones, of torch's own layers, for tests of conversion.

Each takes images [N, 3, 16, 16].
"""

import copy

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import cnn


class VGG(nn.Sequential):
    """Nothing but a chain; the classifier's dropout is off, for the sake of comparison."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.ReLU()),
            nn.Identity(),
            nn.MaxPool2d(3, 2, 1),
            nn.Flatten(),
            nn.Dropout(0),
            nn.Linear(96, 5),
        )


class _Residual(nn.Module):
    def __init__(self, entering: int, leaving: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(entering, leaving, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(leaving)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(leaving, leaving, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(leaving)
        self.downsample = None
        if stride > 1 or entering != leaving:
            shortcut = nn.Conv2d(entering, leaving, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(leaving))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """Residual blocks, in each of which one ReLU serves twice."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(_Residual(4, 4), _Residual(4, 6, 2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer1(x))
        return self.fc(torch.flatten(x, 1))


class _InvertedResidual(nn.Module):
    def __init__(self, channels: int, stride: int, activation: type[nn.Module]):
        super().__init__()
        self.use_shortcut = stride == 1
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1, bias=False),
            nn.BatchNorm2d(2 * channels),
            activation(),
            nn.Conv2d(2 * channels, 2 * channels, 3, stride, 1, groups=2 * channels, bias=False),
            nn.BatchNorm2d(2 * channels),
            activation(),
            nn.Conv2d(2 * channels, channels, 1),
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 2, 1), nn.ReLU(), nn.Conv2d(2, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        y = y * TF.hardsigmoid(self.squeeze(y))
        return x + y if self.use_shortcut else y


class MobileNet(nn.Module):
    """Depthwise layers, squeezes, ReLU6 and Hardswish."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1),
            nn.Hardswish(),
            _InvertedResidual(4, 1, nn.ReLU6),
            _InvertedResidual(4, 2, nn.Hardswish),
        )
        self.classifier = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class _DenseLayer(nn.Module):
    def __init__(self, entering: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(entering)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(entering, 2, 3, padding=1)

    def forward(self, *features: Tensor) -> Tensor:
        return self.conv(self.relu(self.norm(torch.cat(features, 1))))


class Inception(nn.Module):
    """Branches and dense connections, concatenated; functions beside modules."""

    def __init__(self):
        super().__init__()
        self.branch1 = nn.Conv2d(3, 2, 1)
        self.branch3 = nn.Sequential(
            nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, (1, 3), padding=(0, 1)), nn.ReLU()
        )
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.project = nn.Conv2d(3, 2, 1)
        self.dense = nn.ModuleDict({f"layer{i}": _DenseLayer(8 + 2 * i) for i in range(2)})
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x)
        branches = [TF.relu(self.branch1(x)), self.branch3(x), self.project(pooled).relu()]
        features = [torch.cat(branches, dim=1)]
        for _, layer in self.dense.items():
            features.append(layer(torch.cat(features, 1)))
        x = TF.max_pool2d(torch.cat(features, 1), 2)
        return self.head(x).mean((2, 3))


class DeepLab(nn.Module):
    """Dilated branches, upsampling by the input's size, and a head for training alone."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU())
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 2, 3, padding=d, dilation=d), nn.ReLU()) for d in (1, 2, 4)
        )
        self.image = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.ReLU())
        self.project = nn.Conv2d(8, 4, 1)
        self.relu = nn.ReLU()
        self.head = nn.Conv2d(4, 3, 1)
        self.auxiliary = nn.Sequential(nn.Conv2d(4, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 3, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size = x.shape[-2:]
        features = self.backbone(x)
        found = [branch(features) for branch in self.branches]
        image = self.image(features)
        found.append(TF.interpolate(image, features.shape[-2:], mode="nearest"))
        y = self.head(self.relu(self.project(torch.cat(found, 1))))
        out = {"out": TF.interpolate(y, size, mode="bilinear", align_corners=False)}
        if self.training:
            out["aux"] = self.auxiliary(features)
        return out


class _Double(nn.Sequential):
    def __init__(self, entering: int, leaving: int):
        super().__init__(
            nn.Conv2d(entering, leaving, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(leaving, leaving, 3, padding=1),
            nn.ReLU(),
        )


class _Up(nn.Module):
    """Whether to pad follows from sizes, so no trace passes through it."""

    def __init__(self, channels: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels // 2, 2, 2)
        self.conv = _Double(channels, channels // 2)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.up(x)
        if skip is None:
            return x
        if x.shape[-2:] != skip.shape[-2:]:
            x = TF.interpolate(x, skip.shape[-2:])
        return self.conv(torch.cat([skip, x], dim=1))


class UNet(nn.Module):
    """What is pooled is read once more, by a skip connection."""

    def __init__(self):
        super().__init__()
        self.inner = _Double(3, 4)
        self.pool = nn.MaxPool2d(2)
        self.bottom = _Double(4, 8)
        self.up = _Up(8)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.inner(x)
        return self.head(self.up(self.bottom(self.pool(skip)), skip))


class SegNet(nn.Module):
    """Poolings that give indices, which are unpooled by."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2, 2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2, 2)
        self.decode = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, indices = self.pool(self.relu(self.encode(x)))
        return self.decode(self.unpool(x, indices))


class FPN(nn.Module):
    """A backbone for detection: maps of several sizes by name."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, k, 3, 2, 1), nn.BatchNorm2d(k), nn.ReLU())
            for c, k in ((3, 4), (4, 6), (6, 8))
        )
        self.lateral = nn.ModuleList(nn.Conv2d(c, 4, 1) for c in (4, 6, 8))
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(3)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        found = [layer(y) for layer, y in zip(self.lateral, found, strict=True)]
        for i in range(len(found) - 1, 0, -1):
            found[i - 1] = found[i - 1] + TF.interpolate(found[i], scale_factor=2.0)
        return {f"p{i}": layer(found[i]) for i, layer in enumerate(self.smooth)}


class _Shuffle(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.groups = groups
        self.reduce = nn.Conv2d(channels, channels, 1, groups=groups)
        self.relu = nn.ReLU(inplace=True)
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        kept, x = x.chunk(2, dim=1)
        x = self.spatial(self.relu(self.reduce(x)))
        x = torch.cat((kept, x), 1)
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleNet(nn.Sequential):
    """Grouped layers between which channels change places."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            _Shuffle(4, 2),
            _Shuffle(4, 2),
            nn.ChannelShuffle(2),
            nn.AvgPool2d(4),
            nn.Flatten(),
        )


class _ChannelsFirstNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return super().forward(x).permute(0, 3, 1, 2)


class _ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 2 * channels)
        self.project = nn.Linear(2 * channels, channels)
        self.gamma = nn.Parameter(0.1 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.project(TF.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """LayerNorm over permuted channels, and a patch stem."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 4, 4), _ChannelsFirstNorm(4))
        self.blocks = nn.Sequential(_ConvNeXtBlock(4), _ConvNeXtBlock(4))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean([-2, -1]))


MODELS = (*(VGG, ResNet, MobileNet, Inception, DeepLab, UNet, SegNet, FPN, ShuffleNet, ConvNeXt),)


def fused(chain: nn.Sequential) -> nn.Sequential:
    """A copy in which a convolution does what the ReLU and the MaxPool2d after it do, and these do
    nothing.
    """
    chain = copy.deepcopy(chain)
    for i, conv in enumerate(chain):
        relu, pool = [*chain, None, None][i + 1 : i + 3]
        if (
            isinstance(conv, nn.Conv2d)
            and isinstance(relu, nn.ReLU)
            and isinstance(pool, nn.MaxPool2d)
        ):
            layer = cnn.ConvReLUMaxPool2d(
                *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding),
                pool_kernel_size=pool.kernel_size,
                pool_stride=pool.stride,
            )
            layer.to(conv.weight).load_state_dict(conv.state_dict())
            chain[i], chain[i + 1], chain[i + 2] = layer, nn.Identity(), nn.Identity()
    return chain
