"""Engine 3: direct convolution, for few input channels (C / groups <= 4).

With few channels, a row of the filter is one run of S x C elements that lie together in x as well,
c fastest in channels_last and s fastest in NCHW: it becomes one segment of the product's depth,
cut into (c, s) once, outside the loop over the rows. dgrad runs on parts of dx and w, one for each
phase of the stride, as in engine 1. Sizes and strides are in elements.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import cost_model, device
from ..device import loop
from ..geometry import Conv2dGeometry, Direction, dgrad_index_map
from ..lang.epilogue import Epilogue, results, store_result
from ..lang.integers import (
    cdiv,
    decode_ints,
    decode_strides,
    encode_ints,
    operands,
    pixel,
    power_of_2,
    program,
    within,
)
from ..lang.numerics import dot, downcast, fence_copies, upcast
from ..lang.prologue import load_normalization, load_normalized
from ..lang.reduction import reduction_block, reduction_tiles
from ..lang.split_sum import gradients
from ..pool.pool_gradient import load_gradient, pooled
from ..problem import Problem
from ..tile import INTERPRETER_ELEMENTS, Block, Tile, overlapped
from .engine import Dgrad, Engine, Fprop, Wgrad
from .paired_columns import FEW


@triton.jit
def indices(COUNT: tl.constexpr, INT64_INDEX: tl.constexpr):
    """0 .. COUNT - 1, as wide as the offsets that are computed from them."""
    i = tl.arange(0, COUNT)
    if INT64_INDEX:
        i = i.to(tl.int64)
    return i


@triton.jit
def lines(BLOCK: tl.constexpr, SEGMENT: tl.constexpr, INT64_INDEX: tl.constexpr):
    """(line, position) of a block's elements, in lines of SEGMENT; of one line, the scalar 0."""
    position = indices(BLOCK, INT64_INDEX)
    if BLOCK == SEGMENT:
        line = program(INT64_INDEX) * 0
    else:
        line = position // SEGMENT
        position = position % SEGMENT
    return line, position


@triton.jit
def row_element(i, C, S, CHANNELS_FASTEST: tl.constexpr):
    """(c, s, inside) of the i-th of the S x C elements of one row of a filter."""
    if CHANNELS_FASTEST:
        s = i // C
        c = i - s * C
    else:
        c = i // S
        s = i - c * S
    return c, s, i < C * S


@triton.jit
def sum_pixels(
    dy_ptr,
    dy_strides,
    counts,
    k,
    k_mask,
    first,
    k_tiles,
    DEPTH: tl.constexpr,
    ACC: tl.constexpr,
    pooled=None,
    POOL: tl.constexpr = None,
):
    """db[k], the sum of dy over ``k_tiles`` blocks of DEPTH pixels from the ``first`` block on.

    ``counts`` are N * P * Q, P and Q; ``pooled`` and POOL as for wgrad.
    """
    pixels, P, Q = counts
    acc = tl.zeros((k.shape[0], DEPTH), ACC)
    for i in loop(k_tiles):
        at = (first + i) * DEPTH + tl.arange(0, DEPTH)
        n, p, q = pixel(at, P, Q)
        offsets = n * dy_strides.n + p * dy_strides.h + q * dy_strides.w
        offsets = (k * dy_strides.c)[:, None] + offsets[None, :]
        mask = k_mask[:, None] & (at < pixels)[None, :]
        where = n[None, :], k[:, None], p[None, :], q[None, :]
        dy = load_gradient(dy_ptr, dy_strides, offsets, where, mask, pooled, POOL)
        acc += upcast(dy, ACC)
    return tl.sum(acc, axis=1)


@triton.jit
def few_channel_fprop_kernel(
    x_ptr,  # [N, groups * C, H, W]
    w_ptr,  # [groups * K, C, R, S]
    result,  # a Result; y[N, groups * K, P, Q]
    x_strides,  # n, c, h, w, encoded
    w_strides,  # k, c, r, s
    sizes,  # N, H, W, P, Q, encoded
    reduction,  # groups, K, C, R, S; K and C of one group
    index_map,  # an IndexMap
    normalize,  # scale and shift[groups * C], float32, of x in bytes, or None
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64_INDEX: tl.constexpr,
    TILE: tl.constexpr,  # a _Segments
):
    """y[n,k,p,q] = act(sum over c,r,s of x[n,c,h,w] * w[k,c,r,s] + bias[k] + residual[n,k,p,q]).

    h and w are where ``index_map`` has (p, q) and (r, s) meet; x is zero outside. In bytes it
    counts as x * scale[c] + shift[c], rounded to w's dtype. One program writes one rows x columns
    tile of one group, accumulated in float32 (float64 for float64). A turn's depth is
    ``depth / segment`` rows of the filter, each padded to a segment.
    """
    bias_ptr, residual_ptr, residual_strides, y_ptr, y_strides = result
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    DEPTH: tl.constexpr = TILE.depth
    SEGMENT: tl.constexpr = TILE.segment
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    N, H, W, P, Q = decode_ints(sizes)
    groups, K, C, R, S = reduction
    x_strides = decode_strides(x_strides)
    w_k, w_c, w_r, w_s = w_strides
    stride_h, origin_h, step_h, stride_w, origin_w, step_w = index_map

    pid = program(INT64_INDEX)
    column_tiles = tl.cdiv(K, COLUMNS)
    group = pid // column_tiles % groups
    row = pid // (column_tiles * groups) * ROWS + tl.arange(0, ROWS)
    n, p, q = pixel(row, P, Q)
    row_mask = n < N
    k = pid % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    k_mask = k < K
    k += group * K

    h0 = p * stride_h + origin_h
    w0 = q * stride_w + origin_w
    x_ptr += group * C * x_strides.c
    line, position = lines(DEPTH, SEGMENT, INT64_INDEX)
    acc = tl.zeros((ROWS, COLUMNS), ACC)
    for part in loop(tl.cdiv(S * C, SEGMENT)):
        c, s, inside = row_element(part * SEGMENT + position, C, S, TILE.channels_fastest)
        w = w0[:, None] + s * step_w
        scale, shift = load_normalization(normalize, group * C + c, inside)
        # [ROWS, DEPTH]
        along = (n * x_strides.n)[:, None] + (c * x_strides.c)[None, :] + w * x_strides.w
        along_mask = (row_mask[:, None] & inside[None, :]) & within(w, W)
        w_along = c * w_c + s * w_s
        for i in loop(tl.cdiv(R, DEPTH // SEGMENT)):
            r = i * (DEPTH // SEGMENT) + line
            h = h0[:, None] + r * step_h
            x_mask = along_mask & within(h, H)
            w_mask = inside
            if DEPTH > SEGMENT:
                x_mask &= (r < R)[None, :]
                w_mask &= r < R
            x_offsets = along + h * x_strides.h
            x_tile = load_normalized(x_ptr, x_offsets, x_mask, normalize, scale, shift, DTYPE)
            # [DEPTH, COLUMNS]
            w_mask = w_mask[:, None] & k_mask[None, :]
            w_offsets = (w_along + r * w_r)[:, None] + (k * w_k)[None, :]
            w_tile = tl.load(w_ptr + w_offsets, mask=w_mask, other=0.0)
            fence_copies()
            acc = dot(x_tile, w_tile, acc, PRECISION)

    masks = (row_mask, k_mask)
    result = bias_ptr, residual_ptr, residual_strides, y_ptr, y_strides
    store_result(acc, (n, p, q), k, masks, result, ACTIVATION)


@triton.jit
def few_channel_dgrad_kernel(
    dy_ptr,  # [N, groups * K, P, Q]
    w_ptr,  # [groups * K, C, R, S]
    result,  # a Result; dx[N, groups * C, H, W]
    dy_strides,  # n, k, p, q, encoded
    w_strides,  # k, c, r, s; then where the first tap is
    sizes,  # N, P, Q, H, W, encoded
    reduction,  # groups, K, C, R, S; K and C of one group
    index_map,  # an IndexMap
    placement,  # a Placement
    ACTIVATION: tl.constexpr,
    INT64_INDEX: tl.constexpr,
    TILE: tl.constexpr,  # a Block
):
    """dx[n,c,h,w] = sum over k,r,s of dy[n,k,p,q] * w[k,c,r,s] + bias[c].

    p, q are where ``index_map`` has (h, w) and (r, s) meet; dy is zero outside. One program writes
    the C channels of one group for a block of pixels of ``placement``. C is too narrow for a matrix
    product: each lane adds up its own products over the k_tiles, in float32 (float64 for float64),
    and the lanes are summed once.
    """
    bias_ptr, residual_ptr, residual_strides, y_ptr, y_strides = result
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    DEPTH: tl.constexpr = TILE.depth
    PACKED: tl.constexpr = TILE.packed
    ACC: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    N, P, Q, H, W = decode_ints(sizes)
    groups, K, C, R, S = reduction
    dy_strides = decode_strides(dy_strides)
    w_k, w_c, w_r, w_s, w_first = w_strides
    stride_h, origin_h, step_h, stride_w, origin_w, step_w = index_map
    dx_step_h, dx_first_h, dx_step_w, dx_first_w = placement

    pid = program(INT64_INDEX)
    group = pid % groups
    row = pid // groups * ROWS + tl.arange(0, ROWS)
    n, h, w = pixel(row, H, W)
    row_mask = n < N
    c = indices(COLUMNS, INT64_INDEX)
    c_mask = c < C

    p0 = h * stride_h + origin_h
    q0 = w * stride_w + origin_w
    dy_rows = group * K * dy_strides.c + n * dy_strides.n + p0 * dy_strides.h + q0 * dy_strides.w
    w_columns = w_first + group * K * w_k + c * w_c
    acc = tl.zeros((ROWS, COLUMNS, DEPTH), ACC)
    for i in loop(reduction_tiles(K, R, S, DEPTH, PACKED)):
        k, r, s, inside = reduction_block(i + pid * 0, K, R, S, DEPTH, PACKED)
        p = p0[:, None] + r * step_h
        q = q0[:, None] + s * step_w
        # [ROWS, DEPTH]
        dy_mask = (row_mask[:, None] & inside[None, :]) & within(p, P) & within(q, Q)
        dy_offsets = k * dy_strides.c + r * step_h * dy_strides.h
        dy_offsets += s * step_w * dy_strides.w
        dy_offsets = dy_rows[:, None] + dy_offsets[None, :]
        dy = tl.load(dy_ptr + dy_offsets, mask=dy_mask, other=0.0)
        # [COLUMNS, DEPTH]
        w_mask = c_mask[:, None] & inside[None, :]
        w_offsets = k * w_k + (r * w_r + s * w_s)
        w_offsets = w_columns[:, None] + w_offsets[None, :]
        w_tile = tl.load(w_ptr + w_offsets, mask=w_mask, other=0.0)
        acc += upcast(dy, ACC)[:, None, :] * upcast(w_tile, ACC)[None, :, :]

    acc = tl.sum(acc, axis=2)
    h = h * dx_step_h + dx_first_h
    w = w * dx_step_w + dx_first_w
    masks = (row_mask, c_mask)
    c += group * C
    result = bias_ptr, residual_ptr, residual_strides, y_ptr, y_strides
    store_result(acc, (n, h, w), c, masks, result, ACTIVATION)


@triton.jit(do_not_specialize=["split_k"])
def few_channel_wgrad_kernel(
    x_ptr,  # [N, groups * C, H, W]
    dy_ptr,  # [N, groups * K, P, Q]
    parts,  # GradientParts; dw[split_k, groups * K, C, R, S], db[split_k, groups * K]
    x_strides,  # n, c, h, w, encoded
    dy_strides,  # n, k, p, q, encoded
    sizes,  # N, H, W, P, Q, encoded
    reduction,  # groups, K, C, R, S; K and C of one group
    index_map,  # an IndexMap
    split_k,
    pooled,  # of dy as load_gradient takes it, or None
    POOL: tl.constexpr,  # its Window, or None
    normalize,  # scale and shift[groups * C], float32, of x in bytes, or None
    PRECISION: tl.constexpr,
    INT64_INDEX: tl.constexpr,
    TILE: tl.constexpr,  # a _Segments
):
    """dw[k,c,r,s] = sum over n,p,q of dy[n,k,p,q] * x[n,c,h,w], and db[k] = sum of dy[n,k,p,q].

    x in bytes counts as x * scale[c] + shift[c], rounded to dy's dtype. One program writes a tile
    of filters k by ``columns / segment`` rows of them, each padded to a segment, summed over one
    part of the pixels in float32 (float64 for float64); the programs of one column of tiles more
    sum dy alone.
    """
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    DEPTH: tl.constexpr = TILE.depth
    SEGMENT: tl.constexpr = TILE.segment
    dw_ptr, db_ptr, dw_strides = parts
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    N, H, W, P, Q = decode_ints(sizes)
    groups, K, C, R, S = reduction
    x_strides = decode_strides(x_strides)
    dy_strides = decode_strides(dy_strides)
    stride_h, origin_h, step_h, stride_w, origin_w, step_w = index_map

    pid = program(INT64_INDEX)
    parts = tl.cdiv(S * C, SEGMENT)
    column_tiles = 0
    if dw_ptr is not None:
        column_tiles = parts * tl.cdiv(R, COLUMNS // SEGMENT)
    tiles = column_tiles
    if db_ptr is not None:
        tiles += 1
    row_tiles = tl.cdiv(K, ROWS)
    tile = pid % tiles
    group = pid // (tiles * row_tiles) % groups
    split = pid // (tiles * row_tiles * groups)
    k = pid // tiles % row_tiles * ROWS + tl.arange(0, ROWS)
    k_mask = k < K
    k += group * K
    pixels = (pid * 0 + N) * P * Q  # as wide as the offsets
    k_tiles = tl.cdiv(tl.cdiv(pixels, DEPTH), split_k)

    if tile == column_tiles:
        if db_ptr is not None:
            counts = (pixels, P, Q)
            at = split * k_tiles
            db = sum_pixels(
                dy_ptr, dy_strides, counts, k, k_mask, at, k_tiles, DEPTH, ACC, pooled, POOL
            )
            db = downcast(db, db_ptr.dtype.element_ty)
            tl.store(db_ptr + split * groups * K + k, db, mask=k_mask)
    elif dw_ptr is not None:
        line, position = lines(COLUMNS, SEGMENT, INT64_INDEX)
        c, s, inside = row_element(tile % parts * SEGMENT + position, C, S, TILE.channels_fastest)
        r = tile // parts * (COLUMNS // SEGMENT) + line
        if COLUMNS > SEGMENT:
            inside &= r < R
        scale, shift = load_normalization(normalize, group * C + c, inside)
        x_columns = (group * C + c) * x_strides.c
        x_columns += r * step_h * x_strides.h + s * step_w * x_strides.w
        acc = tl.zeros((ROWS, COLUMNS), ACC)
        for i in loop(k_tiles):
            at = (split * k_tiles + i) * DEPTH + tl.arange(0, DEPTH)
            n, p, q = pixel(at, P, Q)
            at_mask = at < pixels
            # [DEPTH, ROWS]
            offsets = n * dy_strides.n + p * dy_strides.h + q * dy_strides.w
            offsets = offsets[:, None] + (k * dy_strides.c)[None, :]
            mask = at_mask[:, None] & k_mask[None, :]
            where = n[:, None], k[None, :], p[:, None], q[:, None]
            dy = load_gradient(dy_ptr, dy_strides, offsets, where, mask, pooled, POOL)
            # [DEPTH, COLUMNS]
            h0 = p * stride_h + origin_h
            w0 = q * stride_w + origin_w
            h = h0[:, None] + r * step_h
            w = w0[:, None] + s * step_w
            mask = at_mask[:, None] & inside[None, :] & within(h, H) & within(w, W)
            offsets = n * x_strides.n + h0 * x_strides.h + w0 * x_strides.w
            offsets = offsets[:, None] + x_columns[None, :]
            x = load_normalized(x_ptr, offsets, mask, normalize, scale, shift, DTYPE)
            fence_copies()
            acc = dot(tl.trans(dy), x, acc, PRECISION)
        dw_split, dw_k, dw_c, dw_r, dw_s = dw_strides
        offsets = c * dw_c + (r * dw_r + s * dw_s)
        offsets = split * dw_split + (k * dw_k)[:, None] + offsets[None, :]
        dw = downcast(acc, dw_ptr.dtype.element_ty)
        tl.store(dw_ptr + offsets, dw, mask=k_mask[:, None] & inside[None, :])


def _segment(g: Conv2dGeometry, block: int) -> int:
    """What a row of the filter is padded to, in blocks that hold several rows or part of one."""
    return min(block, power_of_2(g.S * g.C // g.groups))


class _Segments(NamedTuple):
    """What of a tile a kernel is compiled for; one of its sizes holds whole segments."""

    rows: int
    columns: int
    depth: int
    segment: int
    channels_fastest: bool  # whether c runs fastest in a segment, else s


def _segments(x: Tensor, g: Conv2dGeometry, tile: Tile, block: int) -> _Segments:
    """Those of a tile whose size ``block`` holds segments."""
    fastest = x.stride(1) < x.stride(3)
    return _Segments(tile.rows, tile.columns, tile.depth, _segment(g, block), fastest)


def fprop(call: Fprop, tile: Tile) -> None:
    """y[N,K,P,Q] = activation(conv(x, w) + bias + residual); x may have bytes."""
    x, w, y, g = call.x, call.w, call.y, call.g
    K, C, P, Q = g.K // g.groups, g.C // g.groups, g.P, g.Q
    device.launch(
        few_channel_fprop_kernel,
        (cdiv(g.N * P * Q, tile.rows) * cdiv(K, tile.columns) * g.groups,),
        device=x.device,
        **operands(x=x),
        w_ptr=w,
        w_strides=w.stride(),
        **results(call.epilogue, y),
        sizes=encode_ints((g.N, g.H, g.W, P, Q)),
        reduction=(g.groups, K, C, g.R, g.S),
        index_map=tuple(g.index_map),
        normalize=call.normalization,
        PRECISION=call.precision,
        INT64_INDEX=device.int64_index(g.N * P * Q, x, w, call.epilogue.residual, y),
        TILE=_segments(x, g, tile, tile.depth),
        num_warps=tile.warps,
        num_stages=overlapped(tile, computed=call.normalization is not None),
    )


def dgrad(call: Dgrad, tile: Tile) -> None:
    """dx[N,C,H,W], the gradient of x, plus bias[C]; one launch for each phase of the stride.

    The precision takes no part: the products are formed outside the tensor cores, in float32.
    """
    dy, w, dx, g = call.dy, call.w, call.dx, call.g
    K, C, P, Q = g.K // g.groups, g.C // g.groups, g.P, g.Q
    k, c, r, s = w.stride()
    for row, column in g.dgrad():
        first = r * row.tap + s * column.tap
        index_map, placement = dgrad_index_map(row, column)
        device.launch(
            few_channel_dgrad_kernel,
            (cdiv(g.N * row.count * column.count, tile.rows) * g.groups,),
            device=dy.device,
            **operands(dy=dy),
            w_ptr=w,
            **results(Epilogue(call.bias), dx),
            w_strides=(k, c, r * row.tap_step, s * column.tap_step, first),
            sizes=encode_ints((g.N, P, Q, row.count, column.count)),
            reduction=(g.groups, K, C, row.taps, column.taps),
            index_map=tuple(index_map),
            placement=tuple(placement),
            INT64_INDEX=device.int64_index(g.N * g.H * g.W, dy, w, dx),
            TILE=Block.of(tile),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def wgrad(call: Wgrad, tile: Tile) -> None:
    """dw[K,C/groups,R,S] and db[K], the gradients of weight and bias; None is not computed.

    The pixels are summed in ``tile.split_k`` parts, which a second pass adds in order. x may have
    bytes, dy be the gradient of a pooled result: see ``pool_gradient``.
    """
    x, dy, g = call.x, call.dy, call.g
    computed = call.pooled is not None or call.normalization is not None
    maxima, window = pooled(call.pooled)
    argmax = call.pooled and call.pooled.argmax
    column_tiles = (0 if call.dw is None else _tap_tiles(g, tile)) + (call.db is not None)
    with gradients(call.dw, call.db, tile.split_k) as parts:
        device.launch(
            few_channel_wgrad_kernel,
            (column_tiles * _filter_tiles(g, tile) * tile.split_k,),
            device=x.device,
            **operands(x=x, dy=dy),
            parts=tuple(parts),
            sizes=encode_ints((g.N, g.H, g.W, g.P, g.Q)),
            reduction=(g.groups, g.K // g.groups, g.C // g.groups, g.R, g.S),
            index_map=tuple(g.index_map),
            split_k=tile.split_k,
            pooled=maxima,
            POOL=window,
            normalize=call.normalization,
            PRECISION=call.precision,
            INT64_INDEX=device.int64_index(g.N * g.P * g.Q, x, dy, parts.dw, argmax),
            TILE=_segments(x, g, tile, tile.columns),
            num_warps=tile.warps,
            num_stages=overlapped(tile, computed),
        )


def _filter_tiles(g: Conv2dGeometry, tile: Tile) -> int:
    """How many tiles of rows wgrad cuts the filters into."""
    return g.groups * cdiv(g.K // g.groups, tile.rows)


def _tap_tiles(g: Conv2dGeometry, tile: Tile) -> int:
    """How many tiles of columns wgrad cuts the taps into."""
    segment = _segment(g, tile.columns)
    parts = cdiv(g.S * g.C // g.groups, segment)
    return parts * cdiv(g.R, tile.columns // segment)


def _power(size: int, least: int, most: int) -> int:
    """The power of two that holds ``size``, between two others."""
    return max(least, min(most, power_of_2(size)))


def tiles(problem: Problem) -> Iterator[Tile]:
    """A tile that suits the convolution; fprop's and dgrad's order of summation ignores N."""
    if problem.g.C // problem.g.groups <= FEW:
        yield _tile(problem)


def _tile(problem: Problem) -> Tile:
    direction, g, dtype, _, device, *_ = problem
    if device.backend == "interpreter":
        return _interpreter_tile(direction, g)
    tile = _gpu_tile(direction, g, dtype.itemsize)
    if direction != "wgrad":
        return tile
    programs = max(1, (_tap_tiles(g, tile) + 1) * _filter_tiles(g, tile))
    # Two programs for each multiprocessor, but at least eight k_tiles for each program.
    most = cdiv(g.N * g.P * g.Q, 8 * tile.depth)
    return replace(tile, split_k=max(1, min(most, 2 * device.multiprocessors // programs)))


def _gpu_tile(direction: Direction, g: Conv2dGeometry, itemsize: int) -> Tile:
    """Blocks that leave a thread enough registers for the addresses of what it gathers."""
    K, C = g.K // g.groups, g.C // g.groups
    half = itemsize == 2
    if direction == "dgrad":
        columns, depth = _power(C, 1, FEW), _power(K, 1, 16)
        return Tile(_power((4096 if half else 2048) // (columns * depth), 1, 256), columns, depth)
    if direction == "wgrad":
        rows = _power(K, 16, 64 if half else 32)
        columns = _power(g.R * _segment(g, 128), 16, 128 if half else 32)
        if columns == 128:
            return Tile(rows, columns, 64, warps=8)
        return Tile(rows, columns, 32 if half else 16)
    # The depth that pads a row of the filter least.
    depth = min((32, 16), key=lambda depth: cdiv(g.S * C, depth) * depth) if half else 16
    columns = _power(K, 16, 64 if half else 32)
    return Tile(64, columns, depth, warps=8 if columns == 64 else 4)


def _interpreter_tile(direction: Direction, g: Conv2dGeometry) -> Tile:
    """A program and a turn of its loop cost far more than an element: few, large blocks."""
    limit = INTERPRETER_ELEMENTS
    K, C = g.K // g.groups, g.C // g.groups
    row = _segment(g, limit)
    taps = power_of_2(g.R) * row
    pixels = g.N * g.P * g.Q
    if direction == "dgrad":
        pixels = g.N * cdiv(g.H, g.stride[0]) * cdiv(g.W, g.stride[1])
    if direction == "dgrad":
        columns = _power(C, 1, FEW)
        reduction = K * cdiv(g.R, g.stride[0]) * cdiv(g.S, g.stride[1])
        packed = reduction <= 256
        depth = _power(reduction if packed else K, 1, 256)
        return Tile(_power(pixels, 1, limit // (columns * depth)), columns, depth, packed)
    if direction == "wgrad":
        rows, columns = _power(K, 16, 1024), _power(taps, 16, 1024)
        return Tile(rows, columns, _power(pixels, 16, limit // max(rows, columns)))
    columns = _power(K, 16, 1024)
    # A turn takes whole rows of the filter as long as it pays to pad their number.
    depth = max(16, min(taps, max(row, 256), 1024))
    return Tile(_power(pixels, 16, limit // max(columns, depth)), columns, depth)


ENGINE = Engine(
    "few_channels",
    tiles=tiles,
    launchers={Fprop: fprop, Dgrad: dgrad, Wgrad: wgrad},
    fuses={"fprop": frozenset({"bytes"}), "wgrad": frozenset({"bytes", "pool_gradient"})},
    predict=cost_model.predict_direct,
)
