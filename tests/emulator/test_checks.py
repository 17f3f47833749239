"""The checkers find what is broken on purpose, and nothing in what is right."""

import re
from contextlib import suppress

import handmade
import known_kernels as kernels
import pytest
import torch
from emulated import ARCH
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.emulator import checks, driver

hopper = pytest.mark.skipif(ARCH < 90, reason="needs TMA")
MODES = ["eager", "lazy", "both"]


def kinds() -> set[str]:
    return {r.kind for r in checks.FINDINGS}


def found(body: str, planted: bool, **size: int) -> set[str]:
    """Kinds of findings in a kernel written in PTX."""
    with suppress(checks.Fault):
        handmade.run(body, planted, ARCH, **size)
    return kinds()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [*handmade.WARPS, *handmade.MBARRIERS])
def test_planted_fault(case, mode):
    kind, body = {**handmade.WARPS, **handmade.MBARRIERS}[case]
    driver.configure(mode=mode)
    assert not found(body, planted=False)
    assert kind in found(body, planted=True)


@hopper
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", handmade.PRODUCTS)
def test_planted_fault_of_a_product(case, mode):
    kind, body = handmade.PRODUCTS[case]
    driver.configure(mode=mode)
    assert found(body, planted=False, threads=128) == set()
    assert kind in found(body, planted=True, threads=128)


def test_race_names_both_instructions():
    handmade.run(handmade.WARPS["barrier"][1], True, ARCH)
    (race,) = (str(r) for r in checks.FINDINGS if r.kind == "race")
    assert "st.shared.b32" in race
    assert "ld.shared.b32" in race


def test_unknown_instruction():
    with pytest.raises(Exception, match="frobnicate"):
        handmade.run("frobnicate.b32 %r9, %r1;", False, ARCH)


def test_a_kernel_that_is_unloaded_is_forgotten():
    utils = driver.EmulatedDriver(ARCH).utils
    module, function, *_ = utils.load_binary("sample", "", 0, 0)
    assert function in utils.functions
    utils.unload_module(module)
    assert function not in utils.functions


@pytest.mark.parametrize(
    ("body", "threads"),
    [
        (handmade.WARPS["copy, not waited for"][1], 64),
        pytest.param(handmade.PRODUCTS["wait"][1], 128, marks=hopper),
    ],
)
def test_eager_and_lazy_runs_differ(body, threads):
    """Threads read what a copy or a product may or may not have written; nothing else is looked
    at.
    """
    driver.configure(mode="both", races=False)
    assert not found(body, planted=False, threads=threads)
    assert "eager and lazy runs differ" in found(body, planted=True, threads=threads)


# Kernels of Triton with edits of their PTX


def tensor_product(programs: int, K: int, stages: int):
    """(a, b, c) of a product by TMA and wgmma of 128 x 128 numbers."""
    a, b = torch.randn(128, K).half(), torch.randn(128, K).half()
    c = torch.full((128, 128), float("nan"), dtype=torch.float16)
    # A kernel that is broken must not be found in Triton's cache of loaded ones.
    kernels.tensor_matmul.device_caches.clear()
    operands = (
        TensorDescriptor.from_tensor(a, [64, 64]),
        TensorDescriptor.from_tensor(b, [128, 64]),
        TensorDescriptor.from_tensor(c, [64, 128]),
    )
    blocks = {"BM": 64, "BN": 128, "BK": 64, "TB": True, "num_stages": stages}
    kernels.tensor_matmul[(programs,)](*operands, 128, 128, K, **blocks)
    return a, b, c


def tensor_matmul(mode="eager", **options):
    """Relative error of a product by TMA and wgmma."""
    driver.configure(mode=mode, **options)
    a, b, c = tensor_product(2, 320, 3)
    right = a.double() @ b.double().T
    return ((c.double() - right).norm() / right.norm()).item()


def pointer_matmul(mode="eager", **options):
    """Relative error of a product by cp.async."""
    driver.configure(mode=mode, **options)
    M, N, K = 128, 128, 320
    a, b = torch.randn(M, K).half(), torch.randn(K, N).half()
    c = torch.full((M, N), float("nan"), dtype=torch.float16)
    kernels.matmul.device_caches.clear()
    strides = *a.stride(), *b.stride(), *c.stride()
    blocks = {"BM": 64, "BN": 64, "BK": 64, "G": 2, "P": "ieee", "num_stages": 3}
    kernels.matmul[(4,)](a, b, c, M, N, K, *strides, **blocks)
    right = a.double() @ b.double()
    return ((c.double() - right).norm() / right.norm()).item()


def edit(pattern: str, new: str = "", count: int = 0) -> None:
    """Kernels loaded from now on have what matches replaced."""

    def rewrite(text):
        text, times = re.subn(pattern, new, text, count=count, flags=re.M)
        assert times, pattern
        return text

    driver.rewrite_by(rewrite)


PRODUCTS = [tensor_matmul, pointer_matmul] if ARCH >= 90 else [pointer_matmul]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_right_product_has_no_findings(product, mode):
    assert product(mode, views=True, owners=True) < 1e-3
    assert not kinds()


@hopper
@pytest.mark.parametrize("mode", MODES)
def test_missing_wait_for_a_tensor_load(mode):
    edit(r"mbarrier\.try_wait\S*\s+(\S+),\s*\[[^\]]*\],[^;]*;", r"setp.eq.u32 \1, 0, 0;")
    with suppress(checks.Fault):  # the ring's next load arrives at a barrier that is not done
        tensor_matmul(mode)
    assert "asynchronous hazard" in kinds()


TENSOR_FAULTS = {
    "no wait for products": (r"^\s*wgmma\.wait_group.*$", "", "asynchronous hazard"),
    "no proxy fence": (r"^\s*fence\.proxy\.async.*$", "", "missing proxy fence"),
    "no wait for stores": (r"^.*cp\.async\.bulk\.wait_group.*$", "", "bulk store not waited for"),
    "no barriers initialised": (r"^.*mbarrier\.init.*$", "", "stopped"),
    "more bytes expected": (r"(expect_tx\S*\s+_,\s*\[[^\]]*\],\s*)(\d+);", r"\g<1>1\2;", "stopped"),
}


@hopper
@pytest.mark.parametrize("case", TENSOR_FAULTS)
def test_planted_fault_of_a_tensor_product(case):
    pattern, new, kind = TENSOR_FAULTS[case]
    edit(pattern, new)
    if kind == "stopped":
        with pytest.raises(checks.Fault, match=r"deadlock|not initialised"):
            tensor_matmul()
    else:
        tensor_matmul()
        assert kind in kinds()


@hopper
def test_eager_and_lazy_runs_of_a_tensor_product_differ():
    """What is stored has not been waited for; nothing else is looked at."""
    tensor_matmul("both", races=False)
    assert not kinds()
    edit(r"^\s*wgmma\.wait_group.*$")
    tensor_matmul("both", races=False)
    assert kinds() == {"eager and lazy runs differ", "wgmma not waited for"}


@hopper
def test_tensor_store_that_is_overwritten():
    """The ring of a persistent kernel's stores: the next tile is written into what one reads."""
    edit(r"^.*cp\.async\.bulk\.wait_group.*$")
    tensor_product(1, 64, 2)
    assert "asynchronous hazard" in kinds()


@hopper
def test_wrong_descriptor_is_a_wrong_result():
    """Each matrix of A or B begins 16 bytes later."""
    edit(r"^(\s*wgmma\.mma_async.*?\}, )(%rd\d+), ", r"add.s64 \2, \2, 1;\n\1\2, ")
    with suppress(checks.Fault):  # the last matrix reaches outside shared memory
        assert not tensor_matmul() < 1e-3


@pytest.mark.parametrize("pattern", [r"^\s*cp\.async\.wait_group.*$", r"wait_group\s+\d+;"])
def test_missing_or_late_wait_for_cp_async(pattern):
    edit(pattern, "wait_group 3;" if pattern.startswith("wait") else "")
    pointer_matmul()
    assert "asynchronous hazard" in kinds()
    assert not pointer_matmul("lazy") < 1e-3


@hopper
def test_fences_of_cp_async_by_the_letter():
    edit(r"fence\.proxy\.async\S*;")
    pointer_matmul(strict=False)
    assert not kinds()
    pointer_matmul(strict=True)
    assert kinds() == {"missing proxy fence of cp.async"}


# Global memory


def test_bounds_are_those_of_storages():
    x, o = torch.randn(1000), torch.zeros(4096)
    kernels.add[(4,)](x, x, o, 4000, B=1024)
    assert kinds() == {"global read out of bounds"}


def test_read_outside_the_view():
    whole = torch.randn(2048)
    x, o = whole[:1000], torch.zeros(2048)
    kernels.add[(2,)](x, x, o, 2000, B=1024)
    assert not kinds()
    driver.configure(views=True)
    kernels.add[(2,)](x, x, o, 2000, B=1024)
    assert kinds() == {"global read outside the tensor's view"}


def test_ctas_that_write_one_place():
    driver.configure(owners=True)
    x, o = torch.randn(4096), torch.zeros(4096)
    kernels.add[(4,)](x, x, o, 4096, B=1024)
    assert not kinds()
    kernels.overlap[(2,)](x, o, B=1024)
    assert kinds() == {"race of CTAs"}


def test_device_assertion():
    x = torch.zeros(32)
    kernels.check[(1,)](x, 1.0, B=32, debug=True)
    with pytest.raises(checks.Fault, match="assertion failed: too large"):
        kernels.check[(1,)](x, -1.0, B=32, debug=True)


# Tensor maps


@hopper
def test_tensor_map_is_checked_as_by_the_driver():
    a, b = torch.randn(64, 64), torch.zeros(64, 64)
    d = TensorDescriptor.from_tensor(a, [32, 32])
    d.strides = [63, 1]
    with pytest.raises(RuntimeError, match="tensor map"):
        kernels.copy_box[(1,)](d, TensorDescriptor.from_tensor(b, [32, 32]), 0, 0, BX=32, BY=32)


@hopper
@pytest.mark.parametrize(("x", "y"), [(0, 0), (-5, 3), (40, -7), (100, 0), (50, 60)])
def test_boxes_outside_a_tensor_are_zero(x, y):
    a, b = torch.randn(60, 64), torch.full((32, 32), 7.0)
    box = TensorDescriptor.from_tensor(a, [32, 32]), TensorDescriptor.from_tensor(b, [32, 32])
    kernels.copy_box[(1,)](*box, x, y, BX=32, BY=32)
    right = torch.zeros(32, 32)
    for i in range(32):
        for j in range(32):
            if 0 <= x + i < 60 and 0 <= y + j < 64:
                right[i, j] = a[x + i, y + j]
    assert torch.equal(b, right)
    assert not kinds()


@hopper
def test_tensor_map_beyond_the_storage():
    a, b = torch.randn(64, 64), torch.zeros(32, 32)
    d = TensorDescriptor.from_tensor(a, [32, 32])
    d.shape = [128, 64]
    kernels.copy_box[(1,)](d, TensorDescriptor.from_tensor(b, [32, 32]), 48, 0, BX=32, BY=32)
    assert kinds() == {"global read out of bounds"}


def copy(a: TensorDescriptor, b: TensorDescriptor, programs: int = 1) -> set[str]:
    """Kinds of findings in copying a box of 32 x 32."""
    kernels.copy_box[(programs,)](a, b, 0, 0, BX=32, BY=32)
    return kinds()


@hopper
def test_tensor_store_beyond_the_storage():
    a, b = torch.randn(32, 32), torch.zeros(16, 32)
    boxes = [TensorDescriptor(t, [32, 32], [32, 1], [32, 32]) for t in (a, b)]
    assert copy(boxes[0], boxes[0]) == set()
    assert copy(*boxes) == {"global write out of bounds"}


@hopper
def test_ctas_that_write_one_box():
    driver.configure(owners=True)
    boxes = [TensorDescriptor.from_tensor(torch.zeros(32, 32), [32, 32]) for _ in range(2)]
    assert copy(*boxes) == set()
    assert copy(*boxes, programs=2) == {"race of CTAs"}
