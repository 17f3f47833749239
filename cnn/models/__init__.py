"""Networks, one file per family, each built by a function of its name.

``list`` returns their names and ``create`` builds one by its name. FLOPs in docstrings count a
multiply-add as two, and only convolutions and linear layers, as FlopCounterMode does. Unless stated
otherwise they are for one image of 3x224x224 and 1,000 classes.

Example:
    >>> model = cnn.models.resnet18(num_classes=10, image_size=32)
    >>> model(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
"""

import builtins
from typing import Any

from torch import nn

from ..text import meant
from .alexnet import AlexNet, alexnet
from .classifier import reset_classifier
from .hed import vgg16_hed
from .lenet5 import LeNet5, lenet5
from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101
from .vgg import VGG, vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn
from .vgg_small import VGGSmall, vgg_small
from .zfnet import ZFNet, zfnet

__all__ = [
    "VGG",
    "AlexNet",
    "LeNet5",
    "ResNet",
    "VGGSmall",
    "ZFNet",
    "alexnet",
    "create",
    "lenet5",
    "list",
    "reset_classifier",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg16_hed",
    "vgg19",
    "vgg19_bn",
    "vgg_small",
    "zfnet",
]

_BUILDERS = {
    builder.__name__: builder
    for builder in (
        *(alexnet, lenet5, resnet18, resnet34, resnet50, resnet101),
        *(vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn, vgg_small, zfnet),
    )
}


def list() -> builtins.list[str]:
    """The names of all networks, sorted.

    Example:
        >>> cnn.models.list()[:3]
        ['alexnet', 'lenet5', 'resnet101']
    """
    return sorted(_BUILDERS)


def create(name: str, **options: Any) -> nn.Module:
    """A newly initialized network by its name; ``options`` are its builder's.

    Every builder takes ``num_classes``, ``in_channels`` and ``image_size``. Networks made for
    224x224 pixels have a variant for small images. Raises ValueError for an unknown name.

    Example:
        >>> model = cnn.models.create("lenet5", num_classes=10, in_channels=1)
        >>> model(torch.randn(2, 1, 32, 32)).shape
        torch.Size([2, 10])
    """
    if name not in _BUILDERS:
        known = ", ".join(list())
        raise ValueError(f"name must be one of {known}, got name={name!r}{meant(name, list())}")
    return _BUILDERS[name](**options)
