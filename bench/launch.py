"""What a call costs the processor: all of our Python and PyTorch's dispatch, without the launch.

Operators run on small tensors with launches left out, planned as for an H200, so no GPU is needed;
beside them PyTorch's own convolution on an empty batch, which computes nothing either. Times are
microseconds a call, the least of several rounds, as whatever else the machine does only adds.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as TF
from torch import Tensor
from triton.backends.compiler import GPUTarget

import cnn
import cnn.functional as F
from kernels import device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=20, help="the least of so many (default: 20)")
    parser.add_argument("--calls", type=int, default=1000, help="in a round (default: 1000)")


def run(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available() and not device.INTERPRET:
        # Only under the interpreter do CPU tensors take the path of a GPU's.
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "bench", "launch"]
        command += ["--rounds", str(args.rounds), "--calls", str(args.calls)]
        return subprocess.run(command, env=environment, check=False).returncode
    torch.set_num_threads(1)
    with device.launch_nothing(GPUTarget("cuda", 90, 32)):
        for name, call in calls().items():
            print(f"{name:44s} {least(call, args.rounds, args.calls):7.2f} us")
    return 0


def least(call: Callable[[], object], rounds: int, count: int) -> float:
    """Microseconds of one call in the quickest round."""
    call()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(count):
            call()
        seconds.append(time.perf_counter() - start)
    return min(seconds) / count * 1e6


def calls() -> dict[str, Callable[[], object]]:
    """What is timed, by name: a 3x3 layer in channels_last, bfloat16."""
    where = "cuda" if torch.cuda.is_available() else "cpu"

    def tensor(*shape: int) -> Tensor:
        memory = torch.zeros(shape, dtype=torch.bfloat16, device=where)
        return memory.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else memory

    x, w, bias = tensor(2, 64, 8, 8), tensor(64, 64, 3, 3), tensor(64)
    x_leaf, w_leaf = x.clone().requires_grad_(), w.clone().requires_grad_()
    layer = cnn.Conv2d(64, 64, 3, padding=1, device=where, dtype=torch.bfloat16)
    layer = layer.to(memory_format=torch.channels_last)
    y = F.conv2d(x_leaf, w_leaf, padding=1)
    dy = torch.zeros_like(y)
    arguments = ((1, 1), (1, 1, 1, 1), (1, 1), 1, None)
    operators = torch.ops.triton_cnn

    def without_gradient() -> Tensor:
        with torch.no_grad():
            return F.conv2d(x, w, bias, padding=1)

    return {
        "torch.nn.functional.conv2d, empty batch": lambda: TF.conv2d(x[:0], w, bias, padding=1),
        "cnn.functional.conv2d": without_gradient,
        "cnn.functional.conv2d, recorded for backward": lambda: F.conv2d(
            x_leaf, w_leaf, bias, padding=1
        ),
        "cnn.Conv2d, recorded for backward": lambda: layer(x),
        "backward, dgrad and wgrad": lambda: torch.autograd.grad(
            y, (x_leaf, w_leaf), dy, retain_graph=True
        ),
        "torch.ops.triton_cnn.conv2d": lambda: operators.conv2d(
            x, w, bias, None, *arguments, False
        ),
        "cnn.functional.max_pool2d, 3x3/2": lambda: F.max_pool2d(x, 3, 2, 1),
    }
