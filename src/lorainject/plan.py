"""What a LoraSpec comes to on one model: a Plan of Sites, made by `find`, carried out by `inject`, printed as a
table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from .numerics.delta import scale
from .spec import Init

BY_DESIGN = ("output head", "router")
"""How the reasons begin for which "all-linear" leaves a weight out that could carry an adapter."""
HEADER = ("module", "kind", "weight", "r", "alpha", "scale", "sites", "trainable")


@dataclass(frozen=True, kw_only=True)
class Site:
    """One weight, or one slice of a fused weight, that carries an adapter, with the settings of the adapter."""

    path: str
    """Path of the weight's module, as in model.named_modules()."""
    aliases: tuple[str, ...] = ()
    """Further paths of the same module object, and paths of modules that share the weight and use it in the same way.
    It is adapted under all of them and saved once."""
    parameter: str = "weight"
    """Name of the weight in its module."""
    label: str = ""
    """The slice of a fused weight ("q", "0:768"); empty for the whole weight."""
    rows: tuple[range, ...] | None = None
    """The slice's rows of W (out, in), whichever way W is stored; None for the whole weight."""
    kind: str
    """Kind of weight, a key of lora.weight_kinds.KINDS: "linear", "embedding", "experts" and so on."""
    shape: tuple[int, ...]
    """Shape of the whole weight as stored; for a quantized weight, the shape before it was quantized."""
    stack: int = 1
    """Number of matrices in the weight, each of which has its own A and B: the experts of a stack, otherwise 1."""
    in_features: int
    """Columns of A."""
    out_features: int
    """Rows of B; for a slice, the number of its rows."""
    readers: tuple[str, ...] = ()
    """Paths of the modules whose own code reads the weight. Empty if the weight is applied by calling its module."""
    named: bool = False
    """True if the target named the weight itself ("q_proj.weight"), so that all modules around it count as readers."""
    r: int
    """Rank."""
    alpha: float
    """Numerator of the scale; equal to `r` unless it was set."""
    scaling: str
    """As in LoraSpec."""
    dropout: float
    """As in LoraSpec."""
    init: Init
    """As in LoraSpec."""
    dora: bool = False
    """As in LoraSpec."""
    dtype: torch.dtype
    """Dtype of A and B."""

    @property
    def name(self) -> str:
        """The path of the module, the name of the parameter unless it is `weight`, and the slice in brackets."""
        return site_name(self.path, self.parameter, self.label)

    @property
    def scale(self) -> float:
        """The scale s of the update s B A."""
        return scale(self.alpha, self.r, self.scaling)

    @property
    def trainable(self) -> int:
        """Number of elements of A (*stack, r, in), B (*stack, out, r) and, with DoRA, m (out,)."""
        return self.stack * self.r * (self.in_features + self.out_features) + self.dora * self.out_features


@dataclass(frozen=True, kw_only=True)
class TrainedTensor:
    """A parameter of the base model, or some rows of it, that trains as it is and belongs to the adapter."""

    path: str
    """Path of the parameter's module."""
    parameter: str
    """Name of the parameter in its module."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    ids: tuple[int, ...] | None = None
    """The rows that train. None for the whole parameter."""
    dtype: torch.dtype
    """Dtype in which it trains."""
    field: str
    """The setting that asks for it: "modules_to_save", "bias" or "trainable_tokens"."""

    @property
    def name(self) -> str:
        """The path of the module, with the name of the parameter unless it is `weight`."""
        return site_name(self.path, self.parameter)

    @property
    def trainable(self) -> int:
        """Number of elements that train."""
        return math.prod(self.shape if self.ids is None else (len(self.ids), *self.shape[1:]))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sites that `inject` adapts. A Plan prints as a table and iterates over its sites."""

    sites: tuple[Site, ...]
    """The sites, in the order of the model."""
    tensors: tuple[TrainedTensor, ...] = ()
    """What trains besides A and B: modules_to_save, biases, rows of tokens."""
    total: int
    """Number of parameters of the base model."""
    left_out: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What "all-linear" leaves out, with the reason, by name: output heads, routers, and layers that multiply by a
    weight that cannot carry an adapter. Empty without "all-linear"."""
    towers: tuple[str, ...] = ()
    """Paths of the models that the model is composed of (vision_tower, language_model). Empty unless it has several."""

    @property
    def trainable(self) -> int:
        """Number of parameters that train: the elements of all A, B, magnitudes and trained tensors."""
        return sum(site.trainable for site in self.sites) + sum(tensor.trainable for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Memory of all that trains, in bytes. The size of an adapter file is this plus a header, unless `init` starts
        with another B than zero."""
        sites = sum(site.trainable * site.dtype.itemsize for site in self.sites)
        return sites + sum(tensor.trainable * tensor.dtype.itemsize for tensor in self.tensors)

    @property
    def unsupported(self) -> dict[str, str]:
        """The part of `left_out` that is not left out by design: layers whose weight cannot carry an adapter."""
        return {name: reason for name, reason in self.left_out.items() if not reason.startswith(BY_DESIGN)}

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        """Return a table with one line per group of sites that differ in their layer numbers only, and the totals."""
        lines = _table(self.sites)
        share = f"{100 * self.trainable / self.total:.3g} %" if self.total else "n/a"
        trainable = f"{self.trainable:,} trainable of {self.total:,} ({share})"
        lines += ["-" * len(lines[0]), f"{len(self.sites)} sites; {trainable}; {_size(self.bytes)}"]
        for setting in dict.fromkeys(t.field for t in self.tensors):
            tensors = [t for t in self.tensors if t.field == setting]
            names = dict.fromkeys(_starred(t.name) + (f" ({len(t.ids)} rows)" if t.ids else "") for t in tensors)
            lines.append(f"trains as well ({setting}): {', '.join(names)}: {sum(t.trainable for t in tensors):,}")
        if self.towers:
            counts = {t: sum(site.name.startswith(f"{t}.") for site in self.sites) for t in self.towers}
            adapted = ", ".join(f"{count} in {tower}" for tower, count in counts.items() if count)
            lines.append(f"of these {adapted}" + "".join(f"; none in {t}" for t, count in counts.items() if not count))
        for reason in dict.fromkeys(self.left_out.values()):
            names = dict.fromkeys(_starred(name) for name, why in self.left_out.items() if why == reason)
            lines.append(f"left out: {', '.join(names)} ({reason})")
        return "\n".join(line.rstrip() for line in lines)


def site_name(path: str, parameter: str, label: str = "") -> str:
    """Return the name of a weight: its module's path, the parameter unless it is `weight`, and the slice in
    brackets."""
    name = path if parameter == "weight" else f"{path}.{parameter}".removeprefix(".")
    return f"{name}[{label}]" if label else name


def _table(sites: tuple[Site, ...]) -> list[str]:
    """Return the lines of the table, with aligned columns."""
    groups: dict[tuple[str, ...], list[Site]] = {}
    for s in sites:
        key = (_starred(s.name), s.kind, "x".join(map(str, s.shape)), str(s.r), f"{s.alpha:g}", f"{s.scale:.4g}")
        groups.setdefault(key, []).append(s)
    rows: list[tuple[str, ...]] = [HEADER]
    for (name, *cells), group in groups.items():
        label = (name if len(group) > 1 else group[0].name) + " (shared)" * any(s.aliases for s in group)
        rows.append((label, *cells, str(len(group)), f"{sum(s.trainable for s in group):,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    formats = [f"{{:{'<' if column < 3 else '>'}{width}}}" for column, width in enumerate(widths)]
    return ["  ".join(formats).format(*row) for row in rows]


def _starred(name: str) -> str:
    """Return the name with * for each number, except in the slice."""
    path, bracket, label = name.partition("[")
    return re.sub(r"\b\d+\b", "*", path) + bracket + label


def _size(count: float) -> str:
    if count < 1024:
        return f"{count:.0f} bytes"
    power = 1 if count < 1024**2 else 2 if count < 1024**3 else 3
    return f"{count / 1024**power:.2f} {('KiB', 'MiB', 'GiB')[power - 1]}"
