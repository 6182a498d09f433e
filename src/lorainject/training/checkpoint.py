"""The adapters of a model in the folder of a checkpoint, and back.

    checkpoint-8/lorainject.json              the names and settings of the adapters, which are active, and what trains
    checkpoint-8/adapter_model.safetensors    the adapter that trains, as `li.save` writes it (with its config)
    checkpoint-8/sft/...                      every other adapter, in a folder of its name
    checkpoint-8/other_parameters.safetensors parameters of the base that train as well (a new head), if there are any

A checkpoint is read into a bare model, which gets its adapters from it, or into a model that carries the same ones.
Adapters that differ in anything but their values are refused, because the states of the optimizer would belong to
other parameters, or the scale would change in the middle of a training.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import FileError, system_errors
from ..files.hotswap import hotswap
from ..files.save_load import load, save
from ..lora.adapter import LoraAdapter
from ..lora.model_index import ModelIndex
from ..lora.strength import read_strengths
from ..merging.report import with_strengths
from ..surgery import eject
from ..switching import activate

MANIFEST = "lorainject.json"
OTHERS = "other_parameters.safetensors"
SETTINGS = ("r", "alpha", "scaling", "dropout")


def has_adapters(folder: str | Path) -> bool:
    """True if the folder is a checkpoint of adapters, as `save_adapters` writes it."""
    return (Path(folder) / MANIFEST).is_file()


def save_adapters(model: nn.Module, folder: str | Path, *, others_are_kept: bool = False) -> None:
    """Write all adapters of a model, and the parameters of the base that train with them.

    Args:
        model: The model.
        folder: The folder, which exists.
        others_are_kept: True for a checkpoint that a trainer reads again. Otherwise `save` warns of parameters of the
            base that train, because `load` does not read them.
    """
    folder, manifest = Path(folder), describe(model)
    with warnings.catch_warnings():
        if others_are_kept:
            warnings.filterwarnings("ignore", message=".* train too, but belong to no adapter")
        for name, path in manifest["folders"].items():
            save(model, folder / path, name)
    adapted = {id(p) for adapter in _adapters(ModelIndex(model)) for p in adapter.parameters()}
    others = {name: p for name, p in _named(model) if p.requires_grad and id(p) not in adapted}
    with system_errors(f"{folder} cannot be written"):
        if others:
            save_file({name: p.detach().contiguous() for name, p in others.items()}, folder / OTHERS)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def load_adapters(model: nn.Module, folder: str | Path, *, is_wrapped: bool = False) -> None:
    """Give a model the adapters of a checkpoint, in place: parameters that an optimizer holds stay the same objects.

    Args:
        model: A bare model, or one with the adapters of the checkpoint.
        folder: The folder of the checkpoint.
        is_wrapped: True if the model is inside DistributedDataParallel, where no adapter can be added.

    Raises:
        FileError: The adapters of the model differ from those of the checkpoint in anything but their values, or the
            checkpoint cannot be read. A bare model is then bare again.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        folders = {name: folder / path for name, path in manifest["folders"].items()}
        trained, active = set(manifest["trained"]), read_strengths("resume", [manifest["active"]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        way_out = "resume from another checkpoint"
        raise FileError(f"{folder / MANIFEST} does not describe a checkpoint: {e}", way_out=way_out) from e
    is_bare = not ModelIndex(model).sites
    if not is_bare and (problems := list(differences(manifest, describe(model)))):
        raise FileError(
            f"{folder} was written with other adapters than the model has:", problems,
            "inject with the settings of the checkpoint, or pass the base model without adapters, which then gets those"
            " of the checkpoint. To train on from its values with other settings, inject, call hotswap(model, path),"
            " and train without resume_from_checkpoint",
        )  # fmt: skip
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for name, path in folders.items():
        if is_bare:
            with _bare_on_error(model):
                load(model, path, name)
        elif is_wrapped:
            hotswap(model, path, name)
        else:
            _refill(model, path, name)
    others = load_file(folder / OTHERS) if (folder / OTHERS).is_file() else {}
    with torch.no_grad():
        for name, p in _named(model):
            if name in others:
                p.copy_(others[name])
    if is_bare:
        activate(model, active)
        flags = [(p, name in trained) for name, p in _named(model)]
    for p, requires_grad in flags:  # load freezes the base
        p.requires_grad_(requires_grad)


def describe(model: nn.Module) -> dict[str, Any]:
    """Return all that must be equal for a training to go on: every adapter's sites and settings, which adapters are
    active, and which parameters train, as values of JSON.

    Raises:
        StateError: The model has no adapters.
    """
    index = ModelIndex(model)
    index.require_adapters("describe the adapters", merged=True, nested=True)
    adapters = {
        name: {key: _settings(site.adapters[name]) for key, site in index.sites.items() if name in site.adapters}
        for name in dict.fromkeys(name for state in index.states for name in state.before)  # as they were added
    }
    trained = [
        name
        for name in index.default
        if any(p.requires_grad for a in index.adapters_named(name) for p in a.parameters())
    ]
    main = (*trained, *adapters)[0]
    return {
        "adapters": adapters,
        "folders": {name: "." if name == main else name for name in adapters},
        "active": index.default_strengths,
        "trained": [name for name, p in _named(model) if p.requires_grad],
    }


def differences(checkpoint: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each difference between what `describe` returned for a checkpoint and for a model."""
    theirs, ours = checkpoint["adapters"], model["adapters"]
    if theirs.keys() != ours.keys():
        yield f"the checkpoint has the adapters {_quoted(theirs)}, the model {_quoted(ours)}"
        return
    there, here = (read_strengths("resume", [side["active"]]) for side in (checkpoint, model))
    if list(there.items()) != list(here.items()):
        yield f"active in the checkpoint: {_strengths(there)}; on the model: {_strengths(here)}"
    for name, site in sorted({(adapter, site) for adapter in ours for site in (*theirs[adapter], *ours[adapter])}):
        a, b = theirs[name].get(site), ours[name].get(site)
        if a is None or b is None:
            yield f"{site}: carries the adapter {name!r} {'on the model' if a is None else 'in the checkpoint'} alone"
        elif changed := [key for key in {**a, **b} if a.get(key) != b.get(key)]:
            changed = [key for key in changed if key in SETTINGS] or changed  # another rank has other shapes, too
            there, here = ({key: side.get(key) for key in changed} for side in (a, b))
            yield f"{site}: the adapter {name!r} has {_listed(there)} in the checkpoint, {_listed(here)} on the model"
    if theirs == ours and checkpoint["trained"] != model["trained"]:
        changed = sorted({*checkpoint["trained"]} ^ {*model["trained"]})
        for name in changed:
            yield f"{name}: trains {'in the checkpoint' if name in checkpoint['trained'] else 'on the model'} alone"
        if not changed:
            yield f"the adapters were added in the order {_quoted(theirs)}, on the model {_quoted(ours)}"


def _settings(adapter: LoraAdapter) -> dict[str, Any]:
    """Return the settings of an adapter, and the shape and dtype of each of its parameters, as values of JSON."""
    settings = {key: getattr(adapter, key) for key in SETTINGS if hasattr(adapter, key)}
    return settings | {key: f"{p.dtype} {tuple(p.shape)}" for key, p in adapter.named_parameters()}


@contextmanager
def _bare_on_error(model: nn.Module) -> Iterator[None]:
    """Take all adapters off the model if the body raises."""
    try:
        yield
    except BaseException:
        if ModelIndex(model).sites:
            eject(model)
        raise


def _refill(model: nn.Module, path: Path, name: str) -> None:
    """Give an adapter on the model the values of a file, whatever kind of adapter it is.

    The file is loaded under a name that is free, its values are copied, and what was loaded is taken off again.
    """
    names = ModelIndex(model).adapter_names
    spare = next(f"restored{n}" for n in range(len(names) + 1) if f"restored{n}" not in names)
    load(model, path, spare)
    try:
        sites = ModelIndex(model).sites
        with torch.no_grad():
            for adapters in (site.adapters for site in sites.values() if name in site.adapters):
                for p, value in zip(adapters[name].parameters(), adapters[spare].parameters(), strict=True):
                    p.copy_(value)
    finally:
        eject(model, spare)


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters with their names, without what torch.compile adds to them."""
    return ((name.replace("_orig_mod.", ""), p) for name, p in model.named_parameters())


def _adapters(index: ModelIndex) -> list[LoraAdapter]:
    return [adapter for name in index.adapter_names for adapter in index.adapters_named(name)]


def _quoted(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"


def _strengths(strengths: Mapping[str, float]) -> str:
    return with_strengths(map(repr, strengths), strengths.values()) or "none"


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())
