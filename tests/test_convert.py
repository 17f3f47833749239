"""Models of torch's layers, converted: the same parameters, results and gradients, and back."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from converted_training import results
from hand_made import FOLDED, FUSED, MODELS, UNet
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from triton.backends.compiler import GPUTarget

import cnn
from cnn.convert import FusedMaxPool2d, FusedReLU
from kernels.device import launch_nothing

ROOT = Path(__file__).parents[1]


def fused(report: list) -> str:
    plus = {"ConvReLU2d": "", "ConvReLUMaxPool2d": "+"}
    return " ".join(line.name + plus[line.became] for line in report if line.became in plus)


def identities(model: nn.Module) -> dict[str, int]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: id(t) for name, t in tensors}


@pytest.mark.parametrize("kind", MODELS)
def test_models_agree(kind, device):
    """Through the kernels: results and gradients in training, and results with norms folded."""
    torch.manual_seed(0)
    theirs = kind().to(device, torch.float64, memory_format=torch.channels_last)
    ours, state = copy.deepcopy(theirs), theirs.state_dict()
    before = identities(ours)
    converted, report = cnn.convert(ours, report=True)
    assert converted is ours
    assert fused(report) == FUSED[kind.__name__]
    assert identities(ours) == before
    assert list(ours.state_dict()) == list(state)
    x = torch.randn(2, 3, 16, 16, device=device, dtype=torch.float64)
    found = []
    for model in (ours, theirs):
        leaf = x.clone().requires_grad_()
        ys = results(model(leaf))
        leaves = [leaf, *model.parameters()]
        grads = torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)
        found.append([*ys, *grads])
    assert_close(*found, rtol=1e-9, atol=1e-11)
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-11)
    if FOLDED[kind.__name__] == FUSED[kind.__name__]:
        return
    cnn.convert(ours.eval(), fold_batch_norm=True)
    with torch.no_grad():
        assert_close(results(ours(x)), results(theirs.eval()(x)), rtol=1e-9, atol=1e-11)


def test_models_train_alike():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "tests")
    command = [sys.executable, "-W", "error", "-m", "tests.converted_training"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_folded(kind):
    model = kind().eval()
    keys, norms = (
        set(model.state_dict()),
        [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)],
    )
    _, report = cnn.convert(model, fold_batch_norm=True, report=True)
    assert fused(report) == FOLDED[kind.__name__]
    folded = [line for line in report if line.kind == "BatchNorm2d"]
    names = {line.name for line in folded}
    assert {line.became for line in folded} <= {"Identity"}
    assert len(folded) == (len(norms) if kind.__name__ != "Inception" else 0)
    gone = {key for key in keys if key.rpartition(".")[0] in names}
    biases = set(model.state_dict()) - keys
    assert set(model.state_dict()) == keys - gone | biases
    assert all(key.endswith(".bias") for key in biases)
    again = copy.deepcopy(model)
    assert fused(cnn.convert(model, fold_batch_norm=True, report=True)[1]) == fused(report)
    assert str(cnn.convert(cnn.revert(model))) == str(again)


# Layers of every kind.


class Subclass(nn.Conv2d):
    def reset_parameters(self):
        nn.init.constant_(self.weight, 0.1)
        nn.init.zeros_(self.bias)

    def extra_repr(self):
        return "ours, " + super().extra_repr()


class Overriding(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


class OverridingInner(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) + 1


class OverridingPool(nn.MaxPool2d):
    def forward(self, input):
        return -super().forward(-input)


class OverridingLazy(nn.LazyConv2d):
    cls_to_become = Overriding


def hooked():
    layer = nn.Conv2d(2, 3, 3)
    layer.register_forward_hook(lambda module, args, y: y * 2)
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    layer.register_full_backward_hook(lambda module, dx, dy: (dx[0] * 3,))
    return layer


def replaced():
    layer = nn.Conv2d(2, 3, 3)
    layer.forward = lambda x: x
    return layer


LAYERS = {
    "plain": (lambda: nn.Conv2d(2, 3, 3), "Conv2d"),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), "Conv2d"),
    "same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=2), "Conv2d"),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, 2), "ConvTranspose2d"),
    "pool": (lambda: nn.MaxPool2d(2, ceil_mode=True), "MaxPool2d"),
    "lazy": (lambda: nn.LazyConv2d(3, 3), "LazyConv2d"),
    "lazy transposed": (lambda: nn.LazyConvTranspose2d(3, 3), "LazyConvTranspose2d"),
    "subclass": (lambda: Subclass(2, 3, 3), "Subclass"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), "Conv2d"),
    "orthogonal": (lambda: parametrizations.orthogonal(Subclass(2, 3, 3)), "Subclass"),
    "hooks": (hooked, "Conv2d"),
}


@pytest.mark.parametrize(("layer", "became"), LAYERS.values(), ids=LAYERS)
def test_layers_of_every_kind(layer, became, device):
    torch.manual_seed(0)
    theirs = nn.Sequential(layer(), nn.Sigmoid()).to(device, torch.float64)
    ours, kept = copy.deepcopy(theirs), copy.deepcopy(theirs)
    own = type(ours[0])
    before = identities(ours)
    _, report = cnn.convert(ours, report=True)
    assert [line.became for line in report] == [became]
    assert identities(ours) == before
    x = torch.randn(2, 2, 7, 8, device=device, dtype=torch.float64)
    copied = copy.deepcopy(ours)
    found = []
    for model in (ours, copied, theirs):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)  # lazy layers draw their weights now
        y = model(leaf)
        found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])])
        if model is not theirs:
            kinds = cnn.Conv2d, cnn.ConvTranspose2d, cnn.MaxPool2d
            assert isinstance(model[0], kinds)
    assert_close(found[0], found[2], rtol=1e-10, atol=1e-12)
    assert_close(found[1], found[2], rtol=1e-10, atol=1e-12)
    if became != "LazyConv2d":
        assert not isinstance(kept[0], kinds), "a copy made before stays as it was"
    cnn.revert(ours)
    assert str(ours) == str(theirs)
    assert type(ours[0]).__mro__[1:] == type(theirs[0]).__mro__[1:]
    assert vars(ours[0]).keys() == vars(theirs[0]).keys()
    assert own.__name__ == type(ours[0]).__name__ or "Lazy" in own.__name__


def test_the_old_norms(device):
    with pytest.warns(FutureWarning, match="deprecated"):
        layer = nn.utils.weight_norm(nn.Conv2d(2, 3, 3))
    model = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(2, 2, 1)), layer).to(device)
    twin = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 3)).to(device)
    cnn.convert(model.eval())
    x = torch.randn(1, 2, 5, 5, device=device)
    y = model(x)
    for ours, theirs in zip(model, twin, strict=True):
        assert type(ours) is cnn.Conv2d
        theirs.weight.data, theirs.bias.data = ours.weight.detach(), ours.bias.detach()
    assert_close(y, twin(x))


@pytest.mark.parametrize(
    ("layer", "note"),
    [
        (lambda: Overriding(2, 3, 3), "forward is overridden"),
        (lambda: OverridingInner(2, 3, 3), "_conv_forward is overridden"),
        (lambda: OverridingPool(2), "forward is overridden"),
        (lambda: OverridingLazy(3, 3), "it becomes a class of its own"),
        (replaced, "forward is overridden"),
        (lambda: nn.Conv2d(2, 3, 3, dtype=torch.complex64), "its parameters are torch.complex64"),
        (lambda: nn.Conv2d(2, 3, 3).to(torch.float8_e5m2), "its parameters are torch.float8_e5m2"),
    ],
)
def test_what_is_left_alone(layer, note):
    layer = layer()
    kind = type(layer)
    model, report = cnn.convert(nn.Sequential(layer, nn.ReLU()), report=True)
    assert [(line.became, line.note) for line in report] == [(kind.__name__, f"left alone: {note}")]
    assert type(model[0]) is kind
    assert type(model[1]) is nn.ReLU
    assert type(cnn.revert(model)[0]) is kind


def test_a_model_that_is_a_layer():
    layer = nn.Conv2d(2, 3, 3).eval().requires_grad_(False)
    layer.note = "mine"
    assert cnn.convert(layer) is layer
    assert type(layer) is cnn.Conv2d
    assert (layer.training, layer.note, layer.weight.requires_grad) == (False, "mine", False)
    assert type(cnn.revert(layer)) is nn.Conv2d


def test_shared_layers_stay_shared():
    layer = nn.Conv2d(2, 2, 3)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, nn.ReLU())})
    _, report = cnn.convert(model, report=True)
    assert model["a"] is model["b"][0] is layer
    assert [(line.name, line.became) for line in report] == [("a", "Conv2d")]


def test_an_optimizer_made_before(device):
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU()).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    cnn.convert(model)
    before = model[0].weight.detach().clone()
    model(torch.ones(1, 2, 3, 3, device=device)).sum().backward()
    optimizer.step()
    assert_close(model[0].weight.detach(), before - model[0].weight.grad)


# What a model goes through.


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def from_state(model):
    fresh = cnn.convert(nn.Sequential(Subclass(2, 3, 3), *UNet().inner, UNet().pool))
    fresh.load_state_dict(model.state_dict())
    return fresh


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, copy.copy, reloaded, lambda m: pickle.loads(pickle.dumps(m)), from_state],
)
def test_copies(clone, device):
    torch.manual_seed(0)
    theirs = nn.Sequential(Subclass(2, 3, 3), *UNet().inner, UNet().pool).to(device)
    ours = clone(cnn.convert(copy.deepcopy(theirs))).to(device)
    assert [type(layer) for layer in ours[1:]] == [
        *(cnn.ConvReLU2d, FusedReLU, cnn.ConvReLUMaxPool2d, FusedReLU, FusedMaxPool2d),
    ]
    assert isinstance(ours[0], Subclass)
    assert isinstance(ours[0], cnn.Conv2d)
    x = torch.randn(1, 2, 8, 8, device=device)
    assert_close(ours(x), theirs(x))
    reverted = cnn.revert(ours)
    assert str(reverted) == str(theirs)
    assert [type(layer) for layer in reverted] == [type(layer) for layer in theirs]
    assert [vars(layer).keys() for layer in reverted] == [vars(layer).keys() for layer in theirs]


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.tail = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True))

    def forward(self, x):
        x = checkpoint(self.body, x, use_reentrant=False)
        return checkpoint(self.tail, x, use_reentrant=True)


def test_checkpointed_and_compiled(device):
    torch.manual_seed(0)
    theirs = Checkpointed().to(device)
    ours = copy.deepcopy(theirs)
    _, report = cnn.convert(ours, report=True)
    assert fused(report) == "body.0+ tail.0"
    whole = nn.Sequential(ours.body, ours.tail)
    compiled = torch.compile(whole, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 2, 8, 8, device=device)
    found = []
    for model in (theirs, ours, compiled):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        found.append([y, leaf.grad, *(p.grad for p in model.parameters())])
        model.zero_grad()
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])


# Folding, reverting, reporting.


def norm_net(**options):
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3, **options), nn.ReLU())
    return model.eval()


class Tied(nn.Module):
    """The convolution's weight serves once more."""

    def __init__(self):
        super().__init__()
        self.net = norm_net()

    def forward(self, x):
        return nn.functional.conv_transpose2d(self.net(x), self.net[0].weight)


def test_folding_makes_new_parameters():
    model = norm_net().requires_grad_(False)
    weight = model[0].weight
    cnn.convert(model, fold_batch_norm=True, fuse=False)
    assert type(model[0]) is cnn.Conv2d
    assert model[0].weight is not weight
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert not any(p.requires_grad for p in model.parameters())
    cnn.convert(model)
    assert [type(m).__name__ for m in model] == ["ConvReLU2d", "Identity", "FusedReLU"]
    assert [type(m) for m in cnn.revert(model)] == [nn.Conv2d, nn.Identity, nn.ReLU]


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (lambda: norm_net(track_running_stats=False), "does not normalise by running statistics"),
        (lambda: nn.Sequential(norm_net()[0], norm_net()[1].train()).eval(), ""),
        (lambda: nn.Sequential(*norm_net()[:1], nn.BatchNorm2d(3)).eval(), ""),
        (Tied, "its parameters are used elsewhere"),
        (
            lambda: nn.Sequential(parametrizations.weight_norm(norm_net()[0]), norm_net()[1]),
            "it is parametrized",
        ),
    ],
)
def test_what_is_not_folded(model, note):
    model = model().eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    _, report = cnn.convert(model, fold_batch_norm=True, report=True)
    assert all(type(m) is nn.BatchNorm2d for m in norms) == bool(note)
    assert note in report[0].note


def test_folding_needs_evaluation():
    model = norm_net()
    model[1].train()
    _, report = cnn.convert(model, fold_batch_norm=True, report=True)
    assert "does not normalise by running statistics" in report[0].note
    with pytest.raises(ValueError, match="eval mode"):
        cnn.convert(norm_net().train(), fold_batch_norm=True)


def test_what_is_no_model():
    for function in (cnn.convert, cnn.revert):
        with pytest.raises(TypeError, match="model must be"):
            function([nn.Conv2d(2, 3, 3)])


def test_reverting_a_part_of_what_was_fused():
    model = cnn.convert(nn.Sequential(nn.Sequential(nn.Conv2d(2, 3, 3)), nn.ReLU()))
    for part in (model[0], model[1]):
        with pytest.raises(ValueError, match="beyond this model"):
            cnn.revert(part)
    assert type(model[0][0]) is cnn.ConvReLU2d
    cnn.revert(model)
    assert type(model[0][0]) is nn.Conv2d


def test_layers_that_were_built_fused_stay():
    model = cnn.models.lenet5()
    before = str(model)
    assert str(cnn.revert(cnn.convert(model))) == before


REPORT = """\
layer  was              is                 engine           note
0      Conv2d           ConvReLUMaxPool2d  stem_pool
1      ReLU             FusedReLU                           part of 0
2      MaxPool2d        FusedMaxPool2d                      part of 0
3      Conv2d           Conv2d             depthwise        not fused: a Conv2d follows
4      Conv2d           Conv2d             descriptor_gemm  not fused: a ReLU6 follows
6      MaxPool2d        MaxPool2d          max_pool
7      ConvTranspose2d  ConvTranspose2d    implicit_gemm
8      OverridingPool   OverridingPool                      left alone: forward is overridden"""


def test_the_report():
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(64, 64, 3, groups=64),
        nn.Conv2d(64, 128, 3, padding="same"),
        nn.ReLU6(),
        nn.MaxPool2d(2, return_indices=True),
        nn.ConvTranspose2d(128, 32, 2, 2, groups=2),
        OverridingPool(2),
    ).to(torch.bfloat16, memory_format=torch.channels_last)
    with launch_nothing(GPUTarget("cuda", 90, 32)):
        _, report = cnn.convert(model, report=True)
    assert str(report) == REPORT
