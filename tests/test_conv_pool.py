"""Convolution, ReLU and max-pooling as one: against torch's three operators in float64.

Operands are small integers, whose sums every dtype holds exactly: so values, winners and gradients
are compared bit for bit.
"""

import itertools

import pytest
import torch
import torch.nn.functional as TF
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import cnn
import cnn.functional as F
from kernels import cost_model, planner
from kernels.device import launches

CONVOLUTIONS = {  # arguments after input, weight and bias, and the filter
    "1x1": ((1, 0, 1, 1), (1, 1)),
    "3x3": ((1, 1, 1, 1), (3, 3)),
    "3x3 without padding": ((1, 0, 1, 1), (3, 3)),
    "3x3/2": ((2, 1, 1, 1), (3, 3)),
    "2x3 same": ((1, "same", 1, 1), (2, 3)),
    "full": ((1, "full", 1, 1), (2, 2)),
    "strides": (((2, 1), (2, 1), 1, 1), (3, 2)),
    "dilated": ((1, 2, (2, 1), 1), (3, 2)),
    "wider than the input": ((1, (2, 0), 1, 1), (9, 2)),
    "groups": ((1, 1, 1, 2), (3, 3)),
    "depthwise": ((1, 1, 1, 4), (3, 3)),
    "stride beyond the kernel": ((3, 2, 1, 1), (2, 2)),
}
POOLS = {  # kernel, stride, padding
    "2x2/2": (2, 2, 0),
    "3x3/2": (3, 2, 0),
    "3x3/2, padded": (3, 2, 1),
    "3x3/1, padded": (3, 1, 1),
    "2x2/1": (2, 1, 0),
    "2x2/3": (2, 3, 1),
    "3x1": ((3, 1), (1, 2), (1, 0)),
    "1x1": (1, 1, 0),
    "4x2": ((4, 2), (2, 1), (2, 1)),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MEMORY = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def integers(shape, device, seed, most=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).to(dtype).to(device)


def unfused(x, w, bias, convolution, pool):
    """torch's three operators; paddings by name are torch's own or made of numbers."""
    stride, padding, dilation, groups = convolution
    if padding == "full":
        padding = tuple(d * (size - 1) for d, size in zip((1, 1), w.shape[2:], strict=True))
    z = TF.conv2d(x, w, bias, stride, padding, dilation, groups)
    return TF.max_pool2d(TF.relu(z), *pool)


def fused(x, w, bias, convolution, pool):
    kernel, stride, padding = pool
    return F.conv2d_relu_max_pool2d(
        *(x, w, bias, *convolution),
        pool_kernel_size=kernel,
        pool_stride=stride,
        pool_padding=padding,
    )


def compare(x, w, bias, convolution, pool, seed=9):
    """Values and all gradients, bit for bit."""
    ours = [t.detach().clone(memory_format=torch.preserve_format) for t in (x, w, bias)]
    theirs = [t.detach().cpu().double() for t in ours]
    for t in (*ours, *theirs):
        t.requires_grad_()
    y, right = fused(*ours, convolution, pool), unfused(*theirs, convolution, pool)
    torch.testing.assert_close(y.cpu().double(), right, rtol=0, atol=0, equal_nan=True)
    dy = integers(right.shape, "cpu", seed, 3)
    mine = torch.autograd.grad(y, ours, dy.to(y))
    for a, b in zip(mine, torch.autograd.grad(right, theirs, dy), strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=0, equal_nan=True)
    return y


# Of torch's own padding="same" with an even kernel.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_every_pool_after_every_convolution(convolution, memory, device):
    arguments, kernel = CONVOLUTIONS[convolution]
    groups = arguments[-1]
    x = integers((2, 4, 7, 8), device, 1).contiguous(memory_format=MEMORY[memory])
    w = integers((4 if groups == 4 else 6, 4 // groups, *kernel), device, 2, 2)
    bias = integers(w.shape[:1], device, 3)
    for pool in POOLS.values():
        y = compare(x, w, bias, arguments, pool)
        assert y.is_contiguous(memory_format=MEMORY[memory])


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(dtype, memory, device):
    """Sums stay below 256, which bfloat16 holds."""
    x = integers((2, 5, 9, 10), device, 1, 2, dtype).contiguous(memory_format=MEMORY[memory])
    w, bias = integers((7, 5, 3, 3), device, 2, 1, dtype), integers((7,), device, 3, 2, dtype)
    for pool in ("2x2/2", "3x3/2, padded"):
        compare(x, w, bias, (1, 1, 1, 1), POOLS[pool])


def test_special_values(device):
    """NaN, infinities and windows without a positive value; ties go to the first pixel."""
    x = integers((2, 2, 8, 9), device, 1, 1)
    x[0, :, 1, 2], x[0, :, 5, 5], x[1, :, 6, 1] = torch.nan, -torch.inf, torch.inf
    w = torch.ones((3, 2, 1, 1), dtype=x.dtype, device=device)
    w[1] = -1
    bias = torch.tensor([0.0, -1.0, -20.0], dtype=x.dtype, device=device)
    for pool in POOLS.values():
        ours, theirs = (t.detach().clone().requires_grad_() for t in (x, x.cpu()))
        y = fused(ours, w, bias, (1, 0, 1, 1), pool)
        right = unfused(theirs, w.cpu(), bias.cpu(), (1, 0, 1, 1), pool)
        torch.testing.assert_close(y.cpu(), right, rtol=0, atol=0, equal_nan=True)
        dy = torch.where(right.isnan(), 0, integers(right.shape, "cpu", 4, 3))
        (dx,) = torch.autograd.grad(y, ours, dy.to(device))
        torch.testing.assert_close(
            dx.cpu(), *torch.autograd.grad(right, theirs, dy), rtol=0, atol=0
        )


def test_the_gradient_reaches_a_window_that_has_one_nan(device):
    x = torch.zeros((1, 1, 4, 4), dtype=torch.float64, device=device)
    x[0, 0, 1, 0] = torch.nan
    x.requires_grad_()
    w = torch.ones((1, 1, 1, 1), dtype=torch.float64, device=device)
    y = F.conv2d_relu_max_pool2d(x, w, pool_kernel_size=2)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.nonzero(dx).tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_the_last_of_several_nans_gets_the_gradient(channels, dtype, memory, device):
    """Whatever engine takes it; beside ties of numbers, whose first does."""
    x = integers((2, channels, 9, 10), device, 1, 1, dtype)
    draw = torch.rand((2, 1, 9, 10), generator=torch.Generator().manual_seed(0))
    x = torch.where((draw < 0.2).to(device), torch.nan, x).contiguous(memory_format=MEMORY[memory])
    w = integers((17, channels, 1, 1), device, 2, 1, dtype)
    bias = integers((17,), device, 3, 1, dtype)
    for pool in ("2x2/2", "3x3/2, padded", "3x3/1, padded"):
        y = compare(x, w, bias, (1, 0, 1, 1), POOLS[pool])
        assert y.isnan().any()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 16])
def test_a_zero_is_positive_and_gets_no_gradient(channels, dtype, memory, device):
    """torch's ReLU on a GPU knows no negative zero either, whatever the window holds."""
    values = torch.tensor([0.0, -0.0, -1.0], dtype=dtype)
    windows = torch.cartesian_prod(*[values] * 4).view(9, 9, 2, 2).permute(0, 2, 1, 3)
    x = torch.full((1, channels, 18, 18), -0.0, dtype=dtype)
    x[0, 0] = windows.reshape(18, 18)
    x = x.to(device).contiguous(memory_format=MEMORY[memory]).requires_grad_()
    w = torch.ones((16, channels, 1, 1), dtype=dtype, device=device)
    bias = torch.full((16,), -0.0, dtype=dtype, device=device)
    y = fused(x, w, bias, (1, 0, 1, 1), POOLS["2x2/2"])
    assert (y == 0).all()
    assert not y.signbit().any()
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert (dx == 0).all()


@pytest.mark.parametrize("pool", [2, 16], ids=["one byte", "two bytes"])
def test_what_is_kept_for_backward(pool, device):
    """Input, weight and an offset for each result: neither the map nor the result."""
    x = torch.randn((2, 8, 32, 32), device=device, requires_grad=True)
    w = torch.randn((16, 8, 3, 3), device=device, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = F.conv2d_relu_max_pool2d(x, w, padding=1, pool_kernel_size=pool)
    size = 1 if pool == 2 else 2
    least = x.nbytes + w.nbytes + y.numel() * size
    assert sum(t.nbytes for t in kept) <= 1.05 * least


@pytest.mark.parametrize("memory", MEMORY)
def test_the_map_is_never_allocated_forward(memory, device):
    x = torch.randn((2, 8, 64, 64), device=device).contiguous(memory_format=MEMORY[memory])
    w = torch.randn((16, 8, 3, 3), device=device, requires_grad=True)
    for kernel, stride in ((2, 2), (3, 2)):

        def call(kernel=kernel, stride=stride):
            return F.conv2d_relu_max_pool2d(
                x, w, padding=1, pool_kernel_size=kernel, pool_stride=stride
            )

        y, most = call(), peak(call, device)
        assert most <= 1.3 * (y.nbytes + y.numel()), most
        unfused = peak(lambda: F.conv2d(x, w, padding=1, activation="relu"), device)
        assert unfused >= 2 * 16 * 64 * 64 * 4


def peak(call, device):
    """Bytes that tensors take at most during a call, beyond those that stood before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = call()
    steps = [e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    return max(itertools.accumulate(steps))


def test_the_module_is_conv_relu_and_pool(device):
    torch.manual_seed(0)
    block = cnn.ConvReLUMaxPool2d(
        3, 5, 3, 2, 1, bias=False, pool_kernel_size=3, pool_stride=2, pool_padding=1
    ).to(device)
    plain = torch.nn.Conv2d(3, 5, 3, 2, 1, bias=False)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 3, 17, 15)
    right = TF.max_pool2d(TF.relu(plain(x)), 3, 2, 1)
    torch.testing.assert_close(block(x.to(device)).cpu(), right)
    torch.testing.assert_close(block(x[0].to(device)).cpu(), right[0])
    assert "pool_kernel_size=3, pool_stride=2, pool_padding=1" in repr(block)
    assert cnn.ConvReLUMaxPool2d(3, 5, 3, pool_kernel_size=2).pool_stride == 2


def test_autocast(device):
    x, w = torch.randn((1, 3, 8, 8), device=device), torch.randn((4, 3, 3, 3), device=device)
    w.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        y = F.conv2d_relu_max_pool2d(x, w, pool_kernel_size=2)
        right = TF.max_pool2d(TF.relu(F.conv2d(x, w)), 2)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, right)
    (dw,) = torch.autograd.grad(y.sum(), w)
    assert dw.dtype == torch.float32


def test_bad_arguments_are_named(device):
    x, w = torch.zeros((1, 3, 8, 8), device=device), torch.zeros((4, 3, 3, 3), device=device)
    for error, name, kwargs in (
        (RuntimeError, "pool_padding", {"pool_kernel_size": 2, "pool_padding": 2}),
        (RuntimeError, "pool_kernel_size", {"pool_kernel_size": 7}),
        (RuntimeError, "pool_stride", {"pool_kernel_size": 2, "pool_stride": 0}),
        (TypeError, "pool_kernel_size", {"pool_kernel_size": "2"}),
        (ValueError, "precision", {"pool_kernel_size": 2, "precision": "best"}),
    ):
        with pytest.raises(error, match=name):
            F.conv2d_relu_max_pool2d(x, w, **kwargs)
    with pytest.raises(RuntimeError, match="channels"):
        F.conv2d_relu_max_pool2d(x[:, :2], w, pool_kernel_size=2)
    with pytest.raises(RuntimeError, match="weight"):
        F.conv2d_relu_max_pool2d(x, w[:0], pool_kernel_size=2)


def test_an_empty_batch(device):
    x = torch.zeros((0, 3, 8, 8), device=device, requires_grad=True)
    w = torch.ones((4, 3, 3, 3), device=device, requires_grad=True)
    y = F.conv2d_relu_max_pool2d(x, w, pool_kernel_size=2)
    assert y.shape == (0, 4, 3, 3)
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert dx.shape == x.shape
    assert not dw.any()


def test_repeats_bit_for_bit_and_images_do_not_mix(device):
    x = torch.randn((3, 5, 9, 9), device=device, requires_grad=True)
    w = torch.randn((6, 5, 3, 3), device=device, requires_grad=True)

    def run(x):
        y = F.conv2d_relu_max_pool2d(x, w, padding=1, pool_kernel_size=3, pool_stride=2)
        return y, *torch.autograd.grad(y, (x, w), torch.ones_like(y))

    first, second = run(x), run(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = run(x[1:2].detach().requires_grad_())
    assert torch.equal(alone[0], first[0][1:2])
    assert torch.equal(alone[1], first[1][1:2])


def test_flops_are_those_of_the_convolution(device):
    x = torch.randn((2, 3, 8, 9), device=device, requires_grad=True)
    w = torch.randn((4, 3, 3, 3), device=device, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = F.conv2d_relu_max_pool2d(x, w, padding=1, pool_kernel_size=2)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y.sum(), (x, w))
    assert forward.get_total_flops() == 2 * 2 * 4 * 8 * 9 * 27
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("pool", ["2x2/2", "3x3/2, padded", "2x2/3"])
@pytest.mark.parametrize("convolution", ["3x3", "strides", "groups"])
def test_gradients_that_are_found_as_they_are_read(convolution, pool, dtype, device, monkeypatch):
    """Where the planner finds that cheaper; here it always does."""
    monkeypatch.setattr(cost_model, "writes_pool_gradient", lambda *_: False)
    planner.plan_pool_gradient.cache_clear()
    arguments, kernel = CONVOLUTIONS[convolution]
    groups, before = arguments[-1], launches()
    x = integers((2, 12, 7, 8), device, 1, 2, dtype)
    w = integers((6, 12 // groups, *kernel), device, 2, 1, dtype)
    compare(x, w, integers((6,), device, 3, dtype=dtype), arguments, POOLS[pool])
    assert launches().get("pool_gradient_kernel", 0) == before.get("pool_gradient_kernel", 0)
    # A first layer's own gradient is not asked for.
    x = integers((2, 3, 9, 8), device, 1, dtype=dtype)
    w = integers((5, 3, 3, 3), device, 2, dtype=dtype).requires_grad_()
    y = fused(x, w, None, (2, 1, 1, 1), POOLS[pool])
    (dw,) = torch.autograd.grad(y.sum(), w)
    v = w.detach().cpu().double().requires_grad_()
    right = unfused(x.cpu().double(), v, None, (2, 1, 1, 1), POOLS[pool])
    assert torch.equal(dw.cpu().double(), *torch.autograd.grad(right.sum(), v))
    assert launches().get("pool_gradient_kernel", 0) == before.get("pool_gradient_kernel", 0)
    planner.plan_pool_gradient.cache_clear()
