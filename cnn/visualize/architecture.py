"""A drawing of a network's structure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from torch import nn

from kernels._private import Convolution

from ..console import by, table
from ..figures import new_figure
from ..summaries import summary
from ..text import caption
from .layers import evaluating

COLOURS = {
    "image": "#e0e0e0",
    "convolution": "#a9d0ee",
    "convolution and pooling": "#5b9bd0",
    "pooling": "#f4a582",
    "linear": "#a6d18a",
    "block": "#c2a5cf",
    "other": "#f2e6b8",
}
"""Colors of the groups of blocks."""

ACROSS = 8
"""The most blocks in a row of a drawing."""

PLACE = 1.1
"""Inches between neighboring blocks: the unit of a drawing."""

Point = tuple[float, float]


class Block(NamedTuple):
    """Layers that are drawn as one.

    ``kind`` is their classes joined by " + ", ``group`` one of COLOURS, ``size`` the size of their
    output without the batch.
    """

    name: str
    kind: str
    group: str
    size: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class Architecture:
    """A network's blocks in the order of their calls; the first represents the image."""

    blocks: tuple[Block, ...]

    def __str__(self) -> str:
        """One line per block."""
        rows = [("block", "kind", "output", "parameters")]
        for name, kind, _, size, parameters in self.blocks:
            rows.append((name, kind, by(size), f"{parameters:,}"))
        return table(rows, "<<>>")

    def figure(self) -> Any:
        """The blocks as boxes, row by row.

        A box is longer for more maps, and higher and deeper for larger maps; other outputs are
        bars. All sizes are on a logarithmic scale.
        """
        from matplotlib.patches import Patch  # optional, like all of matplotlib

        *_, last = self.blocks
        ends = [f"{last.size[0]:,}\nclasses"] if len(last.size) == 1 else []
        count = len(self.blocks) + len(ends)
        down = -(-count // ACROSS)
        across = max(6, -(-count // down))
        row = 1.3 + 0.1 * max(block.kind.count(" + ") for block in self.blocks)
        height = down * row + 0.3
        figure = new_figure("architecture", figsize=(across * PLACE, height * PLACE))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, across), ylim=(height, 0))
        axes.set_axis_off()
        scale = _Scale(self.blocks)
        reached = 0.0
        for number, item in enumerate((*self.blocks, *ends)):
            line, column = divmod(number, across)
            x, y = column + 0.5, line * row + 0.5
            if isinstance(item, Block):
                half = _draw(axes, item, (x, y), scale)
            else:
                axes.text(x, y, item, ha="center", va="center", fontsize=8)
                half = 0.25
            if number and not column:
                _arrow(axes, (reached, y - row), (across, y - row))
            if number:
                _arrow(axes, (reached if column else 0, y), (x - half, y))
            reached = x + half
        groups = dict.fromkeys(block.group for block in self.blocks[1:])
        handles = [Patch(facecolor=COLOURS[g], edgecolor="0.3", label=g) for g in groups]
        figure.legend(handles=handles, loc="lower center", ncols=len(groups), fontsize=7)
        return figure


class _Scale:
    """The maxima over all blocks."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        maps = [block.size for block in blocks if len(block.size) == 3]
        others = [math.prod(block.size) for block in blocks if len(block.size) != 3]
        self.channels, self.side = max(s[0] for s in maps), max(max(s[1:]) for s in maps)
        self.values = max(others, default=1)


def _draw(axes: Any, block: Block, place: Point, scale: _Scale) -> float:
    """Draw a box at the center of its place with a label below; returns half its width."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Polygon

    if len(block.size) == 3:
        K, P, Q = block.size
        long = 0.04 + 0.26 * _log(K, scale.channels)
        high, deep = 0.04 + 0.56 * _log(P, scale.side), 0.02 + 0.24 * _log(Q, scale.side)
    else:
        long, high, deep = 0.05, 0.1 + 0.7 * _log(math.prod(block.size), scale.values), 0.04
    left, low = place[0] - (long + deep) / 2, place[1] + (high + deep) / 2
    right, top = left + long, low - high
    front = (left, low), (right, low), (right, top), (left, top)
    lid = (left, top), (right, top), (right + deep, top - deep), (left + deep, top - deep)
    flank = (right, low), (right + deep, low - deep), (right + deep, top - deep), (right, top)
    line = {"edgecolor": "0.25", "linewidth": 0.6, "joinstyle": "round"}
    for face, shade in ((front, 1.0), (lid, 1.1), (flank, 0.8)):
        colour = [min(1, shade * level) for level in to_rgb(COLOURS[block.group])]
        axes.add_patch(Polygon(face, facecolor=colour, **line))
    kinds = "\n+ ".join(_cut(kind) for kind in block.kind.split(" + "))
    count = f"{_short(block.parameters)} parameters" if block.parameters else ""
    details = "\n".join(filter(None, (kinds, by(block.size), count)))
    words = {"ha": "center", "va": "top", "fontsize": 6.5}
    axes.text(place[0], place[1] + 0.47, caption(_cut(block.name)), weight="bold", **words)
    axes.text(place[0], place[1] + 0.57, details, linespacing=1.1, **words)
    return (long + deep) / 2


def _arrow(axes: Any, start: Point, end: Point) -> None:
    style = {"arrowstyle": "-|>", "color": "0.4", "linewidth": 0.8, "shrinkA": 2, "shrinkB": 2}
    axes.annotate("", end, start, arrowprops=style)


def _cut(text: str) -> str:
    """A text, shortened at its start if it is too long."""
    return text if len(text) <= 18 else f"…{text[-17:]}"


def _log(value: int, largest: int) -> float:
    """A value from 0 to 1 on a logarithmic scale."""
    return math.log1p(value) / math.log1p(largest)


def _short(count: int) -> str:
    """A number to three digits: 61.1 M."""
    for unit, name in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def architecture(model: nn.Module, size: Sequence[int], depth: int = 1) -> Architecture:
    """The blocks of a network for an image of ``size`` C, H, W, without computing anything.

    Layers appear in the order of their calls. Those that keep the number of values, such as ReLU,
    normalization and dropout, are joined to the block before.

    Args:
        depth: how many levels of modules to open, not counting containers (Sequential, ModuleList).
            1 opens only the network: each residual block is one block, because its branches are no
            chain. Higher values show the layers in it, one after another.

    Raises ValueError if size does not have three numbers, or if depth is below 1.

    Example:
        >>> drawing = visualize.architecture(cnn.models.lenet5(), (1, 32, 32))
        >>> print(drawing.blocks[1].kind)
        ConvReLUMaxPool2d
        >>> drawing.figure().savefig("lenet5.png")
    """
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"size must be C, H, W, got size={tuple(size)}")
    if depth < 1:
        raise ValueError(f"depth must be positive, got depth={depth}")
    modules = dict(model.named_modules())
    blocks = [Block("image", "", "image", tuple(size), 0)]
    with evaluating(model):
        calls = summary(model, (1, *size)).layers
    for name, layers in groupby(calls, lambda layer: _owner(modules, layer.name, depth)):
        *_, last = rows = list(layers)
        kind = type(modules[name]).__name__
        group = "block" if name != last.name else _group(modules[name])
        parameters = sum(row.parameters for row in rows)
        block = Block(name, kind, group, last.output_size[1:], parameters)
        before = blocks[-1]
        same = math.prod(block.size) == math.prod(before.size)
        if group == "other" and same and len(blocks) > 1:
            parameters += before.parameters
            blocks[-1] = before._replace(kind=f"{before.kind} + {kind}", parameters=parameters)
        else:
            blocks.append(block)
    return Architecture(tuple(blocks))


def _owner(modules: dict[str, nn.Module], name: str, depth: int) -> str:
    """The outermost unopened module around a layer, or the layer itself."""
    path = name.split(".")
    for end in range(1, len(path)):
        outer = ".".join(path[:end])
        if not isinstance(modules[outer], nn.Sequential | nn.ModuleList | nn.ModuleDict):
            depth -= 1
            if not depth:
                return outer
    return name


def _group(layer: nn.Module) -> str:
    pooled = "Pool" in type(layer).__name__
    if isinstance(layer, Convolution):
        return "convolution and pooling" if pooled else "convolution"
    if isinstance(layer, nn.Linear):
        return "linear"
    return "pooling" if pooled else "other"
