"""One weight on its way from W0 to W0 + s B A and back: in place with a journal, or in a parameter of its own.

Each way can be measured without writing, carried out, undone while the merge is under way, and taken back from what was left on the
weight (Folded), so that the merge of a whole model is all or nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import MergeError
from ..lora.adapter import LoraAdapter, delta_factors
from ..lora.adapter_dict import MergeRecord, Terms
from ..lora.graft import base_class, change_class
from ..lora.model_index import AdaptedSite
from ..lora.weight_kinds import is_quantized
from ..numerics.checksum import checksum, same_bits
from ..numerics.delta import clone_factors, flatten_factors
from ..numerics.fingerprint import sample_values
from ..numerics.journal import Journal, TileJournal
from ..numerics.threads import ForEach
from ..numerics.tile_merge import TileMerger, TileWorkspace, max_abs_bound, sum_dtype
from ..numerics.tiled_matmul import TILE, LowRankProduct, exact_product, fast_product
from .quantization import scheme


@dataclass
class AdaptedWeight:
    """One weight with all that is adapted of it: the whole, or several slices."""

    name: str
    hosts: tuple[AdaptedSite, ...]

    @property
    def module(self) -> nn.Module:
        """Whose weight it is."""
        return self.hosts[0].module

    @property
    def weight(self) -> nn.Parameter:
        """As stored."""
        return self.module._parameters[self.hosts[0].adapters.parameter]  # type: ignore[return-value]

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        self.module._parameters[self.hosts[0].adapters.parameter] = value

    def adapters(self, names: Sequence[str]) -> list[LoraAdapter]:
        """Those of these names."""
        return [host.adapters[n] for n in names for host in self.hosts if n in host.adapters]

    @property
    def folded(self) -> MergeRecord | None:
        """What merge left: on the first of its hosts that says so."""
        return next((host.adapters.folded for host in self.hosts if host.adapters.folded is not None), None)

    @folded.setter
    def folded(self, value: MergeRecord | None) -> None:
        for host in self.hosts:
            host.adapters.folded = value

    def terms(self, names: Sequence[str], copy: bool = False) -> Terms:
        """The deltas of these adapters as they are now, in the stored orientation; copies, if they are to stay so."""
        kind, shape = self.hosts[0].adapters.kind, self.hosts[0].shape
        rest = tuple(shape[kind.stacked + 1 :])
        found = {n: [a(delta_factors, kind.transposed, rest) for a in self.adapters([n])] for n in names}
        return {
            n: tuple(clone_factors(f) if copy else flatten_factors(f) for f in parts)
            for n, parts in found.items()
            if parts
        }

    def tiles(self, weight: Tensor, of: LowRankProduct) -> Iterator[tuple[Tensor, LowRankProduct]]:
        """Each tile (rows, *rest), a view of the weight, with its delta."""
        return ((W[rows], d.select_rows(rows)) for W, d in self.matrices(weight, of) for rows in d.tiles())

    def matrices(self, weight: Tensor, of: LowRankProduct) -> Iterator[tuple[Tensor, LowRankProduct]]:
        """Each of a stack, or the weight itself, with its delta."""
        whole = zip(weight, of.P, of.Q, strict=True) if self.hosts[0].adapters.kind.stacked else [(weight, of.P, of.Q)]
        return ((W, LowRankProduct(P, Q, of.s)) for W, P, Q in whole)

    @property
    def bias(self) -> nn.Parameter | None:
        """Its module's."""
        return self.module._parameters.get("bias")

    def kept_tiles(self, folded: MergeRecord) -> Iterator[tuple[Tensor, LowRankProduct, TileJournal]]:
        """The same of what is merged in place, each with what was kept of it."""
        assert folded.journal is not None
        found = list(self.tiles(self.weight, summed(folded.terms)))
        return (
            (*tile, kept)
            for tile, kept in zip(found, folded.journal.tiles(view.numel() for view, _ in found), strict=True)
        )


def adapted_weights(on: Mapping[str, AdaptedSite]) -> list[AdaptedWeight]:
    """The adapted weights, each once."""
    places: dict[tuple[int, str], list[tuple[str, AdaptedSite]]] = {}
    for name, host in on.items():
        places.setdefault(host.key, []).append((name.removesuffix(f"[{host.adapters.label}]"), host))
    return [AdaptedWeight(slices[0][0], tuple(host for _, host in slices)) for slices in places.values()]


class InPlace:
    """W0 gives way to M, tile by tile, and a journal remembers it."""

    codes_changed: float | None = None
    norm = 0.0
    """|d|, Frobenius."""

    def __init__(self, w: AdaptedWeight, terms: Terms) -> None:
        self.w, self.terms, self.before, self.cls = w, terms, w.weight, base_class(type(w.module))
        self.sample = None if is_quantized(w.module) else sample_values(w.weight)
        self.tally = TileMerger()

    def fold(self, write: bool, keep: bool, each: ForEach, desk: TileWorkspace) -> str | None:
        """Measure; write, and keep the way back, too. What is wrong, or None."""
        of = summed(self.terms) if keep else self.quick
        self.norm = of.norm
        if not self.norm < torch.finfo(sum_dtype(self.before.dtype)).max:
            return f"{self.w.name}: s B A is not finite"
        try:
            self.tally = TileMerger(desk)
            self._fold(of, write, keep, each)
        except MergeError as e:
            return f"{self.w.name}: {e}; nothing was merged"
        return None

    @functools.cached_property
    def quick(self) -> LowRankProduct:
        """The deltas, for a sum in place that nobody takes out again."""
        return fast_product([f for parts in self.terms.values() for f in parts], self.before.dtype)

    def fits(self) -> bool:
        """Whether the sum can't overflow: then it may be written at once, and nothing kept for the case that it does."""
        bound = (
            self.quick.max_abs_bound + max_abs_bound(self.before.detach()) if self.before.is_contiguous() else math.inf
        )
        return bound < torch.finfo(self.before.dtype).max / 2  # not if NaN or infinity is in it

    def _fold(self, of: LowRankProduct, write: bool, keep: bool, each: ForEach) -> None:
        self._tiled(of, self.before if write else None, each, keep, plain=not keep)

    def _tiled(self, of: LowRankProduct, target: Tensor | None, each: ForEach, keep: bool, plain: bool) -> None:
        if plain and target is not None:
            each(self.tally.measure, ((i, flat(W), d) for i, (W, d) in enumerate(self.w.matrices(self.before, of))))
            both = zip(self.w.tiles(self.before, of), self.w.tiles(target, of), strict=True)
            each(self.tally.workspace.merge_into, ((flat(view), d, flat(out)) for (view, d), (out, _) in both))
            return

        def fold(i: int, view: Tensor, d: LowRankProduct, out: Tensor | None) -> None:
            m = self.tally.merge(i, flat(view), d, keep)
            if out is not None:
                out.copy_(m.view(out.shape))

        outs = itertools.repeat(None) if target is None else (out for out, _ in self.w.tiles(target, of))
        each(
            fold,
            ((i, *tile, out) for i, (tile, out) in enumerate(zip(self.w.tiles(self.before, of), outs, strict=False))),
        )

    def finish(self) -> None:
        """What has to wait until the grafts are off."""

    def undo(self) -> None:
        """W0 again, wherever M is already."""
        for i, (view, d) in enumerate(self.w.tiles(self.before, summed(self.terms))):
            kept = self.tally.journals.get(i)
            if kept is None or checksum(flat(view)) == kept.before:
                continue
            if (w0 := self.tally.workspace.unmerge(flat(view), d, kept)) is not None:
                view.copy_(w0.view(view.shape))

    def folded(self, reversible: bool) -> MergeRecord:
        """What is left on the weight."""
        return self._folded(reversible, Journal.join(self.tally.journals) if reversible else None, None)

    def _folded(self, reversible: bool, journal: Journal | None, original: nn.Parameter | None) -> MergeRecord:
        like = (self.w.weight.dtype, tuple(self.w.weight.shape))
        return MergeRecord(how=type(self).__name__, terms=self.terms if reversible else {}, journal=journal, original=original, cls=self.cls,
                      like=like, mark=0 if original is None else parameter_checksum(self.w), sample=self.sample)  # fmt: skip


class Before(NamedTuple):
    """A folded weight, as it was before it was unfolded."""

    folded: MergeRecord
    weight: nn.Parameter
    bias: nn.Parameter | None
    cls: type[nn.Module]


def unfold(weights: Sequence[AdaptedWeight], each: ForEach) -> dict[str, Before]:
    """W0 again in all of them, in place or as the parameter that it was; what was there, by name. All or nothing.

    Raises MergeError with every weight that does not come out as W0.
    """
    before = {w.name: Before(w.folded, w.weight, w.bias, type(w.module)) for w in weights if w.folded is not None}
    done: list[tuple[Tensor, int, LowRankProduct, Tensor | None]] = []
    stuck: list[str] = []
    desk = TileWorkspace()

    def take_out(name: str, view: Tensor, d: LowRankProduct, kept: TileJournal) -> None:
        """One tile."""
        M = flat(view)
        if (w0 := desk.unmerge(M, d, kept)) is None:
            if checksum(M) != kept.before:  # else an unmerge that was interrupted has been here
                stuck.append(name)
            return
        again = kept.gaps is not None or same_bits(desk.remerge(w0, d), M)
        done.append((view, kept.before, d, None if again else M.clone()))  # before it is written
        view.copy_(w0.view(view.shape))

    try:
        for w in weights:
            if w.folded is not None and w.folded.journal is not None:
                each(take_out, ((w.name, *tile) for tile in w.kept_tiles(w.folded)))
        if stuck:
            problems = [f"{name}: was changed since it was merged (trained, loaded or edited), or s B A comes out otherwise here"
                        " (another machine or BLAS library)" for name in dict.fromkeys(stuck)]  # fmt: skip
            raise MergeError(
                "nothing was unmerged:",
                problems,
                "load the base anew; an adapter's A and B are still there to be saved",
            )
    except BaseException:
        for view, w0, d, M in done:
            if checksum(flat(view)) == w0:
                view.copy_((desk.remerge(flat(view), d) if M is None else M).view(view.shape))
        raise
    for w in weights:
        if w.folded is not None and w.folded.original is not None:
            _put(w, w.folded.how, w.folded.original, w.folded.bias, w.folded.cls)
    return before


def fold_again(weights: Sequence[AdaptedWeight], before: Mapping[str, Before]) -> None:
    """What `unfold` took out, to the bit."""
    desk = TileWorkspace()
    for w in weights:
        if (was := before.get(w.name)) is not None:
            if was.folded.journal is not None:
                for view, d, kept in w.kept_tiles(was.folded):
                    if checksum(flat(view)) == kept.before:
                        view.copy_(desk.remerge(flat(view), d).view(view.shape))
            else:
                _put(w, was.folded.how, was.weight, was.bias, was.cls)
            w.folded = was.folded


def _put(w: AdaptedWeight, how: str, weight: nn.Parameter, bias: nn.Parameter | None, cls: type[nn.Module]) -> None:
    """Exchange the parameter, and what goes with it."""
    if how == "Requantized" and (found := scheme(w.module)) is not None:
        found.install(w.module, weight)
    else:
        w.weight = weight
    if type(w.module) is not cls:
        change_class(w.module, cls)
    if bias is not None:  # last: by the weight an unmerge that was interrupted knows where it was
        w.module._parameters["bias"] = bias


def summed(terms: Terms) -> LowRankProduct:
    """The sum of the deltas, as it comes out the same each time."""
    return exact_product([f for parts in terms.values() for f in parts])


def parameter_checksum(w: AdaptedWeight, bias: bool = False) -> int:
    """By which a parameter of its own is known again: a checksum of all of it, and of its layer's bias if that is exchanged too."""
    found = scheme(w.module)
    values = w.weight.detach() if found is None else found.codes(w.weight)
    parts = [*values.reshape(-1).split(TILE), *([w.bias.detach()] if bias and w.bias is not None else [])]
    return sum((2 * i + 1) * checksum(part) for i, part in enumerate(parts))


def flat(view: Tensor) -> Tensor:
    """(rows, width), contiguous."""
    return view.detach().reshape(len(view), -1).contiguous()
