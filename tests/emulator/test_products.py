"""Matrix products as Triton's tutorials make them, in all dtypes."""

import known_kernels as kernels
import pytest
import torch
import triton
from emulated import ARCH
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import emulator

M, N, K = 104, 136, 112
KINDS = {
    "fp16": (torch.float16, "ieee", 5e-4),
    "bf16": (torch.bfloat16, "ieee", 4e-3),
    "tf32": (torch.float32, "tf32", 1e-3),
    "fp32": (torch.float32, "ieee", 1e-6),
    "tf32x3": (torch.float32, "tf32x3", 1e-6),
    "bf16x3": (torch.float32, "bf16x3", 3e-5),
    "bf16x6": (torch.float32, "bf16x6", 1e-6),
    "e4m3": (torch.float8_e4m3fn, "ieee", 5e-4),
}
KINDS = {name: kind for name, kind in KINDS.items() if name != "e4m3" or ARCH >= 89}


def random(shape: tuple[int, int], dtype: torch.dtype, transposed: bool = False) -> Tensor:
    return torch.randn(shape[::-1]).to(dtype).T if transposed else torch.randn(shape).to(dtype)


def result(dtype: torch.dtype) -> Tensor:
    return torch.full((M, N), float("nan"), dtype=torch.float16 if dtype.itemsize == 1 else dtype)


def error(c: Tensor, expected: Tensor) -> float:
    return ((c.double() - expected).norm() / expected.norm()).item()


def check_matmul(kind, tile, transposed):
    dtype, precision, tolerance = KINDS[kind]
    block_m, block_n, block_k, warps, stages = tile
    a, b = random((M, K), dtype, transposed[0] == "t"), random((K, N), dtype, transposed[1] == "t")
    c = result(dtype)
    kernels.matmul[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)](
        *(a, b, c, M, N, K, *a.stride(), *b.stride(), *c.stride()),
        BM=block_m,
        BN=block_n,
        BK=block_k,
        G=4,
        P=precision,
        num_warps=warps,
        num_stages=stages,
    )
    assert error(c, a.double() @ b.double()) < tolerance
    assert not emulator.findings()


@pytest.mark.parametrize("kind", KINDS)
def test_matmul(kind):
    emulator.configure(races=True)
    check_matmul(kind, (64, 64, 32, 4, 2), "nn")


@pytest.mark.parametrize("mode", ["eager", "lazy"])
@pytest.mark.parametrize("transposed", ["nt", "tn"])
@pytest.mark.parametrize("kind", ["fp16", "tf32"])
def test_layouts_of_operands(kind, transposed, mode):
    emulator.configure(races=True, mode=mode)
    check_matmul(kind, (64, 32, 32, 4, 3), transposed)


def test_two_warpgroups():
    emulator.configure(races=True)
    check_matmul("bf16", (128, 128, 64, 8, 3), "nn")


@pytest.mark.skipif(ARCH < 90, reason="needs TMA")
@pytest.mark.parametrize("mode", ["eager", "lazy"])
@pytest.mark.parametrize(
    ("kind", "tile", "transposed"),
    [
        ("fp16", (128, 128, 64, 4, 3), True),
        ("bf16", (128, 256, 64, 8, 3), False),
        ("tf32", (64, 64, 32, 4, 1), True),
        ("e4m3", (64, 128, 128, 4, 2), True),
    ],
)
def test_tensor_matmul(kind, tile, transposed, mode):
    emulator.configure(mode=mode, races=True)
    dtype, _, tolerance = KINDS[kind]
    block_m, block_n, block_k, warps, stages = tile
    a, b = random((M, K), dtype), random((N, K) if transposed else (K, N), dtype)
    c = result(dtype)
    kernels.tensor_matmul[(2,)](
        TensorDescriptor.from_tensor(a, [block_m, block_k]),
        TensorDescriptor.from_tensor(b, [block_n, block_k] if transposed else [block_k, block_n]),
        TensorDescriptor.from_tensor(c, [block_m, block_n]),
        *(M, N, K),
        BM=block_m,
        BN=block_n,
        BK=block_k,
        TB=transposed,
        num_warps=warps,
        num_stages=stages,
    )
    assert error(c, a.double() @ (b.double().T if transposed else b.double())) < tolerance
    assert not emulator.findings()
