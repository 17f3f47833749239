"""Which engine and which tile for a convolution, from its geometry alone; nothing is timed.

The engine and the depth of its tiles follow from channels, taps, dtype and layout, never from the
batch or the image: so an image's result does not depend on its neighbours. (wgrad sums over the
batch: its engine follows from the map, too, and its order is free.) Tiles and boxes come from fixed
families, so that few binaries serve all sizes; ``model`` predicts which of them is quickest.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from math import ceil, inf, prod
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import (
    conv_pool,
    depthwise,
    descriptor_gemm,
    descriptor_pool,
    direct_conv,
    implicit_gemm,
    model,
    stem_pool,
)
from .device import Device
from .geometry import Conv2dGeometry, Direction, Pool2dGeometry
from .tile import Box, Tile, blocks_per_multiprocessor, is_valid

Layout = Literal["aligned", "channels_last", "scattered"]
"""How the operands lie: channels side by side, pixels in memory order and rows on 16 bytes, as
descriptors need; channels side by side; or otherwise, where each element has an address."""

# Engine 1. rows, columns, warps: in 16 bits; there, with an address for each element, which fills
# the registers sooner; in float32 through tensor cores; and without them.
_SHAPES_16 = ((128, 128, 8), (64, 64, 4), (128, 32, 8), (64, 32, 4), (64, 16, 4))
_SHAPES_SCATTERED = ((128, 64, 8), (64, 64, 4), (64, 32, 4), (64, 16, 4))
_SHAPES_TF32 = ((128, 64, 8), (64, 64, 4), (64, 32, 4), (64, 16, 4))
_SHAPES_EXACT = ((32, 32, 4), (32, 16, 4))

# Engine 2, by the bytes of an element; its ring takes what shared memory is left. fprop and dgrad:
# pixels, channels, warps; wgrad: filters, channels, warps.
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
_MAP = 2**14  # places of a map that comes in batches of at least a small box
_LEAST_COLUMNS = 64  # channels that one product instruction of four warps takes, on Hopper
_ROW = 128  # bytes of a row of shared memory that a descriptor fills without bank conflicts
_INSTRUCTION = 32  # bytes of a reduction that one product instruction takes


class Plan(NamedTuple):
    """An engine (a module with fprop, dgrad and wgrad), the tile to launch it with, and the
    predicted time with what limits it.
    """

    engine: ModuleType
    tile: Tile
    ms: float
    limit: model.Limit


@lru_cache(maxsize=4096)
def plan(
    direction: Direction,
    g: Conv2dGeometry,
    dtype: torch.dtype,
    precision: str,
    device: Device,
    layout: Layout,
) -> Plan:
    """The best of the candidates."""
    return candidates(direction, g, dtype, precision, device, layout)[0]


@lru_cache(maxsize=4096)
def plan_pooled(
    g: Conv2dGeometry,
    pool: Pool2dGeometry,
    dtype: torch.dtype,
    precision: str,
    device: Device,
    layout: Layout,
) -> tuple[ModuleType, Tile]:
    """The engine and tile of a convolution that is pooled before it is stored."""
    return pooled_family(g, pool, dtype, precision, device, layout)[0]


def pooled_family(
    g: Conv2dGeometry,
    pool: Pool2dGeometry,
    dtype: torch.dtype,
    precision: str,
    device: Device,
    layout: Layout,
) -> list[tuple[ModuleType, Tile]]:
    """Those that some batch and image size of the layer may get, the best for this one first."""
    if stem_pool.supports(g, pool, dtype, device, layout):
        return [(stem_pool, stem_pool.choose_tile(g, pool, dtype, device))]
    if device.descriptors and descriptor_pool.supports(g, pool, dtype, device, layout, precision):
        tiles = descriptor_pool.tiles(g, pool, dtype, precision, device)
        return [(descriptor_pool, tile) for tile in tiles]
    tiles = list(_pointer_tiles("fprop", g, dtype, precision, device, layout))
    if device.backend == "interpreter":
        rows = _power(g.N * pool.P * pool.Q, tiles[0].rows)
        return [(conv_pool, replace(tiles[0], rows=rows))]
    # Beside the accumulator, the largest values so far and their taps lie in registers.
    tiles = [tile for tile in tiles if tile.rows * tile.columns <= 2**10 * tile.warps]
    return [(conv_pool, min(tiles, key=lambda tile: _waste(g.K // g.groups, tile)))]


@lru_cache(maxsize=4096)
def plan_expanded(
    direction: Direction,
    g: Conv2dGeometry,
    pool: Pool2dGeometry,
    dtype: torch.dtype,
    precision: str,
    device: Device,
) -> tuple[ModuleType, Tile] | None:
    """The engine and tile of a gradient that expands a pooled one as it is read; None where it had
    better be written out first. The pointer engines alone can.
    """
    if model.expands_first(direction, g, pool, dtype, device):
        return None
    engine, tile, *_ = plan(direction, g, dtype, precision, device, "scattered")
    takes = engine is implicit_gemm or (engine is direct_conv and direction == "wgrad")
    return (engine, tile) if takes else None


def _waste(channels: int, tile: Tile) -> tuple[float, int]:
    """How much of a tile's columns is beyond the channels, then how small it is."""
    taken = -(-channels // tile.columns) * tile.columns
    return taken / channels, -tile.rows * tile.columns


def candidates(
    direction: Direction,
    g: Conv2dGeometry,
    dtype: torch.dtype,
    precision: str,
    device: Device,
    layout: Layout,
    *,
    every_size: bool = False,
) -> list[Plan]:
    """All plans that can run this problem, best first; ``every_size``: also wgrad's for images of
    another size.
    """
    arguments = (direction, g, dtype, precision, device)
    if depthwise.supports(g):
        tile = depthwise.choose_tile(direction, g, dtype, device, layout != "scattered")
        return [Plan(depthwise, tile, *model.predict(*arguments, tile, direct=True))]
    if direct_conv.supports(g):
        tile = direct_conv.choose_tile(direction, g, dtype, device)
        return [Plan(direct_conv, tile, *model.predict(*arguments, tile, direct=True))]
    plans: list[Plan] = []

    def add(engine: ModuleType, tiles: Iterable[Tile]) -> None:
        plans.extend(
            Plan(engine, tile, *model.predict(*arguments, tile))
            for tile in tiles
            if is_valid(tile, dtype.itemsize, device)
        )

    every_size &= direction == "wgrad"
    if layout == "aligned" and _takes_descriptors(*arguments):
        if direction != "wgrad" or every_size or _fits_boxes(g):
            add(descriptor_gemm, _descriptor_tiles(*arguments, every_size))
    if dtype.itemsize > 1 and (every_size or not plans):
        add(implicit_gemm, _pointer_tiles(*arguments, layout))
    return sorted(plans, key=lambda plan: plan.ms)


def family(
    direction: Direction,
    g: Conv2dGeometry,
    dtype: torch.dtype,
    precision: str,
    device: Device,
    layout: Layout,
) -> list[Plan]:
    """Every plan that some batch and image size of a layer may get, with splits of one and of two,
    which stand for any number: what to compile so that a new size compiles nothing.
    """
    plans = candidates(direction, g, dtype, precision, device, layout, every_size=True)
    parts = (1, 2) if direction == "wgrad" else (1,)
    tiles = {
        (plan.engine, replace(plan.tile, splits=splits)): plan for plan in plans for splits in parts
    }
    return [plan._replace(tile=tile) for (_, tile), plan in tiles.items()]


def layout_of(images: Iterable[Tensor | None], filters: Iterable[Tensor]) -> Layout:
    """How the operands lie; ``images`` are x, y or residual, ``filters`` w."""
    found: Layout = "aligned"
    # A filter of one channel has no neighbours to lie beside.
    for t in (*images, *(w for w in filters if w.shape[1] > 1)):
        if t is not None and t.stride(1) != 1:
            return "scattered"
    if not all(t is None or _is_aligned(t, ordered=True) for t in images):
        found = "channels_last"
    if not all(_is_aligned(t, ordered=False) for t in filters):
        found = "channels_last"
    return found


def _is_aligned(t: Tensor, *, ordered: bool) -> bool:
    """Whether rows of channels start on 16 bytes, and where asked follow one another in order."""
    (N, _, H, W), (n, _, h, w) = t.shape, t.stride()
    unit = 16 // t.element_size()
    end = 0
    for size, stride in ((W, w), (H, h), (N, n)):
        if size > 1:
            if stride % unit or stride <= 0 or (ordered and end and stride != end):
                return False
            end = stride * size
    return t.data_ptr() % 16 == 0


def _takes_descriptors(
    direction: Direction, g: Conv2dGeometry, dtype: torch.dtype, precision: str, device: Device
) -> bool:
    """Whether engine 2 takes a layer and is worth it: channels, or a group's, fill its blocks.

    In the interpreter it stands only for what no other engine takes.
    """
    wanted = device.descriptors or (device.backend == "interpreter" and dtype.itemsize == 1)
    if not wanted or not descriptor_gemm.supports(direction, g, dtype, precision):
        return False
    columns, depth = (g.C, g.K) if direction == "dgrad" else (g.K, g.C)
    if g.groups == 1:
        return min(columns, depth) >= 16
    least = _least_depth(dtype.itemsize)
    return columns // g.groups % _LEAST_COLUMNS == 0 and depth // g.groups % least == 0


def _descriptor_tiles(
    direction: Direction,
    g: Conv2dGeometry,
    dtype: torch.dtype,
    precision: str,
    device: Device,
    every_size: bool,
) -> Iterator[Tile]:
    """Engine 2's family, less blocks that are twice as large as what they hold."""
    K, C = g.K // g.groups, g.C // g.groups
    if device.backend == "interpreter":
        columns, depth = (_power(K, 256), _power(C, 128)) if g.groups == 1 else (16, 16)
        yield Tile(256, columns, depth, box=(1, 16, 16))
        return
    if direction == "wgrad":
        for rows, columns, warps in _WGRADS[dtype.itemsize]:
            if _is_too_large(rows, K) or _is_too_large(columns, C):
                continue
            for box in _wgrad_boxes(g, rows, columns, dtype.itemsize, every_size):
                tile = Tile(rows, columns, prod(box), warps=warps, box=box)
                yield from _split(g, _deepest(tile, dtype, device), device)
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
    g: Conv2dGeometry, rows: int, columns: int, itemsize: int, every_size: bool
) -> Iterator[Box]:
    """Pixels of a row, or of as many images: a box with several long axes is not right on
    Triton 3.6, see ``descriptor_gemm.wgrad_kernel``.

    The deepest come first, and a small block makes up for its short turns by their depth. A
    shallower box is worth its turns only if it covers a tenth fewer places than those before it.
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
            worth = 1.1 * waste <= least and descriptor_gemm.keeps_places_apart(g, box)
            if every_size or worth:
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


def _pointer_tiles(
    direction: Direction,
    g: Conv2dGeometry,
    dtype: torch.dtype,
    precision: str,
    device: Device,
    layout: Layout,
) -> Iterator[Tile]:
    """Engine 1's family."""
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
            yield from _split(g, tile, device)
        else:
            yield Tile(rows, columns, whole or min(depth, 32), not whole, 1, warps, stages)


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


def _split(g: Conv2dGeometry, tile: Tile, device: Device) -> Iterator[Tile]:
    """wgrad's reduction in one part, and in as many as fill the device once, twice and four times,
    of at least eight turns each.
    """
    works = model.launches("wgrad", g, replace(tile, splits=1))
    programs, turns = max(works)  # of the parity with most taps
    room = blocks_per_multiprocessor(tile, 2, device) * device.multiprocessors
    parts = {1} | {min(turns // 8, fill * room // max(1, programs)) for fill in (1, 2, 4)}
    yield from (replace(tile, splits=splits) for splits in sorted(parts) if splits > 0)
