"""Training an image classifier: one run, from its first or any later step."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter, eq
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from . import checkpoint as checkpoints
from . import networks, weights
from .data import UNCOUNTED, Augmented, Batches, Data, Preparation, Watch, same_set
from .evaluate import Evaluator, autocast, in_workers, tally
from .group import Group
from .interruption import Interrupted, Interruption
from .journal import Journal, Progress, tell
from .options import AMP, check_size
from .problem import FAILURE, Problem

OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], float, float]] = {
    "adamw": (AdamW, 1e-3, 1e-2),
    "sgd": (lambda *args, **kw: SGD(*args, momentum=0.9, nesterov=True, **kw), 0.05, 5e-4),
}
"""Each with its usual rate and weight decay."""

SCHEDULES: dict[str, Callable[[Optimizer, float, int], LRScheduler]] = {
    "one-cycle": lambda optimizer, lr, steps: OneCycleLR(optimizer, lr, steps),
    "cosine": lambda optimizer, lr, steps: CosineAnnealingLR(optimizer, steps),
    "constant": lambda optimizer, lr, steps: ConstantLR(optimizer, 1.0, 0),
}


@dataclass(frozen=True)
class Config:
    """What fixes the numbers of a run; one that is resumed keeps it.

    ``batch_size`` counts the images of a step over all processes.
    """

    model: str = "lenet5"
    data: str = "digits"
    size: int | None = None
    epochs: int = 10
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
        """The configuration in the checkpoint ``path``. Raises Problem if it is none."""
        values, known_as = (
            checkpoints.configuration(checkpoint, path),
            f"the configuration in {path}",
        )
        config = checkpoints.record(cls, values, known_as)
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("amp", AMP)):
            if (value := vars(config)[name]) not in known:
                raise Problem(f"{known_as} has {name}={value!r}, none of {', '.join(known)}")
        return config

    def resumed(self, given: dict[str, Any], path: Path) -> "Config":
        """This configuration of the checkpoint ``path``, if the arguments ``given`` agree with it.

        Files may have moved: of data in files only the name must agree.
        """
        known = asdict(self)
        for name, value in given.items():
            same = same_set if name == "data" else eq
            if not same(value, known[name]):
                flag = f"--{name.replace('_', '-')}"
                raise Problem(f"{flag}: {value} contradicts {known[name]} of {path}")
        return Config(**{**known, **given})


@dataclass(frozen=True)
class Setting:
    """What may change when a run is resumed.

    Args:
        folder: of the checkpoints last.pt and best.pt, and of the log.
        workers: processes that load images, for each process of the run.
        save_every: steps, or seconds if ``in_seconds``, between checkpoints within an epoch.
        broken: "skip" or "stop" at an image that cannot be read.
        keep_every: epochs between checkpoints that stay, as epoch-1.pt; 0 for none.
    """

    folder: Path
    workers: int = 0
    save_every: float = 600.0
    in_seconds: bool = True
    broken: str = "stop"
    keep_every: int = 0


@dataclass
class Position:
    """How far a run is: whole epochs, steps of the next, the best accuracy, a row an epoch."""

    epoch: int = 0
    step: int = 0
    best: float = -1.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def _sound(tensor: Tensor) -> bool:
    """Whether all values are finite."""
    return bool(tensor.isfinite().all())


class Run:
    """A model in training with all that its next step depends on."""

    def __init__(self, config: Config, setting: Setting, data: Data, group: Group):
        self.config, self.setting, self.data, self.group = config, setting, data, group
        self.position = Position()
        self.totals = torch.zeros(3, dtype=torch.float64, device=group.device)
        self._build_model()
        self._build_loaders()
        self._build_optimizer()
        torch.manual_seed(config.seed + group.rank)  # dropout
        self._saved = time.monotonic()
        self._kept = "nothing was saved"

    def _build_model(self) -> None:
        config, description = self.config, self.data.description
        options = {
            "num_classes": len(description.classes),
            "in_channels": description.channels,
            "image_size": description.size,
        }
        torch.manual_seed(config.seed)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model = networks.create(config.model, **options)
        check_size(model.eval(), config.model, description)
        frozen = weights.freeze(model, config.freeze)
        if config.freeze and self.group.first:
            tell(frozen)
        self.prepare = Preparation(description, self.group.device, layout)
        if config.sync_bn:
            if self.group.device.type == "cpu":
                raise Problem("--sync-bn: torch's SyncBatchNorm needs GPUs")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(self.group.device, memory_format=layout)  # type: ignore[call-overload]
        self.average = None
        if config.ema:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        if config.compile:
            self.model.compile()
        self.network = DistributedDataParallel(self.model) if self.group.world > 1 else self.model

    def _build_loaders(self) -> None:
        config, setting, group, data = self.config, self.setting, self.group, self.data
        count, size = len(data.train), config.batch_size
        if size > count:
            raise Problem(f"--batch-size: {size} is more than the {count} images to train with")
        if size % group.world:
            raise Problem(f"--batch-size: {size} is not a multiple of {group.world} processes")
        self.batches = Batches(count, size, config.seed, group.rank, group.world)
        images = Augmented(data.train, config.seed, shift=config.augment, mirror=data.mirrors)
        pinned = group.device.type == "cuda"
        options = {"pin_memory": pinned, **in_workers(setting.workers)}
        self.loader = DataLoader(images, batch_sampler=self.batches, **options)  # type: ignore[arg-type]
        self.watch, watch = (Watch(part, setting.broken, tell) for part in (data.train, data.test))
        self.test = Evaluator(data.test, self.prepare, config.amp, watch, group, setting.workers)

    def _build_optimizer(self) -> None:
        config = self.config
        make, lr, decay = OPTIMIZERS[config.optimizer]
        lr = lr if config.lr is None else config.lr
        decay = decay if config.weight_decay is None else config.weight_decay
        parameters = filter(attrgetter("requires_grad"), self.model.parameters())
        self.optimizer = make(parameters, lr=lr, weight_decay=decay)
        steps = config.epochs * len(self.batches)
        self.schedule = SCHEDULES[config.schedule](self.optimizer, lr, steps)
        self.scaler = torch.amp.GradScaler(self.group.device.type, enabled=config.amp == "fp16")

    @property
    def averaged(self) -> nn.Module:
        """The model to use: of averaged parameters where there are."""
        return self.average.module if self.average else self.model

    def go(self, interruption: Interruption) -> None:
        """Train to the end, or until interrupted: then raises Interrupted after saving."""
        journal = None
        if self.group.first:
            journal = Journal(self.setting.folder, self.position.epoch)
        while self.position.epoch < self.config.epochs:
            begun, step = time.monotonic(), self.position.step
            self._train(interruption)
            images = (self.position.step - step) * self.config.batch_size
            rate = images / (time.monotonic() - begun)
            self._finish(rate, interruption, journal)

    def _train(self, interruption: Interruption) -> None:
        """The steps of an epoch that are left."""
        config, position = self.config, self.position
        weights.training(self.network)
        self.batches.epoch, self.batches.step = position.epoch, position.step
        steps = len(self.batches)
        counts = (steps * config.batch_size, position.step * config.batch_size)
        title = f"epoch {position.epoch + 1}/{config.epochs}"
        bar = Progress(title, *counts, "image", quiet=not self.group.first)
        try:
            for images, labels in self.loader:
                self._step(images, self.watch(labels))
                position.step += 1
                diverged = False
                if bar.advance(config.batch_size):
                    loss, right, count = self.totals.tolist()
                    count = max(count, 1)  # none where all images are broken
                    bar.show(loss=f"{loss / count:.4f}", accuracy=f"{right / count:.3f}")
                    diverged = not math.isfinite(loss)  # which ends the attempt to save
                signal, due = self.group.highest(interruption.signal, self._due() or diverged)
                if signal or (due and position.step < steps):
                    self.save()
                if signal:
                    raise Interrupted(signal, self._kept)
        finally:
            bar.close()

    def _step(self, images: Tensor, labels: Tensor) -> None:
        labels = labels.to(self.group.device, non_blocking=True)
        with autocast(self.group.device, self.config.amp):
            logits = self.network(self.prepare(images))
            loss = F.cross_entropy(
                *(logits, labels),
                ignore_index=UNCOUNTED,
                reduction="sum",
                label_smoothing=self.config.label_smoothing,
            )
        # Not over those that count: the processes' means are averaged.
        self.scaler.scale(loss / len(labels)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        if self.average:
            self.average.update_parameters(self.model)
        self.totals += tally(logits, labels, loss)

    def _due(self) -> bool:
        if self.setting.in_seconds:
            return time.monotonic() - self._saved >= self.setting.save_every
        return self.position.step % self.setting.save_every == 0

    def _finish(self, rate: float, interruption: Interruption, journal: Journal | None) -> None:
        """Test the model, tell and save."""

        def between() -> None:
            if interruption.signal and self.group.world == 1:
                self.save()
                raise Interrupted(interruption.signal, self._kept)

        position = self.position
        self._check_finite()
        loss, right, count = self.group.sum(self.totals).tolist()
        rates = loss / max(count, 1), right / max(count, 1)
        self.group.share(self.averaged.buffers())  # each process has its own batch statistics
        test_loss, test_accuracy = self.test(self.averaged, between)
        self._check_loss("test loss", test_loss)
        row = {
            "epoch": position.epoch + 1,
            "lr": self.schedule.get_last_lr()[0],
            "train_loss": rates[0],
            "train_accuracy": rates[1],
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "images": int(count),
            "images_per_second": round(rate, 1),
        }
        position.rows.append(row)
        position.epoch += 1
        position.step = 0
        self.totals.zero_()
        better = test_accuracy > position.best
        position.best = max(position.best, test_accuracy)
        if journal:
            lost = len(self.batches) * self.config.batch_size - int(count)
            tell(
                f"epoch {position.epoch}/{self.config.epochs}  loss {row['train_loss']:.4f}  "
                f"accuracy {row['train_accuracy']:.3f}  test loss {test_loss:.4f}  "
                f"test accuracy {test_accuracy:.4f}  {rate:.0f} images/s"
                + (f"  {lost} broken images skipped" if lost else "")
            )
            journal.write(position.rows, last=position.epoch == self.config.epochs)
        kept = self.setting.keep_every and position.epoch % self.setting.keep_every == 0
        names = {"best.pt": better, f"epoch-{position.epoch}.pt": kept}
        self.save(*(name for name, wanted in names.items() if wanted))

    def _check_finite(self) -> None:
        """Raise Problem in all processes if one has diverged: what is saved stays what it is."""
        self._check_loss("loss", self.group.sum(self.totals)[0].item())
        if self.group.highest(not all(map(_sound, self._state())))[0]:
            raise self._diverged("not all parameters", "are finite")

    def _check_loss(self, name: str, loss: float) -> None:
        if not math.isfinite(loss):
            raise self._diverged(f"the {name}", f"is {loss}")

    def _diverged(self, what: str, how: str) -> Problem:
        where = f"{what} of epoch {self.position.epoch + 1}"
        return Problem(f"{where} {how}: lower --lr; {self._kept}", FAILURE)

    def _state(self) -> Iterator[Tensor]:
        """What is learnt, and what the optimizer keeps of it."""
        for model in (self.model, self.averaged):
            yield from model.parameters()
        for kept in self.optimizer.state.values():
            yield from filter(torch.is_tensor, kept.values())

    @property
    def last(self) -> Path:
        return self.setting.folder / "last.pt"

    def save(self, *names: str) -> None:
        """Write last.pt, and before it the same as files of other ``names``."""
        self._check_finite()
        device = self.group.device
        own = {"totals": self.totals.cpu(), "random": torch.get_rng_state()}
        if device.type == "cuda":
            own["cuda_random"] = torch.cuda.get_rng_state(device)
        processes = self.group.gather(own)
        if self.group.first:
            average = self.average.state_dict() if self.average else None
            contents = {
                "config": asdict(self.config),
                "description": asdict(self.data.description),
                "state_dict": self.averaged.state_dict(),
                "position": asdict(self.position),
                "training": {
                    "images": len(self.data.train),
                    "model": self.model.state_dict(),
                    "average": average,
                    "optimizer": self.optimizer.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "processes": processes,
                },
            }
            folder = self.setting.folder
            if "best.pt" in names:
                weights.save(contents, folder / "best.safetensors")
            checkpoints.save(contents, *(folder / name for name in names), self.last)
        self._saved = time.monotonic()
        self._kept = f"{self.last} holds {self.place}"

    @property
    def place(self) -> str:
        """How far the run has come, in words."""
        words = f"epoch {self.position.epoch} of {self.config.epochs}"
        return words + (f" and {self.position.step} steps" if self.position.step else "")

    def restore(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Go on where the checkpoint ``path`` was saved, on any number of processes.

        With another number the order of images stays, and dropout draws anew.
        """
        training = checkpoint["training"]
        known, found = checkpoints.description(checkpoint, path), self.data.description
        if replace(known, identity="") != replace(found, identity=""):
            raise Problem(f"--data: {self.config.data} is not what {path} was trained on")
        if (count := training.get("images")) != len(self.data.train):
            counts = f"{len(self.data.train)} images to train with, {count}"
            raise Problem(f"--data: {self.config.data} holds {counts} when {path} was saved")
        if known.identity not in ("", found.identity):
            raise Problem(
                f"--data: {self.config.data} holds other images than when {path} was saved"
            )
        self.position = checkpoints.record(
            Position, checkpoint["position"], f"the position in {path}"
        )
        try:
            self._load(training)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise Problem(f"{path} does not hold what this run goes on from: {reason}") from error
        self._kept = f"{path} holds {self.place}"

    def _load(self, training: dict[str, Any]) -> None:
        self.model.load_state_dict(training["model"])
        if self.average:
            self.average.load_state_dict(training["average"])
        self.optimizer.load_state_dict(training["optimizer"])
        self.schedule.load_state_dict(training["schedule"])
        self.scaler.load_state_dict(training["scaler"])
        processes = training["processes"]
        if len(processes) == self.group.world:
            own = processes[self.group.rank]
            self.totals.copy_(own["totals"])
            torch.set_rng_state(own["random"])
            if "cuda_random" in own and self.group.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda_random"], self.group.device)
        elif self.group.first:
            self.totals.copy_(torch.stack([each["totals"] for each in processes]).sum(0))
