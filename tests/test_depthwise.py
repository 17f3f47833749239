"""Engine 4 through its launchers, with chosen tiles and with small patches of several shapes.

Results are filled with NaN before each launch, so an element that no program writes shows.
"""

from dataclasses import replace

import pytest
import torch
from cases import DTYPES, LAYOUTS, conv_case, operands, params, random, sliced
from tolerance import (
    assert_close,
    assert_operator_close,
    double,
    evaluate,
    torch_conv2d,
    torch_conv_transpose2d,
)

from kernels import depthwise
from kernels import device as kernel_device
from kernels.device import Device
from kernels.geometry import output_strides
from kernels.tile import Tile, is_valid

SAME = conv_case(2, 20, (6, 7), 20, (3, 3), padding=(1, 1, 1, 1), groups=20)
STRIDED = conv_case(3, 8, (9, 10), 8, (3, 3), (2, 2), (1, 1, 1, 1), groups=8)
DILATED = conv_case(2, 5, (9, 8), 5, (3, 2), (1, 2), (2, 1, 0, 3), (2, 3), groups=5)
MULTIPLIED = conv_case(2, 5, (7, 6), 15, (3, 2), (2, 1), (1, 1, 0, 2), groups=5)
TYPICAL = (SAME, STRIDED, DILATED, MULTIPLIED)
CASES = (
    *TYPICAL,
    # wide kernels, whose taps are taken row by row and one by one; one tap; even kernels
    conv_case(2, 9, (7, 9), 9, (5, 5), padding=(2, 2, 2, 2), groups=9),
    conv_case(1, 8, (8, 8), 8, (7, 7), (2, 2), (3, 3, 3, 3), groups=8),
    conv_case(1, 3, (2, 12), 6, (3, 13), padding=(1, 1, 4, 5), groups=3),
    conv_case(2, 3, (5, 4), 3, (1, 1), stride=(2, 3), groups=3),
    conv_case(2, 4, (8, 7), 8, (4, 2), padding="same", dilation=(2, 1), groups=4),
    # pixels that no window meets; strides and dilations with a common divisor
    conv_case(2, 6, (9, 10), 6, (2, 1), stride=(3, 4), groups=6),
    conv_case(2, 2, (11, 12), 2, (3, 4), (4, 6), (2, 2, 3, 3), (2, 4), groups=2),
    # a stride of two along one axis, padding beyond the kernel
    conv_case(2, 3, (6, 9), 3, (2, 3), (1, 2), (3, 0, 1, 4), groups=3),
)
SOME_DTYPES = (torch.float32, torch.bfloat16)
DIRECTIONS = ("fprop", "dgrad", "wgrad")


def chosen(g, dtype, device, channels_last=True):
    """What the engine would launch, by direction."""
    here = kernel_device.describe(device)
    return {
        name: depthwise.choose_tile(name, g, dtype, here, channels_last) for name in DIRECTIONS
    }


def patched(rows, columns, patch, splits=3):
    """Tiles of several programs along each axis, in which a row is a patch of places."""
    tile = Tile(rows, columns, patch=patch)
    return {
        "fprop": tile,
        "dgrad": tile,
        "wgrad": replace(tile, patch=(1, patch[1]), splits=splits),
    }


class Launch(torch.autograd.Function):
    """The three launchers as one differentiable function, with results poisoned beforehand."""

    @staticmethod
    def forward(ctx, x, w, bias, residual, g, tiles, relu):
        y = like(x.new_full(g.y_shape, torch.nan), x)
        depthwise.fprop(x, w, bias, residual, y, g, tiles["fprop"], relu=relu, precision="ieee")
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
    depthwise.dgrad(dy, w, bias, dx, g, tiles["dgrad"], precision="ieee")
    return dx


def wgrad(x, dy, w, g, tiles, dw=True, db=True):
    strides = output_strides(w.shape, w.stride(1) < w.stride(3))
    dw = w.new_empty_strided(w.shape, strides).fill_(torch.nan) if dw else None
    db = w.new_full((g.K,), torch.nan) if db else None
    depthwise.wgrad(x, dy, dw, db, g, tiles["wgrad"], precision="ieee")
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


@pytest.mark.parametrize(("g", "dtype"), params(CASES, DTYPES))
def test_chosen_tiles(g, dtype, device):
    check(g, operands(g, dtype, device, "channels_last"), chosen(g, dtype, device))


PATCHES = ((2, 4), (2, 2), (1, 8), (8, 1), (3, 5))


@pytest.mark.parametrize(("g", "patch"), params(CASES, PATCHES[:2]))
def test_patches(g, patch, device):
    """With tails along both axes, rows that are not aligned among them."""
    t = operands(g, torch.bfloat16, device, "channels_last")
    check(g, t, patched(16, 8, patch))


@pytest.mark.parametrize(("g", "patch"), params(TYPICAL, PATCHES[2:]))
def test_other_patches(g, patch, device):
    check(g, operands(g, torch.float32, device), patched(32, 1, patch))


@pytest.mark.parametrize(("g", "layout"), params(TYPICAL, LAYOUTS))
def test_layouts(g, layout, device):
    """Filters in either format, views between NaN, and tensors expanded with stride 0."""
    check(g, operands(g, torch.float32, device, layout), patched(64, 8, (2, 4)))
