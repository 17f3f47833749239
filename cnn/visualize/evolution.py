"""How what a layer responds to changes while a network is trained."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .deconvnet import Projections, deconvnet
from .pictures import SIZE, new_figure, show, signed


@dataclass(frozen=True)
class Evolution:
    """The projections of the same maps at several epochs."""

    layer: str
    epochs: tuple[int, ...]
    projections: tuple[Projections, ...]

    def figure(self) -> Any:
        """A row a map and a column an epoch: what excited it most among all images, projected."""
        numbers = self.projections[0].numbers.tolist()
        side = SIZE / max(6, len(self.epochs))
        size = side * len(self.epochs) + 0.4, side * len(numbers) + 0.4
        figure = new_figure("an evolution", figsize=size, layout="constrained")
        axes = figure.subplots(len(numbers), len(self.epochs), squeeze=False)
        for column, (epoch, found) in enumerate(zip(self.epochs, self.projections, strict=True)):
            pictures = signed(found.patches()[0][:, 0])
            for row, picture in enumerate(pictures):
                show(axes[row, column], picture, f"epoch {epoch}" if row == 0 else "")
                if column == 0:
                    axes[row, column].set_ylabel(f"{numbers[row]}", fontsize=9)
        return figure


def evolution(
    models: Mapping[int, nn.Module],
    images: Callable[[], Tensor | Iterable[Tensor]],
    layer: str,
    numbers: list[int] | None = None,
    *,
    count: int = 6,
    guided: bool = False,
) -> Evolution:
    """What excites maps of a layer most as training goes on, as in figure 4 of the paper.

    Args:
        models: by epoch, in the order to be shown.
        images: called for each model, returns images as ``deconvnet`` takes them.
        numbers: of the maps; by default the ``count`` strongest of the last model.
        guided: see ``deconvnet``.

    Raises ValueError as ``deconvnet`` does, and without a model.
    """
    if not models:
        raise ValueError("models must hold at least one, got none")
    options: dict[str, Any] = {"count": count, "top": 1, "guided": guided}
    *earlier, last = models
    found = {last: deconvnet(models[last], images(), layer, numbers, **options)}
    numbers = found[last].numbers.tolist()
    for epoch in earlier:
        found[epoch] = deconvnet(models[epoch], images(), layer, numbers, **options)
    return Evolution(layer, tuple(models), tuple(found[epoch] for epoch in models))
