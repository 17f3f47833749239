"""Checkpoints: files that are whole at any moment, and that run no code when they are read."""

import os
import platform
import warnings
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .data import Description
from .problem import Problem

FORMAT = 1
KEYS = {"format", "versions", "config", "description", "state_dict", "position", "training"}


def save(checkpoint: dict[str, Any], *paths: Path) -> None:
    """Write ``checkpoint`` with format and versions to each path: always the old or the new, whole.

    Raises OSError that names the path where that cannot be done.
    """
    packages = ("torch", "triton", "numpy", "triton-cnn")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    whole = BytesIO()  # torch.save into a file hides what the system says of a full disk
    torch.save({"format": FORMAT, "versions": versions, **checkpoint}, whole)
    for path in paths:
        write(path, whole.getbuffer())


def write(path: Path, contents: Any) -> None:
    """Replace ``path`` by a file of ``contents`` in one step that outlasts a loss of power."""
    path = path.resolve()
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def prepare(folder: Path) -> None:
    """Make the folder of a run, without what a killed one was writing.

    Raises Problem where nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob(".*.part"):
            part.unlink(missing_ok=True)
        write(folder / "last.pt.try", b"")
        (folder / "last.pt.try").unlink(missing_ok=True)
    except OSError as error:
        raise Problem(f"cannot write {folder}: {error.strerror}") from None


def clear(folder: Path) -> None:
    """Remove the run that ``folder`` holds, and nothing else."""
    for name in ("last.pt", "best.pt", "log.csv", "log.jsonl", "curves.png"):
        (folder / name).unlink(missing_ok=True)
    for path in kept(folder).values():
        path.unlink()


def kept(folder: Path) -> dict[int, Path]:
    """The checkpoints of whole epochs that the run in ``folder`` has kept, by epoch."""
    found = {path.stem.removeprefix("epoch-"): path for path in folder.glob("epoch-*.pt")}
    return {int(epoch): found[epoch] for epoch in sorted(filter(str.isdecimal, found), key=int)}


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote, on the CPU. Raises Problem where ``path`` holds something else."""
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("format"), int):
        raise Problem(f"{path} is not a checkpoint of python -m cnn train")
    if checkpoint["format"] != FORMAT:
        raise Problem(f"{path} has format {checkpoint['format']}, this version reads {FORMAT}")
    if not checkpoint.keys() >= KEYS:
        raise Problem(f"{path} lacks {', '.join(sorted(KEYS - checkpoint.keys()))}")
    return checkpoint


def load_parameters(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The parameters in a checkpoint, and it; or those of a bare file, as torchvision's, and None.

    Raises Problem where ``path`` holds something else.
    """
    contents = _read(path)
    if isinstance(contents, dict) and contents and all(map(torch.is_tensor, contents.values())):
        return contents, None
    checkpoint = load(path)
    return checkpoint["state_dict"], checkpoint


def build(name: str, parameters: dict[str, Tensor], image_size: int, path: Path) -> nn.Module:
    """The model ``name`` with the parameters of ``path``, which tell its classes and channels.

    Raises Problem where they do not fit together.
    """
    weights = [value for value in parameters.values() if value.dim() > 1]
    try:
        options = {"num_classes": len(weights[-1]), "in_channels": weights[0].shape[1]}
        with warnings.catch_warnings(action="ignore"):  # of an empty layer
            model = models.create(name, image_size=image_size, **options)
        model.load_state_dict(parameters)
    except (IndexError, RuntimeError):
        size = f"{image_size}x{image_size} pixels"
        raise Problem(f"{path} does not hold the parameters of {name} for {size}") from None
    return model


def description(checkpoint: dict[str, Any]) -> Description:
    """What the data was on which the model of a checkpoint was trained."""
    return Description(**checkpoint["description"])


def _read(path: Path) -> Any:
    try:
        file = path.open("rb")
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror}") from None
    with file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # a damaged file can raise anything
            raise Problem(f"{path} is damaged or not a checkpoint") from None
