"""What a run tells: progress on stderr, and beside the checkpoints its log and curves."""

import csv
import io
import json
import sys
import time
import warnings
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .checkpoint import write
from .errors import UsageError, missing
from .text import plain

Row = dict[str, Any]
"""What is known of an epoch: its number, loss and accuracy in training and validation, and more."""


class Journal:
    """log.csv, log.jsonl and curves.png in ``folder``, and TensorBoard's events when installed.

    The files are written whole from all rows so far, so that they agree with the checkpoint.
    """

    def __init__(self, folder: Path, begun: int):
        self.folder = folder
        self._drawn = time.monotonic()
        self._board = None
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=begun + 1)

    def write(self, rows: list[Row], *, last: bool) -> None:
        """Tell of a new epoch, the last of ``rows``."""
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
        write(self.folder / "log.csv", table.getvalue().encode())
        write(self.folder / "log.jsonl", "".join(lines).encode())
        if last or time.monotonic() - self._drawn > 30:  # drawing takes its time
            try:
                write(self.folder / "curves.png", curves(rows))
            except UsageError as problem:
                if last:
                    tell(str(problem))
            self._drawn = time.monotonic()
        if self._board:
            for name, value in rows[-1].items():
                self._board.add_scalar(name, value, rows[-1]["epoch"])
            self._board.flush()


def curves(rows: list[Row]) -> bytes:
    """Draw loss and accuracy over epochs as a PNG."""
    figure = new_figure("curves", figsize=(10, 4))
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part, label in (("train", "training"), ("val", "validation")):
            points = [row["epoch"] for row in rows], [row[f"{part}_{what}"] for row in rows]
            axes.plot(*points, marker=".", label=label)
        axes.set(xlabel="epoch", ylabel=what)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return png(figure)


def new_figure(use: str, **options: Any):
    """An empty figure of matplotlib's that no window knows of."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing("matplotlib", f"drawing {use}") from None
    return Figure(**options)


def png(figure: Any) -> bytes:
    """A figure as the contents of a PNG file."""
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn for it
        figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


class Progress:
    """A bar on a terminal; elsewhere a line every half minute."""

    EVERY = 30.0  # seconds

    def __init__(self, title: str, total: int | None, done: int, unit: str, *, quiet: bool = False):
        self.title = title
        options = {"leave": False, "disable": True if quiet else None, "unit": unit}
        self._bar = tqdm(total=total, initial=done, desc=title, unit_scale=True, **options)
        self._plain = self._bar.disable and not quiet
        self._total, self._unit = total, unit
        self._done = self._first = done
        self._begun = time.monotonic()
        self._next = self._begun + self.EVERY

    def advance(self, count: int) -> bool:
        """Count on. Says whether it is time to ``show`` figures."""
        self._done += count
        if not self._bar.disable:
            return bool(self._bar.update(count))
        return self._plain and self._done != self._total and time.monotonic() >= self._next

    def tick(self, count: int) -> None:
        """Count on, and show that where no figures are to be."""
        if self.advance(count):
            self.show()

    def show(self, **figures: str) -> None:
        """Show figures beside the count."""
        if not self._bar.disable:
            self._bar.set_postfix(figures, refresh=False)
            return
        now = time.monotonic()
        self._next = now + self.EVERY
        rate = (self._done - self._first) / (now - self._begun)
        words = [self.title, f"{self._done}/{self._total}" if self._total else f"{self._done}"]
        words += [f"{name} {value}" for name, value in figures.items()]
        tell("  ".join([*words, f"{rate:.0f} {self._unit}s/s"]))

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def tell(line: str) -> None:
    """A line of progress; a bar that is on show steps aside. Nobody hears it if stderr is gone."""
    with suppress(OSError):
        tqdm.write(plain(line), file=sys.stderr)
