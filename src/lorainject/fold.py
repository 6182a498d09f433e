"""Fold one tile, M = round(W0 + d), and take it out again to the bit with little more than M and d.

The guess round(M - d) is W0 already for all but a few per cent of a tile's elements: where it is not, W0's own bits are kept.
Where so many miss that keeping them would cost more than the tile does (a delta larger than the weight), the whole tile is kept.
A checksum of W0 says whether what came out is W0: another BLAS library, or another device, may compute another d.

d is a product in float64, rounded to float32 (or not, for a float64 weight); in that dtype the sum is formed, and rounded once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import MergeError

TILE = 1 << 16  # elements: all that is at work on one tile fits an L2 cache, and a place in it fits 16 bits
GPU_TILE = 1 << 22  # there, what costs is the launch of a kernel
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
WHOLE = -1


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
    places: Tensor | None
    """Flat places of the elements kept, uint16 (int32 in larger tiles); None: all are."""
    bits: Tensor
    """W0 at those places, in its dtype."""

    def unfold(self, m: Tensor, d: Tensor) -> Tensor | None:
        """W0 from M and the d that was added, both (rows, width); None if what comes out is not W0, or M not what it was."""
        if self.places is None:
            return self.bits.to(m.device, copy=True).view_as(m) if checksum(m) == self.after else None
        w0 = (m.to(d.dtype) - d).to(m.dtype)
        w0.view(-1)[self.places.to(m.device, torch.int64)] = self.bits.to(m.device)
        return w0 if checksum(w0) == self.before and same(refold(w0, d), m) else None


class Fold:
    """The fold of one weight, while it is under way: what it keeps, and what it measures."""

    def __init__(self) -> None:
        self.kept: list[Kept] = []
        self.lost = self.dot = 0.0
        self.scratch: dict[str, Tensor] = {}

    kept: list[Kept]
    """By tile."""
    lost: float
    """|M - W0 - d|^2, over the finite elements of W0."""
    dot: float
    """<M - W0 - d, d>, likewise."""

    def tile(self, w0: Tensor, P: Tensor, Q: Tensor) -> Tensor:
        """M for one tile W0 (rows, width), contiguous, and d = P Q (float64), which is finite. The result is overwritten by the next.

        Raises MergeError where W0 is finite and M is not.
        """
        d = self._cast("d", torch.mm(P, Q, out=self._room("product", w0, P.dtype)), wide(w0.dtype))
        base = self._cast("base", w0, d.dtype)
        m = self._cast("m", torch.add(base, d, out=self._room("sum", w0, d.dtype)), w0.dtype)
        near = torch.sub(self._cast("sum", m, d.dtype), d, out=self._room("near", w0, d.dtype))
        guess = self._cast("guess", near, w0.dtype)
        places, bits = self._differing(guess, w0)
        if bool((bits.isfinite() & ~m.view(-1)[places].isfinite()).any()):  # there, the guess is not finite either
            raise MergeError(f"W0 + s B A is not finite in {w0.dtype}")
        if guess is near:  # no rounding but d's own: M - W0 - d is zero wherever the guess is right
            error, d = near.view(-1)[places] - bits, d.view(-1)[places]
        else:
            error, d = near.sub_(base).view(-1), d.view(-1)
        lost, dot = float(torch.dot(error, error)), float(torch.dot(error, d))
        if not math.isfinite(lost + dot):  # infinity or NaN in W0 is its own business
            error = torch.where(error.isfinite(), error, 0)
            lost, dot = float(torch.dot(error, error)), float(torch.dot(error, d))
        index = torch.uint16 if w0.numel() <= 1 << 16 else torch.int32
        some = len(places) * (w0.itemsize + index.itemsize) < w0.nbytes
        if some:
            self.kept.append(Kept(checksum(w0), 0, places.to(index), bits))
        else:
            self.kept.append(Kept(checksum(w0), checksum(m), None, w0.reshape(-1).clone()))
        self.lost += lost
        self.dot += dot
        return m

    def _differing(self, guess: Tensor, w0: Tensor) -> tuple[Tensor, Tensor]:
        """Flat places (int64) where the bits differ, and W0 there."""
        a, b = (t.view(-1).view(BITS[t.itemsize]) for t in (w0, guess))
        if a.device.type != "cpu":
            places = (a != b).nonzero().view(-1)
            return places, w0.view(-1)[places]
        differ = self._room("differ", w0, torch.bool).view(-1).numpy()  # numpy finds them several times faster
        places = torch.from_numpy(np.flatnonzero(np.not_equal(a.numpy(), b.numpy(), out=differ)))
        return places, w0.view(-1)[places]

    def _room(self, use: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory that all tiles use in turn: to take it anew costs more than what is done in it."""
        if (room := self.scratch.get(use)) is None or room.shape != like.shape or room.dtype != dtype:
            room = self.scratch[use] = torch.empty_like(like, dtype=dtype)
        return room

    def _cast(self, use: str, t: Tensor, dtype: torch.dtype) -> Tensor:
        return t if t.dtype == dtype else self._room(use, t, dtype).copy_(t)


@dataclass(frozen=True)
class Journal:
    """What is kept of one weight: of all its tiles, end to end."""

    before: Tensor
    """int64 (tiles,)"""
    after: Tensor
    """int64 (tiles,)"""
    counts: Tensor
    """int32 (tiles,): how many elements are kept, or WHOLE."""
    places: Tensor
    """uint16 or int32: of the tiles that are not kept whole."""
    bits: Tensor
    """In the weight's dtype: of all."""

    @classmethod
    def of(cls, kept: Sequence[Kept]) -> Journal:
        """Put end to end; at least one tile."""
        before, after, places, bits = zip(*kept, strict=True)
        counts = [WHOLE if p is None else len(p) for p in places]
        some = [p for p in places if p is not None] or [torch.empty(0, dtype=torch.uint16)]
        return cls(torch.tensor(before), torch.tensor(after), torch.tensor(counts, dtype=torch.int32), torch.cat(some), torch.cat(bits))

    def kept(self, sizes: Iterable[int]) -> Iterator[Kept]:
        """Tile by tile; `sizes` are their elements."""
        place = bit = 0
        for before, after, count, size in zip(self.before.tolist(), self.after.tolist(), self.counts.tolist(), sizes, strict=True):
            if count == WHOLE:
                yield Kept(before, after, None, self.bits[bit : bit + size])
                bit += size
            else:
                yield Kept(before, after, self.places[place : place + count], self.bits[bit : bit + count])
                place, bit = place + count, bit + count

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return sum(t.nbytes for t in vars(self).values())


def refold(w0: Tensor, d: Tensor) -> Tensor:
    """M once more, from what `unfold` gave."""
    return (w0.to(d.dtype) + d).to(w0.dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype have the same bits."""
    return torch.equal(a.view(BITS[a.itemsize]), b.view(BITS[b.itemsize]))


def checksum(tile: Tensor) -> int:
    """A sum of the tile's bits, in words of 8 bytes, each times an odd number that grows with its place: whatever is exchanged, it shows."""
    flat = tile.reshape(-1).view(torch.uint8)
    words = (torch.nn.functional.pad(flat, (0, -len(flat) % 8)) if len(flat) % 8 else flat).view(torch.int64)
    odd = _odd(len(words), words.device)
    return int(torch.dot(words, odd) if words.device.type == "cpu" else (words * odd).sum())  # CUDA has no dot of integers


@functools.lru_cache(maxsize=8)
def _odd(n: int, device: torch.device) -> Tensor:
    return torch.arange(1, 2 * n, 2, device=device)
