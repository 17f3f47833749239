"""The layers, directions and architecture that the commands without a GPU work on.

``add_arguments`` adds the options they share, ``cases`` and ``compiling`` turn them into problems
and into a stand-in for the GPU, ``plan`` asks the planner. Unusable values raise UsageError.
"""

import argparse
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import device, planner
from kernels._private import GPUTarget
from kernels.conv.engine import Plan
from kernels.geometry import Conv2dGeometry, Direction, output_strides
from kernels.ops.tensors import resolve_precision
from kernels.problem import Problem, layout_of
from kernels.tile import Tile

from . import suites
from .errors import UsageError
from .measure import DTYPES

DIRECTIONS: tuple[Direction, ...] = ("fprop", "dgrad", "wgrad")


def add_arguments(parser: argparse.ArgumentParser, *more: str) -> None:
    """Add ``--arch``, and the options for layers, directions (or ``more`` operators) and dtypes."""
    add_layers(parser)
    parser.add_argument(
        "--op",
        nargs="+",
        default=DIRECTIONS,
        choices=(*DIRECTIONS, *more),
        metavar="NAME",
        help=f"some of {', '.join((*DIRECTIONS, *more))} (default: {' '.join(DIRECTIONS)})",
    )


def add_layers(parser: argparse.ArgumentParser) -> None:
    """Add ``--arch``, and the options for layers and dtypes."""
    parser.add_argument(
        "--arch",
        default="sm_90",
        metavar="NAME",
        help="sm_80, sm_90, sm_100, gfx942, ... (default: sm_90)",
    )
    parser.add_argument(
        "--suite",
        nargs="+",
        default=["resnet50_v1.5"],
        metavar="NAME",
        help="suites of bench/cases or of --shapes (default: resnet50_v1.5)",
    )
    parser.add_argument("--shapes", type=Path, metavar="FILE", help="more suites, as bench/cases")
    parser.add_argument("--layer", nargs="+", metavar="NAME", help="layers (default: all)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["bf16"],
        choices=DTYPES,
        metavar="NAME",
        help=f"some of {', '.join(DTYPES)} (default: bf16)",
    )
    parser.add_argument(
        "--batch", type=positive, metavar="N", help="number of images (default: the suite's)"
    )


def positive(text: str) -> int:
    """A whole number from 1, read from an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def cases(args: argparse.Namespace) -> list[suites.Case]:
    """The selected problems, suite by suite."""
    return suites.cases(layers(args), args.op, args.dtype)


def layers(args: argparse.Namespace) -> list[suites.Layer]:
    """The selected layers, suite by suite."""
    try:
        known = suites.layers(args.shapes)
    except OSError as error:
        raise UsageError(f"cannot read {args.shapes}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    _all_known("suite", args.suite, [layer.suite for layer in known])
    chosen = [layer for suite in args.suite for layer in known if layer.suite == suite]
    if args.layer:
        _all_known("layer", args.layer, [layer.name for layer in chosen])
        chosen = [layer for layer in chosen if layer.name in args.layer]
    if args.batch:
        sized = [suites.with_images(layer.geometry, args.batch) for layer in chosen]
        chosen = [layer._replace(geometry=g) for layer, g in zip(chosen, sized, strict=True)]
    return chosen


def _all_known(what: str, names: list[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(f"no {what} {name!r}; there are {', '.join(dict.fromkeys(known))}")


def target(arch: str) -> GPUTarget:
    """Triton's target for an architecture: sm_90 or gfx942."""
    if found := re.fullmatch(r"sm_(\d+)a?", arch):
        return GPUTarget("cuda", int(found[1]), 32)
    if re.fullmatch(r"gfx[0-9a-f]+", arch):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise UsageError(f"no architecture {arch!r}; there are sm_80, sm_90, sm_100, gfx942 and others")


@contextmanager
def compiling(arch: str) -> Iterator[tuple[device.Device, list[Any]]]:
    """Yield a typical device of the architecture, and a list that gets what launches compile to."""
    if device.INTERPRET:
        raise UsageError("TRITON_INTERPRET is set: kernels would run in the interpreter")
    with device.compile_only(target(arch)) as compiled:
        yield device.describe(torch.device("meta")), compiled


def operands(
    g: Conv2dGeometry, dtype: torch.dtype, channels_last: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and y (or their gradients), made by ``empty``."""
    x, w, y = (empty(shape, dtype, channels_last) for shape in (g.x_shape, g.w_shape, g.y_shape))
    return x, w, y


def empty(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = True) -> Tensor:
    """A tensor of the meta device; under emulation, zeros that take no memory until they are
    touched.
    """
    strides = output_strides(shape, channels_last)
    if device.INTERPRET or not device.takes_cpu():
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    pages = mmap.mmap(-1, max(1, prod(shape)) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).as_strided(shape, strides)


def plan(
    direction: Direction, g: Conv2dGeometry, precision: str, x: Tensor, w: Tensor, y: Tensor
) -> Plan:
    """The operators' choice for these operands, on the stand-in device."""
    precision = resolve_precision(precision, x)
    here, layout = (
        device.describe(x.device),
        layout_of((x, y), () if direction == "wgrad" else (w,)),
    )
    return planner.plan(Problem(direction, g, x.dtype, precision, here, layout))


def tile_text(tile: Tile) -> str:
    """Rows, columns and depth: 128x128x64."""
    return f"{tile.rows}x{tile.columns}x{tile.depth}"
