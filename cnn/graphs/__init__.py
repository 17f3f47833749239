"""Rewriting of Dynamo's graphs for ``torch.compile(model, backend="triton_cnn")``."""
