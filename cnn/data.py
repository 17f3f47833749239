"""Data sets that arrive with an installed package; nothing is downloaded."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset


def digits(size: int = 32) -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, scaled up bilinearly.

    Returns the training set (1,437 images) and the test set (360): a fixed split with the same
    share of each digit in both. Images are float32 [1, size, size], shifted and scaled so that the
    training set's pixels have mean 0 and variance 1; labels are int64.
    """
    pixels, target = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8)
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(target)
    train, test = train_test_split(
        range(len(labels)), test_size=0.2, stratify=target, random_state=0
    )
    images = (images - images[train].mean()) / images[train].std()
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])
