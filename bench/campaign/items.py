"""The items of a campaign, most valuable first: checks of results, ceilings, times of tiles."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from kernels import planner
from kernels.device import Device
from kernels.geometry import Conv2dGeometry, Direction, Pool2dGeometry
from kernels.problem import Problem
from kernels.tile import Tile

from .. import selection, suites
from ..measure import DTYPES

OPERATORS: dict[Direction, str] = {
    "fprop": "conv2d",
    "dgrad": "conv2d_dgrad",
    "wgrad": "conv2d_wgrad",
}
DIRECTIONS: dict[str, Direction] = {name: direction for direction, name in OPERATORS.items()}
CHECKED = ("bf16", "fp16", "tf32", "fp32")
EPILOGUES = (("bias",), ("bias", "relu"), ("bias", "residual", "relu"))
RANKS = 3  # timed tiles per layer

# Layers of ResNet-50: those on which wgrad is checked, those on which all of its tiles are, those
# for the other directions, and those that are timed.
_WGRADS = (
    *("l1.0.conv2", "l2.1.conv2", "l3.1.conv2", "l4.1.conv2", "l2.0.conv2"),
    *("l1.0.conv3", "l2.1.conv1", "l3.1.conv1", "l3.0.down"),
)
_FAMILIES = _WGRADS[:5]
_OTHERS = ("l1.0.conv2", "l2.0.conv2", "l3.1.conv2", "l2.1.conv1", "l3.0.down")
_TIMED = (
    *("l1.0.conv2", "l2.1.conv2", "l3.1.conv2", "l4.1.conv2"),
    *("l1.0.conv3", "l2.1.conv1", "l3.1.conv1"),
)
_IMAGES = 64  # in a checked layer
_SMALL = 16  # channels on a CPU: the fewest that tensor cores take


class Forced(NamedTuple):
    """The name of an engine, and the tile that it must use."""

    engine: str
    tile: Tile

    def __str__(self) -> str:
        box = "x".join(map(str, self.tile.box or "-"))
        stages = f"{self.tile.warps}w{self.tile.stages}s"
        return f"{self.engine} {selection.tile_text(self.tile)} {box} {stages}/{self.tile.split_k}"


@dataclass(frozen=True)
class Check:
    """An operator of ``torch.ops.triton_cnn`` on one layer: is it right, and always the same?

    ``parts`` are a convolution's extras: bias, residual, relu. ``forced`` replaces the planner's
    choice.
    """

    layer: str
    operator: str
    geometry: suites.Geometry
    dtype: str
    channels_last: bool = True
    parts: tuple[str, ...] = ()
    forced: Forced | None = None

    @property
    def name(self) -> str:
        layout = "" if self.channels_last else "nchw"
        parts = (self.operator, self.layer, self.dtype, layout, "+".join(self.parts))
        return " ".join(filter(None, (*parts, str(self.forced or ""))))


@dataclass(frozen=True)
class Ceiling:
    """A limit of the device; a name of ``timing.CEILINGS``."""

    name: str


@dataclass(frozen=True)
class Timing:
    """The time of one direction of a layer in bf16, by cuDNN or by a tile of ours."""

    layer: str
    direction: Direction
    geometry: Conv2dGeometry
    forced: Forced | None
    rank: int  # 0 is the planner's choice, or cuDNN

    @property
    def contender(self) -> str:
        return "cudnn" if self.forced is None else "ours"

    @property
    def name(self) -> str:
        return f"time of {self.direction} {self.layer} {self.forced or 'cudnn'}"


Item = Check | Ceiling | Timing


def items(here: Device, ceilings: Iterable[str], small: bool) -> list[Item]:
    """All items in order. ``small``: on layers for a CPU."""
    layers = _layers(_IMAGES, small)
    found: list[Item] = [*_checks(layers, here), *map(Ceiling, ceilings)]
    found += [*_timings(here, small), *_more_checks(layers, here)]
    return list({item.name: item for item in found}.values())  # some layers share their tiles


# Checks.


def _checks(layers: dict[str, suites.Geometry], here: Device) -> Iterator[Check]:
    """wgrad and all of its tiles, then each engine and direction."""
    yield from _directions(("wgrad",), _WGRADS, ("bf16",), layers)
    for name in _FAMILIES:
        yield from _family("wgrad", name, layers[name], "bf16", here, 2)
    yield from _directions(("wgrad",), _WGRADS, CHECKED, layers)
    for dtype in CHECKED:
        yield from _directions(("fprop", "dgrad"), _OTHERS, (dtype,), layers)
        yield from _others(layers, dtype)
    yield from _bytes_and_float8(layers, here)


def _more_checks(layers: dict[str, suites.Geometry], here: Device) -> Iterator[Check]:
    """More tiles, if time is left."""
    for name in _FAMILIES:
        yield from _family("wgrad", name, layers[name], "bf16", here, 1)
    for dtype in ("fp16", "tf32"):
        yield from _family("wgrad", "l3.1.conv2", layers["l3.1.conv2"], dtype, here, 2)
    for direction in ("fprop", "dgrad"):
        yield from _family(direction, "l3.1.conv2", layers["l3.1.conv2"], "bf16", here, 1)


def _directions(
    directions: Sequence[Direction],
    names: Sequence[str],
    dtypes: Sequence[str],
    layers: dict[str, suites.Geometry],
) -> Iterator[Check]:
    for dtype in dtypes:
        for name in names:
            for direction in directions:
                yield Check(name, OPERATORS[direction], layers[name], dtype)


def _family(
    direction: Direction, name: str, g: suites.Geometry, dtype: str, here: Device, split_k: int
) -> Iterator[Check]:
    """Every tile that some batch and image size of a layer may get, for one ``split_k``."""
    assert isinstance(g, Conv2dGeometry)
    kind = DTYPES[dtype]
    problem = Problem(direction, g, kind.torch, kind.precision, here, "aligned")
    for plan in planner.family(problem):
        if plan.tile.split_k == split_k:
            forced = Forced(plan.engine.name, plan.tile)
            yield Check(name, OPERATORS[direction], g, dtype, forced=forced)


def _others(layers: dict[str, suites.Geometry], dtype: str) -> Iterator[Check]:
    """Other engines, epilogues, layouts, pooling."""
    for parts in EPILOGUES:
        yield Check("l3.1.conv2", "conv2d", layers["l3.1.conv2"], dtype, parts=parts)
    yield Check("l3.1.conv2", "conv2d_wgrad", layers["l3.1.conv2"], dtype, parts=("bias",))
    yield Check("transposed", "conv2d_dgrad", layers["transposed"], dtype, parts=("bias",))
    three = tuple(OPERATORS)
    others = "grouped", "groups of 4", "odd", "stem", "one channel", "depthwise", "depthwise/2"
    for name in others:
        yield from _directions(three, (name,), (dtype,), layers)
    for operator in OPERATORS.values():
        yield Check("l3.1.conv2", operator, layers["l3.1.conv2"], dtype, channels_last=False)
    for name in ("stem+pool", "conv3_2+pool", "odd+pool"):
        for operator in ("conv2d_relu_max_pool2d", "conv2d_relu_max_pool2d_backward"):
            yield Check(name, operator, layers[name], dtype)
    block = layers["conv3_2+pool"]
    yield Check("conv3_2+pool", "conv2d_relu_max_pool2d", block, dtype, channels_last=False)
    if dtype != "tf32":  # the rest makes no products
        yield from _without_products(layers, dtype)


def _without_products(layers: dict[str, suites.Geometry], dtype: str) -> Iterator[Check]:
    for operator in ("max_pool2d", "max_pool2d_backward", "max_pool2d_gather"):
        for channels_last in (True, False):
            yield Check("maxpool", operator, layers["maxpool"], dtype, channels_last)
    for operator in ("max_unpool2d", "max_unpool2d_backward"):
        yield Check("pool3", operator, layers["pool3"], dtype)
    for operator in ("relu_backward", "channel_sum"):
        yield Check("l3.1.conv2", operator, layers["l3.1.conv2"], dtype)


def _bytes_and_float8(layers: dict[str, suites.Geometry], here: Device) -> Iterator[Check]:
    for operator in ("conv2d_bytes", "conv2d_bytes_wgrad"):
        yield Check("stem", operator, layers["stem"], "bf16", parts=("bias",))
    if here.descriptors or here.backend == "interpreter":
        g = layers["l3.1.conv2"]
        yield Check("l3.1.conv2", "conv2d_fp8", g, "bf16", parts=("bias", "relu"))


def _layers(images: int, small: bool) -> dict[str, suites.Geometry]:
    """The checked layers by name: those of networks, and cases that networks lack."""
    named = {
        layer.name: layer.geometry
        for suite in ("vgg16", "resnet50_v1.5")  # of two with one name, ResNet's
        for layer in suites.layers()
        if layer.suite == suite
    }
    depthwise = {
        layer.name: layer.geometry
        for layer in suites.layers()
        if layer.suite == "mobilenetv2_depthwise"
    }
    odd = Conv2dGeometry(images, 36, 30, 30, 50, 3, 3, (1, 1), ((2, 2), (2, 2)), (2, 2))
    named |= {
        "depthwise": depthwise["b2.1.dw"],
        "depthwise/2": depthwise["b3.0.dw"],
        # From a generator: its dgrad doubles 16x16 pixels.
        "transposed": Conv2dGeometry(images, 128, 32, 32, 256, 4, 4, (2, 2), ((1, 1), (1, 1))),
        "grouped": Conv2dGeometry(
            images, 256, 28, 28, 256, 3, 3, padding=((1, 1), (1, 1)), groups=4
        ),
        "groups of 4": Conv2dGeometry(
            images, 64, 28, 28, 64, 3, 3, padding=((1, 1), (1, 1)), groups=16
        ),
        "odd": odd,
        "odd+pool": suites.Block(odd, Pool2dGeometry(*odd.y_shape, (2, 2), (2, 2), (0, 0))),
        "one channel": Conv2dGeometry(images, 1, 28, 28, 32, 5, 5, padding=((2, 2), (2, 2))),
    }
    shrink = _shrunk if small else _with_images
    return {name: shrink(g, images) for name, g in named.items()}


def _with_images(g: suites.Geometry, images: int) -> suites.Geometry:
    return suites.with_images(g, min(images, 16) if isinstance(g, suites.Block) else images)


def _shrunk(g: suites.Geometry, images: int) -> suites.Geometry:
    """Two small images, with enough channels to keep the engine the same if possible."""
    if isinstance(g, suites.Block):
        conv = _shrunk(g.conv, images)
        assert isinstance(conv, Conv2dGeometry)
        N, K, P, Q = conv.y_shape
        return suites.Block(conv, replace(g.pool, N=N, C=K, H=P, W=Q))
    shrunk = suites.shrink(suites.Layer("", "", g, 1)).geometry
    if isinstance(shrunk, Pool2dGeometry):
        return replace(shrunk, N=2, C=min(shrunk.C, _SMALL))
    assert isinstance(g, Conv2dGeometry)
    assert isinstance(shrunk, Conv2dGeometry)
    groups = min(g.groups, _SMALL if g.groups == g.C else 2)
    C, K = (groups * _few(count // g.groups) for count in (g.C, g.K))
    return replace(shrunk, N=2, C=C, K=K, groups=groups)


def _few(channels: int) -> int:
    """At most 16 channels, or 18 if rows should start off 16 bytes."""
    return channels if channels <= 4 else _SMALL + channels % 8 // 2


# Times.


def _timings(here: Device, small: bool) -> Iterator[Timing]:
    """The planner's choice beside cuDNN for all layers, then the other ranks."""
    layers = _layers(256, small)
    three: tuple[Direction, ...] = tuple(OPERATORS)
    for rank in range(RANKS):
        for name in _TIMED:
            for direction in three:
                g = layers[name]
                assert isinstance(g, Conv2dGeometry)
                if rank == 0:
                    yield Timing(name, direction, g, None, 0)
                tiles = _best_tiles(direction, g, here)
                if rank < len(tiles):
                    yield Timing(name, direction, g, tiles[rank], rank)


def _best_tiles(direction: Direction, g: Conv2dGeometry, here: Device) -> list[Forced]:
    """The best predicted tile for each number of rows and columns; if these are too few, then the
    best others, which have other boxes or another ``split_k``.
    """
    kind = DTYPES["bf16"]
    best: dict[tuple, Forced] = {}
    others: list[Forced] = []
    problem = Problem(direction, g, kind.torch, kind.precision, here, "aligned")
    for plan in planner.candidates(problem):
        tile = Forced(plan.engine.name, plan.tile)
        if best.setdefault((tile.engine, plan.tile.rows, plan.tile.columns), tile) is not tile:
            others.append(tile)
    return [*best.values(), *others][:RANKS]
