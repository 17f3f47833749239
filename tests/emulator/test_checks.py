"""The checkers find what is broken on purpose, and nothing in what is right."""

import re

import known_kernels as kernels
import pytest
import torch
from emulated import ARCH
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.emulator import checks, driver

hopper = pytest.mark.skipif(ARCH < 90, reason="needs TMA")


def tensor_matmul(mode="eager", **options):
    driver.configure(mode=mode, **options)
    M, N, K = 128, 128, 320
    a, b = torch.randn(M, K).half(), torch.randn(N, K).half()
    c = torch.full((M, N), float("nan"), dtype=torch.float16)
    # A kernel that is broken must not be found in Triton's cache of loaded ones.
    kernels.tensor_matmul.device_caches.clear()
    kernels.tensor_matmul[(2,)](
        TensorDescriptor.from_tensor(a, [64, 64]),
        TensorDescriptor.from_tensor(b, [128, 64]),
        TensorDescriptor.from_tensor(c, [64, 128]),
        M,
        N,
        K,
        BM=64,
        BN=128,
        BK=64,
        TB=True,
        num_stages=3,
    )
    right = a.double() @ b.double().T
    return ((c.double() - right).norm() / right.norm()).item()


def pointer_matmul(mode="eager", **options):
    driver.configure(mode=mode, **options)
    M, N, K = 128, 128, 320
    a, b = torch.randn(M, K).half(), torch.randn(K, N).half()
    c = torch.full((M, N), float("nan"), dtype=torch.float16)
    kernels.matmul.device_caches.clear()
    kernels.matmul[(4,)](
        a,
        b,
        c,
        M,
        N,
        K,
        *a.stride(),
        *b.stride(),
        *c.stride(),
        BM=64,
        BN=64,
        BK=64,
        G=2,
        P="ieee",
        num_stages=3,
    )
    right = a.double() @ b.double()
    return ((c.double() - right).norm() / right.norm()).item()


def exchange(**options):
    driver.configure(**options)
    x = torch.randn(64, 32)
    o = torch.zeros(32, 64)
    kernels.exchange.device_caches.clear()
    kernels.exchange[(1,)](x, o, M=64, N=32)
    return (o - x.T).abs().max().item()


def kinds():
    return {r.kind for r in checks.FINDINGS}


def without(pattern, count=0):
    def rewrite(text):
        new, found = re.subn(pattern, "", text, count=count, flags=re.M)
        assert found, pattern
        return new

    driver.rewrite_by(rewrite)


@hopper
@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_right_tensor_matmul_has_no_findings(mode):
    assert tensor_matmul(mode, races=True, views=True) < 1e-3
    assert not list(checks.FINDINGS)


@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_right_pointer_matmul_has_no_findings(mode):
    assert pointer_matmul(mode, races=True, views=True) < 1e-3
    assert not list(checks.FINDINGS)


def test_right_exchange_has_no_findings():
    assert exchange(races=True) == 0
    assert not list(checks.FINDINGS)


WAIT = r"^\{\n\s*\.reg \.pred complete;\n\s*waitLoop:\n.*\n.*\n\}\n"


@hopper
@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_missing_wait_for_a_tensor_load(mode):
    without(WAIT)
    try:
        error = tensor_matmul(mode)
        assert mode == "eager" or not error < 1e-3
    except checks.Fault as fault:  # the ring's next load arrives at a barrier that is not done
        assert mode == "lazy" and "arrivals" in str(fault)
    assert mode == "lazy" or "asynchronous hazard" in kinds()


@hopper
def test_missing_wait_for_products():
    """The last wait of the loop gone, the ring's next load may overwrite what wgmma still reads."""
    without(r"^\s*wgmma\.wait_group.*$")
    tensor_matmul()
    assert kinds() & {"asynchronous hazard", "wgmma not waited for"}


@hopper
def test_missing_proxy_fence_before_a_tensor_store():
    without(r"^\s*fence\.proxy\.async.*$")
    tensor_matmul()
    assert "missing proxy fence" in kinds()


@hopper
def test_missing_wait_for_a_tensor_store():
    without(r"^\s*cp\.async\.bulk\.wait_group.*$")
    tensor_matmul()
    assert "bulk store not waited for" in kinds() or "asynchronous hazard" in kinds()


@hopper
def test_wrong_parity_is_a_deadlock_or_a_hazard():
    def rewrite(text):
        return re.sub(r"(try_wait\.parity\S* complete, \[%r\d+\]), %r\d+;", r"\1, 1;", text)

    driver.rewrite_by(rewrite)
    try:
        tensor_matmul("lazy")
    except checks.Fault as fault:
        assert "deadlock" in str(fault) or "arrivals" in str(fault)
    assert list(checks.FINDINGS)


@hopper
def test_wrong_expected_bytes_is_a_deadlock():
    def rewrite(text):
        return re.sub(
            r"(expect_tx\S* _, \[%r\d+\]), (\d+);", lambda m: f"{m[1]}, {int(m[2]) + 16};", text
        )

    driver.rewrite_by(rewrite)
    with pytest.raises(checks.Fault, match="deadlock"):
        tensor_matmul()


@hopper
def test_uninitialised_barrier():
    without(r"^.*mbarrier\.init.*$")
    with pytest.raises(checks.Fault, match="not initialised"):
        tensor_matmul()


@hopper
def test_wrong_descriptor_is_a_wrong_result():
    """K advances by 32 bytes in a swizzled row; by 48 it is another part of the operand."""

    def rewrite(text):
        new, n = re.subn(r"(\d{16,})", lambda m: str(int(m[1]) + (int(m[1]) & 2) // 2), text)
        assert n
        return new

    driver.rewrite_by(rewrite)
    try:
        assert not tensor_matmul() < 1e-3
    except checks.Fault as fault:
        assert "outside shared memory" in str(fault)


def test_missing_wait_for_cp_async():
    without(r"^\s*cp\.async\.wait_group.*$")
    pointer_matmul()
    assert "asynchronous hazard" in kinds()
    checks.FINDINGS.clear()
    assert not pointer_matmul("lazy") < 1e-3


def test_too_late_a_wait_for_cp_async():
    def rewrite(text):
        return re.sub(r"cp\.async\.wait_group\s+\d+;", "cp.async.wait_group 3;", text)

    driver.rewrite_by(rewrite)
    pointer_matmul()
    assert "asynchronous hazard" in kinds()


def test_missing_barrier_is_a_race():
    without(r"^\s*bar\.sync\s+0;")
    exchange(races=True)
    assert "race" in kinds()


def test_uninitialised_shared_memory():
    without(r"^.*(st\.shared|stmatrix).*$", count=1)
    exchange()
    assert "uninitialised shared memory" in kinds()


def test_conflicting_shared_writes():
    def rewrite(text):
        return re.sub(r"(st\.shared\S*\s+)\[%r\d+(?:\+\d+)?\]", r"\1[global_smem]", text)

    driver.rewrite_by(rewrite)
    exchange()
    assert "conflicting shared writes" in kinds()


def test_shared_memory_out_of_bounds():
    def rewrite(text):
        return re.sub(r"(ld\.shared\S*\s+[^\[]*)\[(%r\d+)(?:\+\d+)?\]", r"\1[\2+131072]", text)

    driver.rewrite_by(rewrite)
    with pytest.raises(checks.Fault, match="out of bounds"):
        exchange()


def test_global_read_out_of_bounds():
    x, o = torch.randn(1000), torch.zeros(4096)
    kernels.add[(4,)](x, x, o, 4000, B=1024)
    assert "global read out of bounds" in kinds()


def test_global_write_out_of_bounds():
    x, o = torch.randn(4096), torch.zeros(1000)
    kernels.add[(4,)](x, x, o, 4000, B=1024)
    assert "global write out of bounds" in kinds()


def test_read_outside_the_view():
    whole = torch.randn(2048)
    x, o = whole[:1000], torch.zeros(2048)
    kernels.add[(2,)](x, x, o, 2000, B=1024)
    assert not checks.FINDINGS
    driver.configure(views=True)
    kernels.add[(2,)](x, x, o, 2000, B=1024)
    assert "global read outside the tensor's view" in kinds()


def test_misaligned_access():
    kernels.add.device_caches.clear()
    x, o = torch.randn(4096), torch.zeros(4096)
    kernels.add[(1,)](x, x, o, 1024, B=1024)

    def rewrite(text):
        assert "v4" in text
        return text.replace("ld.global.v4.b32", "ld.global.v4.b32").replace("+ 0 ]", "+ 4 ]")

    kernels.add.device_caches.clear()
    driver.rewrite_by(rewrite)
    with pytest.raises(checks.Fault, match="misaligned"):
        kernels.add[(1,)](x, x, o, 1024, B=1024)
    kernels.add.device_caches.clear()


@hopper
def test_tensor_map_is_checked_as_by_the_driver():
    a, b = torch.randn(64, 64), torch.zeros(64, 64)
    d = TensorDescriptor.from_tensor(a, [32, 32])
    d.strides = [63, 1]
    with pytest.raises(RuntimeError, match="tensor map"):
        kernels.copy_box[(1,)](d, TensorDescriptor.from_tensor(b, [32, 32]), 0, 0, BX=32, BY=32)


@hopper
@pytest.mark.parametrize("x,y", [(0, 0), (-5, 3), (40, -7), (100, 0), (50, 60)])
def test_boxes_outside_a_tensor_are_zero(x, y):
    a, b = torch.randn(60, 64), torch.full((32, 32), 7.0)
    kernels.copy_box[(1,)](
        TensorDescriptor.from_tensor(a, [32, 32]),
        TensorDescriptor.from_tensor(b, [32, 32]),
        x,
        y,
        BX=32,
        BY=32,
    )
    right = torch.zeros(32, 32)
    for i in range(32):
        for j in range(32):
            if 0 <= x + i < 60 and 0 <= y + j < 64:
                right[i, j] = a[x + i, y + j]
    assert torch.equal(b, right)
    assert not checks.FINDINGS


@hopper
def test_register_written_after_the_fence():
    def rewrite(text):
        register = re.search(r"wgmma\.mma_async\S* \{(%r\d+),", text)[1]
        new, n = re.subn(
            r"(wgmma\.fence\.sync\.aligned;)",
            rf"\1\nadd.s32 {register}, {register}, 0;",
            text,
            count=1,
        )
        assert n
        return new

    driver.rewrite_by(rewrite)
    tensor_matmul()
    assert "wgmma register hazard" in kinds()


@pytest.mark.parametrize("order", [False, True])
def test_ctas_that_write_one_place(order):
    driver.configure(owners=True, reverse=order)
    x, o = torch.randn(4096), torch.zeros(4096)
    kernels.add[(4,)](x, x, o, 4096, B=1024)
    assert not list(checks.FINDINGS)
    kernels.overlap[(2,)](x, o, B=1024)
    assert "race of CTAs" in kinds()
