"""Time the processor's part of a call: our Python and PyTorch's dispatch, without the launch.

Operators run on small tensors with launches left out, planned as for an H200, so no GPU is needed.
Beside them runs PyTorch's own convolution on an empty batch, which computes nothing either. Times
are microseconds per call, the minimum of several rounds, because other load can only add time. Each
call makes one launch unless its name says otherwise.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

import cnn
import cnn.functional as F
from kernels import device
from kernels._private import GPUTarget


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=20, help="number of rounds (default: 20)")
    parser.add_argument("--calls", type=int, default=1000, help="calls per round (default: 1000)")


def run(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available() and not device.INTERPRET:
        # CPU tensors take a GPU's path only under the interpreter.
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
    """Microseconds of one call in the fastest round."""
    call()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(count):
            call()
        seconds.append(time.perf_counter() - start)
    return min(seconds) / count * 1e6


class _Nothing(torch.autograd.Function):
    """Two gradients that take no time: measures autograd's own part of a backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x.new_empty(1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(w)


def calls() -> dict[str, Callable[[], object]]:
    """The timed calls by name, in channels_last and bfloat16, with the launches of each."""
    where = "cuda" if torch.cuda.is_available() else "cpu"

    def tensor(*shape: int) -> Tensor:
        memory = torch.zeros(shape, dtype=torch.bfloat16, device=where)
        return memory.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else memory

    def forward(function: Callable[..., Tensor], *tensors: Tensor, **arguments: Any) -> Callable:
        def call() -> Tensor:
            with torch.no_grad():
                return function(*tensors, **arguments)

        return call

    def backward(y: Tensor, *leaves: Tensor) -> Callable:
        dy = torch.zeros_like(y)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    x, w, bias = tensor(2, 64, 8, 8), tensor(64, 64, 3, 3), tensor(64)
    plain = x.contiguous(), w.contiguous(), bias
    image, first = tensor(2, 3, 32, 32), tensor(64, 3, 7, 7)
    x_leaf, w_leaf, b_leaf = (t.clone().requires_grad_() for t in (x, w, bias))
    layer = cnn.Conv2d(64, 64, 3, padding=1, device=where, dtype=torch.bfloat16)
    layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stem: Any = {"stride": 2, "padding": 3}
    block: Any = {"padding": 1, "pool_kernel_size": 2}
    y = F.conv2d(x_leaf, w_leaf, b_leaf, padding=1)
    strided = F.conv2d(x_leaf, w_leaf, b_leaf, 2, 1)
    pooled = F.max_pool2d(x_leaf, 3, 2, 1)
    fused = F.conv2d_relu_max_pool2d(x_leaf, w_leaf, b_leaf, **block)
    numbers = (1, 1), (1, 1, 1, 1), (1, 1), 1, None
    operators = torch.ops.triton_cnn
    dy = torch.zeros_like(y)
    return {
        "torch.nn.functional.conv2d, empty batch": lambda: TF.conv2d(x[:0], w, bias, padding=1),
        "conv2d": forward(F.conv2d, x, w, bias, padding=1),
        "conv2d, recorded for backward": lambda: F.conv2d(x_leaf, w_leaf, b_leaf, padding=1),
        "cnn.Conv2d, recorded for backward": lambda: layer(x),
        "conv2d, contiguous": forward(F.conv2d, *plain, padding=1),
        "conv2d, first layer (2)": forward(F.conv2d, image, first, bias, **stem),
        "conv2d, depthwise": forward(F.conv2d, x, tensor(64, 1, 3, 3), bias, padding=1, groups=64),
        "conv_transpose2d": forward(F.conv_transpose2d, x, w, bias),
        "max_pool2d": forward(F.max_pool2d, x, kernel_size=3, stride=2, padding=1),
        "conv2d_relu_max_pool2d": forward(F.conv2d_relu_max_pool2d, x, w, bias, **block),
        "torch.ops.triton_cnn.conv2d": lambda: operators.conv2d(x, w, bias, None, *numbers, False),
        "torch.ops.triton_cnn.conv2d_dgrad": lambda: operators.conv2d_dgrad(
            dy, w, None, x.shape[2:], *numbers, True
        ),
        "torch.ops.triton_cnn.conv2d_wgrad": lambda: operators.conv2d_wgrad(
            x, dy, w.shape, w.stride(), *numbers, False
        ),
        "backward of a Function that does nothing": backward(
            _Nothing.apply(x_leaf, w_leaf), x_leaf
        ),
        "backward of conv2d (2)": backward(F.conv2d(x_leaf, w_leaf, padding=1), x_leaf, w_leaf),
        "backward of conv2d with bias (4)": backward(y, x_leaf, w_leaf, b_leaf),
        "backward of conv2d with bias, stride 2 (10)": backward(strided, x_leaf, w_leaf, b_leaf),
        "backward of max_pool2d": backward(pooled, x_leaf),
        "backward of conv2d_relu_max_pool2d (4)": backward(fused, x_leaf, w_leaf, b_leaf),
    }
