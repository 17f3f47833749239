"""Matrix products as Triton's tutorials make them, in all dtypes and several tiles."""

import known_kernels as kernels
import pytest
import torch
import triton
from emulated import ARCH
from bench.emulator import checks, driver
from triton.tools.tensor_descriptor import TensorDescriptor

M, N, K = 200, 264, 176
KINDS = {
    "fp16": (torch.float16, "ieee", 5e-4),
    "bf16": (torch.bfloat16, "ieee", 4e-3),
    "tf32": (torch.float32, "tf32", 1e-3),
    "fp32": (torch.float32, "ieee", 1e-6),
    "tf32x3": (torch.float32, "tf32x3", 1e-6),
    "bf16x3": (torch.float32, "bf16x3", 3e-5),
    "bf16x6": (torch.float32, "bf16x6", 1e-6),
}
if ARCH >= 89:
    KINDS["e4m3"] = (torch.float8_e4m3fn, "ieee", 5e-4)
    KINDS["e5m2"] = (torch.float8_e5m2, "ieee", 5e-4)
TILES = [
    (128, 128, 64, 4, 3),
    (128, 256, 64, 8, 2),
    (64, 64, 32, 4, 1),
    (64, 32, 32, 4, 2),
    (128, 64, 32, 8, 4),
]


def random(shape, dtype, transposed=False):
    if transposed:
        return torch.randn(shape[::-1]).to(dtype).T
    return torch.randn(shape).to(dtype)


def error(c, right):
    return ((c.double() - right).norm() / right.norm()).item()


@pytest.mark.parametrize("transposed", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_matmul(kind, tile, transposed, mode):
    dtype, precision, tolerance = KINDS[kind]
    BM, BN, BK, warps, stages = tile
    if transposed != "nn" and tile not in TILES[::3]:
        pytest.skip("one tile of each size of a warp will do")
    if mode == "lazy" and (stages == 1 or kind not in ("fp16", "tf32")):
        pytest.skip("copies alone are lazy")
    if dtype == torch.float32 and BM * BN > (
        8192 if precision in ("ieee", "bf16x6", "bf16x3", "tf32x3") else 16384
    ):
        pytest.skip("too large")
    driver.configure(mode=mode, races=True)
    a, b = random((M, K), dtype, transposed[0] == "t"), random((K, N), dtype, transposed[1] == "t")
    c = torch.full((M, N), float("nan"), dtype=torch.float16 if dtype.itemsize == 1 else dtype)
    grid = (triton.cdiv(M, BM) * triton.cdiv(N, BN),)
    kernels.matmul[grid](
        a,
        b,
        c,
        M,
        N,
        K,
        *a.stride(),
        *b.stride(),
        *c.stride(),
        BM=BM,
        BN=BN,
        BK=BK,
        G=4,
        P=precision,
        num_warps=warps,
        num_stages=stages,
    )
    assert error(c, a.double() @ b.double()) < tolerance
    assert not list(checks.FINDINGS)


@pytest.mark.skipif(ARCH < 90, reason="needs TMA")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "tile",
    [(128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (64, 64, 32, 4, 1), (64, 128, 128, 4, 2)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["fp16", "bf16", "tf32", "e4m3"])
@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_tensor_matmul(kind, tile, transposed, mode):
    dtype, _, tolerance = KINDS[kind]
    BM, BN, BK, warps, stages = tile
    if dtype.itemsize == 1 and not transposed:
        pytest.skip("float8 is K-major only")
    if dtype == torch.float32 and BM * BN > 8192:
        pytest.skip("too large")
    driver.configure(mode=mode, races=True)
    a, b = random((M, K), dtype), random((N, K) if transposed else (K, N), dtype)
    c = torch.full((M, N), float("nan"), dtype=torch.float16 if dtype.itemsize == 1 else dtype)
    kernels.tensor_matmul[(2,)](
        TensorDescriptor.from_tensor(a, [BM, BK]),
        TensorDescriptor.from_tensor(b, [BN, BK] if transposed else [BK, BN]),
        TensorDescriptor.from_tensor(c, [BM, BN]),
        M,
        N,
        K,
        BM=BM,
        BN=BN,
        BK=BK,
        TB=transposed,
        num_warps=warps,
        num_stages=stages,
    )
    assert error(c, a.double() @ (b.double().T if transposed else b.double())) < tolerance
    assert not list(checks.FINDINGS)
