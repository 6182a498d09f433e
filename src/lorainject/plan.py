"""What a LoraSpec comes to on one model: a Plan of Sites, which prints as a table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .numerics.delta import scale


@dataclass(frozen=True, kw_only=True)
class Site:
    """One weight that carries an adapter, with everything that follows from the spec."""

    path: str
    """Of the module, as in model.named_modules()."""
    aliases: tuple[str, ...] = ()
    """Further paths of the very same module: adapted too, saved once."""
    parameter: str = "weight"
    """The weight's name in its module."""
    label: str = ""
    """Which slice of the weight ("q", "0:768"); empty for the whole."""
    rows: tuple[range, ...] | None = None
    """The slice's rows of W (out, in); None: all."""
    kind: str
    """A row of kinds.KINDS."""
    shape: tuple[int, ...]
    """Of the weight as stored."""
    stack: int = 1
    """How many matrices, each with an A and a B of its own: the experts of a stack."""
    in_features: int
    out_features: int
    """Rows of B: of the slice, if it is one."""
    readers: tuple[str, ...] = ()
    """Paths of the modules whose own code reads the weight; none where it is applied by calling its module."""
    named: bool = False
    """Whether the weight itself was named, so that all modules it lies in read it."""
    r: int
    alpha: float
    scaling: str
    dropout: float
    init: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The path; with the parameter, if that is not `weight`, and the slice."""
        return site_name(self.path, self.parameter, self.label)

    @property
    def scale(self) -> float:
        """s in W0 + s B A."""
        return scale(self.alpha, self.r, self.scaling)

    @property
    def trainable(self) -> int:
        """Elements of A (r, in) and B (out, r) together, in all of the stack."""
        return self.stack * self.r * (self.in_features + self.out_features)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `inject` would do, or did. Prints as a table; iterates over its sites."""

    sites: tuple[Site, ...]
    total: int
    """Parameters of the base model."""
    left_out: tuple[str, ...] = ()
    """What "all-linear" left out: the output head and routers."""
    towers: tuple[str, ...] = ()
    """The models that the model is made of (vision_tower, language_model), by path; none if it is one."""

    @property
    def trainable(self) -> int:
        """Parameters that train: all of A and B."""
        return sum(site.trainable for site in self.sites)

    @property
    def bytes(self) -> int:
        """Of A and B in memory; the adapter's file is this plus a header."""
        return sum(site.trainable * site.dtype.itemsize for site in self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        """One line for all layers that look alike: layers.*.self_attn.q_proj stands for as many sites as the line counts."""
        groups: dict[tuple[str, ...], list[Site]] = {}
        for s in self.sites:
            row = (_starred(s.name), s.kind, "x".join(map(str, s.shape)), str(s.r), f"{s.alpha:g}", f"{s.scale:.4g}")
            groups.setdefault(row, []).append(s)
        table: list[tuple[str, ...]] = [("module", "kind", "weight", "r", "alpha", "scale", "sites", "trainable")]
        for (path, *cells), sites in groups.items():
            label = (path if len(sites) > 1 else sites[0].name) + " (shared)" * any(s.aliases for s in sites)
            table.append((label, *cells, str(len(sites)), f"{sum(s.trainable for s in sites):,}"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in table
        ]
        share = f"{100 * self.trainable / self.total:.3g} %" if self.total else "n/a"
        lines += [
            "-" * len(lines[0]),
            f"{len(self.sites)} sites; {self.trainable:,} trainable of {self.total:,} ({share}); {_size(self.bytes)}",
        ]
        if self.towers:
            counts = [(t, sum(s.name.startswith(f"{t}.") for s in self.sites)) for t in self.towers]
            lines.append(
                "of these "
                + ", ".join(f"{n} in {t}" for t, n in counts if n)
                + "".join(f"; none in {t}" for t, n in counts if not n)
            )
        lines += (
            [f"left out (head, routers): {', '.join(dict.fromkeys(map(_starred, self.left_out)))}"]
            if self.left_out
            else []
        )
        return "\n".join(line.rstrip() for line in lines)


def site_name(path: str, parameter: str, label: str = "") -> str:
    """How a weight is named: by its module, where it is the module's `weight`; by module and parameter else; and its slice."""
    whole = path if parameter == "weight" else f"{path}.{parameter}".removeprefix(".")
    return whole + (f"[{label}]" if label else "")


def _starred(name: str) -> str:
    path, bracket, label = name.partition("[")
    return re.sub(r"\b\d+\b", "*", path) + bracket + label


def _size(n: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.2f} {unit}"
        n /= 1024
    raise AssertionError
