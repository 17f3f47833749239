"""The backward pass of conv + bias + ReLU + max-pool from one offset a window, without the map.

The oracle is autograd of the unfused operators in float64; on small integers all sums are exact in
every dtype, so ours must be the oracle's, rounded once.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as TF
from cases import case_id, conv_case, in_strides, random, sliced
from torch import Tensor

from kernels import planner
from kernels.conv import implicit_gemm, relu_backward
from kernels.conv.engine import Dgrad, Wgrad
from kernels.cost_model import writes_pool_gradient
from kernels.device import Device, describe
from kernels.geometry import Conv2dGeometry, Pool2dGeometry
from kernels.pool import max_pool, pool_gradient
from kernels.pool.pool_gradient import PoolGradient
from kernels.problem import Problem
from kernels.tile import Tile

ONE = (1, 1)
CASES = (
    # windows that do not overlap, and leave the last row or column
    (conv_case(2, 8, (6, 7), 12, (3, 3), padding=(1, 1, 1, 1)), ((2, 2), (2, 2))),
    # that overlap, with padding; a convolution with stride, dilation, sides that differ
    (conv_case(2, 6, (15, 11), 7, (3, 2), (2, 1), (1, 0, 0, 2), (2, 1)), ((3, 3), (2, 2), ONE)),
    # each window on the next, strides that differ; groups
    (conv_case(2, 12, (5, 6), 10, (3, 3), (1, 1), (1, 1, 1, 1), ONE, 2), ((3, 2), (1, 2), (1, 0))),
    # few channels, for which engine 3 has a kernel of wgrad
    (conv_case(2, 3, (13, 12), 8, (5, 5), (2, 2), (2, 2, 2, 2)), ((3, 3), (2, 2), ONE)),
    # gaps between windows, a hanging window, dilation of the pooling; a pointwise convolution
    (conv_case(1, 17, (9, 8), 9, (1, 1)), ((2, 2), (4, 3), (0, 1), (1, 2), True)),
)
RUNS = (
    (torch.float16, "channels_last"),
    (torch.bfloat16, "sliced"),
    (torch.float32, "contiguous"),
    (torch.float64, "channels_last"),
)
POOLS = (
    ((2, 2), (2, 2)),
    ((3, 3), (2, 2), ONE),
    ((2, 3), ONE, ONE, (2, 3)),
    ((2, 1), (3, 2), (0, 0), ONE, True),
)


def pool_of(g: Conv2dGeometry, window: tuple) -> Pool2dGeometry:
    return Pool2dGeometry(g.N, g.K, g.P, g.Q, *window)


def laid_out(t: Tensor, layout: str) -> Tensor:
    return sliced(t) if layout == "sliced" else in_strides(t, layout == "channels_last")


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device, layout: str = "contiguous"):
    t = torch.full(shape, torch.nan, dtype=dtype, device=device)
    return laid_out(t, layout) if t.ndim == 4 else t


def integers(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).double()


def winners(z: Tensor, pool: Pool2dGeometry, none: int = 255, dtype=torch.uint8) -> Tensor:
    """The taps that win the windows of relu(z), and ``none`` where no gradient flows."""
    y, index = TF.max_pool2d(
        z.relu(), *(pool.kernel, pool.stride, pool.padding, pool.dilation), pool.ceil_mode, True
    )
    p, q = (torch.arange(size, device=z.device) for size in y.shape[2:])
    h = index // pool.W + pool.padding[0] - p[:, None] * pool.stride[0]
    w = index % pool.W + pool.padding[1] - q * pool.stride[1]
    tap = h // pool.dilation[0] * pool.kernel[1] + w // pool.dilation[1]
    return torch.where(y > 0, tap, none).to(dtype)


def unfused(g: Conv2dGeometry, pool: Pool2dGeometry, x: Tensor, w: Tensor, bias: Tensor):
    """(the map before its ReLU, the pooled result)."""
    pads = (*g.padding[1], *g.padding[0])
    z = TF.conv2d(TF.pad(x, pads), w, bias, g.stride, 0, g.dilation, g.groups)
    window = pool.kernel, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
    return z, TF.max_pool2d(z.relu(), *window)


def problem(g: Conv2dGeometry, pool: Pool2dGeometry):
    """(x, w, dy, argmax) and the gradients of x, w and bias, all in float64."""
    inputs = [integers(shape, i) for i, shape in enumerate((g.x_shape, g.w_shape, (g.K,)))]
    leaves = [t.requires_grad_() for t in inputs]
    z, y = unfused(g, pool, *leaves)
    dy = integers(y.shape, 3)
    right = torch.autograd.grad(y, leaves, dy)
    x, w, _ = (t.detach() for t in inputs)
    return (x, w, dy, winners(z.detach(), pool)), right


def planned(direction, g, dtype, device):
    return planner.plan(Problem(direction, g, dtype, "ieee", describe(device)))[:2]


def case_and_run(value) -> str:
    if isinstance(value, Conv2dGeometry):
        return case_id(value)
    return "x".join(map(str, value[0])) if isinstance(value, tuple) else str(value).split(".")[-1]


@pytest.mark.parametrize(("dtype", "layout"), RUNS, ids=case_and_run)
@pytest.mark.parametrize(("g", "window"), CASES, ids=case_and_run)
def test_gradients_of_a_convolution_that_was_pooled(g, window, dtype, layout, device):
    pool = pool_of(g, window)
    (x, w, dy, argmax), right = problem(g, pool)
    x, w, dy = (laid_out(t.to(device, dtype), layout) for t in (x, w, dy))
    argmax = in_strides(argmax.to(device), layout == "channels_last")
    won = PoolGradient(pool, argmax)

    if g.C > 4:
        dx = poisoned(g.x_shape, dtype, device, layout)
        engine, tile = planned("dgrad", g, dtype, device)
        engine.launch(Dgrad(dy, w, dx, g, pooled=won), tile)
        assert torch.equal(dx.cpu(), right[0].to(dtype))
    dw, db = poisoned(g.w_shape, dtype, device), poisoned((g.K,), dtype, device)
    engine, tile = planned("wgrad", g, dtype, device)
    engine.launch(Wgrad(x, dy, dw, db, g, pooled=won), tile)
    for ours, expected in zip((dw, db), right[1:], strict=True):
        assert torch.equal(ours.cpu(), expected.to(dtype))


@pytest.mark.parametrize(("dtype", "layout"), RUNS, ids=case_and_run)
@pytest.mark.parametrize("window", POOLS, ids=case_and_run)
def test_it_is_the_backward_of_pooling_bit_for_bit(window, dtype, layout, device):
    pool = Pool2dGeometry(2, 5, 9, 11, *window)
    z = random(pool.x_shape, dtype, device, 0)
    dy = laid_out(random(pool.y_shape, dtype, device, 1), layout)
    argmax = winners(z, pool)
    right = poisoned(pool.x_shape, dtype, device)
    tile = max_pool.choose_tile("backward", pool, False, describe(device))
    max_pool.max_pool2d_backward(dy, argmax, right, pool, tile)

    dz, db = poisoned(pool.x_shape, dtype, device, layout), poisoned((5,), dtype, device)
    pool_gradient.write(dy, argmax, dz, db, pool)
    assert torch.equal(dz, right)
    assert_sums(db, dz)
    if dz._base is not None:
        assert (~dz._base.isnan()).sum() == dz.numel()

    again = torch.full_like(dz, torch.nan)
    pool_gradient.write(dy, argmax, again, None, pool)
    assert torch.equal(again, dz)


def assert_sums(db: Tensor, dz: Tensor) -> None:
    """db[k] is the sum of dz[n,k,p,q], rounded once after a sum in float32 or float64."""
    exact, magnitude = dz.double().sum((0, 2, 3)), dz.double().abs().sum((0, 2, 3))
    eps = torch.finfo(db.dtype).eps
    accumulator = min(eps, torch.finfo(torch.float32).eps)
    assert ((db.double() - exact).abs() <= eps / 2 * exact.abs() + accumulator * magnitude).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=case_and_run)
@pytest.mark.parametrize("window", POOLS[:2], ids=case_and_run)
def test_gradients_are_those_of_the_written_map_bit_for_bit(window, dtype, device):
    g = conv_case(2, 6, (7, 8), 9, (3, 2), padding=(1, 1, 1, 0))
    tile = Tile(64, 64, 64, packed=True, split_k=2)
    pool = pool_of(g, window)
    x, w, z, dy = (
        random(shape, dtype, device, i)
        for i, shape in enumerate((g.x_shape, g.w_shape, g.y_shape, pool.y_shape))
    )
    argmax, dz = winners(z, pool), poisoned(g.y_shape, dtype, device)
    pool_gradient.write(dy, argmax, dz, None, pool)
    results = []
    for gradient, won in ((dz, None), (dy, PoolGradient(pool, argmax))):
        dx, dw = poisoned(g.x_shape, dtype, device), poisoned(g.w_shape, dtype, device)
        db = poisoned((g.K,), dtype, device)
        implicit_gemm.dgrad(Dgrad(gradient, w, dx, g, pooled=won), tile)
        implicit_gemm.wgrad(Wgrad(x, gradient, dw, db, g, pooled=won), tile)
        results.append((dx, dw, db))
    assert all(map(torch.equal, *results))


def test_a_pooled_gradient_by_hand(device):
    """Two windows of 3 in a row of 5 pixels, the middle pixel won by both; a third has none."""
    pool = Pool2dGeometry(1, 1, 1, 7, (1, 3), (1, 2))
    dy = torch.tensor([[[[2.0, 3.0, 5.0]]]], device=device)
    dz, db = poisoned(pool.x_shape, dy.dtype, device), poisoned((1,), dy.dtype, device)
    argmax = torch.tensor([[[[2, 0, 255]]]], dtype=torch.uint8, device=device)
    pool_gradient.write(dy, argmax, dz, db, pool)
    assert dz.flatten().tolist() == [0, 0, 5, 0, 0, 0, 0]
    assert db.tolist() == [5]


def test_a_window_of_more_than_255_taps(device):
    g = conv_case(2, 5, (20, 21), 12, (1, 1))
    pool = pool_of(g, ((16, 17), (4, 4)))
    (x, w, dy, _), right = problem(g, pool)
    x, w, dy = (t.to(device, torch.float32) for t in (x, w, dy))
    bias = integers((g.K,), 2).to(device, torch.float32)
    argmax = winners(unfused(g, pool, x, w, bias)[0], pool, -1, torch.int16)
    assert argmax.max() > 255
    dx = poisoned(g.x_shape, dy.dtype, device)
    engine, tile = planned("dgrad", g, dy.dtype, device)
    engine.launch(Dgrad(dy, w, dx, g, pooled=PoolGradient(pool, argmax)), tile)
    assert torch.equal(dx.cpu(), right[0].float())


@pytest.mark.parametrize("window", POOLS[:2], ids=case_and_run)
def test_what_is_not_finite_goes_to_the_winner_alone(window, device):
    pool = Pool2dGeometry(1, 2, 6, 6, *window)
    z = random(pool.x_shape, torch.float32, device, 0)
    argmax, dy = winners(z, pool), torch.zeros(pool.y_shape, device=device)
    dy[0, 0, 1, 1], dy[0, 0, 1, 2] = torch.nan, torch.inf
    dy[0, 1] = torch.nan
    argmax[0, 0, 1, 1:] = torch.tensor([0, 1], device=device)
    argmax[0, 1] = 255
    dz, db = poisoned(pool.x_shape, dy.dtype, device), poisoned((2,), dy.dtype, device)
    pool_gradient.write(dy, argmax, dz, db, pool)
    assert dz[0, 0].isnan().sum() == 1
    assert dz[0, 0].isinf().sum() == 1
    assert not dz[0, 1].any()
    assert db.isnan().tolist() == [True, False]


@pytest.mark.parametrize(("dtype", "layout"), RUNS, ids=case_and_run)
def test_a_relus_backward_sums_its_channels(dtype, layout, device):
    shape = (3, 70, 5, 6)
    dy, y = (laid_out(random(shape, dtype, device, i), layout) for i in range(2))
    y[0, 0, 0, 0], y[1, 1, 1, 1] = torch.nan, 0
    dy[1, 1, 1, 1] = torch.inf
    dz, db = poisoned(shape, dtype, device, layout), poisoned((70,), dtype, device)
    relu_backward.relu_backward(dy, y, dz, db)
    assert torch.equal(dz, torch.where(y <= 0, 0, dy))
    assert_sums(db, dz)


def test_sums_repeat_bit_for_bit_over_many_tiles(device):
    """More tiles than the interpreter's two parts hold at a turn each, with an uneven last part."""
    shape = (3, 2, 70, 70)
    dy, y = random(shape, torch.float32, device, 0), torch.ones(shape, device=device)
    sums = []
    for _ in range(2):
        dz, db = poisoned(shape, dy.dtype, device), poisoned((2,), dy.dtype, device)
        relu_backward.relu_backward(dy, y, dz, db)
        assert torch.equal(dz, dy)
        assert_sums(db, dz)
        sums.append(db)
    assert torch.equal(*sums)


AMPERE = Device("cuda", 80, multiprocessors=108, shared_memory=163 << 10)
HOPPER = Device("cuda", 90, multiprocessors=132, shared_memory=227 << 10)
VGG = conv_case(8, 3, (224, 224), 64, (3, 3), padding=(1, 1, 1, 1))
STEM = conv_case(8, 3, (224, 224), 64, (7, 7), (2, 2), (3, 3, 3, 3))


@pytest.mark.parametrize(
    ("direction", "g", "window", "gpu", "first"),
    [
        ("wgrad", VGG, POOLS[0], AMPERE, False),
        ("wgrad", VGG, POOLS[0], HOPPER, False),
        ("wgrad", replace(VGG, C=64), POOLS[0], AMPERE, True),  # many taps
        ("dgrad", replace(VGG, C=64), POOLS[0], AMPERE, True),
        ("wgrad", STEM, POOLS[1], HOPPER, True),  # several windows
        ("dgrad", conv_case(8, 64, (56, 56), 64, (1, 1)), POOLS[0], AMPERE, False),
        ("dgrad", conv_case(8, 64, (56, 56), 64, (1, 1)), POOLS[0], HOPPER, True),  # engine 2
    ],
    ids=lambda value: case_and_run(value) if not isinstance(value, Device) else f"sm_{value.arch}",
)
def test_what_is_written_first_does_not_follow_the_batch(direction, g, window, gpu, first):
    for n in (1, 8, 1000):
        g = replace(g, N=n)
        problem = Problem(direction, g, torch.bfloat16, "ieee", gpu)
        assert writes_pool_gradient(problem, pool_of(g, window)) == first
