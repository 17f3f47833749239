"""``functional``'s own functions, composed of torch's: on a CPU without kernels, and for export."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kernels import device
from kernels._private import is_exporting

from .arguments import (
    PRECISIONS,
    check_bytes,
    check_choice,
    check_dtypes,
    check_residual,
    check_scale,
    check_tensor,
    convolution,
)
from .autocast import autocast

_exports_operators = False


@contextmanager
def exported_operators() -> Iterator[None]:
    """Within this context ``torch.export`` finds this library's operators, not torch's."""
    global _exports_operators
    outer, _exports_operators = _exports_operators, True
    try:
        yield
    finally:
        _exports_operators = outer


def is_torchs(input: Any) -> bool:
    """Whether a call is torch's own affair: it is exported, or on a CPU that runs no kernels."""
    if is_exporting():
        return not _exports_operators
    return isinstance(input, Tensor) and input.is_cpu and not device.takes_cpu()


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    precision: str | None = None,
    scale: Tensor | None = None,
    normalise: tuple[Any, Any] | None = None,
) -> Tensor:
    """``functional.conv2d``, whose ``precision`` has no say: torch's setting has."""
    check_choice("activation", activation, ("relu",))
    check_choice("precision", precision, PRECISIONS)
    call = input, weight, bias, stride, padding, dilation, groups
    beyond_torch = isinstance(padding, str) and padding == "full"
    if residual is None and scale is None and normalise is None and not beyond_torch:
        y = torch.conv2d(*call)
    else:
        y = _beyond_torch(*call, residual, scale, normalise)
    # In place, as a convolution does not need its result for backward.
    return y if activation is None else y.relu_()


def _beyond_torch(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    residual: Tensor | None,
    scale: Tensor | None,
    normalise: Any,
) -> Tensor:
    """The convolution and its sum, of arguments that torch's has not."""
    check_tensor("input", input)
    check_tensor("weight", weight)
    check_tensor("bias", bias, optional=True)
    check_tensor("residual", residual, optional=True)
    check_tensor("scale", scale, optional=True)
    g = convolution(input, weight, bias, stride, padding, dilation, groups)
    if padding == "full":
        padding = g.padding[0], g.padding[2]
    geometry = stride, padding, dilation, groups
    check_residual(residual, input, weight, g.size)
    if scale is not None:
        check_scale(scale, weight.shape[0], input, weight, bias, residual)
        return _float8(input, weight, bias, geometry, residual, scale)
    if normalise is not None:
        if residual is not None:
            raise NotImplementedError("a convolution of bytes takes no residual, got one")
        factor, shift = check_bytes(input, weight, g.groups, normalise)
        input = (input * factor[:, None, None] + shift[:, None, None]).to(weight.dtype)
    y = torch.conv2d(input, weight, bias, *geometry)
    if residual is None:
        return y
    _, addend = autocast(y, residual)
    check_dtypes(y, residual=addend)
    return y + addend


def _float8(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple,
    residual: Tensor | None,
    scale: Tensor,
) -> Tensor:
    with torch.autocast(input.device.type, enabled=False):
        y = torch.conv2d(input.float(), weight.float(), None, *geometry)
    y = y * scale.expand(weight.shape[0])[:, None, None]
    if bias is not None:
        y = y + bias[:, None, None]
    if residual is not None:
        y = y + residual
    return y.to(torch.bfloat16)


def conv2d_relu_max_pool2d(
    *args: Any,
    pool_kernel_size: Any,
    pool_stride: Any = None,
    pool_padding: Any = 0,
    **kwargs: Any,
) -> Tensor:
    """``functional.conv2d_relu_max_pool2d``."""
    y = conv2d(*args, activation="relu", **kwargs)
    steps = () if pool_stride is None else pool_stride
    return torch.max_pool2d(y, pool_kernel_size, steps, pool_padding)
