"""Networks, one file per family; each is built by a function of its name.

``list`` names them and ``create`` builds one by its name.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from .lenet5 import LeNet5, lenet5
from .vgg import VGG, vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn

__all__ = [
    "VGG",
    "LeNet5",
    "create",
    "lenet5",
    "list",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
]

_BUILDERS = {
    builder.__name__: builder
    for builder in (lenet5, vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn)
}


def list() -> Sequence[str]:
    """The names of all networks, sorted."""
    return sorted(_BUILDERS)


def create(name: str, **options: Any) -> nn.Module:
    """A freshly initialised network by its name; ``options`` are its builder's.

    Raises ValueError for an unknown name.
    """
    if name not in _BUILDERS:
        raise ValueError(f"there is no model {name!r}; there are {', '.join(list())}")
    return _BUILDERS[name](**options)
