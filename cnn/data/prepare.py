"""Turn images into a model's input."""

from dataclasses import dataclass

import torch
from torch import Tensor

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's photographs, used to train torchvision's models."""


@dataclass(frozen=True)
class Description:
    """Everything needed to prepare other images like a data set's. A checkpoint holds it.

    Args:
        mean, std: of the training set's pixels, one per channel, with black 0 and white 1.
        pixels: whether images are uint8 pixels; otherwise they are float32 and used as they are.
        identity: a digest of the training and validation images, or "".
    """

    classes: tuple[str, ...]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixels: bool = True
    identity: str = ""

    @property
    def channels(self) -> int:
        return len(self.mean)


class Normalize:
    """Moves images [N, C, H, W] to a device as float32; pixels get mean 0 and variance 1."""

    def __init__(
        self,
        description: Description,
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        self.device = device
        self.memory_format = memory_format
        white = 255 if description.pixels else 1
        mean, std = (
            torch.tensor(values, dtype=torch.float64)[:, None, None] * white
            for values in (description.mean, description.std)
        )
        self._scale = (1 / std).float().to(device)
        self._shift = (-mean / std).float().to(device)

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        return torch.addcmul(self._shift, images, self._scale)


def moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images, with white as 1."""
    counts = torch.stack([c.bincount(minlength=256) for c in images.transpose(0, 1).flatten(1)])
    shares = counts.double() / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ levels
    std = (shares @ levels**2 - mean**2).clamp(min=1e-12).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
