"""What the planner may choose, and that nothing it chooses for order depends on the batch."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

from bench import plan as bench_plan
from bench import selection, suites
from kernels import cost_model, planner
from kernels import device as devices
from kernels.conv import depthwise, descriptor_gemm, few_channels, implicit_gemm, paired_columns
from kernels.device import Device
from kernels.geometry import Conv2dGeometry
from kernels.problem import Problem
from kernels.tile import Tile, is_valid

H100 = Device("cuda", 90, multiprocessors=132, shared_memory=227 << 10)
MI300 = Device("hip", "gfx942", multiprocessors=304, shared_memory=64 << 10)
INTERPRETER = Device("interpreter", "numpy", multiprocessors=1, shared_memory=1 << 40)
LAYERS = {
    "stem": Conv2dGeometry(8, 3, 224, 224, 64, 7, 7, (2, 2), ((3, 3), (3, 3))),
    "few": Conv2dGeometry(8, 8, 56, 56, 64, 3, 3, groups=2),
    "3x3": Conv2dGeometry(8, 64, 56, 56, 64, 3, 3, (1, 1), ((1, 1), (1, 1))),
    "odd": Conv2dGeometry(8, 37, 19, 23, 41, 3, 5, (2, 1), ((0, 1), (2, 3)), (2, 1)),
    "grouped": Conv2dGeometry(8, 96, 28, 28, 96, 3, 3, (1, 1), ((1, 1), (1, 1)), (1, 1), 4),
    "depthwise": Conv2dGeometry(8, 96, 28, 28, 96, 3, 3, (1, 1), ((1, 1), (1, 1)), (1, 1), 96),
}
DIRECTIONS = ("fprop", "dgrad", "wgrad")
DATA = Path(__file__).parent / "data"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("device", [H100, MI300, INTERPRETER], ids=lambda d: d.backend)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
def test_each_candidate_is_valid_and_its_order_does_not_depend_on_the_batch(
    direction, name, dtype, device
):
    g = LAYERS[name]
    candidates = planner.candidates(Problem(direction, g, dtype, "ieee", device, "channels_last"))
    assert candidates
    assert all(is_valid(tile, dtype.itemsize, device) for _, tile, *_ in candidates)
    if direction == "wgrad":
        return
    orders = set()
    for N in (1, 3, 64, 1000):
        engine, tile, *_ = planner.plan(
            Problem(direction, replace(g, N=N), dtype, "ieee", device, "channels_last")
        )
        orders.add((engine, tile.depth, tile.packed))
    assert len(orders) == 1


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("stem", paired_columns.ENGINE),
        ("few", few_channels.ENGINE),
        ("3x3", implicit_gemm.ENGINE),
        ("odd", implicit_gemm.ENGINE),
        ("grouped", implicit_gemm.ENGINE),
        ("depthwise", depthwise.ENGINE),
    ],
)
def test_engine(name, engine):
    assert (
        planner.plan(
            Problem("fprop", LAYERS[name], torch.bfloat16, "ieee", H100, "channels_last")
        ).engine
        is engine
    )


def test_wgrad_splits_its_pixels_until_the_device_is_full():
    g = LAYERS["3x3"]
    tile = planner.plan(Problem("wgrad", g, torch.bfloat16, "ieee", H100, "channels_last")).tile
    programs, turns = cost_model.wgrad_work(g, tile)
    assert programs * tile.split_k >= H100.multiprocessors
    assert turns // tile.split_k >= 8
    tiny = replace(g, N=1, H=4, W=4)
    assert (
        planner.plan(
            Problem("wgrad", tiny, torch.bfloat16, "ieee", H100, "channels_last")
        ).tile.split_k
        == 1
    )


@pytest.mark.parametrize(
    ("tile", "reason"),
    [
        (Tile(96, 64, 64), "rows are no power of two"),
        (Tile(128, 128, 64, stages=8), "shared memory"),
        (Tile(256, 256, 32, warps=4), "registers"),
        (Tile(64, 64, 0), "no depth"),
        (Tile(64, 64, 32, split_k=0), "no part"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_tiles(tile, reason):
    assert is_valid(Tile(128, 128, 64, warps=8, stages=3), 2, H100)
    assert not is_valid(tile, 2, H100), reason


def test_the_interpreter_takes_blocks_up_to_its_limit():
    assert is_valid(Tile(1 << 14, 64, 16), 8, INTERPRETER)
    assert not is_valid(Tile(1 << 15, 64, 16), 8, INTERPRETER)


# Every layer of every suite, as networks in channels_last launch it.

CONVOLUTIONS = [layer for layer in suites.layers() if isinstance(layer.geometry, Conv2dGeometry)]
SUITES = sorted({layer.suite for layer in CONVOLUTIONS})
MODES = ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "tf32x3"))
GPUS = [
    H100,
    MI300,
    Device("cuda", 80, multiprocessors=108, shared_memory=163 << 10),
    Device("cuda", 100, multiprocessors=148, shared_memory=227 << 10),
    Device("cuda", 120, multiprocessors=170, shared_memory=99 << 10),
]


@pytest.mark.parametrize("device", GPUS, ids=lambda d: str(d.arch))
@pytest.mark.parametrize("suite", SUITES)
def test_the_plan_of_each_layer_of_each_suite(suite, device):
    """It is valid, not quicker than the roofline, and no candidate is quicker under the model."""
    for layer in CONVOLUTIONS:
        if layer.suite != suite:
            continue
        for direction, (dtype, precision) in product(DIRECTIONS, MODES):
            problem = (direction, layer.geometry, dtype, precision, device)
            best = planner.plan(Problem(*problem, "aligned"))
            assert is_valid(best.tile, dtype.itemsize, device)
            assert best.ms >= cost_model.roofline(Problem(*problem))
            others = planner.candidates(Problem(*problem, "aligned"))
            assert best in others
            same_engine = [other.ms for other in others if other.engine is best.engine]
            assert best.ms == min(same_engine)
            assert best.ms <= 1.25 * min(other.ms for other in others)


@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
@pytest.mark.parametrize("suite", SUITES)
def test_engine_and_order_do_not_depend_on_the_batch(suite, direction):
    for layer in CONVOLUTIONS:
        if layer.suite != suite:
            continue
        plans = [
            planner.plan(
                Problem(
                    direction, replace(layer.geometry, N=N), torch.bfloat16, "ieee", H100, "aligned"
                )
            )
            for N in (1, 2, 7, 64, 513)
        ]
        assert len({(plan.engine, plan.tile.depth, plan.tile.packed) for plan in plans}) == 1
        assert {plan.tile.split_k for plan in plans} == {1}


# The weight's gradient: boxes with one long axis, and an engine that no batch changes.


@st.composite
def wgrads(draw):
    """A layer, dtype and precision whose gradient descriptors may take."""
    groups = draw(st.sampled_from((1, 1, 1, 2)))
    C, K = (groups * draw(st.sampled_from((16, 48, 64, 128, 192, 512))) for _ in range(2))
    H, W = (draw(st.integers(7, 260)) for _ in range(2))
    R, S, padding = (draw(st.integers(low, high)) for low, high in ((1, 5), (1, 5), (0, 2)))
    stride = draw(st.sampled_from(((1, 1), (1, 1), (2, 2), (2, 1))))
    g = Conv2dGeometry(
        draw(st.integers(1, 300)), C, H, W, K, R, S, stride, ((padding,) * 2,) * 2, groups=groups
    )
    modes = [(torch.float16, "ieee"), (torch.bfloat16, "ieee")]
    modes += [(torch.float32, mode) for mode in ("tf32", "bf16x3", "tf32x3", "bf16x6")]
    return g, *draw(st.sampled_from(modes))


@examples(100)
@given(problem=wgrads(), batch=st.integers(1, 600), size=st.tuples(*[st.integers(7, 260)] * 2))
def test_wgrad_has_boxes_of_one_long_axis_and_one_engine(problem, batch, size):
    """At any batch, and what warming up compiles serves any batch and image."""
    g, dtype, precision = problem
    rest = (dtype, precision, H100, "aligned")
    family = {
        (plan.engine, replace(plan.tile, split_k=min(2, plan.tile.split_k)))
        for plan in planner.family(Problem("wgrad", g, *rest))
    }
    for tile in [tile for _, tile in family if tile.box]:
        assert sum(length > 1 for length in tile.box) == 1
    chosen = planner.plan(Problem("wgrad", g, *rest))
    (engine,) = {plan.engine for plan in planner.candidates(Problem("wgrad", g, *rest))}
    other = planner.plan(Problem("wgrad", replace(g, N=batch), *rest))
    assert chosen.engine is other.engine is engine
    resized = planner.plan(Problem("wgrad", replace(g, N=batch, H=size[0], W=size[1]), *rest))
    for plan in (chosen, other, resized):
        assert (plan.engine, replace(plan.tile, split_k=min(2, plan.tile.split_k))) in family


MAPS = (
    ((7, 7), descriptor_gemm.ENGINE, "a batch has images for a box"),
    ((128, 128), descriptor_gemm.ENGINE, "rows are whole boxes"),
    ((75, 75), descriptor_gemm.ENGINE, "a batch has images for a box"),
    ((200, 333), implicit_gemm.ENGINE, "few images, and no box divides a row"),
    ((333, 208), descriptor_gemm.ENGINE, "13 boxes of 16 pixels are a row"),
)


@pytest.mark.parametrize(("size", "engine", "why"), MAPS, ids=lambda value: str(value))
def test_the_map_decides_which_engine_sums_the_weights_gradient(size, engine, why):
    g = Conv2dGeometry(4, 64, *size, 64, 3, 3, (1, 1), ((1, 1), (1, 1)))
    for N in (1, 4, 256):
        plan = planner.plan(
            Problem("wgrad", replace(g, N=N), torch.bfloat16, "ieee", H100, "aligned")
        )
        assert plan.engine is engine, why


@pytest.mark.parametrize(
    ("N", "size", "box"),
    [
        (256, 14, (64, 1, 1)),
        (32, 14, (32, 1, 1)),  # half a deep box would be empty
        (48, 14, (16, 1, 1)),
        (60, 14, (64, 1, 1)),  # a shallower one would cover no less
        (3, 14, (16, 1, 1)),
        (3, 112, (1, 1, 16)),
        (3, 192, (1, 1, 64)),
    ],
)
def test_the_box_follows_the_batch_and_the_rows(N, size, box):
    g = Conv2dGeometry(N, 256, size, size, 256, 3, 3, (1, 1), ((1, 1), (1, 1)))
    plan = planner.plan(Problem("wgrad", g, torch.bfloat16, "ieee", H100, "aligned"))
    assert plan.tile.box == box


def test_the_model_counts_what_a_box_wastes():
    """One image in a box of 64: the turns are those of 64 images."""
    g = Conv2dGeometry(64, 256, 14, 14, 256, 3, 3, (1, 1), ((1, 1), (1, 1)))
    tile = Tile(128, 256, 64, warps=8, stages=4, box=(64, 1, 1))
    full, alone = (cost_model.wgrad_work(replace(g, N=N), tile) for N in (64, 1))
    assert full == alone == (18, 14 * 14)
    rest = (torch.bfloat16, "ieee", H100)
    per_image = cost_model.predict(Problem("wgrad", g, *rest), tile).ms / 64
    assert cost_model.predict(Problem("wgrad", replace(g, N=1), *rest), tile).ms > 32 * per_image


def test_descriptors_serve_most_of_resnet50():
    engines = [
        planner.plan(
            Problem(direction, layer.geometry, torch.bfloat16, "ieee", H100, "aligned")
        ).engine
        for layer in CONVOLUTIONS
        if layer.suite == "resnet50_v1.5"
        for direction in DIRECTIONS
    ]
    assert engines.count(descriptor_gemm.ENGINE) == len(engines) - 3  # all but the stem


@pytest.mark.parametrize(
    ("g", "layout", "why"),
    [
        (Conv2dGeometry(8, 64, 9, 9, 64, 3, 3), "channels_last", "rows are not on 16 bytes"),
        (Conv2dGeometry(8, 64, 9, 9, 64, 3, 3), "scattered", "channels are apart"),
        (Conv2dGeometry(8, 64, 9, 9, 64, 3, 3, groups=4), "aligned", "16 filters fill no block"),
        (Conv2dGeometry(8, 40, 9, 9, 128, 3, 3, groups=2), "aligned", "20 channels fill no block"),
        (Conv2dGeometry(8, 8, 9, 9, 64, 3, 3), "aligned", "8 channels fill no block"),
        (Conv2dGeometry(8, 64, 9, 9, 64, 3, 3, (3, 3)), "aligned", "nine phases"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_what_descriptors_do_not_take(g, layout, why):
    engine = planner.plan(Problem("fprop", g, torch.bfloat16, "ieee", H100, layout)).engine
    assert engine is implicit_gemm.ENGINE, why


@pytest.mark.parametrize("C", [16, 32, 48, 96])
def test_a_block_of_float8_is_as_deep_as_a_product_instruction(C):
    """32 channels: Triton compiles no product of fewer. A group's neighbours are not read."""
    for taps in (1, 3):
        g = Conv2dGeometry(8, C, 28, 28, 64, taps, taps)
        plans = planner.candidates(
            Problem("fprop", g, torch.float8_e4m3fn, "ieee", H100, "aligned")
        )
        assert plans
        assert all(plan.tile.depth >= 32 for plan in plans)
        grouped = replace(g, C=2 * C, K=128, groups=2)
        plans = planner.candidates(
            Problem("fprop", grouped, torch.float8_e4m3fn, "ieee", H100, "aligned")
        )
        assert all(plan.tile.depth >= 32 and C % plan.tile.depth == 0 for plan in plans)
        assert bool(plans) == (C % 32 == 0)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_the_plans_of_all_suites_are_those_recorded(arch):
    """A change of the planner or of its model of time shows what it changes.

    The tables are what ``python -m bench plan --arch ARCH --dtype bf16 tf32 --suite ...`` prints.
    """
    cases = suites.cases(CONVOLUTIONS, DIRECTIONS, ["bf16", "tf32"])
    with devices.launch_nothing(selection.target(arch)):
        found = list(bench_plan.lines(cases))
    assert found == (DATA / f"plans-{arch}.txt").read_text().splitlines()
