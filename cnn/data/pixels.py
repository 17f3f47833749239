"""Turn Pillow images into tensors: upright, 8 bits, without transparency, and square."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import missing

BACKGROUND = "white"
"""The color behind transparent pixels."""

ORIENTATION, BITS_PER_SAMPLE = 0x0112, 0x0102  # of EXIF and TIFF

TURNS = (
    *("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM"),
    *("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"),
)
"""Pillow's operation that makes an image of orientation 2 to 8 upright."""

DEEP = {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}
"""Pillow's modes of grey images with more than 8 bits."""


def fit(picture: Any, size: int, channels: int) -> Tensor:
    """A picture as uint8 [channels, size, size]: scaled, then cropped at the center."""
    image, ops = pillow()
    if channels not in (1, 3):
        raise ValueError(f"it is a Pillow image, and has no {channels} channels")
    picture.load()
    upright = turned(eight_bits(picture), orientation(picture))
    coloured = opaque(upright).convert("L" if channels == 1 else "RGB")
    square = ops.fit(coloured, (size, size), image.Resampling.BILINEAR)
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, channels).permute(2, 0, 1)


def orientation(picture: Any) -> int:
    """The orientation in the picture's EXIF; 1, upright, if the EXIF cannot be read."""
    try:  # not ImageOps.exif_transpose, which rewrites the whole EXIF
        number = picture.getexif().get(ORIENTATION)
    except Exception:  # Pillow's reader can raise anything
        return 1
    return int(number) if number in range(1, 9) else 1


def turned(picture: Any, orientation: int) -> Any:
    """The picture turned upright."""
    if orientation == 1:
        return picture
    return picture.transpose(pillow()[0].Transpose[TURNS[orientation - 2]])


def eight_bits(picture: Any) -> Any:
    """The picture with shades scaled to 0 to 255 if it has more than 8 bits.

    White is 65,535 in 16 bits, and the largest number of 9 to 15 bits in a TIFF that has these.
    32-bit numbers do not say what white is: it is the lowest of 1 (floating point only), 255 and
    65,535 that no pixel exceeds. If pixels are negative or exceed all of these, the darkest becomes
    black and the brightest white.
    """
    if picture.mode not in DEEP:
        return picture
    image, _ = pillow()
    values = np.asarray(picture).astype(np.float64 if picture.mode in "IF" else np.float32)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 1.0)
    white = next((white for white in _whites(picture) if high <= white), None)
    if low < 0 or white is None:
        black, span = low, max(high - low, 1e-300)
    else:
        black, span = 0.0, white
    shades = (np.nan_to_num(values, nan=black, posinf=high, neginf=low) - black) / span * 255
    return image.fromarray(shades.round().clip(0, 255).astype(np.uint8))


def _whites(picture: Any) -> tuple[int, ...]:
    """The possible values of white in a picture of a DEEP mode, lowest first."""
    if picture.mode == "F":
        return 1, 255, 65535
    if picture.mode == "I" and picture.format not in ("PNG", "PPM"):  # 16 bits, in Pillow's 32
        return 255, 65535
    bits = getattr(picture, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))
    return (2 ** min(bits[0], 16) - 1,)


def opaque(picture: Any) -> Any:
    """The picture on a plain BACKGROUND."""
    if not picture.has_transparency_data:
        return picture
    image, _ = pillow()
    if picture.mode == "La":
        picture = picture.convert("LA")
    background = image.new("RGBA", picture.size, BACKGROUND)
    background.alpha_composite(picture.convert("RGBA"))
    return background


def pillow():
    """Pillow's modules Image and ImageOps."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise missing("Pillow", "reading image files") from None
    return Image, ImageOps
