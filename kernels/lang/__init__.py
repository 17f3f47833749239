"""The parts that kernels are made of: jitted functions, and what launchers send to them."""
