"""Models of torch's layers, converted: the same parameters, results and gradients, and back."""

import copy
import io
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from converted_training import results
from hand_made import MODELS
from torch import fx, nn
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, prune
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import cnn
from cnn.conversion import SWAPS

ROOT = Path(__file__).parents[1]


def identities(model: nn.Module) -> dict[str, int]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: id(t) for name, t in tensors}


def layers_of(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def outcomes(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What a model returns, and the gradients of its input and parameters."""
    leaf = x.clone().requires_grad_()
    ys = results(model(leaf))
    model.zero_grad()
    sum(y.square().sum() for y in ys).backward()
    return [*ys, *(t.grad for t in (leaf, *model.parameters()) if t.grad is not None)]


@pytest.mark.parametrize("kind", MODELS)
def test_models_agree(kind, device):
    torch.manual_seed(0)
    theirs = kind().to(device, torch.float64, memory_format=torch.channels_last)
    ours, state = copy.deepcopy(theirs), theirs.state_dict()
    before = identities(ours)
    converted, report = cnn.convert(ours, report=True)
    assert converted is ours
    swapped = layers_of(theirs, tuple(SWAPS))
    assert layers_of(ours, tuple(SWAPS.values())) == swapped
    assert [line.name for line in report] == swapped
    assert {line.note for line in report} == {""}
    assert identities(ours) == before
    assert list(ours.state_dict()) == list(state)
    x = torch.randn(2, 3, 16, 16, device=device, dtype=torch.float64)
    assert_close(outcomes(ours, x), outcomes(theirs, x), rtol=1e-9, atol=1e-11)
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-11)
    once = str(ours)
    assert str(cnn.convert(ours)) == once
    assert str(cnn.revert(ours)) == str(theirs)


def test_models_train_alike():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "tests")
    command = [sys.executable, "-W", "error", "-m", "tests.converted_training"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Layers of every kind.


class Subclass(nn.Conv2d):
    def reset_parameters(self):
        nn.init.constant_(self.weight, 0.1)
        nn.init.zeros_(self.bias)

    def extra_repr(self):
        return "ours, " + super().extra_repr()

    def __getstate__(self):
        return {**vars(self), "saved": True}

    def __setstate__(self, state):
        assert state.pop("saved")
        super().__setstate__(state)


class Overriding(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


class OverridingInner(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) + 1


class OverridingReduce(nn.Conv2d):
    def __reduce__(self):
        return OverridingReduce, (2, 3, 3), self.__getstate__()


class Normalizing(nn.Conv2d):
    normalize = True


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


def quantized():
    layer = nn.Conv2d(2, 3, 3)
    layer.qconfig = "mine"
    return layer


LAYERS = {
    "plain": (lambda: nn.Conv2d(2, 3, 3), "cnn.Conv2d"),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), "cnn.Conv2d"),
    "same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=2), "cnn.Conv2d"),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, 2), "cnn.ConvTranspose2d"),
    "pool": (lambda: nn.MaxPool2d(2, ceil_mode=True), "cnn.MaxPool2d"),
    "lazy": (lambda: nn.LazyConv2d(3, 3), "LazyConv2d"),
    "lazy transposed": (lambda: nn.LazyConvTranspose2d(3, 3), "LazyConvTranspose2d"),
    "subclass": (lambda: Subclass(2, 3, 3), "Subclass[cnn.Conv2d]"),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3)),
        "ParametrizedConv2d[cnn.Conv2d]",
    ),
    "orthogonal": (
        lambda: parametrizations.orthogonal(Subclass(2, 3, 3)),
        "ParametrizedSubclass[cnn.Conv2d]",
    ),
    "hooks": (hooked, "cnn.Conv2d"),
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
    assert f"(0): {became}(" in str(ours)
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
        (lambda: OverridingReduce(2, 3, 3), "__reduce__ is overridden"),
        (lambda: OverridingLazy(3, 3), "it becomes a class of its own"),
        (lambda: Normalizing(2, 3, 3), "it has normalize of its own"),
        (quantized, "it has qconfig of its own"),
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
    assert [(line.name, line.became) for line in report] == [("a", "cnn.Conv2d")]


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
    fresh = cnn.convert(Net())
    fresh.load_state_dict(model.state_dict())
    return fresh


class Net(nn.Module):
    """A layer of each kind: two called one after another, one after a function, one twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.body = nn.Sequential(Subclass(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.unpool = nn.MaxUnpool2d(2)
        self.up = nn.ConvTranspose2d(4, 2, 3, padding=1)

    def forward(self, x):
        x, indices = self.pool(self.act(self.stem(x)))
        x = nn.functional.relu(self.body(self.body(x)))
        return self.up(self.unpool(x, indices))


OURS = (*("stem", "pool", "body.0", "unpool", "up"),)


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, copy.copy, reloaded, lambda m: pickle.loads(pickle.dumps(m)), from_state],
)
def test_copies(clone, device):
    torch.manual_seed(0)
    theirs = Net().to(device, torch.float64)
    theirs.body[0].note = ["mine"]
    ours = clone(cnn.convert(copy.deepcopy(theirs))).to(device, torch.float64)
    assert layers_of(ours, tuple(SWAPS.values())) == [*OURS]
    assert isinstance(ours.body[0], Subclass)
    if clone is not from_state:
        assert ours.body[0].note == ["mine"]
    x = torch.randn(2, 3, 8, 8, device=device, dtype=torch.float64)
    assert_close(outcomes(ours, x), outcomes(theirs, x), rtol=1e-9, atol=1e-9)
    cnn.revert(ours)
    assert str(ours) == str(theirs)
    kinds = [[type(module) for module in model.modules()] for model in (ours, theirs)]
    assert kinds[0] == kinds[1]


def another_stem(net):
    net.stem = nn.Conv2d(1, 4, 3, padding=1).to(net.up.weight)
    return net


def one_channel(net):
    net.stem.weight = nn.Parameter(net.stem.weight.detach().sum(1, keepdim=True))
    net.stem.in_channels = 1
    return net


def another_activation(net):
    net.act, net.body[2] = nn.GELU(), nn.Sigmoid()
    return net


def removed(net):
    del net.body[2]
    net.act = nn.Identity()
    return net


def hooks(net):
    net.stem.register_forward_hook(lambda module, args, y: y * 2)
    net.body[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    net.up.register_full_backward_hook(lambda module, dx, dy: (dx[0] * 3,))
    return net


def feature_extractor(net):
    """In torchvision's manner: a trace that returns the results of layers by their names."""
    traced = fx.symbolic_trace(net)
    found = {}
    for node in traced.graph.nodes:
        for name in ("stem", "body.0"):
            if str(node.target) == name or name in node.meta.get("nn_module_stack", {}):
                found[name] = node
    assert list(found) == ["stem", "body.0"]
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    output.args = (found,)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def parametrized(net):
    parametrizations.weight_norm(net.stem)
    parametrizations.spectral_norm(net.body[0])
    parametrizations.orthogonal(net.up)
    return net


def pruned(net):
    prune.l1_unstructured(net.stem, "weight", 0.5)
    prune.ln_structured(net.body[0], "weight", 0.5, 2, 0)
    prune.remove(net.body[0], "weight")
    return net


def folded(net):
    net.eval()
    net.body[0] = fuse_conv_bn_eval(net.body[0], net.body[1])
    net.body[1] = nn.Identity()
    return net


def frozen(net):
    net.stem.requires_grad_(False)
    net.body.eval().requires_grad_(False)
    return net


def assigned(net):
    state = {name: t.clone() for name, t in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    return net


SURGERY = {
    "another stem": (another_stem, OURS[1:]),
    "one channel": (one_channel, OURS),
    "another activation": (another_activation, OURS),
    "removed layers": (removed, OURS),
    "hooks": (hooks, OURS),
    "traced": (fx.symbolic_trace, ()),
    "feature extractor": (feature_extractor, ()),
    "parametrized": (parametrized, OURS),
    "pruned": (pruned, OURS),
    "folded": (folded, OURS),
    "frozen": (frozen, OURS),
    "half": (lambda net: net.half(), OURS),
    "channels_last": (lambda net: net.to(memory_format=torch.channels_last), OURS),
    "assigned": (assigned, OURS),
}


@pytest.mark.parametrize(("change", "kept"), SURGERY.values(), ids=SURGERY)
def test_surgery(change, kept, device):
    """A model that is changed after conversion does what it does if it never was converted."""
    torch.manual_seed(0)
    theirs = Net().to(device, torch.float64)
    ours, models = cnn.convert(copy.deepcopy(theirs)), []
    for model in (ours, theirs):
        torch.manual_seed(1)
        models.append(change(model))
    ours, theirs = models
    channels = 1 if change in (another_stem, one_channel) else 3
    x = torch.randn(2, channels, 8, 8, device=device).to(next(theirs.parameters()).dtype)
    tolerance = 1e-2 if x.dtype == torch.half else 1e-9
    close = {"rtol": tolerance, "atol": tolerance}
    assert_close(outcomes(ours, x), outcomes(theirs, x), **close)
    assert_close(ours.state_dict(), theirs.state_dict())
    assert layers_of(ours, tuple(SWAPS.values())) == [*kept]
    cnn.revert(ours)
    assert not layers_of(ours, tuple(SWAPS.values()))
    assert_close(outcomes(ours, x), outcomes(theirs, x), **close)


def test_what_was_traced_is_converted(device):
    torch.manual_seed(0)
    theirs = fx.symbolic_trace(Net().to(device, torch.float64))
    ours = cnn.convert(copy.deepcopy(theirs))
    assert layers_of(ours, tuple(SWAPS.values())) == ["stem", "pool", "unpool", "up"]
    x = torch.randn(2, 3, 8, 8, device=device, dtype=torch.float64)
    assert_close(outcomes(ours, x), outcomes(theirs, x), rtol=1e-9, atol=1e-9)


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
    ours = cnn.convert(copy.deepcopy(theirs))
    compiled = torch.compile(
        nn.Sequential(ours.body, ours.tail), backend="aot_eager", fullgraph=True
    )
    x = torch.randn(1, 2, 8, 8, device=device)
    right = outcomes(theirs, x)
    for model in (ours, compiled):
        assert_close(outcomes(model, x), right)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_tools_for_quantization_leave_out_no_layer(training):
    """They know classes by identity, so they have torch's, or raise."""
    from torch.ao import quantization

    prepare = quantization.prepare_qat if training else quantization.prepare
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), Subclass(3, 3, 1)).train(training)
    cnn.convert(model)
    with warnings.catch_warnings(action="ignore"):  # of observers and settings
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        with pytest.raises(NotImplementedError, match=r"not cnn.Conv2d: call cnn.revert\(model\)"):
            prepare(model)
        cnn.revert(model[0])
        model[1].qconfig = None
        with pytest.raises(NotImplementedError, match=r"not Subclass\[cnn.Conv2d\]"):
            prepare(model)
        model[2].qconfig = None
        prepared = prepare(model)
    assert hasattr(prepared[0], "weight_fake_quant" if training else "activation_post_process")
    assert type(prepared[1]) is cnn.MaxPool2d


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_quantization_of_graphs_leaves_out_no_layer(training):
    """Its tracer keeps torch's layers whole and looks into all others."""
    from torch.ao import quantization
    from torch.ao.quantization import quantize_fx

    def prepare(model: nn.Module, *whole: type[nn.Module]) -> nn.Module:
        defaults = f"get_default_{'qat_' * training}qconfig_mapping"
        mapping = getattr(quantization, defaults)("fbgemm")
        for kind in whole:
            mapping.set_object_type(kind, None)
        custom = {"prepare_custom_config": quantize_fx.PrepareCustomConfig()}
        custom["prepare_custom_config"].set_non_traceable_module_classes([*whole])
        function = quantize_fx.prepare_qat_fx if training else quantize_fx.prepare_fx
        with warnings.catch_warnings(action="ignore"):  # of observers and settings
            return function(model, mapping, torch.randn(1, 2, 8, 8), **custom)

    def model(*layers: nn.Module) -> nn.Module:
        return nn.Sequential(*layers, nn.Conv2d(2, 2, 1)).train(training)

    own = cnn.ConvReLU2d(2, 2, 1)
    for layer in (nn.Conv2d(2, 2, 3), nn.ConvTranspose2d(2, 2, 3), nn.MaxPool2d(2), own):
        ours = cnn.convert(model(layer))
        ours[1] = nn.Conv2d(2, 2, 1)
        with pytest.raises(
            NotImplementedError, match=r"not \w+2d of cnn: call cnn.revert\(model\)"
        ):
            prepare(ours)
    ours = cnn.convert(model(own))
    ours[1] = nn.Conv2d(2, 2, 1)
    quantized = prepare(ours, cnn.ConvReLU2d)
    assert type(getattr(quantized, "0")) is cnn.ConvReLU2d
    assert any("activation_post_process" in name for name, _ in quantized.named_modules())


# Reverting, reporting.


def test_what_is_no_model():
    for function in (cnn.convert, cnn.revert):
        with pytest.raises(TypeError, match="model must be"):
            function([nn.Conv2d(2, 3, 3)])


def test_layers_that_torch_has_no_class_for_stay():
    model = cnn.convert(nn.Sequential(cnn.models.lenet5(), nn.Conv2d(1, 2, 3), Subclass(1, 2, 3)))
    model[1].normalize = model[2].normalize = 2.0, 0.0
    before = str(model)
    assert str(cnn.revert(model)) == before
    model[1].normalize = model[2].normalize = None
    assert [type(layer) for layer in cnn.revert(model)[1:]] == [nn.Conv2d, Subclass]


REPORT = """\
layer  was              is                    note
0      Conv2d           cnn.Conv2d
2      MaxPool2d        cnn.MaxPool2d
4      Subclass         Subclass[cnn.Conv2d]
5      ConvTranspose2d  cnn.ConvTranspose2d
6      OverridingPool   OverridingPool        left alone: forward is overridden"""


def test_the_report():
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.BatchNorm2d(64),
        Subclass(64, 128, 3, padding="same"),
        nn.ConvTranspose2d(128, 32, 2, 2, groups=2),
        OverridingPool(2),
    )
    _, report = cnn.convert(model, report=True)
    assert str(report) == REPORT
