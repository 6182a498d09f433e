"""How one weight is merged, W0 -> W0 + s B A: five strategies, by what the weight and its deltas are.

    InPlace       the weight's memory is overwritten tile by tile, and a journal keeps what restores W0
    Untied        the weight shares memory with another module, which keeps W0: the sum goes into a new parameter
    WithExtras    c V + s B A and a bias update (DoRA, replacement tensors) go into new parameters, since the difference
                  from W0 does not have low rank
    Requantized   a quantized weight: dequantized, summed, and quantized again by the same scheme
    Dequantized   a quantized weight: dequantized and summed, and the layer becomes an nn.Linear

A new parameter replaces the original one, which the merge record keeps; the in-place merge alone needs no copy of W0.

Every strategy can measure a merge without writing, write it, and undo it while the merge of the model is under way, so
that the merge of a whole model is all or nothing. Undoing a merge later, from what it left on the weight, is in
revert.py.
"""

from __future__ import annotations

import functools
import itertools
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import MergeError
from ..lora.graft import base_class, change_class
from ..lora.replacement import replace_rows
from ..lora.weight_kinds import is_quantized
from ..numerics.checksum import checksum
from ..numerics.delta import total_gain
from ..numerics.fingerprint import sample_values
from ..numerics.journal import Journal
from ..numerics.threads import ForEach
from ..numerics.tile_merge import DeltaStats, TileMerger, TileWorkspace, max_abs_bound, sum_dtype
from ..numerics.tiled_matmul import TILE, LowRankProduct, fast_product
from .adapted_weight import AdaptedWeight, AdapterDeltas, MergeRecord, as_matrix, have_extras, total_delta
from .quantization import Scheme, find_scheme


class MergeStrategy:
    """The merge of one weight that is W0 now. The base class is for merges that give the weight a new parameter.

    Args:
        weight: The weight, with all adapters' sites.
        deltas: What is to be added.
    """

    codes_changed: float | None = None
    """The share of a quantized weight's codes that changed; None for other weights."""

    def __init__(self, weight: AdaptedWeight, deltas: AdapterDeltas) -> None:
        self.adapted, self.deltas = weight, deltas
        self.original, self.original_bias = weight.weight, weight.bias
        self.module_class = base_class(type(weight.module))
        self.sample = None if is_quantized(weight.module) else sample_values(weight.weight)
        self.merger = TileMerger()

    @property
    def fast_delta(self) -> LowRankProduct:
        """The total delta for a merge that is never undone; for most strategies the exact one."""
        return total_delta(self.deltas)

    def cannot_fail(self) -> bool:
        """True if the sum is known to fit into the weight's dtype, so that it may be written without a way back."""
        return False

    def merge(self, write: bool, undoable: bool, for_each: ForEach, workspace: TileWorkspace) -> str | None:
        """Measure the merge and, if asked to, write it.

        Args:
            write: Write the sum.
            undoable: Keep what `undo` needs, and use the exact delta. Without it, a merge that is written must not
                fail.
            for_each: Calls a function for every tile, in threads.
            workspace: The threads' buffers.

        Returns:
            What is wrong with the sum, or None.
        """
        delta = total_delta(self.deltas) if undoable else self.fast_delta
        if not delta.norm < torch.finfo(sum_dtype(self.original.dtype)).max:
            return f"{self.adapted.name}: s B A is not finite"
        self.merger = TileMerger(workspace)
        try:
            self._merge(delta, write, undoable, for_each)
        except MergeError as e:
            return f"{self.adapted.name}: {e}"
        return None

    def _merge(self, delta: LowRankProduct, write: bool, undoable: bool, for_each: ForEach) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Do what has to wait until the module has no graft."""

    def undo(self) -> None:
        """Restore W0, and the bias, however far the merge has come."""
        self.adapted.weight = self.original
        if self.adapted.bias is not self.original_bias:
            self.adapted.bias = self.original_bias

    def record(self, reversible: bool) -> MergeRecord:
        """Return what is to be left on the weight, once it is merged."""
        merged, bias = self.adapted.weight, self.adapted.bias
        in_place = merged is self.original
        original = self.original if reversible and not in_place else None
        original_bias = self.original_bias if reversible and bias is not self.original_bias else None
        return MergeRecord(
            strategy=type(self).__name__,
            deltas=self.deltas if reversible else {},
            journal=Journal.join(self.merger.journals) if reversible and in_place else None,
            original=original,
            original_bias=original_bias,
            module_class=self.module_class,
            dtype=merged.dtype,
            shape=tuple(merged.shape),
            checksum=0 if original is None else self.adapted.checksum(with_bias=original_bias is not None),
            sample=self.sample,
        )


class TiledMerge(MergeStrategy):
    """A merge whose sum is formed tile by tile, in threads."""

    keeps_journal = False

    @functools.cached_property
    def fast_delta(self) -> LowRankProduct:
        """The total delta for a merge that is never undone, in float32 where that is exact enough."""
        return fast_product([f for parts in self.deltas.values() for f in parts], self.original.dtype)

    def cannot_fail(self) -> bool:
        """True if the largest |W0| plus a bound of |d| is far below overflow; False if W0 holds infinity or NaN."""
        if not self.original.is_contiguous():
            return False
        bound = self.fast_delta.max_abs_bound + max_abs_bound(self.original.detach())
        return bound < torch.finfo(self.original.dtype).max / 2

    def _merge_tiles(self, delta: LowRankProduct, out: Tensor | None, undoable: bool, for_each: ForEach) -> None:
        """Merge into `out`, which may be W0 itself, or only measure if it is None."""
        adapted, W0, merger = self.adapted, self.original, self.merger
        if out is not None and not undoable:
            tiles = enumerate(zip(adapted.tiles(W0, delta), adapted.tiles(out, delta), strict=True))
            for_each(merger.merge_into, ((i, as_matrix(w), d, as_matrix(m)) for i, ((w, d), (m, _)) in tiles))
            return

        def merge_tile(i: int, w0: Tensor, d: LowRankProduct, target: Tensor | None) -> None:
            m = merger.merge(i, as_matrix(w0), d, reversible=undoable and self.keeps_journal)
            if target is not None:
                target.copy_(m.view(target.shape))

        targets = itertools.repeat(None) if out is None else (view for view, _ in adapted.tiles(out, delta))
        pairs = enumerate(zip(adapted.tiles(W0, delta), targets, strict=False))
        for_each(merge_tile, ((i, w0, d, target) for i, ((w0, d), target) in pairs))


class InPlace(TiledMerge):
    """W0 is overwritten, and a journal keeps what restores it."""

    keeps_journal = True

    def _merge(self, delta: LowRankProduct, write: bool, undoable: bool, for_each: ForEach) -> None:
        self._merge_tiles(delta, self.original if write else None, undoable, for_each)

    def undo(self) -> None:
        for i, (view, d) in enumerate(self.adapted.tiles(self.original, total_delta(self.deltas))):
            journal = self.merger.journals.get(i)
            if journal is None or checksum(as_matrix(view)) == journal.before:  # not written yet
                continue
            if (w0 := self.merger.workspace.unmerge(as_matrix(view), d, journal)) is not None:
                view.copy_(w0.view(view.shape))


class Untied(TiledMerge):
    """The sum goes into a new parameter; modules that share W0 keep it."""

    def _merge(self, delta: LowRankProduct, write: bool, undoable: bool, for_each: ForEach) -> None:
        new = nn.Parameter(torch.empty_like(self.original), self.original.requires_grad) if write else None
        self._merge_tiles(delta, new, undoable, for_each)
        if new is not None:
            self.adapted.weight = new


class WithExtras(MergeStrategy):
    """c V + s B A, with a gain c (DoRA) and perhaps a tensor V in W0's place; and the bias with its update.

    The sum is formed in float64, and rounded once.
    """

    def __init__(self, weight: AdaptedWeight, deltas: AdapterDeltas) -> None:
        super().__init__(weight, deltas)
        self.updates = [f.update for parts in deltas.values() for f in parts if f.update is not None]

    def _merge(self, delta: LowRankProduct, write: bool, undoable: bool, for_each: ForEach) -> None:
        W0 = self.original
        new = nn.Parameter(torch.empty_like(W0), W0.requires_grad)
        gain, start = gain_and_start(self.deltas, W0.detach())
        tiles = (self.adapted.tiles(t, delta) for t in (W0, new, start, gain.expand(W0.shape)))
        for i, ((w0, d), (out, _), (v, _), (c, _)) in enumerate(zip(*tiles, strict=True)):
            before = as_matrix(w0).double()
            exact = as_matrix(c) * as_matrix(v).double() + d.dense()
            out.data.copy_(exact.view(out.shape))
            stored = as_matrix(out)
            if bool((before.isfinite() & ~stored.isfinite()).any()):
                raise MergeError(f"the sum is not finite in {out.dtype}")
            finite = before.isfinite()
            change, error = (t.where(finite, 0.0) for t in (exact - before, stored.double() - exact))
            self.merger.stats[i] = DeltaStats.measure(change, error)
        if write:
            self.adapted.weight = new
            if self.updates and (bias := self.original_bias) is not None:
                value = sum((u.double() for u in self.updates), start=bias.double()).to(bias.dtype)
                self.adapted.bias = nn.Parameter(value, bias.requires_grad)


class Requantized(MergeStrategy):
    """Dequantized, summed in float32, and quantized again by the same scheme. Only the new codes tell what survives."""

    def __init__(self, weight: AdaptedWeight, deltas: AdapterDeltas) -> None:
        super().__init__(weight, deltas)
        self.scheme = cast(Scheme, find_scheme(weight.module))

    def _merge(self, delta: LowRankProduct, write: bool, undoable: bool, for_each: ForEach) -> None:
        module = self.adapted.module
        W0, d = self.scheme.dequantize(module), delta.dense().float()
        new = self.scheme.requantize(module, W0 + d)
        self.scheme.install(module, new)
        self._measure(W0, d, self.scheme.dequantize(module))
        self.codes_changed = self.scheme.codes_changed(self.original, new)
        if not write:
            self.undo()

    def _measure(self, W0: Tensor, d: Tensor, M: Tensor) -> None:
        if not bool(M.isfinite().all()):
            raise MergeError("W0 + s B A is not finite as it is stored")
        tiles = zip(*(t.split(max(1, TILE // d.shape[1])) for t in (W0, d, M)), strict=True)
        for i, (w0, part, m) in enumerate(tiles):
            self.merger.stats[i] = DeltaStats.measure(part, m - w0 - part)

    def undo(self) -> None:
        if self.adapted.weight is not self.original:
            self.scheme.install(self.adapted.module, self.original)


class Dequantized(Requantized):
    """Dequantized and summed; the layer becomes an nn.Linear in the dtype of its bias, or in bfloat16."""

    def _merge(self, delta: LowRankProduct, write: bool, undoable: bool, for_each: ForEach) -> None:
        W0, d = self.scheme.dequantize(self.adapted.module), delta.dense().float()
        bias = self.adapted.bias
        M = (W0 + d).to(torch.bfloat16 if bias is None else bias.dtype)
        self._measure(W0, d, M.float())
        if write:
            self.adapted.weight = nn.Parameter(M, requires_grad=False)

    def finish(self) -> None:
        change_class(self.adapted.module, nn.Linear)

    def undo(self) -> None:
        change_class(self.adapted.module, self.module_class)
        self.adapted.weight = self.original


STRATEGIES = {cls.__name__: cls for cls in (InPlace, Untied, WithExtras, Requantized, Dequantized)}


def choose_strategy(weight: AdaptedWeight, deltas: AdapterDeltas, is_tied: bool, dequantize: bool) -> str:
    """Return the name of the strategy that merges these deltas into this weight."""
    if is_quantized(weight.module):
        return "Dequantized" if dequantize else "Requantized"
    if have_extras(deltas):
        return "WithExtras"
    return "Untied" if is_tied else "InPlace"


def can_be_linear(module: nn.Module) -> bool:
    """True if Python lets an object of the module's class become an nn.Linear; for quanto's layers it does not."""
    other = object.__new__(base_class(type(module)))
    try:
        other.__class__ = nn.Linear
    except TypeError:
        return False
    return True


def gain_and_start(deltas: AdapterDeltas, W0: Tensor) -> tuple[Tensor, Tensor]:
    """Return c, which expands to W0's shape, and V, the tensor in W0's place: the merged weight is c V + s P Q.

    Raises:
        MergeError: Several adapters are combined, and one of them replaces the whole tensor.
    """
    parts = [f for group in deltas.values() for f in group]
    values = [f.value for f in parts if f.value is not None]
    if values and len(parts) > 1:
        raise MergeError(
            "one of several adapters replaces the whole tensor, which leaves nothing of the others: merge one at a time"
        )
    gain = total_gain(parts)
    return W0.new_ones(()) if gain is None else gain, replace_rows(W0, *values[0]) if values else W0
