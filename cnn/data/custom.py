"""Data sets from a user's function, given as MODULE:FUNCTION."""

import inspect
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..errors import UsageError
from .files import unreadable
from .parts import USES, WORDS, Data, draw, identity, missing
from .pixels import DEEP, fit
from .prepare import IMAGENET, Description, moments

SAMPLE = 1000
"""Number of images from which the mean and standard deviation of pixels are estimated."""


def is_code(name: str) -> bool:
    """Whether a data set's name is that of a function, so that loading it runs code."""
    return bool(re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", name))


def call(flag: str, name: str, **options: Any) -> Any:
    """The result of the function ``name``, given by the argument ``flag``: runs its code.

    Its module is also searched in the current folder. It gets those of ``options`` that it has
    parameters for.
    """
    try:
        here = str(Path.cwd())
        if here not in sys.path and not sys.flags.safe_path:
            sys.path.insert(0, here)  # python -m adds it, an installed command does not
        return fitting(resolve_name(name), options)
    except (Exception, SystemExit) as error:  # user code can raise anything
        raise UsageError(f"--{flag}: {name}() fails: {type(error).__name__}: {error}") from None


def fitting(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    """The result of a function, called with those of ``options`` that it has parameters for."""
    taken = inspect.signature(function).parameters if options else {}
    if not any(each.kind is each.VAR_KEYWORD for each in taken.values()):
        options = {name: value for name, value in options.items() if name in taken}
    return function(**options)


class Samples(Dataset):
    """A part of a user's data set, as (image [channels, size, size], label).

    Pixels are uint8, other images float32. An unreadable image is black and has the label -1 minus
    its index.
    """

    def __init__(self, data: Any, origin: str, part: str, description: Description):
        self.data, self.origin, self.part = data, origin, part
        self.description = description

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.at(index, 0, 0)

    def at(self, index: int, seed: int, epoch: int) -> tuple[Tensor, int]:
        """An item; ``seed``, ``epoch`` and ``index`` fix everything that it draws at random."""
        try:
            return self._sample(index, seed, epoch)
        except UsageError:
            known = self.description
            kind = torch.uint8 if known.pixels else torch.float32
            return torch.zeros(known.channels, known.size, known.size, dtype=kind), -1 - index

    def read(self, index: int) -> Tensor:
        """Read an image. Raises UsageError if that fails."""
        return self._sample(index, 0, 0)[0]

    def name(self, index: int) -> str:
        """A name that identifies an image."""
        return f"{USES[self.part]} image {index} of {self.origin}"

    def _sample(self, index: int, seed: int, epoch: int) -> tuple[Tensor, int]:
        try:
            with fixed_random(seed, epoch, index):
                image, label = _pair(self.data[index])
            return as_pixels(image, self.description), self._label(label)
        except (Exception, SystemExit) as error:  # user code can raise anything
            raise unreadable(self.name(index), error) from None

    def _label(self, label: Any) -> int:
        count, number = len(self.description.classes), int(label)
        if not 0 <= number < count or number != label:
            raise ValueError(f"its label {label} is not in 0 to {count - 1}")
        return number


def _pair(sample: Any) -> tuple[Any, Any]:
    """The image and the label in a data set's item."""
    if not isinstance(sample, list | tuple) or len(sample) != 2:
        raise TypeError(f"it is a {type(sample).__name__}, not (image, label)")
    return sample[0], sample[1]


@contextmanager
def fixed_random(*numbers: int) -> Iterator[None]:
    """A context with fixed random numbers of Python, NumPy and torch on the CPU; it restores the
    generators' states.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)  # the generator that user code draws from
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def as_pixels(image: Any, known: Description) -> Tensor:
    """A Pillow image, an array [H, W, C] or a tensor [C, H, W], in the form of ``known``."""
    if hasattr(image, "getexif"):
        if not known.pixels:
            raise ValueError("it is a Pillow image, not a floating-point one")
        return fit(image, known.size, known.channels)
    pixels = _channels_first(image)
    wanted = "uint8" if known.pixels else "floating point"
    if pixels.is_floating_point() == known.pixels:
        raise ValueError(f"its dtype is {pixels.dtype}, not {wanted}")
    if len(pixels) != known.channels:
        raise ValueError(f"it has {len(pixels)} channels, not {known.channels}")
    if not known.pixels and not pixels.isfinite().all():
        raise ValueError("it holds NaN or infinite numbers")
    return square(pixels if known.pixels else pixels.float(), known.size)


def _channels_first(image: Any) -> Tensor:
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(image))
        image = image.permute(2, 0, 1) if image.dim() == 3 else image
    if not isinstance(image, Tensor):
        raise TypeError(f"it is a {type(image).__name__}, neither a tensor nor a Pillow image")
    image = image[None] if image.dim() == 2 else image
    if image.dim() != 3 or not image.numel():
        raise ValueError(f"its shape is {list(image.shape)}, not [channels, height, width]")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"its dtype is {image.dtype}, neither uint8 nor floating point")
    return image


def square(image: Tensor, size: int) -> Tensor:
    """An image [C, H, W] as [C, size, size]: scaled, then cropped at the center."""
    height, width = image.shape[1:]
    least = min(height, width)
    if (height, width) == (size, size):
        return image
    top, left = (height - least) // 2, (width - least) // 2
    middle = image[None, :, top : top + least, left : left + least]
    return F.interpolate(middle, (size, size), mode="bilinear", antialias=True)[0]


def custom(name: str, size: int | None, seed: int, val: bool) -> Data:
    """The data set that the function ``name`` returns, which is called without arguments.

    It returns a map-style ``torch.utils.data.Dataset`` of (image, label), or two of them, for
    training and testing, or a dict of them by "train", "val" and "test". A missing test set, or
    with ``val`` a missing validation set, is drawn from the training images by each one's index and
    ``seed``. Classes are the attribute ``classes`` of the data set, or "classes" in the dict: their
    names or their number. An entry "mirrors" says whether images may be mirrored.
    """
    made = call("data", name)
    if isinstance(made, tuple) and len(made) == 2:
        given: Mapping[str, Any] = dict(zip(("train", "test"), made, strict=True))
    else:
        given = made if isinstance(made, Mapping) else {"train": made}
    parts = _parts(given, name)
    classes = _classes(given, parts, name)
    description = _described(parts, classes, size, name)
    wanted, whole = missing(parts, val), parts["train"]
    drawn = draw([str(index) for index in range(len(whole))], seed, wanted)
    for part in ("train", *wanted) if wanted else ():
        parts[part] = Subset(whole, [at for at, chosen in enumerate(drawn) if chosen == part])
    samples = {part: Samples(each, name, part, description) for part, each in parts.items()}
    for part, images in samples.items():
        if not len(images):
            raise UsageError(f"--data: {name} returns no {USES[part]} image")
    mirrors = bool(given.get("mirrors", False))
    return Data(samples["train"], samples["test"], description, mirrors, samples.get("val"))


def _parts(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    parts = {WORDS[key.casefold()]: part for key, part in given.items() if key.casefold() in WORDS}
    if "train" not in parts:
        raise UsageError(f'--data: {name} returns no training set: return {{"train": ...}}')
    for part in parts.values():
        if not (hasattr(part, "__getitem__") and hasattr(part, "__len__")):
            kind = type(part).__name__
            raise UsageError(f"--data: {name} returns a {kind}, which has no length or no index")
    return parts


def _described(
    parts: Mapping[str, Any], classes: tuple[str, ...], size: int | None, name: str
) -> Description:
    """The description of all images by the first readable one; a sample gives the pixels' mean."""
    train = parts["train"]
    image = _first(train, name)
    if hasattr(image, "getexif"):
        channels = 1 if image.mode in {"1", "L", "LA", "La", *DEEP} else 3
        kind, usual = torch.uint8, min(*image.size, 224)
    else:
        try:
            first = _channels_first(image)
        except (TypeError, ValueError) as error:
            raise UsageError(f"--data: an image of {name}: {error}") from None
        channels, kind, usual = len(first), first.dtype, min(first.shape[1:])
    lengths = [f"{part} {len(parts[part])}" for part in sorted(parts.keys() - {"test"})]
    whole = identity(text.encode(errors="surrogateescape") for text in (*lengths, *classes))
    neutral = (0.0,) * channels, (1.0,) * channels
    known = Description(classes, size or usual, *neutral, kind == torch.uint8, whole)
    if not known.pixels:
        return known
    if channels == 3:
        mean, std = IMAGENET
    else:
        sample = Samples(train, name, "train", known)
        chosen = range(0, len(train), -(-len(train) // SAMPLE))
        images = [image for image, label in map(sample.__getitem__, chosen) if label >= 0]
        if not images:
            sample.read(0)  # raises with the reason
            raise UsageError(f"--data: few images of {name} can be read")
        mean, std = moments(torch.stack(images))
    return replace(known, mean=mean, std=std)


def _first(data: Any, name: str) -> Any:
    error = None
    for index in range(min(len(data), SAMPLE)):
        try:
            with fixed_random(0, 0, index):
                return _pair(data[index])[0]
        except (Exception, SystemExit) as raised:  # user code can raise anything
            error = error or raised
    if error is None:
        raise UsageError(f"--data: {name} returns no training image")
    raise unreadable(f"any image of {name}", error)


def _classes(given: Mapping[str, Any], parts: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The class names: those given, those of the data sets, or numbers."""
    told = [_told(part) for part in parts.values()]
    classes = given.get("classes", told[0])
    if classes is None:
        raise UsageError(f'--data: {name} returns no "classes": give their names or number')
    names = range(classes) if isinstance(classes, int) else classes
    found = tuple(map(str, names))
    if len(found) < 2 or len({*found}) < len(found):
        raise UsageError(f"--data: the classes of {name} must be two or more, and must differ")
    for other in told:
        if "classes" not in given and other is not None and tuple(map(str, other)) != found:
            raise UsageError(f"--data: the parts of {name} have different classes")
    return found


def _told(data: Any) -> Sequence[str] | None:
    """The classes that a data set states, or the set that it is a part of."""
    while not hasattr(data, "classes") and hasattr(data, "dataset"):
        data = data.dataset
    return getattr(data, "classes", None)
