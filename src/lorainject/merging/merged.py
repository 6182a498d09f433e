"""Merge adapters for the time of a context: `merged`.

A model can go from one merged adapter to another without a second copy of its weights: each time W0 is restored from
the journal, to the bit, and the next sum is formed from W0. So any number of switches leaves no trace.

What was merged when a context began is merged again at its end, from copies of the deltas (the factors, which are
small). Contexts may end in another order than they began: a server can begin the next context before it ends the last
one, and goes straight from one adapter to the other.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..lora.active import AdapterState, choose, choosing
from ..lora.model_index import ModelIndex
from ..numerics.modes import in_default_modes
from ..numerics.threads import defer_interrupt
from ..spec import explains_settings
from .adapted_weight import adapted_weights
from .checks import strengths_to_merge
from .merge import Recorded, merge_index, merge_recorded, recorded_deltas, unmerge_index
from .report import MergeReport


@dataclass(eq=False)
class Before:
    """What was merged into a model when a context began."""

    strengths: Mapping[str, float]
    deltas: Recorded


_OPEN: weakref.WeakKeyDictionary[AdapterState, list[Before]] = weakref.WeakKeyDictionary()
"""For every model with open `merged` contexts, what each of them has to restore, the newest last."""


@explains_settings
@contextmanager
def merged(model: nn.Module, names: str | Sequence[str] | Mapping[str, float] | None = None, *,
           strict: bool | None = None, untie: bool = False,
           dequantise: bool = False) -> Iterator[MergeReport]:  # fmt: skip
    """Merge exactly these adapters within this context, and give the weights back to the bit at its end.

    Whatever happens inside, the weights are afterwards what they were before: W0, or what was merged then. A context
    within another one replaces the merged adapters by its own. Nothing of the size of the weights is kept, unless they
    are tied, quantized, or have more than s B A to add (`merge`).

    Unlike the contexts `using` and `rows`, this one acts on the weights, and so on every thread that uses the model.
    While it is open, another thread or task can neither merge nor unmerge.

        with li.merged(model, {"fr": 0.7}) as report:
            print(report)
            model.generate(**inputs)

    Args:
        model: A model with adapters.
        names: The adapters to merge, as for `merge`, but adapters that are active now may be left out.
        strict: As for `merge`.
        untie: As for `merge`.
        dequantise: As for `merge`.

    Yields:
        What became of every weight's delta.

    Raises:
        SpecError: As for `merge`.
        StateError: The model has no such adapter, no adapter is active or named, or a context is open.
        MergeError: Weights cannot be merged, as for `merge`; or, at the end of the context, weights that were changed
            inside cannot be restored.
    """
    index = ModelIndex(model)
    chosen = strengths_to_merge(index, names, instead=True)
    state, before = index.states[0], Before(index.merged_strengths, recorded_deltas(adapted_weights(index.sites)))
    _OPEN.setdefault(state, []).append(before)
    try:
        report = _merge_instead(index, chosen, strict=strict, untie=untie, dequantise=dequantise)
        with choosing(index.states, choose(chosen), "merged"):
            yield report
    finally:
        _leave(model, state, before)


@in_default_modes
@torch.no_grad()
def _merge_instead(index: ModelIndex, chosen: Mapping[str, float], **options: bool | None) -> MergeReport:
    """Merge adapters into W0, whatever was merged before."""
    if index.merged:
        unmerge_index(index)
    return merge_index(index, chosen, reversible=True, **options)  # type: ignore[arg-type]


@in_default_modes
@torch.no_grad()
def _leave(model: nn.Module, state: AdapterState, before: Before) -> None:
    """End a context: restore what it found, or leave that to the context that was begun after it."""
    contexts = _OPEN[state]
    i = contexts.index(before)
    contexts.remove(before)
    if i < len(contexts):
        contexts[i].strengths, contexts[i].deltas = before.strengths, before.deltas
        return
    with defer_interrupt():
        index = ModelIndex(model)
        kept = {name: t for name, t in before.strengths.items() if name in index.adapter_names}
        weights = adapted_weights(index.sites)
        if index.merged_strengths == kept and _are_same(recorded_deltas(weights), before.deltas):
            return
        if index.merged:
            unmerge_index(index)
        if kept:
            merge_recorded(index, weights, before.deltas, kept)


def _are_same(a: Recorded, b: Recorded) -> bool:
    """True if both are of the same merge."""
    return a.keys() == b.keys() and all(a[name][1] is b[name][1] for name in a)
