"""Check the machine code of every binary that layers may launch on Hopper, without a GPU.

A hazard is a register that an instruction touches while an earlier one may still use it, on some
path through the kernel: an asynchronous product (wgmma) that has not been waited for, or a load
whose scoreboard has not. Exit code 1 if there is any.

Scopes: "planned" is what the planner chooses for aligned channels_last operands of the suite's
size; "family" adds what any batch, image size and layout may get, with no epilogue and with the
full one, and the choices for 64-bit offsets; "every" is all that the operators can launch. Triton
compiles a kernel again for each pattern of sizes and strides that are 1 or divisible by 16. Of a
family's kernels in one layout that differ only in this pattern, one is checked; of "planned" and of
"every", all are. build/hazards keeps the findings on each binary, which is not checked again.
"""

import argparse
import inspect
import json
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import triton
from tqdm import tqdm

from . import assembly, binaries, compiled, dataflow, measure, sass, selection, suites
from ._private import intercepted, module_of, unspecialized
from .errors import UsageError

_CACHE = Path("build") / "hazards"


class Verdict(NamedTuple):
    """The findings on one binary.

    ``operands``: the number of its products that take an operand from registers.
    """

    binary: str
    kernel: str
    products: int
    operands: int
    hazards: tuple[str, ...]


def check(kernel: Any) -> Verdict:
    """The verdict on one of Triton's compiled kernels."""
    instructions = compiled.instructions(kernel, encoded=True)
    products = [p for p in (sass.effects(ins).product for ins in instructions) if p]
    return Verdict(
        binary=sha256(kernel.asm["cubin"]).hexdigest()[:16],
        kernel=f"{module_of(kernel).removeprefix('kernels.')}.{kernel.metadata.name}",
        products=len(products),
        operands=sum(bool(product.operand) for product in products),
        hazards=tuple(map(str, dataflow.find(instructions, kernel.metadata.name))),
    )


class Verdicts:
    """Verdicts, kept in a file, by what a kernel is compiled from; known ones are not compiled."""

    def __init__(self, path: Path):
        self._path = path
        self._kept: dict[str, Verdict] = {}
        self._examples: dict[tuple[str, str], str] = {}  # by unspecialized kernel, and layout
        if path.is_file():
            rows = json.loads(path.read_text())
            self._kept = {key: Verdict(*rest, hazards=tuple(found)) for key, *rest, found in rows}

    def save(self) -> None:
        """Write the file atomically."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        lines = (json.dumps([key, *verdict]) for key, verdict in self._kept.items())
        part.write_text("[\n" + ",\n".join(lines) + "\n]\n")
        part.replace(self._path)

    def of(
        self,
        geometry: suites.Geometry,
        dtype: measure.Dtype,
        launched: list[Any],
        scope: binaries.Scope,
    ) -> dict[str, Verdict]:
        """The verdicts on everything that the operators launch for a layer, each kernel's own or
        its example's, by what it is compiled from; compiles kernels without a verdict.
        """
        checked: dict[str, str] = {}  # the kernel whose verdict counts, for each

        def is_known(source: str) -> bool:
            name = _name(source)
            alike = unspecialized(source), group.layout
            if self._examples.get(alike) not in self._kept:
                self._examples[alike] = name
            takes_example = scope == "family" and group is not binaries.PLANNED
            checked.setdefault(name, self._examples[alike] if takes_example else name)
            return checked[name] in self._kept

        def read(source: str, kernel: Any) -> None:
            self._kept[_name(source)] = check(kernel)
            launched.clear()  # thousands of kernels would fill the memory
            if len(self._kept) % 16 == 0:
                self.save()

        for group in binaries.groups(scope):
            with intercepted(is_known, read):
                group.launch(geometry, dtype)
        self.save()
        return {name: self._kept[example] for name, example in checked.items()}


def _name(source: str) -> str:
    """A hash of everything that determines a verdict: the check, and the kernel's sources."""
    return sha256(f"{_checked_by()} {source}".encode()).hexdigest()[:32]


@cache
def _checked_by() -> str:
    sources = (assembly, sass, dataflow, check, compiled.instructions)
    return sha256("".join(map(inspect.getsource, sources)).encode()).hexdigest()


# The command.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m bench hazards``."""
    selection.add_layers(parser)
    parser.add_argument(
        "--scope",
        default="family",
        choices=binaries.SCOPES,
        metavar="NAME",
        help=f"one of {', '.join(binaries.SCOPES)} (default: family)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the table")


def run(args: argparse.Namespace) -> int:
    """Check the selected layers, print and save the table. Returns the exit code."""
    failures: list[str] = []
    try:
        if args.arch != "sm_90":
            raise UsageError(f"hazards are known of sm_90, not of {args.arch}")
        if args.json and not args.json.absolute().parent.is_dir():
            raise UsageError(f"no folder for {args.json}")
        layers = selection.layers(args)
        with selection.compiling(args.arch) as (_, launched), compiled.timing():
            found = dict(_check(layers, args, launched, failures))
    except UsageError as error:
        _say(str(error))
        return 2
    rows = [_row(*key, verdicts) for key, verdicts in found.items()]
    print("\n".join(table(rows)))
    verdicts = {verdict.binary: verdict for some in found.values() for verdict in some.values()}
    faulty = [verdict for verdict in verdicts.values() if verdict.hazards]
    for verdict in faulty:
        _say(f"{verdict.binary} ({verdict.kernel}): {verdict.hazards[0]}")
    for failure in failures:
        _say(failure)
    if args.json:
        report = {"arch": args.arch, "triton": triton.__version__, "commit": measure.commit()}
        report |= {"command": args.command, "rows": rows}
        args.json.write_text(compiled.as_json(report))
    return 1 if faulty or failures else 0


def _check(
    layers: Iterable[suites.Layer],
    args: argparse.Namespace,
    launched: list[Any],
    failures: list[str],
) -> Iterator[tuple[tuple[str, str], dict[str, Verdict]]]:
    """Yield per suite and dtype the verdicts on all kernels, by what they are compiled from."""
    verdicts = Verdicts(_CACHE / f"{triton.__version__}.json")
    for dtype in args.dtype:
        for suite in args.suite:
            found: dict[str, Verdict] = {}
            chosen = [layer for layer in layers if layer.suite == suite]
            for layer in tqdm(chosen, f"{suite} {dtype}", file=sys.stderr, disable=None):
                try:
                    geometry, kind = layer.geometry, measure.DTYPES[dtype]
                    found.update(verdicts.of(geometry, kind, launched, args.scope))
                except Exception as error:  # the compiler raises many classes
                    failures.append(f"{suite} {layer.name} {dtype} is not checked: {error!r}")
            yield (suite, dtype), found


def _row(suite: str, dtype: str, verdicts: dict[str, Verdict]) -> dict[str, Any]:
    by_binary = {verdict.binary: verdict for verdict in verdicts.values()}.values()
    faulty = [verdict for verdict in by_binary if verdict.hazards]
    return {
        "suite": suite,
        "dtype": dtype,
        "specialized": len(verdicts),
        "binaries": len(by_binary),
        "with_products": sum(verdict.products > 0 for verdict in by_binary),
        "with_register_operands": sum(verdict.operands > 0 for verdict in by_binary),
        "with_hazards": len(faulty),
        "hazards": sum(len(verdict.hazards) for verdict in faulty),
        "kernels_with_hazards": sorted({verdict.kernel for verdict in faulty}),
    }


_HEAD = ("suite", "dtype", "specialized", "binaries")
_HEAD += ("with_products", "with_register_operands", "with_hazards")


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line per suite and dtype."""
    cells = [_HEAD, *(tuple(str(row[name]) for name in _HEAD) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(map(str.ljust, line, widths)).rstrip()


def _say(text: str) -> None:
    print(f"python -m bench hazards: {text}", file=sys.stderr)
