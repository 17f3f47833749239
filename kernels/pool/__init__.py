"""Max-pooling, its inverse and their gradients."""
