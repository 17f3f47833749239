"""What a layer's filters look for."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .deconvnet import Projections, deconvnet
from .layers import find
from .pictures import SIZE, new_figure, show, signed, tiles


@dataclass(frozen=True)
class Filters:
    """The filters [K, C, R, S] of a layer that sees the image itself, C being 1 or 3."""

    layer: str
    weights: Tensor

    def figure(self) -> Any:
        """The filters as a grid, each from black to white, 0 grey."""
        grid = tiles(signed(self.weights))
        high = SIZE / 2 * grid.shape[1] / grid.shape[2] + 0.3
        figure = new_figure("filters", figsize=(SIZE / 2, high), layout="constrained")
        show(figure.subplots(), grid, f"filters of {self.layer}")
        return figure


def filters(
    model: nn.Module,
    layer: str | None = None,
    images: Tensor | Iterable[Tensor] | None = None,
    *,
    count: int = 64,
    guided: bool = False,
) -> Filters | Projections:
    """The filters of a layer: of the first as they are, of deeper ones as their projections.

    What a deeper filter looks for cannot be seen in its numbers, so it is what made it respond most
    strongly among ``images``, projected to the pixels by ``deconvnet``.

    Args:
        layer: by default the first convolution.
        images: as ``deconvnet`` takes them; not needed for a convolution of one or three channels.
        count: projected filters at most.
        guided: see ``deconvnet``.

    Raises ValueError for a layer that does not exist, and for a deeper one without images.
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
