"""Which engine and which tile for a convolution, from its geometry alone; nothing is timed.

The engine and the depth of its tiles follow from channels, taps, dtype and layout, never from the
batch or the image: so an image's result does not depend on its neighbours. (wgrad sums over the
batch: its engine follows from the map, too, and its order is free.) Tiles and boxes come from fixed
families, so that few binaries serve all sizes; ``cost_model`` predicts which of them is quickest.
"""

from dataclasses import replace
from functools import lru_cache

from . import conv_pool, cost_model
from .conv import ENGINES
from .conv.engine import Fusion, Plan, PoolingEngine
from .geometry import Pool2dGeometry
from .problem import Problem
from .tile import Tile


@lru_cache(maxsize=4096)
def plan(problem: Problem) -> Plan:
    """The best of the candidates."""
    return candidates(problem)[0]


def candidates(problem: Problem) -> list[Plan]:
    """All plans that can run this problem, best first."""
    plans: list[Plan] = []
    for engine in ENGINES:
        found = engine.plans(problem)
        plans += found
        if found and engine.is_final(problem):
            break
    return sorted(plans, key=lambda plan: plan.ms)


def family(problem: Problem) -> list[Plan]:
    """Every plan that some batch and image size of a layer may get, with ``split_k`` 1 and 2,
    which stand for any number: what to compile so that a new size compiles nothing.
    """
    wgrad = problem.direction == "wgrad"
    plans = candidates(problem._replace(any_size=wgrad))
    tiles = {
        (plan.engine, replace(plan.tile, split_k=split_k)): plan
        for plan in plans
        for split_k in ((1, 2) if wgrad else (1,))
    }
    return [plan._replace(tile=tile) for (_, tile), plan in tiles.items()]


def plan_fused(fusion: Fusion, problem: Problem) -> Plan | None:
    """The plan of a problem that needs ``fusion``; None if the best plan's engine lacks it."""
    found = candidates(problem)
    fuses = found and found[0].engine.takes(fusion, problem.direction)
    return found[0] if fuses else None


@lru_cache(maxsize=4096)
def plan_pool_gradient(problem: Problem, pool: Pool2dGeometry) -> Plan | None:
    """The plan, in any layout, of a direction that finds the map's gradient from the pooled one as
    it reads; None if the map's had better be written out first.
    """
    if cost_model.writes_pool_gradient(problem, pool):
        return None
    return plan_fused("pool_gradient", problem._replace(layout="scattered"))


@lru_cache(maxsize=4096)
def plan_pooled(problem: Problem, pool: Pool2dGeometry) -> tuple[PoolingEngine, Tile]:
    """The engine and tile of a convolution that is pooled before it is stored."""
    return pooled_family(problem, pool)[0]


def pooled_family(problem: Problem, pool: Pool2dGeometry) -> list[tuple[PoolingEngine, Tile]]:
    """Those that some batch and image size of the layer may get, the best for this one first."""
    for engine in conv_pool.ENGINES:
        if found := [(engine, tile) for tile in engine.tiles(problem, pool)]:
            return found
    raise AssertionError(problem)
