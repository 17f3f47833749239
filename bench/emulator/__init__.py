"""Executes on CPU tensors the code that Triton compiles for NVIDIA's GPUs: PTX, emulated.

``install("sm_90")`` makes the emulator Triton's driver and the library's launch mode.
"""

from contextlib import ExitStack
from dataclasses import replace

from triton.backends.compiler import GPUTarget

from kernels import device

from . import driver

_forever = ExitStack()


def install(arch: str = "sm_90", multiprocessors: int = 132, **options: object) -> device.Device:
    """Let the library's operators on CPU tensors run as on such a GPU, from here to the end of the
    process. Options are those of ``checks.Options``. Returns the GPU as the planner sees it.
    """
    number = int(arch.removeprefix("sm_"))
    driver.install(number, multiprocessors=multiprocessors, **options)
    target = GPUTarget("cuda", number, 32)
    stand_in = replace(device.typical(target), multiprocessors=multiprocessors)
    _forever.enter_context(device.emulate(stand_in))
    return stand_in
