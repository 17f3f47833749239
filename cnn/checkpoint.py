"""Checkpoints: files that are whole at any moment, and that run no code when they are read.

They end in a digest of all that is before it, so that no damage is taken for a run.
"""

import errno
import fcntl
import hashlib
import os
import platform
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import torch
import triton
from torch import Tensor, nn

from . import models
from .data import Description
from .problem import Problem

FORMAT = 2
KEYS = {"format", "versions", "config", "description", "state_dict", "position", "training"}
FILES = ("last.pt", "best.pt", "log.csv", "log.jsonl", "curves.png")
"""What a run writes; and epoch-N.pt."""

MARK = b"triton-cnn blake2b "
DIGITS = 32


def save(checkpoint: dict[str, Any], *paths: Path) -> None:
    """Write ``checkpoint`` with format and versions to each path: always the old or the new, whole.

    Raises OSError that names the path where that cannot be done.
    """
    whole = BytesIO()  # torch.save into a file hides what the system says of a full disk
    torch.save({"format": FORMAT, "versions": versions(), **checkpoint}, whole)
    sealed = seal(whole.getbuffer())
    for path in paths:
        write(path, sealed)


def versions() -> dict[str, str]:
    """What computes here, by the modules: a package of Triton's has one of several names."""
    modules = {"torch": torch, "triton": triton, "numpy": numpy}
    known = {name: str(module.__version__) for name, module in modules.items()}
    try:
        own = version("triton-cnn")
    except PackageNotFoundError:  # a checkout, or a bundle
        own = "not installed"
    return {"python": platform.python_version(), **known, "triton-cnn": own}


def seal(archive: memoryview | bytes) -> bytes:
    """A file of torch.save's with a digest at its end, as the comment that a ZIP file may have."""
    comment = len(MARK) + DIGITS
    # The last two bytes of a ZIP file without a comment are the length of it.
    marked = b"".join((archive[:-2], comment.to_bytes(2, "little"), MARK))
    return marked + _digest(marked)


def _digest(contents: memoryview | bytes) -> bytes:
    return hashlib.blake2b(contents, digest_size=DIGITS // 2).hexdigest().encode()


def write(path: Path, contents: Any) -> None:
    """Replace ``path`` by a file of ``contents`` in one step that outlasts a loss of power."""
    path = path.resolve()
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Make the folder of a run, and keep other processes out of it; the lock ends with this one.

    Gives whether the file system has locks, without which nobody is kept out. Removes what a killed
    run was writing. Raises Problem if another run has the folder, or if nothing can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise Problem(f"cannot write {folder}: {error.strerror}") from None
    with file:
        locked = _lock(file.fileno(), folder)
        try:
            for name in (*FILES, "epoch-*.pt"):
                for part in folder.glob(f".{name}.*.part"):
                    part.unlink(missing_ok=True)
            write(folder / "last.pt.try", b"")
            (folder / "last.pt.try").unlink(missing_ok=True)
        except OSError as error:
            raise Problem(f"cannot write {folder}: {error.strerror}") from None
        yield locked


def _lock(file: int, folder: Path) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which a loader's workers do not inherit
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise Problem(f"{folder} is in use by another run: name another --output") from None
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return False
        raise Problem(f"cannot lock {folder}: {error.strerror}") from None
    return True


def results(folder: Path) -> list[Path]:
    """The files of a run that ``folder`` holds."""
    return [*filter(Path.exists, map(folder.joinpath, FILES)), *kept(folder).values()]


def kept(folder: Path) -> dict[int, Path]:
    """The checkpoints of whole epochs that the run in ``folder`` has kept, by epoch."""
    found = {path.stem.removeprefix("epoch-"): path for path in folder.glob("epoch-*.pt")}
    return {int(epoch): found[epoch] for epoch in sorted(filter(str.isdecimal, found), key=int)}


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote, on the CPU. Raises Problem if ``path`` holds something else."""
    return _checked(_read(path), path)


def load_parameters(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The parameters in a checkpoint, and it; or those of a bare file, as torchvision's, and None.

    Raises Problem if ``path`` holds something else.
    """
    contents, sealed = _read(path)
    if isinstance(contents, dict) and contents and all(map(torch.is_tensor, contents.values())):
        return contents, None
    checkpoint = _checked((contents, sealed), path)
    return checkpoint["state_dict"], checkpoint


def _checked(read: tuple[Any, bool], path: Path) -> dict[str, Any]:
    """What was read of ``path`` if it is a checkpoint, and as it was written."""
    checkpoint, sealed = read
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("format"), int):
        raise Problem(f"{path} is not a checkpoint of python -m cnn train")
    if checkpoint["format"] != FORMAT:
        raise Problem(f"{path} has format {checkpoint['format']}, this version reads {FORMAT}")
    if not sealed:
        raise Problem(f"{path} is damaged: it lacks the digest at its end")
    if not checkpoint.keys() >= KEYS:
        raise Problem(f"{path} lacks {', '.join(sorted(KEYS - checkpoint.keys()))}")
    return checkpoint


def build(name: str, parameters: dict[str, Tensor], image_size: int, path: Path) -> nn.Module:
    """The model ``name`` with the parameters of ``path``, which tell its classes and channels.

    Raises Problem where they do not fit together.
    """
    weights = [value for value in parameters.values() if value.dim() > 1]
    try:
        options = {"num_classes": len(weights[-1]), "in_channels": weights[0].shape[1]}
        with warnings.catch_warnings(action="ignore"):  # of an empty layer
            model = models.create(name, image_size=image_size, **options)
        model.load_state_dict(parameters)
    except (IndexError, RuntimeError):
        size = f"{image_size}x{image_size} pixels"
        raise Problem(f"{path} does not hold the parameters of {name} for {size}") from None
    return model


def description(checkpoint: dict[str, Any]) -> Description:
    """What the data was on which the model of a checkpoint was trained."""
    return Description(**checkpoint["description"])


def _read(path: Path) -> tuple[Any, bool]:
    """What a file holds, and whether it ends in a digest, which is then right."""
    try:
        whole = path.read_bytes()
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror}") from None
    sealed = whole.endswith(MARK, 0, -DIGITS)
    if sealed and _digest(memoryview(whole)[:-DIGITS]) != whole[-DIGITS:]:
        raise Problem(f"{path} is damaged: its digest is not that of its contents")
    try:
        damaged = None if sealed else _wrong_crc(BytesIO(whole))
        contents = torch.load(BytesIO(whole), map_location="cpu", weights_only=True)
    except Exception:  # a damaged file can raise anything
        raise Problem(f"{path} is damaged or not a checkpoint") from None
    if damaged:
        raise Problem(f"{path} is damaged: the CRC of {damaged} in it is wrong")
    return contents, sealed


def _wrong_crc(file: BytesIO) -> str | None:
    """A part of a ZIP file whose CRC, which torch.load does not look at, is wrong."""
    if not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as archive:
        # All are 0 if torch was told to compute none.
        return archive.testzip() if any(part.CRC for part in archive.infolist()) else None
