"""Checkpoints: files that are written atomically and run no code when they are read.

They end in a digest of everything before it, so any damage is noticed.
"""

import argparse
import errno
import fcntl
import hashlib
import os
import platform
import re
import zipfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy
import torch
import triton
from torch import Tensor

from .. import __version__
from ..data import Description
from ..errors import UsageError
from ..files import write

T = TypeVar("T")

FORMAT = 3
KEYS = {"format", "versions", "config", "description", "state_dict", "position", "training"}
FILES = ("last.pt", "best.pt", "best.safetensors", "log.csv", "log.jsonl", "curves.png")
"""The files that a run writes, besides epoch-N.pt."""

_scalar, (_dtype, _) = numpy.float64(0).__reduce__()
HARMLESS = [
    *(argparse.Namespace, numpy.dtype, type(_dtype), type(numpy.dtype("float32"))),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
"""Non-tensors in other programs' checkpoints: arguments and numbers, which run no code."""

MARK = b"triton-cnn blake2b "
DIGITS = 32


def save(checkpoint: dict[str, Any], *paths: Path) -> None:
    """Write ``checkpoint`` with format and versions to each path, atomically.

    Raises OSError with the path if that fails.
    """
    whole = BytesIO()  # torch.save into a file hides the system's error for a full disk
    torch.save({"format": FORMAT, "versions": versions(), **checkpoint}, whole)
    seal(whole)
    for path in paths:
        write(path, whole.getbuffer())


def versions() -> dict[str, str]:
    """The versions of the modules that compute. Triton's package has one of several names."""
    modules = {"torch": torch, "triton": triton, "numpy": numpy}
    known = {name: str(module.__version__) for name, module in modules.items()}
    return {"python": platform.python_version(), **known, "triton-cnn": __version__}


def seal(file: BytesIO) -> None:
    """Append a digest to torch.save's output, as the comment that a ZIP file may have."""
    file.seek(-2, os.SEEK_END)  # the length of the comment, so far 0
    file.write((len(MARK) + DIGITS).to_bytes(2, "little") + MARK)
    whole = digest(file.getbuffer())
    file.write(whole)


def digest(contents: memoryview | bytes) -> bytes:
    """A digest of ``contents``, DIGITS letters long."""
    return hashlib.blake2b(contents, digest_size=DIGITS // 2).hexdigest().encode()


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Create the folder of a run and lock it against other processes; the lock ends with this one.

    Yields whether the file system has locks; without them nobody is kept out. Removes partial files
    of a killed run. Raises UsageError if another run has the folder or nothing can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK  # an error, not a wait, if it is a pipe
        file = os.open(folder / ".lock", flags, 0o666)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}") from None
    with os.fdopen(file, "a"):
        locked = _lock(file, folder)
        try:
            for name in (*FILES, "epoch-*.pt", "last.pt.try"):
                for part in folder.glob(f".{name}.*.part"):
                    part.unlink(missing_ok=True)
            write(folder / "last.pt.try", b"")
            (folder / "last.pt.try").unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write {folder}: {error.strerror}") from None
        yield locked


def _lock(file: int, folder: Path) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by a loader's workers
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UsageError(f"{folder} is in use by another run: name another --output") from None
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return False
        raise UsageError(f"cannot lock {folder}: {error.strerror}") from None
    return True


def results(folder: Path) -> list[Path]:
    """The files in ``folder`` that a run wrote."""
    return [*filter(Path.exists, map(folder.joinpath, FILES)), *kept(folder).values()]


def kept(folder: Path) -> dict[int, Path]:
    """The checkpoints of whole epochs that the run in ``folder`` has kept, by epoch."""
    found = {path.stem.removeprefix("epoch-"): path for path in folder.glob("epoch-*.pt")}
    return {int(epoch): found[epoch] for epoch in sorted(filter(str.isdecimal, found), key=int)}


def of_run(path: Path, name: str = "best.pt") -> Path:
    """The file ``path``; if ``path`` is a run's folder, its checkpoint ``name``."""
    return path / name if path.is_dir() else path


def latest(path: Path) -> Path:
    """The file ``path``; if ``path`` is a run's folder, its last.pt.

    Raises UsageError if the file does not exist.
    """
    last = of_run(path, "last.pt")
    if not last.exists():
        best = last.with_name("best.pt")  # the only checkpoint, if a run was killed early
        hint = f"; --resume {best} --overwrite continues from its best" if best.exists() else ""
        raise UsageError(f"cannot read {last}: No such file or directory{hint}")
    return last


def load(path: Path) -> dict[str, Any]:
    """Read on the CPU what ``save`` wrote. Raises UsageError if ``path`` holds anything else."""
    if path.suffix == ".safetensors":
        raise UsageError(f"{path} holds only weights: resume a run from its last.pt")
    return checked(*unpacked(contents(path), path), path)


def checked(
    checkpoint: Any, sealed: bool, path: Path, keys: Set[str] = frozenset(KEYS)
) -> dict[str, Any]:
    """The contents of ``path``, if they are an undamaged checkpoint with ``keys``."""
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("format"), int):
        raise UsageError(f"{path} is not a checkpoint of python -m cnn train")
    if checkpoint["format"] != FORMAT:
        raise UsageError(f"{path} has format {checkpoint['format']}, this version reads {FORMAT}")
    if not sealed:
        raise UsageError(f"{path} is damaged: it lacks the digest at its end")
    if not checkpoint.keys() >= keys:
        raise UsageError(f"{path} lacks {', '.join(sorted(keys - checkpoint.keys()))}")
    for name in sorted(keys - {"format"}):
        _check_type(checkpoint[name], name, dict, str(path))
    for name, value in checkpoint["state_dict"].items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UsageError(f"{path} has a parameter {name}={value!r:.50}, which is not a tensor")
    return checkpoint


def description(checkpoint: dict[str, Any], path: Path) -> Description:
    """The description of the data that the checkpoint's model was trained on."""
    known = record(Description, checkpoint["description"], f"the description in {path}")
    if not 0 < len(known.mean) == len(known.std):
        raise UsageError(
            f"the description in {path} has {len(known.mean)} means and {len(known.std)} deviations"
        )
    return known


def configuration(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration of the checkpoint's training: its model's name, data, seed and more."""
    config = checkpoint["config"]
    for name, kind in (("model", str), ("data", str), ("seed", int)):
        _check_type(config.get(name), name, kind, f"the configuration in {path}")
    return config


def record(kind: type[T], values: dict[str, Any], known_as: str) -> T:
    """A dataclass of ``values``. Raises UsageError that names a missing or unknown value."""
    hints = get_type_hints(kind)
    if unknown := sorted(map(str, values.keys() - hints.keys())):
        raise UsageError(f"{known_as} holds {unknown[0]}, which this version does not know")
    for name, value in values.items():
        _check_type(value, name, hints[name], known_as)
    try:
        return kind(**values)
    except TypeError:
        lacking = next(name for name in hints if name not in values)
        raise UsageError(f"{known_as} lacks {lacking}") from None


def _check_type(value: Any, name: str, hint: Any, known_as: str) -> None:
    plain = hint if isinstance(hint, UnionType) else get_origin(hint) or hint
    if not isinstance(value, plain | int if float in (hint, *get_args(hint)) else plain):
        wanted = hint.__name__ if isinstance(hint, type) else hint
        raise UsageError(f"{known_as} has {name}={value!r:.50}, which is not {wanted}")


def contents(path: Path) -> bytes:
    """The bytes of a file. Raises UsageError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def unpacked(whole: bytes, path: Path) -> tuple[Any, bool]:
    """The contents of a torch.save file, and whether it ends in a digest, which is verified."""
    sealed = whole.endswith(MARK, 0, -DIGITS)
    if sealed and digest(memoryview(whole)[:-DIGITS]) != whole[-DIGITS:]:
        raise UsageError(f"{path} is damaged: its digest does not match its contents")
    damaged = None
    try:
        damaged = None if sealed else _wrong_crc(BytesIO(whole))
        with torch.serialization.safe_globals(HARMLESS):
            found = torch.load(BytesIO(whole), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        code = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", str(error))
        if code and not damaged:
            what = f"{path} holds {code[1]}, and reading that could run code"
            raise UsageError(f"{what}: save its state_dict") from None
        raise UsageError(f"{path} is damaged or not a checkpoint") from None
    if damaged:
        raise UsageError(f"{path} is damaged: the CRC of {damaged} in it is wrong")
    return found, sealed


def _wrong_crc(file: BytesIO) -> str | None:
    """A part of a ZIP file with a wrong CRC, which torch.load does not check."""
    if not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as archive:
        # All are 0 if torch was told to compute none.
        return archive.testzip() if any(part.CRC for part in archive.infolist()) else None
