"""Convolution of 8-bit images: of bytes, normalized as they are loaded, and of float8."""

from typing import Any

import torch
from torch import Tensor

from .. import planner, replay
from ..conv.engine import Fprop, Normalization, Wgrad
from ..device import describe
from ..lang.epilogue import Epilogue
from ..problem import Problem, layout_of
from . import vmap
from .conv2d import (
    CONV,
    channel_sum,
    conv2d,
    conv2d_wgrad,
    geometry,
    how,
    output,
    relu_backward,
    wgrad_output,
    wgrad_vmap,
)
from .dispatch import BATCH, SUM, WHOLE, Operator, Sharding, define
from .tensors import resolve_precision

# Bytes: x stands for scale * x + shift, in the dtype of w, and gets no gradient.


def _launch(call: Fprop | Wgrad, like: Tensor) -> None:
    """Launch a call whose x has bytes that count as values of like's dtype."""
    here = describe(like.device)
    problem = Problem(call.direction, call.g, like.dtype, call.precision, here)
    plan = planner.plan_fused("bytes", problem)
    assert plan is not None, call.g  # cnn.functional takes few channels only
    plan.engine.launch(call, plan.tile)


def _normalization(a: Any) -> Normalization:
    return Normalization(replay.contiguous(a.scale), replay.contiguous(a.shift))


def _normalized(dims: Any, a: Any, dtype: torch.dtype) -> tuple[Tensor, int | None]:
    """Images from bytes, and their mapped axis: what bytes have no rule of their own for."""
    x = a.x if dims.x is None else a.x.movedim(dims.x, 0)
    scale, shift = (
        t if dim is None else t.movedim(dim, 0)[:, None]
        for t, dim in ((a.scale, dims.scale), (a.shift, dims.shift))
    )
    mapped = any(dim is not None for dim in (dims.x, dims.scale, dims.shift))
    values = x * scale[..., None, None] + shift[..., None, None]
    return values.to(dtype), 0 if mapped else None


def _bytes(a: Any, y: Tensor) -> None:
    g, precision = geometry(a.x.shape, a.w.shape, a), resolve_precision(a.precision, a.w)
    epilogue = Epilogue(replay.contiguous(a.bias), relu=a.relu)
    _launch(Fprop(a.x, a.w, y, g, precision, epilogue, _normalization(a)), a.w)


def _bytes_vmap(op: Operator, size: int, dims: Any, a: Any) -> tuple[Any, Any]:
    x, axis = _normalized(dims, a, a.w.dtype)
    dims = conv2d.arguments(dims, x=axis, residual=None)
    return vmap.convolution(conv2d, size, dims, conv2d.arguments(a, x=x, residual=None))


def _bytes_setup(ctx: Any, inputs: Any, y: Tensor) -> None:
    x, _, _, scale, shift, ctx.call = inputs
    ctx.save_for_backward(x, scale, shift, y if ctx.call.a.relu else None)


def _bytes_backward(ctx: Any, dy: Tensor) -> tuple:
    (x, scale, shift, y), a = ctx.saved_tensors, ctx.call.a
    _, need_dw, need_db, *_ = ctx.needs_input_grad
    dw = db = None
    if y is not None:
        dy, db = relu_backward(dy, y, need_db)
    unsummed = need_db and y is None
    if need_dw:
        w = a.w.shape, a.w.strides
        dw, sums = conv2d_bytes_wgrad(x, dy, scale, shift, *w, *how(a), unsummed)
        db = sums if unsummed else db
    elif unsummed:
        db = channel_sum(dy)
    return None, dw, db if need_db else None, None, None, None


conv2d_bytes = define(
    f"conv2d_bytes(Tensor x, Tensor w, Tensor? bias, Tensor scale, Tensor shift, {CONV}, bool"
    " relu) -> Tensor",
    results=lambda a: output(a, a.w),
    kernels=_bytes,
    flops=lambda a: geometry(a.x, a.w, a).flops,
    vmap=_bytes_vmap,
    sharding=Sharding((BATCH, WHOLE, WHOLE, WHOLE, WHOLE), (BATCH,)),
    setup_context=_bytes_setup,
    backward=_bytes_backward,
)
"""y = relu?(conv(scale[C] * x + shift[C], w) + bias) of x in bytes."""


def _bytes_wgrad(a: Any, dw: Tensor, db: Tensor) -> None:
    g, precision = geometry(a.x.shape, a.size, a), resolve_precision(a.precision, a.dy)
    call = Wgrad(a.x, a.dy, dw, db if a.bias else None, g, precision, _normalization(a))
    _launch(call, a.dy)


def _bytes_wgrad_vmap(op: Operator, size: int, dims: Any, a: Any) -> tuple[Any, Any]:
    x, axis = _normalized(dims, a, a.dy.dtype)
    dims = conv2d_wgrad.arguments(dims, x=axis)
    return wgrad_vmap(conv2d_wgrad, size, dims, conv2d_wgrad.arguments(a, x=x))


def _bytes_wgrad_backward(ctx: Any, ddw: Tensor, ddb: Tensor) -> tuple:
    (x, scale, shift), a = ctx.saved_tensors, ctx.call.a
    ddy = conv2d_bytes(x, ddw, ddb if a.bias else None, scale, shift, *how(a), False)
    return None, ddy, None, None, None


conv2d_bytes_wgrad = define(
    "conv2d_bytes_wgrad(Tensor x, Tensor dy, Tensor scale, Tensor shift, SymInt[4] size, SymInt[4]"
    f" strides, {CONV}, bool bias) -> (Tensor, Tensor)",
    results=lambda a: wgrad_output(a, a.dy),
    kernels=_bytes_wgrad,
    flops=lambda a: geometry(a.x, a.size, a).flops,
    vmap=_bytes_wgrad_vmap,
    sharding=Sharding((BATCH, BATCH, WHOLE, WHOLE), (SUM, SUM)),
    saves=("x", "scale", "shift"),
    backward=_bytes_wgrad_backward,
)
"""(dw, db) of ``conv2d_bytes``, as ``conv2d_wgrad`` gives them of ``conv2d``."""


# Float8, without a gradient.


def _fp8(a: Any, y: Tensor) -> None:
    if 0 in y.shape:
        return
    g = geometry(a.x.shape, a.w.shape, a)
    here, layout = describe(a.x.device), layout_of((a.x, y, a.residual), (a.w,))
    plan = planner.plan_fused("scale", Problem("fprop", g, a.x.dtype, "ieee", here, layout))
    if plan is None:
        raise NotImplementedError(
            "float8 needs a GPU with tensor descriptors, groups that fill blocks of channels, and "
            "channels_last operands whose rows are multiples of 16 bytes, got input of "
            f"{list(a.x.shape)} and weight of {list(a.w.shape)} with groups={a.groups} on "
            f"{a.x.device}"
        )
    scale = replay.derive(a.scale, lambda scale: scale.expand(g.K).contiguous())
    epilogue = Epilogue(replay.contiguous(a.bias), a.residual, a.relu, scale)
    plan.engine.launch(Fprop(a.x, a.w, y, g, epilogue=epilogue), plan.tile)


conv2d_fp8 = define(
    "conv2d_fp8(Tensor x, Tensor w, Tensor scale, Tensor? bias, Tensor? residual, SymInt[2] stride,"
    " SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool relu) -> Tensor",
    results=lambda a: output(a, a.x, torch.bfloat16),
    kernels=_fp8,
    flops=lambda a: geometry(a.x, a.w, a).flops,
    sharding=Sharding((BATCH, WHOLE, WHOLE, WHOLE, BATCH), (BATCH,)),
)
"""y = relu?(scale * conv(x, w) + bias + residual) in bfloat16, of float8_e4m3fn x and w."""
