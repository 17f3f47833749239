"""Max-pooling and its inverse: memory traffic alone, in any layout.

The forward pass keeps one small number per window, its *argmax*: the tap that won, as
``r * S + s``. All gradients follow from it, and all gather: each element is written exactly once,
without atomics and without a pass of zeros. Sizes and strides are in elements.

In 16 bits the traffic of an output leaves a GPU time for a few dozen instructions, so these are
counted. Where channels lie side by side a thread has eight of a pixel: one load of 16 bytes. Taps
outside the image move to the nearest inside, which changes no maximum and needs no mask. Gradients
are written by *cells*, the pixels that one step of the windows passes: the windows that cover a
cell are loaded once, and which tap of theirs a pixel is follows from its position in the cell.
"""

from functools import lru_cache
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device
from ..device import Device
from ..geometry import Pair, Pool2dGeometry
from ..lang.integers import decode_ints, encode_ints, pointers, within
from ..lang.numerics import downcast, upcast
from ..tile import Tile
from .tiling import offset_at, pixels_and_channels, tile_for, tiled_launch, unit_strides

_INTERPRET = tl.constexpr(device.INTERPRET)
_VECTOR = 16  # bytes of the widest load
_UNROLLED = 16  # taps, and pixels of a cell, that code is written out for


def argmax_dtype(g: Pool2dGeometry) -> torch.dtype:
    """The smallest dtype that holds g's argmax.

    All bits set, which is -1 in a signed dtype, stand for a window without any pixel.
    """
    if g.taps < 2**8:
        return torch.uint8
    return torch.uint16 if g.taps < 2**16 else torch.int32


@lru_cache(maxsize=4096)
def choose_tile(
    direction: Literal["forward", "backward"],
    g: Pool2dGeometry,
    channels_last: bool,
    device: Device,
) -> Tile:
    """The tile of a launch over a pooling's results (forward and gather) or its input."""
    rows, columns = (g.P, g.Q) if direction == "forward" else _cells(g)
    return tile_for(g.N * rows * columns, g.C, channels_last, device)


class _Window(NamedTuple):
    """What of a pooling its kernels are compiled for; pairs are height and width."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    overhangs: tuple[bool, bool]  # whether taps may lie outside the image
    may_be_empty: bool  # whether all of a window's may: dilation steps over an image

    @classmethod
    def of(cls, g: Pool2dGeometry) -> "_Window":
        rows, columns = (padding > 0 or g.ceil_mode for padding in g.padding)
        empty = g.dilation != (1, 1)
        return cls(g.kernel, g.stride, g.padding, g.dilation, (rows, columns), empty)


class _Taps(NamedTuple):
    """The taps to visit: ``count`` from ``first`` on, ``columns`` in a row."""

    first: Pair
    columns: int
    count: int
    unroll: int

    @classmethod
    def of(cls, g: Pool2dGeometry) -> "_Taps":
        """On a GPU all of them, as binaries must not depend on the image.

        In the interpreter only those that lie inside x for any window at all, which are few where
        windows outgrow the image.
        """
        rows, columns = ((0, taps) for taps in g.kernel)
        if device.INTERPRET:
            sizes, outputs = (g.H, g.W), (g.P, g.Q)
            axes = zip(sizes, outputs, g.kernel, g.stride, g.padding, g.dilation, strict=True)
            rows, columns = (_reach(*axis) for axis in axes)
        (top, bottom), (left, right) = rows, columns
        width = right - left
        count = (bottom - top) * width
        unroll = count if count <= _UNROLLED else min(width, 8)
        return cls((top, left), width, count, unroll)


def _reach(size: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int) -> Pair:
    """(first, end) of the taps along one axis: from the last window's to the first window's."""
    first = max(0, -(((outputs - 1) * stride - padding) // dilation))
    return first, min(kernel, (size - 1 + padding) // dilation + 1)


def _by_cells(g: Pool2dGeometry) -> bool:
    """Whether a cell is small enough for code that is written out."""
    return max(g.taps, g.stride[0] * g.stride[1]) <= _UNROLLED


def _cells(g: Pool2dGeometry) -> Pair:
    """How many cells cover the input, along each axis; without cells, how many pixels."""
    if not _by_cells(g):
        return g.H, g.W
    rows, columns = (
        (size - 1 + padding) // stride - padding // stride + 1
        for size, padding, stride in zip((g.H, g.W), g.padding, g.stride, strict=True)
    )
    return rows, columns


class _Meeting(NamedTuple):
    """Which of the windows that cover a cell has a pixel, at which of its taps."""

    window: int
    tap: int


class _Cell(NamedTuple):
    """The pixels that windows pass in one step, and the windows that cover them.

    Cell u begins at row ``u * size + first``, the windows that cover it at ``u + earliest``;
    likewise its columns.
    """

    size: Pair
    first: Pair
    earliest: Pair
    windows: Pair
    pixels: tuple[tuple[_Meeting, ...], ...]  # of each pixel

    @classmethod
    def of(cls, g: Pool2dGeometry) -> "_Cell":
        def taps(axis: int, pixel: int) -> list[Pair]:
            """(window, tap) of those that meet a row or a column of the cell."""
            found = []
            for window in range(g.covering[axis]):
                tap, rest = divmod(
                    pixel + (g.covering[axis] - 1 - window) * g.stride[axis], g.dilation[axis]
                )
                if rest == 0 and tap < g.kernel[axis]:
                    found.append((window, tap))
            return found

        pixels = tuple(
            tuple(
                _Meeting(window=i * g.covering[1] + j, tap=r * g.kernel[1] + s)
                for (i, r), (j, s) in product(taps(0, row), taps(1, column))
            )
            for row, column in product(range(g.stride[0]), range(g.stride[1]))
        )
        first, earliest = zip(
            *(
                (-(padding % stride), padding // stride - covering + 1)
                for padding, stride, covering in zip(g.padding, g.stride, g.covering, strict=True)
            ),
            strict=True,
        )
        return cls(g.stride, first, earliest, g.covering, pixels)


@triton.jit
def _reached(output, SIZE, WINDOW: tl.constexpr, AXIS: tl.constexpr):
    """(origin, first, last): where a window's tap 0 lies, and which of its taps are inside."""
    DILATION: tl.constexpr = WINDOW.dilation[AXIS]
    origin = output * WINDOW.stride[AXIS] - WINDOW.padding[AXIS]
    first = origin * 0
    last = first + (WINDOW.kernel[AXIS] - 1)
    if WINDOW.overhangs[AXIS]:
        first = tl.maximum((DILATION - 1 - origin) // DILATION, 0)
        last = tl.minimum((SIZE - 1 - origin) // DILATION, last)
    return origin, first, last


@triton.jit
def max_pool2d_kernel(
    x_ptr,
    y_ptr,
    argmax_ptr,  # or None
    indices_ptr,  # or None
    strides,  # of each of these, see unit_strides
    tiling,  # over y, see pixels_and_channels
    sizes,  # H, W, encoded
    WINDOW: tl.constexpr,  # a _Window
    TAPS: tl.constexpr,  # the _Taps to take
    TILE: tl.constexpr,  # a PixelTile
):
    """y[n,c,p,q] = max over r,s of x[n,c,h,w], and the tap that won, and its index h * W + w.

    h = p * stride - padding + r * dilation, likewise w; pixels outside x take no part. A later
    tap wins if it is greater or NaN: of equal values the first does, of several NaNs the last.
    One program writes a tile of pixels by channels; values are compared in their own dtype.
    """
    H, W = decode_ints(sizes)
    n, p, q, c, mask = pixels_and_channels(tiling, TILE)
    x_strides, y_strides, argmax_strides, indices_strides = strides
    x_strides = unit_strides(x_strides, TILE)
    S: tl.constexpr = WINDOW.kernel[1]
    h0, r0, r1 = _reached(p, H, WINDOW, 0)
    w0, s0, s1 = _reached(q, W, WINDOW, 1)
    found = mask
    winner = tl.minimum(tl.maximum(TAPS.first[0], r0), r1) * S
    winner += tl.minimum(tl.maximum(TAPS.first[1], s0), s1)
    if WINDOW.may_be_empty:
        found = mask & (r0 <= r1) & (s0 <= s1)
        winner = tl.where(found, winner, -1)
    winner = tl.broadcast_to(winner, mask.shape).to(tl.int32)

    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    COMPARED: tl.constexpr = tl.float32 if _INTERPRET and DTYPE == tl.bfloat16 else DTYPE
    best = tl.full(mask.shape, float("-inf"), COMPARED)
    OTHER: tl.constexpr = float("-inf") if WINDOW.may_be_empty else None
    x_planes = x_ptr + n * x_strides.n + c * x_strides.c
    for tap in tl.range(0, TAPS.count, loop_unroll_factor=TAPS.unroll):
        # A tap outside is moved inside: it repeats a value that takes part anyway.
        r = tl.minimum(tl.maximum(TAPS.first[0] + tap // TAPS.columns, r0), r1)
        s = tl.minimum(tl.maximum(TAPS.first[1] + tap % TAPS.columns, s0), s1)
        h = h0 + r * WINDOW.dilation[0]
        w = w0 + s * WINDOW.dilation[1]
        x = tl.load(x_planes + h * x_strides.h + w * x_strides.w, mask=found, other=OTHER)
        x = upcast(x, COMPARED)
        # Not the larger one: of equal zeros the first keeps its sign.
        greater = x > best
        winner = tl.where(greater | (x != x), (r * S + s).to(tl.int32), winner)
        best = tl.where(x != x, x, tl.where(greater, x, best))

    at = offset_at(n, c, p, q, unit_strides(y_strides, TILE))
    tl.store(y_ptr + at, downcast(best, DTYPE), mask=mask)
    if argmax_ptr is not None:
        at = offset_at(n, c, p, q, unit_strides(argmax_strides, TILE))
        tl.store(argmax_ptr + at, winner.to(argmax_ptr.dtype.element_ty), mask=mask)
    if indices_ptr is not None:
        h = h0 + winner // S * WINDOW.dilation[0]
        w = w0 + winner % S * WINDOW.dilation[1]
        index = tl.where(winner < 0, -1, h.to(tl.int64) * W + w)
        at = offset_at(n, c, p, q, unit_strides(indices_strides, TILE))
        tl.store(indices_ptr + at, index, mask=mask)


def max_pool2d(
    x: Tensor,
    g: Pool2dGeometry,
    y: Tensor,
    argmax: Tensor | None,
    indices: Tensor | None,
    tile: Tile,
) -> None:
    """y[N,C,P,Q] = the maximum of each window of x[N,C,H,W].

    argmax[N,C,P,Q], of ``argmax_dtype(g)``, and int64 indices[N,C,P,Q] tell the pixel that it
    came from; None is not wanted. A window without any pixel gives -inf, no argmax and index -1.
    """
    results = [y if t is None else t for t in (y, argmax, indices)]
    own = {"sizes": encode_ints((g.H, g.W)), "WINDOW": _Window.of(g), "TAPS": _Taps.of(g)}
    launch = tiled_launch((g.N, g.P, g.Q), g.C, tile, (x, *results), **own)
    device.launch(
        max_pool2d_kernel,
        launch.grid,
        device=x.device,
        **pointers(x=x, y=y, argmax=argmax, indices=indices),
        **launch.arguments,
        num_warps=tile.warps,
    )


@triton.jit
def max_pool2d_backward_kernel(
    dy_ptr,
    argmax_ptr,
    dx_ptr,
    strides,  # of each of these, see unit_strides
    tiling,  # over cells, see pixels_and_channels
    sizes,  # H, W, P, Q, encoded
    CELL: tl.constexpr,  # a _Cell
    TILE: tl.constexpr,  # a PixelTile
):
    """dx[n,c,h,w] = sum of dy[n,c,p,q] over the windows that pixel (h, w) won.

    One program writes a tile of cells by channels: it asks the windows that cover a cell once,
    and knows of each pixel which tap of theirs it is. Windows are added in the order of p and q,
    in float32 (float64 for float64).
    """
    H, W, P, Q = decode_ints(sizes)
    n, u, v, c, mask = pixels_and_channels(tiling, TILE)
    dy_strides, argmax_strides, dx_strides = strides
    dy_strides = unit_strides(dy_strides, TILE)
    argmax_strides = unit_strides(argmax_strides, TILE)
    dx_strides = unit_strides(dx_strides, TILE)
    dys = ()
    argmax = ()
    for i in tl.static_range(CELL.windows[0] * CELL.windows[1]):
        p = u + (CELL.earliest[0] + i // CELL.windows[1])
        q = v + (CELL.earliest[1] + i % CELL.windows[1])
        covers = mask & within(p, P) & within(q, Q)
        argmax_at = argmax_ptr + offset_at(n, c, p, q, argmax_strides)
        argmax += (tl.load(argmax_at, mask=covers, other=-1),)
        dys += (tl.load(dy_ptr + offset_at(n, c, p, q, dy_strides), mask=covers, other=0.0),)

    DTYPE: tl.constexpr = dx_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    dx_cells = dx_ptr + offset_at(n, c, u * CELL.size[0], v * CELL.size[1], dx_strides)
    for i in tl.static_range(len(CELL.pixels)):
        dx = tl.zeros(mask.shape, ACC)
        for j in tl.static_range(len(CELL.pixels[i])):
            won = argmax[CELL.pixels[i][j].window] == CELL.pixels[i][j].tap
            dx += tl.where(won, upcast(dys[CELL.pixels[i][j].window], ACC), 0.0)
        # As wide as u and v, as a stride's multiple may not fit into 32 bits.
        row = u * 0 + (CELL.first[0] + i // CELL.size[1])
        column = v * 0 + (CELL.first[1] + i % CELL.size[1])
        inside = mask & within(u * CELL.size[0] + row, H) & within(v * CELL.size[1] + column, W)
        dx_at = dx_cells + (row * dx_strides.h + column * dx_strides.w)
        tl.store(dx_at, downcast(dx, DTYPE), mask=inside)


@triton.jit
def max_pool2d_far_backward_kernel(
    dy_ptr,
    argmax_ptr,
    dx_ptr,
    strides,  # of each of these, see unit_strides
    tiling,  # over dx, see pixels_and_channels
    sizes,  # P, Q, encoded
    WINDOW: tl.constexpr,  # a _Window
    WINDOWS: tl.constexpr,  # how many may cover a pixel, along each axis
    TILE: tl.constexpr,  # a PixelTile
):
    """The same for windows or strides of many pixels: each pixel asks the windows that cover it.

    One program writes a tile of pixels by channels.
    """
    P, Q = decode_ints(sizes)
    dy_strides, argmax_strides, dx_strides = strides
    dy_strides = unit_strides(dy_strides, TILE)
    argmax_strides = unit_strides(argmax_strides, TILE)
    R: tl.constexpr = WINDOW.kernel[0]
    S: tl.constexpr = WINDOW.kernel[1]
    n, h, w, c, mask = pixels_and_channels(tiling, TILE)
    h0 = h + WINDOW.padding[0]
    w0 = w + WINDOW.padding[1]
    p0 = h0 // WINDOW.stride[0] - (WINDOWS[0] - 1)
    q0 = w0 // WINDOW.stride[1] - (WINDOWS[1] - 1)

    ACC: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    dx = tl.zeros(mask.shape, ACC)
    dy_planes = dy_ptr + n * dy_strides.n + c * dy_strides.c
    argmax_planes = argmax_ptr + n * argmax_strides.n + c * argmax_strides.c
    for i in tl.range(0, WINDOWS[0]):
        p = p0 + i
        r = h0 - p * WINDOW.stride[0]
        row_mask = mask & within(p, P)
        row_mask = row_mask & (r % WINDOW.dilation[0] == 0) & (r // WINDOW.dilation[0] < R)
        dy_rows = dy_planes + p * dy_strides.h
        argmax_rows = argmax_planes + p * argmax_strides.h
        for j in tl.range(0, WINDOWS[1], loop_unroll_factor=min(WINDOWS[1], 8)):
            q = q0 + j
            s = w0 - q * WINDOW.stride[1]
            covers = row_mask & within(q, Q)
            covers = covers & (s % WINDOW.dilation[1] == 0) & (s // WINDOW.dilation[1] < S)
            argmax = tl.load(argmax_rows + q * argmax_strides.w, mask=covers, other=-1)
            dy = tl.load(dy_rows + q * dy_strides.w, mask=covers, other=0.0)
            tap = r // WINDOW.dilation[0] * S + s // WINDOW.dilation[1]
            dx += tl.where(covers & (argmax == tap), upcast(dy, ACC), 0.0)
    at = offset_at(n, c, h, w, unit_strides(dx_strides, TILE))
    tl.store(dx_ptr + at, downcast(dx, dx_ptr.dtype.element_ty), mask=mask)


def max_pool2d_backward(
    dy: Tensor, argmax: Tensor, dx: Tensor, g: Pool2dGeometry, tile: Tile
) -> None:
    """dx[N,C,H,W] from dy[N,C,P,Q] and the argmax[N,C,P,Q] of the forward pass."""
    kernel: Any = max_pool2d_far_backward_kernel
    own: dict[str, Any] = {"WINDOW": _Window.of(g), "WINDOWS": g.covering}
    own["sizes"] = encode_ints((g.P, g.Q))
    if _by_cells(g):
        kernel = max_pool2d_backward_kernel
        own = {"sizes": encode_ints((g.H, g.W, g.P, g.Q)), "CELL": _Cell.of(g)}
    launch = tiled_launch((g.N, *_cells(g)), g.C, tile, (dy, argmax, dx), **own)
    device.launch(
        kernel,
        launch.grid,
        device=dy.device,
        **pointers(dy=dy, argmax=argmax, dx=dx),
        **launch.arguments,
        num_warps=tile.warps,
    )


@triton.jit
def max_pool2d_gather_kernel(
    ddx_ptr,
    argmax_ptr,
    ddy_ptr,
    strides,  # of each of these, see unit_strides
    tiling,  # over ddy, see pixels_and_channels
    WINDOW: tl.constexpr,  # a _Window
    TILE: tl.constexpr,  # a PixelTile
):
    """ddy[n,c,p,q] = ddx[n,c,h,w] at the pixel that won window (p, q); 0 where there was none.

    One program writes a tile of pixels by channels.
    """
    n, p, q, c, mask = pixels_and_channels(tiling, TILE)
    ddx_strides, argmax_strides, ddy_strides = strides
    at = offset_at(n, c, p, q, unit_strides(argmax_strides, TILE))
    argmax = tl.load(argmax_ptr + at, mask=mask, other=0).to(tl.int32)
    found = mask & (argmax >= 0) & (argmax < WINDOW.kernel[0] * WINDOW.kernel[1])
    r = argmax // WINDOW.kernel[1]
    s = argmax % WINDOW.kernel[1]
    h = p * WINDOW.stride[0] - WINDOW.padding[0] + r * WINDOW.dilation[0]
    w = q * WINDOW.stride[1] - WINDOW.padding[1] + s * WINDOW.dilation[1]
    at = offset_at(n, c, h, w, unit_strides(ddx_strides, TILE))
    ddy = tl.load(ddx_ptr + at, mask=found, other=0.0)
    tl.store(ddy_ptr + offset_at(n, c, p, q, unit_strides(ddy_strides, TILE)), ddy, mask=mask)


def max_pool2d_gather(
    ddx: Tensor, argmax: Tensor, ddy: Tensor, g: Pool2dGeometry, tile: Tile
) -> None:
    """ddy[N,C,P,Q] from ddx[N,C,H,W] and argmax[N,C,P,Q]: the gradient of the gradient."""
    launch = tiled_launch((g.N, g.P, g.Q), g.C, tile, (ddx, argmax, ddy), WINDOW=_Window.of(g))
    device.launch(
        max_pool2d_gather_kernel,
        launch.grid,
        device=ddx.device,
        **pointers(ddx=ddx, argmax=argmax, ddy=ddy),
        **launch.arguments,
        num_warps=tile.warps,
    )
