"""Folders of photographs, with one folder per class."""

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import UsageError
from ..text import plain
from .files import ImageFiles, hidden, image_files, is_image
from .parts import USES, WORDS, Data, class_name, draw, identity, missing, utf8
from .prepare import IMAGENET, Description

Listing = dict[str, list[Path]]
"""Each class's image files, by class name."""


def folder(path: Path | None, size: int | None, seed: int, val: bool) -> Data:
    """Color images in one folder per class, or in such folders below train, val and test.

    The parts may have other usual names, in any capitalization. A missing test part, or with
    ``val`` a missing val part, is drawn from the training images by each one's name and ``seed``.
    """
    if not path or not path.is_dir():
        raise UsageError(
            f"{path or 'folder'} is not a folder: give folder:PATH, with one folder per class"
        )
    places = _parts(path)
    parts = {part: _listing(place) for part, place in places.items()}
    classes = tuple(sorted(parts["train"]))
    _check_classes(path, places, parts)
    parts |= _drawn(parts["train"], path, seed, missing(parts, val))
    images = {part: _labelled(each, classes, size or 224) for part, each in parts.items()}
    _check_images(path, images, classes)
    learned = [file for part, each in images.items() if part != "test" for file in each.paths]
    whole = identity(sorted(utf8(str(file.relative_to(path))) for file in learned))
    description = Description(classes, size or 224, *IMAGENET, identity=whole)
    notes = [*_lacking(path, parts), *_loose(path, places.values())]
    if "test" not in places and places["train"] != path:
        count = len(images["test"])
        notes.append(
            f"{path} has no test part: {count} images of {places['train'].name} are used for it"
        )
    return Data(images["train"], images["test"], description, True, images.get("val"), tuple(notes))


def _parts(path: Path) -> dict[str, Path]:
    """The folder of each part; without parts only "train", which is ``path`` itself.

    A folder with a part's name but without subfolders is a class, unless all have such names.
    """
    inside = _folders(path)
    named: dict[str, Path] = {}
    for place in inside:
        part = WORDS.get(place.name.casefold())
        if part in named:
            two = f"{named[part].name} and {place.name}"
            raise UsageError(f"{path} holds two {USES[part]} folders: {two}")
        if part:
            named[part] = place
    others = len(inside) - len(named)
    nested = {part: place for part, place in named.items() if _folders(place)}
    flat = [place for part, place in named.items() if part not in nested]
    if not nested and (others or not named):
        return {"train": path}
    if "train" in nested and not flat and (len(nested) > 1 or not others):
        return nested
    if flat and (nested or not others):
        raise UsageError(f"{flat[0]} holds no folders of classes")
    names = " and ".join(sorted(place.name for place in nested.values()))
    if "train" not in nested:
        raise UsageError(f"{path} holds {names}, each with folders of classes, but no train")
    raise UsageError(f"{path}: {names} can be a part or a class: rename it, or give {path}/{names}")


def _folders(path: Path) -> list[Path]:
    """The user's folders in ``path``."""
    try:
        return sorted(each for each in path.iterdir() if not hidden(each.name) and each.is_dir())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _listing(path: Path) -> Listing:
    found: Listing = {}
    for place in _folders(path):
        name = class_name(place.name)
        if name in found:
            raise UsageError(f"{path} holds two folders of the class {name}, in two spellings")
        found[name] = image_files(place)
    return found


def _check_classes(path: Path, places: dict[str, Path], parts: dict[str, Listing]) -> None:
    """Raise UsageError if a part has a class that the training part lacks."""
    known = parts["train"]
    for part, listing in parts.items():
        for name in sorted(listing.keys() - known.keys()):
            if listing[name]:
                only = f"{places[part]} holds the class {name}"
                raise UsageError(f"{only}, but {places['train']} does not")


def _check_images(path: Path, images: dict[str, ImageFiles], classes: tuple[str, ...]) -> None:
    """Raise UsageError unless each part has images, and the training part two classes."""
    for part, each in images.items():
        if not len(each):
            raise UsageError(f"{path} holds no {USES[part]} image in a folder of its class")
    first, *others = {*images["train"].labels}
    if not others:
        only = f"{path} holds training images of only one class, {classes[first]}"
        raise UsageError(f"{only}: give a folder with a folder for each class")


def _drawn(known: Listing, path: Path, seed: int, parts: list[str]) -> dict[str, Listing]:
    """The images of ``known``, split into the training part and ``parts``."""
    pairs = [(name, image) for name, images in known.items() for image in images]
    names = [str(image.relative_to(path)) for _, image in pairs]
    drawn = {part: {name: [] for name in known} for part in ("train", *parts)}
    for (name, image), part in zip(pairs, draw(names, seed, parts), strict=True):
        drawn[part][name].append(image)
    return drawn


def _labelled(listing: Listing, classes: tuple[str, ...], size: int) -> ImageFiles:
    pairs = [(path, label) for label, name in enumerate(classes) for path in listing.get(name, ())]
    return ImageFiles([path for path, _ in pairs], [label for _, label in pairs], size)


def _lacking(path: Path, parts: dict[str, Listing]) -> list[str]:
    """A line for each part that has no images of some classes."""
    found = []
    for part in filter(parts.__contains__, USES):
        names = [name for name in sorted(parts["train"]) if not parts[part].get(name)]
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            which = ", ".join(map(plain, names[:5])) + more
            found.append(f"{path} holds no {USES[part]} image of: {which}")
    return found


def _loose(path: Path, places: Iterable[Path]) -> list[str]:
    """A line on images that are outside the class folders."""
    count = 0
    for place in {path, *places}:
        with os.scandir(place) as entries:
            count += sum(is_image(entry) for entry in entries)
    return [f"{path} holds {count} images outside class folders: they are unused"] * (count > 0)
