"""Each tile of the planner's families by itself, with a plain epilogue.

The layers are small and have few taps; their channels are those of layers that fill a GPU, so that
all tiles apply.
"""

from typing import Any, NamedTuple

import pytest
import torch
from cases import Operands, case_id, conv_case, operands
from tolerance import assert_close, double, evaluate_torch, torch_conv2d

from bench import emulator
from kernels import device as devices
from kernels import planner
from kernels.conv.engine import Dgrad, Fprop, Plan, Wgrad
from kernels.geometry import Conv2dGeometry, Direction
from kernels.lang.epilogue import Epilogue
from kernels.problem import Layout, Problem

TALL, WIDE = (1, 1, 0, 0), (0, 0, 1, 1)
PLAIN = conv_case(2, 256, (8, 9), 256, (3, 1), padding=TALL)
LAYERS = (
    PLAIN,
    conv_case(2, 128, (10, 8), 256, (3, 3), (2, 2), (1, 1, 1, 1)),
    conv_case(2, 128, (11, 9), 128, (1, 3), (2, 2), WIDE),
    conv_case(3, 256, (7, 9), 128, (1, 1)),
    conv_case(2, 200, (8, 9), 136, (1, 3), padding=WIDE),
    conv_case(2, 256, (8, 9), 256, (3, 1), padding=TALL, groups=2),
)
PROBLEMS = (
    *((g, torch.bfloat16, "ieee") for g in LAYERS),
    *((g, torch.float32, "tf32") for g in LAYERS[:4]),
    (PLAIN, torch.float16, "ieee"),
    *((PLAIN, torch.float32, precision) for precision in ("bf16x3", "tf32x3", "bf16x6", "ieee")),
)
# The relative error of one product, where operands are rounded or split before it.
PRODUCT_EPS = {"tf32": 2**-9, "bf16x3": 2**-15, "tf32x3": 2**-21, "bf16x6": 2**-23, "ieee": 0.0}
LAYOUTS: tuple[Layout, ...] = ("aligned", "channels_last", "scattered")


class Run(NamedTuple):
    """One direction of a layer, by one plan."""

    direction: Direction
    g: Conv2dGeometry
    dtype: torch.dtype
    precision: str
    layout: Layout
    plan: Plan

    @property
    def name(self) -> str:
        tile, engine = self.plan.tile, self.plan.engine.name
        kind = str(self.dtype).rpartition(".")[2]
        block = f"{tile.rows}x{tile.columns}x{tile.depth}-w{tile.warps}-s{tile.stages}"
        box = "" if tile.box is None else "-box" + "x".join(map(str, tile.box))
        split = f"-splits{tile.split_k}" if tile.split_k > 1 else ""
        kind = f"{case_id(self.g)}-{kind}-{self.precision}-{self.layout}"
        return f"{kind}-{engine}-{block}{box}{split}"


def runs(direction: Direction) -> list[Any]:
    """The plans of every layer, dtype and layout; a binary that two layouts share comes once."""
    here = devices.describe(torch.device("cpu"))
    found = []
    for g, dtype, precision in PROBLEMS:
        seen = set()
        for layout in LAYOUTS:
            for plan in planner.family(Problem(direction, g, dtype, precision, here, layout)):
                key = plan.engine, plan.tile, layout == "scattered"
                if key not in seen:
                    seen.add(key)
                    run = Run(direction, g, dtype, precision, layout, plan)
                    found.append(pytest.param(run, id=run.name))
    return found


def references(g: Conv2dGeometry, t: Operands) -> list[tuple]:
    """(y, gradients) in torch's own dtype, in float64, and in float64 of absolute values."""
    exact = [double(v) for v in (t.x, t.w, t.bias, t.dy)]
    return [
        evaluate_torch(torch_conv2d(g), (x, w, bias, None), dy)
        for x, w, bias, dy in ((t.x, t.w, t.bias, t.dy), exact, [v.abs() for v in exact])
    ]


def check(run: Run, device: torch.device) -> None:
    emulator.configure(mode="both", views=True, owners=True)
    g, (engine, tile, *_), precision = run.g, run.plan, run.precision
    layout = "contiguous" if run.layout == "scattered" else "channels_last"
    t = operands(g, run.dtype, device, layout)

    def fresh(like: torch.Tensor) -> torch.Tensor:
        return torch.full_like(like, torch.nan)

    (same_y, same), (y, exact), (bound_y, bound) = references(g, t)
    if run.direction == "fprop":
        ours = [fresh(t.dy)]
        engine.launch(Fprop(t.x, t.w, *ours, g, precision, Epilogue(t.bias)), tile)
        right = [(y, same_y, bound_y)]
    elif run.direction == "dgrad":
        ours = [fresh(t.x)]
        engine.launch(Dgrad(t.dy, t.w, *ours, g, precision), tile)
        right = [(exact[0], same[0], bound[0])]
    else:
        ours = [fresh(t.w), fresh(t.bias)]
        engine.launch(Wgrad(t.x, t.dy, *ours, g, precision), tile)
        right = list(zip(exact[1:3], same[1:3], bound[1:3], strict=True))
    eps = PRODUCT_EPS[precision] if run.dtype == torch.float32 else 0.0
    for result, (reference, same_dtype, magnitude) in zip(ours, right, strict=True):
        assert_close(result, reference, same_dtype, magnitude, product_eps=eps)


@pytest.mark.parametrize("run", runs("fprop"))
def test_fprop(run, device):
    check(run, device)


@pytest.mark.parametrize("run", runs("dgrad"))
def test_dgrad(run, device):
    check(run, device)


@pytest.mark.parametrize("run", runs("wgrad"))
def test_wgrad(run, device):
    check(run, device)
