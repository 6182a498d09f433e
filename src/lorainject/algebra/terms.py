"""Adapters as arguments, the sites of each weight, and whether sites of several adapters can be on one weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FileError
from ..files import transforms
from ..files.convert import read
from ..files.record import AdapterFile, StoredSite
from ..lora.weight_kinds import KINDS
from ..numerics.delta import is_finite
from ..plan import site_name

Adapter = str | Path | AdapterFile
"""A path of any format that `li.read` reads without hints, or a record."""
ONE_BASE = "give adapters of one base model, read with that model: li.read(path, hints=Hints(model=...))"


def as_records(adapters: Iterable[Adapter]) -> list[AdapterFile]:
    """Return the records of adapters. Raise FileError if a file cannot be read, or if a record holds NaN."""
    files = [a if isinstance(a, AdapterFile) else read(a) for a in adapters]
    problems = [f"{file.path}: {s.name} holds NaN or infinity" for file in files for s in file.sites
                if not all(is_finite(t) for t in (s.A, s.B, s.magnitude, s.bias) if t is not None)]  # fmt: skip
    if problems:
        raise FileError("nothing can be computed with these adapters:", problems, "train again, or drop these sites")
    return files


def by_weight(file: AdapterFile) -> dict[str, list[StoredSite]]:
    """Return the sites of each weight by its name. A weight has several sites if they are on slices."""
    weights: dict[str, list[StoredSite]] = {}
    for s in file.sites:
        weights.setdefault(site_name(s.path, s.parameter), []).append(s)
    return weights


def why_apart(files: Sequence[AdapterFile]) -> list[str]:
    """Return a line per weight that two of the adapters describe as different weights, and for names of two kinds."""
    namespaces = {file.namespace for file in files}
    if len(namespaces) > 1:
        return [f"{file.path}: has names of the kind {file.namespace!r}" for file in files]
    problems, known = list[str](), dict[str, StoredSite]()
    for file in files:
        for name, sites in by_weight(file).items():
            first = known.setdefault(name, sites[0])
            problems += [f"{name}: {file.path} has it {why}" for s in sites if (why := _difference(first, s))][:1]
    return problems


def _difference(s: StoredSite, other: StoredSite) -> str | None:
    """Return how the weight of the second site differs from that of the first; None if it can be the same."""
    if s.shape and other.shape and s.shape != other.shape:
        return f"of shape {other.shape}, another adapter has {s.shape}"
    is_vague = {s.kind, other.kind} == {"linear", "linear^T"} and not (s.shape and other.shape)
    if s.kind != other.kind and not is_vague:
        return f"of kind {other.kind}, another adapter has {s.kind}"
    sizes = [_sizes(x) for x in (s, other)]
    if any(a != b for a, b in zip(*sizes, strict=True) if a is not None and b is not None):
        here, first = (f"A {tuple(x.A.shape)} and B {tuple(x.B.shape)}" for x in (other, s))
        return f"with {here}, another adapter has {first}"
    return None


def _sizes(s: StoredSite) -> tuple[tuple[int, ...], int | None, int]:
    """Return (stack, out, in) of the weight as far as the site tells; `out` is None for a slice of unknown whole."""
    return tuple(s.A.shape[:-2]), s.B.shape[-2] if s.rows is None else _shape_rows(s), s.A.shape[-1]


def _shape_rows(s: StoredSite) -> int | None:
    return KINDS[s.kind].sizes(s.shape)[1] if s.shape else None


def out_features(sites: Sequence[StoredSite]) -> int:
    """Return how many rows W (out, in) has, or at least has if all sites are slices that do not tell."""
    known = [size for s in sites if (size := _sizes(s)[1]) is not None]
    return known[0] if known else max(part.stop for s in sites for part in s.rows or ())


def product(sites: Sequence[StoredSite], out: int) -> tuple[Tensor, Tensor]:
    """Return P (*stack, out, R) and Q (*stack, R, in) in float64, so that P Q is the update of the whole weight."""
    P = [transforms.on_rows(s, out).double() * s.scale for s in sites]
    return torch.cat(P, -1), torch.cat([s.A.double() for s in sites], -2)
