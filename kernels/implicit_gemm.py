"""Engine 1: convolution as a matrix product whose left matrix is never stored.

Rows are pixels, columns are channels of the result, the depth runs over channels and taps. The
operands are gathered by pointers, so any strides do: NCHW, channels_last, views, expanded
tensors. dgrad is the same product on parts of dx and w, one for each parity of the stride. Sizes
and strides are in elements.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import device
from .device import loop
from .epilogue import result_strides, store_result
from .expansion import load_expanded, pooled
from .geometry import Conv2dGeometry, Pool2dGeometry
from .indexing import (
    cdiv,
    dgrad_walk,
    dot,
    fence_copies,
    fprop_walk,
    narrow,
    pixel,
    plain,
    plain_strides,
    program,
    reduction_block,
    reduction_turns,
    unspecialised,
    unspecialised_strides,
    widen,
    within,
)
from .split_sum import parts_like, split_sum
from .tile import Tile, overlapped


@triton.jit
def fprop_kernel(
    x_ptr,  # [N, groups * C, H, W]
    w_ptr,  # [groups, K, C, R, S]
    bias_ptr,  # [groups * K] or None
    residual_ptr,  # like y, or None
    y_ptr,  # [N, groups * K, P, Q]
    x_strides,  # n, c, h, w, unspecialised
    w_strides,  # group, k, c, r, s; then where the first tap is
    y_strides,  # the residual's, then y's: n, k, p, q, unspecialised
    sizes,  # N, H, W, P, Q, unspecialised
    reduction,  # groups, K, C, R, S; K and C of one group
    walk,  # of h, then w: stride, origin, step; then step and first of y
    pooled,  # of a map's gradient x as load_expanded takes it, or None
    POOL: tl.constexpr,  # its Window, or None
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,  # rows, columns, depth, packed
):
    """y[n,k,p,q] = relu?(sum over c,r,s of x[n,c,h,w] * w[k,c,r,s] + bias[k] + residual[n,k,p,q]).

    h = p * stride + origin + r * step, likewise w; x is zero outside. The p-th row is row
    p * step + first of y and of the residual, likewise q. One program writes one rows x columns
    tile of one group, accumulated in float32 (float64 for float64).
    """
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    DEPTH: tl.constexpr = TILE[2]
    PACKED: tl.constexpr = TILE[3]
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    N, H, W, P, Q = plain(sizes)
    groups, K, C, R, S = reduction
    x_strides = plain_strides(x_strides)

    pid = program(WIDE)
    column_tiles = tl.cdiv(K, COLUMNS)
    group = pid // column_tiles % groups
    row = pid // (column_tiles * groups) * ROWS + tl.arange(0, ROWS)
    n, p, q = pixel(row, P, Q)
    row_mask = n < N
    k = pid % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    k_mask = k < K

    h0 = p * walk[0] + walk[1]
    w0 = q * walk[3] + walk[4]
    x_rows = group * C * x_strides[1] + n * x_strides[0] + h0 * x_strides[2] + w0 * x_strides[3]
    w_columns = w_strides[5] + group * w_strides[0] + k * w_strides[1]
    acc = tl.zeros((ROWS, COLUMNS), ACC)
    for i in loop(reduction_turns(C, R, S, DEPTH, PACKED)):
        c, r, s, inside = reduction_block(i + (pid - pid), C, R, S, DEPTH, PACKED)
        h = h0[:, None] + r * walk[2]
        w = w0[:, None] + s * walk[5]
        # [ROWS, DEPTH]
        x_mask = (row_mask[:, None] & inside[None, :]) & within(h, H) & within(w, W)
        x_offsets = c * x_strides[1] + r * walk[2] * x_strides[2] + s * walk[5] * x_strides[3]
        x_offsets = x_rows[:, None] + x_offsets[None, :]
        if POOL is None:
            x_tile = tl.load(x_ptr + x_offsets, mask=x_mask, other=0.0)
        else:
            where = n[:, None], (group * C + c)[None, :], h, w
            x_tile = load_expanded(x_ptr, x_strides, pooled, where, x_mask, POOL)
        # [DEPTH, COLUMNS]
        w_mask = inside[:, None] & k_mask[None, :]
        w_offsets = c * w_strides[2] + (r * w_strides[3] + s * w_strides[4])
        w_offsets = w_columns[None, :] + w_offsets[:, None]
        w_tile = tl.load(w_ptr + w_offsets, mask=w_mask, other=0.0)
        fence_copies()
        acc = dot(x_tile, w_tile, acc, PRECISION)

    at = (n, p * walk[6] + walk[7], q * walk[8] + walk[9])
    masks = (row_mask, k_mask)
    k += group * K
    store_result(acc, at, k, masks, bias_ptr, residual_ptr, y_ptr, y_strides, RELU)


class _Product(NamedTuple):
    """What distinguishes one launch of fprop_kernel from another, besides its tensors."""

    pixels: int
    w_strides: tuple[int, int, int, int, int, int]  # group, k, c, r, s; where the first tap is
    sizes: tuple[int, ...]  # N, H, W, P, Q, unspecialised
    reduction: tuple[int, int, int, int, int]  # groups, K, C, R, S
    walk: tuple[int, ...]  # as the kernel takes it


def _multiply(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    products: tuple[_Product, ...],
    tile: Tile,
    relu: bool,
    precision: str,
    pool: Pool2dGeometry | None = None,
    offsets: Tensor | None = None,
) -> None:
    N, _, P, Q = y.shape
    wide = device.wide(N * P * Q, x, w, residual, y, offsets)
    expansion = pooled(pool, offsets)
    x_strides, y_strides = unspecialised_strides(x), result_strides(residual, y)
    for pixels, w_strides, sizes, reduction, walk in products:
        groups, K = reduction[:2]
        device.launch(
            fprop_kernel,
            (cdiv(pixels, tile.rows) * cdiv(K, tile.columns) * groups,),
            *(x, w, bias, residual, y, x_strides, w_strides, y_strides, sizes, reduction, walk),
            *expansion,
            *(relu, precision, wide, (tile.rows, tile.columns, tile.depth, tile.packed)),
            device=x.device,
            num_warps=tile.warps,
            num_stages=overlapped(tile, computed=pool is not None),
        )


def fprop(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    g: Conv2dGeometry,
    tile: Tile,
    *,
    relu: bool,
    precision: str,
) -> None:
    """y[N,K,P,Q] = relu?(conv(x, w) + bias + residual)."""
    product = _fprop_product(g, w.stride())
    _multiply(x, w, bias, residual, y, (product,), tile, relu, precision)


def _fprop_product(g: Conv2dGeometry, w_strides: tuple[int, ...]) -> _Product:
    K, C = g.K // g.groups, g.C // g.groups
    P, Q = g.P, g.Q
    return _Product(
        g.N * P * Q,
        (K * w_strides[0], *w_strides, 0),
        unspecialised((g.N, g.H, g.W, P, Q)),
        (g.groups, K, C, g.R, g.S),
        fprop_walk(g),
    )


def dgrad(
    dy: Tensor,
    w: Tensor,
    bias: Tensor | None,
    dx: Tensor,
    g: Conv2dGeometry,
    tile: Tile,
    *,
    precision: str,
    pool: Pool2dGeometry | None = None,
    offsets: Tensor | None = None,
) -> None:
    """dx[N,C,H,W], the gradient of x, plus bias[C] (for a transposed convolution).

    Each parity of the stride is a stride-1 convolution of dy with its own taps of w, exchanged
    K and C, that writes its own pixels of dx. With ``pool`` and its ``offsets``, dy is the gradient
    of the pooled result: see ``expansion``.
    """
    products = _dgrad_products(g, w.stride())
    _multiply(dy, w, bias, None, dx, products, tile, False, precision, pool, offsets)


def _dgrad_products(g: Conv2dGeometry, w_strides: tuple[int, ...]) -> tuple[_Product, ...]:
    K, C = g.K // g.groups, g.C // g.groups
    P, Q = g.P, g.Q
    k, c, r, s = w_strides
    return tuple(
        _Product(
            g.N * row.count * column.count,
            (K * k, c, k, r * row.tap_step, s * column.tap_step, r * row.tap + s * column.tap),
            unspecialised((g.N, P, Q, row.count, column.count)),
            (g.groups, C, K, row.taps, column.taps),
            dgrad_walk(row, column),
        )
        for row, column in g.dgrad()
    )


@triton.jit(do_not_specialize=["splits"])
def wgrad_kernel(
    x_ptr,  # [N, groups * C, H, W]
    dy_ptr,  # [N, groups * K, P, Q]
    dw_ptr,  # [splits, groups * K, C, R, S] or None
    db_ptr,  # [splits, groups * K] or None
    x_strides,  # n, c, h, w, unspecialised
    dy_strides,  # n, k, p, q, unspecialised
    dw_strides,  # split, k, c, r, s
    sizes,  # N, H, W, P, Q, unspecialised
    reduction,  # groups, K, C, R, S; K and C of one group
    walk,  # stride, origin, step of the height, then of the width
    splits,
    pooled,  # of dy as load_expanded takes it, or None
    POOL: tl.constexpr,  # its Window, or None
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,  # rows, columns, depth, packed
):
    """dw[k,c,r,s] = sum over n,p,q of dy[n,k,p,q] * x[n,c,h,w], and db[k] = sum of dy[n,k,p,q].

    One program writes a tile of filters k by reduction indices (c, r, s) of one group, summed
    over one part of the pixels; the programs of one column of tiles more sum dy alone.
    """
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    DEPTH: tl.constexpr = TILE[2]
    PACKED: tl.constexpr = TILE[3]
    ACC: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    N, H, W, P, Q = plain(sizes)
    groups, K, C, R, S = reduction
    x_strides = plain_strides(x_strides)
    dy_strides = plain_strides(dy_strides)

    pid = program(WIDE)
    column_tiles = 0
    if dw_ptr is not None:
        column_tiles = reduction_turns(C, R, S, COLUMNS, PACKED)
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
    turns = tl.cdiv(tl.cdiv(pixels, DEPTH), splits)

    if tile == column_tiles:
        if db_ptr is not None:
            db = tl.zeros((ROWS,), ACC)
            for i in loop(turns):
                at = (split * turns + i) * DEPTH + tl.arange(0, DEPTH)
                n, p, q = pixel(at, P, Q)
                # [ROWS, DEPTH]
                offsets = n * dy_strides[0] + p * dy_strides[2] + q * dy_strides[3]
                offsets = (k * dy_strides[1])[:, None] + offsets[None, :]
                mask = k_mask[:, None] & (n < N)[None, :]
                if POOL is None:
                    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0)
                else:
                    where = n[None, :], k[:, None], p[None, :], q[None, :]
                    dy = load_expanded(dy_ptr, dy_strides, pooled, where, mask, POOL)
                db += tl.sum(widen(dy, ACC), axis=1)
            db = narrow(db, db_ptr.dtype.element_ty)
            tl.store(db_ptr + split * groups * K + k, db, mask=k_mask)
    elif dw_ptr is not None:
        c, r, s, inside = reduction_block(tile, C, R, S, COLUMNS, PACKED)
        x_columns = (group * C + c) * x_strides[1]
        x_columns += r * walk[2] * x_strides[2] + s * walk[5] * x_strides[3]
        acc = tl.zeros((ROWS, COLUMNS), ACC)
        for i in loop(turns):
            at = (split * turns + i) * DEPTH + tl.arange(0, DEPTH)
            n, p, q = pixel(at, P, Q)
            h0 = p * walk[0] + walk[1]
            w0 = q * walk[3] + walk[4]
            h = h0[:, None] + r * walk[2]
            w = w0[:, None] + s * walk[5]
            at_mask = n < N
            # [DEPTH, ROWS]
            offsets = n * dy_strides[0] + p * dy_strides[2] + q * dy_strides[3]
            offsets = offsets[:, None] + (k * dy_strides[1])[None, :]
            mask = at_mask[:, None] & k_mask[None, :]
            if POOL is None:
                dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0)
            else:
                where = n[:, None], k[None, :], p[:, None], q[:, None]
                dy = load_expanded(dy_ptr, dy_strides, pooled, where, mask, POOL)
            # [DEPTH, COLUMNS]
            offsets = n * x_strides[0] + h0 * x_strides[2] + w0 * x_strides[3]
            mask = at_mask[:, None] & inside[None, :] & within(h, H) & within(w, W)
            x = tl.load(x_ptr + (offsets[:, None] + x_columns[None, :]), mask=mask, other=0.0)
            fence_copies()
            acc = dot(tl.trans(dy), x, acc, PRECISION)
        offsets = c * dw_strides[2] + (r * dw_strides[3] + s * dw_strides[4])
        offsets = split * dw_strides[0] + (k * dw_strides[1])[:, None] + offsets[None, :]
        dw = narrow(acc, dw_ptr.dtype.element_ty)
        tl.store(dw_ptr + offsets, dw, mask=k_mask[:, None] & inside[None, :])


def wgrad(
    x: Tensor,
    dy: Tensor,
    dw: Tensor | None,
    db: Tensor | None,
    g: Conv2dGeometry,
    tile: Tile,
    *,
    precision: str,
    pool: Pool2dGeometry | None = None,
    offsets: Tensor | None = None,
) -> None:
    """dw[K,C/groups,R,S] and db[K], the gradients of weight and bias; None is not computed.

    The pixels are summed in ``tile.splits`` parts, which a second pass adds in a fixed order. With
    ``pool`` and its ``offsets``, dy is the gradient of the pooled result: see ``expansion``.
    """
    K, C, R, S = g.K // g.groups, g.C // g.groups, g.R, g.S
    P, Q = g.P, g.Q
    tiles = 0 if db is None else 1
    if dw is not None:
        depth = C * R * S
        tiles += cdiv(depth, tile.columns) if tile.packed else R * S * cdiv(C, tile.columns)
    dw_parts = None if dw is None else parts_like(dw, tile.splits)
    db_parts = None if db is None else parts_like(db, tile.splits)
    device.launch(
        wgrad_kernel,
        (tiles * cdiv(K, tile.rows) * g.groups * tile.splits,),
        *(x, dy, dw_parts, db_parts),
        *(unspecialised_strides(x), unspecialised_strides(dy)),
        (0, 0, 0, 0, 0) if dw is None else (dw.numel(), *dw.stride()),
        *(unspecialised((g.N, g.H, g.W, P, Q)), (g.groups, K, C, R, S), g.walk),
        *(tile.splits, *pooled(pool, offsets), precision),
        device.wide(g.N * P * Q, x, dy, dw_parts, offsets),
        (tile.rows, tile.columns, tile.depth, tile.packed),
        device=x.device,
        num_warps=tile.warps,
        num_stages=overlapped(tile, computed=pool is not None),
    )
    if dw is not None and dw_parts is not None:
        split_sum(dw_parts, dw)
    if db is not None and db_parts is not None:
        split_sum(db_parts, db)
