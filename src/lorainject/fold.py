"""Fold one tile, M = round(W0 + d), and take it out again to the bit with little more than M and d.

The guess round(M - d) is W0 already for all but a few per cent of a tile's elements: where it is not, W0's own bits are kept.
Where so many miss that keeping them would cost more than the tile does (a delta larger than the weight), the whole tile is kept.
A checksum of W0 says whether what came out is W0: another BLAS library, or another device, may compute another d.

d is a product in float64, rounded to float32 (or not, for a float64 weight); in that dtype the sum is formed, and rounded once.

A fold that nobody takes out again may form d in float32 throughout (blocks.py), in half the time.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .blocks import BLOCK, STRIP, Product, padded, strips
from .errors import MergeError

TILE = 1 << 18  # elements: what is at work on one tile lies in the caches, and calling torch costs little beside the work
QUICK_TILE = 1 << 21  # for factors in float32: these are worked on in smaller pieces anyway
GPU_TILE = 1 << 22  # there, what costs is the launch of a kernel
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
PRODUCT = 1 << 17  # elements of a product in float64, which is rounded before it leaves the cache
ENOUGH = 1 << 14  # so many elements of a tile are measured at most, in whole rows
LANES = 1 << 12  # words that a checksum leaves to be multiplied in 64 bits, which is slow
MULTIPLIERS = [pow(0x9E3779B1, 2 * i + 1, 1 << 32) - (1 << 31) | 1 for i in range(40)]
WHOLE = -1
GAP, LONGEST = torch.uint16, (1 << 16) - 1


def tiles(rows: int, width: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> Iterator[slice]:
    """The tiles of a matrix: whole rows, as many as fit; for factors in float32 (see `quick`), whole blocks of rows."""
    unit = BLOCK[0] if dtype == torch.float32 else 1
    size = GPU_TILE if torch.device(device).type != "cpu" else QUICK_TILE if dtype == torch.float32 else TILE
    step = max(unit, size // width // unit * unit)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which the sum for a weight of this dtype is formed."""
    return torch.promote_types(dtype, torch.float32)


class Measured(NamedTuple):
    """What became of a delta, over the finite elements of W0: sums of squares, of all elements or of a part that stands for them."""

    asked: float
    """|d|^2"""
    lost: float
    """|M - W0 - d|^2"""
    dot: float
    """<M - W0 - d, d>"""

    @classmethod
    def total(cls, parts: Iterable[Measured]) -> Measured:
        """Of several parts together."""
        return cls(*map(math.fsum, zip(*parts, strict=True))) if (parts := list(parts)) else cls(0.0, 0.0, 0.0)

    @property
    def survival(self) -> float:
        """<M - W0, d> / <d, d>: the share of d that is really in M; 1 for a zero d."""
        return 1 + self.dot / self.asked if self.asked else 1.0


class Kept(NamedTuple):
    """What is kept of one tile."""

    before: int
    """Checksum of W0."""
    after: int
    """Checksum of M if all of the tile is kept, else 0: then folding anew tells whether M is what it was."""
    gaps: Tensor | None
    """From each element kept to the next, the first from the tile's beginning: uint16. None: all are kept."""
    bits: Tensor
    """W0 at those places, in its dtype."""


class Desk(threading.local):
    """Each thread's memory for one tile, used again for the next: to take it anew, or more of it than a cache holds, costs more than the work.

    Tiles are (rows, width), contiguous; d = P Q, finite, with P (rows, R) and Q (R, width) in float64, or for `sum` and `add` a Product that
    `quick` gave. What the functions return is overwritten by the next call.
    """

    like: tuple[torch.Size, torch.dtype, torch.device] | None = None
    tile: Tensor | None = None
    wide: Tensor | None = None
    narrow: Tensor | None = None
    strips: Tensor | None = None

    def fold(self, w0: Tensor, P: Tensor, Q: Tensor) -> tuple[Tensor, Measured, Kept]:
        """M, what became of d, and what to keep. Raises MergeError where W0 is finite and M is not."""
        self._lay(w0, P, Q)
        m = _finite(self._plus_d(w0), w0)
        return m, measured(w0, P, lambda rows: self.d[rows]), self._kept(w0, m)

    def sum(self, w0: Tensor, of: Product) -> tuple[Tensor, Measured]:
        """M without a way back, and what became of d. Raises MergeError where W0 is finite and M is not."""
        m = self.narrow = _fitting(self.narrow, w0.shape, w0.dtype, w0.device)
        found = self.add(w0, of, m)
        return _finite(m, w0), found

    def add(self, w0: Tensor, of: Product, out: Tensor) -> Measured:
        """M into `out`, which may be W0 itself; for a sum that is known to be finite."""
        P, Q, s = of
        found = measured(w0, P, lambda rows: (P[rows] @ Q).mul_(s))
        if P.dtype == torch.float32:
            if self.strips is None:
                self.strips = torch.empty(2, BLOCK[0], STRIP)
            for at, d, total in strips(P, Q, self.strips):
                if out.dtype == d.dtype:
                    torch.add(w0[at], d, alpha=s, out=out[at])
                else:
                    out[at].copy_(total.copy_(w0[at]).add_(d, alpha=s))
        else:
            total = self.wide = _fitting(self.wide, w0.shape, P.dtype, w0.device)
            out.copy_(total.copy_(w0).addmm_(P, Q))
        return found

    def unfold(self, m: Tensor, P: Tensor, Q: Tensor, kept: Kept) -> Tensor | None:
        """W0; None if what comes out is not W0, or M is not what it was."""
        if kept.gaps is None:
            return kept.bits.to(m.device).view_as(m) if checksum(m) == kept.after else None
        self._lay(m, P, Q)
        w0 = self._minus_d(m)
        w0.view(-1)[kept.gaps.to(m.device, torch.int64).cumsum(0)] = kept.bits.to(m.device)
        return w0 if checksum(w0) == kept.before and same(self._plus_d(w0), m) else None

    def refold(self, w0: Tensor, P: Tensor, Q: Tensor) -> Tensor:
        """M once more, from what `unfold` gave."""
        self._lay(w0, P, Q)
        return self._plus_d(w0)

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """For a tile that has to be brought here first."""
        self.tile = _fitting(self.tile, shape, dtype)
        return self.tile

    def _lay(self, tile: Tensor, P: Tensor, Q: Tensor) -> None:
        """Room for such a tile, and d. (On the device of the factors it comes out as it did, wherever the weight is by now.)"""
        step = max(1, PRODUCT // tile.shape[1])
        if self.like != (tile.shape, tile.dtype, tile.device):
            self.like = tile.shape, tile.dtype, tile.device
            self.d, self.total, self.other = (torch.empty_like(tile, dtype=wide(tile.dtype)) for _ in range(3))
            product = torch.empty(min(step, len(tile)), tile.shape[1], dtype=torch.float64, device=P.device)
            self.parts = [(d, product[: len(d)]) for d in self.d.split(step)]
            narrow = self.d.dtype != tile.dtype
            self.m, self.guess = (torch.empty_like(tile), torch.empty_like(tile)) if narrow else (self.total, self.other)
            self.differ = torch.empty_like(tile, dtype=torch.bool).view(-1)
        for p, (d, product) in zip(P.split(step), self.parts, strict=True):
            d.copy_(torch.mm(p, Q, out=product))

    def _plus_d(self, w0: Tensor) -> Tensor:
        if self.m is self.total:
            return torch.add(w0, self.d, out=self.total)
        return self.m.copy_(self.total.copy_(w0).add_(self.d))

    def _minus_d(self, m: Tensor) -> Tensor:
        if self.guess is self.other:
            return torch.sub(m, self.d, out=self.other)
        return self.guess.copy_(self.other.copy_(m).sub_(self.d))

    def _kept(self, w0: Tensor, m: Tensor) -> Kept:
        a, b = (t.view(-1).view(BITS[t.itemsize]) for t in (w0, self._minus_d(m)))
        if a.device.type == "cpu":  # numpy needs a third of torch's time for this
            places = np.flatnonzero(np.not_equal(a.numpy(), b.numpy(), out=self.differ.numpy()))
        else:
            places = (a != b).nonzero().view(-1).cpu().numpy()
        if len(places) * (w0.itemsize + GAP.itemsize) >= w0.nbytes:
            return Kept(checksum(w0), checksum(m), None, w0.reshape(-1).clone())
        gaps = np.diff(places)
        if len(places) == 0 or places[0] > LONGEST or (gaps > LONGEST).any():  # some more are kept, lest a gap be too long for 16 bits
            places = np.union1d(places, np.arange(0, len(a), LONGEST))
            gaps = np.diff(places)
        steps = np.empty(len(places), np.uint16)
        steps[0], steps[1:] = places[0], gaps
        bits = torch.from_numpy(a.numpy()[places]) if a.device.type == "cpu" else a[torch.from_numpy(places).to(a.device)]
        return Kept(checksum(w0), 0, torch.from_numpy(steps).to(a.device), bits.view(w0.dtype))


class Fold:
    """The fold of one weight, while it is under way, in as many threads as there are: what it measures, and what it keeps."""

    def __init__(self, desk: Desk | None = None) -> None:
        self.kept: dict[int, Kept] = {}
        self.tiles: dict[int, Measured] = {}
        self.desk = desk or Desk()

    kept: dict[int, Kept]
    """By tile; empty where nobody wants the way back."""
    tiles: dict[int, Measured]
    """By tile."""

    @property
    def measured(self) -> Measured:
        """Of all tiles."""
        return Measured.total(self.tiles.values())

    def keep(self, i: int, w0: Tensor, P: Tensor, Q: Tensor) -> Tensor:
        """M for tile i, with a way back (see Desk.fold)."""
        m, self.tiles[i], self.kept[i] = self.desk.fold(w0, P, Q)
        return m

    def sum(self, i: int, w0: Tensor, of: Product) -> Tensor:
        """M for tile i without one (see Desk.sum)."""
        m, self.tiles[i] = self.desk.sum(w0, of)
        return m

    def add(self, i: int, w0: Tensor, of: Product, out: Tensor) -> None:
        """M for tile i, straight into `out` (see Desk.add)."""
        self.tiles[i] = self.desk.add(w0, of, out)


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
    def of(cls, fold: Fold) -> Journal:
        """What a fold of at least one tile has kept."""
        before, after, gaps, bits = zip(*(fold.kept[i] for i in sorted(fold.kept)), strict=True)
        counts = [WHOLE if g is None else len(g) for g in gaps]
        some = [g for g in gaps if g is not None] or [torch.empty(0, dtype=GAP)]
        return cls(torch.tensor(before), torch.tensor(after), torch.tensor(counts, dtype=torch.int32), torch.cat(some), torch.cat(bits))

    def kept(self, sizes: Iterable[int]) -> Iterator[Kept]:
        """Tile by tile; `sizes` are their elements."""
        place = bit = 0
        for before, after, count, size in zip(self.before.tolist(), self.after.tolist(), self.counts.tolist(), sizes, strict=True):
            if count == WHOLE:
                yield Kept(before, after, None, self.bits[bit : bit + size])
                bit += size
            else:
                yield Kept(before, after, self.gaps[place : place + count], self.bits[bit : bit + count])
                place, bit = place + count, bit + count

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return sum(t.nbytes for t in vars(self).values())


def measured(w0: Tensor, P: Tensor, d_of: Callable[[slice], Tensor]) -> Measured:
    """By d's rows: of some; of all, in float64, where d vanishes on those that would stand for them."""
    rows = slice(None, None, w0.numel() // ENOUGH | 1)  # odd, so that no pattern of heads or blocks is met again and again
    w, d = w0[rows].flatten(), d_of(rows).flatten()
    dtype = d.dtype
    if not (asked := float(torch.dot(d, d))):
        if not P.any():
            return Measured(0.0, 0.0, 0.0)
        w, d = w0.flatten(), d_of(slice(None)).flatten().double()
        asked = float(torch.dot(d, d))
    before = w.to(dtype)
    error = (before + d).to(dtype).to(w0.dtype).to(d.dtype).sub_(before).sub_(d)
    lost, dot = float(torch.dot(error, error)), float(torch.dot(error, d))
    if not math.isfinite(lost + dot):  # infinity or NaN in W0 is its own business
        error.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        lost, dot = float(torch.dot(error, error)), float(torch.dot(error, d))
    times = w0.numel() / d.numel()
    return Measured(times * asked, times * lost, times * dot)


def at_most(w: Tensor) -> float:
    """No |w_ij| is larger; infinite or NaN if one is. W is contiguous."""
    if w.dtype in (torch.float32, torch.float64):  # a third of the time
        return float(torch.dot(w.view(-1), w.view(-1))) ** 0.5
    low, high = torch.aminmax(w)
    return max(float(high), -float(low))


def _finite(m: Tensor, w0: Tensor) -> Tensor:
    """M, if that is finite where W0 is."""
    low, high = torch.aminmax(m)
    if not math.isfinite(float(high) - float(low)) and bool((w0.isfinite() & ~m.isfinite()).any()):
        raise MergeError(f"W0 + s B A is not finite in {w0.dtype}")
    return m


def _fitting(room: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """`room` if it is just that, else new."""
    if room is not None and (room.shape, room.dtype, room.device) == (shape, dtype, torch.device(device)):
        return room
    return torch.empty(shape, dtype=dtype, device=device)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype have the same bits."""
    a, b = a.view(BITS[a.itemsize]), b.view(BITS[b.itemsize])
    return bool(np.array_equal(a.numpy(), b.numpy()) if a.device.type == "cpu" else torch.equal(a, b))  # torch takes four times as long


def checksum(tile: Tensor) -> int:
    """Of the tile's bits and their places: the second half is added to the first, times a number of that step's own, until little is left.

    So each word of 4 bytes is multiplied by an odd number that its place decides, mod 2^32, and the processor does several at a time.
    """
    raw = tile.reshape(-1).view(torch.uint8)
    words = padded(raw, 0, 4).view(torch.int32)
    multipliers = iter(MULTIPLIERS)
    while len(words) > LANES:
        first, second = padded(words, 0, 2).chunk(2)
        words = torch.add(first, second, alpha=next(multipliers))
    weights = _weights(len(words), words.device)
    total = torch.dot(words.long(), weights) if words.device.type == "cpu" else (words * weights).sum()
    return int(total) ^ len(raw)


@functools.lru_cache(maxsize=8)
def _weights(n: int, device: torch.device) -> Tensor:
    """Odd numbers of 64 bits that no small multiples of each other cancel."""
    mixed = torch.arange(1, n + 1, device=device) * -7046029254386353131
    return (mixed ^ (mixed >> 29)) * -4658895280553007687 | 1
