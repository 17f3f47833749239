"""The blocks of networks and their drawing."""

from collections import Counter

import pytest
import torch
from matplotlib.colors import to_rgb
from torch import nn

import cnn
from cnn.models.resnet import BasicBlock
from cnn.visualize import architecture
from cnn.visualize.architecture import COLOURS


def plain() -> nn.Module:
    """Layers of torch's: what keeps the number of values is joined, whatever its shape."""
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    rest = (nn.Dropout(), nn.Flatten(), nn.Linear(36, 3), nn.Softmax(1))
    return nn.Sequential(nn.Sequential(*layers), nn.Sequential(*rest))


def test_the_table():
    found = architecture(plain(), (1, 8, 8))
    assert str(found) == (
        "block  kind                           output  parameters\n"
        "image                                  1x8x8           0\n"
        "0.0    Conv2d + BatchNorm2d + ReLU     4x6x6          48\n"
        "0.3    MaxPool2d + Dropout + Flatten   4x3x3           0\n"
        "1.2    Linear + Softmax                    3         111"
    )
    groups = ["image", "convolution", "pooling", "linear"]
    assert [block.group for block in found.blocks] == groups
    assert str(architecture(cnn.convert(plain()), (1, 8, 8))) == str(found)


def test_fused_layers():
    found = architecture(cnn.models.lenet5(), (1, 32, 32)).blocks
    assert [(block.kind, block.group, block.size) for block in found] == [
        ("", "image", (1, 32, 32)),
        ("ConvReLUMaxPool2d", "convolution and pooling", (6, 14, 14)),
        ("ConvReLUMaxPool2d", "convolution and pooling", (16, 5, 5)),
        ("Linear + ReLU", "linear", (120,)),
        ("Linear + ReLU", "linear", (84,)),
        ("Linear", "linear", (10,)),
    ]
    assert sum(block.parameters for block in found) == 61_706


def test_branches_are_blocks_until_they_are_opened():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(BasicBlock(4, 8, 2), BasicBlock(8, 8)))
    model.append(nn.Upsample(scale_factor=2))
    found = architecture(model, (3, 8, 8)).blocks
    assert [block[:4] for block in found[1:]] == [
        ("0", "Conv2d", "convolution", (4, 8, 8)),
        ("1.0", "BasicBlock", "block", (8, 4, 4)),
        ("1.1", "BasicBlock", "block", (8, 4, 4)),
        ("2", "Upsample", "other", (8, 8, 8)),
    ]
    for number in (0, 1):
        assert found[2 + number].parameters == sum(p.numel() for p in model[1][number].parameters())
    opened = architecture(model, (3, 8, 8), 2).blocks
    assert [block.name for block in opened[2:5]] == ["1.0.conv1", "1.0.conv2", "1.0.downsample.0"]
    assert sum(block.parameters for block in opened) == sum(p.numel() for p in model.parameters())


def faces(figure) -> Counter:
    """How many polygons have which colour."""
    (axes,) = figure.get_axes()
    return Counter(tuple(patch.get_facecolor()[:3]) for patch in axes.patches)


@pytest.mark.parametrize("name", ["lenet5", "vgg16_bn", "resnet18"])
def test_the_figure(name):
    """Each block has a face of its colour, its name and its size; an arrow leads to each but the
    first, and two from row to row. Nothing is outside the figure.
    """
    with torch.device("meta"):
        model = cnn.models.create(name)
    found = architecture(model, (1, 32, 32) if name == "lenet5" else (3, 224, 224))
    figure = found.figure()
    figure.canvas.draw()
    groups = Counter(block.group for block in found.blocks)
    for group, count in groups.items():
        assert faces(figure)[to_rgb(COLOURS[group])] == count
    (axes,) = figure.get_axes()
    texts = [text.get_text() for text in axes.texts]
    assert [text for text in texts if text in {block.name for block in found.blocks}] == [
        block.name for block in found.blocks
    ]
    for block in found.blocks:
        size = "x".join(map(str, block.size))
        assert any(size in text.splitlines() for text in texts)
    assert sum("classes" in text for text in texts) == 1
    rows = -(-(len(found.blocks) + 1) // 8)
    arrows = sum(text == "" for text in texts)
    assert arrows == len(found.blocks) + rows - 1
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(legend) == groups.keys() - {"image"}
    labels = [text.get_window_extent() for text in axes.texts if text.get_text()]
    labels.append(figure.legends[0].get_window_extent())
    assert not any(a.overlaps(b) for n, a in enumerate(labels) for b in labels[:n])
    for box in (*labels, *(patch.get_window_extent() for patch in axes.patches)):
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width
        assert 0 <= box.y0 < box.y1 <= figure.bbox.height


def test_boxes_grow_with_maps_and_channels():
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 5), nn.Conv2d(8, 64, 1))
    figure = architecture(model, (1, 16, 16)).figure()
    (axes,) = figure.get_axes()
    fronts = [patch.get_xy() for patch in axes.patches[::3]]
    long, high = (
        [float(xy[:, axis].max() - xy[:, axis].min()) for xy in fronts] for axis in (0, 1)
    )
    assert high[0] == pytest.approx(high[1])
    assert high[2] == pytest.approx(high[3])
    assert high[1] > high[2]
    assert long[1] == pytest.approx(long[2])
    assert long[0] < long[1] < long[3]
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("size", "depth", "words"),
    [
        ((8, 8), 1, r"size must be C, H, W, got size=\(8, 8\)"),
        ((1, 0, 8), 1, r"got size=\(1, 0, 8\)"),
        ((1, 8, 8), 0, "depth=0"),
    ],
)
def test_bad_arguments(size, depth, words):
    with pytest.raises(ValueError, match=words):
        architecture(plain(), size, depth)
