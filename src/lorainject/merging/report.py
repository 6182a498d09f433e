"""The report of a merge, and what happens when too little of a delta survives the rounding to the stored dtype.

The survival of a delta d is <W - W0, d> / <d, d> for the stored weight W, measured on every element. bfloat16 has
8 bits of precision, so most of a delta of 0.1 % of the weight is rounded away, whoever merges it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import MergeError, SurvivalWarning
from ..numerics.tile_merge import DeltaStats

INSIDE = (__name__.split(".")[0], "torch", "contextlib")
"""The packages between a call of lorainject and the warning: the decorators of verbs, and contexts."""
MIN_SURVIVAL = 0.9  # a smaller share of a delta is worth a warning, or is refused


@dataclass(frozen=True, kw_only=True)
class MergedSite:
    """What became of one weight's delta d = s B A when W0 + d was rounded to the stored dtype, measured on all elements
    in which W0 is finite."""

    path: str
    norm: float
    """||d||, the Frobenius norm of the delta."""
    survival: float
    """<W - W0, d> / <d, d>: the share of the delta that is in the stored weight W; 1 for a zero delta."""
    error: float
    """||W - W0 - d|| / ||d||; 0 for a zero delta."""
    weight_bytes: int
    """Size of the weight in bytes."""
    journal_bytes: int
    """Size in bytes of what is kept so that unmerge is exact, the factors included; 0 after merge(reversible=False)."""
    codes_changed: float | None = None
    """The share of a quantized weight's codes that changed; None for other weights."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What merge did. Prints as one line."""

    names: tuple[str, ...]
    """The merged adapters."""
    strengths: tuple[float, ...]
    """The strength of each merged adapter."""
    sites: tuple[MergedSite, ...]
    """One entry per merged weight."""

    @property
    def survival(self) -> float:
        """The share of all deltas together that is in the stored weights: the sites' shares, weighted by ||d||^2."""
        asked = sum(s.norm**2 for s in self.sites)
        return sum(s.survival * s.norm**2 for s in self.sites) / asked if asked else 1.0

    @property
    def weight_bytes(self) -> int:
        """Size in bytes of all merged weights."""
        return sum(s.weight_bytes for s in self.sites)

    @property
    def journal_bytes(self) -> int:
        """Size in bytes of all that is kept for unmerge."""
        return sum(s.journal_bytes for s in self.sites)

    def __str__(self) -> str:
        return (
            f"merged {with_strengths(self.names, self.strengths)} into {len(self.sites)} weights"
            f" ({self.weight_bytes:,} bytes, {self.journal_bytes:,} kept for unmerge);"
            f" {self.survival:.4f} of the delta survived the storage dtype"
        )


def with_strengths(names: Iterable[object], strengths: Iterable[float]) -> str:
    """Return adapters as messages list them, each with its strength unless that is 1."""
    return ", ".join(f"{n}" if t == 1 else f"{n} ({t:g})" for n, t in zip(names, strengths, strict=True))


def merged_site(path: str, stats: DeltaStats, weight_bytes: int, codes_changed: float | None = None) -> MergedSite:
    """Return the report of one weight for which nothing is kept yet."""
    return MergedSite(
        path=path,
        norm=stats.asked**0.5,
        survival=stats.survival,
        error=(stats.lost / stats.asked) ** 0.5 if stats.asked else 0.0,
        weight_bytes=weight_bytes,
        journal_bytes=0,
        codes_changed=codes_changed,
    )


def check_survival(sites: Sequence[MergedSite], strict: bool | None) -> None:
    """Warn, or raise MergeError, where less than MIN_SURVIVAL of a delta survives the rounding to the stored weight.

    Args:
        sites: The weights, measured.
        strict: True refuses, False warns, None refuses quantized weights and warns of others.
    """
    lost = {
        s: f"{s.path}: keeps {max(s.survival, 0.0):.2f} of its delta, with a rounding error of {s.error:.0%}"
        for s in sites
        if s.survival < MIN_SURVIVAL
    }
    refused = [line for s, line in lost.items() if strict or (strict is None and s.codes_changed is not None)]
    what = f"less than {MIN_SURVIVAL} of a delta survives the rounding to the stored weight"
    advice = "keep the adapter unmerged, merge in a wider dtype (a copy of the model in float32)"
    if refused:
        raise MergeError(f"nothing was merged: {what}:", refused, f"{advice}, or accept the loss with strict=False")
    if lost:
        message = MergeError(f"{what}:", lost.values(), advice.replace(", merge", ", or merge"))
        warnings.warn(str(message), SurvivalWarning, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """Return the stacklevel, for warnings.warn in the calling function, of the code that called lorainject."""
    frame, level = sys._getframe(2), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in INSIDE:
        frame, level = frame.f_back, level + 1
    return level
