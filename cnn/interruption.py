"""Ctrl-C and SIGTERM, taken at the end of a step."""

import os
import signal
from types import FrameType, TracebackType


class Interrupted(Exception):
    """The run was asked to end by ``signal``, and is saved: ``kept`` says where and how far."""

    def __init__(self, number: int, kept: str):
        super().__init__(number, kept)
        self.signal = number
        self.kept = kept


class Interruption:
    """Within it, ``signal`` is 0 until SIGINT or SIGTERM arrives, and then its number.

    A second Ctrl-C raises KeyboardInterrupt at once. Not under torchrun, which passes on the Ctrl-C
    that a terminal has already sent to each process.
    """

    def __init__(self) -> None:
        self.signal = 0

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.signal = number

    def __enter__(self) -> "Interruption":
        self._before = {n: signal.signal(n, self._take) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def ignore_in_worker(worker: int) -> None:
    """Leave the end of a loader's worker to the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
