"""The stem's kernel through its launcher, against convolution, ReLU and pooling in float64.

Inputs are small integers, so that results and the taps that won must agree exactly, ties included.
Results are poisoned before each launch, so an element that no program writes shows.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as TF
from cases import case_id, conv_case, in_strides, random, sliced
from tolerance import assert_close

from kernels import device as kernel_device
from kernels.conv import paired_columns
from kernels.conv.engine import PooledConv
from kernels.conv_pool import few_channels
from kernels.geometry import Pool2dGeometry
from kernels.problem import Problem


def pool_of(g, kernel, padding=(0, 0), ceil_mode=False):
    return Pool2dGeometry(g.N, g.K, g.P, g.Q, kernel, (2, 2), padding, ceil_mode=ceil_mode)


def case(g, *pool):
    return pytest.param(g, pool_of(g, *pool), id=f"{case_id(g)}-{pool}".replace(" ", ""))


RESNET = conv_case(2, 3, (17, 20), 17, (7, 7), (2, 2), (3, 3, 3, 3))
LENET = conv_case(3, 1, (12, 12), 6, (5, 5))
CASES = (
    case(RESNET, (3, 3), (1, 1)),
    case(LENET, (2, 2)),
    # AlexNet's: windows that start at the map's first pixel, and a row that a run does not fill
    case(conv_case(2, 3, (37, 40), 7, (11, 11), (4, 4), (2, 2, 2, 2)), (3, 3)),
    # windows that reach beyond the map, of odd and even sizes; C = 2, 4
    case(conv_case(2, 4, (9, 8), 17, (3, 3), padding=(1, 1, 1, 1)), (2, 2), (1, 1)),
    case(conv_case(2, 2, (13, 12), 5, (3, 4), (2, 1), (0, 2, 1, 0), (1, 2)), (3, 2), (1, 0), True),
    # several tiles along each axis; a map of one pixel; strides that exceed the kernel
    case(conv_case(1, 3, (40, 43), 3, (1, 1)), (2, 3), (0, 1)),
    case(conv_case(2, 3, (5, 5), 3, (3, 3), (3, 2), (1, 1, 1, 1)), (3, 3), (1, 1)),
    case(conv_case(2, 3, (3, 3), 3, (3, 3)), (3, 3), (1, 1)),
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = {
    "channels_last": lambda t: in_strides(t, True),
    "contiguous": lambda t: in_strides(t, False),
    "sliced": sliced,
}


def integers(shape, low, high, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).float()


def operands(g, dtype, device, layout="channels_last"):
    shapes = (g.x_shape, -3, 3), (g.w_shape, -1, 1), ((g.K,), -2, 2)
    x, w, bias = (
        integers(*shape, seed).to(dtype=dtype, device=device) for seed, shape in enumerate(shapes)
    )
    return LAYOUTS[layout](x), LAYOUTS[layout](w), bias


def tiles(g, pool, dtype, device):
    """The chosen tile, and one that takes several programs, turns and tiles of filters."""
    here = kernel_device.describe(device)
    (chosen,) = few_channels.tiles(Problem("fprop", g, dtype, "ieee", here), pool)
    turn = max(16, paired_columns.segment(g))  # the least that holds a run
    return chosen, replace(chosen, rows=256, columns=16, depth=turn, box=(1, 16, 16))


def run(x, w, bias, g, pool, tile, layout="channels_last", argmax=True):
    y = LAYOUTS[layout](x.new_full(pool.y_shape, torch.nan))
    taps = torch.full_like(y, 77, dtype=torch.uint8) if argmax else None
    few_channels.conv2d_relu_max_pool2d(PooledConv(x, w, bias, y, taps, g, pool), tile)
    return y, taps


def reference(x, w, bias, g, pool):
    """(y, taps) in float64 and int64, the map rounded to x's dtype as unfused operators do."""
    exact = [None if t is None else t.double().cpu() for t in (x, w, bias)]
    (top, bottom), (left, right) = g.padding
    padded = TF.pad(exact[0], (left, right, top, bottom))
    z = TF.conv2d(padded, exact[1], exact[2], g.stride, 0, g.dilation).relu().to(x.dtype).double()
    y, indices = TF.max_pool2d(
        z, pool.kernel, (2, 2), pool.padding, ceil_mode=pool.ceil_mode, return_indices=True
    )
    r = indices // g.Q - (2 * torch.arange(pool.P) - pool.padding[0])[:, None]
    s = indices % g.Q - (2 * torch.arange(pool.Q) - pool.padding[1])
    return y, torch.where(y <= 0, 255, r * pool.kernel[1] + s)


def assert_same(y, taps, right_y, right_taps):
    torch.testing.assert_close(y.double().cpu(), right_y, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(taps.long().cpu(), right_taps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("g", "pool"), CASES)
def test_values_and_taps(g, pool, layout, device):
    x, w, bias = operands(g, torch.float16, device, layout)
    y, taps = reference(x, w, bias, g, pool)
    assert taps.unique().numel() > 1 or g.H == 3
    ours, our_taps = run(x, w, bias, g, pool, tiles(g, pool, x.dtype, device)[0], layout)
    assert torch.equal(ours.double().cpu(), y)
    assert torch.equal(our_taps.long().cpu(), taps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("g", "pool"), CASES[:3])
def test_any_tile_gives_the_same(g, pool, dtype, device):
    """In each dtype, without bias, and without argmax."""
    x, w, _ = operands(g, dtype, device)
    y, taps = reference(x, w, None, g, pool)
    for tile in tiles(g, pool, dtype, device):
        ours, our_taps = run(x, w, None, g, pool, tile)
        assert torch.equal(ours.double().cpu(), y)
        assert torch.equal(our_taps.long().cpu(), taps)
        assert torch.equal(run(x, w, None, g, pool, tile, argmax=False)[0], ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding(dtype, device):
    """Of random values the map is rounded once, and pooling adds no error."""
    g, pool = RESNET, pool_of(RESNET, (3, 3), (1, 1))
    x, w, bias = (
        random(shape, dtype, device, i) for i, shape in enumerate((g.x_shape, g.w_shape, (g.K,)))
    )

    def pooled(*inputs):
        return TF.max_pool2d(TF.conv2d(*inputs, (2, 2), 3).relu(), 3, 2, 1)

    exact = [t.double().cpu() for t in (x, w, bias)]
    ours, _ = run(x, w, bias, g, pool, tiles(g, pool, dtype, device)[0])
    assert_close(ours, pooled(*exact), pooled(x, w, bias), pooled(*(t.abs() for t in exact)))


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("g", "pool"), [CASES[0], CASES[3], CASES[4]])
def test_what_is_not_finite_spreads_to_its_own_windows(g, pool, value, device):
    """Neighbouring outputs share a row of the product: one's NaN must not reach the other."""
    for dtype, layout in zip(DTYPES, LAYOUTS, strict=True):
        x, w, _ = operands(g, dtype, device, layout)
        w.fill_(1)
        x[0, 0, 3, 4] = x[-1, -1, -1, -1] = value
        y, taps = reference(x, w, None, g, pool)
        assert not y.isfinite().all() or value < 0
        assert_same(*run(x, w, None, g, pool, tiles(g, pool, dtype, device)[0]), y, taps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [(2, 2), (2, 3), (3, 2), (3, 3)], ids=str)
def test_of_several_nans_the_last_wins(kernel, dtype, device):
    """As in torch, wherever in a tile they lie, beside ties of numbers, which go to the first."""
    g = conv_case(2, 3, (21, 23), 17, (1, 1))
    pool = pool_of(g, kernel, (1, 1))
    x, w, bias = operands(g, dtype, device)
    draw = torch.rand(g.N, 1, g.H, g.W, generator=torch.Generator().manual_seed(0))
    x = torch.where((draw < 0.2).to(device), torch.nan, x)
    y, taps = reference(x, w, bias, g, pool)
    assert 0.3 < y.isnan().float().mean() < 1
    for tile in tiles(g, pool, dtype, device):
        assert_same(*run(x, w, bias, g, pool, tile), y, taps)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("g", "pool"), [CASES[0], CASES[1], CASES[4]])
def test_what_is_not_finite_in_a_filter_stays_in_its_channel(g, pool, value, device):
    for dtype, layout in zip(DTYPES, LAYOUTS, strict=True):
        x, w, bias = operands(g, dtype, device, layout)
        x.abs_().add_(1)
        w[1, -1, 0, 0] = bias[3] = value
        y, taps = reference(x, w, bias, g, pool)
        assert not y[:, [1, 3]].isfinite().all() or value < 0
        assert y[:, [0, 2]].isfinite().all()
        assert_same(*run(x, w, bias, g, pool, tiles(g, pool, dtype, device)[0]), y, taps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_is_positive(dtype, device):
    """Whatever zeros and negative numbers a window holds, and where what is below zero rounds to
    it: torch's ReLU on a GPU knows no negative zero either.
    """
    g = conv_case(1, 1, (16, 64), 16, (1, 1))
    pool = pool_of(g, (2, 2))
    tiny = torch.finfo(dtype).smallest_normal
    values = torch.tensor([0.0, -0.0, -tiny, -1.0], dtype=dtype)
    windows = torch.cartesian_prod(*[values] * 4).view(8, 32, 2, 2)
    x = windows.permute(0, 2, 1, 3).reshape(g.x_shape).to(device)
    w = torch.full(g.w_shape, tiny, dtype=dtype, device=device)
    y, taps = run(x, w, None, g, pool, tiles(g, pool, dtype, device)[0])
    assert (y == 0).all()
    assert not y.signbit().any()
    assert (taps == 255).all()


def test_an_image_does_not_depend_on_its_neighbours(device):
    g, pool = replace(RESNET, N=5), pool_of(replace(RESNET, N=5), (3, 3), (1, 1))
    x = random(g.x_shape, torch.float32, device, 0)
    w = random(g.w_shape, torch.float32, device, 1)
    one, one_pool = replace(g, N=1), replace(pool, N=1)
    alone, _ = run(x[3:4], w, None, one, one_pool, tiles(one, one_pool, x.dtype, device)[0])
    x[:3] = x[4:] = torch.nan
    among, _ = run(x, w, None, g, pool, tiles(g, pool, x.dtype, device)[0])
    assert torch.equal(among[3:4], alone)


def test_64_bit_offsets_change_nothing(device, monkeypatch):
    g, pool = RESNET, pool_of(RESNET, (3, 3), (1, 1))
    x, w, bias = operands(g, torch.bfloat16, device)
    tile = tiles(g, pool, x.dtype, device)[1]
    narrow = run(x, w, bias, g, pool, tile)
    monkeypatch.setattr(kernel_device, "int64_index", lambda *_: True)
    assert all(map(torch.equal, narrow, run(x, w, bias, g, pool, tile)))


def test_no_images(device):
    g = replace(LENET, N=0)
    x, w, bias = operands(g, torch.float32, device)
    pool = pool_of(g, (2, 2))
    y, taps = run(x, w, bias, g, pool, tiles(g, pool, x.dtype, device)[0])
    assert y.numel() == taps.numel() == 0


def test_what_is_supported(device):
    here = kernel_device.describe(device)

    def supports(g, pool, dtype=torch.float16):
        return few_channels.supports(Problem("fprop", g, dtype, "ieee", here), pool)

    assert supports(RESNET, pool_of(RESNET, (3, 3), (1, 1)))
    assert not supports(RESNET, pool_of(RESNET, (3, 3)), torch.float64)
    assert not supports(RESNET, replace(pool_of(RESNET, (3, 3)), stride=(1, 1)))
    assert not supports(RESNET, pool_of(RESNET, (4, 3)))
    for g in (replace(RESNET, C=5), replace(RESNET, C=4, K=2, groups=2), replace(RESNET, S=30)):
        assert not supports(g, pool_of(g, (2, 2)))
