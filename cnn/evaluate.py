"""What a trained model says of images, and how often it is right."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from .checkpoint import write
from .data import UNCOUNTED, Preparation, Watch
from .group import Group
from .interruption import ignore_in_worker
from .journal import Progress, new_figure, png
from .problem import FAILURE, Problem
from .text import caption, plain

BATCH = 256
"""Images of a batch when nothing is learnt."""


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """torch.autocast of "bf16" or "fp16", or nothing for "off"."""
    if amp == "off":
        return nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[amp])


def in_workers(count: int) -> dict[str, Any]:
    """The options of a DataLoader with ``count`` worker processes; it draws no shared numbers."""
    options = {"generator": torch.Generator(), "num_workers": count}
    if count:
        options |= {"worker_init_fn": ignore_in_worker, "persistent_workers": True}
    return options


@torch.no_grad()
def outputs(
    model: nn.Module, loader: DataLoader, prepare: Preparation, amp: str, watch: Watch
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits in float32 and labels of each batch of ``loader``, on the device of ``prepare``."""
    model.eval()
    for images, labels in loader:
        with autocast(prepare.device, amp):
            logits = model(prepare(images))
        yield logits.float(), watch(labels).to(prepare.device)


def answers(
    model: nn.Module, images: Any, prepare: Preparation, amp: str, watch: Watch, workers: int
) -> tuple[Tensor, Tensor]:
    """Labels and answers for all ``images`` that can be read, with a bar meanwhile."""
    loader = DataLoader(images, BATCH, **in_workers(workers))
    bar = Progress("test", len(images), 0, "image")
    right, pairs = 0, []
    for logits, labels in outputs(model, loader, prepare, amp, watch):
        counted = labels != UNCOUNTED
        pairs.append((labels[counted].cpu(), logits.argmax(1)[counted].cpu()))
        right += int((pairs[-1][0] == pairs[-1][1]).sum())
        if bar.advance(len(labels)):
            bar.show(right=str(right))
    bar.close()
    labels, given = (torch.cat(values) for values in zip(*pairs, strict=True))
    _check_any(len(labels))
    return labels, given


def _check_any(count: float) -> None:
    if not count:
        raise Problem("no image to test with can be read", FAILURE)


class Evaluator:
    """Tests models on a data set that the processes of ``group`` share."""

    def __init__(
        self, data: Any, prepare: Preparation, amp: str, watch: Watch, group: Group, workers: int
    ):
        share = Subset(data, range(group.rank, len(data), group.world))
        pinned = prepare.device.type == "cuda"
        self._loader = DataLoader(share, BATCH, pin_memory=pinned, **in_workers(workers))
        self._rest = prepare, amp, watch
        self._group = group

    def __call__(self, model: nn.Module, between: Callable[[], None]) -> tuple[float, float]:
        """Mean cross-entropy and accuracy; ``between`` is called after each batch."""
        totals = torch.zeros(3, dtype=torch.float64, device=self._group.device)
        for logits, labels in outputs(model, self._loader, *self._rest):
            totals += tally(logits, labels, F.cross_entropy(logits, labels, reduction="sum"))
            between()
        loss, right, count = self._group.sum(totals).tolist()
        _check_any(count)
        return loss / count, right / count


def tally(logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """What is summed over batches: loss, right answers, and images that count."""
    right = (logits.argmax(1) == labels).sum()
    return torch.stack(
        [loss.detach().double(), right.double(), (labels != UNCOUNTED).sum().double()]
    )


def class_table(labels: Tensor, answers: Tensor, classes: tuple[str, ...]) -> str:
    """Precision, recall, F1 and number of images of each class."""
    from sklearn.metrics import classification_report  # takes its time

    numbers, names = range(len(classes)), [*map(plain, classes)]
    options = {"labels": numbers, "target_names": names, "digits": 3, "zero_division": 0.0}
    return str(classification_report(labels, answers, **options))


def draw_confusion(labels: Tensor, answers: Tensor, classes: tuple[str, ...], path: Path) -> None:
    """Draw how often which class is taken for which, as a PNG. Names show of up to 50 classes."""
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    count = len(classes)
    figure = new_figure(
        "the confusion matrix", figsize=(2 + 0.5 * min(count, 24),) * 2, layout="constrained"
    )
    axes = figure.subplots()
    matrix = confusion_matrix(labels, answers, labels=range(count))
    display = ConfusionMatrixDisplay(matrix, display_labels=[*map(caption, classes)])
    display.plot(ax=axes, cmap="Blues", include_values=count <= 20, xticks_rotation="vertical")
    if count > 50:
        axes.set(xticks=[], yticks=[])
    write(path, png(figure))
