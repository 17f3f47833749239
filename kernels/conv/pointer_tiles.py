"""Tiles of the engine that gathers its operands by pointers."""

from collections.abc import Iterator

import torch

from ..cost_model import split
from ..geometry import Conv2dGeometry, Direction
from ..problem import Problem
from ..tile import Tile, block_for, is_valid

# Rows, columns, warps: in 16 bits; there, with an address for each element, which fills
# the registers sooner; in float32 through tensor cores; and without them.
_SHAPES_16 = ((128, 128, 8), (64, 64, 4), (128, 32, 8), (64, 32, 4), (64, 16, 4))
_SHAPES_SCATTERED = ((128, 64, 8), (64, 64, 4), (64, 32, 4), (64, 16, 4))
_SHAPES_TF32 = ((128, 64, 8), (64, 64, 4), (64, 32, 4), (64, 16, 4))
_SHAPES_EXACT = ((32, 32, 4), (32, 16, 4))


def pointer_tiles(problem: Problem) -> Iterator[Tile]:
    """The tiles that a problem may be launched with."""
    tiles = _family(problem)
    return (tile for tile in tiles if is_valid(tile, problem.dtype.itemsize, problem.device))


def _family(problem: Problem) -> Iterator[Tile]:
    direction, g, dtype, precision, device, layout, _ = problem
    if dtype.itemsize == 1:
        return
    if device.backend == "interpreter":
        yield _interpreter_tile(direction, g)
        return
    exact = dtype == torch.float64 or (dtype == torch.float32 and precision == "ieee")
    if exact:
        shapes, depth = _SHAPES_EXACT, 16
    elif dtype == torch.float32:
        shapes, depth = _SHAPES_TF32, 32
    elif layout == "scattered":
        shapes, depth = _SHAPES_SCATTERED, 32
    else:
        shapes, depth = _SHAPES_16, 64
    stages = 2 if exact or device.backend == "hip" else 3
    per_group = (g.K if direction == "dgrad" else g.C) // g.groups
    # A turn of one tap wants whole blocks of channels; else channels and taps run together.
    whole = next((d for d in (depth, depth // 2, depth // 4) if d >= 16 and per_group % d == 0), 0)
    if shapes is _SHAPES_16 and not whole and direction != "wgrad":
        shapes = _SHAPES_SCATTERED  # a tile of 128x128 has no registers left for such addresses
    for rows, columns, warps in shapes:
        if direction == "wgrad":
            packed = per_group % columns != 0
            if packed and rows * columns > 2**11:
                continue
            # Taps that change within a block take registers for each pixel of its depth.
            tile = Tile(
                rows, columns, min(depth, 32) if packed else depth, packed, 1, warps, stages
            )
            yield from split(g, tile, device)
        else:
            yield Tile(rows, columns, whole or min(depth, 32), not whole, 1, warps, stages)


def _interpreter_tile(direction: Direction, g: Conv2dGeometry) -> Tile:
    """The interpreter takes its time by the program and by the turn, not by the element."""
    gemm = g.gemm(direction)
    if direction == "wgrad":
        return Tile(block_for(gemm.rows, 256), block_for(gemm.columns, 256), 1024, packed=True)
    columns, depth = block_for(gemm.columns, 256), 64
    # Larger blocks leave the processor's cache.
    rows = block_for(gemm.rows, 2**18 // max(columns, depth))
    return Tile(rows, columns, depth, packed=True)
