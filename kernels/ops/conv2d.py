"""Convolution in its three directions, and the first steps of a gradient: a ReLU's, a bias's.

fprop, dgrad and wgrad are linear in each operand and one another's derivatives; so every derivative
of any order is again one of these operators.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import autotune, device, planner, replay
from ..conv import relu_backward as masking
from ..conv.engine import Call, Dgrad, Fprop, Plan, Wgrad
from ..device import describe
from ..geometry import (
    Conv2dGeometry,
    contiguous_strides,
    conv_output_sizes,
    dense_strides,
    output_strides,
)
from ..lang.epilogue import Epilogue
from ..problem import Problem, layout_of
from . import tensors, vmap
from .dispatch import BATCH, SUM, WHOLE, Operator, Sharding, define
from .tensors import channels_last, resolve_precision

CONV = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, str? precision"
how: Any = attrgetter("stride", "padding", "dilation", "groups", "precision")
"""The numbers that the directions share, from any one's arguments."""


def geometry(x_shape: Sequence[int], w_shape: Sequence[int], a: Any) -> Conv2dGeometry:
    return Conv2dGeometry.of(x_shape, w_shape, a.stride, a.padding, a.dilation, a.groups)


def output(a: Any, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for y, on like's device and by default in its dtype."""
    size = conv_output_sizes(a.x.shape[2:], a.w.shape[2:], a.stride, a.padding, a.dilation)
    last = channels_last(a.x, a.w)
    return tensors.new(like, (a.x.shape[0], a.w.shape[0], *size), last, dtype)


def _launch(
    operator: Operator,
    a: Any,
    call: Call,
    images: tuple[Tensor | None, ...],
    filters: tuple[Tensor, ...],
) -> None:
    """Launch what the planner chooses, what measuring does, or to warm up the whole family."""
    like = next(t for t in call.results if t is not None)
    here, layout = describe(like.device), layout_of(images, filters)
    problem = Problem(call.direction, call.g, like.dtype, call.precision, here, layout)
    if device.is_warming_up():
        plans = planner.family(problem)
    elif autotune.is_enabled():
        plans = [_fastest(operator, a, call, problem)]
    else:
        plans = [planner.plan(problem)]
    for plan in plans:
        plan.engine.launch(call, plan.tile)


def _fastest(operator: Operator, a: Any, call: Call, problem: Problem) -> Plan:
    def run(plan: Plan, *operands: Tensor | None) -> tuple[Tensor, ...]:
        fresh = [
            None if t is None else t.new_empty_strided(t.shape, t.stride()) for t in call.results
        ]
        plan.engine.launch(call.on(operands, fresh), plan.tile)
        return tuple(t for t in fresh if t is not None)

    def reference(*operands: Tensor | None) -> tuple[Tensor, ...]:
        given = dict(zip(a._fields, operands, strict=False))  # tensors come first
        found = operator.reference(*a._replace(**given))
        results = (found,) if isinstance(found, Tensor) else found
        return tuple(t for t, ours in zip(results, call.results, strict=True) if ours is not None)

    fused = (
        call.epilogue.activation is not None if isinstance(call, Fprop) else len(call.results) > 1
    )
    variant = "".join("01"[t is not None] for t in call.operands) + "-fused" * fused
    return autotune.choose(problem, call.operands, run, reference, variant)


# ATen, which measured plans are checked against: results as the operators lay them out.


def _laid_out(value: Tensor, last: bool) -> Tensor:
    strides = output_strides(value.shape, last)
    if value.stride() == strides:
        return value
    return value.new_empty_strided(value.shape, strides).copy_(value)


def _padded(x: Tensor, padding: Sequence[int]) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom))


def _aten_backward(dy: Tensor, x: Tensor, w: Tensor, a: Any, wanted: list[bool]) -> Any:
    return torch.ops.aten.convolution_backward(
        dy, x, w, None, a.stride, [0, 0], a.dilation, False, [0, 0], a.groups, wanted
    )


# y = relu?(conv(x, w) + bias + residual).


def _conv2d(a: Any, y: Tensor) -> None:
    images, w = (y, a.x, a.residual), tensors.packed(a.w, (y, a.x, a.residual))
    epilogue = Epilogue(replay.contiguous(a.bias), a.residual, "relu" if a.relu else None)
    g, precision = geometry(a.x.shape, a.w.shape, a), resolve_precision(a.precision, a.x)
    _launch(conv2d, a, Fprop(a.x, w, y, g, precision, epilogue), images, (w,))


def _conv2d_by_aten(a: Any) -> Tensor:
    y = torch.conv2d(_padded(a.x, a.padding), a.w, a.bias, a.stride, 0, a.dilation, a.groups)
    y = y if a.residual is None else y + a.residual
    return _laid_out(torch.relu(y) if a.relu else y, channels_last(a.x, a.w))


def _conv2d_setup(ctx: Any, inputs: Any, y: Tensor) -> None:
    x, w, _, _, ctx.call = inputs
    need_dx, need_dw, *_ = ctx.needs_input_grad
    mask = y if ctx.call.a.relu else None
    ctx.save_for_backward(x if need_dw else None, w if need_dx else None, mask)


def _conv2d_backward(ctx: Any, dy: Tensor) -> tuple:
    (x, w, y), a = ctx.saved_tensors, ctx.call.a
    need_dx, need_dw, need_db, need_residual, _ = ctx.needs_input_grad
    dx = dw = db = None
    if y is not None:
        dy, db = relu_backward(dy, y, need_db)
    if need_dx:
        last = a.x.channels_last or a.w.channels_last
        dx = conv2d_dgrad(dy, w, None, a.x.shape[2:], *how(a), last)
    unsummed = need_db and y is None
    if need_dw:
        dw, sums = conv2d_wgrad(x, dy, a.w.shape, a.w.strides, *how(a), unsummed)
        db = sums if unsummed else db
    elif unsummed:
        db = channel_sum(dy)
    return dx, dw, db if need_db else None, dy if need_residual else None, None


conv2d = define(
    f"conv2d(Tensor x, Tensor w, Tensor? bias, Tensor? residual, {CONV}, bool relu) -> Tensor",
    results=lambda a: output(a, a.x),
    kernels=_conv2d,
    flops=lambda a: geometry(a.x, a.w, a).flops,
    vmap=vmap.convolution,
    sharding=Sharding((BATCH, WHOLE, WHOLE, BATCH), (BATCH,)),
    reference=_conv2d_by_aten,
    setup_context=_conv2d_setup,
    backward=_conv2d_backward,
)
"""y[N,K,P,Q] = relu?(conv(x[N,C,H,W], w[K,C/groups,R,S]) + bias[K] + residual[N,K,P,Q]).

Under ReLU y is its own mask: no other is kept."""


# dx = the gradient of x, plus bias.


def _x_shape(dy: Sequence[int], w: Sequence[int], a: Any) -> tuple[int, ...]:
    return dy[0], w[1] * a.groups, *a.size


def _dgrad(a: Any, dx: Tensor) -> None:
    w, bias = tensors.packed(a.w, (dx, a.dy)), replay.contiguous(a.bias)
    g, precision = geometry(dx.shape, a.w.shape, a), resolve_precision(a.precision, a.dy)
    _launch(conv2d_dgrad, a, Dgrad(a.dy, w, dx, g, precision, bias), (dx, a.dy), (w,))


def _dgrad_by_aten(a: Any) -> Tensor:
    (top, bottom, left, right), (rows, columns) = a.padding, a.size
    channels = a.w.shape[1] * a.groups
    x = a.dy.new_empty((a.dy.shape[0], channels, rows + top + bottom, columns + left + right))
    padded, _, _ = _aten_backward(a.dy, x, a.w, a, [True, False, False])
    dx = F.pad(padded, (-left, -right, -top, -bottom))  # the last sides may be negative: zeros
    return _laid_out(dx if a.bias is None else dx + a.bias[:, None, None], a.channels_last)


def _dgrad_setup(ctx: Any, inputs: Any, dx: Tensor) -> None:
    dy, w, _, ctx.call = inputs
    need_dy, need_dw, *_ = ctx.needs_input_grad
    ctx.save_for_backward(dy if need_dw else None, w if need_dy else None)


def _dgrad_backward(ctx: Any, ddx: Tensor) -> tuple:
    (dy, w), a = ctx.saved_tensors, ctx.call.a
    need_dy, need_dw, need_db, _ = ctx.needs_input_grad
    ddy = dw = db = None
    if need_dy:
        ddy = conv2d(ddx, w, None, None, *how(a), False)
    if need_dw:
        dw, _ = conv2d_wgrad(ddx, dy, a.w.shape, a.w.strides, *how(a), False)
    if need_db:
        db = channel_sum(ddx)
    return ddy, dw, db, None


conv2d_dgrad = define(
    f"conv2d_dgrad(Tensor dy, Tensor w, Tensor? bias, SymInt[2] size, {CONV}, bool channels_last)"
    " -> Tensor",
    results=lambda a: tensors.new(a.dy, _x_shape(a.dy.shape, a.w.shape, a), a.channels_last),
    kernels=_dgrad,
    flops=lambda a: geometry(_x_shape(a.dy, a.w, a), a.w, a).flops,
    vmap=vmap.convolution,
    sharding=Sharding((BATCH, WHOLE, WHOLE), (BATCH,)),
    reference=_dgrad_by_aten,
    setup_context=_dgrad_setup,
    backward=_dgrad_backward,
)
"""dx[N,C,H,W] of (H, W) = size, the gradient of x plus bias[C]. This is also the transposed
convolution of dy[N,K,P,Q] with w[K,C/groups,R,S]."""


# (dw, db) = the gradients of weight and, if asked for, bias.


def wgrad_output(a: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for dw and db, on like's device and in its dtype."""
    db = tensors.new_vector(like, a.size[0] if a.bias else 0)
    return tensors.new_filters(like, a.size, a.strides), db


def _wgrad(a: Any, dw: Tensor, db: Tensor) -> None:
    g, precision = geometry(a.x.shape, a.size, a), resolve_precision(a.precision, a.x)
    call = Wgrad(a.x, a.dy, dw, db if a.bias else None, g, precision)
    _launch(conv2d_wgrad, a, call, (a.x, a.dy), ())


def _wgrad_by_aten(a: Any) -> tuple[Tensor, Tensor]:
    w = a.x.new_empty(tuple(a.size))
    _, dw, _ = _aten_backward(a.dy, _padded(a.x, a.padding), w, a, [False, True, False])
    result = a.x.new_empty_strided(tuple(a.size), dense_strides(a.size, a.strides)).copy_(dw)
    return result, a.dy.sum((0, 2, 3)) if a.bias else a.x.new_empty(0)


def wgrad_vmap(op: Operator, size: int, dims: Any, a: Any) -> tuple[Any, Any]:
    w_size = (a.size[0] * size, *a.size[1:])
    a = a._replace(size=w_size, strides=contiguous_strides(w_size))
    return vmap.at_once(op, size, dims, a, vmap.CHANNELS, 0, 0 if a.bias else None)


def _wgrad_setup(ctx: Any, inputs: Any, gradients: Any) -> None:
    x, dy, ctx.call = inputs
    need_dx, need_ddy, _ = ctx.needs_input_grad
    ctx.save_for_backward(x if need_ddy else None, dy if need_dx else None)


def _wgrad_backward(ctx: Any, ddw: Tensor, ddb: Tensor) -> tuple:
    (x, dy), a = ctx.saved_tensors, ctx.call.a
    need_dx, need_ddy, _ = ctx.needs_input_grad
    dx = ddy = None
    if need_dx:
        last = a.x.channels_last or channels_last(ddw)
        dx = conv2d_dgrad(dy, ddw, None, a.x.shape[2:], *how(a), last)
    if need_ddy:
        ddy = conv2d(x, ddw, ddb if a.bias else None, None, *how(a), False)
    return dx, ddy, None


conv2d_wgrad = define(
    f"conv2d_wgrad(Tensor x, Tensor dy, SymInt[4] size, SymInt[4] strides, {CONV}, bool bias)"
    " -> (Tensor, Tensor)",
    results=lambda a: wgrad_output(a, a.x),
    kernels=_wgrad,
    flops=lambda a: geometry(a.x, a.size, a).flops,
    vmap=wgrad_vmap,
    sharding=Sharding((BATCH, BATCH), (SUM, SUM)),
    reference=_wgrad_by_aten,
    setup_context=_wgrad_setup,
    backward=_wgrad_backward,
)
"""(dw, db), the gradients of w, with the given size and strides, and if ``bias`` of a bias."""


# db[k] = sum over n, p, q of dy[n, k, p, q].


def _channel_sum(a: Any, db: Tensor) -> None:
    N, K, P, Q = a.dy.shape
    g = Conv2dGeometry(N, K, P, Q, K, 1, 1)
    here, layout = describe(a.dy.device), layout_of((a.dy,), ())
    plan = planner.plan(Problem("wgrad", g, a.dy.dtype, "ieee", here, layout))
    plan.engine.launch(Wgrad(a.dy, a.dy, None, db, g), plan.tile)


def _channel_sum_backward(ctx: Any, ddb: Tensor) -> tuple:
    return ddb[:, None, None].expand(ctx.call.a.dy.shape), None


channel_sum = define(
    "channel_sum(Tensor dy) -> Tensor",
    results=lambda a: tensors.new_vector(a.dy, a.dy.shape[1]),
    kernels=_channel_sum,
    vmap=lambda op, size, dims, a: vmap.at_once(op, size, dims, a, vmap.CHANNELS, 0),
    sharding=Sharding((BATCH,), (SUM,)),
    backward=_channel_sum_backward,
)
"""db[K], the gradient of a bias. It is the sum of dy[N,K,P,Q] over n, p and q."""


# dz = dy where y > 0.


def _relu_output(a: Any) -> tuple[Tensor, Tensor]:
    return tensors.new_like(a.y), tensors.new_vector(a.y, a.y.shape[1] if a.bias else 0)


def _relu_vmap(op: Operator, size: int, dims: Any, a: Any) -> tuple[Any, Any]:
    axis = vmap.CHANNELS if a.bias else vmap.IMAGES
    return vmap.at_once(op, size, dims, a, axis, axis, 0 if a.bias else None)


def _relu_backward_backward(ctx: Any, ddz: Tensor, ddb: Tensor) -> tuple:
    (y,) = ctx.saved_tensors
    if ctx.call.a.bias:
        ddz = ddz + ddb[:, None, None]
    ddy, _ = relu_backward(ddz, y, False)
    return ddy, None, None


relu_backward = define(
    "relu_backward(Tensor dy, Tensor y, bool bias) -> (Tensor, Tensor)",
    results=_relu_output,
    kernels=lambda a, dz, db: masking.relu_backward(a.dy, a.y, dz, db if a.bias else None),
    vmap=_relu_vmap,
    sharding=Sharding((BATCH, BATCH), (BATCH, SUM)),
    saves=("y",),
    backward=_relu_backward_backward,
)
"""(dz, db) of dz = dy where y > 0, else 0, and if ``bias`` of db = the sum of dz over n, p and q.
No gradient flows to y itself."""
