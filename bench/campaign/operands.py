"""The operands of a check: random, but the same each time."""

from collections.abc import Callable
from math import prod, sqrt
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from kernels.geometry import Conv2dGeometry, Pool2dGeometry
from kernels.pool import max_pool

from .. import suites
from ..measure import DTYPES
from . import references
from .items import Check


class Call(NamedTuple):
    """An operator's arguments; ``tensors`` are the first in its schema."""

    tensors: tuple[Tensor | None, ...]
    numbers: tuple[Any, ...]


class Source:
    """Makes a check's operands; on the meta device without numbers."""

    def __init__(self, check: Check, where: torch.device):
        self.check, self.where = check, where
        self.dtype = DTYPES[check.dtype]
        torch.manual_seed(crc32(check.layer.encode()))

    def images(self, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        """Four axes in the check's layout."""
        return self.laid_out(torch.randn(shape, device=self.where) * scale).to(self.dtype.torch)

    def filters(self, g: Conv2dGeometry) -> Tensor:
        return self.images(g.w_shape, 1 / sqrt(prod(g.w_shape[1:])))

    def vector(self, part: str, size: int) -> Tensor | None:
        """A bias, if the check has one."""
        if part not in self.check.parts:
            return None
        return torch.randn(size, device=self.where).to(self.dtype.torch)

    def laid_out(self, t: Tensor) -> Tensor:
        last = self.check.channels_last
        return t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def derived(self, like: Tensor, dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
        """An operand that follows from others, such as an argmax."""
        if self.where.type == "meta":
            return torch.empty_like(like, dtype=dtype)
        with self.where:
            return self.laid_out(make())


def call_of(check: Check, where: torch.device) -> Call:
    """The operator's arguments on a device; equal checks get equal numbers."""
    source = Source(check, where)
    g = check.geometry
    if isinstance(g, suites.Block):
        return _block_call(check, source, g)
    if isinstance(g, Pool2dGeometry):
        return _pool_call(check, source, g)
    return _convolution_call(check, source, g)


def _convolution_call(check: Check, source: Source, g: Conv2dGeometry) -> Call:
    x, w, dy = source.images(g.x_shape), source.filters(g), source.images(g.y_shape)
    numbers = *_geometry(g), source.dtype.precision
    bias = source.vector("bias", g.C if check.operator == "conv2d_dgrad" else g.K)
    relu = "relu" in check.parts
    residual = dy if "residual" in check.parts else None
    has_bias = bias is not None
    filters = w.shape, w.stride()
    if check.operator in ("conv2d_bytes", "conv2d_bytes_wgrad"):
        bytes_ = source.laid_out((x.float() * 64 + 128).clamp(0, 255).to(torch.uint8))
        scale = torch.full((g.C,), 1 / 64, device=source.where)
        normalized = scale, torch.full((g.C,), -2.0, device=source.where)
        if check.operator == "conv2d_bytes":
            return Call((bytes_, w, bias, *normalized), (*numbers, relu))
        return Call((bytes_, dy, *normalized), (*filters, *numbers, has_bias))
    if check.operator == "conv2d_fp8":
        x, w = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        scale = torch.full((1,), 0.5, device=source.where)
        return Call((x, w, scale, bias, residual), (*_geometry(g), relu))
    last = check.channels_last
    return {
        "conv2d": Call((x, w, bias, residual), (*numbers, relu)),
        "conv2d_dgrad": Call((dy, w, bias), ((g.H, g.W), *numbers, last)),
        "conv2d_wgrad": Call((x, dy), (*filters, *numbers, has_bias)),
        "relu_backward": Call((dy, source.images(g.y_shape)), (True,)),
        "channel_sum": Call((dy,), ()),
    }[check.operator]


def _geometry(g: Conv2dGeometry) -> tuple[Any, ...]:
    (top, bottom), (left, right) = g.padding
    return g.stride, (top, bottom, left, right), g.dilation, g.groups


def _pool_call(check: Check, source: Source, g: Pool2dGeometry) -> Call:
    x, dy = source.images(g.x_shape), source.images(g.y_shape)
    window = g.kernel, g.stride, g.padding, g.dilation, g.ceil_mode
    argmax = source.derived(
        dy,
        max_pool.argmax_dtype(g),
        lambda: references.max_pool2d(x.float(), *window, True, False)[1],
    )
    if check.operator.startswith("max_unpool2d"):
        indices = source.derived(
            dy, torch.int64, lambda: references.max_pool2d(x.float(), *window, False, True)[2]
        )
        if check.operator == "max_unpool2d":
            return Call((dy, indices), ((g.H, g.W),))
        return Call((x, indices), ())
    return {
        "max_pool2d": Call((x,), (*window, True, True)),
        "max_pool2d_backward": Call((dy, argmax), ((g.H, g.W), *window, check.channels_last)),
        "max_pool2d_gather": Call((x, argmax), window),
    }[check.operator]


def _block_call(check: Check, source: Source, block: suites.Block) -> Call:
    g, pool = block
    x, w, dy = source.images(g.x_shape), source.filters(g), source.images(pool.y_shape)
    bias = torch.randn(g.K, device=source.where).to(x.dtype)
    numbers = *_geometry(g), source.dtype.precision, pool.kernel, pool.stride, pool.padding
    if check.operator == "conv2d_relu_max_pool2d":
        return Call((x, w, bias), (*numbers, True))
    argmax = source.derived(
        dy,
        max_pool.argmax_dtype(pool),
        lambda: references.conv2d_relu_max_pool2d(
            x.float(), w.float(), bias.float(), *numbers, True
        )[1],
    )
    wanted = g.C > 4, True, True  # an image needs no gradient
    sizes = (g.H, g.W), w.shape, w.stride()
    return Call((dy, argmax, x, w), (*sizes, *numbers, check.channels_last, wanted))
