"""Where in an image a map's pixel looks."""

import pytest
import torch
from torch import nn

import cnn
from cnn.visualize import fields, layers
from kernels.geometry import ReceptiveField

FIELD = ReceptiveField((5, 3), (2, 4), (-2, 1))


def test_boxes_by_hand():
    """Rows from 2p - 2 on, five of them; columns from 4q + 1 on, three of them; of 9 x 10."""
    assert fields.window(FIELD, 0, 0) == (-2, 1, 3, 4)
    assert fields.box(FIELD, 0, 0, 9, 10) == (0, 1, 3, 4)
    assert fields.box(FIELD, 1, 1, 9, 10) == (0, 5, 5, 8)
    assert fields.box(FIELD, 4, 2, 9, 10) == (6, 9, 9, 10)
    assert fields.box(FIELD, 6, 3, 9, 10) == (9, 10, 9, 10)  # in the padding alone


def test_a_patch_is_a_view_of_the_image():
    x = torch.arange(180.0).view(2, 9, 10)
    found = fields.patch(x, FIELD, 1, 1)
    assert found.equal(x[:, :5, 5:8])
    assert found.data_ptr() == x[:, :, 5:].data_ptr()
    assert fields.patch(x, FIELD, 6, 3).shape == (2, 0, 0)


@pytest.mark.parametrize("convert", [False, True], ids=["torch", "converted"])
def test_a_patch_holds_just_the_pixels_that_matter(convert):
    """Noise elsewhere changes nothing; each row and column of the patch changes something."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2))
    model = cnn.convert(model) if convert else model
    x = torch.randn(1, 1, 8, 8)
    field = layers.field_of(model, "2", x)
    with torch.no_grad():
        for p, q in ((0, 0), (1, 2), (3, 3)):
            before = model(x)[..., p, q]
            other = torch.randn_like(x)
            seen = fields.patch(other[0], field, p, q)
            seen.copy_(fields.patch(x[0], field, p, q))
            assert model(other)[..., p, q].equal(before)
            for axis in (1, 2):
                for line in range(seen.shape[axis]):
                    changed = x.clone()
                    fields.patch(changed[0], field, p, q).select(axis, line).add_(1)
                    assert not model(changed)[..., p, q].equal(before)
