"""Programs of a network, as Python source: written, built, reduced."""

import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

IMPORTS = """\
import torch
import torch.nn.functional as TF
from torch import nn
from torch.utils.checkpoint import checkpoint

import cnn
import cnn.functional as F
"""
HOOKS = """\
def double(module, args, result):
    return result * 2


def keep(module, args, result):
    module.register_buffer("kept", result.detach())
"""


@dataclass(frozen=True)
class Program:
    """A network's layers and the lines of its forward pass, with inputs and settings of a run."""

    seed: int
    dtype: torch.dtype  # of parameters and inputs
    coarsest: torch.dtype  # of all values
    whole: bool  # parameters and inputs are -1, 0 or 1, and all values exact in bfloat16
    channels_last: bool
    training: bool  # else evaluated, without gradients
    autocast: bool  # around the call
    dynamic: bool  # compiled for sizes that vary
    leaves: tuple[str, ...]
    inputs: tuple[str, ...]  # which the network may mutate
    layers: tuple[str, ...]
    lines: tuple[str, ...]
    results: tuple[str, ...]

    def __str__(self) -> str:
        inputs = ", ".join(f"x{i}" for i in range(len(self.inputs)))
        layers = ("super().__init__()", *self.layers)
        leaves = [f"leaf{i}" for i in range(len(self.leaves))]
        whole = (
            "for t in network.state_dict().values():",
            "    t.sign_().mul_(torch.rand(t.shape) < 2 / t[0].numel())  # two or so of a filter",
            *(f"{leaf}.data.sign_()" for leaf in leaves),
        )
        return "\n".join(
            (
                IMPORTS,
                HOOKS,
                "",
                "class Network(nn.Module):",
                "    def __init__(self):",
                *(f"        {layer}" for layer in layers),
                "",
                f"    def forward(self, {inputs}):",
                *(f"        {line}" for line in self.lines),
                f"        return ({''.join(f'{name}, ' for name in self.results)})",
                "",
                "",
                f"torch.manual_seed({self.seed})",
                f"layout = torch.{'channels_last' if self.channels_last else 'contiguous_format'}",
                f"network = Network().to({self.dtype}, memory_format=layout)",
                f"network.train({self.training})",
                *(f"{leaf} = {text}" for leaf, text in zip(leaves, self.leaves, strict=True)),
                *(whole if self.whole else ()),
                *(f"x{i} = {text}" for i, text in enumerate(self.inputs)),
                f"# called as network({inputs}) with gradients={self.training}, "
                f"autocast={self.autocast}, compiled with dynamic={self.dynamic}",
            )
        )

    def build(self) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
        """(the network, leaves, inputs made of them), the same ones at each call."""
        names: dict[str, Any] = {}
        exec(compile(str(self), f"<drawn network {self.seed}>", "exec"), names)
        leaves = [names[f"leaf{i}"] for i in range(len(self.leaves))]
        return names["network"], leaves, [names[f"x{i}"] for i in range(len(self.inputs))]


def reduced(program: Program, fails: Callable[[Program], bool]) -> Program:
    """A smaller program that still fails: without the results, lines and layers it does not need.

    A line gives way to ``pass`` and a region to ``if True:``, as others may stand within it.
    """
    for part in ("results", "lines", "layers"):
        for i in reversed(range(len(getattr(program, part)))):
            smaller = _without(program, part, i)
            if fails(smaller):
                program = smaller
    for setting in ("training", "autocast", "dynamic", "channels_last"):
        smaller = replace(program, **{setting: False})
        if smaller != program and fails(smaller):
            program = smaller
    return program


def _without(program: Program, part: str, i: int) -> Program:
    parts = getattr(program, part)
    less = ()
    if part == "lines":
        text = parts[i].lstrip()
        less = (parts[i].replace(text, "if True:" if text.endswith(":") else "pass"),)
    return replace(program, **{part: (*parts[:i], *less, *parts[i + 1 :])})


class Writer:
    """Writes a network's layers and the lines of its forward pass, and executes each as it does.

    So it knows the shapes and dtypes of all names, and a line that torch refuses is not written.
    """

    def __init__(self, random: Random, dtype: torch.dtype, training: bool, channels_last: bool):
        self.random, self.dtype, self.training = random, dtype, training
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.names: dict[str, Any] = {"self": nn.Module()}
        exec(IMPORTS, self.names)
        exec(HOOKS, self.names)
        self.leaves: list[str] = []
        self.inputs: list[str] = []
        self.layers: list[str] = []
        self.lines: list[str] = []
        self.regions: list[ExitStack] = []
        self.coarsest = torch.bfloat16 if torch.is_autocast_enabled("cpu") else dtype
        self.count = count(1)

    # Drawing.

    def maybe(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def pick_recent(self, names: Iterable[str]) -> str:
        """One of the names, more likely a late one."""
        names = list(names)
        return names[max(0, len(names) - 1 - int(self.random.expovariate(0.7)))]

    # What there is.

    def maps(self, like: Tensor | None = None) -> list[str]:
        """Names of images, of the shape of one if it is given."""
        return [
            name
            for name, value in self.names.items()
            if isinstance(value, Tensor)
            and not name.startswith("leaf")
            and value.is_floating_point()
            and value.dim() in (3, 4)
            and value.numel() > 0
            and (like is None or value.shape == like.shape)
        ]

    def used_layers(self) -> list[str]:
        """What lines of forward mention: an expression that was not chosen had layers, too."""
        used = set(re.findall(r"self\.(\w+)", "\n".join(self.lines)))
        return [layer for layer in self.layers if re.findall(r"\w+\d+", layer)[0] in used]

    # Writing.

    def execute(self, text: str) -> bool:
        try:
            exec(text, self.names)
        except Exception:
            return False
        return True

    def write(self, text: str) -> bool:
        """Whether torch takes the line; if so it is written."""
        if not self.execute(text):
            return False
        self.lines.append("    " * len(self.regions) + text)
        for value in self.names.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                self.coarsest = max(self.coarsest, value.dtype, key=lambda t: torch.finfo(t).eps)
        return True

    def new(self, prefix: str = "v") -> str:
        return f"{prefix}{next(self.count)}"

    def assign(self, expression: str, old: str | None = None) -> str | None:
        """The name that the expression's value has got, at times the old one; None if there is
        no such value.
        """
        name = old if old is not None and self.maybe(0.5) else self.new()
        return name if self.write(f"{name} = {expression}") else None

    def layer(self, prefix: str, text: str) -> str:
        """The name under which the network has a layer, parameter or buffer."""
        name = f"self.{self.new(prefix)}"
        line = text.replace("NAME", name.removeprefix("self."))
        line = line if line.startswith("self.register") else f"{name} = {line}"
        exec(line, self.names)
        self.layers.append(line)
        self.names["self"].to(self.dtype, memory_format=self.layout).train(self.training)
        return name

    def open(self, context: str) -> None:
        self.lines.append("    " * len(self.regions) + f"with {context}:")
        region = ExitStack()
        region.enter_context(eval(context, self.names))
        self.regions.append(region)

    def close(self, depth: int) -> None:
        """Leave regions until there are so many."""
        while len(self.regions) > depth:
            if self.lines[-1].endswith(":"):
                self.lines.append("    " * len(self.regions) + "pass")
            self.regions.pop().close()

    def call(
        self, function: str, required: dict[str, str], optional: dict[str, tuple[str, str]]
    ) -> str:
        """A call with some arguments by position and the rest by keyword. ``optional`` has values
        and defaults; what is the default may be left out.
        """
        known = [*required.items(), *((name, value) for name, (value, _) in optional.items())]
        by_position = self.pick(1, len(required), len(required), len(known))
        words = [value for _, value in known[:by_position]]
        for name, value in known[by_position:]:
            default = optional[name][1] if name in optional else None
            if value != default or self.maybe(0.1):
                words.append(f"{name}={value}")
        return f"{function}({', '.join(words)})"
