"""What layers have learned: the deconvnet against its paper's steps in float64, and its company."""

import base64
import copy
import re
import shutil
import subprocess
import sys

import hand_made
import pytest
import torch
import torch.nn.functional as TF
from torch import nn

import cnn
import cnn.functional as F
from cnn import visualize
from cnn.visualize import deconvnet, pictures
from cnn.visualize.layers import evaluating, field_of, map_layers, outputs
from cnn.visualize.page import page
from kernels.device import launches


def small(device, pool: nn.Module | None = None) -> nn.Sequential:
    """Two blocks in float64, converted, in which no map is dead."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.ReLU(inplace=True),
        pool or nn.MaxPool2d(2),
        nn.Conv2d(5, 4, (3, 5), stride=(1, 2), padding=(1, 2)),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    nn.init.constant_(model[3].bias, 0.5)
    return cnn.convert(model.to(device, torch.float64))


def images(device, count: int = 3) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(count, 2, 16, 20, generator=draw, dtype=torch.float64).to(device)


def by_hand(model: nn.Sequential, x: torch.Tensor, k: int, p: int, q: int, unpool) -> torch.Tensor:
    """Section 2.1 of the paper, step by step, for one image [C, H, W] on the CPU."""
    one, two = (model[i].cpu() for i in (0, 3))
    first = TF.conv2d(x[None], one.weight, one.bias, padding=1).relu()
    kernel, stride = model[2].kernel_size, model[2].stride
    pooled, switches = TF.max_pool2d(first, kernel, stride, return_indices=True)
    second = TF.conv2d(pooled, two.weight, two.bias, (1, 2), (1, 2)).relu()
    top, upper = TF.max_pool2d(second, 2, return_indices=True)
    seed = torch.zeros_like(top)
    seed[0, k, p, q] = top[0, k, p, q]
    down = TF.max_unpool2d(seed, upper, 2, output_size=second.shape).relu()
    odd = pooled.shape[-1] - ((second.shape[-1] - 1) * 2 + 1)
    down = TF.conv_transpose2d(down, two.weight, None, (1, 2), (1, 2), (0, odd))
    down = unpool(down, switches, first.shape).relu()
    return TF.conv_transpose2d(down, one.weight, padding=1)[0]


def unpool_apart(values, switches, size):
    return TF.max_unpool2d(values, switches, 2, output_size=size)


def unpool_overlapping(values, switches, size):
    flat = torch.zeros(size, dtype=values.dtype).flatten(2)
    flat.scatter_add_(2, switches.flatten(2), values.flatten(2))
    return flat.view(size)


@pytest.mark.parametrize("join", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize(
    ("pool", "unpool"),
    [(None, unpool_apart), (nn.MaxPool2d(3, 2), unpool_overlapping)],
    ids=["2x2", "3x3/2"],
)
def test_a_projection_is_the_papers(device, pool, unpool, join):
    plain, x = small(device, pool), images(device)
    model = hand_made.fused(plain) if join else copy.deepcopy(plain)
    assert type(model[0]) is (cnn.ConvReLUMaxPool2d if join else cnn.Conv2d)
    found = deconvnet(model, x, "5", [2, 0, 3], top=2)
    with torch.no_grad():
        y = model(x)
    cnn.revert(plain).cpu()
    assert found.projections.shape == (3, 2, 2, 16, 20)
    for m, k in enumerate((2, 0, 3)):
        peaks = y[:, k].flatten(1).amax(1)
        order = peaks.argsort(descending=True)[:2]
        assert torch.equal(found.sources[m], order)
        assert torch.equal(found.values[m], peaks[order])
        assert torch.equal(found.images[m], x[order])
        for n, image in enumerate(order.tolist()):
            p, q = found.places[m, n].tolist()
            assert y[image, k, p, q] == peaks[image] > 0
            right = by_hand(plain, x[image].cpu(), k, p, q, unpool)
            torch.testing.assert_close(found.projections[m, n].cpu(), right, rtol=0, atol=1e-12)
            assert right.abs().max() > 1e-3


def test_the_kernels_run_backwards_by_one_byte_switches(device):
    """Pooling, convolution and both backwards are launched; no map of indices is kept."""
    model, x = small(device), images(device, 1)
    kept = []
    before = launches()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        visualize.project(model, x, "5", torch.tensor([1]))
    launched = {name for name, count in launches().items() if count > before.get(name, 0)}
    assert launched >= {"max_pool2d_kernel", "max_pool2d_backward_kernel"}, launched
    assert torch.uint8 in kept
    assert torch.int64 not in kept


def test_guided_projections_stop_at_what_was_zero(device):
    model, x = small(device), images(device, 1)
    number, place = torch.tensor([1]), torch.tensor([[2, 1]])
    found = visualize.project(model, x, "5", number, place, guided=True)[0].cpu()
    plain, image = cnn.revert(model).cpu(), x.cpu().requires_grad_()
    relus = [plain[1], plain[4]]
    for relu in relus:
        relu.inplace = False
        relu.register_full_backward_hook(lambda m, dx, dy: (dx[0].clamp(min=0),))
    y = plain(image)
    y[0, 1, 2, 1].backward(y.detach()[0, 1, 2, 1])
    torch.testing.assert_close(found, image.grad[0], rtol=0, atol=1e-12)
    unguided = visualize.project(plain, x.cpu(), "5", number, place)[0]
    assert not torch.allclose(found, unguided, atol=1e-6)


@pytest.mark.parametrize("family", [hand_made.VGG, hand_made.ResNet], ids=lambda f: f.__name__)
def test_converted_layers_project_as_torchs_do(device, family):
    """Also with a ReLU that serves twice, sums of branches and normalizations."""
    torch.manual_seed(0)
    model = family().double().eval().to(device)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, device=device)
    layer = next(name for name in reversed(map_layers(model, x)) if "fc" not in name)
    with torch.no_grad():
        numbers = outputs(model, x, [layer])[layer].amax((2, 3)).argmax(1)
    right = visualize.project(model, x, layer, numbers)
    assert right.abs().amax((1, 2, 3)).min() > 0
    found = visualize.project(cnn.convert(model), x, layer, numbers)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


def test_every_relu_is_one_of_the_gradient():
    """As a function, in place, as a method, with a residual, clipped at six, and fused."""
    x = torch.tensor([[-1.0, 2.0, 7.0, 3.0]], dtype=torch.float64)
    dy = torch.tensor([[5.0, -4.0, 3.0, 2.0]], dtype=torch.float64)
    relus = (
        torch.relu,
        torch.Tensor.relu,
        TF.relu,
        nn.ReLU(),
        nn.ReLU(inplace=True),
        torch.relu_,
        torch.Tensor.relu_,
        lambda t: TF.relu(input=t, inplace=True),
        nn.ReLU6(),
        TF.relu6,
    )
    for relu in relus:
        leaf = x.clone().requires_grad_()
        with visualize.Deconvnet():
            y = relu(leaf * 1)
        assert torch.equal(y, x.clamp(0, 6) if relu in relus[-2:] else x.relu())
        y.backward(dy)
        assert torch.equal(leaf.grad, dy.relu())
    one, residual = (x.view(1, 1, 2, 2).clone().requires_grad_() for _ in range(2))
    with visualize.Deconvnet():
        y = F.conv2d(one, torch.ones(1, 1, 1, 1).double(), activation="relu", residual=residual)
    y.backward(dy.view_as(y))
    assert torch.equal(one.grad, dy.view_as(y).relu())
    assert torch.equal(residual.grad, dy.view_as(y).relu())
    leaf = x.view(1, 1, 2, 2).clone().requires_grad_()
    F.conv2d(leaf, torch.ones(1, 1, 1, 1).double(), activation="relu").sum().backward()
    assert leaf.grad.flatten().tolist() == [0, 1, 1, 1]  # outside, a gradient is one


def test_batches_give_what_one_tensor_gives(device, monkeypatch):
    """Also where images that are alike meet, of which the first wins, and in several batches."""
    model, x = small(device), images(device, 5)
    x = torch.cat([x, x[:2]])
    whole = deconvnet(model, x, "2", [1, 4], top=6)
    monkeypatch.setattr(sys.modules["cnn.visualize.deconvnet"], "BATCH", 4)
    parts = deconvnet(model, iter([x[:1], x[1:4], x[4:]]), "2", [1, 4], top=6)
    for name in ("values", "sources", "places", "images", "projections"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    assert len(set(whole.sources[0].tolist())) == 6
    first = whole.sources[0].tolist()
    for twin in (5, 6):
        assert twin not in first or first.index(twin - 5) < first.index(twin)


def test_patches_are_what_the_field_holds_moved_into_the_image(device):
    model, x = small(device), images(device, 2)
    found = deconvnet(model, x, "2", [0, 3], top=2)
    projections, seen = found.patches()
    assert found.field == field_of(model, "2", x)
    assert seen.shape == (2, 2, 2, *found.field.size) == projections.shape
    for m in range(2):
        for n in range(2):
            outside = found.projections[m, n].clone()
            p, q = found.places[m, n].tolist()
            top, left = (min(max(0, 2 * place - 1), size - 4) for place, size in ((p, 16), (q, 20)))
            box = (slice(None), slice(top, top + 4), slice(left, left + 4))
            assert torch.equal(seen[m, n], found.images[m, n][box])
            assert torch.equal(projections[m, n], outside[box])
            outside[box] = 0
            assert not outside.any()  # what a map's pixel does not see is not projected to


def test_whole_maps_and_units_are_projected(device):
    torch.manual_seed(0)
    model = cnn.models.lenet5().to(device)
    x = torch.rand(1, 32, 32, device=device)
    one = deconvnet(model, x, "features.0", [2], whole=True)
    assert one.field is None
    maps = visualize.maps(model, x, "features.0", 6).maps
    assert one.projections.shape == (1, 1, 1, 32, 32)
    peak = deconvnet(model, x, "features.0", [2])
    assert (one.projections != 0).sum() > (peak.projections != 0).sum() > 0
    assert len(maps) == 6
    unit = deconvnet(model, x, "classifier.2", count=3)
    assert unit.values[:, 0].tolist() == sorted(unit.values[:, 0].tolist(), reverse=True)
    assert unit.places.eq(0).all()


def test_the_model_is_left_as_it_was(device):
    model, x = small(device).train(), images(device, 1)
    model[3].eval()
    modes = [module.training for module in model.modules()]
    deconvnet(model, x, "5")

    def fail():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


ERRORS = {
    "layer": ({"layer": "conv"}, r"layer must be one of 0, 1, 2, 3, 4, 5, got layer='conv'"),
    "empty layer": ({"layer": ""}, r"layer must be one of 0, 1, .*, got layer=''"),
    "map": ({"numbers": [1, 4]}, "numbers must be of the 4 maps of 5, got 4"),
    "negative map": ({"numbers": [-1]}, "numbers must be of the 4 maps of 5, got -1"),
    "count": ({"count": 0}, "count must be positive, got count=0"),
    "top": ({"top": 0}, "top must be positive, got top=0"),
    "no map": ({"numbers": []}, r"numbers must not be empty, got numbers=\[\]"),
    "images": ({"images": []}, "images must hold at least one image, got none"),
    "empty batch": ({"images": torch.ones(0, 2, 8, 8)}, "images must hold at least one image"),
    "bytes": ({"images": torch.ones(1, 2, 8, 8).byte()}, r"images must be floats .* torch.uint8"),
    "axes": ({"images": [torch.ones(2, 8, 8)]}, r"floats \[N, C, H, W\], got .* \[2, 8, 8\]"),
}


@pytest.mark.parametrize(("changes", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_what_is_wrong(device, changes, message):
    arguments = {"images": images(device, 1), "layer": "5", **changes}
    with pytest.raises(ValueError, match=message):
        deconvnet(small(device), **arguments)


PROJECT_ERRORS = {
    "map": ({"numbers": torch.tensor([1, 4])}, "numbers must be of the 4 maps of 5, got 4"),
    "negative": ({"numbers": torch.tensor([-1, 0])}, "numbers must be of the 4 maps of 5, got -1"),
    "count": ({"numbers": torch.tensor([1])}, r"numbers must be 2 maps, got \[1\]"),
    "bytes": ({"x": torch.ones(2, 2, 8, 8).byte()}, r"x must be floats .* torch.uint8"),
    "axes": ({"x": torch.ones(2, 8, 8)}, r"x must be floats \[N, C, H, W\], got .* \[2, 8, 8\]"),
}


@pytest.mark.parametrize(("changes", "message"), PROJECT_ERRORS.values(), ids=PROJECT_ERRORS)
def test_errors_of_projections_name_what_is_wrong(device, changes, message):
    arguments = {"x": images(device, 2), "layer": "5", "numbers": torch.tensor([0, 1]), **changes}
    with pytest.raises(ValueError, match=message):
        visualize.project(small(device), **arguments)


def test_no_images_have_no_projections(device):
    none = images(device, 2)[:0]
    found = visualize.project(small(device), none, "5", torch.tensor([], dtype=torch.int64))
    assert found.shape == none.shape


def test_no_hook_is_left_where_a_second_layer_does_not_exist():
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(ValueError, match="got layer='1'"):
        outputs(model, torch.zeros(1, 1, 2, 2), ["0", "1"])
    assert not model[0]._forward_hooks


def test_fields_are_those_of_eval_mode():
    """In training a normalization of single pixels refuses one image."""
    model = nn.Sequential(nn.Conv2d(1, 2, 4), nn.BatchNorm2d(2)).train()
    found = deconvnet(model, torch.rand(1, 4, 4), "1", count=1)
    assert found.field.size == (4, 4)
    assert visualize.receptive_field(model, torch.rand(1, 4, 4)).seen[0].field == found.field
    assert len(visualize.architecture(model, (1, 4, 4)).blocks) == 2
    assert map_layers(model, torch.rand(1, 1, 4, 4)) == ["0", "1"]
    assert all(module.training for module in model.modules())


def test_a_network_that_decides_by_its_values_is_projected():
    class Deciding(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    torch.manual_seed(0)
    found = deconvnet(Deciding(nn.Conv2d(1, 2, 3)), torch.rand(1, 6, 6), "0", [1], top=1)
    assert found.field is None
    assert (found.projections != 0).sum() == 9


def test_16_bits_and_nan_are_drawn():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 3)).to(torch.bfloat16)
    x = torch.rand(2, 1, 12, 12, dtype=torch.bfloat16)
    x[1, 0, 3, 4] = torch.nan
    parts = {"part": [[0, 0, 9, 9]] * 2}
    results = (
        *(visualize.maps(model, image, "2", 3) for image in x),
        visualize.filters(model),
        deconvnet(model, x, "2", count=2, top=2),
        *(visualize.occlusion(model, image, size=6, stride=6) for image in x),
        visualize.invariance(model, x, steps={"scale": (1, 2)}),
        visualize.correspondence(model, x, parts, ["0"], random=1),
        visualize.ablation(model, [(x, torch.tensor([1, 2]))]),
        visualize.receptive_field(model, x[1]),
    )
    for result in results:
        result.figure().canvas.draw()
        assert str(result)


def test_maps_come_in_the_order_of_their_peaks(device):
    model, (x,) = small(device), images(device, 1)
    found = visualize.maps(model, x, "0", 3)
    with torch.no_grad():
        y = model[0](x[None])[0]
    peaks = y.amax((1, 2))
    assert peaks[found.numbers].tolist() == sorted(peaks.tolist(), reverse=True)[:3]
    assert torch.equal(found.maps, y[found.numbers])
    drawn = [axes for axes in found.figure().axes if axes.get_visible()]
    assert [axes.get_title() for axes in drawn] == ["image", *map(str, found.numbers.tolist())]
    for wrong in (x[None], (x * 255).byte()):
        with pytest.raises(ValueError, match=r"x must be floats \[C, H, W\], got"):
            visualize.maps(model, wrong, "0")
    with pytest.raises(ValueError, match=r"layer must give maps .*got \[1, 10\] of layer="):
        visualize.maps(
            cnn.models.lenet5().to(device), torch.zeros(1, 32, 32).to(device), "classifier.4"
        )


def test_first_filters_are_weights_and_deeper_ones_projections(device):
    torch.manual_seed(0)
    model = cnn.models.lenet5().to(device)
    found = visualize.filters(model)
    assert found.layer == "features.0"
    assert torch.equal(found.weights, model.features[0].weight.detach().cpu())
    assert len(found.figure().axes) == 1
    with pytest.raises(ValueError, match=r"images must be given .* got layer='features.2'"):
        visualize.filters(model, "features.2")
    x = torch.rand(2, 1, 32, 32, device=device)
    projected = visualize.filters(model, "features.2", x, count=5)
    assert projected.values.shape == (5, 1)
    assert len([axes for axes in projected.figure().axes if axes.get_visible()]) == 5
    with pytest.raises(ValueError, match="model must have a Conv2d"):
        visualize.filters(nn.ReLU())


def test_an_evolution_follows_the_same_maps(device):
    stages = {}
    for epoch in (1, 4):
        torch.manual_seed(epoch)
        stages[epoch] = cnn.models.lenet5().to(device)
    x = torch.rand(3, 1, 32, 32, device=device)
    found = visualize.evolution(stages, lambda: iter([x[:2], x[2:]]), "features.2", count=2)
    last = deconvnet(stages[4], x, "features.2", count=2, top=1)
    assert torch.equal(found.projections[1].projections, last.projections)
    first = deconvnet(stages[1], x, "features.2", last.numbers.tolist(), top=1)
    assert torch.equal(found.projections[0].projections, first.projections)
    titles = [axes.get_title() for axes in found.figure().axes]
    assert titles == ["epoch 1", "epoch 4", "", ""]
    with pytest.raises(ValueError, match="models must hold at least one, got none"):
        visualize.evolution({}, lambda: x, "features.2")


def test_a_layer_that_is_not_called_or_gives_no_tensor_is_told():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.wordy = nn.ReLU(), Wordy()

        def forward(self, x):
            self.wordy(x)
            return x

    class Wordy(nn.Module):
        def forward(self, x):
            return "a word"

    assert map_layers(Odd(), torch.zeros(1, 1, 2, 2)) == []
    for name in ("idle", "wordy"):
        with pytest.raises(
            ValueError, match=f"must be called and give a tensor, got layer='{name}'"
        ):
            outputs(Odd(), torch.zeros(1), [name])


def test_levels():
    pixels = torch.tensor([[[[0.25, 1.0]]], [[[-3.0, 1.0]]]])
    assert pictures.pixels(pixels).flatten().tolist() == [0.25, 1, 0, 1]
    assert pictures.signed(pixels * 3).flatten().tolist() == [0.625, 1, 0, pytest.approx(2 / 3)]
    assert pictures.pixels(torch.zeros(1, 5, 2, 2)).shape == (1, 1, 2, 2)
    numbers = torch.arange(1.0, 4)[:, None, None, None].expand(3, 1, 1, 1)
    assert pictures.tiles(numbers, 2, gap=1, level=0).tolist() == [
        [[1, 0, 2], [0, 0, 0], [3, 0, 0]]
    ]


def test_a_model_can_normalize_for_itself():
    model = visualize.normalize_first(nn.Identity(), (0.5, 0.25), (2, 0.5))
    x = torch.tensor([1.0, 1.0]).view(1, 2, 1, 1)
    assert model(x).flatten().tolist() == [0.25, 1.5]
    assert not model.state_dict()
    model(x.to("meta"))


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


def test_a_page_holds_all_it_needs():
    text = page("a < b", "show --x '&'", PIXEL, "1 < 2")
    assert "<title>a &lt; b</title>" in text
    assert "show --x &#x27;&amp;&#x27;" in text
    assert "<pre>1 &lt; 2</pre>" in text
    sources = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert [base64.b64decode(source.partition(",")[2]) for source in sources] == [PIXEL]
    assert not re.search(r"https?:", text)


@pytest.mark.skipif(
    not any(map(shutil.which, BROWSERS)), reason=f"no browser: none of {', '.join(BROWSERS)}"
)
def test_a_page_opens_in_a_browser_without_a_script_error(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page("title", "command", PIXEL, "table"))
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom")
    command = [browser, *flags, f"--user-data-dir={tmp_path}/profile", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert 'data-ready="1"' in done.stdout  # its script has run to its end
    assert "CONSOLE" not in done.stderr, done.stderr
