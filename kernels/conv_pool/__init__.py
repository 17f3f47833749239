"""A convolution, ReLU and max-pool in one kernel: the engines that the planner chooses from."""

from ..conv.engine import PoolingEngine
from . import descriptor_gemm, few_channels, implicit_gemm

ENGINES: list[PoolingEngine] = [few_channels.ENGINE, descriptor_gemm.ENGINE, implicit_gemm.ENGINE]
"""Of those that take a problem, the first is launched; the last takes all."""
