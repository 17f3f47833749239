"""Pictures of what the layers of a network have learned.

After Zeiler and Fergus, "Visualizing and understanding convolutional networks" (2014). Each tool is
a function that returns tensors, with a ``figure`` method. It works on any network of torch's layers
or this library's.
"""

from .ablation import Ablation, ablation
from .architecture import Architecture, Block, architecture
from .correspondence import Correspondence, correspondence
from .deconvnet import Deconvnet, Projections, deconvnet, project
from .filters import Evolution, Filters, evolution, filters
from .invariance import Curves, Invariance, invariance, transformed
from .maps import Maps, maps
from .occlusion import Occlusion, occlusion
from .pictures import normalize_first
from .receptive_field import ReceptiveFields, receptive_field

__all__ = [
    "Ablation",
    "Architecture",
    "Block",
    "Correspondence",
    "Curves",
    "Deconvnet",
    "Evolution",
    "Filters",
    "Invariance",
    "Maps",
    "Occlusion",
    "Projections",
    "ReceptiveFields",
    "ablation",
    "architecture",
    "correspondence",
    "deconvnet",
    "evolution",
    "filters",
    "invariance",
    "maps",
    "normalize_first",
    "occlusion",
    "project",
    "receptive_field",
    "transformed",
]
