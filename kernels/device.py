"""The device: what it is, how a kernel is launched on it, and how often one was.

Everything is asked lazily: importing this module touches no GPU.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import triton.language as tl
from triton import knobs

from ._private import GPUTarget, python_range, quick_interpreter, without_gpu
from .geometry import largest_offset

INTERPRET: bool = knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set when Triton was imported: kernels then run on CPU tensors."""

loop: Callable[..., Iterable[Any]] = python_range if INTERPRET else tl.range


class _Recorder(threading.local):
    recording: Any = None  # the replay.Recording of the call that this thread is in


recorder = _Recorder()


def fork_safe_lock() -> threading.RLock:
    """A lock that is free in a child: forking waits for whichever thread holds it. What it guards
    is then whole there, as the child has no other thread that could finish it.
    """
    lock = threading.RLock()
    os.register_at_fork(
        before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
    )
    return lock


_lock = fork_safe_lock()
_launches: Counter[str] = Counter()
_compiled: list[Any] = []  # by launches that only compile


class Peaks(NamedTuple):
    """What a device sustains; the planner's model of time is built on it.

    For sm_90 products and memory are what was measured on an H200: 790 TFLOP/s in bfloat16 and
    4.3 TB/s. The others, and the rates of L2, follow data sheets by the same proportions.
    """

    macs: int  # 16-bit multiply-adds a cycle of one multiprocessor
    clock: float  # GHz
    memory: float  # GB/s
    l2: float  # GB/s


_PEAKS: dict[int | str, Peaks] = {
    80: Peaks(1024, 1.2, 1700, 3500),
    90: Peaks(2048, 1.46, 4300, 7000),
    100: Peaks(4096, 1.5, 7000, 11000),
    "gfx942": Peaks(1024, 1.4, 4300, 8000),
}
_OTHER_PEAKS = Peaks(512, 1.6, 800, 2500)


@dataclass(frozen=True, eq=False)  # by identity, which costs a key least
class Device:
    """What a planner asks of a device. ``backend`` is "cuda", "hip" or "interpreter"."""

    backend: str
    arch: int | str
    multiprocessors: int
    shared_memory: int  # bytes one program may use

    @property
    def descriptors(self) -> bool:
        """Whether hardware loads boxes through tensor descriptors (TMA): Hopper and later."""
        return self.backend == "cuda" and int(self.arch) >= 90

    @property
    def peaks(self) -> Peaks:
        """Sustained rates, of the architecture rather than of one product."""
        return _PEAKS.get(self.arch, _OTHER_PEAKS)


@dataclass(frozen=True)
class _Launching:
    """What a launch does, and the device that tensors count as being on; None: the one they are on.

    ``emulated``: CPU tensors count as a GPU's, and whoever stands in as Triton's driver runs what
    was compiled for it.
    """

    mode: Literal["run", "compile", "warm_up", "nothing"] = "run"
    stand_in: Device | None = None
    emulated: bool = False


# Of the process: autograd's threads would not see a context variable.
_launching = _Launching()


@contextmanager
def _launch_mode(launching: _Launching) -> Iterator[None]:
    global _launching
    previous, _launching = _launching, launching
    try:
        yield
    finally:
        _launching = previous


_SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10}
_SHARED_MEMORY |= {100: 227 << 10, 103: 227 << 10, 110: 227 << 10, 120: 99 << 10, 121: 99 << 10}
_INTERPRETER = Device("interpreter", "numpy", multiprocessors=1, shared_memory=1 << 40)


@cache
def typical(target: GPUTarget) -> Device:
    """A typical device of an architecture, for planning without one."""
    if target.backend == "hip":
        shared = (160 if target.arch == "gfx950" else 64) << 10
        return Device("hip", target.arch, multiprocessors=304, shared_memory=shared)
    shared = _SHARED_MEMORY.get(int(target.arch), 48 << 10)
    return Device("cuda", target.arch, multiprocessors=132, shared_memory=shared)


@cache
def _of_gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    count = properties.multi_processor_count
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return Device("hip", arch, count, properties.shared_memory_per_block)
    arch = 10 * properties.major + properties.minor
    return Device("cuda", arch, count, properties.shared_memory_per_block_optin)


def describe(device: torch.device) -> Device:
    """The description of the device a tensor is on."""
    if _launching.stand_in is not None:
        return _launching.stand_in
    if device.type == "cuda":
        return _of_gpu(torch.cuda.current_device() if device.index is None else device.index)
    return _INTERPRETER


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **meta: Any):
    """Run ``kernel`` on ``device`` over ``grid``; an empty grid runs nothing.

    ``meta`` has what of the kernel's arguments is given by name, and Triton's options.

    The interpreter is not thread-safe (two threads give wrong numbers in silence), hence the lock;
    nor need an emulator be.
    """
    if 0 in grid:
        return
    if (recording := recorder.recording) is not None:
        recording.launched(kernel, grid, args, {"device": device, **meta})
    mode = _launching.mode
    if mode == "nothing":
        return
    if mode in ("compile", "warm_up"):
        _compiled.append(kernel.warmup(*args, grid=grid, **meta))
        return
    _launches[kernel.fn.__name__] += 1
    if INTERPRET:
        with _lock, np.errstate(all="ignore"), quick_interpreter():
            kernel[grid](*args, **meta)
        return
    if _launching.emulated:
        with _lock:
            kernel[grid](*args, **meta)
        return
    if device.index is None or device.index == torch.cuda.current_device():
        kernel[grid](*args, **meta)
    else:
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)


def launches() -> dict[str, int]:
    """How many launches this process has made of each kernel."""
    return dict(_launches)


@contextmanager
def compile_only(target: GPUTarget) -> Iterator[list[Any]]:
    """Within this context launches compile for ``target`` and run nothing; no GPU is needed.

    Yields the list to which each launch adds Triton's compiled kernel. Tensors may be of the meta
    device. Not for use beside other threads that launch kernels.
    """
    global _compiled
    if INTERPRET:
        raise RuntimeError("compile_only needs a process without TRITON_INTERPRET")
    if _launching.mode == "compile":
        raise RuntimeError(f"compile_only is not re-entrant; it compiles for {_launching.stand_in}")
    _compiled = []
    with without_gpu(target), _launch_mode(_Launching("compile", typical(target))):
        yield _compiled


@contextmanager
def warm_up() -> Iterator[None]:
    """Within this context convolutions compute nothing, but compile all binaries that any batch
    and image size of the same layers may need, for the GPU their tensors are on.

    After ``with warm_up(): model(x).sum().backward()`` a size that is new compiles nothing, as long
    as offsets fit into 32 bits, tensors start on 16 bytes and even sizes of layers with stride 2
    stay even. Do not step an optimizer within: results are whatever was in memory.
    """
    if INTERPRET:
        yield
        return
    outer = _launching.mode
    try:
        with _launch_mode(replace(_launching, mode="warm_up")):
            yield
    finally:
        if outer == "run":  # no one else is collecting what is compiled
            _compiled.clear()


def is_warming_up() -> bool:
    return _launching.mode == "warm_up"


def may_replay() -> bool:
    """Whether recordings may be replayed: not inside another recording, nor while launches only
    compile.
    """
    return recorder.recording is None and _launching.mode not in ("compile", "warm_up")


@contextmanager
def launch_nothing(target: GPUTarget) -> Iterator[None]:
    """Within this context operators do all but their launches, planned for a typical ``target``.

    Results are not computed: it is for timing what a call costs the processor.
    """
    with _launch_mode(_Launching("nothing", typical(target))):
        yield


@contextmanager
def emulate(stand_in: Device) -> Iterator[None]:
    """Within this context CPU tensors count as those of ``stand_in``, and their operators plan and
    launch as there. Triton's active driver has to run what is compiled.
    """
    if INTERPRET:
        raise RuntimeError("emulation needs a process without TRITON_INTERPRET")
    with _launch_mode(_Launching("run", stand_in, emulated=True)):
        yield


def is_emulated() -> bool:
    return _launching.emulated


def takes_cpu() -> bool:
    """Whether kernels run on CPU tensors: in the interpreter, or emulated."""
    return INTERPRET or is_emulated()


def all_registers(where: torch.device) -> dict[str, int]:
    """Launch options that allow a thread all registers there are. Left alone, ptxas may spill a few
    bytes to let one block more share a multiprocessor.
    """
    return {"maxnreg": 255} if describe(where).backend == "cuda" else {}


def int64_index(pixels: int, *tensors: torch.Tensor | None) -> bool:
    """Whether offsets need 64 bits: a tensor's largest, or the count of pixels.

    A margin of one tile is kept, as the last program's masked rows lie beyond the end.
    """
    offsets = [largest_offset(t.shape, t.stride()) for t in tensors if t is not None]
    return max([pixels, *offsets]) >= 2**31 - 2**20
