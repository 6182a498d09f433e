"""Fold one tile, M = round(W0 + d), and take it out again to the bit with little more than M and d.

The guess round(M - d) is W0 already for all but a few per cent of a tile's elements: where it is not, W0's own bits are kept.
Where so many miss that keeping them would cost more than the tile does (a delta larger than the weight), the whole tile is kept.
A checksum of W0 says whether what came out is W0: another BLAS library, or another device, may compute another d.

The sum is formed in float32 (float64 for a float64 weight), from a product d = s P Q (blocks.py) rounded to that, and rounded once.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import MergeError
from .checksum import BITS, checksum, differing_positions
from .tiled_matmul import LowRankProduct, add_product_by_rows, row_tiles

ENOUGH, LEAST, EVERY = (
    1 << 13,
    1 << 10,
    7,
)  # so many elements are measured, of each 1,024 one at least, of some rows in every seventh column
CAST = 3 << 17  # elements that are cast at a time
WHOLE = -1
CPU = torch.device("cpu")
GAP, LONGEST = torch.uint16, (1 << 16) - 1


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the sum for a weight of this dtype is formed."""
    return torch.promote_types(dtype, torch.float32)


class DeltaStats(NamedTuple):
    """What became of a delta, over the finite elements of W0: sums of squares, of all elements or of a part that stands for them."""

    asked: float
    """|d|^2"""
    lost: float
    """|M - W0 - d|^2"""
    dot: float
    """<M - W0 - d, d>"""

    @classmethod
    def total(cls, parts: Iterable[DeltaStats]) -> DeltaStats:
        """Of several parts together."""
        return cls(*map(math.fsum, zip(*parts, strict=True))) if (parts := list(parts)) else cls(0.0, 0.0, 0.0)

    @property
    def survival(self) -> float:
        """<M - W0, d> / <d, d>: the share of d that is really in M; 1 for a zero d."""
        return 1 + self.dot / self.asked if self.asked else 1.0


class TileJournal(NamedTuple):
    """What is kept of one tile."""

    before: int
    """Checksum of W0."""
    after: int
    """Checksum of M."""
    gaps: Tensor | None
    """From each element kept to the next, the first from the tile's beginning: uint16. None: all are kept."""
    bits: Tensor
    """W0 at those places, in its dtype."""


class TileWorkspace(threading.local):
    """Each thread's memory for one tile, used again for the next: to take it anew, or more of it than a cache holds, costs more than the work.

    Tiles are (rows, width), d is finite. What the functions return is overwritten by the next call.
    """

    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self.rooms: dict[tuple[str, tuple[int, ...], torch.dtype, torch.device], Tensor] = {}

    def fold(self, w0: Tensor, of: LowRankProduct) -> tuple[Tensor, DeltaStats, TileJournal]:
        """M, what became of d, and what to keep. Raises MergeError where W0 is finite and M is not."""
        m, guess = self._like(w0, "m"), self._like(w0, "guess")
        for d, (w, there, back) in self._strips(of, w0, m, guess):
            self._sum(w, d, of.s, there)
            self._sum(there, d, -of.s, back)
        return m, measure_delta(w0, of), _kept(w0, m, guess)

    def sum(self, w0: Tensor, of: LowRankProduct) -> tuple[Tensor, DeltaStats]:
        """M without a way back, and what became of d. Raises MergeError where W0 is finite and M is not."""
        m = self._plus(w0, of, of.s, self._like(w0, "m"))
        _check(m, w0, m)
        return m, measure_delta(w0, of)

    def merge_into(self, w0: Tensor, of: LowRankProduct, out: Tensor) -> None:
        """M into `out`, which may be W0 itself; for a sum that is known to be finite."""
        self._plus(w0, of, of.s, out)

    def unfold(self, m: Tensor, of: LowRankProduct, kept: TileJournal) -> Tensor | None:
        """W0; None if what comes out is not W0, or M is not what it was."""
        if checksum(m) != kept.after:
            return None
        if kept.gaps is None:
            return kept.bits.to(m.device).view_as(m)
        w0 = self._plus(m, of, -of.s, self._like(m, "guess"))
        w0.view(-1)[kept.gaps.to(m.device, torch.int64).cumsum(0)] = kept.bits.to(m.device)
        return w0 if checksum(w0) == kept.before else None

    def refold(self, w0: Tensor, of: LowRankProduct) -> Tensor:
        """M once more, from what `unfold` gave."""
        return self._plus(w0, of, of.s, self._like(w0, "m"))

    def room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
        """Memory of this shape, contiguous: always the same for the same name."""
        asked = name, shape, dtype, device
        if asked not in self.rooms:
            memory, n = self.memory.get((name, dtype, device)), math.prod(shape)
            if memory is None or len(memory) < n:
                self.rooms.clear()  # they would keep what was too small
                memory = self.memory[name, dtype, device] = torch.empty(n, dtype=dtype, device=device)
            self.rooms[asked] = memory[:n].view(shape)
        return self.rooms[asked]

    def _like(self, tile: Tensor, name: str) -> Tensor:
        return self.room(name, tile.shape, tile.dtype, tile.device)

    def _strips(self, of: LowRankProduct, *row_tiles: Tensor) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
        """d / s, and the tiles' strips; formed where the factors are: there it comes out as it did, wherever the weight is by now."""
        room, like = functools.partial(self.room, device=of.P.device), row_tiles[0]
        return (
            (strip.product(room, sum_dtype(like.dtype)).to(like.device), parts)
            for strip, parts in of.strips(*row_tiles)
        )

    def _plus(self, a: Tensor, of: LowRankProduct, s: float, out: Tensor) -> Tensor:
        """round(a + s P Q)"""
        if out.is_cpu and of.adds(s):
            return self._added(a, of, s, out)
        for d, (part, strip) in self._strips(of, a, out):
            self._sum(part, d, s, strip)
        return out

    def _added(self, a: Tensor, of: LowRankProduct, s: float, out: Tensor) -> Tensor:
        """The same where P Q can be added in one call."""
        direct = out.dtype == of.P.dtype and out.is_contiguous()
        for rows in (slice(None),) if direct else row_tiles(len(out), out.shape[1], out.device, CAST):
            part, P = a[rows], of.P[rows]
            total = out[rows] if direct else self.room("sum", part.shape, P.dtype)
            if not total.is_set_to(part):
                total.copy_(part)
            add_product_by_rows(P, of.Q, s, total)
            if not direct:
                out[rows].copy_(total)
        return out

    def _sum(self, a: Tensor, d: Tensor, s: float, out: Tensor) -> None:
        """round(a + s d)"""
        if out.dtype == d.dtype:
            torch.add(a, d, alpha=s, out=out)
        else:
            out.copy_(self.room("sum", a.shape, d.dtype, a.device).copy_(a).add_(d, alpha=s))


def _kept(w0: Tensor, m: Tensor, guess: Tensor) -> TileJournal:
    """What the guess is to be mended with. Raises MergeError where W0 is finite and M is not: the guess misses all of that."""
    places = differing_positions(w0, guess)
    if len(places):
        _check(_taken(m, places), w0, m)
    if len(places) * (w0.itemsize + GAP.itemsize) >= w0.nbytes:
        return TileJournal(checksum(w0), checksum(m), None, w0.reshape(-1).clone())
    gaps = np.diff(places, prepend=0)
    if len(places) == 0 or gaps.max() > LONGEST:  # some more are kept, lest a gap be too long for 16 bits
        places = np.union1d(places, np.arange(0, w0.numel(), LONGEST))
        gaps = np.diff(places, prepend=0)
    return TileJournal(
        checksum(w0), checksum(m), torch.from_numpy(gaps.astype(np.uint16)).to(w0.device), _taken(w0, places)
    )


def _taken(t: Tensor, places: np.ndarray) -> Tensor:
    """The elements at these places. (numpy takes a tenth of torch's time.)"""
    if t.device.type != "cpu":
        return t.view(-1)[torch.from_numpy(places).to(t.device)]
    return torch.from_numpy(t.view(-1).view(BITS[t.itemsize]).numpy()[places]).view(t.dtype)


def _check(suspects: Tensor, w0: Tensor, m: Tensor) -> None:
    """Raises MergeError where W0 is finite and M is not, if that may be among the suspects."""
    low, high = torch.aminmax(suspects)
    if not math.isfinite(float(high) - float(low)) and bool((w0.isfinite() & ~m.isfinite()).any()):
        raise MergeError(f"W0 + s B A is not finite in {w0.dtype}")


class TileMerger:
    """The fold of one weight, while it is under way, in as many threads as there are: what it measures, and what it keeps."""

    def __init__(self, desk: TileWorkspace | None = None) -> None:
        self.kept: dict[int, TileJournal] = {}
        self.tiles: dict[int, DeltaStats] = {}
        self.desk = desk or TileWorkspace()

    kept: dict[int, TileJournal]
    """By tile; empty where nobody wants the way back."""
    tiles: dict[int, DeltaStats]
    """By tile."""

    @property
    def measured(self) -> DeltaStats:
        """Of all tiles."""
        return DeltaStats.total(self.tiles.values())

    def keep(self, i: int, w0: Tensor, of: LowRankProduct) -> Tensor:
        """M for a tile, with a way back (see Desk.fold)."""
        m, self.tiles[i], self.kept[i] = self.desk.fold(w0, of)
        return m

    def sum(self, i: int, w0: Tensor, of: LowRankProduct) -> Tensor:
        """M for a tile without one (see Desk.sum)."""
        m, self.tiles[i] = self.desk.sum(w0, of)
        return m

    def measure(self, i: int, w0: Tensor, of: LowRankProduct) -> None:
        """What will become of d."""
        self.tiles[i] = measure_delta(w0, of)


@dataclass(frozen=True)
class Journal:
    """What is kept of one weight: of all its tiles, end to end."""

    before: Tensor
    """int64 (tiles,)"""
    after: Tensor
    """int64 (tiles,)"""
    counts: Tensor
    """int32 (tiles,): how many elements are kept, or WHOLE."""
    gaps: Tensor
    """uint16: of the tiles that are not kept whole."""
    bits: Tensor
    """In the weight's dtype: of all."""

    @classmethod
    def of(cls, fold: TileMerger) -> Journal:
        """What a fold of at least one tile has kept."""
        before, after, gaps, bits = zip(*(fold.kept[i] for i in sorted(fold.kept)), strict=True)
        counts = [WHOLE if g is None else len(g) for g in gaps]
        some = [g for g in gaps if g is not None] or [torch.empty(0, dtype=GAP)]
        return cls(
            torch.tensor(before),
            torch.tensor(after),
            torch.tensor(counts, dtype=torch.int32),
            torch.cat(some),
            torch.cat(bits),
        )

    def kept(self, sizes: Iterable[int]) -> Iterator[TileJournal]:
        """Tile by tile; `sizes` are their elements."""
        place = bit = 0
        for before, after, count, size in zip(
            self.before.tolist(), self.after.tolist(), self.counts.tolist(), sizes, strict=True
        ):
            if count == WHOLE:
                yield TileJournal(before, after, None, self.bits[bit : bit + size])
                bit += size
            else:
                yield TileJournal(before, after, self.gaps[place : place + count], self.bits[bit : bit + count])
                place, bit = place + count, bit + count

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return sum(t.nbytes for t in vars(self).values())


def measure_delta(w0: Tensor, of: LowRankProduct) -> DeltaStats:
    """By some of a matrix's elements; by all, in float64, where d vanishes on those that would stand for them."""
    step = min(w0.numel() // ENOUGH, LEAST)  # odd ones, so that no pattern of heads or blocks is met again and again
    rows, columns = (
        (slice(None, None, step // EVERY | 1), slice(None, None, EVERY)) if step else (slice(None), slice(None))
    )
    w, d = w0[rows, columns].flatten(), torch.mm(of.P[rows], of.Q[:, columns]).flatten().mul_(of.s)
    if not (asked := float(torch.dot(d, d))):
        if not of.P.any():
            return DeltaStats(0.0, 0.0, 0.0)
        w, d = w0.flatten(), torch.mm(of.P.double(), of.Q.double()).flatten().mul_(of.s)
        asked = float(torch.dot(d, d))
    before = w.to(d)
    error = (before + d).to(w.dtype).to(d.dtype).sub_(before).sub_(d)
    lost, dot = float(torch.dot(error, error)), float(torch.dot(error, d))
    if not math.isfinite(lost + dot):  # infinity or NaN in W0 is its own business
        error.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        lost, dot = float(torch.dot(error, error)), float(torch.dot(error, d))
    times = w0.numel() / d.numel()
    return DeltaStats(times * asked, times * lost, times * dot)


def max_abs_bound(w: Tensor) -> float:
    """No |w_ij| is larger; infinite or NaN if one is. W is contiguous."""
    if w.dtype in (torch.float32, torch.float64):  # a third of the time
        return float(torch.dot(w.view(-1), w.view(-1))) ** 0.5
    low, high = torch.aminmax(w)
    return max(float(high), -float(low))
