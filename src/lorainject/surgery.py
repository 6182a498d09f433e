"""Put adapters onto a model, and take them off again: inject and eject.

`inject` plans first (targets/resolve.py, which changes nothing) and then acts (`attach`). All memory is allocated
before the first module is changed, and whatever fails after that is undone, so that a model is injected as a whole or
not at all.

The base is frozen while it carries adapters. Each module remembers which of its parameters required a gradient
(FROZEN), so that `eject` can give the flags back.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import GraftError, StateError
from .lora.active import ROOTS, AdapterState
from .lora.adapter import LoraAdapter
from .lora.adapter_dict import AdapterDict, adapters_of
from .lora.dora import DoraAdapter
from .lora.gradients import warn_of_cut_graphs
from .lora.initial_values import starts_at_zero
from .lora.model_index import ModelIndex, execution_device
from .lora.mounting import graft_obstacles, mount, mount_all, set_grafted, unmount
from .lora.offset import OffsetAdapter
from .lora.ranks import share_factors
from .lora.weight_kinds import KINDS, WHOLE, is_sharded, kind_of, stored_tensor
from .merging.adapted_weight import merge_record
from .merging.merge import unmerge_index
from .numerics.modes import in_default_modes
from .plan import Plan, Site
from .plan import site_name as name_of_site
from .spec import Init, LoraSpec, Override, Target, explains_settings, spec_from_arguments
from .targets.heads import find_output_embeddings
from .targets.model_weights import model_weights
from .targets.resolve import resolve
from .targets.trained_tensors import PlannedReplacement, replacements

FROZEN = "_lora_frozen"
"""The attribute of a base module that lists the parameters that inject froze, so that eject can thaw them."""


class LoadedFactors(NamedTuple):
    """What a file has for one site."""

    A: Tensor
    B: Tensor
    m: Tensor | None = None
    """Magnitudes (lora/dora.py)."""
    b: Tensor | None = None
    """Update of the bias (lora/dora.py)."""
    A0: Tensor | None = None
    """Initial values that are subtracted (lora/offset.py), as is B0."""
    B0: Tensor | None = None


@explains_settings
@in_default_modes
def inject(model: nn.Module, targets: Target | Sequence[Target] | None = None, r: int = 8, *,
           alpha: float | None = None, dropout: float = 0.0, exclude: Target | Sequence[Target] = (),
           layers: Sequence[int] | None = None, scaling: str = "standard", init: Init = "kaiming",
           dtype: torch.dtype | None = None,
           overrides: Mapping[str, Mapping[str, float]] | Sequence[Override] | None = (), dora: bool = False,
           modules_to_save: Target | Sequence[Target] = (), bias: str = "none",
           trainable_tokens: Mapping[str, Sequence[int]] | Sequence[tuple[str, Sequence[int]]] = (),
           name: str = "default", spec: LoraSpec | None = None) -> nn.Module:  # fmt: skip
    """Add LoRA, W = W0 + s B A, to the matched weights of a model, in place, and return the same model.

    The base model is frozen, and only A and B train. B starts at zero, so the output does not change. The new adapter
    becomes the active one; use `activate` to switch. Source: Hu et al. 2021, arXiv 2106.09685, equation 3.

    What else is to train is named by `modules_to_save`, `bias` and `trainable_tokens`. It belongs to the adapter: it is
    saved, loaded, switched, merged and ejected with A and B, and the base keeps its own values.

    In a distributed job (torch.distributed with several processes), every process must call inject, and gets the A that
    rank 0 drew, so that all train the same adapter. Processes that inject weights of different shapes, such as the
    stages of a pipeline, keep what each of them drew. Wrap the model (DistributedDataParallel) afterwards.

    Args:
        model: The model to change.
        name: The name of the new adapter: 1 to 64 letters, digits, "_" or "-".
        spec: All other settings as one value, instead of the single arguments. A LoraConfig of PEFT is translated.

    The other arguments are the fields of `LoraSpec`, where they are documented.

    Raises:
        SpecError: Settings are invalid.
        TargetError: A target matches nothing, or matches a weight that cannot carry an adapter.
        StateError: Adapters are merged, or a context is open.

    If an error is raised, the model is unchanged. `find` takes the same arguments and shows what would be done.
    """
    index = ModelIndex(model)
    index.require_ready("inject", computed=True)
    spec = spec_from_arguments(spec, targets, r=r, alpha=alpha, dropout=dropout, exclude=exclude, layers=layers,
                       scaling=scaling, init=init, dtype=dtype, overrides=overrides or (), dora=dora,
                       modules_to_save=modules_to_save, bias=bias, trainable_tokens=trainable_tokens)  # fmt: skip
    plan = resolve(index, spec, name)
    attach(index, plan, name, replacements=_trained_tensors(index, plan) if plan.tensors else ())
    if plan.unsupported:
        left_out = ", ".join(f"{path} ({reason})" for path, reason in list(plan.unsupported.items())[:5])
        warnings.warn(
            f"{len(plan.unsupported)} layers were left out, and will not train: {left_out}"
            + ", ..." * (len(plan.unsupported) > 5), stacklevel=4,
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
    warn_of_cut_graphs(index)  # before anything is changed: a warning may be an error
    modules = index.modules
    adapters = [(s, _new_adapter(modules[s.path], s, factors[s.name] if factors else None)) for s in plan]
    if factors is None:
        share_factors([p for _, adapter in adapters for p in adapter.parameters()])
    states = index.states or [AdapterState()]
    heads = [m for embeddings in find_output_embeddings(index) for m in embeddings.modules()]
    try:
        for s, adapter in adapters:
            module = modules[s.path]
            siblings = adapters_of(module, s.parameter, s.label)
            if siblings is None:
                siblings = AdapterDict(states[0], KINDS[s.kind], s.parameter, s.label, site=s.name, named=s.named)
                siblings.is_head = s.parameter == "weight" and any(module is head for head in heads)
            mount_all(modules, (s.path, *s.aliases), siblings, s.readers)
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
            state.before[name] = state.default.by_name
            state.set_default({name: 1.0})
        _freeze(modules.values())
    except BaseException:
        _remove(ModelIndex(index.model), [name])
        raise
    states[0].root = weakref.ref(getattr(index.model, "_orig_mod", index.model))
    if len(states) == 1:
        ROOTS[index.model] = states[0]
    return index.model


@explains_settings
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
            stacklevel=4,
        )
        for state in index.whole_states:
            state.members = {n: member for n, member in state.members.items() if n not in index.lost}
    if _restore_untouched(index) and (not index.sites or name not in (None, *index.adapter_names)):
        return model
    names = () if name is None else (name,)
    index.require_adapters("eject", *names, merged=True, lost=name is None, computed=not index.merged,
                           superseded=not index.merged)  # fmt: skip
    index.require_idle("eject", names or index.adapter_names)
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
        state.merged = {}
    # After merge(reversible=False) modules still have their original class. unmount expects grafted ones.
    set_grafted(index, True)
    _remove(index, index.adapter_names if name is None else [name])
    return model


def _new_adapter(module: nn.Module, site: Site, loaded: LoadedFactors | None) -> LoraAdapter:
    """Create the adapter of one site, from the factors of a file or freshly drawn, on the device where the weight is
    used."""
    device, kind = execution_device(module, site.parameter), KINDS[site.kind]
    stack, out_features, _ = kind.sizes(site.shape)
    empty = partial(torch.empty, dtype=site.dtype, device=device)
    if loaded is None:
        A, B = empty(*stack, site.r, site.in_features), empty(*stack, site.out_features, site.r)
        m, b = empty(site.out_features) if site.dora else None, None
        A0 = B0 = None
    else:
        A, B = (t.to(device, site.dtype) for t in (loaded.A, loaded.B))
        m, b = (None if t is None else t.to(device) for t in (loaded.m, loaded.b))
        A0, B0 = (None if t is None else t.to(device, site.dtype) for t in (loaded.A0, loaded.B0))
    make: Callable[..., LoraAdapter] = LoraAdapter
    if m is not None or b is not None:
        make = partial(DoraAdapter, module, kind.transposed, m, b)
    elif A0 is not None or (loaded is None and not starts_at_zero(site.init)):
        make = partial(OffsetAdapter, A0, B0)
    adapter = make(
        A, B, alpha=site.alpha, scaling=site.scaling, dropout=site.dropout, init=site.init, slices=site.rows,
        out=out_features, padding_idx=getattr(module, "padding_idx", None) if kind.name == "embedding" else None,
    )  # fmt: skip
    if loaded is None:
        weight = stored_tensor(module, site.parameter)
        assert weight is not None
        adapter.reset_parameters(weight, kind)
    return adapter


def _trained_tensors(index: ModelIndex, plan: Plan) -> list[PlannedReplacement]:
    """Return the tensors of a plan that train as they are, with the values of the base."""
    weights, planned = {name: w for w in model_weights(index) for name in w.names}, []
    for tensor in plan.tensors:
        module = index.modules[tensor.path]
        W0 = module._parameters[tensor.parameter]
        assert W0 is not None
        value = W0.detach() if tensor.ids is None else W0.detach()[list(tensor.ids)]
        value = value.to(execution_device(module, tensor.parameter), tensor.dtype, copy=True)
        planned += replacements(index, weights, module, tensor.parameter, value, tensor.ids)
    return planned


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
            state.revision += 1
            previous = state.before.pop(name, {})
            state.before = {n: previous if [*was] == [name] else was for n, was in state.before.items()}
            active = previous if state.default.active == (name,) else state.default.by_name
            state.set_default({n: t for n, t in active.items() if n in state.before})
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
