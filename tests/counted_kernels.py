"""Prints what the emulator counts of small kernels, as JSON, in a process without interpreter."""

import json
import sys

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import counted, emulator
from bench.emulator.launch import LAUNCHES


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """y = every STEP-th element of x."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * STEP, mask=i < n), mask=i < n)


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, turns, SIZE: tl.constexpr):
    """c[SIZE, SIZE] = the sum of so many products of a and b."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for i in range(turns):
        acc = tl.dot(tl.load(a_ptr + i * SIZE * SIZE + at), tl.load(b_ptr + at), acc)
    tl.store(c_ptr + at, acc)


@triton.jit
def box_kernel(x_desc, y_desc, row):
    """Copy a box that begins at a row of x."""
    y_desc.store([0, 0], x_desc.load([row, 0]))


@gluon.jit
def transpose_kernel(x_ptr, y_ptr, SIZE: gl.constexpr, PADDED: gl.constexpr):
    """y = x through shared memory: stored by rows, read by columns."""
    rows: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    columns: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    padded: gl.constexpr = gl.PaddedSharedLayout.with_identity_for(
        [[SIZE, 1]], [SIZE, SIZE], [1, 0]
    )
    i = gl.arange(0, SIZE, gl.SliceLayout(1, rows))
    j = gl.arange(0, SIZE, gl.SliceLayout(0, rows))
    memory = gl.allocate_shared_memory(gl.float32, [SIZE, SIZE], padded if PADDED else plain)
    memory.store(gl.load(x_ptr + i[:, None] * SIZE + j[None, :]))
    value = memory.load(columns)
    i = gl.arange(0, SIZE, gl.SliceLayout(1, columns))
    j = gl.arange(0, SIZE, gl.SliceLayout(0, columns))
    gl.store(y_ptr + j[None, :] * SIZE + i[:, None], value)


def main() -> None:
    emulator.install("sm_90", count=True, ctas=4, races=False)
    x, y = torch.zeros(8192), torch.zeros(8192)
    half = torch.zeros(4096, dtype=torch.bfloat16)
    boxes = TensorDescriptor(torch.zeros(64, 64), [64, 64], [64, 1], [16, 32])
    deep = torch.zeros(5 * 4096, dtype=torch.bfloat16)
    launches = {
        "copy": lambda: copy_kernel[(4,)](x, y, 1024, STEP=1, BLOCK=256),
        "copy with a step": lambda: copy_kernel[(4,)](x, y, 1024, STEP=4, BLOCK=256),
        "copy of a part": lambda: copy_kernel[(4,)](x, y, 1000, STEP=1, BLOCK=256),
        "copy of a sample": lambda: copy_kernel[(64,)](x, y, 8192, STEP=1, BLOCK=128),
        "product": lambda: product_kernel[(3,)](deep, half, x, 5, SIZE=64),
        "box": lambda: box_kernel[(1,)](boxes, boxes, 0),
        "box at the end": lambda: box_kernel[(1,)](boxes, boxes, 60),
        "transpose": lambda: transpose_kernel[(1,)](x, y, SIZE=32, PADDED=False),
        "padded transpose": lambda: transpose_kernel[(1,)](x, y, SIZE=32, PADDED=True),
    }
    found = {}
    for name, launch in launches.items():
        launch()
        found[name] = counted.scaled(LAUNCHES[-1])._asdict()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
