"""The data sets that have a name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from ..problem import Problem, missing
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
    draws the test set of a folder that has none. Raises Problem where files are not as they should.
    """
    name, _, path = name.partition(":")
    return NAMES[name](Path(path) if path else None, size, seed)


Part = tuple[Tensor, Tensor]
"""Images [N, C, H, W] and labels [N]."""


def in_memory(
    train: Part, test: Part, classes: tuple[str, ...], size: int, origin: object, *, mirrors: bool
) -> Data:
    """A data set of ``train`` and ``test``; ``origin`` is named where they are not sound."""
    for images, labels in (train, test):
        if not len(images) == len(labels) > 0:
            raise Problem(f"{origin} holds {len(images)} images and {len(labels)} labels")
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise Problem(f"{origin} holds labels beyond 0 to {len(classes) - 1}")
    (images, labels), test = ((resized(images, size), labels) for images, labels in (train, test))
    description = Description(classes, size, *moments(images))
    return Data(TensorDataset(images, labels), TensorDataset(*test), description, mirrors)


def moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images, with white as 1."""
    counts = torch.stack([c.bincount(minlength=256) for c in images.transpose(0, 1).flatten(1)])
    shares = counts.double() / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ levels
    std = (shares @ levels**2 - mean**2).clamp(min=1e-12).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 images [N, C, H, W] as [N, C, size, size].

    They are padded with black where that takes at most four pixels on each side, as LeNet-5's
    paper makes 28x28 pixels 32x32, and else scaled bilinearly.
    """
    height, width = images.shape[-2:]
    margin, odd = divmod(size - height, 2)
    if height == width and 0 <= margin <= 4 and not odd:
        return F.pad(images, (margin,) * 4)
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def digits(path: Path | None, size: int | None, seed: int) -> Data:
    """scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, scaled up.

    A fixed fifth of them, with the same share of each digit, is the test set.
    """
    from sklearn.datasets import load_digits  # takes its time
    from sklearn.model_selection import train_test_split

    if path:
        raise Problem("digits come with scikit-learn and take no path")
    size = size or 32
    pixels, target = load_digits(return_X_y=True)
    grey = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(grey, (size, size), mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(target).long()
    train, test = train_test_split(
        range(len(labels)), test_size=0.2, stratify=target, random_state=0
    )
    parts = (images[train], labels[train]), (images[test], labels[test])
    return in_memory(*parts, DIGITS, size, "scikit-learn", mirrors=False)


def faces(path: Path | None, size: int | None, seed: int) -> Data:
    """scikit-image's 100 faces and 100 other cuttings of photographs, grey, of 25x25 pixels.

    A fixed fifth of each is the test set.
    """
    from sklearn.model_selection import train_test_split  # takes its time

    try:
        from skimage.data import lfw_subset
    except ImportError:
        raise missing("scikit-image", "the data set faces", "show") from None
    if path:
        raise Problem("faces come with scikit-image and take no path")
    images = torch.from_numpy(lfw_subset()).mul(255).round().to(torch.uint8)[:, None]
    labels = torch.arange(2).repeat_interleave(100)
    train, test = train_test_split(range(200), test_size=0.2, stratify=labels, random_state=0)
    parts = (images[train], labels[train]), (images[test], labels[test])
    return in_memory(*parts, ("face", "other"), size or 32, "scikit-image", mirrors=True)


@dataclass(frozen=True)
class IdxSet:
    """A reader of the four IDX files that MNIST, and what was made like it, consists of."""

    classes: tuple[str, ...]
    place: Path
    mirrors: bool

    def __call__(self, path: Path | None, size: int | None, seed: int) -> Data:
        folder = path or self.place
        if not folder.is_dir():
            raise Problem(f"{folder} is no folder: give the place of the IDX files, as NAME:FOLDER")
        train, test = (self._part(folder, name) for name in ("train", "t10k"))
        return in_memory(train, test, self.classes, size or 32, folder, mirrors=self.mirrors)

    def _part(self, folder: Path, name: str) -> Part:
        images = idx(_idx_path(folder, f"{name}-images", "idx3-ubyte"), axes=3)
        labels = idx(_idx_path(folder, f"{name}-labels", "idx1-ubyte"), axes=1)
        return images[:, None], labels.long()


def _idx_path(folder: Path, name: str, kind: str) -> Path:
    """Plain or compressed; some unpackers write the second hyphen as a point."""
    return first_there(folder, [f"{name}{dot}{kind}{end}" for dot in "-." for end in ("", ".gz")])


def cifar10(path: Path | None, size: int | None, seed: int) -> Data:
    """CIFAR-10 from its binary or Python version, unpacked."""
    if not path:
        raise Problem("cifar10 needs a place: give it as cifar10:FOLDER")
    for place in (path, path / "cifar-10-batches-bin", path / "cifar-10-batches-py"):
        for read, end in ((cifar10_binary, ".bin"), (cifar10_pickle, "")):
            if (place / f"data_batch_1{end}").is_file():
                batches = [read(place / f"data_batch_{number}{end}") for number in range(1, 6)]
                images, labels = (torch.cat(each) for each in zip(*batches, strict=True))
                test = read(place / f"test_batch{end}")
                parts = (images, labels), test
                return in_memory(*parts, OBJECTS, size or 32, place, mirrors=True)
    raise Problem(f"{path} holds neither data_batch_1.bin nor data_batch_1")


def folder(path: Path | None, size: int | None, seed: int) -> Data:
    """Colour images in a folder for each class, below train/ and test/ or val/ if it has a train/.

    Else a fifth of each class, drawn from ``seed``, is the test set.
    """
    if not path or not path.is_dir():
        raise Problem(f"{path or 'folder'} is no folder: give folder:PATH, with a folder a class")
    train = path / "train" if (path / "train").is_dir() else path
    classes = tuple(sorted(place.name for place in train.glob("[!.]*") if place.is_dir()))
    found = [image_files(train / name) for name in classes]
    if train is path:
        draw = np.random.default_rng(seed)
        parts = zip(*(_split(files, draw) for files in found), strict=True)
        trains, tests = parts if classes else ((), ())
    else:
        apart = [path / name for name in ("test", "val") if (path / name).is_dir()]
        if not apart:
            raise Problem(f"{path} holds a train, but neither a test nor a val")
        trains, tests = found, [image_files(apart[0] / name) for name in classes]
    size = size or 224
    training, test = _labelled(trains, size), _labelled(tests, size)
    for part, use in ((training, "train"), (test, "test")):
        if not len(part):
            raise Problem(f"{path} holds no image to {use} with, in a folder of its class")
    return Data(training, test, Description(classes, size, *IMAGENET), mirrors=True)


def _split(files: list[Path], draw: np.random.Generator) -> tuple[list[Path], list[Path]]:
    """Four fifths and one of ``files``."""
    order = draw.permutation(len(files)).tolist()
    fifth = len(files) // 5
    return [files[at] for at in sorted(order[fifth:])], [files[at] for at in sorted(order[:fifth])]


def _labelled(classes: Sequence[list[Path]], size: int) -> ImageFiles:
    pairs = [(path, label) for label, files in enumerate(classes) for path in files]
    return ImageFiles([path for path, _ in pairs], [label for _, label in pairs], size)


NAMES: dict[str, Callable[[Path | None, int | None, int], Data]] = {
    "digits": digits,
    "faces": faces,
    "mnist": IdxSet(DIGITS, DEBIAN / "mnist", mirrors=False),
    "fashion-mnist": IdxSet(CLOTHES, DEBIAN / "fashion-mnist", mirrors=True),
    "cifar10": cifar10,
    "folder": folder,
}
