"""The maps of a layer for an image."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layers import check_images, check_maps, evaluating, outputs
from .pictures import panels, pixels


@dataclass(frozen=True)
class Maps:
    """The strongest maps of one layer for one image.

    ``maps`` [count, P, Q] are sorted by their largest value, the largest first; ``numbers`` [count]
    are their channels; ``image`` [C, H, W] is the input.
    """

    layer: str
    image: Tensor
    numbers: Tensor
    maps: Tensor

    def figure(self) -> Any:
        """The image, then each map from black, its lowest value, to white, its highest."""
        pictures = [pixels(self.image), *pixels_of_each(self.maps)]
        titles = ["image", *(f"{number}" for number in self.numbers.tolist())]
        return panels(pictures, titles, 4 if len(pictures) < 9 else 6, "maps")


def pixels_of_each(values: Tensor) -> Tensor:
    """Maps [count, P, Q] as pictures [count, 1, P, Q], each stretched to the whole range."""
    low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
    return ((values - low) / (high - low).clamp(min=1e-12)).detach().float().cpu()[:, None]


def maps(model: nn.Module, x: Tensor, layer: str, count: int = 16) -> Maps:
    """The ``count`` maps of ``layer`` with the largest values for x[C, H, W].

    Raises ValueError if the layer does not exist or has no maps, and for another kind of x.

    Example:
        >>> found = visualize.maps(cnn.models.lenet5(), torch.rand(1, 32, 32), "features.0", 4)
        >>> found.maps.shape
        torch.Size([4, 14, 14])
    """
    if count < 1:
        raise ValueError(f"count must be positive, got count={count}")
    check_images(x, "x", "[C, H, W]")
    with evaluating(model), torch.no_grad():
        (found,) = check_maps(outputs(model, x[None], [layer])[layer], layer)
    peaks = found.amax((1, 2))
    numbers = peaks.argsort(descending=True, stable=True)[:count]
    return Maps(layer, x, numbers, found[numbers])
