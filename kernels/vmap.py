"""torch.vmap over the operators: the mapped axis joins the batch, or the groups if w has it."""

from collections.abc import Callable

import torch
from torch import Tensor

from .geometry import contiguous_strides

_ops = torch.ops.triton_cnn
_BATCH, _CHANNELS = 0, 1


def _fold(t: Tensor | None, dim: int | None, size: int, axis: int) -> Tensor | None:
    """The mapped axis ``dim`` of t merged into ``axis``, slower than it; an unmapped t repeats."""
    if t is None:
        return None
    if dim is None:
        t = t.unsqueeze(axis).expand(*t.shape[:axis], size, *t.shape[axis:])
    else:
        t = t.movedim(dim, axis)
    return t.flatten(axis, axis + 1)


def _unfold(t: Tensor, size: int, axis: int) -> Tensor:
    return t.unflatten(axis, (size, t.shape[axis] // size))


def _conv2d(info, in_dims, x, w, bias, residual, stride, padding, dilation, groups, *rest):
    size, (x_dim, w_dim, bias_dim, residual_dim) = info.batch_size, in_dims[:4]
    axis = _BATCH
    if w_dim is not None or bias_dim is not None:
        axis, groups = _CHANNELS, groups * size
        w, bias = _fold(w, w_dim, size, 0), _fold(bias, bias_dim, size, 0)
    x, residual = _fold(x, x_dim, size, axis), _fold(residual, residual_dim, size, axis)
    y = _ops.conv2d(x, w, bias, residual, stride, padding, dilation, groups, *rest)
    return _unfold(y, size, axis), axis


def _dgrad(info, in_dims, dy, w, bias, extent, stride, padding, dilation, groups, *rest):
    size, (dy_dim, w_dim, bias_dim) = info.batch_size, in_dims[:3]
    axis = _BATCH
    if w_dim is not None or bias_dim is not None:
        axis, groups = _CHANNELS, groups * size
        w, bias = _fold(w, w_dim, size, 0), _fold(bias, bias_dim, size, 0)
    dy = _fold(dy, dy_dim, size, axis)
    dx = _ops.conv2d_dgrad(dy, w, bias, extent, stride, padding, dilation, groups, *rest)
    return _unfold(dx, size, axis), axis


def _wgrad(info, in_dims, x, dy, w_size, _, stride, padding, dilation, groups, precision, bias):
    size = info.batch_size
    x, dy = _fold(x, in_dims[0], size, _CHANNELS), _fold(dy, in_dims[1], size, _CHANNELS)
    w_size = (w_size[0] * size, *w_size[1:])
    numbers = stride, padding, dilation, groups * size, precision, bias
    dw, db = _ops.conv2d_wgrad(x, dy, w_size, contiguous_strides(w_size), *numbers)
    return (_unfold(dw, size, 0), _unfold(db, size, 0) if bias else db), (0, 0 if bias else None)


def _normalized(dims, x, scale, shift, dtype):
    """Images from bytes, and their mapped axis: what bytes have no rule of their own for."""

    def normalize(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return (x * scale[:, None, None] + shift[:, None, None]).to(dtype)

    if any(dim is not None for dim in dims):
        return torch.vmap(normalize, dims)(x, scale, shift), 0
    return normalize(x, scale, shift), None


def _conv2d_bytes(info, in_dims, x, w, bias, scale, shift, *rest):
    x_dim, w_dim, bias_dim, *dims = in_dims[:5]
    values, axis = _normalized((x_dim, *dims), x, scale, shift, w.dtype)
    return _conv2d(info, (axis, w_dim, bias_dim, None), values, w, bias, None, *rest)


def _conv2d_bytes_wgrad(info, in_dims, x, dy, scale, shift, *rest):
    x_dim, dy_dim, *dims = in_dims[:4]
    values, axis = _normalized((x_dim, *dims), x, scale, shift, dy.dtype)
    return _wgrad(info, (axis, dy_dim), values, dy, *rest)


def _channel_sum(info, in_dims, dy):
    folded = _fold(dy, in_dims[0], info.batch_size, _CHANNELS)
    return _unfold(_ops.channel_sum(folded), info.batch_size, 0), 0


def _relu_backward(info, in_dims, dy, y, bias):
    size, axis = info.batch_size, _CHANNELS if bias else _BATCH
    dy, y = (_fold(t, dim, size, axis) for t, dim in zip((dy, y), in_dims[:2], strict=True))
    dz, db = _ops.relu_backward(dy, y, bias)
    return (_unfold(dz, size, axis), _unfold(db, size, 0) if bias else db), (
        axis,
        0 if bias else None,
    )


def _max_pool2d(info, in_dims, x, *window):
    results = _ops.max_pool2d(_fold(x, in_dims[0], info.batch_size, _BATCH), *window)
    wanted = (True, *window[-2:])
    unfolded = (
        _unfold(t, info.batch_size, _BATCH) if want else t
        for t, want in zip(results, wanted, strict=True)
    )
    return tuple(unfolded), tuple(0 if want else None for want in wanted)


def _conv_pool(info, in_dims, x, w, bias, stride, padding, dilation, groups, *rest):
    size, (x_dim, w_dim, bias_dim) = info.batch_size, in_dims[:3]
    axis = _BATCH
    if w_dim is not None or bias_dim is not None:
        axis, groups = _CHANNELS, groups * size
        w, bias = _fold(w, w_dim, size, 0), _fold(bias, bias_dim, size, 0)
    x = _fold(x, x_dim, size, axis)
    y, argmax = _ops.conv2d_relu_max_pool2d(x, w, bias, stride, padding, dilation, groups, *rest)
    wants_offsets = rest[-1]
    argmax = _unfold(argmax, size, axis) if wants_offsets else argmax
    return (_unfold(y, size, axis), argmax), (axis, axis if wants_offsets else None)


def _conv_pool_backward(info, in_dims, dy, argmax, x, w, size, w_size, _, *rest):
    """Each mapped problem is a group of its own."""
    count, (dy_dim, offsets_dim, x_dim, w_dim) = info.batch_size, in_dims[:4]
    stride, padding, dilation, groups, *others, wanted = rest
    dy = _fold(dy, dy_dim, count, _CHANNELS)
    argmax = _fold(argmax, offsets_dim, count, _CHANNELS)
    x, w = _fold(x, x_dim, count, _CHANNELS), _fold(w, w_dim, count, 0)
    w_size = (w_size[0] * count, *w_size[1:])
    numbers = stride, padding, dilation, groups * count, *others, wanted
    grads = _ops.conv2d_relu_max_pool2d_backward(
        dy, argmax, x, w, size, w_size, contiguous_strides(w_size), *numbers
    )
    axes = (_CHANNELS, 0, 0)
    unfolded = (
        _unfold(t, count, axis) if want else t
        for t, axis, want in zip(grads, axes, wanted, strict=True)
    )
    dims = (axis if want else None for axis, want in zip(axes, wanted, strict=True))
    return tuple(unfolded), tuple(dims)


def _over_batch(operator: Callable[..., Tensor]) -> Callable:
    """The rule of an operator on two tensors whose images do not mix."""

    def rule(info, in_dims, first, second, *rest):
        size = info.batch_size
        folded = (
            _fold(t, dim, size, _BATCH) for t, dim in zip((first, second), in_dims[:2], strict=True)
        )
        return _unfold(operator(*folded, *rest), size, _BATCH), _BATCH

    return rule


def register(library: torch.library.Library) -> None:
    """Register the rules of all operators."""
    rules = {
        "conv2d": _conv2d,
        "conv2d_dgrad": _dgrad,
        "conv2d_wgrad": _wgrad,
        "conv2d_bytes": _conv2d_bytes,
        "conv2d_bytes_wgrad": _conv2d_bytes_wgrad,
        "channel_sum": _channel_sum,
        "relu_backward": _relu_backward,
        "conv2d_relu_max_pool2d": _conv_pool,
        "conv2d_relu_max_pool2d_backward": _conv_pool_backward,
        "max_pool2d": _max_pool2d,
    }
    for name in (
        "max_pool2d_backward",
        "max_pool2d_gather",
        "max_unpool2d",
        "max_unpool2d_backward",
    ):
        rules[name] = _over_batch(getattr(_ops, name))
    for name, rule in rules.items():
        torch.library.register_vmap(f"triton_cnn::{name}", rule, lib=library)
