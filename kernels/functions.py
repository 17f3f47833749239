"""The operators as differentiable functions: a torch.autograd.Function each, no arithmetic.

The three directions of a convolution are one another's derivatives (fprop, dgrad and wgrad are
linear in each argument), and so are pooling's backward and gather; so every derivative of any order
is again a kernel. All arguments are batched and normalized: see ``library``.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from . import library
from ._private import (
    SingleLevelFunction,
    below_autograd,
    enable_single_level_autograd_function,
    record_as_now,
)
from .geometry import Pair, conv_output_sizes, is_channels_last

_ops = torch.ops.triton_cnn
Padding = tuple[int, int, int, int]


def channels_last(*tensors: Tensor) -> bool:
    return any(is_channels_last(t.shape, t.stride()) for t in tensors)


class _Numbers:
    """A Function's arguments other than tensors, as one object, because each argument of ``apply``
    costs time: the callable that computes the result, the tensors' shapes and strides, and the
    operator's own arguments.
    """

    __slots__ = ("make", "numbers", "shapes", "strides")

    def __init__(
        self,
        make: Callable[..., Any],
        tensors: Sequence[Tensor | None],
        numbers: tuple,
    ):
        self.make, self.numbers = make, numbers
        self.shapes: list[Any] = [None if t is None else t.shape for t in tensors]
        self.strides: list[Any] = [None if t is None else t.stride() for t in tensors]

    def channels_last(self, *which: int) -> bool:
        return any(is_channels_last(self.shapes[i], self.strides[i]) for i in which)


class Operator(SingleLevelFunction):
    """An operator of ``library``, applied to its tensors and its ``_Numbers``."""

    apply: Callable[..., Any]
    name: str  # the operator's
    dispatched: Callable[..., Any]  # through PyTorch's dispatcher
    direct: Callable[..., Any]  # past it

    @staticmethod
    def forward(*args):
        return args[-1].make(*args[:-1])


def _apply(function: type[Operator], *tensors: Tensor | None, numbers: tuple) -> Any:
    """The operator, past the dispatcher if nothing is left for it to do: it takes two thirds of a
    call.
    """
    if not library.is_plain(tensors):
        library.meet_subclasses()
        return function.dispatched(*tensors, *numbers)
    if torch.is_grad_enabled():
        direct = function.direct
        call = _Numbers(lambda *tensors: direct(*tensors, *numbers), tensors, numbers)
        return function.apply(*tensors, call)
    return function.direct(*tensors, *numbers)


class ReluBackward(Operator):
    """dz = dy where y > 0, through which y itself gets no gradient, and with ``bias`` its channel
    sum db. Numbers: bias.
    """

    name = "relu_backward"

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        _, y, ctx.call = inputs
        ctx.save_for_backward(y)

    @staticmethod
    def backward(ctx: Any, ddz, ddb):
        (y,), (bias,) = ctx.saved_tensors, ctx.call.numbers
        if bias:
            ddz = ddz + ddb[:, None, None]
        return _apply(ReluBackward, ddz, y, numbers=(False,))[0], None, None


class ChannelSum(Operator):
    """db[k] = sum over n, p, q of dy[n, k, p, q]: the gradient of a bias."""

    name = "channel_sum"

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, ddb):
        return ddb[:, None, None].expand(ctx.shape), *[None] * (len(ctx.needs_input_grad) - 1)


class Conv2d(Operator):
    """y = relu?(conv(x, w) + bias + residual). Under ReLU y is its own mask: no other is kept.

    Numbers: stride, padding, dilation, groups, precision, relu.
    """

    name = "conv2d"

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        x, w, _, _, ctx.call = inputs
        need_dx, need_dw = ctx.needs_input_grad[:2]
        relu = ctx.call.numbers[-1]
        ctx.save_for_backward(
            x if need_dw else None, w if need_dx else None, output if relu else None
        )

    @staticmethod
    def backward(ctx: Any, dy):
        (x, w, y), call = ctx.saved_tensors, ctx.call
        need_dx, need_dw, need_db, need_residual, *others = ctx.needs_input_grad
        geometry = call.numbers[:-1]
        dx = dw = db = None
        if y is not None:
            dy, db = _apply(ReluBackward, dy, y, numbers=(need_db,))
        if need_dx:
            numbers = call.shapes[0][2:], *geometry, call.channels_last(0, 1)
            dx = _apply(Conv2dDgrad, dy, w, None, numbers=numbers)
        unsummed = need_db and y is None
        if need_dw:
            numbers = call.shapes[1], call.strides[1], *geometry, unsummed
            dw, sums = _apply(Conv2dWgrad, x, dy, numbers=numbers)
            db = sums if unsummed else db
        elif unsummed:
            db = _apply(ChannelSum, dy, numbers=())
        dy = dy if need_residual else None
        return dx, dw, db if need_db else None, dy, *[None] * len(others)


class Conv2dBytes(Operator):
    """y = relu?(conv(scale * x + shift, w) + bias) of x in bytes, which gets no gradient.

    Numbers: stride, padding, dilation, groups, precision, relu.
    """

    name = "conv2d_bytes"

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        x, _, _, scale, shift, ctx.call = inputs
        relu = ctx.call.numbers[-1]
        ctx.save_for_backward(x, scale, shift, output if relu else None)

    @staticmethod
    def backward(ctx: Any, dy):
        (x, scale, shift, y), call = ctx.saved_tensors, ctx.call
        _, need_dw, need_db, *others = ctx.needs_input_grad
        dw = db = None
        if y is not None:
            dy, db = _apply(ReluBackward, dy, y, numbers=(need_db,))
        unsummed = need_db and y is None
        if need_dw:
            numbers = call.shapes[1], call.strides[1], *call.numbers[:-1], unsummed
            dw, sums = _apply(Conv2dBytesWgrad, x, dy, scale, shift, numbers=numbers)
            db = sums if unsummed else db
        elif unsummed:
            db = _apply(ChannelSum, dy, numbers=())
        return None, dw, db if need_db else None, *[None] * len(others)


class Conv2dBytesWgrad(Operator):
    """(dw, db) of ``Conv2dBytes``. Numbers: as of ``Conv2dWgrad``."""

    name = "conv2d_bytes_wgrad"

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        x, _, scale, shift, ctx.call = inputs
        ctx.save_for_backward(x, scale, shift)

    @staticmethod
    def backward(ctx: Any, ddw, ddb):
        x, scale, shift = ctx.saved_tensors
        _, _, *geometry, bias = ctx.call.numbers
        tensors = x, ddw, ddb if bias else None, scale, shift
        ddy = _apply(Conv2dBytes, *tensors, numbers=(*geometry, False))
        return None, ddy, *[None] * (len(ctx.needs_input_grad) - 2)


def _plain_conv2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    geometry: tuple,
    residual: Tensor | None = None,
) -> Tensor:
    return _apply(Conv2d, x, w, bias, residual, numbers=(*geometry, False))


class Conv2dDgrad(Operator):
    """dx = the gradient of x, plus bias: also the transposed convolution of dy.

    Numbers: size, stride, padding, dilation, groups, precision, channels_last.
    """

    name = "conv2d_dgrad"

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        dy, w, _, ctx.call = inputs
        need_dy, need_dw = ctx.needs_input_grad[:2]
        ctx.save_for_backward(dy if need_dw else None, w if need_dy else None)

    @staticmethod
    def backward(ctx: Any, ddx):
        (dy, w), call = ctx.saved_tensors, ctx.call
        need_dy, need_dw, need_db, *others = ctx.needs_input_grad
        geometry = call.numbers[1:-1]
        ddy = dw = db = None
        if need_dy:
            ddy = _plain_conv2d(ddx, w, None, geometry)
        if need_dw:
            numbers = call.shapes[1], call.strides[1], *geometry, False
            dw, _ = _apply(Conv2dWgrad, ddx, dy, numbers=numbers)
        if need_db:
            db = _apply(ChannelSum, ddx, numbers=())
        return ddy, dw, db, *[None] * len(others)


class Conv2dWgrad(Operator):
    """(dw, db) = the gradients of weight and, if asked for, bias: from x and dy.

    Numbers: w's size and strides, stride, padding, dilation, groups, precision, bias.
    """

    name = "conv2d_wgrad"

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        x, dy, ctx.call = inputs
        need_dx, need_ddy = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_ddy else None, dy if need_dx else None)

    @staticmethod
    def backward(ctx: Any, ddw, ddb):
        (x, dy), call = ctx.saved_tensors, ctx.call
        need_dx, need_ddy, *others = ctx.needs_input_grad
        _, _, *geometry, bias = call.numbers
        dx = ddy = None
        if need_dx:
            last = call.channels_last(0) or channels_last(ddw)
            numbers = call.shapes[0][2:], *geometry, last
            dx = _apply(Conv2dDgrad, dy, ddw, None, numbers=numbers)
        if need_ddy:
            ddy = _plain_conv2d(x, ddw, ddb if bias else None, tuple(geometry))
        return dx, ddy, *[None] * len(others)


class MaxPool2d(Operator):
    """(y, argmax, indices): the winners' taps for backward, flat indices for the caller.

    Numbers: kernel, stride, padding, dilation, ceil_mode, argmax, indices.
    """

    name = "max_pool2d"

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        _, ctx.call = inputs
        _, argmax, indices = output
        ctx.mark_non_differentiable(argmax, indices)
        ctx.save_for_backward(argmax)

    @staticmethod
    def backward(ctx: Any, dy, _offsets, _indices):
        (argmax,), call = ctx.saved_tensors, ctx.call
        numbers = call.shapes[0][2:], *call.numbers[:5], call.channels_last(0)
        dx = _apply(MaxPool2dBackward, dy, argmax, numbers=numbers)
        return dx, *[None] * (len(ctx.needs_input_grad) - 1)


class MaxPool2dBackward(Operator):
    """dx = each pixel's share: the sum of dy over the windows it won.

    Numbers: size, kernel, stride, padding, dilation, ceil_mode, channels_last.
    """

    name = "max_pool2d_backward"

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        _, argmax, ctx.call = inputs
        ctx.save_for_backward(argmax)

    @staticmethod
    def backward(ctx: Any, ddx):
        (argmax,), window = ctx.saved_tensors, ctx.call.numbers[1:-1]
        ddy = _apply(MaxPool2dGather, ddx, argmax, numbers=window)
        return ddy, *[None] * (len(ctx.needs_input_grad) - 1)


class MaxPool2dGather(Operator):
    """ddy = the value of ddx at each window's winner.

    Numbers: kernel, stride, padding, dilation, ceil_mode.
    """

    name = "max_pool2d_gather"

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        _, argmax, ctx.call = inputs
        ctx.save_for_backward(argmax)

    @staticmethod
    def backward(ctx: Any, ddy):
        (argmax,), call = ctx.saved_tensors, ctx.call
        numbers = call.shapes[0][2:], *call.numbers, call.channels_last(0)
        ddx = _apply(MaxPool2dBackward, ddy, argmax, numbers=numbers)
        return ddx, *[None] * (len(ctx.needs_input_grad) - 1)


class Conv2dReluMaxPool2d(Operator):
    """(y, argmax) of y = max_pool(relu(conv(x, w) + bias)). The argmax holds the ReLU's mask, so
    neither y nor the map is kept.

    Numbers: stride, padding, dilation, groups, precision; the pooling's kernel, stride, padding;
    argmax.
    """

    name = "conv2d_relu_max_pool2d"

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        x, w, _, ctx.call = inputs
        _, argmax = output
        ctx.mark_non_differentiable(argmax)
        need_dx, need_dw = ctx.needs_input_grad[:2]
        ctx.save_for_backward(argmax, x if need_dw else None, w if need_dx else None)

    @staticmethod
    def backward(ctx: Any, dy, _offsets):
        (argmax, x, w), call = ctx.saved_tensors, ctx.call
        wanted = ctx.needs_input_grad[:3]
        sizes = call.shapes[0][2:], call.shapes[1], call.strides[1]
        numbers = *sizes, *call.numbers[:-1], call.channels_last(0, 1), wanted
        grads = _apply(Conv2dReluMaxPool2dBackward, dy, argmax, x, w, numbers=numbers)
        grads = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return *grads, *[None] * (len(ctx.needs_input_grad) - 3)


class Conv2dReluMaxPool2dBackward(Operator):
    """(dx, dw, db), those that are wanted: dgrad, wgrad and channel sum of the map's gradient dz,
    which has each dy where its window's winner lies.

    Numbers: x's size, w's size and strides; the forward pass's up to argmax; channels_last,
    wanted.
    """

    name = "conv2d_relu_max_pool2d_backward"

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        dy, argmax, x, w, ctx.call = inputs
        ctx.save_for_backward(dy, argmax, x, w)

    @staticmethod
    def backward(ctx: Any, ddx, ddw, ddb):
        dy, argmax, x, w = ctx.saved_tensors
        size, w_size, _, *rest = ctx.call.numbers
        *conv, kernel, stride, padding, _, (want_dx, want_dw, want_db) = rest
        conv, window = tuple(conv), (kernel, stride, padding, (1, 1), False)
        need_ddy, _, need_x, need_w, *others = ctx.needs_input_grad
        places = conv_output_sizes(size, w_size[2:], *conv[:3])
        ddy = dx = dw = ddz = None
        if need_ddy:
            if want_db:
                ddz = ddb[:, None, None].expand(*dy.shape[:2], *places)
            if want_dx:
                ddz = _plain_conv2d(ddx, w, None, conv, ddz)
            if want_dw:
                ddz = _plain_conv2d(x, ddw, None, conv, ddz)
            ddy = _apply(MaxPool2dGather, ddz, argmax, numbers=window)
        if need_x or need_w:
            numbers = places, *window, channels_last(dy)
            dz = _apply(MaxPool2dBackward, dy, argmax, numbers=numbers)
            if need_x and want_dw:
                numbers = size, *conv, channels_last(x, ddw)
                dx = _apply(Conv2dDgrad, dz, ddw, None, numbers=numbers)
            if need_w and want_dx:
                numbers = w.shape, w.stride(), *conv, False
                dw, _ = _apply(Conv2dWgrad, ddx, dz, numbers=numbers)
        return ddy, None, dx, dw, *[None] * len(others)


class MaxUnpool2d(Operator):
    """y[indices] = x, zero elsewhere; of equal indices the last in row-major order wins.

    Numbers: size.
    """

    name = "max_unpool2d"

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        _, indices, ctx.call = inputs
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, dy):
        return _apply(MaxUnpool2dBackward, dy, *ctx.saved_tensors, numbers=()), None, None


class MaxUnpool2dBackward(Operator):
    """dx = dy[indices]; of equal indices each gets it, as in torch."""

    name = "max_unpool2d_backward"

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        dy, indices, *_ = inputs
        ctx.save_for_backward(indices)
        ctx.size = dy.shape[2:]

    @staticmethod
    def backward(ctx: Any, ddx):
        dy = _apply(MaxUnpool2d, ddx, *ctx.saved_tensors, numbers=(ctx.size,))
        return dy, *[None] * (len(ctx.needs_input_grad) - 1)


def _register(function: type[Operator]) -> None:
    """Make the operator itself differentiable, by the same Function.

    As in the operators of PyTorch the level of a transform is no concern of this kernel: within
    ``torch.func.grad`` it is given the tensors of one level, and the next operator is the level's.
    """
    dispatched = function.dispatched = library.dispatched(function.name)
    function.direct = staticmethod(library.direct(function.name))
    count = library.operands(function.name)

    def autograd(keyset: Any, *args: Any) -> Any:
        tensors, numbers = args[:count], args[count:]
        below = below_autograd(dispatched, keyset)
        if not library.is_recorded(tensors):
            return below(*args)
        make = record_as_now(lambda *tensors: below(*tensors, *numbers))
        with enable_single_level_autograd_function():
            return function.apply(*tensors, _Numbers(make, tensors, library.with_tuples(numbers)))

    library.register_autograd(function.name, autograd)


for _function in Operator.__subclasses__():
    _register(_function)


class Call:
    """An operator and its numbers, to be called with its tensors."""

    def __init__(
        self,
        function: type[Operator],
        dispatched: Callable[..., Any],  # its operator
        numbers: tuple,
        result: Callable[[Any], Any] | None = None,  # of what the operator gives
    ):
        self._function, self._dispatched = function, dispatched
        self._numbers, self._result = numbers, result

    def __call__(self, *tensors: Tensor | None) -> Any:
        if torch.compiler.is_compiling():
            # Dynamo takes no Function that is given one tensor twice: its own residual, say.
            library.meet_subclasses()
            made = self._dispatched(*tensors, *self._numbers)
        else:
            made = _apply(self._function, *tensors, numbers=self._numbers)
        return made if self._result is None else self._result(made)

    def again(self, *tensors: Tensor | None) -> Callable[..., Any] | None:
        """After a call that nothing watched: the same, for tensors that differ from these in their
        elements alone, with what follows from the rest done once. None if it is not kept.
        """
        function, result = self._function, self._result
        recording = library.recording_of(function.name, tensors, *self._numbers)
        if recording is None:
            return None
        numbers = _Numbers(recording, tensors, self._numbers)
        record = function.apply
        if not torch.is_grad_enabled():
            return recording if result is None else lambda *tensors: result(recording(*tensors))
        if result is None:
            return lambda *tensors: record(*tensors, numbers)
        return lambda *tensors: result(record(*tensors, numbers))


def conv2d(
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    relu: bool,
    precision: str | None,
) -> Call:
    """y[N,K,P,Q] = relu?(conv(x[N,C,H,W], w[K,C/groups,R,S]) + bias[K] + residual[N,K,P,Q])."""
    return Call(Conv2d, _ops.conv2d, (stride, padding, dilation, groups, precision, relu))


def conv2d_bytes(
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    relu: bool,
    precision: str | None,
) -> Call:
    """y = relu?(conv(scale[C] * x + shift[C], w) + bias): of uint8 x, w, bias, scale, shift."""
    numbers = stride, padding, dilation, groups, precision, relu
    return Call(Conv2dBytes, _ops.conv2d_bytes, numbers)


conv2d_fp8 = library.operator("conv2d_fp8")
"""y = relu?(scale * conv(x, w) + bias + residual) in bfloat16, of float8_e4m3fn x and w: of x, w,
scale, bias, residual, stride, padding, dilation, groups, relu."""


def conv_transpose2d(
    size: Sequence[int],
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    precision: str | None,
    channels_last: bool,
) -> Call:
    """[N,C,H,W] of (H, W) = size: dgrad of x[N,K,P,Q] with w[K,C/groups,R,S], plus bias[C]."""
    numbers = size, stride, padding, dilation, groups, precision, channels_last
    return Call(Conv2dDgrad, _ops.conv2d_dgrad, numbers)


def max_pool2d(
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool, indices: bool
) -> Call:
    """y[N,C,P,Q] of x, with indices also the int64 positions of the maxima, flat over H * W."""
    numbers = kernel, stride, padding, dilation, ceil_mode, torch.is_grad_enabled(), indices
    return Call(MaxPool2d, _ops.max_pool2d, numbers, itemgetter(0, 2) if indices else itemgetter(0))


def conv2d_relu_max_pool2d(
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    precision: str | None,
    pool_kernel: Pair,
    pool_stride: Pair,
    pool_padding: Pair,
) -> Call:
    """y[N,K,PP,PQ] = max_pool(relu(conv(x[N,C,H,W], w[K,C/groups,R,S]) + bias[K]))."""
    numbers = stride, padding, dilation, groups, precision, pool_kernel, pool_stride, pool_padding
    numbers = *numbers, torch.is_grad_enabled()
    return Call(Conv2dReluMaxPool2d, _ops.conv2d_relu_max_pool2d, numbers, itemgetter(0))


def max_unpool2d(size: Sequence[int]) -> Call:
    """[N,C,H,W] of (H, W) = size with x[N,C,P,Q] at its indices, flat over H * W, and zeros."""
    return Call(MaxUnpool2d, _ops.max_unpool2d, (size,))
