"""An engine of one kernel: the example of docs/adding.md, where the rest of this file stands."""

from collections.abc import Iterator

import triton
import triton.language as tl

from kernels import device
from kernels.conv.engine import Engine, Fprop
from kernels.device import loop
from kernels.lang.epilogue import results, store_result
from kernels.lang.integers import (
    cdiv,
    decode_ints,
    decode_strides,
    encode_ints,
    operands,
    pixel,
    program,
)
from kernels.lang.numerics import dot
from kernels.problem import Problem
from kernels.tile import Block, Tile


@triton.jit
def pointwise_kernel(
    x_ptr,  # [N, C, P, Q]
    w_ptr,  # [K, C, 1, 1]
    result,  # a Result; y[N, K, P, Q]
    x_strides,  # n, c, p, q, encoded
    w_strides,  # k, c
    sizes,  # N, P, Q, encoded
    K,
    C,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64_INDEX: tl.constexpr,
    TILE: tl.constexpr,  # a Block
):
    """y[n,k,p,q] = act(sum over c of x[n,c,p,q] * w[k,c] + bias[k] + residual[n,k,p,q]).

    One program writes one rows x columns tile, accumulated in float32 (float64 for float64).
    """
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    DEPTH: tl.constexpr = TILE.depth
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    N, P, Q = decode_ints(sizes)
    x_strides = decode_strides(x_strides)
    w_k, w_c = w_strides
    bias_ptr, residual_ptr, residual_strides, y_ptr, y_strides = result

    pid = program(INT64_INDEX)
    column_tiles = tl.cdiv(K, COLUMNS)
    n, p, q = pixel(pid // column_tiles * ROWS + tl.arange(0, ROWS), P, Q)
    k = pid % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    row_mask = n < N
    k_mask = k < K
    x_rows = n * x_strides.n + p * x_strides.h + q * x_strides.w
    acc = tl.zeros((ROWS, COLUMNS), ACC)
    for first in loop(0, C, DEPTH):
        c = first + tl.arange(0, DEPTH)
        # [ROWS, DEPTH]
        mask = row_mask[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + (x_rows[:, None] + (c * x_strides.c)[None, :]), mask=mask, other=0.0)
        # [DEPTH, COLUMNS]
        mask = (c < C)[:, None] & k_mask[None, :]
        offsets = (c * w_c)[:, None] + (k * w_k)[None, :]
        w = tl.load(w_ptr + offsets, mask=mask, other=0.0)
        acc = dot(x, w, acc, PRECISION)
    masks = (row_mask, k_mask)
    result = bias_ptr, residual_ptr, residual_strides, y_ptr, y_strides
    store_result(acc, (n, p, q), k, masks, result, ACTIVATION)


def tiles(problem: Problem) -> Iterator[Tile]:
    """The one tile of pointwise convolutions of one group; none of others."""
    g = problem.g
    if problem.direction == "fprop" and g.pointwise and g.groups == 1 and g.C > 4:
        yield Tile(rows=32, columns=16, depth=16)


def fprop(call: Fprop, tile: Tile) -> None:
    """y[N,K,P,Q] = epilogue(conv(x, w))."""
    x, w, y, g = call.x, call.w, call.y, call.g
    pixels = g.N * g.P * g.Q
    device.launch(
        pointwise_kernel,
        (cdiv(pixels, tile.rows) * cdiv(g.K, tile.columns),),
        device=x.device,
        **operands(x=x),
        w_ptr=w,
        w_strides=w.stride()[:2],
        **results(call.epilogue, y),
        sizes=encode_ints((g.N, g.P, g.Q)),
        K=g.K,
        C=g.C,
        PRECISION=call.precision,
        INT64_INDEX=device.int64_index(pixels, x, w, call.epilogue.residual, y),
        TILE=Block.of(tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


ENGINE = Engine("pointwise", tiles=tiles, launchers={Fprop: fprop})
