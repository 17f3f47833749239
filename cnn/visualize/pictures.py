"""Turn tensors into pictures, and pictures into matplotlib figures."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..figures import new_figure
from ..text import caption

SIZE = 8.0
"""Width of a figure in inches."""


def normalize_first(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Make the model take pixels, black 0 and white 1, which it then normalizes itself.

    So pictures of inputs, and of projections to them, have their true colors. Registers a hook on
    the model and returns the model.

    Example:
        >>> mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        >>> model = visualize.normalize_first(cnn.models.lenet5(in_channels=3), mean, std)
        >>> logits = model(torch.rand(1, 3, 32, 32))
    """

    def normalize(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        shift, scale = (x.new_tensor(values)[:, None, None] for values in (mean, std))
        return (x - shift) / scale, *rest

    model.register_forward_pre_hook(normalize)
    return model


def pixels(images: Tensor) -> Tensor:
    """Images [N, C, H, W], or one without N, as levels from 0 to 1 of one or three channels.

    An image within 0 and 1 stays as it is, up to rounding; others are stretched to that range.
    Other numbers of channels are averaged.
    """
    images = _shown(images)
    low = images.amin((-3, -2, -1), keepdim=True)
    high = images.amax((-3, -2, -1), keepdim=True)
    within = (low >= -1e-4) & (high <= 1 + 1e-4)
    span = (high - low).clamp(min=1e-12)
    return torch.where(within, images, (images - low) / span).clamp(0, 1)


def signed(images: Tensor) -> Tensor:
    """Images [N, C, H, W] of either sign as levels: 0 is grey, the largest value white or black."""
    images = _shown(images)
    largest = images.abs().amax((-3, -2, -1), keepdim=True).clamp(min=1e-12)
    return 0.5 + images / (2 * largest)


def _shown(images: Tensor) -> Tensor:
    images = images.detach().float().cpu().nan_to_num()
    return images if images.shape[-3] in (1, 3) else images.mean(-3, keepdim=True)


def grey(images: Tensor) -> Tensor:
    """The neutral levels [N, C, 1, 1] of images [N, C, H, W].

    They are 0.5 for an image within 0 and 1, else the mean of each of its channels.
    """
    within = (images.amin((1, 2, 3)) >= 0) & (images.amax((1, 2, 3)) <= 1)
    middle = images.new_tensor(0.5)
    return torch.where(within[:, None, None, None], middle, images.mean((2, 3), keepdim=True))


def tiles(images: Tensor, columns: int | None = None, gap: int = 1, level: float = 1.0) -> Tensor:
    """Images [N, C, H, W] row by row as one [C, H', W'], ``gap`` pixels of ``level`` between them.

    The default number of columns makes the result roughly square.
    """
    count, channels, height, width = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = -(-count // columns)
    blank = images.new_full((rows * columns - count, channels, height, width), level)
    whole = F.pad(torch.cat([images, blank]), (0, gap, 0, gap), value=level)
    whole = whole.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    return whole[:, : whole.shape[1] - gap, : whole.shape[2] - gap]


def show(axes: Any, image: Tensor, title: str = "", **options: Any) -> Any:
    """Draw levels [C, H, W] or [H, W] in ``axes``, without ticks. ``options`` are imshow's."""
    axes.set(xticks=[], yticks=[])
    axes.set_title(caption(title), fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if image.dim() == 3:
        image = image.permute(1, 2, 0) if len(image) == 3 else image[0]
    colour = {} if image.dim() == 3 else {"cmap": "gray", "vmin": 0, "vmax": 1}
    return axes.imshow(image.numpy(), **{"interpolation": "nearest", **colour, **options})


def frame(axes: Any, box: Sequence[int], colour: Any, **options: Any) -> Any:
    """Draw a rectangle in ``axes`` around the pixels from (top, left) to before (bottom, right)."""
    from matplotlib.patches import Rectangle  # optional, like all of matplotlib

    top, left, bottom, right = box
    options = {"linewidth": 1.5, "fill": False, "edgecolor": colour} | options
    return axes.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, **options))


def colours(count: int) -> list[Any]:
    """``count`` distinguishable colors: ten distinct ones, or more from blue to red."""
    from matplotlib import colormaps

    if count <= 10:
        return list(colormaps["tab10"].colors[:count])  # type: ignore[attr-defined]
    return list(colormaps["turbo"](torch.linspace(0.05, 0.95, count).numpy()))


def panels(
    images: Sequence[Tensor], titles: Sequence[str], columns: int, use: str, width: float = SIZE
) -> Any:
    """A figure of pictures with levels [C, H, W], each with a title, row by row."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    high = max(image.shape[-2] / image.shape[-1] for image in images)
    height = rows * (width / columns * high + 0.3)
    figure = new_figure(use, figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for place, image, title in zip(axes, images, titles, strict=False):
        show(place, image, title)
    for place in axes[len(images) :]:
        place.set_visible(False)
    return figure
