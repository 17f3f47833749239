"""Convolution and max-pooling kernels in Triton, from geometry to operators of PyTorch."""
