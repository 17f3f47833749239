"""How pooling's kernels go over a tensor: each program takes a tile of pixels by channels."""

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import device
from ..device import Device
from ..lang.integers import (
    Strides,
    cdiv,
    decode_ints,
    decode_strides,
    divisors,
    encode_ints,
    power_of_2,
    program,
    quotient,
)
from ..tile import Tile

_VECTOR = 16  # bytes of the widest load


def tile_for(pixels: int, channels: int, channels_last: bool, device: Device) -> Tile:
    """A tile that lies along the axis of a tensor that is contiguous.

    Eight channels for each thread are one load of 16 bytes in 16 bits. Where pixels lie side by
    side a thread has one of them in four channels, which share its addresses. The interpreter
    takes its time by the program, not by the element.
    """
    columns = power_of_2(channels)
    if device.backend == "interpreter":
        columns = min(columns, 1024)
        return Tile(min(power_of_2(pixels), 2**18 // columns), columns)
    if not channels_last:
        columns = min(columns, 4)
        return Tile(512 // columns, columns)
    columns = min(columns, 64)
    return Tile(1024 // columns, columns)


class PixelTile(NamedTuple):
    rows: int  # pixels
    columns: int  # channels
    unit: int  # that divides C and all strides but that of channels
    int64_index: bool  # whether offsets need 64 bits
    channels_inside: bool  # whether neighboring threads have neighboring channels, else pixels


class Launch(NamedTuple):
    """One launch without its tensors."""

    grid: tuple[int]
    arguments: dict[str, Any]


def tiled_launch(
    pixels: tuple[int, int, int],
    C: int,
    tile: Tile,
    tensors: Sequence[Tensor],
    **own: Any,
) -> Launch:
    """A launch over pixels (n, p, q) by C channels of these tensors, of which the first has values.
    ``own``: what the kernel takes besides.

    Where channels lie side by side the unit is what C and the strides of dense tensors have in
    common, up to a vector: it makes aligned loads, and depends neither on the batch nor the image.
    """
    N, P, Q = pixels
    rows = [_row_strides(t.shape, t.stride()) for t in tensors]
    unit = 1
    channels = [t.stride(1) for t in tensors]
    if set(channels) == {1} and max(map(max, rows)) < 2**31:
        vector = _VECTOR // tensors[0].element_size()
        unit = gcd(vector, C, *(stride for strides in rows for stride in strides))
    column_tiles = cdiv(C, tile.columns)
    tiling = encode_ints((N, P, Q, C // unit, column_tiles)) + divisors(P, Q, column_tiles)
    int64_index = device.int64_index(N * P * Q, *tensors)
    strides = tuple(
        (2 * (n // unit) - 1, 2 * c - 1, 2 * (h // unit) - 1, 2 * (w // unit) - 1, 1)
        for (n, h, w), c in zip(rows, channels, strict=True)
    )
    block = PixelTile(tile.rows, tile.columns, unit, int64_index, channels[-1] == 1)
    arguments = {"strides": strides, "tiling": tiling, **own, "TILE": block}
    return Launch((cdiv(N * P * Q, tile.rows) * column_tiles,), arguments)


def _row_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int, int]:
    """Strides of n, h and w; that of an axis of one element may be anything."""
    n, _, h, w = strides
    return 0 if shape[0] == 1 else n, 0 if shape[2] == 1 else h, w


@triton.jit
def unit_strides(strides, TILE: tl.constexpr):
    """A tensor's Strides, all but that of c multiples of the unit."""
    n, c, h, w = decode_strides(strides)
    return Strides(n * TILE.unit, c, h * TILE.unit, w * TILE.unit)


@triton.jit
def pixels_and_channels(tiling, TILE: tl.constexpr):
    """(n, p, q, c, mask) of this program's tile of N x P x Q pixels by C channels.

    Neighboring threads go along the last axis. So if channels are contiguous in the last tensor,
    the result, pixels are [rows, 1] and channels [1, columns]; in NCHW, pixels are [1, rows] and
    channels [columns, 1]. The mask has both axes.
    """
    N, P, Q, C, column_tiles, by_P, shift_P, by_Q, shift_Q, by_tiles, shift_tiles = decode_ints(
        tiling
    )
    pid = program(TILE.int64_index)
    row_tile = quotient(pid, column_tiles, by_tiles, shift_tiles)
    pixel = row_tile * TILE.rows + tl.arange(0, TILE.rows)
    c = (pid - row_tile * column_tiles) * TILE.columns + tl.arange(0, TILE.columns)
    if TILE.channels_inside:
        pixel, c = pixel[:, None], c[None, :]
    else:
        pixel, c = pixel[None, :], c[:, None]
    row = quotient(pixel, Q, by_Q, shift_Q)
    n = quotient(row, P, by_P, shift_P)
    return n, row - n * P, pixel - row * Q, c, (n < N) & (c < C * TILE.unit)


@triton.jit
def offset_at(n, c, h, w, strides):
    """Where a tensor's elements [n, c, h, w] are."""
    return n * strides.n + h * strides.h + w * strides.w + c * strides.c
