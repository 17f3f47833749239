"""The file for a measuring command's rows, and the handling of errors."""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kernels.device import INTERPRET

from . import measure
from .errors import UsageError
from .report import load


def device_named(name: str) -> torch.device:
    """The CPU or GPU to measure. Raises UsageError if it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "no GPU here; --device cpu runs everything on tiny layers but measures nothing"
        )
    if name == "cuda" and INTERPRET:
        raise UsageError("TRITON_INTERPRET is set: the kernels would run in the interpreter")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def opened(args: argparse.Namespace, identity: dict[str, str], **more: Any) -> dict[str, Any]:
    """The contents of ``args.json`` if this run may continue it, else those of a new file.

    ``identity`` is ``measure.identity``'s; ``more``: further fields of a new file.
    """
    new = {**identity, "command": args.command, **more, "rows": []}
    if args.json is None:
        if args.resume:
            raise UsageError("--resume needs --json FILE")
        return new
    try:
        old = load(args.json) if args.json.exists() and args.json.stat().st_size else None
    except OSError as error:
        raise UsageError(f"cannot read {args.json}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    if old is None or not (args.resume or old["rows"]):
        return new
    if not args.resume:
        raise UsageError(f"{args.json} has rows: --resume continues it")
    differ = [name for name, now in identity.items() if old.get(name) != now]
    if "commit" in differ and measure.is_same_code(str(old.get("commit")), identity["commit"]):
        differ.remove("commit")
    if differ:
        others = "; ".join(f"{name} {old.get(name)}, not {identity[name]}" for name in differ)
        raise UsageError(f"{args.json} was measured with {others}")
    if args.command not in old["command"].split(" && "):
        old["command"] += f" && {args.command}"
    return old


def keep(results: dict[str, Any], path: Path | None) -> None:
    """Write the file atomically: an interrupted run leaves a whole file."""
    if path is None:
        return
    head = json.dumps({k: v for k, v in results.items() if k != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in results["rows"])
    text = f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def noted(errors: dict[str, str], name: str) -> Iterator[None]:
    """A context whose exception becomes one line of ``errors``."""
    try:
        yield
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """The values with floats rounded to five digits."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}
