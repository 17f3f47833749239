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
"""The first engine that has tiles for a problem is launched; engines are compared by time only if
it is not ``is_final``. The last one takes almost all problems."""
