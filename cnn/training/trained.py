"""Use from Python of a model that ``train`` wrote."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data import Description, Normalize, as_pixels, photograph
from ..errors import UsageError
from . import checkpoint as checkpoints
from . import networks, weights


class Transform:
    """Prepares images in the same way as for the model's training.

    Takes a file's path, a Pillow image, an array [H, W, C], a tensor [C, H, W] or a batch of such
    tensors, in uint8 if the model was trained on pixels. The shorter side is scaled to the model's
    ``size``, and the center is cropped.

    Returns float32 [C, size, size], or [N, C, size, size] for a batch, on the model's device.
    Raises ValueError or TypeError for anything else, and UsageError if a file cannot be read.
    """

    def __init__(self, description: Description, device: torch.device):
        self.description = description
        self._prepare = Normalize(description, device)

    def __call__(self, image: Any) -> Tensor:
        if isinstance(image, Tensor) and image.dim() == 4:
            return torch.stack([self(each) for each in image])
        known = self.description
        if isinstance(image, str | os.PathLike):
            pixels = photograph(os.fspath(image), known.size, known.channels)
        else:
            pixels = as_pixels(image, known)
        return self._prepare(pixels[None])[0]


class Trained(NamedTuple):
    """A trained model in evaluation mode, the transform for its images, and its class names."""

    model: nn.Module
    transform: Transform
    classes: tuple[str, ...]


def load(
    path: str | os.PathLike,
    device: torch.device | str = "cpu",
    model: networks.Source | None = None,
) -> Trained:
    """Load what ``python -m cnn train`` wrote: a run's folder, a checkpoint or its safetensors.

    From a folder it loads best.pt, else best.safetensors, else last.pt if the first epoch is not
    complete. No code named in a file is run: if the model was given as MODULE:FUNCTION, ``model``
    must be that function, or a module that it returns.

    Returns ``model, transform, classes`` as a named tuple: see ``Trained`` and ``Transform``.
    Raises cnn.errors.UsageError if the file cannot be read, is damaged, or is not a checkpoint.

    Example:
        >>> model, transform, classes = cnn.load("runs/lenet5-digits")  # doctest: +SKIP
        >>> logits = model(transform("seven.png")[None])  # doctest: +SKIP
        >>> classes[logits.argmax()]  # doctest: +SKIP
        '7'
    """
    names = ("best.pt", "best.safetensors", "last.pt")
    files = [checkpoints.of_run(Path(path), name) for name in names]
    file = next(filter(Path.exists, files), files[-1])
    parameters, checkpoint = weights.read(file)
    if checkpoint is None:
        raise UsageError(f"{file} holds only weights, without the model and the classes")
    known = checkpoints.description(checkpoint, file)
    config = checkpoints.configuration(checkpoint, file)
    if model is None and networks.runs_code(config["model"]):
        raise UsageError(
            f"{file} names a model that is code: give model=, {config['model']} itself"
        )
    built = weights.build(config["model"], parameters, known.size, file, known, model)
    layout = torch.channels_last if config.get("channels_last") else torch.contiguous_format
    built = built.to(device, memory_format=layout).eval()  # type: ignore[call-overload]
    return Trained(built, Transform(known, torch.device(device)), known.classes)
