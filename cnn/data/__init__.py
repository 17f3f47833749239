"""Data sets of labelled images by name; nothing is downloaded.

``load`` gives a part each to train with, to validate with and to test with. Images are uint8
[C, size, size] until a batch of them is on its device, where ``Normalize`` makes them what a
model takes.
"""

from .augment import Augmented
from .batches import Batches
from .custom import as_pixels, call, fitting, is_code
from .files import PHOTOGRAPHS, UNCOUNTED, ImageFiles, UnreadableImages, image_files, photograph
from .parts import Data, class_name
from .prepare import IMAGENET, Description, Normalize
from .sets import NAMES, load, runs_code, same_set

__all__ = [
    "IMAGENET",
    "NAMES",
    "PHOTOGRAPHS",
    "UNCOUNTED",
    "Augmented",
    "Batches",
    "Data",
    "Description",
    "ImageFiles",
    "Normalize",
    "UnreadableImages",
    "as_pixels",
    "call",
    "class_name",
    "fitting",
    "image_files",
    "is_code",
    "load",
    "photograph",
    "runs_code",
    "same_set",
]
