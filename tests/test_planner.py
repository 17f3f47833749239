"""What the planner may choose, and that nothing it chooses for order depends on the batch."""

from dataclasses import replace

import pytest
import torch

from kernels import direct_conv, implicit_gemm, planner
from kernels.device import Device
from kernels.geometry import Conv2dGeometry
from kernels.tile import Tile, is_valid

H100 = Device("cuda", 90, multiprocessors=132, shared_memory=227 << 10)
MI300 = Device("hip", "gfx942", multiprocessors=304, shared_memory=64 << 10)
INTERPRETER = Device("interpreter", "numpy", multiprocessors=1, shared_memory=1 << 40)
LAYERS = {
    "stem": Conv2dGeometry(8, 3, 224, 224, 64, 7, 7, (2, 2), ((3, 3), (3, 3))),
    "3x3": Conv2dGeometry(8, 64, 56, 56, 64, 3, 3, (1, 1), ((1, 1), (1, 1))),
    "odd": Conv2dGeometry(8, 37, 19, 23, 41, 3, 5, (2, 1), ((0, 1), (2, 3)), (2, 1)),
    "grouped": Conv2dGeometry(8, 96, 28, 28, 96, 3, 3, (1, 1), ((1, 1), (1, 1)), (1, 1), 4),
    "depthwise": Conv2dGeometry(8, 96, 28, 28, 96, 3, 3, (1, 1), ((1, 1), (1, 1)), (1, 1), 96),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("device", [H100, MI300, INTERPRETER], ids=lambda d: d.backend)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
def test_each_candidate_is_valid_and_its_order_does_not_depend_on_the_batch(
    direction, name, dtype, device
):
    g = LAYERS[name]
    candidates = planner.candidates(direction, g, dtype, "ieee", device, "channels_last")
    assert candidates
    assert all(is_valid(tile, dtype.itemsize, device) for _, tile, *_ in candidates)
    if direction == "wgrad":
        return
    orders = set()
    for N in (1, 3, 64, 1000):
        engine, tile, *_ = planner.plan(
            direction, replace(g, N=N), dtype, "ieee", device, "channels_last"
        )
        orders.add((engine, tile.depth, tile.packed))
    assert len(orders) == 1


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("stem", direct_conv),
        ("3x3", implicit_gemm),
        ("odd", implicit_gemm),
        ("grouped", implicit_gemm),
        ("depthwise", direct_conv),
    ],
)
def test_engine(name, engine):
    assert (
        planner.plan("fprop", LAYERS[name], torch.bfloat16, "ieee", H100, "channels_last").engine
        is engine
    )


def test_wgrad_splits_its_pixels_until_the_device_is_full():
    g = LAYERS["3x3"]
    tile = planner.plan("wgrad", g, torch.bfloat16, "ieee", H100, "channels_last").tile
    programs = -(-g.K // tile.rows) * -(-g.C * 9 // tile.columns) * tile.splits
    assert H100.multiprocessors <= programs <= 2 * H100.multiprocessors
    tiny = replace(g, N=1, H=4, W=4)
    assert (
        planner.plan("wgrad", tiny, torch.bfloat16, "ieee", H100, "channels_last").tile.splits == 1
    )


@pytest.mark.parametrize(
    ("tile", "reason"),
    [
        (Tile(96, 64, 64), "rows are no power of two"),
        (Tile(128, 128, 64, stages=8), "shared memory"),
        (Tile(256, 256, 32, warps=4), "registers"),
        (Tile(64, 64, 0), "no depth"),
        (Tile(64, 64, 32, splits=0), "no part"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_tiles(tile, reason):
    assert is_valid(Tile(128, 128, 64, warps=8, stages=3), 2, H100)
    assert not is_valid(tile, 2, H100), reason


def test_the_interpreter_takes_blocks_up_to_its_limit():
    assert is_valid(Tile(1 << 14, 64, 16), 8, INTERPRETER)
    assert not is_valid(Tile(1 << 15, 64, 16), 8, INTERPRETER)
