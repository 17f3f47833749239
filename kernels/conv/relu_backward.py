"""The first step of backward through a fused activation such as ReLU, whose gradient follows from
its result; and the sum that is the bias's gradient.
"""

import triton
import triton.language as tl
from torch import Tensor

from .. import device
from ..device import loop
from ..lang.epilogue import ACTIVATIONS
from ..lang.integers import decode_ints, decode_strides, encode_ints, operands, pixel, program
from ..lang.numerics import downcast, upcast
from ..lang.split_sum import channel_tiles, parts_like, split_sum


# The tiles per program depend on the batch, the channels do not.
@triton.jit(do_not_specialize=["tiles_per_program"])
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
    tiles_per_program,
    GRADIENT: tl.constexpr,  # of an Activation
    INT64_INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dz = GRADIENT(dy, y), and db[k] = sum of dz[n,k,p,q].

    One program writes ``tiles_per_program`` tiles of ROWS pixels by COLUMNS channels, and their
    part of db.
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
    for i in loop(tiles_per_program):
        n, p, q = pixel((part * tiles_per_program + i) * ROWS + tl.arange(0, ROWS), P, Q)
        mask = (n < N)[:, None] & (k < K)[None, :]
        at = n * dy_strides.n + p * dy_strides.h + q * dy_strides.w
        dy = tl.load(dy_ptr + (at[:, None] + (k * dy_strides.c)[None, :]), mask=mask, other=0.0)
        at = n * y_strides.n + p * y_strides.h + q * y_strides.w
        y = tl.load(y_ptr + (at[:, None] + (k * y_strides.c)[None, :]), mask=mask, other=0.0)
        dz = downcast(GRADIENT(dy, upcast(y, ACC)), dz_ptr.dtype.element_ty)
        at = n * dz_strides.n + p * dz_strides.h + q * dz_strides.w
        tl.store(dz_ptr + (at[:, None] + (k * dz_strides.c)[None, :]), dz, mask=mask)
        db += upcast(dz, ACC)
    if db_ptr is not None:
        db = downcast(tl.sum(db, axis=0), db_ptr.dtype.element_ty)
        tl.store(db_ptr + part * K + k, db, mask=k < K)


def relu_backward(
    dy: Tensor, y: Tensor, dz: Tensor, db: Tensor | None = None, activation: str = "relu"
) -> None:
    """dz[N,K,P,Q] = the gradient before an activation with result y, from the gradient dy after it.

    db[K], if there is one, is its sum: the gradient of a bias that was added before.
    """
    known = ACTIVATIONS[activation]
    assert known.of_result, activation
    N, K, P, Q = y.shape
    tiles = channel_tiles(y, N * P * Q, 4096, db is not None)
    parts = parts_like(db, tiles.parts)
    device.launch(
        relu_backward_kernel,
        (tiles.programs,),
        device=y.device,
        **operands(dy=dy, y=y, dz=dz),
        db_ptr=parts,
        sizes=encode_ints((N, P, Q)),
        K=K,
        tiles_per_program=tiles.per_program,
        GRADIENT=known.gradient,
        INT64_INDEX=device.int64_index(N * P * Q, dy, y, dz),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=tiles.warps,
    )
    split_sum(parts, db)
