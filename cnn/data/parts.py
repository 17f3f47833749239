"""The parts of a data set: to train with, to validate with, and to test with."""

import hashlib
import os
import unicodedata
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .prepare import Description

WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev", "development"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The part that a usual name means, in small letters."""

USES = {"train": "train", "val": "validate", "test": "test"}

SHARES = {"test": (0.0, 0.2), "val": (0.2, 0.3)}
"""Of the numbers from 0 to 1 by which parts are drawn: a fifth and a tenth of all images."""


@dataclass(frozen=True)
class Data:
    """Parts of (image [channels, size, size], label), which have no image in common.

    Args:
        mirrors: whether a mirrored image could as well be in the set.
        val: to validate with; None if there is none and none was asked for.
        notes: what is odd about the set, in words.
    """

    train: Any
    test: Any
    description: Description
    mirrors: bool
    val: Any = None
    notes: tuple[str, ...] = ()


def utf8(name: str) -> bytes:
    """A file's name in bytes that are the same in every locale and after a copy to a Mac."""
    raw = os.fsencode(name)
    try:
        return unicodedata.normalize("NFC", raw.decode()).encode()
    except UnicodeDecodeError:
        return raw


def class_name(name: str) -> str:
    """The name of a class, as it is in every locale, from that of its folder."""
    return utf8(name).decode(errors="surrogateescape")


def missing(given: Container[str], val: bool) -> list[str]:
    """The parts that have to be drawn from the images to train with."""
    return [part for part in ("test", "val")[: 1 + val] if part not in given]


def draw(names: Sequence[str], seed: int, parts: Iterable[str]) -> list[str]:
    """The part of each name: one of ``parts``, as far as its share goes, else "train".

    It depends on the name and ``seed`` alone, so that a new or a renamed file moves no other. Only
    a part that no name would be in gets the one that is nearest to it.
    """
    numbers = [_number(name, seed) for name in names]
    drawn = ["train"] * len(names)
    for part in parts:
        low, high = SHARES[part]
        free = [at for at, taken in enumerate(drawn) if taken == "train"]
        inside = [at for at in free if low <= numbers[at] < high]
        if free and not inside:
            inside = [min(free, key=lambda at: abs(numbers[at] - low))]
        for at in inside:
            drawn[at] = part
    return drawn


def _number(name: str, seed: int) -> float:
    """A number from 0 to 1, evenly distributed over names and seeds."""
    key = seed.to_bytes(8, "big")
    digest = hashlib.blake2b(utf8(name), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "big") / 2**64


def identity(records: Iterable[bytes]) -> str:
    """A digest of what a data set is made of, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for record in records:
        digest.update(len(record).to_bytes(8, "big"))
        digest.update(record)
    return digest.hexdigest()
