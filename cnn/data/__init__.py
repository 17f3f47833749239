"""Data sets of labelled images by name; nothing is downloaded.

Images are uint8 [C, size, size] until a batch of them is on its device, where ``Preparation`` makes
them what a model takes.
"""

from .augment import Augmented
from .batches import Batches
from .files import PHOTOGRAPHS, UNCOUNTED, ImageFiles, Watch, image_files, photograph
from .prepare import Description, Preparation
from .sets import NAMES, Data, load

__all__ = [
    "NAMES",
    "PHOTOGRAPHS",
    "UNCOUNTED",
    "Augmented",
    "Batches",
    "Data",
    "Description",
    "ImageFiles",
    "Preparation",
    "Watch",
    "image_files",
    "load",
    "photograph",
]
