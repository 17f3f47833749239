"""Tensor descriptors over NHWC memory. Sizes, strides and offsets are in elements."""

from collections.abc import Sequence

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import replay
from ..geometry import Taps
from ..tile import Box


def _descriptor(
    t: Tensor,
    shape: Sequence[int],
    strides: Sequence[int],
    block: Sequence[int],
    offset: int = 0,  # of its first element, from t's
) -> TensorDescriptor:
    """``layout_of`` has found t aligned. The stride of an axis of one element, which is
    never taken, is made one that is allowed.
    """
    unit = 16 // t.element_size()
    allowed = [s if size > 1 else unit for size, s in zip(shape, strides, strict=True)]
    if offset:
        t = replay.derive(t, lambda t: t.as_strided((1,), (1,), t.storage_offset() + offset))
    return TensorDescriptor(t, list(shape), [*allowed[:-1], 1], list(block))


def images(
    t: Tensor,
    block: Sequence[int],
    phase: tuple[Taps, Taps] | None = None,
    *,
    flat: bool = False,
    images_last: bool = False,
) -> TensorDescriptor:
    """t[N, C, H, W] as [N, H, W, C], or as [H, W, N, C] with ``images_last``.

    ``phase``: only its pixels. ``flat``: the pixels, in memory order, count as images of one.
    """
    (N, C, H, W), (n, c, h, w) = t.shape, t.stride()
    offset = 0
    if flat:
        pitch = w if W > 1 else h if H > 1 else n
        N, H, W, n = N * H * W, 1, 1, pitch
    elif phase is not None:
        row, column = phase
        offset = row.first * h + column.first * w
        H, W, h, w = row.count, column.count, row.stride * h, column.stride * w
    if images_last:
        return _descriptor(t, (H, W, N, C), (h, w, n, c), block, offset)
    return _descriptor(t, (N, H, W, C), (n, h, w, c), block, offset)


def image_pairs(t: Tensor, box: Box, depth: int) -> TensorDescriptor:
    """t[N, C, H, W] of even H and W as [N, H/2, 2, W/2, 2C]: both phases of both axes."""
    (N, C, H, W), (n, c, h, w) = t.shape, t.stride()
    pairs, steps = (N, H // 2, 2, W // 2, 2 * C), (n, 2 * h, h, 2 * w, c)
    deep, high, wide = box
    return _descriptor(t, pairs, steps, (deep, high, 1, wide, depth))


def rows_first(images: TensorDescriptor) -> TensorDescriptor:
    """[N, H, W, C] as [H, N, W, C], or pairs of both as [H/2, 2, N, W/2, 2C]."""
    rows = len(images.shape) - 3
    order = (*range(1, rows + 1), 0, rows + 1, rows + 2)
    axes = images.shape, images.strides, images.block_shape
    shape, strides, block = ([t[axis] for axis in order] for t in axes)
    return TensorDescriptor(images.base, shape, strides, block)


def filters(w: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """w[K, C, R, S] as [R, S, K, C]."""
    (K, C, R, S), (k, c, r, s) = w.shape, w.stride()
    return _descriptor(w, (R, S, K, C), (r, s, k, c), (1, 1, *block))
