"""Time training steps."""

import copy

from torch import nn

import cnn


def eager(model: nn.Module) -> nn.Module:
    """A copy of a network on torch's own layers, one for each of a fused layer's parts."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            setattr(parent, name, _torchs(layer))
    return model


def _torchs(layer: nn.Module) -> nn.Module:
    following: list[nn.Module] = []
    if isinstance(layer, cnn.ConvReLU2d | cnn.ConvReLUMaxPool2d):
        following.append(nn.ReLU(inplace=True))
    if isinstance(layer, cnn.ConvReLUMaxPool2d):
        window = layer.pool_kernel_size, layer.pool_stride, layer.pool_padding
        following.append(nn.MaxPool2d(*window))
    for ours, torchs in ((cnn.Conv2d, nn.Conv2d), (cnn.MaxPool2d, nn.MaxPool2d)):
        if isinstance(layer, ours):
            layer.__class__ = torchs
    return nn.Sequential(layer, *following) if following else layer
