"""PEFT's names, shapes and config (0.7 to 0.21): https://huggingface.co/docs/peft, layout verified against peft 0.21.2.

    base_model.model.<path>.lora_A.weight (r, in)             .lora_B.weight (out, r)            linear, Conv1D
    base_model.model.<path>.lora_A.weight (r, in, *kernel)    .lora_B.weight (out, r, *ones)     convolution
    base_model.model.<path>.lora_embedding_A (r, V)           .lora_embedding_B (d, r)           embedding
    base_model.model.<path>.lora_A.weight (E r, in)           .lora_B.weight (out, r E)          stacked experts (target_parameters):
        the rows of A go by expert, the columns of B by rank, and of several parameters of a module the last has these names, the one
        before it <path>.base_layer.lora_A.weight, and so on

r is read off the tensors; alpha comes from the config, with patterns that match the end of a path.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor, nn

from ..adapters import walk
from ..errors import FileError
from ..kinds import KINDS, LAYERS
from ..lowrank import scale
from ..spec import is_alpha, site_name
from .record import AdapterFile, StoredSite

PREFIX = "base_model.model."
WRITTEN_AS = "0.21.2"  # the version whose layout we write
LINEAR, EMBEDDING = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
OF_LAYERS = frozenset(kind.name for kind in LAYERS)
PATTERN_SECONDS = 1.0
NONE = torch.empty(0)  # in place of A and B until they are found
DEFAULT_ALPHA = 8  # PEFT's, for a config that does not say

# Fields which, when set, mean that the file is more than, or other than, W0 + s B A.
BEYOND = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
          "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "enable_lora")  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # inits under which the base itself was altered


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
    """The tensors of a file, by PEFT's names."""
    names = keys(sites)
    return {key: t for s in sites for key, t in zip(names[s.name], _packed(s), strict=True)}


def _packed(s: StoredSite) -> tuple[Tensor, Tensor]:
    """A and B in the shapes that PEFT gives them."""
    if s.A.ndim == 3:
        return s.A.reshape(-1, s.A.shape[-1]), s.B.permute(1, 2, 0).reshape(s.B.shape[1], -1)
    if s.kind == "conv" and holds(s):
        return s.A.reshape(s.r, *s.shape[1:]), s.B.reshape(*s.B.shape, *[1] * (len(s.shape) - 2))
    return s.A, s.B


def _unpacked(A: Tensor, B: Tensor, kind: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The inverse."""
    if kind.startswith("experts"):
        E = shape[0]
        return A.reshape(E, -1, A.shape[-1]), B.reshape(B.shape[0], -1, E).permute(2, 0, 1).contiguous()
    return (A.flatten(1), B.flatten(1)) if A.ndim > 2 and B.shape[2:].numel() == 1 else (A, B)


def padded(sites: Sequence[StoredSite]) -> tuple[StoredSite, ...]:
    """The slices of a weight as one adapter on the whole of it: their A stacked, B zero outside their rows. Exact."""
    whole: dict[str, list[StoredSite]] = {}
    for s in sites:
        whole.setdefault(site_name(s.path, s.parameter), []).append(s)
    return tuple(s for group in whole.values() for s in ([_joined(group)] if any(g.label for g in group) else group))


def _joined(group: Sequence[StoredSite]) -> StoredSite:
    first, r = group[0], sum(s.r for s in group)
    stack, out, _ = KINDS[first.kind].sizes(first.shape)
    B = first.B.new_zeros(*stack, out, r)
    for n, s in enumerate(group):
        at = sum(other.r for other in group[:n])
        rows = torch.tensor([i for part in s.rows or (range(out),) for i in part])
        B[..., rows, at : at + s.r] = s.B if s.scale == first.scale else (s.B.double() * (s.scale / first.scale)).to(s.B.dtype)
    alpha = first.scale * (math.sqrt(r) if first.scaling == "rslora" else r)
    return replace(first, label="", rows=None, A=torch.cat([s.A for s in group], -2), B=B, alpha=alpha)


def config(model: nn.Module, sites: tuple[StoredSite, ...]) -> dict[str, Any]:
    """adapter_config.json: the commonest r, alpha and dropout, and the exceptions as patterns on exact paths."""
    r, alpha = Counter((s.r, s.alpha) for s in sites).most_common(1)[0][0]
    scalings = {s.scaling for s in sites}
    if len(scalings) > 1:
        raise FileError("PEFT's config holds one scaling for all sites, this adapter has both", way_out='save(model, "x.safetensors") holds it')
    bare = [s for s in sites if is_bare(s)]
    names = [f"{s.path}.{s.parameter}" if is_bare(s) else s.path for s in sites]
    return {
        "peft_type": "LORA", "peft_version": WRITTEN_AS, "task_type": _task(model), "inference_mode": True, "revision": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "auto_mapping": None, "r": r, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0 if bare else max(s.dropout for s in sites),  # PEFT has no dropout on parameters, and refuses one
        "bias": "none", "fan_in_fan_out": {s.kind for s in sites} == {"linear^T"},
        "use_rslora": scalings == {"rslora"}, "use_dora": False, "lora_bias": False, "init_lora_weights": True,
        "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None, "exclude_modules": None,
        "target_modules": _target_modules(model, [s for s in sites if not is_bare(s)]),
        "target_parameters": [f"{s.path}.{s.parameter}" for s in bare] or None,
        "rank_pattern": {f"^{re.escape(name)}": s.r for name, s in zip(names, sites, strict=True) if s.r != r},
        "alpha_pattern": {f"^{re.escape(name)}": s.alpha for name, s in zip(names, sites, strict=True) if s.alpha != alpha},
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


def site(tensors: Mapping[str, Tensor], path: str, problems: list[str], *, alpha: Any, scaling: Any, dropout: Any) -> StoredSite | None:
    """A and B of one path out of the tensors that PEFT wrote; None, and lines in `problems`, if they or the settings can't be meant."""
    embedding = f"{PREFIX}{path}{EMBEDDING[0]}" in tensors
    a, b = (f"{PREFIX}{path}{end}" for end in (EMBEDDING if embedding else LINEAR))
    kind = "embedding" if embedding else "conv" if tensors[a if a in tensors else b].ndim > 2 else "linear"
    return pair(tensors, (a, b), StoredSite(path=path, kind=kind, A=NONE, B=NONE, alpha=0), problems, alpha=alpha, scaling=scaling, dropout=dropout)


def pair(tensors: Mapping[str, Tensor], at: tuple[str, str], s: StoredSite, problems: list[str], *, alpha: Any, scaling: Any,
         dropout: Any) -> StoredSite | None:  # fmt: skip
    """The site with its A and B, found under the two names; None, and lines in `problems`, if they or the settings can't be meant."""
    wrong = [f"{key}: missing" for key in at if key not in tensors]
    wrong += [f"{s.name}: alpha must be a finite number above 0, not {alpha!r}"] * (not is_alpha(alpha))
    wrong += [f"{s.name}: dropout must be a probability p with 0 <= p < 1, not {dropout!r}"] * (
        not isinstance(dropout, int | float) or not 0 <= dropout < 1
    )
    if not wrong:
        A, B = (tensors[key] for key in at)
        if 0 in (A.numel(), B.numel()):
            wrong.append(f"{s.name}: A {tuple(A.shape)} with B {tuple(B.shape)} is empty: a sharded run was saved without being gathered")
        else:
            with contextlib.suppress(RuntimeError, IndexError):  # shapes that can't be unpacked are named below
                A, B = _unpacked(A, B, s.kind, s.shape)
            if A.ndim != B.ndim or A.ndim not in (2, 3) or A.shape[-2] != B.shape[-1] or A.shape[:-2] != B.shape[:-2]:
                wrong.append(f"{s.name}: A {tuple(A.shape)} with B {tuple(B.shape)} is no pair (r, in) and (out, r)")
    if wrong:
        problems += wrong
        return None
    return replace(s, A=A, B=B, alpha=float(alpha), scaling=scaling, dropout=float(dropout))


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


def _target_modules(model: nn.Module, sites: Sequence[StoredSite]) -> list[str]:
    """Leaf names if they mean exactly these sites in this model, as people write them; else full paths; none, if there are no sites."""
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
