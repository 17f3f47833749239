"""Whether a network finds the same part of an object in different images."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..console import Progress, table
from ..figures import new_figure
from ..text import caption
from .layers import check_images, evaluating, run_in_batches
from .pictures import SIZE, colours, frame, grey, pixels, show

SHOWN = 10
"""The number of images in a figure."""


@dataclass(frozen=True)
class Correspondence:
    """How differently the features of images change when the same part of each is covered.

    ``parts`` names the boxes [N, 4] that were covered in ``images`` [N, C, H, W]: top, left, bottom
    and right, the last two exclusive.

    ``shares`` [layers, parts, N, N] is, for any two images, the share of a layer's features whose
    changes differ in sign: up, down or none. ``random`` [layers, parts, draws, N, N] is the same
    for boxes of the part's size at random places.
    """

    images: Tensor
    parts: dict[str, Tensor]
    layers: tuple[str, ...]
    shares: Tensor
    random: Tensor

    @property
    def change(self) -> Tensor:
        """The score of each layer and part, and its spread: [2, layers, parts].

        The score is the mean share over all pairs of images: 0 if each feature changes in the same
        direction in all images. The spread is the standard deviation, over the images, of the mean
        over an image's pairs.
        """
        return _mean_and_spread(self.shares[:, :, None])

    @property
    def random_change(self) -> Tensor:
        """The same for random boxes: [2, layers, parts], over images and draws."""
        return _mean_and_spread(self.random)

    def __str__(self) -> str:
        """The scores of each layer and part."""
        rows = [("layer", "part", "sign change", "random boxes")]
        scores = torch.stack([self.change, self.random_change]).permute(2, 3, 0, 1).tolist()
        for layer, of_layer in zip(self.layers, scores, strict=True):
            for part, of_part in zip(self.parts, of_layer, strict=True):
                own, random = (f"{mean:.3f} ± {spread:.3f}" for mean, spread in of_part)
                rows.append((layer, part, own, random))
        return table(rows, "<<>>")

    def figure(self) -> Any:
        """The first images with the parts' boxes, and the scores of each layer as bars."""
        images = self.images[:SHOWN]
        height, width = images.shape[2:]
        rows, down = -(-len(images) // 5), -(-len(self.layers) // 3)
        columns, across = -(-len(images) // rows), -(-len(self.layers) // down)
        heights = [rows * SIZE / columns * height / width, 2.6 * down]
        figure = new_figure("parts", figsize=(SIZE, sum(heights)), layout="constrained")
        halves: Any = figure.subfigures(2, 1, height_ratios=heights)
        above, below = halves
        colour = dict(zip(self.parts, colours(len(self.parts)), strict=True))
        for number in range(len(images)):
            axes = above.add_subplot(rows, columns, number + 1)
            show(axes, pixels(images[number]))
            for part, boxes in self.parts.items():
                frame(axes, boxes[number].tolist(), colour[part])
        first = None
        for number, layer in enumerate(self.layers):
            first = axes = below.add_subplot(down, across, number + 1, sharey=first)
            _bars(axes, self.change[:, number], colour, 0)
            _bars(axes, self.random_change[:, number], dict.fromkeys(colour, "0.8"), 0.4)
            axes.set_xticks([place + 0.2 for place in range(len(colour))], [*map(caption, colour)])
            axes.set_title(caption(layer), fontsize=9)
            axes.tick_params(labelsize=8)
            axes.tick_params("x", rotation=30 if len(colour) > 4 else 0)
        below.supylabel("features whose signs differ\n(grey: random boxes)", fontsize=9)
        return figure


def _bars(axes: Any, scores: Tensor, colour: Mapping[str, Any], shift: float) -> None:
    means, spreads = scores.tolist()
    places = [place + shift for place in range(len(means))]
    options = {"color": list(colour.values()), "ecolor": "0.3", "capsize": 2}
    axes.bar(places, means, 0.4, yerr=spreads, **options)


def _mean_and_spread(shares: Tensor) -> Tensor:
    """Mean and spread of shares [layers, parts, draws, N, N], over draws and images:
    [2, layers, parts].
    """
    count = shares.shape[-1]
    means = (shares.sum(-1) / (count - 1)).flatten(2)  # an image does not differ from itself
    return torch.stack([means.mean(-1), means.std(-1)])


def correspondence(
    model: nn.Module,
    images: Tensor,
    parts: Mapping[str, Any],
    layers: Sequence[str],
    *,
    random: int = 10,
    seed: int = 0,
    batch: int = 64,
) -> Correspondence:
    """Cover the same part in images of one kind of object and compare the changes in features.

    Zeiler and Fergus (2014; arXiv:1311.2901), section 4.3 and table 1. Nothing tells a network that
    the eyes of different dogs correspond. If it knows, covering them changes its features alike. ε
    is an image's features minus those of the image with its part covered. The signs (-1, 0 or 1) of
    ε are compared: Δ is the sum of the Hamming distances of sign(ε) over all ordered pairs of
    images. The score here is Δ divided by the number of such pairs and of features; the paper does
    not say what its own values are divided by. A lower score means more alike.

    The baseline is boxes at random places, drawn separately for each image. If objects have the
    same place in all images, so do the parts' boxes, unlike random ones: this alone lowers the
    scores of layers that keep the map's size. The cover has level 0.5 for an image within 0 and 1,
    else the mean of each of its channels.

    Args:
        images: floats [N, C, H, W] as the model takes them, at least two.
        parts: the boxes [N, 4] of each part by its name, in whole pixels: top, left, bottom and
            right, the last two exclusive.
        layers: names of the layers whose features are compared, with any number of axes.
        random: number of random boxes per part.
        seed: seed of the random places.
        batch: number of images passed to the model at once. All images' features are kept.

    Raises ValueError for arguments that do not fit.

    Example:
        >>> eyes = torch.tensor([[8, 8, 16, 16]] * 4)
        >>> images, model = torch.rand(4, 1, 32, 32), cnn.models.lenet5()
        >>> result = visualize.correspondence(model, images, {"eyes": eyes}, ["features.2"])
        >>> result.change.shape  # (score, spread) of each layer and part
        torch.Size([2, 1, 1])
    """
    check_images(images, "images")
    if len(images) < 2:
        raise ValueError(f"images must be at least two, got {len(images)}")
    counts = {"parts": len(parts), "layers": len(layers), "random": random, "batch": batch}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least one, got {name}={count}")
    image = torch.tensor([0, 0, *images.shape[2:]]).expand(len(images), 4)
    boxes = {name: _boxes(name, values, image) for name, values in parts.items()}
    places = _with_random(boxes, image, random, seed)
    levels = grey(images)
    with (
        evaluating(model),
        torch.no_grad(),
        closing(Progress("correspondence", images.shape[0] * len(places), 0, "image")) as bar,
    ):
        # Always in the same batches, so that an unaffected feature keeps its bits.
        _, before = run_in_batches(model, images, layers, batch)
        found = []
        for place in places:
            covered = _covered(images, place, levels)
            _, after = run_in_batches(model, covered, layers, batch)
            found.append(torch.stack([_shares(before[name], after[name]) for name in layers]))
            bar.tick(len(images))
    shares = torch.stack(found, 1).unflatten(1, (len(parts), 1 + random))
    return Correspondence(images, boxes, tuple(layers), shares[:, :, 0], shares[:, :, 1:])


def _boxes(name: str, values: Any, whole: Tensor) -> Tensor:
    """The boxes [N, 4] in an argument, checked to be within the images."""
    boxes = torch.as_tensor(values).cpu()
    if boxes.shape != whole.shape or boxes.is_floating_point():
        size = f"{boxes.dtype} {list(boxes.shape)}"
        raise ValueError(f"boxes must be whole numbers {list(whole.shape)}, got {name} of {size}")
    (first, last), (_, side) = (t.unflatten(1, (2, 2)).unbind(1) for t in (boxes, whole))
    bad = ((first < 0) | (first >= last) | (last > side)).any(1)
    if bad.any():
        number = int(bad.nonzero()[0])
        text = f"{name}={boxes[number].tolist()} of image {number}"
        raise ValueError(f"boxes must hold pixels of {side[0].tolist()} only, got {text}")
    return boxes


def _with_random(boxes: dict[str, Tensor], whole: Tensor, count: int, seed: int) -> Tensor:
    """Each part's boxes, followed by ``count`` boxes of the same size at random places."""
    generator = torch.Generator().manual_seed(seed)
    places = []
    for own in boxes.values():
        size = own[:, 2:] - own[:, :2]
        room = whole[:, 2:] - size
        places.append(own)
        for _ in range(count):
            drawn = torch.rand(size.shape, generator=generator, dtype=torch.float64)
            corner = (drawn * (room + 1)).long()
            places.append(torch.cat([corner, corner + size], 1))
    return torch.stack(places)


def _covered(images: Tensor, boxes: Tensor, levels: Tensor) -> Tensor:
    """Copies of the images, each with its box filled with its level."""
    images = images.clone()
    for image, box, level in zip(images, boxes.tolist(), levels, strict=True):
        top, left, bottom, right = box
        image[:, top:bottom, left:right] = level
    return images


def _shares(before: Tensor, after: Tensor) -> Tensor:
    """The number of features [N, ...] in which two images' changes differ in sign: [N, N]."""
    signs = (before - after).flatten(1).sign()
    return torch.stack([(signs != own).double().mean(1) for own in signs]).cpu()
