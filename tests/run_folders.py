"""Folders of runs: what they hold, and whether two hold the same."""

import json
import socket
import time
from pathlib import Path

import torch
from forks import Fork, Forks

from cnn.training import checkpoint as checkpoints


def files(folder: Path) -> set[str]:
    """The names of what a run has left, but for its lock, which stays."""
    return {path.name for path in folder.iterdir()} - {".lock"}


def numbers(folder: Path) -> list[dict]:
    """What the log says of each epoch, but for its speed."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key != "images_per_second"} for row in rows]


def await_file(path: Path) -> None:
    """Wait until another process has made a file."""
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} does not come")


def assert_same(first: object, second: object) -> None:
    """Equal bit for bit, all tensors in them included."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert torch.equal(first, second) if torch.is_tensor(first) else first == second


def assert_same_runs(first: Path, second: Path) -> None:
    """Two folders hold the same run: every number of its log and of its last checkpoint."""
    assert numbers(first) == numbers(second)
    one, other = (checkpoints.load(folder / "last.pt") for folder in (first, second))
    for each in (one, other):
        for row in each["position"]["rows"]:
            row["images_per_second"] = 0
    assert_same(one, other)


def start_twice(cpu: Forks, *argv: object, **environment: object) -> list[Fork]:
    """Two processes of one run, as torchrun starts them; the first has ``environment``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["TORCHELASTIC_RUN_ID"] = "test"
    extra = (environment, {})
    return [cpu.start(*argv, **shared, **extra[n], RANK=n, LOCAL_RANK=n) for n in range(2)]
