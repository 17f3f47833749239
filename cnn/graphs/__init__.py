"""Dynamo's graphs, rewritten for ``torch.compile(model, backend="triton_cnn")``."""
