"""Merge adapters into the weights, W = W0 + s B A, and take them out again to the bit: `merge`, `unmerge`, `deltas`.

However many adapters are merged, the sum is formed from W0 in float32 (float64 for float64 weights), tile by tile, and
rounded once to the weight's dtype. A merged module has its original class, so its forward is the original forward and
costs what the base model's costs.

No copy of W0 is kept. A journal of a few per cent of the weight (numerics/journal.py) and copies of the factors
restore it, so A and B may be trained, replaced or moved meanwhile. Weights that cannot be overwritten (tied,
quantized, or with more than s B A to add) get a new parameter instead, and the original one comes back.

Both verbs change the whole model or nothing. How one weight is merged is in strategies.py, how a merge is undone in
revert.py, and what is checked first in checks.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import MergeError, StateError
from ..lora.active import STATES
from ..lora.model_index import ModelIndex
from ..lora.mounting import graft_obstacles, set_grafted
from ..lora.strength import read_strengths
from ..numerics.delta import Factors
from ..numerics.modes import in_default_modes
from ..numerics.threads import defer_interrupt
from ..numerics.tile_merge import TileWorkspace, sum_dtype
from ..spec import explains_settings
from .adapted_weight import AdaptedWeight, AdapterDeltas, adapted_weights, have_extras, threads_for, total_delta
from .checks import irreversible_weights, quoted, strengths_to_merge, tied_weights, unmergeable_weights
from .report import MergeReport, check_survival, merged_site
from .revert import ADVICE, remerge_on_error, set_merged, unmerge_weights
from .strategies import STRATEGIES, MergeStrategy, choose_strategy, gain_and_start


@explains_settings
@in_default_modes
@torch.no_grad()
def merge(model: nn.Module, names: str | Sequence[str] | Mapping[str, float] | None = None, *,
          reversible: bool = True, strict: bool | None = None, untie: bool = False,
          dequantise: bool = False) -> MergeReport:  # fmt: skip
    """Merge adapters into the weights, in all of them or in none.

    While some adapters are merged, further ones can be merged as well: the sum is always formed from W0, with one
    rounding.

    Args:
        model: A model with adapters.
        names: The adapters to merge, which must include the active ones. None merges the active adapters. A mapping
            gives each adapter a strength, as `activate` describes it. Without one, an active adapter is merged at the
            strength with which it is active, and another one at 1.
        reversible: Keep what `unmerge` needs. If False, nothing is kept, and an interrupt (Ctrl-C) waits until all
            weights are merged.
        strict: What to do where less than 0.9 of a delta survives the rounding to the weight's dtype. True refuses
            before anything is written, False warns (SurvivalWarning), None refuses quantized weights and warns of
            others.
        untie: Give a weight that is tied to a weight of another use (embedding and output head) memory of its own until
            unmerge. Modules that use one weight in the same way have one adapter, and need no untying. Before an untied
            model is exported, set its config's `tie_word_embeddings=False`: transformers 5 sees that the weights
            differ, but other readers go by the config. This unties everything that the class ties: a model with
            further ties (blocks that share their layers, as Zamba's) must not be exported so, since what it stores once
            is drawn anew in the other places. Inject it without embedding and head instead.
        dequantise: Turn quantized layers into nn.Linear, in the dtype of the bias, or in bfloat16 without one. By
            default, they are dequantized, summed and quantized again by the same scheme.

    Returns:
        What became of every weight's delta.

    Raises:
        SpecError: A strength is not a finite number.
        StateError: The adapters are merged already, none is active, or an active one would be left out.
        MergeError: Some weights cannot be merged, all of which are listed: tied to another module's, on the meta
            device, or with a sum that is not finite, for example.

    If an error is raised, the model is unchanged. The exception is an error of the system, such as out of memory,
    during a merge with reversible=False: its message says that weights are half merged.
    """
    index = ModelIndex(model)
    chosen = strengths_to_merge(index, names, reversible=reversible)
    return merge_index(index, chosen, reversible=reversible, strict=strict, untie=untie, dequantise=dequantise)


def merge_index(index: ModelIndex, chosen: Mapping[str, float], *, reversible: bool, strict: bool | None, untie: bool,
                dequantise: bool) -> MergeReport:  # fmt: skip
    """Merge adapters at these strengths, together with those that are merged already (see `merge`)."""
    merged = index.merged_strengths
    weights, ties = adapted_weights(index.sites), tied_weights(index)
    problems = graft_obstacles(index) + unmergeable_weights(weights, [*chosen], {} if untie else ties, dequantise)
    if problems := problems + irreversible_weights(weights):
        raise MergeError("nothing was merged:", problems, "keep these adapters unmerged, or eject them first")
    states = unmerge_weights(weights) if merged else {}
    with remerge_on_error(index, weights, states, merged):
        strategies: list[MergeStrategy] = []
        for w in weights:
            previous = states[w.name].record if w.name in states else None
            available = (previous.deltas if previous else {}) | w.deltas(chosen, copy=reversible)
            # In the order of the model's adapters, so that the bits do not depend on the order of the merges.
            if deltas := {name: available[name] for name in index.adapter_names if name in available}:
                strategy = choose_strategy(w, deltas, w.key in ties, dequantise)
                if previous and not have_extras(deltas):
                    strategy = previous.strategy
                strategies.append(STRATEGIES[strategy](w, deltas))
        return _merge_weights(index, weights, strategies, {**merged, **chosen}, reversible, strict)


@explains_settings
@in_default_modes
@torch.no_grad()
def unmerge(model: nn.Module, names: str | Sequence[str] | None = None) -> nn.Module:
    """Take merged adapters out of the weights again, and return the same model.

    Every weight is W0 again, to the bit, and the adapters are active as before.

    Args:
        model: A model with merged adapters.
        names: The adapters to take out, in any order. They are inactive then, and the weights have the bits that
            merging the remaining ones gives. None takes all of them out.

    Raises:
        StateError: Nothing is merged, or not these adapters.
        MergeError: W0 cannot be restored, after merge(reversible=False) or because a weight's dtype or values were
            changed.

    If an error is raised, the model is unchanged.
    """
    index = ModelIndex(model)
    index.require_adapters("unmerge", merged=True)
    index.require_idle("unmerge")
    if not index.merged:
        raise StateError("nothing is merged", way_out="merge(model) comes first")
    unmerge_index(index, names)
    return model


@torch.no_grad()
def unmerge_index(index: ModelIndex, names: str | Sequence[str] | None = None) -> None:
    """Unmerge these adapters, or all, from a model that has merged ones (see `unmerge`)."""
    merged = index.merged_strengths
    removed = list(merged) if names is None else [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in removed if name not in merged]:
        raise StateError(f"{quoted(unknown)} is not merged", way_out=f"merged are {quoted(merged)}")
    weights = adapted_weights({name: site for name, site in index.sites.items() if site.adapters.state.merged})
    if problems := graft_obstacles(index) + irreversible_weights(weights):
        raise MergeError("nothing was unmerged:", problems, ADVICE)
    recorded = recorded_deltas(weights)
    states = unmerge_weights(weights)
    if remaining := {name: t for name, t in merged.items() if name not in removed}:
        with remerge_on_error(index, weights, states, merged):
            merge_recorded(index, weights, recorded, remaining)
        for state in index.states:
            state.set_default({n: t for n, t in state.default.by_name.items() if n not in removed})
        return
    # Each step can be repeated, so that an unmerge that is interrupted here is finished by the next one.
    set_grafted(index, True)
    for w in weights:
        w.record = None
    set_merged(weights, {})


Recorded = Mapping[str, tuple[str, AdapterDeltas]]
"""What a merge has put into each weight, by the weight's name: the name of the strategy, and the deltas."""


def recorded_deltas(weights: Sequence[AdaptedWeight]) -> Recorded:
    """Return what is merged into the weights now."""
    return {w.name: (record.strategy, record.deltas) for w in weights if (record := w.record) is not None}


def merge_recorded(
    index: ModelIndex, weights: Sequence[AdaptedWeight], recorded: Recorded, strengths: Mapping[str, float]
) -> None:
    """Merge deltas of an earlier merge, of the adapters in `strengths`, into weights that are W0 now."""
    strategies: list[MergeStrategy] = []
    for w in weights:
        w.record = None
        strategy, parts = recorded.get(w.name, ("", {}))
        if kept := {name: parts[name] for name in parts if name in strengths}:
            strategies.append(STRATEGIES[strategy](w, kept))
    _merge_weights(index, weights, strategies, strengths, reversible=True, strict=False)


@explains_settings
def deltas(model: nn.Module, name: str | Mapping[str, float] | None = None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the delta of every adapted weight, formed one weight at a time.

    Args:
        model: A model with adapters, merged or not.
        name: The adapter whose deltas are formed, at strength 1. A mapping from names to strengths sums those of
            several adapters. None sums those of all active adapters, at their strengths; while adapters are merged, of
            all merged ones.

    Yields:
        The name of the weight (the module's path, with the parameter's name appended if that is not `weight`), the
        weight, and its delta s B A in the weight's stored shape, in float32 (float64 for float64 weights). The weight
        is W0, or W0 + s B A while merged. With DoRA or a replacement tensor, the delta is the whole difference from
        W0.

    Raises:
        SpecError: A strength is not a finite number.
        StateError: The model has no adapters, or none of this name.
    """
    index = ModelIndex(model)
    named = None if name is None else read_strengths("deltas", [name])
    index.require_adapters("form deltas", *(named or ()), merged=True, nested=True, part=True)
    for w in adapted_weights(index.sites):
        state, record = w.sites[0].adapters.state, w.record
        chosen = (state.merged or state.choice.by_name) if named is None else named
        if record is None or not have_extras(record.deltas):
            parts = w.deltas(chosen)
        else:  # the gain of DoRA depends on W0, which the weight is not now
            parts = {
                n: tuple(_times(f, chosen[n], state.merged[n]) for f in factors)
                for n, factors in record.deltas.items()
                if n in chosen
            }
        if not parts:
            continue
        d = total_delta(parts).dense().reshape(w.sites[0].shape)
        if have_extras(parts):
            W0 = (w.weight if record is None or record.original is None else record.original).detach()
            gain, start = gain_and_start(parts, W0)
            d = d + gain.double() * start - W0
        yield w.name, w.weight.detach(), d.to(sum_dtype(w.weight.dtype))


def _times(f: Factors, t: float, merged: float) -> Factors:
    """Return the factors at strength t, from those of a merge at another strength."""
    if t == merged:
        return f
    if merged == 0:
        raise StateError(
            "the delta of an adapter with magnitudes (DoRA) or whole tensors cannot be formed while it is merged at"
            " strength 0",
            way_out="call unmerge(model) first",
        )
    return f.times(t / merged)


def _merge_weights(index: ModelIndex, weights: Sequence[AdaptedWeight], strategies: Sequence[MergeStrategy],
                   strengths: Mapping[str, float], reversible: bool, strict: bool | None) -> MergeReport:  # fmt: skip
    """Merge into weights that are all W0 now, in all of them or in none.

    A merge that is not reversible is also not undoable while it is under way if no sum can fail: to keep a way back
    would take half of its time.
    """
    if strict or reversible or not all(strategy.cannot_fail() for strategy in strategies):
        return _carry_out(index, weights, strategies, strengths, reversible, strict)
    try:
        with defer_interrupt():
            report = _carry_out(index, weights, strategies, strengths, reversible, strict, undoable=False)
    except Exception as e:  # from the system, out of memory for example
        raise MergeError(
            "the merge stopped halfway: some weights are merged, and reversible=False kept nothing to restore them",
            way_out="load the base model again",
        ) from e
    check_survival(report.sites, strict)
    return report


def _carry_out(index: ModelIndex, weights: Sequence[AdaptedWeight], strategies: Sequence[MergeStrategy],
               strengths: Mapping[str, float], reversible: bool, strict: bool | None,
               undoable: bool = True) -> MergeReport:  # fmt: skip
    """Merge by these strategies, after a trial that writes nothing if strict; undo everything if anything is raised."""
    workspace = TileWorkspace()
    try:
        for write in (False, True) if strict else (True,):
            with threads_for([s.adapted for s in strategies]) as for_each:
                results = [s.merge(write, write and undoable, for_each, workspace) for s in strategies]
            if problems := [problem for problem in results if problem is not None]:
                advice = "lower alpha, or merge a copy of the model in a wider dtype"
                raise MergeError("nothing was merged:", problems, advice)
            sites = [
                merged_site(s.adapted.name, s.merger.total, s.adapted.weight.nbytes, s.codes_changed)
                for s in strategies
            ]
            if undoable:
                check_survival(sites, strict)
        records = [s.record(reversible) for s in strategies]
        for strategy, record in zip(strategies, records, strict=True):
            strategy.adapted.record = record
        set_grafted(index, False)
        for strategy in strategies:
            strategy.finish()
        set_merged(weights, strengths)
        reported = [replace(site, journal_bytes=record.nbytes) for site, record in zip(sites, records, strict=True)]
        return MergeReport(names=tuple(strengths), strengths=tuple(strengths.values()), sites=tuple(reported))
    except BaseException:
        for strategy in strategies:
            strategy.undo()
            strategy.adapted.record = None
        set_grafted(index, True)
        set_merged(weights, {})
        raise


def _refuse_to_train(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """Raise StateError if an optimizer steps over merged A and B: it would silently train nothing."""
    members = [member() for state in list(STATES) if state.merged for member in state.members.values()]
    merged = {id(p) for adapters in members if adapters is not None for p in adapters.parameters()}
    if merged and any(id(p) in merged for group in optimizer.param_groups for p in group["params"]):
        raise StateError(
            "cannot train while merged: A and B are in the weights, and out of the graph",
            way_out="call unmerge(model) first",
        )


register_optimizer_step_pre_hook(_refuse_to_train)
