"""AdapterHub's LoRA (`adapters` 1.3.0): https://github.com/adapter-hub/adapters.

    <module>.loras.<name>.lora_A (r, in)    .lora_B (out, r)    s = alpha / r

Before adapters 1.1.0 s was 1, whatever alpha was.

The tensors are in pytorch_adapter.bin or adapter.safetensors, with an adapter_config.json. GPT-2's c_attn is loralib's
MergedLinear: attn_matrices in the config says which of q, k and v it has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import FileError
from .. import transforms
from ..format import Files, Format
from ..io import safetensors_file
from ..io.open_adapter import CONFIG, Hints, Source
from ..record import AdapterFile, StoredSite, checked_sites, collected, require_writable
from .language_model_names import missing_alpha
from .pairs import rank_problems, read_pairs

ENDINGS = {".lora_A": "A", ".lora_B": "B"}
SITE = re.compile(r"(?P<path>.*)\.loras\.(?P<name>[^.]+)")
# By the end of a module's path: the switch of the config that adapts it, or the letter of attn_matrices.
SWITCHES = {
    "q_proj": "q", "query": "q", "k_proj": "k", "key": "k", "v_proj": "v", "value": "v",
    "intermediate.dense": "intermediate_lora", "down_proj": "intermediate_lora", "c_fc": "intermediate_lora",
    "output.dense": "output_lora", "up_proj": "output_lora", "mlp.c_proj": "output_lora",
}  # fmt: skip


def claims(source: Source) -> bool:
    """True if any tensor lies in a `loras`, or the config is AdapterHub's."""
    inner = source.config.get("config")
    return any(".loras." in key for key in source.tensors) or (isinstance(inner, dict) and "architecture" in inner)


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """Return the record."""
    config: Mapping[str, Any] = source.config.get("config") or {}
    if (architecture := config.get("architecture", "lora")) != "lora":
        problems.append(f"architecture is {architecture!r}: only lora is a pair of low-rank factors")
    not_plain = {
        "composition_mode": config.get("composition_mode", "add") != "add",
        "use_gating": config.get("use_gating"),
        "vera_d": config.get("vera_d") is not None,
        "use_dora": config.get("use_dora"),
    }
    problems += [
        f"{key} is {config[key]!r}, which is not plain LoRA: not supported"
        for key, is_set in not_plain.items()
        if is_set
    ]
    names: set[str] = set()

    def module_path(site: str) -> str | None:
        if match := SITE.fullmatch(site):
            names.add(match["name"])
        return match and match["path"]

    pairs = read_pairs(source.tensors, ENDINGS, problems, translate=module_path)
    if len(names) > 1:
        problems.append(f"it holds several adapters: {', '.join(sorted(names))}")
    alpha: Any = hints.alpha if hints.alpha is not None else config.get("alpha")
    if alpha is None:
        problems.append(missing_alpha(CONFIG))
    if problems:
        return None
    version = re.match(r"adapters\.(\d+)\.(\d+)", str(source.config.get("version", "")))
    unscaled = version is not None and (int(version[1]), int(version[2])) < (1, 1)
    enabled = [letter in config.get("attn_matrices", ["q", "v"]) for letter in "qkv"]
    sites: list[StoredSite] = []
    for path, pair in pairs.items():
        problems += rank_problems(path, pair.B, config.get("r"))
        s = StoredSite(path=path, A=pair.A, B=pair.B, alpha=alpha, dropout=config.get("dropout", 0.0))
        s = replace(s, alpha=s.B.shape[-1]) if unscaled else s
        sites += transforms.split_merged_linear(s, enabled) if path.endswith("c_attn") else [s]
    notes = ("adapters before 1.1.0 ignored alpha, so the scale is 1",) * unscaled
    return AdapterFile(path=source.path, format="adapterhub", sites=tuple(checked_sites(sites, problems)),
                       name=next(iter(names), "default"), config=source.config, notes=notes)  # fmt: skip


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """Return the directory. Raises FileError for weights that no switch of the config adapts."""
    by_path: dict[str, list[StoredSite]] = {}
    for s in file.sites:
        by_path.setdefault(s.path, []).append(s)
    tensors: dict[str, Tensor] = {}
    switches: set[str] = set()
    problems: list[str] = []
    name = re.sub(r"\W", "_", file.name)
    for module, sites in by_path.items():
        switch = next((switch for end, switch in SWITCHES.items() if f".{module}".endswith(f".{end}")), None)
        A, B = sites[0].A, sites[0].B
        if module.endswith("c_attn") and (merged := transforms.join_merged_linear(sites)) and len(merged[2]) == 3:
            A, B, enabled = merged
            switches |= {letter for letter, is_on in zip("qkv", enabled, strict=True) if is_on}
        elif switch is None or len(sites) > 1 or sites[0].rows is not None:
            problems.append(f"{module}: `adapters` has no LoRA for this weight, or not for this slice of it")
            continue
        else:
            switches.add(switch)
        tensors |= {f"{module}.loras.{name}.lora_A": A, f"{module}.loras.{name}.lora_B": B}
    config = file.config if file.format == "adapterhub" else {}
    with collected(problems):
        config = config or _base_config(hints)
    require_writable("AdapterHub", problems)
    first, letters = file.sites[0], switches & set("qkv")
    lora = {
        "architecture": "lora", "r": first.r, "alpha": first.alpha, "dropout": first.dropout,
        "attn_matrices": sorted(letters), "selfattn_lora": bool(letters),
        "intermediate_lora": "intermediate_lora" in switches, "output_lora": "output_lora" in switches,
        "composition_mode": "add", "use_gating": False, "use_dora": False, "vera_d": None, "vera_b": None,
        "init_weights": "lora", "leave_out": [],
    }  # fmt: skip
    config = {
        "model_name": "",
        **config,
        "config": {**config.get("config", {}), **lora},
        "name": name,
        "version": "adapters.1.3.0",
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {
        path / "adapter.safetensors": safetensors_file.dump(tensors, {"format": "pt"}),
        path / CONFIG: [text.encode()],
    }


def _base_config(hints: Hints) -> dict[str, Any]:
    """Return the fields by which `adapters` recognizes the base model."""
    config = getattr(hints.model, "config", None)
    if config is None:
        raise FileError(
            "AdapterHub's config names the class and type of the base model, which the adapter does not say",
            way_out="give the model: hints=Hints(model=...)",
        )
    return {
        "model_class": type(hints.model).__name__,
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
    }


FORMAT = Format(name="adapterhub", library="adapters 1.3.0", claims=claims, read=read, write=write, scales="one",
                holds=frozenset({"slices"}))  # fmt: skip
