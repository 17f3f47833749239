"""The emulator as Triton's driver: kernels run on CPU tensors, from the PTX that Triton emits."""

import inspect
import itertools
import mmap
import struct
import time
from types import SimpleNamespace

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.backends.nvidia import driver as nvidia

from .checks import FINDINGS, OPTIONS, Options, Report
from .codegen import Program
from .counters import Counters, sample
from .instructions import HANDLERS
from .machine import Machine
from .memory import GlobalMemory
from .parser import parse
from .static import register_hazards
from .tma import HANDLES, TensorMap

MAX_SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
MAX_SHARED |= {103: 227 << 10, 120: 99 << 10}

_PACK = {"i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u1": "<B", "u8": "<B"}
_PACK |= {"u16": "<H", "u32": "<I", "u64": "<Q", "fp16": "<e", "fp32": "<f", "f32": "<f"}
_PACK |= {"fp64": "<d"}


class Function:
    """A loaded kernel."""

    def __init__(self, name: str, text: str, shared: int):
        self.name, self.shared = name, shared
        self.text = text
        self._program: Program | None = None

    @property
    def program(self) -> Program:
        if self._program is None:
            self._program = program_of(self.text)
            for ins, what in register_hazards(self._program):
                FINDINGS.add(Report("wgmma register hazard", self.name, ins, what))
        return self._program


_programs: dict[str, Program] = {}


def program_of(text: str) -> Program:
    if text not in _programs:
        _programs[text] = Program(parse(text), HANDLERS)
    return _programs[text]


class Launches:
    """What has been run: for reports of speed."""

    def __init__(self):
        self.log: list = []


LAUNCHES = Launches()
REWRITE = [None]
"""A function of PTX text that is applied when a kernel is loaded: for tests that break one."""


class Utils:
    functions: dict[
        int, Function
    ] = {}  # by handle, of all drivers: Triton keeps what it has loaded

    def __init__(self, target: GPUTarget):
        self.target = target

    def load_binary(self, name, binary, shared, device):
        text = binary.decode() if isinstance(binary, bytes) else binary
        if REWRITE[0] is not None:
            text = REWRITE[0](text)
        handle = len(self.functions) + 1
        self.functions[handle] = Function(name, text, shared)
        return handle, handle, 0, 0, 1024

    def unload_module(self, module):
        """Triton keeps a module until its kernel is collected; nothing is held here."""

    def get_device_properties(self, device):
        arch = self.target.arch
        return {
            "max_shared_mem": MAX_SHARED.get(arch, 48 << 10),
            "max_num_regs": 65536,
            "multiprocessor_count": OPTIONS.multiprocessors,
            "warpSize": 32,
            "sm_clock_rate": 1_700_000,
            "mem_clock_rate": 2_600_000,
            "mem_bus_width": 5120,
        }

    def fill_tma_descriptor(self, base, swizzle, itemsize, kind, box, shape, strides, padding):
        steps = [int(s) * itemsize for s in reversed(list(strides)[:-1])]
        t = TensorMap(
            base=int(base),
            sizes=[int(s) for s in reversed(list(shape))],
            strides=steps,
            box=[int(b) for b in reversed(list(box))],
            itemsize=itemsize,
            swizzle=swizzle,
            nan=padding == 1,
            kind=kind,
        )
        t.check()
        return t

    fill_tma_descriptor_tiled = fill_tma_descriptor  # its name in Triton 3.9

    def set_printf_fifo_size(self, size):
        pass


class Launcher:
    """Packs a launch's arguments as CudaLauncher does, then runs the grid."""

    def __init__(self, src, metadata):
        self.metadata = metadata
        self.signature = dict(src.signature)
        self.tensordesc_meta = getattr(metadata, "tensordesc_meta", None)
        self.num_ctas = getattr(metadata, "num_ctas", 1)
        self.flat: list = []

    def __call__(self, gx, gy, gz, stream, function, packed, launch_metadata, enter, leave, *args):
        active = triton.runtime.driver.active
        if enter is not None:
            enter(launch_metadata)
        loaded = active.utils.functions[function]
        values, tensors = self._flatten(args)
        run(loaded, (gx, gy, gz), values, tensors, self.metadata, self.num_ctas)
        if leave is not None:
            leave(launch_metadata)

    def _flatten(self, args):
        """[(type, value)] of the kernel's parameters, and the tensors among them."""
        out: list = []
        tensors: list = []
        described = 0

        def add(kind, value):
            nonlocal described
            if isinstance(kind, tuple):
                for k, v in zip(kind, value, strict=True):
                    add(k, v)
            elif kind == "constexpr":
                pass
            elif kind.startswith("tensordesc"):
                meta = self.tensordesc_meta[described] if self.tensordesc_meta else None
                described += 1
                tensors.append(value)
                expanded = _describe(value, meta)
                rank = len(value.shape)
                if meta is None:
                    element = kind.split("<")[1].split("[")[0]
                    flags = len(expanded) - 1 - 4 * rank  # Triton 3.9 has one more than 3.6
                    kinds = ["*" + element, *["i64"] * (2 * rank), *["i1"] * flags]
                else:
                    kinds = ["nvTmaDesc"]
                    expanded[0].keep = value.base
                kinds += ["i32"] * rank + ["i64"] * rank
                for k, v in zip(kinds, expanded, strict=True):
                    add(k, v)
            else:
                if kind[0] == "*" and hasattr(value, "data_ptr"):
                    tensors.append(value)
                out.append((kind, value))

        for kind, value in zip(self.signature.values(), args, strict=True):
            add(kind, value)
        return out, tensors


def _below_4_gib(size: int) -> np.ndarray:
    """Zeroed bytes for parameters, whose addresses Triton 3.9's PTX keeps in 32 bits."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_32BIT", 0x40)
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8)


def _describe(value, meta) -> list:
    """A descriptor's parameters, as this version of Triton expands them."""
    arguments = len(inspect.signature(nvidia.make_tensordesc_arg).parameters)
    return nvidia.make_tensordesc_arg(value, meta, *[None] * (arguments - 2))


def _pack(kind: str, value) -> bytes:
    if kind[0] == "*":
        if value is None:
            return bytes(8)
        if hasattr(value, "data_ptr"):
            value = value.data_ptr()
        return struct.pack("<Q", value)
    if kind == "nvTmaDesc":
        return HANDLES.encode(value)
    if kind == "bf16":
        return struct.pack("<f", value)[2:]
    return struct.pack(_PACK[kind], value)


def _register_tensor(memory: GlobalMemory, t, number: int, options: Options) -> None:
    """The storage of a tensor, or of the tensor a descriptor describes, may be accessed."""
    shape, strides = t.shape, getattr(t, "strides", None)
    if isinstance(t, torch.Tensor):
        strides = t.stride()
    else:
        t = t.base
    if t.device.type != "cpu":
        raise RuntimeError(f"argument {number} is on {t.device}")
    storage = t.untyped_storage()
    size = storage.nbytes()
    if size == 0:
        return
    name = "x".join(map(str, shape))
    a = memory.register(
        storage.data_ptr(), size, f"argument {number} ({name} {str(t.dtype)[6:]})", t
    )
    if options.views:
        inside = np.zeros(size, bool)
        if a.elements is None:
            a.elements = np.zeros(size, bool)
        if all(shape):
            offset = t.storage_offset() * t.element_size()
            item = t.element_size()
            for byte in range(item):
                view = np.lib.stride_tricks.as_strided(
                    inside[offset + byte :], tuple(shape), [s * item for s in strides]
                )
                view[...] = True
        a.elements |= inside


def run(loaded: Function, grid, values, tensors, metadata, num_ctas=1) -> None:
    """Execute a grid."""
    if num_ctas != 1:
        raise NotImplementedError("clusters of CTAs")
    if not (0 < grid[0] < 2**31 and 0 < grid[1] < 2**16 and 0 < grid[2] < 2**16):
        raise RuntimeError(f"Triton Error [CUDA]: invalid argument: a grid of {grid}")
    started = time.perf_counter()
    options = OPTIONS
    program = loaded.program
    kernel = program.kernel
    threads = kernel.threads or 32 * metadata.num_warps
    if threads > 1024:
        raise RuntimeError(f"Triton Error [CUDA]: invalid argument: {threads} threads")
    memory = GlobalMemory()
    for number, t in enumerate(tensors):
        if isinstance(t, torch.Tensor) or hasattr(t, "base"):
            _register_tensor(memory, t, number, options)
    total = grid[0] * grid[1] * grid[2]
    scratch = []
    extra = []
    for what in ("global", "profile"):
        size = getattr(metadata, f"{what}_scratch_size", 0) or 0
        if size:
            buffer = np.zeros(size * total + 256, np.uint8)
            at = -(-buffer.ctypes.data // 128) * 128
            memory.register(at, size * total, f"{what} scratch", buffer)
            scratch.append(buffer)
            extra.append(("*u8", at))
        else:
            extra.append(("*u8", None))
    packed = [_pack(kind, value) for kind, value in (*values, *extra)]
    if len(packed) != len(kernel.params):
        raise RuntimeError(
            f"{kernel.name} has {len(kernel.params)} parameters, {len(packed)} arguments were given"
        )
    end = kernel.params[-1].offset + kernel.params[-1].size if kernel.params else 0
    block = _below_4_gib(end + 256)
    origin = -(-block.ctypes.data // 128) * 128
    memory.register(origin, max(end, 1), "parameters", block, writable=False)
    params, symbols = {}, {}
    for p, raw in zip(kernel.params, packed, strict=True):
        if len(raw) != p.size:
            raise RuntimeError(f"{kernel.name}: {p.name} has {p.size} bytes, {len(raw)} were given")
        at = origin - block.ctypes.data + p.offset
        block[at : at + p.size] = np.frombuffer(raw, np.uint8)
        params[p.name] = raw
        symbols[p.name] = origin + p.offset
    constants = []
    for name, data in kernel.globals.items():
        buffer = np.frombuffer(data + bytes(64), np.uint8).copy()
        constants.append(buffer)
        memory.register(buffer.ctypes.data, len(data), name, buffer)
        symbols[name] = buffer.ctypes.data
    dynamic = loaded.shared
    limit = MAX_SHARED.get(int("".join(c for c in kernel.target if c.isdigit()) or 80), 227 << 10)
    if dynamic > limit:
        raise triton.runtime.errors.OutOfResources(dynamic, limit, "shared memory")
    ctas = [(x, y, z) for z, y, x in itertools.product(*(range(g) for g in reversed(grid)))]
    ctas = [ctas[place] for place in sample(len(ctas), options.ctas)]
    if options.reverse:
        ctas.reverse()
    batch = max(1, options.lanes // threads)
    counters = Counters(kernel, threads) if options.count else None
    for first in range(0, len(ctas), batch):
        machine = Machine(
            program,
            memory,
            params,
            symbols,
            grid,
            ctas[first : first + batch],
            threads,
            dynamic,
            options,
            counters,
        )
        machine.run()
    seconds = time.perf_counter() - started
    LAUNCHES.log.append(
        {
            "kernel": kernel.name,
            "grid": grid,
            "ctas": len(ctas),
            "threads": threads,
            "seconds": seconds,
            "shared": dynamic,
            "counters": counters.summary() if counters else None,
        }
    )


class EmulatedDriver:
    """What triton.runtime.driver.set_active takes."""

    def __init__(self, arch: int = 90):
        self.target = GPUTarget("cuda", arch, 32)
        self.utils = Utils(self.target)
        self.launcher_cls = Launcher

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"emulated:{self.target.arch}"

    def set_current_device(self, device) -> None:
        pass

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_device_capability(self, device=None):
        return divmod(self.target.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return SimpleNamespace(synchronize=lambda: None, current_device=lambda: 0)

    def map_python_to_cpp_type(self, ty: str) -> str:
        return nvidia.ty_to_cpp(ty)

    def get_benchmarker(self):
        raise NotImplementedError("times of an emulator mean nothing")


_assembles = [False]


def _without_ptxas() -> None:
    """Compile to PTX only: ptxas takes seconds a kernel and nothing here runs machine code."""
    if _assembles[0]:
        return
    _assembles[0] = True
    backend = nvidia_compiler.CUDABackend
    init, add_stages, digest = backend.__init__, backend.add_stages, backend.hash

    def __init__(self, target):
        init(self, target)
        self.binary_ext = "ptx"

    def stages(self, stages, options, language):
        add_stages(self, stages, options, language)
        stages.pop("cubin", None)

    def hash(self):
        return digest(self) + "-ptx"

    backend.__init__, backend.add_stages, backend.hash = __init__, stages, hash


def install(arch: int = 90, **options) -> EmulatedDriver:
    """Make the emulator Triton's driver in this process. Options are those of ``checks.Options``."""
    _without_ptxas()
    configure(**options)
    driver = EmulatedDriver(arch)
    triton.runtime.driver.set_active(driver)
    return driver


def configure(**options) -> None:
    for name, value in options.items():
        if not hasattr(OPTIONS, name):
            raise TypeError(f"no option {name}")
        setattr(OPTIONS, name, value)
