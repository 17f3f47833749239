"""Checkpoints: files that are whole at any moment, and that run no code when they are read.

They end in a digest of all that is before it, so that no damage is taken for a run.
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
"""What a run writes; and epoch-N.pt."""

_scalar, (_dtype, _) = numpy.float64(0).__reduce__()
HARMLESS = [
    *(argparse.Namespace, numpy.dtype, type(_dtype), type(numpy.dtype("float32"))),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
"""What others' checkpoints hold besides tensors: arguments and numbers, which run no code."""

MARK = b"triton-cnn blake2b "
DIGITS = 32


def save(checkpoint: dict[str, Any], *paths: Path) -> None:
    """Write ``checkpoint`` with format and versions to each path: always the old or the new, whole.

    Raises OSError that names the path if that cannot be done.
    """
    whole = BytesIO()  # torch.save into a file hides what the system says of a full disk
    torch.save({"format": FORMAT, "versions": versions(), **checkpoint}, whole)
    seal(whole)
    for path in paths:
        write(path, whole.getbuffer())


def versions() -> dict[str, str]:
    """What computes here, by the modules: a package of Triton's has one of several names."""
    modules = {"torch": torch, "triton": triton, "numpy": numpy}
    known = {name: str(module.__version__) for name, module in modules.items()}
    return {"python": platform.python_version(), **known, "triton-cnn": __version__}


def seal(file: BytesIO) -> None:
    """End what torch.save wrote in a digest, as the comment that a ZIP file may have."""
    file.seek(-2, os.SEEK_END)  # the length of the comment, of which there was none
    file.write((len(MARK) + DIGITS).to_bytes(2, "little") + MARK)
    whole = digest(file.getbuffer())
    file.write(whole)


def digest(contents: memoryview | bytes) -> bytes:
    """DIGITS letters that are others for other contents."""
    return hashlib.blake2b(contents, digest_size=DIGITS // 2).hexdigest().encode()


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Make the folder of a run, and keep other processes out of it; the lock ends with this one.

    Gives whether the file system has locks, without which nobody is kept out. Removes what a killed
    run was writing. Raises UsageError if another run has the folder, or if nothing can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK  # of a pipe, which nobody reads, an error
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
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which a loader's workers do not inherit
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UsageError(f"{folder} is in use by another run: name another --output") from None
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return False
        raise UsageError(f"cannot lock {folder}: {error.strerror}") from None
    return True


def results(folder: Path) -> list[Path]:
    """The files of a run that ``folder`` holds."""
    return [*filter(Path.exists, map(folder.joinpath, FILES)), *kept(folder).values()]


def kept(folder: Path) -> dict[int, Path]:
    """The checkpoints of whole epochs that the run in ``folder`` has kept, by epoch."""
    found = {path.stem.removeprefix("epoch-"): path for path in folder.glob("epoch-*.pt")}
    return {int(epoch): found[epoch] for epoch in sorted(filter(str.isdecimal, found), key=int)}


def of_run(path: Path, name: str = "best.pt") -> Path:
    """The file ``path``, or the checkpoint ``name`` of the run whose folder it is."""
    return path / name if path.is_dir() else path


def latest(path: Path) -> Path:
    """The file ``path``, or last.pt of the run whose folder it is.

    Raises UsageError if there is none.
    """
    last = of_run(path, "last.pt")
    if not last.exists():
        best = last.with_name("best.pt")  # a run that was killed early may have no other
        hint = f"; --resume {best} --overwrite goes on from its best" if best.exists() else ""
        raise UsageError(f"cannot read {last}: No such file or directory{hint}")
    return last


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote, on the CPU. Raises UsageError if ``path`` holds something else."""
    if path.suffix == ".safetensors":
        raise UsageError(f"{path} holds weights alone: a run goes on from its last.pt")
    return checked(*unpacked(contents(path), path), path)


def checked(
    checkpoint: Any, sealed: bool, path: Path, keys: Set[str] = frozenset(KEYS)
) -> dict[str, Any]:
    """What was read of ``path`` if it is a checkpoint with ``keys``, and as it was written."""
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
            raise UsageError(f"{path} has a parameter {name}={value!r:.50}, which is no tensor")
    return checkpoint


def description(checkpoint: dict[str, Any], path: Path) -> Description:
    """What the data was on which the model of the checkpoint ``path`` was trained."""
    known = record(Description, checkpoint["description"], f"the description in {path}")
    if not 0 < len(known.mean) == len(known.std):
        raise UsageError(
            f"the description in {path} has {len(known.mean)} means and {len(known.std)} deviations"
        )
    return known


def configuration(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """How the model of the checkpoint ``path`` was trained: its name, data, seed and more."""
    config = checkpoint["config"]
    for name, kind in (("model", str), ("data", str), ("seed", int)):
        _check_type(config.get(name), name, kind, f"the configuration in {path}")
    return config


def record(kind: type[T], values: dict[str, Any], known_as: str) -> T:
    """A dataclass of ``values``. Raises UsageError that names what it lacks or does not know."""
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
        raise UsageError(f"{known_as} has {name}={value!r:.50}, which is no {wanted}")


def contents(path: Path) -> bytes:
    """A file as it is. Raises UsageError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def unpacked(whole: bytes, path: Path) -> tuple[Any, bool]:
    """What a file of torch.save holds, and whether it ends in a digest, which is then right."""
    sealed = whole.endswith(MARK, 0, -DIGITS)
    if sealed and digest(memoryview(whole)[:-DIGITS]) != whole[-DIGITS:]:
        raise UsageError(f"{path} is damaged: its digest is not that of its contents")
    damaged = None
    try:
        damaged = None if sealed else _wrong_crc(BytesIO(whole))
        with torch.serialization.safe_globals(HARMLESS):
            found = torch.load(BytesIO(whole), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        code = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", str(error))
        if code and not damaged:
            what = f"{path} holds {code[1]}, and to read that could run code"
            raise UsageError(f"{what}: save its state_dict") from None
        raise UsageError(f"{path} is damaged or not a checkpoint") from None
    if damaged:
        raise UsageError(f"{path} is damaged: the CRC of {damaged} in it is wrong")
    return found, sealed


def _wrong_crc(file: BytesIO) -> str | None:
    """A part of a ZIP file whose CRC, which torch.load does not look at, is wrong."""
    if not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as archive:
        # All are 0 if torch was told to compute none.
        return archive.testzip() if any(part.CRC for part in archive.infolist()) else None
