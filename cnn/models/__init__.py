"""Networks, one file per family; each is built by a function of its name."""

from .lenet5 import LeNet5, lenet5

__all__ = ["LeNet5", "lenet5"]
