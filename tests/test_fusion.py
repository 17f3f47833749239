"""What conversion fuses, and above all what it does not: each trap, and what it must catch."""

import copy
import gc
import random
import time

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

import cnn

REGISTRY: list[Tensor] = []


def conv() -> nn.Conv2d:
    return nn.Conv2d(2, 2, 3, padding=1)


def block() -> nn.Sequential:
    return nn.Sequential(conv(), nn.ReLU())


def fused(model: nn.Module, **options) -> set[str]:
    """The layers that conversion fuses; a "+" follows where a pooling went into one, too."""
    cnn.convert(model, **options)
    kinds = {cnn.ConvReLU2d: "", cnn.ConvReLUMaxPool2d: "+"}
    return {
        name + kinds[type(module)]
        for name, module in model.named_modules()
        if type(module) in kinds
    }


class Chain(nn.Module):
    """conv, relu, pool; the traps below override ``forward``."""

    def __init__(self, **pool):
        super().__init__()
        self.conv, self.other = conv(), conv()
        self.relu, self.inplace = nn.ReLU(), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2, **pool)
        self.body, self.tail = block(), block()
        self.blocks = nn.ModuleList([block(), block()])
        self.limit, self.norm, self.settings = 1, None, {"scale": 2}

    def forward(self, x):
        return self.pool(self.relu(self.conv(x)))


# Fused.


class ByArguments(Chain):
    def forward(self, x):
        y = self.conv(input=x)
        return self.inplace(y) + self.relu(self.other(x))


class Settings(Chain):
    """All branches depend on what the module is, not on what it is given."""

    def forward(self, x):
        if self.norm is not None:
            x = self.norm(x)
        y = self.conv(x) if self.limit > 0 and not hasattr(self, "strange") else x
        for i, layer in enumerate(self.blocks):
            if i in (0, 1) and len(self.blocks) > self.limit and isinstance(layer, nn.Module):
                x = layer(x)
        sums = [x, self.relu(y) * self.settings["scale"]]
        for part, one in zip(reversed(sums), range(len(sums)), strict=True):
            x = x + part * one
        assert isinstance(x, object)
        return {name: x for name in ("a", "b") if name != self.norm}


class Helper(Chain):
    def forward(self, x):
        return self._finish(residual(x, self.conv(x)), "ignored")

    def _finish(self, x, name):
        return self.relu(self.other(x))


def residual(x, y):
    return x + y


class Parameters(Chain):
    """What settings decide, in a function that is given settings."""

    def forward(self, x):
        return self._head(self._body(x, self.limit > 0, activate=True))

    def _body(self, x, more, activate):
        return self.relu(self.conv(x)) if more and activate else self.conv(x)

    def _head(self, x, raw=False):
        y = self.other(x)
        return y if raw else self.inplace(y)


class Inner(Chain):
    """A block that no trace passes through, but which is only called as a whole."""

    def forward(self, x, skip=None):
        """Mentions self.conv and self.body."""
        if skip is None or x.sum() > 0:
            return self.body(x)
        return self._finish(x)

    def _finish(self, x):
        for each in self.blocks:
            x = each(x)
        return checkpoint(self.tail, x, use_reentrant=False)

    def initialise(self):
        for module in self.modules():
            nn.init.zeros_(module.weight)


class Outer(Chain):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        return self.relu(self.conv(self.inner(x)))


class ForwardOfBase(Chain):
    def forward(self, x):
        return super().forward(x) * 2


class HookedInside(Chain):
    """What passes a hook is not fused; what is on either side of it is."""

    def __init__(self):
        super().__init__()
        self.body.register_forward_hook(lambda module, args, result: None)

    def forward(self, x):
        return self.relu(self.conv(self.body(x)))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Chain, "conv+"),
        (ByArguments, "conv other"),
        (Settings, "conv blocks.0.0 blocks.1.0"),
        (Helper, "other"),
        (Parameters, "conv other"),
        (Inner, "body.0 tail.0 blocks.0.0 blocks.1.0"),
        (Outer, "conv inner.body.0 inner.tail.0 inner.blocks.0.0 inner.blocks.1.0"),
        (ForwardOfBase, "conv+"),
        (HookedInside, "conv body.0"),
        (lambda: nn.ModuleList([block(), conv(), nn.ReLU()]), "0.0"),
        (lambda: nn.DataParallel(block()), "module.0"),
        (lambda: torch.fx.symbolic_trace(Settings()), "conv blocks.0.0 blocks.1.0"),
        (lambda: nn.Sequential(conv(), nn.Identity(), nn.ReLU(), nn.Identity()), "0"),
        (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.MaxPool2d(2)), "0"),
        (lambda: Chain(ceil_mode=True), "conv"),
        (lambda: Chain(return_indices=True), "conv"),
        (lambda: Chain(dilation=(1, 2)), "conv"),
        (lambda: Chain(stride=3, padding=1), "conv+"),
    ],
)
def test_what_is_fused(model, names):
    model = model()
    state = {name: t.data_ptr() for name, t in model.state_dict().items()}
    assert fused(model) == set(names.split())
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == state
    assert fused(model) == set(names.split()), "a second conversion changes nothing"
    cnn.revert(model)
    assert fused(model) == set(names.split())
    assert fused(cnn.revert(model), fuse=False) == set()


# Not fused.


class TwoReaders(Chain):
    def forward(self, x):
        y = self.conv(x)
        return y + self.relu(y)


class InPlaceReadAgain(Chain):
    def forward(self, x):
        y = self.conv(x)
        self.inplace(y)
        return self.pool(y)


class Returned(Chain):
    def forward(self, x):
        y = self.conv(x)
        return self.relu(y), {"features": [y]}


class SizeRead(Chain):
    def forward(self, x):
        y = self.conv(x)
        return self.pool(self.relu(y)) * y.shape[2]


class CalledTwice(Chain):
    def forward(self, x):
        return self.relu(self.conv(self.conv(x)))


class ReLUTwice(Chain):
    def forward(self, x):
        return self.relu(self.other(self.relu(self.conv(x))))


class Functions(Chain):
    def forward(self, x):
        x = torch.relu(self.conv(x)) + self.other(x).relu_()
        return TF.max_pool2d(TF.relu(self.conv(x)), 2)


class ByTensor(Chain):
    def forward(self, x):
        y = self.conv(x)
        return self.relu(y) if y.mean() > 0 else y


class BySize(Chain):
    def forward(self, x):
        y = self.conv(x)
        if x.shape[-1] > 8:
            y = self.relu(y)
        return y


class ByNone(Chain):
    def forward(self, x, mask=None):
        y = self.conv(x)
        if mask is None:
            return y
        return self.relu(y)


class ByType(Chain):
    def forward(self, x):
        y = self.conv(x)
        return self.relu(y) if not isinstance(x, Tensor) else y


class ByTypeOfParameter(Chain):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        y = self.conv(x)
        return y if isinstance(self.scale, Tensor) else self.relu(y)


class ByAttributeOfParameter(ByTypeOfParameter):
    def forward(self, x):
        y = self.conv(x)
        return self.relu(y) if hasattr(self.scale, "strange") else y


class ByChance(Chain):
    def forward(self, x):
        y = self.conv(x)
        return self.relu(y) if random.random() < 2 else y


class ByTorchsChance(Chain):
    def forward(self, x):
        y = self.conv(x)
        if torch.rand(()).item() < 2 or self.limit < 0:
            y = self.relu(y)
        return y


class ByChosenLayer(Chain):
    def forward(self, x):
        layer = random.choice([self.relu])
        return layer(self.conv(x))


class ByRandomLoop(Chain):
    def forward(self, x):
        for _ in range(int(random.random()) + 1):
            x = self.conv(x)
        return self.relu(x)


class ByRandomList(Chain):
    def forward(self, x):
        turns = list(range(int(random.random()) + 1))
        for _ in reversed(turns):
            x = self.conv(x)
        return self.relu(x)


class ByQueue(Chain):
    """A setting that each call changes."""

    def __init__(self):
        super().__init__()
        self.queue = [True, True, True, False]

    def forward(self, x):
        y = self.conv(x)
        _ = self.queue.pop(0)
        return self.relu(y) if len(self.queue) > 0 else y


class BySetattr(Chain):
    def forward(self, x):
        setattr(self, "limit", self.limit + 1)  # noqa: B010
        y = self.conv(x)
        return self.relu(y) if self.limit < 9 else y


class ByComprehension(Chain):
    def forward(self, x):
        y = self.conv(x)
        return [self.relu(y) for _ in range(1) if time.time() > 0]


class ByHelper(Chain):
    def forward(self, x):
        return maybe(self.relu, self.conv(x))


def maybe(layer, x):
    return layer(x) if time.time() > 0 else x


class ByParameter(Chain):
    def forward(self, x):
        return self._finish(self.conv(x), random.random() < 2)

    def _finish(self, y, activate=True):
        return self.relu(y) if activate else y


class ByAlias(ByParameter):
    def forward(self, x):
        finish = self._finish
        return finish(self.conv(x), random.random() < 2) + self._finish(x)


class ByKeywords(ByParameter):
    def forward(self, x):
        return self._finish(self.conv(x), activate=random.random() < 2)


class ByGradientMode(Chain):
    def forward(self, x):
        y = self.conv(x)
        return y if not torch.is_grad_enabled() else self.relu(y)


class ByCounter(Chain):
    def forward(self, x):
        self.limit += 1
        y = self.conv(x)
        return y if self.limit > 8 else self.relu(y)


class ByBuffer(Chain):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        y = self.conv(x)
        return y if self.steps > 8 else self.relu(y)


class ByException(Chain):
    def forward(self, x):
        y = self.conv(x)
        try:
            return self.relu(y)
        except ValueError:
            return y


class Lambda(Chain):
    def forward(self, x):
        return (lambda y: self.relu(y))(self.conv(x))


class WithoutGradient(Chain):
    def forward(self, x):
        y = self.conv(x)
        with torch.no_grad():
            return self.relu(y)


class WithGradient(Chain):
    def forward(self, x):
        with torch.enable_grad():
            y = self.conv(x)
        return self.relu(y)


class KeptInAttribute(Chain):
    def forward(self, x):
        self.seen = y = self.conv(x)
        return self.relu(y)


class KeptInGlobal(Chain):
    def forward(self, x):
        y = self.conv(x)
        REGISTRY.append(y)
        return self.relu(y)


class KeptBeside(Chain):
    def forward(self, x):
        y = self.conv(x)
        self.settings["seen"] = y
        return self.relu(y)


class ForwardCalled(Chain):
    def forward(self, x):
        return self.conv.forward(x) + self.relu(self.conv(x))


class InTraining(Chain):
    def forward(self, x):
        y = self.conv(x)
        if self.training:
            return self.relu(y) + self.other(x)
        return y + self.relu(self.other(x))


class InTrainingAlone(Chain):
    """The ReLU serves another layer in evaluation."""

    def forward(self, x):
        return self.relu(self.conv(x) if self.training else self.other(x))


class LooksInto(Chain):
    def forward(self, x):
        if x.sum() > 0:
            return self.body(x)
        return self.body[0](x)


class LooksIntoByLoop(Chain):
    def forward(self, x):
        x = self.tail(x) if x.sum() > 0 else self.tail(-x)
        for layer in self.body:
            x = layer(x)
        for each in self.blocks:
            x = each[0](x)
        return getattr(self, "tail")[0](x)  # noqa: B009


class LooksIntoByMethod(Chain):
    def forward(self, x):
        return self._finish(self.body(x)) if x.sum() > 0 else x

    def _finish(self, x):
        return self.body[0](x)


class HandsOut(Chain):
    def forward(self, x):
        return first(self) if x.sum() > 0 else self.body(x)


def first(model):
    return model.body[0]


class OwnCall(Chain):
    def __call__(self, x):
        return super().__call__(x) + self.conv(x)


class Replaced(Chain):
    def __init__(self):
        super().__init__()
        self.forward = lambda x: self.conv(x)


class Shared(nn.Module):
    """Two parents call one block; one of them looks into it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Chain(), LooksInto()
        self.b.body = self.a.body

    def forward(self, x):
        return self.a.body(x) + self.b(x)


def hooked(register: str, *path: str):
    """A chain with a hook that changes nothing, here where ``path`` names."""

    def build():
        model = nn.Sequential(nn.Sequential(conv()), nn.ReLU(), nn.MaxPool2d(2))
        module = model.get_submodule(".".join(path))
        getattr(module, register)(lambda *args: None)
        return model

    return pytest.param(build, id=f"{register}-{'.'.join(path)}")


HOOKS = (
    *("register_forward_hook", "register_forward_pre_hook"),
    *("register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook"),
)


@pytest.mark.parametrize(
    "model",
    [
        *(TwoReaders, InPlaceReadAgain, Returned, SizeRead, CalledTwice, ReLUTwice, Functions),
        *(ByTensor, BySize, ByNone, ByType, ByTypeOfParameter, ByAttributeOfParameter),
        *(ByChance, ByTorchsChance, ByChosenLayer, ByRandomLoop),
        *(ByRandomList, ByQueue, BySetattr),
        *(
            ByComprehension,
            ByHelper,
            ByParameter,
            ByAlias,
            ByKeywords,
            ByGradientMode,
            ByCounter,
            ByBuffer,
            ByException,
            Lambda,
        ),
        *(WithoutGradient, WithGradient, KeptInAttribute, KeptInGlobal, KeptBeside, ForwardCalled),
        *(
            InTraining,
            InTrainingAlone,
            LooksInto,
            LooksIntoByLoop,
            LooksIntoByMethod,
            HandsOut,
            OwnCall,
        ),
        *(Replaced, Shared),
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(2), nn.ReLU()),
        lambda: nn.Sequential(conv(), nn.ReLU6(), conv(), nn.LeakyReLU(), conv(), nn.MaxPool2d(2)),
        lambda: nn.ModuleList([conv(), nn.ReLU()]),
        lambda: nn.ModuleDict({"conv": conv(), "relu": nn.ReLU()}),
        *(hooked(register, *path) for register in HOOKS for path in (("0", "0"), ("0",), ("1",))),
    ],
)
def test_what_is_not_fused(model):
    model = model()
    mode, state = random.getstate(), torch.get_rng_state()
    before = copy.copy(vars(model))
    assert fused(model) == set()
    assert vars(model) == before, "tracing leaves the module as it was"
    assert torch.equal(torch.get_rng_state(), state)
    random.setstate(mode)
    REGISTRY.clear()


def test_a_hook_of_all_modules():
    handle = torch_module.register_module_forward_hook(lambda *args: None)
    try:
        assert fused(block()) == set()
    finally:
        handle.remove()
    assert fused(block()) == {"0"}


@pytest.mark.parametrize("path", ["1", "2"])
def test_a_hook_ends_a_chain(path):
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2))
    model.get_submodule(path).register_forward_hook(lambda *args: None)
    assert fused(model) == ({"0"} if path == "2" else set())


WITHOUT_SOURCE = """
class Straight(Chain):
    def forward(self, x):
        y = torch.cat([self.relu(self.conv(x)), x.sum(1, keepdim=True)], dim=1)
        return {"found": self.pool(y)}


class Branching(Chain):
    def forward(self, x):
        y = self.conv(x)
        return self.relu(y) if x is None else y


class Choosing(Chain):
    def forward(self, x):
        return random.choice([self.relu])(self.conv(x))


class Drawing(Chain):
    def forward(self, x):
        return self.blocks[torch.randint(1, ())][1](self.conv(x))


class Storing(Chain):
    def forward(self, x):
        self.seen = self.conv(x)
        return self.relu(self.seen)
"""


collections = 0


def listen(phase, info):
    global collections
    collections += 1


def test_who_listens_to_the_collector_is_no_part_of_a_forward():
    thresholds = gc.get_threshold()
    gc.callbacks.append(listen)
    gc.set_threshold(1)
    try:
        assert fused(block()) == {"0"}
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(listen)
    assert gc.isenabled()


def test_code_without_a_source():
    """Only what has one way is fused."""
    classes = {"Chain": Chain, "torch": torch, "random": random}
    exec(WITHOUT_SOURCE, classes)
    assert fused(classes["Straight"]()) == {"conv"}
    for name in ("Branching", "Choosing", "Drawing", "Storing"):
        assert fused(classes[name]()) == set(), name
