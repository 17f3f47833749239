"""Which engine and which tile for a convolution, from its geometry alone; nothing is timed.

The engine and the depth of its tiles follow from channels, taps and dtype, never from the batch
or the image: so an image's result does not depend on its neighbours.
"""

from dataclasses import replace
from functools import lru_cache
from math import ceil
from types import ModuleType
from typing import NamedTuple

import torch

from . import direct_conv, implicit_gemm
from .device import Device
from .geometry import Conv2dGeometry, Direction
from .tile import Tile, is_valid

# rows, columns, warps: in 16 bits; there, with an address for each element, which fills the
# registers sooner; in float32 through tensor cores; and without them.
_SHAPES_16 = ((128, 128, 8), (128, 64, 8), (64, 64, 4), (128, 32, 8), (64, 32, 4), (64, 16, 4))
_SHAPES_SCATTERED = ((128, 64, 8), (64, 64, 4), (64, 32, 4), (64, 16, 4))
_SHAPES_TF32 = ((128, 64, 8), (64, 64, 4), (64, 32, 4), (64, 16, 4))
_SHAPES_EXACT = ((32, 32, 4), (32, 16, 4))


class Plan(NamedTuple):
    """An engine (a module with fprop, dgrad and wgrad) and the tile to launch it with."""

    engine: ModuleType
    tile: Tile


@lru_cache(maxsize=4096)
def plan(
    direction: Direction,
    g: Conv2dGeometry,
    dtype: torch.dtype,
    precision: str,
    device: Device,
    scattered: bool = False,
) -> Plan:
    """The best of the candidates."""
    return candidates(direction, g, dtype, precision, device, scattered)[0]


def candidates(
    direction: Direction,
    g: Conv2dGeometry,
    dtype: torch.dtype,
    precision: str,
    device: Device,
    scattered: bool = False,
) -> list[Plan]:
    """All plans that can run this problem, best first.

    ``scattered``: an operand's channels do not lie side by side, so each element has an address.
    """
    if direct_conv.supports(g):
        return [Plan(direct_conv, direct_conv.choose_tile(direction, g, dtype, device))]
    tiles = _tiles(direction, g, dtype, precision, device, scattered)
    tiles = [tile for tile in tiles if is_valid(tile, dtype.itemsize, device)]
    tiles.sort(key=lambda tile: _cost(direction, g, tile, device))
    return [Plan(implicit_gemm, tile) for tile in tiles]


def _tiles(
    direction: Direction,
    g: Conv2dGeometry,
    dtype: torch.dtype,
    precision: str,
    device: Device,
    scattered: bool,
) -> list[Tile]:
    if device.backend == "interpreter":
        return [_interpreter_tile(direction, g)]
    exact = dtype == torch.float64 or (dtype == torch.float32 and precision == "ieee")
    if exact:
        shapes, depth = _SHAPES_EXACT, 16
    elif dtype == torch.float32:
        shapes, depth = _SHAPES_TF32, 32
    elif scattered:
        shapes, depth = _SHAPES_SCATTERED, 32
    else:
        shapes, depth = _SHAPES_16, 64
    stages = 2 if exact or device.backend == "hip" else 3
    per_group = g.C // g.groups
    if direction == "wgrad":
        tiles = [
            Tile(rows, columns, depth, per_group % columns != 0, 1, warps, stages)
            for rows, columns, warps in shapes
        ]
        return [replace(tile, splits=_splits(g, tile, device)) for tile in tiles]
    channels = per_group if direction == "fprop" else g.K // g.groups
    # A turn of one tap wants whole blocks of channels; else channels and taps run together.
    whole = next((d for d in (depth, depth // 2, depth // 4) if d >= 16 and channels % d == 0), 0)
    return [
        Tile(rows, columns, whole or min(depth, 32), not whole, 1, warps, stages)
        for rows, columns, warps in shapes
    ]


def _interpreter_tile(direction: Direction, g: Conv2dGeometry) -> Tile:
    """The interpreter takes its time by the program and by the turn, not by the element."""
    gemm = g.gemm(direction)
    if direction == "wgrad":
        return Tile(_power(gemm.rows, 256), _power(gemm.columns, 256), 1024, packed=True)
    columns, depth = _power(gemm.columns, 256), 64
    # Larger blocks leave the processor's cache.
    rows = _power(gemm.rows, 2**18 // max(columns, depth))
    return Tile(rows, columns, depth, packed=True)


def _power(size: int, most: int) -> int:
    """The power of two a block needs to hold ``size``, between 16 and ``most``."""
    return max(16, min(most, 1 << (max(1, size) - 1).bit_length()))


def _splits(g: Conv2dGeometry, tile: Tile, device: Device) -> int:
    """Parts of wgrad's reduction that fill the device twice, of at least eight turns each."""
    gemm = g.gemm("wgrad")
    programs = g.groups * ceil(gemm.rows / tile.rows) * ceil(gemm.columns / tile.columns)
    turns = ceil(gemm.depth / tile.depth)
    return max(1, min(2 * device.multiprocessors // max(1, programs), turns // 8))


def _cost(direction: Direction, g: Conv2dGeometry, tile: Tile, device: Device) -> float:
    """Relative time: waves of programs, times a tile's products and the traffic that feeds them."""
    gemm = g.gemm(direction)
    programs = g.groups * ceil(gemm.rows / tile.rows) * ceil(gemm.columns / tile.columns)
    waves = ceil(programs * tile.splits / device.multiprocessors)
    area = tile.rows * tile.columns
    return waves * (area + 64 * (tile.rows + tile.columns)) / tile.splits
