"""Measure the device's limits, and the times of tiles beside cuDNN's.

On a CPU each runs once on little data, as a test without a number.
"""

import subprocess
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import cost_model, device
from kernels.device import loop
from kernels.geometry import Direction
from kernels.problem import Problem

from .. import measure, peers
from ..measure import DTYPES
from . import tiles
from .items import Ceiling, Forced, Timing

_LAUNCHES = 200  # in one graph
_L2_BLOCK = 4096  # elements of four bytes that one program copies at once


@triton.jit
def empty_kernel():
    """Nothing: what it takes is the launch."""


@triton.jit
def l2_copy_kernel(source_ptr, target_ptr, blocks, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """target = source, ``ROUNDS`` times over ``blocks`` blocks.

    Each round a program takes blocks that another had, and loads pass by the first cache: so all
    is read from L2 if both tensors fit there.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    for turn in range(ROUNDS):
        for block in loop((program + turn) % programs, blocks, programs):
            at = block * BLOCK + tl.arange(0, BLOCK)
            tl.store(target_ptr + at, tl.load(source_ptr + at, cache_modifier=".cg"))


# Ceilings: a value in a unit; None on a CPU.


def _matmul(size: int, name: str) -> Callable[[torch.device], float | None]:
    """TFLOP/s of torch's product of square matrices."""

    def measured(where: torch.device) -> float | None:
        measure.set_torch(DTYPES[name], where)
        side = size if where.type == "cuda" else 32
        kind = DTYPES[name].torch
        pairs = [tuple(torch.randn(2, side, side, device=where).to(kind)) for _ in range(2)]
        ms = _milliseconds(torch.mm, pairs, where)
        return ms and 2 * size**3 / ms / 1e9

    return measured


def _copy(elements: int) -> Callable[[torch.device], float | None]:
    """GB/s of a float32 copy, read and written together."""

    def measured(where: torch.device) -> float | None:
        source = torch.randn(elements if where.type == "cuda" else 64, device=where)
        target = torch.empty_like(source)
        ms = _milliseconds(target.copy_, [(source,)], where)
        return ms and 2 * source.nbytes / ms / 1e6

    return measured


def _l2_copy(mebibytes: int) -> Callable[[torch.device], float | None]:
    """GB/s of a copy of so much in L2 within one launch, read and written together."""

    def measured(where: torch.device) -> float | None:
        gpu = where.type == "cuda"
        block, rounds = (_L2_BLOCK, 100) if gpu else (64, 2)
        blocks = mebibytes * 2**20 // 4 // block if gpu else 3
        source = torch.randn(blocks * block, device=where)
        target = torch.full_like(source, torch.nan)
        programs = 4 * device.describe(where).multiprocessors if gpu else 2

        def call() -> None:
            meta = {"ROUNDS": rounds, "BLOCK": block}
            device.launch(l2_copy_kernel, (programs,), source, target, blocks, device=where, **meta)

        ms = _milliseconds(call, [()], where)
        if not torch.equal(source, target):
            raise ArithmeticError("the copy is not what was copied")
        return ms and 2 * rounds * source.nbytes / ms / 1e6

    return measured


def _launch(programs: int) -> Callable[[torch.device], float | None]:
    """Microseconds of one of many empty kernels in a graph."""

    def measured(where: torch.device) -> float | None:
        def call() -> None:
            device.launch(empty_kernel, (programs,), device=where)

        ms = _milliseconds(call, [()] * (_LAUNCHES if where.type == "cuda" else 2), where)
        return ms and 1e3 * ms

    return measured


def _clock(where: torch.device) -> float | None:
    """MHz of the multiprocessors while products keep them busy; None if it cannot be read."""
    if where.type == "cpu":
        return None
    one, other, product = (
        torch.randn(8192, 8192, device=where, dtype=torch.bfloat16) for _ in range(3)
    )
    for _ in range(2000):  # about three seconds
        torch.mm(one, other, out=product)
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(where).uuid}"
    query = ["nvidia-smi", gpu, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
        return float(done.stdout.partition("\n")[0])
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    finally:
        torch.cuda.synchronize()


_Measured = Callable[[torch.device], float | None]
CEILINGS: dict[str, tuple[str, _Measured]] = {
    "product of 8192, bf16": ("TFLOP/s", _matmul(8192, "bf16")),
    "copy of 1 GiB": ("GB/s", _copy(2**28)),
    "copy of 16 MiB in L2": ("GB/s", _l2_copy(16)),
    "launch of 1 program": ("us", _launch(1)),
    "launch of 132 programs": ("us", _launch(132)),
    "clock under load": ("MHz", _clock),
    "product of 4096, bf16": ("TFLOP/s", _matmul(4096, "bf16")),
    "product of 16384, bf16": ("TFLOP/s", _matmul(16384, "bf16")),
    "product of 8192, tf32": ("TFLOP/s", _matmul(8192, "tf32")),
    "copy of 4 GiB": ("GB/s", _copy(2**30)),
    "copy of 8 MiB in L2": ("GB/s", _l2_copy(8)),
    "copy of 24 MiB in L2": ("GB/s", _l2_copy(24)),
}


def _milliseconds(call: Callable, sets: list, where: torch.device) -> float | None:
    """``measure.milliseconds``; on a CPU one call, and None."""
    if where.type == "cuda":
        return measure.milliseconds(call, sets, where)
    call(*sets[0])
    return None


def run_ceiling(item: Ceiling, where: torch.device) -> dict[str, Any]:
    """The row of one ceiling."""
    unit, measured = CEILINGS[item.name]
    return {"ok": True, "reason": None, "value": measured(where), "unit": unit}


# Tiles.


@torch.no_grad()
def run_timing(item: Timing, where: torch.device) -> dict[str, Any]:
    """The row of one tile, or of cuDNN."""
    kind, g = DTYPES["bf16"], item.geometry
    measure.set_torch(kind, where)
    sets = _sets(item.direction, item.layer, g, where)
    predicted = None
    if item.forced is None:
        ms = _milliseconds(_problem(item).eager().call, sets, where)
    else:
        ms = _milliseconds(_launcher(item, item.forced), sets, where)
        if where.type == "cuda":
            here, tile = device.describe(where), item.forced.tile
            problem = Problem(item.direction, g, kind.torch, kind.precision, here)
            predicted = cost_model.predict(problem, tile)
    return {
        "ok": True,
        "reason": None,
        "ms": ms,
        "predicted_ms": predicted and predicted.ms,
        "limit": predicted and predicted.limit,
        "tflops": ms and 2 * cost_model.macs(item.direction, g) / ms / 1e9,
        "chosen": str(item.forced) if item.forced else None,
    }


def compile_timing(item: Timing) -> None:
    """Launch the tile in a mode that only compiles."""
    if item.forced is not None:
        _launcher(item, item.forced)(*_inputs(item, torch.device("meta")))


def _problem(item: Timing) -> peers.Convolution:
    return peers.Convolution(item.direction, item.geometry, DTYPES["bf16"].precision)


def _launcher(item: Timing, forced: Forced) -> Callable[..., Tensor]:
    """The tile on the inputs of ``_problem``: x, w and, except for fprop, dy."""
    precision = DTYPES["bf16"].precision

    def call(x: Tensor, w: Tensor, *dy: Tensor) -> Tensor:
        operands = {"fprop": (x, w), "dgrad": (*dy, w), "wgrad": (x, *dy)}[item.direction]
        return tiles.launch(forced, item.direction, item.geometry, precision, *operands)

    return call


def _inputs(item: Timing, where: torch.device) -> peers.Inputs:
    last = torch.channels_last

    def draw(shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, device=where).to(torch.bfloat16)
        return drawn.contiguous(memory_format=last) if len(shape) == 4 else drawn

    return _problem(item).inputs(draw)


@lru_cache(maxsize=1)  # cuDNN and the tiles of one layer come one after another
def _sets(direction: Direction, layer: str, g: Any, where: torch.device) -> list[peers.Inputs]:
    """Buffers that together exceed the L2 cache twice, with the same numbers for all contenders."""
    item = Timing(layer, direction, g, None, 0)
    torch.manual_seed(0)
    _, bytes_moved = _problem(item).work(2)
    return [_inputs(item, where) for _ in range(measure.sets_needed(bytes_moved, where))]
