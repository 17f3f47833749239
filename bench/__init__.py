"""What the kernels cost: for now the code that they compile to, which needs no GPU."""
