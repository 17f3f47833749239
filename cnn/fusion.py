"""Which layer alone reads another's result: the proof that fusing the two changes nothing.

A forward is traced by torch.fx down to layers, in training and in evaluation, on copies of the
modules it passes through. The trace stands for every call only if settings alone decide the way
(``decisions``) and no result is kept beside the graph. A module that cannot be traced is a wall:
what it calls as a whole is traced for itself, what it looks into is left alone. So is a module with
hooks, which see what passes its border.

It is assumed that the model is called as a whole, and that its settings, other than ``training``,
stay what they are.
"""

import copy
import gc
import os
import sys
import sysconfig
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized

from .decisions import called_whole, undecided

_TRUSTED = (
    f"{Path(torch.__file__).parent}{os.sep}",
    f"{Path(__file__).parent}{os.sep}",
    "<frozen ",
)
_STDLIB = sysconfig.get_path("stdlib")
_COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class Flow:
    """What reads the results of a model's layers.

    ``reader(layer)`` is the module that alone reads the layer's result at its only call, and reads
    nothing else; or, in a few words, why there is none.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._reasons: dict[nn.Module, str] = {}
        self._calls: dict[nn.Module, dict[fx.Graph, list[fx.Node]]] = defaultdict(dict)
        self._modules: dict[fx.Node, nn.Module] = {}
        self._roots: dict[nn.Module, nn.Module] = {}
        self._walls: set[nn.Module] = set()
        self._beside: dict[nn.Module, set[nn.Module]] = {}  # a root, and what is also beyond it
        self.read: set[int] = set()  # ids of the parameters that a forward reads itself
        if torch_module._has_any_global_hook():
            self._refuse(model, "hooks of all modules are registered")
            return
        self._leaves = {module for module in model.modules() if _is_leaf(module)}
        for module in model.modules():
            if module in self._leaves:
                for inner in module.modules():
                    if inner is not module:
                        self._reasons[inner] = f"it is part of a {_name(module)}"
            elif (
                has_hooks(module)
                or _is_wrapper(module)
                or not _calls_forward(module)
                or module._compiled_call_impl is not None
            ):
                self._walls.add(module)
        waiting, seen = [model], set()
        while waiting:
            if (root := waiting.pop()) not in seen:
                seen.add(root)
                waiting += self._enter(root)

    def reader(self, layer: nn.Module) -> nn.Module | str:
        found = self._reader(layer)
        if isinstance(found, str):
            return found
        if self._calls[found].keys() != self._calls[layer].keys():
            return "training and evaluation differ"
        reason = self._shared(layer) or self._shared(found)
        return reason or found

    def _reader(self, layer: nn.Module) -> nn.Module | str:
        if layer in self._reasons:
            return self._reasons[layer]
        if not self._calls[layer]:
            return "it is not called"
        found = [self._reader_in(nodes) for nodes in self._calls[layer].values()]
        reasons = [reason for reason in found if isinstance(reason, str)]
        if not reasons and len(set(found)) > 1:
            return "training and evaluation differ"
        return [*reasons, *found][0]

    def _reader_in(self, calls: list[fx.Node]) -> nn.Module | str:
        """The same in one graph."""
        if len(calls) > 1:
            return "it is called more than once"
        (node,) = calls
        if len(node.users) != 1:
            return "its result has several readers" if node.users else "its result is not read"
        (user,) = node.users
        if user.op == "output":
            return "its result is returned"
        if user.op != "call_module":
            name = user.target if isinstance(user.target, str) else _name(user.target)
            return f"its reader is {name}(), a function"
        reader = self._modules[user]
        if user.args != (node,) or user.kwargs or len(self._calls[reader][user.graph]) > 1:
            return f"its reader, a {_name(reader)}, reads more than that"
        if user.meta["gradients"] != node.meta["gradients"]:
            return f"its reader, a {_name(reader)}, is called in another gradient mode"
        return reader

    def _shared(self, layer: nn.Module) -> str | None:
        """Why calls of a layer may have been missed."""
        if layer in self._reasons:
            return self._reasons[layer]
        root = self._roots[layer]
        if root not in self._beside:
            self._beside[root] = set(_walk(self._model, {root}))
            for wall in self._walls & set(root.modules()) - {root}:
                self._beside[root].update(inner for inner in wall.modules() if inner is not wall)
        return "it is called in several places" if layer in self._beside[root] else None

    def _refuse(self, module: nn.Module, reason: str) -> None:
        for inner in module.modules():
            self._reasons.setdefault(inner, reason)

    def _enter(self, root: nn.Module) -> list[nn.Module]:
        """Trace one module; returns those to be traced apart from it."""
        if root in self._leaves:
            return []
        if isinstance(root, nn.ModuleList | nn.ModuleDict) or type(root) is nn.Module:
            return list(root.children())
        reason = None
        if _is_wrapper(root) or not _calls_forward(root):
            reason = f"{_name(root)} has a call of its own"
        while reason is None:
            try:
                graphs = _trace(root, self._walls - {root}, self._leaves)
            except _Untraceable as error:
                if error.module is root:
                    reason = str(error)
                else:  # its like would fail, too
                    kind = type(error.module)
                    self._walls.update(m for m in root.modules() if type(m) is kind)
            else:
                self._record(root, graphs)
                return [wall for wall in self._walls & set(root.modules()) if wall is not root]
        return self._wall(root, reason)

    def _wall(self, root: nn.Module, reason: str) -> list[nn.Module]:
        """Take root as untraceable; returns what it only calls as a whole."""
        self._walls.add(root)
        children = {name: m for name, m in root._modules.items() if m is not None}
        whole: set[str] = set()
        if not _is_wrapper(root):
            whole = called_whole(type(root), set(children)) if _calls_forward(root) else set()
        elif len(children) == 1:
            whole = set(children)
        for name, child in children.items():
            if name not in whole:
                self._refuse(child, reason)
            elif child in self._leaves:
                self._reasons.setdefault(child, reason)
        return [children[name] for name in whole]

    def _record(self, root: nn.Module, graphs: list[tuple[fx.Graph, nn.Module]]) -> None:
        for graph, traced in graphs:
            for node in graph.nodes:
                if node.op == "call_module":
                    module = traced.get_submodule(node.target)
                    self._modules[node] = module
                    self._calls[module].setdefault(graph, []).append(node)
                    if self._roots.setdefault(module, root) is not root:
                        self._reasons[module] = "it is called in several places"
                elif node.op == "get_attr":
                    path, _, name = node.target.rpartition(".")
                    self.read.add(id(getattr(traced.get_submodule(path), name)))


class _Untraceable(Exception):
    def __init__(self, module: nn.Module, reason: str):
        super().__init__(reason)
        self.module = module


class _Tracer(fx.Tracer):
    """Records calls of layers, and the code of users that runs in which module."""

    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, opaque: set[nn.Module]):
        super().__init__()
        self.within, self.opaque = [root], opaque
        self.code: dict[CodeType, nn.Module] = {}  # with the module that it first ran in
        self.names: dict[CodeType, dict[str, Any]] = {}
        self.entered: set[CodeType] = set()  # called by others than users' code
        self.results: list[tuple[weakref.ref, nn.Module]] = []  # each with its caller

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.opaque

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if m in self.opaque:
            result = super().call_module(m, forward, args, kwargs)
            gradients = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            result.node.meta["gradients"] = gradients
            self.results.append((weakref.ref(result), self.within[-1]))
            return result
        self.within.append(m)  # stays the last where forward raises
        result = super().call_module(m, forward, args, kwargs)
        self.within.pop()
        return result

    def watch(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and not _is_trusted(frame):
            self.code.setdefault(frame.f_code, self.within[-1])
            self.names[frame.f_code] = frame.f_globals
            if frame.f_back is None or _is_trusted(frame.f_back):
                self.entered.add(frame.f_code)


def _trace(
    root: nn.Module, walls: set[nn.Module], leaves: set[nn.Module]
) -> list[tuple[fx.Graph, nn.Module]]:
    """The graphs of training, of evaluation, and without gradients of the mode root is in, each
    with the copy of root that it belongs to, whose layers are root's own. Raises _Untraceable.
    """
    opaque = (walls | leaves) & set(root.modules())
    graphs = []
    for training in (True, False, None):
        try:
            memo: dict[int, Any] = {id(each): each for each in (*opaque, *root.parameters())}
            traced = copy.deepcopy(root, memo)
        except Exception as error:
            raise _Untraceable(root, f"{_name(root)} cannot be copied: {_line(error)}") from error
        own = {memo[id(module)]: module for module in root.modules() if id(module) in memo}
        for module in own:
            if module is not own[module] and training is not None:
                module.training = training
        tracer = _Tracer(traced, opaque)
        with torch.inference_mode(False), torch.set_grad_enabled(training is not None):
            graphs.append((_graph(tracer, traced, root, own), traced))
    return graphs


def _graph(
    tracer: _Tracer, traced: nn.Module, root: nn.Module, own: dict[nn.Module, nn.Module]
) -> fx.Graph:
    """One trace of a copy of root, if it stands for all calls; ``own``: what was copied."""
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            _watched_by(tracer.watch),
        ):
            warnings.simplefilter("ignore")
            graph = tracer.trace(traced)
    except Exception as error:
        module = error.module if isinstance(error, _Untraceable) else tracer.within[-1]
        raise _Untraceable(own.get(module, root), f"{_name(module)}: {_line(error)}") from error
    for code, reason in undecided(tracer.names, tracer.entered):
        module = tracer.code[code]
        raise _Untraceable(own.get(module, root), f"{_name(module)}: {reason}")
    for result, module in tracer.results:
        if _is_kept(result):
            raise _Untraceable(own.get(module, root), f"{_name(module)} keeps what a layer returns")
    return graph


def _is_kept(thing: weakref.ref) -> bool:
    """Whether something is still referred to, other than by a cycle that nobody sees."""
    for generation in (0, 1, 2):
        if thing() is None:
            return False
        gc.collect(generation)
    return thing() is not None


@contextmanager
def _watched_by(watch: Callable) -> Iterator[None]:
    """Within this context each call of a function is shown to ``watch``.

    Python collects no garbage meanwhile: who listens to that, by gc.callbacks, would be shown too.
    """
    previous: Any = sys.getprofile()
    collects = gc.isenabled()
    gc.disable()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(previous if callable(previous) else None)
        if collects:
            gc.enable()
        if enable := getattr(previous, "enable", None):  # cProfile's is no function
            enable()


def _is_trusted(frame: FrameType) -> bool:
    """Whether code is torch's, ours or Python's own, or of a comprehension, which its function's
    source shows.
    """
    file = frame.f_code.co_filename
    if file.startswith(_STDLIB) and "-packages" not in file:
        return True
    if str(frame.f_globals.get("__name__")).startswith("namedtuple_"):
        return True
    return file.startswith(_TRUSTED) or frame.f_code.co_name in _COMPREHENSIONS


def _is_leaf(module: nn.Module) -> bool:
    """Whether a call of the module is one step: nothing within it is looked at."""
    if _is_container(module):
        return False
    if type(module).__module__.startswith(("torch.nn.modules.", "torch.ao.")):
        return True
    inner = (inner for inner in module.modules() if inner is not module)
    return is_parametrized(module) or not any(isinstance(each, nn.Conv2d) for each in inner)


def _is_wrapper(module: nn.Module) -> bool:
    """Whether it is a container of torch's that calls what it holds, as DistributedDataParallel."""
    if _is_container(module) or _is_leaf(module):
        return False
    return type(module).__module__.startswith("torch.")


def _is_container(module: nn.Module) -> bool:
    """Whether it is one of torch's containers that can be looked into."""
    kinds = nn.Sequential | nn.ModuleList | nn.ModuleDict | fx.GraphModule
    return isinstance(module, kinds) or type(module) is nn.Module


def _calls_forward(module: nn.Module) -> bool:
    """Whether a call of the module is a call of its class's forward."""
    if isinstance(module, fx.GraphModule):
        return True
    ways = ("__call__", "_call_impl")
    return "forward" not in module.__dict__ and all(
        getattr(type(module), way) is getattr(nn.Module, way) for way in ways
    )


def _walk(module: nn.Module, without: set[nn.Module]) -> Iterator[nn.Module]:
    """A module and all below it, less what is only below ``without``."""
    waiting, seen = [module], set(without)
    while waiting:
        if (module := waiting.pop()) not in seen:
            seen.add(module)
            yield module
            waiting += module.children()


def _name(thing: Any) -> str:
    return getattr(thing, "__name__", type(thing).__name__)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
