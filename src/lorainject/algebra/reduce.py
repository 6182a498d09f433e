"""The best adapter of a lower rank: `compress`, and `Approximation`, a record that tells what it left out.

The update s B A of a site is decomposed by a QR of B and of A^T and an SVD of a matrix (r, r), in float64
(numerics/low_rank.py); the update itself is never formed. No adapter of the chosen rank has a smaller error in the
Frobenius norm. A stack of experts has one rank, and its error is that of all experts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SpecError
from ..files.origin import adapter_origins, made_by
from ..files.record import AdapterFile, StoredSite
from ..numerics.delta import product_norm
from ..numerics.low_rank import product_svd
from ..numerics.modes import in_default_modes
from .terms import Adapter, as_records


@dataclass(frozen=True, kw_only=True)
class ReducedSite:
    """What an approximation kept of one site."""

    path: str
    full_rank: int
    """The rank before; of a matrix that was no product, its shorter side."""
    r: int
    """The rank now."""
    norm: float
    """The Frobenius norm of the update before."""
    error: float
    """The norm of the difference between the update that is stored now and the one before, relative to `norm`."""
    note: str = ""
    """What to know about the rank, if it was found and not asked for."""


@dataclass(frozen=True, kw_only=True)
class Approximation(AdapterFile):
    """A record with the errors of its sites. `li.write` writes it like any other record; it prints as a table."""

    reduced: tuple[ReducedSite, ...] = ()
    """One entry per site."""
    left_out: tuple[str, ...] = ()
    """What changed and is not in the record, one line each."""

    @property
    def error(self) -> float:
        """The error of all sites together, relative to the norm of all updates together."""
        total = sum(site.norm**2 for site in self.reduced)
        return (sum((site.error * site.norm) ** 2 for site in self.reduced) / total) ** 0.5 if total else 0.0

    def __str__(self) -> str:
        """Return a table with one line per site, the total, and what was left out."""
        rows = [("site", "rank", "of", "|update|", "error", "")]
        rows += [(s.path, str(s.r), str(s.full_rank), f"{s.norm:.4g}", f"{s.error:.2e}", s.note) for s in self.reduced]
        lines = table(rows, left=(0, 5))
        lines.append(f"{len(self.sites)} sites, {self.parameters:,} parameters, error {self.error:.2e} of the update")
        return "\n".join([*lines, *(f"left out: {line}" for line in self.left_out)])


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Return the lines of a table with aligned columns; those in `left` are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [f"{{:{'<' if i in left else '>'}{width}}}" for i, width in enumerate(widths)]
    return ["  ".join(cells).format(*row).rstrip() for row in rows]


@in_default_modes
def compress(adapter: Adapter, *, r: int | None = None, error: float | None = None, energy: float | None = None,
             dtype: torch.dtype = torch.float32) -> Approximation:  # fmt: skip
    """Return the best adapter of a lower rank, site by site. Exactly one of `r`, `error` and `energy` is given.

    Args:
        adapter: A path of any format, or a record.
        r: The highest rank of a site. Sites of a lower rank stay as they are.
        error: The highest relative error of a site, |D - D'| / |D| in the Frobenius norm; each site gets the lowest
            rank that keeps it.
        energy: The least share of |D|^2 that a site must keep: error = sqrt(1 - energy).
        dtype: The data type of the new A and B. A type of 16 bits adds its rounding to the errors.

    Returns:
        A record with the errors of its sites. What is besides A and B stays as it is; with a magnitude (DoRA), the
        error is that of B A.

    Raises:
        SpecError: There is not exactly one setting, it is impossible, or no site has a higher rank than `r`.
        FileError: The file cannot be read, or holds NaN.
    """
    file = as_records([adapter])[0]
    share = _lost_share(r, error, energy)
    if share is None and file.sites and all(s.r < (r or 0) for s in file.sites):
        highest = max(s.r for s in file.sites)
        way_out = f"give a rank below {highest}, or use the adapter as it is"
        raise SpecError(f"r={r} is higher than the rank of every site ({highest})", way_out=way_out)
    sites, reduced = zip(*(_reduce(s, r, share, dtype) for s in file.sites), strict=True) if file.sites else ((), ())
    fields = {key: value for key, value in vars(file).items() if key not in ("sites", "reduced")}
    setting = {key: value for key, value in (("r", r), ("error", error), ("energy", energy)) if value is not None}
    fields["origin"] = made_by("compress", **setting, adapters=adapter_origins([file], [1.0]))
    return Approximation(**fields | {"sites": tuple(sites), "reduced": tuple(reduced)})


def _lost_share(r: int | None, error: float | None, energy: float | None) -> float | None:
    """Return which share of |D|^2 may be left out; None if the rank is given. Raise SpecError for impossible values."""
    settings = {"r": r, "error": error, "energy": energy}
    chosen: dict[str, Any] = {key: value for key, value in settings.items() if value is not None}
    problems = []
    if len(chosen) != 1:
        problems.append(f"exactly one of r, error and energy is needed, not {', '.join(chosen) or 'none'}")
    if r is not None and (not isinstance(r, int) or isinstance(r, bool) or r < 1):
        problems.append(f"r must be an integer of at least 1, not {r!r}")
    problems += [f"{key} must be a number between 0 and 1, not {chosen[key]!r}" for key in ("error", "energy")
                 if key in chosen and not 0 <= chosen[key] <= 1]  # fmt: skip
    if problems:
        raise SpecError("no rank can be chosen:", problems, "write, for instance, compress(file, r=8)")
    return None if r is not None else error**2 if error is not None else 1 - float(energy or 0)


def _reduce(s: StoredSite, r: int | None, share: float | None, dtype: torch.dtype) -> tuple[StoredSite, ReducedSite]:
    """Return the site with a lower rank, and what it lost; the site itself, to the bit, if its rank stays."""
    svd = product_svd(s.B, s.A, s.scale)
    norm = svd.lost(0) ** 0.5
    highest = svd.S.shape[-1]
    rank = min(r, s.r) if r is not None else svd.rank_within(share or 0.0) or highest
    if rank >= s.r:
        return s, ReducedSite(path=s.name, full_rank=s.r, r=s.r, norm=norm, error=0.0)
    P, Q = svd.factors(min(rank, highest))
    bias = None if s.bias is None else (s.bias.double() * s.scale).float()
    reduced = with_factors(s, P.to(dtype), Q.to(dtype), bias)
    return reduced, ReducedSite(path=s.name, full_rank=s.r, r=reduced.r, norm=norm, error=_error(s, reduced, norm))


def with_factors(s: StoredSite, B: Tensor, A: Tensor, bias: Tensor | None = None) -> StoredSite:
    """Return the site with other factors, whose scale is 1."""
    return replace(s, A=A.contiguous(), B=B.contiguous(), alpha=float(A.shape[-2]), scaling="standard", bias=bias,
                   constant_ranks=0)  # fmt: skip


def _error(s: StoredSite, other: StoredSite, norm: float) -> float:
    """Return the norm of the difference of two updates relative to `norm`; 0 for a zero update."""
    P = torch.cat([s.B.double() * s.scale, other.B.double() * -other.scale], -1)
    return product_norm(P, torch.cat([s.A.double(), other.A.double()], -2)) / norm if norm else 0.0
