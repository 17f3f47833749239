"""Convolution of few channels, and its weight gradient, by pairs of neighbouring outputs.

Their windows overlap in one short run of x, which is loaded once, by wide words if the channels
lie side by side. fprop multiplies it by packed filters, which hold each filter twice, the second
time shifted by the stride: for a run padded to a power of two that often is no product more than
one output alone would take. wgrad multiplies it by dy of both outputs, and finds each filter's
gradient twice, in parts for the second pass to add. Sizes and strides are in elements.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import cost_model, device, replay
from ..device import Device, loop
from ..geometry import Conv2dGeometry, contiguous_strides
from ..lang.epilogue import results, store_result
from ..lang.integers import (
    cdiv,
    decode_ints,
    decode_strides,
    divisors,
    encode_ints,
    operands,
    pixel,
    pointers,
    power_of_2,
    program,
    quotient,
    within,
)
from ..lang.numerics import dot, downcast, fence_copies
from ..lang.prologue import load_normalization, load_normalized
from ..lang.split_sum import gradients
from ..pool.pool_gradient import load_pool_gradient, pooled
from ..problem import Problem
from ..tile import INTERPRETER_ELEMENTS, Block, Tile
from .engine import Engine, Fprop, Wgrad

FEW = 4
"""Channels of a group, at most, that count as few."""

DEEPEST = 64
"""Elements of x in a row of the product, at most."""


class Run(NamedTuple):
    """The elements of x in one row that two neighbouring outputs see, as a row of the product."""

    segment: int  # what they are padded to
    columns: int  # of x, that the two windows cover together
    lead: int  # elements before them
    flat: bool  # they lie side by side in x
    unit: int  # what divides the position of each run's first element in its row of x


def _columns(g: Conv2dGeometry) -> int:
    return (g.S - 1) * g.dilation[1] + 1 + g.stride[1]


def segment(g: Conv2dGeometry, lead: int = 0) -> int:
    """What a run and the elements before it are padded to."""
    return power_of_2(lead + _columns(g) * g.C)


@lru_cache(maxsize=4096)
def _run(g: Conv2dGeometry, first: int, flat: bool, itemsize: int) -> Run:
    step = 2 * g.stride[1] * g.C
    first = (first * g.stride[1] - g.padding[1][0]) * g.C
    unit = 16 // itemsize if flat else 1
    while step % unit or segment(g, first % unit) > segment(g):
        unit //= 2
    return Run(segment(g), _columns(g), first % unit, flat, unit)


def run_of(x: Tensor, g: Conv2dGeometry, first: int = 0) -> Run:
    """The run of pairs that start at column ``first`` of y, and at each second one from there.

    Elements that lie side by side start earlier if that makes loads wider; whether it does depends
    on where the rows of x start, but the products and their order do not.
    """
    n, c, h, w = x.stride()
    flat = w == g.C and (c == 1 or g.C == 1)
    run = _run(g, first, flat, x.element_size())
    # The stride of an axis of one element may be anything.
    rows = (n if g.N > 1 else 0) | (h if g.H > 1 else 0) | g.W * g.C
    aligned = rows % run.unit == 0 and x.data_ptr() % 16 == 0
    return run if aligned else run._replace(unit=1)


def to_launch(run: Run) -> tuple[Run, ...]:
    """The run; warming up, also what another image needs whose rows start elsewhere."""
    return tuple({run, run._replace(unit=1)}) if device.is_warming_up() else (run,)


class Filters(NamedTuple):
    """What of a convolution a kernel is compiled for."""

    K: int
    C: int
    R: int
    S: int
    stride_h: int
    step_h: int
    stride_w: int
    step_w: int

    @classmethod
    def of(cls, g: Conv2dGeometry) -> "Filters":
        (stride_h, stride_w), (step_h, step_w) = g.stride, g.dilation
        return cls(g.K, g.C, g.R, g.S, stride_h, step_h, stride_w, step_w)


def supports(g: Conv2dGeometry, dtype: torch.dtype) -> bool:
    """Whether ``fprop`` and ``wgrad`` take the convolution, in any layout."""
    few = g.groups == 1 and 0 < g.C <= FEW
    return few and dtype.itemsize == 2 and segment(g) <= DEEPEST


def tiles(problem: Problem) -> Iterator[Tile]:
    """A tile that suits the convolution; dgrad has none."""
    if problem.direction != "dgrad" and supports(problem.g, problem.dtype):
        chosen = _fprop_tile if problem.direction == "fprop" else _wgrad_tile
        yield chosen(problem.g, problem.device)


def _fprop_tile(g: Conv2dGeometry, device: Device) -> Tile:
    """A tile of pixels by filters; its depth holds whole runs."""
    if device.backend == "interpreter":
        columns = max(16, min(1024, power_of_2(g.K)))
        depth = max(16, min(1024, power_of_2(g.R) * segment(g)))
        rows = min(power_of_2(2 * g.N * g.P * g.Q), INTERPRETER_ELEMENTS // max(columns, depth))
        return Tile(max(32, rows), columns, depth)
    # Hopper multiplies 64 rows at once, the filters, each twice, and keeps less in registers.
    hopper = device.arch == 90
    columns = max(16, min(64 if hopper else 32, power_of_2(g.K)))
    depth = max(16, segment(g))
    rows = 256 if hopper or depth < DEEPEST else 128
    return Tile(rows, columns, depth, warps=8, stages=3)


@triton.jit
def run_element(j, C: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr):
    """(c, column) of the j-th element of a run, c fastest if it is flat."""
    if FLAT:
        column = j // C
        c = j - column * C
    else:
        c = j // COLUMNS
        column = j - c * COLUMNS
    return c, column


@triton.jit
def window_tap(column, half, FILTERS: tl.constexpr):
    """(s, inside): the tap of the first or second output at a column of their run, if any."""
    reach = column - half * FILTERS.stride_w
    s = reach // FILTERS.step_w
    return s, (reach >= 0) & (s < FILTERS.S) & (s * FILTERS.step_w == reach)


@triton.jit
def pack_kernel(
    w_ptr,  # [K, C, R, S]
    packed_ptr,  # [tiles of filters, k_tiles, COLUMNS / 8, 2, 8, DEPTH]
    w_strides,  # k, c, r, s
    FILTERS: tl.constexpr,  # the Filters
    RUN: tl.constexpr,  # a Run
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """packed[..., half, k, (r, j)] = w[k, c, r, s] for the tap s of output ``half`` at element j.

    One program writes what one turn of the loop multiplies: zeros where a window does not reach.
    """
    TURNS: tl.constexpr = (FILTERS.R * RUN.segment + DEPTH - 1) // DEPTH
    pid = tl.program_id(0)
    depth = tl.arange(0, DEPTH)
    d = pid % TURNS * DEPTH + depth
    j = d % RUN.segment - RUN.lead
    r = d // RUN.segment
    c, column = run_element(j, FILTERS.C, RUN.columns, RUN.flat)
    m = tl.arange(0, 2 * COLUMNS)
    k = pid // TURNS * COLUMNS + m // 16 * 8 + m % 8
    s, inside = window_tap(column[None, :], (m // 8 % 2)[:, None], FILTERS)
    inside &= ((j >= 0) & (c < FILTERS.C) & (r < FILTERS.R))[None, :]
    inside &= (k < FILTERS.K)[:, None]
    w_k, w_c, w_r, w_s = w_strides
    offsets = (k * w_k)[:, None] + (c * w_c + r * w_r)[None, :]
    w = tl.load(w_ptr + offsets + s * w_s, mask=inside, other=0.0)
    packed_ptr += pid.to(tl.int64) * (2 * COLUMNS * DEPTH)
    tl.store(packed_ptr + (m * DEPTH)[:, None] + depth[None, :], w)


def pack(w: Tensor, g: Conv2dGeometry, tile: Tile, run: Run) -> Tensor:
    """The filters as ``convolve`` takes them."""
    w = replay.contiguous(w) if device.int64_index(0, w) else w
    filter_tiles, k_tiles = cdiv(g.K, tile.columns), cdiv(g.R * run.segment, tile.depth)
    shape = filter_tiles, k_tiles, 2 * tile.columns, tile.depth
    packed = replay.new(w, shape, contiguous_strides(shape))
    device.launch(
        pack_kernel,
        (filter_tiles * k_tiles,),
        device=w.device,
        **pointers(w=w, packed=packed),
        w_strides=w.stride(),
        FILTERS=Filters.of(g),
        RUN=run._replace(unit=1),
        DEPTH=tile.depth,
        COLUMNS=tile.columns,
        num_warps=8,
    )
    return packed


@triton.jit
def halves(tile):
    """(even, odd)[filters, pairs] of a tile[filters in eights, each twice; pairs]."""
    M: tl.constexpr = tile.shape[0]
    PAIRS: tl.constexpr = tile.shape[1]
    tile = tile.reshape(M // 16, 2, 8, PAIRS).trans(0, 2, 3, 1)
    return tile.reshape(M // 2, PAIRS, 2).split()


@triton.jit
def convolve(
    x_ptr,
    packed_ptr,
    normalize,  # scale and shift[C], float32, of x in bytes, or None
    at,  # n_mask, h, w of each pair's first output and tap, its row's offset in x, the next tap's
    x_strides,
    sizes,  # H, W
    FILTERS: tl.constexpr,  # the Filters
    RUN: tl.constexpr,  # a Run
    TILE: tl.constexpr,  # its columns and depth count
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[filters, pairs] in float32: one output of each pair, or both where HALF is None.

    With both, an output's filter is zero outside its own window. So an infinity or NaN that only
    its neighbour sees makes it NaN.
    """
    C: tl.constexpr = FILTERS.C
    R: tl.constexpr = FILTERS.R
    SEGMENT: tl.constexpr = RUN.segment
    UNIT: tl.constexpr = RUN.unit
    DEPTH: tl.constexpr = TILE.depth
    COLUMNS: tl.constexpr = TILE.columns
    LINES: tl.constexpr = DEPTH // SEGMENT
    DTYPE: tl.constexpr = packed_ptr.dtype.element_ty
    n_mask, h0, w0, x_rows, x_step = at
    H, W = sizes
    depth = tl.arange(0, DEPTH)
    position = depth % SEGMENT + x_step * 0  # as wide as the offsets
    j = position - RUN.lead
    c, column = run_element(j, C, RUN.columns, RUN.flat)
    if RUN.flat:
        # Both ends of a row are multiples of the unit, as is the start of a run.
        start = tl.multiple_of(w0 * C - RUN.lead, UNIT)
        i = start[:, None] + position[None, :]
        x_mask = (i >= 0) & (i < tl.multiple_of(W * C, UNIT))
        x_offsets = tl.multiple_of(x_rows + start, UNIT)[:, None] + position[None, :]
    else:
        w = w0[:, None] + column[None, :]
        x_mask = within(w, W) & (c < C)[None, :]
        x_offsets = (x_rows + w0 * x_strides.w)[:, None]
        x_offsets += (c * x_strides.c + column * x_strides.w)[None, :]
    x_mask &= n_mask[:, None]
    scale, shift = load_normalization(normalize, c, (j >= 0) & (c < C))
    line = depth // SEGMENT
    if LINES > 1:
        x_offsets += (line * x_step)[None, :]

    m = tl.arange(0, 2 * COLUMNS if HALF is None else COLUMNS)
    if HALF is not None:
        m = m // 8 * 16 + HALF * 8 + m % 8
        _, seen = window_tap(column, HALF, FILTERS)
        seen &= j >= 0
    acc = tl.zeros((m.shape[0], h0.shape[0]), tl.float32)
    for i in tl.range((R + LINES - 1) // LINES, num_stages=None if HALF is None else 1):
        if LINES == 1:
            mask = x_mask & within(h0 + i * FILTERS.step_h, H)[:, None]
        else:
            r = i * LINES + line
            mask = (
                x_mask & within(h0[:, None] + (r * FILTERS.step_h)[None, :], H) & (r < R)[None, :]
            )
        x_at = x_offsets + tl.multiple_of(i * (LINES * x_step), UNIT)
        x = load_normalized(x_ptr, x_at, mask, normalize, scale, shift, DTYPE)
        if HALF is not None:
            x = tl.where(seen[None, :], x, 0.0)
        w_at = i * (2 * COLUMNS * DEPTH) + (m * DEPTH)[:, None] + depth[None, :]
        filters = tl.load(packed_ptr + w_at)
        fence_copies()
        acc = dot(filters, tl.trans(x), acc, PRECISION)
    return acc


@triton.jit
def pair_fprop_kernel(
    x_ptr,  # [N, C, H, W]
    packed_ptr,  # as pack_kernel writes it
    result,  # a Result; y[N, K, P, Q]
    x_strides,  # n, c, h, w, encoded
    sizes,  # N, H, W, P, Q, encoded
    origin,  # of the index map along the height and the width
    normalize,  # scale and shift[C], float32, of x in bytes, or None
    FILTERS: tl.constexpr,  # the Filters
    RUN: tl.constexpr,  # a Run
    TILE: tl.constexpr,  # a Block
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64_INDEX: tl.constexpr,
):
    """y[n,k,p,q] = act(sum over c,r,s of x[n,c,h,w] * w[k,c,r,s] + bias[k] + residual[n,k,p,q]).

    One program writes a tile of ``rows`` pixels by ``columns`` filters, accumulated in float32.
    """
    bias_ptr, residual_ptr, residual_strides, y_ptr, y_strides = result
    PAIRS: tl.constexpr = TILE.rows // 2
    COLUMNS: tl.constexpr = TILE.columns
    DEPTH: tl.constexpr = TILE.depth
    K: tl.constexpr = FILTERS.K
    K_TILES: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    TURNS: tl.constexpr = (FILTERS.R * RUN.segment + DEPTH - 1) // DEPTH
    N, H, W, P, Q = decode_ints(sizes)
    x_strides = decode_strides(x_strides)
    origin_h, origin_w = origin
    pid = program(INT64_INDEX)
    k_tile = pid % K_TILES
    n, p, q = pixel(pid // K_TILES * PAIRS + tl.arange(0, PAIRS), P, (Q + 1) // 2)
    h = p * FILTERS.stride_h + origin_h
    w = 2 * q * FILTERS.stride_w + origin_w
    x_step = (pid * 0 + FILTERS.step_h) * x_strides.h
    at = (n < N, h, w, n * x_strides.n + h * x_strides.h, x_step)
    x_sizes = (H, W)
    packed_ptr += k_tile * (TURNS * 2 * COLUMNS * DEPTH)
    both = convolve(
        x_ptr, packed_ptr, normalize, at, x_strides, x_sizes, FILTERS, RUN, TILE, None, PRECISION
    )
    even, odd = halves(both)
    total = tl.sum(both)
    if total != total:
        # A NaN, perhaps of what a neighbour alone sees.
        even = convolve(
            x_ptr, packed_ptr, normalize, at, x_strides, x_sizes, FILTERS, RUN, TILE, 0, PRECISION
        )
        odd = convolve(
            x_ptr, packed_ptr, normalize, at, x_strides, x_sizes, FILTERS, RUN, TILE, 1, PRECISION
        )

    acc = tl.join(even, odd).reshape(COLUMNS, 2 * PAIRS).trans()
    i = tl.arange(0, 2 * PAIRS)
    n, p, q = pixel(pid // K_TILES * PAIRS + i // 2, P, (Q + 1) // 2)
    q = 2 * q + i % 2
    k = k_tile * COLUMNS + tl.arange(0, COLUMNS)
    masks = ((n < N) & (q < Q), k < K)
    result = bias_ptr, residual_ptr, residual_strides, y_ptr, y_strides
    store_result(acc, (n, p, q), k, masks, result, ACTIVATION)


def fprop(call: Fprop, tile: Tile) -> None:
    """y[N,K,P,Q] = activation(conv(x, w) + bias + residual), of one group; x may have bytes."""
    x, y, g = call.x, call.y, call.g
    run = run_of(x, g)
    if 0 in y.shape:
        return
    packed = pack(call.w, g, tile, run)
    pairs = g.N * g.P * cdiv(g.Q, 2)
    for known in to_launch(run):
        device.launch(
            pair_fprop_kernel,
            (cdiv(pairs, tile.rows // 2) * cdiv(g.K, tile.columns),),
            device=x.device,
            **operands(x=x),
            packed_ptr=packed,
            **results(call.epilogue, y),
            sizes=encode_ints((g.N, g.H, g.W, g.P, g.Q)),
            origin=(g.index_map.origin_h, g.index_map.origin_w),
            normalize=call.normalization,
            FILTERS=Filters.of(g),
            RUN=known,
            TILE=Block.of(tile),
            PRECISION=call.precision,
            INT64_INDEX=device.int64_index(2 * pairs, x, call.epilogue.residual, y),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def _wgrad_tile(g: Conv2dGeometry, device: Device) -> Tile:
    """A tile of filters, each twice, by runs of x; its depth is a patch of pairs."""
    lines = power_of_2(g.R) * segment(g)
    if device.backend == "interpreter":
        rows, columns = 2 * max(8, min(512, power_of_2(g.K))), max(16, min(1024, lines))
        along = power_of_2(cdiv(g.Q, 2))
        depth = max(16, min(power_of_2(g.P) * along, INTERPRETER_ELEMENTS // max(rows, columns)))
        return Tile(rows, columns, depth, patch=(1, along))
    rows = 2 * max(8, min(64, power_of_2(g.K)))
    widest = 256 if device.arch == 90 else 128
    if _run(g, 0, flat=True, itemsize=2).unit <= 2:
        widest //= 2  # narrow loads are many, and each takes registers
    columns = max(16, min(widest, lines))
    depth, stages = (32, 2) if device.backend == "hip" else (64, 3)
    warps = 8 if columns > 64 else 4
    programs = cdiv(2 * g.K, rows) * cdiv(g.R * segment(g), columns)
    # As many programs as share the multiprocessors, but at least eight turns for each.
    split_k = min(
        cdiv(g.N * g.P * g.Q, 16 * depth),
        device.multiprocessors * (8 // warps) // max(1, programs),
    )
    return Tile(
        rows,
        columns,
        depth,
        split_k=max(1, split_k),
        warps=warps,
        stages=stages,
        patch=(depth // 8, 8),
    )


@triton.jit
def store_gradient(dw_ptr, dw_strides, dw, half, k, r, j, FILTERS: tl.constexpr, RUN: tl.constexpr):
    """Store dw[filters k, elements j of the runs of rows r], of the first or second outputs.

    What does not lie in their windows is dropped. ``dw_strides``: of parts, k, c, r, s.
    """
    c, column = run_element(j, FILTERS.C, RUN.columns, RUN.flat)
    s, mask = window_tap(column, half, FILTERS)
    mask &= (j >= 0) & (c < FILTERS.C) & (r < FILTERS.R)
    _, dw_k, dw_c, dw_r, dw_s = dw_strides
    offsets = c * dw_c + r * dw_r + s * dw_s
    offsets = (k * dw_k)[:, None] + offsets[None, :]
    tl.store(dw_ptr + offsets, dw, mask=(k < FILTERS.K)[:, None] & mask[None, :])


@triton.jit
def pair_wgrad_kernel(
    x_ptr,  # [N, C, H, W]
    dy_ptr,  # [N, K, P, Q]
    parts,  # GradientParts; dw[parts, K, C, R, S], db[parts, K]
    x_strides,  # n, c, h, w, encoded
    dy_strides,  # n, k, p, q, encoded
    patches,  # as _wgrad_patches gives it
    origin,  # of the index map along the height and the width
    pooled,  # of dy as load_pool_gradient takes it, or None
    POOL: tl.constexpr,  # its Window, or None
    normalize,  # scale and shift[C], float32, of x in bytes, or None
    FILTERS: tl.constexpr,  # the Filters
    RUN: tl.constexpr,  # a Run
    TILE: tl.constexpr,  # a _Patch
    PRECISION: tl.constexpr,
    INT64_INDEX: tl.constexpr,
):
    """dw[k,c,r,s] = sum over n,p,q of dy[n,k,p,q] * x[n,c,h,w], and db[k] = sum of dy[n,k,p,q].

    x in bytes counts as x * scale[c] + shift[c], rounded to dy's dtype. One program multiplies
    ``rows / 2`` filters' dy, of the first and the second output of each pair, by the runs that
    ``columns / segment`` rows of a filter meet. It sums a share of the pairs in float32, and writes
    what the first outputs and what the second ones add to dw as two parts. The products of an
    output with what only its neighbour sees are dropped, so x need not be finite there. The last
    column of an odd width therefore has programs of its own, which write one part instead of two.

    A turn's pairs are a patch: so many rows of y, and of each so many pairs, or the last output in
    so many images. Indices that end in _in are within a patch, the same in every turn.
    """
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    HEIGHT: tl.constexpr = TILE.height
    WIDTH: tl.constexpr = TILE.width
    K: tl.constexpr = FILTERS.K
    C: tl.constexpr = FILTERS.C
    R: tl.constexpr = FILTERS.R
    STEP: tl.constexpr = 2 * FILTERS.stride_w
    UNIT: tl.constexpr = RUN.unit
    dw_ptr, db_ptr, dw_strides = parts
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    K_TILES: tl.constexpr = (2 * K + ROWS - 1) // ROWS
    LINES: tl.constexpr = COLUMNS // RUN.segment
    LINE_TILES: tl.constexpr = 1 if dw_ptr is None else (R + LINES - 1) // LINES
    x_strides = decode_strides(x_strides)
    dy_strides = decode_strides(dy_strides)
    sizes, divisors = patches
    N, H, W, P, Q, split_k, singles, tall, wide, wide_single = decode_ints(sizes)
    by_tall, tall_shift, by_wide, wide_shift, by_single, single_shift = decode_ints(divisors)
    origin_h, origin_w = origin

    pid = program(INT64_INDEX)
    line_tile = pid % LINE_TILES
    k_tile = pid // LINE_TILES % K_TILES
    split = pid // (LINE_TILES * K_TILES)
    single = split >= split_k
    part = tl.where(single, split_k + split, 2 * split)
    split = tl.where(single, split - split_k, split)
    across = tl.where(single, N, Q // 2)  # pairs of a row, or images
    wide = tl.where(single, wide_single, wide)
    by_wide = tl.where(single, by_single, by_wide)
    wide_shift = tl.where(single, single_shift, wide_shift)
    count = tall * wide * tl.where(single, 1, N)
    patches_per_share = tl.cdiv(count, tl.where(single, singles, split_k))

    m = tl.arange(0, ROWS)
    half = m // 8 % 2
    k = k_tile * (ROWS // 2) + m // 16 * 8 + m % 8
    k_mask = (k < K) & (half < tl.where(single, 1, 2))
    zero = pid * 0  # as wide as the offsets
    i = tl.arange(0, HEIGHT * WIDTH) + zero
    p_in = i // WIDTH
    across_in = i % WIDTH
    dy_in = (k * dy_strides.c + half * dy_strides.w)[:, None]
    dy_in += (p_in * dy_strides.h)[None, :]
    dy_step = tl.where(single, zero + dy_strides.n, zero + 2 * dy_strides.w)
    dy_in += (across_in * dy_step)[None, :]

    column = tl.arange(0, COLUMNS)
    r = line_tile * LINES + column // RUN.segment
    position = column % RUN.segment + zero
    j = position - RUN.lead
    c, column = run_element(j, C, RUN.columns, RUN.flat)
    scale, shift = load_normalization(normalize, c, (j >= 0) & (c < C))
    if RUN.flat:
        # Along the width, x is one axis of W * C elements, and a run goes its C-th part as far.
        width = W * C // UNIT * UNIT  # a multiple of the unit, as is the start of a run
        w_step = STEP * C
        w_in = position
        x_in = tl.multiple_of(r * FILTERS.step_h * x_strides.h, UNIT) + position
        x_step = tl.where(single, zero + x_strides.n, zero + w_step)
    else:
        width = W
        w_step = STEP
        w_in = tl.where(c < C, column, W - origin_w)
        x_in = r * FILTERS.step_h * x_strides.h + c * x_strides.c + column * x_strides.w
        x_step = tl.where(single, zero + x_strides.n, zero + w_step * x_strides.w)
    h_in = tl.where(r < R, r * FILTERS.step_h, H - origin_h)  # beyond the image from any row
    x_in = tl.multiple_of(across_in * x_step, UNIT)[:, None] + x_in[None, :]
    x_in += tl.multiple_of(p_in * (FILTERS.stride_h * x_strides.h), UNIT)[:, None]

    dw = tl.zeros((ROWS, COLUMNS), tl.float32)
    db = tl.zeros((ROWS, 16), tl.float32)
    ones = downcast(tl.full((HEIGHT * WIDTH, 16), 1.0, tl.float32), DTYPE)
    first = split * patches_per_share
    end = tl.minimum((split + 1) * patches_per_share, count)
    for patch in loop(first, end):
        row = quotient(patch, wide, by_wide, wide_shift)
        n = quotient(row, tall, by_tall, tall_shift)
        p = zero + (row - n * tall) * HEIGHT
        first = (patch - row * wide) * WIDTH
        n = zero + tl.where(single, first, n)
        q = zero + tl.where(single, Q - 1, 2 * first)
        inside = (p_in < P - p) & (across_in < across - first)
        # [ROWS, pairs]
        dy_at = n * dy_strides.n + p * dy_strides.h + q * dy_strides.w
        dy_mask = k_mask[:, None] & inside[None, :]
        if POOL is None:
            dy = tl.load(dy_ptr + dy_at + dy_in, mask=dy_mask, other=0.0)
        else:
            images = n + tl.where(single, across_in, 0)
            outputs = q + tl.where(single, 0, 2 * across_in)
            outputs = half[:, None] + outputs[None, :]
            where = images[None, :], k[:, None], (p + p_in)[None, :], outputs
            dy = load_pool_gradient(dy_ptr, dy_strides, pooled, where, dy_mask, POOL)
        if dw_ptr is not None:
            # [pairs, COLUMNS]
            h = p * FILTERS.stride_h + origin_h
            w = q * FILTERS.stride_w + origin_w
            x_at = n * x_strides.n + h * x_strides.h
            if RUN.flat:
                w = w * C - RUN.lead
                x_at = tl.multiple_of(x_at + w, UNIT)
            else:
                x_at += w * x_strides.w
            h = tl.where(p_in < P - p, h + p_in * FILTERS.stride_h, H)
            w += tl.where(single, 0, across_in * w_step)
            w = tl.multiple_of(tl.where(across_in < across - first, w, width), UNIT)
            x_mask = within(h[:, None] + h_in[None, :], H)
            x_mask &= within(w[:, None] + w_in[None, :], width)
            x = load_normalized(x_ptr + x_at, x_in, x_mask, normalize, scale, shift, DTYPE)
            fence_copies()
            dw = dot(dy, x, dw, PRECISION)
        if db_ptr is not None:
            fence_copies()
            db = dot(dy, ones, db, PRECISION)

    if db_ptr is not None:
        if line_tile == 0:
            copy = tl.arange(0, 16)[None, :]
            db_at = ((part + half) * K + k)[:, None] + copy * 0
            tl.store(db_ptr + db_at, db, mask=k_mask[:, None] & (copy == 0))
    if dw_ptr is not None:
        first, second = halves(dw)
        k = k_tile * (ROWS // 2) + tl.arange(0, ROWS // 2)
        dw_part, _, _, _, _ = dw_strides
        dw_ptr += part * dw_part
        store_gradient(dw_ptr, dw_strides, first, 0, k, r, j, FILTERS, RUN)
        if not single:
            dw_ptr += dw_part
            store_gradient(dw_ptr, dw_strides, second, 1, k, r, j, FILTERS, RUN)


class _Patch(NamedTuple):
    """What of a tile wgrad's kernel is compiled for: its depth is ``height`` x ``width`` pairs."""

    rows: int
    columns: int
    height: int
    width: int


class _Patches(NamedTuple):
    """How wgrad's programs share the pairs: two parts come of a split, one of a single."""

    shares: int
    parts: int
    sizes: tuple[int, ...]
    divisors: tuple[int, ...]


def _wgrad_patches(g: Conv2dGeometry, shares: int, height: int, width: int) -> _Patches:
    """The patches of height x width outputs.

    ``sizes``: N, H, W, P, Q, split_k, singles; patches along p, along q, of images. ``divisors``
    divide by these three.
    """
    tall, wide, deep = cdiv(g.P, height), cdiv(g.Q // 2, width), cdiv(g.N, width)
    split_k, singles = shares, 0
    if g.Q % 2:
        single = cdiv(shares * deep, max(1, deep + g.N * wide))
        singles = max(1, min(single, shares - 1))
        split_k = max(1, shares - singles)
    sizes = encode_ints((g.N, g.H, g.W, g.P, g.Q, split_k, singles, tall, wide, deep))
    return _Patches(split_k + singles, 2 * split_k + singles, sizes, divisors(tall, wide, deep))


def wgrad(call: Wgrad, tile: Tile) -> None:
    """dw[K,C,R,S] and db[K], of one group; x may have bytes, dy be a pooled gradient.

    The pairs are summed in ``tile.split_k`` shares. A second pass adds their parts in order.
    """
    x, dy, g = call.x, call.dy, call.g
    computed = call.pooled is not None or call.normalization is not None
    width = min(tile.patch[1], tile.depth)
    height = tile.depth // width
    patches = _wgrad_patches(g, tile.split_k, height, width)
    maxima, window = pooled(call.pooled)
    argmax = call.pooled and call.pooled.argmax
    run = run_of(x, g)
    with gradients(call.dw, call.db, patches.parts) as parts:
        for known in to_launch(run):
            # Loads of four bytes go to shared memory on their own, narrower ones through registers.
            copied = known.unit * x.element_size() >= 4 and not computed
            columns, warps, stages = tile.columns, tile.warps, tile.stages
            if not copied and not device.INTERPRET:
                columns, warps, stages = max(run.segment, min(64, columns)), 8, 1
            lines = 1 if call.dw is None else cdiv(g.R, columns // run.segment)
            device.launch(
                pair_wgrad_kernel,
                (lines * cdiv(2 * g.K, tile.rows) * patches.shares,),
                device=x.device,
                **operands(x=x, dy=dy),
                parts=tuple(parts),
                patches=(patches.sizes, patches.divisors),
                origin=(g.index_map.origin_h, g.index_map.origin_w),
                pooled=maxima,
                POOL=window,
                normalize=call.normalization,
                FILTERS=Filters.of(g),
                RUN=known,
                TILE=_Patch(tile.rows, columns, height, width),
                PRECISION=call.precision,
                INT64_INDEX=device.int64_index(g.N * g.P * g.Q, x, dy, parts.dw, argmax),
                num_warps=warps,
                num_stages=stages,
                **device.all_registers(x.device),
            )


ENGINE = Engine(
    "paired_columns",
    tiles=tiles,
    launchers={Fprop: fprop, Wgrad: wgrad},
    fuses={"fprop": frozenset({"bytes"}), "wgrad": frozenset({"bytes", "pool_gradient"})},
    predict=cost_model.predict_direct,
)
