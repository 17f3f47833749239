"""The named data sets."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from ..errors import UsageError, missing
from .custom import custom, is_code
from .folder import folder
from .formats import cifar10_binary, cifar10_pickle, first_there, idx
from .parts import Data, draw, identity
from .prepare import Description, moments

DEBIAN = Path("/usr/share/datasets")
"""The folder of data sets from Debian's packages, such as dataset-fashion-mnist."""

CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
OBJECTS = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
DIGITS = tuple("0123456789")


def load(name: str, size: int | None = None, seed: int = 0, *, val: bool = False) -> Data:
    """The data set ``name``: one of NAMES, "NAME:PATH" with the place of its files, or a function.

    A function, as "MODULE:FUNCTION", is imported and called: this runs code. Images are ``size`` x
    ``size``; the default is 224 for folders of photographs, a function's own size, and 32 for
    others. ``seed`` draws a missing test set from the training images, and with ``val`` the
    validation images; in-memory sets always draw the same ones. Raises UsageError if the files are
    not valid.

    Example:
        >>> sets = cnn.data.load("digits", val=True)
        >>> len(sets.train), len(sets.val), len(sets.test)
        (1295, 142, 360)
    """
    known, _, path = name.partition(":")
    if known in NAMES:
        return NAMES[known](Path(path) if path else None, size, seed, val)
    if is_code(name):
        return custom(name, size, seed, val)
    raise UsageError(f"--data: {name!r} is none of {', '.join(NAMES)}, and no MODULE:FUNCTION")


def same_set(first: str, second: str) -> bool:
    """Whether two names refer to one data set, whose files may have moved."""
    names = [name if runs_code(name) else name.partition(":")[0] for name in (first, second)]
    return names[0] == names[1]


def runs_code(name: str) -> bool:
    """Whether loading the data set ``name`` runs code that the name chooses."""
    return name.partition(":")[0] not in NAMES


Part = tuple[Tensor, Tensor]
"""Images [N, C, H, W] and labels [N]."""


def in_memory(
    train: Part,
    test: Part,
    classes: tuple[str, ...],
    size: int,
    origin: object,
    *,
    mirrors: bool,
    val: bool,
) -> Data:
    """A data set of ``train`` and ``test``; errors name ``origin``.

    With ``val``, a fixed tenth of ``train`` is for validation.
    """
    for images, labels in (train, test):
        if not len(images) == len(labels) > 0:
            raise UsageError(f"{origin} holds {len(images)} images and {len(labels)} labels")
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise UsageError(f"{origin} holds labels beyond 0 to {len(classes) - 1}")
    whole = identity(part.contiguous().numpy().tobytes() for part in train)
    (images, labels), test = ((resized(images, size), labels) for images, labels in (train, test))
    description = Description(classes, size, *moments(images), identity=whole)
    parts = {"train": TensorDataset(images, labels), "test": TensorDataset(*test)}
    if val:
        drawn = draw([str(index) for index in range(len(labels))], 0, ["val"])
        for part in ("train", "val"):
            chosen = [at for at, each in enumerate(drawn) if each == part]
            parts[part] = TensorDataset(images[chosen], labels[chosen])
        if not len(parts["train"]):
            raise UsageError(f"{origin} holds no training image besides one for validation")
    return Data(parts["train"], parts["test"], description, mirrors, parts.get("val"))


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 images [N, C, H, W] as [N, C, size, size].

    They are padded with black if up to four pixels on each side suffice, as LeNet-5's paper pads
    28x28 pixels to 32x32, and otherwise scaled bilinearly.
    """
    height, width = images.shape[-2:]
    margin, odd = divmod(size - height, 2)
    if height == width and 0 <= margin <= 4 and not odd:
        return F.pad(images, (margin,) * 4)
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def digits(path: Path | None, size: int | None, seed: int, val: bool) -> Data:
    """scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, scaled up.

    A fixed fifth of them, with the same share of each digit, is the test set.
    """
    from sklearn.datasets import load_digits  # takes its time
    from sklearn.model_selection import train_test_split

    if path:
        raise UsageError("digits come with scikit-learn and take no path")
    size = size or 32
    pixels, target = load_digits(return_X_y=True)
    grey = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(grey, (size, size), mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(target).long()
    train, test = train_test_split(
        range(len(labels)), test_size=0.2, stratify=target, random_state=0
    )
    parts = (images[train], labels[train]), (images[test], labels[test])
    return in_memory(*parts, DIGITS, size, "scikit-learn", mirrors=False, val=val)


def faces(path: Path | None, size: int | None, seed: int, val: bool) -> Data:
    """scikit-image's 100 faces and 100 other cuttings of photographs, grey, of 25x25 pixels.

    A fixed fifth of each is the test set.
    """
    from sklearn.model_selection import train_test_split  # takes its time

    try:
        from skimage.data import lfw_subset
    except ImportError:
        raise missing("scikit-image", "the data set faces", "show") from None
    if path:
        raise UsageError("faces come with scikit-image and take no path")
    images = torch.from_numpy(lfw_subset()).mul(255).round().to(torch.uint8)[:, None]
    labels = torch.arange(2).repeat_interleave(100)
    train, test = train_test_split(range(200), test_size=0.2, stratify=labels, random_state=0)
    parts = (images[train], labels[train]), (images[test], labels[test])
    return in_memory(*parts, ("face", "other"), size or 32, "scikit-image", mirrors=True, val=val)


@dataclass(frozen=True)
class IdxSet:
    """A reader of the four IDX files of MNIST and of sets in the same format."""

    classes: tuple[str, ...]
    place: Path
    mirrors: bool

    def __call__(self, path: Path | None, size: int | None, seed: int, val: bool) -> Data:
        folder = path or self.place
        if not folder.is_dir():
            raise UsageError(
                f"{folder} is not a folder: give the place of the IDX files, as NAME:FOLDER"
            )
        train, test = (self._part(folder, name) for name in ("train", "t10k"))
        options = {"mirrors": self.mirrors, "val": val}
        return in_memory(train, test, self.classes, size or 32, folder, **options)

    def _part(self, folder: Path, name: str) -> Part:
        images = idx(_idx_path(folder, f"{name}-images", "idx3-ubyte"), axes=3)
        labels = idx(_idx_path(folder, f"{name}-labels", "idx1-ubyte"), axes=1)
        return images[:, None], labels.long()


def _idx_path(folder: Path, name: str, kind: str) -> Path:
    """The path of a plain or compressed file; some unpackers write the second hyphen as a dot."""
    return first_there(folder, [f"{name}{dot}{kind}{end}" for dot in "-." for end in ("", ".gz")])


def cifar10(path: Path | None, size: int | None, seed: int, val: bool) -> Data:
    """CIFAR-10 from its binary or Python version, unpacked."""
    if not path:
        raise UsageError("cifar10 needs a place: give it as cifar10:FOLDER")
    for place in (path, path / "cifar-10-batches-bin", path / "cifar-10-batches-py"):
        for read, end in ((cifar10_binary, ".bin"), (cifar10_pickle, "")):
            if (place / f"data_batch_1{end}").is_file():
                batches = [read(place / f"data_batch_{number}{end}") for number in range(1, 6)]
                images, labels = (torch.cat(each) for each in zip(*batches, strict=True))
                test = read(place / f"test_batch{end}")
                parts = (images, labels), test
                return in_memory(*parts, OBJECTS, size or 32, place, mirrors=True, val=val)
    raise UsageError(f"{path} holds neither data_batch_1.bin nor data_batch_1")


NAMES: dict[str, Callable[[Path | None, int | None, int, bool], Data]] = {
    "digits": digits,
    "faces": faces,
    "mnist": IdxSet(DIGITS, DEBIAN / "mnist", mirrors=False),
    "fashion-mnist": IdxSet(CLOTHES, DEBIAN / "fashion-mnist", mirrors=True),
    "cifar10": cifar10,
    "folder": folder,
}
