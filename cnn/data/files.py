"""Images in files, through Pillow."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..problem import FAILURE, Problem, missing

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
UNCOUNTED = -100  # torch's label for a sample that does not count


class ImageFiles(Dataset):
    """Image files with labels, as uint8 [channels, size, size].

    The shorter side is scaled to ``size``, and the middle is cut out. A file that cannot be read is
    a black image, whose label is -1 less its index.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], size: int, channels: int = 3):
        _pillow()  # its absence is no fault of an image
        self.paths = paths
        self.labels = labels
        self.size = size
        self.channels = channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return self.read(index), self.labels[index]
        except Problem:
            return torch.zeros(self.channels, self.size, self.size, dtype=torch.uint8), -1 - index

    def read(self, index: int) -> Tensor:
        """Read an image; raises Problem where that cannot be done."""
        image, ops = _pillow()
        path = self.paths[index]
        try:
            with image.open(path) as file:
                return fit(ops.exif_transpose(file), self.size, self.channels)
        except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or f"{error}".replace(f" {str(path)!r}", "")
            raise Problem(f"cannot read {path}: {reason}", FAILURE) from None


def fit(picture: Any, size: int, channels: int) -> Tensor:
    """An image of Pillow's as uint8 [channels, size, size]: scaled, then its middle cut out."""
    image, ops = _pillow()
    coloured = picture.convert("L" if channels == 1 else "RGB")
    square = ops.fit(coloured, (size, size), image.Resampling.BILINEAR)
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, channels).permute(2, 0, 1)


PHOTOGRAPHS = {
    "skimage": (
        *("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "colorwheel", "grass"),
        *("gravel", "hubble_deep_field", "moon", "retina", "rocket"),
    ),
    "sklearn": ("china", "flower"),
}
"""The images that come with scikit-image and with scikit-learn."""


def photograph(name: str, size: int, channels: int = 3) -> Tensor:
    """An image as uint8 [channels, size, size]: a file, or "skimage:coffee" of PHOTOGRAPHS.

    Raises Problem where there is none, or it cannot be read.
    """
    source, _, which = name.partition(":")
    if source not in PHOTOGRAPHS:
        return ImageFiles([Path(name)], [0], size, channels).read(0)
    if which not in PHOTOGRAPHS[source]:
        known = ", ".join(f"{source}:{which}" for which in PHOTOGRAPHS[source])
        raise Problem(f"{name!r} is none of {known}")
    image, _ = _pillow()
    if source == "sklearn":
        from sklearn.datasets import load_sample_image  # takes its time

        return fit(image.fromarray(load_sample_image(f"{which}.jpg")), size, channels)
    try:
        from skimage import data
    except ImportError:
        raise missing("scikit-image", f"the image {name}", "show") from None
    return fit(image.fromarray(getattr(data, which)()), size, channels)


class Watch:
    """Looks over labels for images that could not be read.

    Under ``policy`` "stop" the first raises Problem; under "skip" ``tell`` is called once of each,
    and they do not count.
    """

    def __init__(self, data: Any, policy: str, tell: Callable[[str], None]):
        self.data = data
        self.policy = policy
        self.tell = tell
        self._known: set[int] = set()

    def __call__(self, labels: Tensor) -> Tensor:
        """Return the labels with UNCOUNTED for each image that could not be read."""
        if not len(labels) or labels.min() >= 0:
            return labels
        for index in (-1 - labels[labels < 0]).tolist():
            if self.policy == "stop":
                raise Problem(self._reason(index), FAILURE)
            if index not in self._known:
                self._known.add(index)
                self.tell(f"{self._reason(index)}; skipped")
        return labels.where(labels >= 0, UNCOUNTED)

    def _reason(self, index: int) -> str:
        try:
            self.data.read(index)
        except Problem as problem:
            return str(problem)
        return f"cannot always read {self.data.paths[index]}"


def _pillow():
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise missing("Pillow", "reading image files") from None
    return Image, ImageOps


def image_files(folder: Path) -> list[Path]:
    """All image files below ``folder``, by their suffixes, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
