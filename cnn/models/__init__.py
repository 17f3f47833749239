"""Networks, one file per family; each is built by a function of its name.

``list`` names them and ``create`` builds one by its name. Where a docstring tells FLOPs, a
multiplication and an addition count as two, those of convolutions and linear layers alone, as in
FlopCounterMode; unless it says else, for one image of 3x224x224 and 1,000 classes.
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
    """The names of all networks, sorted."""
    return sorted(_BUILDERS)


def create(name: str, **options: Any) -> nn.Module:
    """A freshly initialised network by its name; ``options`` are its builder's.

    Each takes ``num_classes``, ``in_channels`` and ``image_size``, for which networks that were
    made for 224x224 pixels have a form for small images. Raises ValueError for an unknown name.
    """
    if name not in _BUILDERS:
        known = ", ".join(list())
        raise ValueError(f"name must be one of {known}, got name={name!r}{meant(name, list())}")
    return _BUILDERS[name](**options)
