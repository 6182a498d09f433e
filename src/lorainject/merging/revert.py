"""Undo a finished merge from what it left on the weights: restore W0 in all of them, or in none.

A merge that fails halfway is undone by the strategies that began it (strategies.py).

A weight that was merged in place is restored tile by tile from its journal; one that was given a new parameter gets the
original back. A tile is written only if its checksums say that it is what merge wrote, and that the result is W0. If
one weight fails, the tiles that are W0 already are merged again, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from ..errors import MergeError
from ..lora.graft import change_class
from ..lora.model_index import ModelIndex
from ..lora.mounting import set_grafted
from ..numerics.checksum import checksum, same_bits
from ..numerics.journal import TileJournal
from ..numerics.tile_merge import TileWorkspace
from ..numerics.tiled_matmul import LowRankProduct
from .adapted_weight import AdaptedWeight, MergeRecord, as_matrix, threads_for
from .quantization import find_scheme

CHANGED = (
    "was changed since it was merged (trained, loaded or edited), or s B A has other bits here"
    " (another machine or BLAS library)"
)
ADVICE = "load the base model again; A and B are unchanged, and can be saved"


class MergedState(NamedTuple):
    """A merged weight before it was unmerged: what merging it again needs."""

    record: MergeRecord
    weight: nn.Parameter
    bias: nn.Parameter | None
    module_class: type[nn.Module]


def unmerge_weights(weights: Sequence[AdaptedWeight]) -> dict[str, MergedState]:
    """Restore W0 in all merged weights, or in none; return what was there, by the weight's name. The records stay.

    Raises:
        MergeError: Weights were changed since they were merged, or their W0 does not come out; all are listed.
    """
    states = {
        w.name: MergedState(record, w.weight, w.bias, type(w.module))
        for w in weights
        if (record := w.record) is not None
    }
    restored: list[tuple[Tensor, int, LowRankProduct, Tensor | None]] = []
    failed: list[str] = []
    workspace = TileWorkspace()

    def restore_tile(name: str, view: Tensor, d: LowRankProduct, journal: TileJournal) -> None:
        M = as_matrix(view)
        if (w0 := workspace.unmerge(M, d, journal)) is None:
            if checksum(M) != journal.before:  # an interrupted unmerge has restored this tile already
                failed.append(name)
            return
        # A tile kept whole is restored even if d is rounded differently here; to merge it again then needs M itself.
        can_remerge = journal.gaps is not None or same_bits(workspace.remerge(w0, d), M)
        restored.append((view, journal.before, d, None if can_remerge else M.clone()))
        view.copy_(w0.view(view.shape))

    def remerge_tiles() -> None:
        for view, before, d, copy in restored:
            if checksum(as_matrix(view)) == before:
                view.copy_((workspace.remerge(as_matrix(view), d) if copy is None else copy).view(view.shape))

    with threads_for(weights) as for_each:
        try:
            for w in weights:
                if w.record is not None and w.record.journal is not None:
                    for_each(restore_tile, ((w.name, *tile) for tile in w.journaled_tiles(w.record)))
            if failed:
                raise MergeError(
                    "nothing was unmerged:", [f"{name}: {CHANGED}" for name in dict.fromkeys(failed)], ADVICE
                )
        except BaseException:
            remerge_tiles()
            raise
    for w in weights:
        if (record := w.record) is not None and record.original is not None:
            _install(w, record.strategy, record.original, record.original_bias, record.module_class)
    return states


def remerge_weights(weights: Sequence[AdaptedWeight], states: Mapping[str, MergedState]) -> None:
    """Merge again, to the bit, what `unmerge_weights` has unmerged."""
    workspace = TileWorkspace()
    for w in weights:
        if (state := states.get(w.name)) is None:
            continue
        if state.record.journal is not None:
            for view, d, journal in w.journaled_tiles(state.record):
                if checksum(as_matrix(view)) == journal.before:
                    view.copy_(workspace.remerge(as_matrix(view), d).view(view.shape))
        else:
            _install(w, state.record.strategy, state.weight, state.bias, state.module_class)
        w.record = state.record


@contextmanager
def remerge_on_error(
    index: ModelIndex,
    weights: Sequence[AdaptedWeight],
    states: Mapping[str, MergedState],
    strengths: Mapping[str, float],
) -> Iterator[None]:
    """Restore the previous merge, of adapters at these strengths, if an error is raised within the context."""
    try:
        yield
    except BaseException:
        if states:
            set_grafted(index, False)
            remerge_weights(weights, states)
            set_merged(weights, strengths)
        raise


def set_merged(weights: Sequence[AdaptedWeight], strengths: Mapping[str, float]) -> None:
    """Record in the state of every site which adapters are merged, and at which strengths."""
    for w in weights:
        for site in w.sites:
            site.adapters.state.merged = dict(strengths)


def _install(
    w: AdaptedWeight, strategy: str, weight: nn.Parameter, bias: nn.Parameter | None, module_class: type[nn.Module]
) -> None:
    """Install a parameter, together with the bias and the class of the module that belong to it."""
    if strategy == "Requantized" and (scheme := find_scheme(w.module)) is not None:
        scheme.install(w.module, weight)
    else:
        w.weight = weight
    if type(w.module) is not module_class:
        change_class(w.module, module_class)
    if bias is not None:  # last, because an interrupted unmerge tells by the weight how far it came
        w.bias = bias
