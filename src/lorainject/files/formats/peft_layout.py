"""PEFT's names, shapes and config (0.7 to 0.21), and how they are written.

Source: https://huggingface.co/docs/peft, verified against peft 0.21.2. Every key begins with base_model.model.<path>,
the path being the module's, and goes on with

    .lora_A.weight (r, in)             .lora_B.weight (out, r)            linear, Conv1D
    .lora_A.weight (r, in, *kernel)    .lora_B.weight (out, r, *ones)     convolution
    .lora_embedding_A (r, V)           .lora_embedding_B (d, r)           embedding
    .lora_A.weight (E r, in)           .lora_B.weight (out, r E)          stack of experts (target_parameters)
    .lora_magnitude_vector             (out,), for convolutions (1, out, *ones): DoRA
    .lora_B.bias                       (out,): the update of the bias, times the scale
    .token_adapter.trainable_tokens_delta    (n, width): rows in place of the base's
    .weight, .bias                     a whole tensor in place of the base's; .base_layer.weight if A and B are there

In a stack of experts the rows of A are sorted by expert and the columns of B by rank. If several parameters of one
module are adapted, the last has these names, the one before it <path>.base_layer.lora_A.weight, and so on.

The rank is read off the tensors; alpha comes from the config, where patterns match the end of a path. What PEFT has no
names for (slices, transposed convolutions) gets names that PEFT does not take for its own. peft_reader.py reads all
this.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import regex
from torch import Tensor

from ...errors import FileError
from ...lora.weight_kinds import LAYERS
from ...numerics.delta import scale
from .. import transforms
from ..format import Files
from ..io import safetensors_file
from ..io.open_adapter import CONFIG, TENSORS, Hints
from ..record import AdapterFile, StoredSite

PREFIX = "base_model.model."
PEFT_VERSION = "0.21.2"  # the version whose layout is written
HEADER_CONFIG = "lora_adapter_metadata"  # where diffusers keeps PEFT's config: in the header of the tensor file
TOKENS = "token_adapter.trainable_tokens_delta"
LINEAR, EMBEDDING = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
LAYER_KINDS = frozenset(kind.name for kind in LAYERS)
PATTERN_SECONDS = 1.0
DEFAULT_ALPHA = 8  # PEFT's, for a config without lora_alpha
# Fields of the config that say nothing about A and B: kept as they were.
ABOUT = ("task_type", "base_model_name_or_path", "auto_mapping", "revision")


class Extra(NamedTuple):
    """A tensor that an adapter holds besides A and B."""

    tensor: Tensor
    role: str
    """"magnitude", "bias", "replaced" or "tokens"."""
    name: str
    """The site's name; for "tokens" the path of the embedding."""
    detail: tuple[Any, ...] = ()
    """The axis of a magnitude; the ids of token rows."""


def can_hold(s: StoredSite) -> bool:
    """True if PEFT has such a site.

    PEFT has no slices, no transposed convolutions, no weights that were named as such, and of bare parameters only
    matrices and stacks.
    """
    return s.peft and not s.label and not s.named and s.kind != "conv^T" and (s.kind != "matrix" or len(s.shape) == 2)


def is_bare(s: StoredSite) -> bool:
    """True if the site is on a parameter of a module that is no layer (PEFT's target_parameters)."""
    return s.kind not in LAYER_KINDS


def factor_keys(sites: Sequence[StoredSite]) -> dict[str, tuple[str, str]]:
    """Return the keys of A and B by site name. The sites must be in the order in which the model has their weights."""
    keys = {}
    for s in sites:
        if not can_hold(s):
            keys[s.name] = (f"{s.name}.lora_A", f"{s.name}.lora_B")
            continue
        stem = f"{PREFIX}{s.path}"
        if is_bare(s):
            bare = [other.parameter for other in sites if other.path == s.path and is_bare(other) and can_hold(other)]
            stem += ".base_layer" * (len(bare) - 1 - bare.index(s.parameter))
        A, B = EMBEDDING if s.embedding else LINEAR
        keys[s.name] = (stem + A, stem + B)
    return keys


def factor_tensors(sites: Sequence[StoredSite]) -> dict[str, Tensor]:
    """Return A and B of all sites by key, in PEFT's shapes."""
    keys = factor_keys(sites)
    return {key: t for s in sites for key, t in zip(keys[s.name], _pack(s), strict=True)}


def _pack(s: StoredSite) -> tuple[Tensor, Tensor]:
    if s.A.ndim == 3:
        return s.A.reshape(-1, s.A.shape[-1]), s.B.permute(1, 2, 0).reshape(s.B.shape[1], -1)
    if s.kind == "conv" and can_hold(s):
        return s.A.reshape(s.r, *s.shape[1:]), s.B.reshape(*s.B.shape, *[1] * (len(s.shape) - 2))
    return s.A, s.B


def extra_tensors(file: AdapterFile) -> dict[str, Extra]:
    """Return all that the file holds besides A and B, by key."""
    extras: dict[str, Extra] = {}
    for s in file.sites:
        stem = f"{PREFIX}{s.path}" if can_hold(s) else s.name
        if s.magnitude is not None:
            m = s.magnitude.view(1, -1, *[1] * (len(s.shape) - 2)) if s.kind == "conv" and s.shape[2:] else s.magnitude
            key = f"{stem}.lora_magnitude_vector" if s.magnitude_axis == "out" else f"{stem}.magnitude_in"
            extras[key] = Extra(m, "magnitude", s.name, (s.magnitude_axis,))
        if s.bias is not None:
            extras[f"{stem}.lora_B.bias"] = Extra(s.bias, "bias", s.name)
    adapted = {s.path for s in file.sites}
    for name, t in file.replaced.items():
        path, leaf = (name.removesuffix(".bias"), "bias") if name.endswith(".bias") else (name, "weight")
        wrapper = ".base_layer" if path in adapted else ""
        extras[f"{PREFIX}{path}{wrapper}.{leaf}"] = Extra(t, "replaced", name)
    for path, token_rows in file.tokens.items():
        extras[f"{PREFIX}{path}.{TOKENS}"] = Extra(token_rows.rows, "tokens", path, (token_rows.ids,))
    return extras


def config(file: AdapterFile) -> dict[str, Any]:
    """Return adapter_config.json: the most frequent r and alpha, and the others as patterns on exact paths."""
    sites = file.sites
    if len({s.scaling for s in sites}) > 1:  # PEFT has one rule of scaling for all sites
        sites = tuple(map(transforms.to_standard_scaling, sites))
    r, alpha = Counter((s.r, s.alpha) for s in sites).most_common(1)[0][0]
    bare = [f"{s.path}.{s.parameter}" for s in sites if is_bare(s)]
    by_pattern = {f"^{re.escape(f'{s.path}.{s.parameter}' if is_bare(s) else s.path)}": s for s in sites}
    targets = _target_modules(file.config.get("target_modules"), sorted({s.path for s in sites if not is_bare(s)}))
    about = {key: file.config.get(key) or None for key in ABOUT}
    return about | {
        "peft_type": "LORA", "peft_version": PEFT_VERSION, "inference_mode": True, "init_lora_weights": True,
        "r": r, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0 if bare else max(s.dropout for s in sites),  # PEFT refuses dropout on parameters
        "bias": _bias_mode(file), "fan_in_fan_out": {s.kind for s in sites} == {"linear^T"},
        "use_rslora": {s.scaling for s in sites} == {"rslora"},
        "use_dora": any(s.magnitude is not None for s in sites),
        "lora_bias": any(s.bias is not None for s in sites), "modules_to_save": _modules_to_save(file),
        "layers_to_transform": None, "layers_pattern": None, "exclude_modules": None,
        "target_modules": targets, "target_parameters": bare or None,
        "trainable_token_indices": {path: list(t.ids) for path, t in file.tokens.items()} or None,
        "rank_pattern": {pattern: s.r for pattern, s in by_pattern.items() if s.r != r},
        "alpha_pattern": {pattern: s.alpha for pattern, s in by_pattern.items() if s.alpha != alpha},
    }  # fmt: skip


def _target_modules(old: Any, paths: list[str]) -> list[str]:
    """Return the list that the config had if each entry means some of these paths and all entries mean all of them."""
    if not isinstance(old, list) or set(target_paths({"target_modules": old}, paths)) != set(paths):
        return paths
    return sorted(old) if all(target_paths({"target_modules": [entry]}, paths) for entry in old) else paths


def _modules_to_save(file: AdapterFile) -> list[str] | None:
    """Return the modules whose weight is replaced, but for adapted embeddings, whose base weight PEFT saves anyway."""
    modules = {name for name in file.replaced if not name.endswith(".bias")} - {s.path for s in file.sites}
    old = file.config.get("modules_to_save")
    return sorted(old) if isinstance(old, list) and old and modules else sorted(modules) or None


def _bias_mode(file: AdapterFile) -> str:
    """Return PEFT's `bias`: which biases are replaced, apart from those of modules_to_save."""
    layers = {name.removesuffix(".bias") for name in file.replaced if name.endswith(".bias")} - file.replaced.keys()
    if not layers:
        return "none"
    if file.config.get("bias") in ("all", "lora_only"):
        return str(file.config["bias"])
    return "lora_only" if layers <= {s.path for s in file.sites} else "all"


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """Return the files of the directory that PEFT reads. Raises FileError for sites that PEFT does not have."""
    file, attention = _wrap_attention(file)
    if beyond := [f"{s.name}: {s.kind}" for s in file.sites if not can_hold(s)]:
        raise FileError("PEFT has no place for:", beyond, "write it in the format lorainject")
    extras = {key: extra.tensor for key, extra in extra_tensors(file).items()}
    tensors = factor_tensors(file.sites) | extras | attention
    text = json.dumps(config(file), indent=2, sort_keys=True) + "\n"
    return {path / TENSORS: safetensors_file.dump(tensors, {"format": "pt"}), path / CONFIG: [text.encode()]}


def _wrap_attention(file: AdapterFile) -> tuple[AdapterFile, dict[str, Tensor]]:
    """Return the file with nn.MultiheadAttention as PEFT has it, and the tensors of out_proj by key.

    PEFT has one adapter on the module, for in_proj_weight, and A and B of out_proj inside of it, under the same rank
    and alpha. It applies out_proj's update twice, so the factors of out_proj are written for twice the module's scale.
    """
    owners = {f"{s.path}.out_proj".removeprefix("."): s.path for s in file.sites if s.parameter == "in_proj_weight"}
    out_projs = {owners[s.path]: s for s in file.sites if s.path in owners}
    sites: list[StoredSite] = []
    tensors: dict[str, Tensor] = {}
    for s in file.sites:
        if s.path in owners:
            continue
        if s.parameter == "in_proj_weight" and (out_proj := out_projs.get(s.path)) is not None:
            r = max(s.r, out_proj.r)
            s = replace(transforms.with_rank(s, r), parameter="weight", kind="linear", shape=())
            out_proj = transforms.with_scale_folded(transforms.with_rank(out_proj, r), 2 * s.scale)
            stem = PREFIX + f"{s.path}.base_layer.out_proj".removeprefix(".")
            tensors |= {stem + ending: t for ending, t in zip(LINEAR, (out_proj.A, out_proj.B), strict=True)}
        sites.append(s)
    return replace(file, sites=tuple(sites)), tensors


def config_scale(config: Mapping[str, Any], path: str, r: int) -> float:
    """Return the scale that PEFT reads out of a config for one site."""
    alpha = float(match_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", DEFAULT_ALPHA)))
    return scale(alpha, r, "rslora" if config.get("use_rslora") else "standard")


def target_paths(config: Mapping[str, Any], paths: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Return those of a model's paths that `target_modules` asks for; none for "all-linear" and layer filters."""
    targets = config.get("target_modules")
    if (
        targets in (None, "all-linear")
        or config.get("layers_to_transform") is not None
        or config.get("exclude_modules")
    ):
        return []
    if isinstance(targets, str):
        return [path for path in paths if path and full_match(targets, path)]
    endings = tuple(f".{target}" for target in targets)
    return [path for path in paths if path and f".{path}".endswith(endings)]


def match_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of the path, by PEFT's rule (0.15 and later)."""
    return next((value for key, value in (patterns or {}).items() if full_match(rf"(.*\.)?({key})", path)), default)


def full_match(pattern: str, path: str) -> bool:
    """True if a pattern from a file matches the whole path. Raises FileError if it is broken or takes too long."""
    try:
        return regex.fullmatch(pattern, path, timeout=PATTERN_SECONDS) is not None
    except (regex.error, TimeoutError) as e:
        reason = f"it takes more than {PATTERN_SECONDS:g} s" if isinstance(e, TimeoutError) else e
        raise FileError(
            f"the pattern {pattern!r} in the adapter's config cannot be used: {reason}",
            way_out="correct the pattern in adapter_config.json",
        ) from e
