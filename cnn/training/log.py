"""A run's log: CSV, JSON lines, curves, and TensorBoard's events."""

import csv
import io
import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..console import tell
from ..errors import UsageError
from ..figures import new_figure, png
from ..files import write

Row = dict[str, Any]
"""One epoch: its number, loss and accuracy in training and validation, and more."""


class RunLog:
    """log.csv, log.jsonl and curves.png in ``folder``, and TensorBoard's events if installed.

    Each write replaces the files by all rows so far, so that they agree with the checkpoint.
    """

    def __init__(self, folder: Path, rows: list[Row]):
        self.folder = folder
        self._drawn = time.monotonic()
        self._board = None
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=len(rows) + 1)
        if rows:
            self._write_files(rows, last=False)

    def write(self, rows: list[Row], *, last: bool) -> None:
        """Log a new epoch, the last of ``rows``."""
        self._write_files(rows, last=last)
        if self._board:
            for name, value in rows[-1].items():
                self._board.add_scalar(name, value, rows[-1]["epoch"])
            self._board.flush()

    def _write_files(self, rows: list[Row], *, last: bool) -> None:
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
