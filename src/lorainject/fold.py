"""Fold one tile, M = round(W0 + d), and take it out again to the bit with little more than M and d.

The guess round(M - d) is W0 already for all but a few per cent of a tile's elements: where it is not, W0's own bits are kept.
Where so many miss that keeping them would cost more than the tile does (a delta larger than the weight), the whole tile is kept.
A checksum of W0 says whether what came out is W0: another BLAS library, or another device, may compute another d.

d is a product in float64, rounded to float32 (or not, for a float64 weight); in that dtype the sum is formed, and rounded once.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import MergeError

TILE = 1 << 18  # elements: what is at work on one tile lies in the caches, and calling torch costs little beside the work
GPU_TILE = 1 << 22  # there, what costs is the launch of a kernel
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
PRODUCT = 1 << 16  # elements of a product in float64, which is rounded before it leaves the cache
WORDS = 1 << 14  # of a checksum, between two multipliers: these, too, shall lie in the cache
WHOLE = -1
GAP, LONGEST = torch.uint16, (1 << 16) - 1


def tiles(rows: int, width: int, device: torch.device | str = "cpu") -> Iterator[slice]:
    """The tiles of a matrix: whole rows, as many as fit."""
    step = max(1, (TILE if torch.device(device).type == "cpu" else GPU_TILE) // width)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which the sum for a weight of this dtype is formed."""
    return torch.promote_types(dtype, torch.float32)


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

    Tiles are (rows, width), contiguous; d = P Q, finite, with P (rows, R) and Q (R, width) in float64. What the functions return is
    overwritten by the next call.
    """

    like: tuple[torch.Size, torch.dtype, torch.device] | None = None
    tile: Tensor | None = None

    def fold(self, w0: Tensor, P: Tensor, Q: Tensor, keep: bool) -> tuple[Tensor, tuple[float, float], Kept | None]:
        """M; |M - W0 - d|^2 and <M - W0 - d, d> over the finite elements of W0; and, if asked for, what to keep.

        Raises MergeError where W0 is finite and M is not.
        """
        self._lay(w0, P, Q)
        m = self._plus_d(w0)
        kept = self._kept(w0, m, self._minus_d(m)) if keep else None
        if m is self.sum:  # no rounding but the sum's own
            torch.sub(torch.sub(m, w0, out=self.other), self.d, out=self.other)
        else:
            self.other.copy_(m).sub_(self.sum)
        return m, self._measured(w0, m), kept

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
        if self.tile is None or self.tile.shape != shape or self.tile.dtype != dtype:
            self.tile = torch.empty(shape, dtype=dtype)
        return self.tile

    def _lay(self, tile: Tensor, P: Tensor, Q: Tensor) -> None:
        """Room for such a tile, and d. (On the device of the factors it comes out as it did, wherever the weight is by now.)"""
        step = max(1, PRODUCT // tile.shape[1])
        if self.like != (tile.shape, tile.dtype, tile.device):
            self.like = tile.shape, tile.dtype, tile.device
            self.product = torch.empty(min(step, len(tile)), tile.shape[1], dtype=torch.float64, device=P.device)
            self.d, self.sum, self.other = (torch.empty_like(tile, dtype=wide(tile.dtype)) for _ in range(3))
            narrow = self.d.dtype != tile.dtype
            self.m, self.guess = (torch.empty_like(tile), torch.empty_like(tile)) if narrow else (self.sum, self.other)
            self.differ = torch.empty_like(tile, dtype=torch.bool).view(-1)
        for start in range(0, len(tile), step):
            p = P[start : start + step]
            self.d[start : start + step].copy_(torch.mm(p, Q, out=self.product[: len(p)]))

    def _plus_d(self, w0: Tensor) -> Tensor:
        if self.m is self.sum:
            return torch.add(w0, self.d, out=self.sum)
        return self.m.copy_(self.sum.copy_(w0).add_(self.d))

    def _minus_d(self, m: Tensor) -> Tensor:
        if self.guess is self.other:
            return torch.sub(m, self.d, out=self.other)
        return self.guess.copy_(self.other.copy_(m).sub_(self.d))

    def _measured(self, w0: Tensor, m: Tensor) -> tuple[float, float]:
        error, d = self.other.view(-1), self.d.view(-1)
        lost, dot = float(torch.dot(error, error)), float(torch.dot(error, d))
        if not math.isfinite(lost + dot):  # infinity or NaN in W0 is its own business
            if bool((w0.isfinite() & ~m.isfinite()).any()):
                raise MergeError(f"W0 + s B A is not finite in {w0.dtype}")
            error.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            lost, dot = float(torch.dot(error, error)), float(torch.dot(error, d))
        return lost, dot

    def _kept(self, w0: Tensor, m: Tensor, guess: Tensor) -> Kept:
        a, b = (t.view(-1).view(BITS[t.itemsize]) for t in (w0, guess))
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

    def __init__(self) -> None:
        self.kept: dict[int, Kept] = {}
        self.measured: dict[int, tuple[float, float]] = {}
        self.desk = Desk()

    kept: dict[int, Kept]
    """By tile; empty where nobody wants the way back."""
    measured: dict[int, tuple[float, float]]
    """By tile: |M - W0 - d|^2 and <M - W0 - d, d>, over the finite elements of W0."""

    @property
    def lost(self) -> float:
        """|M - W0 - d|^2"""
        return math.fsum(lost for lost, _ in self.measured.values())

    @property
    def dot(self) -> float:
        """<M - W0 - d, d>"""
        return math.fsum(dot for _, dot in self.measured.values())

    def tile(self, i: int, w0: Tensor, P: Tensor, Q: Tensor, keep: bool) -> Tensor:
        """M for tile i (see Desk.fold)."""
        m, self.measured[i], kept = self.desk.fold(w0, P, Q, keep)
        if kept is not None:
            self.kept[i] = kept
        return m


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


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype have the same bits."""
    return torch.equal(a.view(BITS[a.itemsize]), b.view(BITS[b.itemsize]))


def checksum(tile: Tensor) -> int:
    """A sum of the tile's bits, in words of 8 bytes, each times an odd number of its own place: whatever is exchanged, it shows."""
    raw = tile.reshape(-1).view(torch.uint8)
    words = (torch.nn.functional.pad(raw, (0, -len(raw) % 8)) if len(raw) % 8 else raw).view(torch.int64)
    odd = _odd(min(len(words), WORDS), words.device)
    parts = [torch.dot(part, odd[: len(part)]) if part.device.type == "cpu" else (part * odd[: len(part)]).sum() for part in words.split(WORDS)]
    return sum(int(part) * (2 * i + 1) ** 9 for i, part in enumerate(parts)) % (1 << 63)


@functools.lru_cache(maxsize=8)
def _odd(n: int, device: torch.device) -> Tensor:
    return torch.arange(1, 2 * n, 2, device=device)
