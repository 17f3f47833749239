"""Train and test image classifiers, and show what they have learned.

Results go to stdout; progress and errors go to stderr. Exit codes: 0, 1 for a failure, 2 for
arguments or files that cannot be used, 128 plus its number for a signal, so 130 after Ctrl-C.
``torchrun`` starts ``train`` on several GPUs.
"""

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import fields
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from kernels.device import INTERPRET, launches

from . import __version__, data, models
from .cli import show
from .cli.options import (
    Parser,
    add_common,
    check_agreed,
    check_fit,
    check_pixels,
    chosen_data,
    chosen_model,
    data_set,
    interval,
    interval_text,
    model_name,
    not_negative,
    number,
    positive,
    run_or_file,
    share,
    whole,
)
from .console import tell
from .data import UNCOUNTED, ImageFiles, Normalize, UnreadableImages, image_files
from .data import load as load_data
from .errors import FAILURE, UsageError
from .text import plain
from .training import checkpoint as checkpoints
from .training import networks, weights
from .training.config import AMP, OPTIMIZERS, SCHEDULES, Config, RunOptions
from .training.distributed import ProcessGroup
from .training.evaluate import BATCH, answers, class_table, draw_confusion, in_workers, outputs
from .training.run import Run
from .training.signals import Interrupted, Signals

LAST = Path()  # --resume without a path
SPLITS = {"test": "test", "val": "validation", "train": "training"}
"""The parts that eval can test, and their names in its output."""


def parser() -> Parser:
    """The parser of the command line with its subcommands."""
    top = Parser(prog="python -m cnn", description="Train, test and look into image classifiers.")
    top.add_argument("--version", action="version", version=f"triton-cnn {__version__}")
    commands = top.add_subparsers(required=True, metavar="{train,eval,predict,show}")
    common = Parser(add_help=False)
    add_common(common)
    help = "processes that load images (default: %(default)s)"
    common.add_argument("--workers", type=not_negative, default=0, metavar="N", help=help)

    command = commands.add_parser("train", parents=[common], help="train a model")
    command.set_defaults(run=train)
    _configuration(command)
    add = command.add_argument
    help = "continue from a checkpoint or a run's last one (default: the one in --output)"
    add("--resume", type=Path, nargs="?", const=LAST, metavar="PATH", help=help)
    help = "folder for checkpoints, log and curves (default: runs/MODEL-DATA)"
    add("--output", type=Path, metavar="FOLDER", help=help)
    add("--overwrite", action="store_true", help="replace the run in the folder")
    help = "write checkpoints within an epoch, every N steps or minutes as in 10m (default: 10m)"
    add("--save-every", type=interval, default=(600.0, True), metavar="N", help=help)
    help = "keep the checkpoint of every N-th epoch, as epoch-N.pt"
    add("--keep-every", type=whole, default=0, metavar="N", help=help)
    _broken(command)

    command = commands.add_parser("eval", parents=[common], help="test a trained model")
    command.set_defaults(run=evaluate)
    add = command.add_argument
    help = "a run's folder (its best.pt is used), a checkpoint, or a state_dict file"
    add("checkpoint", type=run_or_file, help=help)
    help = "model of a state_dict file, or the MODULE:FUNCTION that makes the checkpoint's model"
    add("--model", type=model_name, metavar="NAME", help=help)
    add("--data", type=data_set, metavar="NAME", help="data set (default: the model's own)")
    add("--size", type=whole, help="side of the images in pixels, for a state_dict file")
    add("--amp", choices=AMP, help="16-bit arithmetic (default: as trained)")
    help = "part of the data set to test on (default: test)"
    add("--split", choices=SPLITS, default="test", help=help)
    add("--limit", type=whole, metavar="N", help="use only the first N images")
    help = "PNG of the confusion matrix (default: CHECKPOINT-confusion.png)"
    add("--confusion", type=Path, metavar="PATH", help=help)
    _broken(command)

    command = commands.add_parser("predict", parents=[common], help="classify image files")
    command.set_defaults(run=predict)
    add = command.add_argument
    add("checkpoint", type=run_or_file, help="a run's folder (its best.pt is used) or a checkpoint")
    add("images", type=Path, nargs="+", help="image files, or folders of them")
    help = "the MODULE:FUNCTION that makes the model, if it was trained from one"
    add("--model", type=model_name, metavar="NAME", help=help)
    add("--top", type=whole, default=1, metavar="N", help="number of classes to print (default: 1)")

    show.add_parsers(commands)
    return top


def _broken(command: Parser) -> None:
    help = "what to do about an unreadable image (default: %(default)s)"
    command.add_argument("--broken", choices=("skip", "stop"), default="stop", help=help)


def _configuration(command: Parser) -> None:
    """Add the arguments of Config. None means not given, so that a resumed run keeps its own."""
    add = command.add_argument
    switch = {"action": argparse.BooleanOptionalAction, "default": None}
    _, rates, decays = zip(*OPTIMIZERS.values(), strict=True)
    usual_rate, usual_decay = (
        ", ".join(f"{name} {value}" for name, value in zip(OPTIMIZERS, values, strict=True))
        for values in (rates, decays)
    )
    help = (
        f"{', '.join(models.list())}, timm:NAME, torchvision:NAME; or MODULE:FUNCTION, which is "
        f"imported and called to make one (default: {Config.model})"
    )
    add("--model", type=model_name, metavar="NAME", help=help)
    help = "start from the weights of a run or of a file, such as torchvision's"
    add("--init", metavar="PATH", help=help)
    help = "parameters that stay fixed, by name, as in conv1.weight,layer1,layer2.*.bn1"
    add("--freeze", type=lambda text: text.split(","), action="extend", metavar="NAMES", help=help)
    help = (
        f"{', '.join(data.NAMES)}, with a place as NAME:PATH; or MODULE:FUNCTION, which is "
        f"imported and called to make one (default: {Config.data})"
    )
    add("--data", type=data_set, metavar="NAME", help=help)
    add("--size", type=whole, help="side of the images in pixels (default: folders 224, others 32)")
    add("--epochs", type=whole, help=f"passes over the training images (default: {Config.epochs})")
    help = "stop after N epochs without a better best.pt; 0: never (default: 0)"
    add("--patience", type=not_negative, metavar="N", help=help)
    help = f"images per step, over all processes (default: {Config.batch_size})"
    add("--batch-size", type=whole, metavar="N", help=help)
    help = f"AdamW, or SGD with Nesterov momentum (default: {Config.optimizer})"
    add("--optimizer", choices=OPTIMIZERS, help=help)
    add("--lr", type=positive, help=f"peak learning rate (default: {usual_rate})")
    decay = number(float, 0, math.inf, "a number from 0")
    add("--weight-decay", type=decay, metavar="X", help=f"weight decay (default: {usual_decay})")
    add("--schedule", choices=SCHEDULES, help=f"schedule of the rate (default: {Config.schedule})")
    help = f"share of a label to spread over all classes (default: {Config.label_smoothing})"
    add("--label-smoothing", type=share, metavar="X", help=help)
    help = f"decay of the parameters' moving average, as in 0.999; 0: none (default: {Config.ema})"
    add("--ema", type=share, metavar="X", help=help)
    add("--augment", **switch, help="shift images, and mirror them if the data set allows it")
    add("--amp", choices=AMP, help=f"16-bit arithmetic (default: {Config.amp})")
    add("--channels-last", **switch, help="keep images and maps in NHWC")
    add("--compile", **switch, help="compile the model with torch.compile")
    add("--sync-bn", **switch, help="compute batch statistics over all GPUs")
    seed = number(int, 0, 2**63, "a whole number from 0 to 9223372036854775807")
    add("--seed", type=seed, help=f"seed of all random numbers (default: {Config.seed})")


def train(args: argparse.Namespace) -> None:
    """Train a model; write its checkpoints, log and curves to a folder."""
    names = [field.name for field in fields(Config)]
    given = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    if args.freeze:
        given["freeze"] = tuple(args.freeze)
    config = Config(**given)
    known_as = f"{config.model.rpartition(':')[2]}-{config.data.partition(':')[0]}"
    folder = args.output or Path("runs", known_as)
    source = args.resume
    if source:
        source = checkpoints.latest(folder / "last.pt" if source is LAST else source)
        folder = args.output or source.parent
    group = ProcessGroup(args.device)
    with checkpoints.claimed(folder) if group.first else nullcontext(True) as locked:
        if not locked:
            tell(f"{folder}: its file system has no locks, so other runs are not kept out")
        group.highest(0)  # other runs may write to the folder until the first process has it
        _train(args, config, given, folder, source, group)


def _train(
    args: argparse.Namespace,
    config: Config,
    given: dict[str, Any],
    folder: Path,
    source: Path | None,
    group: ProcessGroup,
) -> None:
    """Train in a folder that no other run uses, from the checkpoint ``source`` on if given."""
    checkpoint = None
    if source:
        checkpoint = checkpoints.load(source)
        config = Config.of(checkpoint, source).resumed(given, source)
        chosen_data(args.data, config.data, source)
        chosen_model(args.model, config.model, source)
    if group.first:
        _check_free(folder, source, args.overwrite)
    sets = load_data(config.data, config.size, config.seed, val=True)
    if group.first:
        _tell_notes(sets)
    period, in_seconds = args.save_every
    rest = {"broken": args.broken, "keep_every": args.keep_every}
    options = RunOptions(folder, args.workers, period, in_seconds, **rest)
    run = Run(config, options, sets, group)
    if source and checkpoint:
        run.restore(checkpoint, source)
        if group.first:
            tell(f"resumed {source}: {run.place}")
    elif config.init:
        for line in weights.begin(run.model, Path(config.init), config.model):
            if group.first:
                tell(line)
    if group.first:
        if not (source and source.parent.samefile(folder)):
            run.begin_folder(source)
        tell(run.task)
    try:
        with Signals() as signals:
            run.go(signals)
        if group.first:
            print(f"kernels: {engine(group.device)}\n{plain(run.outcome)}")
    except Interrupted as interrupted:
        group.close()
        kept = f"{interrupted.kept}; resume with: {_command(args, config, folder, group.world)}"
        raise Interrupted(interrupted.signal, kept) from None
    group.close()


def _command(args: argparse.Namespace, config: Config, folder: Path, processes: int) -> str:
    """The command that resumes an interrupted run, with options that checkpoints do not hold."""
    usual = vars(parser().parse_args(["train"]))
    words = ["python -m cnn" if processes == 1 else "torchrun ... -m cnn", "train --resume"]
    words.append(shlex.quote(str(folder)))
    for name, module in (("data", data), ("model", networks)):
        if module.runs_code(vars(config)[name]):
            words.append(f"--{name} {vars(config)[name]}")
    for name in ("device", "workers", "save_every", "keep_every", "broken"):
        if (value := vars(args)[name]) != usual[name]:
            value = interval_text(*value) if name == "save_every" else value
            words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(words)


def _check_free(folder: Path, source: Path | None, overwrite: bool) -> None:
    """Raise UsageError if a folder holds a run that is neither resumed nor to be overwritten."""
    last = folder / "last.pt"
    continued = source and last.exists() and source.samefile(last)
    if not continued and not overwrite and checkpoints.results(folder):
        raise UsageError(
            f"{folder} holds a run: --resume it, --overwrite it, or name another --output"
        )


def _tell_notes(sets: data.Data) -> None:
    for note in sets.notes:
        tell(note)


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate a trained model: print a table of its classes, its confusion, speed and accuracy."""
    model, trained, known, sets = _trained(args)
    part = vars(sets)[args.split]
    count = min(args.limit or len(part), len(part))
    layout = torch.channels_last if trained.channels_last else torch.contiguous_format
    model = model.to(args.device, memory_format=layout)  # type: ignore[call-overload]
    begun = time.monotonic()
    found = answers(
        model,
        Subset(part, range(count)),
        Normalize(known, args.device, layout),
        args.amp or trained.amp,
        UnreadableImages(part, args.broken, tell),
        args.workers,
    )
    rate = count / (time.monotonic() - begun)
    print(class_table(found, known.classes))
    which = "" if args.split == "test" else f"-{args.split}"
    name = f"{args.checkpoint.stem}{which}-confusion.png"
    picture = args.confusion or args.checkpoint.with_name(name)
    try:
        draw_confusion(found, known.classes, picture)
        print(f"confusion matrix: {plain(picture)}")
    except (OSError, UsageError) as error:  # the folder is not writable, or no matplotlib
        if args.confusion and isinstance(error, OSError):
            raise
        tell(explain(error)[1])
    right, total = found.right(), len(found.labels)
    print(f"{right} of {total} images right, {rate:.0f} images/s\n{found}")
    print(f"kernels: {engine(args.device)}\n{SPLITS[args.split]} accuracy {right / total:.3f}")


def _trained(
    args: argparse.Namespace,
) -> tuple[torch.nn.Module, Config, data.Description, data.Data]:
    """The model to evaluate, its training configuration, its images' description, and the data."""
    parameters, checkpoint = weights.read(args.checkpoint)
    if checkpoint:
        trained = Config.of(checkpoint, args.checkpoint)
        known = checkpoints.description(checkpoint, args.checkpoint)
        check_agreed(args, "model", trained.model)
        check_agreed(args, "size", known.size)
    else:
        for name, use in (("model", "their network"), ("data", "the images to test on")):
            if not vars(args)[name]:
                raise UsageError(f"{args.checkpoint} holds only parameters: give --{name}, {use}")
        trained, known = Config(model=args.model, data=args.data, size=args.size), None
    size = known.size if known else trained.size
    name = chosen_data(args.data, trained.data, args.checkpoint)
    sets = load_data(name, size, trained.seed, val=args.split != "test")
    _tell_notes(sets)
    known = known or sets.description
    if data.same_set(name, trained.data) and known.identity not in ("", sets.description.identity):
        tell(f"{name} has changed since the training: renamed images may now be in other parts")
    chosen_model(args.model, trained.model, args.checkpoint)
    check_fit(known, sets.description, args)
    model = weights.build(trained.model, parameters, known.size, args.checkpoint, known)
    return model, trained, known if checkpoint else networks.described(model, known), sets


def predict(args: argparse.Namespace) -> None:
    """Print one line per image: its path, then the most probable classes with probabilities."""
    parameters, checkpoint = weights.read(args.checkpoint)
    if checkpoint is None:
        raise UsageError(f"{args.checkpoint} holds only parameters, without class names")
    trained = Config.of(checkpoint, args.checkpoint)
    known = checkpoints.description(checkpoint, args.checkpoint)
    check_pixels(known, args.checkpoint)
    check_agreed(args, "model", trained.model)
    chosen_model(args.model, trained.model, args.checkpoint)
    model = weights.build(trained.model, parameters, known.size, args.checkpoint, known)
    folders = (image_files(given) if given.is_dir() else [given] for given in args.images)
    paths = [path for files in folders for path in files]
    if not paths:
        raise UsageError(f"{args.images[0]} holds no image")
    images = ImageFiles(paths, [0] * len(paths), known.size, known.channels)
    unread: list[str] = []
    unreadable = UnreadableImages(images, "skip", unread.append)
    loader = DataLoader(images, BATCH, **in_workers(args.workers))
    prepare = Normalize(known, args.device)
    ahead = iter(paths)
    for logits, labels in outputs(model.to(args.device), loader, prepare, trained.amp, unreadable):
        best = logits.softmax(1).topk(min(args.top, len(known.classes)))
        rows = zip(labels.tolist(), best.values.tolist(), best.indices.tolist(), strict=True)
        for (label, chances, classes), path in zip(rows, ahead, strict=False):
            if label != UNCOUNTED:
                pairs = zip(classes, chances, strict=True)
                named = [f"{plain(known.classes[c])}\t{chance:.4f}" for c, chance in pairs]
                print(plain(path), *named, sep="\t")
    for line in unread:
        say(line)
    if unread:
        raise SystemExit(FAILURE)


def engine(where: torch.device) -> str:
    """The name of what computed here, judged by the counted launches."""
    if not launches():
        return "aten (cpu)"
    if INTERPRET:
        return "triton (interpreter)"
    return f"triton (cuda:{torch.cuda.get_device_name(where)})"


def say(line: str) -> None:
    """Print a line on stderr, with the process's number if there are several."""
    rank = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
    with suppress(OSError):  # a terminal that is gone
        print(f"python -m cnn{rank}: {plain(line)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal may lack some characters
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        say("interrupted")
        code = 130
    except Interrupted as interrupted:
        if os.environ.get("RANK", "0") == "0":
            say(f"interrupted; {interrupted.kept}")
        code = 128 + interrupted.signal
    except Exception as error:
        if args.debug:
            raise
        code, line = explain(error)
        say(line)
    else:
        return
    raise SystemExit(code)


def explain(error: Exception) -> tuple[int, str]:
    """The exit code and the one-line message for an error."""
    if isinstance(error, UsageError):
        return error.code, str(error)
    if isinstance(error, OSError) and error.filename:
        return FAILURE, f"{error.filename}: {error.strerror}"
    words = " ".join(str(error).split())
    return FAILURE, f"{type(error).__name__}: {words} (--debug shows where)"


if __name__ == "__main__":
    main()
