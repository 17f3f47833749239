"""Convolution, bias, ReLU and max-pooling in one kernel, for any geometry and any strides.

The map between convolution and pooling is never stored. One program computes a tile of pooled
pixels by channels: for each tap of the pooling window it forms the product of a convolution at the
pixels under that tap, and keeps the larger values and where they came from. Windows that do not
overlap cost no product more than the convolution alone; others form those of shared pixels anew.
What is kept for backward is one argmax per window: see ``pool_gradient``. Sizes and strides are in
elements.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import triton
import triton.language as tl

from .. import device
from ..conv.engine import PooledConv, PoolingEngine
from ..conv.pointer_tiles import pointer_tiles
from ..device import loop
from ..geometry import Pool2dGeometry
from ..lang.epilogue import PooledResult
from ..lang.integers import (
    cdiv,
    decode_ints,
    decode_strides,
    encode_ints,
    operands,
    pixel,
    program,
    within,
)
from ..lang.numerics import dot, downcast, fence_copies, upcast
from ..lang.reduction import reduction_block, reduction_tiles
from ..problem import Problem
from ..tile import Block, Tile, block_for


class _Window(NamedTuple):
    """What of a pooling the kernel is compiled for."""

    R: int
    S: int
    stride_h: int
    stride_w: int
    top: int
    left: int


@triton.jit
def conv_pool_kernel(
    x_ptr,  # [N, groups * C, H, W]
    w_ptr,  # [groups * K, C, R, S]
    result,  # a PooledResult; y[N, groups * K, PP, PQ]
    x_strides,  # n, c, h, w, encoded
    w_strides,  # k, c, r, s
    sizes,  # N, H, W, P, Q, PP, PQ, encoded
    reduction,  # groups, K, C, R, S; K and C of one group
    index_map,  # an IndexMap
    POOL: tl.constexpr,  # a _Window
    PRECISION: tl.constexpr,
    INT64_INDEX: tl.constexpr,
    TILE: tl.constexpr,  # a Block
):
    """y = max over a window of relu(conv(x, w) + bias), rounded to y's dtype before it is compared;
    argmax = the window's tap that won, or -1 where y is 0 by the ReLU.

    Of equal values the first wins, of several NaNs the last. Products are summed in float32
    (float64 for float64), in the order in which the convolution alone sums them.
    """
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    DEPTH: tl.constexpr = TILE.depth
    PACKED: tl.constexpr = TILE.packed
    TAPS: tl.constexpr = POOL.R * POOL.S
    bias_ptr, y_ptr, argmax_ptr, y_strides, argmax_strides = result
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    N, H, W, P, Q, PP, PQ = decode_ints(sizes)
    groups, K, C, R, S = reduction
    x_strides = decode_strides(x_strides)
    w_k, w_c, w_r, w_s = w_strides
    stride_h, origin_h, step_h, stride_w, origin_w, step_w = index_map

    pid = program(INT64_INDEX)
    column_tiles = tl.cdiv(K, COLUMNS)
    group = pid // column_tiles % groups
    row = pid // (column_tiles * groups) * ROWS + tl.arange(0, ROWS)
    n, pp, pq = pixel(row, PP, PQ)
    k = pid % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    k_mask = k < K
    k += group * K
    bias = tl.zeros((COLUMNS,), ACC)
    if bias_ptr is not None:
        bias = upcast(tl.load(bias_ptr + k, mask=k_mask, other=0.0), ACC)

    best = tl.full((ROWS, COLUMNS), float("-inf"), ACC)
    winner = tl.full((ROWS, COLUMNS), -1, tl.int32)
    for tap in loop(TAPS):
        p = pp * POOL.stride_h - POOL.top + tap // POOL.S
        q = pq * POOL.stride_w - POOL.left + tap % POOL.S
        row_mask = (n < N) & within(p, P) & within(q, Q)
        h0 = p * stride_h + origin_h
        w0 = q * stride_w + origin_w
        x_rows = group * C * x_strides.c + n * x_strides.n + h0 * x_strides.h + w0 * x_strides.w
        acc = tl.zeros((ROWS, COLUMNS), ACC)
        for i in loop(reduction_tiles(C, R, S, DEPTH, PACKED)):
            c, r, s, inside = reduction_block(i + (pid - pid), C, R, S, DEPTH, PACKED)
            h = h0[:, None] + r * step_h
            w = w0[:, None] + s * step_w
            # [ROWS, DEPTH]
            x_mask = (row_mask[:, None] & inside[None, :]) & within(h, H) & within(w, W)
            x_offsets = c * x_strides.c + r * step_h * x_strides.h
            x_offsets += s * step_w * x_strides.w
            x_offsets = x_rows[:, None] + x_offsets[None, :]
            x = tl.load(x_ptr + x_offsets, mask=x_mask, other=0.0)
            # [DEPTH, COLUMNS]
            w_mask = inside[:, None] & k_mask[None, :]
            w_offsets = c * w_c + (r * w_r + s * w_s)
            w_offsets = (k * w_k)[None, :] + w_offsets[:, None]
            filters = tl.load(w_ptr + w_offsets, mask=w_mask, other=0.0)
            fence_copies()
            acc = dot(x, filters, acc, PRECISION)
        value = upcast(downcast(acc + bias[None, :], DTYPE), ACC)
        wins = row_mask[:, None] & ((value > best) | (value != value))
        best = tl.where(wins, value, best)
        winner = tl.where(wins, tap, winner)

    masked = best <= 0
    mask = (n < N)[:, None] & k_mask[None, :]
    y_strides = decode_strides(y_strides)
    at = n * y_strides.n + pp * y_strides.h + pq * y_strides.w
    at = at[:, None] + (k * y_strides.c)[None, :]
    tl.store(y_ptr + at, downcast(tl.where(masked, 0.0, best), DTYPE), mask=mask)
    if argmax_ptr is not None:
        argmax_strides = decode_strides(argmax_strides)
        at = n * argmax_strides.n + pp * argmax_strides.h + pq * argmax_strides.w
        at = at[:, None] + (k * argmax_strides.c)[None, :]
        argmax = tl.where(masked, -1, winner).to(argmax_ptr.dtype.element_ty)
        tl.store(argmax_ptr + at, argmax, mask=mask)


def conv2d_relu_max_pool2d(call: PooledConv, tile: Tile) -> None:
    """y[N,K,PP,PQ] = max_pool(relu(conv(x, w) + bias)), and argmax."""
    x, w, y, argmax, g, pool = call.x, call.w, call.y, call.argmax, call.g, call.pool
    K, C = g.K // g.groups, g.C // g.groups
    windows = g.N * pool.P * pool.Q
    window = _Window(*pool.kernel, *pool.stride, *pool.padding)
    device.launch(
        conv_pool_kernel,
        (cdiv(windows, tile.rows) * cdiv(K, tile.columns) * g.groups,),
        device=y.device,
        **operands(x=x),
        w_ptr=w,
        result=tuple(PooledResult.of(call.bias, y, argmax)),
        w_strides=w.stride(),
        sizes=encode_ints((g.N, g.H, g.W, g.P, g.Q, pool.P, pool.Q)),
        reduction=(g.groups, K, C, g.R, g.S),
        index_map=tuple(g.index_map),
        POOL=window,
        PRECISION=call.precision,
        INT64_INDEX=device.int64_index(windows, x, w, y),
        TILE=Block.of(tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def tiles(problem: Problem, pool: Pool2dGeometry) -> Iterator[Tile]:
    """Of the tiles of engine 1 that leave registers for the largest values so far and their taps,
    the one that wastes least.
    """
    g, device = problem.g, problem.device
    known = list(pointer_tiles(problem))
    if device.backend == "interpreter":
        yield replace(known[0], rows=block_for(g.N * pool.P * pool.Q, known[0].rows))
        return
    known = [tile for tile in known if tile.rows * tile.columns <= 2**10 * tile.warps]
    yield min(known, key=lambda tile: _waste(g.K // g.groups, tile))


def _waste(channels: int, tile: Tile) -> tuple[float, int]:
    """How much of a tile's columns is beyond the channels, then how small it is."""
    taken = cdiv(channels, tile.columns) * tile.columns
    return taken / channels, -tile.rows * tile.columns


ENGINE = PoolingEngine("implicit_gemm", tiles=tiles, launch=conv2d_relu_max_pool2d)
