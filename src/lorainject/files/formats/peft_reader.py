"""PEFT's files of any version and variant, read into the record (the layout stands in peft_layout.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...plan import site_name
from ..format import Format
from ..io.open_adapter import Hints, Source
from ..record import NONE, AdapterFile, StoredSite, TokenRows
from . import peft_layout
from .peft_stacks import Reading, parameter, parameters

KEY = re.compile(
    r"(?P<path>.*)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
TOKENS = re.compile(r"(?P<path>.*)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
SAVED = re.compile(r"(?P<path>.*?)(?:\.base_layer|\.modules_to_save\.[^.]+)*\.(?P<leaf>weight|bias)")
# Fields which, when set, mean that the file is other than W0 + s B A with what the record holds beside it.
BEYOND = ("layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config",
          "enable_lora")  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # inits under which the base itself was altered
OUT_PROJ = ".base_layer.out_proj"
TINKER = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def claims(source: Source) -> bool:
    """Whether it says so in its config, or its tensors have PEFT's names."""
    if "peft_type" in source.config or {"r", "lora_alpha"} <= source.config.keys():
        return not any(
            key.endswith((".lora_a.weight", ".lora_b.weight")) for key in source.tensors
        )  # torchtune writes a config for PEFT too
    return any((m := KEY.fullmatch(bare(key))) and (m["leaf"] or "embedding" in m["part"]) for key in source.tensors)


def bare(key: str) -> str:
    """A key without what wrappers put into it."""
    key = re.sub(r"(^|\.)(_orig_mod|_fsdp_wrapped_module)(?=\.)", "", key).removeprefix(".")
    return key.removeprefix("module." if key.startswith("module.base_model.") else "").removeprefix(peft_layout.PREFIX)


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """The record; what is wrong goes into `problems`."""
    config = source.config
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        problems.append(f"peft_type is {kind!r}: only LORA is a pair of low-rank factors")
        return None
    if not config and hints.alpha is None:
        problems.append(
            "it holds no record of alpha, without which its scale is unknown: give the directory with its adapter_config.json, or Hints(alpha=...)"
        )
        return None
    problems += [f"{field} is set, which is not plain LoRA: not supported" for field in BEYOND if config.get(field)]
    if not isinstance(config.get("target_modules"), str | list | None):
        problems.append(f"target_modules is {config['target_modules']!r}, not a list of names or a pattern")
    if any(str(config.get("init_lora_weights", "")).lower().startswith(init) for init in CHANGES_BASE):
        problems.append(
            f"init_lora_weights is {config['init_lora_weights']!r}: it belongs to an altered base; convert it with PEFT first"
        )
    reading = Reading(config, hints, problems, [])
    groups: dict[str, dict[str, Tensor]] = {}
    tokens: dict[str, TokenRows] = {}
    replaced: dict[str, Tensor] = {}
    adapters = set()
    for key, t in source.tensors.items():
        if found := KEY.fullmatch(bare(key)):
            groups.setdefault(found["path"], {})["bias" if found["leaf"] == "bias" else found["part"]] = t
            adapters.add(found["adapter"])
        elif found := TOKENS.fullmatch(bare(key)):
            tokens |= _tokens(found["path"], t, config, problems)
        elif ".original_module." in key:
            continue  # a raw dump's copy of the base's
        elif (found := SAVED.fullmatch(bare(key))) and _is_saved(key, found, config):
            replaced[site_name(found["path"].replace(".base_layer", ""), found["leaf"])] = t
        else:
            problems.append(f"{key}: unexpected, neither A nor B")
    if len(adapters) > 1:
        problems.append(f"it holds several adapters: {', '.join(sorted(map(str, adapters)))}")
    if config.get("use_dora") and not any("lora_magnitude_vector" in group for group in groups.values()):
        problems.append("use_dora is set, which is not plain LoRA, but there is no magnitude")
    if config.get("modules_to_save") and not replaced:
        problems.append("modules_to_save is set, but none of these modules' tensors is there")
    if config.get("bias", "none") != "none" and not any(name.endswith("bias") for name in replaced):
        problems.append(f"bias is {config['bias']!r}, but no bias is there")
    sites = [s for path, group in groups.items() for s in _sites(path, group, groups, reading) if s is not None]
    return AdapterFile(path=source.path, format="peft", sites=tuple(sites), replaced=replaced, tokens=tokens, config=dict(config),
                       notes=tuple(dict.fromkeys(reading.notes)))  # fmt: skip


def _is_saved(key: str, found: re.Match[str], config: Mapping[str, Any]) -> bool:
    """Whether it is a whole tensor that PEFT may have saved: of modules_to_save, a bias, or an embedding or head that came along."""
    path, saved = found["path"], config.get("modules_to_save") or []
    marked = any(mark in key for mark in (".base_layer.", ".modules_to_save."))
    known = any(path == m or path.endswith(f".{m}") or f".{m}." in f".{path}." for m in saved if isinstance(m, str))
    return (
        known
        or marked
        or path.endswith(("embed_tokens", "lm_head"))
        or (found["leaf"] == "bias" and config.get("bias", "none") != "none")
    )


def _tokens(path: str, rows: Tensor, config: Mapping[str, Any], problems: list[str]) -> dict[str, TokenRows]:
    given = config.get("trainable_token_indices")
    ids = (
        next((i for name, i in given.items() if path == name or path.endswith(f".{name}")), None)
        if isinstance(given, dict)
        else given
    )
    if not (
        isinstance(ids, list)
        and all(isinstance(i, int) and i >= 0 for i in ids)
        and rows.ndim == 2
        and len(ids) == len(rows)
    ):
        problems.append(f"{path}: {tuple(rows.shape)} rows of tokens, of which the config says {ids!r}")
        return {}
    return {path: TokenRows(ids=tuple(ids), rows=rows)}


def _sites(
    path: str, group: Mapping[str, Tensor], groups: Mapping[str, Any], reading: Reading
) -> list[StoredSite | None]:
    """A pair's site; of Tinker's stacks, A (E or 1, r, in) and B (E or 1, out, r), one for each expert, which shares what there is one of."""
    A, B = group.get("lora_A"), group.get("lora_B")
    leaf = path.rpartition(".")[2]
    if (
        A is None
        or B is None
        or A.ndim != 3
        or B.ndim != 3
        or leaf not in TINKER
        or not path.endswith(f".experts.{leaf}")
    ):
        return [_site(path, group, groups, reading)]
    E = max(A.shape[0], B.shape[0])
    if not {A.shape[0], B.shape[0]} <= {1, E}:
        reading.problems.append(
            f"{path}: A {tuple(A.shape)} and B {tuple(B.shape)} are for different numbers of experts"
        )
        return []
    at = path.removesuffix(leaf)
    return [
        reading.made(StoredSite(path=f"{at}{e}.{TINKER[leaf]}", A=NONE, B=NONE, alpha=0), A[e % len(A)], B[e % len(B)])
        for e in range(E)
    ]


def _site(path: str, group: Mapping[str, Tensor], groups: Mapping[str, Any], reading: Reading) -> StoredSite | None:
    """One pair; None, and lines in the problems, if it is none."""
    embedding = "lora_embedding_A" in group
    halves = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if missing := [half for half in halves if half not in group]:
        reading.problems.extend(
            f"{peft_layout.PREFIX}{path}.{half}{'' if embedding else '.weight'}: missing" for half in missing
        )
        return None
    A, B = (group[half] for half in halves)
    at = "lm_head" if path == "model.unembed_tokens" else path.replace(".base_layer", "")  # Tinker's name for it
    if candidates := parameters(at, reading):
        return parameter(path, at, A, B, groups, candidates, reading)
    if path.endswith(OUT_PROJ) or path + OUT_PROJ in groups:
        return _attention(path, at, A, B, reading)
    magnitude, conv = group.get("lora_magnitude_vector"), A.ndim > 2
    if magnitude is None and any("lora_magnitude_vector" in other for other in groups.values()):
        reading.problems.append(f"{at}: its magnitude is missing")
    if conv and B.shape[1:2].numel() and B.shape[1] != A.shape[0]:
        reading.problems.append(
            f"{at}: a grouped convolution's {tuple(A.shape)} and {tuple(B.shape)}, which not even PEFT can merge: not supported"
        )
        return None
    s = StoredSite(path=at, kind="embedding" if embedding else "conv" if conv else "linear", shape=(B.shape[0], *A.shape[1:]) if conv else (),
                   A=NONE, B=NONE, alpha=0, magnitude=None if magnitude is None else magnitude.flatten(), bias=group.get("bias"))  # fmt: skip
    return reading.made(s, *peft_layout.unpacked(A, B, s.kind, s.shape))


def _attention(path: str, at: str, A: Tensor, B: Tensor, reading: Reading) -> StoredSite | None:
    """nn.MultiheadAttention's in_proj_weight or out_proj, whose settings go by the module's path; out_proj's update counts twice."""
    if not path.endswith(OUT_PROJ):
        s = StoredSite(
            path=at,
            parameter="in_proj_weight",
            kind="matrix",
            shape=(*B.shape[:1], *A.shape[1:]),
            A=NONE,
            B=NONE,
            alpha=0,
        )
        return reading.made(s, A, B, at=at)
    factor = reading.hints.out_proj_factor
    if factor is None:
        factor = 2.0 if reading.version <= (0, 21, 2) else 1.0
        times = (
            "twice, as in PEFT up to 0.21.2, where it was trained so"
            if factor == 2
            else "once, as later PEFT should do"
        )
        reading.notes.append(f"the update of out_proj counts {times} (Hints(out_proj_factor=...) decides)")
    s = StoredSite(path=at, A=NONE, B=NONE, alpha=0, peft=False)  # as a layer of its own PEFT would adapt it in vain
    return reading.made(s, A, B, factor, at=at.removesuffix(".out_proj"))


FORMAT = Format(name="peft", library="peft 0.21.2 (reads 0.7 and later)", claims=claims, read=read, write=peft_layout.write,
                holds=frozenset({"stacks", "embeddings", "convolutions", "parameters", "magnitudes", "bias updates", "whole tensors", "tokens"}),
                scales="site")  # fmt: skip
