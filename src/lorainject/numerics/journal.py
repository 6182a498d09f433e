"""The journal of a merge: what is kept of W0 so that unmerge can restore it to the bit, with far less than a copy of
it.

With M = round(W0 + d), the guess round(M - d) already equals W0 for all but a few per cent of the elements. The
journal of a tile holds the position and the bits of W0 for the elements where the guess misses, and two checksums: of
M, so that a weight that was edited is not overwritten, and of W0, so that a restored tile is known to be exact
(another device or BLAS library may compute another d). A tile is kept whole where the journal would be larger than the
tile, for a delta larger than W0.

The positions are stored as gaps of 16 bits, from each position to the next. A gap beyond 16 bits is bridged by keeping
some elements that the guess does not miss.

`TileJournal` is the journal of one tile, `Journal` of one weight. Merging and restoring a tile is in tile_merge.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checksum import BITS, checksum

WHOLE = -1
GAP, MAX_GAP = torch.int16, (1 << 16) - 1  # torch cannot unpickle uint16


class TileJournal(NamedTuple):
    """What is kept of one tile W0 with n elements."""

    before: int
    """Checksum of W0."""
    after: int
    """Checksum of M."""
    gaps: Tensor | None
    """From each kept position to the next, the first from 0: unsigned numbers in the bits of int16, shape (count,).
    None if the whole tile is kept."""
    bits: Tensor
    """The kept elements of W0, shape (count,) or (n,), in W0's dtype."""

    @classmethod
    def record(cls, w0: Tensor, m: Tensor, missed: np.ndarray) -> TileJournal:
        """Return the journal of a merge from w0 to m (contiguous) whose guess misses at these ascending positions."""
        before, after = checksum(w0), checksum(m)
        if len(missed) * (w0.itemsize + GAP.itemsize) >= w0.nbytes:
            return cls(before, after, None, w0.reshape(-1).clone())
        gaps = np.diff(missed, prepend=0)
        if len(missed) == 0 or gaps.max() > MAX_GAP:
            missed = np.union1d(missed, np.arange(0, w0.numel(), MAX_GAP))
            gaps = np.diff(missed, prepend=0)
        unsigned = torch.from_numpy(gaps.astype(np.uint16).view(np.int16))
        return cls(before, after, unsigned.to(w0.device), elements_at(w0, missed))

    def correct(self, guess: Tensor) -> Tensor | None:
        """Write the kept elements into the guess (contiguous); return it, or None if it is not W0 even so."""
        assert self.gaps is not None
        positions = (self.gaps.to(guess.device, torch.int64) & MAX_GAP).cumsum(0)
        guess.view(-1)[positions] = self.bits.to(guess.device)
        return guess if checksum(guess) == self.before else None


def elements_at(t: Tensor, positions: np.ndarray) -> Tensor:
    """Return a contiguous tensor's elements at these flat positions; on CPUs numpy takes a tenth of torch's time."""
    if t.device.type != "cpu":
        return t.view(-1)[torch.from_numpy(positions).to(t.device)]
    return torch.from_numpy(t.view(-1).view(BITS[t.itemsize]).numpy()[positions]).view(t.dtype)


@dataclass(frozen=True)
class Journal:
    """What is kept of one weight: the journals of all its tiles, concatenated. The field names are keys on disk."""

    before: Tensor
    """Checksums of the tiles of W0: int64, shape (tiles,)."""
    after: Tensor
    """Checksums of the merged tiles: int64, shape (tiles,)."""
    counts: Tensor
    """int32, shape (tiles,): how many elements are kept, or WHOLE."""
    gaps: Tensor
    """int16: the gaps of all tiles that are not kept whole, as in TileJournal."""
    bits: Tensor
    """The kept elements of all tiles, in the weight's dtype."""

    @classmethod
    def join(cls, journals: Mapping[int, TileJournal]) -> Journal:
        """Return the journal of a weight from those of its tiles (at least one), by the tile's number."""
        before, after, gaps, bits = zip(*(journals[i] for i in sorted(journals)), strict=True)
        return cls(
            torch.tensor(before),
            torch.tensor(after),
            torch.tensor([WHOLE if g is None else len(g) for g in gaps], dtype=torch.int32),
            torch.cat([g for g in gaps if g is not None] or [torch.empty(0, dtype=GAP)]),
            torch.cat(bits),
        )

    def tiles(self, sizes: Iterable[int]) -> Iterator[TileJournal]:
        """Yield the journal of each tile, for tiles with these numbers of elements."""
        gap = bit = 0
        checksums = zip(self.before.tolist(), self.after.tolist(), self.counts.tolist(), sizes, strict=True)
        for before, after, count, size in checksums:
            if count == WHOLE:
                yield TileJournal(before, after, None, self.bits[bit : bit + size])
                bit += size
            else:
                yield TileJournal(before, after, self.gaps[gap : gap + count], self.bits[bit : bit + count])
                gap, bit = gap + count, bit + count

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(t.nbytes for t in vars(self).values())
