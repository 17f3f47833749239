"""A trained network's accuracy without one of its layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..console import Progress, table
from ..data import UNCOUNTED
from ..figures import new_figure
from ..text import caption
from ..training.evaluate import tally
from .layers import calls, check_class, evaluating, find, first_tensor, hooked, outputs
from .pictures import SIZE

Batches = Sequence[tuple[Tensor, Tensor]] | DataLoader
"""Pairs of model inputs [N, ...] and integer labels [N]; iterated over several times."""

Change = Callable[[Tensor], Tensor | None]
"""A function from a layer's result to its replacement; None leaves the result unchanged."""


class Score(NamedTuple):
    """Share of images that are classified correctly, and mean cross-entropy in nats."""

    accuracy: float
    loss: float


class Removal(NamedTuple):
    """Layers that were removed together, their number of parameters, and the score without them."""

    layers: tuple[str, ...]
    parameters: int
    score: Score


@dataclass(frozen=True)
class Ablation:
    """A network's score without each of its layers; ``whole`` is the score with all of them.

    ``how`` is "mean" or "zero", the replacement; ``images`` is the number of images classified.
    """

    how: str
    images: int
    whole: Score
    removals: tuple[Removal, ...]

    def __str__(self) -> str:
        """One line per removal: the share of wrong answers, its change, and the loss."""
        rows = [("without", "parameters", "error", "change", "loss")]
        for layers, parameters, (accuracy, loss) in (Removal((), 0, self.whole), *self.removals):
            change = f"{self.whole.accuracy - accuracy:+.2%}" if layers else ""
            numbers = f"{parameters:,}", f"{1 - accuracy:.2%}", change, f"{loss:.4f}"
            rows.append((" + ".join(layers) or "-", *numbers))
        return table(rows, "<>>>>")

    def figure(self) -> Any:
        """Error and loss without each of the layers as bars; lines show the whole network's."""
        names = [" + ".join(removal.layers) for removal in self.removals]
        size = SIZE, 1.3 + 0.25 * len(names)
        figure = new_figure("ablation", figsize=size, layout="constrained")
        one, other = figure.subplots(1, 2, sharey=True)
        scores = [self.whole, *(removal.score for removal in self.removals)]
        line = _bars(one, "error in %", *(100 * (1 - score.accuracy) for score in scores))
        _bars(other, "loss", *(score.loss for score in scores))
        one.set_yticks(range(len(names)), [*map(caption, names)])
        one.invert_yaxis()
        figure.legend([line], ["the whole network"], loc="outside upper right", fontsize=8)
        return figure


def _bars(axes: Any, what: str, whole: float, *values: float) -> Any:
    """Bars, and a line for the whole network."""
    axes.barh(range(len(values)), values, color="tab:blue")
    axes.set_xlabel(what)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return axes.axvline(whole, color="0.3", linestyle="--", linewidth=1)


def ablation(
    model: nn.Module,
    batches: Batches,
    layers: Sequence[str | Sequence[str]] | None = None,
    how: str = "mean",
) -> Ablation:
    """Measure how well a trained network classifies without one of its layers, or several at once.

    Args:
        batches: a list of pairs (x, labels), a DataLoader or the like, iterated over once for the
            whole network and once per removal. Images are moved to the model's parameters.
        layers: a name, or a group of names, for each removal. By default each layer with
            parameters.
        how: "mean" replaces each of a layer's maps (axis 1 of its result) by the map's mean over
            all images and pixels in the whole network; "zero" replaces it by zeros. After the
            layer, only paths around it still carry information about the image.

    Zeiler and Fergus (2014; arXiv:1311.2901), section 5.1 and table 3, remove layers before the
    training and so find what the others can make up for. Here nothing is trained again, which shows
    what a trained network relies on. To repeat their experiment, train networks with and without
    the layers by ``python -m cnn train`` and compare the results of ``python -m cnn eval``.

    Raises ValueError for arguments that do not fit.

    Example:
        >>> batches = [(torch.rand(8, 1, 32, 32), torch.arange(8))]
        >>> result = visualize.ablation(cnn.models.lenet5(), batches, ["features.0"])
        >>> print(result)  # doctest: +SKIP
    """
    if how not in ("mean", "zero"):
        raise ValueError(f"how must be one of mean, zero, got how={how!r}")
    x = _first(model, batches)
    with evaluating(model), torch.no_grad():
        groups = _groups(model, x, layers)
        names = {name for group in groups for name in group}
        means = {name: _Mean() for name in names} if how == "mean" else {}
        total = len(x) * len(batches) * (1 + len(groups))
        with closing(Progress("ablation", total, 0, "image")) as bar:
            images, whole = _score(model, batches, means, bar)
            removals = []
            for group in groups:
                changes = {name: _constant(means.get(name)) for name in group}
                _, score = _score(model, batches, changes, bar)
                removals.append(Removal(group, _parameters(model, group), score))
    return Ablation(how, images, whole, tuple(removals))


def _first(model: nn.Module, batches: Batches) -> Tensor:
    """The images of the first batch, on the model's device."""
    if not isinstance(batches, Sized) or not len(batches):
        kind = type(batches).__name__
        raise ValueError(f"batches must be a list or a DataLoader that is not empty, got a {kind}")
    images, _ = next(iter(batches))
    return images.to(_place(model, images))


def _place(model: nn.Module, images: Tensor) -> torch.device:
    return next((p.device for p in model.parameters()), images.device)


def _groups(
    model: nn.Module, x: Tensor, layers: Sequence[str | Sequence[str]] | None
) -> list[tuple[str, ...]]:
    """The groups of layers to remove, with checked names."""
    if layers is None:
        layers = list(dict.fromkeys(row.name for row in calls(model, x) if row.parameters))
    groups = [(group,) if isinstance(group, str) else tuple(group) for group in layers]
    outputs(model, x, [name for group in groups for name in group])
    return groups


@contextmanager
def _changed(model: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
    """A context in which the results of the model's layers are changed."""

    def apply(name: str, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor):
            raise ValueError(f"layer must give a tensor, got layer={name!r}")
        return changes[name](output)

    with hooked(model, changes, apply):
        yield


class _Mean:
    """A change that leaves results unchanged, and accumulates the mean of each map."""

    def __init__(self) -> None:
        self._sum: Any = 0
        self._count = 0

    def __call__(self, y: Tensor) -> None:
        axes = [axis for axis in range(y.dim()) if axis != 1]
        self._sum = self._sum + y.sum(axes, dtype=torch.float64)
        self._count += y[:, 0].numel()

    @property
    def value(self) -> Tensor:
        """The mean of each map [K]."""
        return self._sum / self._count


def _constant(mean: _Mean | None) -> Change:
    """A change that replaces each map by its mean or zero, in a tensor that may be modified."""

    def fill(y: Tensor) -> Tensor:
        levels = mean.value.to(y) if mean else y.new_zeros(1)
        return torch.empty_like(y).copy_(levels.view(-1, *[1] * (y.dim() - 2)))

    return fill


def _score(
    model: nn.Module, batches: Batches, changes: Mapping[str, Change], bar: Progress
) -> tuple[int, Score]:
    """The number of images, and the score of the changed model."""
    totals: Any = torch.zeros(3, dtype=torch.float64)
    with _changed(model, changes):
        for images, labels in batches:
            logits = first_tensor(model(images.to(_place(model, images))))
            if logits is None or logits.dim() != 2:
                given = "no tensor" if logits is None else list(logits.shape)
                raise ValueError(f"model must give logits [N, classes], got {given}")
            for number in labels[labels != UNCOUNTED].unique().tolist():
                check_class(number, logits.shape[1], "labels")
            logits, labels = logits.float(), labels.to(logits.device)
            loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=UNCOUNTED)
            totals += tally(logits, labels, loss).cpu()
            bar.tick(len(images))
    loss, right, count = totals.tolist()
    if not count:
        raise ValueError("batches must hold images with labels")
    return int(count), Score(right / count, loss / count)


def _parameters(model: nn.Module, names: Sequence[str]) -> int:
    """The number of parameters in all of the layers."""
    return sum(p.numel() for p in {p for name in names for p in find(model, name).parameters()})
