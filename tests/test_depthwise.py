"""Engine 4 through its launchers, with chosen tiles and with small patches of several shapes.

Results are filled with NaN before each launch, so an element that no program writes shows.
"""

from dataclasses import replace
from itertools import cycle, product

import pytest
import torch
from cases import DTYPES, LAYOUTS, case_id, conv_case, operands, params, random, sliced
from tolerance import (
    assert_close,
    assert_operator_close,
    double,
    evaluate,
    torch_conv2d,
    torch_conv_transpose2d,
)

from kernels import device as kernel_device
from kernels.conv import depthwise
from kernels.conv.engine import Dgrad, Fprop, Wgrad
from kernels.device import Device
from kernels.geometry import output_strides
from kernels.lang.epilogue import Epilogue
from kernels.problem import Problem
from kernels.tile import Tile, is_valid

SAME = conv_case(2, 20, (5, 7), 20, (3, 3), padding=(1, 1, 1, 1), groups=20)
STRIDED = conv_case(3, 8, (9, 10), 8, (3, 3), (2, 2), (1, 1, 1, 1), groups=8)
DILATED = conv_case(2, 5, (9, 8), 5, (3, 2), (1, 2), (2, 1, 0, 3), (2, 3), groups=5)
MULTIPLIED = conv_case(2, 5, (7, 6), 15, (3, 2), (2, 1), (1, 1, 0, 2), groups=5)
TYPICAL = (SAME, STRIDED, DILATED, MULTIPLIED)
CASES = (
    *TYPICAL,
    # wide kernels, whose taps are taken row by row and one by one; one tap; even kernels
    conv_case(1, 9, (4, 9), 9, (3, 5), padding=(1, 1, 2, 2), groups=9),
    conv_case(1, 8, (5, 8), 8, (2, 7), (2, 2), (1, 0, 3, 3), groups=8),
    conv_case(1, 3, (2, 12), 6, (1, 13), padding=(0, 0, 4, 5), groups=3),
    conv_case(2, 3, (5, 4), 3, (1, 1), stride=(2, 3), groups=3),
    conv_case(2, 4, (8, 7), 8, (4, 2), padding="same", dilation=(2, 1), groups=4),
    # pixels that no window meets; strides and dilations with a common divisor
    conv_case(2, 6, (9, 10), 6, (2, 1), stride=(3, 4), groups=6),
    conv_case(2, 2, (11, 12), 2, (3, 4), (4, 6), (2, 2, 3, 3), (2, 4), groups=2),
    # a stride of two along one axis, padding beyond the kernel
    conv_case(2, 3, (6, 9), 3, (2, 3), (1, 2), (3, 0, 1, 4), groups=3),
)
DIRECTIONS = ("fprop", "dgrad", "wgrad")


def chosen(g, dtype, device, channels_last=True):
    """What the engine would launch, by direction."""
    here = kernel_device.describe(device)
    return {name: tile_of(name, g, dtype, here, channels_last) for name in DIRECTIONS}


def tile_of(direction, g, dtype, here, channels_last):
    layout = "channels_last" if channels_last else "scattered"
    (tile,) = depthwise.tiles(Problem(direction, g, dtype, "ieee", here, layout))
    return tile


def patched(patch):
    """Tiles in which a row is a patch of places, of as many channels a thread as on a GPU."""
    tile = Tile(16, 16, warps=1, patch=patch)
    wgrad = replace(tile, patch=(1, patch[1]), split_k=3)
    return {"fprop": tile, "dgrad": tile, "wgrad": wgrad}


class Launch(torch.autograd.Function):
    """The three launchers as one differentiable function, with results poisoned beforehand."""

    @staticmethod
    def forward(ctx, x, w, bias, residual, g, tiles, relu):
        y = like(x.new_full(g.y_shape, torch.nan), x)
        call = Fprop(x, w, y, g, epilogue=Epilogue(bias, residual, "relu" if relu else None))
        depthwise.fprop(call, tiles["fprop"])
        ctx.save_for_backward(x, w, y)
        ctx.rest = g, tiles, relu
        return y

    @staticmethod
    def backward(ctx, dy):
        (x, w, y), (g, tiles, relu) = ctx.saved_tensors, ctx.rest
        dz = torch.where(y <= 0, 0, dy) if relu else dy
        dx = dgrad(dz, w, None, g, tiles)
        dw, db = wgrad(x, dz, w, g, tiles)
        _, _, bias, residual, *_ = ctx.needs_input_grad
        return dx, dw, db if bias else None, dz if residual else None, None, None, None


def like(result, operand):
    """The result in rows of channels where its operand has them, else as a view between NaN."""
    if operand.stride(1) == 1:
        return result.contiguous(memory_format=torch.channels_last)
    return sliced(result)


def dgrad(dy, w, bias, g, tiles):
    dx = like(dy.new_full(g.x_shape, torch.nan), dy)
    depthwise.dgrad(Dgrad(dy, w, dx, g, bias=bias), tiles["dgrad"])
    return dx


def wgrad(x, dy, w, g, tiles, dw=True, db=True):
    strides = output_strides(w.shape, w.stride(1) < w.stride(3))
    dw = w.new_empty_strided(w.shape, strides).fill_(torch.nan) if dw else None
    db = w.new_full((g.K,), torch.nan) if db else None
    depthwise.wgrad(Wgrad(x, dy, dw, db, g), tiles["wgrad"])
    return dw, db


def conv(g, tiles, relu=False):
    return lambda *inputs: Launch.apply(*inputs, g, tiles, relu)


def check(g, t, tiles, relu=False, inputs=None):
    return assert_operator_close(
        conv(g, tiles, relu),
        torch_conv2d(g),
        (t.x, t.w, t.bias.contiguous(), t.residual) if inputs is None else inputs,
        t.dy,
        names=("x", "w", "bias", "residual"),
        relu=relu,
    )


@pytest.mark.parametrize(("g", "dtype"), params(CASES, (torch.bfloat16,)))
def test_chosen_tiles(g, dtype, device):
    check(g, operands(g, dtype, device, "channels_last"), chosen(g, dtype, device))


@pytest.mark.parametrize(
    ("g", "dtype"), params(TYPICAL, [d for d in DTYPES if d != torch.bfloat16])
)
def test_other_dtypes(g, dtype, device):
    check(g, operands(g, dtype, device), chosen(g, dtype, device, channels_last=False))


# As the planner has them on a GPU, and one that no axis of a case is a multiple of; with tails of
# rows, of channels and of patches along both axes.
PATCHES = ((2, 4), (2, 2), (1, 8), (1, 4), (4, 2), (3, 5))


@pytest.mark.parametrize(
    ("g", "patch"),
    [
        *params(TYPICAL, PATCHES[:1]),
        *(
            pytest.param(g, patch, id=f"{case_id(g)}-{patch}")
            for g, patch in zip(cycle(TYPICAL), PATCHES[1:])
        ),
        *params(CASES[len(TYPICAL) :], PATCHES[1:2]),
    ],
)
def test_patches(g, patch, device):
    check(g, operands(g, torch.bfloat16, device, "channels_last"), patched(patch))


@pytest.mark.parametrize(("g", "layout"), params(TYPICAL, LAYOUTS))
def test_layouts(g, layout, device):
    """Filters in either format, views between NaN, and tensors expanded with stride 0."""
    check(g, operands(g, torch.float32, device, layout), chosen(g, torch.float32, device))


@pytest.mark.parametrize("split_k", [1, 2, 9])
def test_splits(split_k, device):
    """One part, parts of several blocks, and more parts than blocks, so that some are empty."""
    g, tiles = STRIDED, patched((1, 2))
    tiles["wgrad"] = replace(tiles["wgrad"], split_k=split_k)
    check(g, operands(g, torch.float16, device), tiles)


@pytest.mark.parametrize(
    ("g", "bias", "residual"),
    [
        (SAME, False, True),
        (STRIDED, True, False),
        (DILATED, False, False),
        (MULTIPLIED, True, True),
    ],
    ids=lambda value: case_id(value) if not isinstance(value, bool) else str(value),
)
def test_epilogue(g, bias, residual, device):
    t = operands(g, torch.bfloat16, device, "channels_last")
    inputs = (t.x, t.w, t.bias if bias else None, t.residual if residual else None)
    y, _ = check(g, t, patched((2, 4)), relu=True, inputs=inputs)
    assert (y == 0).any()


@pytest.mark.parametrize("g", params(CASES))
def test_dgrad_adds_the_bias_of_a_transposed_convolution(g, device):
    t = operands(g, torch.float32, device)
    inputs = (t.dy, t.w, random((g.C,), torch.float32, device, seed=9))
    exact = [double(v) for v in inputs]
    same_dtype, reference, magnitude = (
        torch_conv_transpose2d(g)(*tensors) for tensors in (inputs, exact, [v.abs() for v in exact])
    )
    ours = dgrad(*inputs, g, chosen(g, torch.float32, device))
    assert_close(ours, reference, same_dtype, magnitude)


@pytest.mark.parametrize("g", params((SAME, MULTIPLIED)))
def test_a_gradient_alone_is_the_same(g, device):
    t = operands(g, torch.float32, device)
    tiles = patched((1, 4))
    both = wgrad(t.x, t.dy, t.w, g, tiles)
    only_dw, nothing = wgrad(t.x, t.dy, t.w, g, tiles, db=False)
    assert nothing is None
    assert torch.equal(only_dw, both[0])
    nothing, only_db = wgrad(t.x, t.dy, t.w, g, tiles, dw=False)
    assert nothing is None
    assert torch.equal(only_db, both[1])


def results(g, t, tiles):
    y, gradients = evaluate(conv(g, tiles), t.inputs, t.dy)
    return y, *gradients


@pytest.mark.parametrize("g", params((STRIDED, MULTIPLIED)))
def test_neither_a_repeat_nor_a_patch_changes_a_bit(g, device):
    """wgrad alone adds in an order of its tile."""
    t = operands(g, torch.float32, device, "channels_last")
    first = results(g, t, chosen(g, torch.float32, device))
    tiles = patched((2, 4))
    second = results(g, t, tiles)
    assert all(map(torch.equal, first[:2], second[:2]))
    assert all(map(torch.equal, second, results(g, t, tiles)))


@pytest.mark.parametrize("g", params((STRIDED, DILATED)))
def test_an_image_does_not_depend_on_its_neighbours(g, device):
    many, one = replace(g, N=5), replace(g, N=1)
    t = operands(many, torch.bfloat16, device)
    for i in range(5):
        t.x[i], t.dy[i] = (torch.nan, torch.nan) if i != 3 else (t.x[3], t.dy[3])
    y, dx, *_ = results(many, t, patched((2, 4)))
    alone = replace(t, x=t.x[3:4], residual=t.residual[3:4], dy=t.dy[3:4])
    y_alone, dx_alone, *_ = results(one, alone, chosen(one, torch.bfloat16, device))
    assert y_alone.isfinite().all()
    assert torch.equal(y[3:4], y_alone)
    assert torch.equal(dx[3:4], dx_alone)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("patch", [(1, 1), (2, 4)])
def test_what_no_window_holds_takes_no_part(patch, value, device):
    """All windows are surrounded by ``value``: they lie at 0, 1 and 3, 4 of 5 rows and columns."""
    g = conv_case(1, 3, (6, 6), 3, (2, 2), stride=(3, 3), groups=3)
    t = operands(g, torch.float32, device)
    for i in (2, 5):
        t.x[:, :, i], t.x[:, :, :, i] = value, value
    y, (dx, dw, db, _) = check(g, t, patched(patch))
    assert all(result.isfinite().all() for result in (y, dx, dw, db))
    assert (dx[:, :, 2] == 0).all()


@pytest.mark.parametrize("g", params((SAME, DILATED)))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_spreads_to_its_own_windows(g, value, device):
    """Pixels that a patch loads for places outside y among them."""
    t = operands(g, torch.float64, device)
    t.x[1, 1, 2, 3] = value
    t.x[0, 0, -1, -1] = value
    t.dy[0, 3, 1, 0] = value
    y, (dx, *_) = check(g, t, patched((2, 2)))
    for result in (y, dx):
        assert 0 < result.isfinite().sum() < result.numel()


def test_64_bit_offsets_change_nothing(device, monkeypatch):
    g, tiles = STRIDED, patched((2, 2))
    t = operands(g, torch.float32, device)
    narrow = results(g, t, tiles)
    monkeypatch.setattr(kernel_device, "int64_index", lambda *_: True)
    assert all(map(torch.equal, narrow, results(g, t, tiles)))


@pytest.mark.parametrize("split_k", [1, 3])
def test_no_images(split_k, device):
    g = replace(SAME, N=0)
    t = operands(g, torch.float32, device)
    tiles = chosen(g, torch.float32, device)
    tiles["wgrad"] = replace(tiles["wgrad"], split_k=split_k)
    y, dx, dw, db, _ = results(g, t, tiles)
    assert (y.shape, dx.shape) == (g.y_shape, g.x_shape)
    assert torch.equal(dw, torch.zeros_like(t.w))
    assert torch.equal(db, torch.zeros_like(t.bias))


DEVICES = (
    Device("interpreter", "numpy", multiprocessors=1, shared_memory=1 << 40),
    Device("cuda", 80, multiprocessors=108, shared_memory=163 << 10),
    Device("cuda", 90, multiprocessors=132, shared_memory=227 << 10),
    Device("hip", "gfx942", multiprocessors=304, shared_memory=64 << 10),
)
LAYERS = (
    *CASES,
    conv_case(0, 2, (1, 1), 2, (1, 1), groups=2),
    conv_case(256, 960, (7, 7), 960, (3, 3), padding="same", groups=960),
    conv_case(64, 2048, (7, 7), 2048, (31, 31), padding="same", groups=2048),
)


@pytest.mark.parametrize("target", DEVICES, ids=lambda target: f"{target.backend}-{target.arch}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_are_valid_and_their_patches_ignore_the_batch(dtype, target):
    for g, direction, channels_last in product(LAYERS, DIRECTIONS, (False, True)):
        tile = tile_of(direction, g, dtype, target, channels_last)
        assert is_valid(tile, dtype.itemsize, target), (g, direction, tile)
        assert direction != "wgrad" or tile.patch[0] == 1
        more = replace(g, N=7 * g.N + 1)
        other = tile_of(direction, more, dtype, target, channels_last)
        assert replace(other, rows=tile.rows, split_k=tile.split_k) == tile, (g, direction)


def test_what_is_supported():
    def supports(g):
        return any(depthwise.tiles(Problem("fprop", g, torch.float32, "ieee", DEVICES[0])))

    for g in CASES:
        assert supports(g)
    assert not supports(conv_case(1, 1, (3, 3), 4, (1, 1)))
    assert not supports(conv_case(1, 6, (3, 3), 6, (1, 1), groups=3))
