"""A model of a convolution's time on a GPU: what the planner compares tiles by.

A program is busy for the longest of three: its products, with what its tile wastes at the edges;
what it reads through L2; its share of the least traffic of memory. Programs come in waves, the last
one often half empty. What no neighbour hides of first loads and stores is added, and the launches,
and the second pass of a split reduction. Nothing is measured here: ``device.Peaks`` holds the
rates. Times are in ms, sizes in elements.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, prod
from typing import Literal, NamedTuple

import torch

from .device import Device
from .geometry import Conv2dGeometry, Direction, Pool2dGeometry
from .problem import Problem
from .tile import Tile, blocks_per_multiprocessor

Limit = Literal["tensor cores", "memory", "L2", "launch"]
Times = dict[Limit, float]

_LAUNCH = 0.003  # from one kernel's end to the next one's start
_FILL = 1500  # cycles from a tile's first load to its first product
# Instructions of a thread beside the products of one turn: SASS for sm_90 has 95 to 130.
_TURN = 110
# The same of engine 1, for each element of a turn's depth: it gathers its operands.
_GATHERED = {"fprop": 4.0, "dgrad": 4.0, "wgrad": 5.5}
_DIRECT = 0.25  # engine 3's share of the tensor cores' rate
# Instructions of a thread to find one element of a pooled map's gradient in a load, for each
# window that may hold it, and the channels whose products share the load: SASS has 6 to 9.
_EXPANDED = 7
_SHARED = 64
_MODES = {"tf32": 2, "tf32x3": 6, "bf16x3": 3, "bf16x6": 6}  # 16-bit products' time for one


class Prediction(NamedTuple):
    """Milliseconds, and what takes them."""

    ms: float
    limit: Limit


class Work(NamedTuple):
    """One launch: programs (or tiles of a persistent one), and the k_tiles of each."""

    programs: int
    k_tiles: int


def rate(dtype: torch.dtype, precision: str, device: Device) -> float:
    """Multiply-adds of one multiprocessor in a cycle."""
    if dtype == torch.float64:
        return 64
    if dtype == torch.float32:
        return device.peaks.macs / _MODES[precision] if precision in _MODES else 128
    return device.peaks.macs * 2 / dtype.itemsize


def macs(direction: Direction, g: Conv2dGeometry) -> int:
    """Multiply-adds of a direction: dgrad leaves out what meets no pixel's phase."""
    per_tap = g.K * (g.C // g.groups)
    if direction != "dgrad":
        return g.N * g.P * g.Q * per_tap * g.R * g.S
    return g.N * per_tap * sum(h.count * w.count * h.taps * w.taps for h, w in g.dgrad())


def roofline(problem: Problem) -> float:
    """Milliseconds that no plan goes below: every product at full rate, every byte moved once."""
    direction, g, dtype, precision, device, *_ = problem
    per_second = rate(dtype, precision, device) * device.multiprocessors * device.peaks.clock * 1e9
    seconds = (
        macs(direction, g) / per_second,
        g.bytes(dtype.itemsize, direction) / (device.peaks.memory * 1e9),
    )
    return 1e3 * max(seconds)


def predict_direct(problem: Problem, tile: Tile) -> Prediction:
    """The time of engines that are fast if memory is, whatever their tile: 3 and 4."""
    direction, g, dtype, precision, device, *_ = problem
    everywhere = device.multiprocessors * device.peaks.clock * 1e6  # cycles of all in one ms
    per_cycle = rate(dtype, precision, device)
    times: Times = {
        "tensor cores": macs(direction, g) / (_DIRECT * per_cycle) / everywhere,
        "memory": g.bytes(dtype.itemsize, direction) / (device.peaks.memory * 1e6),
    }
    limit = max(times, key=lambda name: times[name])
    return Prediction(times[limit] + _LAUNCH, limit)


def predict(problem: Problem, tile: Tile) -> Prediction:
    """The time of one direction as a matrix product with one tile."""
    direction, g, dtype, precision, device, *_ = problem
    itemsize, per_cycle = dtype.itemsize, rate(dtype, precision, device)
    everywhere = device.multiprocessors * device.peaks.clock * 1e6  # cycles of all in one ms
    memory = g.bytes(itemsize, direction) / (device.peaks.memory * 1e6)
    works = launches(direction, g, tile)
    programs = max(1, sum(work.programs for work in works))  # none of an empty batch
    turn = turn_cycles(direction, tile, itemsize, per_cycle, device)
    ms, waits = 0.0, dict[Limit, float]()
    for work in works:
        busy: Times = {name: work.k_tiles * each for name, each in turn.items()}
        busy["memory"] = memory * everywhere / programs
        limit, taken = cycles(work.programs, busy, tile, itemsize, device)
        waits[limit] = waits.get(limit, 0.0) + taken
        ms += taken * device.multiprocessors / everywhere
    launch = _LAUNCH * len(works)
    if tile.split_k > 1:
        parts = 4 * (tile.split_k * 2 + 1) * prod(g.w_shape)
        launch += _LAUNCH + parts / (device.peaks.memory * 1e6)
    # Of an image without pixels nothing is launched.
    return Prediction(ms + launch, "launch" if launch >= ms else max(waits, key=waits.__getitem__))


def turn_instructions(direction: Direction, tile: Tile) -> float:
    """A thread's in one turn, beside products."""
    return _TURN if tile.box else _GATHERED[direction] * tile.depth


def turn_cycles(
    direction: Direction, tile: Tile, itemsize: int, per_cycle: float, device: Device
) -> Times:
    """What one turn of a program takes of its multiprocessor's share of each."""
    products = tile.rows * tile.columns * tile.depth / per_cycle
    products = max(products, turn_instructions(direction, tile) * tile.warps / 4)
    l2 = device.peaks.l2 / device.peaks.clock / device.multiprocessors  # bytes a cycle
    return {
        "tensor cores": products,
        "L2": (tile.rows + tile.columns) * tile.depth * itemsize / l2,
    }


def cycles(
    programs: int, busy: Times, tile: Tile, itemsize: int, device: Device
) -> tuple[Limit, float]:
    """What limits one launch of programs that are ``busy`` so many cycles each, and its cycles.

    Products wait for the last wave; L2 and memory serve whoever asks. Programs that share a
    multiprocessor hide each other's first loads and stores, as long as they are busy.
    """
    together = blocks_per_multiprocessor(tile, itemsize, device)
    waves = ceil(programs / (device.multiprocessors * together))
    all_busy: Times = {
        name: programs / device.multiprocessors * cycles for name, cycles in busy.items()
    }
    all_busy["tensor cores"] = waves * together * busy["tensor cores"]
    limit = max(all_busy, key=lambda name: all_busy[name])
    exposed = _FILL + tile.rows * tile.columns / 32 - (together - 1) * max(busy.values())
    return limit, all_busy[limit] + waves * max(0.0, exposed)


def launches(direction: Direction, g: Conv2dGeometry, tile: Tile) -> list[Work]:
    """What an engine launches for one direction, dgrad's phases apart."""
    if direction == "wgrad":
        programs, k_tiles = wgrad_work(g, tile)
        shares = [1.0]
        if tile.box:  # one launch for each phase of x that has taps
            taps = [h.taps * w.taps for h, w in g.dgrad()]
            shares = [count / (g.R * g.S) for count in taps if count]
        k_tiles = ceil(k_tiles / tile.split_k)
        return [Work(round(programs * share) * tile.split_k, k_tiles) for share in shares]
    columns, reduction = (g.K, g.C) if direction == "fprop" else (g.C, g.K)
    if direction == "fprop":
        phases = [(g.N, g.P, g.Q, g.R * g.S)]
    else:
        phases = [(g.N, h.count, w.count, h.taps * w.taps) for h, w in g.dgrad()]
    if tile.box and g.pointwise:
        phases = [(g.N * g.H * g.W, 1, 1, 1)]
    column_tiles = g.groups * ceil(columns // g.groups / tile.columns)
    works = []
    for *pixels, taps in phases:
        if tile.box:
            rows = prod(ceil(size / length) for size, length in zip(pixels, tile.box, strict=True))
        else:
            rows = ceil(prod(pixels) / tile.rows)
        works.append(Work(rows * column_tiles, _k_tiles(reduction // g.groups, taps, tile)))
    return works


def _k_tiles(channels: int, taps: int, tile: Tile) -> int:
    if tile.packed:
        return ceil(channels * taps / tile.depth)
    return taps * ceil(channels / tile.depth)


def wgrad_work(g: Conv2dGeometry, tile: Tile) -> Work:
    """Programs and k_tiles of wgrad in one part."""
    K, C = g.K // g.groups, g.C // g.groups
    columns = (
        ceil(C * g.R * g.S / tile.columns) if tile.packed else (g.R * g.S * ceil(C / tile.columns))
    )
    pixels = (g.N * g.H * g.W, 1, 1) if g.pointwise else (g.N, g.P, g.Q)
    if tile.box:
        k_tiles = prod(ceil(size / length) for size, length in zip(pixels, tile.box, strict=True))
    else:
        k_tiles = ceil(prod(pixels) / tile.depth)
    return Work(g.groups * ceil(K / tile.rows) * columns, k_tiles)


def writes_pool_gradient(problem: Problem, pool: Pool2dGeometry) -> bool:
    """Whether dgrad or wgrad of a map that was pooled had better read its gradient written out by
    ``pool_gradient.write`` than find it in each of its loads. The batch takes no part.

    Written out, each element takes memory's time for one store and one load; found in loads, the
    schedulers' for each read of it, by dgrad for each tap. Engine 2 reads only what is written.
    Triton 3.6 does not compile a product of float64 whose operand is chosen by offsets of bytes.
    """
    direction, g, dtype, _, device, *_ = problem
    C = g.C // g.groups
    if dtype.itemsize > 4 or (device.descriptors and C > 4):
        return True
    taps = g.R * g.S
    if direction == "dgrad":
        reads = taps * ceil(C / _SHARED)
    else:
        reads = ceil(C * taps / _SHARED) + 1  # and the bias gradient's
    issue = device.multiprocessors * 4 * 32 * device.peaks.clock  # instructions in one ns
    in_loads = reads * prod(pool.covering) * _EXPANDED / issue
    return in_loads > 2 * dtype.itemsize / device.peaks.memory


def split(g: Conv2dGeometry, tile: Tile, device: Device) -> Iterator[Tile]:
    """wgrad's reduction in one part, and in as many as fill the device once, twice and four times,
    of at least eight k_tiles each.
    """
    works = launches("wgrad", g, replace(tile, split_k=1))
    programs, k_tiles = max(works)  # of the phase with most taps
    room = blocks_per_multiprocessor(tile, 2, device) * device.multiprocessors
    parts = {1} | {min(k_tiles // 8, fill * room // max(1, programs)) for fill in (1, 2, 4)}
    yield from (replace(tile, split_k=split_k) for split_k in sorted(parts) if split_k > 0)
