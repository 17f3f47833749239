"""Every binary that the library may launch for a layer: ``groups`` of calls of its operators.

A ``Scope`` sets how many. "planned" is what the planner chooses for aligned channels_last operands
of the given size. "family" adds what any batch and image size may get in any layout
(``device.warm_up`` launches it), with no epilogue and with the full one, and the choices for 64-bit
offsets. "every" has all epilogues, and all tiles with 64-bit offsets.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels import device, planner
from kernels.conv.engine import Fprop
from kernels.conv.paired_columns import FEW
from kernels.geometry import Conv2dGeometry, Pair, Pool2dGeometry
from kernels.lang.epilogue import Epilogue
from kernels.ops.conv2d import (
    channel_sum,
    conv2d,
    conv2d_dgrad,
    conv2d_wgrad,
    relu_backward,
)
from kernels.ops.conv2d_8bit import conv2d_bytes, conv2d_bytes_wgrad
from kernels.ops.conv2d_relu_max_pool2d import (
    conv2d_relu_max_pool2d,
    conv2d_relu_max_pool2d_backward,
)
from kernels.ops.max_pool2d import (
    max_pool2d,
    max_pool2d_backward,
    max_pool2d_gather,
    max_unpool2d,
    max_unpool2d_backward,
)
from kernels.pool import max_pool
from kernels.problem import Problem, layout_of

from . import selection, suites
from .measure import Dtype

Scope = Literal["planned", "family", "every"]
SCOPES: tuple[Scope, ...] = ("planned", "family", "every")
LAYOUTS = ("aligned", "channels_last", "scattered")  # the planner's
Arguments = tuple[Pair, tuple[int, int, int, int], Pair, int]
"""Stride, padding, dilation and groups of a convolution, as operators take them."""


class Group(NamedTuple):
    """Calls of all operators on a layer.

    ``any_size``: also with what other sizes get. ``large``: with 64-bit offsets.
    """

    layout: str
    any_size: bool = False
    large: bool = False
    every_epilogue: bool = False

    def launch(self, geometry: suites.Geometry, dtype: Dtype) -> None:
        """Launch everything that the operators may launch for one layer."""
        geometry = _large(geometry) if self.large else geometry
        with device.warm_up() if self.any_size else nullcontext():
            _operators(geometry, dtype, self.layout, self.every_epilogue)


PLANNED = Group("aligned")


def groups(scope: Scope) -> Iterator[Group]:
    """The groups of a scope, planned ones first."""
    yield PLANNED
    if scope != "planned":
        every = scope == "every"
        for layout in LAYOUTS:
            yield Group(layout, any_size=True, every_epilogue=every)
            yield Group(layout, any_size=every, large=True, every_epilogue=every)


def _operators(geometry: suites.Geometry, dtype: Dtype, layout: str, every: bool) -> None:
    if isinstance(geometry, Conv2dGeometry):
        _convolution(geometry, dtype, layout, every)
    elif isinstance(geometry, Pool2dGeometry):
        _pooling(geometry, dtype, layout)
    else:
        _block(geometry, dtype, layout)


def _large(geometry: suites.Geometry) -> suites.Geometry:
    """The geometry with enough images for 64-bit offsets."""
    g = geometry.conv if isinstance(geometry, suites.Block) else geometry
    images = 1 + 2**31 // min(prod(g.x_shape[1:]), prod(g.y_shape[1:]))
    return suites.with_images(geometry, images)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """A tensor of the meta device. Rows of a merely "channels_last" one start anywhere."""
    if layout != "channels_last" or len(shape) != 4:
        return selection.empty(shape, dtype, layout == "aligned")
    N, C, H, W = shape
    return selection.empty((N, C + 1, H, W), dtype)[:, :C]


def _convolution(g: Conv2dGeometry, dtype: Dtype, layout: str, every: bool) -> None:
    x, y = (_empty(shape, dtype.torch, layout) for shape in (g.x_shape, g.y_shape))
    w = selection.empty(g.w_shape, dtype.torch, layout != "scattered")
    bias = w.new_empty(g.K)
    (top, bottom), (left, right) = g.padding
    arguments = g.stride, (top, bottom, left, right), g.dilation, g.groups
    how = *arguments, dtype.precision
    epilogues = [(None, None, False), (bias, y, True)]
    if every:
        epilogues = list(product((None, bias), (None, y), (False, True)))
    for vector, added, relu in epilogues:
        conv2d.launch(x, w, vector, added, *how, relu)
    for vector in (None, w.new_empty(g.C)):
        conv2d_dgrad.launch(y, w, vector, x.shape[2:], *how, layout != "scattered")
    for with_bias in (False, True):
        conv2d_wgrad.launch(x, y, w.shape, w.stride(), *how, with_bias)
    channel_sum.launch(y)
    for with_bias in (False, True):
        relu_backward.launch(y, y, with_bias)
    if g.groups == 1 and g.C <= FEW:
        _bytes(g, dtype, layout, arguments)
    if dtype.torch == torch.bfloat16:
        _eighths(g, layout, arguments)


def _bytes(g: Conv2dGeometry, dtype: Dtype, layout: str, arguments: Arguments) -> None:
    """First layers on uint8 images."""
    w = selection.empty(g.w_shape, dtype.torch, layout != "scattered")
    x, dy = _empty(g.x_shape, torch.uint8, layout), _empty(g.y_shape, dtype.torch, layout)
    scale, shift = (w.new_empty(g.C, dtype=torch.float32) for _ in range(2))
    how = *arguments, dtype.precision
    for bias, relu in ((None, False), (w.new_empty(g.K), True)):
        conv2d_bytes.launch(x, w, bias, scale, shift, *how, relu)
    for with_bias in (False, True):
        conv2d_bytes_wgrad.launch(x, dy, scale, shift, w.shape, w.stride(), *how, with_bias)


def _eighths(g: Conv2dGeometry, layout: str, arguments: Arguments) -> None:
    """Products of float8 with bfloat16 results."""
    w = selection.empty(g.w_shape, torch.float8_e4m3fn, layout != "scattered")
    x, y = (
        _empty(shape, t, layout) for shape, t in ((g.x_shape, w.dtype), (g.y_shape, torch.bfloat16))
    )
    here, aligned = device.describe(w.device), layout_of((x, y), (w,))
    known = planner.candidates(Problem("fprop", g, w.dtype, "ieee", here, aligned))
    known = [plan for plan in known if plan.engine.takes("scale", "fprop")]
    vector = y.new_empty(g.K)
    for plan in known if device.is_warming_up() else known[:1]:
        for bias, added, activation in ((None, None, None), (vector, y, "relu")):
            epilogue = Epilogue(bias, added, activation, scale=vector.float())
            plan.engine.launch(Fprop(x, w, y, g, epilogue=epilogue), plan.tile)


def _pooling(g: Pool2dGeometry, dtype: Dtype, layout: str) -> None:
    x, y = (_empty(shape, dtype.torch, layout) for shape in (g.x_shape, g.y_shape))
    argmax = _empty(g.y_shape, max_pool.argmax_dtype(g), layout)
    indices = _empty(g.y_shape, torch.int64, layout)
    window = g.kernel, g.stride, g.padding, g.dilation, g.ceil_mode
    for with_offsets, with_indices in ((False, False), (True, False), (False, True)):
        max_pool2d.launch(x, *window, with_offsets, with_indices)
    max_pool2d_backward.launch(y, argmax, x.shape[2:], *window, layout != "scattered")
    max_pool2d_gather.launch(x, argmax, *window)
    max_unpool2d.launch(y, indices, x.shape[2:])
    max_unpool2d_backward.launch(x, indices)


def _block(block: suites.Block, dtype: Dtype, layout: str) -> None:
    g, pool = block
    x, dy = (_empty(shape, dtype.torch, layout) for shape in (g.x_shape, pool.y_shape))
    w = selection.empty(g.w_shape, dtype.torch, layout != "scattered")
    argmax = _empty(pool.y_shape, max_pool.argmax_dtype(pool), layout)
    (top, bottom), (left, right) = g.padding
    how = g.stride, (top, bottom, left, right), g.dilation, g.groups, dtype.precision
    window = pool.kernel, pool.stride, pool.padding
    for bias, with_offsets in product((None, w.new_empty(g.K)), (False, True)):
        conv2d_relu_max_pool2d.launch(x, w, bias, *how, *window, with_offsets)
    sizes = x.shape[2:], w.shape, w.stride()
    for wanted in ((g.C > 4, True, True), (g.C > 4, True, False)):
        conv2d_relu_max_pool2d_backward.launch(
            dy, argmax, x, w, *sizes, *how, *window, layout != "scattered", wanted
        )
