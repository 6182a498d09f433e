"""PEFT's names, shapes and config (0.7 to 0.21), and how they are written: https://huggingface.co/docs/peft, verified against peft 0.21.2.

    base_model.model.<path>.lora_A.weight (r, in)             .lora_B.weight (out, r)            linear, Conv1D
    base_model.model.<path>.lora_A.weight (r, in, *kernel)    .lora_B.weight (out, r, *ones)     convolution
    base_model.model.<path>.lora_embedding_A (r, V)           .lora_embedding_B (d, r)           embedding
    base_model.model.<path>.lora_A.weight (E r, in)           .lora_B.weight (out, r E)          stacked experts (target_parameters):
        the rows of A go by expert, the columns of B by rank, and of several parameters of a module the last has these names, the one
        before it <path>.base_layer.lora_A.weight, and so on
    base_model.model.<path>.lora_magnitude_vector             (out,), for convolutions (1, out, *ones): DoRA
    base_model.model.<path>.lora_B.bias                       (out,): the update of the bias, times the scale
    base_model.model.<path>.token_adapter.trainable_tokens_delta    (n, width): rows in place of the base's
    base_model.model.<path>[.base_layer].weight, .bias        a whole tensor in place of the base's

r is read off the tensors; alpha comes from the config, with patterns that match the end of a path (peft_reader.py).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import regex
from torch import Tensor

from ...errors import FileError
from ...lora.weight_kinds import LAYERS
from ...numerics.delta import scale
from .. import transforms
from ..io import safetensors_file
from ..io.open_adapter import CONFIG, TENSORS, Hints
from ..record import AdapterFile, StoredSite

PREFIX = "base_model.model."
WRITTEN_AS = "0.21.2"  # the version whose layout we write
TOKENS = "token_adapter.trainable_tokens_delta"
LINEAR, EMBEDDING = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
OF_LAYERS = frozenset(kind.name for kind in LAYERS)
PATTERN_SECONDS = 1.0
DEFAULT_ALPHA = 8  # PEFT's, for a config that does not say
ABOUT = (
    "task_type",
    "base_model_name_or_path",
    "auto_mapping",
    "revision",
)  # fields that say nothing of A and B: kept as they were


def keys(sites: Sequence[StoredSite]) -> dict[str, tuple[str, str]]:
    """For each site, in the model's order, the names of its two tensors; of what PEFT has not, names that it won't take for its own."""
    found = {}
    for s in sites:
        if not holds(s):
            found[s.name] = (f"{s.name}.lora_A", f"{s.name}.lora_B")
            continue
        at = f"{PREFIX}{s.path}"
        if is_bare(s):
            beside = [other.parameter for other in sites if other.path == s.path and is_bare(other) and holds(other)]
            at += ".base_layer" * (len(beside) - 1 - beside.index(s.parameter))
        a, b = EMBEDDING if s.embedding else LINEAR
        found[s.name] = (at + a, at + b)
    return found


def holds(s: StoredSite) -> bool:
    """Whether PEFT has such a site: no slices, no transposed convolutions, no bare parameters that are neither matrix nor stack."""
    return s.peft and not s.label and not s.named and s.kind != "conv^T" and (s.kind != "matrix" or len(s.shape) == 2)


def is_bare(s: StoredSite) -> bool:
    """Whether it sits on a parameter of a module that is no layer: PEFT's target_parameters."""
    return s.kind not in OF_LAYERS


def tensors(sites: Sequence[StoredSite]) -> dict[str, Tensor]:
    """The tensors of A and B, by PEFT's names."""
    names = keys(sites)
    return {key: t for s in sites for key, t in zip(names[s.name], _packed(s), strict=True)}


def _packed(s: StoredSite) -> tuple[Tensor, Tensor]:
    """A and B in the shapes that PEFT gives them."""
    if s.A.ndim == 3:
        return s.A.reshape(-1, s.A.shape[-1]), s.B.permute(1, 2, 0).reshape(s.B.shape[1], -1)
    if s.kind == "conv" and holds(s):
        return s.A.reshape(s.r, *s.shape[1:]), s.B.reshape(*s.B.shape, *[1] * (len(s.shape) - 2))
    return s.A, s.B


def unpacked(A: Tensor, B: Tensor, kind: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The inverse."""
    if kind.startswith("experts"):
        E = shape[0]
        return A.reshape(E, -1, A.shape[-1]), B.reshape(B.shape[0], -1, E).permute(2, 0, 1).contiguous()
    return (A.flatten(1), B.flatten(1)) if A.ndim > 2 and B.shape[2:].numel() == 1 else (A, B)


def extras(file: AdapterFile) -> dict[str, Tensor]:
    """The tensors beside A and B, by PEFT's names."""
    found: dict[str, Tensor] = {}
    for s in file.sites:
        if s.magnitude is not None:
            ones = [1] * (len(s.shape) - 2) if s.kind == "conv" else []
            found[f"{PREFIX}{s.path}.lora_magnitude_vector"] = s.magnitude.view(1, -1, *ones) if ones else s.magnitude
        if s.bias is not None:
            found[f"{PREFIX}{s.path}.lora_B.bias"] = s.bias
    return found | {f"{PREFIX}{path}.{TOKENS}": t.rows for path, t in file.tokens.items()} | dict(whole(file).values())


def whole(file: AdapterFile) -> dict[str, tuple[str, Tensor]]:
    """The whole tensors, by what they replace: PEFT's name, and the tensor."""
    found, adapted = {}, {s.path for s in file.sites}
    for name, t in file.replaced.items():
        path, leaf = (name[: -len(".bias")], "bias") if name.endswith(".bias") else (name, "weight")
        found[name] = f"{PREFIX}{path}{'.base_layer' * (path in adapted)}.{leaf}", t
    return found


def config(file: AdapterFile) -> dict[str, Any]:
    """adapter_config.json: the commonest r, alpha and dropout, and the exceptions as patterns on exact paths."""
    sites = (
        tuple(map(transforms.to_standard_scaling, file.sites))
        if len({s.scaling for s in file.sites}) > 1
        else file.sites
    )  # PEFT has one for all
    r, alpha = Counter((s.r, s.alpha) for s in sites).most_common(1)[0][0]
    bare = [s for s in sites if is_bare(s)]
    names = [f"{s.path}.{s.parameter}" if is_bare(s) else s.path for s in sites]
    chosen = sorted({s.path for s in sites if not is_bare(s)})
    saved = _saved(file)
    return dict.fromkeys(ABOUT) | {key: file.config[key] for key in ABOUT if file.config.get(key)} | {
        "peft_type": "LORA", "peft_version": WRITTEN_AS, "inference_mode": True, "r": r, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0 if bare else max(s.dropout for s in sites),  # PEFT has no dropout on parameters, and refuses one
        "bias": _bias(file, saved), "fan_in_fan_out": {s.kind for s in sites} == {"linear^T"},
        "use_rslora": {s.scaling for s in sites} == {"rslora"}, "use_dora": any(s.magnitude is not None for s in sites),
        "lora_bias": any(s.bias is not None for s in sites), "init_lora_weights": True,
        "modules_to_save": saved, "layers_to_transform": None, "layers_pattern": None, "exclude_modules": None,
        "target_modules": _targets(file.config.get("target_modules"), chosen),
        "target_parameters": [f"{s.path}.{s.parameter}" for s in bare] or None,
        "trainable_token_indices": {path: list(t.ids) for path, t in file.tokens.items()} or None,
        "rank_pattern": {f"^{re.escape(name)}": s.r for name, s in zip(names, sites, strict=True) if s.r != r},
        "alpha_pattern": {f"^{re.escape(name)}": s.alpha for name, s in zip(names, sites, strict=True) if s.alpha != alpha},
    }  # fmt: skip


def _targets(given: Any, chosen: list[str]) -> list[str]:
    """The list as it stood, if its entries still mean these paths, all and each; else the paths themselves."""
    if not isinstance(given, list) or set(targeted({"target_modules": given}, chosen)) != set(chosen):
        return chosen
    return (
        sorted(given)
        if all(any(targeted({"target_modules": [entry]}, [path]) for path in chosen) for entry in given)
        else chosen
    )


def _saved(file: AdapterFile) -> list[str] | None:
    """modules_to_save: the modules whose weight is replaced, but for adapted embeddings, whose base weight merely came along."""
    whole = {name for name in file.replaced if not name.endswith(".bias")} - {s.path for s in file.sites}
    kept = file.config.get("modules_to_save")
    return sorted(kept) if isinstance(kept, list) and kept and whole else sorted(whole) or None


def _bias(file: AdapterFile, saved: list[str] | None) -> str:
    """ "none", "lora_only" (of adapted layers) or "all", by the biases that are there and belong to no saved module."""
    biases = {
        name.removesuffix(".bias")
        for name in file.replaced
        if name.endswith(".bias") and name.removesuffix(".bias") not in file.replaced
    }
    if not biases or file.config.get("bias") in ("all", "lora_only"):
        return str(file.config["bias"]) if biases else "none"
    return "lora_only" if biases <= {s.path for s in file.sites} else "all"


def write(file: AdapterFile, path: Path, hints: Hints) -> dict[Path, Any]:
    """The directory that PEFT reads."""
    file, attention = _attention(file)
    if beyond := [f"{s.name}: {s.kind}" for s in file.sites if not holds(s)]:
        raise FileError("PEFT has no place for:", beyond, "write it in the format lorainject")
    text = json.dumps(config(file), indent=2, sort_keys=True) + "\n"
    return {
        path / TENSORS: safetensors_file.dump(tensors(file.sites) | extras(file) | attention, {"format": "pt"}),
        path / CONFIG: [text.encode()],
    }


def _attention(file: AdapterFile) -> tuple[AdapterFile, dict[str, Tensor]]:
    """nn.MultiheadAttention as PEFT has it: one adapter on the module, with out_proj's A and B, which count twice, inside of it."""
    owners = {f"{s.path}.out_proj".removeprefix("."): s.path for s in file.sites if s.parameter == "in_proj_weight"}
    outs = {owners[s.path]: s for s in file.sites if s.path in owners}
    sites: list[StoredSite] = []
    beside: dict[str, Tensor] = {}
    for s in (s for s in file.sites if s.path not in owners):
        if s.parameter == "in_proj_weight" and (out := outs.get(s.path)) is not None:
            r = max(s.r, out.r)
            s = replace(transforms.with_rank(s, r), parameter="weight", kind="linear", shape=())
            out = transforms.with_scale_folded(transforms.with_rank(out, r), 2 * s.scale)
            at = ".".join(filter(None, (s.path, "base_layer.out_proj")))
            beside |= {f"{PREFIX}{at}.lora_A.weight": out.A, f"{PREFIX}{at}.lora_B.weight": out.B}
        sites.append(s)
    return replace(file, sites=tuple(sites)), beside


def scale_of(config: Mapping[str, Any], path: str, r: int) -> float:
    """The scale that PEFT reads out of a config for one site."""
    alpha = float(pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", DEFAULT_ALPHA)))
    return scale(alpha, r, "rslora" if config.get("use_rslora") else "standard")


def targeted(config: Mapping[str, Any], paths: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """The paths of a model that `target_modules` asks for; for "all-linear" and layer filters nothing can be said."""
    wanted = config.get("target_modules")
    if (
        wanted is None
        or wanted == "all-linear"
        or config.get("layers_to_transform") is not None
        or config.get("exclude_modules")
    ):
        return []
    if isinstance(wanted, str):
        return [path for path in paths if path and full(wanted, path)]
    ends = tuple(f".{w}" for w in wanted)
    return [path for path in paths if path and f".{path}".endswith(ends)]


def pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The first entry whose key matches the end of the path, by PEFT's rule (0.15 and later)."""
    return next((value for key, value in (patterns or {}).items() if full(rf"(.*\.)?({key})", path)), default)


def full(text: str, path: str) -> bool:
    """Whether a pattern from a file matches the path as a whole, within a time limit."""
    try:
        return regex.fullmatch(text, path, timeout=PATTERN_SECONDS) is not None
    except (regex.error, TimeoutError) as e:
        why = "it never ends" if isinstance(e, TimeoutError) else e
        raise FileError(
            f"the pattern {text!r} in the adapter's config can't be used: {why}", way_out="correct adapter_config.json"
        ) from e
