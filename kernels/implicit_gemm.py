"""Engine 1: convolution as a matrix product whose left matrix is never stored.

Rows are pixels, columns are channels of the result, the depth runs over channels and taps. The
operands are gathered by pointers, so any strides do: NCHW, channels_last, views, expanded
tensors. dgrad is the same product on views of dx and w, one for each parity of the stride. Sizes
and strides are in elements.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import device
from .device import loop
from .epilogue import finish
from .geometry import Conv2dGeometry
from .indexing import dot, narrow, pixel, program, reduction_block, reduction_turns, widen
from .split_sum import parts_like, split_sum
from .tile import Tile


@triton.jit(do_not_specialize=["sizes", "walk"])
def fprop_kernel(
    x_ptr,  # [N, groups * C, H, W]
    w_ptr,  # [groups, K, C, R, S]
    bias_ptr,  # [groups * K] or None
    residual_ptr,  # like y, or None
    y_ptr,  # [N, groups * K, P, Q]
    x_strides,  # n, c, h, w
    w_strides,  # group, k, c, r, s
    residual_strides,
    y_strides,  # n, k, p, q
    sizes,  # N, H, W, P, Q
    reduction,  # groups, K, C, R, S; K and C of one group
    walk,  # stride, origin, step of the height, then of the width
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,  # rows, columns, depth, packed
):
    """y[n,k,p,q] = relu?(sum over c,r,s of x[n,c,h,w] * w[k,c,r,s] + bias[k] + residual[n,k,p,q]).

    h = p * stride + origin + r * step, likewise w; x is zero outside. One program writes one
    rows x columns tile of one group, accumulated in float32 (float64 for float64).
    """
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    DEPTH: tl.constexpr = TILE[2]
    PACKED: tl.constexpr = TILE[3]
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    N, H, W, P, Q = sizes
    groups, K, C, R, S = reduction

    pid = program(WIDE)
    column_tiles = tl.cdiv(K, COLUMNS)
    group = pid // column_tiles % groups
    row = pid // (column_tiles * groups) * ROWS + tl.arange(0, ROWS)
    n, p, q = pixel(row, P, Q)
    row_mask = row < N * P * Q
    k = pid % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    k_mask = k < K

    h0 = p * walk[0] + walk[1]
    w0 = q * walk[3] + walk[4]
    x_rows = x_ptr + group * C * x_strides[1] + n * x_strides[0]
    w_columns = w_ptr + group * w_strides[0] + k * w_strides[1]
    acc = tl.zeros((ROWS, COLUMNS), ACC)
    for i in loop(reduction_turns(C, R, S, DEPTH, PACKED)):
        c, r, s, inside = reduction_block(i + (pid - pid), C, R, S, DEPTH, PACKED)
        h = h0[:, None] + r * walk[2]
        w = w0[:, None] + s * walk[5]
        # [ROWS, DEPTH]
        x_mask = (row_mask[:, None] & inside[None, :]) & ((h >= 0) & (h < H) & (w >= 0) & (w < W))
        x_offsets = (c * x_strides[1])[None, :] + h * x_strides[2] + w * x_strides[3]
        x_tile = tl.load(x_rows[:, None] + x_offsets, mask=x_mask, other=0.0)
        # [DEPTH, COLUMNS]
        w_mask = inside[:, None] & k_mask[None, :]
        w_offsets = c * w_strides[2] + (r * w_strides[3] + s * w_strides[4])
        w_tile = tl.load(w_columns[None, :] + w_offsets[:, None], mask=w_mask, other=0.0)
        acc = dot(x_tile, w_tile, acc, PRECISION)

    k += group * K
    mask = row_mask[:, None] & k_mask[None, :]
    residual_offsets = 0
    if residual_ptr is not None:
        at = n * residual_strides[0] + p * residual_strides[2] + q * residual_strides[3]
        residual_offsets = at[:, None] + (k * residual_strides[1])[None, :]
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    y = finish(acc, bias_ptr, k, k_mask, residual_ptr, residual_offsets, mask, RELU, DTYPE)
    at = n * y_strides[0] + p * y_strides[2] + q * y_strides[3]
    tl.store(y_ptr + at[:, None] + (k * y_strides[1])[None, :], y, mask=mask)


class _Product(NamedTuple):
    """What distinguishes one launch of fprop_kernel from another, besides its tensors."""

    w_strides: tuple[int, int, int, int, int]  # group, k, c, r, s
    reduction: tuple[int, int, int, int, int]  # groups, K, C, R, S
    walk: tuple[int, int, int, int, int, int]  # stride, origin, step; height, width


def _multiply(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    product: _Product,
    tile: Tile,
    relu: bool,
    precision: str,
) -> None:
    N, _, P, Q = y.shape
    groups, K = product.reduction[:2]
    rows = N * P * Q
    device.launch(
        fprop_kernel,
        (triton.cdiv(rows, tile.rows) * triton.cdiv(K, tile.columns) * groups,),
        *(x, w, bias, residual, y),
        *(x.stride(), product.w_strides),
        *((0, 0, 0, 0) if residual is None else residual.stride(), y.stride()),
        *((N, *x.shape[2:], P, Q), product.reduction, product.walk),
        *(relu, precision, device.wide(rows, x, w, residual, y)),
        (tile.rows, tile.columns, tile.depth, tile.packed),
        device=x.device,
        num_warps=tile.warps,
        num_stages=tile.stages,
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
    K, C, R, S = g.K // g.groups, g.C // g.groups, g.R, g.S
    k_stride = w.stride(0)
    product = _Product(
        (K * k_stride, *w.stride()),
        (g.groups, K, C, R, S),
        g.walk,
    )
    _multiply(x, w, bias, residual, y, product, tile, relu, precision)


def dgrad(
    dy: Tensor,
    w: Tensor,
    bias: Tensor | None,
    dx: Tensor,
    g: Conv2dGeometry,
    tile: Tile,
    *,
    precision: str,
) -> None:
    """dx[N,C,H,W], the gradient of x, plus bias[C] (for a transposed convolution).

    Each parity of the stride is a stride-1 convolution of dy with its own taps of w, exchanged
    K and C, that writes its own pixels of dx.
    """
    K, C = g.K // g.groups, g.C // g.groups
    for row, column in g.dgrad():
        k, c, r, s = w.stride()
        product = _Product(
            (K * k, c, k, r * row.tap_step, s * column.tap_step),
            (g.groups, C, K, row.taps, column.taps),
            (1, row.origin, -row.step, 1, column.origin, -column.step),
        )
        _multiply(
            dy,
            w[:, :, row.tap :, column.tap :],
            bias,
            None,
            dx[:, :, row.first :: row.stride, column.first :: column.stride],
            product,
            tile,
            False,
            precision,
        )


@triton.jit(do_not_specialize=["sizes", "walk", "splits"])
def wgrad_kernel(
    x_ptr,  # [N, groups * C, H, W]
    dy_ptr,  # [N, groups * K, P, Q]
    dw_ptr,  # [splits, groups * K, C, R, S] or None
    db_ptr,  # [splits, groups * K] or None
    x_strides,  # n, c, h, w
    dy_strides,  # n, k, p, q
    dw_strides,  # split, k, c, r, s
    sizes,  # N, H, W, P, Q
    reduction,  # groups, K, C, R, S; K and C of one group
    walk,  # stride, origin, step of the height, then of the width
    splits,
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
    N, H, W, P, Q = sizes
    groups, K, C, R, S = reduction

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
    pixels = N * P * Q
    turns = tl.cdiv(tl.cdiv(pixels, DEPTH), splits)

    if tile == column_tiles:
        if db_ptr is not None:
            db = tl.zeros((ROWS,), ACC)
            for i in loop(turns):
                at = (split * turns + i) * DEPTH + tl.arange(0, DEPTH)
                n, p, q = pixel(at, P, Q)
                # [ROWS, DEPTH]
                offsets = (n * dy_strides[0] + p * dy_strides[2] + q * dy_strides[3])[None, :]
                mask = k_mask[:, None] & (at < pixels)[None, :]
                dy = tl.load(dy_ptr + (k * dy_strides[1])[:, None] + offsets, mask=mask, other=0.0)
                db += tl.sum(widen(dy, ACC), axis=1)
            db = narrow(db, db_ptr.dtype.element_ty)
            tl.store(db_ptr + split * groups * K + k, db, mask=k_mask)
    elif dw_ptr is not None:
        c, r, s, inside = reduction_block(tile, C, R, S, COLUMNS, PACKED)
        x_columns = x_ptr + (group * C + c) * x_strides[1]
        acc = tl.zeros((ROWS, COLUMNS), ACC)
        for i in loop(turns):
            at = (split * turns + i) * DEPTH + tl.arange(0, DEPTH)
            n, p, q = pixel(at, P, Q)
            h = (p * walk[0] + walk[1])[:, None] + r * walk[2]
            w = (q * walk[3] + walk[4])[:, None] + s * walk[5]
            at_mask = at < pixels
            # [DEPTH, ROWS]
            offsets = (n * dy_strides[0] + p * dy_strides[2] + q * dy_strides[3])[:, None]
            mask = at_mask[:, None] & k_mask[None, :]
            dy = tl.load(dy_ptr + offsets + (k * dy_strides[1])[None, :], mask=mask, other=0.0)
            # [DEPTH, COLUMNS]
            offsets = (n * x_strides[0])[:, None] + h * x_strides[2] + w * x_strides[3]
            mask = at_mask[:, None] & inside[None, :] & ((h >= 0) & (h < H) & (w >= 0) & (w < W))
            x = tl.load(x_columns[None, :] + offsets, mask=mask, other=0.0)
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
) -> None:
    """dw[K,C/groups,R,S] and db[K], the gradients of weight and bias; None is not computed.

    The pixels are summed in ``tile.splits`` parts, which a second pass adds in a fixed order.
    """
    K, C, R, S = g.K // g.groups, g.C // g.groups, g.R, g.S
    P, Q = g.P, g.Q
    tiles = 0 if db is None else 1
    if dw is not None:
        depth = C * R * S
        tiles += (
            triton.cdiv(depth, tile.columns)
            if tile.packed
            else R * S * triton.cdiv(C, tile.columns)
        )
    dw_parts = None if dw is None else parts_like(dw, tile.splits)
    db_parts = None if db is None else parts_like(db, tile.splits)
    device.launch(
        wgrad_kernel,
        (tiles * triton.cdiv(K, tile.rows) * g.groups * tile.splits,),
        *(x, dy, dw_parts, db_parts),
        *(x.stride(), dy.stride()),
        (0, 0, 0, 0, 0) if dw is None else (dw.numel(), *dw.stride()),
        *((g.N, g.H, g.W, P, Q), (g.groups, K, C, R, S)),
        g.walk,
        *(tile.splits, precision, device.wide(g.N * P * Q, x, dy, dw_parts)),
        (tile.rows, tile.columns, tile.depth, tile.packed),
        device=x.device,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if dw is not None and dw_parts is not None:
        split_sum(dw_parts, dw)
    if db is not None and db_parts is not None:
        split_sum(db_parts, db)
