"""Max-pooling's kernels against torch on the CPU: exact but for sums of gradients.

All results are poisoned before each launch, so that an element that is not written shows.
"""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cases import DTYPES, examples, in_strides, random, sliced
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor

from kernels.device import Device, describe, int64_index, launch, launches
from kernels.geometry import Pool2dGeometry, is_channels_last, largest_offset, output_strides
from kernels.lang.integers import _compiled_decode_ints, _compiled_quotient, divisors, encode_ints
from kernels.pool import max_pool, max_unpool
from kernels.tile import Tile, is_valid

LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")


def pool_case(n, c, hw, kernel, stride=None, padding=(0, 0), dilation=(1, 1), ceil_mode=False):
    return Pool2dGeometry(n, c, *hw, kernel, stride or kernel, padding, dilation, ceil_mode)


def pool_id(g: Pool2dGeometry) -> str:
    """As in N2-C5-H9-W11-k3x2-s2x1-p1x0-d1x1-ceil."""
    shape = [f"{letter}{getattr(g, letter)}" for letter in "NCHW"]
    pairs = zip("kspd", (g.kernel, g.stride, g.padding, g.dilation), strict=True)
    window = [f"{letter}{rows}x{columns}" for letter, (rows, columns) in pairs]
    return "-".join(shape + window + ["ceil"] * g.ceil_mode)


PLAIN = pool_case(2, 5, (6, 8), (2, 2))
OVERLAPPING = pool_case(2, 3, (9, 11), (3, 3), (2, 2), (1, 1))
CASES = (
    PLAIN,
    OVERLAPPING,
    pool_case(2, 5, (9, 11), (3, 2), (2, 1), (1, 0), ceil_mode=True),
    # every window overlaps its neighbours
    pool_case(1, 17, (7, 6), (3, 3), (1, 1), (1, 1)),
    pool_case(2, 3, (8, 7), (5, 4), (2, 1), (2, 2)),
    # gaps between windows, and pixels behind the last one
    pool_case(2, 6, (11, 10), (2, 1), (3, 4)),
    pool_case(1, 4, (7, 7), (3, 3), (3, 3)),
    # with ceil_mode a last window that hangs over, and one that would start in the padding
    pool_case(2, 4, (7, 8), (2, 3), (2, 3), ceil_mode=True),
    pool_case(1, 3, (5, 5), (2, 2), (3, 3), (1, 1), ceil_mode=True),
    # dilation by itself, sharing a divisor with the stride, and beyond the padding
    pool_case(2, 3, (9, 10), (2, 3), (1, 1), (1, 1), (2, 3)),
    pool_case(2, 3, (11, 12), (3, 2), (2, 4), (1, 1), (4, 2)),
    pool_case(1, 5, (4, 6), (3, 3), (1, 2), (1, 1), (2, 2), ceil_mode=True),
    # a single pixel, a window as large as the image, one larger than it
    pool_case(3, 4, (1, 1), (1, 1)),
    pool_case(2, 5, (4, 3), (4, 3)),
    pool_case(2, 5, (2, 3), (3, 5), (1, 1), (1, 2)),
    pool_case(1, 1, (6, 5), (2, 2), (1, 1)),
)


def params(cases, *axes):
    """pytest parameters: each case with each combination of the other values."""
    tuples = [()]
    for axis in axes:
        tuples = [(*values, value) for values in tuples for value in axis]
    return [
        pytest.param(
            g, *values, id="-".join([pool_id(g), *(str(v).split(".")[-1] for v in values)])
        )
        for g in cases
        for values in tuples
    ]


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values in a layout; "expanded" repeats the first image, column and row with stride 0."""
    if layout == "sliced":
        return sliced(t)
    if layout == "expanded":
        return t[:1, :, :1, :1].expand_as(t)
    return in_strides(t, layout == "channels_last")


def tied(g: Pool2dGeometry, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Input of few different values, both zeros among them: many windows have several maxima."""
    return (random(g.x_shape, dtype, device, seed) * 2).round() / 2


def poisoned(shape, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A result to be written, of garbage, in the memory format of ``like``."""
    channels_last = is_channels_last(like.shape, like.stride())
    result = torch.empty_strided(
        shape, output_strides(shape, channels_last), dtype=dtype, device=like.device
    )
    return result.fill_(torch.nan if dtype.is_floating_point else 77)


def tile_for(direction, g: Pool2dGeometry, like: Tensor) -> Tile:
    channels_last = is_channels_last(like.shape, like.stride())
    return max_pool.choose_tile(direction, g, channels_last, describe(like.device))


def pool(x: Tensor, g: Pool2dGeometry, tile: Tile | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(y, argmax, indices) of the kernel."""
    y = poisoned(g.y_shape, x.dtype, x)
    argmax = poisoned(g.y_shape, max_pool.argmax_dtype(g), x)
    indices = poisoned(g.y_shape, torch.int64, x)
    max_pool.max_pool2d(x, g, y, argmax, indices, tile or tile_for("forward", g, x))
    return y, argmax, indices


def pool_backward(
    dy: Tensor, argmax: Tensor, g: Pool2dGeometry, tile: Tile | None = None
) -> Tensor:
    dx = poisoned(g.x_shape, dy.dtype, argmax)
    max_pool.max_pool2d_backward(dy, argmax, dx, g, tile or tile_for("backward", g, dx))
    return dx


def gather(ddx: Tensor, argmax: Tensor, g: Pool2dGeometry, tile: Tile | None = None) -> Tensor:
    ddy = poisoned(g.y_shape, ddx.dtype, argmax)
    max_pool.max_pool2d_gather(ddx, argmax, ddy, g, tile or tile_for("forward", g, ddy))
    return ddy


def unpool(x: Tensor, indices: Tensor, size: tuple[int, int]) -> Tensor:
    y = poisoned((*x.shape[:2], *size), x.dtype, x)
    max_unpool.max_unpool2d(x, indices, y)
    return y


def unpool_backward(dy: Tensor, indices: Tensor) -> Tensor:
    dx = poisoned(indices.shape, dy.dtype, indices)
    max_unpool.max_unpool2d_backward(dy, indices, dx)
    return dx


def torch_pool(x: Tensor, g: Pool2dGeometry) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.max_pool2d_with_indices(
        x.cpu().contiguous(), g.kernel, g.stride, g.padding, g.dilation, g.ceil_mode
    )


def torch_backward(dy: Tensor, x: Tensor, g: Pool2dGeometry, indices: Tensor) -> Tensor:
    return torch.ops.aten.max_pool2d_with_indices_backward(
        *(dy.cpu().contiguous(), x.to("cpu", dy.dtype).contiguous()),
        *(g.kernel, g.stride, g.padding, g.dilation, g.ceil_mode),
        indices.cpu().contiguous(),
    )


def assert_same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        ours.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True, check_stride=False
    )


def assert_gradient(dx: Tensor, dy: Tensor, x: Tensor, g: Pool2dGeometry, indices: Tensor) -> None:
    """dx is right by the rule of ``tolerance``."""
    exact = dy.double()
    assert_close(
        dx,
        torch_backward(exact, x, g, indices),
        torch_backward(dy, x, g, indices),
        torch_backward(exact.abs(), x, g, indices),
        name="dx",
    )


def assert_forward_as_torch(
    x: Tensor, g: Pool2dGeometry, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Values and indices are torch's, exactly. Returns (y, argmax, indices) of the kernel."""
    y, argmax, indices = pool(x, g, tile)
    expected, expected_indices = torch_pool(x, g)
    assert_same(y, expected)
    assert_same(indices, expected_indices)
    return y, argmax, indices


def assert_all_as_torch(
    x: Tensor, dy: Tensor, g: Pool2dGeometry, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Forward, backward and gather. Returns the argmax and dx, for further checks."""
    _, argmax, indices = assert_forward_as_torch(x, g, tile)
    dx = pool_backward(dy, argmax, g, tile)
    assert_gradient(dx, dy, x, g, indices)
    ddx = random(g.x_shape, x.dtype, x.device, 2)
    winners = ddx.flatten(2).gather(2, indices.flatten(2)).view(g.y_shape)
    assert_same(gather(ddx, argmax, g, tile), winners)
    return argmax, dx


@pytest.mark.parametrize(
    ("g", "dtype", "layout"),
    params(CASES, [torch.float32], LAYOUTS[:2])
    + params(CASES[:2], [torch.float32], LAYOUTS[2:])
    + params(CASES[:2], [dtype for dtype in DTYPES if dtype != torch.float32], LAYOUTS),
)
def test_values_indices_and_gradients(g, dtype, layout, device):
    x = laid_out(tied(g, dtype, device), layout)
    dy = laid_out(random(g.y_shape, dtype, device, 1), layout)
    assert_all_as_torch(x, dy, g)


@pytest.mark.parametrize(("rows", "columns"), [(32, 2), (64, 1), (16, 16), (512, 1)], ids=str)
def test_any_tile(rows, columns, device):
    g = OVERLAPPING
    x, dy = tied(g, torch.float32, device), random(g.y_shape, torch.float32, device, 1)
    assert_all_as_torch(x, dy, g, Tile(rows, columns))


def among_channels(t: Tensor, first: int) -> Tensor:
    """The values in channels_last, as some of 24 channels from ``first`` on."""
    base = in_strides(t.new_zeros((t.shape[0], 24, *t.shape[2:])), channels_last=True)
    return base[:, first : first + t.shape[1]].copy_(t)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("channels", "first"), [(8, 0), (16, 8), (8, 1), (12, 0), (12, 2), (20, 0), (7, 0)], ids=str
)
def test_channels_that_are_whole_vectors_and_others(channels, first, dtype, device):
    """Strides and channels are multiples of a vector or of a part, pointers aligned or not."""
    g = pool_case(2, channels, (5, 7), (3, 3), (2, 2), (1, 1))
    x = among_channels(tied(g, dtype, device), first)
    dy = among_channels(random(g.y_shape, dtype, device, 1), first)
    argmax, dx = assert_all_as_torch(x, dy, g)
    y, codes = (among_channels(poisoned(g.y_shape, t, x), first) for t in (dtype, torch.uint8))
    tile = max_pool.choose_tile("forward", g, True, describe(x.device))
    max_pool.max_pool2d(x, g, y, codes, None, tile)
    assert_same(codes, argmax)
    assert_same(y, torch_pool(x, g)[0])
    again = among_channels(poisoned(g.x_shape, dtype, x), first)
    tile = max_pool.choose_tile("backward", g, True, describe(x.device))
    max_pool.max_pool2d_backward(dy, codes, again, g, tile)
    assert_same(again, dx)


@pytest.mark.parametrize("kernel", [(2, 2), (3, 3), (5, 5)], ids=str)
@pytest.mark.parametrize("none", [(255, torch.uint8), (65535, torch.uint16), (-1, torch.int16)])
def test_a_window_without_a_winner_gives_no_gradient(kernel, none, device):
    """Whatever its gradient is, and whichever integers hold the argmax."""
    g = pool_case(2, 5, (8, 9), kernel, (2, 2), (1, 1))
    x, dy = tied(g, torch.float32, device), random(g.y_shape, torch.float32, device, 1)
    _, argmax, _ = pool(x, g)
    lost = random(g.y_shape, torch.float32, device, 2) > 0
    expected = pool_backward(dy.masked_fill(lost, 0), argmax, g)
    code, dtype = none
    argmax = torch.where(lost, code, argmax.to(torch.int32)).to(dtype)
    assert_same(pool_backward(dy.masked_fill(lost, torch.nan), argmax, g), expected)
    assert_same(gather(torch.full_like(x, torch.nan), argmax, g).isnan(), ~lost)


def test_a_worked_example(device):
    g = pool_case(1, 1, (4, 4), (3, 3), (1, 1))
    x = torch.tensor(
        [[1, 2, 0, 1], [4, 4, 3, 0], [0, 1, 9, 5], [2, 2, 1, 0]], dtype=torch.float32, device=device
    ).view(g.x_shape)
    y, argmax, indices = pool(x, g)
    assert y.flatten().tolist() == [9, 9, 9, 9]
    assert argmax.flatten().tolist() == [8, 7, 5, 4]
    assert indices.flatten().tolist() == [10, 10, 10, 10]
    dy = torch.tensor([[1, 2], [4, 8]], dtype=torch.float32, device=device).view(g.y_shape)
    dx = pool_backward(dy, argmax, g)
    assert dx.flatten().nonzero().flatten().tolist() == [10]
    assert dx[0, 0, 2, 2].item() == 15
    assert gather(x * 2, argmax, g).flatten().tolist() == [18, 18, 18, 18]


def test_of_equal_values_the_first_wins(device):
    g = pool_case(1, 2, (4, 6), (2, 3))
    x = torch.tensor([0.0, -0.0] * 24, device=device).view(g.x_shape)
    _, argmax, _ = assert_forward_as_torch(x, g)
    assert not argmax.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_that_wins_keeps_its_sign(dtype, device):
    """Zeros of both signs, in all orders, among negative numbers."""
    values = torch.tensor([0.0, -0.0, -1.0], dtype=dtype, device=device)
    x = torch.cartesian_prod(*[values] * 4).view(1, 81, 2, 2)
    g = pool_case(1, 81, (2, 2), (2, 2))
    y, *_ = assert_forward_as_torch(x, g)
    assert torch.equal(y.signbit().cpu(), torch_pool(x, g)[0].signbit().cpu())


@pytest.mark.parametrize(("g", "dtype"), params((PLAIN, OVERLAPPING, CASES[2]), DTYPES))
def test_nan_and_infinity(g, dtype, device):
    """A NaN wins over all before it, and the last of several; infinities are plain values."""
    x = tied(g, dtype, device)
    kind = torch.randint(8, g.x_shape, generator=torch.Generator().manual_seed(3)).to(device)
    for number, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[kind == number] = value
    y, _, indices = assert_forward_as_torch(x, g)
    assert y.isnan().any()
    assert not y.isnan().all()
    assert_same(y, x.flatten(2).gather(2, indices.flatten(2)).view(g.y_shape))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf], ids=["nan", "-inf"])
def test_windows_of_one_value(value, device):
    """Of NaNs the last pixel wins, of -inf the first inside the image; it gets the gradient."""
    g = pool_case(2, 3, (5, 6), (3, 3), (2, 2), (1, 1))
    x = torch.full(g.x_shape, value, device=device)
    _, argmax, indices = assert_forward_as_torch(x, g)
    dy = random(g.y_shape, torch.float32, device, 1)
    assert_gradient(pool_backward(dy, argmax, g), dy, x, g, indices)


def test_values_just_outside_a_window_do_not_leak(device):
    g = pool_case(1, 2, (7, 7), (2, 2), (3, 3))
    x = torch.full(g.x_shape, torch.nan, device=device)
    for h in (0, 1, 3, 4):
        for w in (0, 1, 3, 4):
            x[:, :, h, w] = h - w
    y, argmax, _ = assert_forward_as_torch(x, g)
    assert y.isfinite().all()
    covered = x.isfinite()
    dx = pool_backward(torch.full_like(y, torch.inf), argmax, g)
    assert (dx[~covered] == 0).all()
    assert dx.isinf().sum() == y.numel()


NO_PIXEL = (
    pool_case(2, 3, (1, 8), (3, 3), (3, 3), (1, 1), (2, 2), ceil_mode=True),
    pool_case(2, 3, (1, 8), (3, 128), (3, 64), (1, 64), (2, 1), ceil_mode=True),
    pool_case(2, 3, (1, 8), (3, 32768), (3, 9999), (1, 16384), (2, 1), ceil_mode=True),
)


@pytest.mark.parametrize(
    ("g", "dtype"), params(NO_PIXEL[:1], DTYPES) + params(NO_PIXEL[1:], [torch.float32])
)
def test_windows_without_a_pixel(g, dtype, device):
    """-inf, index -1 and no gradient, where torch gives an index outside the image.

    The windows take rows -1, 1 and 3 of an image with row 0 alone.
    """
    none = {torch.uint8: 2**8 - 1, torch.uint16: 2**16 - 1, torch.int32: -1}
    y, argmax, indices = pool(tied(g, dtype, device), g)
    assert (y == -torch.inf).all()
    assert (indices == -1).all()
    assert (argmax.to(torch.int64) == none[max_pool.argmax_dtype(g)]).all()
    dx = pool_backward(torch.full_like(y, torch.nan), argmax, g)
    assert_same(dx, torch.zeros(g.x_shape, dtype=dtype))
    ddx = torch.full(g.x_shape, torch.nan, dtype=dtype, device=device)
    assert_same(gather(ddx, argmax, g), torch.zeros_like(y))


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        ((15, 17), torch.uint8),
        ((16, 16), torch.uint16),
        ((255, 257), torch.uint16),
        ((256, 256), torch.int32),
    ],
    ids=str,
)
def test_argmax_dtype(kernel, dtype):
    assert max_pool.argmax_dtype(pool_case(1, 1, (300, 300), kernel)) == dtype


@pytest.mark.parametrize(
    "g",
    [
        pool_case(2, 3, (5, 7), (4, 128), (2, 64), (2, 64), ceil_mode=True),
        pool_case(2, 3, (5, 3), (4, 32768), (1, 32768), (2, 16384)),
    ],
    ids=pool_id,
)
def test_large_windows(g, device):
    x = tied(g, torch.float32, device)
    argmax, _ = assert_all_as_torch(x, random(g.y_shape, torch.float32, device, 1), g)
    assert argmax.to(torch.int64).max() > torch.iinfo(torch.uint8).max
    if g.taps > 2**16:
        assert argmax.to(torch.int64).max() > torch.iinfo(torch.uint16).max


def test_results_that_are_not_wanted(device):
    x = tied(OVERLAPPING, torch.float32, device)
    y, argmax, indices = pool(x, OVERLAPPING)
    for wants_offsets, wants_indices in ((False, False), (True, False), (False, True)):
        poisons = [torch.full_like(t, 77) for t in (y, argmax, indices)]
        max_pool.max_pool2d(
            *(x, OVERLAPPING, poisons[0]),
            poisons[1] if wants_offsets else None,
            poisons[2] if wants_indices else None,
            tile_for("forward", OVERLAPPING, x),
        )
        assert_same(poisons[0], y)
        assert_same(poisons[1], argmax if wants_offsets else torch.full_like(argmax, 77))
        assert_same(poisons[2], indices if wants_indices else torch.full_like(indices, 77))


def test_an_empty_batch_launches_nothing(device):
    g = pool_case(0, 3, (5, 5), (2, 2))
    before = launches()
    y, argmax, indices = pool(torch.empty(g.x_shape, device=device), g)
    assert pool_backward(y, argmax, g).shape == g.x_shape
    assert gather(torch.empty(g.x_shape, device=device), argmax, g).shape == g.y_shape
    assert unpool(y, indices, (5, 5)).shape == g.x_shape
    assert unpool_backward(torch.empty(g.x_shape, device=device), indices).shape == g.y_shape
    assert launches() == before


def test_two_runs_agree_bitwise(device):
    g = CASES[3]
    x, dy = tied(g, torch.float16, device), random(g.y_shape, torch.float16, device, 1)
    _, argmax, _ = pool(x, g)
    runs = [pool_backward(dy, argmax, g).view(torch.int16) for _ in range(2)]
    assert torch.equal(*runs)


@st.composite
def pools(draw):
    """Any pooling that torch takes and that has a window; small images, windows of any kind."""
    ceil_mode = draw(st.booleans())
    axes = []
    for _ in range(2):
        size, kernel, stride, dilation = (draw(st.integers(1, most)) for most in (12, 5, 5, 3))
        padding = draw(st.integers(0, kernel // 2))
        short = dilation * (kernel - 1) + 1 - size - 2 * padding
        if ceil_mode:
            short -= stride - 1
        axes.append((size + max(0, short), kernel, stride, padding, dilation))
    sizes, *window = zip(*axes, strict=True)
    return Pool2dGeometry(
        draw(st.integers(1, 2)), draw(st.integers(1, 5)), *sizes, *window, ceil_mode
    )


def has_pixel(g: Pool2dGeometry) -> Tensor:
    """[P, Q]: whether a window has a pixel of the image at all."""
    axes = [
        torch.tensor(
            [
                any(0 <= p * stride - padding + r * dilation < size for r in range(kernel))
                for p in range(places)
            ]
        )
        for size, places, kernel, stride, padding, dilation in zip(
            *((g.H, g.W), (g.P, g.Q), g.kernel, g.stride, g.padding, g.dilation), strict=True
        )
    ]
    return axes[0][:, None] & axes[1]


@examples(60)
@given(
    g=pools(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    nan=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_geometry(g, dtype, layout, nan, seed, device):
    x = laid_out(tied(g, dtype, device, seed), layout)
    if nan and layout != "expanded":
        x[x > 1] = torch.nan
    y, argmax, indices = pool(x, g)
    expected, expected_indices = torch_pool(x, g)
    found = has_pixel(g)
    assert_same(y, expected.masked_fill(~found, -torch.inf))
    assert_same(indices, expected_indices.masked_fill(~found, -1))
    dy = laid_out(random(g.y_shape, dtype, device, seed + 1), layout)
    dx = pool_backward(dy, argmax, g)
    if found.all():
        assert_gradient(dx, dy, x, g, indices)
    else:
        # An image too small for one window along an axis is too small for all.
        assert not found.any()
        assert not dx.any()


# Unpooling.


def spread(t: Tensor, layout: str) -> Tensor:
    """The values, of any dtype, in a layout."""
    if layout == "sliced":
        return torch.stack((t, t), -1)[..., 0]
    return in_strides(t, layout == "channels_last")


def random_indices(shape, size: tuple[int, int], device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(size[0] * size[1], shape, generator=generator).to(device)


@pytest.mark.parametrize(("g", "dtype", "layout"), params((PLAIN, CASES[6]), DTYPES, LAYOUTS[:3]))
def test_unpool_after_a_pooling(g, dtype, layout, device):
    x = random(g.x_shape, dtype, device, 0)
    y, _, indices = pool(x, g)
    size = (g.H, g.W)
    expected = torch.ops.aten.max_unpool2d(y.cpu(), indices.cpu(), size)
    z = unpool(spread(y, layout), spread(indices, layout), size)
    assert_same(z, expected)
    dz = spread(random(g.x_shape, dtype, device, 1), layout)
    expected = dz.flatten(2).gather(2, indices.flatten(2)).view(g.y_shape)
    assert_same(unpool_backward(dz, spread(indices, layout)), expected)


def test_unpool_worked_example(device):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device).view(1, 1, 2, 2)
    indices = torch.tensor([[5, 0], [4, 0]], device=device).view(1, 1, 2, 2)
    assert unpool(x, indices, (2, 3)).tolist() == [[[[4, 0, 0], [0, 3, 1]]]]
    dy = torch.arange(6.0, device=device).view(1, 1, 2, 3)
    assert unpool_backward(dy, indices).tolist() == [[[[5, 0], [4, 0]]]]


@pytest.mark.parametrize(
    ("shape", "size", "layout"),
    [
        ((2, 3, 9, 11), (4, 5), "contiguous"),
        ((2, 3, 9, 11), (4, 5), "channels_last"),
        ((2, 3, 9, 11), (4, 5), "sliced"),
        ((2, 17, 3, 2), (20, 30), "channels_last"),
        ((3, 700, 2, 2), (1, 3), "contiguous"),
        ((1, 1, 1, 33), (1, 1), "contiguous"),
    ],
    ids=str,
)
def test_of_equal_indices_the_last_wins(shape, size, layout, device):
    x, indices = random(shape, torch.float32, device, 0), random_indices(shape, size, device)
    planes = shape[0] * shape[1]
    expected = np.zeros((planes, size[0] * size[1]), np.float32)
    values, places = (t.reshape(planes, -1).cpu().numpy() for t in (x, indices))
    for plane in range(planes):
        for value, place in zip(values[plane], places[plane], strict=True):
            expected[plane, place] = value
    y = unpool(spread(x, layout), spread(indices, layout), size)
    assert_same(y, torch.from_numpy(expected).view(y.shape))


def test_unpool_expanded(device):
    shape, size = (2, 3, 4, 5), (6, 7)
    x = random((2, 3, 1, 1), torch.float32, device, 0).expand(shape)
    indices = random_indices((1, 1, 4, 5), size, device).expand(shape)
    assert_same(
        unpool(x, indices, size), unpool(spread(x, "contiguous"), indices.contiguous(), size)
    )


@pytest.mark.parametrize("bad", [-1, 12, 2**40])
def test_an_index_outside_raises_before_anything_is_written(bad):
    """On the CPU, whatever the kernels run on: there, nothing may be launched."""
    x = torch.ones(1, 2, 2, 2)
    indices = torch.arange(8).view(1, 2, 2, 2)
    indices[0, 1, 1, 0] = bad
    with pytest.raises(RuntimeError, match="index"):
        torch.ops.aten.max_unpool2d(x, indices, (3, 4))
    y, before = poisoned((1, 2, 3, 4), torch.float32, x), launches()
    with pytest.raises(RuntimeError, match=rf"index {bad} is outside \[0, 12\).* size 3x4"):
        max_unpool.max_unpool2d(x, indices, y)
    assert y.isnan().all()
    assert launches() == before


def test_unpool_backward_reads_nothing_outside(device):
    indices = torch.tensor([-1, 5, 6, 2**40], device=device).view(1, 1, 2, 2)
    dy = torch.full((1, 1, 2, 3), 7.0, device=device)
    assert unpool_backward(dy, indices).flatten().tolist() == [0, 7, 0, 0]


COMPILE_UNPOOL = """
import torch
from triton.backends.compiler import GPUTarget
from kernels import device
from kernels.pool import max_unpool
with device.compile_only(GPUTarget("cuda", 90, 32)) as compiled:
    x = torch.empty(1, 8, 4, 4, device="meta")
    max_unpool.max_unpool2d(x, x.to(torch.int64), torch.empty(1, 8, 8, 8, device="meta"))
print(compiled[0].asm["ptx"])
"""


def test_on_a_gpu_an_index_outside_fails_an_assertion(monkeypatch):
    """One assertion is compiled in, and none of the overflow checks that come in debug mode."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ptx = subprocess.run(
        [sys.executable, "-c", COMPILE_UNPOOL],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert len(re.findall(r"call\b[^;]*__assertfail", ptx)) == 1


# Sizes.


@triton.jit
def quotient_kernel(i_ptr, result_ptr, sizes, BLOCK: tl.constexpr):
    size, multiplier, shift = _compiled_decode_ints(sizes)
    at = tl.arange(0, BLOCK)
    i = tl.load(i_ptr + at)
    tl.store(result_ptr + at, _compiled_quotient(i, size, multiplier, shift))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 48, 64, 641, 2**16 + 1, 2**30 + 1, 2**31 - 2**20])
def test_quotients_without_a_division(size, device):
    """As GPUs compute them, in the interpreter too."""
    steps = torch.arange(1, 2**10) * (2**31 // size // 2**10 + 1)
    ends = torch.cat([steps * size - 1, steps * size, 2**31 - 1 - steps])
    i = ends[(ends >= 0) & (ends < 2**31)][: 2**11]
    i = torch.nn.functional.pad(i, (0, 2**11 - len(i))).to(torch.int32)
    result = poisoned((1, 1, 1, 2**11), torch.int32, i.view(1, 1, 1, -1)).flatten().to(device)
    sizes = encode_ints((size,)) + divisors(size)
    launch(quotient_kernel, (1,), i.to(device), result, sizes, len(i), device=device)
    assert_same(result, i // size)


@pytest.mark.parametrize("axis", range(4))
def test_offsets_beyond_32_bits(axis, device):
    """The last of three elements along an axis lies 2**31 elements away; few are touched."""
    shape = (3, 3, 3, 3)
    buffer = torch.empty(2**31 + 1024, dtype=torch.float16, device=device)
    strides = [27, 9, 3, 1]
    strides[axis] = 2**30
    x, y, dx, ddy, z = (buffer.as_strided(shape, strides, 128 * slot) for slot in range(5))
    assert largest_offset(shape, strides) >= 2**31
    assert int64_index(0, x)
    values = random(shape, torch.float16, device, 0)
    x.copy_(values)
    for result in (y, dx, ddy, z):
        result.fill_(torch.nan)

    g = pool_case(3, 3, (3, 3), (3, 3), (1, 1), (1, 1))
    forward, backward = tile_for("forward", g, y), tile_for("backward", g, dx)
    expected, argmax, indices = pool(values, g)
    max_pool.max_pool2d(x, g, y, None, None, forward)
    assert_same(y, expected)
    max_pool.max_pool2d_backward(x, argmax, dx, g, backward)
    assert_same(dx, pool_backward(values, argmax, g))
    max_pool.max_pool2d_gather(x, argmax, ddy, g, forward)
    assert_same(ddy, expected)
    max_unpool.max_unpool2d(x, indices, z)
    assert_same(z, unpool(values, indices, (3, 3)))
    max_unpool.max_unpool2d_backward(x, indices, z)
    assert_same(z, expected)


@pytest.mark.parametrize(
    "device",
    [
        Device("cuda", 80, 108, 163 << 10),
        Device("hip", "gfx942", 304, 64 << 10),
        Device("interpreter", "numpy", 1, 1 << 40),
    ],
    ids=lambda device: device.backend,
)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_every_tile_is_valid(device, channels_last):
    for channels in (1, 3, 64, 65, 2048, 2**20):
        for size in (1, 7, 1000):
            g = pool_case(64, channels, (size, size), (1, 1))
            for direction in ("forward", "backward"):
                tile = max_pool.choose_tile(direction, g, channels_last, device)
                assert is_valid(tile, 8, device), (channels, size, tile)
