"""The inverse of max-pooling: values go back to where their maxima were."""

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from .. import device, replay
from ..device import loop
from ..lang.integers import (
    cdiv,
    decode_ints,
    decode_strides,
    encode_ints,
    operands,
    pointers,
    power_of_2,
    program,
)
from ..tile import Tile
from .tiling import offset_at, pixels_and_channels, tile_for, tiled_launch, unit_strides


@triton.jit
def max_unpool2d_kernel(
    x_ptr,
    indices_ptr,
    y_ptr,
    x_strides,  # n, c, p, q, encoded; so are those of indices
    indices_strides,
    y_strides,  # n, c, h, w, encoded
    sizes,  # N, H * W, W, P * Q, Q, encoded
    C,
    INT64_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    PLANES: tl.constexpr,
):
    """y[n,c,h,w] = the last x[n,c,p,q] whose index is h * W + w; 0 if there is none.

    One program writes PLANES planes (n, c): zeros first, then x in blocks of BLOCK elements.
    Barriers order the blocks; within one, an element yields to a later one of the same index.
    """
    N, HW, W, PQ, Q = decode_ints(sizes)
    x_strides = decode_strides(x_strides)
    indices_strides = decode_strides(indices_strides)
    y_strides = decode_strides(y_strides)
    plane = (program(INT64_INDEX) * PLANES + tl.arange(0, PLANES))[:, None]
    n = plane // C
    c = plane % C

    hw = tl.arange(0, 8 * BLOCK).to(plane.dtype)[None, :]
    for _ in loop(tl.cdiv(HW, 8 * BLOCK)):
        zero = tl.zeros((PLANES, 8 * BLOCK), y_ptr.dtype.element_ty)
        tl.store(
            y_ptr + offset_at(n, c, hw // W, hw % W, y_strides), zero, mask=(n < N) & (hw < HW)
        )
        hw += 8 * BLOCK

    position = tl.arange(0, BLOCK)
    pq = position.to(plane.dtype)[None, :]
    for _ in loop(tl.cdiv(PQ, BLOCK)):
        mask = (n < N) & (pq < PQ)
        p = pq // Q
        q = pq % Q
        index = tl.load(indices_ptr + offset_at(n, c, p, q, indices_strides), mask=mask, other=0)
        inside = (index >= 0) & (index < HW)
        tl.device_assert(inside, "max_unpool2d: an index lies outside the result", mask=mask)
        x = tl.load(x_ptr + offset_at(n, c, p, q, x_strides), mask=mask, other=0.0)
        inside = inside & mask
        index = tl.where(inside, index, -1).to(plane.dtype)
        # [PLANES, BLOCK, BLOCK]
        repeated = (index[:, :, None] == index[:, None, :]) & (
            position[:, None] < position[None, :]
        )
        last = tl.max(repeated.to(tl.int32), axis=2) == 0
        tl.debug_barrier()
        tl.store(y_ptr + offset_at(n, c, index // W, index % W, y_strides), x, mask=inside & last)
        pq += BLOCK


def max_unpool2d(x: Tensor, indices: Tensor, y: Tensor) -> None:
    """y[N,C,H,W] from x[N,C,P,Q] and int64 indices[N,C,P,Q], flat over H * W: zero elsewhere.

    Of equal indices the last in the order of p and q wins. An index outside raises RuntimeError on
    a CPU; on a GPU it fails a device-side assertion. Nothing is written outside y either way.
    """
    N, C, H, W = y.shape
    P, Q = x.shape[2:]
    indices = replay.derive(indices, partial(_checked, H=H, W=W))
    tile = _unpool_tile(y)
    device.launch(
        max_unpool2d_kernel,
        (cdiv(N * C, tile.columns),),
        device=x.device,
        **operands(x=x, indices=indices, y=y),
        sizes=encode_ints((N, H * W, W, P * Q, Q)),
        C=C,
        INT64_INDEX=device.int64_index(max(N * C, H * W, P * Q), x, indices, y),
        BLOCK=tile.rows,
        PLANES=tile.columns,
        num_warps=tile.warps,
        # Assertions are compiled in debug mode only, which must not check all arithmetic as well.
        debug=True,
        sanitize_overflow=False,
    )


def _checked(indices: Tensor, H: int, W: int) -> Tensor:
    if indices.device.type == "cpu" and indices.numel():
        for bad in indices.aminmax():
            if not 0 <= bad < H * W:
                raise RuntimeError(
                    f"max_unpool2d: index {bad.item()} is outside [0, {H * W}), "
                    f"the range for a result of size {H}x{W}"
                )
    return indices


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
    strides,  # of each of these, see unit_strides
    tiling,  # over dx, see pixels_and_channels
    sizes,  # H * W, W, encoded
    TILE: tl.constexpr,  # a PixelTile
):
    """dx[n,c,p,q] = dy[n,c,h,w] where indices[n,c,p,q] = h * W + w; 0 for an index outside.

    One program writes a tile of pixels by channels.
    """
    HW, W = decode_ints(sizes)
    n, p, q, c, mask = pixels_and_channels(tiling, TILE)
    dy_strides, indices_strides, dx_strides = strides
    at = offset_at(n, c, p, q, unit_strides(indices_strides, TILE))
    index = tl.load(indices_ptr + at, mask=mask, other=0)
    inside = mask & (index >= 0) & (index < HW)
    index = tl.where(inside, index, 0).to(n.dtype)
    at = offset_at(n, c, index // W, index % W, unit_strides(dy_strides, TILE))
    dx = tl.load(dy_ptr + at, mask=inside, other=0.0)
    tl.store(dx_ptr + offset_at(n, c, p, q, unit_strides(dx_strides, TILE)), dx, mask=mask)


def max_unpool2d_backward(dy: Tensor, indices: Tensor, dx: Tensor) -> None:
    """dx[N,C,P,Q] from dy[N,C,H,W] and the forward pass's indices; equal ones all get dy."""
    N, C, H, W = dy.shape
    P, Q = dx.shape[2:]
    tile = tile_for(N * P * Q, C, dx.stride(1) == 1, device.describe(dy.device))
    sizes = encode_ints((H * W, W))
    launch = tiled_launch((N, P, Q), C, tile, (dy, indices, dx), sizes=sizes)
    device.launch(
        max_unpool2d_backward_kernel,
        launch.grid,
        device=dy.device,
        **pointers(dy=dy, indices=indices, dx=dx),
        **launch.arguments,
        num_warps=tile.warps,
    )
