"""Transforms against torch's own moves, and curves against networks whose answer is known."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import cnn
from cnn.visualize import invariance, transformed
from cnn.visualize.pictures import pixels

STEPS = {"translation": (-2, 0, 1), "scale": (1, 1.5), "rotation": (0, 30, 90, 360)}


def pictures(*size, dtype=torch.float64):
    return torch.rand(size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def network(classes=4):
    """With what behaves otherwise in training."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    last = nn.Linear(27, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, classes)
    return nn.Sequential(*layers, *last).double()


@pytest.mark.parametrize("kind", ["translation", "scale", "rotation"])
def test_a_step_that_changes_nothing_gives_the_images(kind):
    x = pictures(2, 3, 5, 7)
    for step in {"scale": (1, 1.0), "rotation": (0, 360, -720.0)}.get(kind, (0, 0.0)):
        assert transformed(x, kind, step) is x


@pytest.mark.parametrize("step", [1, 3, -2])
def test_translation_moves_down_and_repeats_the_border(step):
    x = pictures(2, 3, 6, 9)
    lines = (torch.arange(6) - step).clamp(0, 5)
    assert_close(transformed(x, "translation", step), x[:, :, lines])


def test_translation_by_half_a_pixel_is_the_mean_of_neighbours():
    x = pictures(1, 1, 4, 3)
    above = x[:, :, [0, 0, 1, 2]]
    assert_close(transformed(x, "translation", 0.5), (x + above) / 2)


@pytest.mark.parametrize("turns", [1, 2, 3, -1, 5])
def test_rotation_turns_anticlockwise(turns):
    x = pictures(2, 3, 6, 6)
    assert_close(transformed(x, "rotation", 90 * turns), torch.rot90(x, turns, (2, 3)))


def test_rotation_keeps_the_form_of_what_is_not_square():
    """Of an image of 5x9 pixels a quarter turn leaves the middle 5x5, and repeats the border."""
    x = pictures(1, 1, 5, 9)
    found = transformed(x, "rotation", 90)
    assert_close(found[:, :, :, 2:7], torch.rot90(x[:, :, :, 2:7], 1, (2, 3)))
    assert_close(found[:, :, :, :2], found[:, :, :, 2:3].expand(-1, -1, -1, 2))
    turned = transformed(x, "rotation", 180)
    assert_close(turned, x.flip(2, 3))


@pytest.mark.parametrize("step", [30, 135, 200])
def test_rotation_of_a_slope(step):
    """Bilinear interpolation is exact on a plane; within the largest circle no border is seen."""
    line, column = (torch.arange(11.0).double() - 5 for _ in range(2))
    plane = 2 * line[:, None] - 3 * column
    cos, sin = math.cos(math.radians(step)), math.sin(math.radians(step))
    # Right is (1, 0), up is -line: a turn to the left takes right to up.
    source_column = cos * column - sin * line[:, None]
    source_line = sin * column + cos * line[:, None]
    right = 2 * source_line - 3 * source_column
    inside = line[:, None] ** 2 + column**2 <= 25
    assert_close(transformed(plane[None, None], "rotation", step)[0, 0][inside], right[inside])


@pytest.mark.parametrize("step", [2, 1.3, 0.5])
def test_scale_about_the_middle(step):
    line, column = torch.arange(8.0).double() - 3.5, torch.arange(6.0).double() - 2.5
    plane = 2 * line[:, None] - 3 * column
    right = 2 * (line / step).clamp(-3.5, 3.5)[:, None] - 3 * (column / step).clamp(-2.5, 2.5)
    assert_close(transformed(plane[None, None], "scale", step)[0, 0], right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_transforms_keep_the_dtype(dtype):
    x = pictures(1, 2, 5, 6, dtype=torch.float32).to(dtype)
    moved = transformed(x, "translation", 1)
    assert moved.dtype == dtype
    assert_close(moved, x[:, :, [0, 0, 1, 2, 3]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_curves_are_those_of_one_image_after_another(batch):
    model, x = network(), pictures(3, 2, 9, 8)
    state, given = copy.deepcopy(model.state_dict()), x.clone()
    drawn = torch.get_rng_state()
    labels = [3, 0, 2]
    found = invariance(model, x, ["0", "3"], labels, steps=STEPS, batch=batch)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.training, "modes are restored"
    assert not model[0]._forward_hooks
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(x, given)

    model.eval()
    assert (found.layers, found.labels.tolist()) == (("0", "3"), labels)
    assert {kind: curves.steps for kind, curves in found.curves.items()} == STEPS
    for kind, curves in found.curves.items():
        assert curves.distances.shape == (2, 3, len(curves.steps))
        assert curves.probability.shape == (3, len(curves.steps))
        for n, image in enumerate(x.split(1)):
            for s, step in enumerate(curves.steps):
                moved = transformed(image, kind, step)
                with torch.no_grad():
                    first = (model[0](moved) - model[0](image)).square().sum().sqrt()
                    last = (model[:4](moved) - model[:4](image)).square().sum().sqrt()
                    chance = model(moved).softmax(1)[0, labels[n]]
                assert_close(curves.distances[:, n, s], torch.stack([first, last]))
                assert_close(curves.probability[n, s], chance)


def test_what_is_not_moved_is_not_far():
    """To the last bit, whatever the batch."""
    model, x = network().float(), pictures(5, 2, 9, 8, dtype=torch.float32)
    found = invariance(model, x, steps=STEPS, batch=3)
    for kind, place in (("translation", 1), ("scale", 0), ("rotation", 0), ("rotation", 3)):
        assert found.curves[kind].distances[..., place].eq(0).all()
        assert torch.equal(
            found.curves[kind].probability[:, place], found.curves["scale"].probability[:, 0]
        )
    assert found.curves["translation"].distances[..., [0, 2]].gt(0).all()


def test_networks_that_are_invariant_by_construction():
    """A mean of maps of single pixels forgets places; one over columns forgets only these."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(3, 4)).double()
    spot = torch.zeros(2, 2, 9, 9, dtype=torch.float64)
    spot[:, :, 3:6, 3:6] = pictures(2, 2, 3, 3)
    steps = {"translation": (-3, -1, 2), "rotation": (90, 180, 270), "scale": (1.4,)}
    found = invariance(model, spot, ["1", "3"], steps=steps)
    for kind in ("translation", "rotation"):
        first, last = found.curves[kind].distances
        assert first.min() > 0.1
        assert last.max() < 1e-12
        chances = found.curves[kind].probability
        assert_close(chances, chances[:, :1].expand(-1, 3))
    assert found.curves["scale"].distances[1].min() > 1e-3

    columns = nn.Sequential(nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d((1, 9))).double()
    found = invariance(columns, spot, ["1"], steps=steps)
    assert found.labels is None
    assert found.curves["translation"].distances.max() < 1e-12
    assert found.curves["rotation"].distances[..., [0, 2]].min() > 1e-3


def test_defaults():
    """The first maps, the last layer but one, predicted classes; steps as in the paper."""
    model, x = network(), pictures(2, 2, 9, 8)
    found = invariance(model, x)
    assert found.layers == ("0", "7")
    assert torch.equal(found.labels, model.eval()(x).argmax(1))
    assert found.classes == ("class 0", "class 1", "class 2", "class 3")
    steps = {kind: curves.steps for kind, curves in found.curves.items()}
    assert steps["translation"] == (-6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6)
    assert steps["scale"] == (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8)
    assert steps["rotation"] == tuple(range(0, 360, 15))
    alone = nn.Sequential(nn.AdaptiveAvgPool2d((3, 3)))
    large = invariance(alone, torch.rand(1, 1, 224, 2), steps=None)
    assert large.layers == ("0",)
    assert large.curves["translation"].steps == tuple(range(-60, 61, 10))


def test_a_converted_model_says_the_same(device):
    model, x = network(), pictures(2, 2, 9, 8)
    right = invariance(model, x, ["3"], steps=STEPS)
    ours = cnn.convert(model).to(device)
    found = invariance(ours, x.to(device), ["3"], steps=STEPS)
    for kind, curves in found.curves.items():
        assert_close(curves.distances.cpu(), right.curves[kind].distances)
        assert_close(curves.probability.cpu(), right.curves[kind].probability)
    found.figure()


def test_numbers_of_16_bits_are_compared_in_32():
    found = invariance(network().bfloat16(), pictures(2, 2, 9, 8).bfloat16(), steps=STEPS)
    curves = found.curves["scale"]
    assert curves.distances.dtype == curves.probability.dtype == torch.float32
    assert curves.distances[..., 0].eq(0).all()
    found.figure()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": torch.rand(2, 9, 8)}, r"images must be floats \[N, .* \[2, 9, 8\]"),
        ({"images": torch.ones(1, 2, 9, 8).byte()}, r"images must be floats .* torch.uint8"),
        ({"images": torch.ones(0, 2, 9, 8)}, "images must hold at least one image, got none"),
        ({"layers": ["0", "pool"]}, r"layer must be one of 0, 1, .*, got layer='pool'"),
        ({"layers": []}, r"layers must not be empty"),
        ({"labels": [1, 2, 3]}, r"labels must be 2 classes, got \[3\]"),
        ({"labels": [1, 4]}, r"labels must be one of the 4 classes .* got labels=4"),
        ({"steps": {"shear": (1,)}}, r"must be one of translation, scale, rotation, got 'shear'"),
        ({"steps": {"scale": (1, 0)}}, r"step of scale must be positive and finite, got step=0"),
        ({"steps": {"rotation": (math.nan,)}}, r"step of rotation must be finite, got step=nan"),
        ({"steps": {"scale": ()}}, r"steps must not be empty, got steps=\{'scale': \(\)\}"),
        ({"steps": {}}, r"steps must not be empty, got steps=\{\}"),
        ({"batch": 0}, r"batch must be positive, got batch=0"),
        ({"classes": ("a", "b")}, r"classes must be 4 names, got 2"),
    ],
)
def test_errors(options, message):
    model = network().float()
    with pytest.raises(ValueError, match=message):
        invariance(**{"model": model, "images": torch.rand(2, 2, 9, 8), "steps": STEPS} | options)
    assert model.training
    with pytest.raises(ValueError, match=r"images must be floats .* \[1, 9, 8\]"):
        transformed(torch.rand(1, 9, 8), "scale", 2)
    with pytest.raises(ValueError, match="labels"):
        invariance(nn.Sequential(nn.Conv2d(2, 1, 1)), torch.rand(1, 2, 9, 8), labels=[0])


def test_figure_and_text():
    model, x = network(), pictures(7, 2, 9, 8)
    names = ("cat", "dog", "owl", "ant")
    found = invariance(model, x, ["0", "3"], [0, 1, 2, 3, 0, 1, 2], steps=STEPS, classes=names)
    figure = found.figure()
    assert len(figure.axes) == 3 * 4
    for row, (kind, curves) in enumerate(found.curves.items()):
        shown, *plots = figure.axes[4 * row : 4 * row + 4]
        assert shown.get_title().startswith(f"{kind}: ")
        montage = torch.tensor(shown.images[0].get_array())
        assert montage.shape == (5 * 10 - 1, len(curves.steps) * 9 - 1), "five images, all steps"
        last = pixels(transformed(x[:1], kind, curves.steps[-1]))[0, 0]
        assert_close(montage[:9, -8:], last)
        titles = ["distance in 0", "distance in 3", "probability"]
        assert [axes.get_title() for axes in plots] == titles
        for axes, lines in zip(plots, [*curves.distances, curves.probability], strict=True):
            drawn = torch.stack([torch.tensor(line.get_ydata()) for line in axes.lines])
            assert_close(drawn, lines)
            assert tuple(axes.lines[0].get_xdata()) == curves.steps
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == [f"image {n + 1}: {names[n % 4]}" for n in range(5)]
    figure.draw_without_rendering()

    head, *rows = str(found).splitlines()
    assert head.split("  ")[0] == "transform"
    assert len(rows) == 3 + 2 + 4
    scale = found.curves["scale"]
    means = [*scale.distances.mean(1)[:, 1], scale.probability.mean(0)[1]]
    assert rows[4].split() == ["scale", "1.5", *(f"{value:.4g}" for value in means)]
