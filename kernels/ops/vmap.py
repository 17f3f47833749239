"""torch.vmap over operators: the mapped axis joins the batch, or the channels as groups."""

from typing import Any

from torch import Tensor

IMAGES, CHANNELS = 0, 1
_FILTERS = ("w", "bias")


def convolution(op: Any, size: int, dims: Any, a: Any) -> tuple[Any, Any]:
    """The rule of an operator that gives a convolution of images with filters."""
    axis = joined(dims)
    return at_once(op, size, dims, a, axis, axis)


def over_batch(op: Any, size: int, dims: Any, a: Any) -> tuple[Any, Any]:
    """The rule of an operator that gives images, and does not mix those it is given."""
    return at_once(op, size, dims, a, IMAGES, IMAGES)


def joined(dims: Any) -> int:
    """The axis that the mapped one joins: the batch, unless it has filters of its own."""
    return IMAGES if dims.w is None and dims.bias is None else CHANNELS


def at_once(op: Any, size: int, dims: Any, a: Any, axis: int, *axes: int | None) -> tuple[Any, Any]:
    """All mapped problems in one call: its results, and which of their axes is the mapped one.

    In each image the mapped axis joins ``axis``; in the channels each problem is a group with its
    own filters. ``axes`` are where the results have it, None of one that is not wanted.
    """
    folded = {
        name: _fold(t, getattr(dims, name), size, 0 if name in _FILTERS else axis)
        for name, t in a._asdict().items()
        if isinstance(t, Tensor) and (axis == CHANNELS or name not in _FILTERS)
    }
    if axis == CHANNELS and "groups" in a._fields:
        folded["groups"] = a.groups * size
    made = op.overload(*a._replace(**folded))
    if isinstance(made, Tensor):
        return _unfold(made, size, axes[0]), axes[0]
    return tuple(_unfold(t, size, at) for t, at in zip(made, axes, strict=True)), axes


def _fold(t: Tensor, dim: int | None, size: int, axis: int) -> Tensor:
    """The mapped axis ``dim`` of t merged into ``axis``, slower than it; an unmapped t repeats."""
    if dim is None:
        t = t.unsqueeze(axis).expand(*t.shape[:axis], size, *t.shape[axis:])
    else:
        t = t.movedim(dim, axis)
    return t.flatten(axis, axis + 1)


def _unfold(t: Tensor, size: int, axis: int | None) -> Tensor:
    return t if axis is None else t.unflatten(axis, (size, t.shape[axis] // size))
