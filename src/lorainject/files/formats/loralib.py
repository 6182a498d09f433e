"""microsoft/loralib's state dicts (0.1.2): https://github.com/microsoft/LoRA. A pickle of a flat table, and no config: alpha has to be told.

    <module>.lora_A (r, in)         .lora_B (out, r)               Linear; Embedding too, with in = vocabulary
    <module>.lora_A (k r, in)       .lora_B (k out/g, r)           MergedLinear: k of g parts of the rows are enabled, each with an A of its own
    <module>.lora_A (r ks, in ks)   .lora_B (out ks, r ks)         Conv2d: B A is the weight (out, in, ks, ks) seen as (out ks, in ks)
    <module>.bias                                                  with bias="lora_only" or "all": in place of the base's

The three look alike; the model tells them apart (Hints(model=...)). A whole state dict is read for its A and B; what it has in `weight`
may hold the update already (loralib merges in eval mode), so the weights of adapted layers are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...plan import site_name
from .. import transforms
from ..format import Files, Format
from ..io.open_adapter import Hints, Source
from ..record import NONE, AdapterFile, StoredSite, checked
from .names import pickled

ENDS = (".lora_A", ".lora_B")


def claims(source: Source) -> bool:
    """Whether any tensor is called <module>.lora_A, as a parameter is."""
    return any(key.endswith(ENDS) for key in source.tensors)


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """The record; what is wrong, or not said, goes into `problems`."""
    tensors = {key.removeprefix("module."): t for key, t in source.tensors.items()}
    paths = dict.fromkeys(key[: -len(ENDS[0])] for key in tensors if key.endswith(ENDS))
    if hints.alpha is None:
        problems.append("loralib does not store alpha: say it, as in Hints(alpha=32)")
        return None
    problems += [f"{at}{end}: missing" for at in paths for end in ENDS if at + end not in tensors]
    notes = (
        []
        if hints.model
        else [
            "linears, embeddings and convolutions look alike: all were taken for linears; read it with the model to be sure"
        ]
    )
    sites: list[StoredSite] = []
    for at in (at for at in paths if at + ENDS[0] in tensors and at + ENDS[1] in tensors):
        A, B = (tensors[at + end] for end in ENDS)
        for s, a, b, alpha in _sites(at, A, B, hints, problems):
            made = checked(s, a, b, problems, alpha=alpha, scaling=hints.scaling)
            sites += [made] if made else []
    beside = {key: t for key, t in tensors.items() if not key.endswith(ENDS)}
    replaced = {site_name(*key.rpartition(".")[::2]): t for key, t in beside.items() if not _is_base(key, paths)}
    if len(beside) > len(replaced):
        notes.append(
            "a whole state dict: of the adapted layers A and B were taken, and the weights passed over, which may hold them already"
        )
    return AdapterFile(path=source.path, format="loralib", sites=tuple(sites), replaced=replaced, notes=tuple(notes))


def _is_base(key: str, paths: Mapping[str, None]) -> bool:
    """Whether it is the weight of an adapted layer, or a bias of one that a whole state dict brings along unasked."""
    path, _, leaf = key.rpartition(".")
    return leaf == "weight" and (path in paths or path.rpartition(".")[0] in paths)


def _sites(
    at: str, A: Tensor, B: Tensor, hints: Hints, problems: list[str]
) -> list[tuple[StoredSite, Tensor, Tensor, float]]:
    """One module's sites, each with its A, B and alpha."""
    alpha, layer = hints.alpha or 0.0, _layer(hints.model, at)
    s = StoredSite(path=at, A=NONE, B=NONE, alpha=alpha)
    if A.ndim != 2 or B.ndim != 2 or 0 in (*A.shape, *B.shape):
        return [(s, A, B, alpha)]
    k = A.shape[0] // B.shape[1]
    enabled = next((list(g) for end, g in (hints.groups or {}).items() if at == end or at.endswith(f".{end}")), None)
    if enabled is None and k > 1 and layer is not None and (weight := layer._parameters.get("weight")) is not None:
        parts = max(weight.shape) * k // B.shape[0] if weight.ndim == 2 else 0
        enabled = [True] * k if parts == k else None
    if enabled is not None:
        return [(p, p.A, p.B, alpha) for p in transforms.split_merged_linear(replace(s, A=A, B=B), enabled)]
    if k > 1:
        problems.append(f"{at}: A {tuple(A.shape)} and B {tuple(B.shape)} are {k} enabled groups of a MergedLinear: say which, as in"
                        f' Hints(groups={{"{at.rpartition(".")[2]}": [True, False, True]}})')  # fmt: skip
        return []
    if isinstance(layer, nn.Conv2d):
        return [_convolution(s, layer, A, B, alpha)]
    return [(replace(s, kind="embedding") if isinstance(layer, nn.Embedding) else s, A, B, alpha)]


def _convolution(
    s: StoredSite, layer: nn.Conv2d, A: Tensor, B: Tensor, alpha: float
) -> tuple[StoredSite, Tensor, Tensor, float]:
    """(out ks, in ks) seen as (out, in ks ks): a copy of A for each row of the kernel, so rank r ks^2, with the scale of rank r."""
    ks = layer.kernel_size[0]
    transforms.checked_shape(s.name, ks * A.shape[0], ks * A.shape[1])
    wide = torch.kron(torch.eye(ks, dtype=A.dtype), A)
    return (
        replace(s, kind="conv", shape=tuple(layer.weight.shape)),
        wide,
        B.reshape(-1, ks * B.shape[1]),
        alpha * ks * ks,
    )


def _layer(model: nn.Module | None, path: str) -> nn.Module | None:
    return dict(model.named_modules()).get(path) if model is not None else None


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """One pickle. Slices that are equal parts of their weight are written as a MergedLinear's, others padded to the whole."""
    by_path: dict[str, list[StoredSite]] = {}
    for s in file.sites:
        by_path.setdefault(s.path, []).append(s)
    tensors: dict[str, Tensor] = {}
    for at, group in by_path.items():
        one = transforms.join_merged_linear(group) if group[0].rows is not None else None
        A, B = one[:2] if one else next((s.A, s.B) for s in transforms.slices_to_whole(group))
        tensors |= {f"{at}.lora_A": A, f"{at}.lora_B": B}
    tensors |= {name if name.endswith(".bias") else f"{name}.weight": t for name, t in file.replaced.items()}
    return {path: [pickled(tensors)]}


FORMAT = Format(name="loralib", library="loralib 0.1.2", claims=claims, read=read, write=write, scales="alpha", suffix=".pt",
                asks=("alpha", "groups"), holds=frozenset({"slices", "embeddings", "whole tensors"}))  # fmt: skip
