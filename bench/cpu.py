"""Time networks on a CPU: ours, where cnn.functional calls torch, beside torch's own layers.

Training steps and inference in float32, with the same parameters and images. The contenders take
turns in one process, so that other load on the machine affects all of them alike.
"""

import argparse
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as TF
import triton
from torch import Tensor, nn

import cnn
from kernels import device

from . import measure
from .errors import UsageError
from .record import keep, rounded
from .train import eager


class Case(NamedTuple):
    """A network on images with one channel for LeNet-5, three for the others."""

    model: str
    batch_size: int
    image_size: int


CASES = (
    Case("lenet5", 1, 32),
    Case("lenet5", 32, 32),
    Case("vgg_small", 32, 32),
    Case("resnet18", 8, 64),
)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TASKS = ("training", "inference")
LIMIT, LIMIT_OF_ONE = 1.05, 1.15  # on our time over torch's, for batches and for one image
FEWEST_ROUNDS = 11
SAMPLE_SECONDS = 2e-3  # shorter calls are repeated for this long


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m bench cpu``."""
    names = list(dict.fromkeys(case.model for case in CASES))
    parser.add_argument(
        "--model",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"some of {', '.join(names)} (default: all)",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=10.0,
        metavar="S",
        help="time per row, which has at least 11 rounds (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return value


def run(args: argparse.Namespace) -> int:
    """Measure the selected networks. Returns the exit code."""
    results: dict[str, Any] = {**_identity(), "command": args.command, "rows": []}
    try:
        if device.takes_cpu():
            raise UsageError("TRITON_INTERPRET is set: the kernels would run in the interpreter")
        keep(results, args.json)
        print(line(HEAD))
        cases = [case for case in CASES if case.model in args.model]
        for case, task, layout in itertools.product(cases, TASKS, LAYOUTS):
            row = _row(case, task, layout, args.seconds)
            results["rows"].append(row)
            keep(results, args.json)
            print(line(_cells(row)), flush=True)
    except UsageError as error:
        print(f"python -m bench cpu: {error}", file=sys.stderr)
        return 2
    over = [row for row in results["rows"] if max(row["ratio"].values()) > row["limit"]]
    return int(bool(over))


def _identity() -> dict[str, Any]:
    """The versions and the machine."""
    cpu = Path("/proc/cpuinfo")
    models = (text for text in cpu.read_text().splitlines() if text.startswith("model name"))
    return {
        "cpu": next(models, "unknown").partition(": ")[2] or "unknown",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": measure.commit(),
    }


# A row.

HEAD = ("model", "images", "task", "layout", "torch ms", "ours", "converted", "limit")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    images = f"{row['batch_size']}x{row['image_size']}x{row['image_size']}"
    ratios = (f"{row['ratio'][name]:.3f}" for name in ("ours", "converted"))
    numbers = f"{row['ms']['torch']:.3f}", *ratios, f"{row['limit']:.2f}"
    return row["model"], images, row["task"], row["layout"], *numbers


def line(cells: tuple[str, ...]) -> str:
    """A line of the table."""
    widths = (10, 9, 10, 14, -10, -7, -10, -6)
    columns = zip(cells, widths, strict=True)
    return " ".join(c.ljust(w) if w > 0 else c.rjust(-w) for c, w in columns)


def _row(case: Case, task: str, layout: str, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    channels = 1 if case.model == "lenet5" else 3
    size = case.image_size
    options = {"num_classes": 10, "in_channels": channels, "image_size": size}
    model = cnn.models.create(case.model, **options)
    x = torch.randn(case.batch_size, channels, size, size).to(memory_format=LAYOUTS[layout])
    labels = torch.randint(10, (case.batch_size,))
    model = model.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    networks = contenders(model)
    make = training if task == "training" else inference
    calls = {name: make(network, x, labels) for name, network in networks.items()}
    times = alternating(calls, seconds)
    ms = {name: statistics.median(found) for name, found in times.items()}
    ratio = {name: typical_ratio(times[name], times["torch"]) for name in ("ours", "converted")}
    return {
        **case._asdict(),
        "task": task,
        "layout": layout,
        "rounds": len(times["torch"]),
        "ms": rounded(ms),
        "ratio": rounded(ratio),
        "limit": LIMIT_OF_ONE if case.batch_size == 1 else LIMIT,
    }


def typical_ratio(ours: list[float], torchs: list[float]) -> float:
    """The median over the rounds, which a few slow rounds of either hardly change."""
    return statistics.median(one / other for one, other in zip(ours, torchs, strict=True))


def contenders(model: nn.Module) -> dict[str, nn.Module]:
    """A network of ours, the same with torch's layers, and that one converted; equal parameters."""
    torchs = flat(eager(model))
    return {"torch": torchs, "ours": model, "converted": cnn.convert(copy.deepcopy(torchs))}


def flat(model: nn.Module) -> nn.Module:
    """The network with each Sequential in a Sequential replaced by its layers."""
    for name, child in model.named_children():
        setattr(model, name, flat(child))
    if type(model) is not nn.Sequential:
        return model
    layers = [[*child] if type(child) is nn.Sequential else [child] for child in model]
    return nn.Sequential(*itertools.chain(*layers))


def training(network: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """A training step, which returns the loss before it."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step() -> Tensor:
        loss = TF.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def inference(network: nn.Module, x: Tensor, _labels: Tensor) -> Callable[[], Tensor]:
    """A function that returns the logits."""
    network.eval()

    def logits() -> Tensor:
        with torch.no_grad():
            return network(x)

    return logits


def alternating(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call, one per round. Each round starts with another call."""
    repeats = max(1, round(SAMPLE_SECONDS / min(_warmed(call) for call in calls.values())))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for order in _rounds([*calls], seconds):
        for name in order:
            times[name].append(1e3 * _seconds_of(calls[name], repeats))
    return times


def _rounds(names: list[str], seconds: float) -> Iterator[list[str]]:
    end = time.perf_counter() + seconds
    for number in itertools.count():
        if number >= FEWEST_ROUNDS and time.perf_counter() > end:
            return
        first = number % len(names)
        yield names[first:] + names[:first]


def _warmed(call: Callable[[], Any]) -> float:
    """Seconds of a call after warm-up calls."""
    for _ in range(3):
        call()
    return _seconds_of(call, 1)


def _seconds_of(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
