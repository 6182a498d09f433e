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

from .errors import GraftError, SpecError, StateError
from .lora.active import ROOTS, AdapterState, Choice, choosing
from .lora.adapter import LoraAdapter
from .lora.adapter_dict import AdapterDict, adapters_of
from .lora.dora import DoraAdapter
from .lora.kernels.per_row import RowAssignment
from .lora.model_index import AdaptedSite, ModelIndex, WeightKey, execution_device, states_to_switch
from .lora.replacement import ReplacementTensor
from .lora.weight_graft import graft_obstacles, mount, set_grafted, unmount
from .lora.weight_kinds import KINDS, WHOLE, is_sharded, kind_of
from .merging.adapted_weight import merge_record
from .merging.merge import unmerge_index
from .numerics.delta import alpha_of
from .numerics.modes import in_default_modes
from .plan import Plan, Site
from .plan import site_name as name_of_site
from .spec import LoraSpec, Override, Target, is_alpha, spec_from_arguments
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


@in_default_modes
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
    return attach(index, resolve(index, spec, name), name)


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
                siblings = AdapterDict(states[0], KINDS[s.kind], s.parameter, s.label, site=s.name, named=s.named)
            mount((s.path, *s.aliases), module, siblings, [(path, modules[path]) for path in s.readers])
            vars(adapter)["training"] = module.training  # train() takes 5 us per module
            siblings[name] = adapter
        for new in replacements:
            module = modules[new.paths[0]]
            siblings = adapters_of(module, new.parameter)
            if siblings is None:
                site = name_of_site(new.paths[0], new.parameter, "")
                siblings = AdapterDict(states[0], kind_of(module, new.parameter) or WHOLE, new.parameter, site=site)
            mount(new.paths, module, siblings, [*new.readers, (new.paths[0], module)])
            siblings[name] = new.adapter
        for state in states:
            state.before[name] = state.default.active
            state.set_default((name,))
        _freeze(modules.values())
    except BaseException:
        _remove(ModelIndex(index.model), [name])
        raise
    states[0].root = weakref.ref(getattr(index.model, "_orig_mod", index.model))
    if len(states) == 1:
        ROOTS[index.model] = states[0]
    return index.model


@in_default_modes
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
    if name is None and index.lost:
        warnings.warn(
            f"these weights were injected, but their modules were replaced or removed since: {', '.join(index.lost)}",
            stacklevel=3,
        )
        for state in index.whole_states:
            state.members = {n: member for n, member in state.members.items() if n not in index.lost}
    if _restore_untouched(index) and (not index.sites or name not in (None, *index.adapter_names)):
        return model
    names = () if name is None else (name,)
    index.require_adapters("eject", *names, merged=True, lost=name is None, computed=not index.merged)
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

    This is the model's default, which holds for every thread; `using` makes a choice for the caller alone. Exactly the
    parameters of these adapters require a gradient afterwards, except those that were frozen by hand.

    Args:
        model: A model with adapters.
        names: Adapter names, or one list of them.

    Raises:
        StateError: The model has no such adapter, adapters are merged, or an adapter with magnitudes (DoRA) or whole
            tensors shares a weight with another of these adapters.
    """
    names = _required_names(model, names, "activate")
    for state in states_to_switch(model, "activate", *names):
        state.set_default(tuple(dict.fromkeys(names)))


@contextmanager
def using(model: nn.Module, *names: str) -> Iterator[None]:
    """Let the caller's forwards use exactly these adapters within this context, whatever `activate` says.

    The choice belongs to the thread or the asyncio task that makes it; other threads and tasks do not see it. A task or
    a thread that is started with a copy of the caller's contextvars inherits it. In a generator, the context holds
    while the generator runs, and not for its consumer between two items.

    A backward uses the adapters of its forward, gradient checkpointing included, wherever it runs.

    Args:
        model: A model with adapters.
        names: Adapter names, or one list of them. Without names, the model computes what its base computes.

    Raises:
        StateError: As for `activate`.
    """
    names = _required_names(model, names, "use adapters", nested=True)
    states = states_to_switch(model, "use adapters", *names, nested=True)
    _warn_if_frozen(model, states, names, "using")
    with choosing(states, Choice(names), "using"):
        yield


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Let the caller's forwards compute what the base model computes within this context.

    The choice belongs to the caller, as for `using`.

    Raises:
        StateError: The model has no adapters, or adapters are merged.
    """
    states = states_to_switch(model, "disable the adapters", nested=True)
    with choosing(states, Choice(), "disabled"):
        yield


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Let row i of the batch use the adapter names[i] within this context.

    Every module with adapters must see the batch on axis 0 of its input, followed by at least one more axis (the
    sequence). The choice belongs to the caller, as for `using`. Only adapters that are active by default train: to
    train several in one batch, activate all of them first. For short rows A and B are copied once per row, or once for
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
    used = tuple(dict.fromkeys(n for n in names if n is not None))
    states = states_to_switch(model, "route rows", *used, nested=True)
    _warn_if_frozen(model, states, used, "rows")
    with choosing(states, Choice(rows=RowAssignment(names)), "rows"):
        yield


def parameters(model: nn.Module, name: str | Sequence[str] | None = None) -> Iterator[nn.Parameter]:
    """Return an iterator over the trainable parameters of adapters, for an optimizer.

    Exactly the adapters that are active by default train: `inject` and `load` activate the new adapter and freeze the
    others, and `activate` freezes and thaws. A model with several adapters therefore asks for a name, or warns which
    adapters the optimizer will not train.

    Args:
        model: A model with adapters, or a part of one.
        name: The adapter or adapters whose parameters are returned. None means those of the active adapters.

    Raises:
        StateError: The model has no such adapter, adapters are merged, or an adapter has nothing that trains.
    """
    names = None if name is None else (name,) if isinstance(name, str) else tuple(name)
    index = ModelIndex(model)
    index.require_adapters("train", *names or (), nested=True, part=True, computed=True)
    chosen = index.default if names is None else names
    if not chosen:
        raise StateError("no adapter is active", way_out="call activate(model, name) first")
    trained = {n: [p for a in index.adapters_named(n) for p in a.parameters() if p.requires_grad] for n in chosen}
    if frozen := [n for n, tensors in trained.items() if not tensors]:
        raise StateError(
            f"nothing of {', '.join(map(repr, frozen))} requires a gradient, so that it would not train",
            way_out=f"call activate(model, {', '.join(map(repr, chosen))}) first, which lets exactly these train",
        )
    if names is None and (others := [n for n in index.adapter_names if n not in chosen]):
        warnings.warn(
            f"these are the parameters of {', '.join(map(repr, chosen))} alone; {', '.join(map(repr, others))} is not"
            f" active and does not train. Say whose parameters you want: parameters(model, {chosen[0]!r})",
            stacklevel=2,
        )
    return iter(dict.fromkeys(p for tensors in trained.values() for p in tensors))


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


def rescale(model: nn.Module, name: str = "default", *, alpha: float | None = None, scale: float | None = None) -> None:
    """Change the scale s of an adapter on all of its weights, for the forward, merge, save and everything else.

    Compiled code is not compiled again. An adapter of several ranks or alphas gets the same alpha, or the same scale,
    on all of its weights.

    Args:
        model: A model with the adapter.
        name: The adapter's name.
        alpha: The new numerator: s = alpha / r, or alpha / sqrt(r) where the adapter is rank-stabilized.
        scale: The new s itself. Give either of the two.

    Raises:
        SpecError: Not exactly one of the two is given, or it is not a finite number above 0.
        StateError: The model has no such adapter, adapters are merged, or a context is open.
    """
    given = [value for value in (alpha, scale) if value is not None]
    if len(given) != 1 or not is_alpha(given[0]):
        raise SpecError(
            f"rescale takes either alpha or scale, a finite number above 0, not alpha={alpha!r}, scale={scale!r}",
            way_out="write rescale(model, name, alpha=16) or rescale(model, name, scale=2)",
        )
    index = ModelIndex(model)
    index.require_adapters("rescale", name)
    for adapter in index.adapters_named(name):
        new = given[0] if scale is None else alpha_of(scale, adapter.r, adapter.scaling)
        adapter.rescale(new, adapter.scaling)


def reset(model: nn.Module, name: str | None = None) -> None:
    """Draw A anew and set B to zero, so that the adapter is as `inject` makes it and the output is the base model's.

    This is also what gives A and B values after a model that was built on the meta device has got its memory by
    `to_empty`.

    Args:
        model: A model with adapters.
        name: The adapter's name. None resets all adapters.

    Raises:
        StateError: The model has no such adapter, adapters are merged, a context is open, or an adapter has values that
            come from a file alone (magnitudes of DoRA, whole tensors).
    """
    index = ModelIndex(model)
    index.require_adapters("reset", *([] if name is None else [name]))
    names = index.adapter_names if name is None else (name,)
    adapters = [adapter for n in names for adapter in index.adapters_named(n)]
    if any(type(adapter) is not LoraAdapter for adapter in adapters):
        raise StateError(
            "cannot reset an adapter with magnitudes (DoRA) or whole tensors, which come from its file",
            way_out="eject it and load the file again, or name the adapters to reset",
        )
    for adapter in adapters:
        adapter.reset_parameters()


def _required_names(model: nn.Module, names: tuple[str, ...], verb: str, nested: bool = False) -> tuple[str, ...]:
    """Return the names that activate or using was given, each once; raise StateError if they cannot be active
    together."""
    if len(names) == 1 and isinstance(names[0], list | tuple):
        names = tuple(names[0])
    if len(names) > 1:
        index = ModelIndex(model)
        index.require_adapters(verb, *names, nested=nested, computed=True)
        if conflicts := _conflicts(index.sites, names):
            raise StateError(
                "magnitudes (DoRA) and whole tensors cannot be active with another adapter on the same weight:",
                conflicts,
                "activate one of them at a time",
            )
    return tuple(dict.fromkeys(names))


def _warn_if_frozen(model: nn.Module, states: Sequence[AdapterState], names: Sequence[str], verb: str) -> None:
    """Warn of adapters that a training forward would use without training them."""
    frozen = [n for n in names if not any(n in state.default.active for state in states)]
    if frozen and model.training and torch.is_grad_enabled():
        warnings.warn(
            f"{', '.join(map(repr, frozen))} is not active by default, so that it does not train within {verb}(...):"
            f" call activate(model, {', '.join(map(repr, names))}) first to train it, or use torch.no_grad()",
            stacklevel=5,
        )


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
    training: dict[int, nn.Parameter] = {}
    for module in modules:
        training |= {id(p): p for p in module._parameters.values() if p is not None and p.requires_grad}
        # Each module that has a tied parameter notes it: load_state_dict(assign=True) ends the tie.
        if names := [n for n, p in module._parameters.items() if id(p) in training]:
            module.__dict__[FROZEN] = tuple(dict.fromkeys((*module.__dict__.get(FROZEN, ()), *names)))
    for p in training.values():
        p.requires_grad_(False)


def _remove(index: ModelIndex, names: Sequence[str]) -> None:
    """Take adapters off, wherever they are, and restore what carries no adapter any more."""
    for name in names:
        for state in index.states:
            previous = state.before.pop(name, ())
            state.before = {n: previous if was == (name,) else was for n, was in state.before.items()}
            active = previous if state.default.active == (name,) else state.default.active
            state.set_default(tuple(n for n in active if n in state.before))
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
            # prune and spectral_norm keep the parameter under another name, and compute `weight` from it.
            for p in (module._parameters.get(name), module._parameters.get(f"{name}_orig")):
                if p is not None:
                    p.requires_grad_(True)
        del module.__dict__[FROZEN]
    return bool(empty or frozen)
