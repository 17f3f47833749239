"""The command line in processes of its own, forked from one that has imported it already.

They run without the interpreter, on the CPU: quick. What importing costs is paid once.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fork:
    """A process that was started. Killed by a signal, its code is the signal's number below 0."""

    forks: "Forks"
    pid: int
    out: Path
    err: Path

    def wait(self) -> int:
        return self.forks.ask("wait", self.pid)


class Forks:
    """Starts ``python -m cnn`` again and again.

    It knows one model more, "normed". Under SIGNAL_AFTER_SAVES=N a process signals itself right
    after writing its Nth checkpoint, or SIGNAL_DELAY seconds later: Ctrl-C, or what SIGNAL names,
    SIGNAL_TIMES in a row. GROUP makes it the first of a process group, IGNORED names a signal that
    it ignores from the start, and STDERR a file that takes its errors.
    """

    def __init__(self, server: subprocess.Popen, folder: Path):
        self._server = server
        self._folder = folder
        self._count = 0

    def ask(self, *request) -> int:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def start(self, *argv: object, **environment: object) -> Fork:
        self._count += 1
        out, err = (self._folder / f"{self._count}.{end}" for end in ("out", "err"))
        words = [str(word) for word in argv]
        values = {name: str(value) for name, value in environment.items()}
        return Fork(self, self.ask("start", words, values, str(out), str(err)), out, err)

    def run(self, *argv: object, **environment: object) -> tuple[int, str, str]:
        """Exit code, output and errors of a command."""
        fork = self.start(*argv, **environment)
        code = fork.wait()
        return code, fork.out.read_text(), fork.err.read_text()


@contextmanager
def forks() -> Iterator[Forks]:
    """Keep the process from which others are forked."""
    environment = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as server,
    ):
        yield Forks(server, Path(folder))
        server.stdin.close()


def normed(num_classes: int = 10, in_channels: int = 1, image_size: int = 32) -> nn.Module:
    """A network with batch normalization, of torch's layers."""
    side = image_size // 4
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, stride=4, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * side**2, num_classes),
    )


def serve() -> None:
    """Start what stdin asks for and answer on stdout."""
    import matplotlib.figure  # noqa: F401
    import sklearn.datasets
    import sklearn.metrics
    import sklearn.model_selection  # noqa: F401
    import torch._dynamo  # noqa: F401  (which optimizers import)

    from cnn import models
    from cnn.training.log import curves

    # Fonts are found once.
    curves([{"epoch": 1, "train_loss": 1, "val_loss": 2, "train_accuracy": 0, "val_accuracy": 1}])
    names, create = models.list, models.create
    models.list = lambda: [*names(), "normed"]
    models.create = lambda name, **options: (
        normed(**options) if name == "normed" else create(name, **options)
    )
    for line in sys.stdin:
        match json.loads(line):
            case "start", *request:
                child = os.fork()
                if not child:
                    os._exit(run(*request))
                answer(child)
            case "wait", child:
                answer(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def run(argv: list[str], environment: dict[str, str], out: str, err: str) -> int:
    """Run the command line and return its exit code."""
    from cnn.__main__ import main

    # Who started the tests may ignore these.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if "GROUP" in environment:
        os.setpgid(0, 0)
    if name := environment.get("IGNORED"):
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    os.environ.update(environment)
    sys.path.extend(filter(None, [environment.get("PYTHONPATH")]))
    if saves := environment.get("SIGNAL_AFTER_SAVES"):
        signal_after(
            int(saves),
            signal.Signals[environment.get("SIGNAL", "SIGINT")],
            int(environment.get("SIGNAL_TIMES", 1)),
            float(environment.get("SIGNAL_DELAY", 0)),
        )
    for path, number in (out, 1), (environment.get("STDERR", err), 2):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    code = 0
    try:
        main(argv)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    return code


def signal_after(saves: int, number: int, times: int, delay: float) -> None:
    from cnn.training import checkpoint

    save, left = checkpoint.save, [saves]

    def send() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    def counting(*args) -> None:
        save(*args)
        left[0] -= 1
        if left[0] == 0:
            threading.Timer(delay, send).start() if delay else send()

    checkpoint.save = counting


if __name__ == "__main__":
    serve()
