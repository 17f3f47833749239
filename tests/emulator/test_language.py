"""Features of the language that real GPUs run rightly: each function says whether all came out."""

import pytest
import torch
import triton
import triton.language as tl
from emulated import ARCH
from bench.emulator import checks, driver


@triton.jit
def layernorm_k(x, y, w, b, n, eps, B: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, B)
    m = i < n
    v = tl.load(x + r * n + i, mask=m, other=0).to(tl.float32)
    mu = tl.sum(v) / n
    d = tl.where(m, v - mu, 0.0)
    var = tl.sum(d * d) / n
    rs = 1 / tl.sqrt(var + eps)
    tl.store(
        y + r * n + i,
        (d * rs * tl.load(w + i, mask=m) + tl.load(b + i, mask=m)).to(y.dtype.element_ty),
        mask=m,
    )


def layernorm():
    x = torch.randn(33, 700).bfloat16()
    w = torch.randn(700)
    b = torch.randn(700)
    y = torch.empty_like(x)
    layernorm_k[(33,)](x, y, w, b, 700, 1e-5, B=1024, num_warps=8)
    ref = torch.nn.functional.layer_norm(x.float(), (700,), w, b)
    return (y.float() - ref).abs().max().item() < 0.03


@triton.jit
def red_k(x, o, oi, M: tl.constexpr, N: tl.constexpr, AX: tl.constexpr, K: tl.constexpr):
    v = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    L: tl.constexpr = N if AX == 0 else M
    p = o + tl.arange(0, L)
    if K == 0:
        tl.store(p, tl.sum(v, AX))
    elif K == 1:
        tl.store(p, tl.max(v, AX))
    elif K == 2:
        tl.store(p, tl.min(v, AX))
    elif K == 3:
        tl.store(oi + tl.arange(0, L), tl.argmax(v, AX))
    elif K == 4:
        tl.store(oi + tl.arange(0, L), tl.argmin(v, AX))
    elif K == 5:
        tl.store(p, tl.xor_sum(v, AX))


def reductions():
    ok = True
    for dt in (
        torch.float32,
        torch.float16,
        torch.int32,
        torch.int64,
        torch.int8,
        torch.float64,
        torch.bfloat16,
    ):
        for AX in (0, 1):
            for M, N, w in ((32, 64, 4), (4, 128, 1), (128, 16, 8)):
                x = (torch.randn(M, N) * 20).to(dt)
                for K in range(6):
                    if K == 5 and dt.is_floating_point:
                        continue
                    L = N if AX == 0 else M
                    o = torch.zeros(L, dtype=dt)
                    oi = torch.zeros(L, dtype=torch.int32)
                    red_k[(1,)](x, o, oi, M=M, N=N, AX=AX, K=K, num_warps=w)
                    if K == 0:
                        r = x.double().sum(AX)
                        e = (
                            ((o.double() - r).abs().max() / (x.double().abs().sum(AX).max())).item()
                            < {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dt, 1e-5)
                            if dt != torch.int8
                            else torch.equal(o, x.sum(AX).to(torch.int8))
                        )
                    elif K == 1:
                        e = torch.equal(o, x.amax(AX))
                    elif K == 2:
                        e = torch.equal(o, x.amin(AX))
                    elif K in (3, 4):
                        xx = x.double().numpy()
                        import numpy as np

                        r = (np.argmax if K == 3 else np.argmin)(xx, AX)
                        e = bool((oi.numpy() == r).all())
                    else:
                        import numpy as np

                        r = np.bitwise_xor.reduce(x.numpy(), AX)
                        e = bool((o.numpy() == r).all())
                    if not e:
                        print("  bad", dt, AX, M, N, w, K)
                    ok &= e
    return ok


@triton.jit
def scan_k(x, o, M: tl.constexpr, N: tl.constexpr, AX: tl.constexpr, R: tl.constexpr):
    i = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(o + i, tl.cumsum(tl.load(x + i), AX, reverse=R))


def scans():
    ok = True
    for AX in (0, 1):
        for R in (False, True):
            x = torch.randint(-9, 9, (32, 128), dtype=torch.int32)
            o = torch.zeros_like(x)
            scan_k[(1,)](x, o, M=32, N=128, AX=AX, R=R)
            r = x.flip(AX).cumsum(AX).flip(AX) if R else x.cumsum(AX)
            ok &= torch.equal(o, r.int())
    return ok


@triton.jit
def gather_k(x, i, o, M: tl.constexpr, N: tl.constexpr, AX: tl.constexpr):
    p = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(o + p, tl.gather(tl.load(x + p), tl.load(i + p), AX))


def gathers():
    ok = True
    for AX in (0, 1):
        x = torch.randn(64, 32)
        i = torch.randint(0, (64, 32)[AX], (64, 32), dtype=torch.int32)
        o = torch.zeros_like(x)
        gather_k[(1,)](x, i, o, M=64, N=32, AX=AX)
        ok &= torch.equal(o, x.gather(AX, i.long()))
    return ok


@triton.jit
def shape_k(x, o1, o2, o3, o4, M: tl.constexpr, N: tl.constexpr):
    p = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    v = tl.load(x + p)
    tl.store(o1 + tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :], tl.trans(v))
    a, b = tl.split(v.reshape(M, N // 2, 2))
    q = tl.arange(0, M)[:, None] * (N // 2) + tl.arange(0, N // 2)[None, :]
    tl.store(o2 + q, a - b)
    tl.store(o3 + p, tl.join(b, a).reshape(M, N))
    tl.store(o4 + tl.arange(0, M * N), v.reshape(M // 2, 2, N).permute(1, 2, 0).reshape(M * N))


def shapes():
    ok = True
    for dt in (torch.float32, torch.float16, torch.int8, torch.int64):
        M, N = 32, 64
        x = (torch.randn(M, N) * 50).to(dt)
        o = [torch.zeros(M * N, dtype=dt) for _ in range(4)]
        shape_k[(1,)](x, *o, M=M, N=N)
        ok &= torch.equal(o[0].view(N, M), x.T.contiguous())
        ok &= torch.equal(o[1][: M * N // 2].view(M, N // 2), x[:, ::2] - x[:, 1::2])
        ok &= torch.equal(o[2].view(M, N // 2, 2), torch.stack((x[:, 1::2], x[:, ::2]), 2))
        ok &= torch.equal(o[3], x.view(M // 2, 2, N).permute(1, 2, 0).reshape(-1))
        if not ok:
            print("  ", dt)
    return ok


@triton.jit
def atom_k(c, h, x, n, B: tl.constexpr, K: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    v = tl.load(x + i, mask=m, other=0)
    if K == 0:
        tl.atomic_add(h + v, 1, mask=m)
    elif K == 1:
        tl.atomic_max(c + i * 0, v, mask=m)
    elif K == 2:
        tl.atomic_add(c + i * 0, v, mask=m)
    elif K == 3:
        tl.atomic_xchg(c + i, v, mask=m)
    elif K == 4:
        tl.atomic_min(c + i * 0, v, mask=m)


def atomics():
    n = 1000
    x = torch.randint(0, 16, (n,), dtype=torch.int32)
    h = torch.zeros(16, dtype=torch.int32)
    c = torch.zeros(n, dtype=torch.int32)
    atom_k[(4,)](c, h, x, n, B=256, K=0)
    ok = torch.equal(h, torch.bincount(x, minlength=16).int())
    atom_k[(4,)](c, h, x, n, B=256, K=1)
    ok &= c[0].item() == x.max().item()
    c.zero_()
    atom_k[(4,)](c, h, x, n, B=256, K=2)
    ok &= c[0].item() == x.sum().item()
    c.zero_()
    atom_k[(4,)](c, h, x, n, B=256, K=3)
    ok &= torch.equal(c, x)
    c.fill_(99)
    atom_k[(4,)](c, h, x, n, B=256, K=4)
    ok &= c[0].item() == x.min().item()
    for dt in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        xf = torch.randint(0, 3, (n,)).to(dt)[:60]
        cf = torch.zeros(2, dtype=dt)  # 16-bit atomics of sm_80 work on 32 bits
        atom_k[(1,)](cf, h, xf, 60, B=64, K=2)
        ok &= cf[0].item() == xf.sum().item()
        if not ok:
            print("  ", dt, cf, xf.sum())
    return ok


@triton.jit
def lock_k(lock, acc, B: tl.constexpr):
    i = tl.arange(0, B)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(acc + i, tl.load(acc + i) + tl.program_id(0))
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


def locks():
    a = torch.zeros(128)
    l = torch.zeros(1, dtype=torch.int32)
    lock_k[(20,)](l, a, B=128)
    return bool((a == 190).all())


@triton.jit
def int_k(a, b, o, n, B: tl.constexpr):
    i = tl.arange(0, B)
    m = i < n
    x = tl.load(a + i, mask=m, other=1)
    y = tl.load(b + i, mask=m, other=1)
    tl.store(o + i, x + y, mask=m)
    tl.store(o + n + i, x * y, mask=m)
    tl.store(o + 2 * n + i, x // y, mask=m)
    tl.store(o + 3 * n + i, x % y, mask=m)
    tl.store(o + 4 * n + i, x & y, mask=m)
    tl.store(o + 5 * n + i, x ^ y, mask=m)
    tl.store(o + 6 * n + i, tl.where(x < y, x, y), mask=m)
    tl.store(o + 7 * n + i, x >> (y & 7), mask=m)
    tl.store(o + 8 * n + i, x << (y & 7), mask=m)


def integers():
    ok = True
    import numpy as np

    for dt in (
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint32,
        torch.uint64,
    ):
        npd = np.dtype(str(dt)[6:])
        ii = np.iinfo(npd)
        n = 500
        g = np.random.default_rng(0)
        a = g.integers(ii.min, ii.max, n, dtype=npd, endpoint=True)
        b = g.integers(ii.min, ii.max, n, dtype=npd, endpoint=True)
        b[b == 0] = 1
        b[:200] = (b[:200] % 7 + 1).astype(npd)
        o = torch.zeros(9 * n, dtype=dt)
        int_k[(1,)](torch.from_numpy(a), torch.from_numpy(b), o, n, B=512)
        r = o.numpy().reshape(9, n)
        with np.errstate(all="ignore"):
            rem = np.fmod(a, b)
            sh = (b & 7).astype(npd)
            e = [
                a + b,
                a * b,
                (a - rem) // b,
                rem,
                a & b,
                a ^ b,
                np.minimum(a, b),
                a >> sh,
                a << sh,
            ]
        for k, (x, y) in enumerate(zip(r, e)):
            bad = x != y
            if k in (2, 3) and npd.kind == "i":
                bad &= ~((a == ii.min) & (b == -1))
            if bad.any():
                ok = False
                print("  ", dt, k, bad.sum(), a[bad][:3], b[bad][:3], x[bad][:3], y[bad][:3])
    return ok


from triton.language.extra import libdevice


@triton.jit
def math_k(x, o, n, B: tl.constexpr):
    i = tl.arange(0, B)
    m = i < n
    v = tl.load(x + i, mask=m, other=1.0)
    tl.store(o + i, tl.exp(v), mask=m)
    tl.store(o + n + i, tl.log(tl.abs(v)), mask=m)
    tl.store(o + 2 * n + i, tl.sqrt(tl.abs(v)), mask=m)
    tl.store(o + 3 * n + i, tl.sin(v), mask=m)
    tl.store(o + 4 * n + i, tl.cos(v), mask=m)
    tl.store(o + 5 * n + i, libdevice.tanh(v), mask=m)
    tl.store(o + 6 * n + i, tl.erf(v), mask=m)
    tl.store(o + 7 * n + i, tl.rsqrt(tl.abs(v)), mask=m)
    tl.store(o + 8 * n + i, tl.floor(v), mask=m)
    tl.store(o + 9 * n + i, libdevice.pow(tl.abs(v), 1.7), mask=m)
    tl.store(o + 10 * n + i, tl.fma(v, v, v), mask=m)
    tl.store(o + 11 * n + i, 1 / v, mask=m)


def maths():
    n = 1000
    x = torch.randn(n) * 3
    o = torch.zeros(12 * n)
    math_k[(1,)](x, o, n, B=1024)
    d = x.double()
    r = o.view(12, n).double()
    e = [
        d.exp(),
        d.abs().log(),
        d.abs().sqrt(),
        d.sin(),
        d.cos(),
        d.tanh(),
        d.erf(),
        d.abs().rsqrt(),
        d.floor(),
        d.abs() ** 1.7,
        d * d + d,
        1 / d,
    ]
    ok = True
    for k, (a, b) in enumerate(zip(r, e)):
        err = ((a - b).abs() / (b.abs() + 1e-3)).max().item()
        if err > 2e-5:
            ok = False
            print("  ", k, err)
    return ok


@triton.jit
def cvt_k(x, o, n, B: tl.constexpr):
    i = tl.arange(0, B)
    m = i < n
    tl.store(o + i, tl.load(x + i, mask=m).to(o.dtype.element_ty), mask=m)


def conversions():
    ok = True
    F = [torch.float32, torch.float16, torch.bfloat16, torch.float64] + (
        [torch.float8_e4m3fn, torch.float8_e5m2] if ARCH >= 89 else []
    )
    I = [torch.int32, torch.int8, torch.int64, torch.uint8, torch.int16]
    for a in F + I:
        for b in F + I:
            if (
                a == b
                or (a.itemsize == 1 and b.itemsize == 1)
                or (a in (torch.float64,) and b.itemsize == 1 and b.is_floating_point)
                or (b in (torch.float64,) and a.itemsize == 1 and a.is_floating_point)
            ):
                continue
            if (a in I and b.is_floating_point and b.itemsize == 1) or (
                b in I and a.is_floating_point and a.itemsize == 1
            ):
                continue
            x = (torch.randn(600) * 30).to(a)
            if b == torch.uint8:
                x = x.to(torch.float32).abs().to(a)
            o = torch.zeros(600, dtype=b)
            try:
                cvt_k[(1,)](x, o, 600, B=1024)
            except Exception as e:
                print("  exc", a, b, str(e)[:200])
                ok = False
                continue
            r = x.to(b)
            if not torch.equal(o.double(), r.double()):
                ok = False
                print(
                    "  ",
                    a,
                    b,
                    (o.double() != r.double()).sum().item(),
                    x[o.double() != r.double()][:3],
                    o[o.double() != r.double()][:3],
                )
    return ok


@triton.jit
def flip_k(x, o, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(o + i, tl.sort(tl.load(x + i)))


def sorts():
    x = torch.randn(256)
    o = torch.zeros(256)
    flip_k[(1,)](x, o, N=256)
    return torch.equal(o, x.sort()[0])


@triton.jit
def hist_k(x, o, N: tl.constexpr, BINS: tl.constexpr):
    tl.store(o + tl.arange(0, BINS), tl.histogram(tl.load(x + tl.arange(0, N)), BINS))


def histograms():
    x = torch.randint(0, 32, (512,), dtype=torch.int32)
    o = torch.zeros(32, dtype=torch.int32)
    hist_k[(1,)](x, o, N=512, BINS=32)
    return torch.equal(o, torch.bincount(x, minlength=32).int())


@triton.jit
def rand_k(o, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.rand(42, i))


def rands():
    o = torch.zeros(1024)
    rand_k[(1,)](o, B=1024)
    return 0.45 < o.mean().item() < 0.55 and o.min() >= 0 and o.max() < 1


@pytest.mark.parametrize(
    "feature",
    [
        layernorm,
        reductions,
        scans,
        gathers,
        shapes,
        atomics,
        locks,
        integers,
        maths,
        conversions,
        sorts,
        histograms,
        rands,
    ],
    ids=lambda f: f.__name__,
)
def test_feature(feature):
    driver.configure(races=True)
    assert feature()
    assert not list(checks.FINDINGS)
