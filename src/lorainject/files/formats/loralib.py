"""microsoft/loralib's state dicts (0.1.2), a pickle without a config: https://github.com/microsoft/LoRA.

    <module>.lora_A (r, in)         .lora_B (out, r)          Linear; Embedding too, with in = vocabulary
    <module>.lora_A (k r, in)       .lora_B (k out/g, r)      MergedLinear: k of g parts of the rows are enabled,
                                                              each with its own r rows of A
    <module>.lora_A (r ks, in ks)   .lora_B (out ks, r ks)    Conv2d: B A is the weight (out, in, ks, ks) viewed as
                                                              (out ks, in ks)
    <module>.bias                                             with bias="lora_only" or "all": in place of the base's

Alpha is not stored. The three layers look alike; the model tells them apart (Hints(model=...)), and Hints(groups=...)
says which parts of a MergedLinear are enabled.

A whole state dict is read for its A and B only. The weights of its adapted layers are ignored, because they may hold
the update already: loralib merges in eval mode.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...plan import site_name
from .. import transforms
from ..format import Files, Format
from ..io.open_adapter import Hints, Source
from ..record import AdapterFile, StoredSite, checked_sites, collected, require_writable
from . import torch_pickle
from .pairs import read_pairs, renamed

ENDINGS = {".lora_A": "A", ".lora_B": "B"}


def claims(source: Source) -> bool:
    """True if any tensor is called <module>.lora_A or .lora_B, as parameters are."""
    return any(key.endswith(tuple(ENDINGS)) for key in source.tensors)


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """Return the record, with each enabled part of a MergedLinear as a site on a slice."""
    if hints.alpha is None:
        problems.append("loralib does not store alpha: pass it, as in Hints(alpha=32)")
        return None
    rest: dict[str, Tensor] = {}
    tensors = renamed(source.tensors, lambda key: key.removeprefix("module."), problems)
    pairs = read_pairs(tensors, ENDINGS, problems, rest=rest)
    modules = {} if hints.model is None else dict(hints.model.named_modules())
    sites: list[StoredSite] = []
    for path, pair in pairs.items():
        s = StoredSite(path=path, A=pair.A, B=pair.B, alpha=hints.alpha, scaling=hints.scaling)
        sites += _sites(s, modules.get(path), hints, problems)
    replaced = {site_name(*key.rpartition(".")[::2]): t for key, t in rest.items() if not _is_base_weight(key, pairs)}
    notes = []
    if hints.model is None:
        notes.append("linears, embeddings and convolutions look alike, and all were read as linears: read the file with"
                     " the model to be sure")  # fmt: skip
    if len(rest) > len(replaced):
        notes.append("the file is a whole state dict: the weights of adapted layers were ignored, because they may hold"
                     " the update already")  # fmt: skip
    return AdapterFile(path=source.path, format="loralib", sites=tuple(checked_sites(sites, problems)),
                       replaced=replaced, notes=tuple(notes))  # fmt: skip


def _is_base_weight(key: str, paths: Collection[str]) -> bool:
    """True if the tensor is the weight of an adapted layer, or of the convolution inside an adapted Conv2d."""
    path, _, leaf = key.rpartition(".")
    return leaf == "weight" and (path in paths or path.rpartition(".")[0] in paths)


def _sites(s: StoredSite, layer: nn.Module | None, hints: Hints, problems: list[str]) -> list[StoredSite]:
    """Return the sites of one module: one per enabled part of a MergedLinear, else one."""
    if s.A.ndim != 2 or s.B.ndim != 2 or 0 in (*s.A.shape, *s.B.shape):
        return [s]  # reported by checked_sites
    k = s.A.shape[0] // s.B.shape[1]
    by_ending = (list(g) for ending, g in (hints.groups or {}).items() if f".{s.path}".endswith(f".{ending}"))
    enabled = next(by_ending, None)
    weight = None if layer is None else layer._parameters.get("weight")
    if enabled is None and k > 1 and weight is not None and weight.ndim == 2:
        enabled = [True] * k if max(weight.shape) * k // s.B.shape[0] == k else None
    if enabled is not None:
        return transforms.split_merged_linear(s, enabled)
    if k > 1:
        shapes = f"A {tuple(s.A.shape)} and B {tuple(s.B.shape)}"
        groups = f'Hints(groups={{"{s.path.rpartition(".")[2]}": [True, False, True]}})'
        problems.append(f"{s.path}: {shapes} are {k} enabled groups of a MergedLinear: say which, as in {groups}")
        return []
    if isinstance(layer, nn.Conv2d):
        return [_convolution(s, layer)]
    return [replace(s, kind="embedding") if isinstance(layer, nn.Embedding) else s]


def _convolution(s: StoredSite, layer: nn.Conv2d) -> StoredSite:
    """Return the update (out ks, in ks) as an update of W.flatten(1), (out, in ks ks).

    A is copied once per row of the kernel. The rank becomes r ks^2, and alpha grows
    with it, so that the scale stays that of rank r.
    """
    ks = layer.kernel_size[0]
    transforms.checked_shape(s.name, ks * s.A.shape[0], ks * s.A.shape[1])
    A = torch.kron(torch.eye(ks, dtype=s.A.dtype), s.A)
    B = s.B.reshape(-1, ks * s.B.shape[1])
    return replace(s, kind="conv", shape=tuple(layer.weight.shape), A=A, B=B, alpha=s.alpha * ks * ks)


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """Return one pickle. Slices that are equal parts of a weight become a MergedLinear, others the whole weight."""
    by_path: dict[str, list[StoredSite]] = {}
    for s in file.sites:
        by_path.setdefault(s.path, []).append(s)
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for module, sites in by_path.items():
        with collected(problems):
            merged = transforms.join_merged_linear(sites) if sites[0].rows is not None else None
            for s in () if merged else transforms.slices_to_whole(sites, problems):
                merged = s.A, s.B, []
            if merged:
                tensors |= {f"{module}.lora_A": merged[0], f"{module}.lora_B": merged[1]}
    require_writable("loralib", problems)
    tensors |= {name if name.endswith(".bias") else f"{name}.weight": t for name, t in file.replaced.items()}
    return {path: [torch_pickle.dump(tensors)]}


FORMAT = Format(name="loralib", library="loralib 0.1.2", claims=claims, read=read, write=write, scales="alpha",
                suffix=".pt", asks=("alpha", "groups", "model"),
                holds=frozenset({"slices", "embeddings", "whole tensors"}))  # fmt: skip
