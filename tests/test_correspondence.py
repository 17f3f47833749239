"""What changes in the features of images when the same part of each is covered."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import cnn
from cnn.visualize import correspondence, pictures


def pixels_as_features() -> nn.Module:
    layer = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(layer.weight)
    return nn.Sequential(layer, nn.Flatten())


IMAGES = torch.tensor([[4.0, 4, 2, 2], [4.0, 4, 0, 4], [0.0, 4, 2, 3]]).view(3, 1, 1, 4) / 4


@pytest.mark.parametrize("batch", [1, 2, 64])
@pytest.mark.parametrize("layer", ["0", "1"])
def test_by_hand(batch, layer):
    """The two left pixels in grey, of changes ++00, ++00 and -+00; and the two right ones, of
    changes 0000, 00-+ and 000+. Of three pairs 0, 1 and 1 of four signs differ, or 2, 1 and 1.
    """
    parts = {"left": [[0, 0, 1, 2]] * 3, "right": [[0, 2, 1, 4]] * 3}
    found = correspondence(pixels_as_features(), IMAGES, parts, [layer], random=3, batch=batch)
    left = torch.tensor([[0, 0, 1], [0, 0, 1], [1, 1, 0]]) / 4
    right = torch.tensor([[0, 2, 1], [2, 0, 1], [1, 1, 0]]) / 4
    assert_close(found.shares, torch.stack([left, right])[None].double())
    # Means of an image's pairs: 1/8, 1/8 and 1/4; 3/8, 3/8 and 1/4.
    spread = (1 / 192) ** 0.5
    wanted = [[[1 / 6, 1 / 3]], [[spread, spread]]]
    assert_close(found.change, torch.tensor(wanted, dtype=torch.float64))
    assert found.random.shape == (1, 2, 3, 3, 3)
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "part", "sign", "change", "random", "boxes"]
    assert [line.split()[:5] for line in lines[1:]] == [
        [layer, "left", "0.167", "±", "0.072"],
        [layer, "right", "0.333", "±", "0.072"],
    ]


def test_random_boxes_have_the_parts_sizes_and_lie_anywhere():
    """All pixels of boxes change by the same sign: how many differ tells where the boxes lie."""
    images = torch.ones(2, 1, 3, 4)
    parts = {"part": torch.tensor([[0, 0, 2, 3], [1, 1, 3, 4]])}  # two of six pixels lie in both
    found = correspondence(pixels_as_features(), images, parts, ["0"], random=256)
    assert found.shares[0, 0, 0, 1] == 8 / 12
    # Four pixels lie in both of boxes that a column parts, and three where it is a line.
    assert set((found.random[0, 0, :, 0, 1] * 12).round().tolist()) == {0, 4, 6, 8}
    full = {"part": [[0, 0, 3, 4]] * 2}
    found = correspondence(pixels_as_features(), images, full, ["0"], random=4)
    assert found.random.eq(0).all()


def test_same_bits_and_nothing_changed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Dropout(), nn.BatchNorm2d(3))
    model[0].eval()
    images, state = torch.randn(3, 2, 8, 8), torch.get_rng_state()
    parts = {"part": [[1, 1, 4, 4]] * 3}
    one, two = (correspondence(model, images, parts, ["2"], seed=seed) for seed in (1, 1))
    assert torch.get_rng_state().equal(state)
    assert one.random.equal(two.random)
    assert not one.random.equal(correspondence(model, images, parts, ["2"], seed=2).random)
    with pytest.raises(RuntimeError):
        correspondence(model, torch.randn(3, 1, 8, 8), parts, ["2"])
    assert [layer.training for layer in model] == [False, True, True]
    assert not any(layer._forward_hooks for layer in model)
    assert model[2].num_batches_tracked == 0


def test_a_converted_network_says_the_same(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2))
    model.double().to(device)
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64, device=device)
    call = (images, {"part": [[2, 2, 5, 5], [1, 1, 4, 4], [2, 2, 5, 5]]}, ["2", "3"])
    before, after = correspondence(model, *call), correspondence(cnn.convert(model), *call)
    assert isinstance(model[0], cnn.Conv2d)
    assert before.shares[:, :, 0, 1].min() > 0
    assert_close(after.shares, before.shares)
    assert_close(after.random, before.random)


def test_the_figure():
    images = torch.rand(7, 3, 8, 12)
    parts = {"eye": [[1, 1, 4, 4]] * 7, "nose": [[3, 5, 6, 8]] * 7}
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    found = correspondence(model, images, parts, ["0", "1"])
    figure = found.figure()
    figure.canvas.draw()
    axes = figure.get_axes()
    assert [each.get_title() for each in axes[7:]] == ["0", "1"]
    for picture in axes[:7]:
        assert [box.get_bbox().bounds for box in picture.patches] == [
            (0.5, 0.5, 3, 3),
            (4.5, 2.5, 3, 3),
        ]
    heights = torch.tensor([bar.get_height() for bar in axes[8].patches])
    wanted = torch.cat([found.change[0, 1], found.random_change[0, 1]])
    assert_close(heights.double(), wanted)
    assert [text.get_text() for text in axes[8].get_xticklabels()] == ["eye", "nose"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.rand(1, 1, 4, 4)}, "images must be at least two, got 1"),
        ({"images": torch.ones(2, 1, 4, 4, dtype=torch.int64)}, "images must be floats"),
        ({"parts": {}}, "parts=0"),
        ({"parts": {"eye": [[0, 0, 2, 2]]}}, r"got eye of torch.int64 \[1, 4\]"),
        ({"parts": {"eye": [[0, 0, 2.5, 2]] * 2}}, "whole numbers"),
        ({"parts": {"eye": [[0, 0, 2, 2], [0, 3, 1, 5]]}}, r"eye=\[0, 3, 1, 5\] of image 1"),
        ({"parts": {"eye": [[0, 2, 2, 2]] * 2}}, r"eye=\[0, 2, 2, 2\] of image 0"),
        ({"layers": ["2"]}, "layer must be one of 0, 1"),
        ({"layers": []}, "layers=0"),
        ({"random": 0}, "random=0"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_bad_arguments(change, words):
    call = {
        "images": torch.rand(2, 1, 4, 4),
        "parts": {"eye": [[0, 0, 2, 2]] * 2},
        "layers": ["0"],
    }
    with pytest.raises(ValueError, match=words):
        correspondence(pixels_as_features(), **call | change)


def test_what_stands_for_nothing():
    """Grey within 0 and 1, else each channel's mean."""
    images = torch.tensor([[[0.0, 1]], [[-1.0, 3]]])[:, :, None].expand(2, 2, 1, 2)
    assert pictures.grey(images).flatten(1).tolist() == [[0.5, 0.5], [1, 1]]
