"""An engine of one kernel: the planner chooses it once it is in the list."""

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from cases import operands
from tolerance import assert_operator_close, torch_conv2d

from cnn import functional
from kernels import device as kernel_device
from kernels import planner
from kernels.conv.engine import Engine, Fprop
from kernels.device import launches, loop
from kernels.geometry import Conv2dGeometry
from kernels.lang.epilogue import results, store_result
from kernels.lang.integers import cdiv, decode_ints, decode_strides, encode_ints, pixel, program
from kernels.lang.integers import operands as arguments
from kernels.lang.numerics import dot
from kernels.ops import calls
from kernels.problem import Problem
from kernels.tile import Block, Tile


@triton.jit
def pointwise_kernel(
    x_ptr,  # [N, C, P, Q]
    w_ptr,  # [K, C, 1, 1]
    bias_ptr,  # [K] or None
    residual_ptr,  # like y, or None
    y_ptr,  # [N, K, P, Q]
    x_strides,  # n, c, p, q, encoded
    w_strides,  # k, c
    y_strides,  # the residual's, then y's
    sizes,  # N, P, Q, encoded
    K,
    C,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64_INDEX: tl.constexpr,
    TILE: tl.constexpr,  # a Block
):
    """y[n,k,p,q] = relu?(sum over c of x[n,c,p,q] * w[k,c] + bias[k] + residual[n,k,p,q])."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    N, P, Q = decode_ints(sizes)
    x_strides = decode_strides(x_strides)
    w_k, w_c = w_strides
    pid = program(INT64_INDEX)
    column_tiles = tl.cdiv(K, TILE.columns)
    n, p, q = pixel(pid // column_tiles * TILE.rows + tl.arange(0, TILE.rows), P, Q)
    k = pid % column_tiles * TILE.columns + tl.arange(0, TILE.columns)
    rows = n * x_strides.n + p * x_strides.h + q * x_strides.w
    acc = tl.zeros((TILE.rows, TILE.columns), ACC)
    for first in loop(0, C, TILE.depth):
        c = first + tl.arange(0, TILE.depth)
        mask = (n < N)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + (rows[:, None] + (c * x_strides.c)[None, :]), mask=mask, other=0.0)
        mask = (c < C)[:, None] & (k < K)[None, :]
        w = tl.load(w_ptr + ((c * w_c)[:, None] + (k * w_k)[None, :]), mask=mask, other=0.0)
        acc = dot(x, w, acc, PRECISION)
    masks = (n < N, k < K)
    store_result(acc, (n, p, q), k, masks, bias_ptr, residual_ptr, y_ptr, y_strides, RELU)


def tiles(problem: Problem) -> Iterator[Tile]:
    g = problem.g
    if problem.direction == "fprop" and g.pointwise and g.groups == 1 and g.C > 4:
        yield Tile(rows=32, columns=16, depth=16)


def fprop(call: Fprop, tile: Tile) -> None:
    x, w, y, g = call.x, call.w, call.y, call.g
    pixels = g.N * g.P * g.Q
    kernel_device.launch(
        pointwise_kernel,
        (cdiv(pixels, tile.rows) * cdiv(g.K, tile.columns),),
        device=x.device,
        **arguments(x=x),
        w_ptr=w,
        w_strides=w.stride()[:2],
        **results(call.epilogue, y),
        sizes=encode_ints((g.N, g.P, g.Q)),
        K=g.K,
        C=g.C,
        PRECISION=call.precision,
        INT64_INDEX=kernel_device.int64_index(pixels, x, w, call.epilogue.residual, y),
        TILE=Block.of(tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


POINTWISE = Engine("pointwise", tiles=tiles, launchers={Fprop: fprop})


@pytest.fixture
def pointwise(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """The engine, in front of the planner's others; no call from before is replayed."""
    monkeypatch.setattr(planner, "ENGINES", [POINTWISE, *planner.ENGINES])
    monkeypatch.setattr(calls, "known", {})
    planner.plan.cache_clear()
    yield POINTWISE
    planner.plan.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_engine_in_the_list_is_chosen_and_runs(layout, dtype, device, pointwise):
    g = Conv2dGeometry(N=2, C=17, H=5, W=3, K=9, R=1, S=1)  # sizes that fill no block
    here = kernel_device.describe(device)
    assert planner.plan(Problem("fprop", g, dtype, "ieee", here)).engine is pointwise
    assert planner.plan(Problem("dgrad", g, dtype, "ieee", here)).engine is not pointwise
    t = operands(g, dtype, device, layout)
    before = launches().get("pointwise_kernel", 0)

    def conv(x, w, bias, residual):
        return functional.conv2d(x, w, bias, residual=residual, activation="relu")

    names = "x", "w", "bias", "residual"
    assert_operator_close(conv, torch_conv2d(g), t.inputs, t.dy, names=names, relu=True)
    assert launches()["pointwise_kernel"] > before
