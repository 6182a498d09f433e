"""diffusers' pytorch_lora_weights.safetensors (0.42.1), one file for all parts of a pipeline.

    <component>.<path>.lora_A.weight, .lora_B.weight           as in PEFT; component: unet, text_encoder, ...
    ....lora_linear_layer.down.weight, ....lora.down.weight    older names of A; .up for B
    ....processor.to_q_lora.down.weight                        of 2023: to_q, and to_out for to_out.0

In the header, lora_adapter_metadata holds PEFT's config of each component ("unet.lora_alpha"). Without it nothing tells
alpha, and s is 1. What save_lora_adapter writes for one model, without a component, is PEFT's layout (peft_reader.py).

Source: https://huggingface.co/docs/diffusers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..format import Files, Format
from ..io import safetensors_file
from ..io.open_adapter import Hints, Source, header_json
from ..record import AdapterFile, Problem, StoredSite, checked_sites, require_writable
from . import peft_layout
from .pairs import as_matrices, rank_problems, read_pairs, renamed

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior",
              "diffusion_model")  # fmt: skip
FILE = "pytorch_lora_weights.safetensors"
ENDINGS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_down.weight": "A", ".lora_up.weight": "B",
    ".lora.down.weight": "A", ".lora.up.weight": "B",
    ".lora_linear_layer.down.weight": "A", ".lora_linear_layer.up.weight": "B",
    ".alpha": "alpha", ".alpha.weight": "alpha",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".dora_scale": "magnitude", ".dora_scale.weight": "magnitude",
}  # fmt: skip
KEY_OF_2023 = re.compile(r"(?P<path>.*?)(?:\.processor)?\.(?P<leaf>\w+)_lora\.(?P<side>down|up)\.weight")
CLIP_LEAVES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def claims(source: Source) -> bool:
    """True if all tensors lie in parts of a pipeline. GPT-2's transformer.h is no such part."""
    keys = list(map(_later_key, source.tensors))
    in_parts = all(key.partition(".")[0] in COMPONENTS and not key.startswith("transformer.h.") for key in keys)
    return "peft_type" not in source.config and in_parts and any(k.endswith(tuple(ENDINGS)) for k in keys)


def _later_key(key: str) -> str:
    """Return the key that later versions of diffusers use for a key of 2023, and ComfyUI's shorter key for its longer
    one; any other key unchanged."""
    if key.startswith("model.diffusion_model."):
        return key.removeprefix("model.")
    if (match := KEY_OF_2023.fullmatch(key)) is None:
        return key
    leaf = match["leaf"]
    if match["path"].startswith("text_encoder"):
        leaf = CLIP_LEAVES.get(leaf, leaf)
    return f"{match['path']}.{'to_out.0' if leaf == 'to_out' else leaf}.lora.{match['side']}.weight"


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """Return the record, whose paths begin with the component."""
    metadata = header_json(source, peft_layout.HEADER_CONFIG) or {}
    tensors = renamed(source.tensors, _later_key, problems)
    pairs = read_pairs(tensors, ENDINGS, problems, translate=lambda path: path.removesuffix(".processor"))
    configs: dict[str, dict[str, Any]] = {}
    for key, value in metadata.items():
        component, _, field = key.partition(".")
        configs.setdefault(component, {})[field] = value
    sites = []
    for path, pair in pairs.items():
        config = configs.get(path.partition(".")[0], {})
        stated = peft_layout.match_pattern(config.get("rank_pattern"), path.partition(".")[2], config.get("r"))
        problems += rank_problems(path, pair.B, stated)
        if "alpha" in pair.extras:
            alpha: Any = float(pair.extras["alpha"])
        else:
            alpha = _alpha(config, source.metadata, path, pair.A.shape[0] if pair.A.ndim else 1)
        m = pair.extras.get("magnitude")
        scaling = "rslora" if config.get("use_rslora") else "standard"
        sites.append(StoredSite(path=path, alpha=alpha, scaling=scaling, magnitude=None if m is None else m.flatten(),
                                **as_matrices(pair.A, pair.B)))  # fmt: skip
    has_alpha = metadata or any("alpha" in pair.extras for pair in pairs.values())
    notes = () if has_alpha else ("no header tells alpha, so the scale was taken to be 1, as in diffusers",)
    return AdapterFile(path=source.path, format="diffusers", sites=tuple(checked_sites(sites, problems)),
                       config=metadata, namespace="pipeline", notes=notes)  # fmt: skip


def _alpha(config: Mapping[str, Any], metadata: Mapping[str, Any], path: str, r: int) -> Any:
    """Return alpha by the component's PEFT config, by the header fields that other trainers write, or r, for s = 1."""
    component, _, module = path.partition(".")
    if config:
        default = config.get("lora_alpha", peft_layout.DEFAULT_ALPHA)
        return peft_layout.match_pattern(config.get("alpha_pattern"), module, default)
    alpha, rank = (metadata.get(f"{component}.{field}") for field in ("lora_alpha", "r"))
    return float(alpha) / float(rank) * r if alpha is not None and rank is not None else r


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """Return the file in a directory, with PEFT's config of each component in its header.

    Raises:
        FileError: If the component of a site is unknown, or if diffusers, which has PEFT's layers, would ignore a site.
    """
    problems: list[str] = [
        Problem(f"{s.name}: {s.kind}; diffusers has PEFT's layers, which do nothing here", "write it as lorainject")
        for s in file.sites
        if not peft_layout.can_hold(s)
    ]
    by_component: dict[str, list[StoredSite]] = {}
    for s in file.sites:
        component, module = hints.component or "", s.path
        if file.namespace == "pipeline":
            component, _, module = s.path.partition(".")
        if component not in COMPONENTS:
            line = f"{s.name}: diffusers needs to know which part of the pipeline has this module"
            problems.append(Problem(line, 'say it, as in Hints(component="unet")'))
        by_component.setdefault(component, []).append(replace(s, path=module))
    require_writable("diffusers", problems)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for component, sites in by_component.items():
        part = replace(file, sites=tuple(sites), config={}, replaced={}, tokens={})
        peft_tensors = peft_layout.factor_tensors(part.sites)
        peft_tensors |= {key: extra.tensor for key, extra in peft_layout.extra_tensors(part).items()}
        tensors |= {f"{component}.{key.removeprefix(peft_layout.PREFIX)}": t for key, t in peft_tensors.items()}
        metadata |= {f"{component}.{field}": value for field, value in peft_layout.config(part).items()}
    text = json.dumps(metadata, indent=2, sort_keys=True)
    return {path / FILE: safetensors_file.dump(tensors, {"format": "pt", peft_layout.HEADER_CONFIG: text})}


FORMAT = Format(name="diffusers", library="diffusers 0.42.1", claims=claims, read=read, write=write, scales="site",
                holds=frozenset({"convolutions", "magnitudes"}), names=frozenset({"hf", "pipeline"}))  # fmt: skip
