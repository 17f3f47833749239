"""What the layers of a network have learned, as pictures.

After Zeiler and Fergus, "Visualizing and understanding convolutional networks" (2014). Each tool is
a function that returns tensors, with a ``figure`` of them, for any network of torch's layers or
this library's.
"""

from .deconvnet import Deconvnet, Projections, deconvnet, project
from .evolution import Evolution, evolution
from .filters import Filters, filters
from .invariance import Curves, Invariance, invariance, transformed
from .maps import Maps, maps
from .occlusion import Occlusion, occlusion
from .pictures import normalise_first

__all__ = [
    "Curves",
    "Deconvnet",
    "Evolution",
    "Filters",
    "Invariance",
    "Maps",
    "Occlusion",
    "Projections",
    "deconvnet",
    "evolution",
    "filters",
    "invariance",
    "maps",
    "normalise_first",
    "occlusion",
    "project",
    "transformed",
]
