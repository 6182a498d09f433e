"""Put adapters onto a model, switch them, and take them off again: inject, activate, disabled, rows, parameters, eject.

`inject` plans first (targets/resolve.py, which changes nothing) and then acts (`attach`). All memory is allocated
before the first module is changed, and whatever fails after that is undone, so that a model is injected as a whole or
not at all.

The base is frozen while it carries adapters. Each module remembers which of its parameters required a gradient
(FROZEN), so that `eject` can give the flags back.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import GraftError, StateError
from .lora.active import ROOTS, AdapterState
from .lora.adapter import LoraAdapter
from .lora.adapter_dict import AdapterDict, adapters_of
from .lora.dora import DoraAdapter
from .lora.kernels.per_row import RowAssignment
from .lora.model_index import AdaptedSite, ModelIndex, WeightKey, execution_device, states_to_switch
from .lora.replacement import ReplacementTensor
from .lora.weight_graft import graft_obstacles, mount, mount_all, set_grafted, unmount
from .lora.weight_kinds import KINDS, WHOLE, is_sharded, kind_of
from .merging.adapted_weight import merge_record
from .merging.merge import unmerge_index
from .plan import Plan, Site
from .spec import LoraSpec, Override, Target, spec_from_arguments
from .targets.resolve import resolve

FROZEN = "_lora_frozen"
"""The attribute of a base module that lists the parameters that inject froze, so that eject can thaw them."""

LoadedFactors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""A and B of one site of a file, and the magnitudes m and the bias update b if the file has them (lora/dora.py)."""


class PlannedReplacement(NamedTuple):
    """A tensor of the base model that an adapter replaces."""

    paths: tuple[str, ...]
    """All paths of the module that owns the tensor."""
    parameter: str
    readers: tuple[tuple[str, nn.Module], ...]
    """Other modules whose code reads the tensor, with their paths."""
    adapter: ReplacementTensor


def inject(model: nn.Module, targets: Target | Sequence[Target] | None = None, r: int = 8, *,
           alpha: float | None = None, dropout: float = 0.0, exclude: Target | Sequence[Target] = (),
           layers: Sequence[int] | None = None, scaling: str = "standard", init: str = "kaiming",
           dtype: torch.dtype | None = None,
           overrides: Mapping[str, Mapping[str, float]] | Sequence[Override] | None = (),
           name: str = "default", spec: LoraSpec | None = None) -> nn.Module:  # fmt: skip
    """Add LoRA, W = W0 + s B A, to the matched weights of a model, in place, and return the same model.

    The base model is frozen, and only A and B train. B starts at zero, so the output does not change. The new adapter
    becomes the active one; use `activate` to switch. Source: Hu et al. 2021, arXiv 2106.09685, equation 3.

    Args:
        model: The model to change.
        name: The name of the new adapter: 1 to 64 letters, digits, "_" or "-".
        spec: All other settings as one value, instead of the single arguments.

    The other arguments are the fields of `LoraSpec`, where they are documented.

    Raises:
        SpecError: Settings are invalid.
        TargetError: A target matches nothing, or matches a weight that cannot carry an adapter.
        StateError: Adapters are merged, or a context is open.

    If an error is raised, the model is unchanged. `find` takes the same arguments and shows what would be done.
    """
    index = ModelIndex(model)
    index.require_ready("inject")
    spec = spec_from_arguments(spec, targets, r=r, alpha=alpha, dropout=dropout, exclude=exclude, layers=layers,
                       scaling=scaling, init=init, dtype=dtype, overrides=overrides or ())  # fmt: skip
    plan = resolve(index, spec, name)
    attach(index, plan, name)
    if plan.unsupported:
        left_out = ", ".join(f"{path} ({reason})" for path, reason in list(plan.unsupported.items())[:5])
        warnings.warn(
            f"{len(plan.unsupported)} layers were left out, and will not train: {left_out}"
            + ", ..." * (len(plan.unsupported) > 5), stacklevel=2,
        )  # fmt: skip
    return model


def attach(index: ModelIndex, plan: Plan, name: str, factors: Mapping[str, LoadedFactors] | None = None,
           replacements: Sequence[PlannedReplacement] = ()) -> nn.Module:  # fmt: skip
    """Carry out a plan: create the adapters, graft the modules, freeze the base, and activate the new adapter.

    Args:
        index: An index of the model without the new adapter.
        plan: What `resolve` found for this model.
        name: The name of the new adapter.
        factors: The factors of every site by its name. If None, A is drawn and B is zero.
        replacements: Tensors of the base that the adapter replaces.
    """
    modules = index.modules
    adapters = [(s, _new_adapter(modules[s.path], s, factors[s.name] if factors else None)) for s in plan]
    states = index.states or [AdapterState()]
    try:
        for s, adapter in adapters:
            module = modules[s.path]
            siblings = adapters_of(module, s.parameter, s.label)
            if siblings is None:
                siblings = AdapterDict(states[0], KINDS[s.kind], s.parameter, s.label, named=s.named)
            mount_all(modules, (s.path, *s.aliases), siblings, s.readers)
            vars(adapter)["training"] = module.training  # train() takes 5 us per module
            siblings[name] = adapter
        for new in replacements:
            module = modules[new.paths[0]]
            siblings = adapters_of(module, new.parameter)
            if siblings is None:
                siblings = AdapterDict(states[0], kind_of(module, new.parameter) or WHOLE, new.parameter)
            mount(new.paths, module, siblings, [*new.readers, (new.paths[0], module)])
            siblings[name] = new.adapter
        for state in states:
            state.before[name], state.active = state.active, (name,)
        _freeze(modules.values())
    except BaseException:
        _remove(ModelIndex(index.model), [name])
        raise
    states[0].root = weakref.ref(getattr(index.model, "_orig_mod", index.model))
    if len(states) == 1:
        ROOTS[index.model] = states[0]
    return index.model


def eject(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take one adapter, or all of them, off a model, and return the same model.

    Without its last adapter the model is as it was before `inject`, to the bit: classes, weights, keys and
    requires_grad flags. Merged adapters are unmerged first; after merge(reversible=False) the merged weights stay. An
    eject that was interrupted is finished by the next one.

    Args:
        model: A model with adapters.
        name: The adapter to take off. None takes all of them off.

    Raises:
        StateError: The model has no such adapter.
        GraftError: Something was built on a grafted class since (FSDP, parametrize, a patched forward).
        MergeError: A merged weight was changed and cannot be restored.

    If an error is raised, the model is unchanged.
    """
    index = ModelIndex(model)
    if _restore_untouched(index) and not index.sites:
        return model
    index.require_adapters("eject", *([] if name is None else [name]), merged=True)
    problems = graft_obstacles(index)
    problems += [
        f"{site_name}: its A and B are sharded"
        for site_name, site in index.sites.items()
        if any(map(is_sharded, site.adapters.parameters()))
    ]
    if problems:
        raise GraftError(
            "nothing was ejected:", problems, "undo what was built on top, in reverse order, and call eject again"
        )
    if any((record := merge_record(site.adapters)) and record.is_reversible for site in index.sites.values()):
        unmerge_index(index)
    elif name is not None and index.merged:
        raise StateError(
            f"cannot eject {name!r} alone after merge(reversible=False)",
            way_out="eject(model) takes all adapters off and leaves the merged weights",
        )
    for state in index.states:
        state.merged = ()
    # After merge(reversible=False) modules still have their original class. unmount expects grafted ones.
    set_grafted(index, True)
    _remove(index, index.adapter_names if name is None else [name])
    return model


def activate(model: nn.Module, *names: str) -> None:
    """Make exactly these adapters the active ones. Their deltas add up; without names the model computes what its base
    computes.

    Switching takes microseconds, however many adapters and layers there are. Do not switch between a forward with
    gradient checkpointing and its backward, which runs the forward again.

    Args:
        model: A model with adapters.
        names: Adapter names, or one list of them.

    Raises:
        StateError: The model has no such adapter, adapters are merged, or an adapter with magnitudes (DoRA) or whole
            tensors shares a weight with another of these adapters.
    """
    if len(names) == 1 and isinstance(names[0], list | tuple):
        names = tuple(names[0])
    if len(names) > 1:
        index = ModelIndex(model)
        index.require_adapters("activate", *names)
        if conflicts := _conflicts(index.sites, names):
            raise StateError(
                "magnitudes (DoRA) and whole tensors cannot be active with another adapter on the same weight:",
                conflicts,
                "activate one of them at a time",
            )
    for state in states_to_switch(model, "activate", *names):
        state.active = tuple(dict.fromkeys(names))


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Let the model compute what its base computes within this context, in every thread.

    Run a backward within the context too.

    Raises:
        StateError: The model has no adapters, or adapters are merged.
    """
    states = states_to_switch(model, "disable the adapters", nested=True)
    with _changed(states, active=(), rows=None, context="disabled"):
        yield


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Let row i of the batch use the adapter names[i] within this context.

    Every module with adapters must see the batch on axis 0 of its input, followed by at least one more axis (the
    sequence). Run a backward within the context too. For short rows A and B are copied once per row, or once for
    several rows with the same adapter, as long as the copies are no larger than the weight; they are freed with the
    context.

    Args:
        model: A model with adapters.
        names: One entry per row: an adapter name, or None for the base model.

    Raises:
        StateError: The model has no such adapter, adapters are merged, or, during a forward, axis 0 of a module's input
            is not certain to be the batch.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise StateError(
            f"rows takes a list with one adapter name per row, not {names!r}",
            way_out='write rows(model, ["fr", None, "de"]) for a batch of three rows',
        )
    states = states_to_switch(model, "route rows", *(n for n in names if n is not None), nested=True)
    with _changed(states, rows=RowAssignment(names), context="rows"):
        yield


def parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Return an iterator over the trainable parameters of the active adapters, for an optimizer.

    Raises:
        StateError: Adapters are merged, or none is active: nothing would train.
    """
    index = ModelIndex(model)
    index.require_adapters("train", nested=True, part=True)
    adapters = [adapter for site in index.sites.values() for adapter in site.adapters.active]
    if not adapters:
        raise StateError("no adapter is active", way_out="call activate(model, name) first")
    return iter(dict.fromkeys(p for adapter in adapters for p in adapter.parameters() if p.requires_grad))


def _new_adapter(module: nn.Module, site: Site, loaded: LoadedFactors | None) -> LoraAdapter:
    """Create the adapter of one site, from the factors of a file or freshly drawn, on the device where the weight is
    used."""
    device, kind = execution_device(module, site.parameter), KINDS[site.kind]
    make: Callable[..., LoraAdapter] = LoraAdapter
    stack, out_features, _ = kind.sizes(site.shape)
    if loaded is None:
        A = torch.empty(*stack, site.r, site.in_features, dtype=site.dtype, device=device)
        B = torch.empty(*stack, site.out_features, site.r, dtype=site.dtype, device=device)
    else:
        A, B = (t.to(device, site.dtype) for t in loaded[:2])
        m, b = (None if t is None else t.to(device) for t in loaded[2:])
        if m is not None or b is not None:
            make = partial(DoraAdapter, module, kind.transposed, m, b)
    adapter = make(
        A, B, alpha=site.alpha, scaling=site.scaling, dropout=site.dropout, init=site.init, slices=site.rows,
        out=out_features, padding_idx=getattr(module, "padding_idx", None) if kind.name == "embedding" else None,
    )  # fmt: skip
    if loaded is None:
        adapter.reset_parameters()
    return adapter


def _conflicts(sites: Mapping[str, AdaptedSite], names: Sequence[str]) -> list[str]:
    """Return the weights that several of these adapters are on, at least one of which must be alone on its weight."""
    by_weight: dict[WeightKey, dict[str, str]] = {}
    exclusive: set[WeightKey] = set()
    for site_name, site in sites.items():
        for name in names:
            if name in site.adapters:
                by_weight.setdefault(site.key, {})[name] = site_name
                if _is_exclusive(site.adapters[name]):
                    exclusive.add(site.key)
    shared = (by_weight[key] for key in by_weight if key in exclusive and len(by_weight[key]) > 1)
    return [f"{next(iter(adapters.values()))}: {', '.join(adapters)}" for adapters in shared]


def _is_exclusive(adapter: LoraAdapter) -> bool:
    """True if no other adapter can be active on the same weight."""
    return isinstance(adapter, ReplacementTensor) or (isinstance(adapter, DoraAdapter) and adapter.m is not None)


def _freeze(modules: Iterable[nn.Module]) -> None:
    """Freeze the base, and add what was frozen to each module's list: an earlier inject may have frozen other
    parameters."""
    for module in modules:
        if training := {n: p for n, p in module._parameters.items() if p is not None and p.requires_grad}:
            module.__dict__[FROZEN] = (*module.__dict__.get(FROZEN, ()), *training)
            for p in training.values():
                p.requires_grad_(False)


def _remove(index: ModelIndex, names: Sequence[str]) -> None:
    """Take adapters off, wherever they are, and restore what carries no adapter any more."""
    for name in names:
        for state in index.states:
            previous = state.before.pop(name, ())
            state.before = {n: previous if was == (name,) else was for n, was in state.before.items()}
            active = previous if state.active == (name,) else state.active
            state.active = tuple(n for n in active if n in state.before)
        for site in index.sites.values():
            if name in site.adapters:
                del site.adapters[name]
    _restore_untouched(index)


def _restore_untouched(index: ModelIndex) -> bool:
    """Restore the classes of modules that carry no adapter any more, and thaw the base if none is left on the model.

    This also finishes an eject that was interrupted. Return whether there was anything to restore.
    """
    empty = [name for name, site in index.sites.items() if not list(site.adapters)]
    if empty:
        unmount(index, empty)
    frozen = {} if index.sites else {id(m): m for _, m in index.walked if FROZEN in m.__dict__}
    for module in frozen.values():
        for name in module.__dict__[FROZEN]:
            if (p := module._parameters.get(name)) is not None:
                p.requires_grad_(True)
        del module.__dict__[FROZEN]
    return bool(empty or frozen)


@contextmanager
def _changed(states: Sequence[AdapterState], **changes: object) -> Iterator[None]:
    """Change these attributes of the states within the context."""
    saved = [(state, {key: getattr(state, key) for key in changes}) for state in states]
    try:
        for state, _ in saved:
            vars(state).update(changes)
        yield
    finally:
        for state, before in saved:
            vars(state).update(before)
