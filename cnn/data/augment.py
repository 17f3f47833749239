"""Stateless augmentation."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .custom import Samples


class Augmented(Dataset):
    """A data set whose images are shifted, and mirrored if the set allows it.

    Images are padded with black by an eighth on each side, then cropped; half of them are mirrored.
    (seed, epoch, index) determine both, so workers hold no state and an epoch can be entered
    anywhere. Items are indexed by (epoch, index).
    """

    def __init__(self, data: Dataset, seed: int, *, shift: bool, mirror: bool):
        self.data = data
        self.seed = seed
        self.shift = shift
        self.mirror = mirror

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = place
        if isinstance(self.data, Samples):  # which may itself draw random numbers
            image, label = self.data.at(index, self.seed, epoch)
        else:
            image, label = self.data[index]
        if not self.shift:
            return image, label
        size = image.shape[-1]
        margin = size // 8
        draw = np.random.default_rng((self.seed, epoch, index + 1))  # without index: the order
        top, left, mirror = draw.integers((2 * margin + 1, 2 * margin + 1, 2)).tolist()
        image = F.pad(image, (margin,) * 4)[:, top : top + size, left : left + size]
        return (image.flip(-1) if mirror and self.mirror else image), label
