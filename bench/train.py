"""Time training steps of whole networks: ours beside PyTorch's own layers, eager and compiled.

A step is forward and backward in bf16 autocast and channels_last, and SGD with momentum, with
images on the GPU. It is timed twice: launched from Python, like a training loop, which gives the
images per second, and by replays of its CUDA graph, which is only the GPU's part.
"""

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import cnn

from . import measure
from .errors import UsageError
from .record import device_named, keep, noted, opened, rounded
from .report import Row

PEERS = {
    "ours_compiled": "ours by torch.compile",
    "eager": "torch's layers",
    "compiled": "torch's layers by torch.compile",
}
LOSS_TOLERANCE = 0.05  # relative, for first losses in bf16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m bench train``."""
    parser.add_argument(
        "--model",
        nargs="+",
        choices=cnn.models.list(),
        default=["resnet50", "vgg16", "resnet18"],
        metavar="NAME",
        help=f"some of {', '.join(cnn.models.list())} (default: resnet50 vgg16 resnet18)",
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        default=list(PEERS),
        metavar="NAME",
        help=f"{', '.join(f'{name} ({text})' for name, text in PEERS.items())} (default: all)",
    )
    whole = {"type": _positive, "metavar": "N"}
    parser.add_argument("--batch-size", default=128, help="images (default: %(default)s)", **whole)
    parser.add_argument(
        "--image-size", default=224, help="side in pixels (default: %(default)s)", **whole
    )
    parser.add_argument(
        "--compile-mode",
        default="default",
        metavar="NAME",
        help="torch.compile's mode, without its own CUDA graphs (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows")
    parser.add_argument("--resume", action="store_true", help="skip the rows that FILE has")
    parser.add_argument(
        "--commit", default="unknown", metavar="NAME", help="the commit, if git cannot tell it"
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu tests everything on two 32x32 images and measures nothing (default: cuda)",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Measure the selected networks. Returns the exit code."""
    try:
        device = device_named(args.device)
        if device.type == "cpu":
            args.batch_size, args.image_size = 2, 32
        results = opened(args, measure.identity(device, args.commit))
        rows = [_row(name, args, results, device) for name in args.model]
    except UsageError as error:
        print(f"python -m bench train: {error}", file=sys.stderr)
        return 2
    return int(any("ours" in row.get("errors", {}) for row in rows))


def _row(name: str, args: argparse.Namespace, results: dict[str, Any], device: torch.device) -> Row:
    """The row of a network: the existing one, or a new one, which is saved at once."""
    key = {
        "model": name,
        "batch_size": args.batch_size,
        "image_size": args.image_size,
        "compile_mode": args.compile_mode,
    }
    row = next((row for row in results["rows"] if key.items() <= row.items()), None)
    if row is None or not set(args.peers) <= row["ratio"].keys():
        if row is not None:
            results["rows"].remove(row)  # a peer is missing, and all must run side by side
        row = key | measure_model(args, name, device)
        results["rows"].append(row)
        keep(results, args.json)
    print(lines(row))
    return row


def lines(row: Row) -> str:
    """A row as text, one line per contender."""
    head = f"{row['model']}, {row['batch_size']} images of {row['image_size']}x{row['image_size']}"
    found = [head]
    for name, step in row["steps"].items():
        text = f"  {name:14}"
        if step is None:
            found.append(f"{text} failed")
            continue
        text += f"{step['images_s']:9.1f} images/s {step['ms']:9.2f} ms"
        if step["graph_ms"]:
            text += f"  in a graph {step['graph_ms']:9.2f} ms"
        if step["peak_gb"]:
            text += f"  {step['peak_gb']:6.2f} GB"
        if ratio := row["ratio"].get(name):
            text += f"  {ratio:5.2f} of our time"
        found.append(text)
    found += [f"  [{who}: {what}]" for who, what in row.get("errors", {}).items()]
    return "\n".join(found)


# A row.


def measure_model(args: argparse.Namespace, name: str, device: torch.device) -> Row:
    """All contenders on one network, with the same parameters and images."""
    torch.manual_seed(0)
    measure.set_torch(measure.DTYPES["bf16"], device)
    model = cnn.models.create(name, in_channels=3, image_size=args.image_size)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # so that losses can be compared
    x = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    x = x.to(memory_format=torch.channels_last)
    labels = torch.randint(10, (args.batch_size,), device=device)
    errors: dict[str, str] = {}
    steps: dict[str, Any] = dict.fromkeys(("ours", *args.peers))
    for contender in steps:
        with noted(errors, contender):
            step = Step(contender, model, args.compile_mode, device)
            found = measure_step(step, x, labels, errors)
            ours = steps["ours"] or found
            if not abs(found["loss"] - ours["loss"]) <= LOSS_TOLERANCE * abs(ours["loss"]):
                raise ValueError(f"the first loss is {found['loss']:g}, ours {ours['loss']:g}")
            steps[contender] = found
        step = None  # the next one needs its memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
    ours = steps["ours"]
    ratio = {
        peer: steps[peer]["ms"] / ours["ms"] if ours and steps[peer] else None
        for peer in args.peers
    }
    row = {"steps": steps, "ratio": rounded(ratio)}
    return row | ({"errors": errors} if errors else {})


class Step:
    """A contender's training step on a network, with a copy of its parameters."""

    def __init__(self, contender: str, model: nn.Module, mode: str, device: torch.device):
        self.contender = contender
        network = copy.deepcopy(model) if contender.startswith("ours") else eager(model)
        layout = torch.channels_last
        network = network.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
        self.network: Any = network
        if contender.endswith("compiled"):
            torch.compiler.reset()
            self.network = torch.compile(network, mode=mode)

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        """Make a step; returns the loss before it."""
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = TF.cross_entropy(self.network(x), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def measure_step(step: Step, x: Tensor, labels: Tensor, errors: dict[str, str]) -> dict[str, Any]:
    """A step's measurements; null for a graph that cannot be captured; ``errors`` says why."""
    device = x.device
    gpu = device.type == "cuda"
    loss = step(x, labels).item()
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    ms = measure.launched_milliseconds(step, (x, labels), device)
    peak, graph_ms = (torch.cuda.max_memory_allocated(device) / 1e9 if gpu else None), None
    if gpu:
        with noted(errors, f"{step.contender} graph"):
            graph_ms = measure.milliseconds(step, [(x, labels)], device)
    times = {"images_s": 1e3 * len(x) / ms, "ms": ms, "graph_ms": graph_ms}
    return rounded({**times, "peak_gb": peak, "loss": loss})


def eager(model: nn.Module) -> nn.Module:
    """A copy of a network on torch's own layers, one for each part of a fused layer."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            setattr(parent, name, _torchs(layer))
    return model


def _torchs(layer: nn.Module) -> nn.Module:
    following: list[nn.Module] = []
    if isinstance(layer, cnn.ConvReLU2d | cnn.ConvReLUMaxPool2d):
        following.append(nn.ReLU(inplace=True))
    if isinstance(layer, cnn.ConvReLUMaxPool2d):
        window = layer.pool_kernel_size, layer.pool_stride, layer.pool_padding
        following.append(nn.MaxPool2d(*window))
    for ours, torchs in ((cnn.Conv2d, nn.Conv2d), (cnn.MaxPool2d, nn.MaxPool2d)):
        if isinstance(layer, ours):
            layer.__class__ = torchs  # type: ignore[assignment]
    return nn.Sequential(layer, *following) if following else layer
