"""Readers of data sets' file formats. Each raises UsageError that names the file."""

import gzip
import io
import math
import pickle
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError

DEFLATE = 1032
"""The highest compression ratio of gzip."""


def read(path: Path) -> bytearray:
    """The contents of a file."""
    with _opened(path) as file:
        return bytearray(file.read())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file for reading, unpacked if its name ends in .gz."""
    try:
        if not path.is_file():  # reading a pipe would wait
            path.stat()
            raise UsageError(f"{path} is not a file")
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def idx(path: Path, axes: int) -> Tensor:
    """Bytes from a file in MNIST's IDX format, described at yann.lecun.com/exdb/mnist.

    Unpacks no more than the header announces, nor than the file can hold.
    """
    with _opened(path) as file:
        header = file.read(4 + 4 * axes)
        shape = [int.from_bytes(header[at : at + 4], "big") for at in range(4, len(header), 4)]
        count = math.prod(shape)
        most = path.stat().st_size * (DEFLATE if path.suffix == ".gz" else 1)
        if header[:4] != bytes((0, 0, 8, axes)) or len(shape) != axes or count > most:
            raise UsageError(f"{path} is not an IDX file of bytes with {axes} axes")
        contents = bytearray(file.read(count + 1))
    if not count:
        raise UsageError(f"{path} is empty: its header says {shape}")
    if len(contents) != count:
        other = "fewer" if len(contents) < count else "more"
        raise UsageError(f"{path} is not an IDX file: it holds {other} bytes than its header says")
    return torch.frombuffer(contents, dtype=torch.uint8).view(shape)


def cifar10_binary(path: Path) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] and labels [N] from a file of CIFAR-10's binary version."""
    contents = read(path)
    if not contents or len(contents) % 3073:
        raise UsageError(f"{path} is not a CIFAR-10 file: records have 3073 bytes")
    records = torch.frombuffer(contents, dtype=torch.uint8).view(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that builds only numpy arrays."""

    _ALLOWED: dict[tuple[str, str], Any] = {
        (f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0]
        for core in ("core", "_core")
    } | {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed") from None


def cifar10_pickle(path: Path) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] and labels [N] from a file of CIFAR-10's Python version.

    Only arrays are built from the pickle, which could otherwise run any code.
    """
    try:
        contents = _ArraysOnly(io.BytesIO(read(path)), encoding="bytes").load()
        images = torch.from_numpy(contents[b"data"].reshape(-1, 3, 32, 32))
        labels = torch.tensor(contents[b"labels"])
    except UsageError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UsageError(f"{path} is not a CIFAR-10 file: {error}") from None
    if images.dtype != torch.uint8 or labels.dtype != torch.int64:
        raise UsageError(f"{path} is not a CIFAR-10 file: it holds other types")
    return images, labels


def first_there(folder: Path, names: Sequence[str]) -> Path:
    """The first of ``names`` that exists in ``folder``."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"{folder} holds no {names[0]}")
