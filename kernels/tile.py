"""Tiles: what one program computes, and the one predicate that says which tiles a device takes."""

from dataclasses import dataclass

from .device import Device

INTERPRETER_ELEMENTS = 2**20  # Triton's limit on the elements of one block


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's ``rows x columns`` block of a product, walked ``depth`` deep a turn.

    fprop and dgrad: rows are pixels, columns are channels of the result, depth the reduction over
    channels and taps. wgrad: rows are filters k, columns (c, r, s), depth pixels; its depth is cut
    into ``splits`` parts, added up in a second pass. ``packed`` runs the reduction over channels
    and taps together, for channels that do not fill a block; otherwise each turn has one tap.
    Pooling and depthwise kernels have no depth: rows are pixels, columns channels.
    """

    rows: int
    columns: int
    depth: int = 1
    packed: bool = False
    splits: int = 1
    warps: int = 4
    stages: int = 2


def is_valid(tile: Tile, itemsize: int, device: Device) -> bool:
    """The single statement of which tiles may be launched, for elements of ``itemsize`` bytes."""
    sizes = (tile.rows, tile.columns, tile.depth)
    if any(size < 1 or size & (size - 1) for size in sizes) or tile.splits < 1:
        return False
    areas = (tile.rows * tile.columns, tile.rows * tile.depth, tile.columns * tile.depth)
    if device.backend == "interpreter":
        return max(areas) <= INTERPRETER_ELEMENTS
    ring = tile.stages * (tile.rows + tile.columns) * tile.depth * itemsize
    registers = tile.rows * tile.columns * max(1, itemsize // 4) // (32 * tile.warps)
    return ring <= device.shared_memory and registers <= 128
