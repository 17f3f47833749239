"""The winners of tuning, in a file for each device and set of versions that processes share."""

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from .device import Device

Record = dict[str, Any]
"""A plan as JSON: the engine's name and the tile's fields, which are scalars or lists of them."""

_LARGEST = 16 << 20  # bytes of a file, which takes about 400 for each class


def cache_folder() -> Path:
    """$TRITON_CNN_CACHE, else triton-cnn in $XDG_CACHE_HOME or in ~/.cache."""
    own = os.environ.get("TRITON_CNN_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "triton-cnn"


@cache
def fingerprint() -> str:
    """A hash of this package's sources."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.name} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def versions_of(where: torch.device, device: Device) -> dict[str, str]:
    """What times and winners depend on besides the problem."""
    name = device.backend if where.type == "cpu" else torch.cuda.get_device_name(where)
    return {
        "device": f"{name} {device.arch} {device.multiprocessors}",
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "sources": fingerprint(),
    }


class Store:
    """Winners of one device and set of versions, by class, in a file that processes share.

    Each class has the records of one or more winners, the latest first: not each plan can run all
    geometries of a class. A file is replaced as a whole, under a lock, so it may be read without.
    What cannot be read or written costs one warning and is then kept in memory alone. The folder
    may be one that others write to, so only regular files count: see ``_regular``.
    """

    def __init__(self, folder: Path, versions: dict[str, str]):
        text = json.dumps(versions, sort_keys=True)
        device = re.sub(r"\W+", "-", versions["device"])
        name = f"{device}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self.path = folder / name
        self._versions = versions
        self._entries: dict[str, list[Record]] = {}
        self._seen: tuple | None = None  # the file's identity when it was last read
        self._usable = True

    def get(self, name: str) -> list[Record]:
        """Winners of a class, those of other processes included."""
        with self._one_warning_if_it_fails():
            try:
                seen = self._identity()
                if seen != self._seen:
                    self._merge(self._read())
                    self._seen = seen
            except FileNotFoundError:
                pass
            except ValueError:
                with self._lock():
                    self._merge(self._read_or_set_aside())
        return self._entries.get(name, [])

    def put(self, name: str, record: Record) -> None:
        """Add a winner, before any other of its class."""
        if self._usable:
            with self._one_warning_if_it_fails():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self._lock():
                    self._merge(self._read_or_set_aside())
                    self._add(name, record)
                    self._write()
        self._add(name, record)

    def _add(self, name: str, record: Record) -> None:
        others = [other for other in self._entries.get(name, []) if other != record]
        self._entries[name] = [record, *others]

    def _merge(self, entries: dict[str, list[Record]]) -> None:
        """Take what is in the file, and keep what only this process knows."""
        for name, own in self._entries.items():
            known = entries.setdefault(name, [])
            known += [record for record in own if record not in known]
        self._entries = entries

    def _identity(self) -> tuple:
        status = self.path.lstat()
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _read(self) -> dict[str, list[Record]]:
        """The file's entries; ValueError if it is damaged."""
        with open(self.path, "rb", opener=_regular) as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise ValueError("it is too large")
        try:
            content = json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if not isinstance(content, dict) or content.get("versions") != self._versions:
            raise ValueError("it is not of these versions")
        entries = content.get("winners")
        if not isinstance(entries, dict) or not all(map(_are_records, entries.values())):
            raise ValueError("it has no winners by class")
        return entries

    def _read_or_set_aside(self) -> dict[str, list[Record]]:
        """The file's entries; under the lock, so that one process alone renames a damaged file."""
        try:
            return self._read()
        except FileNotFoundError:
            return {}
        except ValueError as error:
            aside = self.path.with_suffix(f".damaged-{time.time_ns()}")
            self.path.rename(aside)
            reason = f"the tuning cache {self.path} is damaged ({error}); it is now {aside.name}"
            warnings.warn(reason, RuntimeWarning, stacklevel=2)
            return {}

    def _write(self) -> None:
        """Under the lock: a temporary file that is there already was left by one who was killed."""
        temporary = self.path.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        try:
            with open(temporary, "x", opener=_regular) as file:
                content = {"versions": self._versions, "winners": self._entries}
                json.dump(content, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _lock(self, patience: float = 10.0) -> Iterator[None]:
        """Hold the file's lock, for which a stopped process is waited for ``patience`` seconds."""
        deadline = time.monotonic() + patience
        with open(self.path.with_suffix(".lock"), "a", opener=_regular) as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{file.name} has been locked for long") from None
                    time.sleep(0.01)
            try:
                yield
            finally:  # closing it would not do while a child that was forked meanwhile has it open
                fcntl.flock(file, fcntl.LOCK_UN)

    @contextmanager
    def _one_warning_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._usable:
                self._usable = False
                reason = f"tuning is remembered in this process only: {error}"
                warnings.warn(reason, RuntimeWarning, stacklevel=2)


def _regular(path: str, flags: int) -> int:
    """Open a regular file: no link that someone has put there, and no pipe, on which to wait."""
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return file


def _are_records(records: Any) -> bool:
    """Whether they are what this module may have written for a class."""
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        return False
    fields = (field for record in records for field in record.values())
    items = (item for field in fields for item in (field if isinstance(field, list) else [field]))
    return not any(isinstance(item, list | dict) for item in items)
