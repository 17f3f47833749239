"""The parts of a data set: training, validation and test."""

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
"""The part that a usual name means, in lower case."""

USES = {"train": "training", "val": "validation", "test": "test"}

SHARES = {"test": (0.0, 0.2), "val": (0.2, 0.3)}
"""Shares of the numbers from 0 to 1 that choose an image's part: a fifth and a tenth of all."""


@dataclass(frozen=True)
class Data:
    """Disjoint parts of (image [channels, size, size], label).

    Args:
        mirrors: whether a mirrored image could also be in the set.
        val: the validation part; None if there is none and none was requested.
        notes: sentences about anything unusual in the set.
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
    """A class's name from its folder's name, the same in every locale."""
    return utf8(name).decode(errors="surrogateescape")


def missing(given: Container[str], val: bool) -> list[str]:
    """The parts that must be drawn from the training images."""
    return [part for part in ("test", "val")[: 1 + val] if part not in given]


def draw(names: Sequence[str], seed: int, parts: Iterable[str]) -> list[str]:
    """The part of each name: one of ``parts``, according to its share, else "train".

    It depends only on the name and ``seed``, so a new or renamed file moves no other. The one
    exception: a part that would be empty gets the name that is nearest to it.
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
    """A digest of a data set's contents, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for record in records:
        digest.update(len(record).to_bytes(8, "big"))
        digest.update(record)
    return digest.hexdigest()
