"""Convolution, bias, ReLU and max-pooling in one kernel, for any geometry and any strides.

The map between convolution and pooling is never stored. One program computes a tile of pooled
pixels by channels: for each tap of the pooling window it forms the product of a convolution at the
pixels under that tap, and keeps the larger values and where they came from. Windows that do not
overlap cost no product more than the convolution alone; others form those of shared pixels anew.
What is kept for backward is one offset a window: see ``expansion``. Sizes and strides are in
elements.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import device
from .device import loop
from .geometry import Conv2dGeometry, Pool2dGeometry
from .indexing import (
    cdiv,
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
from .tile import Tile


@triton.jit
def conv_pool_kernel(
    x_ptr,  # [N, groups * C, H, W]
    w_ptr,  # [groups * K, C, R, S]
    bias_ptr,  # [groups * K] or None
    y_ptr,  # [N, groups * K, PP, PQ]
    offsets_ptr,  # like y, or None
    x_strides,  # n, c, h, w, unspecialised
    w_strides,  # k, c, r, s
    y_strides,  # n, k, pp, pq, unspecialised; so are those of offsets
    offsets_strides,
    sizes,  # N, H, W, P, Q, PP, PQ, unspecialised
    reduction,  # groups, K, C, R, S; K and C of one group
    walk,  # of h, then w: stride, origin, step
    POOL: tl.constexpr,  # kernel, stride and padding of the height, then of the width
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,  # rows, columns, depth, packed
):
    """y = max over a window of relu(conv(x, w) + bias), rounded to y's dtype before it is compared;
    offsets = the window's tap that won, or -1 where y is 0 by the ReLU.

    Of equal values the first wins, of several NaNs the last. Products are summed in float32
    (float64 for float64), in the order in which the convolution alone sums them.
    """
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    DEPTH: tl.constexpr = TILE[2]
    PACKED: tl.constexpr = TILE[3]
    TAPS: tl.constexpr = POOL[0] * POOL[3]
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    N, H, W, P, Q, PP, PQ = plain(sizes)
    groups, K, C, R, S = reduction
    x_strides = plain_strides(x_strides)

    pid = program(WIDE)
    column_tiles = tl.cdiv(K, COLUMNS)
    group = pid // column_tiles % groups
    row = pid // (column_tiles * groups) * ROWS + tl.arange(0, ROWS)
    n, pp, pq = pixel(row, PP, PQ)
    k = pid % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    k_mask = k < K
    k += group * K
    bias = tl.zeros((COLUMNS,), ACC)
    if bias_ptr is not None:
        bias = widen(tl.load(bias_ptr + k, mask=k_mask, other=0.0), ACC)

    best = tl.full((ROWS, COLUMNS), float("-inf"), ACC)
    winner = tl.full((ROWS, COLUMNS), -1, tl.int32)
    for tap in loop(TAPS):
        p = pp * POOL[1] - POOL[2] + tap // POOL[3]
        q = pq * POOL[4] - POOL[5] + tap % POOL[3]
        row_mask = (n < N) & within(p, P) & within(q, Q)
        h0 = p * walk[0] + walk[1]
        w0 = q * walk[3] + walk[4]
        x_rows = group * C * x_strides[1] + n * x_strides[0] + h0 * x_strides[2] + w0 * x_strides[3]
        acc = tl.zeros((ROWS, COLUMNS), ACC)
        for i in loop(reduction_turns(C, R, S, DEPTH, PACKED)):
            c, r, s, inside = reduction_block(i + (pid - pid), C, R, S, DEPTH, PACKED)
            h = h0[:, None] + r * walk[2]
            w = w0[:, None] + s * walk[5]
            # [ROWS, DEPTH]
            x_mask = (row_mask[:, None] & inside[None, :]) & within(h, H) & within(w, W)
            x_offsets = c * x_strides[1] + r * walk[2] * x_strides[2] + s * walk[5] * x_strides[3]
            x_offsets = x_rows[:, None] + x_offsets[None, :]
            x = tl.load(x_ptr + x_offsets, mask=x_mask, other=0.0)
            # [DEPTH, COLUMNS]
            w_mask = inside[:, None] & k_mask[None, :]
            w_offsets = c * w_strides[1] + (r * w_strides[2] + s * w_strides[3])
            w_offsets = (k * w_strides[0])[None, :] + w_offsets[:, None]
            filters = tl.load(w_ptr + w_offsets, mask=w_mask, other=0.0)
            fence_copies()
            acc = dot(x, filters, acc, PRECISION)
        value = widen(narrow(acc + bias[None, :], DTYPE), ACC)
        wins = row_mask[:, None] & ((value > best) | (value != value))
        best = tl.where(wins, value, best)
        winner = tl.where(wins, tap, winner)

    masked = best <= 0
    mask = (n < N)[:, None] & k_mask[None, :]
    y_strides = plain_strides(y_strides)
    at = n * y_strides[0] + pp * y_strides[2] + pq * y_strides[3]
    at = at[:, None] + (k * y_strides[1])[None, :]
    tl.store(y_ptr + at, narrow(tl.where(masked, 0.0, best), DTYPE), mask=mask)
    if offsets_ptr is not None:
        strides = plain_strides(offsets_strides)
        at = n * strides[0] + pp * strides[2] + pq * strides[3]
        at = at[:, None] + (k * strides[1])[None, :]
        offset = tl.where(masked, -1, winner).to(offsets_ptr.dtype.element_ty)
        tl.store(offsets_ptr + at, offset, mask=mask)


def conv2d_relu_max_pool2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    offsets: Tensor | None,
    g: Conv2dGeometry,
    pool: Pool2dGeometry,
    tile: Tile,
    *,
    precision: str,
) -> None:
    """y[N,K,PP,PQ] = max_pool(relu(conv(x, w) + bias)).

    offsets[N,K,PP,PQ], of ``max_pool.offset_dtype(pool)``, are the taps that won, all bits set
    where no gradient flows.
    """
    K, C = g.K // g.groups, g.C // g.groups
    windows = g.N * pool.P * pool.Q
    (R, S), (step_r, step_s), (before_r, before_s) = pool.kernel, pool.stride, pool.padding
    y_strides = unspecialised_strides(y)
    device.launch(
        conv_pool_kernel,
        (cdiv(windows, tile.rows) * cdiv(K, tile.columns) * g.groups,),
        *(x, w, bias, y, offsets, unspecialised_strides(x), w.stride(), y_strides),
        y_strides if offsets is None else unspecialised_strides(offsets),
        unspecialised((g.N, g.H, g.W, g.P, g.Q, pool.P, pool.Q)),
        *((g.groups, K, C, g.R, g.S), fprop_walk(g)),
        (R, step_r, before_r, S, step_s, before_s),
        *(precision, device.wide(windows, x, w, y)),
        (tile.rows, tile.columns, tile.depth, tile.packed),
        device=y.device,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
