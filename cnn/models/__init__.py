"""Networks, one file per family; each is built by a function of its name."""

import builtins
from typing import Any

from torch import nn

from .lenet5 import LeNet5, lenet5
from .vgg_small import VGGSmall, vgg_small

__all__ = ["LeNet5", "VGGSmall", "create", "lenet5", "list", "vgg_small"]

_BUILDERS = {"lenet5": lenet5, "vgg_small": vgg_small}


def list() -> builtins.list[str]:
    """The names of the networks."""
    return sorted(_BUILDERS)


def create(name: str, **options: Any) -> nn.Module:
    """Build the network ``name`` with its function's options."""
    if name not in _BUILDERS:
        raise ValueError(f"name must be one of {', '.join(list())}, got name={name!r}")
    return _BUILDERS[name](**options)
