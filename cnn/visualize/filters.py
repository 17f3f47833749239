"""The patterns that a layer's filters respond to, and their change during training."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .deconvnet import Projections, deconvnet
from .layers import find
from .pictures import SIZE, panels, signed, tiles


@dataclass(frozen=True)
class Filters:
    """The filters [K, C, R, S] of a layer that sees the image itself, with C 1 or 3."""

    layer: str
    weights: Tensor

    def figure(self) -> Any:
        """The filters as a grid, each from black to white with 0 as grey."""
        title = f"filters of {self.layer}"
        return panels([tiles(signed(self.weights))], [title], 1, "filters", SIZE / 2)


def filters(
    model: nn.Module,
    layer: str | None = None,
    images: Tensor | Iterable[Tensor] | None = None,
    *,
    count: int = 64,
    guided: bool = False,
) -> Filters | Projections:
    """The filters of a layer: the first layer's as they are, deeper ones' as projections.

    A deeper filter's numbers do not show which pattern it responds to. So its strongest response
    among ``images`` is projected to the pixels by ``deconvnet``.

    Args:
        layer: by default the first convolution.
        images: as in ``deconvnet``; not needed for a convolution of one or three channels.
        count: the most filters to project.
        guided: see ``deconvnet``.

    Raises ValueError if the layer does not exist, or is a deeper one and images are missing.

    Example:
        >>> visualize.filters(cnn.models.lenet5()).figure().savefig("filters.png")
    """
    if layer is None:
        convolutions = (name for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
        layer = next(convolutions, None)
        if layer is None:
            raise ValueError("model must have a Conv2d, got one without")
    module = find(model, layer)
    if isinstance(module, nn.Conv2d) and module.weight.shape[1] in (1, 3) and module.groups == 1:
        return Filters(layer, module.weight.detach().cpu())
    if images is None:
        raise ValueError(f"images must be given to project a deeper layer, got layer={layer!r}")
    return deconvnet(model, images, layer, count=count, top=1, guided=guided)


@dataclass(frozen=True)
class Evolution:
    """The projections of the same maps at several epochs."""

    layer: str
    epochs: tuple[int, ...]
    projections: tuple[Projections, ...]

    def figure(self) -> Any:
        """A row per map and a column per epoch: the strongest activation of all, projected."""
        numbers, columns = self.projections[0].numbers.tolist(), len(self.epochs)
        strongest = [signed(found.patches()[0][:, 0]) for found in self.projections]
        pictures = [found[row] for row in range(len(numbers)) for found in strongest]
        titles = [f"epoch {epoch}" for epoch in self.epochs] + [""] * (len(pictures) - columns)
        width = SIZE * columns / max(6, columns) + 0.4
        figure = panels(pictures, titles, columns, "an evolution", width)
        for number, axes in zip(numbers, figure.axes[::columns], strict=True):
            axes.set_ylabel(f"{number}", fontsize=9)
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
    """The strongest activations of a layer's maps over the epochs, as in figure 4 of the paper.

    Args:
        models: models by epoch, in the order to show them.
        images: a function, called for each model, that returns images as in ``deconvnet``.
        numbers: the maps; by default the ``count`` strongest of the last model.
        guided: see ``deconvnet``.

    Raises ValueError as ``deconvnet`` does, and without a model.

    Example:
        >>> images = torch.rand(8, 1, 32, 32)
        >>> models = {epoch: cnn.models.lenet5() for epoch in (1, 2)}
        >>> found = visualize.evolution(models, lambda: images, "features.2", count=2)
        >>> found.figure().savefig("evolution.png")
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
