"""Max-pooling and its inverse. Pooling's backward and gather are one another's derivatives.

``argmax`` is the tap that won in each window.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..device import describe
from ..geometry import Pool2dGeometry
from ..pool import max_pool, max_unpool
from . import tensors, vmap
from .dispatch import BATCH, Operator, Sharding, define
from .tensors import channels_last

_WINDOW = (
    "SymInt[2] kernel, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool ceil_mode"
)
window: Any = attrgetter("kernel", "stride", "padding", "dilation", "ceil_mode")
"""The numbers that pooling, its backward and its gather share, from any one's arguments."""


def _geometry(x_shape: Sequence[int], a: Any) -> Pool2dGeometry:
    N, C, H, W = x_shape
    return Pool2dGeometry(N, C, H, W, *window(a))


# The maximum of each window.


def _pooled(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    g = _geometry(a.x.shape, a)
    y = tensors.new(a.x, g.y_shape, channels_last(a.x))
    argmax = tensors.new_like(y, max_pool.argmax_dtype(g), a.argmax)
    return y, argmax, tensors.new_like(y, torch.int64, a.indices)


def _max_pool2d(a: Any, y: Tensor, argmax: Tensor, indices: Tensor) -> None:
    g = _geometry(a.x.shape, a)
    tile = max_pool.choose_tile("forward", g, channels_last(a.x), describe(a.x.device))
    kept = argmax if a.argmax else None, indices if a.indices else None
    max_pool.max_pool2d(a.x, g, y, *kept, tile)


def _max_pool2d_vmap(op: Operator, size: int, dims: Any, a: Any) -> tuple[Any, Any]:
    axes = 0, 0 if a.argmax else None, 0 if a.indices else None
    return vmap.at_once(op, size, dims, a, vmap.IMAGES, *axes)


def _max_pool2d_setup(ctx: Any, inputs: Any, results: Any) -> None:
    _, ctx.call = inputs
    _, argmax, indices = results
    ctx.mark_non_differentiable(argmax, indices)
    ctx.save_for_backward(argmax)


def _max_pool2d_backward(ctx: Any, dy: Tensor, _argmax: None, _indices: None) -> tuple:
    (argmax,), a = ctx.saved_tensors, ctx.call.a
    size, last = a.x.shape[2:], a.x.channels_last
    return max_pool2d_backward(dy, argmax, size, *window(a), last), None


max_pool2d = define(
    f"max_pool2d(Tensor x, {_WINDOW}, bool argmax, bool indices) -> (Tensor, Tensor, Tensor)",
    results=_pooled,
    kernels=_max_pool2d,
    vmap=_max_pool2d_vmap,
    sharding=Sharding((BATCH,), (BATCH, BATCH, BATCH)),
    setup_context=_max_pool2d_setup,
    backward=_max_pool2d_backward,
)
"""(y, argmax, indices), which are the maxima, the taps that backward takes, and int64 indices, flat
over H * W. The last two are empty unless asked for."""


# Its gradient: what each pixel has won.


def _scatter(a: Any, dx: Tensor) -> None:
    g = _geometry(dx.shape, a)
    tile = max_pool.choose_tile("backward", g, a.channels_last, describe(a.dy.device))
    max_pool.max_pool2d_backward(a.dy, a.argmax, dx, g, tile)


def _scatter_backward(ctx: Any, ddx: Tensor) -> tuple:
    return max_pool2d_gather(ddx, *ctx.saved_tensors, *window(ctx.call.a)), None, None


max_pool2d_backward = define(
    f"max_pool2d_backward(Tensor dy, Tensor argmax, SymInt[2] size, {_WINDOW}, bool channels_last)"
    " -> Tensor",
    results=lambda a: tensors.new(a.dy, (*a.dy.shape[:2], *a.size), a.channels_last),
    kernels=_scatter,
    vmap=vmap.over_batch,
    sharding=Sharding((BATCH, BATCH), (BATCH,)),
    saves=("argmax",),
    backward=_scatter_backward,
)
"""dx[N,C,H,W] of (H, W) = size, in each pixel the sum of dy over the windows that it won."""


def _gather(a: Any, ddy: Tensor) -> None:
    g = _geometry(a.ddx.shape, a)
    tile = max_pool.choose_tile("forward", g, channels_last(ddy), describe(a.ddx.device))
    max_pool.max_pool2d_gather(a.ddx, a.argmax, ddy, g, tile)


def _gather_backward(ctx: Any, ddy: Tensor) -> tuple:
    (argmax,), a = ctx.saved_tensors, ctx.call.a
    size, last = a.ddx.shape[2:], a.ddx.channels_last
    return max_pool2d_backward(ddy, argmax, size, *window(a), last), None, None


max_pool2d_gather = define(
    f"max_pool2d_gather(Tensor ddx, Tensor argmax, {_WINDOW}) -> Tensor",
    results=lambda a: tensors.new_like(a.argmax, a.ddx.dtype),
    kernels=_gather,
    vmap=vmap.over_batch,
    sharding=Sharding((BATCH, BATCH), (BATCH,)),
    saves=("argmax",),
    backward=_gather_backward,
)
"""ddy[N,C,P,Q], the value of ddx at the pixel that won each window."""


# The inverse, by indices.


def _max_unpool2d_backward(ctx: Any, dy: Tensor) -> tuple:
    return max_unpool2d_backward(dy, *ctx.saved_tensors), None, None


max_unpool2d = define(
    "max_unpool2d(Tensor x, Tensor indices, SymInt[2] size) -> Tensor",
    results=lambda a: tensors.new(a.x, (*a.x.shape[:2], *a.size), channels_last(a.x)),
    kernels=lambda a, y: max_unpool.max_unpool2d(a.x, a.indices, y),
    vmap=vmap.over_batch,
    sharding=Sharding((BATCH, BATCH), (BATCH,)),
    saves=("indices",),
    backward=_max_unpool2d_backward,
)
"""y[N,C,H,W] of (H, W) = size, with y[indices] = x, flat over H * W, and zero elsewhere. Of equal
indices the last in row-major order wins."""


def _pick_backward(ctx: Any, ddx: Tensor) -> tuple:
    return max_unpool2d(ddx, *ctx.saved_tensors, ctx.call.a.dy.shape[2:]), None, None


max_unpool2d_backward = define(
    "max_unpool2d_backward(Tensor dy, Tensor indices) -> Tensor",
    results=lambda a: tensors.new(a.dy, a.indices.shape, channels_last(a.indices)),
    kernels=lambda a, dx: max_unpool.max_unpool2d_backward(a.dy, a.indices, dx),
    vmap=vmap.over_batch,
    sharding=Sharding((BATCH, BATCH), (BATCH,)),
    saves=("indices",),
    backward=_pick_backward,
)
"""dx = dy[indices]; of equal indices each gets it, as in torch."""
