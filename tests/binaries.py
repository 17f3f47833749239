"""The binaries that sizes of a layer need, without compiling them: python -m tests.binaries.

Prints JSON: ``rows``, for each layer, layout and direction of the pointer kernels the binaries that
its first size needs and those that other sizes need besides; ``accesses``, how many bytes each
access to global memory has in a few kernels that are compiled; ``resnet50``, how many binaries a
training step needs, and those that steps of other sizes need after warming up. A program of its
own, as the tests' process has the interpreter.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from bench import suites
from bench._private import hooked
from kernels import device, planner
from kernels.conv import depthwise, few_channels, implicit_gemm, paired_columns, relu_backward
from kernels.conv.engine import Dgrad, Fprop, Wgrad
from kernels.geometry import Conv2dGeometry, Pool2dGeometry, output_strides
from kernels.lang.epilogue import Epilogue
from kernels.ops.conv2d import conv2d, conv2d_dgrad, conv2d_wgrad
from kernels.ops.conv2d_relu_max_pool2d import (
    conv2d_relu_max_pool2d,
    conv2d_relu_max_pool2d_backward,
)
from kernels.pool import max_pool, max_unpool, pool_gradient
from kernels.problem import Problem
from kernels.tile import Tile

Binary = tuple[str, str, str]  # a kernel's module and name, and what Triton compiles it for

ONE = ((1, 1), (1, 1))
LAYERS = {
    "3x3": Conv2dGeometry(2, 64, 32, 32, 64, 3, 3, padding=ONE),
    "3x3/2": Conv2dGeometry(2, 64, 32, 32, 128, 3, 3, (2, 2), ONE),
    "1x1/2": Conv2dGeometry(2, 64, 32, 32, 128, 1, 1, (2, 2)),
    "12 channels": Conv2dGeometry(2, 12, 32, 32, 20, 3, 3, padding=ONE, dilation=(2, 1)),
    "4 groups of 24": Conv2dGeometry(2, 96, 32, 32, 96, 3, 3, padding=ONE, groups=4),
    "32 groups of 4": Conv2dGeometry(2, 128, 32, 32, 128, 3, 3, padding=ONE, groups=32),
    "stem": Conv2dGeometry(2, 3, 32, 32, 64, 7, 7, (2, 2), ((3, 3), (3, 3))),
    "lenet5": Conv2dGeometry(2, 1, 32, 32, 6, 5, 5),
    "depthwise": Conv2dGeometry(2, 96, 32, 32, 96, 3, 3, (2, 2), ONE, groups=96),
}
POOLS = {
    "pool 3x3/2": Pool2dGeometry(2, 64, 32, 32, (3, 3), (2, 2), (1, 1)),
    "pool 2x2/2": Pool2dGeometry(2, 6, 32, 32, (2, 2), (2, 2)),
}
# A layer, and the kernel, stride and padding of the pooling after it.
BLOCKS = {
    "3x3, pool 2x2/2": (LAYERS["3x3"], ((2, 2), (2, 2), (0, 0))),
    "3x3, pool 3x3/2": (LAYERS["3x3"], ((3, 3), (2, 2), (1, 1))),
    "12 channels, pool 3x2/1": (LAYERS["12 channels"], ((3, 2), (1, 1), (0, 1))),
    "stem, pool 3x3/2": (LAYERS["stem"], ((3, 3), (2, 2), (1, 1))),
    "lenet5, pool 2x2/2": (LAYERS["lenet5"], ((2, 2), (2, 2), (0, 0))),
}
BATCHES = (1, 2, 3, 16, 31, 64, 512)
IMAGES = (
    *((32, 32), (33, 32), (34, 47), (48, 64), (57, 57), (112, 112)),
    *((224, 224), (225, 321), (512, 512), (511, 512)),
)


@contextmanager
def counting(target: GPUTarget) -> Iterator[set[Binary]]:
    """Within this context launches run and compile nothing; yields the binaries they need."""
    needed: set[Binary] = set()

    def note(*, key: str, fn: Any, **_: Any) -> bool:
        needed.add((fn.module, fn.name, key))
        return True

    with hooked(note), device.compile_only(target):
        yield needed


def empty(shape: tuple[int, ...], channels_last: bool, dtype=torch.bfloat16) -> Tensor:
    """A tensor without memory. The batch of one has an odd stride, as it is never taken."""
    n, *strides = output_strides(shape, channels_last)
    if shape[0] == 1:
        n = 12345
    return torch.empty_strided(shape, (n, *strides), dtype=dtype, device="meta")


def launch_convolution(direction: str, g: Conv2dGeometry, channels_last: bool) -> None:
    """As the operators do, with the tile of engine 3, or one of engine 1 that all layers take."""
    x, y = empty(g.x_shape, channels_last), empty(g.y_shape, channels_last)
    w = torch.empty_strided(
        g.w_shape, output_strides(g.w_shape, channels_last), dtype=x.dtype, device="meta"
    )
    bias = torch.empty(g.K, dtype=x.dtype, device="meta")
    engine, tile = implicit_gemm.ENGINE, Tile(64, 64, 32, packed=g.C // g.groups % 32 != 0)
    layout = "channels_last" if channels_last else "scattered"
    problem = Problem(direction, g, x.dtype, "ieee", device.describe(x.device), layout)
    plan = planner.plan(problem)
    if plan.engine in (depthwise.ENGINE, paired_columns.ENGINE, few_channels.ENGINE):
        engine, tile = plan.engine, plan.tile
    if direction == "fprop":
        engine.launch(Fprop(x, w, y, g, epilogue=Epilogue(bias, y, "relu")), tile)
    elif direction == "dgrad":
        engine.launch(Dgrad(y, w, x, g), tile)
    else:
        # One part needs no second pass, and so another binary.
        tile = replace(tile, split_k=2 + g.N % 15)
        engine.launch(Wgrad(x, y, w, bias, g), tile)


def launch_pool(direction: str, g: Pool2dGeometry, channels_last: bool) -> None:
    """All kernels of a direction, and with the gradients a ReLU's and a pooling's."""
    x, y = empty(g.x_shape, channels_last), empty(g.y_shape, channels_last)
    argmax = empty(g.y_shape, channels_last, max_pool.argmax_dtype(g))
    indices = empty(g.y_shape, channels_last, torch.int64)
    gpu = device.describe(x.device)
    forward = max_pool.choose_tile("forward", g, channels_last, gpu)
    if direction == "forward":
        max_pool.max_pool2d(x, g, y, argmax, indices, forward)
        max_unpool.max_unpool2d(y, indices, x)
    else:
        backward = max_pool.choose_tile("backward", g, channels_last, gpu)
        max_pool.max_pool2d_backward(y, argmax, x, g, backward)
        max_pool.max_pool2d_gather(x, argmax, y, g, forward)
        max_unpool.max_unpool2d_backward(x, indices, y)
        bias = torch.empty(g.C, dtype=x.dtype, device="meta")
        relu_backward.relu_backward(y, y, y, bias)
        pool_gradient.write(y, argmax, x, bias, g)


def launch_block(window: Any, direction: str, g: Conv2dGeometry, channels_last: bool) -> None:
    """A convolution, ReLU and max-pooling as one, as the operators do."""
    pool = Pool2dGeometry(*g.y_shape, *window)
    x, y = empty(g.x_shape, channels_last), empty(pool.y_shape, channels_last)
    w = torch.empty_strided(
        g.w_shape, output_strides(g.w_shape, channels_last), dtype=x.dtype, device="meta"
    )
    bias, argmax = torch.empty(g.K, dtype=x.dtype, device="meta"), y.to(torch.uint8)
    padding = (*g.padding[0], *g.padding[1])
    arguments = (g.stride, padding, g.dilation, g.groups, None, *window)
    if direction == "forward":
        conv2d_relu_max_pool2d.launch(x, w, bias, *arguments, True)
    else:
        sizes = x.shape[2:], w.shape, w.stride()
        wanted = g.C > 4, True, True  # images need no gradient
        conv2d_relu_max_pool2d_backward.launch(
            y, argmax, x, w, *sizes, *arguments, channels_last, wanted
        )


def sizes() -> Iterator[tuple[int, int, int]]:
    """N, H, W, of which the first one is to be enough."""
    yield 2, 64, 64
    for batch, image in product(BATCHES, IMAGES):
        yield batch, *image


def rows(needed: set[Binary]) -> Iterator[dict[str, Any]]:
    """A row for each layer, layout and direction."""
    convolutions = product(LAYERS.items(), ("fprop", "dgrad", "wgrad"), [launch_convolution])
    pools = product(POOLS.items(), ("forward", "backward"), [launch_pool])
    blocks = (
        ((name, layer), direction, partial(launch_block, window))
        for (name, (layer, window)), direction in product(BLOCKS.items(), ("forward", "backward"))
    )
    for ((name, layer), direction, launch), channels_last in product(
        [*convolutions, *pools, *blocks], (False, True)
    ):
        needed.clear()
        first: set[Binary] = set()
        for N, H, W in sizes():
            g = replace(layer, N=N, H=H, W=W)
            if max(prod(g.x_shape), prod(g.y_shape)) >= 2**31 - 2**20:
                continue  # offsets of 64 bits are other binaries
            with nullcontext() if first else device.warm_up():
                launch(direction, g, channels_last)
            first = first or set(needed)
        label = {"layer": name, "direction": direction, "channels_last": channels_last}
        yield {**label, "first": sorted(first), "more": sorted(needed - first)}


def accesses(ptx: str) -> list[int]:
    """Bytes of each load, store and asynchronous copy from or to global memory."""
    found = re.findall(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    copied = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, 0x(\w+)", ptx)
    return [int(count or 1) * int(bits) // 8 for count, bits in found] + [
        int(size, 16) for size in copied
    ]


def compiled() -> Iterator[tuple[str, list[int]]]:
    """Kernels of channels_last layers in odd sizes."""
    with device.compile_only(GPUTarget("cuda", 90, 32)) as kernels:
        g = replace(LAYERS["3x3"], N=3, H=57, W=45)
        x, w, y = (empty(shape, True) for shape in (g.x_shape, g.w_shape, g.y_shape))
        tile = Tile(64, 64, 32)
        call = Fprop(x, w, y, g, epilogue=Epilogue(residual=y, activation="relu"))
        implicit_gemm.fprop(call, tile)
        g = replace(POOLS["pool 3x3/2"], N=3, H=57, W=45)
        x, y = empty(g.x_shape, True), empty(g.y_shape, True)
        tile = max_pool.choose_tile("forward", g, True, device.describe(x.device))
        max_pool.max_pool2d(x, g, y, None, None, tile)
        relu_backward.relu_backward(y, y, y)
        g = replace(LAYERS["depthwise"], N=3, C=72, H=57, W=45, K=72, stride=(1, 1), groups=72)
        for direction in ("fprop", "dgrad"):
            launch_convolution(direction, g, True)
    for kernel in kernels:
        yield kernel.metadata.name, accesses(kernel.asm["ptx"])


def step(N: int, image: int) -> None:
    """The convolutions of ResNet-50 in training, on N images of image x image, by the operators.

    The first layer's input, the images, needs no gradient.
    """
    for layer in suites.layers():
        if layer.suite != "resnet50_v1.5" or not isinstance(layer.geometry, Conv2dGeometry):
            continue
        g = layer.geometry
        size = g.H * image // 224
        x, w = empty((N, g.C, size, size), True), empty(g.w_shape, True)
        (top, bottom), (left, right) = g.padding
        arguments = (g.stride, (top, bottom, left, right), g.dilation, g.groups, None)
        y = conv2d.launch(x, w, None, None, *arguments, False)
        if g.C > 3:
            conv2d_dgrad.launch(y, w, None, x.shape[2:], *arguments, True)
        conv2d_wgrad.launch(x, y, w.shape, w.stride(), *arguments, False)


def resnet50(needed: set[Binary]) -> dict[str, Any]:
    """Batches of 1 to 512 images of 64 to 512 pixels, in multiples of 32."""
    needed.clear()
    step(256, 224)
    one_step = len(needed)
    needed.clear()
    with device.warm_up():
        step(256, 224)
    warm = set(needed)
    needed.clear()
    images = (64, 96, 160, 224, 288, 352, 448, 512)
    for N, image in product((1, 3, 16, 31, 64, 100, 512), images):
        if N * 64 * (image // 2) ** 2 < 2**30:  # offsets of 64 bits are other binaries
            step(N, image)
    new = sorted(needed - warm)
    return {"one_step": one_step, "warm": len(warm), "other_sizes": len(needed), "new": new}


if __name__ == "__main__":
    target = GPUTarget("cuda", 90, 32)
    with counting(target) as needed:
        found = {"rows": list(rows(needed)), "resnet50": resnet50(needed)}
    json.dump({**found, "accesses": list(compiled())}, sys.stdout)
