"""Every binary that the library may launch for a layer: ``launch`` calls its operators.

They are called under ``device.warm_up``, which launches the whole family of tiles that some batch
or image size may get, with each epilogue that the operators have, in each layout.
"""

from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from math import prod

import torch
from torch import Tensor

from kernels import device, library, max_pool
from kernels.geometry import Conv2dGeometry, Pool2dGeometry

from . import selection, suites
from .measure import Dtype

LAYOUTS = ("aligned", "channels_last", "scattered")  # as the planner's


def launch(geometry: suites.Geometry, dtype: Dtype, every: bool = False) -> None:
    """Launch what the operators on one layer may, in all layouts, and with offsets of 64 bits.

    Of epilogues only none and the whole, and with 64 bits only the planned tile, unless ``every``.
    """
    for layout in LAYOUTS:
        with device.warm_up():
            _operators(geometry, dtype, layout, every)
        with device.warm_up() if every else nullcontext():
            _operators(_large(geometry), dtype, layout, every)


def _operators(geometry: suites.Geometry, dtype: Dtype, layout: str, every: bool) -> None:
    if isinstance(geometry, Conv2dGeometry):
        _convolution(geometry, dtype, layout, every)
    elif isinstance(geometry, Pool2dGeometry):
        _pooling(geometry, dtype, layout)
    else:
        _block(geometry, dtype, layout)


def _large(geometry: suites.Geometry) -> suites.Geometry:
    """The geometry with so many images that offsets take 64 bits."""
    if isinstance(geometry, suites.Block):
        conv, pool = geometry
        images = _large(conv).N
        return suites.Block(replace(conv, N=images), replace(pool, N=images))
    images = 1 + 2**31 // min(prod(geometry.x_shape[1:]), prod(geometry.y_shape[1:]))
    return replace(geometry, N=images)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """A tensor of the meta device. Of what is merely "channels_last" rows start anywhere."""
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
        library._conv2d(x, w, vector, added, *how, relu)
    for vector in (None, w.new_empty(g.C)):
        library._conv2d_dgrad(y, w, vector, x.shape[2:], *how, layout != "scattered")
    for with_bias in (False, True):
        library._conv2d_wgrad(x, y, w.shape, w.stride(), *how, with_bias)
    library._channel_sum(y)
    for with_bias in (False, True):
        library._relu_backward(y, y, with_bias)
    _eight_bits(g, dtype, layout, arguments)


def _eight_bits(g: Conv2dGeometry, dtype: Dtype, layout: str, arguments: tuple) -> None:
    """Products of float8, whose result is bfloat16, and images of bytes."""


def _pooling(g: Pool2dGeometry, dtype: Dtype, layout: str) -> None:
    x, y = (_empty(shape, dtype.torch, layout) for shape in (g.x_shape, g.y_shape))
    offsets = _empty(g.y_shape, max_pool.offset_dtype(g), layout)
    indices = _empty(g.y_shape, torch.int64, layout)
    window = g.kernel, g.stride, g.padding, g.dilation, g.ceil_mode
    for with_offsets, with_indices in ((False, False), (True, False), (False, True)):
        library._max_pool2d(x, *window, with_offsets, with_indices)
    library._max_pool2d_backward(y, offsets, x.shape[2:], *window, layout != "scattered")
    library._max_pool2d_gather(x, offsets, *window)
    library._max_unpool2d(y, indices, x.shape[2:])
    library._max_unpool2d_backward(x, indices)


def _block(block: suites.Block, dtype: Dtype, layout: str) -> None:
    g, pool = block
    x, dy = (_empty(shape, dtype.torch, layout) for shape in (g.x_shape, pool.y_shape))
    w = selection.empty(g.w_shape, dtype.torch, layout != "scattered")
    offsets = _empty(pool.y_shape, max_pool.offset_dtype(pool), layout)
    (top, bottom), (left, right) = g.padding
    how = g.stride, (top, bottom, left, right), g.dilation, g.groups, dtype.precision
    window = pool.kernel, pool.stride, pool.padding
    for bias, with_offsets in product((None, w.new_empty(g.K)), (False, True)):
        library._conv_pool(x, w, bias, *how, *window, with_offsets)
    sizes = x.shape[2:], w.shape, w.stride()
    for wanted in ((g.C > 4, True, True), (g.C > 4, True, False)):
        library._conv_pool_backward(
            dy, offsets, x, w, *sizes, *how, *window, layout != "scattered", wanted
        )
