"""Read weights from files of every usual kind, and load them into models."""

import json
from collections.abc import Iterator
from copy import copy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..data import Description
from ..errors import UsageError
from ..files import write
from ..models.classifier import auxiliary, classifiers, renew
from . import checkpoint as checkpoints
from . import networks
from .checkpoint import DIGITS, FORMAT, MARK, digest

KEYS = {"format", "versions", "config", "description", "state_dict"}
NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
OWN = "triton-cnn"
"""The entry in safetensors' metadata that describes the weights' model and data, in JSON."""

NESTS = ("state_dict", "model_state_dict", "model", "module", "network", "net", "weights", "params")
"""Keys under which files keep their weights beside other things, the most common first."""

WRAPPERS = {"module", "_orig_mod", "model"}
"""Prefixes that DataParallel, torch.compile and Lightning add to the names of parameters."""


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The weights in a file, and its checkpoint, None if it holds only weights.

    The file is a checkpoint or safetensors file from train, or another program's safetensors or
    torch.save file, which holds the weights directly or nested in other things. Raises UsageError
    if there are none.
    """
    whole = checkpoints.contents(path)
    if is_safetensors(whole) or path.suffix == ".safetensors":
        found, sealed = _unpacked_safetensors(whole, path)
    else:
        found, sealed = checkpoints.unpacked(whole, path)
    if isinstance(found, dict) and isinstance(found.get("format"), int):
        checkpoint = checkpoints.checked(found, sealed, path, KEYS)
        return checkpoint["state_dict"], checkpoint
    parameters = _within(found)
    if parameters is None:
        raise UsageError(f"{path} is not a checkpoint of python -m cnn train, and holds no weights")
    for name, value in parameters.items():
        if not _is_dense(value):
            raise UsageError(f"{path}: its {name} is not a dense tensor of numbers")
    return parameters, None


def is_safetensors(whole: bytes) -> bool:
    """Whether contents begin like a safetensors file: a header's length, and the header in JSON."""
    return whole[8:9] == b"{"


def _within(found: Any, depth: int = 4) -> dict[str, Tensor] | None:
    """The tensors by name that make up all of ``found``, or of a part nested in it."""
    if not isinstance(found, dict) or not found or not depth:
        return None
    if all(isinstance(n, str) and isinstance(value, Tensor) for n, value in found.items()):
        return dict(found)
    return next(filter(None, (_within(found.get(name), depth - 1) for name in NESTS)), None)


def _is_dense(value: Tensor) -> bool:
    """Whether a tensor stores all numbers of its shape, none of them shared by strides."""
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write the weights of a checkpoint as safetensors, with everything that ``cnn.load`` needs.

    The metadata hold a digest of the file, computed with zeros in place of the digest itself.
    """
    about = {"digest": MARK.decode() + "0" * DIGITS, "format": FORMAT}
    about |= {"versions": checkpoints.versions()}
    about |= {name: checkpoint[name] for name in ("config", "description")}
    tensors = {  # each with its own memory, as safetensors requires
        name: value.cpu().clone(memory_format=torch.contiguous_format)
        for name, value in checkpoint["state_dict"].items()
    }
    whole = safetensors.torch.save(tensors, {OWN: json.dumps(about)})
    at = whole.index(MARK) + len(MARK)
    write(path, whole[:at] + digest(whole) + whole[at + DIGITS :])


def _unpacked_safetensors(whole: bytes, path: Path) -> tuple[dict[str, Any], bool]:
    """The contents of a file that ``save`` wrote, and True if it is whole; for another's file its
    tensors, and False.
    """
    try:
        parameters = safetensors.torch.load(whole)
        length = int.from_bytes(whole[:8], "little")
        about = json.loads(whole[8 : 8 + length]).get("__metadata__", {}).get(OWN)
    except Exception:  # a damaged file can raise anything
        raise UsageError(f"{path} is damaged or not a safetensors file") from None
    at = whole.find(MARK, 0, 8 + length) + len(MARK)
    if about is None and at < len(MARK):
        return parameters, False
    zeroed = whole[:at] + b"0" * DIGITS + whole[at + DIGITS :]
    if about is None or digest(zeroed) != whole[at : at + DIGITS]:
        raise UsageError(f"{path} is damaged: its digest does not match its contents")
    return {**json.loads(about, object_hook=_tuples), "state_dict": parameters}, True


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with JSON's lists turned back into tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def build(
    name: str,
    parameters: dict[str, Tensor],
    image_size: int,
    path: Path,
    known: Description | None = None,
    source: networks.Source | None = None,
) -> nn.Module:
    """The model ``name``, made by ``source`` if given, with the parameters of ``path``.

    Its classes and channels come from ``known``, or else from the parameters. Raises UsageError if
    they do not fit together.
    """
    if unknown := networks.known_as(name):
        raise UsageError(f"{path} names a model {name}, which is {unknown}")
    options = {"image_size": image_size}
    if known and known.classes:
        options |= {"num_classes": len(known.classes), "in_channels": known.channels}
    model = networks.create(source or name, **options)
    if len(options) == 1:
        for layer, axis, count in _resized(model, named(parameters, model)):
            renew(model.get_submodule(layer), axis, count)
    fill(model, parameters, f"{name} for {image_size}x{image_size} pixels", path)
    return model


def fill(model: nn.Module, parameters: dict[str, Tensor], known_as: str, path: Path) -> None:
    """Load the parameters of ``path`` into a model. Raises UsageError if they do not fit."""
    own = model.state_dict()
    parameters = _of_this_version(named(parameters, model), own)
    reason, lacking = "load_state_dict refuses them", [n for n in own if n not in parameters]
    differ = [n for n in own if n in parameters and not _is_alike(own[n], parameters[n])]
    try:
        if not differ:
            model.load_state_dict(parameters)
            return
    except (RuntimeError, ValueError):  # also from a module's own method
        pass
    if lacking:
        reason = f"it lacks {_several(lacking)}"
    elif foreign := [name for name in parameters if name not in own]:
        reason = f"it also holds {_several(foreign)}"
    elif differ:
        values = parameters[differ[0]], own[differ[0]]
        sizes = ["x".join(map(str, value.shape)) or "a number" for value in values]
        if sizes[0] == sizes[1]:
            sizes = [str(value.dtype) for value in values]
        reason = f"its {differ[0]} is {sizes[0]}, not {sizes[1]}"
    raise UsageError(f"{path} does not hold the parameters of {known_as}: {reason}")


def _of_this_version(parameters: dict[str, Tensor], own: dict[str, Any]) -> dict[str, Tensor]:
    """Parameters with the versions of a model's layers, which some layers need and few files have.

    BatchNorm layers from before torch 0.4.1 do not count their batches.
    """
    counters = [name for name in own if name.endswith("num_batches_tracked")]
    counts = {name: own[name] for name in counters}
    found = copy(own)  # torch's own dict, which has the versions beside its items
    found.clear()
    found.update(counts | parameters)
    return found


def _is_alike(own: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, and are both floating-point or both not."""
    kinds = [(value.is_floating_point(), value.is_complex()) for value in (own, other)]
    return own.shape == other.shape and kinds[0] == kinds[1]


def named(parameters: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Parameters by their names in the model, without the prefixes that wrappers add."""
    own = model.state_dict()
    names = {_bare(name): name for name in own}
    found = {
        name if name in own else names.get(_bare(name), name): value
        for name, value in parameters.items()
    }
    if "n_averaged" not in own:
        found.pop("n_averaged", None)  # AveragedModel's counter
    return found


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _several(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")


def _resized(model: nn.Module, parameters: dict[str, Tensor]) -> Iterator[tuple[str, int, int]]:
    """The layers whose weights have other numbers of channels or classes: (name, axis, number)."""
    axes = dict.fromkeys(_seeing(model), 1) | dict.fromkeys(classifiers(model), 0)
    own, nothing = model.state_dict(), torch.empty(0)
    for layer, axis in axes.items():
        ours, theirs = ([*of.get(f"{layer}.weight", nothing).shape] for of in (own, parameters))
        if len(ours) == len(theirs) > axis and ours[axis] != theirs[axis]:
            count, ours[axis] = theirs[axis], theirs[axis]
            if ours == theirs:
                yield layer, axis, count


def _seeing(model: nn.Module) -> Iterator[str]:
    """The names of the convolutions that may see the image, such as RepVGG's first two."""
    if first := networks.first_convolution(model):
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and module.in_channels == first[1].in_channels:
                yield name


def begin(model: nn.Module, path: Path, known_as: str) -> list[str]:
    """Load a file's or a run's weights into a new model; returns lines that tell what was loaded.

    A first convolution for other channels and a classifier for other classes stay newly
    initialized; auxiliary classifiers that the model lacks are ignored. Raises UsageError if
    anything else does not fit.
    """
    path = checkpoints.of_run(path)
    parameters, own = named(read(path)[0], model), model.state_dict()
    new = {}
    for layer, axis, count in _resized(model, parameters):
        own_count, what = own[f"{layer}.weight"].shape[axis], ("classes", "channels")[axis]
        new[layer] = f"{layer} is new: it is for {own_count} {what}, not {count}"
    stay = {name: value for name, value in own.items() if name.rpartition(".")[0] in new}
    left_out = [name for name in parameters if name not in own and auxiliary(name)]
    taken = {name: value for name, value in parameters.items() if name not in left_out}
    fill(model, {**taken, **stay}, known_as, path)
    count = f"{len(own) - len(stay)} of {len(own)}"
    told = [f"{count} parameters and buffers loaded from {path}", *new.values()]
    if left_out:
        told.append(f"{_several(left_out)} ignored: they belong to auxiliary classifiers")
    return told


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> str:
    """Freeze the parameters that patterns match, or whose layers they match; returns a summary.

    Raises UsageError if a pattern matches none, or if nothing is left to train.
    """
    frozen: set[str] = set()
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        found = {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")}
        if not found:
            raise UsageError(f"--freeze: {pattern!r} matches none of {names[0]} to {names[-1]}")
        frozen |= found
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if not any(each.requires_grad for each in model.parameters()):
        raise UsageError("--freeze: nothing is left to train")
    norms = sum(map(_is_frozen_norm, model.modules()))
    kept = f"; {norms} BatchNorm layers among them use and keep their statistics" if norms else ""
    return f"{len(frozen)} of {len(names)} parameters are frozen{kept}"


def _is_frozen_norm(module: nn.Module) -> bool:
    own = [*module.parameters()] if isinstance(module, NORMS) else []
    return bool(own) and not any(each.requires_grad for each in own)


def training(model: nn.Module) -> None:
    """Put a model into training mode, except frozen BatchNorm layers."""
    model.train()
    for module in filter(_is_frozen_norm, model.modules()):
        module.eval()
