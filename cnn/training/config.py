"""A run's settings: those that fix its numbers, and those that may change when it is resumed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from operator import eq
from pathlib import Path
from typing import Any

from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, OneCycleLR

from ..data import same_set
from ..errors import UsageError
from . import checkpoint as checkpoints

AMP = ("bf16", "fp16", "off")

OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], float, float]] = {
    "adamw": (AdamW, 1e-3, 1e-2),
    "sgd": (lambda *args, **kw: SGD(*args, momentum=0.9, nesterov=True, **kw), 0.05, 5e-4),
}
"""The optimizers, each with its default rate and weight decay."""

SCHEDULES: dict[str, Callable[[Optimizer, float, int], LRScheduler]] = {
    "one-cycle": lambda optimizer, lr, steps: OneCycleLR(optimizer, lr, steps),
    "cosine": lambda optimizer, lr, steps: CosineAnnealingLR(optimizer, steps),
    "constant": lambda optimizer, lr, steps: ConstantLR(optimizer, 1.0, 0),
}


@dataclass(frozen=True)
class Config:
    """The settings that fix a run's numbers; a resumed run keeps them.

    ``batch_size`` counts the images of a step over all processes. ``patience`` is the number of
    epochs without a better one after which a run stops; 0 means never.
    """

    model: str = "lenet5"
    data: str = "digits"
    size: int | None = None
    epochs: int = 10
    patience: int = 0
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float | None = None
    weight_decay: float | None = None
    schedule: str = "one-cycle"
    label_smoothing: float = 0.0
    ema: float = 0.0
    augment: bool = False
    amp: str = "off"
    channels_last: bool = False
    compile: bool = False
    sync_bn: bool = False
    seed: int = 0
    init: str | None = None
    freeze: tuple[str, ...] = ()

    @classmethod
    def of(cls, checkpoint: dict[str, Any], path: Path) -> "Config":
        """The configuration in the checkpoint ``path``. Raises UsageError if it is not valid."""
        values, known_as = (
            checkpoints.configuration(checkpoint, path),
            f"the configuration in {path}",
        )
        config = checkpoints.record(cls, values, known_as)
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("amp", AMP)):
            if (value := vars(config)[name]) not in known:
                raise UsageError(f"{known_as} has {name}={value!r}, none of {', '.join(known)}")
        return config

    def resumed(self, given: dict[str, Any], path: Path) -> "Config":
        """This configuration of the checkpoint ``path``, if the arguments ``given`` agree with it.

        Files may have moved: for data in files only the name must agree.
        """
        known = asdict(self)
        for name, value in given.items():
            same = same_set if name == "data" else eq
            if not same(value, known[name]):
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag}: {value} contradicts {known[name]} of {path}")
        return Config(**{**known, **given})


@dataclass(frozen=True)
class RunOptions:
    """The settings that may change when a run is resumed.

    Args:
        folder: folder of the checkpoints last.pt and best.pt, and of the log.
        workers: number of processes that load images, for each process of the run.
        save_every: steps, or seconds if ``in_seconds``, between checkpoints within an epoch.
        broken: what to do about an unreadable image, "skip" or "stop".
        keep_every: epochs between checkpoints that are kept, as epoch-1.pt; 0 for none.
    """

    folder: Path
    workers: int = 0
    save_every: float = 600.0
    in_seconds: bool = True
    broken: str = "stop"
    keep_every: int = 0
