"""The change of a network's features when an image is shifted, magnified or rotated."""

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..console import Progress, table
from ..figures import new_figure
from ..text import caption
from .layers import (
    calls,
    check_class,
    check_images,
    class_names,
    evaluating,
    probabilities,
    run_in_batches,
    wide,
)
from .pictures import pixels, show, tiles

UNITS = {"translation": "pixels down", "scale": "times", "rotation": "degrees anticlockwise"}
"""The transforms, and the units of their steps."""

NEUTRAL = {"translation": 0.0, "scale": 1.0, "rotation": 0.0}
SHOWN = 5
"""The number of images, and of steps of each, in a figure."""


@dataclass(frozen=True)
class Curves:
    """The effect of one transform on N images at each of its S ``steps``.

    ``distances`` [layers, N, S] are Euclidean, between a layer's values for the original and the
    transformed image. ``probability`` [N, S] is that of the image's class, None without classes.
    """

    steps: tuple[float, ...]
    distances: Tensor
    probability: Tensor | None


@dataclass(frozen=True)
class Invariance:
    """The curves of each transform for ``images`` [N, C, H, W], and the layers that they belong to.

    ``labels`` [N] are the classes of ``probability``, ``classes`` the names of all classes.
    """

    images: Tensor
    layers: tuple[str, ...]
    curves: dict[str, Curves]
    labels: Tensor | None
    classes: tuple[str, ...]

    def __str__(self) -> str:
        """Means over the images, one line per step."""
        rows: list[tuple[str, ...]] = [("transform", "step", *self._titles())]
        for kind, curves in self.curves.items():
            means = [lines.mean(0).tolist() for lines in self._lines(curves)]
            for step, *values in zip(curves.steps, *means, strict=True):
                rows.append((kind, f"{step:g}", *(f"{value:.4g}" for value in values)))
        return table(rows, "<" + ">" * len(rows[0][1:]))

    def figure(self) -> Any:
        """One row per transform: the first images, distances in each layer, probabilities.

        Images that are not shown have grey lines.
        """
        titles = self._titles()
        columns = 1 + len(titles)
        options = {"figsize": (3 * columns, 2.7 * len(self.curves)), "layout": "constrained"}
        figure = new_figure("invariance", **options)
        places = figure.subplots(len(self.curves), columns, squeeze=False)
        for row, (kind, curves) in zip(places, self.curves.items(), strict=True):
            self._show_examples(row[0], kind, curves.steps)
            for axes, title, lines in zip(row[1:], titles, self._lines(curves), strict=True):
                for number, line in enumerate(lines.cpu()):
                    style = {
                        "label": caption(self._name(number)),
                        "color": f"C{number}",
                        "zorder": 3,
                    }
                    shown = style if number < SHOWN else {"color": "0.75"}
                    axes.plot(curves.steps, line, linewidth=1.2, **shown)
                axes.set_title(caption(title), fontsize=9)
                axes.set_xlabel(UNITS[kind], fontsize=8)
                axes.tick_params(labelsize=8)
                axes.set_ylim(bottom=0)
                axes.grid(alpha=0.3)
        handles, names = places[0, 1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=SHOWN, fontsize=8)
        return figure

    def _titles(self) -> list[str]:
        """The titles of the result of ``_lines``."""
        distances = [f"distance in {name}" for name in self.layers]
        return distances if self.labels is None else [*distances, "probability"]

    def _lines(self, curves: Curves) -> list[Tensor]:
        """Distances [N, S] in each layer, and probabilities [N, S] if there are any."""
        chances = [] if curves.probability is None else [curves.probability]
        return [*curves.distances, *chances]

    def _name(self, number: int) -> str:
        if self.labels is None:
            return f"image {number + 1}"
        return f"image {number + 1}: {self.classes[int(self.labels[number])]}"

    def _show_examples(self, axes: Any, kind: str, steps: Sequence[float]) -> None:
        """The first images, one per row, at steps from the first to the last."""
        count = min(SHOWN, len(steps))
        chosen = [steps[round(n)] for n in torch.linspace(0, len(steps) - 1, count).tolist()]
        moved = [pixels(transformed(self.images[:SHOWN], kind, step)) for step in chosen]
        whole = tiles(torch.stack(moved, 1).flatten(0, 1), count)
        title = f"{kind}: {', '.join(f'{step:g}' for step in chosen)}"
        show(axes, whole, title, interpolation="antialiased")


def transformed(images: Tensor, kind: str, step: float) -> Tensor:
    """Images [N, C, H, W] with their content transformed by bilinear interpolation.

    Args:
        kind: "translation": ``step`` pixels down; "scale": ``step`` times as large, about the
            center; "rotation": by ``step`` degrees anticlockwise, about the center.

    Content from outside the image repeats the pixels of its border. A step without effect (0, 1, or
    full turns) returns the images themselves. Raises ValueError for another kind, a scale that is
    not positive, and images that are not floats [N, C, H, W].
    """
    _check_step(kind, step)
    check_images(images, "images")
    step = step % 360 if kind == "rotation" else step
    if step == NEUTRAL[kind]:
        return images
    height, width = images.shape[2:]
    # The position in the image from which each pixel of the result comes, in -1 to 1.
    if kind == "translation":
        rows = (1, 0, 0), (0, 1, -2 * step / height)
    elif kind == "scale":
        rows = (1 / step, 0, 0), (0, 1 / step, 0)
    else:
        cos, sin = math.cos(math.radians(step)), math.sin(math.radians(step))
        rows = (cos, -sin * height / width, 0), (sin * width / height, cos, 0)
    source = wide(images)
    matrix = source.new_tensor(rows).expand(len(images), 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(source, grid, padding_mode="border", align_corners=False)
    return moved.to(images.dtype)


def _check_step(kind: str, step: float) -> None:
    if kind not in UNITS:
        raise ValueError(f"transform must be one of {', '.join(UNITS)}, got {kind!r}")
    if not math.isfinite(step) or (kind == "scale" and step <= 0):
        sign = "positive and " if kind == "scale" else ""
        raise ValueError(f"step of {kind} must be {sign}finite, got step={step}")


def _steps(height: int) -> dict[str, tuple[float, ...]]:
    """The steps of the paper's figure, but shifts by whole pixels in proportion to the height."""
    shift = max(1, round(height * 10 / 224))
    return {
        "translation": tuple(float(shift * n) for n in range(-6, 7)),
        "scale": tuple(1 + n / 10 for n in range(9)),
        "rotation": tuple(float(degrees) for degrees in range(0, 360, 15)),
    }


def invariance(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str] | None = None,
    labels: Sequence[int] | Tensor | None = None,
    *,
    steps: Mapping[str, Sequence[float]] | None = None,
    classes: Sequence[str] = (),
    batch: int = 64,
) -> Invariance:
    """The change of a network's features and answers when images are shifted, magnified or rotated.

    Zeiler and Fergus (2014; arXiv:1311.2901), section 4, "Feature invariance", and figure 5: small
    transforms change the first layer a lot and the last ones little, and except for rotations they
    hardly change the answers.

    Args:
        images: floats [N, C, H, W], as the model takes them.
        layers: layers whose values are compared; by default the first with maps, and the last
            before the output.
        labels: N classes whose probabilities are reported; by default the most probable ones.
        steps: the steps of each transform of ``transformed`` to apply. By default those of the
            paper's figure: shifts by up to 27 % of the height, scales from 1 to 1.8, a full turn.
        classes: names of the classes, for texts.
        batch: number of images passed to the model at once. All images' features are kept.

    A result [N, classes] counts as logits; for any other there are only distances. Raises
    ValueError for arguments that do not fit.

    Example:
        >>> curves = visualize.invariance(cnn.models.lenet5(), torch.rand(2, 1, 32, 32))
        >>> curves.figure().savefig("invariance.png")
    """
    check_images(images, "images")
    if not len(images):
        raise ValueError("images must hold at least one image, got none")
    if batch < 1:
        raise ValueError(f"batch must be positive, got batch={batch}")
    wanted = _steps(images.shape[2]) if steps is None else steps
    for kind, values in wanted.items():
        for step in values:
            _check_step(kind, step)
    if layers is not None and not layers:
        raise ValueError(f"layers must not be empty, got layers={layers}")
    if not wanted or not all(map(len, wanted.values())):
        raise ValueError(f"steps must not be empty, got steps={steps}")
    curves, total = {}, len(images) * sum(map(len, wanted.values()))
    bar = Progress("invariance", total, 0, "image")
    with closing(bar), evaluating(model), torch.no_grad():
        names = tuple(_ends(model, images[:1]) if layers is None else layers)
        result, begin = run_in_batches(model, images, names, batch)
        chances = probabilities(result)
        known = _labels(chances, images, labels)
        for kind, values in wanted.items():
            distances, found = [], []
            for step in values:
                moved = transformed(images, kind, step)
                result, after = run_in_batches(model, moved, names, batch)
                changes = [(wide(after[name]) - wide(begin[name])).flatten(1) for name in names]
                distances.append(torch.stack([change.norm(dim=1) for change in changes]))
                if known is not None and (chances := probabilities(result)) is not None:
                    found.append(chances.gather(1, known[:, None])[:, 0])
                bar.tick(len(images))
            probability = torch.stack(found, 1) if found else None
            curves[kind] = Curves(tuple(values), torch.stack(distances, 2), probability)
    texts = () if chances is None else class_names(classes, chances.shape[1])
    return Invariance(images, names, curves, known, texts)


def _labels(
    chances: Tensor | None, images: Tensor, labels: Sequence[int] | Tensor | None
) -> Tensor | None:
    """The classes [N] whose probabilities are reported."""
    if labels is None:
        return None if chances is None else chances.argmax(1)
    numbers = torch.as_tensor(labels, dtype=torch.int64, device=images.device)
    if numbers.shape != images.shape[:1]:
        raise ValueError(f"labels must be {len(images)} classes, got {list(numbers.shape)}")
    for number in numbers.tolist():
        check_class(number, 0 if chances is None else chances.shape[1], "labels")
    return numbers


def _ends(model: nn.Module, images: Tensor) -> dict[str, None]:
    """The first layer with maps, and the last but one."""
    layers = calls(model, images)
    maps = [row.name for row in layers if len(row.output_size) == 4]
    names = [row.name for row in layers]
    return dict.fromkeys([(maps or names)[0], names[-2:][0]])
