"""Training, evaluation and checkpoints of an image classifier."""

import errno
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm


def fit(
    model: nn.Module,
    data: TensorDataset,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
) -> Iterator[float]:
    """Train ``model``, which is on ``device``; yields the mean loss of each epoch as it ends.

    AdamW under the one-cycle schedule with its peak at ``lr``; ``seed`` fixes the order of images.
    Within an epoch a progress bar shows on a terminal.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = DataLoader(data, batch_size, shuffle=True, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * len(batches))
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        bar = tqdm(batches, f"epoch {epoch}/{epochs}", leave=False, disable=None, unit="step")
        for images, labels in bar:
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(labels)
            bar.set_postfix(loss=f"{loss.item():.3f}")
        yield total / len(data)


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset, device: torch.device) -> float:
    """The share of ``data`` that ``model``, which is on ``device``, labels rightly."""
    model.eval()
    right = 0
    for images, labels in DataLoader(data, batch_size=512):
        right += (model(images.to(device)).argmax(1).cpu() == labels).sum().item()
    return right / len(data)


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that ``path`` always holds a whole one: the old, then the new.

    Raises OSError where ``path`` cannot be written.
    """
    whole = BytesIO()  # torch.save into a file hides what the system says of a full disk
    torch.save(checkpoint, whole)
    part = _part(path)
    try:
        part.write_bytes(whole.getbuffer())
        part.replace(path.resolve())
    finally:
        part.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise OSError unless ``save`` can write ``path``; changes nothing."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file")
    part = _part(path)
    part.touch()
    part.unlink()


def _part(path: Path) -> Path:
    """Where a checkpoint is written before it replaces ``path``: the same folder."""
    path = path.resolve()
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote: "model", "state_dict", "epochs" and "accuracy", on the CPU.

    Raises OSError where ``path`` cannot be read, ValueError where it holds no checkpoint.
    """
    with path.open("rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{path} is not a checkpoint") from error
    if not isinstance(checkpoint, dict) or not {"model", "state_dict"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint")
    return checkpoint
