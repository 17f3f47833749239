"""Engine 3 through its launchers, with chosen and with tiny tiles.

Results are filled with NaN before each launch, so an element that no program writes shows.
"""

from dataclasses import replace
from itertools import product

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
from kernels.conv import few_channels, paired_columns
from kernels.conv.engine import Dgrad, Fprop, Normalization, Wgrad
from kernels.device import Device
from kernels.geometry import Pool2dGeometry, output_strides
from kernels.lang.epilogue import Epilogue
from kernels.pool import pool_gradient
from kernels.pool.pool_gradient import PoolGradient
from kernels.problem import Problem
from kernels.tile import INTERPRETER_ELEMENTS, Tile, is_valid

STEM = conv_case(2, 3, (9, 8), 8, (7, 7), stride=(2, 2), padding=(3, 3, 3, 3))
GROUPED = conv_case(2, 8, (6, 5), 20, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2), groups=2)
TYPICAL = (STEM, GROUPED)

CASES = (
    STEM,
    GROUPED,
    # one to four channels; filters that are fewer and more than a tile's columns
    conv_case(2, 1, (9, 8), 6, (5, 5), padding=(2, 2, 2, 2)),
    conv_case(3, 2, (4, 7), 17, (3, 3), padding=(0, 1, 1, 0)),
    conv_case(2, 3, (9, 11), 5, (3, 2), stride=(2, 1), padding=(1, 1, 0, 0)),
    conv_case(1, 4, (6, 6), 33, (2, 2), stride=(2, 2)),
    # a row of eleven taps, and rows that a block does not hold
    conv_case(2, 3, (13, 12), 7, (11, 11), stride=(4, 4), padding=(2, 2, 2, 2)),
    conv_case(1, 4, (3, 40), 3, (2, 37), padding=(0, 1, 5, 0)),
    # one tap, at every pixel and at a few: dgrad has pixels without any
    conv_case(2, 3, (5, 4), 7, (1, 1)),
    conv_case(2, 3, (9, 10), 5, (2, 1), stride=(3, 4)),
    # a kernel wider than the input, an even one with 'same', dilation beyond the padding
    conv_case(2, 2, (2, 3), 6, (5, 7), padding=(2, 2, 3, 3)),
    conv_case(2, 3, (5, 6), 7, (2, 4), padding="same"),
    conv_case(2, 3, (11, 12), 6, (3, 4), (4, 6), (2, 2, 3, 3), (2, 4)),
    # three groups of two channels
    conv_case(2, 6, (6, 5), 9, (3, 3), (1, 2), (1, 1, 1, 1), groups=3),
)

SOME_DTYPES = (torch.float32, torch.bfloat16)
DIRECTIONS = ("fprop", "dgrad", "wgrad")


def chosen(g, dtype, device):
    """The engine and tile that are launched, by direction."""
    here = kernel_device.describe(device)
    return {name: plan_of(name, g, dtype, here) for name in DIRECTIONS}


def plan_of(direction, g, dtype, here):
    """The engine for few channels, or that for pairs of outputs, with its tile."""
    problem = Problem(direction, g, dtype, "ieee", here)
    engines = paired_columns.ENGINE, few_channels.ENGINE
    return next((engine, tile) for engine in engines for tile in engine.tiles(problem))


def changed(plan, **fields):
    engine, tile = plan
    return engine, replace(tile, **fields)


TINY = {
    # Several programs along each axis, rows of the filter in parts, several turns.
    "fprop": (few_channels.ENGINE, Tile(64, 16, 16)),
    "dgrad": (few_channels.ENGINE, Tile(64, 4, 8)),
    "wgrad": (few_channels.ENGINE, Tile(16, 16, 64, split_k=3)),
}


class Launch(torch.autograd.Function):
    """The three launchers as one differentiable function, with results poisoned beforehand."""

    @staticmethod
    def forward(ctx, x, w, bias, residual, g, tiles, relu):
        y = sliced(x.new_full(g.y_shape, torch.nan))
        engine, tile = tiles["fprop"]
        engine.launch(
            Fprop(x, w, y, g, epilogue=Epilogue(bias, residual, "relu" if relu else None)), tile
        )
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


def dgrad(dy, w, bias, g, tiles):
    dx = sliced(dy.new_full(g.x_shape, torch.nan))
    engine, tile = tiles["dgrad"]
    engine.launch(Dgrad(dy, w, dx, g, bias=bias), tile)
    return dx


def wgrad(x, dy, w, g, tiles, dw=True, db=True):
    strides = output_strides(w.shape, w.stride(1) < w.stride(3))
    dw = w.new_empty_strided(w.shape, strides).fill_(torch.nan) if dw else None
    db = w.new_full((g.K,), torch.nan) if db else None
    engine, tile = tiles["wgrad"]
    engine.launch(Wgrad(x, dy, dw, db, g), tile)
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


@pytest.mark.parametrize("g", params(CASES))
def test_tiny_tiles(g, device):
    check(g, operands(g, torch.float32, device), TINY)


@pytest.mark.parametrize(("g", "layout"), params(TYPICAL, LAYOUTS))
def test_layouts(g, layout, device):
    """Filters in either format, views between NaN, and tensors expanded with stride 0."""
    t = operands(g, torch.float32, device, layout)
    check(g, t, chosen(g, torch.float32, device))


TILES = (
    # several rows of the filter in a block, a single one, a part of one
    *((STEM, "fprop", Tile(32, 16, depth)) for depth in (64, 32, 16)),
    *((STEM, "wgrad", Tile(16, columns, 32)) for columns in (64, 32, 16)),
    # filters and taps together in a block
    *((GROUPED, "dgrad", Tile(32, 4, depth, packed=True)) for depth in (8, 128)),
)


@pytest.mark.parametrize(
    ("g", "direction", "tile"),
    [
        pytest.param(*case, id=f"{case_id(g)}-{direction}-{tile.rows}x{tile.columns}x{tile.depth}")
        for case in TILES
        for g, direction, tile in [case]
    ],
)
def test_tiles(g, direction, tile, device):
    t = operands(g, torch.float16, device, "x_channels_last")
    check(g, t, chosen(g, torch.float16, device) | {direction: (few_channels.ENGINE, tile)})


@pytest.mark.parametrize(("g", "dtype", "split_k"), params(TYPICAL, (torch.float16,), (1, 2, 9)))
def test_splits(g, dtype, split_k, device):
    """One part, parts of several turns, and more parts than turns, so that some are empty."""
    tiles = chosen(g, dtype, device)
    tiles["wgrad"] = changed(tiles["wgrad"], depth=16, split_k=split_k)
    check(g, operands(g, dtype, device), tiles)


@pytest.mark.parametrize(("g", "dtype"), params(TYPICAL, SOME_DTYPES))
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_epilogue(g, dtype, bias, residual, device):
    t = operands(g, dtype, device)
    inputs = (t.x, t.w, t.bias if bias else None, t.residual if residual else None)
    y, _ = check(g, t, chosen(g, dtype, device), relu=True, inputs=inputs)
    assert (y == 0).any()


@pytest.mark.parametrize(("g", "dtype"), params(CASES, SOME_DTYPES))
def test_dgrad_adds_the_bias_of_a_transposed_convolution(g, dtype, device):
    t = operands(g, dtype, device)
    inputs = (t.dy, t.w, random((g.C,), dtype, device, seed=9))
    exact = [double(v) for v in inputs]
    same_dtype, reference, magnitude = (
        torch_conv_transpose2d(g)(*tensors) for tensors in (inputs, exact, [v.abs() for v in exact])
    )
    ours = dgrad(*inputs, g, chosen(g, dtype, device))
    assert_close(ours, reference, same_dtype, magnitude)


@pytest.mark.parametrize(("g", "split_k"), params(TYPICAL, (1, 3)))
def test_a_gradient_alone_is_the_same(g, split_k, device):
    t = operands(g, torch.float32, device)
    tiles = {"wgrad": changed(TINY["wgrad"], split_k=split_k)}
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


@pytest.mark.parametrize("g", params(TYPICAL))
def test_repeats_bit_for_bit(g, device):
    t = operands(g, torch.float32, device, "channels_last")
    for tiles in (chosen(g, torch.float32, device), TINY):
        assert all(map(torch.equal, results(g, t, tiles), results(g, t, tiles)))


@pytest.mark.parametrize(("g", "dtype"), params(TYPICAL, SOME_DTYPES))
def test_an_image_does_not_depend_on_its_neighbours(g, dtype, device):
    many, one = replace(g, N=9), replace(g, N=1)
    t = operands(many, dtype, device)
    for i in range(9):
        t.x[i], t.dy[i] = (torch.nan, torch.nan) if i != 4 else (t.x[4], t.dy[4])
    y, dx, *_ = results(many, t, chosen(many, dtype, device))
    alone = replace(t, x=t.x[4:5], residual=t.residual[4:5], dy=t.dy[4:5])
    y_alone, dx_alone, *_ = results(one, alone, chosen(one, dtype, device))
    assert y_alone.isfinite().all()
    assert torch.equal(y[4:5], y_alone)
    assert torch.equal(dx[4:5], dx_alone)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tiny", [False, True], ids=["", "tiny"])
def test_what_no_window_holds_takes_no_part(tiny, value, device):
    """All windows are surrounded by ``value``: they lie at 0, 1 and 3, 4 of 5 rows and columns."""
    g = conv_case(1, 3, (5, 5), 4, (2, 2), stride=(3, 3))
    t = operands(g, torch.float32, device)
    t.x[:, :, 2], t.x[:, :, :, 2] = value, value
    tiles = TINY if tiny else chosen(g, torch.float32, device)
    y, (dx, dw, db, _) = check(g, t, tiles)
    assert all(result.isfinite().all() for result in (y, dx, dw, db))
    assert (dx[:, :, 2] == 0).all()


@pytest.mark.parametrize("g", params(TYPICAL))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_spreads_to_its_own_windows(g, value, device):
    t = operands(g, torch.float64, device)
    t.x[1, 1, 2, 3] = value
    t.dy[0, 3, 1, 0] = value
    for tiles in (chosen(g, torch.float64, device), TINY):
        y, (dx, *_) = check(g, t, tiles)
        for result in (y, dx):
            assert 0 < result.isfinite().sum() < result.numel()


@pytest.mark.parametrize("g", params(TYPICAL))
def test_64_bit_offsets_change_nothing(g, device, monkeypatch):
    t = operands(g, torch.float32, device)
    for tiles in (chosen(g, torch.float32, device), TINY):
        monkeypatch.undo()
        narrow = results(g, t, tiles)
        monkeypatch.setattr(kernel_device, "int64_index", lambda *_: True)
        assert all(map(torch.equal, narrow, results(g, t, tiles)))


@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize("g", params(TYPICAL))
def test_no_images(g, split_k, device):
    empty = replace(g, N=0)
    t = operands(empty, torch.float32, device)
    tiles = chosen(empty, torch.float32, device)
    tiles["wgrad"] = changed(tiles["wgrad"], split_k=split_k)
    y, dx, dw, db, _ = results(empty, t, tiles)
    assert (y.shape, dx.shape) == (empty.y_shape, empty.x_shape)
    assert torch.equal(dw, torch.zeros_like(t.w))
    assert torch.equal(db, torch.zeros_like(t.bias))


def test_no_channels(device):
    g = conv_case(2, 0, (4, 5), 3, (2, 2))
    t = operands(g, torch.float32, device)
    y, dx, dw, db, _ = results(g, t, chosen(g, torch.float32, device))
    assert torch.equal(y, t.bias[:, None, None] + t.residual)
    assert dx.numel() == dw.numel() == 0
    assert db.allclose(t.dy.sum((0, 2, 3)))


DEVICES = (
    Device("interpreter", "numpy", multiprocessors=1, shared_memory=1 << 40),
    Device("cuda", 80, multiprocessors=108, shared_memory=163 << 10),
    Device("cuda", 90, multiprocessors=132, shared_memory=227 << 10),
    Device("hip", "gfx942", multiprocessors=304, shared_memory=64 << 10),
)
LAYERS = (
    *CASES,
    conv_case(256, 3, (224, 224), 64, (7, 7), (2, 2), (3, 3, 3, 3)),
    conv_case(128, 3, (224, 224), 96, (11, 11), (4, 4), (2, 2, 2, 2)),
    conv_case(64, 4, (8, 9000), 2000, (1, 3000)),
    conv_case(0, 0, (1, 1), 1, (1, 1)),
)


@pytest.mark.parametrize("target", DEVICES, ids=lambda target: f"{target.backend}-{target.arch}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_are_valid_and_their_order_of_summation_ignores_the_batch(dtype, target):
    for g, direction in product(LAYERS, DIRECTIONS):
        _, tile = plan_of(direction, g, dtype, target)
        assert is_valid(tile, dtype.itemsize, target), (g, direction, tile)
        if direction == "dgrad":
            block = tile.rows * tile.columns * tile.depth
            assert block <= INTERPRETER_ELEMENTS, (g, direction, tile)
        if direction != "wgrad":
            _, other = plan_of(direction, replace(g, N=7 * g.N + 1), dtype, target)
            assert replace(other, rows=tile.rows) == tile, (g, direction)


def test_what_is_supported():
    def supports(g):
        return any(few_channels.tiles(Problem("fprop", g, torch.float32, "ieee", DEVICES[0])))

    for g in CASES:
        assert supports(g)
    assert not supports(conv_case(1, 5, (3, 3), 4, (1, 1)))
    assert not supports(conv_case(1, 10, (3, 3), 4, (1, 1), groups=2))


@pytest.mark.parametrize(
    ("dtype", "layout"),
    list(zip(DTYPES, ("contiguous", "channels_last", "sliced", "x_channels_last"), strict=True)),
)
def test_bytes_are_normalized_as_they_are_loaded(dtype, layout, device):
    """As if x * scale + shift, rounded, had been padded with zeros.

    The other operands are small integers, whose sums are exact in any order.
    """
    grouped = replace(GROUPED, C=4, K=4)
    for g, tiles in ((STEM, chosen(STEM, dtype, device)), (grouped, TINY)):
        t = operands(g, dtype, device, layout)
        for factors in (t.w, t.dy):
            factors.mul_(2).round_()
        x = (t.x.double() * 50 + 100).clamp(0, 255).to(torch.uint8)
        # Multiples of 1/16 below 2**8: the value is exact before it is rounded.
        scale = torch.arange(1, g.C + 1, device=device) / 16
        shift = torch.arange(g.C, device=device) / 4 - 7
        values = (x * scale[:, None, None] + shift[:, None, None]).to(dtype)
        y, plain_y = (sliced(t.w.new_full(g.y_shape, torch.nan)) for _ in range(2))
        dw, plain_dw = (torch.full_like(t.w, torch.nan) for _ in range(2))
        factors = Normalization(scale, shift)
        engine, tile = tiles["fprop"]
        engine.launch(Fprop(values, t.w, plain_y, g), tile)
        engine.launch(Fprop(x, t.w, y, g, normalization=factors), tile)
        assert torch.equal(y, plain_y)
        engine, tile = tiles["wgrad"]
        engine.launch(Wgrad(values, t.dy, plain_dw, None, g), tile)
        engine.launch(Wgrad(x, t.dy, dw, None, g, normalization=factors), tile)
        assert torch.equal(dw, plain_dw)
        assert y.isfinite().all()


PAIRED_CASES = tuple(g for g in CASES if paired_columns.supports(g, torch.float16))
# Several patches of pairs, and as rows have an odd length several of single outputs.
PATCHES = conv_case(6, 3, (9, 21), 17, (3, 3), (2, 2), (1, 1, 1, 1))


def integers(g, dtype, device, layout, value=None):
    """Operands of small integers, whose sums are exact in any order; ``value`` is among x."""
    t = operands(g, dtype, device, layout)
    x, w, bias, residual = (v.mul_(2).round_() for v in (t.x.clone(), t.w, t.bias, t.residual))
    if value is not None:
        x[0, 0, g.H // 2, g.W // 2] = x[-1, -1, -1, -1] = value
    return x if layout != "sliced" else sliced(x), w, bias.contiguous(), residual


def fprop(g, inputs, plan):
    x, w, bias, residual = inputs
    engine, tile = plan
    y = sliced(w.new_full(g.y_shape, torch.nan))
    engine.launch(Fprop(x, w, y, g, epilogue=Epilogue(bias, residual, "relu")), tile)
    return y


@pytest.mark.parametrize("g", params(PAIRED_CASES))
def test_pairs_of_outputs(g, device):
    """Exactly what each output by itself gives, in any layout, with large and with tiny tiles."""
    depth = max(16, paired_columns.segment(g))
    for layout in ("contiguous", "channels_last", "sliced"):
        inputs = integers(g, torch.float16, device, layout)
        alone = fprop(g, inputs, TINY["fprop"])
        assert alone.isfinite().all()
        tiny = paired_columns.ENGINE, Tile(64, 16, depth)
        for plan in (chosen(g, torch.float16, device)["fprop"], tiny):
            assert plan[0] is paired_columns.ENGINE
            assert torch.equal(fprop(g, inputs, plan), alone)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("g", params(PAIRED_CASES[::3]))
def test_what_is_not_finite_does_not_spread_within_a_pair(g, value, device):
    for layout in ("contiguous", "channels_last"):
        inputs = integers(g, torch.bfloat16, device, layout, value)
        alone = fprop(g, inputs, TINY["fprop"])
        paired = fprop(g, inputs, chosen(g, torch.bfloat16, device)["fprop"])
        assert not alone.isfinite().all() or value < 0
        assert paired.equal(alone) or torch.allclose(paired, alone, 0, 0, equal_nan=True)


def paired_wgrad_plans(g, dtype, device):
    """The chosen tile, and one of several programs, shares and patches; some shares are empty."""
    plan = chosen(g, dtype, device)["wgrad"]
    columns = max(16, paired_columns.segment(g))
    return plan, (paired_columns.ENGINE, Tile(16, columns, 16, split_k=3, patch=(4, 4)))


def exact_wgrad(g, x, w, dy):
    """dw and db by torch in float64, rounded."""
    inputs = [double(v) for v in (x, w, w.new_zeros(g.K))]
    _, (_, dw, db, _) = evaluate(torch_conv2d(g), (*inputs, None), double(dy))
    return dw.to(w), db.to(w)


@pytest.mark.parametrize(
    ("g", "layout"),
    [
        *params(PAIRED_CASES, ("channels_last",)),
        *params((PATCHES,), ("contiguous", "channels_last", "sliced")),
    ],
)
def test_gradients_of_pairs(g, layout, device):
    """Exactly, as all sums are of integers; dw, db, or both at once."""
    x, w, _, dy = integers(g, torch.float16, device, layout)
    right = exact_wgrad(g, x, w, dy)
    for plan in paired_wgrad_plans(g, x.dtype, device):
        assert plan[0] is paired_columns.ENGINE
        tiles = {"wgrad": plan}
        assert all(map(torch.equal, wgrad(x, dy, w, g, tiles), right))
    assert torch.equal(wgrad(x, dy, w, g, tiles, db=False)[0], right[0])
    assert torch.equal(wgrad(x, dy, w, g, tiles, dw=False)[1], right[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("g", params((*PAIRED_CASES[::2], PATCHES)))
def test_what_is_not_finite_does_not_spread_within_a_pairs_gradient(g, value, device):
    x, w, _, dy = integers(g, torch.bfloat16, device, "channels_last", value)
    dy[0, 0, 0, 0] = dy[-1, 0, -1, -1] = value
    right = exact_wgrad(g, x, w, dy)
    for plan in paired_wgrad_plans(g, x.dtype, device):
        for result, expected in zip(wgrad(x, dy, w, g, {"wgrad": plan}), right, strict=True):
            assert torch.allclose(result, expected, 0, 0, equal_nan=True)


@pytest.mark.parametrize("g", params((STEM, PAIRED_CASES[2])))
def test_gradients_of_pairs_expand_a_pooled_one(g, device):
    x, w, *_ = integers(g, torch.float16, device, "channels_last")
    pool = Pool2dGeometry(*g.y_shape, (3, 3), (2, 2), (1, 1))
    dy = random(pool.y_shape, x.dtype, device, seed=5).mul_(2).round_()
    argmax = torch.randint(0, 9, pool.y_shape, dtype=torch.uint8, device=device)
    dz, db = x.new_empty(g.y_shape), x.new_full((g.K,), torch.nan)
    pool_gradient.write(dy, argmax, dz, None, pool)
    for engine, tile in paired_wgrad_plans(g, x.dtype, device):
        dw = torch.full_like(w, torch.nan)
        engine.launch(Wgrad(x, dy, dw, db, g, pooled=PoolGradient(pool, argmax)), tile)
        assert all(map(torch.equal, (dw, db), exact_wgrad(g, x, w, dz)))


def test_gradients_of_pairs_with_64_bit_offsets(device, monkeypatch):
    x, w, _, dy = operands(STEM, torch.float16, device, "channels_last").inputs
    for plan in paired_wgrad_plans(STEM, x.dtype, device):
        monkeypatch.undo()
        narrow = wgrad(x, dy, w, STEM, {"wgrad": plan})
        monkeypatch.setattr(kernel_device, "int64_index", lambda *_: True)
        assert all(map(torch.equal, narrow, wgrad(x, dy, w, STEM, {"wgrad": plan})))


def test_pairs_with_64_bit_offsets(device, monkeypatch):
    inputs = integers(STEM, torch.float16, device, "channels_last")
    tile = chosen(STEM, torch.float16, device)["fprop"]
    narrow = fprop(STEM, inputs, tile)
    monkeypatch.setattr(kernel_device, "int64_index", lambda *_: True)
    assert torch.equal(fprop(STEM, inputs, tile), narrow)


def test_an_image_of_a_batch_in_pairs(device):
    many, one = replace(STEM, N=5), replace(STEM, N=1)
    x, w, bias, residual = operands(many, torch.float16, device, "channels_last").inputs
    alone = (x[2:3], w, bias, residual[2:3])
    y = fprop(one, alone, chosen(one, x.dtype, device)["fprop"])
    x[:2] = x[3:] = torch.nan
    assert torch.equal(
        fprop(many, (x, w, bias, residual), chosen(many, x.dtype, device)["fprop"])[2:3], y
    )
