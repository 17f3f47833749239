"""What is done to a finished tile while it is still in registers: bias, residual, activation.

``y = activation(acc + bias + residual)``, rounded once, to the result's dtype. An activation is a
jitted function, which a kernel takes as a ``tl.constexpr``; its gradient stands beside it. A kernel
without an activation pays nothing for it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .integers import decode_strides, encode_strides
from .numerics import downcast, upcast


@triton.jit
def relu(tile):
    """max(tile, 0), where NaN stays NaN as in torch; tl.maximum would drop it."""
    return tl.where(tile < 0, 0.0, tile)


@triton.jit
def relu_gradient(dy, y):
    """dy where y > 0, else 0: also of an infinite dy. A NaN in y passes dy on."""
    return tl.where(y <= 0, 0.0, dy)


class Activation(NamedTuple):
    """An elementwise function of a tile before it is stored, and its gradient: both are jitted."""

    function: Any  # of a tile in float32 (float64 for float64)
    gradient: Any  # of dy in its own dtype, and of y, or the function's argument, in float32
    of_result: bool  # whether it is of y: then nothing else is kept for it


ACTIVATIONS: dict[str, Activation] = {"relu": Activation(relu, relu_gradient, of_result=True)}
"""By the name that operators know them by."""


class Epilogue(NamedTuple):
    """What is done to a result before it is stored: activation(scale * y + bias + residual)."""

    bias: Tensor | None = None  # [K]
    residual: Tensor | None = None  # like y
    activation: str | None = None  # one of ACTIVATIONS
    scale: Tensor | None = None  # [K], float32

    @property
    def function(self) -> Any:
        """The activation as a kernel takes it; None for none."""
        return self.activation and ACTIVATIONS[self.activation].function


class Result(NamedTuple):
    """What ``store_result`` takes. A kernel has it as one argument, a plain tuple.

    It must unpack it before its loop: after one, Triton 3.6 forgets constants in nested tuples.
    """

    bias: Tensor | None
    residual: Tensor | None
    residual_strides: tuple[int, ...] | None  # n, k, p, q, encoded
    y: Tensor
    y_strides: tuple[int, ...]  # n, k, p, q, encoded


def results(epilogue: Epilogue, y: Tensor) -> dict[str, Any]:
    """A kernel's arguments, by name, for what ``store_result`` takes."""
    bias, residual, _, _ = epilogue
    strides = None if residual is None else encode_strides(residual)
    result = Result(bias, residual, strides, y, encode_strides(y))
    return {"result": tuple(result), "ACTIVATION": epilogue.function}


@triton.jit
def finish(
    tile,
    bias_ptr,
    columns,
    columns_mask,
    residual_ptr,
    residual_offsets,
    mask,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """activation(tile + bias[column] + residual) in DTYPE, of a [pixels, channels] accumulator.

    ``columns`` are the channels of the tile's columns; ``residual_offsets`` and ``mask`` have the
    tile's shape. What is None takes no part.
    """
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns_mask, other=0.0)
        tile += upcast(bias, tile.dtype)[None, :]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + residual_offsets, mask=mask, other=0.0)
        tile += upcast(residual, tile.dtype)
    if ACTIVATION is not None:
        tile = ACTIVATION(tile)
    return downcast(tile, DTYPE)


@triton.jit
def store_result(acc, at, k, masks, result, ACTIVATION: tl.constexpr):
    """Finish the accumulators of pixels at = (n, p, q) and channels k, and store them to y.

    ``masks`` are those of the pixels and of the channels, ``result`` is a Result.
    """
    n, p, q = at
    pixel_mask, k_mask = masks
    bias_ptr, residual_ptr, residual_strides, y_ptr, y_strides = result
    mask = pixel_mask[:, None] & k_mask[None, :]
    residual_offsets = 0
    if residual_ptr is not None:
        residual_strides = decode_strides(residual_strides)
        offsets = n * residual_strides.n + p * residual_strides.h + q * residual_strides.w
        residual_offsets = offsets[:, None] + (k * residual_strides.c)[None, :]
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    y = finish(acc, bias_ptr, k, k_mask, residual_ptr, residual_offsets, mask, ACTIVATION, DTYPE)
    y_strides = decode_strides(y_strides)
    offsets = n * y_strides.n + p * y_strides.h + q * y_strides.w
    tl.store(y_ptr + (offsets[:, None] + (k * y_strides.c)[None, :]), y, mask=mask)


class PooledResult(NamedTuple):
    """What a kernel that pools its map writes, with the bias before the ReLU: a plain tuple, too.

    The ReLU is no argument: keys and argmax hold it.
    """

    bias: Tensor | None
    y: Tensor
    argmax: Tensor | None
    y_strides: tuple[int, ...]  # n, k, p, q, encoded
    argmax_strides: tuple[int, ...] | None

    @classmethod
    def of(cls, bias: Tensor | None, y: Tensor, argmax: Tensor | None) -> "PooledResult":
        strides = None if argmax is None else encode_strides(argmax)
        return cls(bias, y, argmax, encode_strides(y), strides)
