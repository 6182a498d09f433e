"""Compare the updates of two adapters: `compare`.

For the updates D = s B A and E of one weight:

    angle      arccos(<D, E> / (|D| |E|)): 0 degrees if one is a positive multiple of the other, 90 if they are
               orthogonal, 180 if they point in opposite directions
    overlap    phi = |U^T V|^2 / min(i, j) for orthonormal bases U (i vectors) and V (j vectors) of the subspaces of the
               two updates: 0 if they are orthogonal, 1 if one contains the other. `in` compares the directions of the
               input (right singular vectors), `out` those of the output.

phi is the measure of Hu et al. 2021 (arXiv 2106.09685), section 7.2, with i and j the full ranks. All products are
(r, r) in float64; the updates are never formed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..errors import FileError
from ..files.record import AdapterFile
from ..numerics.low_rank import SVD, product_svd
from ..numerics.modes import in_default_modes
from .reduce import table
from .terms import ONE_BASE, Adapter, as_records, by_weight, out_features, product, why_apart

NEGLIGIBLE = 1e-10  # singular values below this share of the largest one come from rounding


@dataclass(frozen=True, kw_only=True)
class ComparedWeight:
    """How two adapters change one weight; of a stack of experts, all of them together."""

    path: str
    norms: tuple[float, float]
    """The Frobenius norms of the two updates."""
    dot: float
    """The inner product of the two updates."""
    difference: float
    """The norm of the difference of the two updates."""
    ranks: tuple[int, int]
    """The numbers of singular values that are not zero; of a stack, the largest of its experts."""
    overlap_in: float
    """phi of the directions of the input; of a stack, the mean of its experts. NaN if an update is zero."""
    overlap_out: float
    """phi of the directions of the output."""

    @property
    def angle(self) -> float:
        """The angle between the two updates in degrees; NaN if one of them is zero."""
        return _angle(self.dot, *self.norms)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` found. Prints as a table."""

    weights: tuple[ComparedWeight, ...]
    """The weights that both adapters change."""
    only_first: tuple[str, ...]
    """What only the first adapter changes: weights, and in brackets what else there is."""
    only_second: tuple[str, ...]
    norms: tuple[float, float]
    """The norms of all updates of each adapter together."""
    extras: tuple[str, ...] = ()
    """What the adapters hold besides A and B, which is not compared, one line each."""

    @property
    def angle(self) -> float:
        """The angle in degrees between all updates together, as if each adapter were one vector."""
        return _angle(math.fsum(w.dot for w in self.weights), *self.norms)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON can hold, with None for NaN."""
        weights = [_without_nan(asdict(w) | {"angle": w.angle}) for w in self.weights]
        return _without_nan(asdict(self) | {"weights": weights, "angle": self.angle})

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("weight", "|a|", "|b|", "|a-b|", "angle", "rank a", "rank b", "overlap in", "out")
        ]
        for w in self.weights:
            sizes = (f"{x:.4g}" for x in (*w.norms, w.difference))
            overlaps = (f"{x:.3f}" for x in (w.overlap_in, w.overlap_out))
            rows.append((w.path, *sizes, f"{w.angle:.1f}", *map(str, w.ranks), *overlaps))
        lines = table(rows)
        lines.append(f"in total: |a| = {self.norms[0]:.4g}, |b| = {self.norms[1]:.4g}, angle {self.angle:.1f} degrees")
        lines += [f"only in a: {line}" for line in self.only_first]
        lines += [f"only in b: {line}" for line in self.only_second]
        return "\n".join([*lines, *(f"not compared: {line}" for line in self.extras)])


@in_default_modes
def compare(a: Adapter, b: Adapter) -> Comparison:
    """Compare what two adapters add to each weight: norms, angles, shared subspaces, and what only one changes.

    Args:
        a, b: Paths of any format, or records.

    Returns:
        One entry per weight that both change, and the totals.

    Raises:
        FileError: A file cannot be read or holds NaN, or the adapters are not for the same weights; each is listed.
    """
    first, second = as_records([a, b])
    if problems := why_apart([first, second]):
        raise FileError("these adapters cannot be compared:", problems, ONE_BASE)
    ours, theirs = by_weight(first), by_weight(second)
    weights, norms = [], ([0.0], [0.0])
    for name in dict.fromkeys([*ours, *theirs]):
        sites = [*ours.get(name, ()), *theirs.get(name, ())]
        out = out_features(sites)
        factors = [product(part[name], out) if name in part else None for part in (ours, theirs)]
        svds = [None if f is None else product_svd(*f) for f in factors]
        for svd, total in zip(svds, norms, strict=True):
            total.append(0.0 if svd is None else svd.lost(0))
        if factors[0] and factors[1] and svds[0] and svds[1]:
            weights.append(_compared(name, factors[0], factors[1], svds[0], svds[1]))
    return Comparison(
        weights=tuple(weights),
        only_first=_only(first, second), only_second=_only(second, first),
        norms=(math.fsum(norms[0]) ** 0.5, math.fsum(norms[1]) ** 0.5),
        extras=tuple(f"{what}: {line}" for what, file in (("a", first), ("b", second)) for line in file.beside),
    )  # fmt: skip


def _compared(name: str, f: tuple[Tensor, Tensor], g: tuple[Tensor, Tensor], u: SVD, v: SVD) -> ComparedWeight:
    """Return the entry of one weight, from the factors and the decompositions of both updates."""
    (P, Q), (R, S) = f, g
    dot = float(((P.mT @ R) * (Q @ S.mT)).sum())
    squares = u.lost(0), v.lost(0)
    pairs = list(zip(*(t.reshape(-1, *t.shape[-n:]) for t, n in ((u.U, 2), (u.S, 1), (u.Vh, 2), (v.U, 2), (v.S, 1),
                                                                 (v.Vh, 2))), strict=True))  # fmt: skip
    overlaps, ranks = [], []
    for left, sizes, right, other_left, other_sizes, other_right in pairs:
        i, j = _rank(sizes), _rank(other_sizes)
        ranks.append((i, j))
        if i and j:
            inputs = right[:i] @ other_right[:j].mT
            outputs = left[:, :i].mT @ other_left[:, :j]
            overlaps.append([float(x.square().sum()) / min(i, j) for x in (inputs, outputs)])
    means = [math.fsum(column) / len(overlaps) for column in zip(*overlaps, strict=True)] or [math.nan, math.nan]
    return ComparedWeight(
        path=name, norms=(squares[0] ** 0.5, squares[1] ** 0.5), dot=dot,
        difference=max(squares[0] + squares[1] - 2 * dot, 0.0) ** 0.5,
        ranks=(max(i for i, _ in ranks), max(j for _, j in ranks)), overlap_in=means[0], overlap_out=means[1],
    )  # fmt: skip


def _rank(S: Tensor) -> int:
    """Return how many singular values are not negligible."""
    return int((NEGLIGIBLE * S[0] < S).sum())


def _angle(dot: float, first: float, second: float) -> float:
    if first == 0 or second == 0:
        return math.nan
    return math.degrees(math.acos(max(-1.0, min(1.0, dot / (first * second)))))


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in values.items()}


def _only(file: AdapterFile, other: AdapterFile) -> tuple[str, ...]:
    """Return what an adapter changes and the other does not."""
    theirs = by_weight(other)
    lines = [name for name in by_weight(file) if name not in theirs]
    lines += [f"{name} (a whole tensor)" for name in file.replaced if name not in other.replaced]
    return (*lines, *(f"{path} (rows of tokens)" for path in file.tokens if path not in other.tokens))
