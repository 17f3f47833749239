"""A convolution's three directions on ATen, which measured plans are checked against.

Each has its operator's arguments and gives its result, layout included.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import dense_strides, is_channels_last, output_strides


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
    return result, dy.sum((0, 2, 3)) if bias else x.new_empty(0)
