"""Merge a delta into one tile of a weight, and take it out again to the bit.

    merge      M  = round(W0 + d)
    unmerge    W0 = round(M - d), corrected by the tile's journal (journal.py)        d = s P Q (tiled_matmul.py)

A tile has shape (rows, width) and is contiguous. The sum is formed in float32, or in float64 for a float64 weight,
from d rounded to that dtype, and is rounded once to the weight's dtype. The delta is finite; W0 may hold infinity and
NaN.

How much of the delta survives the rounding (`DeltaStats`) is measured on every element, block by block, while W0, d and
M are in the cache: a sample is wrong by any amount where a delta is concentrated in a few rows or columns. The products
of a block's rows are summed in float32, and these sums in float64.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import MergeError
from .checksum import checksum, differing_positions
from .journal import TileJournal
from .tiled_matmul import LowRankProduct

BLOCK = 3 << 15  # elements that are cast, added and measured at a time on a CPU: half of the largest strip
ROW_SUM = 1 << 10  # elements whose products are summed in float32
SMALL = 1e-20  # a smaller mean square is measured in float64, lest squares vanish in float32
CPU = torch.device("cpu")


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the sum for a weight of this dtype is formed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class DeltaStats(NamedTuple):
    """What became of a delta d when M = round(W0 + d) was stored: sums over all elements where W0 is finite."""

    asked: float
    """<d, d>: the squared norm of the delta that was to be added."""
    lost: float
    """<e, e> for the rounding error e = M - W0 - d."""
    dot: float
    """<e, d>."""

    @classmethod
    def measure(cls, d: Tensor, error: Tensor, s: float = 1.0) -> DeltaStats:
        """Return the sums for the delta s d with this error: two matrices, in float32 or float64, on one device."""
        asked, lost, dot = _sums(d, error)
        if d.dtype == torch.float32 and not (
            math.isfinite(asked + lost) and min(asked, s * s * asked) >= SMALL * d.numel()
        ):
            if not bool(d.any()):
                return cls(0.0, lost, 0.0)
            asked, lost, dot = _sums(d.double(), error.double())
        return cls(s * s * asked, lost, s * dot)

    @classmethod
    def total(cls, parts: Iterable[DeltaStats]) -> DeltaStats:
        """Return the sums over several tiles or weights; zeros if there are none."""
        parts = list(parts)
        return cls(*map(math.fsum, zip(*parts, strict=True))) if parts else cls(0.0, 0.0, 0.0)

    @property
    def survival(self) -> float:
        """<M - W0, d> / <d, d>: the share of d that is in M; 1 for a zero delta."""
        return 1 + self.dot / self.asked if self.asked else 1.0


class TileWorkspace(threading.local):
    """Scratch buffers for one tile, of each thread, and the operations that use them.

    A returned tensor lies in a buffer, and is overwritten by the thread's next call. The buffers are kept because to
    allocate memory for every tile, or more of it than a cache holds, costs more than the arithmetic.

    Every operation takes tiles of shape (rows, width) and the delta as a `LowRankProduct` with P (rows, R), Q (R,
    width).
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype, torch.device], Tensor] = {}

    def merge(
        self, w0: Tensor, delta: LowRankProduct, reversible: bool = True
    ) -> tuple[Tensor, DeltaStats, TileJournal | None]:
        """Return M, what became of the delta, and the journal (None unless reversible).

        Raises:
            MergeError: An element of W0 is finite, and the same element of M is not.
        """
        m = self._like(w0, "m")
        if not reversible:
            return m, self.merge_into(w0, delta, m), None
        guess = self._like(w0, "guess")
        stats = self._merge_blocks(w0, delta, m, guess)
        return m, stats, TileJournal.record(w0, m, differing_positions(w0, guess))

    def merge_into(self, w0: Tensor, delta: LowRankProduct, out: Tensor) -> DeltaStats:
        """Write M into `out`, and return what became of the delta; raise as `merge` does.

        `out` may be W0 itself if every element of W0 and of M is known to be finite.
        """
        return self._merge_blocks(w0, delta, out)

    def unmerge(self, m: Tensor, delta: LowRankProduct, journal: TileJournal) -> Tensor | None:
        """Return W0; None if M is not what merge wrote, or if what comes out is not W0."""
        if checksum(m) != journal.after:
            return None
        if journal.gaps is None:
            return journal.bits.to(m.device).view_as(m)
        return journal.correct(self._add(m, delta, -delta.s, self._like(m, "guess")))

    def remerge(self, w0: Tensor, delta: LowRankProduct) -> Tensor:
        """Return M once more, for W0 as `unmerge` returned it."""
        return self._add(w0, delta, delta.s, self._like(w0, "m"))

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
        """Return the buffer of this name, contiguous and not initialized; a second call returns the same memory."""
        key = name, shape, dtype, device
        if key not in self._views:
            memory, n = self._memory.get((name, dtype, device)), math.prod(shape)
            if memory is None or len(memory) < n:
                self._views.clear()  # they would keep the smaller memory alive
                memory = self._memory[name, dtype, device] = torch.empty(n, dtype=dtype, device=device)
            self._views[key] = memory[:n].view(shape)
        return self._views[key]

    def _like(self, tile: Tensor, name: str) -> Tensor:
        return self.buffer(name, tile.shape, tile.dtype, tile.device)

    def _blocks(self, delta: LowRankProduct, *tiles: Tensor) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
        """Yield d / s of each block, on the tiles' device, with the parts of these tiles that it covers.

        The product is formed where the factors lie, so that it has the same bits wherever the weight was moved
        meanwhile.
        """
        allocate = functools.partial(self.buffer, device=delta.P.device)
        dtype = sum_dtype(tiles[0].dtype)
        for strip, parts in delta.strips(*tiles):
            product = strip.product(allocate)
            rows = max(1, BLOCK // product.shape[1])
            is_whole = product.dtype == tiles[0].dtype or not product.is_cpu or len(product) <= rows
            whole = product, *parts
            for d, *block in [whole] if is_whole else zip(*(t.split(rows) for t in whole), strict=True):
                if d.dtype != dtype:
                    d = self.buffer("d", d.shape, dtype, d.device).copy_(d)
                yield d.to(block[0].device), block

    def _merge_blocks(self, w0: Tensor, delta: LowRankProduct, m: Tensor, guess: Tensor | None = None) -> DeltaStats:
        """Write M into `m`, and round(M - d) into `guess`; return what became of the delta."""
        tiles = (w0, m) if guess is None else (w0, m, guess)
        stats = DeltaStats.total(self._merge_block(d, delta.s, *block) for d, block in self._blocks(delta, *tiles))
        if not stats.asked and bool(delta.P.any() and delta.Q.any()):  # d vanishes in float32, and M is W0
            d = delta._replace(P=delta.P.double(), Q=delta.Q.double()).dense()
            return DeltaStats.measure(d, -d)
        return stats

    def _merge_block(self, d: Tensor, s: float, w0: Tensor, m: Tensor, guess: Tensor | None = None) -> DeltaStats:
        """Merge s d into a block, whose sum is formed in the dtype of d; return what became of s d."""
        after, error = m, self.buffer("error", d.shape, d.dtype, d.device)
        if w0.dtype == d.dtype:
            if m.data_ptr() == w0.data_ptr():
                w0 = error.copy_(w0)
            torch.sub(torch.add(w0, d, alpha=s, out=m), w0, out=error)
        else:
            after = self.buffer("after", d.shape, d.dtype, d.device)
            m.copy_(torch.add(error.copy_(w0), d, alpha=s, out=after))
            torch.sub(after.copy_(m), error, out=error)
        stats = DeltaStats.measure(d, error.sub_(d, alpha=s), s)
        if not math.isfinite(stats.lost):
            stats = _measure_where_finite(w0, after, d, s)
        if guess is not None:
            self._add_block(after, d, -s, guess)
        return stats

    def _add(self, a: Tensor, delta: LowRankProduct, s: float, out: Tensor) -> Tensor:
        """Write round(a + s P Q) into `out`, and return it."""
        for d, (a_block, out_block) in self._blocks(delta, a, out):
            self._add_block(a_block, d, s, out_block)
        return out

    def _add_block(self, a: Tensor, d: Tensor, s: float, out: Tensor) -> None:
        """Write round(a + s d) into `out`."""
        if out.dtype == d.dtype:
            torch.add(a, d, alpha=s, out=out)
            return
        total = self.buffer("after", a.shape, d.dtype, a.device)
        if a.dtype != d.dtype:
            a = total.copy_(a)
        out.copy_(torch.add(a, d, alpha=s, out=total))


class TileMerger:
    """The merge of one weight, tile by tile and in any number of threads: it collects what is measured and what is
    kept.

    Args:
        workspace: The threads' buffers, which several weights may share.
    """

    def __init__(self, workspace: TileWorkspace | None = None) -> None:
        self.workspace = workspace or TileWorkspace()
        self.stats: dict[int, DeltaStats] = {}
        self.journals: dict[int, TileJournal] = {}

    stats: dict[int, DeltaStats]
    """What became of the delta, by the tile's number."""
    journals: dict[int, TileJournal]
    """What is kept of W0, by the tile's number; empty unless the merge is reversible."""

    def merge(self, i: int, w0: Tensor, delta: LowRankProduct, reversible: bool) -> Tensor:
        """Return M of tile i (see TileWorkspace.merge); collect its statistics and, if reversible, its journal."""
        m, self.stats[i], journal = self.workspace.merge(w0, delta, reversible)
        if journal is not None:
            self.journals[i] = journal
        return m

    def merge_into(self, i: int, w0: Tensor, delta: LowRankProduct, out: Tensor) -> None:
        """Write M of tile i into `out` (see TileWorkspace.merge_into); collect its statistics."""
        self.stats[i] = self.workspace.merge_into(w0, delta, out)

    @property
    def total(self) -> DeltaStats:
        """The statistics of all tiles together."""
        return DeltaStats.total(self.stats.values())


def _measure_where_finite(w0: Tensor, m: Tensor, d: Tensor, s: float) -> DeltaStats:
    """Measure what became of s d in the elements where W0 is finite; raise MergeError if M is not finite there."""
    finite = w0.isfinite()
    if bool((finite & ~m.isfinite()).any()):
        raise MergeError(f"W0 + s B A is not finite in {w0.dtype}")
    d = d.double().where(finite, 0.0)
    return DeltaStats.measure(d, (m.double() - w0.double()).where(finite, 0.0).sub_(d, alpha=s), s)


def _sums(d: Tensor, e: Tensor) -> tuple[float, float, float]:
    """Return <d, d>, <e, e> and <e, d> of two matrices. On CPUs, numpy hands pieces of rows to its BLAS library."""
    if not d.is_cpu:
        rows = [torch.linalg.vecdot(x, y) for x, y in ((d, d), (e, e), (e, d))]
        asked, lost, dot = torch.stack(rows).sum(1, dtype=torch.float64).tolist()
        return asked, lost, dot
    width = d.shape[1]
    if width > ROW_SUM and width % ROW_SUM:
        whole = width // ROW_SUM * ROW_SUM
        left, right = (_sums(d[:, cut], e[:, cut]) for cut in (slice(whole), slice(whole, None)))
        return left[0] + right[0], left[1] + right[1], left[2] + right[2]
    x, y = (t.numpy().reshape(len(t), -1, min(width, ROW_SUM)) for t in (d, e))
    sums = np.empty((3, *x.shape[:2], 1, 1), x.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        for u, v, out in ((x, x, sums[0]), (y, y, sums[1]), (y, x, sums[2])):
            np.matmul(u[..., None, :], v[..., None], out=out)
    asked, lost, dot = sums.reshape(3, -1).sum(1, dtype=np.float64).tolist()
    return asked, lost, dot


def max_abs_bound(w: Tensor) -> float:
    """Return an upper bound of all |w_ij| of a contiguous tensor; infinite or NaN if an element is.

    For float32 and float64 it is the norm, which takes a third of the time of the extremes.
    """
    if w.dtype in (torch.float32, torch.float64):
        return float(torch.dot(w.view(-1), w.view(-1))) ** 0.5
    smallest, largest = torch.aminmax(w)
    return max(float(largest), -float(smallest))
