"""Exact conversions of adapters: each returns factors of the same update s B A, up to float32's rounding.

    with_scale_folded     B' = B s / s'
    with_rank             rows of zeros under A, columns of zeros beside B
    slices_to_whole       A' = the slices' A one below the other; B' = their B side by side, zero outside their rows
    split_rows            each part of a fused weight has its rows of B, and all of A
    split_experts         each expert e of a stack has A[e] and B[e]
    transposed            (B A)^T = A^T B^T
    split_merged_linear   loralib's MergedLinear: group j has rows [j r, (j + 1) r] of A, and its own rows of B
    halves_from_pairs     the rows of q and k in rotary pairs (n, d/2, 2), as in Meta's code, are reordered into halves
                          (n, 2, d/2), as in transformers' code
    parts_from_groups     groups of query heads, each followed by its k and v, become all q, all k, all v
    tucker_A              A' = einsum("mnhw,nj->mjhw", mid, down), B' = up

Reducing the rank is not among them: that is an approximation, and nothing in this library does it unasked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import FileError
from ..lora.weight_kinds import KINDS
from ..plan import site_name
from .record import StoredSite, collected

LARGEST = 2**31
"""Elements of the largest tensor that a conversion may make, because the sizes in a file may be hostile."""


MAX_IDLE_GROUPS = 64
"""Of a MergedLinear: a fused weight has a few groups, and the sizes in a file may be hostile."""


def checked_shape(what: str, *shape: int) -> tuple[int, ...]:
    """Return the shape if a tensor of it may be made. Raises FileError if it has more than LARGEST elements."""
    if math.prod(shape) > LARGEST:
        raise FileError(
            f"{what} would need a tensor of shape {shape}",
            way_out="no adapter is that large: the file is damaged, or was made to do harm",
        )
    return shape


def scaled(t: Tensor, factor: float) -> Tensor:
    """Return t * factor, in t's dtype if that is exact, else in float32 (in float64 if t is float64)."""
    exact = t.double() * factor
    rounded = exact.to(t.dtype)
    return rounded if torch.equal(rounded.double(), exact) else exact.to(torch.promote_types(t.dtype, torch.float32))


def concat(what: str, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return torch.cat of the tensors. Raises FileError if their other axes differ."""
    if len({(*t.shape[: dim % t.ndim], *t.shape[dim % t.ndim + 1 :]) for t in tensors}) > 1:
        raise FileError(
            f"{what}: the parts must have one shape but for axis {dim}, and they have",
            [f"{tuple(t.shape)}" for t in tensors],
            "the parts cannot come from one weight of a model: check how the file was made",
        )
    return torch.cat(list(tensors), dim)


def to_standard_scaling(s: StoredSite) -> StoredSite:
    """Return the site with the same scale, expressed as alpha / r."""
    return s if s.scaling == "standard" else replace(s, alpha=s.scale * s.r, scaling="standard")


def with_scale_folded(s: StoredSite, scale: float) -> StoredSite:
    """Return the site with this scale: the rest of its old scale goes into B and the bias update."""
    if math.isclose(s.scale, scale, rel_tol=1e-12):
        return to_standard_scaling(s)
    factor = s.scale / scale
    bias = None if s.bias is None else scaled(s.bias, factor)
    return replace(s, B=scaled(s.B, factor), bias=bias, alpha=scale * s.r, scaling="standard")


def with_rank(s: StoredSite, r: int) -> StoredSite:
    """Return the site with rank r, which must not be below its own, and the same scale."""
    if s.r == r:
        return s
    A = s.A.new_zeros(checked_shape(s.name, *s.A.shape[:-2], r, s.A.shape[-1]))
    B = s.B.new_zeros(checked_shape(s.name, *s.B.shape[:-1], r))
    A[..., : s.r, :], B[..., : s.r] = s.A, s.B
    return replace(s, A=A, B=B, alpha=s.scale * r, scaling="standard", constant_ranks=0)


def slices_to_whole(sites: Sequence[StoredSite], problems: list[str]) -> tuple[StoredSite, ...]:
    """Return the sites with all slices of a weight joined into one adapter on the whole weight.

    `problems` receives a line per weight whose slices cannot be joined.
    """
    weights: dict[str, list[StoredSite]] = {}
    for s in sites:
        weights.setdefault(site_name(s.path, s.parameter), []).append(s)
    joined: list[StoredSite] = []
    for group in weights.values():
        with collected(problems):
            joined += [_join_slices(group)] if any(s.label for s in group) else group
    return tuple(joined)


def _join_slices(slices: Sequence[StoredSite]) -> StoredSite:
    first, r = slices[0], sum(s.r for s in slices)
    _, out, _ = KINDS[first.kind].sizes(first.shape)
    alpha = first.scale * (math.sqrt(r) if first.scaling == "rslora" else r)
    A = concat(first.path, [s.A for s in slices], -2)
    B = concat(first.path, [on_rows(with_scale_folded(s, first.scale), out) for s in slices], -1)
    return replace(first, label="", rows=None, A=A, B=B, alpha=alpha, constant_ranks=0)


def on_rows(s: StoredSite, out: int) -> Tensor:
    """Return B (*stack, out, r) of a slice for the whole weight with `out` rows: zero outside of the slice."""
    if s.rows is None:
        return s.B
    B = s.B.new_zeros(checked_shape(s.name, *s.B.shape[:-2], out, s.r))
    B[..., _indices(s.rows), :] = s.B
    return B


def split_rows(s: StoredSite, rows: Mapping[str, Sequence[range]]) -> list[StoredSite]:
    """Return the site on a fused weight as sites on its parts, each a weight of its own.

    Args:
        s: The site.
        rows: The rows of the fused weight that each part has, by the path of the part.
    """
    parts = []
    for path, ranges in rows.items():
        i = _indices(ranges)
        magnitude = s.magnitude if s.magnitude is None or s.magnitude_axis == "in" else s.magnitude[i]
        bias = None if s.bias is None else s.bias[i]
        parts.append(replace(s, path=path, B=s.B[..., i, :], shape=(), magnitude=magnitude, bias=bias))
    return parts


def _indices(rows: Sequence[range]) -> Tensor:
    return torch.tensor([i for part in rows for i in part], dtype=torch.long)


def split_experts(s: StoredSite, paths: Sequence[str]) -> list[StoredSite]:
    """Return the experts of a stack as linears at these paths."""
    linear = replace(s, parameter="weight", kind="linear", shape=(), named=False, parts={})
    return [replace(linear, path=path, A=A, B=B) for path, A, B in zip(paths, s.A, s.B, strict=True)]


def transposed(s: StoredSite) -> StoredSite:
    """Return the site with the transposed update."""
    return replace(s, A=s.B.mT.contiguous(), B=s.A.mT.contiguous())


def split_merged_linear(s: StoredSite, enabled: Sequence[bool]) -> list[StoredSite]:
    """Return the enabled groups of a MergedLinear as sites on slices of the weight.

    Args:
        s: A (k r, in) and B (k out / g, r), where k of g groups of rows are enabled.
        enabled: Which of the g groups are enabled.

    Returns:
        One site per enabled group, with A (r, in) and B (out / g, r).
    """
    k, r = sum(enabled), s.B.shape[1]
    if k == 0 or s.A.shape[0] != k * r or s.B.shape[0] % k:
        raise FileError(
            f"{s.name}: A {tuple(s.A.shape)} and B {tuple(s.B.shape)} do not hold {k} of {len(enabled)} groups of rows",
            way_out="correct which groups of the fused weight are enabled",
        )
    size = s.B.shape[0] // k
    shape = (size * len(enabled), s.A.shape[1])
    sites = []
    for j, group in enumerate(group for group, is_on in enumerate(enabled) if is_on):
        rows = range(group * size, (group + 1) * size)
        A, B = s.A[j * r : (j + 1) * r], s.B[j * size : (j + 1) * size]
        sites.append(replace(s, label=f"{rows.start}:{rows.stop}", rows=(rows,), shape=shape, A=A, B=B))
    return sites


def join_merged_linear(slices: Sequence[StoredSite]) -> tuple[Tensor, Tensor, list[bool]] | None:
    """Return A, B and the enabled groups of a MergedLinear: the inverse of `split_merged_linear`.

    The result is None unless the slices are equal parts of the weight with one rank and one scale.
    """
    slices = sorted(slices, key=lambda s: s.rows[0].start if s.rows else 0)
    first = slices[0]
    out = KINDS[first.kind].sizes(first.shape)[1] if first.shape else 0
    size = first.B.shape[0]
    if not out or out % size or any((s.r, s.scale) != (first.r, first.scale) for s in slices):
        return None
    if out // size > len(slices) + MAX_IDLE_GROUPS:
        return None
    starts = {s.rows[0].start for s in slices if s.rows and len(s.rows) == 1 and len(s.rows[0]) == size}
    groups = {start // size for start in starts if start % size == 0}
    if len(groups) != len(slices):
        return None
    A, B = concat(first.path, [s.A for s in slices]), concat(first.path, [s.B for s in slices])
    return A, B, [g in groups for g in range(out // size)]


def halves_from_pairs(rows: int, heads: int) -> Tensor:
    """Return the order of rows that turns rotary pairs into halves: B_halves = B_pairs[order].

    Raises:
        FileError: The rows cannot be shared among the heads.
    """
    if heads < 1 or rows % (2 * heads):
        raise FileError(
            f"{rows} rows cannot be those of {heads} attention heads",
            way_out="give the number of heads of queries, and of keys and values: Hints(heads=(32, 8))",
        )
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def pairs_from_halves(rows: int, heads: int) -> Tensor:
    """Return the inverse order of `halves_from_pairs`: B_pairs = B_halves[order]."""
    return torch.argsort(halves_from_pairs(rows, heads))


def parts_from_groups(rows: int, heads: int, kv_heads: int) -> Tensor:
    """Return the order of rows that turns a fused weight in groups into all q, all k and all v: B_parts = B[order].

    There is one group per head of keys and values: its query heads, then its k and its v.

    Raises:
        FileError: The rows cannot be shared among the heads.
    """
    if min(heads, kv_heads) < 1 or heads % kv_heads or rows % (heads + 2 * kv_heads):
        raise FileError(
            f"{rows} rows cannot be those of {heads} heads of queries and {kv_heads} heads of keys and values",
            way_out="give the number of heads of queries, and of keys and values: Hints(heads=(32, 8))",
        )
    groups = torch.arange(rows).view(kv_heads, heads // kv_heads + 2, -1)
    return torch.cat([groups[:, :-2].flatten(), groups[:, -2].flatten(), groups[:, -1].flatten()])


def tucker_A(what: str, mid: Tensor, down: Tensor) -> Tensor:
    """Return A (r, in, *kernel) for LyCORIS' Tucker factors mid (r, r, *kernel) and down (r, in, 1, 1)."""
    checked_shape(what, mid.shape[0], down.shape[1], *mid.shape[2:])
    return torch.einsum("mn...,nj->mj...", mid, down.flatten(1))
