"""The machine code of the planner's choices, read without a GPU.

``compile_layers(target)`` launches each named layer in every direction on meta tensors, within
``device.compile_only``, and reads registers, spills, shared memory and tensor-core instructions
from what was compiled. ``python -m bench.compiled cuda:90`` prints it as JSON, one row a kernel.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from kernels import device, epilogue, max_pool, planner
from kernels.geometry import (
    Conv2dGeometry,
    Direction,
    Pool2dGeometry,
    output_strides,
)

LAYERS = {
    "resnet50 stem": Conv2dGeometry(32, 3, 224, 224, 64, 7, 7, (2, 2), ((3, 3), (3, 3))),
    "resnet50 3x3": Conv2dGeometry(32, 64, 56, 56, 64, 3, 3, padding=((1, 1), (1, 1))),
    "resnet50 3x3/2": Conv2dGeometry(32, 128, 56, 56, 128, 3, 3, (2, 2), ((1, 1), (1, 1))),
    "resnet50 1x1": Conv2dGeometry(32, 256, 56, 56, 64, 1, 1),
    "vgg16 conv5": Conv2dGeometry(8, 512, 14, 14, 512, 3, 3, padding=((1, 1), (1, 1))),
    "resnext50 grouped": Conv2dGeometry(
        8, 128, 56, 56, 128, 3, 3, (1, 1), ((1, 1), (1, 1)), (1, 1), 32
    ),
    "regnet grouped": Conv2dGeometry(8, 96, 28, 28, 96, 3, 3, (1, 1), ((1, 1), (1, 1)), (1, 1), 4),
    "lenet5 conv1": Conv2dGeometry(64, 1, 32, 32, 6, 5, 5),
    "lenet5 conv2": Conv2dGeometry(64, 6, 14, 14, 16, 5, 5),
    "mobilenetv2 depthwise": Conv2dGeometry(
        32, 96, 112, 112, 96, 3, 3, (2, 2), ((1, 1), (1, 1)), (1, 1), 96
    ),
}
POOLS = {
    "resnet50 pool": Pool2dGeometry(32, 64, 112, 112, (3, 3), (2, 2), (1, 1)),
    "vgg16 pool": Pool2dGeometry(8, 512, 28, 28, (2, 2), (2, 2)),
}
DIRECTIONS: tuple[Direction, ...] = ("fprop", "dgrad", "wgrad")

_TENSOR_CORE = re.compile(r"\b(?:HGMMA|HMMA|QGMMA|UTC\w*MMA|DMMA|v_mfma_\w+)")
_LABEL = re.compile(r"^\s*(\.L\w+):")
_BRANCH = re.compile(r"\b(?:BRA|s_c?branch\w*)\b.*?(\.L\w+)")


@dataclass(frozen=True)
class Code:
    """One compiled kernel: ``spills`` in bytes of local memory (AMD: scratch) a thread.

    ``tensor_core_instructions`` are those of the loop that has most of them.
    """

    layer: str
    direction: str
    kernel: str
    dtype: str
    layout: str
    tile: str
    registers: int
    spills: int
    shared_bytes: int
    tensor_core_instructions: int


def _meta(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
    strides = output_strides(shape, channels_last)
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def launch(
    g: Conv2dGeometry, direction: Direction, dtype: torch.dtype, channels_last: bool, precision: str
) -> planner.Plan:
    """Launch one direction of a layer as the operators do, on meta tensors. Returns its plan."""
    x, w, y = (_meta(s, dtype, channels_last) for s in (g.x_shape, g.w_shape, g.y_shape))
    bias = torch.empty(g.K, dtype=dtype, device="meta")
    if dtype != torch.float32:
        precision = "ieee"
    gpu = device.describe(x.device)
    plan = planner.plan(direction, g, dtype, precision, gpu, not channels_last)
    engine, tile = plan
    if direction == "fprop":
        engine.fprop(x, w, bias, y, y, g, tile, relu=True, precision=precision)
    elif direction == "dgrad":
        engine.dgrad(y, w, None, x, g, tile, precision=precision)
    else:
        engine.wgrad(x, y, w, bias, g, tile, precision=precision)
    return plan


def launch_pool(g: Pool2dGeometry, dtype: torch.dtype, channels_last: bool) -> None:
    """Launch all pooling kernels, and a ReLU's backward, on meta tensors of one layer."""
    x, y = (_meta(s, dtype, channels_last) for s in (g.x_shape, g.y_shape))
    offsets, indices = (
        _meta(g.y_shape, d, channels_last) for d in (max_pool.offset_dtype(g), torch.int64)
    )
    gpu = device.describe(x.device)
    forward, backward = (
        max_pool.choose_tile(direction, g, channels_last, gpu)
        for direction in ("forward", "backward")
    )
    max_pool.max_pool2d(x, g, y, offsets, indices, forward)
    max_pool.max_pool2d_backward(y, offsets, x, g, backward)
    max_pool.max_pool2d_gather(x, offsets, y, g, forward)
    max_pool.max_unpool2d(y, indices, x)
    max_pool.max_unpool2d_backward(x, indices, y)
    epilogue.relu_backward(y, y, y)


def read(compiled, **labels: str) -> Code:
    """Registers, spills and instructions of one compiled kernel."""
    registers, spills, assembly = (_amd if "amdgcn" in compiled.asm else _nvidia)(compiled)
    return Code(
        kernel=compiled.metadata.name,
        registers=registers,
        spills=spills,
        shared_bytes=compiled.metadata.shared,
        tensor_core_instructions=max(map(_tensor_core, _loops(assembly)), default=0),
        **labels,
    )


def _tensor_core(lines: list[str]) -> int:
    return sum(bool(_TENSOR_CORE.search(line)) for line in lines)


def _loops(assembly: str) -> Iterator[list[str]]:
    """The lines from each label to each branch back to it."""
    lines = assembly.splitlines()
    labels: dict[str, int] = {}
    for number, line in enumerate(lines):
        if label := _LABEL.match(line):
            labels[label[1]] = number
        elif (branch := _BRANCH.search(line)) and branch[1] in labels:
            yield lines[labels[branch[1]] : number]


def _amd(compiled) -> tuple[int, int, str]:
    text = compiled.asm["amdgcn"]
    registers, scratch = (
        int(re.findall(rf"\.{name}:\s*(\d+)", text)[0])
        for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, scratch, text


def _nvidia(compiled) -> tuple[int, int, str]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()

        def ask(tool: str, option: str) -> str:
            command = [tools / tool, option, cubin.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = ask("cuobjdump", "-res-usage")
        # Reading all instructions takes as long as compiling them.
        assembly = ask("nvdisasm", "-c") if "mma" in compiled.asm["ptx"] else ""
    registers, stack, local = (
        int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local, assembly


def compile_layers(target: GPUTarget) -> Iterator[Code]:
    """Each kernel that the planner's choices launch: all layers in 16 bits, some wider."""
    runs = [
        *((layer, torch.bfloat16, True, "ieee") for layer in LAYERS),
        ("resnet50 3x3", torch.float16, True, "ieee"),
        ("lenet5 conv1", torch.float16, False, "ieee"),
        ("resnet50 3x3", torch.bfloat16, False, "ieee"),
        ("mobilenetv2 depthwise", torch.bfloat16, False, "ieee"),
        ("resnet50 3x3", torch.float32, True, "tf32"),
        ("lenet5 conv2", torch.float32, False, "ieee"),
        ("lenet5 conv2", torch.float64, False, "ieee"),
        ("lenet5 conv1", torch.float64, False, "ieee"),
    ]
    for layer, dtype, channels_last, precision in runs:
        for direction in DIRECTIONS:
            with device.compile_only(target) as compiled:
                tile = launch(LAYERS[layer], direction, dtype, channels_last, precision).tile
            labels = _labels(layer, direction, dtype, channels_last)
            yield from (read(kernel, tile=str(tile), **labels) for kernel in _distinct(compiled))
    pools = [
        ("resnet50 pool", torch.bfloat16, True),
        ("resnet50 pool", torch.bfloat16, False),
        ("vgg16 pool", torch.float16, True),
        ("vgg16 pool", torch.float32, False),
        ("vgg16 pool", torch.float64, False),
    ]
    for layer, dtype, channels_last in pools:
        with device.compile_only(target) as compiled:
            launch_pool(POOLS[layer], dtype, channels_last)
        labels = _labels(layer, "pool", dtype, channels_last)
        yield from (read(kernel, tile="", **labels) for kernel in _distinct(compiled))


def _labels(layer: str, direction: str, dtype: torch.dtype, channels_last: bool) -> dict[str, str]:
    layout = "channels_last" if channels_last else "contiguous"
    return {"layer": layer, "direction": direction, "dtype": str(dtype)[6:], "layout": layout}


def _distinct(compiled: list) -> list:
    return list({kernel.hash: kernel for kernel in compiled}.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__)
    parser.add_argument("target", help="cuda:80, cuda:90, cuda:100, hip:gfx942, ...")
    backend, arch = parser.parse_args().target.split(":")
    target = GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)
    json.dump([asdict(code) for code in compile_layers(target)], sys.stdout, indent=1)


if __name__ == "__main__":
    main()
