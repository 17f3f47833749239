"""Tiles: what one program computes, and the one predicate that says which tiles a device takes."""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from .device import Device
from .geometry import Pair

INTERPRETER_ELEMENTS = 2**20  # Triton's limit on the elements of one block

Box = tuple[int, int, int]  # pixels along n, p, q


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's ``rows x columns`` block of a product, taken ``depth`` deep a turn.

    fprop and dgrad: rows are pixels, columns are channels of the result, depth the reduction over
    channels and taps. wgrad: rows are filters k, columns (c, r, s), depth pixels; its depth is cut
    into ``split_k`` parts, added up in a second pass. ``packed`` runs the reduction over channels
    and taps together, for channels that do not fill a block; otherwise each turn has one tap.
    Pooling and depthwise kernels have no depth: rows are pixels, columns channels; of depthwise
    ones a row is a ``patch`` of pixels along p and q. Where ``paired_columns`` sums wgrad, rows are
    filters, each twice, columns (r, position in a run), depth a ``patch`` of pairs of pixels.
    ``box``: how a descriptor's block of pixels (rows, for wgrad depth) lies in n, p and q.
    """

    rows: int
    columns: int
    depth: int = 1
    packed: bool = False
    split_k: int = 1
    warps: int = 4
    stages: int = 2
    box: Box | None = None
    patch: Pair = (1, 1)


class Block(NamedTuple):
    """What of a tile a kernel that multiplies is compiled for."""

    rows: int
    columns: int
    depth: int
    packed: bool

    @classmethod
    def of(cls, tile: Tile) -> "Block":
        return cls(tile.rows, tile.columns, tile.depth, tile.packed)


class BoxBlock(NamedTuple):
    """The same of a tile with a box, which is ``n`` x ``p`` x ``q`` pixels."""

    n: int
    p: int
    q: int
    rows: int
    columns: int
    depth: int

    @classmethod
    def of(cls, tile: Tile) -> "BoxBlock":
        return cls(*box_of(tile), tile.rows, tile.columns, tile.depth)


def block_for(size: int, most: int) -> int:
    """The power of two a block needs to hold ``size``, between 16 and ``most``."""
    return max(16, min(most, 1 << (max(1, size) - 1).bit_length()))


def box_of(tile: Tile) -> Box:
    """The box of a tile that has one."""
    assert tile.box is not None
    return tile.box


def overlapped(tile: Tile, computed: bool) -> int:
    """How many turns of its loop Triton may overlap: a single one if the left operand of the
    product is ``computed`` from what is loaded.

    Hopper takes such an operand from registers, and Triton 3.6 lets the next turn write them while
    this turn's products may still be reading.
    """
    return 1 if computed else tile.stages


def shared_bytes(tile: Tile, itemsize: int) -> int:
    """Shared memory of one program: the ring of operands, and what a descriptor stores from."""
    ring = tile.stages * (tile.rows + tile.columns) * tile.depth * itemsize
    if tile.box is None or prod(tile.box) != tile.rows:
        return ring
    return ring + tile.rows // 2 * tile.columns * max(2, itemsize) + _BARRIERS


_BARRIERS = 256  # bytes, at most, of a descriptor ring's barriers
_RESERVED = 1024  # bytes that each program takes besides
_REGISTERS = 2**16  # of a multiprocessor
_ADDRESSES = 60  # registers of a thread beside its accumulator


def is_valid(tile: Tile, itemsize: int, device: Device) -> bool:
    """The single statement of which tiles may be launched, for elements of ``itemsize`` bytes."""
    sizes = (tile.rows, tile.columns, tile.depth, *(tile.box or ()))
    if any(size < 1 or size & (size - 1) for size in sizes) or tile.split_k < 1:
        return False
    areas = (tile.rows * tile.columns, tile.rows * tile.depth, tile.columns * tile.depth)
    if tile.box is not None and not _is_valid_box(tile, itemsize, device):
        return False
    if device.backend == "interpreter":
        return max(areas) <= INTERPRETER_ELEMENTS
    registers = tile.rows * tile.columns * max(1, itemsize // 4) // (32 * tile.warps)
    return shared_bytes(tile, itemsize) <= device.shared_memory and registers <= 128


def _is_valid_box(tile: Tile, itemsize: int, device: Device) -> bool:
    """A box holds the tile's pixels, at least two; hardware takes 256 along each dimension."""
    pixels = prod(tile.box or ())
    if pixels < 2 or pixels not in (tile.rows, tile.depth) or tile.packed:
        return False
    if device.backend == "interpreter":
        return True
    return device.descriptors and max(tile.box or ()) <= 256 and tile.depth * itemsize >= 16


def blocks_per_multiprocessor(tile: Tile, itemsize: int, device: Device) -> int:
    """How many programs of a tile a multiprocessor holds, by shared memory and by registers."""
    shared = shared_bytes(tile, itemsize) + _RESERVED
    threads = 32 * tile.warps
    registers = tile.rows * tile.columns + threads * _ADDRESSES
    return max(1, min((device.shared_memory + _RESERVED) // shared, _REGISTERS // registers))
