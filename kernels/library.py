"""The operators ``torch.ops.triton_cnn``: allocation, planning and launch, with fake versions.

All take batched N, C, H, W tensors and normalised arguments: pairs are (height, width), padding
is (top, bottom, left, right). A CUDA tensor always runs the kernels; a CPU tensor runs them in
Triton's interpreter (TRITON_INTERPRET=1 at import) and otherwise ATen, through the same operators.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from . import aten, autotune, descriptor_gemm, device, epilogue, max_pool, planner, vmap
from .device import INTERPRET, describe
from .geometry import (
    Conv2dGeometry,
    Direction,
    Pool2dGeometry,
    conv_output_size,
    dense_strides,
    is_channels_last,
    output_strides,
)

_library = torch.library.Library("triton_cnn", "DEF")

_CONV = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, str? precision"
_POOL = "SymInt[2] kernel, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool ceil_mode"


_implementations: dict[str, tuple[Callable, Callable]] = {}  # on a GPU, on the CPU


def _define(schema: str, kernels: Callable, reference: Callable, fake: Callable) -> None:
    name = schema.split("(")[0]
    _library.define(schema)
    _implementations[name] = kernels, kernels if INTERPRET else reference
    _library.impl(name, _implementations[name][0], "CUDA")
    _library.impl(name, _implementations[name][1], "CPU")
    torch.library.register_fake(f"triton_cnn::{name}", fake, lib=_library)


def operator(name: str) -> Callable[..., Any]:
    """``torch.ops.triton_cnn.NAME`` for a Function's forward, where nothing is left to record.

    On plain tensors that no mode, transform or trace watches it calls the implementation, which
    saves the two thirds of a call that the dispatcher takes.
    """
    dispatched = getattr(torch.ops.triton_cnn, name).default
    on_gpu, on_cpu = _implementations[name]

    def call(*args: Any) -> Any:
        if is_watched():
            return dispatched(*args)
        for t in args[:4]:
            kind = type(t)
            if kind is not Tensor and kind is not Parameter and isinstance(t, Tensor):
                return dispatched(*args)
        if args[0].is_cuda:
            return on_gpu(*args)
        return on_cpu(*args) if args[0].is_cpu else dispatched(*args)

    return call


def is_watched() -> bool:
    """Whether a dispatch mode, a functorch transform, forward-mode AD or a trace is active."""
    return (
        forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def _new(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    return like.new_empty_strided(tuple(shape), output_strides(shape, channels_last))


def _channels_last(*tensors: Tensor) -> bool:
    return any(is_channels_last(t.shape, t.stride()) for t in tensors)


class _Call(NamedTuple):
    """What an operator on operands of certain shapes, strides and dtypes comes down to."""

    g: Conv2dGeometry
    layout: planner.Layout
    plan: planner.Plan
    shape: torch.Size  # of the result, unless it is wgrad's
    strides: tuple[int, ...]
    packs: bool  # whether w is laid in rows first


_calls: dict[tuple, _Call] = {}


def _call(
    key: tuple,  # all that the rest follows from
    direction: Direction,
    g: Conv2dGeometry,
    precision: str,
    images: tuple[Tensor | None, ...],  # the result first
    w: Tensor | None = None,
) -> _Call:
    """Plan a call, and keep it: one that comes again costs microseconds.

    Where channels lie side by side in the images but not in w, w is copied so: it is small, and
    gathering it is not.
    """
    if len(_calls) >= 4096:
        _calls.clear()
    first = images[0]
    assert first is not None
    here = describe(first.device)
    rows = all(t is None or t.stride(1) == 1 for t in images)
    packs = w is not None and w.stride(1) != 1 and rows and here.descriptors
    filters = () if w is None else (_in_rows(w) if packs else w,)
    layout = planner.layout_of(images, filters)
    plan = planner.plan(direction, g, first.dtype, precision, here, layout)
    _calls[key] = call = _Call(g, layout, plan, first.shape, first.stride(), packs)
    return call


def _in_rows(w: Tensor) -> Tensor:
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


def _run(
    direction: Direction,
    call: _Call,
    precision: str,
    operands: tuple[Tensor | None, ...],
    results: tuple[Tensor, ...],
    launch: Callable[..., tuple[Tensor, ...]],  # takes a plan, operands and results
    reference: Callable[..., tuple[Tensor, ...]],  # takes operands
    fused: bool = False,
) -> None:
    """Launch the planned plan, the one that measuring chooses, or to warm up the whole family."""
    plans = [call.plan]
    if device.is_warming_up() or autotune.is_enabled():
        here = device.describe(results[0].device)
        problem = (direction, call.g, results[0].dtype, precision, here, call.layout)
        if device.is_warming_up():
            plans = planner.family(*problem)
        else:

            def run(plan: planner.Plan, *operands: Tensor | None) -> tuple[Tensor, ...]:
                fresh = (t.new_empty_strided(t.shape, t.stride()) for t in results)
                return launch(plan, *operands, *fresh)

            variant = "".join("01"[t is not None] for t in operands) + "-fused" * fused
            plans = [autotune.choose(*problem, operands, run, reference, variant)]
    for plan in plans:
        launch(plan, *operands, *results)


# Convolution: three walks over one geometry.


def _conv2d_empty(x, w, bias, residual, stride, padding, dilation, groups, precision, relu):
    sizes = (
        conv_output_size(x.shape[2], w.shape[2], stride[0], tuple(padding[:2]), dilation[0]),
        conv_output_size(x.shape[3], w.shape[3], stride[1], tuple(padding[2:]), dilation[1]),
    )
    return _new(x, (x.shape[0], w.shape[0], *sizes), _channels_last(x, w))


def _conv2d(x, w, bias, residual, stride, padding, dilation, groups, precision, relu):
    arguments = (tuple(stride), tuple(padding), tuple(dilation), groups)
    precision, here = resolve_precision(precision, x), describe(x.device)
    key = ("fprop", here, precision, *arguments, x.dtype, x.shape, x.stride(), w.shape, w.stride())
    key += (x.data_ptr() % 16, w.data_ptr() % 16)
    if residual is not None:
        key += (residual.stride(), residual.data_ptr() % 16)
    call = _calls.get(key)
    if call is None:
        g = Conv2dGeometry.of(x.shape, w.shape, *arguments)
        y = _conv2d_empty(x, w, bias, residual, *arguments, precision, relu)
        call = _call(key, "fprop", g, precision, (y, x, residual), w)
    y = x.new_empty_strided(call.shape, call.strides)
    w, bias = _in_rows(w) if call.packs else w, None if bias is None else bias.contiguous()

    def launch(plan: planner.Plan, x, w, bias, residual, y) -> tuple[Tensor]:
        engine, tile, *_ = plan
        engine.fprop(x, w, bias, residual, y, call.g, tile, relu=relu, precision=precision)
        return (y,)

    def reference(x, w, bias, residual) -> tuple[Tensor]:
        return (aten.conv2d(x, w, bias, residual, *arguments, None, relu),)

    _run("fprop", call, precision, (x, w, bias, residual), (y,), launch, reference, relu)
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
    arguments = (tuple(stride), tuple(padding), tuple(dilation), groups)
    precision, here = resolve_precision(precision, dy), describe(dy.device)
    key = ("dgrad", here, precision, *arguments, dy.dtype, tuple(size), channels_last)
    key += (dy.shape, dy.stride(), w.shape, w.stride(), dy.data_ptr() % 16, w.data_ptr() % 16)
    call = _calls.get(key)
    if call is None:
        dx = _dgrad_empty(dy, w, bias, size, *arguments, precision, channels_last)
        g = Conv2dGeometry.of(dx.shape, w.shape, *arguments)
        call = _call(key, "dgrad", g, precision, (dx, dy), w)
    dx = dy.new_empty_strided(call.shape, call.strides)
    w, bias = _in_rows(w) if call.packs else w, None if bias is None else bias.contiguous()

    def launch(plan: planner.Plan, dy, w, bias, dx) -> tuple[Tensor]:
        engine, tile, *_ = plan
        engine.dgrad(dy, w, bias, dx, call.g, tile, precision=precision)
        return (dx,)

    def reference(dy, w, bias) -> tuple[Tensor]:
        return (aten.conv2d_dgrad(dy, w, bias, size, *arguments, None, channels_last),)

    _run("dgrad", call, precision, (dy, w, bias), (dx,), launch, reference)
    return dx


def _wgrad_empty(
    x, dy, size, strides, stride, padding, dilation, groups, precision, bias
) -> tuple[Tensor, Tensor]:
    dw = x.new_empty_strided(tuple(size), dense_strides(size, strides))
    return dw, x.new_empty(size[0] if bias else 0)


def _wgrad(x, dy, size, strides, stride, padding, dilation, groups, precision, bias):
    dw, db = _wgrad_empty(x, dy, size, strides, stride, padding, dilation, groups, precision, bias)
    arguments = (tuple(stride), tuple(padding), tuple(dilation), groups)
    precision, here = resolve_precision(precision, x), describe(x.device)
    key = ("wgrad", here, precision, *arguments, x.dtype, x.shape, x.stride(), dy.stride())
    key += (tuple(size), x.data_ptr() % 16, dy.data_ptr() % 16)
    call = _calls.get(key)
    if call is None:
        g = Conv2dGeometry.of(x.shape, size, *arguments)
        call = _call(key, "wgrad", g, precision, (x, dy))

    def launch(plan: planner.Plan, x, dy, dw, db) -> tuple[Tensor, ...]:
        engine, tile, *_ = plan
        engine.wgrad(x, dy, dw, db if bias else None, call.g, tile, precision=precision)
        return (dw, db) if bias else (dw,)

    def reference(x, dy) -> tuple[Tensor, ...]:
        results = aten.conv2d_wgrad(x, dy, size, strides, *arguments, None, bias)
        return results if bias else results[:1]

    _run("wgrad", call, precision, (x, dy), (dw, db), launch, reference, bias)
    return dw, db


def _channel_sum_empty(dy: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[1])


def _channel_sum(dy: Tensor) -> Tensor:
    db = _channel_sum_empty(dy)
    K = dy.shape[1]
    g = Conv2dGeometry(*dy.shape, K, 1, 1)
    layout = planner.layout_of((dy,), ())
    engine, tile, *_ = planner.plan("wgrad", g, dy.dtype, "ieee", describe(dy.device), layout)
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
