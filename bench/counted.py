"""Count what the planner's choices do, without a GPU, beside its assumptions: one row per layer.

Some programs (CTAs) of each launch are executed at the layer's real size, on zeros: all of a small
grid, otherwise ``--programs`` of them, spread over it. Their sum is scaled to the grid. Programs at
an edge do less, so a number is as good as its sample: ``fewest`` and ``most`` instructions of a
program show the spread. Cells of two numbers are counted/assumed.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tqdm import tqdm

from kernels import cost_model, device
from kernels.conv.engine import Plan
from kernels.device import Device
from kernels.geometry import Conv2dGeometry, Direction, Pool2dGeometry, read_pixels
from kernels.pool import max_pool
from kernels.tile import Tile

from . import compiled, emulator, measure, record, selection, suites
from .emulator.checks import FINDINGS
from .emulator.counters import Counts
from .emulator.launch import LAUNCHES
from .errors import UsageError
from .measure import DTYPES

Row = dict[str, Any]

_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90")
_SECTOR = 32  # bytes
_PLAIN = ("load", "copy", "store", "atomic")  # accesses by threads, not by boxes


class Launch(NamedTuple):
    """The work of one launch, scaled from the executed programs to the grid.

    Instructions are PTX's, per warp; L2 bytes are those of the touched sectors.
    """

    kernel: str
    programs: int
    executed: int
    warps: int  # of a program
    fewest: int  # instructions of a program
    most: int
    instructions: dict[str, int]
    loop_instructions: int  # in the loop with the most products
    macs: int  # of tensor cores
    tma_bytes: int  # boxes, including what is outside the tensor
    load_bytes: int  # requested by warps, by load or cp.async
    store_bytes: int
    l2_read_bytes: int
    l1_bytes: int  # of those, the most that L1 can serve
    l2_written_bytes: int
    requests: int  # to global memory, by warps
    sectors: int  # touched by these
    wavefronts: int  # of shared memory, by threads
    conflicts: int  # those beyond the minimum
    costly: list[Row]  # the source lines with the most wavefronts or sectors beyond the minimum


class Assumed(NamedTuple):
    """The planner's assumptions about an operator; None if it makes none."""

    launches: int | None
    programs: int | None
    turns: int | None
    macs: int | None
    turn_instructions: float | None
    l2_bytes: int | None
    bytes: int | None
    ms: float | None
    limit: str | None


def scaled(entry: dict[str, Any]) -> Launch:
    """The counts in one entry of the emulator's log."""
    counts: Counts = entry["counters"]
    programs = prod(entry["grid"])

    def grid(amount: float) -> int:
        return round(amount * programs / counts.programs)

    def total(memory: str, field: str, *whats: str) -> int:
        found = (a for a in counts.accesses if a.memory == memory and a.what in whats)
        return grid(sum(getattr(access, field) for access in found))

    shared = total("shared", "units", *_PLAIN)
    costly = sorted(counts.accesses, key=lambda access: access.least - access.units)
    return Launch(
        kernel=entry["kernel"],
        programs=programs,
        executed=counts.programs,
        warps=entry["threads"] // 32,
        fewest=counts.fewest,
        most=counts.most,
        instructions={name: grid(n) for name, n in counts.instructions.items()},
        loop_instructions=grid(counts.loop),
        macs=grid(counts.macs),
        tma_bytes=total("global", "bytes", "tensor load", "tensor store"),
        load_bytes=total("global", "bytes", "load", "copy"),
        store_bytes=total("global", "bytes", "store", "atomic"),
        l2_read_bytes=_SECTOR * total("global", "units", "load", "copy", "tensor load"),
        l1_bytes=_SECTOR * grid(counts.again),
        l2_written_bytes=_SECTOR * total("global", "units", "store", "atomic", "tensor store"),
        requests=total("global", "requests", *_PLAIN),
        sectors=total("global", "units", *_PLAIN),
        wavefronts=shared,
        conflicts=shared - total("shared", "least", *_PLAIN),
        costly=[access._asdict() for access in costly[:4] if access.units > access.least],
    )


def assumed(direction: Direction, g: Conv2dGeometry, dtype: torch.dtype, plan: Plan) -> Assumed:
    """The cost model's assumptions about a plan."""
    tile, size = plan.tile, dtype.itemsize
    if plan.engine.name not in ("descriptor_gemm", "implicit_gemm"):
        macs = cost_model.macs(direction, g)
        return Assumed(
            1, None, None, macs, None, None, g.bytes(size, direction), plan.ms, plan.limit
        )
    works = cost_model.launches(direction, g, tile)
    turns = sum(work.programs * work.k_tiles for work in works)
    return Assumed(
        launches=len(works) + (tile.split_k > 1),
        programs=sum(work.programs for work in works),
        turns=turns,
        macs=turns * tile.rows * tile.columns * tile.depth,
        turn_instructions=cost_model.turn_instructions(direction, tile),
        l2_bytes=turns * (tile.rows + tile.columns) * tile.depth * size,
        bytes=g.bytes(size, direction),
        ms=plan.ms,
        limit=plan.limit,
    )


def least_bytes(op: str, g: suites.Geometry, itemsize: int) -> int:
    """Minimal memory traffic: what any tap reads, once, and what is written."""
    if isinstance(g, Pool2dGeometry):
        kept = prod(g.y_shape) * (itemsize + max_pool.argmax_dtype(g).itemsize)
        x = read_pixels(g) if op == "max_pool" else g.H * g.W
        return kept + g.N * g.C * x * itemsize
    if isinstance(g, suites.Block):
        conv, pool = g
        kept = prod(pool.y_shape) * (itemsize + max_pool.argmax_dtype(pool).itemsize)
        read = conv.N * conv.C * read_pixels(conv)
        if op == "conv_relu_max_pool":
            return kept + itemsize * (read + prod(conv.w_shape))
        dx = prod(conv.x_shape) + prod(conv.w_shape) if conv.C > 4 else 0
        return kept + itemsize * (read + prod(conv.w_shape) + dx)
    pixels = g.H * g.W if suites.DIRECTIONS[op] == "dgrad" else read_pixels(g)
    return itemsize * (g.N * g.C * pixels + prod(g.w_shape) + prod(g.y_shape))


def execute(case: suites.Case, gpu: Device) -> tuple[str, Tile, Assumed | None]:
    """Launch what the operator launches for one case; returns its engine, tile and assumptions."""
    g, dtype = case.layer.geometry, DTYPES[case.dtype]
    if isinstance(g, Conv2dGeometry):
        relu = case.op == "conv_relu"
        direction = suites.DIRECTIONS[case.op]
        tensors = selection.operands(g, dtype.torch)
        plan = selection.plan(direction, g, dtype.precision, *tensors)
        compiled.launch(direction, g, tensors, plan, dtype.precision, bias=relu, relu=relu)
        return plan.engine.name, plan.tile, assumed(direction, g, dtype.torch, plan)
    if isinstance(g, suites.Block) and case.op == "conv_relu_max_pool":
        return *compiled.launch_block(g, dtype, gpu), None
    if isinstance(g, suites.Block):
        return *compiled.launch_block_backward(g, dtype, gpu), None
    return *compiled.launch_pool(case.op, g, dtype.torch, gpu), None


def count(case: suites.Case, gpu: Device) -> Row:
    """Execute one case and return its row."""
    LAUNCHES.clear()
    engine, tile, planned = execute(case, gpu)
    launches = [scaled(entry) for entry in LAUNCHES]
    dtype = DTYPES[case.dtype]
    multiplying = [launch for launch in launches if launch.macs]
    macs = sum(launch.macs for launch in multiplying)
    # A tile without depth does not belong to the multiplying kernel.
    a_turn = tile.rows * tile.columns * tile.depth * dtype.products
    turns = macs / a_turn if tile.depth > 1 else 0
    in_loops = sum(launch.loop_instructions / launch.warps for launch in multiplying)
    return {
        "suite": case.layer.suite,
        "layer": case.layer.name,
        "op": case.op,
        "dtype": case.dtype,
        "engine": engine,
        "tile": selection.tile_text(tile),
        "box": tile.box,
        "split_k": tile.split_k,
        "counted": {
            "launches": len(launches),
            "turns": round(turns) or None,
            "macs": macs,
            "turn_instructions": round(in_loops / turns, 1) if turns else None,
            "l2_read_bytes": sum(launch.l2_read_bytes for launch in launches),
            "l1_bytes": sum(launch.l1_bytes for launch in launches),
            "l2_written_bytes": sum(launch.l2_written_bytes for launch in launches),
            "least_bytes": least_bytes(case.op, case.layer.geometry, dtype.torch.itemsize),
            "waits": sum(launch.instructions.get("wait", 0) for launch in launches),
        },
        "assumed": planned and planned._asdict(),
        "launches": [launch._asdict() for launch in launches],
    }


# The command.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m bench counted``."""
    selection.add_arguments(parser, *suites.OPS[len(selection.DIRECTIONS) :])
    parser.add_argument(
        "--programs",
        type=selection.positive,
        default=8,
        metavar="N",
        help="number of programs of each launch to execute (default: 8)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the report")


def run(args: argparse.Namespace) -> int:
    """Execute the selected cases, print and save the report. Returns the exit code."""
    try:
        cases = selection.cases(args)
        if args.json and not args.json.absolute().parent.is_dir():
            raise UsageError(f"no folder for {args.json}")
        if args.arch not in _ARCHS:
            raise UsageError(f"{args.arch} is not emulated; {', '.join(_ARCHS)} are")
        if device.INTERPRET:
            raise UsageError("TRITON_INTERPRET is set: kernels would run in the interpreter")
    except UsageError as error:
        _say(str(error))
        return 2
    gpu = emulator.install(args.arch, count=True, ctas=args.programs, races=False)
    report = {
        "arch": args.arch,
        "triton": triton.__version__,
        "commit": measure.commit(),
        "command": args.command,
        "programs": args.programs,
        "rows": (rows := []),
    }
    failures = []
    for case in tqdm(cases, unit="row", file=sys.stderr, disable=None):
        try:
            rows.append(count(case, gpu))
        except Exception as error:  # the compiler and the emulator raise many classes
            failures.append(f"{' '.join(case.key)} is not counted: {error!r}")
        record.keep(report, args.json)
    print("\n".join(table(rows)))
    failures += map(str, FINDINGS)
    for failure in failures:
        _say(failure)
    return 1 if failures else 0


def _say(text: str) -> None:
    print(f"python -m bench counted: {text}", file=sys.stderr)


_COLUMNS = {
    "layer": 12,
    "op": 10,
    "engine": 15,
    "tile": 11,
    "box": 7,
    "launches": 8,
    "turns": 15,
    "instructions/turn": 17,
    "GMAC": 13,
    "waits/turn": 10,
    "L2 read MB": 16,
    "written": 7,
    "memory MB": 11,
    "sectors/request": 15,
    "conflicts": 9,
    "ms": 6,
    "limit": 0,
}


def table(rows: Sequence[Row]) -> Iterator[str]:
    """One line per row, for all its launches."""
    yield _line({name: name for name in _COLUMNS})
    for row in rows:
        yield _line(_cells(row))


def _line(cells: dict[str, str]) -> str:
    return " ".join(f"{cells[name]:{width}}" for name, width in _COLUMNS.items()).rstrip()


def _cells(row: Row) -> dict[str, str]:
    done, launches = row["counted"], row["launches"]
    said = row["assumed"] or dict.fromkeys(Assumed._fields)
    wavefronts, conflicts, requests, sectors = (
        sum(launch[name] for launch in launches)
        for name in ("wavefronts", "conflicts", "requests", "sectors")
    )
    turns = done["turns"] and done["turns"] * launches[0]["warps"]
    return {
        **{name: row[name] for name in ("layer", "op", "engine", "tile")},
        "box": "x".join(map(str, row["box"] or "-")),
        "launches": _both(done["launches"], said["launches"]),
        "turns": _both(done["turns"], said["turns"]),
        "instructions/turn": _both(done["turn_instructions"], said["turn_instructions"]),
        "GMAC": _both(done["macs"], said["macs"], 1e9, ".1f"),
        "waits/turn": _number(turns and done["waits"] / turns, 1, ".1f"),
        "L2 read MB": _l2(done) + f"/{_number(said['l2_bytes'], 1e6)}",
        "written": _number(done["l2_written_bytes"], 1e6),
        "memory MB": _both(done["least_bytes"], said["bytes"], 1e6),
        "sectors/request": _number(sectors / requests if requests else None, 1, ".1f"),
        "conflicts": _number(conflicts / wavefronts if wavefronts else None, 1, ".0%"),
        "ms": _number(said["ms"], 1, ".3f"),
        "limit": said["limit"] or "-",
    }


def _l2(done: Row) -> str:
    """Megabytes read through L2, with L1 at its best and in parentheses without it."""
    read, spared = done["l2_read_bytes"], done["l1_bytes"]
    without = f"({_number(read, 1e6)})" if spared else ""
    return _number(read - spared, 1e6) + without


def _both(counted: float | None, assumed: float | None, unit: float = 1, form: str = ".0f") -> str:
    return f"{_number(counted, unit, form)}/{_number(assumed, unit, form)}"


def _number(value: float | None, unit: float = 1, form: str = ".0f") -> str:
    return "-" if value is None else format(value / unit, form)
