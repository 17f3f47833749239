"""Convolution in its three directions: the engines that the planner chooses from."""

from . import depthwise, descriptor_gemm, few_channels, implicit_gemm, paired_columns
from .engine import Engine

ENGINES: list[Engine] = [
    depthwise.ENGINE,
    paired_columns.ENGINE,
    few_channels.ENGINE,
    descriptor_gemm.ENGINE,
    implicit_gemm.ENGINE,
]
"""Of those that take a problem, the first is launched; the last takes almost all."""
