"""diffusers' pytorch_lora_weights.safetensors (0.42.1): https://huggingface.co/docs/diffusers. One file for all parts of a pipeline.

    <component>.<path>.lora_A.weight, .lora_B.weight               as PEFT's; component: unet, transformer, text_encoder, text_encoder_2, ...
    ....lora_linear_layer.down.weight, ....lora.down.weight        older names for A; up for B
    ....processor.to_q_lora.down.weight                            of 2023: to_q, and to_out for to_out.0

In the header, lora_adapter_metadata holds PEFT's config of each component ("unet.lora_alpha"). Without it nothing tells alpha, and s is 1.
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
from ..format import Files, Format
from ..io import safetensors_file
from ..io.open_adapter import Hints, Source, header
from ..record import NONE, AdapterFile, StoredSite, checked
from . import peft_layout

COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "prior",
    "diffusion_model",
)
FILE, KEY = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
TENSOR = re.compile(
    r"(?P<path>.*?)(?P<old>\.processor)?\.(?:(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|lora_linear_layer\.down|lora_linear_layer\.up)"
    r"|(?P<leaf>\w+)_lora\.(?P<side>down|up))\.weight|(?P<site>.*)\.(?P<more>lora_magnitude_vector|alpha|dora_scale)(?:\.weight)?"
)


def claims(source: Source) -> bool:
    """Whether all tensors lie in parts of a pipeline. (GPT-2's transformer.h is none.)"""
    parts = all(key.partition(".")[0] in COMPONENTS and not key.startswith("transformer.h.") for key in source.tensors)
    return "peft_type" not in source.config and parts and any(TENSOR.fullmatch(key) for key in source.tensors)


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """The record; paths begin with the component. What is wrong goes into `problems`."""
    said = header(source, KEY) or {}
    found: dict[str, dict[str, Tensor]] = {}
    for key, t in source.tensors.items():
        if known := TENSOR.fullmatch(key):
            at, part = _place(known)
            found.setdefault(at, {})[part] = t
        else:
            problems.append(f"{key}: unexpected, neither A nor B")
    sites: list[StoredSite] = []
    for at, parts in found.items():
        component, _, path = at.partition(".")
        if missing := [half for half in "AB" if half not in parts]:
            problems += [f"{at}: {half} is missing" for half in missing]
            continue
        A, B = parts["A"], parts["B"]
        if A.ndim < 2 or B.ndim < 2 or B.shape[2:].numel() != 1:
            problems.append(f"{at}: A {tuple(A.shape)} with B {tuple(B.shape)} is no pair (r, in) and (out, r)")
            continue
        config = {
            key.removeprefix(f"{component}."): value for key, value in said.items() if key.startswith(f"{component}.")
        }
        m = parts.get("lora_magnitude_vector", parts.get("dora_scale"))
        conv = A.ndim > 2
        s = StoredSite(path=at, kind="conv" if conv else "linear", A=NONE, B=NONE, alpha=0,
                       shape=(B.shape[0], *A.shape[1:]) if conv else (), magnitude=None if m is None else m.flatten())  # fmt: skip
        alpha = (
            float(parts["alpha"]) if "alpha" in parts else _alpha(config, source.metadata, component, path, A.shape[0])
        )
        made = checked(
            s,
            A.flatten(1),
            B.flatten(1),
            problems,
            alpha=alpha,
            scaling="rslora" if config.get("use_rslora") else "standard",
        )
        sites += [made] if made else []
    silent = not said and not any("alpha" in parts for parts in found.values())
    return AdapterFile(path=source.path, format="diffusers", sites=tuple(sites), config=said, namespace="pipeline",
                       notes=("no header tells alpha: as in diffusers, the scale was taken for 1",) * silent)  # fmt: skip


def _place(known: re.Match[str]) -> tuple[str, str]:
    """The site's path, and which of its tensors this is."""
    if known["site"] is not None:
        return known["site"], known["more"]
    if known["leaf"] is None:
        return known["path"], "A" if known["part"].endswith(("A", "down")) else "B"
    text, leaf = known["path"].startswith("text_encoder"), known["leaf"]
    if text:
        leaf = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}.get(leaf, leaf)
    return f"{known['path']}.{'to_out.0' if leaf == 'to_out' else leaf}", "A" if known["side"] == "down" else "B"


def _alpha(config: Mapping[str, Any], metadata: Mapping[str, Any], component: str, path: str, r: int) -> Any:
    """By the component's PEFT config; by a pair of header keys that other trainers write; else r, for s = 1."""
    if config:
        return peft_layout.match_pattern(
            config.get("alpha_pattern"), path, config.get("lora_alpha", peft_layout.DEFAULT_ALPHA)
        )
    alpha, rank = (metadata.get(f"{component}.{key}") for key in ("lora_alpha", "r"))
    return float(alpha) / float(rank) * r if alpha is not None and rank is not None else r


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """The file in a directory, with PEFT's config of each component in its header. Raises FileError where no component is named."""
    by_component: dict[str, list[StoredSite]] = {}
    for s in file.sites:
        component, _, rest = (
            s.path.partition(".") if file.namespace == "pipeline" else (hints.component or "", "", s.path)
        )
        if component not in COMPONENTS:
            raise FileError(
                f"{s.name}: diffusers needs to know whose site it is", way_out='say it, as in Hints(component="unet")'
            )
        by_component.setdefault(component, []).append(replace(s, path=rest))
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for component, sites in by_component.items():
        part = replace(file, sites=tuple(sites), config={}, replaced={}, tokens={})
        extras = {key: extra.tensor for key, extra in peft_layout.extra_tensors(part).items()}
        own = peft_layout.factor_tensors(part.sites) | extras
        tensors |= {f"{component}.{key.removeprefix(peft_layout.PREFIX)}": t for key, t in own.items()}
        about |= {f"{component}.{key}": value for key, value in peft_layout.config(part).items()}
    return {
        path / FILE: safetensors_file.dump(tensors, {"format": "pt", KEY: json.dumps(about, indent=2, sort_keys=True)})
    }


FORMAT = Format(name="diffusers", library="diffusers 0.42.1", claims=claims, read=read, write=write, scales="site",
                holds=frozenset({"convolutions", "magnitudes"}), names=frozenset({"hf", "pipeline"}))  # fmt: skip
