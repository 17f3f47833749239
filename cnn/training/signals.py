"""Ctrl-C and the signals of schedulers and terminals, handled at the end of a step."""

import os
import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(Exception):
    """The run was stopped by ``signal`` and is saved; ``kept`` says where and how far it is."""

    def __init__(self, number: int, kept: str):
        super().__init__(number, kept)
        self.signal = number
        self.kept = kept


class Signals:
    """A context in which ``signal`` is 0 until one of SIGNALS arrives, and then its number.

    SIGHUP does not count if it is ignored, as under nohup.

    A second Ctrl-C raises KeyboardInterrupt at once. Under torchrun it does not, because torchrun
    forwards the Ctrl-C that a terminal has already sent to each process.
    """

    def __init__(self) -> None:
        self.signal = 0

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.signal = number

    def __enter__(self) -> "Signals":
        kept_off = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        taken = [n for n in SIGNALS if not (n == signal.SIGHUP and kept_off)]
        self._before = {n: signal.signal(n, self._take) for n in taken}
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
    """Ignore signals in a loader's worker, so that its parent process decides when it ends.

    A scheduler signals all processes at once, and the run can save only if its workers keep going.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process on a SIGTERM from its parent, but from no other process."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
