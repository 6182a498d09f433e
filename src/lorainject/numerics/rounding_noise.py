"""The noise that rounding leaves in M - W0, where M = round(W0 + d) is stored in a coarse dtype.

Rounding moves an element by up to half a unit in the last place, in either direction alike, so M - W0 is d plus noise
with the known variance ulp^2 / 12 per element. A matrix of independent noise has no singular value much above

    edge = sqrt(the largest sum of variances of a row) + sqrt(the largest sum of variances of a column)

(for equal variances v this is sqrt(v) (sqrt(rows) + sqrt(columns)), Vershynin 2018, theorem 5.32 of arXiv 1011.3027).
What is above the edge comes from d.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .fingerprint import ulp
from .tiled_matmul import row_tiles

MARGIN = 1.1  # of the edge: rounding errors are not quite independent


class RoundingNoise(NamedTuple):
    """What rounding is expected to leave in a matrix."""

    edge: float
    """The largest singular value that noise can explain."""
    energy: float
    """The expected sum of the squares of all elements."""

    @classmethod
    def measure(cls, m: Tensor, d: Tensor, dtype: torch.dtype) -> RoundingNoise:
        """Return the noise in d = M - W0.

        Args:
            m: The stored matrix M.
            d: The difference, of the same shape. Some tools round the delta before they add it, so that its rounding
                counts, too.
            dtype: The coarser one of the dtypes of M and W0.
        """
        rows, columns = [], torch.zeros(m.shape[1], dtype=torch.float64)
        for tile in row_tiles(m.shape[0], m.shape[1], m.device):
            steps = [ulp(t[tile].abs().double(), dtype).square_() for t in (m, d)]
            variance = steps[0].add_(steps[1]).div_(12)
            rows.append(variance.sum(1))
            columns += variance.sum(0)
        by_row = torch.cat(rows)
        edge = float(by_row.max()) ** 0.5 + float(columns.max()) ** 0.5
        return cls(MARGIN * edge, float(columns.sum()))
