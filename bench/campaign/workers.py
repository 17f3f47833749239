"""The processes of a campaign: one that has the device, and those that compile ahead of it.

A fault on a GPU kills its process, so items run in a process that can be replaced. The parent never
touches the GPU, because a process forked after that could not use it.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

_FORK = multiprocessing.get_context("fork")  # shares what is imported, above all torch
_LOOK = 0.02  # seconds between two checks for finished workers


class Death(Exception):
    """A worker's end in the middle of an item."""


class Late(Exception):
    """A worker took longer than allowed, and was ended."""


class Worker:
    """A process that answers one request after another by ``serve()(request)``.

    It calls ``serve`` before the first request.
    """

    def __init__(self, serve: Callable[[], Callable[[Any], Any]]):
        self._connection, other = _FORK.Pipe()
        self._process = _FORK.Process(target=_answer, args=(serve, other), daemon=True)
        self._process.start()
        other.close()

    def ask(self, request: Any, seconds: float) -> Any:
        """The answer. Raises Death or Late, after which there is no worker any more."""
        try:
            self._connection.send(request)
            if self._connection.poll(max(0.0, seconds)):
                return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode or 0
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise Death(f"the process ended {how}") from None
        self.end()
        raise Late(f"it took more than {seconds:.0f} s")

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _answer(serve: Callable[[], Callable[[Any], Any]], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = os.getppid()
    answer = serve()
    while True:
        while not connection.poll(1.0):
            if os.getppid() != parent:
                os._exit(1)  # the parent was killed, and nobody will ask again
        connection.send(answer(connection.recv()))


class Compilers:
    """Processes that call ``compile_(task)`` for all tasks in order; failures are left to whoever
    runs the task.
    """

    def __init__(self, compile_: Callable[[Any], None], tasks: Sequence[Any], count: int):
        self._done = _FORK.RawArray("b", len(tasks))
        self._owner = _FORK.RawArray("i", [-1] * len(tasks))
        self._processes = [
            _FORK.Process(target=self._work, args=(compile_, tasks, number, next_), daemon=True)
            for next_ in [_FORK.Value("i", 0)]
            for number in range(min(count, len(tasks)))
        ]
        for process in self._processes:
            process.start()

    def _work(self, compile_: Callable[[Any], None], tasks: Sequence[Any], me: int, next_: Any):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        parent = os.getppid()
        while os.getppid() == parent:
            with next_.get_lock():
                index, next_.value = next_.value, next_.value + 1
            if index >= len(tasks):
                return
            self._owner[index] = me
            # A failure is raised and reported again when the task runs.
            with suppress(Exception):
                compile_(tasks[index])
            self._done[index] = 1

    def wait(self, index: int, until: float) -> None:
        """Return when a task is compiled, or its process is gone, or at ``until``."""
        while not self._done[index] and time.monotonic() < until:
            owner = self._owner[index]
            left = self._processes if owner < 0 else [self._processes[owner]]
            if not any(process.is_alive() for process in left):
                return
            time.sleep(_LOOK)

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
