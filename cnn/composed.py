"""``functional``'s additions to torch, composed of torch's functions: for CPUs without kernels and
for export.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kernels import device
from kernels._private import is_exporting

from .arguments import check_dtypes
from .autocast import autocast

_exports_operators = False


@contextmanager
def exported_operators() -> Iterator[None]:
    """A context in which ``torch.export`` keeps this library's operators instead of torch's."""
    global _exports_operators
    outer, _exports_operators = _exports_operators, True
    try:
        yield
    finally:
        _exports_operators = outer


def is_torchs(input: Any) -> bool:
    """Whether torch handles a call: during export, or on a CPU that runs no kernels."""
    if is_exporting():
        return not _exports_operators
    return isinstance(input, Tensor) and input.is_cpu and not device.takes_cpu()


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple,
    residual: Tensor | None,
    scale: Tensor | None,
    constants: tuple[Tensor, ...],
) -> Tensor:
    """``functional.conv2d``, without the activation, for arguments that torch's lacks. For uint8
    input ``constants`` are its scale and shift.
    """
    if scale is not None:
        with torch.autocast(input.device.type, enabled=False):
            y = torch.conv2d(input.float(), weight.float(), None, *geometry)
        y = y * scale.expand(weight.shape[0])[:, None, None]
        y = y if bias is None else y + bias[:, None, None]
        return (y if residual is None else y + residual).to(torch.bfloat16)
    if constants:
        factor, shift = constants
        input = (input * factor[:, None, None] + shift[:, None, None]).to(weight.dtype)
    y = torch.conv2d(input, weight, bias, *geometry)
    if residual is None:
        return y
    _, addend = autocast(y, residual)
    check_dtypes(y, residual=addend)
    return y + addend
