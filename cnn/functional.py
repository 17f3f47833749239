"""``torch.nn.functional``'s convolutions and max-poolings, on this library's kernels.

Signatures, defaults, unbatched inputs, result layouts, autocast and errors are torch's: what torch
rejects is rejected here with the same class of exception, and no bad argument reaches a kernel.
The dtypes are float16, bfloat16, float32 and float64; others raise NotImplementedError.

On a CPU without the interpreter these functions are torch's own, with whatever torch takes and
raises there, and so they are on every device while ``torch.export`` looks on.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from operator import itemgetter
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from kernels import ops
from kernels._private import is_quantizing
from kernels.geometry import conv_transpose_output_size, conv_transpose_padding, pool_output_size
from kernels.ops import calls
from kernels.ops.dispatch import Bound
from kernels.ops.tensors import channels_last

from . import composed
from .arguments import (
    INT32,
    PRECISIONS,
    Invalid,
    check_bytes,
    check_channels,
    check_choice,
    check_devices,
    check_dimensions,
    check_dtypes,
    check_pixels,
    check_residual,
    check_scale,
    check_tensors,
    convolution,
    one_number,
    pair,
    pooling,
    refused,
    require,
    unpool_size,
    weight_sizes,
)
from .autocast import autocast, cast

Size = int | Sequence[int]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _overridable(
    torchs: Callable[..., Any],
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Ask ``__torch_function__`` first, as torch does; torch.fx traces through it. Then call
    ``torchs``, which takes the same arguments, if the call is torch's own affair.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            values = (*args, *kwargs.values())
            if has_torch_function(values):
                return _handed_on(call, values, *args, **kwargs)
            if composed.is_torchs(args[0] if args else kwargs.get("input")):
                return torchs(*args, **kwargs)
            try:
                return function(*args, **kwargs)
            except Invalid:
                given = signature(function).bind(*args, **kwargs).arguments
                raise refused(torchs, **given) from None

        return call

    return decorate


def _handed_on(function: Callable[..., Any], values: tuple, *args: Any, **kwargs: Any) -> Any:
    """What ``__torch_function__`` makes of a call, but where it would leave it as it is, unseen."""
    if is_quantizing(values):
        raise NotImplementedError(
            f"torch.ao.quantization knows torch's own functions only, not {function.__name__} of "
            "cnn: call cnn.revert(model) first, or give the layer's class the qconfig None and set "
            "it as non-traceable"
        )
    return handle_torch_function(function, values, *args, **kwargs)


def _called(call: Bound, *tensors: Tensor | None, key: tuple | None = None, unbatched: bool) -> Any:
    """What the call makes of tensors, of which one image is a batch; under its key it is kept."""
    if unbatched:
        made = call(*(t.unsqueeze(0) if t is not None and t.dim() == 3 else t for t in tensors))
        return made.squeeze(0) if isinstance(made, Tensor) else tuple(t.squeeze(0) for t in made)
    made = call(*tensors)
    if key is not None and (again := call.again(*tensors)) is not None:
        calls.remember(key, again)
    return made


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    activation: Literal["relu"] | None = None,
    residual: Tensor | None = None,
    precision: Literal["ieee", "tf32", "tf32x3", "bf16x3", "bf16x6"] | None = None,
    scale: Tensor | None = None,
    normalize: tuple[Any, Any] | None = None,
) -> Tensor:
    """activation(scale * convolution + bias + residual), in one kernel.

    Args:
        input: [N, C, H, W] or [C, H, W].
        weight: [K, C / groups, R, S].
        bias: [K].
        padding: zeros on each side, or "valid", "same" (an odd one goes to the bottom and right)
            or "full", which is dilation * (kernel - 1).
        activation: None or "relu".
        residual: of the result's shape, dtype and device.
        precision: how a GPU multiplies float32, by a product's largest relative error: "ieee"
            (2**-24), "tf32" (2**-9), and on tensor cores by parts "bf16x3" (2**-15), "tf32x3"
            (2**-21) and "bf16x6" (2**-24); None follows torch's setting for convolutions.
        scale: a float32 scalar or [K], for input and weight in float8_e4m3fn, which need it: what
            one of their products stands for. The result, bias and residual are then bfloat16; there
            is no gradient. Hopper's tensor cores sum such products with about 14 bits.
        normalize: (scale, shift) of the channels, for an input of bytes (uint8) with at most four
            channels to a group: what is convolved is input * scale + shift in weight's dtype, which
            is never stored; padding is zero after that. Each is a float32 tensor [C], or a number
            or sequence of C; they get no gradient.

    Returns [N, K, P, Q] or [K, P, Q], in channels_last if input or weight is. Where input has no
    channels the result has none either, as in torch.
    """
    tensors = (input, weight, bias, residual)
    arguments = (stride, padding, dilation, groups, activation, precision)
    beyond = scale is not None or normalize is not None
    key = None if beyond else calls.function_key("conv2d", tensors, arguments)
    if key is not None and (known := calls.known.get(key)) is not None:
        return known(input, weight, bias, residual)
    given: Any = input, weight, bias, stride, padding, dilation, groups
    options: Any = {
        "activation": activation,
        "residual": residual,
        "precision": precision,
        "scale": scale,
        "normalize": normalize,
    }
    others = normalize if isinstance(normalize, tuple) else ()
    values = (*given, *options.values(), *others)
    if has_torch_function(values):
        return _handed_on(conv2d, values, *given, **options)
    check_choice("activation", activation, ("relu",))
    check_choice("precision", precision, PRECISIONS)
    relu, is_torchs = activation is not None, composed.is_torchs(input)
    is_full = isinstance(padding, str) and padding == "full"
    if is_torchs and not beyond and residual is None and not is_full:
        y = torch.conv2d(*given)
        return y.relu_() if relu else y  # in place, as backward does not need what it gave
    try:
        check_tensors(input=input, weight=weight, bias=bias, residual=residual, scale=scale)
        numbers, size, unbatched = convolution(*given)
        check_pixels(input)
    except Invalid:
        names = "input", "weight", "bias", "stride", "padding", "dilation", "groups"
        named = dict(zip(names, given, strict=True)) | ({"padding": 0} if is_full else {})
        raise refused(torch.conv2d, **named) from None
    check_devices(input, weight=weight, bias=bias, residual=residual, scale=scale)
    check_residual(residual, input, weight, size)
    constants = ()
    if scale is not None:
        check_scale(scale, weight.shape[0], input, weight, bias, residual)
    elif normalize is not None:
        if residual is not None:
            raise NotImplementedError("a convolution of bytes takes no residual, got one")
        constants = check_bytes(input, weight, numbers["groups"], normalize)
    if is_torchs:
        top, _, left, _ = numbers["padding"]
        geometry = stride, (top, left) if is_full else padding, dilation, numbers["groups"]
        y = composed.conv2d(input, weight, bias, geometry, residual, scale, constants)
        return y.relu_() if relu else y
    numbers["relu"] = relu
    if scale is not None:
        call = ops.conv2d_8bit.conv2d_fp8.bind(**numbers)
        return _called(call, input, weight, scale, bias, residual, unbatched=unbatched)
    if constants:
        input, weight, bias = autocast(input, weight, bias)
        check_dtypes(weight, bias=bias)
        call = ops.conv2d_8bit.conv2d_bytes.bind(**numbers, precision=precision)
        return _called(call, input, weight, bias, *constants, unbatched=unbatched)
    input, weight, bias, residual = autocast(input, weight, bias, residual)
    check_dtypes(input, weight=weight, bias=bias, residual=residual)
    if input.shape[-3] == 0:  # a result without channels, whose gradients are zero
        y = input.reshape(*input.shape[:-3], 0, *size) + weight.sum()
        return y if bias is None else y + bias.sum()
    call = ops.conv2d.conv2d.bind(**numbers, precision=precision)
    return _called(call, input, weight, bias, residual, key=key, unbatched=unbatched)


@_overridable(TF.conv_transpose2d)
def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """The gradient of conv2d with respect to its input, as an operator of its own.

    Args:
        input: [N, K, P, Q] or [K, P, Q].
        weight: [K, C / groups, R, S], as in the convolution this is the transpose of.
        bias: [C].
        output_padding: rows and columns added to the result at the bottom and right; it must be
            smaller than stride or dilation.

    Returns [N, C, H, W] or [C, H, W], in channels_last if input or weight is.
    """
    tensors = (input, weight, bias)
    arguments = (stride, padding, output_padding, groups, dilation)
    key = calls.function_key("conv_transpose2d", tensors, arguments)
    if key is not None and (known := calls.known.get(key)) is not None:
        return known(input, weight, bias)
    check_tensors(input=input, weight=weight, bias=bias)
    steps, spread = pair(stride, 1), pair(dilation, 1)
    (ph, pw), extra = pair(padding, 0), pair(output_padding, 0)
    groups = one_number(groups)
    unbatched = check_dimensions(input)
    K, channels, R, S = weight_sizes(weight, groups)
    check_channels(input, bias, K, channels * groups)
    require(all(e < s or e < d for e, s, d in zip(extra, steps, spread, strict=True)))
    P, Q = input.shape[-2:]
    size = (
        conv_transpose_output_size(P, R, steps[0], (ph, ph), spread[0], extra[0]),
        conv_transpose_output_size(Q, S, steps[1], (pw, pw), spread[1], extra[1]),
    )
    # Without images torch's result may be empty.
    least = 1 if unbatched or input.shape[0] > 0 else 0
    require(channels != 0 and size[0] >= least and size[1] >= least)
    check_pixels(input)
    check_devices(input, weight=weight, bias=bias)
    x, weight, bias = autocast(input, weight, bias)
    check_dtypes(x, weight=weight, bias=bias)
    pads = conv_transpose_padding((ph, pw), extra, steps)
    last = channels_last(x.unsqueeze(0) if unbatched else x, weight)
    numbers = {"stride": steps, "padding": pads, "dilation": spread, "groups": groups}
    call = ops.conv2d.conv2d_dgrad.bind(size=size, **numbers, precision=None, channels_last=last)
    return _called(call, x, weight, bias, key=key, unbatched=unbatched)


@_overridable(TF.max_pool2d)
def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The maximum of each window. NaN wins, of equal values the first, padding never.

    Args:
        input: [N, C, H, W] or [C, H, W].
        stride: kernel_size if it is None or empty.
        padding: at most half of kernel_size.
        ceil_mode: whether a window may reach beyond the padded input.

    Returns [N, C, P, Q] or [C, P, Q] in input's layout; with return_indices also the int64 indices
    of the maxima, flat over H * W. A window without any pixel gives -inf and index -1; PyTorch's
    gives an index outside the map.
    """
    # In words, as 1 would be taken for the True that it is equal to.
    words = str(ceil_mode), str(return_indices)
    arguments = (kernel_size, stride, padding, dilation, *words)
    key = calls.function_key("max_pool2d", (input,), arguments)
    if key is not None and (known := calls.known.get(key)) is not None:
        return known(input)
    check_tensors(input=input)
    kernel, steps, pads = pooling(kernel_size, stride, padding)
    spread = pair(dilation, 1, INT32)
    require(isinstance(ceil_mode, bool))
    unbatched = check_dimensions(input)
    C, H, W = input.shape[-3:]
    require(0 not in (C, H, W))
    P = pool_output_size(H, kernel[0], steps[0], pads[0], spread[0], ceil_mode)
    Q = pool_output_size(W, kernel[1], steps[1], pads[1], spread[1], ceil_mode)
    require(P >= 1 and Q >= 1)
    check_dtypes(input)
    call = ops.max_pool2d.max_pool2d.bind(
        itemgetter(0, 2) if return_indices else itemgetter(0),
        kernel=kernel,
        stride=steps,
        padding=pads,
        dilation=spread,
        ceil_mode=ceil_mode,
        argmax=torch.is_grad_enabled(),  # which only backward takes
        indices=bool(return_indices),
    )
    return _called(call, input, key=key, unbatched=unbatched)


def _relu_max_pool2d(
    *args: Any, pool_kernel_size: Any, pool_stride: Any = None, pool_padding: Any = 0, **kwargs: Any
) -> Tensor:
    """``conv2d_relu_max_pool2d`` in torch's functions."""
    y = conv2d(*args, activation="relu", **kwargs)
    steps = () if pool_stride is None else pool_stride
    return torch.max_pool2d(y, pool_kernel_size, steps, pool_padding)


@_overridable(_relu_max_pool2d)
def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    pool_kernel_size: Size,
    pool_stride: Size | None = None,
    pool_padding: Size = 0,
    precision: Literal["ieee", "tf32", "tf32x3", "bf16x3", "bf16x6"] | None = None,
) -> Tensor:
    """max_pool2d(relu(conv2d(input, weight) + bias)) in one kernel, whose map is never stored.

    For backward it keeps input, weight and one byte of each result, in which window it lay (two
    where windows have more than 255 pixels).

    Args:
        input, weight, bias, stride, padding, dilation, groups, precision: as of ``conv2d``.
        pool_kernel_size, pool_stride, pool_padding: as of ``max_pool2d``.

    Returns [N, K, P, Q] or [K, P, Q], in channels_last if input or weight is.
    """
    arguments = (stride, padding, dilation, groups, precision)
    window = (pool_kernel_size, pool_stride, pool_padding)
    key = calls.function_key("conv2d_relu_max_pool2d", (input, weight, bias), (*arguments, *window))
    if key is not None and (known := calls.known.get(key)) is not None:
        return known(input, weight, bias)
    check_tensors(input=input, weight=weight, bias=bias)
    check_choice("precision", precision, PRECISIONS)
    g = convolution(input, weight, bias, stride, padding, dilation, groups)
    kernel, steps, pads = pooling(*window)
    require(0 not in (*input.shape[-3:], weight.shape[0]))
    sizes = [
        pool_output_size(places, k, s, p, 1, False)
        for places, k, s, p in zip(g.size, kernel, steps, pads, strict=True)
    ]
    require(min(sizes) >= 1)
    check_devices(input, weight=weight, bias=bias)
    x, weight, bias = autocast(input, weight, bias)
    check_dtypes(x, weight=weight, bias=bias)
    call = ops.conv2d_relu_max_pool2d.conv2d_relu_max_pool2d.bind(
        itemgetter(0),
        **g.numbers,
        precision=precision,
        pool_kernel=kernel,
        pool_stride=steps,
        pool_padding=pads,
        argmax=torch.is_grad_enabled(),
    )
    return _called(call, x, weight, bias, key=key, unbatched=g.unbatched)


@_overridable(TF.max_unpool2d)
def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Put each value back to the place where max_pool2d found it, among zeros.

    Args:
        input: [N, C, P, Q] or [C, P, Q].
        indices: int64, of input's shape, flat over H * W; of equal indices the last wins.
        output_size: (H, W) or (N, C, H, W), of which N and C are ignored; less than a stride from
            the size that the other arguments give.

    Returns [N, C, H, W] or [C, H, W] in input's layout. An index outside H * W raises
    RuntimeError on the CPU and fails a device-side assertion on a GPU.
    """
    check_tensors(input=input, indices=indices)
    unbatched = check_dimensions(input)
    size = unpool_size(input, kernel_size, stride, padding, output_size)
    require(0 not in input.shape[1:])
    require(indices.dtype == torch.int64 and indices.shape == input.shape)
    check_devices(input, indices=indices)
    check_dtypes(input)
    if input.is_cpu and torch.is_autocast_enabled("cpu"):
        input = cast(input, torch.float32)  # torch's rule; GPUs unpool in the dtype they are given
    call = ops.max_pool2d.max_unpool2d.bind(size=size)
    return _called(call, input, indices, unbatched=unbatched)
