"""PEFT's files of any version and variant, read into the record (the layout stands in peft.py).

What a file of `target_parameters` leaves open, the base tells, if it is given; else the likeliest is taken, and noted:
- several parameters of a module are nested in the order in which the module registers them, the last outermost;
- which side of a stack's matrices A faces went by version: from 0.19.1 on the input; in 0.19.0 the output; before that the first axis as stored.
With the base at hand the shapes decide, and the version only where they are square. PEFT itself can't read its older files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..kinds import STACKS
from ..spec import site_name
from . import exact, peft
from .format import Format
from .record import NONE, AdapterFile, StoredSite, TokenRows, checked
from .source import Hints, Source

KEY = re.compile(
    r"(?P<path>.*)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
TOKENS = re.compile(r"(?P<path>.*)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
SAVED = re.compile(r"(?P<path>.*?)(?:\.base_layer|\.modules_to_save\.[^.]+)*\.(?P<leaf>weight|bias)")
# Fields which, when set, mean that the file is other than W0 + s B A with what the record holds beside it.
BEYOND = ("layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config",
          "enable_lora")  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # inits under which the base itself was altered
TINKER = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
ORDER = ("in_proj_weight", "gate_up_proj", "down_proj")  # as transformers registers them
STORED_IN_OUT = ("GptOss", "Aria", "OpenAIPrivacyFilter")  # classes whose experts are (E, in, out), by how their names begin
# Model types whose stacked experts unsloth (up to 2026.9.5) trained with B's columns by expert, and said nothing of it.
UNSLOTH = ("deepseekv3", "ernie45moe", "ernie45vlmoe", "gemma4", "glm4moe", "glm4moelite", "gptoss", "lfm2moe", "mixtral", "qwen35moe", "qwen3moe",
           "qwen3next", "qwen3vlmoe")  # fmt: skip


def claims(source: Source) -> bool:
    """Whether it says so in its config, or its tensors have PEFT's names."""
    if "peft_type" in source.config or {"r", "lora_alpha"} <= source.config.keys():
        return not any(key.endswith((".lora_a.weight", ".lora_b.weight")) for key in source.tensors)  # torchtune writes a config for PEFT too
    return any((m := KEY.fullmatch(bare(key))) and (m["leaf"] or "embedding" in m["part"]) for key in source.tensors)


def bare(key: str) -> str:
    """A key without what wrappers put into it."""
    key = re.sub(r"(^|\.)(_orig_mod|_fsdp_wrapped_module)(?=\.)", "", key).removeprefix(".")
    return key.removeprefix("module." if key.startswith("module.base_model.") else "").removeprefix(peft.PREFIX)


@dataclass(frozen=True)
class _Reading:
    config: Mapping[str, Any]
    hints: Hints
    problems: list[str]
    notes: list[str]

    def alpha(self, name: str) -> Any:
        given = self.config.get("lora_alpha", self.hints.alpha if "r" not in self.config and self.hints.alpha else peft.DEFAULT_ALPHA)
        return peft.pattern(self.config.get("alpha_pattern"), name, given)

    def made(self, s: StoredSite, A: Tensor, B: Tensor, factor: float = 1.0, at: str | None = None) -> StoredSite | None:
        """The site with its A and B, and the settings that hold for its name (or for another one's, `at`)."""
        alpha = self.alpha(s.name if at is None else at)
        if factor != 1 and isinstance(alpha, int | float):
            alpha = alpha * factor
        scaling = "rslora" if self.config.get("use_rslora") else self.hints.scaling if not self.config else "standard"
        return checked(s, A, B, self.problems, alpha=alpha, scaling=scaling, dropout=self.config.get("lora_dropout", 0.0))

    @property
    def version(self) -> tuple[int, ...]:
        found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(self.config.get("peft_version", "0.17.0")))
        return tuple(int(part or 0) for part in found.groups()) if found else (0, 17, 0)


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
        problems.append(f"init_lora_weights is {config['init_lora_weights']!r}: it belongs to an altered base; convert it with PEFT first")
    reading = _Reading(config, hints, problems, [])
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
    return known or marked or path.endswith(("embed_tokens", "lm_head")) or (found["leaf"] == "bias" and config.get("bias", "none") != "none")


def _tokens(path: str, rows: Tensor, config: Mapping[str, Any], problems: list[str]) -> dict[str, TokenRows]:
    given = config.get("trainable_token_indices")
    ids = next((i for name, i in given.items() if path == name or path.endswith(f".{name}")), None) if isinstance(given, dict) else given
    if not (isinstance(ids, list) and all(isinstance(i, int) and i >= 0 for i in ids) and rows.ndim == 2 and len(ids) == len(rows)):
        problems.append(f"{path}: {tuple(rows.shape)} rows of tokens, of which the config says {ids!r}")
        return {}
    return {path: TokenRows(ids=tuple(ids), rows=rows)}


def _sites(path: str, group: Mapping[str, Tensor], groups: Mapping[str, Any], reading: _Reading) -> list[StoredSite | None]:
    """A pair's site; of Tinker's stacks, A (E or 1, r, in) and B (E or 1, out, r), one for each expert, which shares what there is one of."""
    A, B = group.get("lora_A"), group.get("lora_B")
    leaf = path.rpartition(".")[2]
    if A is None or B is None or A.ndim != 3 or B.ndim != 3 or leaf not in TINKER or not path.endswith(f".experts.{leaf}"):
        return [_site(path, group, groups, reading)]
    E = max(A.shape[0], B.shape[0])
    if not {A.shape[0], B.shape[0]} <= {1, E}:
        reading.problems.append(f"{path}: A {tuple(A.shape)} and B {tuple(B.shape)} are for different numbers of experts")
        return []
    at = path.removesuffix(leaf)
    return [reading.made(StoredSite(path=f"{at}{e}.{TINKER[leaf]}", A=NONE, B=NONE, alpha=0), A[e % len(A)], B[e % len(B)]) for e in range(E)]


def _site(path: str, group: Mapping[str, Tensor], groups: Mapping[str, Any], reading: _Reading) -> StoredSite | None:
    """One pair; None, and lines in the problems, if it is none."""
    embedding = "lora_embedding_A" in group
    halves = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if missing := [half for half in halves if half not in group]:
        reading.problems.extend(f"{peft.PREFIX}{path}.{half}{'' if embedding else '.weight'}: missing" for half in missing)
        return None
    A, B = (group[half] for half in halves)
    at = "lm_head" if path == "model.unembed_tokens" else path.replace(".base_layer", "")  # Tinker's name for it
    if candidates := _parameters(at, reading):
        return _parameter(path, at, A, B, groups, candidates, reading)
    magnitude, bias = group.get("lora_magnitude_vector"), group.get("bias")
    if magnitude is None and any("lora_magnitude_vector" in other for other in groups.values()):
        reading.problems.append(f"{at}: its magnitude is missing")
    conv = A.ndim > 2
    if conv and B.shape[1:2].numel() and B.shape[1] != A.shape[0]:
        reading.problems.append(f"{at}: a grouped convolution's {tuple(A.shape)} and {tuple(B.shape)}, which not even PEFT can merge: not supported")
        return None
    in_proj = f"{path}.base_layer.out_proj" in groups
    shape = (B.shape[0], *A.shape[1:]) if conv or in_proj else ()
    s = StoredSite(path=at, parameter="in_proj_weight" if in_proj else "weight", shape=tuple(shape), A=NONE, B=NONE, alpha=0,
                   kind="embedding" if embedding else "conv" if conv else "matrix" if in_proj else "linear",
                   magnitude=None if magnitude is None else magnitude.flatten(), bias=bias,
                   peft=not path.endswith(".base_layer.out_proj"))  # fmt: skip
    factor = 1.0
    if path.endswith(".base_layer.out_proj"):
        factor = (2.0 if reading.version < (0, 21, 3) else 1.0) if reading.hints.out_proj_factor is None else reading.hints.out_proj_factor
        if factor == 2 and reading.hints.out_proj_factor is None:
            reading.notes.append(
                "the update of out_proj counts twice, as in PEFT up to 0.21.2, where it was trained so (Hints(out_proj_factor=1): once)"
            )
    mha = at.removesuffix(".out_proj") if factor != 1 or path != at else at
    return reading.made(s, *peft.unpacked(A, B, s.kind, s.shape), factor, at=mha if path != at or in_proj else None)


# --- target_parameters -------------------------------------------------------------------------------------------------


def _parameters(at: str, reading: _Reading) -> list[str]:
    """The parameters of the module at this path that target_parameters may mean, in the order in which the module has them."""
    found = []
    for entry in reading.config.get("target_parameters") or []:
        owner, _, name = str(entry).rpartition(".")
        if not owner or at == owner or at.endswith(f".{owner}"):
            found.append(name)
    module = _module(reading.hints.model, at)
    if module is not None:
        return [name for name in module._parameters if name in found]
    return sorted(dict.fromkeys(found), key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def _parameter(
    path: str, at: str, A: Tensor, B: Tensor, groups: Mapping[str, Any], candidates: Sequence[str], reading: _Reading
) -> StoredSite | None:
    depth, levels = path.count(".base_layer"), sum(other.replace(".base_layer", "") == at for other in groups)
    if depth >= levels or levels != len(candidates):
        reading.problems.append(f"{at}: {levels} adapted parameters, where the config names {', '.join(candidates)}")
        return None
    name = candidates[levels - 1 - depth]
    module, rank = _module(reading.hints.model, at), peft.pattern(reading.config.get("rank_pattern"), site_name(at, name), reading.config.get("r"))
    weight = None if module is None else module._parameters.get(name)
    if module is None and levels > 1 and not set(candidates) <= set(ORDER):
        reading.notes.append(f"which of {', '.join(candidates)} is which was taken from the config's order: read it with the model to be sure")
    rows = A.shape[0] if A.ndim == 2 else 0
    if weight is None and not (isinstance(rank, int) and rank > 0 and rows % rank == 0):
        reading.problems.append(f"{site_name(at, name)}: {tuple(A.shape)} is no stack of rank {rank!r}")
        return None
    E = (rows // rank if isinstance(rank, int) else 1) if weight is None else weight.shape[0] if weight.ndim == 3 else 1
    if (weight.ndim if weight is not None else 2 + (E > 1)) == 2:
        kind = "linear" if name == "weight" else "matrix"
        return reading.made(StoredSite(path=at, parameter=name, kind=kind, shape=() if name == "weight" else (B.shape[0], A.shape[1]), A=NONE, B=NONE,
                                       alpha=0), A, B, at=site_name(at, name) if name != "weight" else f"{at}.weight")  # fmt: skip
    if rows == 0 or rows % E or B.ndim != 2 or B.shape[1] != rows:
        reading.problems.append(f"{site_name(at, name)}: {tuple(A.shape)} and {tuple(B.shape)} are no stack of {E} experts")
        return None
    by_expert = _order(name, reading) == "grouped_by_expert"
    B = B.reshape(len(B), E, -1).permute(1, 0, 2) if by_expert else B.reshape(len(B), -1, E).permute(2, 0, 1)
    transposed = _stored_in_out(module, reading)
    s = reading.made(
        StoredSite(path=at, parameter=name, kind=STACKS[transposed].name, A=NONE, B=NONE, alpha=0), A.reshape(E, -1, A.shape[1]), B.contiguous()
    )
    if s is None:
        return None
    s = exact.turned(s) if _is_turned(s, weight, transposed, reading) else s
    out, in_ = s.B.shape[-2], s.A.shape[-1]
    return replace(s, shape=(E, in_, out) if transposed else (E, out, in_))


def _is_turned(s: StoredSite, weight: Tensor | None, transposed: bool, reading: _Reading) -> bool:
    """Whether A faces the output."""
    if weight is not None and weight.shape[1] != weight.shape[2]:
        _, out, in_ = STACKS[transposed].sizes(tuple(weight.shape))
        return (s.A.shape[-1], s.B.shape[-2]) == (out, in_)
    if reading.version < (0, 19):
        if weight is None:
            reading.notes.append(
                "which way round the experts' A and B are was taken from the version and the model's name: read it with the model to be sure"
            )
        return not transposed
    return reading.version == (0, 19, 0)


def _stored_in_out(module: nn.Module | None, reading: _Reading) -> bool:
    if module is not None:
        return bool(getattr(module, "is_transposed", False))
    return _class_name(reading).startswith(STORED_IN_OUT)


def _order(name: str, reading: _Reading) -> str:
    """How the columns of B go: as the caller or the file says; unsloth's, where it trained by expert before it said so; else PEFT's."""
    config, auto = reading.config, reading.config.get("auto_mapping")
    places = [config, auto if isinstance(auto, dict) else {}]
    marks = [reading.hints.expert_order]
    for place in places:
        fused = place.get("unsloth_fused_expert_lora")
        of = fused.get("parameters") if isinstance(fused, dict) else None
        if isinstance(of, dict):
            marks += [m.get("lora_B_layout") for key, m in of.items() if isinstance(m, dict) and (key == name or str(key).endswith(f".{name}"))]
        marks.append(place.get("lora_B_layout"))
    if said := next((mark for mark in marks if mark is not None), None):
        if said not in ("rank_major", "grouped_by_expert"):
            reading.problems.append(f"the order of an expert stack's columns is {said!r}, neither rank_major nor grouped_by_expert")
        return str(said)
    if any(place.get("unsloth_fixed") for place in places) and _class_name(reading).lower().startswith(UNSLOTH):
        reading.notes.append(
            "unsloth's experts without a mark: B's columns were taken to go by expert, as up to 2026.9.5 (Hints(expert_order=...) decides)"
        )
        return "grouped_by_expert"
    return "rank_major"


def _class_name(reading: _Reading) -> str:
    if reading.hints.model is not None:
        return type(reading.hints.model).__name__
    auto = reading.config.get("auto_mapping")
    return str(auto.get("base_model_class", "")) if isinstance(auto, dict) else ""


def _module(model: nn.Module | None, path: str) -> nn.Module | None:
    if model is None:
        return None
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


FORMAT = Format(name="peft", library="peft 0.21.2 (reads 0.7 and later)", claims=claims, read=read, write=peft.write,
                holds=frozenset({"stacks", "embeddings", "convolutions", "parameters", "magnitudes", "bias updates", "whole tensors", "tokens"}),
                scales="site")  # fmt: skip
