"""One weight of the model with everything that is adapted of it, and the record that merge leaves on it.

A weight has one site, or several where slices of a fused weight carry adapters. An `AdaptedWeight` collects the deltas
of its sites in the orientation in which the weight is stored (numerics/delta.py), and cuts weight and delta into the
matrices and tiles that are merged one at a time. While adapters are merged, every site holds the same `MergeRecord`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..lora.adapter import LoraAdapter, factors_at
from ..lora.adapter_dict import AdapterDict
from ..lora.model_index import AdaptedSite, WeightKey
from ..lora.weight_kinds import stored_tensor
from ..numerics.checksum import checksum
from ..numerics.delta import Factors, clone_factors, flatten_factors
from ..numerics.journal import Journal, TileJournal
from ..numerics.threads import ForEach, thread_pool
from ..numerics.tiled_matmul import TILE, LowRankProduct, exact_product
from .quantization import find_scheme

AdapterDeltas = dict[str, tuple[Factors, ...]]
"""The deltas of one weight by adapter name: one per site that has this adapter."""


@dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """What merge leaves on a weight, for unmerge."""

    strategy: str
    """The class in strategies.py that merged the weight."""
    deltas: AdapterDeltas
    """Copies of the deltas that were added, at the strengths of the merge, on the device where they were; empty after
    merge(reversible=False)."""
    journal: Journal | None
    """What is kept of W0, if the merge was in place; None also after merge(reversible=False)."""
    original: nn.Parameter | None
    """The parameter that a new one replaced; None after a merge in place, and after merge(reversible=False)."""
    original_bias: nn.Parameter | None = None
    """The module's bias before the merge, if the merge replaced it."""
    module_class: type[nn.Module]
    """The class of the module without grafts."""
    dtype: torch.dtype
    """The dtype of the merged weight."""
    shape: tuple[int, ...]
    """The shape of the merged weight."""
    checksum: int
    """Checksum of the new parameter (AdaptedWeight.checksum), if the merge was not in place; else 0."""
    sample: Tensor | None
    """A few values of W0, for the fingerprint in files that are saved while merged."""

    @property
    def nbytes(self) -> int:
        """Size in bytes of what is kept for unmerge, without a tied weight's original, which the other module keeps."""
        sizes = [f.P.nbytes + f.Q.nbytes for parts in self.deltas.values() for f in parts]
        if self.journal is not None:
            sizes.append(self.journal.nbytes)
        if self.original is not None and self.strategy != "Untied":
            sizes += [t.nbytes for t in (self.original, self.original_bias) if t is not None]
        return sum(sizes)

    @property
    def is_reversible(self) -> bool:
        """True if something was kept from which W0 can be restored."""
        return self.journal is not None or self.original is not None


def merge_record(adapters: AdapterDict) -> MergeRecord | None:
    """Return the record that merge left on the weight of these adapters; None if nothing is merged into it."""
    return cast("MergeRecord | None", adapters.merge_record)


@dataclass
class AdaptedWeight:
    """One weight and all of its sites: the whole weight, or several slices of it."""

    name: str
    """The module's path, with the parameter's name appended if that is not `weight`."""
    sites: tuple[AdaptedSite, ...]

    @property
    def module(self) -> nn.Module:
        """The module that holds the weight."""
        return self.sites[0].module

    @property
    def key(self) -> WeightKey:
        """The weight's identity in the model index."""
        return self.sites[0].key

    @property
    def weight(self) -> nn.Parameter:
        """The weight as stored."""
        return stored_tensor(self.module, self.sites[0].adapters.parameter)  # type: ignore[return-value]

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        for module in self.sites[0].modules:
            module._parameters[self.sites[0].adapters.parameter] = value

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the weight's module."""
        return self.module._parameters.get("bias")

    @bias.setter
    def bias(self, value: nn.Parameter | None) -> None:
        before = self.bias
        for module in self.sites[0].modules:
            if module._parameters.get("bias") is before:
                module._parameters["bias"] = value

    @property
    def record(self) -> MergeRecord | None:
        """What merge left: the record of the first site that has one, since an interrupt may have left some without."""
        return next((record for site in self.sites if (record := merge_record(site.adapters)) is not None), None)

    @record.setter
    def record(self, value: MergeRecord | None) -> None:
        for site in self.sites:
            site.adapters.merge_record = value

    def adapters(self, names: Sequence[str]) -> list[LoraAdapter]:
        """Return the adapters of these names, on all sites."""
        return [site.adapters[n] for n in names for site in self.sites if n in site.adapters]

    def deltas(self, strengths: Mapping[str, float], copy: bool = False) -> AdapterDeltas:
        """Return the deltas of adapters as they are now, at these strengths; `copy` protects them from later changes of
        A and B."""
        kind, shape = self.sites[0].adapters.kind, self.sites[0].shape
        rest = tuple(shape[kind.stacked + 1 :])
        deltas: AdapterDeltas = {}
        for name, t in strengths.items():
            strength = None if t == 1 else t
            if parts := [factors_at(adapter, strength, kind.transposed, rest) for adapter in self.adapters([name])]:
                deltas[name] = tuple(clone_factors(f) if copy else flatten_factors(f) for f in parts)
        return deltas

    def matrices(self, weight: Tensor, delta: LowRankProduct) -> Iterator[tuple[Tensor, LowRankProduct]]:
        """Yield each matrix (rows, *rest) of a tensor of the weight's shape (one per expert), with its delta."""
        if self.sites[0].adapters.kind.stacked:
            for W, P, Q in zip(weight, delta.P, delta.Q, strict=True):
                yield W, LowRankProduct(P, Q, delta.s)
        else:
            yield weight, delta

    def tiles(self, weight: Tensor, delta: LowRankProduct) -> Iterator[tuple[Tensor, LowRankProduct]]:
        """Yield each tile (rows, *rest) of a tensor of the weight's shape, a view, with its delta."""
        return ((W[rows], d.select_rows(rows)) for W, d in self.matrices(weight, delta) for rows in d.tiles())

    def journaled_tiles(self, record: MergeRecord) -> Iterator[tuple[Tensor, LowRankProduct, TileJournal]]:
        """Yield each tile of a weight that is merged in place, with its delta and its journal."""
        assert record.journal is not None
        tiles = list(self.tiles(self.weight, total_delta(record.deltas)))
        journals = record.journal.tiles(view.numel() for view, _ in tiles)
        return ((view, d, journal) for (view, d), journal in zip(tiles, journals, strict=True))

    def checksum(self, with_bias: bool = False) -> int:
        """Return a checksum of all values or codes of the weight, and of the bias if asked for."""
        scheme = find_scheme(self.module)
        values = self.weight.detach() if scheme is None else scheme.codes(self.weight)
        bias = [self.bias] if with_bias and self.bias is not None else []
        return checksum(*values.reshape(-1).split(TILE), *bias)


def adapted_weights(sites: Mapping[str, AdaptedSite]) -> list[AdaptedWeight]:
    """Return the weights of these sites, each once, with slices of one weight together."""
    named: dict[WeightKey, list[tuple[str, AdaptedSite]]] = {}
    for name, site in sites.items():
        named.setdefault(site.key, []).append((name.removesuffix(f"[{site.adapters.label}]"), site))
    return [AdaptedWeight(slices[0][0], tuple(site for _, site in slices)) for slices in named.values()]


def threads_for(weights: Sequence[AdaptedWeight]) -> AbstractContextManager[ForEach]:
    """Return a thread pool for work on the tiles of these weights; one thread if any of them lies on a GPU."""
    return thread_pool("cpu" if all(w.weight.device.type == "cpu" for w in weights) else "cuda")


def total_delta(deltas: AdapterDeltas) -> LowRankProduct:
    """Return the sum of the deltas in float64, which has the same bits each time."""
    return exact_product([f for parts in deltas.values() for f in parts])


def have_extras(deltas: AdapterDeltas) -> bool:
    """True if any of the deltas is more than s B A."""
    return any(f.has_extras for parts in deltas.values() for f in parts)


def as_matrix(view: Tensor) -> Tensor:
    """Return a tile (rows, *rest) as a contiguous matrix (rows, width): a view if possible, else a copy."""
    return view.detach().reshape(len(view), -1).contiguous()
