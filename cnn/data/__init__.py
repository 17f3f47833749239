"""Data sets of labelled images by name; nothing is downloaded.

``load`` returns the training, validation and test part of a set. Images are uint8 [C, size, size].
``Normalize`` moves a batch of them to its device and turns it into a model's input.
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
