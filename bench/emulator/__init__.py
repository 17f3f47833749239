"""Executes on CPU tensors the code that Triton compiles for NVIDIA's GPUs: PTX, emulated.

``install("sm_90")`` makes the emulator Triton's driver and the library's launch mode. Kernels then
run as they are compiled, and what is wrong with their accesses is kept as findings: a report for
each instruction and kind, with the CTA and thread that met it first. A test that caused one fails
if it ends like this::

    emulator.clear()
    ...
    assert not emulator.findings()

What cannot go on (a deadlock, a trap) raises ``checks.Fault``, what is not known in the PTX raises
``parser.PTXError``; both name the instruction and its line. ``LAUNCHES`` has an entry a launch.
"""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from kernels import device
from kernels._private import GPUTarget

from . import driver
from .checks import FINDINGS as FINDINGS
from .checks import Report
from .driver import configure as configure
from .launch import LAUNCHES as LAUNCHES

_forever = ExitStack()


def install(arch: str = "sm_90", multiprocessors: int = 132, **options: Any) -> device.Device:
    """Let the library's operators on CPU tensors run as on such a GPU, from here to the end of the
    process. Options are those of ``checks.Options``. Returns the GPU as the planner sees it.
    """
    number = int(arch.removeprefix("sm_"))
    driver.install(number, multiprocessors=multiprocessors, **options)
    target = GPUTarget("cuda", number, 32)
    stand_in = replace(device.typical(target), multiprocessors=multiprocessors)
    _forever.enter_context(device.emulate(stand_in))
    return stand_in


def findings() -> list[Report]:
    """What launches have found since the last ``clear``."""
    return list(FINDINGS)


def clear() -> None:
    """Forget what launches have found and done."""
    FINDINGS.clear()
    LAUNCHES.clear()
