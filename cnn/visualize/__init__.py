"""What the layers of a network have learned, as pictures.

After Zeiler and Fergus, "Visualizing and understanding convolutional networks" (2014). Each tool is
a function that returns tensors, with a ``figure`` of them, for any network of torch's layers or
this library's.
"""

from .invariance import Curves, Invariance, invariance, transformed
from .maps import Maps, strongest_maps
from .occlusion import Occlusion, occlusion
from .pictures import normalise_first

__all__ = [
    "Curves",
    "Invariance",
    "Maps",
    "Occlusion",
    "invariance",
    "normalise_first",
    "occlusion",
    "strongest_maps",
    "transformed",
]
