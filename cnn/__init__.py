"""Drop-in layers, functions and models that run on the Triton kernels of ``kernels``.

Importing this touches no GPU and compiles nothing.
"""

from importlib import import_module
from typing import Any

from kernels.autotune import enabled as autotune
from kernels.device import warm_up

from . import functional, models
from .conversion import convert, revert
from .exporting import export, export_onnx
from .layers import Conv2d, ConvReLU2d, ConvReLUMaxPool2d, ConvTranspose2d, MaxPool2d, MaxUnpool2d
from .summaries import summary

__version__ = "0.1.0"
"""The one version number: packages, checkpoints and ``python -m cnn --version`` read it."""

__all__ = [
    "Conv2d",
    "ConvReLU2d",
    "ConvReLUMaxPool2d",
    "ConvTranspose2d",
    "MaxPool2d",
    "MaxUnpool2d",
    "autotune",
    "convert",
    "export",
    "export_onnx",
    "functional",
    "models",
    "revert",
    "summary",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    """Import on first access: these need more than a network does."""
    if name in ("compile_backend", "visualize"):
        return import_module(f"cnn.{name}")
    if name == "load":
        return import_module("cnn.training.trained").load
    if name == "compile_report":
        return import_module("cnn.compile_backend").compile_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
