"""The conversions that mathematics allows: each gives factors of the very same update s B A, up to float32's rounding.

    fold the scale       B' = B s / s'
    raise the rank       rows of zeros under A, columns of zeros beside B
    slices to a whole    A' = the slices' A below each other, B' = theirs beside each other, zero outside their rows
    whole to slices      the rows of B, with all of A
    experts apart        A[e], B[e]
    turn                 (B A)^T = A^T B^T
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
from ..kinds import KINDS
from ..spec import site_name
from .record import StoredSite

LARGEST = 2**31
"""Elements of a tensor that a conversion may make: the sizes in a file are a stranger's word."""


def bounded(what: str, *shape: int) -> tuple[int, ...]:
    """The shape, if a tensor of it may be made; FileError if it is absurd."""
    if math.prod(shape) > LARGEST:
        raise FileError(f"{what} would need a tensor {shape}", way_out="no adapter is that large: the file is damaged, or was made to do harm")
    return shape


def times(t: Tensor, factor: float) -> Tensor:
    """The product: in the tensor's own dtype if that is exact, else in float32 (or float64, if it came so)."""
    exact = t.double() * factor
    own = exact.to(t.dtype)
    return own if torch.equal(own.double(), exact) else exact.to(torch.promote_types(t.dtype, torch.float32))


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
        B[..., rows, at : at + s.r] = s.B if s.scale == first.scale else (s.B.double() * (s.scale / first.scale)).to(s.B.dtype)
    alpha = first.scale * (math.sqrt(r) if first.scaling == "rslora" else r)
    return replace(first, label="", rows=None, A=torch.cat([s.A for s in group], -2), B=B, alpha=alpha)


def parts(s: StoredSite, rows: Mapping[str, Sequence[range]]) -> list[StoredSite]:
    """The site on a fused weight as sites on its parts, each a weight of its own at the path that is its key."""
    at = {path: torch.tensor([i for run in runs for i in run]) for path, runs in rows.items()}
    of = {path: (s.magnitude if s.magnitude_axis == "in" else s.magnitude[i]) if s.magnitude is not None else None for path, i in at.items()}
    return [
        replace(s, path=path, B=s.B[..., i, :], shape=(), magnitude=of[path], bias=None if s.bias is None else s.bias[i]) for path, i in at.items()
    ]


def apart(s: StoredSite, paths: Sequence[str]) -> list[StoredSite]:
    """A stack's experts as linears of their own."""
    return [replace(s, path=path, parameter="weight", kind="linear", shape=(), named=False, A=A, B=B)
            for path, A, B in zip(paths, s.A, s.B, strict=True)]  # fmt: skip


def turned(s: StoredSite) -> StoredSite:
    """The transposed update."""
    return replace(s, A=s.B.mT.contiguous(), B=s.A.mT.contiguous())


def tucker(what: str, mid: Tensor, down: Tensor) -> Tensor:
    """A (r, in, *kernel) of LyCORIS' three factors: mid (r, r, *kernel), down (r, in, 1, 1)."""
    bounded(what, mid.shape[0], down.shape[1], *mid.shape[2:])
    return torch.einsum("mn...,nj->mj...", mid, down.flatten(1))
