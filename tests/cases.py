"""The named shapes on which every operator is tested, and the tensors made from them.

A case is a ``Conv2dGeometry``; its id reads as the shape. Sizes are tiny: the interpreter takes
tens of milliseconds for each launch.
"""

import os
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from kernels import device, ops
from kernels.geometry import Conv2dGeometry, full_padding, output_strides, same_padding
from kernels.ops.tensors import channels_last

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def conv_case(
    n: int,
    c: int,
    hw: tuple[int, int],
    k: int,
    rs: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] | str = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Conv2dGeometry:
    """A case; ``padding`` is (top, bottom, left, right), "same" or "full"."""
    if isinstance(padding, str):
        rule = {"same": same_padding, "full": full_padding}[padding]
        padding = (*rule(rs[0], dilation[0]), *rule(rs[1], dilation[1]))
    return Conv2dGeometry.of((n, c, *hw), (k, c // groups, *rs), stride, padding, dilation, groups)


def case_id(g: Conv2dGeometry) -> str:
    """The shape, then whatever is not the default: N2-C5-H9-W11-K7-R3-S2-s2x1-p1.0.1.1-d2x1-g2."""
    parts = [f"{letter}{getattr(g, letter)}" for letter in "NCHWKRS"]
    if g.stride != (1, 1):
        parts.append(f"s{g.stride[0]}x{g.stride[1]}")
    if g.padding != ((0, 0), (0, 0)):
        parts.append("p" + ".".join(str(side) for axis in g.padding for side in axis))
    if g.dilation != (1, 1):
        parts.append(f"d{g.dilation[0]}x{g.dilation[1]}")
    if g.groups != 1:
        parts.append(f"g{g.groups}")
    return "-".join(parts)


PLAIN = conv_case(2, 8, (6, 7), 12, (3, 3), padding=(1, 1, 1, 1))
STRIDED = conv_case(2, 5, (9, 11), 7, (3, 2), stride=(2, 1), padding=(1, 1, 0, 0))
POINTWISE = conv_case(2, 17, (5, 3), 9, (1, 1))
FIRST_LAYER = conv_case(2, 3, (9, 8), 8, (5, 5), stride=(2, 2), padding=(2, 2, 2, 2))
GROUPED = conv_case(2, 12, (5, 6), 8, (3, 3), padding=(1, 1, 1, 1), groups=2)
DEPTHWISE = conv_case(2, 6, (7, 6), 6, (3, 3), padding=(1, 1, 1, 1), groups=6)

CONV_CASES = (
    PLAIN,
    STRIDED,
    POINTWISE,
    FIRST_LAYER,
    GROUPED,
    DEPTHWISE,
    # channels that are prime, one below and one above a power of two
    conv_case(1, 13, (5, 6), 31, (2, 3), padding="full"),
    conv_case(1, 33, (4, 5), 17, (3, 1)),
    # a single filter, a single channel, a single pixel, a kernel as large as the input
    conv_case(3, 1, (4, 4), 1, (2, 2)),
    conv_case(3, 4, (1, 1), 3, (3, 3), padding=(1, 1, 1, 1)),
    conv_case(2, 5, (4, 3), 6, (4, 3)),
    # a kernel wider than the input
    conv_case(2, 5, (2, 3), 6, (5, 7), padding=(2, 2, 3, 3)),
    # strides that exceed the kernel, and leave pixels that no window meets
    conv_case(2, 7, (9, 10), 5, (2, 1), stride=(3, 4)),
    conv_case(2, 16, (6, 7), 8, (1, 1), stride=(2, 2)),
    # 'same' of even kernels pads one more behind than before
    conv_case(2, 6, (5, 6), 7, (2, 4), padding="same"),
    conv_case(1, 5, (7, 6), 5, (4, 2), padding="same", dilation=(1, 3)),
    # dilation that reaches beyond the padding, or shares a divisor with the stride
    conv_case(2, 5, (11, 9), 6, (3, 3), padding=(1, 1, 0, 0), dilation=(4, 3)),
    conv_case(2, 5, (9, 8), 6, (3, 4), stride=(4, 2), padding=(2, 2, 4, 4), dilation=(2, 4)),
    # stride, padding and dilation that differ from axis to axis and from side to side
    conv_case(2, 6, (8, 9), 5, (3, 4), (2, 3), (0, 3, 2, 1), (1, 2)),
    # full padding
    conv_case(2, 3, (4, 5), 4, (3, 2), padding="full", dilation=(2, 1)),
    # groups with more and with fewer filters than channels
    conv_case(2, 9, (6, 5), 6, (3, 2), (1, 2), (1, 1, 1, 1), groups=3),
    conv_case(1, 4, (5, 5), 12, (3, 3), padding=(0, 1, 1, 0), groups=2),
    # depthwise with a channel multiplier, strided, dilated, with even kernels
    conv_case(2, 5, (8, 7), 15, (3, 3), (2, 1), (1, 1, 1, 1), groups=5),
    conv_case(2, 4, (8, 7), 4, (4, 2), padding="same", dilation=(2, 1), groups=4),
    # few channels
    conv_case(2, 1, (8, 8), 6, (5, 5)),
    conv_case(2, 2, (6, 7), 5, (3, 3), (1, 1), (1, 1, 1, 1)),
    conv_case(1, 4, (6, 6), 9, (2, 2), (2, 2)),
)

LAYOUTS = (
    "contiguous",
    "channels_last",
    "x_channels_last",
    "w_channels_last",
    "sliced",
    "expanded",
)


def in_strides(t: Tensor, channels_last: bool) -> Tensor:
    """The same values in one of torch's memory formats, spelled out even where one size is 1."""
    return torch.empty_strided(
        t.shape, output_strides(t.shape, channels_last), dtype=t.dtype, device=t.device
    ).copy_(t)


def sliced(t: Tensor) -> Tensor:
    """The same values as every other element, along each axis, of a tensor of NaN."""
    base = t.new_full([2 * size + 1 for size in t.shape], torch.nan)
    view = base[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


@dataclass(frozen=True)
class Operands:
    """What one convolution is called with. ``dy`` is like y."""

    x: Tensor
    w: Tensor
    bias: Tensor
    residual: Tensor
    dy: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.w, self.bias, self.residual


def random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Normally distributed values, the same on each device."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(device=device, dtype=dtype)


def operands(
    g: Conv2dGeometry,
    dtype: torch.dtype,
    device: torch.device,
    layout: str = "contiguous",
    seed: int = 0,
) -> Operands:
    """Operands of a case. "expanded" repeats one image, row or channel with stride 0."""
    x, w, bias, residual, dy = (
        random(shape, dtype, device, seed + i)
        for i, shape in enumerate((g.x_shape, g.w_shape, (g.K,), g.y_shape, g.y_shape))
    )
    if layout == "sliced":
        return Operands(*(sliced(t) for t in (x, w, bias, residual, dy)))
    if layout == "expanded":
        return Operands(
            x[:1].expand_as(x),
            w[:, :, :1].expand_as(w),
            bias[:1].expand_as(bias),
            residual[:, :, :1].expand_as(residual),
            dy[:, :, :1].expand_as(dy),
        )
    x_last = layout in ("channels_last", "x_channels_last")
    w_last = layout in ("channels_last", "w_channels_last")
    return Operands(
        in_strides(x, x_last),
        in_strides(w, w_last),
        bias,
        in_strides(residual, x_last or w_last),
        in_strides(dy, x_last or w_last),
    )


def params(*axes: Any) -> list[Any]:
    """pytest parameters: each combination of values, with a readable id."""
    return [pytest.param(*values, id="-".join(map(_id, values))) for values in product(*axes)]


def _id(value: Any) -> str:
    return case_id(value) if isinstance(value, Conv2dGeometry) else str(value).split(".")[-1]


def conv2d(g: Conv2dGeometry, relu: bool = False, precision: str | None = "ieee"):
    """The library's convolution of geometry g, called as (x, w, bias, residual)."""

    def operator(x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        pads = (*g.padding[0], *g.padding[1])
        numbers = g.stride, pads, g.dilation, g.groups, precision, relu
        return ops.conv2d.conv2d(x, w, bias, residual, *numbers)

    return operator


def conv_transpose2d(g: Conv2dGeometry):
    """The library's transposed convolution, called as (x, w, bias): x like g's y."""

    def operator(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        pads = (*g.padding[0], *g.padding[1])
        numbers = g.stride, pads, g.dilation, g.groups, "ieee", channels_last(x, w)
        return ops.conv2d.conv2d_dgrad(x, w, bias, (g.H, g.W), *numbers)

    return operator


def examples(count: int) -> settings:
    """How many examples hypothesis draws: ``count``, always the same; for a longer search with
    new ones, TRITON_CNN_EXAMPLES times as many. Emulated a twentieth, as each compiles a kernel.
    """
    if device.is_emulated():
        count = -(-count // 20)
    factor = int(os.environ.get("TRITON_CNN_EXAMPLES", "0"))
    return settings(max_examples=count * max(1, factor), derandomize=factor == 0, deadline=None)
