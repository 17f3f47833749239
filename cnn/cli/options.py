"""Readers and checks of the subcommands' arguments."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from kernels.device import INTERPRET

from .. import data
from ..errors import UsageError
from ..text import meant, plain
from ..training import networks
from ..training.checkpoint import of_run


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {plain(message)}\n")


def number(
    kind: type[int] | type[float], least: float, below: float, words: str
) -> Callable[[str], int | float]:
    """A reader of numbers from ``least`` up to, but not including, ``below``."""

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < below:
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
        return value

    return read


def device(text: str) -> torch.device:
    """Read the name of a device: the CPU, or a CUDA device of this machine."""
    try:
        value = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device") from None
    if value.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if value.type == "cuda" and (value.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"this machine has no {text!r}")
    return value


def run_or_file(text: str) -> Path:
    """Read the path of a checkpoint, or of a run's folder, which stands for its best.pt."""
    return of_run(Path(text))


def data_set(text: str) -> str:
    """Read a data set's name, optionally with a place, or the name of a function that makes one."""
    if data.runs_code(text) and not data.is_code(text):
        known = ", ".join(data.NAMES)
        also = "NAME:PATH of these, or MODULE:FUNCTION"
        close = meant(text, data.NAMES)
        raise argparse.ArgumentTypeError(f"{text!r} is none of {known}, {also}{close}")
    return text


def model_name(text: str) -> str:
    """Read the name of a network, or of a function that makes one."""
    if unknown := networks.known_as(text):
        raise argparse.ArgumentTypeError(f"{text!r} is {unknown}")
    return text


def interval(text: str) -> tuple[float, bool]:
    """Read steps ("500") or minutes ("10m"); returns the number, and whether it is in seconds."""
    minutes = text.endswith("m")
    try:
        value = float(text[:-1]) * 60 if minutes else int(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is neither steps, as 500, nor minutes, as 10m")
    return value, minutes


def interval_text(value: float, in_seconds: bool) -> str:
    """The text that ``interval`` reads as these values."""
    return f"{value / 60:.15g}m" if in_seconds else f"{value}"


whole = number(int, 1, 2**31, "a whole number from 1 to 2147483647")
not_negative = number(int, 0, 2**31, "a whole number from 0 to 2147483647")
positive = number(float, sys.float_info.min, math.inf, "a positive number")
share = number(float, 0, 1, "a number from 0 to less than 1")


def add_common(command: argparse.ArgumentParser) -> None:
    """Add the arguments that every subcommand takes."""
    usual = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
    command.add_argument(
        "--device", type=device, default=usual, help="cpu or cuda (default: %(default)s)"
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def check_agreed(args: argparse.Namespace, name: str, known: object) -> None:
    """Raise UsageError if an argument contradicts the checkpoint."""
    value = vars(args)[name]
    if value not in (None, known):
        raise UsageError(f"--{name}: {value} contradicts {known} of {args.checkpoint}")


def chosen_data(given: str | None, known: str, path: object) -> str:
    """The data set given by the user, else the one that the checkpoint ``path`` names.

    Raises UsageError if the checkpoint names code: only the user decides which code runs.
    """
    if not given and data.runs_code(known):
        raise UsageError(f"{path} names data that is code: to run it, give --data {known}")
    return given or known


def chosen_model(given: str | None, known: str, path: object) -> str:
    """The same for a model, which may also be timm's or torchvision's: these are installed code."""
    if not given and networks.runs_code(known):
        raise UsageError(f"{path} names a model that is code: to run it, give --model {known}")
    return given or known


def check_pixels(known: data.Description, path: object) -> None:
    """Raise UsageError unless a model was trained on pixels and so can take image files."""
    if not known.pixels:
        raise UsageError(f"{path} was trained on floating-point images, which no image file holds")
    if known.channels not in (1, 3):
        count = known.channels
        raise UsageError(f"{path} was trained on images of {count} channels: a file has 1 or 3")


def check_fit(known: data.Description, found: data.Description, args: argparse.Namespace) -> None:
    """Raise UsageError unless the data ``found`` has the classes and channels of ``known``."""
    if found.classes != known.classes:
        differ = sorted({*found.classes} ^ {*known.classes})
        which = f": only one of them has {differ[0]}" if differ else ""
        raise UsageError(f"--data: its classes are not those of {args.checkpoint}{which}")
    if found.pixels != known.pixels:
        raise UsageError(f"--data: {args.checkpoint} is for images of another type")
    if found.channels != known.channels:
        count = f"{known.channels} channels, not {found.channels}"
        raise UsageError(f"--data: {args.checkpoint} is for images of {count}")
