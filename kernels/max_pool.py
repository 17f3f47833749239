"""Max-pooling and its inverse: memory traffic alone, in any layout.

The forward pass keeps one small number for each window, its *offset*: the tap that won, as
``r * S + s``. All gradients follow from it, and all gather: each element is written exactly once,
without atomics and without a pass of zeros. Sizes and strides are in elements.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .device import Device, loop
from .geometry import Pair, Pool2dGeometry
from .indexing import (
    cdiv,
    narrow,
    pixel,
    plain,
    plain_strides,
    power_of_2,
    program,
    unspecialised,
    unspecialised_strides,
    widen,
    within,
)
from .tile import Tile


def offset_dtype(g: Pool2dGeometry) -> torch.dtype:
    """The smallest dtype that holds the offsets of g.

    All bits set, which is -1 in a signed dtype, stand for a window without any pixel.
    """
    if g.taps < 2**8:
        return torch.uint8
    return torch.uint16 if g.taps < 2**16 else torch.int32


def choose_tile(
    direction: Literal["forward", "backward"],
    g: Pool2dGeometry,
    channels_last: bool,
    device: Device,
) -> Tile:
    """The tile for a walk over a pooling's results, as forward and gather take it, or its input."""
    pixels = g.P * g.Q if direction == "forward" else g.H * g.W
    return _tile(g.N * pixels, g.C, channels_last, device)


def _tile(pixels: int, channels: int, channels_last: bool, device: Device) -> Tile:
    """A tile that lies along the axis of a tensor that is contiguous.

    Eight channels for each thread are one load of 16 bytes in 16 bits; pixels are loaded one by
    one. The interpreter takes its time by the program, not by the element.
    """
    columns = power_of_2(channels)
    if device.backend == "interpreter":
        columns = min(columns, 1024)
        return Tile(min(power_of_2(pixels), 2**18 // columns), columns)
    if not channels_last:
        return Tile(512, 1)
    columns = min(columns, 64)
    return Tile(1024 // columns, columns)


class _Window(NamedTuple):
    """What of a pooling its kernels are compiled for; pairs are height and width."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @classmethod
    def of(cls, g: Pool2dGeometry) -> "_Window":
        return cls(g.kernel, g.stride, g.padding, g.dilation)


class _Turns(NamedTuple):
    """A loop over the height and, within it, one over the width."""

    first: Pair
    end: Pair
    unroll: Pair

    @classmethod
    def between(cls, first: Pair, end: Pair) -> "_Turns":
        """A few turns are unrolled wholly, of more only the inner loop."""
        rows, columns = end[0] - first[0], end[1] - first[1]
        return cls(first, end, (rows if rows * columns <= 16 else 1, min(columns, 8)))


@lru_cache(maxsize=4096)
def _taps(g: Pool2dGeometry) -> _Turns:
    """The taps to walk: on a GPU all of them, as binaries must not depend on the image.

    In the interpreter only those that lie inside x for any window at all, which are few where
    windows outgrow the image.
    """
    if not device.INTERPRET:
        return _Turns.between((0, 0), g.kernel)
    rows = _reach(g.H, g.P, g.kernel[0], g.stride[0], g.padding[0], g.dilation[0])
    columns = _reach(g.W, g.Q, g.kernel[1], g.stride[1], g.padding[1], g.dilation[1])
    return _Turns.between((rows[0], columns[0]), (rows[1], columns[1]))


@lru_cache(maxsize=4096)
def _windows(g: Pool2dGeometry) -> _Turns:
    """The windows that may cover a pixel."""
    return _Turns.between((0, 0), g.covering)


def _reach(size: int, places: int, kernel: int, stride: int, padding: int, dilation: int) -> Pair:
    """(first, end) of the taps along one axis: from the last window's to the first window's."""
    first = max(0, -(((places - 1) * stride - padding) // dilation))
    return first, min(kernel, (size - 1 + padding) // dilation + 1)


@triton.jit
def _pixels_and_channels(N, H, W, C, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(n, h, w, c, mask) of this program's tile of N x H x W pixels by C channels.

    Pixels are [ROWS, 1], channels [1, COLUMNS], the mask has both.
    """
    pid = program(WIDE)
    column_tiles = tl.cdiv(C, COLUMNS)
    row = (pid // column_tiles * ROWS + tl.arange(0, ROWS))[:, None]
    c = (pid % column_tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    n, h, w = pixel(row, H, W)
    return n, h, w, c, (n < N) & (c < C)


@triton.jit
def _at(n, c, h, w, strides):
    """Where a tensor's elements [n, c, h, w] are, from its unspecialised strides."""
    strides = plain_strides(strides)
    return n * strides[0] + h * strides[2] + w * strides[3] + c * strides[1]


@triton.jit
def max_pool2d_kernel(
    x_ptr,
    y_ptr,
    offsets_ptr,  # or None
    indices_ptr,  # or None
    x_strides,  # n, c, h, w, unspecialised
    y_strides,  # n, c, p, q, unspecialised; so are the next two
    offsets_strides,
    indices_strides,
    sizes,  # N, H, W, P, Q, unspecialised
    C,
    WINDOW: tl.constexpr,  # a _Window
    TAPS: tl.constexpr,  # the _Turns to take
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y[n,c,p,q] = max over r,s of x[n,c,h,w], and the tap that won, and its index h * W + w.

    h = p * stride - padding + r * dilation, likewise w; pixels outside x take no part. A later
    tap wins if it is greater or NaN: of equal values the first does, of several NaNs the last.
    One program writes ROWS pixels by COLUMNS channels; values are compared in float32 (float64).
    """
    N, H, W, P, Q = plain(sizes)
    x_strides = plain_strides(x_strides)
    n, p, q, c, mask = _pixels_and_channels(N, P, Q, C, WIDE, ROWS, COLUMNS)
    R: tl.constexpr = WINDOW.kernel[0]
    S: tl.constexpr = WINDOW.kernel[1]
    h0 = p * WINDOW.stride[0] - WINDOW.padding[0]
    w0 = q * WINDOW.stride[1] - WINDOW.padding[1]
    # A window's first tap inside x wins unless another beats it, even if its value is -inf.
    r0 = tl.maximum((WINDOW.dilation[0] - 1 - h0) // WINDOW.dilation[0], 0)
    s0 = tl.maximum((WINDOW.dilation[1] - 1 - w0) // WINDOW.dilation[1], 0)
    found = (r0 < R) & (h0 + r0 * WINDOW.dilation[0] < H)
    found &= (s0 < S) & (w0 + s0 * WINDOW.dilation[1] < W)
    winner = tl.where(found, r0 * S + s0, -1).to(tl.int32)
    winner = tl.broadcast_to(winner, (ROWS, COLUMNS))

    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    best = tl.full((ROWS, COLUMNS), float("-inf"), ACC)
    x_planes = x_ptr + n * x_strides[0] + c * x_strides[1]
    for r in tl.range(TAPS.first[0], TAPS.end[0], loop_unroll_factor=TAPS.unroll[0]):
        h = h0 + r * WINDOW.dilation[0]
        row_mask = mask & within(h, H)
        x_rows = x_planes + h * x_strides[2]
        for s in tl.range(TAPS.first[1], TAPS.end[1], loop_unroll_factor=TAPS.unroll[1]):
            w = w0 + s * WINDOW.dilation[1]
            inside = row_mask & within(w, W)
            x = tl.load(x_rows + w * x_strides[3], mask=inside, other=float("-inf"))
            x = widen(x, ACC)
            wins = (x > best) | (x != x)
            best = tl.where(wins, x, best)
            winner = tl.where(wins, r * S + s, winner)

    y = narrow(best, y_ptr.dtype.element_ty)
    tl.store(y_ptr + _at(n, c, p, q, y_strides), y, mask=mask)
    if offsets_ptr is not None:
        offset = winner.to(offsets_ptr.dtype.element_ty)
        tl.store(offsets_ptr + _at(n, c, p, q, offsets_strides), offset, mask=mask)
    if indices_ptr is not None:
        h = h0 + winner // S * WINDOW.dilation[0]
        w = w0 + winner % S * WINDOW.dilation[1]
        index = tl.where(winner < 0, -1, h.to(tl.int64) * W + w)
        tl.store(indices_ptr + _at(n, c, p, q, indices_strides), index, mask=mask)


def max_pool2d(
    x: Tensor,
    g: Pool2dGeometry,
    y: Tensor,
    offsets: Tensor | None,
    indices: Tensor | None,
    tile: Tile,
) -> None:
    """y[N,C,P,Q] = the maximum of each window of x[N,C,H,W].

    offsets[N,C,P,Q], of ``offset_dtype(g)``, and int64 indices[N,C,P,Q] tell the pixel that it
    came from; None is not wanted. A window without any pixel gives -inf, no offset and index -1.
    """
    N, C, P, Q = y.shape
    y_strides = unspecialised_strides(y)
    device.launch(
        max_pool2d_kernel,
        (cdiv(N * P * Q, tile.rows) * cdiv(C, tile.columns),),
        *(x, y, offsets, indices, unspecialised_strides(x), y_strides),
        y_strides if offsets is None else unspecialised_strides(offsets),
        y_strides if indices is None else unspecialised_strides(indices),
        *(unspecialised((N, g.H, g.W, P, Q)), C, _Window.of(g), _taps(g)),
        *(device.wide(N * P * Q, x, y, offsets, indices), tile.rows, tile.columns),
        device=x.device,
        num_warps=tile.warps,
    )


@triton.jit
def max_pool2d_backward_kernel(
    dy_ptr,
    offsets_ptr,
    dx_ptr,
    dy_strides,  # n, c, p, q, unspecialised; so are those of offsets
    offsets_strides,
    dx_strides,  # n, c, h, w, unspecialised
    sizes,  # N, H, W, P, Q, unspecialised
    C,
    WINDOW: tl.constexpr,  # a _Window
    WINDOWS: tl.constexpr,  # the _Turns to take
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx[n,c,h,w] = sum of dy[n,c,p,q] over the windows that pixel (h, w) won.

    Each pixel asks the windows that cover it, in the order of p and q. One program writes ROWS
    pixels by COLUMNS channels, summed in float32 (float64 for float64).
    """
    N, H, W, P, Q = plain(sizes)
    dy_strides = plain_strides(dy_strides)
    offsets_strides = plain_strides(offsets_strides)
    R: tl.constexpr = WINDOW.kernel[0]
    S: tl.constexpr = WINDOW.kernel[1]
    n, h, w, c, mask = _pixels_and_channels(N, H, W, C, WIDE, ROWS, COLUMNS)
    h0 = h + WINDOW.padding[0]
    w0 = w + WINDOW.padding[1]
    p0 = h0 // WINDOW.stride[0] - (WINDOWS.end[0] - 1)
    q0 = w0 // WINDOW.stride[1] - (WINDOWS.end[1] - 1)

    ACC: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    dx = tl.zeros((ROWS, COLUMNS), ACC)
    dy_planes = dy_ptr + n * dy_strides[0] + c * dy_strides[1]
    offsets_planes = offsets_ptr + n * offsets_strides[0] + c * offsets_strides[1]
    for i in tl.range(0, WINDOWS.end[0], loop_unroll_factor=WINDOWS.unroll[0]):
        p = p0 + i
        r = h0 - p * WINDOW.stride[0]
        row_mask = mask & within(p, P)
        row_mask = row_mask & (r % WINDOW.dilation[0] == 0) & (r // WINDOW.dilation[0] < R)
        dy_rows = dy_planes + p * dy_strides[2]
        offsets_rows = offsets_planes + p * offsets_strides[2]
        for j in tl.range(0, WINDOWS.end[1], loop_unroll_factor=WINDOWS.unroll[1]):
            q = q0 + j
            s = w0 - q * WINDOW.stride[1]
            covers = row_mask & within(q, Q)
            covers = covers & (s % WINDOW.dilation[1] == 0) & (s // WINDOW.dilation[1] < S)
            offset = tl.load(offsets_rows + q * offsets_strides[3], mask=covers, other=0)
            dy = tl.load(dy_rows + q * dy_strides[3], mask=covers, other=0.0)
            tap = r // WINDOW.dilation[0] * S + s // WINDOW.dilation[1]
            won = covers & (offset == tap)
            dx += tl.where(won, widen(dy, ACC), 0.0)
    tl.store(dx_ptr + _at(n, c, h, w, dx_strides), narrow(dx, dx_ptr.dtype.element_ty), mask=mask)


def max_pool2d_backward(
    dy: Tensor, offsets: Tensor, dx: Tensor, g: Pool2dGeometry, tile: Tile
) -> None:
    """dx[N,C,H,W] from dy[N,C,P,Q] and the offsets[N,C,P,Q] of the forward pass."""
    device.launch(
        max_pool2d_backward_kernel,
        (cdiv(g.N * g.H * g.W, tile.rows) * cdiv(g.C, tile.columns),),
        *(dy, offsets, dx, *map(unspecialised_strides, (dy, offsets, dx))),
        *(unspecialised((g.N, g.H, g.W, *dy.shape[2:])), g.C, _Window.of(g), _windows(g)),
        *(device.wide(g.N * g.H * g.W, dy, offsets, dx), tile.rows, tile.columns),
        device=dy.device,
        num_warps=tile.warps,
    )


@triton.jit
def max_pool2d_gather_kernel(
    ddx_ptr,
    offsets_ptr,
    ddy_ptr,
    ddx_strides,  # n, c, h, w, unspecialised
    offsets_strides,  # n, c, p, q, unspecialised; so are those of ddy
    ddy_strides,
    sizes,  # N, P, Q, unspecialised
    C,
    WINDOW: tl.constexpr,  # a _Window
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ddy[n,c,p,q] = ddx[n,c,h,w] at the pixel that won window (p, q); 0 where there was none.

    One program writes ROWS pixels by COLUMNS channels.
    """
    N, P, Q = plain(sizes)
    n, p, q, c, mask = _pixels_and_channels(N, P, Q, C, WIDE, ROWS, COLUMNS)
    offset = tl.load(offsets_ptr + _at(n, c, p, q, offsets_strides), mask=mask, other=0)
    offset = offset.to(tl.int32)
    found = mask & (offset >= 0) & (offset < WINDOW.kernel[0] * WINDOW.kernel[1])
    r = offset // WINDOW.kernel[1]
    s = offset % WINDOW.kernel[1]
    h = p * WINDOW.stride[0] - WINDOW.padding[0] + r * WINDOW.dilation[0]
    w = q * WINDOW.stride[1] - WINDOW.padding[1] + s * WINDOW.dilation[1]
    ddy = tl.load(ddx_ptr + _at(n, c, h, w, ddx_strides), mask=found, other=0.0)
    tl.store(ddy_ptr + _at(n, c, p, q, ddy_strides), ddy, mask=mask)


def max_pool2d_gather(
    ddx: Tensor, offsets: Tensor, ddy: Tensor, g: Pool2dGeometry, tile: Tile
) -> None:
    """ddy[N,C,P,Q] from ddx[N,C,H,W] and offsets[N,C,P,Q]: the gradient of the gradient."""
    N, C, P, Q = ddy.shape
    device.launch(
        max_pool2d_gather_kernel,
        (cdiv(N * P * Q, tile.rows) * cdiv(C, tile.columns),),
        *(ddx, offsets, ddy, *map(unspecialised_strides, (ddx, offsets, ddy))),
        *(unspecialised((N, P, Q)), C, _Window.of(g)),
        *(device.wide(N * P * Q, ddx, offsets, ddy), tile.rows, tile.columns),
        device=ddx.device,
        num_warps=tile.warps,
    )


@triton.jit
def max_unpool2d_kernel(
    x_ptr,
    indices_ptr,
    y_ptr,
    x_strides,  # n, c, p, q, unspecialised; so are those of indices
    indices_strides,
    y_strides,  # n, c, h, w, unspecialised
    sizes,  # N, H * W, W, P * Q, Q, unspecialised
    C,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    PLANES: tl.constexpr,
):
    """y[n,c,h,w] = the last x[n,c,p,q] whose index is h * W + w; 0 where there is none.

    One program writes PLANES planes (n, c): zeros first, then x in blocks of BLOCK elements.
    Barriers order the blocks; within one, an element yields to a later one of the same index.
    """
    N, HW, W, PQ, Q = plain(sizes)
    plane = (program(WIDE) * PLANES + tl.arange(0, PLANES))[:, None]
    n = plane // C
    c = plane % C

    hw = tl.arange(0, 8 * BLOCK).to(plane.dtype)[None, :]
    for _ in loop(tl.cdiv(HW, 8 * BLOCK)):
        zero = tl.zeros((PLANES, 8 * BLOCK), y_ptr.dtype.element_ty)
        tl.store(y_ptr + _at(n, c, hw // W, hw % W, y_strides), zero, mask=(n < N) & (hw < HW))
        hw += 8 * BLOCK

    place = tl.arange(0, BLOCK)
    pq = place.to(plane.dtype)[None, :]
    for _ in loop(tl.cdiv(PQ, BLOCK)):
        mask = (n < N) & (pq < PQ)
        p = pq // Q
        q = pq % Q
        index = tl.load(indices_ptr + _at(n, c, p, q, indices_strides), mask=mask, other=0)
        inside = (index >= 0) & (index < HW)
        tl.device_assert(inside, "max_unpool2d: an index lies outside the result", mask=mask)
        x = tl.load(x_ptr + _at(n, c, p, q, x_strides), mask=mask, other=0.0)
        inside = inside & mask
        index = tl.where(inside, index, -1).to(plane.dtype)
        # [PLANES, BLOCK, BLOCK]
        repeated = (index[:, :, None] == index[:, None, :]) & (place[:, None] < place[None, :])
        last = tl.max(repeated.to(tl.int32), axis=2) == 0
        tl.debug_barrier()
        tl.store(y_ptr + _at(n, c, index // W, index % W, y_strides), x, mask=inside & last)
        pq += BLOCK


def max_unpool2d(x: Tensor, indices: Tensor, y: Tensor) -> None:
    """y[N,C,H,W] from x[N,C,P,Q] and int64 indices[N,C,P,Q], flat over H * W: zero elsewhere.

    Of equal indices the last in the order of p and q wins. An index outside raises RuntimeError on
    a CPU; on a GPU it fails a device-side assertion. Nothing is written outside y either way.
    """
    N, C, H, W = y.shape
    P, Q = x.shape[2:]
    _check_indices(indices, H, W)
    tile = _unpool_tile(y)
    device.launch(
        max_unpool2d_kernel,
        (cdiv(N * C, tile.columns),),
        *(x, indices, y, *map(unspecialised_strides, (x, indices, y))),
        *(unspecialised((N, H * W, W, P * Q, Q)), C),
        *(device.wide(max(N * C, H * W, P * Q), x, indices, y), tile.rows, tile.columns),
        device=x.device,
        num_warps=tile.warps,
        # Assertions are compiled in debug mode only, which must not check all arithmetic as well.
        debug=True,
        sanitize_overflow=False,
    )


def _check_indices(indices: Tensor, H: int, W: int) -> None:
    if indices.device.type == "cpu" and indices.numel():
        for bad in indices.aminmax():
            if not 0 <= bad < H * W:
                raise RuntimeError(
                    f"max_unpool2d: index {bad.item()} is outside [0, {H * W}), "
                    f"the range for a result of size {H}x{W}"
                )


def _unpool_tile(y: Tensor) -> Tile:
    """A block of pixels, short as it is compared with itself, by some planes (n, c)."""
    N, C = y.shape[:2]
    if device.INTERPRET:
        return Tile(32, min(power_of_2(N * C), 1024))
    return Tile(16, 16) if y.stride(1) == 1 else Tile(32, 4)


@triton.jit
def max_unpool2d_backward_kernel(
    dy_ptr,
    indices_ptr,
    dx_ptr,
    dy_strides,  # n, c, h, w, unspecialised
    indices_strides,  # n, c, p, q, unspecialised; so are those of dx
    dx_strides,
    sizes,  # N, H * W, W, P, Q, unspecialised
    C,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx[n,c,p,q] = dy[n,c,h,w] where indices[n,c,p,q] = h * W + w; 0 for an index outside.

    One program writes ROWS pixels by COLUMNS channels.
    """
    N, HW, W, P, Q = plain(sizes)
    n, p, q, c, mask = _pixels_and_channels(N, P, Q, C, WIDE, ROWS, COLUMNS)
    index = tl.load(indices_ptr + _at(n, c, p, q, indices_strides), mask=mask, other=0)
    inside = mask & (index >= 0) & (index < HW)
    index = tl.where(inside, index, 0).to(n.dtype)
    dx = tl.load(dy_ptr + _at(n, c, index // W, index % W, dy_strides), mask=inside, other=0.0)
    tl.store(dx_ptr + _at(n, c, p, q, dx_strides), dx, mask=mask)


def max_unpool2d_backward(dy: Tensor, indices: Tensor, dx: Tensor) -> None:
    """dx[N,C,P,Q] from dy[N,C,H,W] and the forward pass's indices; equal ones all get dy."""
    N, C, H, W = dy.shape
    P, Q = dx.shape[2:]
    tile = _tile(N * P * Q, C, dx.stride(1) == 1, device.describe(dy.device))
    device.launch(
        max_unpool2d_backward_kernel,
        (cdiv(N * P * Q, tile.rows) * cdiv(C, tile.columns),),
        *(dy, indices, dx, *map(unspecialised_strides, (dy, indices, dx))),
        *(unspecialised((N, H * W, W, P, Q)), C),
        *(device.wide(max(N * P * Q, H * W), dy, indices, dx), tile.rows, tile.columns),
        device=dy.device,
        num_warps=tile.warps,
    )
