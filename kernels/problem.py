"""What the planner is asked: one direction of a convolution, on a device, with operands that lie
in memory in some way.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .device import Device
from .geometry import Conv2dGeometry, Direction

Layout = Literal["aligned", "channels_last", "scattered"]
"""How the operands lie: channels side by side, pixels in memory order and rows on 16 bytes, as
descriptors need; channels side by side; or otherwise, where each element has an address."""


class Problem(NamedTuple):
    """One direction of a convolution. ``any_size``: at any batch and image size, not only g's."""

    direction: Direction
    g: Conv2dGeometry
    dtype: torch.dtype  # of the filters
    precision: str
    device: Device
    layout: Layout = "scattered"
    any_size: bool = False


def layout_of(images: Iterable[Tensor | None], filters: Iterable[Tensor]) -> Layout:
    """How the operands lie; ``images`` are x, y or residual, ``filters`` w."""
    found: Layout = "aligned"
    # A filter of one channel has no neighbours to lie beside.
    for t in (*images, *(w for w in filters if w.shape[1] > 1)):
        if t is not None and t.stride(1) != 1:
            return "scattered"
    if not all(t is None or _is_aligned(t, ordered=True) for t in images):
        found = "channels_last"
    if not all(_is_aligned(t, ordered=False) for t in filters):
        found = "channels_last"
    return found


def _is_aligned(t: Tensor, *, ordered: bool) -> bool:
    """Whether rows of channels start on 16 bytes, and if asked follow one another in order."""
    (N, _, H, W), (n, _, h, w) = t.shape, t.stride()
    unit = 16 // t.element_size()
    end = 0
    for size, stride in ((W, w), (H, h), (N, n)):
        if size > 1:
            if stride % unit or stride <= 0 or (ordered and end and stride != end):
                return False
            end = stride * size
    return t.data_ptr() % 16 == 0
