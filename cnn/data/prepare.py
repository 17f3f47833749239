"""What a model is given of an image."""

from dataclasses import dataclass

import torch
from torch import Tensor

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet's photographs, by which torchvision's models are trained."""


@dataclass(frozen=True)
class Description:
    """What must be known of a data set to prepare other images alike. A checkpoint holds it.

    Args:
        mean, std: of the training set's pixels, one per channel, black 0 and white 1.
        pixels: whether images are pixels, uint8; if not, they are float32 and taken as they are.
        identity: a digest of the images to train and to validate with, or nothing.
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
    """Takes images [N, C, H, W] to a device: float32, pixels with mean 0 and variance 1."""

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
