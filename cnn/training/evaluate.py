"""A trained model's predictions, and how often they are right."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ..console import Progress
from ..data import UNCOUNTED, Normalize, UnreadableImages
from ..errors import FAILURE, UsageError
from ..figures import new_figure, png
from ..files import write
from ..text import caption, plain
from .distributed import ProcessGroup
from .signals import ignore_in_worker

BATCH = 256
"""Images per batch outside training."""


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """A torch.autocast context for "bf16" or "fp16"; for "off" one that does nothing."""
    if amp == "off":
        return nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[amp])


def in_workers(count: int) -> dict[str, Any]:
    """Options for a DataLoader with ``count`` worker processes that draws no shared numbers."""
    options = {"generator": torch.Generator(), "num_workers": count}
    if count:
        options |= {"worker_init_fn": ignore_in_worker, "persistent_workers": True}
    return options


@torch.no_grad()
def outputs(
    model: nn.Module, loader: DataLoader, prepare: Normalize, amp: str, unreadable: UnreadableImages
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield float32 logits and labels of each batch of ``loader``, on the device of ``prepare``."""
    model.eval()
    for images, labels in loader:
        with autocast(prepare.device, amp):
            logits = model(prepare(images))
        yield logits.float(), unreadable(labels).to(prepare.device)


@dataclass(frozen=True)
class Answers:
    """A model's answers for the readable images [N].

    Args:
        labels: the right classes, [N].
        ranked: the five most probable classes, [N, 5], ties in the order of their numbers; for five
            or fewer classes only the most probable one, [N, 1].
        loss: the mean cross-entropy.
    """

    labels: Tensor
    ranked: Tensor
    loss: float

    def right(self, top: int = 1) -> int:
        """The number of images whose label is among the ``top`` most probable classes."""
        return int((self.ranked[:, :top] == self.labels[:, None]).sum())

    def __str__(self) -> str:
        words = [f"loss {self.loss:.4f}"]
        for top in sorted({1, self.ranked.shape[1]}):
            words.append(f"top-{top} accuracy {self.right(top) / len(self.labels):.4f}")
        return "  ".join(words)


def answers(
    model: nn.Module,
    images: Any,
    prepare: Normalize,
    amp: str,
    unreadable: UnreadableImages,
    workers: int,
) -> Answers:
    """The answers of ``model`` for ``images``; shows a progress bar."""
    loader = DataLoader(images, BATCH, **in_workers(workers))
    bar = Progress("eval", len(images), 0, "image")
    right, loss, parts = 0, 0.0, []
    for logits, labels in outputs(model, loader, prepare, amp, unreadable):
        counted = labels != UNCOUNTED
        logits, labels = logits[counted], labels[counted]
        top = 5 if logits.shape[1] > 5 else 1
        ranked = logits.argsort(dim=1, descending=True, stable=True)[:, :top]
        parts.append((labels.cpu(), ranked.cpu()))
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((ranked[:, 0] == labels).sum())
        if bar.advance(len(counted)):
            bar.show(right=str(right))
    bar.close()
    labels, ranked = (torch.cat(values) for values in zip(*parts, strict=True))
    _check_any(len(labels), "evaluate")
    return Answers(labels, ranked, loss / len(labels))


def _check_any(count: float, use: str) -> None:
    if not count:
        raise UsageError(f"no image to {use} with can be read", FAILURE)


class Evaluator:
    """Validates models with a data set that the processes of ``group`` share."""

    def __init__(
        self,
        data: Any,
        prepare: Normalize,
        amp: str,
        unreadable: UnreadableImages,
        group: ProcessGroup,
        workers: int,
    ):
        share = Subset(data, range(group.rank, len(data), group.world))
        pinned = prepare.device.type == "cuda"
        self._loader = DataLoader(share, BATCH, pin_memory=pinned, **in_workers(workers))
        self._rest = prepare, amp, unreadable
        self._group = group

    def __call__(self, model: nn.Module, between: Callable[[], None]) -> tuple[float, float]:
        """Mean cross-entropy and accuracy; calls ``between`` after each batch."""
        totals = torch.zeros(3, dtype=torch.float64, device=self._group.device)
        for logits, labels in outputs(model, self._loader, *self._rest):
            totals += tally(logits, labels, F.cross_entropy(logits, labels, reduction="sum"))
            between()
        loss, right, count = self._group.sum(totals).tolist()
        _check_any(count, "validate")
        return loss / count, right / count


def tally(logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """The sums to accumulate over batches: loss, right answers, and number of images."""
    right = (logits.argmax(1) == labels).sum()
    return torch.stack(
        [loss.detach().double(), right.double(), (labels != UNCOUNTED).sum().double()]
    )


def class_table(found: Answers, classes: tuple[str, ...]) -> str:
    """A table of each class's precision, recall, F1 and number of images."""
    from sklearn.metrics import classification_report  # takes its time

    numbers, names = range(len(classes)), [*map(plain, classes)]
    options = {"labels": numbers, "target_names": names, "digits": 3, "zero_division": 0.0}
    return str(classification_report(found.labels, found.ranked[:, 0], **options))


def draw_confusion(found: Answers, classes: tuple[str, ...], path: Path) -> None:
    """Draw the confusion matrix as a PNG; class names appear for up to 50 classes."""
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    count = len(classes)
    figure = new_figure(
        "the confusion matrix", figsize=(2 + 0.5 * min(count, 24),) * 2, layout="constrained"
    )
    axes = figure.subplots()
    matrix = confusion_matrix(found.labels, found.ranked[:, 0], labels=range(count))
    display = ConfusionMatrixDisplay(matrix, display_labels=[*map(caption, classes)])
    display.plot(ax=axes, cmap="Blues", include_values=count <= 20, xticks_rotation="vertical")
    if count > 50:
        axes.set(xticks=[], yticks=[])
    write(path, png(figure))
