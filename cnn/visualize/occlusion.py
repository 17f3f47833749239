"""The effect on a network's output of covering a part of the image."""

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import torch
from torch import Tensor, nn

from ..console import Progress, table
from ..figures import new_figure
from ..text import caption
from .layers import (
    calls,
    check_class,
    check_images,
    check_maps,
    class_names,
    evaluating,
    probabilities,
    run,
    wide,
)
from .pictures import SIZE, grey, pixels, show


@dataclass(frozen=True)
class Occlusion:
    """A network's answers while a grey square covers one part of an image after another.

    ``corners`` [rows, columns, 2] are the first row and column of each square, negative if it
    extends beyond the border; ``size`` is its side, ``level`` [C] the value of its pixels.

    ``probability`` [rows, columns] is that of the class ``class_``, and ``answers`` [rows, columns]
    are the most probable classes. Both are None if the network's result is not [N, classes].

    ``activation`` [rows, columns] is the sum of the map ``number`` of ``layer``, the map with the
    largest value for the whole image, ``map`` [P, Q]. All are None for a network without maps.
    ``whole`` has "probability" and "activation", if they exist, without a square.
    """

    image: Tensor
    size: int
    stride: int
    level: Tensor
    corners: Tensor
    whole: dict[str, float]
    class_: int | None = None
    classes: tuple[str, ...] = ()
    probability: Tensor | None = None
    answers: Tensor | None = None
    layer: str | None = None
    number: int | None = None
    map: Tensor | None = None
    activation: Tensor | None = None

    def __str__(self) -> str:
        """Each heat map's extremes, and how often each class is the most probable."""
        rows = [("", "whole image", "least", "of the square at", "most")]
        for title, whole, heat in self._heats():
            corner = "{}, {}".format(*self._corner(heat).tolist())
            rows.append((title, f"{whole:.4g}", f"{heat.min():.4g}", corner, f"{heat.max():.4g}"))
        text = table(rows, "<>>>>")
        if self.answers is None:
            return text
        rows = [("most probable class", "squares")]
        counts = Counter(self.answers.flatten().tolist())
        rows += [(self.classes[number], f"{n:,}") for number, n in counts.most_common()]
        return f"{text}\n\n{table(rows, '<>')}"

    def figure(self) -> Any:
        """The image with the most effective square, heat maps, and most probable classes."""
        heats = self._heats()
        count = 1 + len(heats) + (self.map is not None) + 2 * (self.answers is not None)
        rows, columns = -(-count // 3), min(count, 3)
        height, width = self.image.shape[1:]
        size = SIZE, rows * (SIZE / columns * 0.8 * height / width + 0.4)
        figure = new_figure("occlusion", figsize=size, layout="constrained")
        places = iter(figure.subplots(rows, columns, squeeze=False).flat)
        title, _, heat = heats[0]
        square = covered(self.image, self._corner(heat)[None], self.size, self.level)
        show(next(places), pixels(square[0]), fill(f"least {title}", 30))
        if self.map is not None:
            title = f"map {self.number} of {self.layer}"
            show(next(places), self.map.float().cpu(), title, **_COLOURS)
        for title, whole, heat in reversed(heats):
            axes = next(places)
            title = f"{fill(title, 30)}\n{whole:.3g} without a square"
            drawn = self._draw(axes, heat, title, **_COLOURS)
            figure.colorbar(drawn, ax=axes, shrink=0.8).ax.tick_params(labelsize=8)
        if self.answers is not None:
            self._draw_answers(next(places), next(places), self.answers)
        for axes in places:
            axes.set_visible(False)
        return figure

    def _heats(self) -> list[tuple[str, float, Tensor]]:
        """Title, value without a square, and heat map of everything available."""
        heats = []
        if self.probability is not None:
            title = f"probability of {self.classes[self.class_ or 0]}"
            heats.append((title, self.whole["probability"], self.probability))
        if self.activation is not None:
            title = f"sum of map {self.number} of {self.layer}"
            heats.append((title, self.whole["activation"], self.activation))
        return heats

    def _corner(self, heat: Tensor) -> Tensor:
        """The corner of the square under which ``heat`` is lowest."""
        return self.corners.flatten(0, 1)[int(heat.argmin())]

    def _draw(self, axes: Any, values: Tensor, title: str, **options: Any) -> Any:
        """Draw one value per cell, over the image."""
        rows, columns = (count * self.stride - 0.5 for count in values.shape)
        options |= {"extent": (-0.5, columns, rows, -0.5), "alpha": 0.75}
        show(axes, pixels(self.image).mean(0))
        drawn = show(axes, values.float().cpu(), title, **options)
        height, width = self.image.shape[1:]
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        return drawn

    def _draw_answers(self, axes: Any, names: Any, answers: Tensor) -> None:
        """A color for each of the nine most frequent classes, and a tenth for all others."""
        counts = Counter(answers.flatten().tolist())
        numbers = [number for number, _ in counts.most_common(9)]
        places = torch.full_like(answers, 9)
        for place, number in enumerate(numbers):
            places[answers == number] = place
        options = {"cmap": "tab10", "vmin": -0.5, "vmax": 9.5}
        drawn = self._draw(axes, places, "most probable class", **options)
        labels = [self.classes[number] for number in numbers] + ["others"] * (len(counts) > 9)
        for place, label in enumerate(labels):
            names.scatter([], [], marker="s", color=drawn.cmap(place), label=caption(label))
        names.legend(fontsize=9, loc="center left", frameon=False)
        names.axis("off")


_COLOURS = {"cmap": "viridis", "vmin": None, "vmax": None}


def occlusion(
    model: nn.Module,
    x: Tensor,
    class_: int | None = None,
    layer: str | None = None,
    *,
    size: int | None = None,
    stride: int | None = None,
    classes: Sequence[str] = (),
    batch: int = 64,
) -> Occlusion:
    """Cover one part of an image after another with a grey square and record a network's answers.

    Zeiler and Fergus (2014; arXiv:1311.2901), section 4.2 and figure 7: if the network sees the
    object, not its surroundings, then covering the object makes its class less probable, and its
    strongest map weaker.

    The image is divided into cells of ``stride`` x ``stride`` pixels, from its upper left corner. A
    square is centered on each (a remaining half pixel goes down and right) and may extend beyond
    the border. So every pixel is covered, and a heat map has one value per cell. The square's level
    is 0.5 for an image within 0 and 1, else the mean of each of the image's channels.

    Args:
        x: one image [C, H, W] of floats, as the model takes it.
        class_: class whose probability is recorded; by default the most probable for the whole
            image.
        layer: layer whose strongest map is recorded; by default the last with maps of more than one
            pixel.
        size: side of the square in pixels; by default a fourth of the image's shorter side.
        stride: pixels between squares, at most ``size``; by default a fourth of it.
        classes: names of the classes, for texts.
        batch: number of images passed to the model at once.

    A result [N, classes] counts as logits. Raises ValueError for arguments that do not fit, and for
    a model without classes and maps.

    Example:
        >>> found = visualize.occlusion(cnn.models.lenet5(), torch.rand(1, 32, 32), class_=7)
        >>> found.probability.shape  # one value per cell of 2x2 pixels
        torch.Size([16, 16])
    """
    check_images(x, "x", "[C, H, W]")
    if batch < 1:
        raise ValueError(f"batch must be positive, got batch={batch}")
    size = max(1, min(x.shape[1:]) // 4) if size is None else size
    stride = max(1, size // 4) if stride is None else stride
    corners, shade = _corners(x, size, stride), grey(x[None])[0, :, 0, 0]
    with evaluating(model), torch.no_grad():
        layer = _last_maps(model, x[None]) if layer is None else layer
        chances, maps = _look(model, x[None], layer)
        about: dict[str, Any] = {}
        if chances is not None:
            about["classes"] = class_names(classes, chances.shape[1])
            about["class_"] = int(chances.argmax()) if class_ is None else class_
        if class_ is not None:
            check_class(class_, 0 if chances is None else chances.shape[1], "class_")
        if maps is not None:
            number = int(maps[0].amax((1, 2)).argmax())
            about |= {"layer": layer, "number": number, "map": maps[0, number]}
        if not about:
            raise ValueError("model must give [N, classes], or maps in one of its layers")
        chosen = about.get("class_"), about.get("number")
        whole = _values(chances, maps, *chosen)
        parts = []
        with closing(Progress("occlusion", corners[..., 0].numel(), 0, "image")) as bar:
            for part in corners.flatten(0, 1).split(batch):
                seen = _look(model, covered(x, part, size, shade), layer)
                parts.append(_values(*seen, *chosen))
                bar.tick(len(part))
    for name in whole:
        about[name] = torch.cat([part[name] for part in parts]).view(corners.shape[:2])
    values = {name: float(value) for name, value in whole.items() if name != "answers"}
    return Occlusion(x, size, stride, shade, corners, values, **about)


def covered(x: Tensor, corners: Tensor, size: int, level: Tensor) -> Tensor:
    """Copies [N, C, H, W] of x[C, H, W], each with a square of ``level`` [C] at its corner.

    ``corners`` [N, 2] are the first row and column of each; a square may extend beyond the border.
    """
    inside = []
    for axis in (0, 1):
        first = corners[:, axis, None].to(x.device)
        place = torch.arange(x.shape[1 + axis], device=x.device)
        inside.append((place >= first) & (place < first + size))
    square = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    return torch.where(square, level[:, None, None], x)


def _corners(x: Tensor, size: int, stride: int) -> Tensor:
    if not 1 <= stride <= size:
        raise ValueError(f"stride must be from 1 to size={size}, got stride={stride}")
    over = (size - stride) // 2
    lines, columns = (torch.arange(0, side, stride) - over for side in x.shape[1:])
    return torch.stack(torch.meshgrid(lines, columns, indexing="ij"), -1)


def _last_maps(model: nn.Module, x: Tensor) -> str | None:
    """The last layer with maps, if possible of more than one pixel."""
    maps = [row for row in calls(model, x) if len(row.output_size) == 4]
    large = [row for row in maps if row.output_size[2:] != (1, 1)]
    return next((row.name for row in reversed(large or maps)), None)


def _look(model: nn.Module, images: Tensor, layer: str | None) -> tuple[Any, Any]:
    """Probabilities [N, classes] and the layer's maps [N, K, P, Q]; None for a missing one."""
    result, found = run(model, images, [] if layer is None else [layer])
    return probabilities(result), None if layer is None else check_maps(found[layer], layer)


def _values(
    chances: Tensor | None, maps: Tensor | None, class_: int | None, number: int | None
) -> dict[str, Tensor]:
    """A class's probability, the most probable class, and a map's sum, each [N], if available."""
    values = {}
    if chances is not None:
        values |= {"probability": chances[:, class_], "answers": chances.argmax(1)}
    if maps is not None:
        values["activation"] = wide(maps[:, number]).sum((1, 2))
    return values
