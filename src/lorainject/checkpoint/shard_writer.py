"""The sums that a merge on disk writes: every adapted tensor goes through memory, a tile at a time, on its way from shard to shard.

A parameter may lie in several tensors, and a tensor hold several parameters (patches.py), so what is measured of a parameter is added up.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..errors import MergeError
from ..files.weight_map import StoredPiece
from ..merging.report import MergeReport, merged_site
from ..numerics.delta import Factors
from ..numerics.threads import thread_pool
from ..numerics.tile_merge import DeltaStats, TileMerger, TileWorkspace
from ..numerics.tiled_matmul import LowRankProduct, exact_product, fast_product
from .byte_runs import Patch, patches
from .copying import Meter, copy, hasten
from .shards import BYTES, DTYPES, Shard, Stored


@dataclass
class Sum:
    """A parameter's deltas, where it lies on disk, and what the fold measures."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stacked: bool
    places: tuple[StoredPiece, ...]
    parts: tuple[Factors, ...]
    measured: DeltaStats = field(default_factory=lambda: DeltaStats.total(()))
    """Of what has been folded."""
    norm: float = 0.0
    """Of all of it, once all of it has been written."""
    written: set[str] = field(default_factory=set)
    """Keys on disk."""

    def patches(self, key: str) -> Iterator[Patch]:
        """Of one tensor on disk."""
        return (
            patch
            for place in self.places
            if place.key == key
            for patch in patches(place, self.shape, self.stacked, self.parts)
        )

    def close(self, key: str) -> None:
        """This tensor is written; after the last one A and B are not needed any more."""
        self.written.add(key)
        if self.written == {place.key for place in self.places}:
            self.norm, self.parts = exact_product(self.parts).norm, ()


@dataclass
class MergePlan:
    """All that a merge will write, checked; nothing has been read but headers and a few values."""

    names: tuple[str, ...]
    shards: list[Shard]
    sums: list[Sum]

    def write(
        self,
        shard: Shard,
        source: int,
        target: int | None,
        meter: Meter,
        keep: Callable[[str, Patch, TileMerger], None] | None = None,
    ) -> None:
        """Copy a shard, with the sums in it. Without a target they are only measured; `keep` takes each patch's journal."""
        done, by_key, problems, desk = 0, self._by_key(), [], TileWorkspace()
        with thread_pool() as each:
            for key, stored in shard.tensors.items():
                if key not in by_key:
                    continue
                found = [(s, patch) for s in by_key[key] for patch in s.patches(key)]
                streamed = all(p.whole for _, p in found) and sum(
                    p.width * len(p.starts) for _, p in found
                ) == math.prod(stored.shape)
                if target is not None:
                    copy(source, target, done, stored.start if streamed else stored.stop, meter)
                for s, patch in found:
                    tally = TileMerger(desk)
                    cut = patch.factors()
                    of = exact_product(cut) if keep else fast_product(cut, DTYPES[stored.dtype])
                    try:
                        each(
                            partial(_fold, tally, patch, stored, source, target, of, keep is not None),
                            enumerate(of.tiles()),
                        )
                    except MergeError as e:
                        problems.append(f"{s.name}: {e}")
                        continue
                    s.measured = DeltaStats.total((s.measured, tally.total))
                    if keep is not None:
                        keep(key, patch, tally)
                    if streamed and target is not None:
                        meter.add(patch.width * len(patch.starts) * BYTES[stored.dtype])
                for s in by_key[key] if target is not None else ():
                    s.close(key)
                done = stored.stop
        if target is not None:
            copy(source, target, done, shard.size, meter)
        if problems:
            raise MergeError(
                "nothing was merged:",
                problems,
                "lower alpha or the weights, or merge into a copy of the model in a wider dtype",
            )

    def _by_key(self) -> dict[str, list[Sum]]:
        found: dict[str, list[Sum]] = {}
        for s in self.sums:
            for key in dict.fromkeys(place.key for place in s.places):
                found.setdefault(key, []).append(s)
        return found

    def touches(self, shard: Shard) -> bool:
        """Whether anything in it changes."""
        return not self._by_key().keys().isdisjoint(shard.tensors)

    def forget(self) -> None:
        """What was measured."""
        for s in self.sums:
            s.measured = DeltaStats.total(())

    def report(self) -> MergeReport:
        """What became of the deltas."""
        sites = (
            merged_site(
                s.name,
                exact_product(s.parts).norm if s.parts else s.norm,
                s.measured,
                math.prod(s.shape) * BYTES[s.dtype],
            )
            for s in self.sums
        )
        return MergeReport(names=self.names, sites=tuple(sites))


def get(desk: TileWorkspace, source: int, stored: Stored, patch: Patch, rows: slice) -> Tensor:
    """A tile's elements (runs, width). This thread's next call overwrites them."""
    values = desk.buffer("read", (rows.stop - rows.start, patch.width), DTYPES[stored.dtype])
    for offset, run in _extents(stored, patch, rows, values):
        if os.preadv(source, [run], offset) != len(run):
            raise OSError(errno.EIO, "a shard became shorter while it was read")
    return values


def _fold(
    tally: TileMerger,
    patch: Patch,
    stored: Stored,
    source: int,
    target: int | None,
    of: LowRankProduct,
    keep: bool,
    i: int,
    rows: slice,
) -> None:
    w0 = get(tally.workspace, source, stored, patch, rows)
    m = tally.merge(i, w0, of.select_rows(rows), reversible=keep)
    if target is not None:
        put(target, stored, patch, rows, m)


def put(target: int, stored: Stored, patch: Patch, rows: slice, values: Tensor) -> None:
    """Write a tile back."""
    for offset, run in _extents(stored, patch, rows, values.contiguous()):
        while run:
            n = os.pwrite(target, run, offset)
            if patch.whole:
                hasten(target, offset, n)
            run, offset = run[n:], offset + n


def _extents(stored: Stored, patch: Patch, rows: slice, values: Tensor) -> Iterator[tuple[int, memoryview]]:
    """Where the tile's bytes are in the file, with the memory that holds them: all at once if they follow each other there."""
    raw = memoryview(values.view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]
    starts, size = patch.starts[rows], values.itemsize
    step = len(raw) if patch.whole else patch.width * size
    for i, start in enumerate(starts[:1] if patch.whole else starts):
        yield stored.start + int(start) * size, raw[i * step : (i + 1) * step]
