"""The operators as differentiable functions: a torch.autograd.Function each, no arithmetic.

The three walks of a convolution are one another's derivatives (fprop, dgrad and wgrad are linear
in each argument), and so are pooling's backward and gather; so every derivative of any order is
again a kernel. All arguments are batched and normalised: see ``library``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import library
from .geometry import Pair, conv_places, is_channels_last

_ops = torch.ops.triton_cnn
_channel_sum = library.operator("channel_sum")
_conv2d = library.operator("conv2d")
_conv2d_dgrad = library.operator("conv2d_dgrad")
_conv2d_fp8 = library.operator("conv2d_fp8")
_conv2d_wgrad = library.operator("conv2d_wgrad")
_conv_pool = library.operator("conv2d_relu_max_pool2d")
_conv_pool_backward = library.operator("conv2d_relu_max_pool2d_backward")
_max_pool2d = library.operator("max_pool2d")
_max_pool2d_backward = library.operator("max_pool2d_backward")
_max_pool2d_gather = library.operator("max_pool2d_gather")
_max_unpool2d = library.operator("max_unpool2d")
_max_unpool2d_backward = library.operator("max_unpool2d_backward")
_relu_backward = library.operator("relu_backward")
Padding = tuple[int, int, int, int]


def _channels_last(*tensors: Tensor) -> bool:
    return any(is_channels_last(t.shape, t.stride()) for t in tensors)


def _apply(function: type[Function], *args: Any) -> Any:
    """``function.apply``, which looks its defaults up by inspection and so takes longer than all
    else in a call: where no transform is active, what it calls in the end; without gradients its
    forward alone.
    """
    if library.is_watched():
        return function.apply(*args)
    if torch.is_grad_enabled():
        return super(Function, function).apply(*args)
    return function.forward(*args)


class ReluBackward(Function):
    """dz = dy where y > 0, through which y itself gets no gradient, and with ``bias`` its channel
    sum db.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, y, bias):
        return _relu_backward(dy, y, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        _, y, ctx.bias = inputs
        ctx.save_for_backward(y)

    @staticmethod
    def backward(ctx: Any, ddz, ddb):
        (y,) = ctx.saved_tensors
        if ctx.bias:
            ddz = ddz + ddb[:, None, None]
        return _apply(ReluBackward, ddz, y, False)[0], None, None


class ChannelSum(Function):
    """db[k] = sum over n, p, q of dy[n, k, p, q]: the gradient of a bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy):
        return _channel_sum(dy)

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, ddb):
        return ddb[:, None, None].expand(ctx.shape)


class _Conv2dCall:
    """What a convolution is given besides tensors, and what of their shapes backward needs."""

    __slots__ = ("bound", "channels_last", "geometry", "relu", "w_size", "w_strides", "x_size")

    def __init__(self, x: Tensor, w: Tensor, geometry: Sequence[Any], relu: bool, bound: Any):
        self.geometry = geometry  # stride, padding, dilation, groups, precision
        self.relu = relu
        self.bound = bound  # what the operator comes down to, or None
        self.x_size, self.w_size, self.w_strides = x.shape[2:], w.shape, w.stride()
        self.channels_last = _channels_last(x, w)


class Conv2d(Function):
    """y = relu?(conv(x, w) + bias + residual). Under ReLU y is its own mask: no other is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, bias, residual, call):
        if call.bound is not None:
            return call.bound(x, w, bias, residual)
        return _conv2d(x, w, bias, residual, *call.geometry, call.relu)

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        x, w, _, _, ctx.call = inputs
        needed = ctx.needs_input_grad
        ctx.save_for_backward(
            x if needed[1] else None, w if needed[0] else None, output if ctx.call.relu else None
        )

    @staticmethod
    def setup_operator(ctx: Any, inputs, output):
        """The same for the operator, whose arguments are plain."""
        x, w, bias, residual, *geometry, relu = inputs
        call = _Conv2dCall(x, w, geometry, relu, None)
        Conv2d.setup_context(ctx, (x, w, bias, residual, call), output)

    @staticmethod
    def backward(ctx: Any, dy):
        (x, w, y), call = ctx.saved_tensors, ctx.call
        need_dx, need_dw, need_db, need_residual, *others = ctx.needs_input_grad
        dx = dw = db = None
        if y is not None:
            dy, db = _apply(ReluBackward, dy, y, need_db)
        if need_dx:
            dx = _apply(Conv2dDgrad, dy, w, None, call.x_size, *call.geometry, call.channels_last)
        unsummed = need_db and y is None
        if need_dw:
            sizes = call.w_size, call.w_strides
            dw, sums = _apply(Conv2dWgrad, x, dy, *sizes, *call.geometry, unsummed)
            db = sums if unsummed else db
        elif unsummed:
            db = _apply(ChannelSum, dy)
        dy = dy if need_residual else None
        return dx, dw, db if need_db else None, dy, *[None] * len(others)


def _plain_conv2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    geometry: Sequence[Any],
    residual: Tensor | None = None,
) -> Tensor:
    return _apply(Conv2d, x, w, bias, residual, _Conv2dCall(x, w, geometry, False, None))


class Conv2dDgrad(Function):
    """dx = the gradient of x, plus bias: also the transposed convolution of dy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, w, bias, size, stride, padding, dilation, groups, precision, channels_last):
        return _conv2d_dgrad(
            dy, w, bias, size, stride, padding, dilation, groups, precision, channels_last
        )

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        dy, w, _, _, *ctx.geometry, _ = inputs
        need_dy, need_dw = ctx.needs_input_grad[:2]
        ctx.save_for_backward(dy if need_dw else None, w if need_dy else None)
        ctx.w_size, ctx.w_strides = w.shape, w.stride()

    @staticmethod
    def backward(ctx: Any, ddx):
        dy, w = ctx.saved_tensors
        need_dy, need_dw, need_db = ctx.needs_input_grad[:3]
        ddy = dw = db = None
        if need_dy:
            ddy = _plain_conv2d(ddx, w, None, ctx.geometry)
        if need_dw:
            dw, _ = _apply(Conv2dWgrad, ddx, dy, ctx.w_size, ctx.w_strides, *ctx.geometry, False)
        if need_db:
            db = _apply(ChannelSum, ddx)
        return ddy, dw, db, *[None] * 7


class Conv2dWgrad(Function):
    """(dw, db) = the gradients of weight and, where asked for, bias: from x and dy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, dy, size, strides, stride, padding, dilation, groups, precision, bias):
        return _conv2d_wgrad(
            x, dy, size, strides, stride, padding, dilation, groups, precision, bias
        )

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        x, dy, _, _, *ctx.geometry, ctx.bias = inputs
        need_dx, need_ddy = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_ddy else None, dy if need_dx else None)
        ctx.size = x.shape[2:]
        ctx.x_channels_last = _channels_last(x)

    @staticmethod
    def backward(ctx: Any, ddw, ddb):
        x, dy = ctx.saved_tensors
        need_dx, need_ddy = ctx.needs_input_grad[:2]
        dx = ddy = None
        if need_dx:
            channels_last = ctx.x_channels_last or _channels_last(ddw)
            dx = _apply(Conv2dDgrad, dy, ddw, None, ctx.size, *ctx.geometry, channels_last)
        if need_ddy:
            ddy = _plain_conv2d(x, ddw, ddb if ctx.bias else None, ctx.geometry)
        return dx, ddy, *[None] * 8


class MaxPool2d(Function):
    """(y, offsets, indices): the winners' taps for backward, flat indices for the caller."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, kernel, stride, padding, dilation, ceil_mode, offsets, indices):
        return _max_pool2d(x, kernel, stride, padding, dilation, ceil_mode, offsets, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        x, *ctx.geometry, _, _ = inputs
        _, offsets, indices = output
        ctx.mark_non_differentiable(offsets, indices)
        ctx.save_for_backward(offsets)
        ctx.size = x.shape[2:]
        ctx.channels_last = _channels_last(x)

    @staticmethod
    def backward(ctx: Any, dy, _offsets, _indices):
        (offsets,) = ctx.saved_tensors
        dx = _apply(MaxPool2dBackward, dy, offsets, ctx.size, *ctx.geometry, ctx.channels_last)
        return dx, *[None] * 7


class MaxPool2dBackward(Function):
    """dx = each pixel's share: the sum of dy over the windows it won."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, offsets, size, kernel, stride, padding, dilation, ceil_mode, channels_last):
        return _max_pool2d_backward(
            dy, offsets, size, kernel, stride, padding, dilation, ceil_mode, channels_last
        )

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        _, offsets, _, *ctx.geometry, _ = inputs
        ctx.save_for_backward(offsets)

    @staticmethod
    def backward(ctx: Any, ddx):
        return _apply(MaxPool2dGather, ddx, *ctx.saved_tensors, *ctx.geometry), *[None] * 8


class MaxPool2dGather(Function):
    """ddy = the value of ddx at each window's winner."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ddx, offsets, kernel, stride, padding, dilation, ceil_mode):
        return _max_pool2d_gather(ddx, offsets, kernel, stride, padding, dilation, ceil_mode)

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        ddx, offsets, *ctx.geometry = inputs
        ctx.save_for_backward(offsets)
        ctx.size = ddx.shape[2:]
        ctx.channels_last = _channels_last(ddx)

    @staticmethod
    def backward(ctx: Any, ddy):
        (offsets,) = ctx.saved_tensors
        ddx = _apply(MaxPool2dBackward, ddy, offsets, ctx.size, *ctx.geometry, ctx.channels_last)
        return ddx, *[None] * 6


class Conv2dReluMaxPool2d(Function):
    """(y, offsets) of y = max_pool(relu(conv(x, w) + bias)). The offsets hold the ReLU's mask, so
    neither y nor the map is kept.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, bias, *arguments):
        return _conv_pool(x, w, bias, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        x, w, _, *ctx.geometry, _ = inputs  # eight: the convolution's five, the pooling's three
        _, offsets = output
        ctx.mark_non_differentiable(offsets)
        need_dx, need_dw = ctx.needs_input_grad[:2]
        ctx.save_for_backward(offsets, x if need_dw else None, w if need_dx else None)
        ctx.size, ctx.w_size, ctx.w_strides = x.shape[2:], w.shape, w.stride()
        ctx.channels_last = _channels_last(x, w)

    @staticmethod
    def backward(ctx: Any, dy, _offsets):
        offsets, x, w = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        sizes = ctx.size, ctx.w_size, ctx.w_strides
        arguments = *sizes, *ctx.geometry, ctx.channels_last, wanted
        grads = _apply(Conv2dReluMaxPool2dBackward, dy, offsets, x, w, *arguments)
        grads = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return *grads, *[None] * 9


class Conv2dReluMaxPool2dBackward(Function):
    """(dx, dw, db), those that are wanted: dgrad, wgrad and channel sum of the map's gradient dz,
    which has each dy where its window's winner lies.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, offsets, x, w, *arguments):
        return _conv_pool_backward(dy, offsets, x, w, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        dy, offsets, x, w, ctx.size, ctx.w_size, ctx.w_strides, *rest = inputs
        *ctx.conv, kernel, stride, padding, _, ctx.wanted = rest
        ctx.window = kernel, stride, padding, (1, 1), False
        ctx.save_for_backward(dy, offsets, x, w)

    @staticmethod
    def backward(ctx: Any, ddx, ddw, ddb):
        dy, offsets, x, w = ctx.saved_tensors
        (want_dx, want_dw, want_db), rest = ctx.wanted, len(ctx.needs_input_grad) - 4
        need_ddy, _, need_x, need_w = ctx.needs_input_grad[:4]
        places = conv_places(ctx.size, ctx.w_size[2:], *ctx.conv[:3])
        ddy = dx = dw = ddz = None
        if need_ddy:
            if want_db:
                ddz = ddb[:, None, None].expand(*dy.shape[:2], *places)
            if want_dx:
                ddz = _plain_conv2d(ddx, w, None, ctx.conv, ddz)
            if want_dw:
                ddz = _plain_conv2d(x, ddw, None, ctx.conv, ddz)
            ddy = _apply(MaxPool2dGather, ddz, offsets, *ctx.window)
        if need_x or need_w:
            last = _channels_last(dy)
            dz = _apply(MaxPool2dBackward, dy, offsets, places, *ctx.window, last)
            if need_x and want_dw:
                last = _channels_last(x, ddw)
                dx = _apply(Conv2dDgrad, dz, ddw, None, ctx.size, *ctx.conv, last)
            if need_w and want_dx:
                dw, _ = _apply(Conv2dWgrad, ddx, dz, w.shape, w.stride(), *ctx.conv, False)
        return ddy, None, dx, dw, *[None] * rest


class MaxUnpool2d(Function):
    """y[indices] = x, zero elsewhere; of equal indices the last in row-major order wins."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, indices, size):
        return _max_unpool2d(x, indices, size)

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        _, indices, ctx.size = inputs
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, dy):
        return _apply(MaxUnpool2dBackward, dy, *ctx.saved_tensors), None, None


class MaxUnpool2dBackward(Function):
    """dx = dy[indices]; of equal indices each gets it, as in torch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, indices):
        return _max_unpool2d_backward(dy, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        dy, indices = inputs
        ctx.save_for_backward(indices)
        ctx.size = dy.shape[2:]

    @staticmethod
    def backward(ctx: Any, ddx):
        return _apply(MaxUnpool2d, ddx, *ctx.saved_tensors, ctx.size), None


for _name, _function in {
    "relu_backward": ReluBackward,
    "channel_sum": ChannelSum,
    "conv2d": Conv2d,
    "conv2d_dgrad": Conv2dDgrad,
    "conv2d_wgrad": Conv2dWgrad,
    "conv2d_relu_max_pool2d": Conv2dReluMaxPool2d,
    "conv2d_relu_max_pool2d_backward": Conv2dReluMaxPool2dBackward,
    "max_pool2d": MaxPool2d,
    "max_pool2d_backward": MaxPool2dBackward,
    "max_pool2d_gather": MaxPool2dGather,
    "max_unpool2d": MaxUnpool2d,
    "max_unpool2d_backward": MaxUnpool2dBackward,
}.items():
    # The operators are differentiable by themselves too; the Functions cost less to call.
    _setup = getattr(_function, "setup_operator", _function.setup_context)
    torch.library.register_autograd(
        f"triton_cnn::{_name}", _function.backward, setup_context=_setup
    )


def _call(function: type[Function], operator: Any, *args: Any) -> Any:
    """The Function eagerly; its operator when compiled, as Dynamo takes no Function that is given
    one tensor twice (an input that is its own residual, say).
    """
    return operator(*args) if torch.compiler.is_compiling() else _apply(function, *args)


def conv2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    relu: bool,
    precision: str | None,
) -> Tensor:
    """y[N,K,P,Q] = relu?(conv(x[N,C,H,W], w[K,C/groups,R,S]) + bias[K] + residual[N,K,P,Q])."""
    geometry = stride, padding, dilation, groups, precision
    if torch.compiler.is_compiling():
        return _ops.conv2d(x, w, bias, residual, *geometry, relu)
    return _apply(Conv2d, x, w, bias, residual, _Conv2dCall(x, w, geometry, relu, None))


def bind_conv2d(
    x: Tensor,
    w: Tensor,
    residual: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    relu: bool,
    precision: str | None,
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]:
    """``conv2d`` of (x, w, bias, residual) on kernels, for operands that differ from these in their
    elements alone, where nothing watches: it does what depends on the others once.
    """
    geometry = stride, padding, dilation, groups, precision
    bound = library.bind_conv2d(x, w, residual, *geometry, relu)
    known = _Conv2dCall(x, w, geometry, relu, bound)
    record = super(Function, Conv2d).apply

    def call(x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        if torch.is_grad_enabled():
            return record(x, w, bias, residual, known)
        return bound(x, w, bias, residual)

    return call


def conv2d_fp8(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    relu: bool,
) -> Tensor:
    """y = relu?(scale * conv(x, w) + bias + residual) in bfloat16, of float8_e4m3fn x and w."""
    return _conv2d_fp8(x, w, scale, bias, residual, stride, padding, dilation, groups, relu)


def conv_transpose2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    precision: str | None,
) -> Tensor:
    """[N,C,H,W] of (H, W) = size: dgrad of x[N,K,P,Q] with w[K,C/groups,R,S], plus bias[C]."""
    channels_last = _channels_last(x, w)
    return _call(
        Conv2dDgrad,
        _ops.conv2d_dgrad,
        *(x, w, bias, size, stride, padding, dilation, groups, precision, channels_last),
    )


def max_pool2d(
    x: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    indices: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """y[N,C,P,Q], with indices also the int64 positions of the maxima, flat over H * W."""
    offsets = torch.is_grad_enabled()
    y, _, flat = _call(
        MaxPool2d,
        _ops.max_pool2d,
        *(x, kernel, stride, padding, dilation, ceil_mode, offsets, indices),
    )
    return (y, flat) if indices else y


def conv2d_relu_max_pool2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    precision: str | None,
    pool_kernel: Pair,
    pool_stride: Pair,
    pool_padding: Pair,
) -> Tensor:
    """y[N,K,PP,PQ] = max_pool(relu(conv(x[N,C,H,W], w[K,C/groups,R,S]) + bias[K]))."""
    offsets = torch.is_grad_enabled()
    y, _ = _call(
        Conv2dReluMaxPool2d,
        _ops.conv2d_relu_max_pool2d,
        *(x, w, bias, stride, padding, dilation, groups, precision),
        *(pool_kernel, pool_stride, pool_padding, offsets),
    )
    return y


def max_unpool2d(x: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:
    """[N,C,H,W] of (H, W) = size with x[N,C,P,Q] at its indices, flat over H * W, and zeros."""
    return _call(MaxUnpool2d, _ops.max_unpool2d, x, indices, size)
