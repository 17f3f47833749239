"""A training run of an image classifier, from its first or any later step."""

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from ..console import Progress, tell
from ..data import UNCOUNTED, Augmented, Batches, Data, Normalize, UnreadableImages
from ..errors import FAILURE, UsageError
from ..files import write
from . import checkpoint as checkpoints
from . import networks, weights
from .config import OPTIMIZERS, SCHEDULES, Config, RunOptions
from .distributed import ProcessGroup
from .evaluate import Evaluator, autocast, in_workers, tally
from .log import Row, RunLog
from .signals import Interrupted, Signals


@dataclass
class Position:
    """A run's progress: whole epochs, steps of the next one, and the log's row of each epoch."""

    epoch: int = 0
    step: int = 0
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def of(cls, checkpoint: dict[str, Any], path: Path) -> "Position":
        """The position in the checkpoint ``path``. Raises UsageError if it is not valid."""
        known_as = f"the position in {path}"
        position = checkpoints.record(cls, checkpoint["position"], known_as)
        epochs = range(1, len(position.rows) + 1)
        if position.epoch != len(epochs) or not all(map(_is_row, position.rows, epochs)):
            raise UsageError(f"{known_as} lacks results of its {position.epoch} epochs")
        return position

    @property
    def best(self) -> Row | None:
        """The row with the highest validation accuracy; ties go to the lowest validation loss."""
        return max(self.rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]), default=None)


def _is_row(row: Any, epoch: int) -> bool:
    measured = ("val_loss", "val_accuracy")
    return (
        isinstance(row, dict)
        and row.get("epoch") == epoch
        and all(isinstance(row.get(name), float) for name in measured)
    )


def _sound(tensor: Tensor) -> bool:
    """Whether all values are finite."""
    return bool(tensor.isfinite().all())


class Run:
    """A model in training, with everything that its next step depends on."""

    def __init__(self, config: Config, options: RunOptions, data: Data, group: ProcessGroup):
        self.config, self.options, self.data, self.group = config, options, data, group
        self.position = Position()
        self.totals = torch.zeros(3, dtype=torch.float64, device=group.device)
        self._build_model()
        self._build_loaders()
        self._build_optimizer()
        torch.manual_seed(config.seed + group.rank)  # for dropout
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
        networks.check_size(model.eval(), config.model, description)
        description = networks.described(model, description)
        self.data = replace(self.data, description=description)
        frozen = weights.freeze(model, config.freeze)
        if config.freeze and self.group.first:
            tell(frozen)
        self.prepare = Normalize(description, self.group.device, layout)
        if config.sync_bn:
            if self.group.device.type == "cpu":
                raise UsageError("--sync-bn: torch's SyncBatchNorm needs GPUs")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(self.group.device, memory_format=layout)  # type: ignore[call-overload]
        self.average = None
        if config.ema:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        if config.compile:
            self.model.compile()
        self.network = DistributedDataParallel(self.model) if self.group.world > 1 else self.model

    def _build_loaders(self) -> None:
        config, settings, group, data = self.config, self.options, self.group, self.data
        count, size = len(data.train), config.batch_size
        if size > count:
            raise UsageError(f"--batch-size: {size} is more than the {count} training images")
        if size % group.world:
            raise UsageError(f"--batch-size: {size} is not a multiple of {group.world} processes")
        self.batches = Batches(count, size, config.seed, group.rank, group.world)
        images = Augmented(data.train, config.seed, shift=config.augment, mirror=data.mirrors)
        pinned = group.device.type == "cuda"
        options = {"pin_memory": pinned, **in_workers(settings.workers)}
        self.loader = DataLoader(images, batch_sampler=self.batches, **options)  # type: ignore[arg-type]
        self.unreadable, unreadable = (
            UnreadableImages(part, settings.broken, tell) for part in (data.train, data.val)
        )
        rest = config.amp, unreadable, group, settings.workers
        self.validate = Evaluator(data.val, self.prepare, *rest)

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
        """The model to use: the one with averaged parameters, if there is one."""
        return self.average.module if self.average else self.model

    def go(self, signals: Signals) -> None:
        """Train to the end. If interrupted, save and raise Interrupted."""
        log = None
        if self.group.first:
            log = RunLog(self.options.folder, self.position.rows)
        while not self.over:
            begun, step = time.monotonic(), self.position.step
            self._train(signals)
            images = (self.position.step - step) * self.config.batch_size
            rate = images / (time.monotonic() - begun)
            self._finish(rate, signals, log)
        if log and self.position.epoch < self.config.epochs:
            reason = f"none of the last {self.config.patience} epochs was better"
            tell(f"stopped after epoch {self.position.epoch} of {self.config.epochs}: {reason}")

    @property
    def over(self) -> bool:
        """Whether all epochs are done, or patience with the last ones is exhausted."""
        best, patience = self.position.best, self.config.patience
        waited = self.position.epoch - best["epoch"] if best else 0
        return self.position.epoch >= self.config.epochs or 0 < patience <= waited

    def _train(self, signals: Signals) -> None:
        """Run the remaining steps of an epoch."""
        config, position = self.config, self.position
        weights.training(self.network)
        self.batches.epoch, self.batches.step = position.epoch, position.step
        steps = len(self.batches)
        counts = (steps * config.batch_size, position.step * config.batch_size)
        title = f"epoch {position.epoch + 1}/{config.epochs}"
        bar = Progress(title, *counts, "image", quiet=not self.group.first)
        try:
            for images, labels in self.loader:
                self._step(images, self.unreadable(labels))
                position.step += 1
                diverged = False
                if bar.advance(config.batch_size):
                    loss, right, count = self.totals.tolist()
                    count = max(count, 1)  # none if all images are unreadable
                    bar.show(loss=f"{loss / count:.4f}", accuracy=f"{right / count:.3f}")
                    diverged = not math.isfinite(loss)  # saving then fails and ends the run
                signal, due = self.group.highest(signals.signal, self._due() or diverged)
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
        # Not only over readable images, because the processes' means are averaged.
        self.scaler.scale(loss / len(labels)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        if self.average:
            self.average.update_parameters(self.model)
        self.totals += tally(logits, labels, loss)

    def _due(self) -> bool:
        if self.options.in_seconds:
            return time.monotonic() - self._saved >= self.options.save_every
        return self.position.step % self.options.save_every == 0

    def _finish(self, rate: float, signals: Signals, log: RunLog | None) -> None:
        """Validate the model, report the epoch and save."""

        def between() -> None:
            if signals.signal and self.group.world == 1:
                self.save()
                raise Interrupted(signals.signal, self._kept)

        position = self.position
        self._check_finite()
        loss, right, count = self.group.sum(self.totals).tolist()
        rates = loss / max(count, 1), right / max(count, 1)
        self.group.share(self.averaged.buffers())  # each process has its own batch statistics
        val_loss, val_accuracy = self.validate(self.averaged, between)
        self._check_loss("validation loss", val_loss)
        row = {
            "epoch": position.epoch + 1,
            "lr": self.schedule.get_last_lr()[0],
            "train_loss": rates[0],
            "train_accuracy": rates[1],
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "images": int(count),
            "images_per_second": round(rate, 1),
        }
        position.rows.append(row)
        position.epoch += 1
        position.step = 0
        self.totals.zero_()
        if log:
            lost = len(self.batches) * self.config.batch_size - int(count)
            tell(
                f"epoch {position.epoch}/{self.config.epochs}  loss {row['train_loss']:.4f}  "
                f"accuracy {row['train_accuracy']:.3f}  validation loss {val_loss:.4f}  "
                f"validation accuracy {val_accuracy:.4f}  {rate:.0f} images/s"
                + (f"  {lost} unreadable images skipped" if lost else "")
            )
            log.write(position.rows, last=self.over)
        better = position.best is row
        kept = self.options.keep_every and position.epoch % self.options.keep_every == 0
        names = {"best.pt": better, f"epoch-{position.epoch}.pt": kept}
        self.save(*(name for name, wanted in names.items() if wanted))

    def _check_finite(self) -> None:
        """Raise UsageError in all processes if one has diverged; existing files stay unchanged."""
        self._check_loss("loss", self.group.sum(self.totals)[0].item())
        if self.group.highest(not all(map(_sound, self._state())))[0]:
            raise self._diverged("not all parameters", "are finite")

    def _check_loss(self, name: str, loss: float) -> None:
        if not math.isfinite(loss):
            raise self._diverged(f"the {name}", f"is {loss}")

    def _diverged(self, what: str, how: str) -> UsageError:
        where = f"{what} of epoch {self.position.epoch + 1}"
        return UsageError(f"{where} {how}: lower --lr; {self._kept}", FAILURE)

    def _state(self) -> Iterator[Tensor]:
        """The tensors that training changes: the model's, including batch statistics, and the
        optimizer's.
        """
        for model in (self.model, self.averaged):
            yield from model.parameters()
            for module in model.modules():
                if isinstance(module, weights.NORMS):
                    yield from module.buffers()
        for kept in self.optimizer.state.values():
            yield from filter(torch.is_tensor, kept.values())

    def begin_folder(self, source: Path | None) -> None:
        """Clear the folder, and copy the checkpoint ``source`` and the best of its run into it."""
        best, past, folder = None, self.position.best, self.options.folder
        last = source.read_bytes() if source else None
        if source and past and (path := source.with_name("best.pt")).exists():
            with suppress(UsageError):
                found = checkpoints.load(path)
                if found["position"].get("rows") == self.position.rows[: past["epoch"]]:
                    best = found, path.read_bytes()
        for path in checkpoints.results(folder):
            path.unlink()
        if best:
            weights.save(best[0], folder / "best.safetensors")
            write(folder / "best.pt", best[1])
        if last:
            write(self.last, last)

    @property
    def last(self) -> Path:
        return self.options.folder / "last.pt"

    def save(self, *names: str) -> None:
        """Write last.pt, and before it the same contents under other ``names``."""
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
            folder = self.options.folder
            if "best.pt" in names:
                weights.save(contents, folder / "best.safetensors")
            checkpoints.save(contents, *(folder / name for name in names), self.last)
        self._saved = time.monotonic()
        self._kept = f"{self.last} holds {self.place}"

    @property
    def task(self) -> str:
        """A sentence on the model, the device, the data and the output folder."""
        sets, count = self.data, sum(each.numel() for each in self.model.parameters())
        parts = {"training": sets.train, "validation": sets.val, "test": sets.test}
        counts = ", ".join(f"{len(part):,} {use}" for use, part in parts.items())
        among = f" in {self.group.world} processes" if self.group.world > 1 else ""
        return (
            f"training {self.config.model}, {count:,} parameters, on {self.group.device}{among}; "
            f"images of {self.config.data}: {counts}; output in {self.options.folder}"
        )

    @property
    def outcome(self) -> str:
        """A sentence on the best model: its file, its epoch and its accuracy."""
        best, path = self.position.best, self.options.folder / "best.pt"
        if not best:
            return "nothing was trained"
        holds = "holds" if path.exists() else "is missing; the best was"
        epoch = f"epoch {best['epoch']} of {self.config.epochs}"
        return f"{path} {holds} {epoch}, validation accuracy {best['val_accuracy']:.4f}"

    @property
    def place(self) -> str:
        """A phrase that says how far the run has come."""
        words = f"epoch {self.position.epoch} of {self.config.epochs}"
        return words + (f" and {self.position.step} steps" if self.position.step else "")

    def restore(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Continue where the checkpoint ``path`` was saved, on any number of processes.

        With a different number the order of images stays the same, but dropout draws other numbers.
        """
        training = checkpoint["training"]
        known, found = checkpoints.description(checkpoint, path), self.data.description
        if replace(known, identity="") != replace(found, identity=""):
            raise UsageError(f"--data: {self.config.data} is not what {path} was trained on")
        if (count := training.get("images")) != len(self.data.train):
            counts = f"{len(self.data.train)} training images, {count}"
            raise UsageError(f"--data: {self.config.data} holds {counts} when {path} was saved")
        if known.identity not in ("", found.identity):
            raise UsageError(
                f"--data: {self.config.data} holds other images than when {path} was saved"
            )
        self.position = Position.of(checkpoint, path)
        try:
            self._load(training)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UsageError(f"{path} does not fit this run: {reason}") from error
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
