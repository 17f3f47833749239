"""Compile every kernel for an architecture, without a GPU: python -m tests.compiled_kernels sm_90.

Prints JSON, an entry for each binary: where it was launched first, kernel, engine (the module it is
in), dtype, spill_bytes, unfenced_products (see bench.fences), and of products the
tensor_core_instructions of their steady loop and the epilogue_instructions after it, else None. A
program of its own, as the tests' process has the interpreter.
"""

import json
import sys
from typing import Any

import torch

from bench import compiled, fences, selection
from kernels import conv_pool, device, planner
from kernels.conv import relu_backward
from kernels.conv.engine import Dgrad, PooledConv, Wgrad
from kernels.geometry import Conv2dGeometry, Pool2dGeometry, output_strides
from kernels.pool import max_pool, max_unpool, pool_gradient
from kernels.pool.pool_gradient import PoolGradient
from kernels.problem import Problem

ONE = ((1, 1), (1, 1))
LAYERS = {
    "stem": Conv2dGeometry(32, 3, 224, 224, 64, 7, 7, (2, 2), ((3, 3), (3, 3))),
    "alexnet conv1": Conv2dGeometry(32, 3, 224, 224, 64, 11, 11, (4, 4), ((2, 2), (2, 2))),
    "3x3": Conv2dGeometry(32, 64, 56, 56, 64, 3, 3, padding=ONE),
    "3x3/2": Conv2dGeometry(32, 128, 56, 56, 128, 3, 3, (2, 2), ONE),
    "1x1": Conv2dGeometry(32, 256, 56, 56, 64, 1, 1),
    "vgg16 conv1": Conv2dGeometry(8, 3, 224, 224, 64, 3, 3, padding=ONE),
    "vgg16 conv5": Conv2dGeometry(8, 512, 14, 14, 512, 3, 3, padding=ONE),
    "resnext50 grouped": Conv2dGeometry(8, 128, 56, 56, 128, 3, 3, (1, 1), ONE, (1, 1), 32),
    "regnet grouped": Conv2dGeometry(8, 96, 28, 28, 96, 3, 3, (1, 1), ONE, (1, 1), 4),
    "odd channels": Conv2dGeometry(8, 100, 28, 28, 100, 3, 3, padding=ONE),
    "odd groups": Conv2dGeometry(8, 208, 28, 28, 208, 3, 3, (1, 1), ONE, (1, 1), 2),
    "lenet5 conv1": Conv2dGeometry(64, 1, 32, 32, 6, 5, 5),
    "lenet5 conv2": Conv2dGeometry(64, 6, 14, 14, 16, 5, 5),
    "depthwise": Conv2dGeometry(32, 96, 112, 112, 96, 3, 3, (2, 2), ONE, (1, 1), 96),
}
ALIKE = {
    *("alexnet conv1", "1x1", "vgg16 conv1", "vgg16 conv5"),
    *("regnet grouped", "odd channels", "odd groups"),
}
# Beside all layers in bfloat16. A layout is the planner's: "channels_last" has engine 1 take what
# engine 2 takes of "aligned" operands.
OTHERS = (
    ("3x3", torch.bfloat16, "ieee", "aligned"),
    ("3x3/2", torch.bfloat16, "ieee", "aligned"),
    ("1x1", torch.bfloat16, "ieee", "aligned"),
    ("vgg16 conv5", torch.bfloat16, "ieee", "aligned"),
    ("3x3", torch.float16, "ieee", "channels_last"),
    ("lenet5 conv1", torch.float16, "ieee", "scattered"),
    ("3x3", torch.bfloat16, "ieee", "scattered"),
    ("depthwise", torch.bfloat16, "ieee", "scattered"),
    ("3x3", torch.float32, "tf32", "channels_last"),
    ("3x3", torch.float32, "tf32", "aligned"),
    ("lenet5 conv2", torch.float32, "ieee", "scattered"),
    ("lenet5 conv2", torch.float64, "ieee", "scattered"),
    ("lenet5 conv1", torch.float64, "ieee", "scattered"),
)
POOLS = (
    (Pool2dGeometry(32, 64, 112, 112, (3, 3), (2, 2), (1, 1)), torch.bfloat16, True),
    (Pool2dGeometry(32, 64, 112, 112, (3, 3), (2, 2), (1, 1)), torch.bfloat16, False),
    (Pool2dGeometry(8, 512, 28, 28, (2, 2), (2, 2)), torch.float16, True),
    (Pool2dGeometry(8, 512, 28, 28, (2, 2), (2, 2)), torch.float32, False),
    (Pool2dGeometry(8, 512, 28, 28, (2, 2), (2, 2)), torch.float64, False),
    (Pool2dGeometry(8, 512, 13, 13, (5, 5), (1, 1), (2, 2)), torch.float16, True),
)
# Poolings of a convolution's result, in one kernel with it: kernel, stride, padding.
FUSED_POOLS = (
    ("3x3", torch.bfloat16, "ieee", ((2, 2), (2, 2), (0, 0))),
    ("3x3", torch.bfloat16, "ieee", ((3, 3), (2, 2), (0, 0))),
    ("3x3", torch.float16, "ieee", ((3, 3), (2, 2), (1, 1))),
    ("3x3", torch.bfloat16, "ieee", ((3, 3), (1, 1), (1, 1))),
    ("vgg16 conv5", torch.bfloat16, "ieee", ((2, 2), (2, 2), (0, 0))),
    ("3x3", torch.float32, "tf32", ((2, 2), (2, 2), (0, 0))),
)
# Layer, kernel and padding of the pooling, dtype and precision, channels_last.
STEMS = (
    ("stem", (3, 3), (1, 1), torch.bfloat16, "ieee", True),
    ("stem", (3, 3), (1, 1), torch.float16, "ieee", False),
    ("stem", (3, 3), (1, 1), torch.float32, "tf32", True),
    ("alexnet conv1", (3, 3), (0, 0), torch.bfloat16, "ieee", True),
    ("lenet5 conv1", (2, 2), (0, 0), torch.bfloat16, "ieee", True),
)
# Layers whose gradient is found in loads where 2 x 2 pools follow.
EXPANDED = (
    ("1x1", "dgrad", "channels_last"),
    ("1x1", "wgrad", "channels_last"),
    ("lenet5 conv1", "wgrad", "scattered"),
    ("vgg16 conv1", "wgrad", "channels_last"),
)

Kernels = dict[str, tuple[str, str, Any]]  # where from, dtype, compiled kernel; by Triton's hash


def _found(where: str, dtype: torch.dtype, launched: list[Any]) -> Kernels:
    return {kernel.hash: (where, str(dtype)[6:], kernel) for kernel in launched}


def _comes_first(gpu: device.Device) -> bool:
    """Whether all is read: it takes seconds a kernel. Of other architectures what only differs in
    the layer is left out.
    """
    return gpu.arch in (80, 90)


def convolutions(gpu: device.Device, launched: list[Any]) -> Kernels:
    """Every direction of the layers, with what it has of an epilogue."""
    first = _comes_first(gpu)
    layers = [layer for layer in LAYERS if first or layer not in ALIKE]
    runs = [(layer, torch.bfloat16, "ieee", "channels_last") for layer in layers]
    others = OTHERS if first else OTHERS[:1] + OTHERS[4:]
    found: Kernels = {}
    for layer, dtype, precision, layout in (*runs, *others):
        g = LAYERS[layer]
        tensors = selection.operands(g, dtype, layout != "scattered")
        for direction in selection.DIRECTIONS:
            plan = planner.plan(Problem(direction, g, dtype, precision, gpu, layout))
            launched.clear()
            parts = {"bias": True, "relu": True, "residual": True}
            compiled.launch(direction, g, tensors, plan, precision, **parts)
            found = _found(f"{layer} {direction} {layout}", dtype, launched) | found
    return found


def fused_poolings(gpu: device.Device, launched: list[Any]) -> Kernels:
    """Convolution, bias, ReLU and max-pool in one kernel."""
    found: Kernels = {}
    for layer, dtype, precision, window in FUSED_POOLS[:: 1 if _comes_first(gpu) else 2]:
        g = LAYERS[layer]
        pool = Pool2dGeometry(*g.y_shape, *window)
        problem = Problem("fprop", g, dtype, precision, gpu, "aligned")
        if not conv_pool.descriptor_gemm.supports(problem, pool):
            continue
        x, w, _ = selection.operands(g, dtype)
        y, argmax = (_meta(pool.y_shape, t, channels_last=True) for t in (dtype, torch.uint8))
        tile = conv_pool.descriptor_gemm.family(problem, pool)[0]
        launched.clear()
        call = PooledConv(x, w, x.new_empty(g.K), y, argmax, g, pool, precision)
        conv_pool.descriptor_gemm.ENGINE.launch(call, tile)
        found = _found(f"{layer} {window}", dtype, launched) | found
    return found


def poolings(gpu: device.Device, launched: list[Any]) -> Kernels:
    """All pooling kernels, and a ReLU's backward."""
    found: Kernels = {}
    for g, dtype, channels_last in POOLS if _comes_first(gpu) else POOLS[1::2]:
        launched.clear()
        launch_pool(g, dtype, channels_last, gpu)
        found = _found(f"{g.kernel} channels_last={channels_last}", dtype, launched) | found
    return found


def launch_pool(
    g: Pool2dGeometry, dtype: torch.dtype, channels_last: bool, gpu: device.Device
) -> None:
    x, y = _meta(g.x_shape, dtype, channels_last), _meta(g.y_shape, dtype, channels_last)
    argmax = _meta(g.y_shape, max_pool.argmax_dtype(g), channels_last)
    indices = _meta(g.y_shape, torch.int64, channels_last)
    forward, backward = (
        max_pool.choose_tile(direction, g, channels_last, gpu)
        for direction in ("forward", "backward")
    )
    max_pool.max_pool2d(x, g, y, argmax, indices, forward)
    max_pool.max_pool2d_backward(y, argmax, x, g, backward)
    max_pool.max_pool2d_gather(x, argmax, y, g, forward)
    max_unpool.max_unpool2d(y, indices, x)
    max_unpool.max_unpool2d_backward(x, indices, y)
    relu_backward.relu_backward(y, y, y)


def pool_gradients(gpu: device.Device, launched: list[Any]) -> Kernels:
    """Gradients of pooled results: written out, and where that is dearer found in loads."""
    found: Kernels = {}
    for g, dtype, channels_last in POOLS if _comes_first(gpu) else POOLS[1::2]:
        launched.clear()
        dz = _meta(g.x_shape, dtype, channels_last)
        dy = _meta(g.y_shape, dtype, channels_last)
        argmax = _meta(g.y_shape, torch.uint8, channels_last)
        db = dz.new_empty(g.C)
        pool_gradient.write(dy, argmax, dz, db, g)
        relu_backward.relu_backward(dz, dz, dz, db)
        found = _found(f"{g.kernel} channels_last={channels_last}", dtype, launched) | found
    for layer, direction, layout in EXPANDED:
        launched.clear()
        g, dtype, channels_last = LAYERS[layer], torch.bfloat16, layout != "scattered"
        pool = Pool2dGeometry(g.N, g.K, g.P, g.Q, (2, 2), (2, 2))
        x, w, _ = selection.operands(g, dtype, channels_last)
        dy = _meta(pool.y_shape, dtype, channels_last)
        argmax = _meta(pool.y_shape, torch.uint8, channels_last)
        won = PoolGradient(pool, argmax)
        plan = planner.plan(Problem(direction, g, dtype, "ieee", gpu, layout))
        if direction == "dgrad":
            call = Dgrad(dy, w, x, g, pooled=won)
        else:
            call = Wgrad(x, dy, w, dy.new_empty(g.K), g, pooled=won)
        plan.engine.launch(call, plan.tile)
        found = _found(f"{layer} {direction} {layout} pooled", dtype, launched) | found
    return found


def _meta(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    strides = output_strides(shape, channels_last)
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def stems(gpu: device.Device, launched: list[Any]) -> Kernels:
    """The first layers with their pooling, where the device has the kernel."""
    found: Kernels = {}
    for layer, kernel, padding, dtype, precision, channels_last in STEMS[
        :: 1 if _comes_first(gpu) else 2
    ]:
        g = LAYERS[layer]
        pool = Pool2dGeometry(g.N, g.K, g.P, g.Q, kernel, (2, 2), padding)
        layout = "channels_last" if channels_last else "scattered"
        tiles = list(
            conv_pool.few_channels.tiles(Problem("fprop", g, dtype, precision, gpu, layout), pool)
        )
        if not tiles:
            continue
        x, w, y = (
            torch.empty_strided(
                shape, output_strides(shape, channels_last), dtype=dtype, device="meta"
            )
            for shape in (g.x_shape, g.w_shape, pool.y_shape)
        )
        launched.clear()
        argmax = torch.empty_like(y, dtype=torch.uint8)
        call = PooledConv(x, w, x.new_empty(g.K), y, argmax, g, pool, precision)
        conv_pool.few_channels.ENGINE.launch(call, *tiles)
        found = _found(f"{layer} pooled {layout}", dtype, launched) | found
    return found


def entry(where: str, dtype: str, kernel: Any) -> dict[str, Any]:
    """What was read of one kernel; only products are disassembled, which takes its time."""
    code = compiled.read(kernel) if "tt.dot" in kernel.asm["ttir"] else None
    return {
        "where": where,
        "kernel": kernel.metadata.name,
        "engine": kernel.src.fn.fn.__module__.removeprefix("kernels."),
        "dtype": dtype,
        "unfenced_products": fences.unfenced(kernel.asm.get("ptx", "")),
        "spill_bytes": code.spill_bytes if code else compiled.usage(kernel).spill_bytes,
        "tensor_core_instructions": code and code.tensor_core_instructions,
        "epilogue_instructions": code and code.epilogue_instructions,
    }


def main(arch: str) -> None:
    with selection.compiling(arch) as (gpu, launched), compiled.timing():
        found = convolutions(gpu, launched) | poolings(gpu, launched)
        found |= pool_gradients(gpu, launched)
        found |= fused_poolings(gpu, launched) | stems(gpu, launched)
        json.dump([entry(*kernel) for kernel in found.values()], sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
