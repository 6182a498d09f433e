"""How well a tensor of a merged checkpoint agrees with W0 + sum_i c_i d_i, measured tile by tile.

    E    = round(W0 + sum_i c_i d_i)      the sum in float32 or wider, rounded once to the merged dtype
    step = ulp(W0 or M) + ulp(d)          one rounding of the sum, and one of the delta, which some tools round first

M agrees within rounding if no element is more than a step away from the unrounded sum. An update that is small beside a
step could be missing and still be that close. So the inner products <M - W0, d> and <E - W0, d> are compared as well:
their difference must be what chance makes of the elements in which M and E differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checkpoint.byte_runs import Runs
from ..errors import MergeError
from ..files.io.safetensors_file import TORCH_DTYPES, TensorEntry
from ..numerics.delta import Factors
from ..numerics.fingerprint import ulp
from ..numerics.threads import ForEach
from ..numerics.tile_merge import TileWorkspace, sum_dtype
from ..numerics.tiled_matmul import LowRankProduct, exact_product, fast_product, row_tiles

PRODUCT_SLACK = 2.0**-21  # of |P_i| |Q_j|: rounding inside a product B A that was formed in float32
NOISE = 5.0  # standard deviations that chance may make of the inner products
FEW = 8  # elements that may round the other way because the delta was rounded first
SAME_SCALE = 0.01  # a smaller relative difference of the inner products is no wrong scale


@dataclass(frozen=True)
class Part:
    """Some runs of a tensor, and the delta that each adapter adds to them."""

    runs: Runs
    factors: tuple[Factors, ...]
    """All deltas, in the order in which a merge adds them: P (n, r), Q (r, width)."""
    deltas: tuple[LowRankProduct, ...]
    """The same, one per adapter, in float64."""


@dataclass
class Agreement:
    """Sums over all elements of a tensor in which W0 is finite. d is sum_i c_i d_i."""

    count: int = 0
    differing: int = 0
    """The number of elements in which M is not E."""
    changed: int = 0
    """The number of elements in which M is not W0; of a tile with the bits of a merge, 0 or 1."""
    beyond: int = 0
    """The number of elements that are more than a step away from W0 + d."""
    steps: float = 0.0
    """The largest |M - W0 - d| in steps; infinite if M is not finite."""
    dot: float = 0.0
    """<M - W0, d>"""
    expected: float = 0.0
    """<E - W0, d>"""
    asked: float = 0.0
    """<d, d>"""
    square: float = 0.0
    """<M - W0, M - W0>"""
    variance: float = 0.0
    """The sum of (M - E)^2 d^2: the variance of <M - E, d> if all M - E had random signs."""
    dots: list[float] = field(default_factory=list)
    """<M - W0, d_i> for each adapter, if it was asked for."""

    def add(self, other: Agreement) -> None:
        """Add the sums of another tile."""
        self.steps = max(self.steps, other.steps)
        for name in ("count", "differing", "changed", "beyond", "dot", "expected", "asked", "square", "variance"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.dots = [x + y for x, y in zip(self.dots or [0.0] * len(other.dots), other.dots, strict=True)]

    @property
    def is_unchanged(self) -> bool:
        """True if M is W0, although more elements of the sum than rounding could explain are not."""
        return self.changed == 0 and self.differing >= FEW

    @property
    def is_rounding(self) -> bool:
        """True if M is W0 + d up to rounding."""
        difference = abs(self.dot - self.expected)
        is_chance = difference <= NOISE * self.variance**0.5 or difference <= SAME_SCALE * abs(self.expected)
        return self.differing == 0 or (self.steps <= 1 and is_chance)

    @property
    def survival(self) -> float:
        """The share of d that is in M."""
        return self.dot / self.asked if self.asked else 1.0

    @property
    def cosine(self) -> float:
        """The cosine of the angle between M - W0 and d."""
        return self.dot / (self.asked * self.square) ** 0.5 if self.asked and self.square else 0.0


def measure(parts: Sequence[Part], multiples: Sequence[float], base: tuple[int, TensorEntry],
            merged: tuple[int, TensorEntry], for_each: ForEach, regress: bool = False) -> Agreement:  # fmt: skip
    """Measure how well a tensor agrees with W0 + sum_i c_i d_i.

    Args:
        parts: The parts of the tensor that have deltas.
        multiples: c_i for each adapter.
        base, merged: The file descriptor and the entry of W0 and of M, which have one shape.
        for_each: Of numerics/threads.py.
        regress: Measure `dots`, too.
    """
    total, spaces = Agreement(), (TileWorkspace(), TileWorkspace(), TileWorkspace())
    for part in parts:
        # Most tensors have the bits of one of the two products of a merge, which costs a fraction of what follows.
        asis = not regress and all(c == 1 for c in multiples)
        merges = [fast_product(part.factors, TORCH_DTYPES[base[1].dtype]), exact_product(part.factors)] if asis else []
        P = torch.cat([f.P * (f.s * c) for f, c in zip(part.deltas, multiples, strict=True)], -1)
        delta = LowRankProduct(P, torch.cat([f.Q for f in part.deltas], -2))
        results: list[Agreement] = []

        def measure_tile(rows: slice, part: Part = part, delta: LowRankProduct = delta,
                         results: list[Agreement] = results,
                         merges: list[LowRankProduct] = merges) -> None:  # fmt: skip
            w0 = part.runs.read_tile(*base, rows, spaces[0])
            m = part.runs.read_tile(*merged, rows, spaces[1])
            for product in tuple(merges):
                if (same := _same_as_merged(w0, m, product.select_rows(rows), spaces[2])) is not None:
                    results.append(same)
                    return
                merges[:] = [other for other in merges if other is not product]  # a merge takes one product for all
            result = _agreement(w0, m, delta.select_rows(rows))
            if regress:
                change = (m.double() - w0.double()).nan_to_num_(0.0, 0.0, 0.0)
                result.dots = [f.s * float((f.P[rows] * (change @ f.Q.mT)).sum()) for f in part.deltas]
            results.append(result)

        for_each(measure_tile, ((rows,) for rows in row_tiles(len(P), delta.Q.shape[-1], P.device)))
        for result in results:
            total.add(result)
    return total


def _same_as_merged(w0: Tensor, m: Tensor, delta: LowRankProduct, space: TileWorkspace) -> Agreement | None:
    """Return the sums of a tile if M has the bits that a merge with this product gives; else None."""
    if w0.dtype != m.dtype:
        return None
    try:
        expected, stats, _ = space.merge(w0, delta, reversible=False)
    except MergeError:  # the sum is not finite
        return None
    if not torch.equal(expected, m):
        return None
    share = stats.asked + stats.dot
    return Agreement(count=w0.numel(), dot=share, expected=share, asked=stats.asked,
                     changed=0 if torch.equal(w0, m) else 1)  # fmt: skip


def fitted_multiples(parts: Sequence[Part], dots: Sequence[float]) -> list[float]:
    """Return the c_i for which sum_i c_i d_i is closest to M - W0, by least squares."""
    n = len(dots)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for part in parts:
        for i, f in enumerate(part.deltas):
            for j, g in enumerate(part.deltas):
                gram[i, j] += f.s * g.s * float(((f.P.mT @ g.P) * (f.Q @ g.Q.mT)).sum())
    fit = torch.linalg.pinv(gram, hermitian=True) @ torch.tensor(dots, dtype=torch.float64)
    return [float(c) for c in fit]


def float64_product(parts: Sequence[Factors]) -> LowRankProduct:
    """Return the sum of the deltas of one adapter as one product in float64."""
    P = torch.cat([f.P.double() * f.s.double() for f in parts], -1)
    return LowRankProduct(P, torch.cat([f.Q.double() for f in parts], -2))


def _agreement(w0: Tensor, m: Tensor, delta: LowRankProduct) -> Agreement:
    """Return the sums of one tile."""
    wide, d = torch.promote_types(sum_dtype(w0.dtype), m.dtype), delta.dense()
    finite = w0.isfinite()
    if not bool(finite.all()):
        d = d.where(finite, 0.0)
    expected = (w0.to(wide) + d.to(wide)).to(m.dtype)
    differs = (m != expected) & finite
    result = Agreement(
        count=w0.numel(), differing=int(differs.sum()), changed=int(((m != w0.to(m.dtype)) & finite).sum())
    )
    change, wanted = ((t.double() - w0.double()).where(finite, 0.0) for t in (m, expected))
    result.square = _dot(change, change)
    change.nan_to_num_(0.0, 0.0, 0.0)
    result.dot, result.expected, result.asked = _dot(change, d), _dot(wanted, d), _dot(d, d)
    if result.differing:
        rows, columns = differs.nonzero(as_tuple=True)
        w, x, y, e = (t[rows, columns].double() for t in (w0, m, d, expected))
        size = delta.P.norm(dim=1)[rows] * delta.Q.norm(dim=0)[columns]
        coarse = max((w0.dtype, m.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        step = ulp(torch.stack([w.abs(), x.abs(), (w + y).abs()]).amax(0).nan_to_num(math.inf), coarse)
        step += ulp(y.abs(), coarse) + PRODUCT_SLACK * size
        steps = ((x - w - y).abs() / step).nan_to_num(math.inf)
        result.steps, result.beyond = float(steps.max()), int((steps > 1).sum())
        result.variance = float(((x - e) * y).square().nan_to_num(0.0, 0.0, 0.0).sum())
    return result


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))


def dtype_of(entry: TensorEntry) -> torch.dtype | None:
    """Return the dtype of a tensor on disk; None if torch has none like it."""
    return TORCH_DTYPES.get(entry.dtype)
