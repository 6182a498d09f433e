"""litgpt's lit_model.pth.lora (0.5.13), a pickle: https://github.com/Lightning-AI/litgpt.

    transformer.h.N.attn.qkv           .lora_A (k r, in)    .lora_B (rows of the k enabled parts, r)
    transformer.h.N.attn.proj, .mlp.fc_1 (gate), .mlp.fc_2 (up), .mlp.proj (down), lm_head
                                       .lora_A (r, in)      .lora_B (out, r)

qkv is one weight. k of its parts q, k and v are enabled, each with r rows of A. q has n_head heads of rows, k and v
have n_query_groups each: from model_config.yaml, or from Hints(heads=...). r and alpha are in hyperparameters.yaml.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..format import Files, Format
from ..io.open_adapter import Hints, Source
from ..record import AdapterFile, StoredSite, checked_sites, collected, require_writable
from . import torch_pickle
from .language_model_names import NameTable, attention_heads, missing_alpha
from .pairs import rank_problems, read_pairs

ENDINGS = {".lora_A": "A", ".lora_B": "B"}
QKV = ("query", "key", "value")
NAMES = NameTable({
    "transformer.h.{}.attn.query": "model.layers.{}.self_attn.q_proj",
    "transformer.h.{}.attn.key": "model.layers.{}.self_attn.k_proj",
    "transformer.h.{}.attn.value": "model.layers.{}.self_attn.v_proj",
    "transformer.h.{}.attn.proj": "model.layers.{}.self_attn.o_proj",
    "transformer.h.{}.mlp.fc_1": "model.layers.{}.mlp.gate_proj",
    "transformer.h.{}.mlp.fc_2": "model.layers.{}.mlp.up_proj",
    "transformer.h.{}.mlp.proj": "model.layers.{}.mlp.down_proj",
    "lm_head": "lm_head",
})  # fmt: skip
LEAVES = (".attn.qkv", ".attn.proj", ".attn.attn", ".mlp.fc_1", ".mlp.fc_2", ".mlp.fc", ".mlp.proj")
HYPER, MODEL, FILE = "hyperparameters.yaml", "model_config.yaml", "lit_model.pth.lora"
# The switches of hyperparameters.yaml, and the leaves of transformers' names that each one trains.
SWITCHES = {"projection": ("o_proj",), "mlp": ("gate_proj", "up_proj", "down_proj"), "head": ("lm_head",)}


def claims(source: Source) -> bool:
    """True if hyperparameters.yaml lies next to the tensors, or all A and B have litgpt's names."""
    paths = [key.removesuffix(ending) for key in source.tensors for ending in ENDINGS if key.endswith(ending)]
    named = all(p == "lm_head" or (p.startswith("transformer.h.") and p.endswith(LEAVES)) for p in paths)
    return HYPER in source.configs or (bool(paths) and named)


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """Return the record, in transformers' names, with q, k and v apart."""
    hyper, model = source.configs.get(HYPER, {}), source.configs.get(MODEL, {})
    pairs = read_pairs(source.tensors, ENDINGS, problems)
    alpha: Any = hints.alpha if hints.alpha is not None else hyper.get("lora_alpha")
    heads = attention_heads(hints)
    if "n_head" in model:
        heads = model["n_head"], model.get("n_query_groups") or model["n_head"]
    if alpha is None:
        problems.append(missing_alpha(HYPER))
    if heads is None and any(path.endswith(".attn.qkv") for path in pairs):
        problems.append(f"which rows of qkv are q, k and v is unknown: give the directory with {MODEL}, or the heads,"
                        " as in Hints(heads=(32, 8))")  # fmt: skip
    for path in pairs:
        if path.endswith(".attn.attn"):
            problems.append(f"{path}: files of old litgpt versions, with qkv in groups of heads, are not supported")
        elif not path.endswith(".attn.qkv") and NAMES.to_transformers(path) is None:
            mlp = model.get("mlp_class_name", "this model")
            problems.append(f"{path}: the names of {mlp} are not supported, only those of LLaMAMLP")
    if problems:
        return None
    sites: list[StoredSite] = []
    for path, pair in pairs.items():
        problems += rank_problems(path, pair.B, hyper.get("lora_r"))
        s = StoredSite(
            path=NAMES.to_transformers(path) or path,
            A=pair.A,
            B=pair.B,
            alpha=alpha,
            dropout=hyper.get("lora_dropout", 0.0),
        )
        sites += _split_qkv(s, hyper, heads, problems) if path.endswith(".attn.qkv") else [s]
    return AdapterFile(path=source.path, format="litgpt", sites=tuple(checked_sites(sites, problems)), config=hyper)


def _split_qkv(
    s: StoredSite, hyper: dict[str, Any], heads: tuple[int, int] | None, problems: list[str]
) -> list[StoredSite]:
    """Return the enabled ones of q, k and v as sites of their own."""
    assert heads is not None
    n = dict(zip(QKV, (heads[0], heads[1], heads[1]), strict=True))
    enabled = [part for part in QKV if hyper.get(f"lora_{part}", True)]
    r, n_enabled = s.B.shape[1], sum(n[part] for part in enabled)
    if not enabled or s.A.shape[0] != len(enabled) * r or s.B.shape[0] % n_enabled:
        shapes = f"A {tuple(s.A.shape)} and B {tuple(s.B.shape)}"
        problems.append(
            f"{s.path}: {shapes} do not hold {', '.join(enabled) or 'any part'} of {heads[0]} and {heads[1]} heads"
        )
        return []
    head_size, row, parts = s.B.shape[0] // n_enabled, 0, []
    for j, part in enumerate(enabled):
        rows = n[part] * head_size
        path = NAMES.to_transformers(s.path.removesuffix("qkv") + part) or s.path
        parts.append(replace(s, path=path, A=s.A[j * r : (j + 1) * r], B=s.B[row : row + rows]))
        row += rows
    return parts


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """Return the directory; model_config.yaml belongs to the base. Raises FileError for names that litgpt has not."""
    names = {s.path: NAMES.from_transformers(s.path) for s in file.sites}
    problems = [f"{s.name}: litgpt has no weight of this name" for s in file.sites if names[s.path] is None]
    by_name = {name: s for s in file.sites if (name := names[s.path]) is not None}
    enabled = [part for part in QKV if any(name.endswith(f".attn.{part}") for name in by_name)]
    tensors: dict[str, Tensor] = {}
    for name, s in by_name.items():
        if not name.endswith(QKV):
            tensors |= {f"{name}.lora_A": s.A, f"{name}.lora_B": s.B}
    for attn in dict.fromkeys(name.rpartition(".")[0] for name in by_name if name.endswith(QKV)):
        parts = [by_name.get(f"{attn}.{part}") or _zero_site(part, attn, by_name) for part in enabled]
        what = " and ".join(s.path for s in parts)
        with collected(problems):
            tensors[f"{attn}.qkv.lora_A"] = transforms.concat(what, [s.A for s in parts])
            tensors[f"{attn}.qkv.lora_B"] = transforms.concat(what, [s.B for s in parts])
    require_writable("litgpt", problems)
    first, leaves = file.sites[0], {s.path.rpartition(".")[2] for s in file.sites}
    hyper: dict[str, Any] = {"lora_r": first.r, "lora_alpha": first.alpha, "lora_dropout": first.dropout}
    hyper |= {f"lora_{part}": part in enabled for part in QKV}
    hyper |= {f"lora_{switch}": not leaves.isdisjoint(trained) for switch, trained in SWITCHES.items()}
    text = "".join(f"{key}: {str(value).lower()}\n" for key, value in hyper.items())
    return {path / FILE: [torch_pickle.dump({"model": tensors})], path / HYPER: [text.encode()]}


def _zero_site(part: str, attn: str, by_name: dict[str, StoredSite]) -> StoredSite:
    """Return zeros for a part that only other layers adapt: litgpt enables a part in all layers or in none."""
    A = next(s.A for name, s in by_name.items() if name.startswith(f"{attn}.") and name.endswith(QKV))
    other = next(s for name, s in by_name.items() if name.endswith(f".attn.{part}"))
    return StoredSite(path=attn, A=torch.zeros_like(A), B=torch.zeros_like(other.B), alpha=other.alpha)


FORMAT = Format(name="litgpt", library="litgpt 0.5.13", claims=claims, read=read, write=write, scales="one",
                asks=("heads",), holds=frozenset())  # fmt: skip
