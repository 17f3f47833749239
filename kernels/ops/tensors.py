"""What operators make of tensors: memory for results, and operands as kernels take them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import replay
from ..device import describe
from ..geometry import dense_strides, is_channels_last, output_strides


def channels_last(*tensors: Tensor) -> bool:
    """Whether one of the tensors at least is in channels_last."""
    return any(is_channels_last(t.shape, t.stride()) for t in tensors)


def new(like: Tensor, shape: Sequence[int], last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for images, in channels_last or contiguous, on like's device and by default in its
    dtype.
    """
    return replay.new(like, shape, output_strides(shape, last), dtype)


def new_like(t: Tensor, dtype: torch.dtype | None = None, wanted: bool = True) -> Tensor:
    """Memory of t's shape, that lies as t does; without elements if it is not wanted."""
    if not wanted:
        return new_vector(t, 0, dtype)
    return replay.new(t, t.shape, dense_strides(t.shape, t.stride()), dtype)


def new_filters(like: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Memory for the gradient of filters of such a shape and strides."""
    return replay.new(like, shape, dense_strides(shape, strides))


def new_vector(like: Tensor, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for ``size`` elements; for none, in place of a result that is not wanted."""
    return replay.new(like, (size,), (1,), dtype)


def packed(w: Tensor, images: Sequence[Tensor | None]) -> Tensor:
    """w, copied with its channels side by side if the images have theirs so: it is small, and
    gathering it is not.
    """
    rows = all(t is None or t.stride(1) == 1 for t in images)
    if w.stride(1) == 1 or not rows or not describe(w.device).descriptors:
        return w
    return replay.derive(w, partial(Tensor.contiguous, memory_format=torch.channels_last))


def resolve_precision(precision: str | None, x: Tensor) -> str:
    """How float32 products are made: as asked, else as torch's own convolution is set to.

    AMD's gfx942 has tf32 but no split of it: bf16x6, as accurate, stands for tf32x3 there.
    """
    if x.dtype != torch.float32 or describe(x.device).backend == "interpreter":
        return "ieee"
    if precision is None:
        cudnn: Any = torch.backends.cudnn  # its settings are not in the stubs
        precision = "tf32" if cudnn.conv.fp32_precision == "tf32" else "ieee"
    if torch.version.hip:
        precision = "bf16x6" if precision == "tf32x3" else precision
        known = precision != "tf32" or describe(x.device).arch == "gfx942"
        return precision if known else "ieee"
    return precision
