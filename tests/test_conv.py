"""Convolution's operators: results and gradients of each case, dtype and layout, and odd inputs.

All memory is filled with NaN when it is allocated, so an element that no kernel writes shows.
"""

import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from cases import (
    CONV_CASES,
    DEPTHWISE,
    DTYPES,
    FIRST_LAYER,
    GROUPED,
    LAYOUTS,
    PLAIN,
    POINTWISE,
    STRIDED,
    conv2d,
    conv_case,
    conv_transpose2d,
    operands,
    params,
    random,
    sliced,
)
from tolerance import (
    assert_close,
    assert_operator_close,
    double,
    evaluate,
    evaluate_torch,
    torch_conv2d,
    torch_conv_transpose2d,
)

import cnn.functional as F
from kernels import device as kernel_device
from kernels import planner
from kernels.conv import implicit_gemm
from kernels.conv.engine import Dgrad, Fprop, Wgrad
from kernels.device import Device
from kernels.geometry import is_channels_last, output_strides
from kernels.lang.epilogue import Epilogue
from kernels.problem import Problem
from kernels.tile import Tile

ENGINES = (PLAIN, STRIDED, POINTWISE, FIRST_LAYER, GROUPED, DEPTHWISE)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan(device):
    """torch fills empty tensors under its deterministic mode, which the operators must meet."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.zeros(1, device=device).new_empty_strided((3, 2), (1, 3)).isnan().all()
    yield
    torch.use_deterministic_algorithms(previous)


@contextmanager
def counted():
    """Yields a counter that holds, after the context, how often each kernel was launched in it."""
    before, launched = Counter(kernel_device.launches()), Counter()
    yield launched
    launched.update(Counter(kernel_device.launches()) - before)


@pytest.mark.parametrize(("g", "dtype", "layout"), params(CONV_CASES, DTYPES, LAYOUTS))
def test_conv2d(g, dtype, layout, device):
    t = operands(g, dtype, device, layout)
    y, (dx, dw, _, dresidual) = assert_operator_close(
        conv2d(g), torch_conv2d(g), t.inputs, t.dy, names=("x", "w", "bias", "residual")
    )
    last = is_channels_last(t.x.shape, t.x.stride()) or is_channels_last(t.w.shape, t.w.stride())
    assert y.stride() == output_strides(y.shape, last)
    assert dx.stride() == output_strides(dx.shape, last)
    if layout in ("contiguous", "channels_last"):
        assert dw.stride() == t.w.stride()
    assert torch.equal(dresidual, t.dy)


@pytest.mark.parametrize(("g", "dtype"), params(ENGINES, DTYPES))
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("bias", [False, True], ids=["unbiased", "bias"])
def test_relu(g, dtype, bias, residual, device):
    t = operands(g, dtype, device, "channels_last")
    inputs = (t.x, t.w, t.bias if bias else None, t.residual if residual else None)
    y, (*_, dresidual) = assert_operator_close(
        conv2d(g, relu=True),
        torch_conv2d(g),
        inputs,
        t.dy,
        names=("x", "w", "bias", "residual"),
        relu=True,
    )
    assert (y == 0).any()
    if residual:
        assert torch.equal(dresidual, torch.where(y <= 0, 0, t.dy))


@pytest.mark.parametrize(("g", "dtype", "layout"), params(CONV_CASES, DTYPES, LAYOUTS[:2]))
def test_conv_transpose2d(g, dtype, layout, device):
    t = operands(g, dtype, device, layout)
    bias = random((g.C,), dtype, device, seed=9)
    y, (dx, _, _) = assert_operator_close(
        conv_transpose2d(g),
        torch_conv_transpose2d(g),
        (t.dy, t.w, bias),
        t.x,
        names=("x", "w", "bias"),
    )
    last = is_channels_last(t.dy.shape, t.dy.stride()) or is_channels_last(t.w.shape, t.w.stride())
    assert y.stride() == output_strides(y.shape, last)
    assert dx.shape == t.dy.shape


def test_a_convolution_by_hand(device):
    """One 2x2 filter over the numbers 1 to 9: its first window is 1*1 + 2*2 + 3*4 + 4*5 = 37."""
    x = torch.arange(1.0, 10, device=device).view(1, 1, 3, 3).requires_grad_()
    w = torch.tensor([[[[1.0, 2], [3, 4]]]], device=device, requires_grad=True)
    bias = torch.tensor([-50.0], device=device, requires_grad=True)
    y = F.conv2d(x, w, bias, activation="relu")
    assert y.tolist() == [[[[0, 0], [17, 27]]]]
    y.sum().backward()
    assert x.grad.tolist() == [[[[0, 0, 0], [1, 3, 2], [3, 7, 4]]]]
    assert w.grad.tolist() == [[[[9, 11], [15, 17]]]]
    assert bias.grad.tolist() == [2]


def test_a_transposed_convolution_by_hand(device):
    x = torch.tensor([[[[1.0, 2]]]], device=device)
    w = torch.tensor([[[[1.0, 10, 100]]]], device=device)
    bias = torch.tensor([0.5], device=device)
    assert F.conv_transpose2d(x, w, bias, stride=2).tolist() == [
        [[[1.5, 10.5, 102.5, 20.5, 200.5]]]
    ]


@pytest.mark.parametrize(("g", "dtype"), params(ENGINES, (torch.float32, torch.bfloat16)))
def test_unbatched(g, dtype, device):
    t = operands(g, dtype, device)
    padding = g.padding[0][0], g.padding[1][0]
    arguments = {"stride": g.stride, "padding": padding, "dilation": g.dilation}
    y = F.conv2d(
        t.x[0], t.w, t.bias, **arguments, groups=g.groups, residual=t.residual[0], precision="ieee"
    )
    assert torch.equal(y, conv2d(g)(t.x[:1], t.w, t.bias, t.residual[:1])[0])
    x = F.conv_transpose2d(t.dy[0], t.w, None, **arguments, groups=g.groups)
    batched = F.conv_transpose2d(t.dy[:1], t.w, None, **arguments, groups=g.groups)
    assert torch.equal(x, batched[0])


@pytest.mark.parametrize(
    ("precision", "product_eps"), [("ieee", 0.0), ("tf32", 2**-10), ("tf32x3", 2**-21)]
)
@pytest.mark.parametrize("g", params(ENGINES))
def test_precision(g, precision, product_eps, device):
    """TF32 keeps 10 bits of each factor, three products of TF32 twice as many and one more."""
    t = operands(g, torch.float32, device, "channels_last")
    assert_operator_close(
        conv2d(g, precision=precision),
        torch_conv2d(g),
        t.inputs,
        t.dy,
        names=("x", "w", "bias", "residual"),
        product_eps=product_eps,
    )


# Which gradients are computed.


def gradients(g, t, wanted):
    """(gradients by name, launches) of a fused convolution where only ``wanted`` require one."""
    inputs = dict(zip(("x", "w", "bias", "residual"), t.inputs, strict=True))
    leaves = {k: v.detach().requires_grad_(k in wanted) for k, v in inputs.items()}
    y = conv2d(g, relu=True)(*leaves.values())
    with counted() as launched:
        if wanted:
            y.backward(t.dy)
    return {k: v.grad for k, v in leaves.items()}, launched


@pytest.mark.parametrize("g", params(ENGINES))
def test_only_the_gradients_asked_for_are_computed(g, device):
    t = operands(g, torch.float32, device, "channels_last")
    everything, _ = gradients(g, t, {"x", "w", "bias", "residual"})
    for flags in product([False, True], repeat=4):
        wanted = {name for name, flag in zip(everything, flags, strict=True) if flag}
        some, launched = gradients(g, t, wanted)
        for name, gradient in some.items():
            if name in wanted:
                assert torch.equal(gradient, everything[name]), name
            else:
                assert gradient is None, name
        if not wanted & {"w", "bias"}:
            assert not any("wgrad" in kernel for kernel in launched), launched
        if not wanted:
            assert not launched


# The same bits again.


@pytest.mark.parametrize(("g", "dtype"), params(ENGINES, DTYPES))
def test_repeats_bit_for_bit(g, dtype, device):
    t = operands(g, dtype, device, "channels_last")
    first, second = (evaluate(conv2d(g, relu=True), t.inputs, t.dy) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize(("g", "dtype"), params(ENGINES, DTYPES))
def test_an_image_does_not_depend_on_its_neighbours(g, dtype, device):
    many = conv_case(
        *(37, g.C, (g.H, g.W), g.K, g.kernel, g.stride),
        *((*g.padding[0], *g.padding[1]), g.dilation, g.groups),
    )
    t = operands(many, dtype, device, "channels_last")
    y, (dx, *_) = evaluate(conv2d(g), t.inputs, t.dy)
    for some in (slice(0, 1), slice(36, 37), slice(5, 8)):
        inputs = (t.x[some], t.w, t.bias, t.residual[some])
        alone, (dx_alone, *_) = evaluate(conv2d(g), inputs, t.dy[some])
        assert torch.equal(alone, y[some])
        assert torch.equal(dx_alone, dx[some])


def test_two_threads_at_once(device):
    cases = (PLAIN, DEPTHWISE)
    tensors = [operands(g, torch.float32, device) for g in cases]
    expected = [evaluate(conv2d(g), t.inputs, t.dy) for g, t in zip(cases, tensors, strict=True)]
    failures = []

    def work(g, t, right):
        for _ in range(4):
            y, grads = evaluate(conv2d(g), t.inputs, t.dy)
            if not all(map(torch.equal, (y, *grads), (right[0], *right[1]))):
                failures.append(g)

    threads = [
        threading.Thread(target=work, args=arguments)
        for arguments in zip(cases, tensors, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# What is not finite.

SPARSE = conv_case(2, 3, (7, 8), 4, (2, 2), stride=(3, 3))  # rows and columns that no window meets
PADDED = conv_case(2, 6, (5, 6), 4, (3, 3), padding=(1, 1, 1, 1), groups=2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("g", "dtype"), params((SPARSE, PADDED, DEPTHWISE), DTYPES))
def test_what_is_not_finite_spreads_to_its_windows_alone(g, dtype, value, device):
    t = operands(g, dtype, device)
    t.x[0, 1, 1, 1] = value  # inside a window
    t.x[1, 0, 2, 2] = value  # just outside all windows of SPARSE
    t.residual[1, 2, 0, 1] = value
    t.dy[0, 3, 1, 0] = value
    y, (dx, dw, db, _) = assert_operator_close(
        conv2d(g), torch_conv2d(g), t.inputs, t.dy, names=("x", "w", "bias", "residual")
    )
    for result in (y, dx, dw, db):
        assert not result.isfinite().all()
    for result in (y, dx):
        assert result.isfinite().any()
    if g is SPARSE:
        assert y[1, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("g", "dtype"), params((*ENGINES, SPARSE, PADDED, DEPTHWISE), DTYPES))
def test_what_is_not_finite_in_a_filter_stays_in_its_channels(g, dtype, value, device):
    """Padding counts as zeros, which make NaN of it, in the gradient as well."""
    t = operands(g, dtype, device)
    t.w[1, 0, 0, 0] = value
    y, (dx, dw, db, _) = evaluate(conv2d(g), t.inputs, t.dy)
    z, (transposed_dx, transposed_dw, _) = evaluate(conv_transpose2d(g), (t.dy, t.w, None), t.x)
    inputs, dy = tuple(map(double, t.inputs)), double(t.dy)
    right_y, (right_dx, *_) = evaluate(torch_conv2d(g), inputs, dy)
    assert torch.equal(y.isfinite().cpu(), right_y.isfinite())
    assert torch.equal(y.isnan().cpu(), right_y.isnan())
    assert torch.equal(transposed_dx.isfinite(), y.isfinite())
    c = 1 // (g.K // g.groups) * (g.C // g.groups)
    for result in (dx, z):
        assert result[:, torch.arange(g.C) != c].isfinite().all()
        assert not result.cpu()[~right_dx.isfinite()].isfinite().any()
    for result in (dw, db, transposed_dw):
        assert result.isfinite().all()


@pytest.mark.parametrize("dtype", params(DTYPES))
def test_relu_of_what_is_not_finite(dtype, device):
    """As in torch: NaN stays NaN and passes the gradient on, a masked infinity gives none."""
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1, -1, 0], dtype=dtype, device=device)
    x = x.view(1, 1, 1, 6).requires_grad_()
    y = F.conv2d(x, torch.ones((1, 1, 1, 1), dtype=dtype, device=device), activation="relu")
    dy = torch.tensor([2, 3, torch.inf, 4, torch.nan, torch.inf], dtype=dtype, device=device)
    y.backward(dy.view(1, 1, 1, 6))
    right = torch.relu(x)
    (gradient,) = torch.autograd.grad(right, x, dy.view(1, 1, 1, 6))
    assert torch.equal(y.nan_to_num(7), right.nan_to_num(7))
    assert torch.equal(x.grad, gradient)


# What is empty.


@pytest.mark.parametrize(("g", "dtype"), params(ENGINES, DTYPES))
def test_an_empty_batch(g, dtype, device):
    t = operands(g, dtype, device)
    inputs = (t.x[:0], t.w, t.bias, t.residual[:0])
    with counted() as launched:
        y, (dx, dw, db, dresidual) = evaluate(conv2d(g, relu=True), inputs, t.dy[:0])
        z, (_, dw_transposed, _) = evaluate(conv_transpose2d(g), (t.dy[:0], t.w, None), t.x[:0])
    assert y.shape == dresidual.shape == (0, *g.y_shape[1:])
    assert z.shape == dx.shape == (0, *g.x_shape[1:])
    for zeros, like in ((dw, t.w), (dw_transposed, t.w), (db, t.bias)):
        assert torch.equal(zeros, torch.zeros_like(like))
    # What sums over no pixels is zero, and must be written.
    sums = ("wgrad", "split_sum", "channel_sum", "relu_backward")
    assert all(kernel.removesuffix("_kernel").endswith(sums) for kernel in launched), launched


@pytest.mark.parametrize("with_bias", [False, True], ids=["unbiased", "bias"])
def test_no_channels(with_bias, device):
    """torch's result has no channels either, and so neither bias nor weight counts."""
    x = torch.empty((2, 0, 5, 6), device=device)
    w = torch.empty((4, 0, 3, 3), device=device)
    bias = torch.ones(4, device=device) if with_bias else None
    dy = torch.empty((2, 0, 3, 4), device=device)
    y, ours = evaluate(F.conv2d, (x, w, bias), dy)
    right_y, right = evaluate(TF.conv2d, (x, w, bias), dy)
    assert y.shape == right_y.shape
    for gradient, expected in zip(ours, right, strict=True):
        assert (gradient is None) == (expected is None)
        assert gradient is None or torch.equal(gradient, expected)


# What is large.


FAR = 2**31 + 8


def far_apart(t, offset, axis=0):
    """The same values in zeroed memory, neighbours along an axis ``offset`` elements apart.

    On the CPU only the pages that hold values ever come to be.
    """
    strides = list(t.contiguous().stride())
    strides[axis] = offset
    numel = (t.shape[axis] - 1) * offset + t.numel()
    if t.device.type == "cpu":
        memory = torch.from_numpy(np.zeros(numel, torch.empty(0, dtype=t.dtype).numpy().dtype))
    else:
        memory = torch.zeros(numel, dtype=t.dtype, device=t.device)
    return memory.as_strided(t.shape, strides).copy_(t)


@pytest.mark.parametrize("name", ["x", "w", "residual", "dy"])
@pytest.mark.parametrize("g", params((STRIDED, FIRST_LAYER, GROUPED, DEPTHWISE)))
def test_offsets_beyond_32_bits(g, name, device):
    """A view's offsets count, not its number of elements."""
    t = operands(g, torch.float16, device)
    y, grads = evaluate(conv2d(g), t.inputs, t.dy)
    far = getattr(t, name)
    t = replace(t, **{name: far_apart(far, FAR // (far.shape[0] - 1))})
    far_y, far_grads = evaluate(conv2d(g), t.inputs, t.dy)
    assert torch.equal(far_y, y)
    assert all(map(torch.equal, far_grads, grads))


@pytest.mark.parametrize("g", params((STRIDED, FIRST_LAYER, GROUPED, DEPTHWISE)))
def test_results_beyond_32_bits(g, device):
    t = operands(g, torch.float16, device)
    y, (dx, *_) = evaluate(conv2d(g), (t.x, t.w, t.bias, None), t.dy)
    for run, result in ((run_fprop, y), (run_dgrad, dx)):
        far = far_apart(torch.full_like(result, torch.nan), FAR)
        run(g, t, far)
        assert torch.equal(far, result)


# Each tile and each engine by itself, into views of larger tensors.


def run_fprop(g, t, y, plan=None):
    engine, tile = plan or planned("fprop", g, t)
    engine.launch(Fprop(t.x, t.w, y, g, epilogue=Epilogue(t.bias)), tile)


def run_dgrad(g, t, dx, plan=None):
    engine, tile = plan or planned("dgrad", g, t)
    engine.launch(Dgrad(t.dy, t.w, dx, g), tile)


def planned(direction, g, t):
    here = kernel_device.describe(t.x.device)
    return planner.plan(Problem(direction, g, t.x.dtype, "ieee", here, "channels_last"))[:2]


def assert_engine(direction, g, dtype, device, plan):
    """One direction with one tile, into every other element of a tensor of NaN."""
    t = operands(g, dtype, device)
    right = [
        evaluate_torch(torch_conv2d(g), (x, w, bias, None), dy)
        for x, w, bias, dy in (
            (t.x, t.w, t.bias, t.dy),
            tuple(v.double().cpu() for v in (t.x, t.w, t.bias, t.dy)),
            tuple(v.double().cpu().abs() for v in (t.x, t.w, t.bias, t.dy)),
        )
    ]
    (same_y, same), (y, exact), (bound_y, bound) = right
    if direction == "fprop":
        results = {"y": (sliced(torch.full_like(same_y, torch.nan)), y, same_y, bound_y)}
        run_fprop(g, t, results["y"][0], plan)
    elif direction == "dgrad":
        dx = sliced(torch.full_like(t.x, torch.nan))
        results = {"dx": (dx, exact[0], same[0], bound[0])}
        run_dgrad(g, t, dx, plan)
    else:
        dw, db = torch.full_like(t.w, torch.nan), torch.full_like(t.bias, torch.nan)
        results = {
            "dw": (dw, exact[1], same[1], bound[1]),
            "db": (db, exact[2], same[2], bound[2]),
        }
        engine, tile = plan
        engine.launch(Wgrad(t.x, t.dy, dw, db, g), tile)
    for name, (ours, reference, same_dtype, magnitude) in results.items():
        assert_close(ours, reference, same_dtype, magnitude, name=name)
        if ours._base is not None:
            written = (~ours._base.isnan()).sum().item()
            assert written == ours.numel(), f"{name} is written outside its view"


TILED = (
    conv_case(1, 18, (5, 5), 20, (2, 1), padding=(1, 0, 0, 0)),
    conv_case(2, 6, (4, 5), 36, (1, 3), (1, 2), (0, 0, 1, 1), (1, 2), groups=2),
)
TILES = (
    *(Tile(rows, columns, 16) for rows, columns in ((16, 16), (32, 16), (16, 32))),
    *(Tile(16, 16, depth, packed=True) for depth in (16, 32)),
)
SPLIT_TILES = tuple(
    Tile(16, 16, 16, packed=packed, split_k=split_k)
    for packed in (False, True)
    for split_k in (2, 4)
)


def tile_id(tile):
    packed = "-packed" if tile.packed else ""
    return f"{tile.rows}x{tile.columns}x{tile.depth}-splits{tile.split_k}{packed}"


@pytest.mark.parametrize("tile", TILES, ids=tile_id)
@pytest.mark.parametrize(
    ("g", "direction", "dtype"),
    params(TILED, ("fprop", "dgrad", "wgrad"), (torch.float32, torch.bfloat16)),
)
def test_tiles(g, direction, dtype, tile, device):
    assert_engine(direction, g, dtype, device, (implicit_gemm.ENGINE, tile))


@pytest.mark.parametrize("tile", SPLIT_TILES, ids=tile_id)
@pytest.mark.parametrize(("g", "dtype"), params(TILED, DTYPES))
def test_split_tiles(g, dtype, tile, device):
    """Two parts, and more parts than there are turns, so that some are empty."""
    assert_engine("wgrad", g, dtype, device, (implicit_gemm.ENGINE, tile))


GPUS = (
    Device("cuda", 80, multiprocessors=108, shared_memory=163 << 10),
    Device("cuda", 90, multiprocessors=132, shared_memory=227 << 10),
    Device("hip", "gfx942", multiprocessors=304, shared_memory=64 << 10),
)


@pytest.mark.parametrize(
    ("g", "direction", "dtype"),
    params(ENGINES, ("fprop", "dgrad", "wgrad"), (torch.float32, torch.bfloat16)),
)
def test_each_candidate_of_the_planner(g, direction, dtype, device):
    """Tiles planned for GPUs give the same numbers in the interpreter."""
    here = kernel_device.describe(device)
    plans = {
        (plan.engine.name, plan.tile): (plan.engine, plan.tile)
        for target in (GPUS if here.backend == "interpreter" else (here,))
        for plan in planner.candidates(
            Problem(direction, g, dtype, "ieee", target, "channels_last")
        )
    }
    assert plans
    for plan in plans.values():
        assert_engine(direction, g, dtype, device, plan)
