"""The ways of a merge in which a weight gives way to a parameter of its own: tied, with magnitudes, or quantised.

What was there is kept as it is, and comes back itself (see change.InPlace for the way that needs no copy).
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import MergeError
from ..lora.adapter_dict import MergeRecord, Terms
from ..lora.graft import base_class, change_class
from ..lora.replacement import placed
from ..numerics.delta import total_gain
from ..numerics.threads import ForEach
from ..numerics.tile_merge import DeltaStats
from ..numerics.tiled_matmul import LowRankProduct
from .quantization import Scheme, scheme
from .strategies import AdaptedWeight, InPlace, flat, parameter_checksum, summed


class Untied(InPlace):
    """The fold goes into memory of its own; others that share W0 keep it."""

    def _fold(self, of: LowRankProduct, write: bool, keep: bool, each: ForEach) -> None:
        new = nn.Parameter(torch.empty_like(self.before), self.before.requires_grad) if write else None
        self._tiled(of, new, each, keep=False, plain=not keep)
        if new is not None:
            self.w.weight = new

    def undo(self) -> None:
        self.w.weight = self.before

    def folded(self, reversible: bool) -> MergeRecord:
        return self._folded(reversible, None, self.before if reversible else None)


class Tried(Untied):
    """Only what comes out, sum or codes, tells whether it is good."""

    def fits(self) -> bool:
        return False

    @functools.cached_property
    def quick(self) -> LowRankProduct:
        """In float64 too: what is tried first is what is done."""
        return summed(self.terms)


class Exchanged(Tried):
    """c W0 + s B A (DoRA), a tensor that replaces W0, and the bias with its update, in parameters of their own.

    What was there is kept whole, since the difference is not of low rank. The sums are formed in float64, and rounded once.
    """

    def __init__(self, w: AdaptedWeight, terms: Terms) -> None:
        super().__init__(w, terms)
        self.bias, self.updates = w.bias, [f.update for parts in terms.values() for f in parts if f.update is not None]

    def _fold(self, of: LowRankProduct, write: bool, keep: bool, each: ForEach) -> None:
        new = nn.Parameter(torch.empty_like(self.before), self.before.requires_grad)
        c, start = beside(self.terms, self.before.detach())
        tiles = (self.w.tiles(t, of) for t in (self.before, new, start, c.expand(self.before.shape)))
        for i, ((view, d), (out, _), (V, _), (g, _)) in enumerate(zip(*tiles, strict=True)):
            W0 = flat(view).double()
            M = flat(g) * flat(V).double() + d.dense()
            out.data.copy_(M.view(out.shape))
            if bool((W0.isfinite() & ~flat(out).isfinite()).any()):
                raise MergeError(f"the sum is not finite in {out.dtype}")
            change, error = (M - W0).flatten().nan_to_num(), (flat(out).double() - M).flatten().nan_to_num()
            self.tally.stats[i] = DeltaStats(float(change @ change), float(error @ error), float(error @ change))
        self.norm = self.tally.total.asked**0.5
        if write:
            self.w.weight = new
            if self.updates and self.bias is not None:
                value = sum((u.double() for u in self.updates), start=self.bias.double()).to(self.bias.dtype)
                self.w.module._parameters["bias"] = nn.Parameter(value, self.bias.requires_grad)

    def undo(self) -> None:
        super().undo()
        if self.updates:
            self.w.module._parameters["bias"] = self.bias

    def folded(self, reversible: bool) -> MergeRecord:
        folded = super().folded(reversible)
        return (
            replace(folded, bias=self.bias, mark=parameter_checksum(self.w, True))
            if reversible and self.updates
            else folded
        )


class Requantized(Tried):
    """Dequantised, summed, and quantised anew by the same scheme."""

    def __init__(self, w: AdaptedWeight, terms: Terms) -> None:
        super().__init__(w, terms)
        self.scheme = cast(Scheme, scheme(w.module))

    def _fold(self, of: LowRankProduct, write: bool, keep: bool, each: ForEach) -> None:
        W0, d = self.scheme.dequantise(self.w.module), of.dense().float()
        new = self.scheme.requantise(self.w.module, W0 + d)
        self.scheme.install(self.w.module, new)
        self._measure(W0, d, self.scheme.dequantise(self.w.module))
        self.codes_changed = self.scheme.codes_changed(self.before, new)
        if not write:
            self.undo()

    def _measure(self, W0: Tensor, d: Tensor, M: Tensor) -> None:
        if not bool(M.isfinite().all()):
            raise MergeError("W0 + s B A is not finite as it is stored")
        error = (M - W0 - d).flatten()
        d = d.flatten()
        self.tally.stats[0] = DeltaStats(float(d @ d), float(error @ error), float(error @ d))

    def undo(self) -> None:
        if self.w.weight is not self.before:
            self.scheme.install(self.w.module, self.before)


class Dequantized(Requantized):
    """The layer is an nn.Linear, in its bias's dtype, or without one in bfloat16."""

    def _fold(self, of: LowRankProduct, write: bool, keep: bool, each: ForEach) -> None:
        W0, d = self.scheme.dequantise(self.w.module), of.dense().float()
        bias = self.w.module._parameters.get("bias")
        M = (W0 + d).to(torch.bfloat16 if bias is None else bias.dtype)
        self._measure(W0, d, M.float())
        if write:
            self.w.weight = nn.Parameter(M, requires_grad=False)

    def finish(self) -> None:
        change_class(self.w.module, nn.Linear)

    def undo(self) -> None:
        change_class(self.w.module, self.cls)
        self.w.weight = self.before


def can_be_linear(module: nn.Module) -> bool:
    """Whether Python lets such an object become an nn.Linear (quanto's can't)."""
    other = object.__new__(base_class(type(module)))
    try:
        other.__class__ = nn.Linear
    except TypeError:
        return False
    return True


WAYS = {way.__name__: way for way in (InPlace, Untied, Exchanged, Requantized, Dequantized)}


def beside(terms: Terms, W0: Tensor) -> tuple[Tensor, Tensor]:
    """The gain, which expands to W0's shape, and what stands in W0's place: the merged weight is their product, and P Q."""
    parts = [f for each in terms.values() for f in each]
    values = [f.value for f in parts if f.value is not None]
    if values and len(parts) > 1:
        raise MergeError(
            "nothing was merged: one of several adapters replaces the whole tensor", way_out="merge one at a time"
        )
    c = total_gain(parts)
    return W0.new_ones(()) if c is None else c, placed(W0, *values[0]) if values else W0
