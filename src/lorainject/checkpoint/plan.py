"""What a merge on disk will write, found and checked before it begins: adapters and a checkpoint's headers, brought together.

The model is built without memory, from its config; transformers' rules for loading it tell which bytes of the checkpoint are which of its
weights (places.py), and it takes the adapters as a model in memory would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FileError, SpecError
from ..files.convert import read_source
from ..files.io.open_adapter import Hints, open_source
from ..files.record import AdapterFile, BasePrint, StoredSite
from ..files.rename import rename_for_model
from ..files.save_load import fitted
from ..files.weight_map import StoredPiece, build_meta_model, locate_weights
from ..lora.adapter import LoraAdapter, delta_factors
from ..lora.model_index import ModelIndex
from ..numerics.delta import Factors, flatten_factors
from ..numerics.fingerprint import sample_positions, samples_agree
from ..plan import Site, site_name
from ..targets.model_weights import ModelWeight, model_weights
from .byte_runs import find
from .shard_writer import MergePlan, Sum
from .shards import BYTES, DTYPES, Shard, scan


def plan_merge(base: Path, adapters: Any, weights: Sequence[float] | None, check_base: bool) -> MergePlan:
    """Read the adapters and the checkpoint's headers, and find each delta's bytes. Raises FileError with all that does not fit."""
    asked = [adapters] if isinstance(adapters, str | Path | AdapterFile) else list(adapters)
    files = [a if isinstance(a, AdapterFile) else read_source(open_source(a, spool=True)) for a in asked]
    factor = [1.0] * len(files) if weights is None else [float(w) for w in weights]
    if not files or len(factor) != len(files) or not all(map(math.isfinite, factor)):
        raise SpecError(
            f"{len(files)} adapters and the weights {factor}", way_out="give each adapter one weight, a finite number"
        )
    found = scan(base)
    disk = Disk(found)
    try:
        model = build_meta_model(base) or _skeleton(files, disk)
    except (
        Exception
    ) as e:  # whatever a model's class raises: a package that it needs is missing, a config it can't be built from
        raise FileError(
            f"the model of {base} can't be built from its config.json: {e}",
            way_out="mend it, or install what it asks for",
        ) from e
    at, reasons, _ = locate_weights(model, {key: t.shape for key, t in disk.tensors.items()})
    index = ModelIndex(model)
    by_name = {n: w for w in model_weights(index) for n in w.names}
    sums: dict[tuple[int, str], Sum] = {}
    problems, strange = [], []
    for given, file, times in zip(asked, files, factor, strict=True):
        if file.notes and not isinstance(given, AdapterFile):  # what was taken for granted, the model tells
            file = read_source(open_source(given, spool=True), hints=Hints(model=model))
        own = file.format == "lorainject"  # whose fingerprint goes by its own names
        named = _named_as(file, model, by_name) if own else rename_for_model(file, index)
        wrong = [f"{line}; merging does not put it on yet" for line in file.beside]
        wrong += [
            f"{path}: {reason}"
            for path, t in named.replaced.items()
            if (reason := _replaced(by_name.get(path), t, at, disk))
        ]
        for ours, site in zip((file if own else named).sites, fitted(index, named, by_name, None, wrong), strict=True):
            weight = by_name[site_name(site.path, site.parameter)]
            lies = at.get(full_name(weight), ())
            if reason := reasons.get(full_name(weight)) or _unwritable(weight, model, lies, disk):
                problems.append(f"{site.name}: {reason}")
                continue
            if check_base and file.base is not None and not _same(disk, lies, weight, file.base, ours.name):
                strange.append(f"{site.name}: another base weight than the one this adapter was made for")
            if weight.key not in sums:
                shape = tuple(weight.module._parameters[weight.parameter].shape)  # type: ignore[union-attr]
                sums[weight.key] = Sum(
                    site_name(site.path, site.parameter),
                    disk.tensors[lies[0].key].dtype,
                    shape,
                    weight.kind.stacked,
                    lies,
                    (),
                )
            sums[weight.key].parts += (_factors(ours, site, weight, times),)
    if problems:
        raise FileError(f"{base} can't be merged into on disk:", problems, "load the model and merge in memory: load, merge(reversible=False), eject,"
                        " save_pretrained")  # fmt: skip
    if strange:
        raise FileError(
            f"{base} is not the base that the adapter was made for:",
            strange,
            "give its own base, or accept this one: check_base=False",
        )
    return MergePlan(tuple(f.name for f in files), found, list(sums.values()))


class Disk:
    """The tensors of all shards."""

    def __init__(self, found: Sequence[Shard]) -> None:
        self.tensors = {key: t for shard in found for key, t in shard.tensors.items()}
        self.shard = {key: shard.path for shard in found for key in shard.tensors}

    def read(self, key: str, element: int | None = None) -> Tensor:
        """A tensor, or one element of it."""
        t = self.tensors[key]
        size, start = (
            (t.stop - t.start, t.start) if element is None else (BYTES[t.dtype], t.start + BYTES[t.dtype] * element)
        )
        with self.shard[key].open("rb") as f:
            f.seek(start)
            return torch.frombuffer(bytearray(f.read(size)), dtype=DTYPES[t.dtype]).view(
                t.shape if element is None else (1,)
            )


def full_name(w: ModelWeight) -> str:
    """As in model.named_parameters()."""
    return ".".join(filter(None, (w.paths[0], w.parameter)))


def _factors(ours: StoredSite, site: Site, w: ModelWeight, times: float) -> Factors:
    _, out, _ = w.kind.sizes(site.shape)
    low = LoraAdapter(
        ours.A,
        ours.B,
        alpha=ours.alpha * times,
        scaling=ours.scaling,
        dropout=0.0,
        init="kaiming",
        slices=ours.rows,
        out=out,
    )
    return flatten_factors(delta_factors(low, w.kind.transposed, tuple(site.shape[w.kind.stacked + 1 :])))


def _unwritable(w: ModelWeight, model: nn.Module, lies: Sequence[StoredPiece], disk: Disk) -> str | None:
    """Why this weight's bytes can't be written; None if they can."""
    if not lies:
        return "is nowhere in the checkpoint"
    if odd := {disk.tensors[p.key].dtype for p in lies} - DTYPES.keys():
        return (
            f"is stored as {', '.join(sorted(odd))}, quantised: merge into the checkpoint that this one was made from"
        )
    mine = {".".join(filter(None, (path, w.parameter))) for path in w.paths}
    parameter = w.module._parameters[w.parameter]
    if tied := [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter and n not in mine]:
        return f"is tied to {', '.join(tied)}, which the fold would change as well (in memory, merge(model, untie=True) parts them)"
    return None


def _same(disk: Disk, lies: Sequence[StoredPiece], w: ModelWeight, base: BasePrint, name: str) -> bool:
    found = [find(lies, i) for i in sample_positions(w.module._parameters[w.parameter].numel())]  # type: ignore[union-attr]
    mine = torch.cat([disk.read(key, i).float() for key, i in found])
    return samples_agree(mine, base.sample[name], DTYPES[disk.tensors[found[0][0]].dtype], base.dtype[name])


def _replaced(w: ModelWeight | None, tensor: Tensor, at: Mapping[str, Sequence[StoredPiece]], disk: Disk) -> str | None:
    """PEFT lets whole base weights come along: fine where they are what is there already."""
    lies = at.get(full_name(w), ()) if w is not None else ()
    alike = (
        len(lies) == 1
        and disk.tensors[lies[0].key].shape == tuple(tensor.shape)
        and disk.tensors[lies[0].key].dtype in DTYPES
    )
    if alike and torch.equal(disk.read(lies[0].key).to(tensor.dtype), tensor):
        return None
    return "the file brings a whole base weight that is not this checkpoint's; adapters that replace weights are not supported"


def _named_as(file: AdapterFile, model: nn.Module, by_name: Mapping[str, ModelWeight]) -> AdapterFile:
    """With its paths as in this model, if it was made on the model inside this one (or the other way round): `bert.encoder` and `encoder`."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def renamed(change: Callable[[str], str]) -> AdapterFile:
        sites = tuple(replace(s, path=change(s.path), aliases=tuple(map(change, s.aliases))) for s in file.sites)
        return replace(file, sites=sites, replaced={change(p): t for p, t in file.replaced.items()})

    candidates = (
        [lambda path: path, lambda path: prefix + path, lambda path: path.removeprefix(prefix)] if prefix != "." else []
    )
    fits = (f for f in map(renamed, candidates) if all(site_name(s.path, s.parameter) in by_name for s in f.sites))
    return next(fits, file)


def _skeleton(files: Sequence[AdapterFile], disk: Disk) -> nn.Module:
    """For a checkpoint whose code is its own: the adapted layers, as far as a matrix of the file's name and shape is on disk.

    PEFT's `fan_in_fan_out` may mean some of the layers: which are stored (in, out), only their code could tell.
    """
    root = nn.Module()
    for s in (s for file in files if not file.config.get("fan_in_fan_out") for s in file.sites):
        stored = disk.tensors.get(f"{s.path}.weight")
        if (
            stored is None
            or len(stored.shape) != 2
            or s.parameter != "weight"
            or s.A.ndim != 2
            or s.kind not in ("linear", "embedding")
        ):
            continue
        layer: Any = nn.Linear(stored.shape[1], stored.shape[0], bias=False, device="meta")
        if s.kind == "embedding":
            layer = nn.Embedding(*stored.shape, device="meta")
        *parents, leaf = s.path.split(".")
        at = root
        for part in parents:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]  # type: ignore[assignment]
        at.add_module(leaf, layer)
    return root
