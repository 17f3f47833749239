"""An engine of one kernel: the planner chooses it once it is in the list."""

from collections.abc import Iterator
from pathlib import Path

import pointwise
import pytest
import torch
from cases import operands
from tolerance import assert_operator_close, torch_conv2d

from cnn import functional
from kernels import device as kernel_device
from kernels import planner
from kernels.conv.engine import Engine
from kernels.device import launches
from kernels.geometry import Conv2dGeometry
from kernels.ops import calls
from kernels.problem import Problem

ADDING = Path(__file__).parents[1] / "docs" / "adding.md"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """The engine, in front of the planner's others; no call from before is replayed."""
    monkeypatch.setattr(planner, "ENGINES", [pointwise.ENGINE, *planner.ENGINES])
    monkeypatch.setattr(calls, "known", {})
    planner.plan.cache_clear()
    yield pointwise.ENGINE
    planner.plan.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_engine_in_the_list_is_chosen_and_runs(layout, dtype, device, engine):
    g = Conv2dGeometry(N=2, C=17, H=5, W=3, K=9, R=1, S=1)  # sizes that fill no block
    here = kernel_device.describe(device)
    assert planner.plan(Problem("fprop", g, dtype, "ieee", here)).engine is engine
    assert planner.plan(Problem("dgrad", g, dtype, "ieee", here)).engine is not engine
    t = operands(g, dtype, device, layout)
    before = launches().get("pointwise_kernel", 0)

    def conv(x, w, bias, residual):
        return functional.conv2d(x, w, bias, residual=residual, activation="relu")

    names = "x", "w", "bias", "residual"
    assert_operator_close(conv, torch_conv2d(g), t.inputs, t.dy, names=names, relu=True)
    assert launches()["pointwise_kernel"] > before


def test_the_documentation_shows_this_engine():
    _, _, code = Path(pointwise.__file__).read_text().partition("\n\n")
    assert f"```python\n{code}```" in ADDING.read_text()
