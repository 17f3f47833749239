"""What is done to a finished tile while it is still in registers: bias, residual, ReLU.

``y = relu(acc + bias + residual)``, rounded once, to the result's dtype. Backward, y is its own
mask, so nothing more is kept of it.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import device
from .device import loop
from .engine import Epilogue
from .indexing import (
    decode_ints,
    decode_strides,
    downcast,
    encode_ints,
    encode_strides,
    operands,
    pixel,
    pointers,
    program,
    upcast,
)
from .split_sum import channel_walk, parts_like, split_sum


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


# The number of turns follows the batch, unlike that of the channels.
@triton.jit(do_not_specialize=["turns"])
def relu_backward_kernel(
    dy_ptr,
    y_ptr,
    dz_ptr,
    db_ptr,  # [parts, K] or None
    dy_strides,  # n, k, p, q, encoded; so are the others
    y_strides,
    dz_strides,
    sizes,  # N, P, Q, encoded
    K,
    turns,
    INT64_INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dz = 0 where y <= 0, else dy, and db[k] = sum of dz[n,k,p,q].

    A NaN in y passes dy on, and a masked infinity gives 0. One program writes ``turns`` tiles of
    ROWS pixels by COLUMNS channels, and their part of db.
    """
    N, P, Q = decode_ints(sizes)
    dy_strides = decode_strides(dy_strides)
    y_strides = decode_strides(y_strides)
    dz_strides = decode_strides(dz_strides)
    pid = program(INT64_INDEX)
    column_tiles = tl.cdiv(K, COLUMNS)
    part = pid // column_tiles
    k = pid % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    ACC: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    db = tl.zeros((ROWS, COLUMNS), ACC)
    for i in loop(turns):
        n, p, q = pixel((part * turns + i) * ROWS + tl.arange(0, ROWS), P, Q)
        mask = (n < N)[:, None] & (k < K)[None, :]
        at = n * dy_strides.n + p * dy_strides.h + q * dy_strides.w
        dy = tl.load(dy_ptr + (at[:, None] + (k * dy_strides.c)[None, :]), mask=mask, other=0.0)
        at = n * y_strides.n + p * y_strides.h + q * y_strides.w
        y = tl.load(y_ptr + (at[:, None] + (k * y_strides.c)[None, :]), mask=mask, other=0.0)
        dz = tl.where(upcast(y, ACC) <= 0, 0.0, dy)
        at = n * dz_strides.n + p * dz_strides.h + q * dz_strides.w
        tl.store(dz_ptr + (at[:, None] + (k * dz_strides.c)[None, :]), dz, mask=mask)
        db += upcast(dz, ACC)
    if db_ptr is not None:
        db = downcast(tl.sum(db, axis=0), db_ptr.dtype.element_ty)
        tl.store(db_ptr + part * K + k, db, mask=k < K)


def relu_backward(dy: Tensor, y: Tensor, dz: Tensor, db: Tensor | None = None) -> None:
    """dz[N,K,P,Q] = the gradient before a ReLU with output y, from the gradient dy after it.

    db[K], if there is one, is its sum: the gradient of a bias that was added before the ReLU.
    """
    N, K, P, Q = y.shape
    walk = channel_walk(y, N * P * Q, 4096, db is not None)
    parts = parts_like(db, walk.parts)
    device.launch(
        relu_backward_kernel,
        (walk.programs,),
        device=y.device,
        **operands(dy=dy, y=y, dz=dz),
        db_ptr=parts,
        sizes=encode_ints((N, P, Q)),
        K=K,
        turns=walk.turns,
        INT64_INDEX=device.int64_index(N * P * Q, dy, y, dz),
        ROWS=walk.rows,
        COLUMNS=walk.columns,
        num_warps=walk.warps,
    )
    split_sum(parts, db)
