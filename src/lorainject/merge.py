"""Fold adapters into the weights, W = W0 + s B A, and take them out again to the bit.

The sum is formed in float32 (float64 for float64 weights), tile by tile, and rounded once to the weight's dtype. A merged
module has its original class, so its forward is the original forward. Of W0 a backup is kept; unmerge checks by dtype and
checksum that the weight is still the one that merge wrote, since putting W0 back would otherwise undo somebody's work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .adapters import Folded, Host, merged_names, misfit, mounted, routings, walk
from .errors import MergeError, StateError
from .fingerprint import sample
from .kinds import is_quantised, is_sharded
from .lowrank import LowRank, delta, factors
from .readers import objections, set_grafts

TILE = 1 << 18  # elements: 1 MiB in float32, which an L2 cache holds


@dataclass(frozen=True, kw_only=True)
class MergedSite:
    """What became of one weight's delta d = s B A when W0 + d was rounded to the stored dtype."""

    path: str
    norm: float
    """||d||, Frobenius."""
    survival: float
    """<W - W0, d> / <d, d>: the share of the delta that is really in the stored weight; 1 for a zero delta."""
    error: float
    """||W - W0 - d|| / ||d||; 0 for a zero delta."""
    weight_bytes: int
    journal_bytes: int
    """Kept so that unmerge can be exact; 0 after merge(reversible=False)."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What merge did. Prints as one line."""

    names: tuple[str, ...]
    sites: tuple[MergedSite, ...]

    @property
    def survival(self) -> float:
        """Of all deltas together: the sites' shares, weighted by ||d||^2."""
        asked = sum(s.norm**2 for s in self.sites)
        return sum(s.survival * s.norm**2 for s in self.sites) / asked if asked else 1.0

    @property
    def weight_bytes(self) -> int:
        """Of all folded weights."""
        return sum(s.weight_bytes for s in self.sites)

    @property
    def journal_bytes(self) -> int:
        """Of all that is kept for unmerge."""
        return sum(s.journal_bytes for s in self.sites)

    def __str__(self) -> str:
        return (f"merged {', '.join(self.names)} into {len(self.sites)} weights ({self.weight_bytes:,} bytes, {self.journal_bytes:,} kept"
                f" for unmerge); {self.survival:.4f} of the delta survived the storage dtype")  # fmt: skip


@torch.no_grad()
def merge(model: nn.Module, names: str | Sequence[str] | None = None, *, reversible: bool = True) -> MergeReport:
    """Fold the adapters that are on (or `names`, which must include those) into the weights; all or nothing.

    Every module then has its original class and costs what the base costs. `reversible=False` keeps nothing for unmerge.

    Raises StateError if already merged, if nothing is on, or if an adapter that is on would be left out; MergeError with
    every weight that can't be folded: tied to another module's, on the meta device, or with a result that is not finite.
    """
    if merged := merged_names(model):
        raise StateError(f"{', '.join(map(repr, merged))} is already merged", way_out="unmerge(model) first")
    asked = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names or ()))
    on = mounted(model, "merge", *asked)
    active = tuple(dict.fromkeys(n for r in routings(model) for n in r.active))
    chosen = active if names is None else asked
    if not chosen:
        raise StateError("no adapter is on" if names is None else "no adapter was named",
                         way_out="activate(model, name) first, or say which: merge(model, name)")  # fmt: skip
    if dropped := [n for n in active if n not in chosen]:
        raise StateError(f"{', '.join(map(repr, dropped))} is on but would not be merged, which would change the output",
                         way_out=f"activate(model, {', '.join(map(repr, chosen))}) first, or merge all")  # fmt: skip

    weights = [w for w in _weights(on) if w.adapters(chosen)]
    tied = _tied(model)
    problems = objections(model) + [f"{w.name}: {reason}" for w in weights if (reason := _unfoldable(w, chosen, tied))]
    if problems:
        raise MergeError("nothing was merged:", problems, "keep these adapters unmerged, or eject them first")

    backups: list[tuple[Whole, Tensor]] = []
    report = []
    try:
        for w in weights:
            first, backup = sample(w.weight), w.weight.detach().clone()
            backups.append((w, backup))
            report.append(_fold(w, backup, chosen, backup.nbytes if reversible else 0))
            w.folded = Folded(backup=backup if reversible else None, checksum=checksum(w.weight), sample=first)
        set_grafts(model, False)
        _set_merged(on, chosen)
    except BaseException:
        for w, backup in backups:
            w.weight.copy_(backup)
            w.folded = None
        set_grafts(model, True)
        _set_merged(on, ())
        raise
    return MergeReport(names=chosen, sites=tuple(report))


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Take out again what was merged: every weight is W0 once more, to the bit, and the adapters are on as before.

    Raises StateError if nothing is merged, MergeError (and changes nothing) where W0 can't be given back: after
    merge(reversible=False), or if a weight's dtype or values were changed in between.
    """
    on = {path: host for path, host in mounted(model, "unmerge", merged=True).items() if host.adapters.routing.merged}
    if not on:
        raise StateError("nothing is merged", way_out="merge(model) comes first")
    folded = [w for w in _weights(on) if w.folded is not None]
    if problems := objections(model) + [f"{w.name}: {reason}" for w in folded if (reason := _stuck(w))]:
        raise MergeError("nothing was unmerged:", problems, "load the base anew; an adapter's A and B are still there to be saved")
    # Each step can be done again, so that an unmerge that was interrupted is finished by the next.
    for w in folded:
        if w.folded is not None and w.folded.backup is not None:
            w.weight.copy_(w.folded.backup)
            w.folded = None
    set_grafts(model, True)
    _set_merged(on, ())
    return model


@dataclass
class Whole:
    """One weight with all that is adapted of it: the whole, or several slices."""

    name: str
    hosts: tuple[Host, ...]

    @property
    def weight(self) -> Tensor:
        """As stored."""
        return self.hosts[0].weight

    def adapters(self, names: Sequence[str]) -> list[LowRank]:
        """Those of these names."""
        return [host.adapters[n] for n in names for host in self.hosts if n in host.adapters]

    @property
    def folded(self) -> Folded | None:
        """What merge left: on the first of its hosts that says so."""
        return next((host.adapters.folded for host in self.hosts if host.adapters.folded is not None), None)

    @folded.setter
    def folded(self, value: Folded | None) -> None:
        for host in self.hosts:
            host.adapters.folded = value

    def delta(self, names: Sequence[str], at: tuple[int, ...], rows: slice) -> Tensor:
        """Rows of the sum of s B A, as stored, of one matrix of a stack (`at`), flat (rows, rest): float32, or float64 for float64 weights."""
        kind, dtype = self.hosts[0].adapters.kind, torch.promote_types(self.weight.dtype, torch.float32)
        rest = tuple(self.weight.shape[kind.stacked + 1 :])
        parts = [(a, factors(a, kind.transposed, rest)) for a in self.adapters(names)]
        first, *more = (delta(f.P[at][rows].to(dtype), f.Q[at].to(dtype), a.scale) for a, f in parts)
        return sum(more, first)

    @property
    def matrices(self) -> Iterator[tuple[int, ...]]:
        """The index of each matrix: one empty index, or one for each expert of a stack."""
        return ((i,) for i in range(len(self.weight))) if self.hosts[0].adapters.kind.stacked else iter([()])


def _weights(on: Mapping[str, Host]) -> list[Whole]:
    """The adapted weights, each once."""
    places: dict[tuple[int, str], list[tuple[str, Host]]] = {}
    for name, host in on.items():
        places.setdefault(host.place, []).append((name.removesuffix(f"[{host.adapters.label}]"), host))
    return [Whole(slices[0][0], tuple(host for _, host in slices)) for slices in places.values()]


def _set_merged(on: Mapping[str, Host], names: tuple[str, ...]) -> None:
    for host in on.values():
        host.adapters.routing.merged = names


def deltas(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, weight, s B A) for every adapted weight (None: of all adapters that are on, summed), both in the weight's stored shape.

    The name is the path of the module, and the parameter's name behind it if that is not `weight`. The weight is W0, or while
    merged W0 + s B A. The delta is formed in float32 (float64 for float64 weights), one weight at a time.
    """
    on = mounted(model, "form deltas", *([] if name is None else [name]), merged=True, nested=True, part=True)
    for w in _weights(on):
        names = w.hosts[0].adapters.routing.active if name is None else (name,)
        if w.adapters(names):
            d = torch.stack([w.delta(names, at, slice(None)).detach() for at in w.matrices])
            yield w.name, w.weight.detach(), d.reshape(w.hosts[0].shape)


def checksum(weight: Tensor) -> Tensor:
    """A sum of the weight's bits, in words of 8 bytes, each times an odd number that grows with its place: int64, one a tile."""
    flat = weight.detach().contiguous().flatten().view(torch.uint8)
    words = (nn.functional.pad(flat, (0, -len(flat) % 8)) if len(flat) % 8 else flat).view(torch.int64)
    odd = torch.arange(1, 2 * min(TILE, len(words)), 2, device=words.device)
    return torch.stack([(tile * odd[: len(tile)]).sum() for tile in words.split(TILE)]).cpu()


def _fold(w: Whole, backup: Tensor, names: Sequence[str], kept: int) -> MergedSite:
    """W = round(W0 + s B A), tile by tile, measuring what the rounding left of the delta."""
    dot = square = lost = 0.0
    for at in w.matrices:
        W, W0 = w.weight[at], backup[at]
        step = max(1, TILE * len(W) // W.numel())
        for start in range(0, len(W), step):
            rows = slice(start, start + step)
            d = w.delta(names, at, rows).reshape(W[rows].shape)
            w0 = W0[rows].to(d.dtype)
            W[rows] = w0 + d
            got, asked = (W[rows].to(d.dtype) - w0).flatten(), d.flatten()
            products = _products(got, asked)
            if not math.isfinite(sum(products)):  # W0 holds infinity or NaN, which is its own business; or the sum does
                if not bool(d.isfinite().all()) or bool((~W[rows].isfinite() & w0.isfinite()).any()):
                    raise MergeError(f"{w.name}: W0 + s B A is not finite in {W.dtype}; nothing was merged",
                                     way_out="lower alpha, or merge a copy of the model in a wider dtype")  # fmt: skip
                products = _products(torch.where(got.isfinite(), got, asked).double(), asked.double())
            dot, square, lost = (total + new for total, new in zip((dot, square, lost), products, strict=True))
    return MergedSite(path=w.name, norm=square**0.5, survival=dot / square if square else 1.0, error=(lost / square) ** 0.5 if square else 0.0,
                      weight_bytes=w.weight.nbytes, journal_bytes=kept)  # fmt: skip


def _products(got: Tensor, asked: Tensor) -> tuple[float, float, float]:
    """<got, asked>, |asked|^2 and |got - asked|^2 of two flat tensors."""
    lost = got - asked
    return float(torch.dot(got, asked)), float(torch.dot(asked, asked)), float(torch.dot(lost, lost))


def _unfoldable(w: Whole, names: Sequence[str], tied: dict[tuple[int, str], list[str]]) -> str | None:
    """Why nothing can be folded into this weight; None if it can."""
    host = w.hosts[0]
    weight = host.module._parameters.get(host.adapters.parameter)
    if weight is None:
        return "its weight is computed (parametrised since inject)"
    if is_quantised(host.module):
        return "its weight is quantised: keep the adapter unmerged, or merge into the model before quantising"
    if is_sharded(weight):
        return "its weight is sharded"
    if weight.is_inference():
        return "its weight was made under torch.inference_mode and can't be changed"
    if any(misfit(h, a) for h in w.hosts for n in names if n in h.adapters for a in [h.adapters[n]]):
        return f"its weight is {tuple(weight.shape)} now, for which A and B were not made (resized since inject?)"
    if weight.is_meta or any(p.is_meta for a in w.adapters(names) for p in a.parameters()):
        return "lies on the meta device (offloaded, or never loaded): bring it back first"
    if host.place in tied:
        return f"its weight is tied to {', '.join(tied[host.place])}, which the fold would change as well"
    if not all(bool(p.isfinite().all()) for a in w.adapters(names) for p in a.parameters()):
        return "its A or B holds NaN or infinity"
    return None


def _stuck(w: Whole) -> str | None:
    """Why W0 can't be given back to this weight; None if it can."""
    folded, weight = w.folded, w.weight
    if folded is None or folded.backup is None:
        return "was merged with reversible=False, which keeps nothing to go back by"
    if (weight.dtype, weight.shape) != (folded.backup.dtype, folded.backup.shape):
        return f"is {weight.dtype} {tuple(weight.shape)} now, but was {folded.backup.dtype} {tuple(folded.backup.shape)} when it was merged"
    if not torch.equal(checksum(weight), folded.checksum) and not torch.equal(checksum(weight), checksum(folded.backup)):
        return "was changed since it was merged (trained, loaded or edited)"
    return None


def _tied(model: nn.Module) -> dict[tuple[int, str], list[str]]:
    """For each weight (module's id, parameter) that other tensors of the model share memory with, in whole or in part: their paths."""
    spans: dict[int, list[tuple[int, int, tuple[int, str], str]]] = {}
    for path, module in walk(model):
        for name, t in (module._parameters | module._buffers).items():
            if t is not None and not is_sharded(t) and not is_traceable_wrapper_subclass(t) and not t.is_meta and t.numel():
                extent = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
                spans.setdefault(t.untyped_storage().data_ptr(), []).append(
                    (t.data_ptr(), t.data_ptr() + extent * t.itemsize, (id(module), name), f"{path}.{name}")
                )
    tied: dict[tuple[int, str], list[str]] = {}
    for sharing in spans.values():
        for start, end, mine, _ in sharing:
            if others := [p for s, e, whose, p in sharing if s < end and start < e and whose != mine]:
                tied.setdefault(mine, others)
    return tied


def _refuse_to_train(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """An optimiser that steps over merged A and B would train nothing, in silence."""
    if any(p._lora_routing.merged for group in optimizer.param_groups for p in group["params"] if hasattr(p, "_lora_routing")):
        raise StateError("can't train while merged: A and B are in the weights, and out of the graph", way_out="unmerge(model) first")


register_optimizer_step_pre_hook(_refuse_to_train)
