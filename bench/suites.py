"""The layers of known networks, and the cases made of them.

Shapes are read from JSON, a list of rows. A convolution's row has ``suite``, ``name``, ``N``,
``C``, ``H``, ``W``, ``K``, ``R``, ``S`` and may have ``stride``, ``padding``, ``dilation`` (a
number, or [height, width]), ``groups``, ``count`` (how often the network has the layer) and its
output size ``P``, ``Q``, which is then checked. A pooling's row has ``kernel`` instead of K, R, S
and may have ``ceil_mode``. A convolution that is pooled after its ReLU is a block: its row also has
``pool``, an object with ``kernel``, ``stride`` and ``padding``. Other keys are ignored.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from kernels.geometry import Conv2dGeometry, Direction, Pair, Pool2dGeometry

CASES = Path(__file__).parent / "cases"

# Operators on every convolution; on depthwise ones and on first layers only, by what they compute;
# on poolings; on blocks.
CONVOLUTIONS: dict[str, Direction] = {
    "fprop": "fprop",
    "dgrad": "dgrad",
    "wgrad": "wgrad",
    "conv_relu": "fprop",
}
DEPTHWISE: dict[str, Direction] = {
    "depthwise": "fprop",
    "depthwise_dgrad": "dgrad",
    "depthwise_wgrad": "wgrad",
}
FIRST: dict[str, Direction] = {"first_layer": "fprop", "first_layer_wgrad": "wgrad"}
POOLINGS = ("max_pool", "max_pool_backward")
BLOCKS = ("conv_relu_max_pool", "conv_relu_max_pool_backward")
OPS = (*CONVOLUTIONS, *DEPTHWISE, *FIRST, *POOLINGS, *BLOCKS)
NAMED = DEPTHWISE | FIRST  # operators of CONVOLUTIONS with their own names
DIRECTIONS = CONVOLUTIONS | NAMED  # what each of them computes


class Block(NamedTuple):
    """A convolution with bias and ReLU, and the max-pooling of its result."""

    conv: Conv2dGeometry
    pool: Pool2dGeometry


Geometry = Conv2dGeometry | Pool2dGeometry | Block


class Layer(NamedTuple):
    """A layer of a network, which has it ``count`` times."""

    suite: str
    name: str
    geometry: Geometry
    count: int


class Case(NamedTuple):
    """One measurement: an operator of OPS on a layer, in a dtype by its short name."""

    layer: Layer
    op: str
    dtype: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """The key of its row: suite, layer, op, dtype."""
        return self.layer.suite, self.layer.name, self.op, self.dtype


def layers(shapes: Path | None = None) -> list[Layer]:
    """The layers of ``bench/cases``, and of one more file, whose suites replace those there."""
    known = [layer for path in sorted(CASES.glob("*.json")) for layer in read(path)]
    more = read(shapes) if shapes else []
    replaced = {layer.suite for layer in more}
    return [layer for layer in known if layer.suite not in replaced] + more


def read(path: Path) -> list[Layer]:
    """The layers in one file of shapes. Raises ValueError that names the file and the row."""
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} is not a list of layers")
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            found.append(_layer(row))
        except KeyError as error:
            raise ValueError(f"{path}: row {number} has no {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: row {number}: {error}") from None
    names = [layer[:2] for layer in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: {' '.join(twice[0])} is there twice")
    return found


def _layer(row: dict[str, Any]) -> Layer:
    N, C, H, W = (_number(row, key) for key in "NCHW")
    stride, padding, dilation = (
        _pair(row.get(key, usual), key)
        for key, usual in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    geometry: Geometry
    if "kernel" in row:
        kernel = _pair(row["kernel"], "kernel")
        stride = stride if "stride" in row else kernel
        ceil = bool(row.get("ceil_mode", False))
        geometry = Pool2dGeometry(N, C, H, W, kernel, stride, padding, dilation, ceil)
    else:
        K, R, S = (_number(row, key) for key in "KRS")
        both = (padding[0], padding[0]), (padding[1], padding[1])
        groups = _number(row, "groups") if "groups" in row else 1
        if C % groups or K % groups:
            raise ValueError(f"groups={groups} do not divide both C={C} and K={K}")
        geometry = Conv2dGeometry(N, C, H, W, K, R, S, stride, both, dilation, groups)
    size = geometry.P, geometry.Q
    said = row.get("P", size[0]), row.get("Q", size[1])
    if size != said or min(size) < 1:
        raise ValueError(f"the output is {size[0]}x{size[1]}, not {said[0]}x{said[1]}")
    if "pool" in row and isinstance(geometry, Conv2dGeometry):
        pool = row["pool"]
        sides = ("kernel", "stride", "padding")
        kernel, stride, padding = (_pair(pool.get(key, 0), key) for key in sides)
        geometry = Block(geometry, Pool2dGeometry(*geometry.y_shape, kernel, stride, padding))
    count = _number(row, "count") if "count" in row else 1
    return Layer(str(row["suite"]), str(row["name"]), geometry, count)


def _number(row: dict[str, Any], key: str) -> int:
    if type(row[key]) is not int or row[key] < 1:
        raise ValueError(f"{key}={row[key]!r} is not a whole number from 1")
    return row[key]


def _pair(value: Any, key: str) -> Pair:
    pair = value if isinstance(value, list) else [value, value]
    least = 0 if key == "padding" else 1
    if len(pair) != 2 or any(type(side) is not int or side < least for side in pair):
        raise ValueError(f"{key}={value!r} is neither a whole number nor two, from {least}")
    return pair[0], pair[1]


def _is_named(op: str, g: Conv2dGeometry) -> bool:
    """Whether a convolution has an operator of NAMED: each filter sees one channel of several, or
    all see the few channels of an image.
    """
    return g.groups == g.C > 1 if op in DEPTHWISE else g.groups == 1 and g.C <= 4


def cases(chosen: Iterable[Layer], ops: Sequence[str], dtypes: Sequence[str]) -> list[Case]:
    """Every operator on every layer that has it, in every dtype; suites alternate.

    So an interrupted run has measured a part of each suite, with all operators of its first layers.
    A layer that is selected under two names, as ``fprop`` and ``depthwise``, is measured once,
    under the second.
    """
    suites: dict[str, list[Case]] = {}
    for layer in chosen:
        found = [Case(layer, op, dtype) for op in ops if _has(layer, op, ops) for dtype in dtypes]
        suites.setdefault(layer.suite, []).extend(found)
    turns = zip_longest(*suites.values())
    return [case for turn in turns for case in turn if case is not None]


def _has(layer: Layer, op: str, ops: Sequence[str]) -> bool:
    g = layer.geometry
    if isinstance(g, Block):
        return op in BLOCKS
    if isinstance(g, Pool2dGeometry):
        return op in POOLINGS
    if op in NAMED:
        return _is_named(op, g)
    twice = any(NAMED.get(other) == op and _is_named(other, g) for other in ops)
    return op in CONVOLUTIONS and not twice


def with_images(g: Geometry, N: int) -> Geometry:
    """The geometry with so many images."""
    if isinstance(g, Block):
        return Block(replace(g.conv, N=N), replace(g.pool, N=N))
    return replace(g, N=N)


def shrink(layer: Layer) -> Layer:
    """The layer with one image, a few channels and at most 4x4 outputs, for a CPU."""
    g = layer.geometry
    if isinstance(g, Block):
        conv: Any = shrink(layer._replace(geometry=g.conv)).geometry
        N, K, P, Q = conv.y_shape
        return layer._replace(geometry=Block(conv, replace(g.pool, N=N, C=K, H=P, W=Q)))
    padding = [side if isinstance(side, int) else side[0] for side in g.padding]
    axes = zip((g.H, g.W), g.kernel, g.stride, padding, g.dilation, strict=True)
    height, width = (_size_for_four(*axis) for axis in axes)
    if isinstance(g, Pool2dGeometry):
        return layer._replace(geometry=replace(g, N=1, C=min(g.C, 4), H=height, W=width))
    groups = min(g.groups, 4)
    channels, filters = (groups * min(count // g.groups, 4) for count in (g.C, g.K))
    small = replace(g, N=1, C=channels, H=height, W=width, K=filters, groups=groups)
    return layer._replace(geometry=small)


def _size_for_four(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return min(size, max(1, dilation * (kernel - 1) + 1 - 2 * padding + 3 * stride))
