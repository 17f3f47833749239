"""Train and test image classifiers.

Results go to stdout; progress and errors go to stderr. Exit codes: 0, 2 for arguments or files that
cannot be used, 130 after Ctrl-C.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

from kernels.device import INTERPRET, launches

from . import models
from .data import digits
from .train import accuracy, check_writable, fit, load, save

MODELS = {"lenet5": models.lenet5}
DATA = {"digits": digits}


class Parser(argparse.ArgumentParser):
    """Argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def number(
    kind: type[int] | type[float], least: float, below: float, words: str
) -> Callable[[str], int | float]:
    """A reader of numbers from ``least`` up to, not including, ``below``."""

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
    """Read the name of the CPU or of a CUDA device that this machine has."""
    try:
        value = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device") from None
    if value.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if value.type == "cuda" and (value.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"this machine has no {text!r}")
    return value


def parser() -> Parser:
    """The command line with its subcommands."""
    top = Parser(prog="python -m cnn", description="Train and test image classifiers.")
    commands = top.add_subparsers(required=True)
    common = Parser(add_help=False)
    common.add_argument("--data", choices=DATA, default="digits", help="data set (%(default)s)")
    usual = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
    common.add_argument("--device", type=device, default=usual, help="cpu or cuda (%(default)s)")
    whole = number(int, 1, 2**31, "a whole number from 1 to 2147483647")
    seed = number(int, 0, 2**63, "a whole number from 0 to 9223372036854775807")
    rate = number(float, sys.float_info.min, math.inf, "a positive number")

    command = commands.add_parser("train", parents=[common], help="train a model")
    command.set_defaults(run=train)
    command.add_argument("--model", choices=MODELS, default="lenet5", help="model (%(default)s)")
    command.add_argument("--epochs", type=whole, default=6, help="passes (%(default)s)")
    command.add_argument("--batch-size", type=whole, default=32, help="images (%(default)s)")
    command.add_argument("--lr", type=rate, default=5e-3, help="peak rate (%(default)s)")
    command.add_argument("--seed", type=seed, default=0, help="fixes the run (%(default)s)")
    command.add_argument("--output", type=Path, help="checkpoint to write (MODEL-DATA.pt)")

    command = commands.add_parser("eval", parents=[common], help="test a trained model")
    command.set_defaults(run=evaluate)
    command.add_argument("checkpoint", type=Path, help="what train wrote")
    return top


def train(args: argparse.Namespace) -> None:
    """Train a model and keep the checkpoint of its last whole epoch."""
    output = args.output or Path(f"{args.model}-{args.data}.pt")
    try:
        check_writable(output)
    except OSError as error:
        stop(f"cannot write {output}: {error.strerror}", 2)
    training, test = DATA[args.data]()
    torch.manual_seed(args.seed)
    model = MODELS[args.model]().to(args.device)
    chosen = {key: getattr(args, key) for key in ("epochs", "batch_size", "lr", "seed", "device")}
    kept = "nothing was saved"
    share = 0.0
    try:
        for epoch, loss in enumerate(fit(model, training, **chosen), start=1):
            share = accuracy(model, test, args.device)
            contents = {"model": args.model, "state_dict": model.state_dict()}
            try:
                save({**contents, "epochs": epoch, "accuracy": share}, output)
            except OSError as error:
                stop(f"cannot write {output}: {error.strerror}; {kept}", 2)
            kept = f"{output} holds epoch {epoch} of {args.epochs}"
            log(f"epoch {epoch}/{args.epochs}  loss {loss:.4f}  test accuracy {share:.3f}")
    except KeyboardInterrupt:
        stop(f"interrupted; {kept}", 130)
    report(args.device, share)


def evaluate(args: argparse.Namespace) -> None:
    """Test the model of a checkpoint."""
    try:
        checkpoint = load(args.checkpoint)
    except OSError as error:
        stop(f"cannot read {args.checkpoint}: {error.strerror}", 2)
    except ValueError as error:
        stop(str(error), 2)
    try:
        model = MODELS[checkpoint["model"]]()
        model.load_state_dict(checkpoint["state_dict"])
    except (KeyError, TypeError, RuntimeError):
        stop(f"{args.checkpoint} holds no model that this version knows", 2)
    _, test = DATA[args.data]()
    report(args.device, accuracy(model.to(args.device), test, args.device))


def report(where: torch.device, share: float) -> None:
    """The two lines that end a run: what computed it, by the launches counted, and how well."""
    if not launches():
        engine = "aten (cpu)"
    elif INTERPRET:
        engine = "triton (interpreter)"
    else:
        engine = f"triton (cuda:{torch.cuda.get_device_name(where)})"
    print(f"kernels: {engine}\ntest accuracy {share:.3f}")


def log(line: str) -> None:
    """A line of progress; a bar that is on show steps aside."""
    tqdm.write(line, file=sys.stderr)


def stop(reason: str, code: int) -> NoReturn:
    """End the program with one line that says why."""
    print(f"python -m cnn: {reason}", file=sys.stderr)
    raise SystemExit(code)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        stop("interrupted", 130)


if __name__ == "__main__":
    main()
