"""Convolution, bias, ReLU and max-pool in one kernel, through tensor descriptors.

The map before the pool is never written: a program pools its box of it in registers. A value and
its tap in a window are one integer, a *key*: the bits of relu(value), which rise with it, above a
tag that falls from tap to tap. The largest key has the largest value, of equal ones the first. But
of several NaNs the last has to win: their bits, of which many stand for NaN, rise with the pixel.

Tensor cores leave a thread pairs of neighbouring pixels, eight apart, of a row of the product
filters x pixels. With the box's rows first in the pixels' order, a thread has whole columns of the
map, two by two: pooling rows, and columns two by two, moves nothing between threads. Only a third
column comes from a neighbour. Windows that overlap leave a halo, which is computed twice.

Operands are those of ``descriptor_gemm``. Sizes and strides are in elements.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import cost_model, device
from ..conv import descriptor_tiles
from ..conv.descriptor_gemm import add_products, reads
from ..conv.engine import PooledConv, PoolingEngine
from ..device import INTERPRET, Device, loop
from ..geometry import Conv2dGeometry, Pair, Pool2dGeometry
from ..lang.descriptors import filters, rows_first
from ..lang.epilogue import PooledResult, relu
from ..lang.integers import (
    cdiv,
    decode_ints,
    decode_strides,
    encode_ints,
    power_of_2,
    within,
)
from ..lang.numerics import downcast, upcast
from ..problem import Problem
from ..tile import Box, BoxBlock, Tile, blocks_per_multiprocessor, box_of, is_valid

_INTERPRET = tl.constexpr(INTERPRET)

# Pixels, filters, warps, by the bytes of an element; a key takes twice an element's.
_SHAPES = {
    2: ((256, 128, 8), (256, 64, 4), (128, 128, 4), (128, 64, 4)),
    4: ((128, 64, 4), (64, 64, 4)),
}
# Boxes by their pixels: eight neighbours or more along images and columns keep rows in a thread.
_BOXES = {
    256: ((1, 16, 16), (2, 8, 16), (4, 8, 8), (16, 4, 4)),
    128: ((1, 8, 16), (2, 8, 8), (8, 4, 4), (32, 2, 2)),
    64: ((1, 8, 8), (4, 4, 4), (16, 2, 2)),
}
_ROW = 128  # bytes of a row of shared memory that a descriptor fills without bank conflicts


@triton.jit
def _in_pairs(tile):
    """The even and the odd rows of tile[a, row, b]."""
    A: tl.constexpr = tile.shape[0]
    ROWS: tl.constexpr = tile.shape[1]
    B: tl.constexpr = tile.shape[2]
    return tl.split(tile.reshape(A, ROWS // 2, 2, B).permute(0, 1, 3, 2))


@triton.jit
def _next_rows(tile):
    """tile[a, row + 1, b]; the last row is any. Where a thread has all rows, nothing moves."""
    if tile.shape[1] > 1:
        even, odd = _in_pairs(tile)
        tile = tl.join(odd, _next_rows(even)).permute(0, 1, 3, 2).reshape(tile.shape)
    return tile


@triton.jit
def _next_columns(tile):
    """tile[a, b, column + 1]; the last column is any."""
    column = (tl.arange(0, tile.shape[2]) + 1) % tile.shape[2]
    return tl.gather(tile, tl.broadcast_to(column[None, None, :], tile.shape), 2)


# Of a window's taps the last comes first: one instruction adds to a key and takes the maximum.


@triton.jit
def _pool_rows(key, R: tl.constexpr, STRIDE: tl.constexpr, STEP: tl.constexpr):
    """The maxima of R rows of key[a, row, b] from each STRIDE-th on; tags fall by STEP a row."""
    if STRIDE == 2:
        first, best = _in_pairs(key)
    else:
        first = key
        best = _next_rows(key)
    if R == 3:
        best = tl.maximum(best + STEP, _next_rows(first if STRIDE == 2 else best))
    return tl.maximum(first + (R - 1) * STEP, best)


@triton.jit
def _pool_columns(key, S: tl.constexpr, STRIDE: tl.constexpr):
    """The maxima of S columns of key[a, b, column] from each STRIDE-th on; tags fall by one."""
    A: tl.constexpr = key.shape[0]
    B: tl.constexpr = key.shape[1]
    COLUMNS: tl.constexpr = key.shape[2]
    even, odd = tl.split(key.reshape(A, B, COLUMNS // 2, 2))
    if S == 2 and STRIDE == 2:
        best = tl.maximum(even + 1, odd)
    else:
        third = _next_columns(even)
        best = odd
        if S == 3:
            best = tl.maximum(odd + 1, third)
        best = tl.maximum(even + (S - 1), best)
        if STRIDE == 1:
            if S == 3:
                third = tl.maximum(third + 1, _next_columns(odd))
            best = tl.join(best, tl.maximum(odd + (S - 1), third)).reshape(A, B, COLUMNS)
    return best


@triton.jit
def _nans(
    zero,
    SHAPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The bits of a NaN for each pixel of [k, row, columns of images], as int32: in a window they
    rise from tap to tap. PAIRS: those of two columns, 16 bits each, for both.

    Windows that do not overlap all have the same. Those of others would stay in registers through
    all tiles, but for a zero that the compiler does not know.
    """
    S: tl.constexpr = WINDOW.kernel[1]
    tl.static_assert(SHAPE[1] * S + COLUMNS < 128, "bfloat16 has no more NaNs")
    row = tl.arange(0, SHAPE[1])
    column = tl.arange(0, SHAPE[2]) % COLUMNS
    if WINDOW.stride[0] == WINDOW.kernel[0]:
        row %= WINDOW.stride[0]
    if WINDOW.stride[1] == WINDOW.kernel[1]:
        column %= WINDOW.stride[1]
    if WINDOW.stride != WINDOW.kernel:
        column += zero
    row *= S
    column += 2 ** (BITS - 1) - SHAPE[1] * S - COLUMNS
    if PAIRS:
        row *= 2**16 + 1
        column = (column & -2) * (2**16 + 1) + 2**16
    return tl.broadcast_to(row[None, :, None] + column[None, None, :], SHAPE)


@triton.jit
def _keys(
    tile,
    zero,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    WINDOW: tl.constexpr,
    RANKED: tl.constexpr,
):
    """The bits of relu(tile[k, row, columns of images]) in DTYPE, as the upper half of an integer
    twice as wide. NaNs exceed all numbers; if ranked, the last one of a window exceeds the others.
    """
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    PAIRS: tl.constexpr = BITS == 16 and not _INTERPRET
    nan = _nans(zero, tile.shape, COLUMNS, BITS, WINDOW, PAIRS)
    if BITS == 32:
        bits = tl.where(tile == tile, relu(tile).to(tl.int32, bitcast=True), nan)
        key = bits.to(tl.int64) << 32
    elif _INTERPRET:
        bits = downcast(relu(tile), DTYPE).to(tl.int16, bitcast=True)
        key = tl.where(tile == tile, bits.to(tl.int32), nan) << 16
    else:
        # One conversion for two values, which LLVM would convert one by one, ReLU included. It
        # makes a NaN 0x7fff.
        PAIR: tl.constexpr = "bf16x2" if DTYPE == tl.bfloat16 else "f16x2"
        CONVERT: tl.constexpr = "{.reg .b32 pair; cvt.rn.relu." + PAIR + ".f32 pair, $3, $2; "
        UNPACK: tl.constexpr = "shl.b32 $0, pair, 16; and.b32 $1, pair, 0xffff0000;}"
        if RANKED:
            key = tl.inline_asm_elementwise(
                CONVERT + "min.u16x2 pair, pair, $4; " + UNPACK,
                "=r,=r,r,r,r,r",
                [tile, nan],
                dtype=tl.int32,
                is_pure=True,
                pack=2,
            )
        else:
            key = tl.inline_asm_elementwise(
                CONVERT + UNPACK,
                "=r,=r,r,r",
                [tile],
                dtype=tl.int32,
                is_pure=True,
                pack=2,
            )
    return key


@triton.jit
def _inside(first, size, COUNT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """Which of COUNT rows, or columns, from ``first`` on may count as inside the map.

    That is known of every second one where it is the middle of a window, which no padding reaches.
    """
    i = tl.arange(0, COUNT)
    inside = within(first + i, size)
    if KERNEL == 3 and STRIDE == 2:
        inside |= i % 2 == 1
    return inside


@triton.jit
def _pool(
    acc, corner, map_sizes, zero, DTYPE: tl.constexpr, WINDOW: tl.constexpr, RANKED: tl.constexpr
):
    """Keys [k, row, n, column] of windows of relu(acc[k, row, n, column]).

    Windows that do not lie in the box, the last of overlapping ones, are any.

    ``corner`` is the row and the column of the map where the box begins, which may lie outside.
    """
    K: tl.constexpr = acc.shape[0]
    ROWS: tl.constexpr = acc.shape[1]
    N: tl.constexpr = acc.shape[2]
    COLUMNS: tl.constexpr = acc.shape[3]
    R: tl.constexpr = WINDOW.kernel[0]
    S: tl.constexpr = WINDOW.kernel[1]
    STRIDE_P: tl.constexpr = WINDOW.stride[0]
    STRIDE_Q: tl.constexpr = WINDOW.stride[1]
    key = _keys(acc.reshape(K, ROWS, N * COLUMNS), zero, COLUMNS, DTYPE, WINDOW, RANKED)
    LEAST: tl.constexpr = -(2 ** (key.dtype.primitive_bitwidth - 1))
    # Outside the map keys turn negative, below all others: at once, or where rows become fewer
    # columns later. Each window has a row inside: its columns are not negative yet then.
    AT_ONCE: tl.constexpr = STRIDE_P == 1 and WINDOW.padding[0] > 0 and WINDOW.padding[1] > 0
    p, q = corner
    P, Q = map_sizes
    if WINDOW.padding[0] > 0:
        inside = _inside(p, P, ROWS, R, STRIDE_P)[None, :, None]
        if AT_ONCE:
            columns = _inside(q, Q, COLUMNS, S, STRIDE_Q)
            columns = tl.broadcast_to(columns[None, :], (N, COLUMNS)).reshape(N * COLUMNS)
            inside = inside & columns[None, None, :]
        key += tl.where(inside, 0, LEAST).to(key.dtype)
    key = _pool_rows(key, R, STRIDE_P, S).reshape(K, ROWS // STRIDE_P * N, COLUMNS)
    if WINDOW.padding[1] > 0 and not AT_ONCE:
        inside = _inside(q, Q, COLUMNS, S, STRIDE_Q)
        key += tl.where(inside, 0, LEAST).to(key.dtype)[None, None, :]
    return _pool_columns(key, S, STRIDE_Q).reshape(K, ROWS // STRIDE_P, N, COLUMNS // STRIDE_Q)


@triton.jit
def _store(
    key,  # [k, p, n, q]
    y_ptr,
    argmax_ptr,
    strides,  # of both
    first,  # n, p, q, k of the first key
    sizes,  # N, P, Q, K of y
    WINDOWS: tl.constexpr,  # rows and columns of keys that are of windows
    TAPS: tl.constexpr,
    INT64_INDEX: tl.constexpr,
):
    """Store the values of keys to y, and the taps that won."""
    FILTERS: tl.constexpr = key.shape[0]
    ROWS: tl.constexpr = key.shape[1]
    IMAGES: tl.constexpr = key.shape[2]
    COLUMNS: tl.constexpr = key.shape[3]
    n, p, q, k = first
    N, P, Q, K = sizes
    windows_p, windows_q = WINDOWS
    i = tl.arange(0, ROWS * IMAGES * COLUMNS)
    row = i // (IMAGES * COLUMNS)
    column = i % COLUMNS
    n += i // COLUMNS % IMAGES
    p += row
    q += column
    k += tl.arange(0, FILTERS)
    mask = (row < windows_p) & (column < windows_q) & (n < N)
    mask = (mask & (p < P) & (q < Q))[:, None] & (k < K)[None, :]
    if INT64_INDEX:
        n, p, k = n.to(tl.int64), p.to(tl.int64), k.to(tl.int64)
    offsets = (n * strides.n + p * strides.h + q * strides.w)[:, None]
    offsets = offsets + (k * strides.c)[None, :]

    # The first tap's tag becomes 255, the next one's 254: each is its tap, all bits turned.
    # Zero comes out at 0, as above every key without a value.
    key = tl.maximum(key.reshape(FILTERS, ROWS * IMAGES * COLUMNS) + (256 - TAPS), 256).T
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    INTEGER: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    tl.store(y_ptr + offsets, (key >> BITS).to(INTEGER).to(DTYPE, bitcast=True), mask=mask)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + offsets, (~key).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["tiles"])
def pooled_product_kernel(
    x_desc,  # [H, N, W, C] of one phase, or [H/2, 2, N, W/2, 2C] of four
    x1_desc,  # the other phases that have taps, or None
    x2_desc,
    x3_desc,
    w_desc,  # [R, S, K, C]
    result,  # a PooledResult; argmax, in uint8, has y's strides
    K,  # filters of a group
    tiles,
    sizes,  # N, P, Q; pooled P, Q; tiles along them; column tiles of a group, groups, C of one
    phase_taps,  # PhaseTaps of each phase
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64_INDEX: tl.constexpr,
    TILE: tl.constexpr,  # a BoxBlock
):
    """y = max of each window of relu(conv(x, w) + bias), and the tap that won; 255 where y <= 0.

    One program writes every num_programs-th of the ``tiles``, each the windows that lie in a box
    of the map, of COLUMNS filters of one group. Sums are float32, compared in y's dtype.
    """
    BOX_N: tl.constexpr = TILE.n
    BOX_P: tl.constexpr = TILE.p
    BOX_Q: tl.constexpr = TILE.q
    COLUMNS: tl.constexpr = TILE.columns
    DEPTH: tl.constexpr = TILE.depth
    TAPS: tl.constexpr = WINDOW.kernel[0] * WINDOW.kernel[1]
    WINDOWS_P: tl.constexpr = (BOX_P - WINDOW.kernel[0]) // WINDOW.stride[0] + 1
    WINDOWS_Q: tl.constexpr = (BOX_Q - WINDOW.kernel[1]) // WINDOW.stride[1] + 1
    bias_ptr, y_ptr, argmax_ptr, strides, _ = result
    x_descs = (x_desc, x1_desc, x2_desc, x3_desc)
    N, P, Q, pooled_P, pooled_Q, tiles_p, tiles_q, column_tiles, groups, C = decode_ints(sizes)
    strides = decode_strides(strides)

    for tile in loop(tl.program_id(0), tiles, tl.num_programs(0)):
        group = tile // column_tiles % groups
        k = group * K + tile % column_tiles * COLUMNS
        at = tile // (column_tiles * groups)
        n = at // (tiles_q * tiles_p) * BOX_N
        top = at // tiles_q % tiles_p * WINDOWS_P
        left = at % tiles_q * WINDOWS_Q
        p = top * WINDOW.stride[0] - WINDOW.padding[0]
        q = left * WINDOW.stride[1] - WINDOW.padding[1]

        acc = tl.zeros((COLUMNS, BOX_P * BOX_N * BOX_Q), tl.float32)
        if bias_ptr is not None:
            channels = k + tl.arange(0, COLUMNS)
            bias = tl.load(bias_ptr + channels, mask=channels < groups * K, other=0.0)
            acc += upcast(bias, tl.float32)[:, None]
        for i in tl.static_range(len(phase_taps)):
            x = x_descs[i]
            first = (group * C, 0, k)
            acc = add_products(
                acc, x, w_desc, (n, p, q), first, C, phase_taps[i], False, PRECISION, DEPTH, True
            )
        acc = acc.reshape(COLUMNS, BOX_P, BOX_N, BOX_Q)
        RANKED: tl.constexpr = argmax_ptr is not None
        key = _pool(acc, (p, q), (P, Q), tile >> 31, y_ptr.dtype.element_ty, WINDOW, RANKED)
        first = (n, top, left, k)
        limits = (N, pooled_P, pooled_Q, groups * K)
        windows: tl.constexpr = (WINDOWS_P, WINDOWS_Q)
        _store(key, y_ptr, argmax_ptr, strides, first, limits, windows, TAPS, INT64_INDEX)


class _Window(NamedTuple):
    """What of a pooling the kernel is compiled for; pairs are height and width."""

    kernel: Pair
    stride: Pair
    padding: Pair

    def inside(self, box: Box) -> Pair:
        """How many windows a box holds along its rows and its columns."""
        _, height, width = box
        rows, columns = (
            (size - kernel) // stride + 1
            for size, kernel, stride in zip((height, width), self.kernel, self.stride, strict=True)
        )
        return rows, columns


def _window(pool: Pool2dGeometry) -> _Window:
    return _Window(pool.kernel, pool.stride, pool.padding)


def supports(problem: Problem, pool: Pool2dGeometry) -> bool:
    """Whether this kernel takes a convolution and the pooling of its result, and is worth it.

    Windows are of two or three pixels along each axis, every one or two, padded by one at most.
    Float32 goes through tensor cores alone.
    """
    _, g, dtype, precision, device, layout, _ = problem
    if layout != "aligned" or not (device.descriptors or device.backend == "interpreter"):
        return False
    if dtype.itemsize not in _SHAPES or not descriptor_tiles.supports("fprop", g, dtype, precision):
        return False
    sizes = {*pool.kernel}, {*pool.stride}, {*pool.padding}, {*pool.dilation}
    allowed = {2, 3}, {1, 2}, {0, 1}, {1}
    if pool.ceil_mode or not all(a <= b for a, b in zip(sizes, allowed, strict=True)):
        return False
    if pool.x_shape != g.y_shape or min(pool.y_shape) < 1:
        return False
    K, C = g.K // g.groups, g.C // g.groups
    return min(K, C) >= 16 if g.groups == 1 else K % 64 == C % 16 == 0


def tiles(problem: Problem, pool: Pool2dGeometry) -> list[Tile]:
    """All tiles of the family that suit a layer, best first; none if the kernel does not take it.

    In the interpreter, where its loads are slow, it takes none.
    """
    if problem.device.descriptors and supports(problem, pool):
        return family(problem, pool)
    return []


def family(problem: Problem, pool: Pool2dGeometry) -> list[Tile]:
    """The tiles of a layer that the kernel takes, in the interpreter, too; best first."""
    _, g, dtype, precision, device, *_ = problem
    found = [
        tile
        for tile in _family(g, pool, dtype, device)
        if is_valid(tile, dtype.itemsize, device) and min(_window(pool).inside(box_of(tile))) > 0
    ]
    return sorted(found, key=lambda tile: _cycles(g, pool, tile, dtype, precision, device))


def _family(
    g: Conv2dGeometry, pool: Pool2dGeometry, dtype: torch.dtype, device: Device
) -> Iterator[Tile]:
    K, C = g.K // g.groups, g.C // g.groups
    if device.backend == "interpreter":
        columns, depth = 16, 16
        if g.groups == 1:
            columns, depth = power_of_2(min(K, 128)), power_of_2(min(C, 128))
        yield Tile(512, columns, depth, box=(2, 16, 16))
        return
    row = _ROW // dtype.itemsize
    depth = next((d for d in (row, row // 2) if C % d == 0 or (g.groups == 1 and C > d // 2)), 16)
    overlapping = pool.covering != (1, 1)
    for rows, columns, warps in _SHAPES[dtype.itemsize]:
        if columns > 64 and (K <= columns // 2 or (g.groups > 1 and K % columns)):
            continue
        # Shifted keys take registers: of every second column, or with stride 1 of all.
        if (overlapping and warps == 8) or (
            1 in pool.stride and rows * columns * dtype.itemsize > 2**14
        ):
            continue
        for box in _BOXES[rows]:
            _, _, width = box
            if not overlapping or width >= 8:  # a smaller box is halo for the most part
                yield _deepest(Tile(rows, columns, depth, warps=warps, box=box), dtype, device)


def _deepest(tile: Tile, dtype: torch.dtype, device: Device) -> Tile:
    """The tile with the most of two to four stages that let two programs of four warps, or one of
    eight, share a multiprocessor.
    """
    for stages in (4, 3):
        deep = replace(tile, stages=stages)
        room = blocks_per_multiprocessor(_without_stores(deep), dtype.itemsize, device)
        if room >= 8 // tile.warps:
            return deep
    return replace(tile, stages=2)


def _without_stores(tile: Tile) -> Tile:
    """What takes the same shared memory: results go through the ring's, not through their own."""
    return replace(tile, box=None)


def _cycles(
    g: Conv2dGeometry,
    pool: Pool2dGeometry,
    tile: Tile,
    dtype: torch.dtype,
    precision: str,
    device: Device,
) -> float:
    """What all tiles take by the planner's model, in which pooling counts as any epilogue."""
    rate = cost_model.rate(dtype, precision, device)
    k_tiles = g.R * g.S * cdiv(g.C // g.groups, tile.depth)
    turn = cost_model.turn_cycles("fprop", tile, dtype.itemsize, rate, device)
    busy: cost_model.Times = {limit: k_tiles * cycles for limit, cycles in turn.items()}
    programs = prod(_tiles(g, pool, tile))
    return cost_model.cycles(programs, busy, _without_stores(tile), dtype.itemsize, device)[1]


def _tiles(g: Conv2dGeometry, pool: Pool2dGeometry, tile: Tile) -> tuple[int, int, int, int]:
    """The number of tiles along images, rows and columns of windows, and filters of all groups."""
    images, _, _ = box = box_of(tile)
    lengths = (images, *_window(pool).inside(box))
    n, p, q = (cdiv(*axis) for axis in zip((g.N, pool.P, pool.Q), lengths, strict=True))
    return n, p, q, g.groups * cdiv(g.K // g.groups, tile.columns)


def conv2d_relu_max_pool2d(call: PooledConv, tile: Tile) -> None:
    """y[N,K,P,Q] = the maximum of each window of relu(conv(x, w) + bias), and argmax, of y's
    strides. A NaN wins.
    """
    x, y, argmax, g, pool = call.x, call.y, call.argmax, call.g, call.pool
    assert argmax is None or argmax.stride() == y.stride(), (argmax.stride(), y.stride())
    here, itemsize = device.describe(x.device), x.element_size()
    C, K = g.C // g.groups, g.K // g.groups
    # Groups share descriptors: blocks must not run from one into the next.
    assert g.groups == 1 or K % tile.columns == C % tile.depth == 0, (g.groups, tile)
    xs, phase_taps = reads(g, x, box_of(tile), tile.depth)
    counts = _tiles(g, pool, tile)
    _, tiles_p, tiles_q, tiles_k = counts
    room = here.multiprocessors * blocks_per_multiprocessor(_without_stores(tile), itemsize, here)
    sizes = (g.N, g.P, g.Q, pool.P, pool.Q, tiles_p, tiles_q, tiles_k // g.groups, g.groups, C)
    device.launch(
        pooled_product_kernel,
        (min(prod(counts), room),),
        device=x.device,
        **{name: x and rows_first(x) for name, x in xs.items()},
        w_desc=filters(call.w, (tile.columns, tile.depth)),
        result=tuple(PooledResult.of(call.bias, y, argmax)),
        K=K,
        tiles=prod(counts),
        sizes=encode_ints(sizes),
        phase_taps=tuple([encode_ints(taps) for taps in phase_taps]),
        WINDOW=_window(pool),
        PRECISION=call.precision,
        INT64_INDEX=device.int64_index(0, y),
        TILE=BoxBlock.of(tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


ENGINE = PoolingEngine("descriptor_gemm", tiles=tiles, launch=conv2d_relu_max_pool2d)
