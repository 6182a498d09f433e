"""AdapterHub's LoRA (`adapters` 1.3.0): https://github.com/adapter-hub/adapters. pytorch_adapter.bin or adapter.safetensors, and a config.

<module>.loras.<name>.lora_A (r, in)    .lora_B (out, r)    s = alpha / r; before adapters 1.1.0 s was 1, whatever alpha
GPT-2's c_attn is loralib's MergedLinear: q, k and v as far as attn_matrices has them
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
from ..record import NONE, AdapterFile, StoredSite, checked

KEY = re.compile(r"(?P<path>.*)\.loras\.(?P<name>[^.]+)\.(?P<part>lora_A|lora_B|.*)")
# For a leaf of a model's names: the switch of the config that trains it, or the letter of attn_matrices.
LEAVES = {"q_proj": "q", "query": "q", "k_proj": "k", "key": "k", "v_proj": "v", "value": "v", "intermediate.dense": "intermediate_lora",
          "output.dense": "output_lora", "down_proj": "intermediate_lora", "up_proj": "output_lora", "c_fc": "intermediate_lora",
          "mlp.c_proj": "output_lora"}  # fmt: skip


def claims(source: Source) -> bool:
    """Whether any tensor lies in a `loras`."""
    inner = source.config.get("config")
    return any(".loras." in key for key in source.tensors) or (isinstance(inner, dict) and "architecture" in inner)


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """The record; what is wrong goes into `problems`."""
    config: Mapping[str, Any] = source.config.get("config") or {}
    architecture = config.get("architecture", "lora")
    if architecture != "lora":
        problems.append(f"architecture is {architecture!r}: only lora is a pair of low-rank factors")
    refused = {"composition_mode": config.get("composition_mode", "add") != "add", "use_gating": config.get("use_gating"),
               "vera_d": config.get("vera_d") is not None, "use_dora": config.get("use_dora")}  # fmt: skip
    problems += [
        f"{key} is {config[key]!r}, which is not plain LoRA: not supported" for key, wrong in refused.items() if wrong
    ]
    found: dict[str, dict[str, Tensor]] = {}
    names = set()
    for key, t in source.tensors.items():
        known = KEY.fullmatch(key)
        if known is None or known["part"] not in ("lora_A", "lora_B"):
            problems.append(f"{key}: unexpected, neither A nor B")
        else:
            found.setdefault(known["path"], {})[known["part"]] = t
            names.add(known["name"])
    problems += [
        f"{at}.{half}: missing" for at, parts in found.items() for half in ("lora_A", "lora_B") if half not in parts
    ]
    if len(names) > 1:
        problems.append(f"it holds several adapters: {', '.join(sorted(names))}")
    alpha = hints.alpha if hints.alpha is not None else config.get("alpha")
    if alpha is None:
        problems.append(f"it holds no alpha: give the directory with {CONFIG}, or say it, as in Hints(alpha=16)")
    if problems:
        return None
    version = re.match(r"adapters\.(\d+)\.(\d+)", str(source.config.get("version", "")))
    unscaled = version is not None and (int(version[1]), int(version[2])) < (1, 1)
    sites: list[StoredSite] = []
    for at, parts in found.items():
        s, A, B = StoredSite(path=at, A=NONE, B=NONE, alpha=0), parts["lora_A"], parts["lora_B"]
        merged = [letter in config.get("attn_matrices", ["q", "v"]) for letter in "qkv"]
        whole = replace(s, A=A, B=B)
        for one in transforms.split_merged_linear(whole, merged) if at.endswith("c_attn") else [whole]:
            a, b = one.A, one.B
            made = checked(
                one, a, b, problems, alpha=b.shape[-1] if unscaled else alpha, dropout=config.get("dropout", 0.0)
            )
            sites += [made] if made else []
    notes = ("adapters before 1.1.0 passed over alpha, so the scale is 1",) * unscaled
    return AdapterFile(
        path=source.path,
        format="adapterhub",
        sites=tuple(sites),
        name=next(iter(names), "default"),
        config=source.config,
        notes=notes,
    )


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """The directory. Raises FileError for weights that none of its switches means."""
    by_path: dict[str, list[StoredSite]] = {}
    for s in file.sites:
        by_path.setdefault(s.path, []).append(s)
    tensors: dict[str, Tensor] = {}
    switches: set[str] = set()
    problems = []
    name = re.sub(r"\W", "_", file.name)
    for at, group in by_path.items():
        switch = next((s for leaf, s in LEAVES.items() if f".{at}".endswith(f".{leaf}")), None)
        A, B = group[0].A, group[0].B
        if at.endswith("c_attn") and (merged := transforms.join_merged_linear(group)) and len(merged[2]) == 3:
            A, B, on = merged
            switches |= {letter for letter, used in zip("qkv", on, strict=True) if used}
        elif switch is None or len(group) > 1 or group[0].rows is not None:
            problems.append(f"{at}: none of the weights that `adapters` gives a LoRA, or not in its parts")
            continue
        else:
            switches.add(switch)
        tensors |= {f"{at}.loras.{name}.lora_A": A, f"{at}.loras.{name}.lora_B": B}
    if problems:
        raise FileError("this can't be written as AdapterHub's:", problems, "choose another format")
    first = file.sites[0]
    lora = {"architecture": "lora", "r": first.r, "alpha": first.alpha, "dropout": first.dropout, "attn_matrices": sorted(switches & set("qkv")),
            "selfattn_lora": bool(switches & set("qkv")), "intermediate_lora": "intermediate_lora" in switches,
            "output_lora": "output_lora" in switches,
            "composition_mode": "add", "use_gating": False, "use_dora": False, "vera_d": None, "vera_b": None, "init_weights": "lora",
            "leave_out": []}  # fmt: skip
    own = file.config if file.format == "adapterhub" else _about(hints)
    config = {
        "model_name": "",
        **own,
        "config": {**own.get("config", {}), **lora},
        "name": name,
        "version": "adapters.1.3.0",
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {
        path / "adapter.safetensors": safetensors_file.dump(tensors, {"format": "pt"}),
        path / CONFIG: [text.encode()],
    }


def _about(hints: Hints) -> dict[str, Any]:
    """What the config says of the base, by which `adapters` finds its place."""
    config = getattr(hints.model, "config", None)
    if config is None:
        raise FileError(
            "AdapterHub's config names the base's class and type", way_out="give the model: hints=Hints(model=...)"
        )
    return {
        "model_class": type(hints.model).__name__,
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
    }


FORMAT = Format(
    name="adapterhub",
    library="adapters 1.3.0",
    claims=claims,
    read=read,
    write=write,
    scales="one",
    holds=frozenset({"slices"}),
)
