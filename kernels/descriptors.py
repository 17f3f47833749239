"""Tensor descriptors over NHWC memory: how they lie, apart from the memory they are over.

A ``View`` depends on shapes and strides alone, so a launch that comes again keeps its views and
only puts the tensors in. Sizes, strides and offsets are in elements.
"""

from collections.abc import Sequence

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import replay
from .geometry import Taps
from .tile import Box

Sizes = tuple[int, ...]  # N, C, H, W, or their strides


class View:
    """A descriptor without its memory; ``offset`` is its first element's, from the tensor's."""

    __slots__ = ("_fields", "block", "offset", "shape", "strides")

    def __init__(self, shape: list[int], strides: list[int], block: list[int], offset: int):
        self.shape, self.strides, self.block, self.offset = shape, strides, block, offset
        self._fields = {
            "base": None,
            "shape": shape,
            "strides": strides,
            "block_shape": block,
            "padding": "zero",
            "round_f32_to_tf32": False,
        }

    def over(self, t: Tensor) -> TensorDescriptor:
        """The descriptor. ``planner.layout_of`` has found t aligned: Triton's constructor, which
        would check it again, takes longer than all the rest of a launch.
        """
        if self.offset:
            t = replay.derive(t, self._first)
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__.update(self._fields)
        descriptor.base = t
        return descriptor

    def _first(self, t: Tensor) -> Tensor:
        return t.as_strided((1,), (1,), t.storage_offset() + self.offset)


def _view(
    shape: Sequence[int],
    strides: Sequence[int],
    block: Sequence[int],
    itemsize: int,
    offset: int = 0,
) -> View:
    """The stride of an axis of one element, which is never taken, is made one that is allowed."""
    unit = 16 // itemsize
    allowed = [s if size > 1 else unit for size, s in zip(shape, strides, strict=True)]
    return View(list(shape), [*allowed[:-1], 1], list(block), offset)


def images(
    shape: Sizes,
    strides: Sizes,
    block: Sequence[int],
    itemsize: int,
    parity: tuple[Taps, Taps] | None = None,
    *,
    flat: bool = False,
    images_last: bool = False,
) -> View:
    """t[N, C, H, W] as [N, H, W, C], or as [H, W, N, C] with ``images_last``.

    ``parity``: only its pixels. ``flat``: the pixels, in memory order, count as images of one.
    """
    (N, C, H, W), (n, c, h, w) = shape, strides
    offset = 0
    if flat:
        pitch = w if W > 1 else h if H > 1 else n
        N, H, W, n = N * H * W, 1, 1, pitch
    elif parity is not None:
        row, column = parity
        offset = row.first * h + column.first * w
        H, W, h, w = row.count, column.count, row.stride * h, column.stride * w
    if images_last:
        return _view((H, W, N, C), (h, w, n, c), block, itemsize, offset)
    return _view((N, H, W, C), (n, h, w, c), block, itemsize, offset)


def image_pairs(shape: Sizes, strides: Sizes, box: Box, depth: int, itemsize: int) -> View:
    """t[N, C, H, W] of even H and W as [N, H/2, 2, W/2, 2C]: both parities of both axes."""
    (N, C, H, W), (n, c, h, w) = shape, strides
    pairs, steps = (N, H // 2, 2, W // 2, 2 * C), (n, 2 * h, h, 2 * w, c)
    return _view(pairs, steps, (box[0], box[1], 1, box[2], depth), itemsize)


def rows_first(images: View) -> View:
    """[N, H, W, C] as [H, N, W, C], or pairs of both as [H/2, 2, N, W/2, 2C]."""
    rows = len(images.shape) - 3
    order = (*range(1, rows + 1), 0, rows + 1, rows + 2)
    axes = images.shape, images.strides, images.block
    return View(*([t[axis] for axis in order] for t in axes), images.offset)


def filters(shape: Sizes, strides: Sizes, block: Sequence[int], itemsize: int) -> View:
    """w[K, C, R, S] as [R, S, K, C]."""
    (K, C, R, S), (k, c, r, s) = shape, strides
    return _view((R, S, K, C), (r, s, k, c), (1, 1, *block), itemsize)
