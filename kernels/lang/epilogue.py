"""What is done to a finished tile while it is still in registers: bias, residual, ReLU.

``y = relu(acc + bias + residual)``, rounded once, to the result's dtype. Backward, y is its own
mask, so nothing more is kept of it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .integers import (
    decode_strides,
    encode_strides,
    pointers,
)
from .numerics import downcast, upcast


class Epilogue(NamedTuple):
    """What is done to a result before it is stored: relu?(scale * y + bias + residual)."""

    bias: Tensor | None = None  # [K]
    residual: Tensor | None = None  # like y
    relu: bool = False
    scale: Tensor | None = None  # [K], float32


@triton.jit
def relu(tile):
    """max(tile, 0), where NaN stays NaN as in torch; tl.maximum would drop it."""
    return tl.where(tile < 0, 0.0, tile)


@triton.jit
def finish(
    tile,
    bias_ptr,
    columns,
    columns_mask,
    residual_ptr,
    residual_offsets,
    mask,
    RELU: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """relu?(tile + bias[column] + residual) in DTYPE, of a [pixels, channels] accumulator tile.

    ``columns`` are the channels of the tile's columns; ``residual_offsets`` and ``mask`` have the
    tile's shape. A pointer that is None takes no part.
    """
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns_mask, other=0.0)
        tile += upcast(bias, tile.dtype)[None, :]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + residual_offsets, mask=mask, other=0.0)
        tile += upcast(residual, tile.dtype)
    if RELU:
        tile = relu(tile)
    return downcast(tile, DTYPE)


@triton.jit
def store_result(acc, at, k, masks, bias_ptr, residual_ptr, y_ptr, strides, RELU: tl.constexpr):
    """Finish the accumulators of pixels at = (n, p, q) and channels k, and store them to y.

    ``masks`` are those of the pixels and of the channels; ``strides``, those of the residual and
    of y, are encoded.
    """
    n, p, q = at
    pixel_mask, k_mask = masks
    residual_strides, y_strides = strides
    mask = pixel_mask[:, None] & k_mask[None, :]
    residual_offsets = 0
    if residual_ptr is not None:
        residual_strides = decode_strides(residual_strides)
        offsets = n * residual_strides.n + p * residual_strides.h + q * residual_strides.w
        residual_offsets = offsets[:, None] + (k * residual_strides.c)[None, :]
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    y = finish(acc, bias_ptr, k, k_mask, residual_ptr, residual_offsets, mask, RELU, DTYPE)
    y_strides = decode_strides(y_strides)
    offsets = n * y_strides.n + p * y_strides.h + q * y_strides.w
    tl.store(y_ptr + (offsets[:, None] + (k * y_strides.c)[None, :]), y, mask=mask)


def results(epilogue: Epilogue, y: Tensor) -> dict[str, Any]:
    """A kernel's arguments, by name, for what ``store_result`` takes."""
    bias, residual, relu, _ = epilogue
    strides = tuple([encode_strides(t) for t in (y if residual is None else residual, y)])
    tensors = pointers(bias=bias, residual=residual, y=y)
    return {**tensors, "y_strides": strides, "RELU": relu}
