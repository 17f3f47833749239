"""Activations: every engine fuses each of them, and the gradient is that of torch's function."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as TF
import triton
import triton.language as tl
from cases import conv_case, operands, random
from tolerance import assert_close, torch_conv2d
from torch import Tensor

from kernels.conv import depthwise, descriptor_gemm, few_channels, implicit_gemm, paired_columns
from kernels.conv.engine import Fprop
from kernels.conv.relu_backward import relu_backward
from kernels.lang.epilogue import ACTIVATIONS, Activation, Epilogue
from kernels.lang.numerics import upcast
from kernels.tile import Tile

SLOPE = tl.constexpr(0.25)


@triton.jit
def leaky_relu(tile):
    return tl.where(tile < 0, tile * SLOPE, tile)


@triton.jit
def leaky_relu_gradient(dy, y):
    dy = upcast(dy, y.dtype)
    return tl.where(y > 0, dy, dy * SLOPE)


TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": partial(TF.leaky_relu, negative_slope=SLOPE.value),
}
FIRST, MIDDLE = conv_case(2, 3, (5, 7), 17, (3, 3)), conv_case(2, 16, (5, 7), 24, (3, 3))
LAYERS = {
    implicit_gemm.ENGINE: (MIDDLE, Tile(32, 16, 16)),
    descriptor_gemm.ENGINE: (MIDDLE, Tile(32, 16, 16, box=(1, 4, 8))),
    few_channels.ENGINE: (FIRST, Tile(32, 16, 16)),
    paired_columns.ENGINE: (FIRST, Tile(64, 16, 16, warps=8)),
    depthwise.ENGINE: (
        conv_case(2, 17, (5, 7), 17, (3, 3), groups=17),
        Tile(16, 16, warps=1, patch=(1, 2)),
    ),
}


@pytest.fixture(autouse=True)
def leaky(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second activation in the list, as anybody adds one."""
    row = Activation(leaky_relu, leaky_relu_gradient, of_result=True)
    monkeypatch.setitem(ACTIVATIONS, "leaky_relu", row)


def test_each_is_compared_with_torch():
    assert TORCH.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("engine", LAYERS, ids=repr)
@pytest.mark.parametrize("name", TORCH)
def test_every_engine_fuses_each(name, engine, device):
    g, tile = LAYERS[engine]
    t = operands(g, torch.bfloat16, device, "channels_last")
    y = torch.full_like(t.dy, torch.nan)
    engine.launch(Fprop(t.x, t.w, y, g, epilogue=Epilogue(t.bias, t.residual, name)), tile)
    given = t.x, t.w, t.bias, t.residual
    conv, act = torch_conv2d(g), TORCH[name]
    exact = [v.cpu().double() for v in given]
    magnitude = conv(*(v.abs() for v in exact))
    assert_close(y, act(conv(*exact)), act(conv(*given)), magnitude)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TORCH)
def test_each_gradient_is_torch_s(name, dtype, device):
    z, dy = (random((2, 9, 5, 6), dtype, device, seed) for seed in range(2))
    z[0, 0, 0, 0] = torch.nan
    z[1, 1, 1, 1], dy[1, 1, 1, 1] = -1, torch.inf
    z.requires_grad_()
    y = TORCH[name](z)
    (expected,) = torch.autograd.grad(y, z, dy)
    dz, db = torch.full_like(dy, torch.nan), dy.new_full((9,), torch.nan)
    relu_backward(dy, y.detach(), dz, db, name)
    assert torch.equal(dz, expected)
    sums = [dz.double().sum((0, 2, 3)), dz.sum((0, 2, 3)), dz.double().abs().sum((0, 2, 3))]
    assert_close(db, *sums)
