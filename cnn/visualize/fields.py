"""Where in an image a map's pixel looks. Positions and sizes in pixels, rows before columns."""

from torch import Tensor

from kernels.geometry import ReceptiveField

Box = tuple[int, int, int, int]
"""Top, left, bottom and right of a rectangle of pixels; the last two are the first outside it."""


def window(field: ReceptiveField, p: int, q: int) -> Box:
    """What pixel (p, q) of a map sees, with what lies in the padding outside the image."""
    top, left = (
        offset + stride * place
        for offset, stride, place in zip(field.offset, field.stride, (p, q), strict=True)
    )
    return top, left, top + field.size[0], left + field.size[1]


def box(field: ReceptiveField, p: int, q: int, height: int, width: int) -> Box:
    """What pixel (p, q) of a map sees of an image: empty where that is padding alone."""
    top, left, bottom, right = window(field, p, q)
    top, bottom = (min(max(row, 0), height) for row in (top, bottom))
    left, right = (min(max(column, 0), width) for column in (left, right))
    return top, left, bottom, right


def patch(x: Tensor, field: ReceptiveField, p: int, q: int) -> Tensor:
    """The part [C, h, w] of x[C, H, W] that pixel (p, q) of a map sees. It shares x's memory."""
    top, left, bottom, right = box(field, p, q, x.shape[-2], x.shape[-1])
    return x[..., top:bottom, left:right]
