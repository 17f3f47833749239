"""The part of an image that each layer sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from kernels.geometry import ReceptiveField

from ..console import by, table
from ..figures import new_figure
from ..text import caption
from .layers import calls, check_images, field_of
from .pictures import SIZE, colours, frame, pixels, show

Box = tuple[int, int, int, int]
"""Top, left, bottom and right of a rectangle of pixels; the last two are exclusive."""


class Seen(NamedTuple):
    """The box that the pixel ``position`` of a layer's maps sees.

    ``box`` exceeds the image if the layer sees padding.
    """

    layer: str
    field: ReceptiveField
    position: tuple[int, int]
    box: Box


@dataclass(frozen=True)
class ReceptiveFields:
    """What the central pixel of each layer's maps sees of ``image`` [C, H, W]."""

    image: Tensor
    seen: tuple[Seen, ...]

    def __str__(self) -> str:
        """Size and stride of each layer's field, and the pixels spanned by its central one."""
        rows = [("layer", "field", "stride", "pixel", "rows", "columns")]
        for layer, field, position, (top, left, bottom, right) in self.seen:
            spans = f"{top} to {bottom - 1}", f"{left} to {right - 1}"
            place = "{}, {}".format(*position)
            rows.append((layer, by(field.size), by(field.stride), place, *spans))
        return table(rows, "<>>>>>")

    def figure(self) -> Any:
        """The image with one rectangle per layer, dashed if it sees padding.

        At most half the image's size is shown outside the image on each side.
        """
        figure = new_figure("fields", figsize=(SIZE, 0.7 * SIZE), layout="constrained")
        axes = figure.subplots()
        show(axes, pixels(self.image))
        height, width = self.image.shape[1:]
        image = frame(axes, (0, 0, height, width), "0.6", linewidth=0.5)
        for (layer, field, _, box), colour in zip(self.seen, colours(len(self.seen)), strict=True):
            frame(axes, box, colour, linestyle="--", linewidth=1)
            inside = frame(axes, box, colour, label=f"{caption(layer)}  {by(field.size)}")
            inside.set_clip_path(image)
        tops, lefts, bottoms, rights = zip(*(seen.box for seen in self.seen), strict=True)
        axes.set_ylim(*reversed(_limits(tops, bottoms, height)))
        axes.set_xlim(*_limits(lefts, rights, width))
        columns = -(-len(self.seen) // 28)
        figure.legend(loc="outside right center", fontsize=8, frameon=False, ncols=columns)
        return figure


def _limits(first: Sequence[int], last: Sequence[int], side: int) -> tuple[float, float]:
    """The shown range of an axis: the image and all boxes, with a margin, but at most twice the
    image. Pixels are centered on whole numbers.
    """
    margin = 0.02 * side
    low, high = min(0, *first) - margin, max(side, *last) + margin
    return max(low, -side / 2) - 0.5, min(high, 1.5 * side) - 0.5


def window(field: ReceptiveField, p: int, q: int) -> Box:
    """The box that pixel (p, q) of a map sees, including padding outside the image."""
    top, left = (
        offset + stride * place
        for offset, stride, place in zip(field.offset, field.stride, (p, q), strict=True)
    )
    return top, left, top + field.size[0], left + field.size[1]


def receptive_field(
    model: nn.Module, x: Tensor, layers: Sequence[str] | None = None
) -> ReceptiveFields:
    """The receptive field of the central pixel of layers' maps, drawn on the image x[C, H, W].

    ``layers`` are names. The default is all layers with a known field, without those whose field
    equals an earlier one's. A field is the smallest rectangle of pixels on which an output depends,
    along any path; ``cnn.summary`` finds it without computing anything. If the number of rows or
    columns is even, the one after the middle is central.

    Raises ValueError if a layer does not exist or its field is unknown, such as a linear one's,
    which sees everything.

    Example:
        >>> found = visualize.receptive_field(cnn.models.lenet5(), torch.rand(1, 32, 32))
        >>> found.figure().savefig("fields.png")
    """
    check_images(x, "x", "[C, H, W]")
    rows = {row.name: row for row in calls(model, x[None])}
    if layers is None:
        fields = {row.field: row.name for row in reversed(rows.values()) if row.field}
        layers = [name for name in rows if name in fields.values()]
        if not layers:
            raise ValueError("model must have layers whose receptive field is known")
    seen = []
    for name in layers:
        field = rows[name].field if name in rows else None
        field = field or field_of(model, name, x[None])  # raises with the reason
        p, q = (side // 2 for side in rows[name].output_size[-2:])
        seen.append(Seen(name, field, (p, q), window(field, p, q)))
    return ReceptiveFields(x, tuple(seen))
