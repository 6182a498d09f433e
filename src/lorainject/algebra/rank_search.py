"""The low-rank part of the change of one matrix: at a rank, within an error, or as far as rounding noise allows.

With "auto", the rank is the number of singular values that stand above the noise that rounding to the stored dtype
leaves (numerics/rounding_noise.py). How sure that is shows in two numbers: how far the weakest direction stands above
the noise, and whether what is left has the size of noise. A change that needs so many ranks that its factors are as
large as the matrix itself has no low-rank part.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..numerics.low_rank import SVD, matrix_svd
from ..numerics.rounding_noise import RoundingNoise

FIRST_TRIAL = 16  # singular values that are computed at first; twice as many each time they do not suffice
HIGHEST_AUTO = 512  # the highest rank that "auto" tries: beyond it, a change counts as one of full rank
ARITHMETIC = 8.0  # times the precision of the arithmetic: smaller singular values are its rounding errors
CERTAIN, NOISE_LEFT = 2.0, 1.3
"""A rank is certain if the weakest direction is so many times the noise, and what is left at most this share of it."""
Rank = int | Literal["auto"] | None


class LowRankPart(NamedTuple):
    """The low-rank part P Q of a change D of a matrix."""

    P: Tensor
    """Shape (rows, r)."""
    Q: Tensor
    """Shape (r, width)."""
    norm: float
    """|D|"""
    lost: float
    """|D - P Q|^2"""
    note: str = ""
    """How sure the rank is, where it was found."""

    @property
    def r(self) -> int:
        """The rank."""
        return self.Q.shape[0]


def find_low_rank(w0: Tensor, m: Tensor, r: Rank, error: float | None = None) -> LowRankPart | None:
    """Return the low-rank part of M - W0; None if the change has full rank, or is no more than noise.

    Args:
        w0, m: The matrices, in the dtypes that they are stored in.
        r: The rank, or "auto". None if `error` is the relative error that is allowed.
        error: The highest relative error.
    """
    wide = torch.promote_types(torch.promote_types(w0.dtype, m.dtype), torch.float32)
    d = m.to(wide) - w0.to(wide)
    highest = min(max_rank(d.shape), HIGHEST_AUTO if r == "auto" else max(d.shape))
    if isinstance(r, int):
        svd = matrix_svd(d, min(r, *d.shape))
        return _part(svd, min(r, *d.shape))
    coarse = max((w0.dtype, m.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    noise = RoundingNoise.measure(m, d, coarse) if r == "auto" else None
    k = min(FIRST_TRIAL, highest)
    while True:
        svd = matrix_svd(d, k + 1)
        if noise is None:
            rank = svd.rank_within((error or 0.0) ** 2)
        else:
            arithmetic = ARITHMETIC * torch.finfo(d.dtype).eps * float(svd.S[0])
            noise = RoundingNoise(max(noise.edge, arithmetic), max(noise.energy, arithmetic**2))
            rank = int((noise.edge < svd.S).sum())
        if rank is not None and rank <= k:
            return None if rank == 0 else _part(svd, rank, noise)
        if k >= highest:
            return None
        k = min(2 * k, highest)


def max_rank(shape: torch.Size) -> int:
    """Return the highest rank at which the factors are smaller than the matrix."""
    rows, width = shape
    return max(1, (rows * width - 1) // (rows + width))


def _part(svd: SVD, r: int, noise: RoundingNoise | None = None) -> LowRankPart:
    lost = svd.lost(r)
    return LowRankPart(*svd.factors(r), svd.lost(0) ** 0.5, lost, _note(svd, r, lost, noise) if noise else "")


def _note(svd: SVD, r: int, lost: float, noise: RoundingNoise) -> str:
    """Return how sure the rank is."""
    above = float(svd.S[r - 1]) / noise.edge
    left = lost / noise.energy if noise.energy else 0.0
    word = "unsure" if left > NOISE_LEFT else "certain" if above >= CERTAIN else "likely"
    return f"{word}: the weakest direction is {above:.3g} times the noise, what is left {left:.2f} times"
