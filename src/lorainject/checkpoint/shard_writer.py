"""Write a shard with merged weights: copy its bytes, and pass those of adapted weights through memory, tile by tile.

    M = round(W0 + the sum of all s P Q)        for each tile of a patch (byte_runs.py), by numerics/tile_merge.py

dtypes, shapes and the header stay the same, so the merged bytes take the places of the old ones. A weight may be stored
in several tensors, and a tensor may hold several weights. So what is measured of a weight is summed over its patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import MergeError
from ..files.io.safetensors_file import TORCH_DTYPES, TensorEntry
from ..files.weight_map import StoredPiece
from ..merging.report import MergeReport, merged_site
from ..numerics.delta import Factors
from ..numerics.threads import ForEach, thread_pool
from ..numerics.tile_merge import DeltaStats, TileMerger, TileWorkspace
from ..numerics.tiled_matmul import exact_product, fast_product
from .byte_runs import Patch, cut_into_patches
from .copying import Meter, copy_bytes
from .shards import Shard

NO_STATS = DeltaStats.total(())
KeepJournal = Callable[[str, Patch, TileMerger], None]
"""A function that takes the key on disk, a patch, and the merger that holds the journals of the patch's tiles."""


@dataclass
class WeightUpdate:
    """The deltas of one weight, where the weight is stored, and what has become of the deltas so far."""

    name: str
    dtype: str
    """The data type on disk, as safetensors writes it."""
    shape: tuple[int, ...]
    stacked: bool
    """True if the first axis of the shape counts experts."""
    pieces: tuple[StoredPiece, ...]
    deltas: tuple[Factors, ...]
    """Empty once all pieces are written: A and B may be large."""
    sources: tuple[int, ...] = ()
    """The number of the adapter that each delta comes from."""
    stats: DeltaStats = NO_STATS
    written: set[str] = field(default_factory=set)
    """Keys on disk."""

    @property
    def keys(self) -> set[str]:
        """The tensors on disk that hold a part of the weight."""
        return {piece.key for piece in self.pieces}

    def patches(self, key: str) -> Iterator[Patch]:
        """Yield the patches of one tensor on disk."""
        for piece in self.pieces:
            if piece.key == key:
                yield from cut_into_patches(piece, self.shape, self.stacked, self.deltas)

    def finish(self, key: str) -> None:
        """Note that a tensor on disk is written; free A and B after the last one."""
        self.written.add(key)
        if self.written == self.keys:
            self.deltas = ()


@dataclass
class MergePlan:
    """Everything that a merge will write, checked before anything is written."""

    names: tuple[str, ...]
    """The names of the adapters."""
    strengths: tuple[float, ...]
    """What the delta of each adapter is multiplied with."""
    shards: list[Shard]
    updates: list[WeightUpdate]
    adapters: list[dict[str, Any]] = field(default_factory=list)
    """The adapters and their weights, for the manifest (files/origin.py)."""

    @cached_property
    def updates_of(self) -> dict[str, list[WeightUpdate]]:
        """The updates of each tensor on disk, by its key."""
        by_key: dict[str, list[WeightUpdate]] = {}
        for update in self.updates:
            for key in update.keys:
                by_key.setdefault(key, []).append(update)
        return by_key

    @property
    def changed_shards(self) -> list[Shard]:
        """The shards in which the merge changes something."""
        return [shard for shard in self.shards if not self.updates_of.keys().isdisjoint(shard.tensors)]

    def write(
        self, shard: Shard, source: int, target: int | None, meter: Meter, keep_journal: KeepJournal | None = None
    ) -> None:
        """Copy a shard from one file descriptor to another, with the merged weights in it.

        Without a target, merge only to measure. With `keep_journal`, merge reversibly. Raise MergeError with all
        weights of the shard whose sums are not finite.
        """
        position, problems, workspace = 0, list[str](), TileWorkspace()
        with thread_pool() as for_each:
            for key, entry in shard.tensors.items():
                if key not in self.updates_of:
                    continue
                updates = self.updates_of[key]
                patches = [(update, patch) for update in updates for patch in update.patches(key)]
                overwritten = _is_overwritten(entry, [patch for _, patch in patches])  # then no old byte is copied
                copy_bytes(source, target, position, entry.start if overwritten else entry.stop, meter)
                position = entry.stop
                for update, patch in patches:
                    merger = TileMerger(workspace)
                    try:
                        _merge_patch(patch, merger, entry, source, target, for_each, keep_journal is not None)
                    except MergeError as e:
                        problems.append(f"{update.name}: {e}")
                        continue
                    update.stats = DeltaStats.total((update.stats, merger.total))
                    if keep_journal is not None:
                        keep_journal(key, patch, merger)
                    if overwritten:
                        meter.add(patch.runs.numel * TORCH_DTYPES[entry.dtype].itemsize)
                if target is not None:
                    for update in updates:
                        update.finish(key)
        copy_bytes(source, target, position, shard.size, meter)
        if problems:
            way_out = "lower alpha or the weights, or merge into a copy of the model in a wider dtype"
            raise MergeError("nothing was merged, because some sums overflow:", problems, way_out)

    def reset_statistics(self) -> None:
        """Forget what was measured."""
        for update in self.updates:
            update.stats = NO_STATS

    def report(self) -> MergeReport:
        """Return what became of the deltas."""
        sizes = [math.prod(u.shape) * TORCH_DTYPES[u.dtype].itemsize for u in self.updates]
        sites = [merged_site(u.name, u.stats, size) for u, size in zip(self.updates, sizes, strict=True)]
        return MergeReport(names=self.names, strengths=self.strengths, sites=tuple(sites))


def _is_overwritten(entry: TensorEntry, patches: Sequence[Patch]) -> bool:
    """True if the patches write all bytes of the tensor, without gaps between their runs."""
    covered = sum(patch.runs.numel for patch in patches)
    return covered == math.prod(entry.shape) and all(patch.runs.is_contiguous for patch in patches)


def _merge_patch(patch: Patch, merger: TileMerger, entry: TensorEntry, source: int, target: int | None,
                 for_each: ForEach, reversible: bool) -> None:  # fmt: skip
    """Merge the tiles of a patch from one file descriptor into another, in all threads."""
    factors = patch.factors()
    # The journal needs a product that comes out the same on another machine (see tiled_matmul).
    delta = exact_product(factors) if reversible else fast_product(factors, TORCH_DTYPES[entry.dtype])

    def merge_tile(i: int, rows: slice) -> None:
        w0 = patch.runs.read_tile(source, entry, rows, merger.workspace)
        m = merger.merge(i, w0, delta.select_rows(rows), reversible)
        if target is not None:
            patch.runs.write_tile(target, entry, rows, m)

    for_each(merge_tile, enumerate(delta.tiles()))
