"""The operators on ATen, for CPU tensors where Triton's interpreter is off.

Each has its operator's arguments and gives its result, layout included.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import (
    Pool2dGeometry,
    conv_places,
    dense_strides,
    is_channels_last,
    output_strides,
)
from .max_pool import offset_dtype


def _stored(value: Tensor, channels_last: bool) -> Tensor:
    strides = output_strides(value.shape, channels_last)
    if value.stride() == strides:
        return value
    return value.new_empty_strided(value.shape, strides).copy_(value)


def _channels_last(*tensors: Tensor) -> bool:
    return any(is_channels_last(t.shape, t.stride()) for t in tensors)


def _widths(padding) -> tuple[int, int, int, int]:
    """Padding as F.pad takes it, the last axis first."""
    top, bottom, left, right = padding
    return left, right, top, bottom


def conv2d(x, w, bias, residual, stride, padding, dilation, groups, precision, relu):
    y = torch.conv2d(F.pad(x, _widths(padding)), w, bias, stride, 0, dilation, groups)
    if residual is not None:
        y = y + residual
    if relu:
        y = torch.relu(y)
    return _stored(y, _channels_last(x, w))


def _normalised(x, scale, shift, dtype):
    return (x * scale[:, None, None] + shift[:, None, None]).to(dtype)


def conv2d_bytes(x, w, bias, scale, shift, stride, padding, dilation, groups, precision, relu):
    channels_last = _channels_last(x, w)
    values = _normalised(x, scale, shift, w.dtype)
    y = conv2d(values, w, bias, None, stride, padding, dilation, groups, precision, relu)
    return _stored(y, channels_last)


def conv2d_bytes_wgrad(x, dy, scale, shift, *arguments):
    return conv2d_wgrad(_normalised(x, scale, shift, dy.dtype), dy, *arguments)


def conv2d_fp8(x, w, scale, bias, residual, stride, padding, dilation, groups, relu):
    channels_last = _channels_last(x, w)
    x, w, scale = x.float(), w.float(), scale.expand(w.shape[0])
    y = torch.conv2d(F.pad(x, _widths(padding)), w, None, stride, 0, dilation, groups)
    y = y * scale[:, None, None]
    for term in (None if bias is None else bias[:, None, None], residual):
        y = y if term is None else y + term
    y = (torch.relu(y) if relu else y).to(torch.bfloat16)
    return _stored(y, channels_last)


def _backward(dy, x, w, stride, dilation, groups, mask):
    return torch.ops.aten.convolution_backward(
        dy, x, w, None, stride, [0, 0], dilation, False, [0, 0], groups, mask
    )


def conv2d_dgrad(dy, w, bias, size, stride, padding, dilation, groups, precision, channels_last):
    top, bottom, left, right = padding
    shape = (dy.shape[0], w.shape[1] * groups, size[0] + top + bottom, size[1] + left + right)
    padded = _backward(dy, dy.new_empty(shape), w, stride, dilation, groups, [True, False, False])[
        0
    ]
    dx = F.pad(padded, (-left, -right, -top, -bottom))  # the last sides may be negative: zeros
    if bias is not None:
        dx = dx + bias[:, None, None]
    return _stored(dx, channels_last)


def conv2d_wgrad(x, dy, size, strides, stride, padding, dilation, groups, precision, bias):
    x = F.pad(x, _widths(padding))
    dw = _backward(dy, x, x.new_empty(tuple(size)), stride, dilation, groups, [False, True, False])[
        1
    ]
    result = x.new_empty_strided(tuple(size), dense_strides(size, strides)).copy_(dw)
    return result, channel_sum(dy) if bias else x.new_empty(0)


def channel_sum(dy):
    return dy.sum((0, 2, 3))


def relu_backward(dy, y, bias):
    dz = torch.where(y <= 0, 0, dy)
    result = y.new_empty_strided(y.shape, dense_strides(y.shape, y.stride())).copy_(dz)
    return result, channel_sum(dz) if bias else y.new_empty(0)


def _geometry(x_shape, kernel, stride, padding, dilation, ceil_mode) -> Pool2dGeometry:
    pairs = (tuple(pair) for pair in (kernel, stride, padding, dilation))
    return Pool2dGeometry(*x_shape, *pairs, ceil_mode)  # type: ignore[arg-type]


def _taps(g: Pool2dGeometry) -> tuple[Tensor, Tensor]:
    """Rows[P, R] and columns[Q, S] of the pixels that the taps of each window lie on."""
    p, q = torch.arange(g.P)[:, None], torch.arange(g.Q)[:, None]
    rows = p * g.stride[0] - g.padding[0] + torch.arange(g.kernel[0]) * g.dilation[0]
    columns = q * g.stride[1] - g.padding[1] + torch.arange(g.kernel[1]) * g.dilation[1]
    return rows, columns


def _winners(g: Pool2dGeometry, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices[N, C, P * Q] of the winning pixels, and where a window has one at all."""
    taps = offsets.to(torch.int64)
    found = taps < g.taps if offsets.dtype != torch.int32 else taps >= 0
    rows, columns = _taps(g)
    first = rows[:, :1] * g.W + columns[:, 0]  # [P, Q], may lie outside
    apart = (rows[0, :, None] * g.W + columns[0]).flatten() - first[0, 0]  # [R * S]
    # Looked up, as dividing by the kernel's width takes several times as long.
    winners = first + apart[torch.where(found, taps, 0)]
    return torch.where(found, winners, 0).flatten(2), found


def max_pool2d(x, kernel, stride, padding, dilation, ceil_mode, offsets, indices):
    g = _geometry(x.shape, kernel, stride, padding, dilation, ceil_mode)
    y, flat = torch.ops.aten.max_pool2d_with_indices(
        x, kernel, stride, padding, dilation, ceil_mode
    )
    rows, columns = _taps(g)
    inside = ((rows >= 0) & (rows < g.H)).any(1)[:, None] & ((columns >= 0) & (columns < g.W)).any(
        1
    )
    y = y.masked_fill(~inside, -torch.inf)
    r = (flat // g.W - rows[:, :1]) // g.dilation[0]
    s = (flat % g.W - columns[:, 0]) // g.dilation[1]
    # No pixel at all is -1, which is the largest number of an unsigned dtype.
    taps = torch.where(inside, r * g.kernel[1] + s, -1).to(offset_dtype(g))
    flat = torch.where(inside, flat, -1)
    channels_last = _channels_last(x)
    return (
        _stored(y, channels_last),
        _stored(taps, channels_last) if offsets else taps.new_empty(0),
        _stored(flat, channels_last) if indices else flat.new_empty(0),
    )


def max_pool2d_backward(
    dy, offsets, size, kernel, stride, padding, dilation, ceil_mode, channels_last
):
    g = _geometry((*dy.shape[:2], *size), kernel, stride, padding, dilation, ceil_mode)
    flat, found = _winners(g, offsets)
    acc = torch.float64 if dy.dtype == torch.float64 else torch.float32
    dx = torch.zeros((g.N, g.C, g.H * g.W), dtype=acc)
    dx.scatter_add_(2, flat, torch.where(found, dy, 0).to(acc).flatten(2))
    return _stored(dx.view(g.x_shape).to(dy.dtype), channels_last)


def max_pool2d_gather(ddx, offsets, kernel, stride, padding, dilation, ceil_mode):
    g = _geometry(ddx.shape, kernel, stride, padding, dilation, ceil_mode)
    flat, found = _winners(g, offsets)
    ddy = torch.where(found, ddx.flatten(2).gather(2, flat).view(g.y_shape), 0)
    return torch.empty_like(offsets, dtype=ddx.dtype).copy_(ddy)


def max_unpool2d(x, indices, size):
    planes, flat = x.flatten(2), indices.flatten(2)
    wide = planes if x.dtype in (torch.float32, torch.float64) else planes.float()
    y = torch.ops.aten.max_unpool2d(wide.reshape(x.shape), flat.reshape(x.shape), list(size))
    return _stored(y.to(x.dtype), _channels_last(x))


def max_unpool2d_backward(dy, indices):
    dx = dy.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)
    return _stored(dx, _channels_last(indices))


def conv2d_relu_max_pool2d(
    x, w, bias, stride, padding, dilation, groups, precision, kernel, step, margin, offsets
):
    z = conv2d(x, w, bias, None, stride, padding, dilation, groups, precision, True)
    y, taps, _ = max_pool2d(z, kernel, step, margin, (1, 1), False, True, False)
    taps = torch.where(y <= 0, -1, taps.to(torch.int64)).to(taps.dtype)
    channels_last = _channels_last(x, w)
    return _stored(y, channels_last), _stored(taps, channels_last) if offsets else taps.new_empty(0)


def conv2d_relu_max_pool2d_backward(
    dy,
    offsets,
    x,
    w,
    size,
    w_size,
    w_strides,
    stride,
    padding,
    dilation,
    groups,
    precision,
    kernel,
    step,
    margin,
    channels_last,
    wanted,
):
    geometry = stride, padding, dilation, groups, precision
    places = conv_places(size, w_size[2:], stride, padding, dilation)
    dz = max_pool2d_backward(
        dy, offsets, places, kernel, step, margin, (1, 1), False, channels_last
    )
    dx, dw, db = (dy.new_empty(0) for _ in range(3))
    if wanted[0]:
        dx = conv2d_dgrad(dz, w, None, size, *geometry, channels_last)
    if wanted[1]:
        dw, _ = conv2d_wgrad(x, dz, w_size, w_strides, *geometry, False)
    return dx, dw, channel_sum(dz) if wanted[2] else db
