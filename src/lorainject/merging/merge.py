"""Fold adapters into the weights, W = W0 + s B A, and take them out again to the bit.

The sum is formed in float32 (float64 for float64 weights), tile by tile, and rounded once to the weight's dtype, however many
adapters are folded. A merged module has its original class, so its forward is the original forward. Instead of W0 a journal is
kept (fold.py), with the factors that were used: A and B may be trained, replaced or moved meanwhile. A weight that can't be
written in place (tied and to be untied, or quantised) gives way to a new parameter, and comes back itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import MergeError, StateError, SurvivalWarning
from ..lora.adapter_dict import Terms
from ..lora.model_index import ModelIndex
from ..lora.weight_graft import graft_obstacles, set_grafted
from ..lora.weight_kinds import is_quantized
from ..numerics.threads import ForEach, defer_interrupt, thread_pool
from ..numerics.tile_merge import DeltaStats, TileWorkspace, sum_dtype
from .checks import tied_weights, why_not_mergeable, why_not_reversible
from .exchange import WAYS, beside
from .strategies import AdaptedWeight, Before, InPlace, adapted_weights, fold_again, summed, unfold

SURVIVAL = 0.9  # of a delta: less is worth a warning, or is refused


@dataclass(frozen=True, kw_only=True)
class MergedSite:
    """What became of one weight's delta d = s B A when W0 + d was rounded to the stored dtype."""

    path: str
    norm: float
    """||d||, Frobenius."""
    survival: float
    """<W - W0, d> / <d, d>: the share of the delta that is really in the stored weight; 1 for a zero delta."""
    error: float
    """||W - W0 - d|| / ||d||; 0 for a zero delta."""
    weight_bytes: int
    journal_bytes: int
    """Kept so that unmerge can be exact, the factors included; 0 after merge(reversible=False)."""
    codes_changed: float | None = None
    """Of a quantised weight, the share of the codes that are others now."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What merge did. Prints as one line."""

    names: tuple[str, ...]
    sites: tuple[MergedSite, ...]

    @property
    def survival(self) -> float:
        """Of all deltas together: the sites' shares, weighted by ||d||^2."""
        asked = sum(s.norm**2 for s in self.sites)
        return sum(s.survival * s.norm**2 for s in self.sites) / asked if asked else 1.0

    @property
    def weight_bytes(self) -> int:
        """Of all folded weights."""
        return sum(s.weight_bytes for s in self.sites)

    @property
    def journal_bytes(self) -> int:
        """Of all that is kept for unmerge."""
        return sum(s.journal_bytes for s in self.sites)

    def __str__(self) -> str:
        return (f"merged {', '.join(self.names)} into {len(self.sites)} weights ({self.weight_bytes:,} bytes, {self.journal_bytes:,} kept"
                f" for unmerge); {self.survival:.4f} of the delta survived the storage dtype")  # fmt: skip


@torch.no_grad()
def merge(model: nn.Module, names: str | Sequence[str] | None = None, *, reversible: bool = True, strict: bool | None = None,
          untie: bool = False, dequantise: bool = False) -> MergeReport:  # fmt: skip
    """Fold the adapters that are on (or `names`, which must include those) into the weights; all or nothing.

    Every module then has its original class and costs what the base costs. While some are merged, `names` folds further ones
    in as well: always from W0, with one rounding. `reversible=False` keeps nothing for unmerge, and an interrupt (Ctrl-C) then waits
    until all is folded.

    Where less than 0.9 of a delta survives the rounding to the weight's dtype, a SurvivalWarning says so; `strict=True` refuses
    instead, before anything is written. A quantised weight is dequantised, summed and quantised anew by the same scheme, which is
    refused below 0.9 unless `strict=False`; `dequantise=True` makes it an ordinary nn.Linear in bfloat16
    (or its bias's dtype) instead.

    `untie=True` gives a tied weight memory of its own until unmerge. (To export such a model, set its config's
    `tie_word_embeddings=False`: transformers 5 sees that the two differ, other readers go by the config.)

    Raises StateError if already merged, if nothing is on, or if an adapter that is on would be left out; MergeError with
    every weight that can't be folded: tied to another module's, on the meta device, or with a result that is not finite.
    """
    index = ModelIndex(model)
    merged = index.merged
    asked = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names or ()))
    if again := [n for n in merged if names is None or n in asked]:
        raise StateError(f"{', '.join(map(repr, again))} is already merged", way_out="unmerge(model) first")
    index.require_adapters("merge", *asked, merged=True)
    active = index.active
    chosen = active if names is None else asked
    if not chosen:
        raise StateError("no adapter is active" if names is None else "no adapter was named",
                         way_out="activate(model, name) first, or say which: merge(model, name)")  # fmt: skip
    if not merged and (dropped := [n for n in active if n not in chosen]):
        raise StateError(f"{', '.join(map(repr, dropped))} is active but would not be merged, which would change the output",
                         way_out=f"activate(model, {', '.join(map(repr, chosen))}) first, or merge all")  # fmt: skip
    weights = adapted_weights(index.sites)
    ties = tied_weights(index)
    asked_of = [w for w in weights if w.adapters(chosen)]
    problems = graft_obstacles(index) + [
        f"{w.name}: {reason}"
        for w in asked_of
        if (reason := why_not_mergeable(w, chosen, {} if untie else ties, dequantise))
    ]
    problems += [
        f"{w.name}: {reason}" for w in weights if (reason := why_not_reversible(w))
    ]  # the sum is formed from W0
    if problems:
        raise MergeError("nothing was merged:", problems, "keep these adapters unmerged, or eject them first")
    before = _unfold(weights) if merged else {}
    with _else_again(index, weights, before, merged):
        jobs, order = [], index.adapter_names
        for w in weights:
            was = before[w.name].folded if w.name in before else None
            found = (was.terms if was else {}) | w.terms(chosen, copy=reversible)
            if terms := {n: found[n] for n in order if n in found}:  # whatever came first
                jobs.append(
                    WAYS[was.how if was and not _beside(terms) else _way(w, terms, w.hosts[0].key in ties, dequantise)](
                        w, terms
                    )
                )
        return _merge(index, jobs, (*merged, *chosen), reversible, strict)


@torch.no_grad()
def unmerge(model: nn.Module, names: str | Sequence[str] | None = None) -> nn.Module:
    """Take out again what was merged: every weight is W0 once more, to the bit, and the adapters are on as before.

    With `names`, those alone, in any order; they are off then, and the weights what merging the others gives.

    Raises StateError if nothing is merged, MergeError (and changes nothing) where W0 can't be given back: after
    merge(reversible=False), or if a weight's dtype or values were changed in between.
    """
    index = ModelIndex(model)
    index.require_adapters("unmerge", merged=True)
    if not index.merged:
        raise StateError("nothing is merged", way_out="merge(model) comes first")
    unmerge_index(index, names)
    return model


@torch.no_grad()
def unmerge_index(index: ModelIndex, names: str | Sequence[str] | None = None) -> None:
    """Unmerge these adapters, or all, from a model that has merged ones (see `unmerge`)."""
    on = {name: site for name, site in index.sites.items() if site.adapters.state.merged}
    merged = index.merged
    gone = merged if names is None else [names] if isinstance(names, str) else list(names)
    if unknown := [n for n in gone if n not in merged]:
        raise StateError(
            f"{', '.join(map(repr, unknown))} is not merged", way_out=f"merged are {', '.join(map(repr, merged))}"
        )
    weights = adapted_weights(on)
    if problems := graft_obstacles(index) + [
        f"{w.name}: {reason}" for w in weights if (reason := why_not_reversible(w))
    ]:
        raise MergeError(
            "nothing was unmerged:", problems, "load the base anew; an adapter's A and B are still there to be saved"
        )
    before = _unfold(weights)
    if left := tuple(n for n in merged if n not in gone):
        with _else_again(index, weights, before, merged):
            kept = {name: {n: t for n, t in was.folded.terms.items() if n in left} for name, was in before.items()}
            jobs = [WAYS[before[w.name].folded.how](w, kept[w.name]) for w in weights if kept.get(w.name)]
            for w in weights:
                w.folded = None
            _merge(index, jobs, left, reversible=True, strict=False)
        for state in index.states:
            state.active = tuple(n for n in state.active if n not in gone)
        return
    # Each step can be done again, so that an unmerge that is interrupted here is finished by the next.
    set_grafted(index, True)
    for w in weights:
        w.folded = None
    _set_merged(index, ())


def _set_merged(index: ModelIndex, names: tuple[str, ...]) -> None:
    for state in index.states:
        state.merged = names


def deltas(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, weight, s B A) for every adapted weight (None: of all adapters that are on, summed), both in the weight's stored shape.

    With DoRA the delta is all that its weight differs by from W0. The name is the path of the module, and the parameter's name behind it
    if that is not `weight`. The weight is W0, or while merged W0 + s B A.
    The delta is formed in float32 (float64 for float64 weights), one weight at a time.
    """
    index = ModelIndex(model)
    index.require_adapters("form deltas", *([] if name is None else [name]), merged=True, nested=True, part=True)
    for w in adapted_weights(index.sites):
        asked = w.hosts[0].adapters.state.active if name is None else (name,)
        terms = (
            w.terms(asked)
            if w.folded is None or not _beside(w.folded.terms)
            else {n: t for n, t in w.folded.terms.items() if n in asked}
        )
        if terms:
            d = summed(terms).dense().reshape(w.hosts[0].shape)
            if _beside(terms):
                W0 = (w.weight if w.folded is None or w.folded.original is None else w.folded.original).detach()
                c, start = beside(terms, W0)
                d = d + c.double() * start - W0
            yield w.name, w.weight.detach(), d.to(sum_dtype(w.weight.dtype))


def _merge(index: ModelIndex, jobs: Sequence[InPlace], names: tuple[str, ...], reversible: bool,
           strict: bool | None) -> MergeReport:  # fmt: skip
    """Fold into weights that are all W0; all or nothing."""
    if strict or reversible or not all(job.fits() for job in jobs):
        return _carry_out(index, jobs, names, reversible, strict)
    # None of these sums can fail, so no way back is kept meanwhile: that would take half of the time.
    try:
        with defer_interrupt():
            report = _carry_out(index, jobs, names, reversible, strict, keep=False)
    except Exception as e:  # the system's (out of memory)
        raise MergeError("the merge broke off with some weights written; reversible=False keeps nothing to go back by",
                         way_out="load the base anew") from e  # fmt: skip
    check_survival(report.sites, strict, stacklevel=4)
    return report


def _carry_out(index: ModelIndex, jobs: Sequence[InPlace], names: tuple[str, ...], reversible: bool, strict: bool | None,
               keep: bool = True) -> MergeReport:  # fmt: skip
    desk = TileWorkspace()
    try:
        for write in (False, True) if strict else (True,):
            with _workers([job.w for job in jobs]) as each:
                problems = [
                    problem for job in jobs if (problem := job.fold(write, write and keep, each, desk)) is not None
                ]
            if problems:
                raise MergeError(
                    "nothing was merged:", problems, "lower alpha, or merge a copy of the model in a wider dtype"
                )
            sites = [merged_site(j.w.name, j.norm, j.tally.total, j.w.weight.nbytes, j.codes_changed) for j in jobs]
            if keep:
                check_survival(sites, strict, stacklevel=6)
        for job in jobs:
            job.w.folded = job.folded(reversible)
        set_grafted(index, False)
        for job in jobs:
            job.finish()
        _set_merged(index, names)
        kept = [job.w.folded.nbytes if job.w.folded else 0 for job in jobs]
        return MergeReport(
            names=names, sites=tuple(replace(site, journal_bytes=n) for site, n in zip(sites, kept, strict=True))
        )
    except BaseException:
        for job in jobs:
            job.undo()
            job.w.folded = None
        set_grafted(index, True)
        _set_merged(index, ())
        raise


def _unfold(weights: Sequence[AdaptedWeight]) -> dict[str, Before]:
    with _workers(weights) as each:
        return unfold(weights, each)


def _workers(weights: Sequence[AdaptedWeight]) -> AbstractContextManager[ForEach]:
    return thread_pool("cpu" if all(w.weight.device.type == "cpu" for w in weights) else "cuda")


def merged_site(
    path: str, norm: float, measured: DeltaStats, weight_bytes: int, codes_changed: float | None = None
) -> MergedSite:
    """A site of which nothing is kept yet."""
    error = measured.lost**0.5 / norm if norm else 0.0
    return MergedSite(path=path, norm=norm, survival=measured.survival, error=error, weight_bytes=weight_bytes, journal_bytes=0,
                      codes_changed=codes_changed)  # fmt: skip


def check_survival(sites: Sequence[MergedSite], strict: bool | None, stacklevel: int) -> None:
    """Warn of what does not survive, or refuse it: with `strict`, or where it is None quantised weights alone."""
    drowned = {
        s: f"{s.path}: {max(s.survival, 0.0):.2f} of its delta, error {s.error:.0%}"
        for s in sites
        if s.survival < SURVIVAL
    }
    refused = [line for s, line in drowned.items() if strict or (strict is None and s.codes_changed is not None)]
    what = f"less than {SURVIVAL} of a delta survives the rounding to the stored weight"
    wider = "merge in a wider dtype (a copy of the model in float32)"
    if refused:
        raise MergeError(
            f"nothing was merged: {what}:",
            refused,
            f"keep the adapter unmerged, {wider}, or accept the loss: strict=False",
        )
    if drowned:
        warning = MergeError(f"{what}:", drowned.values(), f"keep the adapter unmerged, or {wider}")
        warnings.warn(str(warning), SurvivalWarning, stacklevel=stacklevel)


def _way(w: AdaptedWeight, terms: Terms, tied_weights: bool, dequantise: bool) -> str:
    if is_quantized(w.module):
        return "Dequantized" if dequantise else "Requantized"
    return "Exchanged" if _beside(terms) else "Untied" if tied_weights else "InPlace"


def _beside(terms: Terms) -> bool:
    """Whether any of these is more than s B A."""
    return any(f.has_extras for parts in terms.values() for f in parts)


@contextmanager
def _else_again(
    index: ModelIndex, weights: Sequence[AdaptedWeight], before: Mapping[str, Before], merged: Sequence[str]
) -> Iterator[None]:
    """If this fails, what was unfolded for it is folded once more."""
    try:
        yield
    except BaseException:
        if before:
            set_grafted(index, False)
            fold_again(weights, before)
            _set_merged(index, tuple(merged))
        raise


def _refuse_to_train(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """An optimiser that steps over merged A and B would train nothing, in silence."""
    if any(
        p._lora_routing.merged
        for group in optimizer.param_groups
        for p in group["params"]
        if hasattr(p, "_lora_routing")
    ):
        raise StateError(
            "cannot train while merged: A and B are in the weights, and out of the graph",
            way_out="call unmerge(model) first",
        )


register_optimizer_step_pre_hook(_refuse_to_train)
