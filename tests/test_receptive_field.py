"""What layers see of an image, as boxes on it."""

import pytest
import torch
from hand_made import fused
from torch import nn

import cnn
from cnn.visualize import receptive_field
from cnn.visualize.layers import field_of
from cnn.visualize.receptive_field import window
from kernels.geometry import ReceptiveField


def network() -> nn.Module:
    """Fields: 3x3 from -1, 1 apart; the same; 4x4 from -1, 2 apart; 8x4 from -3, -1; linear."""
    layers = (nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    rest = (nn.Conv2d(2, 2, (3, 1), padding=(1, 0)), nn.Flatten(), nn.Linear(48, 2))
    return nn.Sequential(*layers, *rest)


BOXES = {"0": (3, 5, 6, 8), "2": (3, 5, 7, 9), "3": (1, 5, 9, 9)}  # of pixels 4, 6; 2, 3; 2, 3


def test_by_hand():
    found = receptive_field(network(), torch.rand(1, 8, 12))
    assert {seen.layer: seen.box for seen in found.seen} == BOXES
    assert str(found) == (
        "layer  field  stride  pixel    rows  columns\n"
        "0        3x3     1x1   4, 6  3 to 5   5 to 7\n"
        "2        4x4     2x2   2, 3  3 to 6   5 to 8\n"
        "3        8x4     2x2   2, 3  1 to 8   5 to 8"
    )
    named = receptive_field(network(), torch.rand(1, 8, 12), ["3", "1"])
    assert [(seen.layer, seen.box) for seen in named.seen] == [("3", BOXES["3"]), ("1", BOXES["0"])]


def test_the_box_holds_the_pixels_that_reach_the_center():
    model = fused(network()[:4])
    for parameter in model.parameters():
        parameter.data.abs_()  # so that no ReLU is zero
    x = torch.rand(1, 1, 8, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x)[0, :, 2, 3].sum(), x)
    (seen,) = receptive_field(model, x.detach()[0], ["3"]).seen
    top, left, bottom, right = seen.box
    lines, columns = (gradient[0, 0].abs().sum(axis).nonzero().flatten() for axis in (1, 0))
    assert top <= lines.min() < lines.max() < bottom
    assert left <= columns.min() < columns.max() < right
    found = receptive_field(model, x.detach()[0]).seen
    assert [seen.layer for seen in found] == ["0", "3"]
    assert [seen.box for seen in found] == [BOXES["2"], BOXES["3"]]


def test_the_figure():
    figure = receptive_field(network(), torch.rand(1, 8, 12)).figure()
    figure.canvas.draw()
    (axes,) = figure.get_axes()
    assert axes.images[0].get_array().shape == (8, 12)
    boxes = [patch.get_bbox().extents for patch in axes.patches]
    wanted = [
        (left - 0.5, top - 0.5, right - 0.5, bottom - 0.5)
        for top, left, bottom, right in [
            (0, 0, 8, 12),
            *(box for box in BOXES.values() for _ in range(2)),
        ]
    ]
    assert [tuple(box) for box in boxes] == wanted
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["0  3x3", "2  4x4", "3  8x4"]
    assert axes.get_xlim() == pytest.approx((-0.74, 11.74))
    assert axes.get_ylim() == pytest.approx((8.66, -0.66))


def test_the_figure_of_many_layers_that_see_far():
    """Fields up to 79 pixels of an image of 8: what is shown is half of it on each side."""
    layers = [nn.Conv2d(1, 1, 3, padding=1) for _ in range(39)]
    found = receptive_field(nn.Sequential(*layers), torch.rand(1, 8, 8))
    assert found.seen[-1].box == (-35, -35, 44, 44)
    figure = found.figure()
    figure.canvas.draw()
    (axes,) = figure.get_axes()
    assert (axes.get_xlim(), axes.get_ylim()) == ((-4.5, 11.5), (11.5, -4.5))


@pytest.mark.parametrize(
    ("layers", "x", "words"),
    [
        (["7"], torch.rand(1, 8, 12), "layer must be one of 0, 1, 2, 3, 4, 5, got layer='7'"),
        (["5"], torch.rand(1, 8, 12), "field that is known, got layer='5'"),
        (None, torch.rand(1, 1, 8, 12), r"x must be floats .* \[1, 1, 8, 12\]"),
    ],
)
def test_bad_arguments(layers, x, words):
    with pytest.raises(ValueError, match=words):
        receptive_field(network(), x, layers)


def test_a_network_that_sees_everything_at_once():
    with pytest.raises(ValueError, match="must have layers"):
        receptive_field(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.rand(1, 2, 2))


def test_a_field_by_hand():
    """Rows from 2p - 2 on, five of them; columns from 4q + 1 on, three of them."""
    field = ReceptiveField((5, 3), (2, 4), (-2, 1))
    assert window(field, 0, 0) == (-2, 1, 3, 4)
    assert window(field, 4, 2) == (6, 9, 11, 12)


@pytest.mark.parametrize("convert", [False, True], ids=["torch", "converted"])
def test_a_field_holds_just_the_pixels_that_matter(convert):
    """Noise elsewhere changes nothing; each row and column of it changes something. In float64,
    which torch convolves in the same way on all processors.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)).double()
    model = cnn.convert(model) if convert else model
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    field = field_of(model, "2", x)
    with torch.no_grad():
        for p, q in ((0, 0), (1, 2), (3, 3)):
            before = model(x)[..., p, q]
            top, left, bottom, right = window(field, p, q)
            box = slice(max(0, top), bottom), slice(max(0, left), right)
            other = torch.randn_like(x)
            other[0, 0][box] = x[0, 0][box]
            assert model(other)[..., p, q].equal(before)
            for axis in (0, 1):
                for line in range(x[0, 0][box].shape[axis]):
                    changed = x.clone()
                    changed[0, 0][box].select(axis, line).add_(1)
                    assert not model(changed)[..., p, q].equal(before)
