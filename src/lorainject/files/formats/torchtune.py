"""torchtune's native adapter_model.pt (0.6.1), a pickle in Meta's names: https://github.com/pytorch/torchtune.

    layers.N.attn.{q,k,v}_proj, .output_proj, layers.N.mlp.w1, .w2, .w3, output
    <name>.lora_a.weight (r, in)    <name>.lora_b.weight (out, r)    <name>.magnitude (out,)     DoRA

Alpha is in adapter_config.json next to it. The rows of q and k are in rotary pairs, as in Meta's code, except for the
model types in UNSORTED; transformers has them in halves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..format import Files, Format
from ..io.open_adapter import CONFIG, Hints, Source
from ..record import AdapterFile, StoredSite, checked_sites, collected, require_writable
from . import torch_pickle
from .language_model_names import UNCHANGED, NameTable, attention_heads, missing_alpha, missing_heads, with_rotary_order
from .pairs import rank_problems, read_pairs

NAMES = NameTable({
    "layers.{}.attn.q_proj": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attn.k_proj": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attn.v_proj": "model.layers.{}.self_attn.v_proj",
    "layers.{}.attn.output_proj": "model.layers.{}.self_attn.o_proj",
    "layers.{}.mlp.w1": "model.layers.{}.mlp.gate_proj",
    "layers.{}.mlp.w2": "model.layers.{}.mlp.down_proj",
    "layers.{}.mlp.w3": "model.layers.{}.mlp.up_proj",
    "output": "lm_head",
})  # fmt: skip
ENDINGS = {".lora_a.weight": "A", ".lora_b.weight": "B", ".magnitude": "magnitude"}
UNSORTED = ("qwen2", "qwen3", "phi3", "phi")  # model types whose q and k torchtune keeps in transformers' order


def claims(source: Source) -> bool:
    """True if any tensor is called <name>.lora_a.weight."""
    return any(key.endswith(".lora_a.weight") for key in source.tensors)


def _heads(hints: Hints) -> tuple[int, int] | None:
    model_type = hints.architecture or getattr(getattr(hints.model, "config", None), "model_type", "")
    return UNCHANGED if model_type in UNSORTED else attention_heads(hints)


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """Return the record, in transformers' names and order of rows."""
    pairs = read_pairs(source.tensors, ENDINGS, problems, translate=NAMES.to_transformers)
    alpha: Any = hints.alpha if hints.alpha is not None else source.config.get("lora_alpha")
    heads = _heads(hints)
    if alpha is None:
        problems.append(missing_alpha(CONFIG))
    problems += missing_heads(pairs, heads)
    for path, pair in pairs.items():
        problems += rank_problems(path, pair.B, source.config.get("r"))
    if problems:
        return None
    sites = checked_sites(
        [
            StoredSite(
                path=path,
                A=pair.A,
                B=pair.B,
                alpha=alpha,
                scaling=hints.scaling,
                magnitude=pair.extras.get("magnitude"),
            )
            for path, pair in pairs.items()
        ],
        problems,
    )
    sites = [with_rotary_order(s, heads, to_pairs=False) for s in sites]
    return AdapterFile(path=source.path, format="torchtune", sites=tuple(sites), config=source.config)


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """Return one pickle. Raises FileError for names that torchtune has not, and if the heads are unknown."""
    heads = _heads(hints)
    names = {s.path: NAMES.from_transformers(s.path) for s in file.sites}
    problems = [f"{s.name}: torchtune has no weight of this name" for s in file.sites if names[s.path] is None]
    problems += missing_heads(names, heads)
    tensors: dict[str, Tensor] = {}
    for s in file.sites:
        name = names[s.path]
        with collected(problems, s.name):
            s = with_rotary_order(s, heads, to_pairs=True)
        tensors |= {f"{name}.lora_a.weight": s.A, f"{name}.lora_b.weight": s.B}
        if s.magnitude is not None:
            tensors[f"{name}.magnitude"] = s.magnitude
    require_writable("torchtune", problems, "give what is missing, or choose another format")
    return {path: [torch_pickle.dump(tensors)]}


FORMAT = Format(name="torchtune", library="torchtune 0.6.1", claims=claims, read=read, write=write, scales="one",
                suffix=".pt", asks=("alpha", "heads"), holds=frozenset({"magnitudes"}))  # fmt: skip
