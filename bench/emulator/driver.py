"""The emulator as Triton's driver: kernels run on CPU tensors, from the PTX that Triton emits."""

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import triton

from kernels import device
from kernels._private import GPUTarget

from .._private import parameters_of_descriptor, stop_at_ptx
from . import launch
from .checks import OPTIONS
from .launch import Argument, Function

Rewrite = Callable[[str], str]


class Utils:
    """What Triton asks of a driver's module in C. Kernels that it has loaded it keeps from one
    driver to the next, so that they are the process's.
    """

    functions: ClassVar[dict[int, Function]] = {}  # by handle
    handles: ClassVar[Iterator[int]] = itertools.count(1)
    rewrite: ClassVar[Rewrite | None] = None

    def __init__(self, target: GPUTarget):
        self.target = target

    def load_binary(self, name: str, binary: bytes | str, shared: int, device: Any) -> tuple:
        text = binary.decode() if isinstance(binary, bytes) else binary
        if Utils.rewrite is not None:
            text = Utils.rewrite(text)
        handle = next(self.handles)
        self.functions[handle] = Function(name, text, shared)
        return handle, handle, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: int) -> None:
        self.functions.pop(module, None)

    def get_device_properties(self, index: Any) -> dict[str, int]:
        return {
            "max_shared_mem": device.typical(self.target).shared_memory,
            "max_num_regs": 65536,
            "multiprocessor_count": OPTIONS.multiprocessors,
            "warpSize": 32,
        }

    fill_tma_descriptor = staticmethod(launch.tensor_map)
    fill_tma_descriptor_tiled = staticmethod(launch.tensor_map)  # its name in Triton 3.9


def rewrite_by(function: Rewrite | None) -> None:
    """Apply a function to the PTX of kernels that are loaded from now on: tests break some so."""
    Utils.rewrite = function


class Launcher:
    """Takes a launch's arguments apart as CudaLauncher does, then runs the grid."""

    def __init__(self, src: Any, metadata: Any):
        self.metadata = metadata
        self.kinds = list(src.signature.values())
        self.tensordesc_meta = getattr(metadata, "tensordesc_meta", None)

    def __call__(self, gx: int, gy: int, gz: int, stream: int, function: int, *rest: Any) -> None:
        _, launch_metadata, enter, leave, *args = rest
        if enter is not None:
            enter(launch_metadata)
        values: list[Argument] = []
        tensors: list[Any] = []
        descriptions = iter(self.tensordesc_meta or ())
        for kind, value in zip(self.kinds, args, strict=True):
            self._flatten(kind, value, values, tensors, descriptions)
        launch.run(Utils.functions[function], (gx, gy, gz), values, tensors, self.metadata)
        if leave is not None:
            leave(launch_metadata)

    def _flatten(
        self, kind: Any, value: Any, values: list[Argument], tensors: list[Any], descriptions: Any
    ) -> None:
        """Add an argument to the kernel's parameters, and to the tensors it may touch."""
        if isinstance(kind, tuple):
            for k, v in zip(kind, value, strict=True):
                self._flatten(k, v, values, tensors, descriptions)
        elif kind.startswith("tensordesc"):
            tensors.append(value)
            values += parameters_of_descriptor(kind, value, next(descriptions, None))
        elif kind != "constexpr":
            if kind[0] == "*" and hasattr(value, "data_ptr"):
                tensors.append(value)
            values.append((kind, value))


class EmulatedDriver:
    """What triton.runtime.driver.set_active takes."""

    launcher_cls = Launcher

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)
        self.utils = Utils(self.target)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"emulated:{self.target.arch}"

    def set_current_device(self, device: Any) -> None:
        """There is one."""

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return SimpleNamespace(synchronize=lambda: None, current_device=lambda: 0)

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("times of an emulator mean nothing")


def install(arch: int = 90, **options: Any) -> EmulatedDriver:
    """Make the emulator Triton's driver in this process. Options: those of ``checks.Options``."""
    stop_at_ptx()
    configure(**options)
    driver = EmulatedDriver(arch)
    triton.runtime.driver.set_active(driver)  # type: ignore[arg-type]  it need not be a DriverBase
    return driver


def configure(**options: Any) -> None:
    for name, value in options.items():
        if not hasattr(OPTIONS, name):
            raise TypeError(f"no option {name}")
        setattr(OPTIONS, name, value)
