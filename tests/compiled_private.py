"""What is counted on in Triton's compiler and driver: a process of its own, with no interpreter.

The last line that it prints is JSON: what is wrong for each name in ``CHECKS``, or nothing.
"""

import json
import sys
import tempfile
import traceback
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import _private as bench_private
from bench import compiled
from kernels import _private

HOPPER = _private.GPUTarget("cuda", 90, 32)
AMPERE = _private.GPUTarget("cuda", 80, 32)


@triton.jit
def double(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    if _private.cuda_capability_geq(9, 0):
        x += x
    else:
        x = x * 2 + 1
    tl.store(x_ptr + i, x, mask=i < n)


@triton.jit
def add_up(x_ptr, sizes):
    tl.store(x_ptr, sizes[0] + sizes[1][0] + sizes[1][1])


@triton.jit
def wrong(x_ptr):
    x = tl.load(x_ptr)
    y = tl.inline_asm_elementwise("frobnicate $0, $1;", "=r,r", [x], tl.int32, True, 1)
    tl.store(x_ptr, y)


@triton.jit
def transpose_box(x, y, N: tl.constexpr):
    y.store([0, 0], x.load([0, 0]).trans())


def compile_(target: _private.GPUTarget, block: int = 64):
    x = torch.empty(100, dtype=torch.int32, device="meta")
    with _private.without_gpu(target):
        return double.warmup(x, 100, BLOCK=block, grid=(1,))


def kernels_compile_without_a_gpu():
    active = triton.runtime.driver._active
    for target in (HOPPER, AMPERE):
        kernel = compile_(target)
        assert kernel.asm["cubin"][:4] == b"\x7fELF"
        assert f".target sm_{target.arch}" in kernel.asm["ptx"], kernel.asm["ptx"]
        assert kernel.metadata.target == target
    amd = compile_(_private.GPUTarget("hip", "gfx942", 64))
    assert ".amdgcn_target" in amd.asm["amdgcn"]
    assert triton.runtime.driver._active is active


def jitted_code_asks_for_the_capability():
    assert "add" in compile_(HOPPER).asm["ttir"]
    texts = [compile_(target).asm["ttir"] for target in (HOPPER, AMPERE)]
    assert ["arith.muli" in text.split("tt.load")[1] for text in texts] == [False, True]


def ptxas_failing_is_an_error_of_its_own():
    with _private.without_gpu(HOPPER):
        try:
            wrong.warmup(torch.empty(1, dtype=torch.int32, device="meta"), grid=(1,))
        except _private.PTXASError:
            return
    raise AssertionError("it compiled")


def compilations_are_told():
    told: list[bench_private.Compilation] = []
    knobs = triton.knobs
    with knobs.compilation.scope(), knobs.cache.scope(), tempfile.TemporaryDirectory() as folder:
        knobs.cache.dir = folder
        bench_private.listen(told.append)
        first = compile_(HOPPER, 128)
        double.device_caches.clear()
        compile_(HOPPER, 128)
    assert [c.cached for c in told] == [False, True]
    assert {c.hash for c in told} == {first.hash}
    assert 0.001 < told[0].seconds < 600


def compilations_are_intercepted():
    names: list[str] = []
    taken: dict[str, object] = {}
    known = False

    def is_known(name: str) -> bool:
        names.append(name)
        return known

    with bench_private.intercepted(is_known, taken.__setitem__):
        kernel = compile_(HOPPER, 256)
        assert list(taken.values()) == [kernel]
        assert compile_(HOPPER, 256) is not kernel  # none was kept, so it is made again
        known = True
        assert compile_(HOPPER, 256) is None
        assert compile_(HOPPER, 512) is None
    assert names[0] == names[1] == names[2] != names[3]
    assert len(taken) == 1
    assert compile_(HOPPER, 256) is not None
    assert len(names) == 4


def names_tell_how_integers_are_specialized():
    names: list[str] = []

    def is_known(name: str) -> bool:
        names.append(name)
        return True

    x = torch.empty(100, dtype=torch.int32, device="meta")
    with bench_private.intercepted(is_known, {}.__setitem__), _private.without_gpu(HOPPER):
        for tensor, n, block in ((x, 100, 64), (x, 1, 64), (x, 16, 64), (x, 100, 1)):
            double.warmup(tensor, n, BLOCK=block, grid=(1,))
        double.warmup(x[1:], 100, BLOCK=64, grid=(1,))
        double.warmup(x.float(), 100, BLOCK=64, grid=(1,))
        double.warmup(x, 100, BLOCK=64, num_warps=8, grid=(1,))
        add_up.warmup(x, (100, (1, 16)), grid=(1,))
        add_up.warmup(x, (16, (100, 1)), grid=(1,))
    assert len(set(names)) == 9
    alike = [bench_private.unspecialized(name) for name in names]
    assert len(set(alike[:3])) == 1
    assert alike[7] == alike[8]
    assert len(set(alike)) == 6  # another block, alignment, type, option or kernel


def a_kernel_knows_its_module():
    assert bench_private.module_of(compile_(HOPPER)) == __name__


def tools_read_machine_code():
    kernel = compile_(HOPPER)
    assert compiled.usage(kernel).registers > 0
    opcodes = [opcode.partition(".")[0] for opcode in compiled.accesses(kernel)]
    assert set(opcodes) == {"LDG", "STG"}


def launchers_are_made_of_a_source_and_metadata():
    from triton.backends.nvidia import driver

    arguments = driver.CudaLauncher.__init__.__code__.co_varnames
    assert arguments[:3] == ("self", "src", "metadata")


def descriptors_expand_and_compilation_stops_at_ptx():
    """Last, as the process is the emulator's from here on."""
    from bench import emulator

    for arch in ("sm_80", "sm_90"):
        emulator.install(arch)
        x, y = torch.arange(256.0).reshape(16, 16), torch.zeros(16, 16)
        boxes = [TensorDescriptor(t, [16, 16], [16, 1], [16, 16]) for t in (x, y)]
        kernel = transpose_box[(1,)](*boxes, 16)
        assert torch.equal(y, x.T)
        assert "cubin" not in kernel.asm
        assert ("cp.async.bulk.tensor" in str(kernel.asm["ptx"])) is (arch == "sm_90")
        assert not emulator.findings()


_CHECKS: tuple[Callable[[], None], ...] = (
    kernels_compile_without_a_gpu,
    jitted_code_asks_for_the_capability,
    ptxas_failing_is_an_error_of_its_own,
    compilations_are_told,
    compilations_are_intercepted,
    names_tell_how_integers_are_specialized,
    a_kernel_knows_its_module,
    tools_read_machine_code,
    launchers_are_made_of_a_source_and_metadata,
    descriptors_expand_and_compilation_stops_at_ptx,
)
CHECKS = [check.__name__ for check in _CHECKS]


def outcome(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    found = {check.__name__: outcome(check) for check in _CHECKS}
    sys.stdout.write("\n" + json.dumps(found))  # after what Triton prints of a failure
