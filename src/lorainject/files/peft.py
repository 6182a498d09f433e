"""PEFT's names, shapes and config (0.7 to 0.21): https://huggingface.co/docs/peft, layout verified against peft 0.21.2.

    base_model.model.<path>.lora_A.weight (r, in)     .lora_B.weight (out, r)       linear, Conv1D
    base_model.model.<path>.lora_embedding_A (r, V)   .lora_embedding_B (d, r)      embedding

r is read off the tensors; alpha comes from the config, with patterns that match the end of a path.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor, nn

from ..adapters import walk
from ..errors import FileError
from ..kinds import kind_of
from ..lowrank import scale
from ..spec import is_alpha
from .record import AdapterFile, StoredSite

PREFIX = "base_model.model."
WRITTEN_AS = "0.21.2"  # the version whose layout we write
LINEAR, EMBEDDING = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
PATTERN_SECONDS = 1.0
DEFAULT_ALPHA = 8  # PEFT's, for a config that does not say

# Fields which, when set, mean that the file is more than, or other than, W0 + s B A.
BEYOND = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
          "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "enable_lora")  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # inits under which the base itself was altered


def tensors(sites: Iterable[StoredSite]) -> dict[str, Tensor]:
    """The tensors of a file, by PEFT's names."""
    return {f"{PREFIX}{s.path}{end}": t for s in sites for end, t in zip(EMBEDDING if s.embedding else LINEAR, (s.A, s.B), strict=True)}


def config(model: nn.Module, sites: tuple[StoredSite, ...]) -> dict[str, Any]:
    """adapter_config.json: the commonest r, alpha and dropout, and the exceptions as patterns on exact paths."""
    r, alpha = Counter((s.r, s.alpha) for s in sites).most_common(1)[0][0]
    paths = {s.path for s in sites}
    kinds = {k.name for path, m in walk(model) if path in paths and (k := kind_of(m))}
    scalings = {s.scaling for s in sites}
    if len(scalings) > 1:
        raise FileError("PEFT's config holds one scaling for all sites, this adapter has both", way_out='save(model, "x.safetensors") holds it')
    return {
        "peft_type": "LORA", "peft_version": WRITTEN_AS, "task_type": _task(model), "inference_mode": True, "revision": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "auto_mapping": None, "r": r, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": max(s.dropout for s in sites), "bias": "none", "fan_in_fan_out": kinds == {"conv1d"},
        "use_rslora": scalings == {"rslora"}, "use_dora": False, "lora_bias": False, "init_lora_weights": True,
        "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None, "exclude_modules": None,
        "target_modules": _target_modules(model, sites),
        "rank_pattern": {f"^{re.escape(s.path)}": s.r for s in sites if s.r != r},
        "alpha_pattern": {f"^{re.escape(s.path)}": s.alpha for s in sites if s.alpha != alpha},
    }  # fmt: skip


def record(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], problems: list[str]) -> AdapterFile | None:
    """The record of a file that PEFT wrote; what is wrong with it goes into `problems`."""
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        problems.append(f"peft_type is {kind!r}: only LORA is a pair of low-rank factors")
        return None
    problems += [f"{field} is set, which is not plain LoRA: not supported" for field in BEYOND if config.get(field)]
    if not isinstance(config.get("target_modules"), str | list | None):
        problems.append(f"target_modules is {config['target_modules']!r}, not a list of names or a pattern")
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}: adapters that replace biases are not supported")
    if any(str(config.get("init_lora_weights", "")).lower().startswith(init) for init in CHANGES_BASE):
        problems.append(f"init_lora_weights is {config['init_lora_weights']!r}: it belongs to an altered base; convert it with PEFT first")
    paths, replaced = dict.fromkeys(at for key in tensors if (at := _path(key)) is not None), {}
    for key, tensor in tensors.items():
        if _path(key) is None:
            if key.endswith((".base_layer.weight", "embed_tokens.weight", "lm_head.weight")):
                replaced[key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")] = tensor
            else:
                problems.append(f"{key}: unexpected, neither A nor B")
    sites = []
    for at in paths:
        alpha = _pattern(config.get("alpha_pattern"), at, config.get("lora_alpha", DEFAULT_ALPHA))
        stored = site(tensors, at, problems, alpha=alpha, scaling="rslora" if config.get("use_rslora") else "standard",
                      dropout=config.get("lora_dropout", 0.0))  # fmt: skip
        sites += [stored] if stored else []
    return AdapterFile(path=path, format="peft", sites=tuple(sites), replaced=replaced, config=dict(config))


def site(tensors: Mapping[str, Tensor], path: str, problems: list[str], *, alpha: Any, scaling: Any, dropout: Any,
         aliases: Sequence[str] = ()) -> StoredSite | None:  # fmt: skip
    """A and B of one path out of the file's tensors; None, and lines in `problems`, if they or the settings can't be meant."""
    embedding = f"{PREFIX}{path}{EMBEDDING[0]}" in tensors
    a, b = (f"{PREFIX}{path}{end}" for end in (EMBEDDING if embedding else LINEAR))
    wrong = [f"{key}: missing" for key in (a, b) if key not in tensors]
    wrong += [f"{path}: alpha must be a finite number above 0, not {alpha!r}"] * (not is_alpha(alpha))
    wrong += [f"{path}: dropout must be a probability p with 0 <= p < 1, not {dropout!r}"] * (
        not isinstance(dropout, int | float) or not 0 <= dropout < 1
    )
    if not wrong:
        A, B = tensors[a], tensors[b]
        if 0 in (A.numel(), B.numel()):
            wrong.append(f"{path}: A {tuple(A.shape)} with B {tuple(B.shape)} is empty: a sharded run was saved without being gathered")
        elif A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            wrong.append(f"{path}: A {tuple(A.shape)} with B {tuple(B.shape)} is no pair (r, in) and (out, r)")
    if wrong:
        problems += wrong
        return None
    return StoredSite(path=path, aliases=tuple(aliases), A=A, B=B, alpha=float(alpha), scaling=scaling, dropout=float(dropout), embedding=embedding)


def payload_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors that are not finite floats, whatever they are called."""
    odd = [f"{key}: {t.dtype} is not a floating-point type of 16 bits or more" for key, t in tensors.items() if not _is_float(t)]
    return odd + [f"{key}: holds NaN or infinity" for key, t in tensors.items() if _is_float(t) and not bool(t.isfinite().all())]


def scale_of(config: Mapping[str, Any], path: str, r: int) -> float:
    """The scale that PEFT reads out of a config for one site."""
    alpha = float(_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", DEFAULT_ALPHA)))
    return scale(alpha, r, "rslora" if config.get("use_rslora") else "standard")


def targeted(config: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """The paths of a model that `target_modules` asks for; for "all-linear" and layer filters nothing can be said."""
    wanted = config.get("target_modules")
    if wanted is None or wanted == "all-linear" or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return []
    if isinstance(wanted, str):
        return [path for path in paths if path and _full(wanted, path)]
    return [path for path in paths if path and any(path == w or path.endswith(f".{w}") for w in wanted)]


def _task(model: nn.Module) -> str | None:
    """PEFT's word for what the model does, by which AutoPeftModel finds the class; None where it is not sure."""
    if type(model).__name__.endswith("ForCausalLM"):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else None


def _target_modules(model: nn.Module, sites: tuple[StoredSite, ...]) -> list[str]:
    """Leaf names if they mean exactly these sites in this model, as people write them; else full paths."""
    chosen = {s.path for s in sites}
    leaves = {path.rsplit(".", 1)[-1] for path in chosen}
    meant = {path for path, _ in walk(model) if path.rsplit(".", 1)[-1] in leaves}
    return sorted(leaves if meant == chosen else chosen)


def _path(key: str) -> str | None:
    """The module path that an A or B belongs to; None for any other tensor."""
    for end in (*LINEAR, *EMBEDDING):
        if key.startswith(PREFIX) and key.endswith(end):
            return key[len(PREFIX) : -len(end)]
    return None


def _pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The first entry whose key matches the end of the path, by PEFT's rule (0.15 and later)."""
    return next((value for key, value in (patterns or {}).items() if _full(rf"(.*\.)?({key})", path)), default)


def _full(pattern: str, path: str) -> bool:
    try:
        return regex.fullmatch(pattern, path, timeout=PATTERN_SECONDS) is not None
    except (regex.error, TimeoutError) as e:
        why = "it never ends" if isinstance(e, TimeoutError) else e
        raise FileError(f"the pattern {pattern!r} in the adapter's config can't be used: {why}", way_out="correct adapter_config.json") from e


def _is_float(t: Tensor) -> bool:
    return t.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
