"""The conversions that mathematics allows: each gives factors of the very same update s B A, up to float32's rounding.

    fold the scale       B' = B s / s'
    raise the rank       rows of zeros under A, columns of zeros beside B
    slices to a whole    A' = the slices' A below each other, B' = theirs beside each other, zero outside their rows
    whole to slices      the rows of B, with all of A
    experts apart        A[e], B[e]
    turn                 (B A)^T = A^T B^T
    grouped rows         loralib's MergedLinear: part j has rows [j r, (j + 1) r] of A, and its own rows of B
    rows in pairs        the rows of q and k in rotary pairs (n, d/2, 2), as Meta's code has them, or in halves (n, 2, d/2), as transformers'
    Tucker               A' = einsum("mnhw,nj->mjhw", mid, down), B' = up

Writing a lower rank is not among them: that is an approximation, and nothing here does it.
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
from .record import StoredSite

LARGEST = 2**31
"""Elements of a tensor that a conversion may make: the sizes in a file are a stranger's word."""


def bounded(what: str, *shape: int) -> tuple[int, ...]:
    """The shape, if a tensor of it may be made; FileError if it is absurd."""
    if math.prod(shape) > LARGEST:
        raise FileError(
            f"{what} would need a tensor {shape}",
            way_out="no adapter is that large: the file is damaged, or was made to do harm",
        )
    return shape


def times(t: Tensor, factor: float) -> Tensor:
    """The product: in the tensor's own dtype if that is exact, else in float32 (or float64, if it came so)."""
    exact = t.double() * factor
    own = exact.to(t.dtype)
    return own if torch.equal(own.double(), exact) else exact.to(torch.promote_types(t.dtype, torch.float32))


def together(what: str, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """One tensor of several. Raises FileError where they don't fit together, as those of a model's own weights do."""
    if len({(*t.shape[: dim % t.ndim], *t.shape[dim % t.ndim + 1 :]) for t in tensors}) > 1:
        raise FileError(
            f"{what}: its parts don't fit together",
            [f"{tuple(t.shape)}" for t in tensors],
            "they are of no model's weights: get the file again",
        )
    return torch.cat(list(tensors), dim)


def standard(s: StoredSite) -> StoredSite:
    """With alpha such that the scale is alpha / r."""
    return s if s.scaling == "standard" else replace(s, alpha=s.scale * s.r, scaling="standard")


def folded(s: StoredSite, scale: float) -> StoredSite:
    """With this scale, the rest of its own in B (and in the bias's update, which is scaled too)."""
    if math.isclose(s.scale, scale, rel_tol=1e-12):
        return standard(s)
    factor = s.scale / scale
    bias = None if s.bias is None else times(s.bias, factor)
    return replace(s, B=times(s.B, factor), bias=bias, alpha=scale * s.r, scaling="standard")


def ranked(s: StoredSite, r: int) -> StoredSite:
    """With rank r, not below its own, and the same scale."""
    if s.r == r:
        return s
    A = s.A.new_zeros(bounded(s.name, *s.A.shape[:-2], r, s.A.shape[-1]))
    B = s.B.new_zeros(bounded(s.name, *s.B.shape[:-1], r))
    A[..., : s.r, :], B[..., : s.r] = s.A, s.B
    return replace(s, A=A, B=B, alpha=s.scale * r, scaling="standard")


def padded(sites: Sequence[StoredSite]) -> tuple[StoredSite, ...]:
    """The slices of a weight as one adapter on the whole of it: their A stacked, B zero outside their rows."""
    whole: dict[str, list[StoredSite]] = {}
    for s in sites:
        whole.setdefault(site_name(s.path, s.parameter), []).append(s)
    return tuple(s for group in whole.values() for s in ([_joined(group)] if any(g.label for g in group) else group))


def _joined(group: Sequence[StoredSite]) -> StoredSite:
    first, r = group[0], sum(s.r for s in group)
    stack, out, _ = KINDS[first.kind].sizes(first.shape)
    B = first.B.new_zeros(bounded(first.name, *stack, out, r))
    for n, s in enumerate(group):
        at = sum(other.r for other in group[:n])
        rows = torch.tensor([i for part in s.rows or (range(out),) for i in part])
        B[..., rows, at : at + s.r] = (
            s.B if s.scale == first.scale else (s.B.double() * (s.scale / first.scale)).to(s.B.dtype)
        )
    alpha = first.scale * (math.sqrt(r) if first.scaling == "rslora" else r)
    return replace(first, label="", rows=None, A=together(first.path, [s.A for s in group], -2), B=B, alpha=alpha)


def parts(s: StoredSite, rows: Mapping[str, Sequence[range]]) -> list[StoredSite]:
    """The site on a fused weight as sites on its parts, each a weight of its own at the path that is its key."""
    at = {path: torch.tensor([i for run in runs for i in run], dtype=torch.long) for path, runs in rows.items()}
    of = {
        path: (s.magnitude if s.magnitude_axis == "in" else s.magnitude[i]) if s.magnitude is not None else None
        for path, i in at.items()
    }
    return [
        replace(
            s, path=path, B=s.B[..., i, :], shape=(), magnitude=of[path], bias=None if s.bias is None else s.bias[i]
        )
        for path, i in at.items()
    ]


def apart(s: StoredSite, paths: Sequence[str]) -> list[StoredSite]:
    """A stack's experts as linears of their own."""
    return [replace(s, path=path, parameter="weight", kind="linear", shape=(), named=False, A=A, B=B)
            for path, A, B in zip(paths, s.A, s.B, strict=True)]  # fmt: skip


def turned(s: StoredSite) -> StoredSite:
    """The transposed update."""
    return replace(s, A=s.B.mT.contiguous(), B=s.A.mT.contiguous())


def grouped(s: StoredSite, A: Tensor, B: Tensor, enabled: Sequence[bool]) -> list[tuple[StoredSite, Tensor, Tensor]]:
    """MergedLinear's A (k r, in) and B (k out/g, r) as sites on slices, k of g parts enabled: each with its A (r, in) and B (out/g, r)."""
    k, r = sum(enabled), B.shape[1]
    if k == 0 or A.shape[0] != k * r or B.shape[0] % k:
        raise FileError(
            f"{s.name}: A {tuple(A.shape)} and B {tuple(B.shape)} are no {k} of {len(enabled)} groups",
            way_out="correct the groups",
        )
    part = B.shape[0] // k
    shape = (part * len(enabled), A.shape[1])
    found = []
    for j, g in enumerate(g for g, on in enumerate(enabled) if on):
        rows = range(g * part, (g + 1) * part)
        slice_ = replace(s, label=f"{rows.start}:{rows.stop}", rows=(rows,), shape=shape)
        found.append((slice_, A[j * r : (j + 1) * r], B[j * part : (j + 1) * part]))
    return found


def merged_linear(group: Sequence[StoredSite]) -> tuple[Tensor, Tensor, list[bool]] | None:
    """The inverse: A, B and which parts are enabled; None if these slices are no equal parts of the weight with one rank and scale."""
    group = sorted(group, key=lambda s: s.rows[0].start if s.rows else 0)
    first = group[0]
    out = KINDS[first.kind].sizes(first.shape)[1] if first.shape else 0
    part = first.B.shape[0]
    at = [s.rows[0].start // part for s in group if s.rows and len(s.rows) == 1 and s.rows[0] == range(s.rows[0].start, s.rows[0].start + part)
          and s.rows[0].start % part == 0]  # fmt: skip
    if (
        not out
        or out % part
        or len(set(at)) != len(group)
        or any((s.r, s.scale) != (first.r, first.scale) for s in group)
    ):
        return None
    A, B = (together(first.path, [getattr(s, half) for s in group]) for half in "AB")
    return A, B, [g in at for g in range(out // part)]


def in_halves(rows: int, heads: int) -> Tensor:
    """Which row in pairs is each row in halves: B_halves = B_pairs[in_halves(...)]. Raises FileError if the heads don't share the rows."""
    if heads < 1 or rows % (2 * heads):
        raise FileError(
            f"{rows} rows are not those of {heads} heads",
            way_out="give the heads of queries, and of keys and values: Hints(heads=(32, 8))",
        )
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def in_pairs(rows: int, heads: int) -> Tensor:
    """The inverse."""
    return torch.argsort(in_halves(rows, heads))


def tucker(what: str, mid: Tensor, down: Tensor) -> Tensor:
    """A (r, in, *kernel) of LyCORIS' three factors: mid (r, r, *kernel), down (r, in, 1, 1)."""
    bounded(what, mid.shape[0], down.shape[1], *mid.shape[2:])
    return torch.einsum("mn...,nj->mj...", mid, down.flatten(1))
