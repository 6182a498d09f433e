"""The verdict on one tensor of a merged checkpoint: what is in it, if it is not base + adapters.

A tensor that does not agree with the sum of the updates (agreement.py) is read again with other multiples of them,
found by least squares. Where rounding swallows a part of a small update, the multiple is too low at first; it is
corrected until the tensor that it predicts holds as much of the update as the one on disk.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch

from ..checkpoint.shard_writer import WeightUpdate
from ..numerics.delta import Factors
from ..numerics.threads import ForEach
from ..numerics.tile_merge import TileWorkspace
from .agreement import Agreement, Part, fitted_multiples, float64_product, measure
from .pairs import Pair

RIGHT = ("exact", "rounded")
VERDICTS = {
    "exact": "has the bits of the sum, rounded once",
    "rounded": "is the sum, up to one rounding step",
    "missing": "has the base's values: the update is missing",
    "double": "holds the update twice",
    "scaled": "holds the update with another weight",
    "swapped": "holds the update of another tensor",
    "changed": "is neither the base nor the sum",
    "absent": "is not in the merged checkpoint",
}
"""What can be said of a tensor that adapters change."""
NEAR = 0.02  # how far a fitted multiple may be from 0 or 2 to be called missing or double
STEPS = 2.0  # how many rounding steps a tensor may be from the sum with fitted multiples
ALIGNED = 0.9  # the cosine from which on a change is called another tensor's update
SAMPLED_ROWS = 16  # rows of a tensor by which it is first compared with another update
MOST_SWAPPED = 64  # the most wrong tensors of one shape that are compared with each other
ROUNDS = 4  # passes that correct a fitted multiple for what rounding takes from small updates


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifiedTensor:
    """What a merged checkpoint holds in place of one tensor that adapters change."""

    path: str
    """The weight in the model."""
    key: str
    """The name of the tensor on disk."""
    verdict: str
    """A name in VERDICTS."""
    multiples: dict[str, float]
    """How many times the update of each adapter that changes the tensor is in it: 1 each if it is right."""
    survival: float = 0.0
    """The share of the whole update that is in the tensor, relative to what was to be added."""
    steps: float = 0.0
    """The largest distance from the unrounded sum, in rounding steps."""
    differing: int = 0
    """The number of elements that are not the sum, rounded once."""
    note: str = ""
    """What else is to be said, for instance whose update it holds."""

    def __str__(self) -> str:
        what = VERDICTS[self.verdict]
        if self.verdict == "scaled":
            what = "merged with " + ", ".join(f"{c:.4g} of {name}" for name, c in self.multiples.items())
        return f"{self.key}: {what}{f' ({self.note})' * bool(self.note)}"


class AdaptedTensor:
    """One tensor on disk that adapters change, in the base and in the merged checkpoint.

    Args:
        key: The name of the tensor on disk.
        updates: The weights that are stored in it, with their deltas.
        names: The names of all adapters.
        pair: Both checkpoints.
        for_each: From numerics/threads.py.
    """

    def __init__(
        self, key: str, updates: Sequence[WeightUpdate], names: Sequence[str], pair: Pair, for_each: ForEach
    ) -> None:
        self.key, self.updates, self.pair, self.for_each = key, updates, pair, for_each
        self.sources = sorted({i for update in updates for i in update.sources})
        self.names = [names[i] for i in self.sources]
        self.verdict, self.note, self.agreement = "absent", "", Agreement()
        self.multiples = [0.0] * len(self.sources)

    def parts(self) -> list[Part]:
        """Return the runs of the tensor that are changed, with one product per adapter."""
        parts = []
        for update in self.updates:
            for patch in update.patches(self.key):
                factors: dict[int, list[Factors]] = {i: [] for i in self.sources}
                for i, f in zip(update.sources, patch.factors(), strict=True):
                    factors[i].append(f)
                n, width = len(patch.runs.starts), patch.runs.width
                idle = [Factors(torch.zeros(n, 0), torch.zeros(0, width), torch.tensor(1.0))]
                products = tuple(float64_product(factors[i] or idle) for i in self.sources)
                parts.append(Part(patch.runs, tuple(patch.factors()), products))
        return parts

    def _measure(self, parts: Sequence[Part], multiples: Sequence[float], regress: bool = False) -> Agreement:
        return measure(parts, multiples, self.pair.base.at(self.key), self.pair.other.at(self.key), self.for_each,
                       regress)  # fmt: skip

    def judge(self) -> None:
        """Find the verdict."""
        if why := self.pair.why_apart(self.key):
            self.verdict, self.note = ("changed", why) if self.key in self.pair.other.entries else ("absent", "")
            return
        parts, ones = self.parts(), [1.0] * len(self.sources)
        self.agreement = self._measure(parts, ones)
        if self.agreement.is_unchanged:
            self.verdict = "missing"
        elif self.agreement.is_rounding:
            self.multiples = ones
            self.verdict = "exact" if self.agreement.differing == 0 else "rounded"
        else:
            self.verdict = self._fit(parts)
        covered = sum(part.runs.numel for part in parts)
        if covered < np.prod(self.pair.base.entries[self.key].shape):
            outside = self.pair.difference(self.key, [part.runs for part in parts])
            if outside and self.verdict in RIGHT:
                self.verdict, self.note = "changed", f"outside of the updated rows: {outside}"

    def _fit(self, parts: Sequence[Part]) -> str:
        """Find the multiples of the updates that explain the tensor, if any do; return the verdict."""
        fit = fitted_multiples(parts, self._measure(parts, [1.0] * len(self.sources), regress=True).dots)
        for _ in range(ROUNDS):
            result = self._measure(parts, fit)
            if result.expected == 0 or abs(result.dot / result.expected - 1) < NEAR / 10:
                break
            fit = [c * result.dot / result.expected for c in fit]
        self.multiples = fit
        if result.steps > STEPS:
            self.note = f"{self.agreement.beyond:,} of {self.agreement.count:,} elements are off"
            return "changed"
        whole = (
            {round(c) for c in fit if abs(c - round(c)) < NEAR} if all(abs(c - round(c)) < NEAR for c in fit) else ()
        )
        return "missing" if whole == {0} else "double" if whole == {2} else "scaled"

    def shape(self) -> tuple[tuple[int, int], ...]:
        """Return the sizes of the parts. Only tensors with the same ones can hold each other's updates."""
        return tuple((len(part.runs.starts), part.runs.width) for part in self.parts())

    def holds_update_of(self, other: AdaptedTensor) -> bool:
        """True if the tensor holds the update that belongs to another one; a few rows are tried first."""
        parts, theirs = self.parts(), other.parts()
        if len(self.sources) != len(other.sources):
            return False
        rows, runs = slice(0, SAMPLED_ROWS), parts[0].runs
        w0, m = (runs.read_tile(*shards.at(self.key), rows, TileWorkspace()).double() for shards in self.pair)
        d = sum((f.P[rows] * f.s) @ f.Q for f in theirs[0].deltas)
        if not torch.cosine_similarity((m - w0).flatten(), torch.as_tensor(d).flatten(), dim=0) > ALIGNED / 2:
            return False
        moved = [Part(p.runs, q.factors, q.deltas) for p, q in zip(parts, theirs, strict=True)]
        return self._measure(moved, [1.0] * len(self.sources)).cosine > ALIGNED

    def report(self) -> VerifiedTensor:
        """Return what was found."""
        return VerifiedTensor(
            path=", ".join(update.name for update in self.updates), key=self.key, verdict=self.verdict,
            multiples=dict(zip(self.names, self.multiples, strict=True)), survival=self.agreement.survival,
            steps=self.agreement.steps, differing=self.agreement.differing, note=self.note,
        )  # fmt: skip


def find_swapped(tensors: Sequence[AdaptedTensor]) -> None:
    """Among the tensors that are neither the base nor the sum, find those that hold each other's updates.

    Where more than MOST_SWAPPED of one shape are wrong, nothing is tried: the base is another one.
    """
    by_shape: dict[tuple[tuple[int, int], ...], list[AdaptedTensor]] = {}
    for t in tensors:
        if t.verdict == "changed" and t.agreement.count:
            by_shape.setdefault(t.shape(), []).append(t)
    for group in by_shape.values():
        for t, other in itertools.permutations(group if len(group) <= MOST_SWAPPED else (), 2):
            if t.verdict == "changed" and t.holds_update_of(other):
                t.verdict, t.note = "swapped", f"that of {other.key}"
