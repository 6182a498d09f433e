"""mlx-lm's adapters (0.32.2), adapters.safetensors (once .npz) and a config: https://github.com/ml-explore/mlx-lm.

    <path>.lora_a (in, r)       <path>.lora_b (r, out)       linear; for embeddings (V, r) and (r, d)
    <path>.lora_a (E, r, in)    <path>.lora_b (E, out, r)    experts: <layer>.mlp.switch_mlp.{gate,up,down}_proj
    <path>.m (out,)                                          DoRA

In adapter_config.json, lora_parameters.scale is the scale s itself. Old files have an alpha next to it; mlx-lm then
trained with s = scale * alpha / rank. Before October 2025 the lora_a of experts was one matrix (E r, in).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import transforms
from ..format import Files, Format
from ..io import safetensors_file
from ..io.open_adapter import CONFIG, Hints, Source
from ..record import AdapterFile, StoredSite, checked_sites, require_writable
from .language_model_names import stack_experts
from .pairs import Pair, rank_problems, read_pairs

ENDINGS = {".lora_a": "A", ".lora_b": "B", ".m": "magnitude"}
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings")


def claims(source: Source) -> bool:
    """True if the config is mlx-lm's, or any tensor is called <path>.lora_a."""
    named = source.container != "gguf" and any(key.endswith((".lora_a", ".lora_b")) for key in source.tensors)
    return named or not source.config.keys().isdisjoint({"lora_parameters", "fine_tune_type"})


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """Return the record, with stacks of experts as one linear per expert."""
    settings = source.config.get("lora_parameters", {})
    if (kind := source.config.get("fine_tune_type", "lora")) not in ("lora", "dora"):
        problems.append(f"fine_tune_type is {kind!r}: whole weights, no pair of low-rank factors")
        return None
    pairs = read_pairs(source.tensors, ENDINGS, problems)
    if "scale" not in settings and hints.alpha is None:
        problems.append(f"it holds no scale: give the directory with {CONFIG}, or pass alpha, as in Hints(alpha=16)")
    for path, pair in pairs.items():
        problems += rank_problems(
            path,
            pair.B.mT if pair.B.ndim == 2 else pair.B[0:1].squeeze(0) if pair.B.ndim == 3 else pair.B,
            settings.get("rank"),
        )
    if problems:
        return None
    sites = checked_sites([_site(path, pair, settings, hints) for path, pair in pairs.items()], problems)
    note = "the config has an alpha too, so the scale is scale * alpha / rank, as mlx-lm before April 2025 trained"
    notes = (note,) * ("alpha" in settings)
    linears = [part for s in sites for part in (_split_experts(s) if s.A.ndim == 3 else [s])]
    return AdapterFile(path=source.path, format="mlx", sites=tuple(linears), config=source.config, notes=notes)


def _site(path: str, pair: Pair, settings: dict[str, Any], hints: Hints) -> StoredSite:
    A, B, kind = pair.A, pair.B, "linear"
    if B.ndim == 3:
        kind = "experts"
        A = A.reshape(B.shape[0], -1, A.shape[1]) if A.ndim == 2 else A
    elif A.ndim == B.ndim == 2:
        kind = "embedding" if path.rpartition(".")[2] in EMBEDDINGS else "linear"
        A, B = A.mT.contiguous(), B.mT.contiguous()
    r = (A.shape[-2] if A.ndim > 1 else 1) or 1  # an empty A is reported by checked_sites
    scale = settings.get("scale", (hints.alpha or 0) / r)
    alpha = scale * r * (settings["alpha"] / settings.get("rank", r) if "alpha" in settings else 1)
    return StoredSite(path=path, kind=kind, A=A, B=B, alpha=alpha, dropout=settings.get("dropout", 0.0),
                      magnitude=pair.extras.get("magnitude"))  # fmt: skip


def _split_experts(s: StoredSite) -> list[StoredSite]:
    """Return the stack in switch_mlp as the linears of the experts that checkpoints have."""
    block, _, leaf = s.path.rpartition(".")
    experts = f"{block.removesuffix('.switch_mlp')}.experts"
    return transforms.split_experts(s, [f"{experts}.{n}.{leaf}" for n in range(len(s.A))])


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """Return the directory that mlx-lm reads. Raises FileError if some expert of a layer has no adapter."""
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for s in stack_experts(file.sites, ".switch_mlp", problems):
        A, B = (s.A, s.B) if s.A.ndim == 3 else (s.A.mT, s.B.mT)
        tensors |= {f"{s.path}.lora_a": A.contiguous(), f"{s.path}.lora_b": B.contiguous()}
        if s.magnitude is not None:
            tensors[f"{s.path}.m"] = s.magnitude
    require_writable("mlx-lm", problems)
    first = file.sites[0]
    is_dora = any(s.magnitude is not None for s in file.sites)
    keys = sorted({re.sub(r"^.*?\.?layers\.\d+\.", "", key.rpartition(".")[0]) for key in tensors})
    config: dict[str, Any] = {"fine_tune_type": "dora" if is_dora else "lora", "num_layers": -1}
    config |= file.config if file.format == "mlx" else {}
    config["lora_parameters"] = {"rank": first.r, "scale": first.scale, "dropout": first.dropout, "keys": keys}
    text = json.dumps(config, indent=4) + "\n"
    return {path / "adapters.safetensors": safetensors_file.dump(tensors, {}), path / CONFIG: [text.encode()]}


FORMAT = Format(name="mlx", library="mlx-lm 0.32.2", claims=claims, read=read, write=write, scales="one",
                holds=frozenset({"embeddings", "magnitudes"}))  # fmt: skip
