"""The settings of a LoraSpec as PEFT's LoraConfig has them, and back.

Source: the documentation of peft.LoraConfig, verified against peft 0.21.2. Where the rules differ:

- A string for `target_modules` is a regular expression over whole paths; a list has paths, or ends of them.
- An entry of `exclude_modules` is a layer; here it may be a container of layers as well.
- A key of `rank_pattern` or `alpha_pattern` is a regular expression over the end of a path. The first that matches
  counts, separately for both; here the first override that matches gives both.
- `layers_pattern` names the list of layers in which `layers_to_transform` counts; here the first number of a path is
  that of the layer.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import FileError, SpecError

CONFIG = "adapter_config.json"
INITS = {True: "kaiming", "gaussian": "gaussian", "orthogonal": "orthogonal", "pissa": "pissa", "olora": "olora"}
"""The values of `init_lora_weights` that exist here."""
READ = {
    "peft_type", "r", "target_modules", "target_parameters", "exclude_modules", "lora_alpha", "lora_dropout", "bias",
    "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "trainable_token_indices", "use_dora", "task_type",
}  # fmt: skip
TASK_HEADS = ("classifier", "score")
"""Modules that PEFT trains for the tasks SEQ_CLS and TOKEN_CLS, those of them that the model has."""
IRRELEVANT = {
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "megatron_core", "runtime_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
"""Settings that say nothing about the adapter, or that follow from the model here."""
NAME = re.compile(r"[\w.\-]+")
SLICE = re.compile(r"\[[^\]]*\]$")


def settings_of(config: Any) -> dict[str, Any]:
    """Return the arguments of LoraSpec that mean what a LoraConfig means. See LoraSpec.from_peft."""
    values = _values(config)
    try:
        return _settings_of(values)
    except (TypeError, AttributeError) as e:
        raise SpecError(f"a setting of the LoraConfig has a wrong type: {e}", way_out="correct it") from e


def _settings_of(values: dict[str, Any]) -> dict[str, Any]:
    get = values.get
    if not {"peft_type", "target_modules", "target_parameters"} & values.keys():
        raise SpecError("these are not the settings of a LoraConfig: they name no target_modules", way_out="check them")
    problems = [
        f"{name}={value!r}: there is no such setting here"
        for name, value in values.items()
        if value and name not in READ | IRRELEVANT
    ]
    if (kind := str(getattr(get("peft_type"), "value", get("peft_type") or "LORA"))) != "LORA":
        problems.append(f"peft_type={kind!r}: only LORA is known here")
    init = get("init_lora_weights", True)
    init = "pissa" if str(init).startswith("pissa_niter_") else init
    if init not in INITS:
        problems.append(f"init_lora_weights={init!r}: the known ones are {', '.join(map(repr, INITS))}")
    targets, layers = get("target_modules"), get("layers_to_transform")
    if targets is None and not get("target_parameters"):
        problems.append("target_modules is None, which PEFT replaces by names for the type of the model: name them")
    entries = _entries(targets)
    layers = [layers] if isinstance(layers, int) else layers
    if layers is not None and get("layers_pattern"):
        if isinstance(targets, str):
            problems.append("layers_pattern goes with a list of target_modules")
        entries = [_in_layers(entry, values["layers_pattern"], layers) for entry in entries]
        layers = None
    ranks, alphas = get("rank_pattern") or {}, get("alpha_pattern") or {}
    tokens = get("trainable_token_indices") or {}
    if ranks and alphas and [*ranks] != [*alphas]:
        problems.append("rank_pattern and alpha_pattern: give both the same keys, since one override sets r and alpha")
    if problems:
        raise SpecError("these settings of PEFT cannot be expressed here:", problems, "change them, and call again")
    return {
        "overrides": {_ending(key): {"r": ranks.get(key), "alpha": alphas.get(key)} for key in ranks or alphas},
        "targets": targets if targets == "all-linear" and not get("target_parameters") else [
            *entries, *(get("target_parameters") or ())],
        "exclude": _entries(get("exclude_modules")), "r": get("r", 8), "alpha": get("lora_alpha", 8),
        "dropout": get("lora_dropout", 0.0), "layers": layers, "init": INITS[init],
        "scaling": "rslora" if get("use_rslora") else "standard", "dora": bool(get("use_dora")),
        "modules_to_save": _modules_to_save(get("modules_to_save") or (), get("task_type")),
        "bias": get("bias", "none"),
        "trainable_tokens": tokens if isinstance(tokens, Mapping) else {"embed_tokens": tokens},
    }  # fmt: skip


def config_of(spec: Any, plan: Any = None) -> dict[str, Any]:
    """Return the arguments of LoraConfig that mean what a LoraSpec means. See LoraSpec.to_peft."""
    problems: list[str] = []
    if spec.init not in INITS.values():
        problems.append("init: a function has no name in PEFT")
    if spec.dtype is not None:
        problems.append("dtype: PEFT chooses the dtype of A and B")
    fields = _named_fields(spec, problems) if plan is None else _exact_fields(plan, problems)
    if spec.dropout and fields.get("target_parameters"):
        problems.append("dropout: PEFT has none on parameters that are no layers")
    saved = list(spec.modules_to_save)
    problems += [f"modules_to_save: {e!r} is no name" for e in saved if not (isinstance(e, str) and NAME.fullmatch(e))]
    if problems:
        raise SpecError("PEFT cannot express:", problems, "pass the plan that find returns, or change the settings")
    return {
        "r": spec.r, "lora_alpha": spec.r if spec.alpha is None else spec.alpha, "lora_dropout": spec.dropout,
        "use_rslora": spec.scaling == "rslora", "use_dora": spec.dora, "bias": spec.bias,
        "init_lora_weights": {ours: theirs for theirs, ours in INITS.items()}[spec.init],
        "modules_to_save": saved or None,
        "trainable_token_indices": {path: list(ids) for path, ids in spec.trainable_tokens} or None,
    } | fields  # fmt: skip


def _values(config: Any) -> dict[str, Any]:
    """Return the settings of a LoraConfig, mapping or file."""
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if not isinstance(config, str | Path):
        raise SpecError(f"a LoraConfig, mapping or path is expected, not a {type(config).__name__}", way_out="pass one")
    path = Path(config) / CONFIG if Path(config).is_dir() else Path(config)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise FileError(f"{path} cannot be read: {e}", way_out=f"give a folder that holds {CONFIG}") from e
    return values if isinstance(values, dict) else {}


def _entries(names: Any) -> list[str]:
    """Return `target_modules` or `exclude_modules` in the grammar of targets."""
    if isinstance(names, str):
        return [names if names == "all-linear" else f"re:{names}"]
    return sorted(names or ())


def _modules_to_save(names: Iterable[str], task: Any) -> list[str]:
    """Return `modules_to_save` with the heads of the task as one entry, because a model has one of them."""
    if str(getattr(task, "value", task)) not in ("SEQ_CLS", "TOKEN_CLS"):
        return list(names)
    return [*(name for name in names if name not in TASK_HEADS), rf"re:(.*\.)?({'|'.join(TASK_HEADS)})"]


def _in_layers(entry: str, patterns: str | Iterable[str], layers: Iterable[int]) -> str:
    """Return the pattern of a name within some layers of the lists that PEFT's `layers_pattern` names."""
    lists = "|".join([patterns] if isinstance(patterns, str) else patterns)
    return rf"re:.*\.({lists})\.({'|'.join(map(str, layers))})\.(.*\.)?{re.escape(entry)}"


def _ending(key: str) -> str:
    """Return a key of a pattern as a target: a name stays a name."""
    return key if NAME.fullmatch(key) else rf"re:(.*\.)?({key})"


def _named_fields(spec: Any, problems: list[str]) -> dict[str, Any]:
    """Return the fields that name weights, as the spec names them."""
    named = [*spec.targets, *spec.exclude, *(override.target for override in spec.overrides)]
    reasons = {entry: why for entry in named if (why := _why_not(entry)) and spec.targets != ("all-linear",)}
    problems += (f"{entry!r}: PEFT has {why}" for entry, why in reasons.items())
    patterns = {_regex(o.target): o for o in spec.overrides if o.target not in reasons}
    fields = {
        "target_modules": _modules([e for e in spec.targets if e not in reasons]),
        "exclude_modules": "|".join(rf"({_regex(e)})(\..*)?" for e in spec.exclude if e not in reasons) or None,
        "rank_pattern": {key: o.r or spec.r for key, o in patterns.items()},
        "alpha_pattern": {key: o.alpha or spec.alpha or o.r or spec.r for key, o in patterns.items()},
        "layers_to_transform": None if spec.layers is None else list(spec.layers),
    }
    if spec.layers is not None and isinstance(fields["target_modules"], str):
        problems.append("layers: PEFT limits names to layers, but no patterns")
    return fields


def _modules(entries: list[str]) -> list[str] | str | None:
    """Return names as a list, and patterns as one regular expression."""
    if entries == ["all-linear"]:
        return entries[0]
    names = all(NAME.fullmatch(entry) for entry in entries)
    return (list(entries) if names else "|".join(f"({_regex(entry)})" for entry in entries)) or None


def _exact_fields(plan: Any, problems: list[str]) -> dict[str, Any]:
    """Return the fields that name weights, with every weight of a plan by its path."""
    problems += (f"{site.name}: PEFT has no slices" for site in plan if site.label)
    bare = [site for site in plan if site.parameter != "weight"]
    (r, alpha), _ = Counter((site.r, site.alpha) for site in plan).most_common(1)[0]
    keys = {f"^{re.escape(site.path if site.parameter == 'weight' else f'{site.path}.{site.parameter}')}": site
            for site in plan}  # fmt: skip
    return {
        "target_modules": [site.path for site in plan if site.parameter == "weight"],
        "target_parameters": [f"{site.path}.{site.parameter}" for site in bare] or None, "r": r, "lora_alpha": alpha,
        "rank_pattern": {key: site.r for key, site in keys.items() if site.r != r},
        "alpha_pattern": {key: site.alpha for key, site in keys.items() if site.alpha != alpha},
    }  # fmt: skip


def _why_not(entry: Any) -> str:
    """Return what PEFT lacks for an entry; empty if it has it."""
    if not isinstance(entry, str):
        return "no functions"
    if SLICE.search(entry) and not entry.startswith("re:"):
        return "no slices"
    return "no such keyword" if entry.rsplit(".", 1)[-1] in ("all-linear", "all-conv") else ""


def _regex(entry: str) -> str:
    """Return the regular expression over whole paths that means what a name, glob or pattern means."""
    if entry.startswith("re:"):
        return entry.removeprefix("re:")
    return r"(.*\.)?" + fnmatch.translate(entry).removeprefix("(?s:").removesuffix(r")\Z").removesuffix(r")\z")
