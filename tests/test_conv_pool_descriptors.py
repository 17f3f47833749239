"""Convolution, bias, ReLU and max-pool in one kernel: values, and the tap of each winner.

Small integers give exact sums with many ties, so values and taps must be torch's own, of float64.
Operands are aligned as in test_descriptor_gemm, results are written into views of NaN.
"""

from dataclasses import replace
from math import prod

import pytest
import torch
import torch.nn.functional as TF
from cases import conv_case, operands, params
from test_descriptor_gemm import DTYPES, TARGET, TF32, aligned, assert_written_in_view_alone
from tolerance import assert_close, double, float32_convolutions, torch_conv2d

from kernels.conv.engine import PooledConv
from kernels.conv_pool.descriptor_gemm import conv2d_relu_max_pool2d, family, supports
from kernels.device import INTERPRET, Device, describe
from kernels.geometry import Conv2dGeometry, Pool2dGeometry
from kernels.problem import Problem
from kernels.tile import Tile, is_valid

HOPPER = Device("cuda", 90, multiprocessors=132, shared_memory=227 << 10)

pytestmark = pytest.mark.skipif(not TARGET.descriptors, reason="no tensor descriptors here")


def pooling(g, kernel, stride, padding=(0, 0)):
    return Pool2dGeometry(*g.y_shape, kernel, stride, padding)


NO_WINNER = 255
UNTOUCHED = 77
TWO = ((2, 2), (2, 2))
THREE = ((3, 3), (2, 2))
PADDED = ((3, 3), (2, 2), (1, 1))
WINDOWS = (
    TWO,
    THREE,
    PADDED,
    ((3, 3), (1, 1), (1, 1)),
    ((2, 3), (2, 1), (1, 0)),
    ((3, 2), (1, 2), (0, 1)),
)
LAYER = conv_case(2, 16, (9, 13), 20, (2, 2), padding=(1, 0, 0, 1))


def integers(g, dtype, device, bias=True):
    """x, w, bias, whose sums any of the dtypes holds."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randint(-1, 2, shape, generator=generator).to(device, dtype)

    return draw(*g.x_shape), draw(*g.w_shape), draw(g.K) if bias else None


def run(g, pool, x, w, bias, tile, *, argmax=True):
    """(y, argmax) of the kernel, both in views of memory that must stay as it is."""
    y = aligned(x.new_full(pool.y_shape, torch.nan), spare=1)
    base = torch.full_like(y._base, UNTOUCHED, dtype=torch.uint8)
    taps = base.as_strided(y.shape, y.stride(), y.storage_offset()) if argmax else None
    call = PooledConv(aligned(x), aligned(w), bias, y, taps, g, pool, "tf32")
    conv2d_relu_max_pool2d(call, tile)
    if taps is not None:
        assert (base != UNTOUCHED).sum() == taps.numel()
    return y, taps


def boxed(*box, columns=32, depth=16):
    return Tile(prod(box), columns, depth, box=box)


def oracle(g, pool, x, w, bias):
    """(y, argmax) by torch, in float64."""
    z = torch_conv2d(g)(double(x), double(w), double(bias), None).to(x.dtype).double().relu()
    y, index = TF.max_pool2d(z, pool.kernel, pool.stride, pool.padding, return_indices=True)
    rows, columns = (
        torch.arange(places) * stride - before
        for places, stride, before in zip((pool.P, pool.Q), pool.stride, pool.padding, strict=True)
    )
    tap = (index // g.Q - rows[:, None]) * pool.kernel[1] + index % g.Q - columns
    return y, torch.where(y <= 0, NO_WINNER, tap)


def assert_exact(g, window, operands, tile):
    pool = pooling(g, *window)
    y, taps = run(g, pool, *operands, tile)
    expected, winners = oracle(g, pool, *operands)
    assert torch.equal(y.double().cpu(), expected)
    assert torch.equal(taps.long().cpu(), winners)
    assert_written_in_view_alone(y)


# Windows, boxes and layers.


@pytest.mark.parametrize(("window", "dtype"), params(WINDOWS, DTYPES))
def test_windows(window, dtype, device):
    """Odd maps, and a tail of filters; boxes that end inside the map and outside."""
    tile = boxed(2, 8, 16) if dtype == torch.bfloat16 else boxed(4, 16, 8)
    assert_exact(LAYER, window, integers(LAYER, dtype, device), tile)


SMALL = conv_case(2, 16, (6, 5), 16, (2, 2), padding=(1, 0, 0, 1))


@pytest.mark.parametrize("box", [(64, 2, 2), (16, 4, 4), (8, 2, 8), (1, 32, 4), (1, 4, 32)])
def test_boxes(box, device):
    """Larger and smaller than the map, along one axis or all."""
    for window in (TWO, PADDED):
        if min(box[1:]) >= window[0][0]:
            assert_exact(SMALL, window, integers(SMALL, torch.bfloat16, device), boxed(*box))


LAYERS = (
    conv_case(1, 48, (7, 6), 33, (3, 1)),  # two blocks of channels, the second half empty
    conv_case(2, 16, (6, 8), 16, (1, 1)),
    conv_case(2, 32, (12, 10), 16, (3, 3), (2, 2), (1, 1, 1, 1)),  # pairs of pixels
    conv_case(2, 16, (11, 10), 16, (3, 2), (2, 1), (1, 1, 0, 0)),  # phases apart
    conv_case(1, 32, (7, 6), 64, (3, 3), padding=(2, 2, 2, 2), dilation=(2, 1), groups=2),
)


@pytest.mark.parametrize("g", params(LAYERS))
def test_layers(g, device):
    depth = 16 if g.groups > 1 or g.stride != (1, 1) else 32
    for bias, window in ((True, PADDED), (False, TWO)):
        inputs = integers(g, torch.float16, device, bias)
        assert_exact(g, window, inputs, boxed(2, 8, 8, depth=depth))


@pytest.mark.parametrize("window", params((TWO, PADDED)))
def test_each_tile(window, device):
    """Those of a GPU, and what stands for them in the interpreter."""
    g = conv_case(2, 64, (5, 6), 128, (1, 2))
    inputs = integers(g, torch.float16, device)
    pool = pooling(g, *window)
    found, here = (
        family(Problem("fprop", g, torch.float16, "ieee", where), pool)
        for where in (TARGET, describe(device))
    )
    assert len(found) >= 5
    for tile in (*found, here[0]):
        assert_exact(g, window, inputs, tile)


def test_wide_offsets(monkeypatch, device):
    monkeypatch.setattr("kernels.device.int64_index", lambda *arguments: True)
    assert_exact(SMALL, PADDED, integers(SMALL, torch.bfloat16, device), boxed(2, 8, 8))


def test_without_offsets(device):
    x, w, bias = integers(SMALL, torch.bfloat16, device)
    pool = pooling(SMALL, *THREE)
    y, _ = run(SMALL, pool, x, w, bias, boxed(8, 4, 8), argmax=False)
    assert torch.equal(y.double().cpu(), oracle(SMALL, pool, x, w, bias)[0])


def test_a_map_of_a_few_numbers(device):
    """By hand: one filter passes the first channel on, the second its negative, plus 3."""
    g = conv_case(1, 16, (3, 4), 16, (1, 1))
    x, w, bias = (
        torch.zeros(s, dtype=torch.bfloat16, device=device) for s in (g.x_shape, g.w_shape, g.K)
    )
    x[0, 0] = torch.tensor([[1, 5, -2, -1], [5, 2, 0, -3], [9, 9, 9, 9]])
    w[0, 0], w[1, 0], bias[1] = 1, -1, 3
    y, taps = run(g, pooling(g, *TWO), x, w, bias, boxed(4, 4, 4))
    assert y[0, :2].tolist() == [[[5, 0]], [[2, 6]]]
    assert taps[0, :2].tolist() == [[[1, NO_WINNER]], [[0, 3]]]


# Numbers.


@pytest.mark.parametrize("dtype", params(DTYPES))
def test_rounding(dtype, device):
    """Values, and winners that are as large as the largest but for their rounding."""
    t = operands(LAYER, dtype, device)
    pool = pooling(LAYER, *PADDED)
    y, taps = run(LAYER, pool, t.x, t.w, t.bias, boxed(4, 16, 16))

    def reference(change):
        x, w, bias = (change(v) for v in (t.x, t.w, t.bias))
        with float32_convolutions("ieee"):
            z = torch_conv2d(LAYER)(x, w, bias, None).relu()
        return z, TF.max_pool2d(z, *PADDED)

    z, exact = reference(double)
    _, own = reference(lambda v: v)
    _, magnitude = reference(lambda v: double(v).abs())
    eps = TF32 if dtype == torch.float32 and not INTERPRET else 0.0
    assert_close(y, exact, own, magnitude, name="y", product_eps=eps)

    taps = taps.long().cpu()
    assert torch.equal(taps == NO_WINNER, y.cpu() <= 0)
    # Each tap's value in its window; outside the map there is none.
    windows = TF.unfold(TF.pad(z, (1, 1, 1, 1), value=-1.0), 3, stride=2)
    windows = windows.view(LAYER.N, LAYER.K, 9, pool.P, pool.Q)
    chosen = windows.gather(2, taps.where(taps != NO_WINNER, 4)[:, :, None])[:, :, 0]
    slack = torch.finfo(dtype).eps * exact + 8 * max(eps, 2**-23) * magnitude
    assert (exact - chosen <= slack)[taps != NO_WINNER].all()


@pytest.mark.parametrize("dtype", params(DTYPES))
def test_what_is_not_finite(dtype, device):
    """NaN wins, and of several the last; infinities come out as they are; -inf gives zero."""
    g = conv_case(1, 16, (6, 6), 16, (1, 1))
    x, w, bias = (torch.zeros(s, dtype=dtype, device=device) for s in (g.x_shape, g.w_shape, g.K))
    w[0, 0] = w[1, 1] = w[2, 2] = 1
    x[0, 0, 1, 1] = torch.inf
    x[0, 0, 3, 3] = -torch.inf
    bias[3], bias[4], bias[5] = torch.nan, torch.inf, -torch.inf
    # Zero times infinity is NaN in other filters' sums.
    for window in (TWO, PADDED):
        pool = pooling(g, *window)
        y, taps = run(g, pool, x, w, bias, boxed(1, 8, 8))
        z = torch_conv2d(g)(double(x), double(w), double(bias), None).relu()
        expected = TF.max_pool2d(z, *window)
        assert torch.equal(y.double().cpu().nan_to_num(-1), expected.nan_to_num(-1))
        assert expected.isnan().any()
        assert torch.equal(taps.long().cpu(), oracle(g, pool, x, w, bias)[1])
    assert (y[0, 5][~y[0, 5].isnan()] == 0).all()


@pytest.mark.parametrize("dtype", params(DTYPES))
@pytest.mark.parametrize("window", params(WINDOWS))
def test_of_several_nans_the_last_wins(window, dtype, device):
    """As in torch, wherever in a box they lie, beside ties of numbers, which go to the first."""
    g = conv_case(2, 16, (17, 18), 16, (1, 1))
    x, w, bias = integers(g, dtype, device)
    draw = torch.rand(g.N, 1, *g.x_shape[2:], generator=torch.Generator().manual_seed(0))
    x = torch.where((draw < 0.15).to(device), torch.nan, x)
    pool = pooling(g, *window)
    expected, winners = oracle(g, pool, x, w, bias)
    assert 0.1 < expected.isnan().float().mean() < 1
    for box in ((1, 8, 16) if dtype == torch.float32 else (1, 16, 16), (2, 8, 8)):
        y, taps = run(g, pool, x, w, bias, boxed(*box))
        assert torch.equal(y.double().cpu().nan_to_num(-1), expected.nan_to_num(-1))
        assert torch.equal(taps.long().cpu(), winners)
        alone, _ = run(g, pool, x, w, bias, boxed(*box), argmax=False)
        assert torch.equal(alone.nan_to_num(-1), y.nan_to_num(-1))


def test_of_equal_values_the_first_wins(device):
    g = replace(LAYER, N=1)
    x, w, bias = integers(g, torch.bfloat16, device)
    y, taps = run(
        g, pooling(g, *PADDED), x, torch.zeros_like(w), torch.ones_like(bias), boxed(1, 16, 8)
    )
    assert (y == 1).all()
    assert (taps[..., 1:, 1:] == 0).all()
    assert (taps[..., 0, 1:] == 3).all()
    assert (taps[..., 1:, 0] == 1).all()
    assert (taps[..., 0, 0] == 4).all()


def test_neither_neighbours_nor_boxes_nor_runs_change_bits(device):
    t = operands(LAYER, torch.bfloat16, device)
    pool = pooling(LAYER, *PADDED)
    y, taps = run(LAYER, pool, t.x, t.w, t.bias, boxed(4, 16, 16))
    one = replace(LAYER, N=1)
    for box in ((2, 16, 8), (1, 8, 16)):
        alone = run(one, replace(pool, N=1), t.x[1:], t.w, t.bias, boxed(*box))
        assert torch.equal(alone[0], y[1:])
        assert torch.equal(alone[1], taps[1:])


# What is taken.


def problem(g, dtype=torch.bfloat16, precision="ieee", device=HOPPER, layout="aligned"):
    return Problem("fprop", g, dtype, precision, device, layout)


def test_what_is_refused():
    g = conv_case(2, 64, (14, 14), 64, (3, 3), padding=(1, 1, 1, 1))
    two = pooling(g, *TWO)
    assert supports(problem(g), two)
    assert supports(problem(g, torch.float16), pooling(g, *PADDED))
    assert supports(problem(g, torch.float32, "tf32"), two)
    few = conv_case(2, 8, (14, 14), 64, (3, 3))
    empty = replace(g, N=0)
    ampere = Device("cuda", 80, 108, 163 << 10)
    refused = {
        "rows that are not aligned": (problem(g, layout="channels_last"), two),
        "no descriptors": (problem(g, device=ampere), two),
        "no tensor core does it": (problem(g, torch.float32), two),
        "nor this": (problem(g, torch.float64), two),
        "results of 8 bits": (problem(g, torch.float8_e4m3fn), two),
        "windows half outside": (problem(g), replace(two, ceil_mode=True)),
        "windows with gaps": (problem(g), replace(two, dilation=(1, 2))),
        "large windows": (problem(g), pooling(g, (4, 2), (2, 2))),
        "large strides": (problem(g), pooling(g, (3, 3), (3, 2))),
        "another map": (problem(g), replace(two, H=13)),
        "few channels": (problem(few), pooling(few, *TWO)),
        "groups that fill no block": (problem(replace(g, groups=4)), two),
        "no pixel": (problem(empty), pooling(empty, *TWO)),
    }
    for why, arguments in refused.items():
        assert not supports(*arguments), why


@pytest.mark.parametrize("window", params(WINDOWS))
def test_tiles_are_valid_and_the_best_wastes_little(window):
    for dtype in DTYPES:
        for g in (LAYER, conv_case(64, 64, (14, 14), 256, (3, 3), padding=(1, 1, 1, 1))):
            found = family(problem(g, dtype, "tf32"), pooling(g, *window))
            assert found
            assert all(is_valid(tile, dtype.itemsize, HOPPER) for tile in found)
    vgg = Conv2dGeometry(256, 512, 14, 14, 512, 3, 3, padding=((1, 1), (1, 1)))
    best = family(problem(vgg), pooling(vgg, *TWO))[0]
    assert best.box[1:] == (2, 2)
    alexnet = Conv2dGeometry(256, 64, 27, 27, 192, 5, 5, padding=((2, 2), (2, 2)))
    best = family(problem(alexnet), pooling(alexnet, *THREE))[0]
    assert best.box == (1, 16, 16)
