"""Terminal output: progress, lines and tables."""

import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

from tqdm import tqdm

from .text import plain


class Progress:
    """A progress bar on a terminal; elsewhere one line every half minute."""

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
        """Add to the count. Returns whether it is time to ``show`` figures."""
        self._done += count
        if not self._bar.disable:
            return bool(self._bar.update(count))
        return self._plain and self._done != self._total and time.monotonic() >= self._next

    def tick(self, count: int) -> None:
        """Add to the count, and show it without figures."""
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
        """Remove the bar."""
        self._bar.close()


def tell(line: str) -> None:
    """Print a line of progress above any visible bar; do nothing if stderr is gone."""
    with suppress(OSError):
        tqdm.write(plain(line), file=sys.stderr)


def table(rows: Sequence[Sequence[str]], sides: str) -> str:
    """Rows as lines with aligned columns, each to its left < or right >."""
    rows = [[*map(plain, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{side}{n}}}" for side, n in zip(sides, widths, strict=True))
    return "\n".join(form.format(*row).rstrip() for row in rows)


def by(size: Iterable[int]) -> str:
    """A size as text: 3x224x224."""
    return "x".join(map(str, size))
