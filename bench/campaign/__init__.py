"""The first minutes on a GPU: check every kernel, measure the device's limits, compare tiles.

First come checks: each engine and direction, wgrad with all of its tiles before others, called 8
times alone and 8 times beside other work. All repeats must give the same bits, within a bound of a
reference in higher precision. Then come ceilings, then three tiles of seven layers beside cuDNN.
Each row is saved to FILE as it comes. If an item kills its process or hangs, that is its result.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from kernels import device
from kernels._private import GPUTarget
from kernels.device import INTERPRET, Device

from .. import measure
from .._private import Compilation, build_launchers, listen
from ..errors import UsageError
from ..record import device_named, keep, opened, rounded
from . import checks, items, timing
from .items import Ceiling, Check, Item, Timing
from .summary import line, summary
from .workers import Compilers, Death, Late, Worker

Row = dict[str, Any]

_MOST_SECONDS = 60.0  # for an item on a GPU, which takes a second at most: beyond this it hangs
_RECENT = 10  # recent items, whose longest predicts whether there is time for one more


class Machine(NamedTuple):
    """A worker's description of its machine; ``target`` is None in the interpreter."""

    identity: dict[str, str]
    here: Device
    target: GPUTarget | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m bench campaign``."""
    parser.add_argument(
        "--minutes",
        type=_minutes,
        default=3.0,
        metavar="N",
        help="end within this time (default: 3)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows")
    parser.add_argument("--resume", action="store_true", help="skip the rows that FILE has")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="items whose names contain a TEXT (default: all)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that compile ahead (default: one per processor)",
    )
    parser.add_argument(
        "--commit", default="unknown", metavar="NAME", help="the commit, if git cannot tell it"
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu tests everything on tiny layers and measures nothing (default: cuda)",
    )
    parser.add_argument(
        "--emulate",
        choices=["sm_80", "sm_90"],
        help="with --device cpu: execute the code compiled for such a GPU",
    )


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of minutes")
    return value


def run(args: argparse.Namespace) -> int:
    """Run as many items as time allows. Returns the exit code: 1 if a check failed."""
    if args.device == "cpu" and not args.emulate and not INTERPRET:
        # CPU tensors take a GPU's path only under the interpreter.
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "bench", *shlex.split(args.command)[3:]]
        left = args.minutes - (time.monotonic() - args.started) / 60
        command += ["--minutes", f"{max(left, 1e-3):.3f}"]
        return subprocess.run(command, env=environment, check=False).returncode
    try:
        if args.emulate and args.device != "cpu":
            raise UsageError("--emulate is for --device cpu")
        return _Campaign(args).run()
    except UsageError as error:
        _say(str(error))
        return 2


def _say(text: str) -> None:
    print(f"python -m bench campaign: {text}", file=sys.stderr)


class _Campaign:
    """One run of the command."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self._end = args.started + 60 * args.minutes
        self._serve = partial(_server, args.device, args.emulate, args.commit)
        self._worker: Worker | None = None
        self._took: list[float] = []  # seconds of the last items

    def run(self) -> int:
        try:
            return self._run()
        finally:
            if self._worker is not None:
                self._worker.end()

    def _run(self) -> int:
        args, machine = self._args, self._machine()
        found = items.items(machine.here, timing.CEILINGS, small=args.device == "cpu")
        if args.only:
            found = [item for item in found if any(text in item.name for text in args.only)]
        date = datetime.now(UTC).isoformat(timespec="seconds")
        results = opened(args, machine.identity, date=date)
        keep(results, args.json)
        rows = results["rows"]
        done = {row["item"] for row in rows}
        missing = [item for item in found if item.name not in done]
        compile_ = partial(_compile, machine.target, args.emulate)
        ahead = Compilers(compile_, missing, args.jobs if machine.target else 0)
        interrupted = False
        try:
            self._run_all(missing, ahead, results)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            ahead.end()
        print(summary(rows, found))
        if interrupted:
            return 130
        return int(any(row["kind"] == "check" and not row["ok"] for row in rows))

    def _machine(self) -> Machine:
        try:
            machine = self._ask("machine")
        except (Death, Late) as error:
            raise UsageError(f"the device cannot be used: {error}") from None
        if isinstance(machine, str):
            raise UsageError(machine)
        return machine

    def _run_all(self, missing: list[Item], ahead: Compilers, results: Row) -> None:
        for index, item in enumerate(missing):
            ahead.wait(index, self._end)
            if time.monotonic() + max(self._took[-_RECENT:], default=0.0) > self._end:
                return
            row = self._row(item)
            if row is None:
                return
            results["rows"].append(row)
            print(line(row), flush=True)
            keep(results, self._args.json)

    def _row(self, item: Item) -> Row | None:
        """The row of one item; None if time ran out first."""
        begun = time.monotonic()
        try:
            row = self._ask(item)
        except Death as death:
            row = failed(item, str(death))
        except Late as late:
            if time.monotonic() >= self._end:
                return None
            row = failed(item, str(late))
        if row.pop("lost", False):
            assert self._worker is not None
            self._worker.end()
            self._worker = None
        self._took.append(time.monotonic() - begun)
        return row

    def _ask(self, request: Any) -> Any:
        """The answer of a worker, which is started if there is none."""
        self._worker = self._worker or Worker(self._serve)
        left = self._end - time.monotonic()
        most = _MOST_SECONDS if self._args.device == "cuda" else left
        try:
            return self._worker.ask(request, min(most, left))
        except (Death, Late):
            self._worker = None
            raise


# In a worker.


def _server(kind: str, emulate: str | None, commit: str) -> Callable[[Any], Any]:
    """The function that answers requests: "machine" with a Machine, or why there is none; an item
    with its row.
    """
    try:
        where = device_named(kind)
        if emulate:
            if INTERPRET:
                raise UsageError("TRITON_INTERPRET is set: nothing would be emulated")
            _emulate(emulate)
    except UsageError as error:
        reason = str(error)
        return lambda _: reason
    torch.set_num_threads(1)
    target = None if INTERPRET else triton.runtime.driver.active.get_current_target()
    machine = Machine(measure.identity(where, commit), device.describe(where), target)
    seconds = _compile_seconds()

    def answer(request: Any) -> Any:
        if request == "machine":
            return machine
        row = run_item(request, where, seconds)
        return row | _found() if emulate else row

    return answer


@cache
def _emulate(arch: str) -> None:
    from .. import emulator

    emulator.install(arch)


def _found() -> Row:
    """What makes a row a failure if the emulator's checkers found something since the last one."""
    from .. import emulator

    found = emulator.findings()
    emulator.clear()
    return {"ok": False, "reason": str(found[0]).partition("\n")[0][:300]} if found else {}


def _compile_seconds() -> list[float]:
    """A list to which each kernel that this process compiles from now on adds its time."""
    seconds: list[float] = []

    def note(compilation: Compilation) -> None:
        if not compilation.cached:
            seconds.append(compilation.seconds)

    listen(note)
    return seconds


def run_item(item: Item, where: torch.device, seconds: list[float]) -> Row:
    """The row of an item, even if it raises; ``lost``: the device takes no more work."""
    begun = time.monotonic()
    seconds.clear()
    lost = False
    try:
        row = _described(item) | rounded(_RUNNERS[type(item)](item, where))
    except Exception as error:
        row = failed(item, f"{type(error).__name__}: {error}".partition("\n")[0][:300])
        lost = _is_lost(where)
    row |= {"seconds": time.monotonic() - begun, "compile_s": sum(seconds)}
    return rounded(row) | ({"lost": True} if lost else {})


_RUNNERS: dict[type, Callable[[Any, torch.device], Row]] = {
    Check: checks.run,
    Ceiling: timing.run_ceiling,
    Timing: timing.run_timing,
}


def _is_lost(where: torch.device) -> bool:
    """Whether an error persists, as after an illegal access."""
    if where.type == "cpu":
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def _described(item: Item) -> Row:
    kind = type(item).__name__.lower()
    row: Row = {"kind": kind, "item": item.name}
    if isinstance(item, Check):
        row |= {"layer": item.layer, "operator": item.operator, "dtype": item.dtype}
    elif isinstance(item, Timing):
        row |= {"layer": item.layer, "direction": item.direction, "contender": item.contender}
        row |= {"rank": item.rank}
    return row


def failed(item: Item, reason: str) -> Row:
    """The row of an item without a result."""
    nothing: dict[type, tuple[str, ...]] = {
        Check: ("error", "bound", "reference", "differing", "covered", "kernels", "chosen"),
        Ceiling: ("value", "unit"),
        Timing: ("ms", "predicted_ms", "limit", "tflops", "chosen"),
    }
    row = _described(item) | {"ok": False, "reason": reason}
    return row | dict.fromkeys((*nothing[type(item)], "seconds", "compile_s"))


# In a process that compiles ahead.


def _compile(target: GPUTarget | None, emulate: str | None, item: Item) -> None:
    assert target is not None  # else nothing is compiled ahead
    if emulate:
        _emulate(emulate)  # its kernels are compiled differently
    with device.compile_only(target) as kernels:
        if isinstance(item, Check):
            checks.compile_(item)
        elif isinstance(item, Timing):
            timing.compile_timing(item)
        if target.backend == "cuda" and not emulate:
            build_launchers(kernels)
