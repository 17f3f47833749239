"""Features of Triton's language, in kernels that real GPUs run rightly, against torch."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from emulated import ARCH
from triton.language.extra import libdevice

from bench import emulator


@pytest.fixture(autouse=True)
def _without_findings():
    emulator.configure(races=True)
    yield
    assert not emulator.findings()


@triton.jit
def _layer_norm_kernel(x, y, w, b, n, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < n
    v = tl.load(x + row * n + i, mask=mask, other=0).to(tl.float32)
    difference = tl.where(mask, v - tl.sum(v) / n, 0.0)
    scale = 1 / tl.sqrt(tl.sum(difference * difference) / n + eps)
    out = difference * scale * tl.load(w + i, mask=mask) + tl.load(b + i, mask=mask)
    tl.store(y + row * n + i, out.to(y.dtype.element_ty), mask=mask)


def test_layer_norm():
    x, w, b = torch.randn(5, 700).bfloat16(), torch.randn(700), torch.randn(700)
    y = torch.empty_like(x)
    _layer_norm_kernel[(5,)](x, y, w, b, 700, 1e-5, BLOCK=1024, num_warps=8)
    expected = torch.nn.functional.layer_norm(x.float(), (700,), w, b)
    torch.testing.assert_close(y.float(), expected, atol=0.03, rtol=0.01)


@triton.jit
def _reduce_kernel(
    x, sums, most, least, first, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr
):
    v = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    at = tl.arange(0, N if AXIS == 0 else M)
    tl.store(sums + at, tl.sum(v, AXIS))
    tl.store(most + at, tl.max(v, AXIS))
    tl.store(least + at, tl.min(v, AXIS))
    tl.store(first + at, tl.argmax(v, AXIS))


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_reductions(dtype, axis, warps):
    x = (torch.randn(32, 64) * 20).round().to(dtype)
    size = x.shape[1 - axis]
    sums, most, least = (torch.zeros(size, dtype=dtype) for _ in range(3))
    first = torch.zeros(size, dtype=torch.int32)
    _reduce_kernel[(1,)](x, sums, most, least, first, M=32, N=64, AXIS=axis, num_warps=warps)
    torch.testing.assert_close(sums.double(), x.double().sum(axis), atol=4, rtol=0.01)
    assert torch.equal(most, x.amax(axis))
    assert torch.equal(least, x.amin(axis))
    assert (first.numpy() == np.argmax(x.double().numpy(), axis)).all()


@triton.jit
def _scan_kernel(x, o, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    i = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(o + i, tl.cumsum(tl.load(x + i), AXIS))


@pytest.mark.parametrize("axis", [0, 1])
def test_scan(axis):
    x = torch.randint(-9, 9, (32, 128), dtype=torch.int32)
    o = torch.zeros_like(x)
    _scan_kernel[(1,)](x, o, M=32, N=128, AXIS=axis)
    assert torch.equal(o, x.cumsum(axis).int())


@triton.jit
def _gather_kernel(x, i, o, M: tl.constexpr, N: tl.constexpr):
    p = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(o + p, tl.gather(tl.load(x + p), tl.load(i + p), 0))


def test_gather():
    x, o = torch.randn(64, 32), torch.zeros(64, 32)
    i = torch.randint(0, 64, (64, 32), dtype=torch.int32)
    _gather_kernel[(1,)](x, i, o, M=64, N=32)
    assert torch.equal(o, x.gather(0, i.long()))


@triton.jit
def _shape_kernel(x, transposed, halved, swapped, M: tl.constexpr, N: tl.constexpr):
    p = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    v = tl.load(x + p)
    tl.store(transposed + tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :], tl.trans(v))
    a, b = tl.split(v.reshape(M, N // 2, 2))
    tl.store(halved + tl.arange(0, M)[:, None] * (N // 2) + tl.arange(0, N // 2)[None, :], a - b)
    tl.store(swapped + p, tl.join(b, a).reshape(M, N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
def test_shapes(dtype):
    x = (torch.randn(32, 64) * 50).to(dtype)
    transposed, halved, swapped = (
        torch.zeros(s, dtype=dtype) for s in ((64, 32), (32, 32), (32, 64))
    )
    _shape_kernel[(1,)](x, transposed, halved, swapped, M=32, N=64)
    assert torch.equal(transposed, x.T)
    assert torch.equal(halved, x[:, ::2] - x[:, 1::2])
    assert torch.equal(swapped, x.view(32, 32, 2).flip(2).view(32, 64))


@triton.jit
def _atomic_kernel(histogram, most, total, copies, x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    v = tl.load(x + i, mask=mask, other=0)
    tl.atomic_add(histogram + v.to(tl.int32), 1, mask=mask)
    tl.atomic_max(most + i * 0, v.to(tl.int32), mask=mask)
    tl.atomic_add(total + i * 0, v, mask=mask)
    tl.atomic_xchg(copies + i, v, mask=mask)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64], ids=str)
def test_atomics(dtype):
    x = torch.randint(0, 16, (400,)).to(dtype)
    histogram, most = torch.zeros(16, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    total, copies = torch.zeros(1, dtype=dtype), torch.zeros_like(x)
    _atomic_kernel[(2,)](histogram, most, total, copies, x, 400, BLOCK=256)
    assert torch.equal(histogram, torch.bincount(x.int(), minlength=16).int())
    assert most.item() == x.max().item()
    assert total.item() == x.sum().item()
    assert torch.equal(copies, x)


@triton.jit
def _lock_kernel(lock, total, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(total + i, tl.load(total + i) + tl.program_id(0))
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


def test_lock():
    total, lock = torch.zeros(128), torch.zeros(1, dtype=torch.int32)
    _lock_kernel[(3,)](lock, total, BLOCK=128)
    assert (total == 3).all()


@triton.jit
def _integer_kernel(a, b, o, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(a + i, mask=mask, other=1)
    y = tl.load(b + i, mask=mask, other=1)
    tl.store(o + i, x + y, mask=mask)
    tl.store(o + n + i, x * y, mask=mask)
    tl.store(o + 2 * n + i, x // y, mask=mask)
    tl.store(o + 3 * n + i, x % y, mask=mask)
    tl.store(o + 4 * n + i, x & ~y, mask=mask)
    tl.store(o + 5 * n + i, x ^ y, mask=mask)
    tl.store(o + 6 * n + i, tl.where(x < y, x, y), mask=mask)
    tl.store(o + 7 * n + i, x >> (y & 7), mask=mask)
    tl.store(o + 8 * n + i, x << (y & 7), mask=mask)


@pytest.mark.parametrize("name", ["int64", "int32", "int16", "int8", "uint8", "uint32"])
def test_integers(name):
    n, info, random = 300, np.iinfo(name), np.random.default_rng(0)
    a, b = (random.integers(info.min, info.max, n, dtype=name, endpoint=True) for _ in range(2))
    b[:100] = b[:100] % 7 + 1
    b[(b == 0) | (b.astype(np.int64) == -1)] = 1
    o = torch.zeros(9 * n, dtype=getattr(torch, name))
    _integer_kernel[(1,)](torch.from_numpy(a), torch.from_numpy(b), o, n, BLOCK=512)
    with np.errstate(over="ignore"):
        remainder, shift = np.fmod(a, b), (b & 7).astype(name)
        expected = [a + b, a * b, (a - remainder) // b, remainder, a & ~b, a ^ b]
        expected += [np.minimum(a, b), a >> shift, a << shift]
    for row, right in zip(o.numpy().reshape(9, n), expected, strict=True):
        assert (row == right).all()


@triton.jit
def _math_kernel(x, o, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mask = i < n
    v = tl.load(x + i, mask=mask, other=1.0)
    tl.store(o + i, tl.exp(v), mask=mask)
    tl.store(o + n + i, tl.log(tl.abs(v)), mask=mask)
    tl.store(o + 2 * n + i, tl.sqrt(tl.abs(v)), mask=mask)
    tl.store(o + 3 * n + i, libdevice.tanh(v), mask=mask)
    tl.store(o + 4 * n + i, tl.erf(v), mask=mask)
    tl.store(o + 5 * n + i, tl.rsqrt(tl.abs(v)), mask=mask)
    tl.store(o + 6 * n + i, tl.floor(v), mask=mask)
    tl.store(o + 7 * n + i, tl.fma(v, v, v), mask=mask)
    tl.store(o + 8 * n + i, 1 / v, mask=mask)


def test_functions():
    n = 500
    x, o = torch.randn(n) * 3, torch.zeros(9, n)
    _math_kernel[(1,)](x, o, n, BLOCK=512)
    d = x.double()
    expected = [d.exp(), d.abs().log(), d.abs().sqrt(), d.tanh(), d.erf(), d.abs().rsqrt()]
    expected += [d.floor(), d * d + d, 1 / d]
    torch.testing.assert_close(o.double(), torch.stack(expected), atol=2e-6, rtol=4e-6)


@triton.jit
def _convert_kernel(x, o, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mask = i < n
    tl.store(o + i, tl.load(x + i, mask=mask).to(o.dtype.element_ty), mask=mask)


_FLOATS = [torch.float32, torch.float16, torch.bfloat16]
_FP8 = [torch.float8_e4m3fn] if ARCH >= 90 else []
_CONVERSIONS = [
    *((a, b) for a in _FLOATS for b in [*_FLOATS, torch.int32, torch.int8] if a != b),
    *((a, b) for a in (torch.int32, torch.uint8) for b in _FLOATS),
    *((a, b) for a in _FP8 for b in _FLOATS),
    *((torch.float64, b) for b in (torch.float32, torch.bfloat16, torch.int64)),
]


@pytest.mark.parametrize(("source", "target"), _CONVERSIONS, ids=str)
def test_conversions(source, target):
    x = (torch.randn(600) * 30).abs().to(source)
    o = torch.zeros(600, dtype=target)
    _convert_kernel[(1,)](x, o, 600, BLOCK=1024)
    assert torch.equal(o.double(), x.to(target).double())


@triton.jit
def _sort_kernel(x, o, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(o + i, tl.sort(tl.load(x + i)))


def test_sort():
    x, o = torch.randn(256), torch.zeros(256)
    _sort_kernel[(1,)](x, o, N=256)
    assert torch.equal(o, x.sort()[0])


@triton.jit
def _random_kernel(o, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(o + i, tl.rand(42, i))


def test_random_numbers():
    """Philox: products' upper halves."""
    o = torch.zeros(1024)
    _random_kernel[(1,)](o, BLOCK=1024)
    assert 0.45 < o.mean().item() < 0.55
    assert o.min() >= 0
    assert o.max() < 1
