"""The figures of a report: one row per adapted weight, and how similar the updates are to one another.

A row of a stack of experts sums up its matrices: norms are those of all together, ranks and factors are medians.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..numerics.tile_merge import DeltaStats, TileWorkspace
from ..numerics.tiled_matmul import LowRankProduct, row_tiles
from .base_weights import amplification, intruder_dimensions
from .spectra import Spectrum, spectrum
from .subspaces import subspace_similarity
from .updates import SiteUpdate

GRID = 32  # directions that a grid shows of each update
LARGEST_SVD = 2048  # the longest shorter side of a weight that is decomposed as a whole


@dataclass(frozen=True, kw_only=True)
class SiteMeasures:
    """What can be measured at one adapted weight. Fields that need a base are None without one."""

    adapter: str
    name: str
    kind: str
    matrices: int
    """Number of matrices: the experts of a stack, otherwise 1."""
    shape: tuple[int, int]
    """(out, in) of each matrix."""
    r: int
    scale: float
    norm: float
    """|s B A|, of all matrices together."""
    singular_values: tuple[float, ...]
    """Descending; of a stack, the root mean square over its matrices."""
    rank: int
    """Number of directions in use."""
    effective_rank: float | None
    """As Spectrum.effective_rank. None for a zero update."""
    rank_95: int
    """The rank that keeps 95 % of the energy; of a stack, the largest of its matrices."""
    dtype: str | None = None
    """The dtype of the base weight."""
    relative_size: float | None = None
    """|dW| / |W0|."""
    amplification: float | None = None
    """|dW| / |U^T W0 V|, table 7."""
    random_amplification: float | None = None
    """The same with random U and V in the denominator."""
    survival: float | None = None
    """The share of the update that is in the merged weight after it was rounded to `dtype`."""
    intruders: int | None = None
    """Number of intruder dimensions among the top 10 of the merged weight; of a stack, the sum. None for large
    weights."""
    remark: str = ""
    """Why something was not measured."""


def measure(adapter: str, update: SiteUpdate) -> tuple[SiteMeasures, Spectrum]:
    """Return the measures of one site, and its spectrum."""
    parts = spectrum(update.A, update.B, update.s)
    out, in_ = update.B.shape[-2], update.A.shape[-1]
    fields: dict[str, Any] = {"remark": update.why_no_base}
    if update.read_base is not None:
        fields |= _beside_base(update, update.read_base(), float(parts.norm.norm()))
    effective = parts.effective_rank
    return SiteMeasures(
        adapter=adapter, name=update.name, kind=update.kind, matrices=parts.norm.numel(), shape=(out, in_),
        r=update.A.shape[-2], scale=update.s, norm=float(parts.norm.norm()),
        singular_values=tuple(_flat(parts.S).square().mean(0).sqrt().tolist()), rank=int(parts.rank.max()),
        effective_rank=None if effective.isnan().all() else float(effective.nanmedian()),
        rank_95=int(parts.rank_for(0.95).max()), **fields,
    ), parts  # fmt: skip


def _beside_base(update: SiteUpdate, W0: Tensor, norm: float) -> dict[str, Any]:
    assert update.dtype is not None
    A, B = (t.to(W0.device) for t in (update.A, update.B))
    ratios = amplification(A, B, W0, update.s)
    size = float(ratios.weight_norm.norm())
    known: dict[str, Any] = {
        "dtype": str(update.dtype).removeprefix("torch."), "relative_size": norm / size if size else None,
        "amplification": _median(ratios.factor),
        "random_amplification": _median(ratios.delta_norm / ratios.random_norm),
        "survival": survival(A, B, update.s, W0, update.dtype),
    }  # fmt: skip
    if update.has_magnitude:
        return known | {"remark": "DoRA: the measures are those of s B A without the magnitude"}
    if min(W0.shape[-2:]) > LARGEST_SVD:
        return known | {"remark": f"intruder dimensions are counted up to {LARGEST_SVD} rows or columns"}
    W = W0 + (update.s * B.to(W0.dtype)) @ A.to(W0.dtype)
    return known | {"intruders": int(intruder_dimensions(W0, W).count.sum())}


def survival(A: Tensor, B: Tensor, s: float, W0: Tensor, dtype: torch.dtype) -> float:
    """Return the share of s B A that is in round(W0 + s B A), as a merge into this dtype measures it.

    Args:
        A: Shape (*stack, r, in).
        B: Shape (*stack, out, r).
        s: The scale.
        W0: Shape (*stack, out, in), with values that the dtype holds.
        dtype: The dtype that the merged weight is rounded to.
    """
    space, stats = TileWorkspace(), []
    for a, b, w in zip(*(t.reshape(-1, *t.shape[-2:]) for t in (A, B, W0)), strict=True):
        product = LowRankProduct(b.double(), a.double(), float(s))
        for rows in row_tiles(w.shape[0], w.shape[1], w.device):
            tile = w[rows].to(dtype).contiguous()
            stats.append(space.merge(tile, product.select_rows(rows), reversible=False)[1])
    return DeltaStats.total(stats).survival


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _median(t: Tensor) -> float | None:
    """Return the median of what is a number; None if nothing is."""
    known = t[t.isfinite()]
    return float(known.median()) if len(known) else None


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """phi between the input directions of two updates of one weight, from two adapters."""

    site: str
    adapters: tuple[str, str]
    grid: tuple[tuple[float | None, ...], ...]
    """phi(i, j) for the first directions of both. None where an update has no such direction."""
    at_rank_95: float | None
    """phi where both keep 95 % of their energy."""
    random: float
    """phi of random subspaces there."""


def between_adapters(spectra: Mapping[str, Mapping[str, Spectrum]]) -> list[Similarity]:
    """Return the similarity of every two adapters at every weight that both adapt; stacks are left out.

    Args:
        spectra: The spectra by adapter and site.
    """
    names, result = list(spectra), []
    for n, first in enumerate(names):
        for second in names[n + 1 :]:
            for site in spectra[first].keys() & spectra[second].keys():
                a, b = spectra[first][site], spectra[second][site]
                if a.S.ndim > 1 or a.Vh.shape[-1] != b.Vh.shape[-1]:
                    continue
                grid = subspace_similarity(a.input_directions[:GRID], b.input_directions[:GRID])
                i, j = (max(1, min(GRID, int(x.rank_for(0.95)))) for x in (a, b))
                result.append(Similarity(
                    site=site, adapters=(first, second),
                    grid=tuple(tuple(None if x != x else x for x in row) for row in grid.tolist()),
                    at_rank_95=_number(grid[i - 1, j - 1]), random=max(i, j) / a.Vh.shape[-1],
                ))  # fmt: skip
    order = {site: n for n, site in enumerate(dict.fromkeys(s for by_site in spectra.values() for s in by_site))}
    return sorted(result, key=lambda s: (*s.adapters, order[s.site]))


@dataclass(frozen=True, kw_only=True)
class LayerSimilarity:
    """phi between the input directions of one projection in every two layers."""

    projection: str
    """The path of the projection, with * in place of the layer."""
    layers: tuple[int, ...]
    """The numbers of the layers, in the order of the table."""
    table: tuple[tuple[float, ...], ...]
    """phi where both updates keep 95 % of their energy."""


def between_layers(spectra: Mapping[str, Spectrum]) -> list[LayerSimilarity]:
    """Return how similar the layers of one adapter are, for each projection; stacks are left out.

    Args:
        spectra: The spectra of one adapter by site.
    """
    groups: dict[str, dict[int, Spectrum]] = {}
    for site, parts in spectra.items():
        number = layer_number(site)
        if number is not None and parts.S.ndim == 1 and int(parts.rank):
            groups.setdefault(starred(site), {})[number] = parts
    result = []
    for projection, by_layer in groups.items():
        if len(by_layer) > 1 and len({parts.Vh.shape[-1] for parts in by_layer.values()}) == 1:
            bases = [parts.Vh[: int(parts.rank_for(0.95))] for parts in by_layer.values()]
            table = tuple(tuple(float((V @ W.mT).square().sum()) / min(len(V), len(W)) for W in bases) for V in bases)
            result.append(LayerSimilarity(projection=projection, layers=tuple(by_layer), table=table))
    return result


def starred(site: str) -> str:
    """Return a site's name with * for its first number, the layer."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", site, count=1)


def layer_number(site: str) -> int | None:
    """Return the first number in a site's name; None if there is none."""
    match = re.search(r"(?:^|\.)(\d+)(?=\.|$)", site)
    return int(match[1]) if match else None


def _number(x: Tensor) -> float | None:
    return None if x.isnan() else float(x)


def oddities(rows: Sequence[SiteMeasures]) -> list[str]:
    """Return what is unusual about the rows of one adapter, one line each."""
    lines = []
    if saved := [row for row in rows if row.r >= 4 and 0 < row.rank_95 <= row.r // 2]:
        worst = max(saved, key=lambda row: row.r / row.rank_95)
        lines.append(
            f"at {len(saved)} of {len(rows)} weights, half of the rank or less has 95 % of the energy, as r"
            f" {worst.r}, of which {worst.rank_95} would do, at {worst.name}"
        )
    if lost := [row for row in rows if row.survival is not None and row.survival < 0.9]:
        least = min(lost, key=lambda row: row.survival or 0.0)
        lines.append(
            f"a merge into {least.dtype} would keep less than 0.9 of the update at {len(lost)} weights, the least"
            f" ({least.survival:.2f}) at {least.name}: merge in float32, or keep the adapter unmerged"
        )
    if huge := [row for row in rows if (row.relative_size or 0) > 0.3]:
        lines.append(f"the update is larger than 0.3 of the base weight at {_names(huge)}")
    if new := [row for row in rows if row.intruders]:
        total = sum(row.intruders or 0 for row in new)
        lines.append(f"{total} of the largest directions of the merged weights are not in the base: at {_names(new)}")
    if zero := [row for row in rows if row.rank == 0]:
        lines.append(f"the update is zero at {_names(zero)}")
    return lines


def _names(rows: Iterable[SiteMeasures]) -> str:
    names = [row.name for row in rows]
    return ", ".join(names[:3]) + f", ... ({len(names)} in all)" * (len(names) > 3)
