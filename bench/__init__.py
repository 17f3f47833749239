"""Benchmarks of the kernels and of what they compile to: ``python -m bench --help``."""
