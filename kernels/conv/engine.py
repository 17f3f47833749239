"""What an engine is, and the calls that it launches.

An engine is a family of kernels for some of the three directions of a convolution, and the tiles
that it launches them with. Each has a file of its own, which ends with its ``ENGINE``; the planner
has the list. A pooling engine is the same of a convolution, ReLU and max-pool in one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

from torch import Tensor

from .. import cost_model
from ..geometry import Conv2dGeometry, Direction, Pool2dGeometry
from ..lang.epilogue import Epilogue
from ..lang.prologue import Normalization
from ..pool.pool_gradient import PoolGradient
from ..problem import Problem
from ..tile import Tile

Fusion = Literal["bytes", "scale", "pool_gradient"]
"""What only some engines fuse: see ``Normalization``, ``Epilogue.scale`` and ``PoolGradient``."""


_PLAIN = Epilogue()


@dataclass(frozen=True)
class Fprop:
    """y[N,K,P,Q] = epilogue(conv(x, w)); x in bytes is normalized as it is loaded."""

    direction: ClassVar[Direction] = "fprop"
    x: Tensor
    w: Tensor
    y: Tensor
    g: Conv2dGeometry
    precision: str = "ieee"
    epilogue: Epilogue = _PLAIN
    normalization: Normalization | None = None

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.x, self.w, self.epilogue.bias, self.epilogue.residual

    @property
    def results(self) -> tuple[Tensor | None, ...]:
        return (self.y,)

    def on(self, operands: Iterable[Any], results: Iterable[Any]) -> Self:
        """The same call of other operands and results."""
        x, w, bias, residual = operands
        (y,) = results
        return replace(
            self, x=x, w=w, y=y, epilogue=self.epilogue._replace(bias=bias, residual=residual)
        )


@dataclass(frozen=True)
class Dgrad:
    """dx[N,C,H,W], the gradient of x, plus bias[C] (for a transposed convolution)."""

    direction: ClassVar[Direction] = "dgrad"
    dy: Tensor
    w: Tensor
    dx: Tensor
    g: Conv2dGeometry
    precision: str = "ieee"
    bias: Tensor | None = None
    pooled: PoolGradient | None = None

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.dy, self.w, self.bias

    @property
    def results(self) -> tuple[Tensor | None, ...]:
        return (self.dx,)

    def on(self, operands: Iterable[Any], results: Iterable[Any]) -> Self:
        """The same call of other operands and results."""
        dy, w, bias = operands
        (dx,) = results
        return replace(self, dy=dy, w=w, dx=dx, bias=bias)


@dataclass(frozen=True)
class Wgrad:
    """dw[K,C/groups,R,S] and db[K], the gradients of weight and bias; None is not computed."""

    direction: ClassVar[Direction] = "wgrad"
    x: Tensor
    dy: Tensor
    dw: Tensor | None
    db: Tensor | None
    g: Conv2dGeometry
    precision: str = "ieee"
    normalization: Normalization | None = None
    pooled: PoolGradient | None = None

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.x, self.dy

    @property
    def results(self) -> tuple[Tensor | None, ...]:
        return self.dw, self.db

    def on(self, operands: Iterable[Any], results: Iterable[Any]) -> Self:
        """The same call of other operands and results."""
        x, dy = operands
        dw, db = results
        return replace(self, x=x, dy=dy, dw=dw, db=db)


Call = Fprop | Dgrad | Wgrad


@dataclass(frozen=True, eq=False, repr=False)
class Engine:
    """``tiles`` are those that a problem may be launched with, best first or in any order; none:
    the engine does not take it. ``launchers`` has a function for each kind of call.
    """

    name: str
    tiles: Callable[[Problem], Iterable[Tile]]
    launchers: Mapping[type[Call], Callable[[Any, Tile], None]]
    fuses: Mapping[Direction, frozenset[Fusion]] = field(default_factory=dict)
    predict: Callable[[Problem, Tile], cost_model.Prediction] = cost_model.predict
    is_final: Callable[[Problem], bool] = lambda problem: True
    """Whether no later engine is tried beside this one, if it takes a problem."""

    def __repr__(self) -> str:
        return self.name

    def launch(self, call: Call, tile: Tile) -> None:
        self.launchers[type(call)](call, tile)

    def takes(self, fusion: Fusion, direction: Direction) -> bool:
        """Whether it fuses what only some engines do."""
        return fusion in self.fuses.get(direction, ())

    def plans(self, problem: Problem) -> list["Plan"]:
        """Its plans for a problem."""
        return [Plan(self, tile, *self.predict(problem, tile)) for tile in self.tiles(problem)]


class Plan(NamedTuple):
    """An engine, the tile to launch it with, and the predicted time with what limits it."""

    engine: Engine
    tile: Tile
    ms: float
    limit: cost_model.Limit


@dataclass(frozen=True)
class PooledConv:
    """y[N,K,PP,PQ] = max_pool(relu(conv(x, w) + bias)).

    argmax[N,K,PP,PQ], of ``max_pool.argmax_dtype(pool)``, are the taps that won, all bits set
    where no gradient flows; None are not wanted.
    """

    x: Tensor
    w: Tensor
    bias: Tensor | None
    y: Tensor
    argmax: Tensor | None
    g: Conv2dGeometry
    pool: Pool2dGeometry
    precision: str = "ieee"


@dataclass(frozen=True, eq=False, repr=False)
class PoolingEngine:
    """``tiles`` are those that some batch and image size of a layer may get, the best for this one
    first; none: the engine does not take it.
    """

    name: str
    tiles: Callable[[Problem, Pool2dGeometry], Iterable[Tile]]
    launch: Callable[[PooledConv, Tile], None]

    def __repr__(self) -> str:
        return self.name
