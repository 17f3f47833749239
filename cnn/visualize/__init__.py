"""What the layers of a network have learned, as pictures.

After Zeiler and Fergus, "Visualizing and understanding convolutional networks" (2014). Each tool is
a function that returns tensors, with a ``figure`` of them, for any network of torch's layers or
this library's.
"""

from .ablation import Ablation, MapAblation, ablation, map_ablation
from .architecture import Architecture, Block, architecture
from .correspondence import Correspondence, correspondence
from .maps import Maps, strongest_maps
from .pictures import normalise_first
from .receptive_field import ReceptiveFields, receptive_field

__all__ = [
    "Ablation",
    "Architecture",
    "Block",
    "Correspondence",
    "MapAblation",
    "Maps",
    "ReceptiveFields",
    "ablation",
    "architecture",
    "correspondence",
    "map_ablation",
    "normalise_first",
    "receptive_field",
    "strongest_maps",
]
