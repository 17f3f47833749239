"""The maps that a layer makes of an image."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layers import check_images, check_maps, evaluating, outputs
from .pictures import panels, pixels


@dataclass(frozen=True)
class Maps:
    """The strongest maps of one layer on one image.

    ``maps`` [count, P, Q] are in falling order of their largest value, ``numbers`` [count] say
    which of the layer's channels they are, ``image`` [C, H, W] is what the layer saw.
    """

    layer: str
    image: Tensor
    numbers: Tensor
    maps: Tensor

    def figure(self) -> Any:
        """The image, then each map from black, its least value, to white, its largest."""
        pictures = [pixels(self.image), *pixels_of_each(self.maps)]
        titles = ["image", *(f"{number}" for number in self.numbers.tolist())]
        return panels(pictures, titles, 4 if len(pictures) < 9 else 6, "maps")


def pixels_of_each(values: Tensor) -> Tensor:
    """Maps [count, P, Q] as pictures [count, 1, P, Q], each over the whole range of levels."""
    low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
    return ((values - low) / (high - low).clamp(min=1e-12)).detach().float().cpu()[:, None]


def maps(model: nn.Module, x: Tensor, layer: str, count: int = 16) -> Maps:
    """The ``count`` maps of ``layer`` with the largest values on x[C, H, W].

    Raises ValueError for a layer that does not exist or gives no maps, and for another kind of x.
    """
    if count < 1:
        raise ValueError(f"count must be positive, got count={count}")
    check_images(x, "x", "[C, H, W]")
    with evaluating(model), torch.no_grad():
        (found,) = check_maps(outputs(model, x[None], [layer])[layer], layer)
    peaks = found.amax((1, 2))
    numbers = peaks.argsort(descending=True, stable=True)[:count]
    return Maps(layer, x, numbers, found[numbers])
