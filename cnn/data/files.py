"""Images in files, read with Pillow."""

import os
import stat
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import FAILURE, UsageError, missing
from .pixels import fit, pillow

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SYSTEM = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
"""Folders that operating systems add, in lower case."""

UNCOUNTED = -100  # torch's label for a sample to ignore


class ImageFiles(Dataset):
    """Image files with labels, as uint8 [channels, size, size].

    The shorter side is scaled to ``size``, and the center is cropped; transparency becomes white.
    An unreadable file gives a black image with the label -1 minus its index.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], size: int, channels: int = 3):
        pillow()  # if Pillow is missing, no image is to blame
        self.paths = paths
        self.labels = labels
        self.size = size
        self.channels = channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return self.read(index), self.labels[index]
        except UsageError:
            return torch.zeros(self.channels, self.size, self.size, dtype=torch.uint8), -1 - index

    def read(self, index: int) -> Tensor:
        """Read an image. Raises UsageError if that fails."""
        path, (image, _) = self.paths[index], pillow()
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait
                raise OSError("it is not a file")
            with warnings.catch_warnings(action="ignore"), image.open(path) as file:
                if file.format == "EPS":  # Pillow would start Ghostscript for it
                    raise ValueError("it is PostScript, a program")
                return fit(file, self.size, self.channels)
        except Exception as error:  # decoders can raise anything
            raise unreadable(path, error) from None

    def name(self, index: int) -> str:
        """A name that identifies an image."""
        return str(self.paths[index])


def unreadable(name: object, error: BaseException) -> UsageError:
    """The error for an image ``name`` whose reading raised ``error``."""
    words = str(getattr(error, "strerror", None) or error)
    words = "it ends the program" if isinstance(error, SystemExit) else words
    reason = words.replace(f" {str(name)!r}", "") or type(error).__name__
    return UsageError(f"cannot read {name}: {reason}", FAILURE)


PHOTOGRAPHS = {
    "skimage": (
        *("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "colorwheel", "grass"),
        *("gravel", "hubble_deep_field", "moon", "retina", "rocket"),
    ),
    "sklearn": ("china", "flower"),
}
"""The images included in scikit-image and scikit-learn."""


def photograph(name: str, size: int, channels: int = 3) -> Tensor:
    """An image as uint8 [channels, size, size]: a file, or one of PHOTOGRAPHS as "skimage:coffee".

    Raises UsageError if it does not exist or cannot be read.
    """
    source, _, which = name.partition(":")
    if source not in PHOTOGRAPHS:
        return ImageFiles([Path(name)], [0], size, channels).read(0)
    if which not in PHOTOGRAPHS[source]:
        known = ", ".join(f"{source}:{which}" for which in PHOTOGRAPHS[source])
        raise UsageError(f"{name!r} is none of {known}")
    image, _ = pillow()
    if source == "sklearn":
        from sklearn.datasets import load_sample_image  # takes its time

        return fit(image.fromarray(load_sample_image(f"{which}.jpg")), size, channels)
    try:
        from skimage import data
    except ImportError:
        raise missing("scikit-image", f"the image {name}", "show") from None
    return fit(image.fromarray(getattr(data, which)()), size, channels)


class UnreadableImages:
    """Finds images that could not be read by their labels.

    Under ``policy`` "stop" the first raises UsageError. Under "skip" each is reported once by
    ``tell``, and does not count.
    """

    def __init__(self, data: Any, policy: str, tell: Callable[[str], None]):
        self.data = data
        self.policy = policy
        self.tell = tell
        self._known: set[int] = set()

    def __call__(self, labels: Tensor) -> Tensor:
        """The labels, with UNCOUNTED for each unreadable image."""
        if not len(labels) or labels.min() >= 0:
            return labels
        for index in (-1 - labels[labels < 0]).tolist():
            if self.policy == "stop":
                reason = self._reason(index)
                raise UsageError(f"{reason}; --broken skip continues without it", FAILURE)
            if index not in self._known:
                self._known.add(index)
                self.tell(f"{self._reason(index)}; skipped")
        return labels.where(labels >= 0, UNCOUNTED)

    def _reason(self, index: int) -> str:
        try:
            self.data.read(index)
        except UsageError as problem:
            return str(problem)
        return f"cannot always read {self.data.name(index)}"


def hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to the system or an editor."""
    return name.startswith(".") or name.casefold() in SYSTEM


def image_files(folder: Path) -> list[Path]:
    """All image files below ``folder``, by their suffixes, sorted by name.

    Hidden files and folders, system folders, pipes and devices are left out. Folders that are links
    are not entered.
    """
    found, folders = [], [str(folder)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                seen = [entry for entry in entries if not hidden(entry.name)]
        except OSError as error:
            raise UsageError(f"cannot read {error.filename}: {error.strerror}") from None
        folders += [entry.path for entry in seen if entry.is_dir(follow_symlinks=False)]
        found += [Path(entry.path) for entry in seen if is_image(entry)]
    return sorted(found, key=os.fsencode)


def is_image(entry: os.DirEntry) -> bool:
    """Whether an entry has an image's name and is a file, or a link to a file or to nothing.

    Reading the latter reports the broken link.
    """
    if hidden(entry.name) or Path(entry.name).suffix.lower() not in SUFFIXES:
        return False
    if not entry.is_symlink():
        return entry.is_file(follow_symlinks=False)
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return True
