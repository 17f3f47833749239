"""One direction of a convolution by a given engine and tile."""

import torch
from torch import Tensor

from kernels import planner
from kernels.conv.engine import Plan
from kernels.geometry import Conv2dGeometry, Direction

from .. import compiled
from .items import Forced


def launch(
    forced: Forced,
    direction: Direction,
    g: Conv2dGeometry,
    precision: str,
    first: Tensor,
    second: Tensor,
) -> Tensor:
    """The result: fprop's from x and w, dgrad's from dy and w, or wgrad's from x and dy."""
    shape = {"fprop": g.y_shape, "dgrad": g.x_shape, "wgrad": g.w_shape}[direction]
    last = torch.channels_last
    result = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=last)
    x, w, y = {
        "fprop": (first, second, result),
        "dgrad": (result, second, first),
        "wgrad": (first, result, second),
    }[direction]
    (engine,) = (engine for engine in planner.ENGINES if engine.name == forced.engine)
    plan = Plan(engine, forced.tile, 0.0, "launch")
    compiled.launch(direction, g, (x, w, y), plan, precision)
    return result
