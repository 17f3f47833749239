"""What the layers of a network have learned, as pictures.

After Zeiler and Fergus, "Visualizing and understanding convolutional networks" (2014). Each tool is
a function that returns tensors, with a ``figure`` of them, for any network of torch's layers or
this library's.
"""

from .deconvnet import Deconvnet, Projections, deconvnet, project
from .evolution import Evolution, evolution
from .filters import Filters, filters
from .maps import Maps, maps
from .pictures import normalise_first

__all__ = [
    "Deconvnet",
    "Evolution",
    "Filters",
    "Maps",
    "Projections",
    "deconvnet",
    "evolution",
    "filters",
    "maps",
    "normalise_first",
    "project",
]
