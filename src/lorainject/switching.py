"""Use the adapters on a model: which are active, for everybody or for one caller, which train, and how strong they are.

`activate` sets the model's default, and with it which parameters require a gradient. The contexts `using`, `disabled`
and `rows` make a choice for their caller (lora/active.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .errors import SpecError, StateError
from .lora.active import AdapterState, Choice, choose, choosing
from .lora.adapter import LoraAdapter
from .lora.dora import DoraAdapter
from .lora.initial_values import why_uninitialized
from .lora.kernels.per_row import RowAssignment
from .lora.model_index import AdaptedSite, ModelIndex, WeightKey, states_to_switch
from .lora.replacement import ReplacementTensor
from .lora.strength import read_strengths, require_strengths
from .numerics.delta import alpha_of
from .spec import explains_settings, is_alpha


@explains_settings
def activate(model: nn.Module, *names: str | Sequence[str] | Mapping[str, float]) -> None:
    """Make exactly these adapters the active ones. Their deltas add up; without names the model computes what its base
    computes.

    A mapping gives each adapter a strength t, W = W0 + the sum of t s B A: `activate(model, {"fr": 0.7, "de": -0.5})`.
    At 0 an adapter has no effect, at 1 (as without a mapping) it is as it was trained, and a negative strength takes
    its effect away. The strength multiplies the adapter's scale, which stays as it is. Where an adapter is more than
    s B A, the weight is interpolated: with magnitudes (DoRA), an update of the bias or a replacement tensor,
    W = W0 + t (W1 - W0) for the weight W1 at strength 1. Compiled code is not compiled again for another strength.

    This is the model's default, which holds for every thread; `using` makes a choice for the caller alone. Exactly the
    parameters of these adapters require a gradient afterwards, except those that were frozen by hand.

    Args:
        model: A model with adapters.
        names: Adapter names, or one list of them, or one mapping from names to strengths.

    Raises:
        SpecError: A strength is not a finite number.
        StateError: The model has no such adapter, adapters are merged, or an adapter with magnitudes (DoRA) or whole
            tensors shares a weight with another of these adapters.
    """
    strengths = _required_strengths(model, names, "activate", "activate")
    for state in states_to_switch(model, "activate", *strengths):
        state.set_default(strengths)


@explains_settings
@contextmanager
def using(model: nn.Module, *names: str | Sequence[str] | Mapping[str, float]) -> Iterator[None]:
    """Let the caller's forwards use exactly these adapters within this context, whatever `activate` says.

    The choice belongs to the thread or the asyncio task that makes it; other threads and tasks do not see it. A task or
    a thread that is started with a copy of the caller's contextvars inherits it. In a generator, the context holds
    while the generator runs, and not for its consumer between two items.

    A backward uses the adapters of its forward, gradient checkpointing included, wherever it runs.

    Args:
        model: A model with adapters.
        names: Adapter names, or one list of them, or one mapping from names to strengths, as for `activate`. Without
            names, the model computes what its base computes.

    Raises:
        SpecError: As for `activate`.
        StateError: As for `activate`.
    """
    strengths = _required_strengths(model, names, "using", "use adapters", nested=True)
    states = states_to_switch(model, "use adapters", *strengths, nested=True)
    _warn_if_frozen(model, states, [*strengths], "using")
    with choosing(states, choose(strengths), "using"):
        yield


@explains_settings
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


@explains_settings
@contextmanager
def rows(model: nn.Module, names: Sequence[str | tuple[str, float] | None]) -> Iterator[None]:
    """Let row i of the batch use the adapter names[i] within this context.

    Every module with adapters must see the batch on axis 0 of its input, followed by at least one more axis (the
    sequence). The choice belongs to the caller, as for `using`. Only adapters that are active by default train: to
    train several in one batch, activate all of them first. For short rows A and B are copied once per row, or once for
    several rows with the same adapter, as long as the copies are no larger than the weight; they are freed with the
    context.

    Args:
        model: A model with adapters.
        names: One entry per row: an adapter name, or a name with a strength as `activate` has it, or None for the base
            model, as in ["fr", ("fr", 0.7), None].

    Raises:
        SpecError: A strength is not a finite number.
        StateError: The model has no such adapter, adapters are merged, or, during a forward, axis 0 of a module's input
            is not certain to be the batch.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise StateError(
            f"rows takes a list with one adapter name per row, not {names!r}",
            way_out='write rows(model, ["fr", None, ("de", 0.7)]) for a batch of three rows',
        )
    pairs = [n if isinstance(n, tuple) and len(n) == 2 else (n, 1.0) for n in names]
    require_strengths("rows", pairs)
    used = tuple(dict.fromkeys(name for name, _ in pairs if name is not None))
    states = states_to_switch(model, "route rows", *used, nested=True)
    _warn_if_frozen(model, states, used, "rows")
    assignment = RowAssignment([name for name, _ in pairs], [float(t) for _, t in pairs])
    with choosing(states, Choice(rows=assignment), "rows"):
        yield


@explains_settings
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
            stacklevel=3,
        )
    return iter(dict.fromkeys(p for tensors in trained.values() for p in tensors))


@explains_settings
def rescale(model: nn.Module, name: str = "default", *, alpha: float | None = None, scale: float | None = None) -> None:
    """Change the scale s of an adapter on all of its weights, for the forward, merge, save and everything else.

    Compiled code is not compiled again. An adapter of several ranks or alphas gets the same alpha, or the same scale,
    on all of its weights. The scale is saved with the adapter; a strength (`activate`) is not, and multiplies it.

    Args:
        model: A model with the adapter.
        name: The adapter's name.
        alpha: The new numerator: s = alpha / r, or alpha / sqrt(r) where the adapter is rank-stabilized.
        scale: The new s itself. Give either of the two.

    Raises:
        SpecError: Not exactly one of the two is given, or it is not a finite number above 0.
        StateError: The model has no such adapter, adapters are merged, or a context is open.
    """
    values = [value for value in (alpha, scale) if value is not None]
    if len(values) != 1 or not is_alpha(values[0]):
        raise SpecError(
            f"rescale takes either alpha or scale, a finite number above 0, not alpha={alpha!r}, scale={scale!r}",
            way_out="write rescale(model, name, alpha=16) or rescale(model, name, scale=2). A strength may be 0 or"
            " negative, as in activate(model, {name: -0.5})",
        )
    index = ModelIndex(model)
    index.require_adapters("rescale", name)
    index.note_change()
    for adapter in index.adapters_named(name):
        new = values[0] if scale is None else alpha_of(scale, adapter.r, adapter.scaling)
        adapter.rescale(new, adapter.scaling)


@explains_settings
def reset(model: nn.Module, name: str | None = None) -> None:
    """Give an adapter the values that `inject` gives it, so that the output is the base model's: A is drawn anew, and
    B is zero; magnitudes and trained tensors are those of the base.

    This is also what gives A and B values after a model that was built on the meta device has got its memory by
    `to_empty`.

    Args:
        model: A model with adapters.
        name: The adapter's name. None resets all adapters.

    Raises:
        StateError: The model has no such adapter, adapters are merged, a context is open, or an adapter was initialized
            by a function that a file does not hold.
    """
    index = ModelIndex(model)
    index.require_adapters("reset", *([] if name is None else [name]))
    names = index.adapter_names if name is None else (name,)
    adapters = [(s, s.adapters[n]) for s in index.sites.values() for n in names if n in s.adapters]
    reasons = [
        f"{adapter.site}: {reason}"
        for site, adapter in adapters
        if not isinstance(adapter, ReplacementTensor)
        and (reason := why_uninitialized(adapter.init, adapter.r, site.module, site.adapters.kind, site.shape))
    ]
    if reasons:
        raise StateError("nothing was reset:", reasons, "eject the adapter, and inject or load it again")
    index.note_change()
    for site, adapter in adapters:
        if any(p.is_meta for p in adapter.parameters()) and not site.weight.is_meta:
            adapter.to_empty(device=site.weight.device)
        adapter.reset_parameters(site.weight, site.adapters.kind)


def _required_strengths(
    model: nn.Module, names: Sequence[Any], verb: str, action: str, nested: bool = False
) -> dict[str, float]:
    """Return the strengths of the adapters that activate or using was called with; raise SpecError or StateError if
    these adapters cannot be active together."""
    strengths = read_strengths(verb, names)
    if len(strengths) > 1:
        index = ModelIndex(model)
        index.require_adapters(action, *strengths, nested=nested, computed=True)
        if conflicts := _conflicts(index.sites, [*strengths]):
            raise StateError(
                "magnitudes (DoRA) and whole tensors cannot be active with another adapter on the same weight:",
                conflicts,
                "activate one of them at a time",
            )
    return strengths


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
