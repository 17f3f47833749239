"""Time our kernels beside their peers, one row per layer, operator and dtype.

Every contender is timed by replays of CUDA graphs over buffers that together exceed twice the L2
cache, in the same run as the ceilings of the roofline. Rows alternate between the suites and are
saved to FILE one by one; --resume continues an interrupted run.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import measure, peers, suites
from .errors import UsageError
from .measure import DTYPES
from .record import device_named, keep, noted, opened, rounded
from .report import Row, line, row_key, summary


class Ending(Exception):
    """The reason why a run ends before its last row, and its exit code."""

    def __init__(self, reason: str, code: int):
        super().__init__(reason)
        self.code = code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m bench kernels``; lists take commas, spaces or both."""
    lists: Any = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument(
        "--suite", type=_names(None), help="suites (default: all, or all of --shapes)", **lists
    )
    parser.add_argument("--shapes", type=Path, metavar="FILE", help="more suites, as bench/cases")
    parser.add_argument(
        "--op",
        type=_names(suites.OPS),
        default=[["fprop", "dgrad", "wgrad"]],
        help=f"some of {', '.join(suites.OPS)} (default: fprop dgrad wgrad)",
        **lists,
    )
    parser.add_argument(
        "--dtype",
        type=_names(DTYPES),
        default=[["bf16"]],
        help=f"some of {', '.join(DTYPES)}; all from fp32 on are float32 (default: bf16)",
        **lists,
    )
    parser.add_argument(
        "--peers",
        type=_names(peers.PEERS),
        default=[peers.installed()],
        help=f"some of {', '.join(peers.PEERS)} (default: all installed)",
        **lists,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows")
    parser.add_argument("--resume", action="store_true", help="skip the rows that FILE has")
    parser.add_argument("--budget", type=_seconds, metavar="SECONDS", help="end within this time")
    parser.add_argument(
        "--commit", default="unknown", metavar="NAME", help="the commit, if git cannot tell it"
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu runs everything on tiny layers, as a test, and measures nothing (default: cuda)",
    )


def _names(known: Sequence[str] | dict[str, Any] | None) -> Callable[[str], list[str]]:
    """A reader of comma-separated names."""

    def read(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        for name in names:
            if known is not None and name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return read


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def run(args: argparse.Namespace) -> int:
    """Measure the selected cases. Returns the exit code."""
    try:
        return _run(args)
    except UsageError as error:
        _say(str(error))
        return 2


def _say(text: str) -> None:
    print(f"python -m bench kernels: {text}", file=sys.stderr)


def _run(args: argparse.Namespace) -> int:
    device = device_named(args.device)
    cases, names = _cases(args), _flat(args.peers)
    results = opened(args, measure.identity(device, args.commit), ceilings={})
    if missing := [case for case in cases if not _is_done(case, names, results)]:
        _add_ceilings(results, missing, device)
        keep(results, args.json)
    ending = None
    try:
        _measure_all(missing, names, results, device, args)
    except KeyboardInterrupt:
        ending = Ending("interrupted", 130)
    except Ending as early:
        ending = early
    rows = {row_key(row): row for row in results["rows"]}
    asked = [rows[case.key] for case in cases if case.key in rows]
    if asked:
        print(summary(asked))
    if ending:
        done = sum(_is_done(case, names, results) for case in cases)
        _say(f"{ending}: {done} of {len(cases)} rows are there; --resume continues")
        if ending.code:
            return ending.code
    return int(any("ours" in row.get("errors", {}) for row in asked))


def _is_done(case: suites.Case, names: Sequence[str], results: dict[str, Any]) -> bool:
    """Whether the results have a row of this case with all of these peers."""
    return any(
        row_key(row) == case.key and set(names) <= row["ratio"].keys() for row in results["rows"]
    )


def _add_ceilings(
    results: dict[str, Any], missing: Sequence[suites.Case], device: torch.device
) -> None:
    known = results["ceilings"]
    needed = {"bf16", *(DTYPES[case.dtype].ceiling for case in missing)}
    if unknown := sorted(name for name in needed if f"{name}_tflops" not in known):
        known.update(rounded(measure.ceilings(unknown, device)) | known)


def _measure_all(
    missing: Sequence[suites.Case],
    names: Sequence[str],
    results: dict[str, Any],
    device: torch.device,
    args: argparse.Namespace,
) -> None:
    """Add the missing rows to the results and save each at once. Raises Ending."""
    longest = 0.0
    with tqdm(missing, unit="row", disable=None, leave=False) as bar:
        for number, case in enumerate(bar):
            begun = time.monotonic()
            # The first row is always measured, so that repeated --resume makes progress.
            if number and args.budget and begun - args.started + longest > args.budget:
                raise Ending(f"the budget of {args.budget:g} s is spent", 0)
            bar.set_postfix_str(" ".join(case.key))
            # A row that lacked a peer is measured again: its peers must run side by side.
            old = next((row for row in results["rows"] if row_key(row) == case.key), None)
            beside = {*names, *(old["ratio"] if old else ())}
            beside = [peer for peer in peers.PEERS if peer in beside]
            row = measure_case(case, beside, results["ceilings"], device)
            if old:
                results["rows"].remove(old)
            results["rows"].append(row)
            keep(results, args.json)
            tqdm.write(line(row))
            if reason := _lost(row, device):
                raise Ending(f"the GPU is lost ({reason})", 1)
            longest = max(longest, time.monotonic() - begun)


def _flat(lists: list[list[str]]) -> list[str]:
    return list(dict.fromkeys(chain.from_iterable(lists)))


def _cases(args: argparse.Namespace) -> list[suites.Case]:
    try:
        layers = suites.layers(args.shapes)
        usual = suites.read(args.shapes) if args.shapes else layers
    except OSError as error:
        raise UsageError(f"cannot read {args.shapes}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    known = list(dict.fromkeys(layer.suite for layer in layers))
    chosen = (
        _flat(args.suite) if args.suite else list(dict.fromkeys(layer.suite for layer in usual))
    )
    for name in chosen:
        if name not in known:
            raise UsageError(f"no suite {name!r}; there are {', '.join(known)}")
    layers = [layer for name in chosen for layer in layers if layer.suite == name]
    found = suites.cases(layers, _flat(args.op), _flat(args.dtype))
    if not found:
        raise UsageError(f"no layer of {', '.join(chosen)} has {', '.join(_flat(args.op))}")
    if args.device == "cpu":
        return [case._replace(layer=suites.shrink(case.layer)) for case in found]
    return found


# A row.


@torch.no_grad()
def measure_case(
    case: suites.Case, names: Sequence[str], ceilings: dict[str, float], device: torch.device
) -> Row:
    """Measure ours and the named peers on one case; null for one that raises, with the reason."""
    dtype = DTYPES[case.dtype]
    problem = peers.problem(case)
    flops, bytes_moved = problem.work(dtype.torch.itemsize)
    errors: dict[str, str] = {}
    times: dict[str, float] = {}
    error = reference = predicted = None
    sets: list[peers.Inputs] = []
    with noted(errors, "ours"):
        draw, count = _normal(dtype.torch, device), measure.sets_needed(bytes_moved, device)
        sets = [problem.inputs(draw) for _ in range(count)]
    if sets:
        times = _race(problem, ("ours", *names), sets, dtype, errors)
        with noted(errors, "planner"):
            predicted = problem.predicted(*sets[0])
    if "ours" in times:
        with noted(errors, "reference"):
            error, reference = _error(problem, sets[0], device)
        if error is not None and not math.isfinite(error):
            errors["ours"], error = f"the error is {error}", None
    ms = times.get("ours")
    roof = measure.roofline_milliseconds(flops, bytes_moved, dtype, ceilings)
    values = {
        "ms": ms,
        "predicted_ms": predicted,
        "tflops": ms and flops / ms / 1e9,
        "gbs": ms and bytes_moved / ms / 1e6,
        "roofline_share": ms and roof / ms,
        "error": error,
    }
    ratio = {name: ms and times[name] / ms if name in times else None for name in names}
    suite, layer, op, _ = case.key
    row = {"suite": suite, "layer": layer, "op": op, "dtype": case.dtype}
    row |= {"count": case.layer.count, **rounded(values), "reference": reference}
    return row | {"ratio": rounded(ratio)} | ({"errors": errors} if errors else {})


def _race(
    problem: peers.Problem,
    names: Sequence[str],
    sets: Sequence[peers.Inputs],
    dtype: measure.Dtype,
    errors: dict[str, str],
) -> dict[str, float]:
    """Milliseconds of the contenders, one after the other; exceptions go to ``errors``."""
    times = {}
    device = sets[0][0].device
    for name in names:
        with noted(errors, name):
            measure.set_torch(dtype, device)
            contender = peers.contender(name, problem)
            prepared = [contender.prepare(*each) for each in sets]
            times[name] = measure.milliseconds(contender.call, prepared, device)
        contender = prepared = None  # the next one needs their memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return times


def _normal(dtype: torch.dtype, device: torch.device) -> peers.Draw:
    """A source of unit normals, the same for each case."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device).to(dtype)
        return drawn.to(memory_format=torch.channels_last) if len(shape) == 4 else drawn

    return draw


def _error(problem: peers.Problem, inputs: peers.Inputs, device: torch.device) -> tuple[float, str]:
    """Relative RMS error against PyTorch's float64, or float32 if memory is short, and which."""
    found = problem.ours().result(inputs)
    measure.set_torch(DTYPES["fp32"], device, search=False)
    try:
        reference = problem.eager().result(tuple(t.double() for t in inputs))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        reference = problem.eager().result(tuple(t.float() for t in inputs))
    return measure.relative_rms(found, reference), str(reference.dtype).removeprefix("torch.")


def _lost(row: Row, device: torch.device) -> str:
    """The reason why the GPU takes no more work, as after an illegal access; "" if it does."""
    if device.type == "cpu" or "errors" not in row:
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""
