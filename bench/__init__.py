"""Benchmarks of the kernels and analyses of their compiled code: ``python -m bench --help``."""
