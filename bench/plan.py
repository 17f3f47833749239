"""Show the planner's choice and predicted time for each layer, without a GPU.

Operands are channels_last and aligned, as in training. A tile is rows x columns x depth; its box is
pixels along n x p x q. The sum counts a layer as often as its network has it.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator

from kernels import device
from kernels.geometry import Conv2dGeometry

from . import selection, suites
from .errors import UsageError
from .measure import DTYPES

_HEAD = ("layer", "op", "dtype", "engine", "tile", "box", "split_k", "ms", "limit")
_WIDTHS = (22, 6, 7, 16, 12, 9, 7, 9, 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m bench plan``."""
    selection.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print one line per layer and direction. Returns the exit code."""
    try:
        cases = selection.cases(args)
        with device.launch_nothing(selection.target(args.arch)):
            for text in lines(cases):
                print(text)
    except UsageError as error:
        print(f"python -m bench plan: {error}", file=sys.stderr)
        return 2
    return 0


def lines(cases: Iterable[suites.Case]) -> Iterator[str]:
    """The lines of the table, with the sum for each suite and direction."""
    sums: dict[tuple[str, str, str], float] = {}
    yield _line(_HEAD)
    for layer, op, dtype in cases:
        g = layer.geometry
        assert isinstance(g, Conv2dGeometry)  # --op offers nothing else
        tensors = selection.operands(g, DTYPES[dtype].torch)
        plan = selection.plan(suites.DIRECTIONS[op], g, DTYPES[dtype].precision, *tensors)
        key = layer.suite, op, dtype
        sums[key] = sums.get(key, 0.0) + plan.ms * layer.count
        box = "x".join(map(str, plan.tile.box or "-"))
        tile = selection.tile_text(plan.tile)
        name = layer.name
        yield _line(
            (
                name,
                op,
                dtype,
                plan.engine.name,
                tile,
                box,
                plan.tile.split_k,
                f"{plan.ms:.4f}",
                plan.limit,
            )
        )
    yield ""
    for (suite, op, dtype), total in sums.items():
        yield f"{suite} {op} {dtype}: {total:.3f} ms"


def _line(cells: Iterable[object]) -> str:
    padded = (f"{cell!s:{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))
    return " ".join(padded).rstrip()
