"""Merge a delta into one tile of a weight, and take it out again to the bit.

    merge      M  = round(W0 + d)
    unmerge    W0 = round(M - d), corrected by the tile's journal (journal.py)        d = s P Q (tiled_matmul.py)

A tile has shape (rows, width) and is contiguous. The sum is formed in float32, or in float64 for a float64 weight,
from d rounded to that dtype, and is rounded once to the weight's dtype. The delta is finite; W0 may hold infinity and
NaN.

How much of the delta survives the rounding (`DeltaStats`) is measured on a sample of the tile's elements: measuring
all of them would take as long as the sum.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import MergeError
from .checksum import checksum, differing_positions
from .journal import TileJournal, elements_at
from .tiled_matmul import LowRankProduct, add_product_by_rows, row_tiles

MIN_SAMPLE = 1 << 13  # DeltaStats are measured on about so many elements of a tile, if it has them,
MAX_SAMPLE_STEP = 1 << 10  # and on at least one of so many,
COLUMN_STEP = 7  # in every seventh column
CAST = 3 << 17  # elements that are cast at a time
CPU = torch.device("cpu")


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the sum for a weight of this dtype is formed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class DeltaStats(NamedTuple):
    """What became of a delta d when M = round(W0 + d) was stored: sums over all elements where W0 is finite.

    The sums of a large tile are estimated from a sample of its elements, in proportion to its size.
    """

    asked: float
    """<d, d>: the squared norm of the delta that was to be added."""
    lost: float
    """<e, e> for the rounding error e = M - W0 - d."""
    dot: float
    """<e, d>."""

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
            self._add(w0, delta, delta.s, m)
            _check_finite(m, w0, m)
            return m, measure_delta(w0, delta), None
        guess = self._like(w0, "guess")
        for d, (w0_strip, m_strip, guess_strip) in self._strips(delta, w0, m, guess):
            self._add_strip(w0_strip, d, delta.s, m_strip)
            self._add_strip(m_strip, d, -delta.s, guess_strip)
        missed = differing_positions(w0, guess)
        if len(missed):  # the guess misses every element that is no longer finite
            _check_finite(elements_at(m, missed), w0, m)
        return m, measure_delta(w0, delta), TileJournal.record(w0, m, missed)

    def merge_into(self, w0: Tensor, delta: LowRankProduct, out: Tensor) -> None:
        """Write M into `out`, which may be W0 itself; for a sum that is known to be finite."""
        self._add(w0, delta, delta.s, out)

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

    def _strips(self, delta: LowRankProduct, *tiles: Tensor) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
        """Yield d / s of each strip, on the tiles' device, with the parts of these tiles that it covers.

        The product is formed where the factors lie, so that it has the same bits wherever the weight was moved
        meanwhile.
        """
        allocate = functools.partial(self.buffer, device=delta.P.device)
        for strip, parts in delta.strips(*tiles):
            yield strip.product(allocate, sum_dtype(tiles[0].dtype)).to(tiles[0].device), parts

    def _add(self, a: Tensor, delta: LowRankProduct, s: float, out: Tensor) -> Tensor:
        """Write round(a + s P Q) into `out`, and return it."""
        if out.is_cpu and delta.can_add_by_rows(s):
            return self._add_by_rows(a, delta, s, out)
        for d, (a_strip, out_strip) in self._strips(delta, a, out):
            self._add_strip(a_strip, d, s, out_strip)
        return out

    def _add_by_rows(self, a: Tensor, delta: LowRankProduct, s: float, out: Tensor) -> Tensor:
        """Do what `_add` does, with product and sum in one call."""
        in_place = out.dtype == delta.P.dtype and out.is_contiguous()
        for rows in (slice(None),) if in_place else row_tiles(len(out), out.shape[1], out.device, CAST):
            part, P = a[rows], delta.P[rows]
            total = out[rows] if in_place else self.buffer("sum", part.shape, P.dtype)
            if not total.is_set_to(part):
                total.copy_(part)
            add_product_by_rows(P, delta.Q, s, total)
            if not in_place:
                out[rows].copy_(total)
        return out

    def _add_strip(self, a: Tensor, d: Tensor, s: float, out: Tensor) -> None:
        """Write round(a + s d) into `out`."""
        if out.dtype == d.dtype:
            torch.add(a, d, alpha=s, out=out)
        else:
            out.copy_(self.buffer("sum", a.shape, d.dtype, a.device).copy_(a).add_(d, alpha=s))


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

    def measure(self, i: int, w0: Tensor, delta: LowRankProduct) -> None:
        """Collect the statistics of tile number i without merging."""
        self.stats[i] = measure_delta(w0, delta)

    @property
    def total(self) -> DeltaStats:
        """The statistics of all tiles together."""
        return DeltaStats.total(self.stats.values())


def _check_finite(suspects: Tensor, w0: Tensor, m: Tensor) -> None:
    """Raise MergeError if W0 is finite and M is not, which happens only where `suspects` holds infinity or NaN."""
    smallest, largest = torch.aminmax(suspects)
    if not math.isfinite(float(largest) - float(smallest)) and bool((w0.isfinite() & ~m.isfinite()).any()):
        raise MergeError(f"W0 + s B A is not finite in {w0.dtype}")


def measure_delta(w0: Tensor, delta: LowRankProduct) -> DeltaStats:
    """Measure what becomes of the delta when it is added to a matrix W0 (rows, width).

    A large matrix is sampled at a fixed stride, odd so that no pattern of heads or blocks is met again and again.
    Where the delta vanishes on the sample, all elements are measured, in float64.
    """
    step = min(w0.numel() // MIN_SAMPLE, MAX_SAMPLE_STEP)
    rows, columns = slice(None), slice(None)
    if step:
        rows, columns = slice(None, None, step // COLUMN_STEP | 1), slice(None, None, COLUMN_STEP)
    w, d = w0[rows, columns].flatten(), torch.mm(delta.P[rows], delta.Q[:, columns]).flatten().mul_(delta.s)
    if not (asked := float(torch.dot(d, d))):
        if not delta.P.any():
            return DeltaStats(0.0, 0.0, 0.0)
        w, d = w0.flatten(), torch.mm(delta.P.double(), delta.Q.double()).flatten().mul_(delta.s)
        asked = float(torch.dot(d, d))
    before = w.to(d)
    error = (before + d).to(w.dtype).to(d.dtype).sub_(before).sub_(d)
    lost, dot = float(torch.dot(error, error)), float(torch.dot(error, d))
    if not math.isfinite(lost + dot):  # elements of W0 that are infinite or NaN do not count
        error.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        lost, dot = float(torch.dot(error, error)), float(torch.dot(error, d))
    share = w0.numel() / d.numel()
    return DeltaStats(share * asked, share * lost, share * dot)


def max_abs_bound(w: Tensor) -> float:
    """Return an upper bound of all |w_ij| of a contiguous tensor; infinite or NaN if an element is.

    For float32 and float64 it is the norm, which takes a third of the time of the extremes.
    """
    if w.dtype in (torch.float32, torch.float64):
        return float(torch.dot(w.view(-1), w.view(-1))) ** 0.5
    smallest, largest = torch.aminmax(w)
    return max(float(largest), -float(smallest))
