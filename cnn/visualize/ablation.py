"""What a trained network is worth without one of its layers or maps."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data import UNCOUNTED
from ..evaluate import tally
from ..journal import Progress, new_figure
from ..summary import table
from ..text import caption
from .layers import calls, check_class, evaluating, find, first_tensor, hooked, outputs
from .pictures import SIZE

Batches = Sequence[tuple[Tensor, Tensor]] | DataLoader
"""Images [N, ...] as a model takes them and their labels [N], of integers; gone over repeatedly."""

Change = Callable[[Tensor, Tensor], Tensor | None]
"""From a layer's input and result to what is put in the result's place, None to leave it."""

LISTED = 20
"""Maps in a table."""


class Score(NamedTuple):
    """Share of images that are classified right, and mean cross-entropy in nats."""

    accuracy: float
    loss: float


class Removal(NamedTuple):
    """Layers that were removed together, how many parameters they have, and what was left."""

    layers: tuple[str, ...]
    parameters: int
    score: Score


@dataclass(frozen=True)
class Ablation:
    """What a network's layers are worth to it: ``whole`` is its score with all of them.

    ``how`` they were removed is "mean", "zero" or "skip"; ``images`` is how many were classified.
    """

    how: str
    images: int
    whole: Score
    removals: tuple[Removal, ...]

    def __str__(self) -> str:
        """A line a removal: the share of wrong answers, its change, and the loss."""
        rows = [("without", "parameters", "error", "change", "loss")]
        for layers, parameters, (accuracy, loss) in (Removal((), 0, self.whole), *self.removals):
            change = f"{self.whole.accuracy - accuracy:+.2%}" if layers else ""
            numbers = f"{parameters:,}", f"{1 - accuracy:.2%}", change, f"{loss:.4f}"
            rows.append((" + ".join(layers) or "-", *numbers))
        return table(rows, "<>>>>")

    def figure(self) -> Any:
        """Error and loss without each of the layers, as bars; lines show those of the whole."""
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
    """Bars, and a line where the whole network is."""
    axes.barh(range(len(values)), values, color="tab:blue")
    axes.set_xlabel(what)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return axes.axvline(whole, color="0.3", linestyle="--", linewidth=1)


@dataclass(frozen=True)
class MapAblation:
    """What a layer's single maps are worth to a network: ``whole`` is its score with all of them.

    ``accuracies`` and ``losses`` [count] are those without the map of ``numbers`` [count].
    """

    layer: str
    how: str
    images: int
    whole: Score
    numbers: Tensor
    accuracies: Tensor
    losses: Tensor

    @property
    def order(self) -> Tensor:
        """Places in ``numbers``, those first without which the loss is largest."""
        return self.losses.argsort(descending=True, stable=True)

    def __str__(self) -> str:
        """The maps that matter most, at most twenty: error, its change, and the loss."""
        rows = [(f"without map of {self.layer}", "error", "change", "loss")]
        rows.append(("-", f"{1 - self.whole.accuracy:.2%}", "", f"{self.whole.loss:.4f}"))
        for place in self.order[:LISTED].tolist():
            accuracy, loss = self.accuracies[place].item(), self.losses[place]
            change = f"{self.whole.accuracy - accuracy:+.2%}"
            rows.append((f"{self.numbers[place]}", f"{1 - accuracy:.2%}", change, f"{loss:.4f}"))
        return table(rows, "<>>>")

    def figure(self) -> Any:
        """How much accuracy is lost and loss is added without each map, as bars."""
        figure = new_figure("ablation", figsize=(SIZE, 4), layout="constrained")
        one, other = figure.subplots(2, 1, sharex=True)
        places = self.order
        for axes, what, values in (
            (one, "error added, in points", 100 * (self.whole.accuracy - self.accuracies)),
            (other, "loss added", self.losses - self.whole.loss),
        ):
            axes.bar(range(len(places)), values[places].tolist(), color="tab:blue")
            axes.axhline(0, color="0.3", linewidth=0.8)
            axes.set_ylabel(what, fontsize=9)
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
        small = len(places) <= 64
        if small:
            names = [f"{number}" for number in self.numbers[places].tolist()]
            other.set_xticks(range(len(places)), names, fontsize=7, rotation=90)
        layer = caption(self.layer)
        other.set_xlabel(f"map of {layer}" if small else f"maps of {layer}, sorted")
        return figure


def ablation(
    model: nn.Module,
    batches: Batches,
    layers: Sequence[str | Sequence[str]] | None = None,
    how: str = "mean",
) -> Ablation:
    """How well a trained network classifies without one of its layers, or several at once.

    Args:
        batches: a list of pairs (x, labels), a DataLoader or the like, gone over once for the whole
            network and once for each removal. Images go to where the model's parameters are.
        layers: a name, or a group of names, for each removal. By default each layer that has
            parameters, or of these what can be skipped.
        how: "mean" puts in the place of each of a layer's maps (axis 1 of its result) the mean that
            the whole network's map has over all images and pixels, "zero" zeros. So behind the
            layer, nothing of the image is left but what goes around it. "skip" passes the layer's
            input on: for layers whose result has its size.

    Zeiler and Fergus (2014; arXiv:1311.2901), section 5.1 and table 3, remove layers before the
    training and so find what the others can make up for. Here nothing is learnt anew, which tells
    what a trained network relies on. For theirs, train networks with and without the layers by
    ``python -m cnn train`` and compare what ``python -m cnn eval`` says of them.

    Raises ValueError for arguments that do not fit.
    """
    _check_how(how, ("mean", "zero", "skip"))
    x = _first(model, batches)
    with evaluating(model), torch.no_grad():
        groups = _groups(model, x, layers, how)
        removed = [dict.fromkeys(group, slice(None)) for group in groups]
        images, whole, scores = _scores(model, batches, len(x), removed, how)
    removals = [
        Removal(group, _parameters(model, group), score)
        for group, score in zip(groups, scores, strict=True)
    ]
    return Ablation(how, images, whole, tuple(removals))


def map_ablation(
    model: nn.Module,
    batches: Batches,
    layer: str,
    maps: Sequence[int] | None = None,
    how: str = "zero",
) -> MapAblation:
    """How well a trained network classifies without one of a layer's maps, each in turn.

    Args:
        batches: as ``ablation`` has them; gone over once for the whole network and for each map.
        layer: whose result has maps, or single values, in axis 1.
        maps: their numbers; by default all.
        how: "zero" or "mean", what is put in the map's place, as in ``ablation``.

    Raises ValueError for arguments that do not fit.
    """
    _check_how(how, ("mean", "zero"))
    x = _first(model, batches)
    with evaluating(model), torch.no_grad():
        count = outputs(model, x, [layer])[layer].shape[1]
        numbers = list(range(count) if maps is None else maps)
        for number in numbers:
            if not 0 <= number < count:
                raise ValueError(f"maps must be from 0 to {count - 1}, got {number}")
        removed = [{layer: slice(number, number + 1)} for number in numbers]
        images, whole, scores = _scores(model, batches, len(x), removed, how)
    accuracies, losses = torch.tensor(scores, dtype=torch.float64).view(-1, 2).unbind(1)
    found = torch.tensor(numbers, dtype=torch.int64)
    return MapAblation(layer, how, images, whole, found, accuracies, losses)


def _check_how(how: str, known: Sequence[str]) -> None:
    if how not in known:
        raise ValueError(f"how must be one of {', '.join(known)}, got how={how!r}")


def _first(model: nn.Module, batches: Batches) -> Tensor:
    """The images of the first batch, where the model is."""
    if not isinstance(batches, Sized) or not len(batches):
        kind = type(batches).__name__
        raise ValueError(f"batches must be a list or a DataLoader that is not empty, got a {kind}")
    images, _ = next(iter(batches))
    return images.to(_place(model, images))


def _place(model: nn.Module, images: Tensor) -> torch.device:
    return next((p.device for p in model.parameters()), images.device)


def _groups(
    model: nn.Module, x: Tensor, layers: Sequence[str | Sequence[str]] | None, how: str
) -> list[tuple[str, ...]]:
    """What is removed together, by names that were checked."""
    if layers is None:
        names = list(dict.fromkeys(row.name for row in calls(model, x) if row.parameters))
        sizes = _sizes(model, x, names)
        return [(name,) for name in names if how != "skip" or sizes[name][0] == sizes[name][1]]
    groups = [(group,) if isinstance(group, str) else tuple(group) for group in layers]
    sizes = _sizes(model, x, [name for group in groups for name in group])
    for name, (before, after) in sizes.items():
        if how == "skip" and before != after:
            change = f"{list(before)} to {list(after)}"
            raise ValueError(f"layer must keep its input's size, got layer={name!r} from {change}")
    return groups


def _sizes(
    model: nn.Module, x: Tensor, names: Sequence[str]
) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Those of what layers get and give."""
    sizes = {}

    def look(name: str, x: Tensor, y: Tensor) -> None:
        sizes[name] = x.shape, y.shape

    with _changed(model, {name: partial(look, name) for name in names}):
        model(x)
    for name in names:
        if name not in sizes:
            raise ValueError(f"layer must be called, got layer={name!r}")
    return sizes


@contextmanager
def _changed(model: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
    """The model with changes of what layers give."""

    def apply(name: str, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            raise ValueError(f"layer must turn a tensor into a tensor, got layer={name!r}")
        return changes[name](args[0], output)

    with hooked(model, changes, apply):
        yield


class _Mean:
    """A change that changes nothing, and takes the mean of each map meanwhile."""

    def __init__(self) -> None:
        self._sum: Any = 0
        self._count = 0

    def __call__(self, x: Tensor, y: Tensor) -> None:
        axes = [axis for axis in range(y.dim()) if axis != 1]
        self._sum = self._sum + y.sum(axes, dtype=torch.float64)
        self._count += y[:, 0].numel()

    @property
    def value(self) -> Tensor:
        """Of each map [K]."""
        return self._sum / self._count


def _change(how: str, mean: _Mean | None, maps: slice) -> Change:
    """What removes ``maps`` of a layer, or skips it."""
    if how == "skip":
        return lambda x, y: x.clone()  # what comes next may work in place

    def fill(x: Tensor, y: Tensor) -> Tensor:
        levels = mean.value.to(y)[maps] if mean else y.new_zeros(1)
        y = y.clone()
        y[:, maps] = levels.view(-1, *[1] * (y.dim() - 2))
        return y

    return fill


def _scores(
    model: nn.Module,
    batches: Batches,
    batch: int,
    removed: Sequence[Mapping[str, slice]],
    how: str,
) -> tuple[int, Score, list[Score]]:
    """How many images there are, and how well the model classifies them: with all its maps, and
    without those of each removal.
    """
    names = {name for removal in removed for name in removal}
    means = {name: _Mean() for name in names} if how == "mean" else {}
    total = batch * len(batches) * (1 + len(removed))
    with closing(Progress("ablation", total, 0, "image")) as bar:
        count, whole = _score(model, batches, means, bar)
        scores = []
        for removal in removed:
            changes = {name: _change(how, means.get(name), maps) for name, maps in removal.items()}
            scores.append(_score(model, batches, changes, bar)[1])
    return count, whole, scores


def _score(
    model: nn.Module, batches: Batches, changes: Mapping[str, Change], bar: Progress
) -> tuple[int, Score]:
    """How many images there are, and how well the model with changes classifies them."""
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
    """How many parameters layers have together."""
    return sum(p.numel() for p in {p for name in names for p in find(model, name).parameters()})
