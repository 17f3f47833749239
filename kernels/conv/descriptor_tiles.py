"""Tiles of the engine that loads boxes of pixels through tensor descriptors, and what it takes."""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, inf, prod

import torch

from ..cost_model import split
from ..device import Device
from ..geometry import Conv2dGeometry, Direction, Taps
from ..problem import Problem
from ..tile import Box, Tile, block_for, blocks_per_multiprocessor, is_valid

# By the bytes of an element; the ring takes what shared memory is left. fprop and dgrad: pixels,
# channels, warps; wgrad: filters, channels, warps.
_PRODUCTS = {
    1: ((256, 128, 8), (128, 64, 4)),
    2: ((256, 128, 8), (256, 64, 4), (128, 128, 4), (128, 64, 4)),
    4: ((128, 128, 8), (128, 64, 4)),
}
_WGRADS = {
    2: ((128, 256, 8), (128, 128, 4), (64, 256, 4), (64, 128, 4), (128, 64, 4), (64, 64, 4)),
    4: ((128, 128, 8), (64, 128, 4), (64, 64, 4)),
}
# Boxes of fprop and dgrad by their pixels, in an order that breaks ties: near pixels before far
# images.
_BOXES = {
    256: ((1, 16, 16), (4, 8, 8), (16, 4, 4), (64, 2, 2), (256, 1, 1)),
    128: ((1, 8, 16), (2, 8, 8), (8, 4, 4), (32, 2, 2), (128, 1, 1)),
}
_LEAST_BOX = 16  # pixels of wgrad's; the least depth of a product instruction in 16 bits
_LEAST_TURN = 2**18  # multiply-adds of a turn of wgrad, which take as long as its barriers
_MAP = 2**14  # outputs of a map that comes in batches of at least a small box
_LEAST_COLUMNS = 64  # channels that one product instruction of four warps takes, on Hopper
_ROW = 128  # bytes of a row of shared memory that a descriptor fills without bank conflicts
_INSTRUCTION = 32  # bytes of a reduction that one product instruction takes


def supports(direction: Direction, g: Conv2dGeometry, dtype: torch.dtype, precision: str) -> bool:
    """Whether products through descriptors take the convolution, on aligned operands.

    fprop and dgrad do not cut a group's channels short, and fprop reads at most four phases.
    """
    if min(g.x_shape) < 1 or min(g.y_shape) < 1 or g.C // g.groups < 1:
        return False
    if dtype == torch.float64 or (dtype == torch.float32 and precision == "ieee"):
        return False
    if direction == "wgrad":  # a tap whose phase has no pixel would not be written
        return g.H >= g.stride[0] and g.W >= g.stride[1]
    return direction == "dgrad" or len(read_phases(g)) <= 4


def read_phases(g: Conv2dGeometry) -> list[tuple[Taps, Taps]]:
    """The phases of x that have taps."""
    return [(row, column) for row, column in g.dgrad() if row.taps and column.taps]


def keeps_outputs_apart(g: Conv2dGeometry, box: Box) -> bool:
    """Whether no output of a box outside the result meets a pixel inside x, by any tap.

    There dy counts as zero, but zero times an infinity or NaN of x would spread into dw.
    """
    if g.pointwise:
        return True
    _, height, width = box
    rows, columns = zip(*g.dgrad(), strict=True)
    return all(
        outputs % length == 0 or all(outputs - taps.origin >= taps.count for taps in phases)
        for outputs, length, phases in ((g.P, height, rows), (g.Q, width, columns))
    )


def descriptor_tiles(problem: Problem) -> Iterator[Tile]:
    """The tiles that a problem may be launched with."""
    direction, g, dtype, _, device, layout, any_size = problem
    if layout != "aligned" or not _is_worth_it(problem):
        return
    if direction == "wgrad" and not any_size and not _fits_boxes(g):
        return
    yield from (tile for tile in _family(problem) if is_valid(tile, dtype.itemsize, device))


def _is_worth_it(problem: Problem) -> bool:
    """Whether a layer's channels, or a group's, fill the blocks of descriptors.

    In the interpreter they stand only for what no other engine takes.
    """
    direction, g, dtype, precision, device, *_ = problem
    wanted = device.descriptors or (device.backend == "interpreter" and dtype.itemsize == 1)
    if not wanted or not supports(direction, g, dtype, precision):
        return False
    columns, depth = (g.C, g.K) if direction == "dgrad" else (g.K, g.C)
    if g.groups == 1:
        return min(columns, depth) >= 16
    least = _least_depth(dtype.itemsize)
    return columns // g.groups % _LEAST_COLUMNS == 0 and depth // g.groups % least == 0


def _family(problem: Problem) -> Iterator[Tile]:
    """All blocks, less those that are twice as large as what they hold."""
    direction, g, dtype, _, device, _, any_size = problem
    K, C = g.K // g.groups, g.C // g.groups
    if device.backend == "interpreter":
        columns, depth = (block_for(K, 256), block_for(C, 128)) if g.groups == 1 else (16, 16)
        yield Tile(256, columns, depth, box=(1, 16, 16))
        return
    if direction == "wgrad":
        for rows, columns, warps in _WGRADS[dtype.itemsize]:
            if _is_too_large(rows, K) or _is_too_large(columns, C):
                continue
            for box in _wgrad_boxes(g, rows, columns, dtype.itemsize, any_size):
                tile = Tile(rows, columns, prod(box), warps=warps, box=box)
                yield from split(g, _deepest(tile, dtype, device), device)
        return
    channels, reduction = (K, C) if direction == "fprop" else (C, K)
    depth = _depth(reduction, g.groups, g.R * g.S, dtype.itemsize)
    for rows, columns, warps in _PRODUCTS[dtype.itemsize]:
        if _is_too_large(columns, channels) or (g.groups > 1 and channels % columns):
            continue
        for box in _BOXES[rows]:
            yield _deepest(Tile(rows, columns, depth, warps=warps, box=box), dtype, device)


def _fits_boxes(g: Conv2dGeometry) -> bool:
    """Whether wgrad's boxes are full: of pixels of a row, or of images at the batch that a map of
    this size usually has. The batch itself takes no part.
    """
    return g.pointwise or g.Q % _LEAST_BOX == 0 or g.P * g.Q <= _MAP


def _wgrad_boxes(
    g: Conv2dGeometry, rows: int, columns: int, itemsize: int, any_size: bool
) -> Iterator[Box]:
    """Pixels of a row, or of as many images: a box with several long axes is not right on
    Triton 3.6, see ``descriptor_gemm.wgrad_kernel``.

    The deepest come first, and a small block makes up for its short turns by their depth. A
    shallower box is worth its turns only if it covers a tenth fewer outputs than those before it.
    """
    images = g.N * g.H * g.W if g.pointwise else g.N
    least = inf
    depth = _ROW // itemsize * (2 if rows * columns <= 2**13 else 1)
    while depth >= _LEAST_BOX:
        boxes: list[tuple[Box, int]] = [] if g.pointwise else [((1, 1, depth), g.Q)]
        if rows * columns * depth >= _LEAST_TURN:
            boxes.append(((depth, 1, 1), images))
        for box, size in boxes:
            waste = ceil(size / depth) * depth / size
            worth = 1.1 * waste <= least and keeps_outputs_apart(g, box)
            if any_size or worth:
                least = min(least, waste)
                yield box
        depth //= 2


def _is_too_large(block: int, size: int) -> bool:
    return block > _LEAST_COLUMNS and size <= block // 2


def _depth(reduction: int, groups: int, taps: int, itemsize: int) -> int:
    """Channels of a turn: two of shared memory's rows in a long reduction of small elements, where
    they come out even; else the fewest of one row and its parts that hold them, or divide them.
    A block that a group does not fill would read the next one's channels.

    A pointwise layer is short, and mostly waits for memory: two shallow programs that share a
    multiprocessor and hide each other's stores serve it better than one deep one.
    """
    row = _ROW // itemsize
    if itemsize <= 2 and taps > 1 and reduction % (2 * row) == 0:
        return 2 * row
    part = next((d for d in (row, row // 2) if reduction % d == 0), _least_depth(itemsize))
    return part if groups > 1 else next((d for d in (row, row // 2) if reduction > d // 2), part)


def _least_depth(itemsize: int) -> int:
    return max(16, _INSTRUCTION // itemsize)


def _deepest(tile: Tile, dtype: torch.dtype, device: Device) -> Tile:
    """The tile with the most of two to four stages that let two programs of four warps, or one of
    eight, share a multiprocessor; the shallowest if none does.
    """
    together = 8 // tile.warps
    for stages in (4, 3, 2):
        deep = replace(tile, stages=stages)
        room = blocks_per_multiprocessor(deep, dtype.itemsize, device)
        if room >= together and is_valid(deep, dtype.itemsize, device):
            return deep
    return replace(tile, stages=2)
