"""A convolution, ReLU and max-pool in one kernel: the engines that the planner chooses from."""

from ..conv.engine import PoolingEngine
from . import descriptor_gemm, few_channels, implicit_gemm

ENGINES: list[PoolingEngine] = [few_channels.ENGINE, descriptor_gemm.ENGINE, implicit_gemm.ENGINE]
"""The first engine that has tiles for a problem is launched. The last one takes all problems."""
