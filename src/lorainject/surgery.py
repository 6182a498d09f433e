"""Put adapters onto a model, switch them, and take them off again: inject, activate, disabled, rows, parameters, eject."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import GraftError, StateError
from .lora.active import ROOTS, AdapterState
from .lora.adapter import LoraAdapter
from .lora.adapter_dict import (
    FROZEN,
    AdaptedSite,
    AdapterDict,
    adapter_states,
    adapters_of,
    execution_device,
    hosts,
    merged_names,
    mounted,
    names_of,
    ready,
    switches,
    walk,
)
from .lora.dora import DoraAdapter
from .lora.kernels.per_row import RowAssignment
from .lora.kernels.shared_input import SharedInput
from .lora.replacement import ReplacementTensor
from .lora.weight_graft import graft_obstacles, mount, set_grafted, unmount
from .lora.weight_kinds import KINDS, WHOLE, is_sharded, kind_of, weight_shape
from .merging.merge import unmerge
from .plan import Plan, Site
from .spec import LoraSpec, Override, Target
from .targets.resolve import find
from .targets.roles import input_group

Given = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""A and B of a file, and m and b if it has them (payload.py)."""


class PlannedReplacement(NamedTuple):
    """A tensor of a module (under all its paths) that an adapter replaces, and the modules beside its own that read it."""

    paths: tuple[str, ...]
    parameter: str
    readers: tuple[tuple[str, nn.Module], ...]
    adapter: ReplacementTensor


def inject(model: nn.Module, targets: Target | Sequence[Target] | None = None, r: int = 8, *, alpha: float | None = None,
           dropout: float = 0.0, exclude: Target | Sequence[Target] = (), layers: Sequence[int] | None = None,
           scaling: str = "standard", init: str = "kaiming", dtype: torch.dtype | None = None,
           overrides: Mapping[str, Mapping[str, float]] | Sequence[Override] | None = (), name: str = "default",
           spec: LoraSpec | None = None) -> nn.Module:  # fmt: skip
    """Put LoRA, W0 + s B A, onto the matched weights of `model`, in place, and return the same object.

    The arguments are documented at LoraSpec. The base is frozen, A and B train, and since B = 0 the output is the base's.
    The new adapter is the one that is on; `activate` switches. Source: arXiv 2106.09685, eq. 3.

    Raises SpecError or TargetError with all that is wrong (see `find`), StateError while merged; the model is then unchanged.
    """
    ready(model, "inject")
    plan = find(model, targets, r, alpha=alpha, dropout=dropout, exclude=exclude, layers=layers, scaling=scaling, init=init,
                dtype=dtype, overrides=overrides, name=name, spec=spec)  # fmt: skip
    return attach(model, plan, name)


def attach(model: nn.Module, plan: Plan, name: str, factors: Mapping[str, Given] | None = None,
           replaced: Sequence[PlannedReplacement] = ()) -> nn.Module:  # fmt: skip
    """Carry out a plan that `find` has checked. `factors` holds A and B (m and b) by site name; without it they are drawn afresh.

    All memory is taken before the first module is changed.
    """
    modules = dict(walk(model))
    adapters = [(s, _low_rank(modules[s.path], s, factors[s.name] if factors else None)) for s in plan]
    state = adapter_states(model) or [AdapterState()]
    try:
        for s, adapter in adapters:
            module = modules[s.path]
            if (own := adapters_of(module, s.parameter, s.label)) is None:
                own = AdapterDict(state[0], KINDS[s.kind], s.parameter, s.label, named=s.named)
            mount((s.path, *s.aliases), module, own, [(path, modules[path]) for path in s.readers])
            vars(adapter)["training"] = module.training  # not by train(), which takes 5 us
            own[name] = adapter
        for new in replaced:
            module = modules[new.paths[0]]
            if (own := adapters_of(module, new.parameter)) is None:
                own = AdapterDict(state[0], kind_of(module, new.parameter) or WHOLE, new.parameter)
            mount(new.paths, module, own, [*new.readers, (new.paths[0], module)])
            own[name] = new.adapter
        _introduce(modules)
        for each in state:
            each.before[name], each.active = each.active, (name,)
        _freeze(modules)
    except BaseException:
        _remove(model, name)
        raise
    state[0].root = weakref.ref(getattr(model, "_orig_mod", model))
    if len(state) == 1:
        ROOTS[model] = state[0]
    return model


def eject(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take one adapter off the model, or all of them: then it is as it was before inject, to the bit.

    What is merged is unmerged first; after merge(reversible=False) the folded weights stay. Raises GraftError, before
    anything is changed, if somebody (FSDP, parametrize, a patch of forward) has built on a grafted class since.
    """
    if _finish(model) and not hosts(model):
        return model
    on = mounted(model, "eject", *([] if name is None else [name]), merged=True)
    problems = graft_obstacles(model)
    problems += [
        f"{path}: its A and B are sharded"
        for path, host in on.items()
        if any(map(is_sharded, host.adapters.parameters()))
    ]
    if problems:
        raise GraftError(
            "nothing was ejected:", problems, "undo what was built on top, in reverse order, and eject then"
        )
    if any(host.adapters.folded and host.adapters.folded.reversible for host in on.values()):
        unmerge(model)
    elif name is not None and merged_names(model):
        raise StateError(
            f"can't eject {name!r} alone after merge(reversible=False)",
            way_out="eject(model) leaves the folded weights",
        )
    for state in adapter_states(model):
        state.merged = ()
    set_grafted(
        model, True
    )  # what stays merged has its own classes still; unmount then takes off one graft after the other
    for each in names_of(model) if name is None else (name,):
        _remove(model, each)
    return model


def activate(model: nn.Module, *names: str) -> None:
    """Switch on exactly these adapters (their terms add up); none: the base alone. One list of names is taken too.

    Raises StateError for unknown names.

    Not between a forward with gradient checkpointing and its backward, which runs the forward once more.
    """
    if len(names) == 1 and isinstance(names[0], list | tuple):
        names = tuple(names[0])
    if len(names) > 1 and (shared := _shared(mounted(model, "activate", *names), names)):
        raise StateError("magnitudes (DoRA) and whole tensors can't be on with another adapter of the same weight:", shared,
                         "activate one at a time")  # fmt: skip
    for state in switches(model, "activate", *names):
        state.active = tuple(dict.fromkeys(names))


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes what its base computes, in every thread. Run its backward within it too."""
    with _routed(switches(model, "disable the adapters", nested=True), active=(), rows=None, context="disabled"):
        yield


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within this context row i of the batch (axis 0) uses the adapter names[i], or the base where that is None.

    Every module with adapters must see the batch on axis 0 of its input, before at least one axis more (the sequence); one
    that does not, or may not, raises StateError. Run a backward within the context too. For short rows A and B are copied for
    each row, or once for several of the same adapter, as long as that is no larger than the weight itself; the copies go with the context.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise StateError(
            f"rows takes a list with one name per row, not {names!r}",
            way_out='rows(model, ["fr", None, "de"]) for a batch of three',
        )
    with _routed(
        switches(model, "route rows", *(n for n in names if n is not None), nested=True),
        rows=RowAssignment(names),
        context="rows",
    ):
        yield


def parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """A and B of the adapters that are on, for an optimiser. Raises StateError while merged, or if none is on: nothing would train."""
    on = mounted(model, "train", nested=True, part=True)
    adapters = [
        host.adapters[name] for host in on.values() for name in host.adapters.state.active if name in host.adapters
    ]
    if not adapters:
        raise StateError("no adapter is on", way_out="activate(model, name) first")
    return iter(dict.fromkeys(p for adapter in adapters for p in adapter.parameters() if p.requires_grad))


def _introduce(modules: Mapping[str, nn.Module]) -> None:
    """Those to each other that probably read the same input."""
    families: dict[tuple[str, int], list[AdapterDict]] = {}
    for path, module in modules.items():
        for own in module._modules.values():
            if (
                isinstance(own, AdapterDict)
                and own.kind.form == "linear"
                and (family := input_group(path) or (own.label and path))
            ):
                families.setdefault((family, own.kind.sizes(weight_shape(module, own.parameter))[2]), []).append(own)
    for members in families.values():
        siblings = SharedInput(dict.fromkeys(members))
        for each in members:
            each.siblings = siblings


def _low_rank(module: nn.Module, site: Site, factors: Given | None) -> LoraAdapter:
    device, kind = execution_device(module, site.parameter), KINDS[site.kind]
    make: Callable[..., LoraAdapter] = LoraAdapter
    stack, out, _ = kind.sizes(site.shape)
    if factors is None:
        A = torch.empty(*stack, site.r, site.in_features, dtype=site.dtype, device=device)
        B = torch.empty(*stack, site.out_features, site.r, dtype=site.dtype, device=device)
    else:
        A, B, *beside = factors
        A, B = A.to(device, site.dtype), B.to(device, site.dtype)
        m, b = (None if t is None else t.to(device) for t in beside)
        if m is not None or b is not None:
            make = partial(DoraAdapter, module, kind.transposed, m, b)
    adapter = make(
        A, B, alpha=site.alpha, scaling=site.scaling, dropout=site.dropout, init=site.init,
        padding_idx=getattr(module, "padding_idx", None) if kind.name == "embedding" else None, slices=site.rows, out=out,
    )  # fmt: skip
    if factors is None:
        adapter.reset_parameters()
    return adapter


def _shared(on: Mapping[str, AdaptedSite], names: Sequence[str]) -> list[str]:
    """The weights that several of these adapters are on, one with magnitudes or as a whole."""
    by_place: dict[tuple[int, str], dict[str, str]] = {}
    for at, host in on.items():
        by_place.setdefault(host.place, {}).update({n: at for n in names if n in host.adapters})
    alone = {
        host.place for host in on.values() for n in names if n in host.adapters and _stands_alone(host.adapters[n])
    }
    return [
        f"{next(iter(found.values()))}: {', '.join(found)}"
        for place, found in by_place.items()
        if len(found) > 1 and place in alone
    ]


def _stands_alone(adapter: LoraAdapter) -> bool:
    return isinstance(adapter, ReplacementTensor) or (isinstance(adapter, DoraAdapter) and adapter.m is not None)


def _freeze(modules: Mapping[str, nn.Module]) -> None:
    for module in modules.values():
        if training := {n: p for n, p in module._parameters.items() if p is not None and p.requires_grad}:
            module.__dict__[FROZEN] = (*module.__dict__.get(FROZEN, ()), *training)
            for p in training.values():
                p.requires_grad_(False)


def _remove(model: nn.Module, name: str) -> None:
    """Take the adapter off wherever it is; with the last one gone, the classes and requires_grad flags go back too."""
    for each in adapter_states(model):
        gone = each.before.pop(name, ())
        each.before = {n: gone if was == (name,) else was for n, was in each.before.items()}
        active = gone if each.active == (name,) else each.active
        each.active = tuple(n for n in active if n in each.before)
    for host in hosts(model).values():
        if name in host.adapters:
            del host.adapters[name]
    _finish(model)


def _finish(model: nn.Module) -> bool:
    """Whatever carries no adapter any more is as it was before; whether there was such. Finishes an eject that was interrupted, too."""
    empty = [host for host in hosts(model).values() if not list(host.adapters)]
    if empty:
        unmount(model, empty)
    frozen = {id(module): module for _, module in walk(model) if FROZEN in module.__dict__} if not hosts(model) else {}
    for module in frozen.values():
        for n in module.__dict__[FROZEN]:
            if (p := module._parameters.get(n)) is not None:
                p.requires_grad_(True)
        del module.__dict__[FROZEN]
    return bool(empty or frozen)


@contextmanager
def _routed(found: Sequence[AdapterState], **changes: object) -> Iterator[None]:
    saved = [(state, {key: getattr(state, key) for key in changes}) for state in found]
    try:
        for state, _ in saved:
            vars(state).update(changes)
        yield
    finally:
        for state, before in saved:
            vars(state).update(before)
