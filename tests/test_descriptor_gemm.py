"""Engine 2, convolution through tensor descriptors, by itself: each direction, epilogue and box.

Operands have channels side by side and rows on 16 bytes, which ``layout_of`` calls
aligned; where channels do not come out even, NaN lies between the rows. Results are written into
NaN. Torch's deterministic mode fills the workspace of a split reduction with NaN too.

The kernels are right for any box, and are asked for many shapes of it here. For wgrad the planner
takes boxes with one long axis only: of the others no GPU runs the code.
"""

from dataclasses import replace
from functools import lru_cache
from itertools import product
from math import prod
from types import SimpleNamespace

import pytest
import torch
import triton
from cases import (
    CONV_CASES,
    PLAIN,
    POINTWISE,
    STRIDED,
    Operands,
    case_id,
    conv_case,
    examples,
    in_strides,
    operands,
    params,
    random,
)
from hypothesis import given
from hypothesis import strategies as st
from test_properties import geometries
from tolerance import assert_close, double, evaluate, float32_convolutions, torch_conv2d
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import device as kernel_device
from kernels import planner
from kernels.conv import descriptor_gemm
from kernels.conv.descriptor_gemm import takes_pairs
from kernels.conv.descriptor_tiles import keeps_outputs_apart, read_phases, supports
from kernels.conv.engine import Dgrad, Fprop, Wgrad
from kernels.device import INTERPRET, Device
from kernels.lang.epilogue import Epilogue
from kernels.ops import tensors
from kernels.problem import Problem, layout_of
from kernels.tile import Tile, is_valid

DIRECTIONS = ("fprop", "dgrad", "wgrad")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HOPPER = Device("cuda", 90, multiprocessors=132, shared_memory=227 << 10)
TARGET = HOPPER if INTERPRET else kernel_device.describe(torch.device("cuda"))
TF32 = 2**-9  # error of a product on a GPU; the interpreter's is exact

pytestmark = pytest.mark.skipif(not TARGET.descriptors, reason="no tensor descriptors here")


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(previous)


def aligned(t, spare=0):
    """The same values as [N, H, W, C] in memory of NaN, each row of channels on 16 bytes.

    ``spare`` times 16 bytes are left after each row, the room of an image before and after all.
    Strides along axes of one image, row or column, which may be anything, are 3.
    """
    N, C, H, W = t.shape
    unit = 16 // t.element_size()
    pitch = (triton.cdiv(C, unit) + spare) * unit
    base = t.new_empty((N + 2, H, W, pitch)).fill_(torch.nan)
    view = base[1:-1, ..., :C].permute(0, 3, 1, 2).copy_(t)
    n, _, h, w = (3 if size == 1 else s for size, s in zip(t.shape, view.stride(), strict=True))
    return view.as_strided(t.shape, (n, 1, h, w))


def poisoned(shape, like):
    """NaN for a result, aligned, in more NaN."""
    return aligned(like.new_empty(shape).fill_(torch.nan), spare=1)


def poisoned_dense(shape, like):
    """NaN for a gradient of weight or bias, which need not be aligned, in more NaN."""
    return like.new_full((prod(shape) + 30,), torch.nan)[15:-15].view(shape)


def assert_written_in_view_alone(t, name="result"):
    written = (~t._base.isnan()).sum().item()
    assert written == t.numel(), f"{name}: {written} elements are written, not {t.numel()}"


def blocks(direction, box, *, columns=16, depth=16, split_k=1):
    """A tile with this box; wgrad's rows are as many as its columns."""
    if direction == "wgrad":
        return Tile(columns, columns, prod(box), split_k=split_k, box=box)
    return Tile(prod(box), columns, depth, box=box)


def box_id(box):
    return "box" + "x".join(map(str, box))


def launch(direction, g, t, tile, precision="tf32"):
    """{name: result} of one direction, without residual."""
    x, w, dy = (aligned(v) for v in (t.x, t.w, t.dy))
    if direction == "fprop":
        y = poisoned(g.y_shape, t.x)
        descriptor_gemm.fprop(Fprop(x, w, y, g, precision, Epilogue(t.bias)), tile)
        return {"y": y}
    if direction == "dgrad":
        dx = poisoned(g.x_shape, t.x)
        descriptor_gemm.dgrad(Dgrad(dy, w, dx, g, precision), tile)
        return {"dx": dx}
    dw, db = poisoned_dense(g.w_shape, t.x), poisoned_dense((g.K,), t.x)
    descriptor_gemm.wgrad(Wgrad(x, dy, dw, db, g, precision), tile)
    return {"dw": dw, "db": db}


def references(g, t):
    """{name: (float64, torch's own dtype, float64 of absolute values)} of all ``launch`` gives."""
    exact = [double(v) for v in (t.x, t.w, t.bias, t.dy)]
    runs = []
    for x, w, bias, dy in (exact, (t.x, t.w, t.bias, t.dy), [v.abs() for v in exact]):
        with float32_convolutions("ieee"):
            y, (dx, dw, db, _) = evaluate(torch_conv2d(g), (x, w, bias, None), dy)
        runs.append((y, dx, dw, db))
    return dict(zip(("y", "dx", "dw", "db"), zip(*runs, strict=True), strict=True))


@lru_cache(maxsize=4)
def problem(g, dtype, device):
    """Operands, which no test may change, and what is right for them."""
    t = operands(g, dtype, device)
    return t, references(g, t)


def assert_right(results, right, product_eps=0.0 if INTERPRET else TF32):
    for name, ours in results.items():
        eps = product_eps if ours.dtype == torch.float32 else 0.0
        assert_close(ours, *right[name], name=name, product_eps=eps)


def assert_engine(direction, g, dtype, device, tile):
    assert supports(direction, g, dtype, "tf32")
    t, right = problem(g, dtype, device)
    results = launch(direction, g, t, tile)
    assert_right(results, right)
    for name, result in results.items():
        assert_written_in_view_alone(result, name)


# The case list of all engines.

SIX_PHASES = conv_case(2, 6, (8, 9), 5, (3, 4), (2, 3), (0, 3, 2, 1), (1, 2))
UNGROUPED = [g for g in CONV_CASES if g.groups == 1]
BOXES = ((2, 8, 16), (1, 16, 16), (4, 8, 8), (2, 16, 8), (4, 4, 8))


@pytest.mark.parametrize(
    ("g", "dtype", "direction"),
    [
        *params(UNGROUPED, DTYPES, ("dgrad", "wgrad")),
        *params([g for g in UNGROUPED if g != SIX_PHASES], DTYPES, ("fprop",)),
    ],
)
def test_case_list(g, dtype, direction, device):
    box = BOXES[CONV_CASES.index(g) % len(BOXES)]
    assert_engine(direction, g, dtype, device, blocks(direction, box))


@pytest.mark.parametrize("g", params(UNGROUPED))
def test_split_case_list(g, device):
    """Three parts, of which some are empty."""
    box = BOXES[CONV_CASES.index(g) % len(BOXES)]
    assert_engine("wgrad", g, torch.bfloat16, device, blocks("wgrad", box, split_k=3))


@pytest.mark.parametrize("split_k", [2, 5])
@pytest.mark.parametrize("g", params((STRIDED, POINTWISE)))
def test_splits(g, split_k, device):
    assert_engine("wgrad", g, torch.float32, device, blocks("wgrad", (1, 2, 8), split_k=split_k))


def test_what_is_refused():
    narrow = conv_case(1, 8, (2, 9), 8, (3, 3), (3, 1), (1, 1, 1, 1))
    empty = replace(PLAIN, N=0)
    refused = {
        ("fprop", SIX_PHASES, torch.float16, "ieee"): "taps in more than four phases of x",
        ("wgrad", narrow, torch.float16, "ieee"): "a phase without pixels has taps",
        ("fprop", PLAIN, torch.float32, "ieee"): "no tensor core does these products",
        ("dgrad", PLAIN, torch.float64, "tf32"): "no tensor core does these products",
        **{(direction, empty, torch.float16, "ieee"): "no pixel" for direction in DIRECTIONS},
    }
    for arguments, why in refused.items():
        assert not supports(*arguments), why
    assert len(read_phases(SIX_PHASES)) == 6


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("g", params([g for g in CONV_CASES if g.groups > 1]))
def test_groups_that_fill_no_block_are_left_to_other_engines(g, direction):
    problem = Problem(direction, g, torch.bfloat16, "ieee", HOPPER, "aligned")
    plans = planner.candidates(problem)
    assert plans
    assert all(plan.engine is not descriptor_gemm.ENGINE for plan in plans)


# Epilogues.

FLAGS = ("bias", "residual", "relu", "scale")


def assert_epilogue(g, t, box, flags):
    """fprop with these of ``FLAGS``, into a result like t.residual. Returns the result."""
    y = poisoned(g.y_shape, t.residual)
    scale = random((g.K,), torch.float32, t.w.device, seed=8) if "scale" in flags else None
    bias = t.bias if "bias" in flags else None
    residual = aligned(t.residual, spare=2) if "residual" in flags else None
    depth = 32 if t.x.element_size() == 1 else 16  # the least that an instruction takes
    epilogue = Epilogue(bias, residual, "relu" if "relu" in flags else None, scale)
    call = Fprop(aligned(t.x), aligned(t.w), y, g, "tf32", epilogue)
    descriptor_gemm.fprop(call, blocks("fprop", box, depth=depth))

    def oracle(change):
        x, w, factor, offset, rest = (
            None if v is None else change(double(v)) for v in (t.x, t.w, scale, bias, residual)
        )
        z = torch_conv2d(g)(x, w, None, None)
        z = z if factor is None else z * factor[:, None, None]
        z = z if offset is None else z + offset[:, None, None]
        return z if rest is None else z + rest

    exact, magnitude = oracle(lambda v: v), oracle(torch.abs)
    exact = exact.relu() if "relu" in flags else exact
    eps = TF32 if t.x.dtype == torch.float32 and not INTERPRET else 0.0
    assert_close(y, exact, exact.to(y.dtype), magnitude, name="y", product_eps=eps)
    return y


FEW_TAPS = conv_case(2, 8, (4, 5), 12, (2, 2), padding=(0, 1, 1, 0))
CHOICES = [
    tuple(flag for flag, there in zip(FLAGS, chosen, strict=True) if there)
    for chosen in product([False, True], repeat=len(FLAGS))
]


@pytest.mark.parametrize("flags", CHOICES, ids=lambda flags: "-".join(flags) or "none")
@pytest.mark.parametrize("dtype", params(DTYPES))
def test_epilogue(dtype, flags, device):
    """Where images or rows are cut into halves, and where all pixels count as images."""
    for g, box in ((FEW_TAPS, (2, 4, 8)), (FEW_TAPS, (1, 4, 8)), (POINTWISE, (32, 1, 1))):
        y = assert_epilogue(g, operands(g, dtype, device), box, flags)
        assert_written_in_view_alone(y)
        assert (y == 0).any() == ("relu" in flags)


@pytest.mark.parametrize(
    ("g", "box"), [(FEW_TAPS, (2, 4, 8)), (POINTWISE, (32, 1, 1))], ids=["taps", "pointwise"]
)
def test_float8_with_a_scale(g, box, device):
    """Operands in e4m3, bias, residual and result in bfloat16."""
    t = operands(g, torch.bfloat16, device)
    t = replace(t, x=t.x.to(torch.float8_e4m3fn), w=t.w.to(torch.float8_e4m3fn))
    for flags in CHOICES:
        if "scale" in flags:
            assert_written_in_view_alone(assert_epilogue(g, t, box, flags))


@pytest.mark.parametrize("dtype", params(DTYPES))
def test_relu_of_what_is_not_finite(dtype, device):
    """As in torch, NaN stays NaN."""
    t = operands(PLAIN, dtype, device)
    t.x[0, 1, 2, 3] = torch.inf
    t.x[1, 0, 0, 0] = torch.nan
    t.residual[0, 3, 5, 6] = torch.nan
    t.residual[1, 3, 5, 6] = -torch.inf
    y = assert_epilogue(PLAIN, t, (2, 8, 8), FLAGS)
    assert y[0, 3, 5, 6].isnan()
    assert y[1, 3, 5, 6] == 0
    assert (y == torch.inf).any()


def test_dgrad_with_a_bias(device):
    """A transposed convolution's bias reaches pixels that meet no tap, too."""
    g = conv_case(2, 7, (9, 10), 5, (2, 1), stride=(3, 4))
    t, right = problem(g, torch.bfloat16, device)
    bias = random((g.C,), torch.bfloat16, device, seed=9)
    dx, tile = poisoned(g.x_shape, t.x), blocks("dgrad", (2, 4, 4))
    descriptor_gemm.dgrad(Dgrad(aligned(t.dy), aligned(t.w), dx, g, bias=bias), tile)
    exact, _, magnitude = right["dx"]
    exact = exact + double(bias)[:, None, None]
    magnitude = magnitude + double(bias).abs()[:, None, None]
    assert_close(dx, exact, exact.to(dx.dtype), magnitude, name="dx")
    assert_written_in_view_alone(dx)
    assert torch.equal(dx[0, :, 2, 1], bias)


# Boxes.

SMALL = (
    conv_case(5, 9, (1, 1), 6, (1, 1)),
    conv_case(4, 9, (1, 1), 6, (3, 3), padding=(1, 1, 1, 1)),
    conv_case(1, 9, (7, 7), 6, (2, 1), padding=(1, 0, 0, 0)),
    conv_case(3, 5, (3, 7), 6, (1, 2), (2, 1), (0, 0, 0, 1)),
)
ANY_BOX = ((16, 1, 1), (1, 16, 1), (1, 1, 16), (4, 1, 8), (8, 8, 4), (1, 32, 8))
TWO_PIXELS = ((1, 1, 2), (1, 2, 1), (2, 1, 1)) if INTERPRET else ()  # too few for an instruction


@pytest.mark.parametrize("box", ANY_BOX, ids=box_id)
@pytest.mark.parametrize(("g", "direction"), params(SMALL, DIRECTIONS))
def test_box(g, direction, box, device):
    """Larger and smaller than the map, along one axis or all."""
    assert_engine(direction, g, torch.bfloat16, device, blocks(direction, box))


@pytest.mark.parametrize("box", TWO_PIXELS, ids=box_id)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_box_of_two_pixels(direction, box, device):
    g = conv_case(3, 5, (2, 4), 6, (1, 2))
    assert_engine(direction, g, torch.float32, device, blocks(direction, box))


TAILS = (conv_case(1, 33, (4, 5), 17, (3, 1)), conv_case(2, 40, (4, 5), 72, (1, 2)))


@pytest.mark.parametrize(("columns", "depth"), [(16, 32), (32, 16), (64, 64)])
@pytest.mark.parametrize(("g", "direction"), params(TAILS, DIRECTIONS))
def test_tails_of_channels(g, direction, columns, depth, device):
    tile = blocks(direction, (2, 4, 8), columns=columns, depth=depth)
    assert_engine(direction, g, torch.float16, device, tile)


# Strides: the pairs of even maps, and phases apart.


@pytest.fixture
def descriptors(monkeypatch):
    """A list to which each launch adds the dimensions of its descriptors."""
    seen = []
    original = kernel_device.launch

    def record(kernel, grid, *args, **meta):
        given = (*args, *meta.values())
        seen.append([len(a.shape) for a in given if isinstance(a, TensorDescriptor)])
        original(kernel, grid, *args, **meta)

    monkeypatch.setattr(kernel_device, "launch", record)
    return seen


PAIRS = (
    conv_case(2, 16, (8, 6), 12, (3, 3), (2, 2), (1, 1, 1, 1)),
    conv_case(3, 32, (2, 8), 20, (2, 5), (2, 2), (1, 0, 2, 3)),
    conv_case(1, 16, (6, 2), 12, (4, 3), (2, 2), (3, 2, 2, 2), (1, 2)),
    conv_case(1, 64, (4, 6), 32, (3, 2), (2, 2), (1, 1, 1, 0), groups=2),
)


@pytest.mark.parametrize(("g", "dtype"), params(PAIRS, (torch.bfloat16, torch.float32)))
def test_pairs_of_pixels_give_what_phases_give(g, dtype, descriptors, device):
    """One descriptor of five dimensions where pixels follow one another, one for each phase that
    has taps where channels are a part of theirs.
    """
    assert takes_pairs(g, 16)
    t, right = problem(g, dtype, device)
    for spare, dimensions in ((0, [5]), (1, [4] * len(read_phases(g)))):
        y = poisoned(g.y_shape, t.x)
        call = Fprop(aligned(t.x, spare), aligned(t.w), y, g, "tf32", Epilogue(t.bias))
        descriptor_gemm.fprop(call, blocks("fprop", (4, 4, 8)))
        assert descriptors.pop() == [*dimensions, 4, 4]
        assert_right({"y": y}, right)
        assert_written_in_view_alone(y)


@pytest.mark.parametrize(
    ("g", "depth"),
    [
        (replace(PAIRS[0], H=7), 16),
        (replace(PAIRS[0], W=7), 16),
        (replace(PAIRS[0], stride=(2, 1)), 16),
        (replace(PAIRS[0], C=24), 16),
        (PAIRS[0], 32),
        (conv_case(1, 16, (8, 8), 16, (1, 1), (2, 2)), 16),
    ],
    ids=["odd-H", "odd-W", "one-stride", "tail", "deep", "one-tap"],
)
def test_what_takes_no_pairs(g, depth, device):
    assert not takes_pairs(g, depth)
    tile = blocks("fprop", (2, 4, 4), depth=depth)
    assert_engine("fprop", g, torch.bfloat16, device, tile)


def test_pairs_of_groups_take_blocks_that_divide_a_group():
    assert takes_pairs(PAIRS[3], 32)
    assert not takes_pairs(PAIRS[3], 64)


STEPS = (
    conv_case(2, 16, (7, 8), 24, (1, 1), (3, 3)),
    conv_case(1, 8, (5, 7), 9, (1, 1), (3, 2), (1, 0, 2, 1)),
    conv_case(2, 8, (9, 9), 9, (2, 2), (4, 4), (1, 1, 1, 1)),
    conv_case(2, 8, (9, 7), 9, (3, 3), (2, 2), (1, 1, 1, 1), (2, 2)),
)


@pytest.mark.parametrize(("g", "direction"), params(STEPS, DIRECTIONS))
def test_strides(g, direction, device):
    """Pointwise with a stride, and phases that have no taps."""
    assert_engine(direction, g, torch.bfloat16, device, blocks(direction, (2, 4, 4)))


POINTS = tuple(
    conv_case(n, 16, size, 24, (1, 1))
    for n, size in ((1, (1, 1)), (5, (1, 1)), (2, (3, 1)), (1, (1, 5)), (3, (4, 5)))
)


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize(("g", "direction"), params(POINTS, DIRECTIONS))
def test_pointwise(g, direction, spare, device):
    """Pixels count as images; their channels may be a part of wider ones, of different widths."""
    t, right = problem(g, torch.float16, device)
    x, dy, w = aligned(t.x, spare), aligned(t.dy, spare), aligned(t.w)
    y, dx, dw = poisoned(g.y_shape, t.x), poisoned(g.x_shape, t.x), poisoned_dense(g.w_shape, t.x)
    tile = blocks(direction, (16, 1, 1))
    if direction == "fprop":
        descriptor_gemm.fprop(Fprop(x, w, y, g, epilogue=Epilogue(t.bias)), tile)
        results = {"y": y}
    elif direction == "dgrad":
        descriptor_gemm.dgrad(Dgrad(dy, w, dx, g), tile)
        results = {"dx": dx}
    else:
        descriptor_gemm.wgrad(Wgrad(x, dy, dw, None, g), tile)
        results = {"dw": dw}
    assert_right(results, right)
    for name, result in results.items():
        assert_written_in_view_alone(result, name)


# Groups whose channels fill blocks.

GROUPS = (
    conv_case(2, 64, (4, 5), 64, (2, 2), padding=(1, 1, 1, 1), groups=2),
    conv_case(1, 64, (4, 5), 64, (1, 2), dilation=(1, 3), groups=4),
    conv_case(2, 32, (5, 4), 64, (3, 2), (2, 2), (1, 1, 1, 0), groups=2),
    conv_case(2, 64, (4, 5), 32, (1, 1), groups=2),
)


@pytest.mark.parametrize(
    ("g", "dtype", "direction"), params(GROUPS, (torch.bfloat16, torch.float32), DIRECTIONS)
)
def test_groups(g, dtype, direction, device):
    assert_engine(direction, g, dtype, device, blocks(direction, (2, 8, 8)))


@pytest.mark.parametrize("g", params(GROUPS))
def test_wgrad_of_groups_smaller_than_a_block(g, device):
    tile = blocks("wgrad", (1, 8, 8), columns=64, split_k=2)
    assert_engine("wgrad", g, torch.bfloat16, device, tile)


@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize("g", params((STRIDED, GROUPS[1])))
def test_weights_gradient_in_any_dense_strides(g, split_k, device):
    t, _ = problem(g, torch.float32, device)
    tile = blocks("wgrad", (2, 4, 8), split_k=split_k)
    expected = launch("wgrad", g, t, tile)["dw"]
    for axes in ((0, 2, 3, 1), (1, 0, 3, 2)):
        shape = [g.w_shape[axis] for axis in axes]
        dw = poisoned_dense(shape, t.w).permute([axes.index(axis) for axis in range(4)])
        descriptor_gemm.wgrad(Wgrad(aligned(t.x), aligned(t.dy), dw, None, g, "tf32"), tile)
        assert torch.equal(dw, expected)
        assert_written_in_view_alone(dw)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_groups_do_not_meet(direction, device):
    """NaN in the channels of one group reaches no other."""
    g = GROUPS[0]
    t = operands(g, torch.bfloat16, device)
    t.x[:, 32:] = torch.nan
    t.dy[:, 32:] = torch.nan
    columns = 64 if direction == "wgrad" else 32
    tile = blocks(direction, (2, 4, 4), columns=columns, depth=32)
    for result in launch(direction, g, t, tile).values():
        first, second = result.tensor_split(2, dim=0 if direction == "wgrad" else 1)
        assert first.isfinite().all()
        assert second.isnan().all()


# What is not finite.

SPARSE = conv_case(2, 3, (7, 8), 4, (2, 2), stride=(3, 3))  # rows and columns that no window meets
PADDED = conv_case(2, 6, (4, 8), 4, (3, 3), padding=(1, 1, 1, 1))
HALVED = conv_case(2, 6, (7, 9), 4, (3, 3), (2, 2), (1, 1, 1, 1))
SPREAD = conv_case(2, 3, (8, 10), 4, (3, 2), padding=(2, 2, 0, 1), dilation=(2, 3))
NOT_FINITE = (SPARSE, PADDED, HALVED, SPREAD)
ROWS = conv_case(2, 6, (4, 16), 4, (3, 3), padding=(1, 1, 1, 1))  # rows of one box
LENGTHS = (1, 2, 4, 8)
GEOMETRIES_AND_BOXES = [
    pytest.param(g, box, id=f"{case_id(g)}-{box_id(box)}")
    for g, box in (
        *product(NOT_FINITE, product((1, 2), LENGTHS, LENGTHS)),
        *product((*NOT_FINITE, ROWS), ((32, 1, 1),)),
        (ROWS, (1, 1, 16)),
    )
    if (prod(box) == 32 or g is ROWS) and keeps_outputs_apart(g, box)
]


def with_infinities(g, dtype, device):
    t = operands(g, dtype, device)
    t.x[0, 1, 1, 1] = torch.inf  # inside a window
    t.x[1, 0, 2, 2] = torch.nan  # just outside all windows of SPARSE
    t.x[0, 2, -1, -1] = torch.inf
    t.x[1, 2, -1, 0] = -torch.inf
    t.x[1, 1, 0, -1] = torch.nan
    t.dy[0, 3, 1, 0] = torch.inf
    t.dy[1, 2, -1, -1] = torch.nan
    return t


def assert_right_beside_infinities(results, g, t):
    assert_right(results, references(g, t))
    assert not any(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize(
    ("g", "direction", "dtype"), params(NOT_FINITE, ("fprop", "dgrad"), DTYPES)
)
def test_what_is_not_finite_spreads_to_its_windows_alone(g, direction, dtype, device):
    t = with_infinities(g, dtype, device)
    results = launch(direction, g, t, blocks(direction, (2, 4, 8)))
    assert_right_beside_infinities(results, g, t)
    assert all(result.isfinite().any() for result in results.values())


@pytest.mark.parametrize(("g", "box"), GEOMETRIES_AND_BOXES)
def test_boxes_that_keep_places_apart(g, box, device):
    """The weight's gradient has no NaN but those of torch."""
    t = with_infinities(g, torch.float32, device)
    results = launch("wgrad", g, t, blocks("wgrad", box))
    assert_right_beside_infinities(results, g, t)


def test_a_box_that_does_not_keep_places_apart(device):
    """The place below the last one has no dy, but its window holds the infinity."""
    box = (1, 8, 8)
    assert not keeps_outputs_apart(PADDED, box)
    t = operands(PADDED, torch.float32, device)
    t.x[0, 1, -1, 3] = torch.inf
    dw = launch("wgrad", PADDED, t, blocks("wgrad", box))["dw"]
    exact, *_ = references(PADDED, t)["dw"]
    assert exact[:, 1, 0].isfinite().all()
    assert dw[:, 1, 0].isnan().any()


@examples(200)
@given(g=geometries(), box=st.tuples(*[st.sampled_from((1, 2, 4, 8))] * 3))
def test_places_are_apart_if_no_window_outside_the_result_meets_x(g, box):
    def meets(places, length, size, kernel, stride, before, dilation):
        outside = range(places, -(-places // length) * length)
        taps = range(kernel)
        return any(0 <= p * stride - before + r * dilation < size for p in outside for r in taps)

    axes = zip(
        *((g.P, g.Q), box[1:], (g.H, g.W), g.kernel, g.stride, (pair[0] for pair in g.padding)),
        g.dilation,
        strict=True,
    )
    apart = not any(meets(*axis) for axis in axes)
    assert keeps_outputs_apart(g, box) == (apart or g.pointwise)


# The same bits.


@pytest.mark.parametrize(("g", "direction"), params((PLAIN, STRIDED, POINTWISE), DIRECTIONS))
def test_repeats_bit_for_bit(g, direction, device):
    t, _ = problem(g, torch.bfloat16, device)
    tile = blocks(direction, (2, 8, 8), split_k=2 if direction == "wgrad" else 1)
    first, second = (launch(direction, g, t, tile) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("g", "dtype", "direction"),
    params(
        (PLAIN, STRIDED, POINTWISE, PAIRS[0]), (torch.bfloat16, torch.float32), ("fprop", "dgrad")
    ),
)
def test_an_image_depends_neither_on_its_neighbours_nor_on_the_box(g, dtype, direction, device):
    many = replace(g, N=5)
    t = operands(many, dtype, device)
    boxes = ((16, 1, 1), (64, 1, 1)) if g.pointwise else ((2, 8, 8), (1, 8, 8), (4, 4, 8))
    ((name, expected),) = launch(direction, many, t, blocks(direction, boxes[0])).items()
    alone = Operands(t.x[3:4], t.w, t.bias, t.residual[3:4], t.dy[3:4])
    for box in boxes:
        result = launch(direction, replace(g, N=1), alone, blocks(direction, box))[name]
        assert torch.equal(result, expected[3:4])


# Precision modes: what tensor cores multiply in place of two float32 numbers.


def cut(t):
    """The 10 bits of a fraction that tensor cores read of float32."""
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)


def tf32(t):
    """Rounded to 10 bits, ties away from zero."""
    return cut((t.view(torch.int32) + 0x1000).view(torch.float32))


def bf16(t):
    """Rounded to 7 bits, ties to even."""
    return t.to(torch.bfloat16).float()


def in_parts(t, *roundings):
    """Each part is what its rounding gives of what those before it have left."""
    parts = []
    for rounding in roundings:
        parts.append(rounding(t))
        t = t - parts[-1]
    return parts


# The parts of each factor, the products of parts that are added up, and the largest relative error
# of the sum. Triton's code for sm_90 forms these parts; tensor cores cut what it does not round.
MODES = {
    "tf32": ((cut,), ((0, 0),), TF32),
    "bf16x3": ((bf16, bf16), ((1, 0), (0, 1), (0, 0)), 2**-15),
    "tf32x3": ((tf32, cut), ((1, 0), (0, 1), (0, 0)), 2**-21),
    "bf16x6": ((bf16,) * 3, ((1, 1), (2, 0), (0, 2), (1, 0), (0, 1), (0, 0)), 2**-24),
}


@pytest.mark.parametrize("mode", MODES)
def test_error_of_a_product(mode):
    """Summed in float64, exactly. The bound holds, and no smaller power of two does.

    Factors lie anywhere between 1 and 2, and close above 1, where errors weigh most.
    """
    roundings, kept, bound = MODES[mode]
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for width in (23, 17, 14):
        bits = torch.randint(2**width, (2, 2**19), generator=generator, dtype=torch.int32)
        a, b = (bits + 0x3F800000).view(torch.float32)
        a_parts, b_parts = (in_parts(t, *roundings) for t in (a, b))
        sums = sum(a_parts[i].double() * b_parts[j].double() for i, j in kept)
        exact = a.double() * b.double()
        worst = max(worst, ((sums - exact).abs() / exact).max().item())
    assert bound / 2 < worst <= bound


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("g", "direction"), params((PLAIN, STRIDED), DIRECTIONS))
def test_a_convolution_in_each_mode(g, direction, mode, device):
    """The interpreter, which knows no modes, is given the parts that tensor cores multiply."""
    roundings, kept, bound = MODES[mode]
    t = operands(g, torch.float32, device)
    t = replace(t, bias=torch.zeros_like(t.bias))
    name, first, second = {
        "fprop": ("y", "x", "w"),
        "dgrad": ("dx", "dy", "w"),
        "wgrad": ("dw", "x", "dy"),
    }[direction]
    tile = blocks(direction, (2, 8, 8))
    if INTERPRET:
        a, b = (in_parts(getattr(t, operand), *roundings) for operand in (first, second))
        result = sum(
            launch(direction, g, replace(t, **{first: a[i], second: b[j]}), tile)[name].double()
            for i, j in kept
        ).float()
    else:
        result = launch(direction, g, t, tile, mode)[name]
    assert_right({name: result}, references(g, t), product_eps=bound)


def test_modes_by_target(monkeypatch):
    def resolve(precision, dtype=torch.float32, target=HOPPER):
        monkeypatch.setattr(tensors, "describe", lambda device: target)
        return tensors.resolve_precision(precision, SimpleNamespace(dtype=dtype, device=None))

    modes = ("ieee", *MODES)
    monkeypatch.setattr(torch.version, "hip", None)
    assert [resolve(mode) for mode in modes] == list(modes)
    interpreter = replace(HOPPER, backend="interpreter")
    assert {resolve(mode, target=interpreter) for mode in modes} == {"ieee"}
    assert {resolve(mode, dtype=torch.float16) for mode in modes} == {"ieee"}
    monkeypatch.setattr(torch.version, "hip", "6.3")
    for arch, tf32_there in (("gfx942", "tf32"), ("gfx90a", "ieee")):
        gpu = Device("hip", arch, multiprocessors=304, shared_memory=64 << 10)
        assert [resolve(mode, target=gpu) for mode in modes] == [
            *("ieee", tf32_there, "bf16x3", "bf16x6", "bf16x6")
        ]


# Which memory is aligned.


def test_layout_of(device):
    def images(*shape):
        return in_strides(torch.zeros(shape, dtype=torch.bfloat16, device=device), True)

    x, odd = images(2, 16, 6, 8), images(2, 12, 6, 8)
    wide = images(2, 40, 6, 8)
    w, thin = images(8, 16, 3, 3), images(8, 12, 3, 3)
    one = torch.zeros((8, 16, 1, 1), dtype=torch.bfloat16, device=device)
    expected = {
        "aligned": [
            ((x,), (w,)),
            ((x, None), (w,)),
            ((wide[:, 8:24],), ()),  # channels of wider pixels
            ((x[1:],), ()),
            ((x[:, :, :1, :1],), ()),  # one pixel of each image
            ((x[:1].as_strided((1, 16, 6, 8), (3, 1, 128, 16)),), ()),  # a stride never taken
            ((x[:, :, :1].as_strided((2, 16, 1, 8), (128, 1, 5, 16)),), ()),
            ((), (one,)),
            ((), (w[:, :, 1:, 1:],)),  # filters may have gaps
            ((), (w[::2],)),
            ((torch.zeros((2, 4, 3, 5), device=device).to(memory_format=torch.channels_last),), ()),
        ],
        "channels_last": [
            ((odd,), (w,)),  # rows of 24 bytes
            ((x,), (thin,)),
            ((x, odd), (w,)),
            ((wide[:, 4:20],), ()),  # starts on 8 bytes
            ((x[:, :, 1:-1],), ()),  # pixels with gaps between them
            ((x[:, :, :, 1:],), ()),
            ((x[::2].expand(2, -1, -1, -1),), ()),  # one image twice
            ((x[:, :, :, :1].expand(-1, -1, -1, 8),), ()),
            ((), (w[:1].expand(8, -1, -1, -1),)),
        ],
        "scattered": [
            ((x.contiguous(),), (w,)),
            ((x,), (w.contiguous(),)),
            ((odd, x.contiguous()), (w,)),
            ((wide[:, ::2],), ()),
            ((x[:, :1].expand(-1, 16, -1, -1),), ()),
        ],
    }
    for layout, operands_of in expected.items():
        for i, (images_, filters) in enumerate(operands_of):
            assert layout_of(images_, filters) == layout, (layout, i)


# What the planner may choose.

PLANNED = (
    conv_case(2, 128, (2, 3), 128, (1, 2), padding=(0, 0, 1, 0)),
    conv_case(3, 48, (3, 2), 80, (2, 2), (2, 2), (1, 0, 0, 1)),
    conv_case(1, 128, (2, 3), 128, (2, 1), padding=(1, 0, 0, 0), groups=2),
)
# Groups of 48 channels, which a block along the depth must divide.
GROUPS_OF_48 = conv_case(1, 96, (2, 3), 128, (1, 2), groups=2)
GROUPS_TO_48 = conv_case(1, 128, (2, 3), 96, (1, 2), groups=2)
WIDE = conv_case(1, 256, (2, 3), 128, (1, 1), (1, 2))
LONG_ROWS = conv_case(1, 64, (2, 64), 128, (1, 2), padding=(0, 0, 1, 0))


@pytest.mark.parametrize(
    ("g", "dtype", "direction"),
    [
        *params(PLANNED, (torch.bfloat16,), DIRECTIONS),
        *params(PLANNED[:1], (torch.float32,), DIRECTIONS),
        *params((GROUPS_OF_48,), (torch.bfloat16, torch.float32), ("fprop",)),
        *params((GROUPS_TO_48,), (torch.bfloat16, torch.float32), ("dgrad",)),
        *params((WIDE, LONG_ROWS), (torch.bfloat16,), ("wgrad",)),
    ],
)
def test_each_candidate_of_the_planner(g, dtype, direction, device):
    problem = Problem(direction, g, dtype, "tf32", TARGET, "aligned")
    tiles = [
        plan.tile for plan in planner.candidates(problem) if plan.engine is descriptor_gemm.ENGINE
    ]
    assert tiles
    assert all(is_valid(tile, dtype.itemsize, TARGET) for tile in tiles)
    for tile in tiles:
        assert_engine(direction, g, dtype, device, tile)


# Any geometry.


@examples(12)
@given(
    g=geometries().filter(lambda g: g.groups == 1),
    dtype=st.sampled_from(DTYPES),
    box=st.sampled_from((*BOXES, *ANY_BOX)),
    columns=st.sampled_from((16, 32)),
    depth=st.sampled_from((16, 32)),
    split_k=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_any_geometry(g, dtype, box, columns, depth, split_k, seed, device):
    t = operands(g, dtype, device, seed=seed)
    right = references(g, t)
    for direction in DIRECTIONS:
        if supports(direction, g, dtype, "tf32"):
            tile = blocks(direction, box, columns=columns, depth=depth)
            if direction == "wgrad":
                tile = replace(tile, split_k=split_k)
            results = launch(direction, g, t, tile)
            assert_right(results, right)
            for name, result in results.items():
                assert_written_in_view_alone(result, name)
