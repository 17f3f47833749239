"""Convolution, ReLU and max-pooling as one: the map between them is never stored."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .. import device, planner, replay
from ..conv.engine import Dgrad, PooledConv, Wgrad
from ..device import describe
from ..geometry import (
    Conv2dGeometry,
    Direction,
    Pool2dGeometry,
    contiguous_strides,
    conv_output_sizes,
)
from ..pool import max_pool, pool_gradient
from ..pool.pool_gradient import PoolGradient
from ..problem import Problem, layout_of
from . import tensors, vmap
from .conv2d import CONV, conv2d, conv2d_dgrad, conv2d_wgrad, geometry, how
from .dispatch import BATCH, SUM, WHOLE, Operator, Sharding, define
from .max_pool2d import max_pool2d_backward, max_pool2d_gather
from .tensors import channels_last, resolve_precision

_POOL = "SymInt[2] pool_kernel, SymInt[2] pool_stride, SymInt[2] pool_padding"


def _window(a: Any) -> dict[str, Any]:
    """The pooling's numbers, as the operators of pooling alone name them."""
    window = {"kernel": a.pool_kernel, "stride": a.pool_stride, "padding": a.pool_padding}
    return {**window, "dilation": (1, 1), "ceil_mode": False}


def _geometries(
    x_shape: Sequence[int], w_shape: Sequence[int], a: Any
) -> tuple[Conv2dGeometry, Pool2dGeometry]:
    g = geometry(x_shape, w_shape, a)
    return g, Pool2dGeometry(*g.y_shape, **_window(a))


# y = max_pool(relu(conv(x, w) + bias)).


def _output(a: Any) -> tuple[Tensor, Tensor]:
    _, pool = _geometries(a.x.shape, a.w.shape, a)
    y = tensors.new(a.x, pool.y_shape, channels_last(a.x, a.w))
    return y, tensors.new_like(y, max_pool.argmax_dtype(pool), a.argmax)


def _forward(a: Any, y: Tensor, argmax: Tensor) -> None:
    if 0 in y.shape:
        return
    g, pool = _geometries(a.x.shape, a.w.shape, a)
    precision, here = resolve_precision(a.precision, a.x), describe(a.x.device)
    w, kept = tensors.packed(a.w, (a.x,)), argmax if a.argmax else None
    call = PooledConv(a.x, w, replay.contiguous(a.bias), y, kept, g, pool, precision)
    problem = Problem("fprop", g, a.x.dtype, precision, here, layout_of((a.x, y), (w,)))
    warm = device.is_warming_up()
    plans = planner.pooled_family(problem, pool) if warm else [planner.plan_pooled(problem, pool)]
    for engine, tile in plans:
        engine.launch(call, tile)


def _forward_vmap(op: Operator, size: int, dims: Any, a: Any) -> tuple[Any, Any]:
    axis = vmap.joined(dims)
    return vmap.at_once(op, size, dims, a, axis, axis, axis if a.argmax else None)


def _setup(ctx: Any, inputs: Any, results: Any) -> None:
    x, w, _, ctx.call = inputs
    _, argmax = results
    ctx.mark_non_differentiable(argmax)
    need_dx, need_dw, *_ = ctx.needs_input_grad
    ctx.save_for_backward(argmax, x if need_dw else None, w if need_dx else None)


def _backward(ctx: Any, dy: Tensor, _argmax: None) -> tuple:
    (argmax, x, w), a = ctx.saved_tensors, ctx.call.a
    need_dx, need_dw, need_db, _ = ctx.needs_input_grad
    sizes = a.x.shape[2:], a.w.shape, a.w.strides
    window = a.pool_kernel, a.pool_stride, a.pool_padding
    last = a.x.channels_last or a.w.channels_last
    wanted = need_dx, need_dw, need_db
    dx, dw, db = conv2d_relu_max_pool2d_backward(
        dy, argmax, x, w, *sizes, *how(a), *window, last, wanted
    )
    return dx if need_dx else None, dw if need_dw else None, db if need_db else None, None


conv2d_relu_max_pool2d = define(
    f"conv2d_relu_max_pool2d(Tensor x, Tensor w, Tensor? bias, {CONV}, {_POOL}, bool argmax)"
    " -> (Tensor, Tensor)",
    results=_output,
    kernels=_forward,
    flops=lambda a: geometry(a.x, a.w, a).flops,
    vmap=_forward_vmap,
    sharding=Sharding((BATCH, WHOLE, WHOLE), (BATCH, BATCH)),
    setup_context=_setup,
    backward=_backward,
)
"""(y, argmax) of y[N,K,PP,PQ] = max_pool(relu(conv(x[N,C,H,W], w[K,C/groups,R,S]) + bias[K])). The
argmax, if asked for, holds the ReLU's mask, so that neither y nor the map is kept."""


# Of (dx, dw, db) those that are wanted: from the map's gradient dz, which has each dy where its
# window's maximum lies.


def _x_shape(a: Any, images: int) -> tuple[int, ...]:
    return images, a.w_size[1] * a.groups, *a.size


def _gradients(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for them; what is not wanted has no elements."""
    need_dx, need_dw, need_db = a.wanted
    shape, none = _x_shape(a, a.dy.shape[0]), partial(tensors.new_vector, a.dy, 0)
    dx = tensors.new(a.dy, shape, a.channels_last) if need_dx else none()
    dw = tensors.new_filters(a.dy, a.w_size, a.w_strides) if need_dw else none()
    return dx, dw, tensors.new_vector(a.dy, a.w_size[0]) if need_db else none()


def _launch_backward(a: Any, dx: Tensor, dw: Tensor, db: Tensor) -> None:
    """dz is read from dy and argmax, or if that is dearer written out once."""
    need_dx, need_dw, need_db = a.wanted
    x_shape = _x_shape(a, a.dy.shape[0])
    g, pool = _geometries(x_shape, a.w_size, a)
    here, precision = describe(a.dy.device), resolve_precision(a.precision, a.dy)
    directions: list[Direction] = ["dgrad"] * need_dx + ["wgrad"] * (need_dw or need_db)
    plans = {
        name: planner.plan_pool_gradient(Problem(name, g, a.dy.dtype, precision, here), pool)
        for name in directions
    }
    kept = dw if need_dw else None, db if need_db else None
    if 0 not in a.dy.shape and 0 not in x_shape and all(plans.values()):
        won = PoolGradient(pool, a.argmax)
        if (plan := plans.get("dgrad")) is not None:
            plan.engine.launch(Dgrad(a.dy, a.w, dx, g, precision, pooled=won), plan.tile)
        if (plan := plans.get("wgrad")) is not None:
            x = a.dy if a.x is None else a.x
            plan.engine.launch(Wgrad(x, a.dy, *kept, g, precision, pooled=won), plan.tile)
        return
    dz = tensors.new(a.dy, g.y_shape, a.channels_last)
    pool_gradient.write(a.dy, a.argmax, dz, kept[1], pool)
    if need_dx:
        conv2d_dgrad.kernels(conv2d_dgrad.arguments(a, dy=dz, bias=None), dx)
    if need_dw:
        filters = {"size": a.w_size, "strides": a.w_strides}
        conv2d_wgrad.kernels(conv2d_wgrad.arguments(a, dy=dz, bias=False, **filters), dw, db)


def _backward_vmap(op: Operator, size: int, dims: Any, a: Any) -> tuple[Any, Any]:
    """Each mapped problem is a group of its own."""
    w_size = (a.w_size[0] * size, *a.w_size[1:])
    a = a._replace(w_size=w_size, w_strides=contiguous_strides(w_size))
    axes = vmap.CHANNELS, 0, 0
    axes = (axis if want else None for axis, want in zip(axes, a.wanted, strict=True))
    return vmap.at_once(op, size, dims, a, vmap.CHANNELS, *axes)


def _backward_flops(a: Any) -> int:
    need_dx, need_dw, _ = a.wanted
    return (need_dx + need_dw) * geometry(_x_shape(a, a.dy[0]), a.w_size, a).flops


def _backward_backward(ctx: Any, ddx: Tensor, ddw: Tensor, ddb: Tensor) -> tuple:
    (dy, argmax, x, w), a = ctx.saved_tensors, ctx.call.a
    want_dx, want_dw, want_db = a.wanted
    need_ddy, _, need_x, need_w, _ = ctx.needs_input_grad
    size = conv_output_sizes(a.size, a.w_size[2:], a.stride, a.padding, a.dilation)
    ddy = dx = dw = ddz = None
    if need_ddy:
        if want_db:
            ddz = ddb[:, None, None].expand(*dy.shape[:2], *size)
        if want_dx:
            ddz = conv2d(ddx, w, None, ddz, *how(a), False)
        if want_dw:
            ddz = conv2d(x, ddw, None, ddz, *how(a), False)
        gather = max_pool2d_gather.arguments(a, ddx=ddz, argmax=argmax, **_window(a))
        ddy = max_pool2d_gather(*gather)
    if need_x or need_w:
        pooling = _window(a) | {"size": size, "channels_last": channels_last(dy)}
        pooling = max_pool2d_backward.arguments(a, dy=dy, argmax=argmax, **pooling)
        dz = max_pool2d_backward(*pooling)
        if need_x and want_dw:
            dx = conv2d_dgrad(dz, ddw, None, a.size, *how(a), channels_last(x, ddw))
        if need_w and want_dx:
            dw, _ = conv2d_wgrad(ddx, dz, w.shape, w.stride(), *how(a), False)
    return ddy, None, dx, dw, None


conv2d_relu_max_pool2d_backward = define(
    "conv2d_relu_max_pool2d_backward(Tensor dy, Tensor argmax, Tensor? x, Tensor? w, SymInt[2]"
    f" size, SymInt[4] w_size, SymInt[4] w_strides, {CONV}, {_POOL}, bool channels_last, bool[3]"
    " wanted) -> (Tensor, Tensor, Tensor)",
    results=_gradients,
    kernels=_launch_backward,
    flops=_backward_flops,
    vmap=_backward_vmap,
    sharding=Sharding((BATCH, BATCH, BATCH, WHOLE), (BATCH, SUM, SUM)),
    saves=("dy", "argmax", "x", "w"),
    backward=_backward_backward,
)
"""(dx, dw, db), if wanted, which are dgrad, wgrad and channel sum of the map's gradient."""
