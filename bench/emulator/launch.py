"""A launch: a kernel's arguments as the bytes it reads, and its grid, run some CTAs at a time."""

import itertools
import mmap
import struct
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from .checks import OPTIONS, Options
from .codegen import Program
from .counters import Counters, sample
from .instructions import handler_of
from .machine import Machine
from .memory import LARGE, GlobalMemory
from .parser import parse
from .tma import MAPS, TensorMap

_PACK = {"i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u1": "<B", "u8": "<B"}
_PACK |= {"u16": "<H", "u32": "<I", "u64": "<Q", "fp16": "<e", "fp32": "<f", "f32": "<f"}
_PACK |= {"fp64": "<d"}

Argument = tuple[str, Any]  # Triton's type of a parameter, and its value
Grid = tuple[int, int, int]
Ints = Sequence[int]


LAUNCHES: list[dict[str, Any]] = []
"""What has been run: for reports of speed and of counts."""


@lru_cache(maxsize=64)
def program_of(text: str) -> Program:
    return Program(parse(text), handler_of)


class Function:
    """A loaded kernel."""

    def __init__(self, name: str, text: str, shared: int):
        self.name, self.text, self.shared = name, text, shared

    @property
    def program(self) -> Program:
        return program_of(self.text)


class Launch:
    """What a launch may touch: its parameters, in memory too, and the storages of its tensors."""

    def __init__(self, function: Function, grid: Grid, threads: int):
        self.function, self.grid, self.threads = function, grid, threads
        self.kernel, self.memory = function.program.kernel, GlobalMemory()
        self.params: dict[str, bytes] = {}
        self.symbols: dict[str, int] = {}
        self.counters = Counters(self.kernel, threads) if OPTIONS.count else None
        for name, data in self.kernel.globals.items():
            buffer = np.frombuffer(data + bytes(64), np.uint8).copy()
            self.memory.register(buffer.ctypes.data, len(data), name, buffer)
            self.symbols[name] = buffer.ctypes.data

    def give(self, values: Sequence[Argument], tensors: Sequence[Any]) -> None:
        """Write the parameters: to where instructions find them by name, and to memory."""
        for number, tensor in enumerate(tensors):
            _register_tensor(self.memory, tensor, number)
        name, params = self.kernel.name, self.kernel.params
        if len(values) != len(params):
            raise RuntimeError(f"{name} has {len(params)} parameters, {len(values)} were given")
        size = params[-1].offset + params[-1].size if params else 1
        block = _below_4_gib(size + 256)
        origin = -(-block.ctypes.data // 128) * 128
        self.memory.register(origin, size, "parameters", block, writable=False)
        for p, (kind, value) in zip(params, values, strict=True):
            raw = _pack(kind, value)
            if len(raw) != p.size:
                raise RuntimeError(f"{name}: {p.name} has {p.size} bytes, {len(raw)} were given")
            at = origin - block.ctypes.data + p.offset
            block[at : at + p.size] = np.frombuffer(raw, np.uint8)
            self.params[p.name] = raw
            self.symbols[p.name] = origin + p.offset

    def execute(self, ctas: list[Grid], options: Options) -> None:
        batch = max(1, options.lanes // self.threads)
        for first in range(0, len(ctas), batch):
            Machine(self, ctas[first : first + batch], options).run()


def run(
    function: Function, grid: Grid, values: list[Argument], tensors: list[Any], metadata: Any
) -> None:
    """Execute a grid, or the CTAs of it that the options ask for."""
    started = time.perf_counter()
    threads = function.program.kernel.threads or 32 * metadata.num_warps
    _check_limits(function, grid, threads, metadata)
    scratch = _scratch(metadata, grid[0] * grid[1] * grid[2])
    launch, ctas = Launch(function, grid, threads), _chosen(grid)
    launch.give([*values, *scratch], [*tensors, *(t for _, t in scratch)])
    if OPTIONS.mode == "both":
        launch.memory.compare(
            lambda mode: launch.execute(ctas, replace(OPTIONS, mode=mode)), function.name
        )
    else:
        launch.execute(ctas, OPTIONS)
    LAUNCHES.append(
        {
            "kernel": function.name,
            "grid": grid,
            "ctas": len(ctas),
            "threads": threads,
            "seconds": time.perf_counter() - started,
            "shared": function.shared,
            "counters": launch.counters.summary() if launch.counters else None,
        }
    )


def _check_limits(function: Function, grid: Grid, threads: int, metadata: Any) -> None:
    """Those of the hardware, with the errors that a launch on it has."""
    if getattr(metadata, "num_ctas", 1) != 1:
        raise NotImplementedError("clusters of CTAs")
    if not (0 < grid[0] < 2**31 and 0 < grid[1] < 2**16 and 0 < grid[2] < 2**16):
        raise RuntimeError(f"Triton Error [CUDA]: invalid argument: a grid of {grid}")
    if threads > 1024:
        raise RuntimeError(f"Triton Error [CUDA]: invalid argument: {threads} threads")
    active: Any = triton.runtime.driver.active  # the emulator's
    limit = active.utils.get_device_properties(0)["max_shared_mem"]
    if function.shared > limit:
        raise triton.OutOfResources(function.shared, limit, "shared memory")


def _scratch(metadata: Any, ctas: int) -> list[Argument]:
    """Global and profiling scratch memory, which Triton gives as the last parameters."""
    found: list[Argument] = []
    for what in ("global", "profile"):
        size = getattr(metadata, f"{what}_scratch_size", 0) or 0
        found.append(("*u8", torch.zeros(size * ctas, dtype=torch.uint8) if size else None))
    return found


def _chosen(grid: Grid) -> list[Grid]:
    """The CTAs that are run, in their order."""
    ctas = [(x, y, z) for z, y, x in itertools.product(*(range(g) for g in reversed(grid)))]
    return [ctas[place] for place in sample(len(ctas), OPTIONS.ctas)]


def _below_4_gib(size: int) -> NDArray[np.uint8]:
    """Zeroed bytes for parameters, whose addresses Triton 3.9's PTX keeps in 32 bits."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_32BIT", 0x40)
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8)


def _pack(kind: str, value: Any) -> bytes:
    if kind[0] == "*":
        pointer = value.data_ptr() if hasattr(value, "data_ptr") else value
        return struct.pack("<Q", pointer or 0)
    if kind == "nvTmaDesc":
        raw = b"PTXTMAP\0" + len(MAPS).to_bytes(120, "little")
        MAPS[raw] = value
        return raw
    if kind == "bf16":
        return struct.pack("<f", value)[2:]
    return struct.pack(_PACK[kind], value)


def tensor_map(
    base: int, swizzle: int, size: int, kind: int, box: Ints, shape: Ints, strides: Ints, nan: int
) -> TensorMap:
    """What cuTensorMapEncodeTiled makes of Triton's arguments; its first axis is the innermost."""
    sizes, boxes = ([int(s) for s in reversed(list(axes))] for axes in (shape, box))
    steps = [int(s) * size for s in reversed(list(strides)[:-1])]
    t = TensorMap(int(base), sizes, steps, boxes, size, swizzle, nan == 1)
    t.check()
    return t


def _register_tensor(memory: GlobalMemory, t: Any, number: int) -> None:
    """The storage of a tensor, or of the tensor a descriptor describes, may be accessed."""
    if t is None:
        return
    tensor: torch.Tensor = t if isinstance(t, torch.Tensor) else t.base
    if tensor.device.type != "cpu":
        raise RuntimeError(f"argument {number} is on {tensor.device}")
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return
    name = f"argument {number} ({'x'.join(map(str, t.shape))} {str(tensor.dtype)[6:]})"
    a = memory.register(storage.data_ptr(), storage.nbytes(), name, tensor)
    if OPTIONS.views and a.size <= LARGE:
        strides = t.stride() if isinstance(t, torch.Tensor) else t.strides
        inside = _bytes_inside(tensor, t.shape, strides)
        a.elements = inside if a.elements is None else a.elements | inside


def _bytes_inside(tensor: torch.Tensor, shape: Ints, strides: Ints) -> NDArray[np.bool_]:
    """For each byte of a storage, whether a view's elements have it."""
    inside = np.zeros(tensor.untyped_storage().nbytes(), bool)
    if all(shape):
        item = tensor.element_size()
        for byte in range(item):
            first = inside[tensor.storage_offset() * item + byte :]
            steps = [s * item for s in strides]
            np.lib.stride_tricks.as_strided(first, tuple(shape), steps)[...] = True
    return inside
