"""A network's stem in one kernel: convolution of few channels, bias, ReLU and max-pooling.

The map between convolution and pooling is never written. Sizes and strides are in elements.

*Pairs.* Two neighbouring outputs are one row of the product, as in ``paired_columns``. So even and
odd columns of the map come apart in the accumulator, even and odd rows by the order of its rows,
and a window of two by two is four numbers of one thread.

*Keys.* Each value, rounded to the result's dtype, becomes an integer: its bits, above a number that
falls from tap to tap. One integer maximum then keeps value and switch, and of equal values the
first. A NaN, made positive, exceeds all numbers; what is negative loses to zero as in the ReLU. Of
several NaNs the last has to win: a tile with a NaN is made again, with numbers of NaNs that rise.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import device
from ..conv.engine import PooledConv, PoolingEngine
from ..conv.paired_columns import (
    DEEPEST,
    FEW,
    Filters,
    convolve,
    halves,
    pack,
    run_of,
    segment,
    to_launch,
)
from ..device import INTERPRET, Device
from ..geometry import Conv2dGeometry, Pool2dGeometry
from ..lang.epilogue import PooledResult
from ..lang.integers import (
    cdiv,
    decode_ints,
    decode_strides,
    encode_ints,
    operands,
    power_of_2,
    program,
    within,
)
from ..lang.numerics import downcast, upcast
from ..problem import Problem
from ..tile import INTERPRETER_ELEMENTS, Tile

_INTERPRET = tl.constexpr(INTERPRET)
_LAST = tl.constexpr(15)  # what the first tap is numbered; the t-th has t less
_GROUPS = tl.constexpr(4)  # of rows of the map, each in threads of its own
_SHIFTED = tl.constexpr(2**20 if INTERPRET else 1)  # what the interpreter gathers at once


class _Window(NamedTuple):
    """What of a pooling the kernel is compiled for."""

    R: int
    S: int
    top: int
    left: int


class _Block(NamedTuple):
    """What of a tile the kernel is compiled for: images, their pixels, filters, and the depth."""

    images: int
    height: int
    width: int
    columns: int
    depth: int


def supports(problem: Problem, pool: Pool2dGeometry) -> bool:
    """Whether the kernel takes a convolution and the pooling of its map, in any layout."""
    g, dtype = problem.g, problem.dtype
    if g.groups != 1 or g.C > FEW or dtype == torch.float64 or problem.device.backend == "hip":
        return False
    if pool.stride != (2, 2) or pool.dilation != (1, 1) or not {*pool.kernel} <= {2, 3}:
        return False
    return segment(g) <= DEEPEST


def tiles(problem: Problem, pool: Pool2dGeometry) -> Iterator[Tile]:
    """A tile of pixels of the map by filters; ``box`` is how the pixels lie in n, p and q."""
    if supports(problem, pool):
        yield _tile(problem.g, pool, problem.dtype, problem.device)


def _tile(g: Conv2dGeometry, pool: Pool2dGeometry, dtype: torch.dtype, device: Device) -> Tile:
    depth = max(16, segment(g))
    if device.backend != "interpreter":
        # Hopper multiplies 64 rows at once, and keeps less in registers.
        hopper = device.arch == 90
        columns = max(16, min(64 if hopper and dtype.itemsize == 2 else 32, power_of_2(g.K)))
        warps = 8 if hopper or depth < DEEPEST else 4
        return Tile(256, columns, depth, warps=warps, stages=3, box=(1, 16, 16))
    columns = max(16, min(64, power_of_2(g.K)))
    depth = max(16, power_of_2(g.R) * segment(g))
    limit = INTERPRETER_ELEMENTS // max(columns, depth)
    p, q = (
        2 * max(_GROUPS.value, min(16, power_of_2(outputs + kernel - 2)))
        for outputs, kernel in zip((pool.P, pool.Q), pool.kernel, strict=True)
    )
    images = max(1, min(power_of_2(g.N), limit // (p * q)))
    return Tile(images * p * q, columns, depth, box=(images, p, q))


@triton.jit
def keys(values, bias, inside, TAP: tl.constexpr, EXACT: tl.constexpr, DTYPE: tl.constexpr):
    """(values + bias)[channels, pixels] above the number of their tap; negative if not inside."""
    values += bias[:, None]
    if DTYPE == tl.float32 or _INTERPRET:
        # A GPU's conversion to 16 bits gives NaN without a sign; what sums give is unspecified.
        values = tl.where(values != values, float("nan"), values)
    rounded = downcast(values, DTYPE)
    if DTYPE == tl.float32:
        bits = rounded.to(tl.int32, bitcast=True).to(tl.int64) << 32
    else:
        bits = rounded.to(tl.int16, bitcast=True).to(tl.int32) << 16
    bits |= _LAST - TAP
    if EXACT:
        bits = tl.where(values != values, bits ^ _LAST, bits)
    return tl.where(inside[None, :], bits, -_LAST)


@triton.jit
def is_nan(key, DTYPE: tl.constexpr):
    """Whether the value of a key is a NaN."""
    HALF_INFINITY: tl.constexpr = 0x7C00 if DTYPE == tl.float16 else 0x7F80
    if DTYPE == tl.float32:
        nan = key >> 32 > 0x7F800000
    else:
        nan = key >> 16 > HALF_INFINITY
    return nan


@triton.jit
def earlier(key, TAPS: tl.constexpr, EXACT: tl.constexpr, DTYPE: tl.constexpr):
    """The key as of a tap that comes so many taps earlier."""
    if EXACT:
        key += tl.where(is_nan(key, DTYPE), -TAPS, TAPS)
    else:
        key += TAPS
    return key


@triton.jit
def before(tile, END: tl.constexpr):
    """tile[i - 1] at i along the last axis; what i = 0 gets is never asked for.

    The axis is taken apart as long as it lies in registers, which costs nothing.
    """
    SIZE: tl.constexpr = tile.shape[1]
    ROWS: tl.constexpr = tile.shape[0]
    if SIZE == 1:
        shifted = tile
    elif SIZE <= END:
        i = tl.maximum(tl.arange(0, SIZE) - 1, 0)
        shifted = tl.gather(tile, tl.broadcast_to(i[None, :], tile.shape), 1)
    else:
        even, odd = tile.reshape(ROWS, SIZE // 2, 2).split()
        shifted = tl.join(before(odd, END), even).reshape(ROWS, SIZE)
    return shifted


@triton.jit
def before_column(key, POINTS: tl.constexpr):
    """The key of the column pair to the left, of keys[channels, column pairs of POINTS rows]."""
    CHANNELS: tl.constexpr = key.shape[0]
    ACROSS: tl.constexpr = key.shape[1] // POINTS
    key = key.reshape(CHANNELS, ACROSS, POINTS).trans(0, 2, 1).reshape(CHANNELS * POINTS, ACROSS)
    key = before(key, _SHIFTED).reshape(CHANNELS, POINTS, ACROSS).trans(0, 2, 1)
    return key.reshape(CHANNELS, ACROSS * POINTS)


@triton.jit
def before_row(key, DOWN: tl.constexpr):
    """The key of the row pair above, of keys[channels, DOWN pairs of each of GROUPS last]."""
    LINES: tl.constexpr = key.shape[0] * key.shape[1] // (DOWN * _GROUPS)
    shape: tl.constexpr = key.shape
    key = key.reshape(LINES, DOWN, _GROUPS).trans(0, 2, 1).reshape(LINES, _GROUPS * DOWN)
    key = before(key, _GROUPS).reshape(LINES, _GROUPS, DOWN).trans(0, 2, 1)
    return key.reshape(shape)


@triton.jit
def pooled(
    even,
    odd,
    bias,
    at,
    sizes,
    POOL: tl.constexpr,
    DOWN: tl.constexpr,
    EXACT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The largest key of each window[channels, windows], at least 0.

    ``at`` is where in the map the last two rows and columns of each window start.
    """
    S: tl.constexpr = POOL.S
    TAP: tl.constexpr = (POOL.R - 2) * S + S - 2
    CHANNELS: tl.constexpr = even.shape[0]
    WINDOWS: tl.constexpr = even.shape[1] // 2
    even_left, odd_left = even.reshape(CHANNELS, WINDOWS, 2).split()
    even_right, odd_right = odd.reshape(CHANNELS, WINDOWS, 2).split()
    p, q = at
    P, Q = sizes
    even_row = within(p, P)
    odd_row = within(p + 1, P)
    left = within(q, Q)
    right = within(q + 1, Q)
    even_right = keys(even_right, bias, even_row & right, TAP + 1, EXACT, DTYPE)
    odd_right = keys(odd_right, bias, odd_row & right, TAP + S + 1, EXACT, DTYPE)
    even = tl.maximum(keys(even_left, bias, even_row & left, TAP, EXACT, DTYPE), even_right)
    odd = tl.maximum(keys(odd_left, bias, odd_row & left, TAP + S, EXACT, DTYPE), odd_right)
    if S == 3:
        even_left = before_column(even_right, DOWN * _GROUPS)
        odd_left = before_column(odd_right, DOWN * _GROUPS)
        even = tl.maximum(even, earlier(even_left, 2, EXACT, DTYPE))
        odd = tl.maximum(odd, earlier(odd_left, 2, EXACT, DTYPE))
    best = tl.maximum(even, odd)
    if POOL.R == 3:
        best = tl.maximum(best, earlier(before_row(odd, DOWN), 2 * S, EXACT, DTYPE))
    if EXACT:
        best = tl.where(is_nan(best, DTYPE), best ^ _LAST, best)
    return tl.maximum(best, 0)


@triton.jit
def windows(pid, sizes, K: tl.constexpr, POOL: tl.constexpr, TILE: tl.constexpr):
    """(k_tile, n, p, q, owned) of the windows of a program's tile; not owned are those before it.

    By image, pair of columns, pair of rows in a group, and group: what lies in one thread or in
    neighbouring ones can be compared at little cost.
    """
    DOWN: tl.constexpr = TILE.height // 2
    ACROSS: tl.constexpr = TILE.width // 2
    K_TILES: tl.constexpr = (K + TILE.columns - 1) // TILE.columns
    PP, PQ = sizes
    tile = pid // K_TILES
    q_tiles = tl.cdiv(PQ, ACROSS - POOL.S + 2)
    p_tiles = tl.cdiv(PP, DOWN - POOL.R + 2)
    row = tile // q_tiles
    image = row // p_tiles
    p0 = (row - image * p_tiles) * (DOWN - POOL.R + 2) - POOL.R + 2
    q0 = (tile - row * q_tiles) * (ACROSS - POOL.S + 2) - POOL.S + 2
    i = tl.arange(0, TILE.images * ACROSS * DOWN)
    p = i % _GROUPS * (DOWN // _GROUPS) + i // _GROUPS % (DOWN // _GROUPS)
    q = i // DOWN % ACROSS
    owned = (p >= POOL.R - 2) & (q >= POOL.S - 2)
    return pid % K_TILES, image * TILE.images + i // (ACROSS * DOWN), p0 + p, q0 + q, owned


@triton.jit
def tile_keys(
    pid,
    inputs,  # x_ptr, packed_ptr, bias_ptr, x_strides, sizes, origin
    FILTERS: tl.constexpr,
    POOL: tl.constexpr,
    RUN: tl.constexpr,
    TILE: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The keys of a tile's windows[filters, windows].

    If exact, an output's products are its own alone, and of several NaNs the last wins.
    """
    COLUMNS: tl.constexpr = TILE.columns
    DEPTH: tl.constexpr = TILE.depth
    TURNS: tl.constexpr = (FILTERS.R * RUN.segment + DEPTH - 1) // DEPTH
    x_ptr, packed_ptr, bias_ptr, x_strides, sizes, origin = inputs
    N, H, W, P, Q, PP, PQ = decode_ints(sizes)
    x_strides = decode_strides(x_strides)
    origin_h, origin_w = origin
    k_tile, n, p, q, _ = windows(pid, (PP, PQ), FILTERS.K, POOL, TILE)
    # Where in the map the last two rows and columns of each window start.
    p = 2 * p + POOL.R - 2 - POOL.top
    q = 2 * q + POOL.S - 2 - POOL.left
    h = p * FILTERS.stride_h + origin_h
    w = q * FILTERS.stride_w + origin_w

    # Each window's two rows, side by side
    h = tl.join(h, h + FILTERS.stride_h).reshape(2 * h.shape[0])
    w = tl.join(w, w).reshape(h.shape)
    n = tl.join(n, n).reshape(h.shape)
    x_step = (pid * 0 + FILTERS.step_h) * x_strides.h
    x_at = (n < N, h, w, n * x_strides.n + h * x_strides.h, x_step)
    packed_ptr += k_tile * (TURNS * 2 * COLUMNS * DEPTH)
    x_sizes = (H, W)
    if EXACT:
        even = convolve(
            x_ptr, packed_ptr, None, x_at, x_strides, x_sizes, FILTERS, RUN, TILE, 0, PRECISION
        )
        odd = convolve(
            x_ptr, packed_ptr, None, x_at, x_strides, x_sizes, FILTERS, RUN, TILE, 1, PRECISION
        )
    else:
        both = convolve(
            x_ptr, packed_ptr, None, x_at, x_strides, x_sizes, FILTERS, RUN, TILE, None, PRECISION
        )
        even, odd = halves(both)
    bias = tl.zeros((COLUMNS,), tl.float32)
    if bias_ptr is not None:
        k = k_tile * COLUMNS + tl.arange(0, COLUMNS)
        bias = upcast(tl.load(bias_ptr + k, mask=k < FILTERS.K, other=0.0), tl.float32)
    DOWN: tl.constexpr = TILE.height // (2 * _GROUPS)
    return pooled(even, odd, bias, (p, q), (P, Q), POOL, DOWN, EXACT, DTYPE)


@triton.jit
def few_channel_pool_kernel(
    x_ptr,  # [N, C, H, W]
    packed_ptr,  # as pack_kernel writes it
    result,  # a PooledResult; y[N, K, PP, PQ]
    x_strides,  # n, c, h, w, encoded
    sizes,  # N, H, W, P, Q, PP, PQ, encoded
    origin,  # of the index map along the height and the width
    FILTERS: tl.constexpr,  # the Filters
    POOL: tl.constexpr,  # a _Window
    RUN: tl.constexpr,  # a Run
    TILE: tl.constexpr,  # a _Block
    PRECISION: tl.constexpr,
    INT64_INDEX: tl.constexpr,
):
    """y[n,k,p,q] = max over a window of relu(conv(x, w) + bias), and the tap that won.

    A tap is r * S + s in the pooling's window, 255 where y is zero and no gradient flows. One
    program makes one tile of the map, accumulated in float32, and pools it. Where windows overlap,
    the tile starts with a pair of rows and one of columns that the windows before share.
    """
    bias_ptr, y_ptr, argmax_ptr, y_strides, argmax_strides = result
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    BITS: tl.constexpr = 32 if DTYPE == tl.float32 else 16
    pid = program(INT64_INDEX)
    inputs = (x_ptr, packed_ptr, bias_ptr, x_strides, sizes, origin)
    key = tile_keys(pid, inputs, FILTERS, POOL, RUN, TILE, False, PRECISION, DTYPE)
    largest = key.max()
    if is_nan(largest, DTYPE):
        # A NaN, perhaps of what a neighbour alone sees, perhaps one of several in a window. Nothing
        # for this rare case stays in registers: zero is added, which the compiler cannot know.
        same = pid + (largest >> (2 * BITS - 1))
        key = tile_keys(same, inputs, FILTERS, POOL, RUN, TILE, True, PRECISION, DTYPE)

    N, _, _, _, _, PP, PQ = decode_ints(sizes)
    k_tile, n, p, q, owned = windows(pid, (PP, PQ), FILTERS.K, POOL, TILE)
    k = k_tile * TILE.columns + tl.arange(0, TILE.columns)
    mask = (k < FILTERS.K)[:, None] & (owned & (n < N) & (p < PP) & (q < PQ))[None, :]
    INTEGER: tl.constexpr = tl.int32 if DTYPE == tl.float32 else tl.int16
    y = (key >> BITS).to(INTEGER).to(DTYPE, bitcast=True)
    y_strides = decode_strides(y_strides)
    offsets = n * y_strides.n + p * y_strides.h + q * y_strides.w
    tl.store(y_ptr + ((k * y_strides.c)[:, None] + offsets[None, :]), y, mask=mask)
    if argmax_ptr is not None:
        tap = tl.where(key >> BITS > 0, _LAST - (key & _LAST), 255).to(tl.uint8)
        argmax_strides = decode_strides(argmax_strides)
        offsets = n * argmax_strides.n + p * argmax_strides.h + q * argmax_strides.w
        offsets = (k * argmax_strides.c)[:, None] + offsets[None, :]
        tl.store(argmax_ptr + offsets, tap, mask=mask)


def conv2d_relu_max_pool2d(call: PooledConv, tile: Tile) -> None:
    """y[N,K,PP,PQ] = max_pool(relu(conv(x, w) + bias)), and argmax."""
    x, y, argmax, g, pool = call.x, call.y, call.argmax, call.g, call.pool
    images, rows, columns = tile.box or (1, 0, 0)
    p_tiles, q_tiles = (
        cdiv(outputs, size // 2 - (kernel - 2))
        for outputs, size, kernel in zip(
            (pool.P, pool.Q), (rows, columns), pool.kernel, strict=True
        )
    )
    programs = cdiv(g.N, images) * p_tiles * q_tiles * cdiv(g.K, tile.columns)
    window = _Window(*pool.kernel, *pool.padding)
    run = run_of(x, g, 2 - window.S - window.left)
    packed = pack(call.w, g, tile, run)
    for known in to_launch(run):
        device.launch(
            few_channel_pool_kernel,
            (programs,),
            device=x.device,
            **operands(x=x),
            packed_ptr=packed,
            result=tuple(PooledResult.of(call.bias, y, argmax)),
            sizes=encode_ints((g.N, g.H, g.W, g.P, g.Q, pool.P, pool.Q)),
            origin=(g.index_map.origin_h, g.index_map.origin_w),
            FILTERS=Filters.of(g),
            POOL=window,
            RUN=known,
            TILE=_Block(images, rows, columns, tile.columns, tile.depth),
            PRECISION=call.precision,
            INT64_INDEX=device.int64_index(g.N * g.P * g.Q, x, y),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


ENGINE = PoolingEngine("few_channels", tiles=tiles, launch=conv2d_relu_max_pool2d)
