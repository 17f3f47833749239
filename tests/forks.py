"""The command line in processes of its own, forked from one that has imported it already.

They run without the interpreter, on the CPU: quick. What importing costs is paid once.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

SERVER = """
import json, os, sys, traceback
from signal import SIGINT, default_int_handler, signal
import matplotlib.figure, sklearn.datasets, sklearn.metrics, sklearn.model_selection
import torch._dynamo  # which optimizers import
from cnn import checkpoint
from cnn.__main__ import main
from cnn.journal import curves

def interrupt_after(saves, times, save=checkpoint.save):
    def counting(*args):
        nonlocal saves
        save(*args)
        saves -= 1
        for _ in range(times if saves == 0 else 0):
            os.kill(os.getpid(), SIGINT)
    checkpoint.save = counting

def run(argv, environment, out, err):
    signal(SIGINT, default_int_handler)  # whoever started the tests may ignore it
    os.environ.update(environment)
    if saves := environment.get("INTERRUPT_AFTER_SAVES"):
        interrupt_after(int(saves), int(environment.get("INTERRUPT_TIMES", 1)))
    for path, number in (out, 1), (err, 2):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    try:
        main(argv)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    os._exit(code)

# Fonts are found once.
curves([{"epoch": 1, "train_loss": 1, "test_loss": 2, "train_accuracy": 0, "test_accuracy": 1}])
for line in sys.stdin:
    match json.loads(line):
        case "start", *request:
            child = os.fork()
            if not child:
                run(*request)
            print(child, flush=True)
        case "wait", child:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


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

    Under INTERRUPT_AFTER_SAVES=N a process gets a Ctrl-C right after writing its Nth checkpoint;
    under INTERRUPT_TIMES=2 it gets another at once.
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
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as server,
    ):
        yield Forks(server, Path(folder))
        server.stdin.close()
