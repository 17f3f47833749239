"""Each operator in torch's own: same arguments, same values, but layouts of its own."""

import torch
from torch import Tensor

from kernels import ops
from kernels.geometry import Pool2dGeometry, conv_output_sizes
from kernels.pool.max_pool import argmax_dtype

conv2d = ops.conv2d.conv2d.reference
conv2d_dgrad = ops.conv2d.conv2d_dgrad.reference
conv2d_wgrad = ops.conv2d.conv2d_wgrad.reference


def _normalized(x, scale, shift, dtype):
    return (x * scale[:, None, None] + shift[:, None, None]).to(dtype)


def conv2d_bytes(x, w, bias, scale, shift, *arguments):
    return conv2d(_normalized(x, scale, shift, w.dtype), w, bias, None, *arguments)


def conv2d_bytes_wgrad(x, dy, scale, shift, *arguments):
    return conv2d_wgrad(_normalized(x, scale, shift, dy.dtype), dy, *arguments)


def channel_sum(dy):
    return dy.sum((0, 2, 3))


def relu_backward(dy, y, bias):
    dz = torch.where(y <= 0, 0, dy)
    return dz, channel_sum(dz) if bias else y.new_empty(0)


# Max-pooling.


def _geometry(x_shape, kernel, stride, padding, dilation, ceil_mode) -> Pool2dGeometry:
    pairs = (tuple(pair) for pair in (kernel, stride, padding, dilation))
    return Pool2dGeometry(*x_shape, *pairs, ceil_mode)  # type: ignore[arg-type]


def _taps(g: Pool2dGeometry) -> tuple[Tensor, Tensor]:
    """Rows[P, R] and columns[Q, S] of the pixels under the taps of each window."""
    p, q = torch.arange(g.P)[:, None], torch.arange(g.Q)[:, None]
    rows = p * g.stride[0] - g.padding[0] + torch.arange(g.kernel[0]) * g.dilation[0]
    columns = q * g.stride[1] - g.padding[1] + torch.arange(g.kernel[1]) * g.dilation[1]
    return rows, columns


def _winners(g: Pool2dGeometry, argmax: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices[N, C, P * Q] of the winning pixels, and whether a window has one at all."""
    taps = argmax.to(torch.int64)
    found = taps < g.taps if argmax.dtype != torch.int32 else taps >= 0
    rows, columns = _taps(g)
    first = rows[:, :1] * g.W + columns[:, 0]  # [P, Q], may be outside
    apart = (rows[0, :, None] * g.W + columns[0]).flatten() - first[0, 0]  # [R * S]
    # By a table, because dividing by the kernel's width takes several times as long.
    winners = first + apart[torch.where(found, taps, 0)]
    return torch.where(found, winners, 0).flatten(2), found


def max_pool2d(x, kernel, stride, padding, dilation, ceil_mode, argmax, indices):
    g = _geometry(x.shape, kernel, stride, padding, dilation, ceil_mode)
    y, flat = torch.ops.aten.max_pool2d_with_indices(
        x, kernel, stride, padding, dilation, ceil_mode
    )
    rows, columns = _taps(g)
    inside_rows, inside_columns = (
        ((at >= 0) & (at < size)).any(1) for at, size in ((rows, g.H), (columns, g.W))
    )
    inside = inside_rows[:, None] & inside_columns
    r = (flat // g.W - rows[:, :1]) // g.dilation[0]
    s = (flat % g.W - columns[:, 0]) // g.dilation[1]
    # A window without any pixel has -1, the largest number of an unsigned dtype.
    taps = torch.where(inside, r * g.kernel[1] + s, -1).to(argmax_dtype(g))
    flat = torch.where(inside, flat, -1)
    return (
        y.masked_fill(~inside, -torch.inf),
        taps if argmax else taps.new_empty(0),
        flat if indices else flat.new_empty(0),
    )


def max_pool2d_backward(dy, argmax, size, *window_and_layout):
    g = _geometry((*dy.shape[:2], *size), *window_and_layout[:-1])
    flat, found = _winners(g, argmax)
    dx = dy.new_zeros((g.N, g.C, g.H * g.W))
    return dx.scatter_add_(2, flat, torch.where(found, dy, 0).flatten(2)).view(g.x_shape)


def max_pool2d_gather(ddx, argmax, *window):
    g = _geometry(ddx.shape, *window)
    flat, found = _winners(g, argmax)
    return torch.where(found, ddx.flatten(2).gather(2, flat).view(g.y_shape), 0)


def max_unpool2d(x, indices, size):
    return torch.ops.aten.max_unpool2d(x.contiguous(), indices.contiguous(), list(size))


def max_unpool2d_backward(dy, indices):
    return dy.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)


# Convolution, ReLU and max-pooling as one.


def conv2d_relu_max_pool2d(x, w, bias, *arguments):
    *convolution, kernel, step, margin, argmax = arguments
    z = conv2d(x, w, bias, None, *convolution, True)
    y, taps, _ = max_pool2d(z, kernel, step, margin, (1, 1), False, True, False)
    taps = torch.where(y <= 0, -1, taps.to(torch.int64)).to(taps.dtype)
    return y, taps if argmax else taps.new_empty(0)


def conv2d_relu_max_pool2d_backward(dy, argmax, x, w, size, w_size, w_strides, *arguments):
    *convolution, kernel, step, margin, channels_last, wanted = arguments
    stride, padding, dilation, *_ = convolution
    map_size = conv_output_sizes(size, w_size[2:], stride, padding, dilation)
    window = kernel, step, margin, (1, 1), False
    dz = max_pool2d_backward(dy, argmax, map_size, *window, channels_last)
    dx, dw, db = (dy.new_empty(0) for _ in range(3))
    if wanted[0]:
        dx = conv2d_dgrad(dz, w, None, size, *convolution, channels_last)
    if wanted[1]:
        dw, _ = conv2d_wgrad(x, dz, w_size, w_strides, *convolution, False)
    return dx, dw, channel_sum(dz) if wanted[2] else db
