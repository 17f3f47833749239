"""What a model is given of an image."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Description:
    """What must be known of a data set to prepare other images alike. A checkpoint holds it.

    ``mean`` and ``std`` are of the training set's pixels, one a channel, black 0 and white 1.
    """

    classes: tuple[str, ...]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return len(self.mean)


class Preparation:
    """Takes uint8 images [N, C, H, W] to a device: float32 of mean 0 and variance 1."""

    def __init__(
        self,
        description: Description,
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        self.device = device
        self.memory_format = memory_format
        mean, std = (
            torch.tensor(values, dtype=torch.float64)[:, None, None] * 255
            for values in (description.mean, description.std)
        )
        self._scale = (1 / std).float().to(device)
        self._shift = (-mean / std).float().to(device)

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        return torch.addcmul(self._shift, images, self._scale)
