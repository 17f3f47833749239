"""Engine 1: convolution as a matrix product whose left matrix is never stored.

Rows are pixels, columns are channels of the result, the depth runs over channels and taps. The
operands are gathered by pointers, so any strides do: NCHW, channels_last, views, expanded
tensors. dgrad is the same product on parts of dx and w, one for each phase of the stride. Sizes
and strides are in elements.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import device
from ..device import loop
from ..geometry import Conv2dGeometry, Placement, dgrad_index_map
from ..lang.epilogue import Epilogue, results, store_result
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
from ..lang.split_sum import gradients
from ..pool.pool_gradient import PoolGradient, load_gradient, pooled
from ..tile import Block, Tile, overlapped
from .engine import Dgrad, Engine, Fprop, Wgrad
from .pointer_tiles import pointer_tiles


@triton.jit
def fprop_kernel(
    x_ptr,  # [N, groups * C, H, W]
    w_ptr,  # [groups, K, C, R, S]
    result,  # a Result; y[N, groups * K, P, Q]
    x_strides,  # n, c, h, w, encoded
    w_strides,  # group, k, c, r, s; then where the first tap is
    sizes,  # N, H, W, P, Q, encoded
    reduction,  # groups, K, C, R, S; K and C of one group
    index_map,  # an IndexMap
    placement,  # a Placement
    pooled,  # of a map's gradient x as load_gradient takes it, or None
    POOL: tl.constexpr,  # its Window, or None
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64_INDEX: tl.constexpr,
    TILE: tl.constexpr,  # a Block
):
    """y[n,k,p,q] = act(sum over c,r,s of x[n,c,h,w] * w[k,c,r,s] + bias[k] + residual[n,k,p,q]).

    h, w are where ``index_map`` has (p, q) and (r, s) meet; x is zero outside. ``placement`` is of
    y and of the residual. One program writes one rows x columns tile of one group, accumulated in
    float32 (float64 for float64).
    """
    bias_ptr, residual_ptr, residual_strides, y_ptr, y_strides = result
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    DEPTH: tl.constexpr = TILE.depth
    PACKED: tl.constexpr = TILE.packed
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    N, H, W, P, Q = decode_ints(sizes)
    groups, K, C, R, S = reduction
    x_strides = decode_strides(x_strides)
    w_group, w_k, w_c, w_r, w_s, w_first = w_strides
    stride_h, origin_h, step_h, stride_w, origin_w, step_w = index_map
    step_p, first_p, step_q, first_q = placement

    pid = program(INT64_INDEX)
    column_tiles = tl.cdiv(K, COLUMNS)
    group = pid // column_tiles % groups
    row = pid // (column_tiles * groups) * ROWS + tl.arange(0, ROWS)
    n, p, q = pixel(row, P, Q)
    row_mask = n < N
    k = pid % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    k_mask = k < K

    h0 = p * stride_h + origin_h
    w0 = q * stride_w + origin_w
    x_rows = group * C * x_strides.c + n * x_strides.n + h0 * x_strides.h + w0 * x_strides.w
    w_columns = w_first + group * w_group + k * w_k
    acc = tl.zeros((ROWS, COLUMNS), ACC)
    for i in loop(reduction_tiles(C, R, S, DEPTH, PACKED)):
        c, r, s, inside = reduction_block(i + (pid - pid), C, R, S, DEPTH, PACKED)
        h = h0[:, None] + r * step_h
        w = w0[:, None] + s * step_w
        # [ROWS, DEPTH]
        x_mask = (row_mask[:, None] & inside[None, :]) & within(h, H) & within(w, W)
        x_offsets = c * x_strides.c + r * step_h * x_strides.h + s * step_w * x_strides.w
        x_offsets = x_rows[:, None] + x_offsets[None, :]
        where = n[:, None], (group * C + c)[None, :], h, w
        x_tile = load_gradient(x_ptr, x_strides, x_offsets, where, x_mask, pooled, POOL)
        # [DEPTH, COLUMNS]
        w_mask = inside[:, None] & k_mask[None, :]
        w_offsets = c * w_c + (r * w_r + s * w_s)
        w_offsets = w_columns[None, :] + w_offsets[:, None]
        w_tile = tl.load(w_ptr + w_offsets, mask=w_mask, other=0.0)
        fence_copies()
        acc = dot(x_tile, w_tile, acc, PRECISION)

    p = p * step_p + first_p
    q = q * step_q + first_q
    masks = (row_mask, k_mask)
    k += group * K
    result = bias_ptr, residual_ptr, residual_strides, y_ptr, y_strides
    store_result(acc, (n, p, q), k, masks, result, ACTIVATION)


class _Product(NamedTuple):
    """What distinguishes one launch of fprop_kernel from another, besides its tensors."""

    w_strides: tuple[int, ...]
    sizes: tuple[int, ...]
    reduction: tuple[int, ...]
    index_map: tuple[int, ...]
    placement: tuple[int, ...]


def _multiply(
    x: Tensor,
    w: Tensor,
    epilogue: Epilogue,
    y: Tensor,
    products: Iterable[tuple[int, _Product]],  # with how many pixels each computes
    tile: Tile,
    precision: str,
    gradient: PoolGradient | None = None,
) -> None:
    N, _, P, Q = y.shape
    maxima, window = pooled(gradient)
    wide = device.int64_index(N * P * Q, x, w, epilogue.residual, y, gradient and gradient.argmax)
    for pixels, product in products:
        groups, K, *_ = product.reduction
        device.launch(
            fprop_kernel,
            (cdiv(pixels, tile.rows) * cdiv(K, tile.columns) * groups,),
            device=x.device,
            **operands(x=x),
            w_ptr=w,
            **results(epilogue, y),
            **product._asdict(),
            pooled=maxima,
            POOL=window,
            PRECISION=precision,
            INT64_INDEX=wide,
            TILE=Block.of(tile),
            num_warps=tile.warps,
            num_stages=overlapped(tile, computed=gradient is not None),
        )


def fprop(call: Fprop, tile: Tile) -> None:
    """y[N,K,P,Q] = activation(conv(x, w) + bias + residual)."""
    g = call.g
    K, C, P, Q = g.K // g.groups, g.C // g.groups, g.P, g.Q
    k, c, r, s = call.w.stride()
    product = _Product(
        w_strides=(K * k, k, c, r, s, 0),
        sizes=encode_ints((g.N, g.H, g.W, P, Q)),
        reduction=(g.groups, K, C, g.R, g.S),
        index_map=tuple(g.index_map),
        placement=tuple(Placement()),
    )
    products = [(g.N * P * Q, product)]
    _multiply(call.x, call.w, call.epilogue, call.y, products, tile, call.precision)


def dgrad(call: Dgrad, tile: Tile) -> None:
    """dx[N,C,H,W], the gradient of x, plus bias[C] (for a transposed convolution).

    Each phase of the stride is a stride-1 convolution of dy with its own taps of w, exchanged
    K and C, that writes its own pixels of dx. dy may be the gradient of the pooled result: see
    ``pool_gradient``.
    """
    products = _dgrad_products(call.g, call.w.stride())
    added = Epilogue(call.bias)
    _multiply(call.dy, call.w, added, call.dx, products, tile, call.precision, call.pooled)


def _dgrad_products(
    g: Conv2dGeometry, w_strides: tuple[int, ...]
) -> Iterator[tuple[int, _Product]]:
    K, C, P, Q = g.K // g.groups, g.C // g.groups, g.P, g.Q
    k, c, r, s = w_strides
    for row, column in g.dgrad():
        first = r * row.tap + s * column.tap
        index_map, placement = dgrad_index_map(row, column)
        yield (
            g.N * row.count * column.count,
            _Product(
                w_strides=(K * k, c, k, r * row.tap_step, s * column.tap_step, first),
                sizes=encode_ints((g.N, P, Q, row.count, column.count)),
                reduction=(g.groups, C, K, row.taps, column.taps),
                index_map=tuple(index_map),
                placement=tuple(placement),
            ),
        )


@triton.jit(do_not_specialize=["split_k"])
def wgrad_kernel(
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
    PRECISION: tl.constexpr,
    INT64_INDEX: tl.constexpr,
    TILE: tl.constexpr,  # a Block
):
    """dw[k,c,r,s] = sum over n,p,q of dy[n,k,p,q] * x[n,c,h,w], and db[k] = sum of dy[n,k,p,q].

    One program writes a tile of filters k by reduction indices (c, r, s) of one group, summed
    over one part of the pixels; the programs of one column of tiles more sum dy alone.
    """
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    DEPTH: tl.constexpr = TILE.depth
    PACKED: tl.constexpr = TILE.packed
    dw_ptr, db_ptr, dw_strides = parts
    ACC: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    N, H, W, P, Q = decode_ints(sizes)
    groups, K, C, R, S = reduction
    x_strides = decode_strides(x_strides)
    dy_strides = decode_strides(dy_strides)
    stride_h, origin_h, step_h, stride_w, origin_w, step_w = index_map

    pid = program(INT64_INDEX)
    column_tiles = 0
    if dw_ptr is not None:
        column_tiles = reduction_tiles(C, R, S, COLUMNS, PACKED)
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
            db = tl.zeros((ROWS,), ACC)
            for i in loop(k_tiles):
                at = (split * k_tiles + i) * DEPTH + tl.arange(0, DEPTH)
                n, p, q = pixel(at, P, Q)
                # [ROWS, DEPTH]
                offsets = n * dy_strides.n + p * dy_strides.h + q * dy_strides.w
                offsets = (k * dy_strides.c)[:, None] + offsets[None, :]
                mask = k_mask[:, None] & (n < N)[None, :]
                where = n[None, :], k[:, None], p[None, :], q[None, :]
                dy = load_gradient(dy_ptr, dy_strides, offsets, where, mask, pooled, POOL)
                db += tl.sum(upcast(dy, ACC), axis=1)
            db = downcast(db, db_ptr.dtype.element_ty)
            tl.store(db_ptr + split * groups * K + k, db, mask=k_mask)
    elif dw_ptr is not None:
        c, r, s, inside = reduction_block(tile, C, R, S, COLUMNS, PACKED)
        x_columns = (group * C + c) * x_strides.c
        x_columns += r * step_h * x_strides.h + s * step_w * x_strides.w
        acc = tl.zeros((ROWS, COLUMNS), ACC)
        for i in loop(k_tiles):
            at = (split * k_tiles + i) * DEPTH + tl.arange(0, DEPTH)
            n, p, q = pixel(at, P, Q)
            h0 = p * stride_h + origin_h
            w0 = q * stride_w + origin_w
            h = h0[:, None] + r * step_h
            w = w0[:, None] + s * step_w
            at_mask = n < N
            # [DEPTH, ROWS]
            offsets = n * dy_strides.n + p * dy_strides.h + q * dy_strides.w
            offsets = offsets[:, None] + (k * dy_strides.c)[None, :]
            mask = at_mask[:, None] & k_mask[None, :]
            where = n[:, None], k[None, :], p[:, None], q[:, None]
            dy = load_gradient(dy_ptr, dy_strides, offsets, where, mask, pooled, POOL)
            # [DEPTH, COLUMNS]
            offsets = n * x_strides.n + h0 * x_strides.h + w0 * x_strides.w
            mask = at_mask[:, None] & inside[None, :] & within(h, H) & within(w, W)
            x = tl.load(x_ptr + (offsets[:, None] + x_columns[None, :]), mask=mask, other=0.0)
            fence_copies()
            acc = dot(tl.trans(dy), x, acc, PRECISION)
        dw_split, dw_k, dw_c, dw_r, dw_s = dw_strides
        offsets = c * dw_c + (r * dw_r + s * dw_s)
        offsets = split * dw_split + (k * dw_k)[:, None] + offsets[None, :]
        dw = downcast(acc, dw_ptr.dtype.element_ty)
        tl.store(dw_ptr + offsets, dw, mask=k_mask[:, None] & inside[None, :])


def wgrad(call: Wgrad, tile: Tile) -> None:
    """dw[K,C/groups,R,S] and db[K], the gradients of weight and bias; None is not computed.

    The pixels are summed in ``tile.split_k`` parts, which a second pass adds in a fixed order. dy
    may be the gradient of the pooled result: see ``pool_gradient``.
    """
    g, x, dy = call.g, call.x, call.dy
    K, C, R, S = g.K // g.groups, g.C // g.groups, g.R, g.S
    P, Q = g.P, g.Q
    tiles = 0 if call.db is None else 1
    if call.dw is not None:
        depth = C * R * S
        tiles += cdiv(depth, tile.columns) if tile.packed else R * S * cdiv(C, tile.columns)
    maxima, window = pooled(call.pooled)
    argmax = call.pooled and call.pooled.argmax
    with gradients(call.dw, call.db, tile.split_k) as parts:
        device.launch(
            wgrad_kernel,
            (tiles * cdiv(K, tile.rows) * g.groups * tile.split_k,),
            device=x.device,
            **operands(x=x, dy=dy),
            parts=tuple(parts),
            sizes=encode_ints((g.N, g.H, g.W, P, Q)),
            reduction=(g.groups, K, C, R, S),
            index_map=tuple(g.index_map),
            split_k=tile.split_k,
            pooled=maxima,
            POOL=window,
            PRECISION=call.precision,
            INT64_INDEX=device.int64_index(g.N * P * Q, x, dy, parts.dw, argmax),
            TILE=Block.of(tile),
            num_warps=tile.warps,
            num_stages=overlapped(tile, computed=call.pooled is not None),
            **(device.all_registers(x.device) if call.pooled else {}),
        )


ENGINE = Engine(
    "implicit_gemm",
    tiles=pointer_tiles,
    launchers={Fprop: fprop, Dgrad: dgrad, Wgrad: wgrad},
    fuses={"dgrad": frozenset({"pool_gradient"}), "wgrad": frozenset({"pool_gradient"})},
)
