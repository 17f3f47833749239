"""Backward of ReLU and max-pool from dy and one argmax per window alone, without the map: a kernel
of its own, and a load for other kernels.

``argmax[n,k,pp,pq]`` is the tap ``r * S + s`` of the window's pixel that won; any other value, as
255 in uint8 or -1 in int16, stands for a window without gradient: its maximum was not above zero,
or it holds no pixel. So they hold the mask of a ReLU between map and pooling, too. The gradient of
a pixel is the sum of dy over the windows that it won, in the order of pp and pq, in float32
(float64 for float64), rounded once, to dy's dtype. Sizes and strides are in elements.
"""

from math import prod
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import device
from ..device import loop
from ..geometry import Pair, Pool2dGeometry
from ..lang.integers import (
    cdiv,
    decode_ints,
    decode_strides,
    encode_ints,
    encode_strides,
    operands,
    pixel,
    program,
    within,
)
from ..lang.numerics import downcast, upcast
from ..lang.split_sum import ChannelTiles, channel_tiles, parts_like, split_sum

_UNROLLED = 36  # windows times pixels, at most, for loops over them to be unrolled


class PoolGradient(NamedTuple):
    """What the map's gradient follows from, besides dy: the pooling's geometry, and per window the
    tap that won.
    """

    pool: Pool2dGeometry
    argmax: Tensor


class Window(NamedTuple):
    """What of a pooling a kernel is compiled for; pairs are height and width."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    covering: Pair  # windows that may hold one pixel
    unrolled: bool  # the loops over them and over the pixels of one stride

    @classmethod
    def of(cls, pool: Pool2dGeometry) -> "Window":
        few = prod((*pool.covering, *pool.stride)) <= _UNROLLED
        return cls(pool.kernel, pool.stride, pool.padding, pool.dilation, pool.covering, few)


def pooled(gradient: PoolGradient | None) -> tuple[tuple | None, Window | None]:
    """What kernels take of a pooling: argmax, its strides, pooled P and Q; and its Window."""
    if gradient is None:
        return None, None
    pool, argmax = gradient
    sizes = encode_ints(argmax.shape[2:])
    return (argmax, encode_strides(argmax), sizes), Window.of(pool)


@triton.jit
def sum_won(dy_ptr, dy_strides, pooled, window, r, s, mask, WINDOW: tl.constexpr):
    """The map's gradient at pixels that lie r, s pixels behind where a window starts.

    window = (n, k, pp, pq) is the last that may hold the pixel. All of these broadcast to the
    mask's shape, which is the tile's: the gradient is 0 where it is not set. ``dy_strides``, of
    dy[N,K,PP,PQ], are plain.
    """
    n, k, pp0, pq0 = window
    argmax_ptr, argmax_strides, sizes = pooled
    argmax_strides = decode_strides(argmax_strides)
    PP, PQ = decode_ints(sizes)
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    R: tl.constexpr = WINDOW.kernel[0]
    S: tl.constexpr = WINDOW.kernel[1]
    ROWS: tl.constexpr = WINDOW.covering[0]
    COLUMNS: tl.constexpr = WINDOW.covering[1]
    ONE: tl.constexpr = ROWS * COLUMNS == 1
    dy_ptr += n * dy_strides.n + k * dy_strides.c
    argmax_ptr += n * argmax_strides.n + k * argmax_strides.c
    total = tl.zeros(mask.shape, DTYPE if ONE else ACC)
    for i in tl.range(0, ROWS, loop_unroll_factor=ROWS if WINDOW.unrolled else 1):
        pp = pp0 - (ROWS - 1) + i
        h = r + (ROWS - 1 - i) * WINDOW.stride[0]
        row_holds = within(pp, PP) & (h % WINDOW.dilation[0] == 0) & (h < R * WINDOW.dilation[0])
        for j in tl.range(0, COLUMNS, loop_unroll_factor=COLUMNS if WINDOW.unrolled else 1):
            pq = pq0 - (COLUMNS - 1) + j
            w = s + (COLUMNS - 1 - j) * WINDOW.stride[1]
            holds = within(pq, PQ) & (w % WINDOW.dilation[1] == 0) & (w < S * WINDOW.dilation[1])
            holds = mask & (row_holds & holds)
            tap = h // WINDOW.dilation[0] * S + w // WINDOW.dilation[1]
            at = pp * argmax_strides.h + pq * argmax_strides.w
            argmax = tl.load(argmax_ptr + at, mask=holds, other=0).to(tl.int32)
            at = pp * dy_strides.h + pq * dy_strides.w
            dy = tl.load(dy_ptr + at, mask=holds, other=0.0)
            if ONE:
                total = tl.where(argmax == tap, dy, 0.0)
            else:
                total = tl.where(argmax == tap, total + upcast(dy, ACC), total)
    if not ONE:
        total = downcast(total, DTYPE)
    return total


@triton.jit
def load_pool_gradient(dy_ptr, dy_strides, pooled, where, mask, WINDOW: tl.constexpr):
    """The map's gradient at where = (n, k, p, q), from dy[N,K,PP,PQ]; 0 where ``mask`` is not set.

    The indices broadcast to the mask's shape; ``dy_strides`` are plain.
    """
    n, k, p, q = where
    h = p + WINDOW.padding[0]
    w = q + WINDOW.padding[1]
    pp = h // WINDOW.stride[0]
    pq = w // WINDOW.stride[1]
    r = h - pp * WINDOW.stride[0]
    s = w - pq * WINDOW.stride[1]
    return sum_won(dy_ptr, dy_strides, pooled, (n, k, pp, pq), r, s, mask, WINDOW)


@triton.jit
def load_gradient(dy_ptr, dy_strides, offsets, where, mask, pooled, WINDOW: tl.constexpr):
    """dy at ``offsets``; of a pooled result, the map's gradient at ``where`` instead."""
    if WINDOW is None:
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0)
    else:
        dy = load_pool_gradient(dy_ptr, dy_strides, pooled, where, mask, WINDOW)
    return dy


# The tiles per program depend on the batch, the channels do not.
@triton.jit(do_not_specialize=["tiles_per_program"])
def pool_gradient_kernel(
    dy_ptr,  # [N, K, PP, PQ]
    dz_ptr,  # [N, K, P, Q]
    db_ptr,  # [parts, K] or None
    dy_strides,  # n, k, pp, pq, encoded
    dz_strides,  # n, k, p, q, encoded
    pooled,  # see sum_won
    sizes,  # N, P, Q, blocks along p and along q, encoded
    K,
    tiles_per_program,
    WINDOW: tl.constexpr,
    INT64_INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dz[n,k,p,q] = sum of dy[n,k,pp,pq] over the windows that the pixel won, db[k] = sum of dz.

    A window starts in each block of stride x stride pixels. So pixels at one position of their
    blocks have the same taps, and no window is loaded for nothing. One program writes
    ``tiles_per_program`` tiles of ROWS blocks by COLUMNS channels, and their part of db.
    """
    N, P, Q, blocks_p, blocks_q = decode_ints(sizes)
    dy_strides = decode_strides(dy_strides)
    dz_strides = decode_strides(dz_strides)
    pid = program(INT64_INDEX)
    column_tiles = tl.cdiv(K, COLUMNS)
    part = pid // column_tiles
    k = (pid % column_tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    ACC: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    db = tl.zeros((ROWS, COLUMNS), ACC)
    STRIDE_P: tl.constexpr = WINDOW.stride[0]
    STRIDE_Q: tl.constexpr = WINDOW.stride[1]
    for i in loop(tiles_per_program):
        block = (part * tiles_per_program + i) * ROWS + tl.arange(0, ROWS)
        n, pp, pq = pixel(block[:, None], blocks_p, blocks_q)
        window = n, k, pp, pq
        mask = (n < N) & (k < K)
        dz_planes = dz_ptr + n * dz_strides.n + k * dz_strides.c
        for r in tl.range(0, STRIDE_P, loop_unroll_factor=STRIDE_P if WINDOW.unrolled else 1):
            p = pp * STRIDE_P + r - WINDOW.padding[0]
            for s in tl.range(0, STRIDE_Q, loop_unroll_factor=STRIDE_Q if WINDOW.unrolled else 1):
                q = pq * STRIDE_Q + s - WINDOW.padding[1]
                inside = mask & (within(p, P) & within(q, Q))
                h = tl.full((1, 1), r, tl.int32)
                w = tl.full((1, 1), s, tl.int32)
                dz = sum_won(dy_ptr, dy_strides, pooled, window, h, w, inside, WINDOW)
                tl.store(dz_planes + (p * dz_strides.h + q * dz_strides.w), dz, mask=inside)
                db += upcast(dz, ACC)
    if db_ptr is not None:
        db = downcast(tl.sum(db, axis=0, keep_dims=True), db_ptr.dtype.element_ty)
        tl.store(db_ptr + part * K + k, db, mask=k < K)


def _blocks(size: int, padding: int, stride: int) -> int:
    return cdiv(size + padding, stride)


def tiles_of(dz: Tensor, pool: Pool2dGeometry, summed: bool) -> ChannelTiles:
    """The tiles of ``write``, in blocks of the pooling's stride."""
    blocks = map(_blocks, dz.shape[2:], pool.padding, pool.stride)
    return channel_tiles(dz, dz.shape[0] * prod(blocks), 2048, summed)


def write(dy: Tensor, argmax: Tensor, dz: Tensor, db: Tensor | None, pool: Pool2dGeometry) -> None:
    """dz[N,K,P,Q], the map's gradient, and its sum db[K], from dy[N,K,PP,PQ] and the argmax."""
    N, K, P, Q = dz.shape
    blocks_p, blocks_q = map(_blocks, (P, Q), pool.padding, pool.stride)
    tiles = tiles_of(dz, pool, db is not None)
    maxima, window = pooled(PoolGradient(pool, argmax))
    parts = parts_like(db, tiles.parts)
    device.launch(
        pool_gradient_kernel,
        (tiles.programs,),
        device=dz.device,
        **operands(dy=dy, dz=dz),
        db_ptr=parts,
        pooled=maxima,
        sizes=encode_ints((N, P, Q, blocks_p, blocks_q)),
        K=K,
        tiles_per_program=tiles.per_program,
        WINDOW=window,
        INT64_INDEX=device.int64_index(N * blocks_p * blocks_q, dy, argmax, dz),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=tiles.warps,
    )
    split_sum(parts, db)
