"""The data sets that have a name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ..problem import Problem
from .files import ImageFiles, image_files
from .formats import cifar10_binary, cifar10_pickle, first_there, idx
from .prepare import Description

DEBIAN = Path("/usr/share/datasets")
"""Where Debian's packages, as dataset-fashion-mnist, put data sets."""

CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
OBJECTS = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
DIGITS = tuple("0123456789")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet's photographs, by which torchvision's models are trained."""


@dataclass(frozen=True)
class Data:
    """A training and a test set of (uint8 image [channels, size, size], label).

    ``mirrors``: whether a mirrored image could as well be in the set.
    """

    train: Any
    test: Any
    description: Description
    mirrors: bool


def load(name: str, size: int | None = None, seed: int = 0) -> Data:
    """The data set ``name``, one of NAMES, or "NAME:PATH" with the place of its files.

    Images are ``size`` x ``size``, by default 224 for folders of photographs and else 32. ``seed``
    draws the test set of a folder that has none. Raises Problem where files are not as they must be.
    """
    name, _, path = name.partition(":")
    return NAMES[name](Path(path) if path else None, size, seed)


def _tensors(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: tuple[str, ...],
    size: int | None,
    where: Any,
    *,
    mirrors: bool,
) -> Data:
    """A data set that is held in memory; ``where`` it came from is told if it is not sound."""
    for images, labels in (train, test):
        if not len(images) == len(labels) > 0:
            raise Problem(f"{where} holds {len(images)} images and {len(labels)} labels")
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise Problem(f"{where} holds labels beyond 0 to {len(classes) - 1}")
    size = size or 32
    train, test = ((resized(images, size), labels) for images, labels in (train, test))
    values = torch.stack([channel.bincount(minlength=256) for channel in _channels(train[0])])
    shares = values.double() / values.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ levels
    std = (shares @ levels**2 - mean**2).clamp(min=1e-12).sqrt()
    description = Description(classes, size, tuple(mean.tolist()), tuple(std.tolist()))
    return Data(TensorDataset(*train), TensorDataset(*test), description, mirrors)


def _channels(images: Tensor) -> Tensor:
    return images.transpose(0, 1).flatten(1)


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 images [N, C, H, W] as [N, C, size, size].

    They are padded with black where that takes at most four pixels on each side, as LeNet-5's
    paper makes 28x28 pixels 32x32, and else scaled bilinearly.
    """
    height, width = images.shape[-2:]
    if height == width and 0 <= size - height <= 8 and (size - height) % 2 == 0:
        return F.pad(images, ((size - height) // 2,) * 4)
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def _digits(path: Path | None, size: int | None, seed: int) -> Data:
    """scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, scaled up.

    A fixed fifth of them, with the same share of each digit, is the test set.
    """
    from sklearn.datasets import load_digits  # takes its time
    from sklearn.model_selection import train_test_split

    if path:
        raise Problem("digits come with scikit-learn and take no path")
    pixels, target = load_digits(return_X_y=True)
    size = size or 32
    grey = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(grey, (size, size), mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(target).long()
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=target, random_state=0)
    parts = ((images[part], labels[part]) for part in (train, test))
    return _tensors(*parts, DIGITS, size, "scikit-learn", mirrors=False)


def _idx_set(classes: tuple[str, ...], place: Path, *, mirrors: bool) -> Callable[..., Data]:
    """A reader of the four IDX files that MNIST and those made like it consist of."""

    def read(path: Path | None, size: int | None, seed: int) -> Data:
        folder = path or place
        if not folder.is_dir():
            raise Problem(f"{folder} is no folder: give the place of the IDX files, as NAME:FOLDER")
        parts = [(_idx_file(folder, part, "images", 3)[:, None], _idx_file(folder, part, "labels", 1).long()) for part in ("train", "t10k")]
        return _tensors(*parts, classes, size, folder, mirrors=mirrors)

    return read


def _idx_file(folder: Path, part: str, kind: str, axes: int) -> Tensor:
    ends = (f"{dot}idx{axes}-ubyte{end}" for dot in "-." for end in ("", ".gz"))
    return idx(first_there(folder, [f"{part}-{kind}{end}" for end in ends]), axes)


def _cifar10(path: Path | None, size: int | None, seed: int) -> Data:
    """CIFAR-10 from its binary or Python version, unpacked."""
    if not path:
        raise Problem("cifar10 needs a place: give it as cifar10:FOLDER")
    kinds = {"data_batch_1.bin": (cifar10_binary, ".bin"), "data_batch_1": (cifar10_pickle, "")}
    places = (path, path / "cifar-10-batches-bin", path / "cifar-10-batches-py")
    found = [(place, *kinds[name]) for place in places for name in kinds if (place / name).is_file()]
    if not found:
        raise Problem(f"{path} holds neither data_batch_1.bin nor data_batch_1")
    place, reader, end = found[0]
    batches = [reader(place / f"data_batch_{number}{end}") for number in range(1, 6)]
    train = torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
    return _tensors(train, reader(place / f"test_batch{end}"), OBJECTS, size, place, mirrors=True)


def _folder(path: Path | None, size: int | None, seed: int) -> Data:
    """Colour images in a folder for each class, below train/ and test/ or val/ if there is a train/.

    Else a fifth of each class, drawn from ``seed``, is the test set.
    """
    if not path or not path.is_dir():
        raise Problem(f"{path or 'folder'} is no folder: give one with a folder a class, as folder:PATH")
    apart = (path / "train").is_dir()
    top = path / "train" if apart else path
    classes = tuple(sorted(place.name for place in top.glob("[!.]*") if place.is_dir()))
    found = [image_files(top / name) for name in classes]
    if apart:
        names = [name for name in ("test", "val") if (path / name).is_dir()]
        if not names:
            raise Problem(f"{path} holds a train, but neither a test nor a val")
        tests = [image_files(path / names[0] / name) for name in classes]
        trains = found
    else:
        draw = np.random.default_rng(seed)
        orders = [draw.permutation(len(files)) for files in found]
        tests, trains = (
            [[files[at] for at in sorted(order[part(len(order) // 5)])] for files, order in zip(found, orders, strict=True)]
            for part in (lambda fifth: slice(fifth), lambda fifth: slice(fifth, None))
        )
    size = size or 224
    parts = []
    for part, lists in (("train", trains), ("test", tests)):
        paths = [file for files in lists for file in files]
        if not paths:
            raise Problem(f"{path} holds no image to {part} with, in a folder of its class")
        labels = [label for label, files in enumerate(lists) for _ in files]
        parts.append(ImageFiles(paths, labels, size))
    return Data(*parts, Description(classes, size, *IMAGENET), mirrors=True)


NAMES: dict[str, Callable[[Path | None, int | None, int], Data]] = {
    "digits": _digits,
    "mnist": _idx_set(DIGITS, DEBIAN / "mnist", mirrors=False),
    "fashion-mnist": _idx_set(CLOTHES, DEBIAN / "fashion-mnist", mirrors=True),
    "cifar10": _cifar10,
    "folder": _folder,
}
