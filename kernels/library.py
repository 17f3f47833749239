"""The operators ``torch.ops.triton_cnn``: allocation, planning and launch, with fake versions.

All take batched N, C, H, W tensors and normalised arguments: pairs are (height, width), padding
is (top, bottom, left, right). A CUDA tensor always runs the kernels; a CPU tensor runs them in
Triton's interpreter (TRITON_INTERPRET=1 at import) and otherwise ATen, through the same operators.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import aten, descriptor_gemm, epilogue, max_pool, planner, vmap
from .device import INTERPRET, describe
from .geometry import (
    Conv2dGeometry,
    Pool2dGeometry,
    conv_output_size,
    dense_strides,
    is_channels_last,
    output_strides,
)

_library = torch.library.Library("triton_cnn", "DEF")

_CONV = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, str? precision"
_POOL = "SymInt[2] kernel, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool ceil_mode"


def _define(schema: str, kernels: Callable, reference: Callable, fake: Callable) -> None:
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, kernels, "CUDA")
    _library.impl(name, kernels if INTERPRET else reference, "CPU")
    torch.library.register_fake(f"triton_cnn::{name}", fake, lib=_library)


def _new(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    return like.new_empty_strided(tuple(shape), output_strides(shape, channels_last))


def _channels_last(*tensors: Tensor) -> bool:
    return any(is_channels_last(t.shape, t.stride()) for t in tensors)


def _as_rows(w: Tensor, x: Tensor) -> Tensor:
    """w with channels side by side where x has them so: a small copy that saves gathering it."""
    if x.stride(1) != 1 or w.stride(1) == 1 or not describe(x.device).descriptors:
        return w
    return w.contiguous(memory_format=torch.channels_last)


def resolve_precision(precision: str | None, x: Tensor) -> str:
    """How float32 products are made: as asked, else as torch's own convolution is set to.

    AMD's gfx942 has tf32 but no split of it: bf16x6, as accurate, stands for tf32x3 there.
    """
    if x.dtype != torch.float32 or x.device.type == "cpu":
        return "ieee"
    if precision is None:
        setting = torch.backends.cudnn.conv.fp32_precision
        precision = "tf32" if setting == "tf32" else "ieee"
    if torch.version.hip:
        precision = "bf16x6" if precision == "tf32x3" else precision
        known = precision != "tf32" or describe(x.device).arch == "gfx942"
        return precision if known else "ieee"
    return precision


# Convolution: three walks over one geometry.


def _conv2d_empty(x, w, bias, residual, stride, padding, dilation, groups, precision, relu):
    sizes = (
        conv_output_size(x.shape[2], w.shape[2], stride[0], tuple(padding[:2]), dilation[0]),
        conv_output_size(x.shape[3], w.shape[3], stride[1], tuple(padding[2:]), dilation[1]),
    )
    return _new(x, (x.shape[0], w.shape[0], *sizes), _channels_last(x, w))


def _conv2d(x, w, bias, residual, stride, padding, dilation, groups, precision, relu):
    g = Conv2dGeometry.of(x.shape, w.shape, stride, padding, dilation, groups)
    y = _new(x, g.y_shape, _channels_last(x, w))
    precision = resolve_precision(precision, x)
    here, w = describe(x.device), _as_rows(w, x)
    layout = planner.layout_of((x, y, residual), (w,))
    engine, tile, *_ = planner.plan("fprop", g, x.dtype, precision, here, layout)
    bias = None if bias is None else bias.contiguous()
    engine.fprop(x, w, bias, residual, y, g, tile, relu=relu, precision=precision)
    return y


def _conv2d_fp8_empty(x, w, scale, bias, residual, stride, padding, dilation, groups, relu):
    y = _conv2d_empty(x, w, bias, residual, stride, padding, dilation, groups, None, relu)
    return torch.empty_like(y, dtype=torch.bfloat16)


def _conv2d_fp8(x, w, scale, bias, residual, stride, padding, dilation, groups, relu):
    g = Conv2dGeometry.of(x.shape, w.shape, stride, padding, dilation, groups)
    y = _new(x.new_empty(0, dtype=torch.bfloat16), g.y_shape, _channels_last(x, w))
    if 0 in y.shape:
        return y
    layout = planner.layout_of((x, y, residual), (w,))
    plans = planner.candidates("fprop", g, x.dtype, "ieee", describe(x.device), layout)
    if not plans:
        raise NotImplementedError(
            "float8 needs a GPU with tensor descriptors, groups that fill blocks of channels, and "
            f"channels_last operands whose rows are multiples of 16 bytes, got {g} on {x.device}"
        )
    scale = scale.expand(g.K).contiguous()
    bias = None if bias is None else bias.contiguous()
    descriptor_gemm.fprop(
        *(x, w, bias, residual, y, g, plans[0].tile), relu=relu, precision="ieee", scale=scale
    )
    return y


def _dgrad_empty(dy, w, bias, size, stride, padding, dilation, groups, precision, channels_last):
    return _new(dy, (dy.shape[0], w.shape[1] * groups, *size), channels_last)


def _dgrad(dy, w, bias, size, stride, padding, dilation, groups, precision, channels_last):
    dx = _dgrad_empty(
        dy, w, bias, size, stride, padding, dilation, groups, precision, channels_last
    )
    g = Conv2dGeometry.of(dx.shape, w.shape, stride, padding, dilation, groups)
    precision = resolve_precision(precision, dy)
    here, w = describe(dy.device), _as_rows(w, dy)
    layout = planner.layout_of((dy, dx), (w,))
    engine, tile, *_ = planner.plan("dgrad", g, dy.dtype, precision, here, layout)
    bias = None if bias is None else bias.contiguous()
    engine.dgrad(dy, w, bias, dx, g, tile, precision=precision)
    return dx


def _wgrad_empty(
    x, dy, size, strides, stride, padding, dilation, groups, precision, bias
) -> tuple[Tensor, Tensor]:
    dw = x.new_empty_strided(tuple(size), dense_strides(size, strides))
    return dw, x.new_empty(size[0] if bias else 0)


def _wgrad(x, dy, size, strides, stride, padding, dilation, groups, precision, bias):
    dw, db = _wgrad_empty(x, dy, size, strides, stride, padding, dilation, groups, precision, bias)
    g = Conv2dGeometry.of(x.shape, size, stride, padding, dilation, groups)
    precision = resolve_precision(precision, x)
    layout = planner.layout_of((x, dy), ())
    engine, tile, *_ = planner.plan("wgrad", g, x.dtype, precision, describe(x.device), layout)
    engine.wgrad(x, dy, dw, db if bias else None, g, tile, precision=precision)
    return dw, db


def _channel_sum_empty(dy: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[1])


def _channel_sum(dy: Tensor) -> Tensor:
    db = _channel_sum_empty(dy)
    N, K, P, Q = dy.shape
    g = Conv2dGeometry(N, K, P, Q, K, 1, 1)
    here, layout = describe(dy.device), planner.layout_of((dy,), ())
    engine, tile, *_ = planner.plan("wgrad", g, dy.dtype, "ieee", here, layout)
    engine.wgrad(dy, dy, None, db, g, tile, precision="ieee")
    return db


def _relu_backward_empty(dy: Tensor, y: Tensor) -> Tensor:
    return y.new_empty_strided(y.shape, dense_strides(y.shape, y.stride()))


def _relu_backward(dy: Tensor, y: Tensor) -> Tensor:
    dz = _relu_backward_empty(dy, y)
    epilogue.relu_backward(dy, y, dz)
    return dz


_define(
    f"conv2d(Tensor x, Tensor w, Tensor? bias, Tensor? residual, {_CONV}, bool relu) -> Tensor",
    _conv2d,
    aten.conv2d,
    _conv2d_empty,
)
_define(
    f"conv2d_dgrad(Tensor dy, Tensor w, Tensor? bias, SymInt[2] size, {_CONV}, bool channels_last)"
    " -> Tensor",
    _dgrad,
    aten.conv2d_dgrad,
    _dgrad_empty,
)
_define(
    f"conv2d_wgrad(Tensor x, Tensor dy, SymInt[4] size, SymInt[4] strides, {_CONV}, bool bias)"
    " -> (Tensor, Tensor)",
    _wgrad,
    aten.conv2d_wgrad,
    _wgrad_empty,
)
_define(
    "conv2d_fp8(Tensor x, Tensor w, Tensor scale, Tensor? bias, Tensor? residual, SymInt[2] stride,"
    " SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool relu) -> Tensor",
    _conv2d_fp8,
    aten.conv2d_fp8,
    _conv2d_fp8_empty,
)
_define("channel_sum(Tensor dy) -> Tensor", _channel_sum, aten.channel_sum, _channel_sum_empty)
_define(
    "relu_backward(Tensor dy, Tensor y) -> Tensor",
    _relu_backward,
    aten.relu_backward,
    _relu_backward_empty,
)


# Max-pooling: its offsets are the tap that won in each window.


def _pool(x_shape, kernel, stride, padding, dilation, ceil_mode) -> Pool2dGeometry:
    pairs = (tuple(pair) for pair in (kernel, stride, padding, dilation))
    return Pool2dGeometry(*x_shape, *pairs, ceil_mode)  # type: ignore[arg-type]


def _max_pool2d_empty(x, kernel, stride, padding, dilation, ceil_mode, offsets, indices):
    g = _pool(x.shape, kernel, stride, padding, dilation, ceil_mode)
    y = _new(x, g.y_shape, _channels_last(x))
    offset_dtype = max_pool.offset_dtype(g)
    return (
        y,
        torch.empty_like(y, dtype=offset_dtype) if offsets else y.new_empty(0, dtype=offset_dtype),
        torch.empty_like(y, dtype=torch.int64) if indices else y.new_empty(0, dtype=torch.int64),
    )


def _max_pool2d(x, kernel, stride, padding, dilation, ceil_mode, offsets, indices):
    results = _max_pool2d_empty(x, kernel, stride, padding, dilation, ceil_mode, offsets, indices)
    g = _pool(x.shape, kernel, stride, padding, dilation, ceil_mode)
    y, kept, flat = results
    tile = max_pool.choose_tile("forward", g, _channels_last(x), describe(x.device))
    max_pool.max_pool2d(x, g, y, kept if offsets else None, flat if indices else None, tile)
    return results


def _max_pool2d_backward_empty(
    dy, offsets, size, kernel, stride, padding, dilation, ceil_mode, channels_last
):
    return _new(dy, (*dy.shape[:2], *size), channels_last)


def _max_pool2d_backward(
    dy, offsets, size, kernel, stride, padding, dilation, ceil_mode, channels_last
):
    dx = _new(dy, (*dy.shape[:2], *size), channels_last)
    g = _pool(dx.shape, kernel, stride, padding, dilation, ceil_mode)
    tile = max_pool.choose_tile("backward", g, channels_last, describe(dy.device))
    max_pool.max_pool2d_backward(dy, offsets, dx, g, tile)
    return dx


def _max_pool2d_gather_empty(ddx, offsets, kernel, stride, padding, dilation, ceil_mode):
    return torch.empty_like(offsets, dtype=ddx.dtype)


def _max_pool2d_gather(ddx, offsets, kernel, stride, padding, dilation, ceil_mode):
    ddy = torch.empty_like(offsets, dtype=ddx.dtype)
    g = _pool(ddx.shape, kernel, stride, padding, dilation, ceil_mode)
    tile = max_pool.choose_tile("forward", g, _channels_last(ddy), describe(ddx.device))
    max_pool.max_pool2d_gather(ddx, offsets, ddy, g, tile)
    return ddy


def _max_unpool2d_empty(x, indices, size):
    return _new(x, (*x.shape[:2], *size), _channels_last(x))


def _max_unpool2d(x, indices, size):
    y = _max_unpool2d_empty(x, indices, size)
    max_pool.max_unpool2d(x, indices, y)
    return y


def _max_unpool2d_backward_empty(dy, indices):
    return _new(dy, indices.shape, _channels_last(indices))


def _max_unpool2d_backward(dy, indices):
    dx = _max_unpool2d_backward_empty(dy, indices)
    max_pool.max_unpool2d_backward(dy, indices, dx)
    return dx


_define(
    f"max_pool2d(Tensor x, {_POOL}, bool offsets, bool indices) -> (Tensor, Tensor, Tensor)",
    _max_pool2d,
    aten.max_pool2d,
    _max_pool2d_empty,
)
_define(
    f"max_pool2d_backward(Tensor dy, Tensor offsets, SymInt[2] size, {_POOL}, bool channels_last)"
    " -> Tensor",
    _max_pool2d_backward,
    aten.max_pool2d_backward,
    _max_pool2d_backward_empty,
)
_define(
    f"max_pool2d_gather(Tensor ddx, Tensor offsets, {_POOL}) -> Tensor",
    _max_pool2d_gather,
    aten.max_pool2d_gather,
    _max_pool2d_gather_empty,
)
_define(
    "max_unpool2d(Tensor x, Tensor indices, SymInt[2] size) -> Tensor",
    _max_unpool2d,
    aten.max_unpool2d,
    _max_unpool2d_empty,
)
_define(
    "max_unpool2d_backward(Tensor dy, Tensor indices) -> Tensor",
    _max_unpool2d_backward,
    aten.max_unpool2d_backward,
    _max_unpool2d_backward_empty,
)

vmap.register(_library)


# What FlopCounterMode counts: as for torch's own convolutions. It passes shapes for tensors.


def _flops(x, w, stride, padding, dilation, groups) -> int:
    return Conv2dGeometry.of(x, w, stride, padding, dilation, groups).flops


@register_flop_formula(torch.ops.triton_cnn.conv2d)
def _conv2d_flops(x, w, bias, residual, stride, padding, dilation, groups, *_, **__) -> int:
    return _flops(x, w, stride, padding, dilation, groups)


@register_flop_formula(torch.ops.triton_cnn.conv2d_fp8)
def _conv2d_fp8_flops(x, w, scale, bias, residual, stride, padding, dilation, groups, *_, **__):
    return _flops(x, w, stride, padding, dilation, groups)


@register_flop_formula(torch.ops.triton_cnn.conv2d_dgrad)
def _dgrad_flops(dy, w, bias, size, stride, padding, dilation, groups, *_, **__) -> int:
    return _flops((dy[0], w[1] * groups, *size), w, stride, padding, dilation, groups)


@register_flop_formula(torch.ops.triton_cnn.conv2d_wgrad)
def _wgrad_flops(x, dy, size, strides, stride, padding, dilation, groups, *_, **__) -> int:
    return _flops(x, size, stride, padding, dilation, groups)
