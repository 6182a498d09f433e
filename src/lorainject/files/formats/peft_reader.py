"""Read PEFT's files of any version and variant into the record. Their names and shapes are in peft_layout.py.

Besides what PEFT's save_pretrained writes, the keys of wrappers (torch.compile, FSDP, DDP), of raw dumps (with the
adapter's name in them) and without any prefix are understood, and the archives of Tinker, which keeps one A or B for
several experts.

nn.MultiheadAttention: PEFT up to 0.21.2 adds out_proj's update twice, in training, too. So it is read with twice the
scale, unless Hints(out_proj_factor=...) says otherwise.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...plan import site_name
from ..format import Format
from ..io.open_adapter import Hints, Source, header_json
from ..record import AdapterFile, Problem, StoredSite, TokenRows
from . import peft_layout
from .pairs import Pair, as_matrices, read_pairs, twice, unexpected
from .peft_altered_base import altered_base_problem, initialization, on_original_base
from .peft_stacks import Reading, candidate_parameters, read_parameter

FACTOR = re.compile(
    r"(?P<path>.*)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
TOKENS = re.compile(r"(?P<path>.*)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
WHOLE = re.compile(r"(?P<path>.*?)(?:\.base_layer|\.modules_to_save\.[^.]+)*\.(?P<leaf>weight|bias)")
# The keys that FACTOR matches are brought into this form, without the adapter's name.
ENDINGS = {
    ".lora_A.weight": "A",
    ".lora_embedding_A": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_B.bias": "bias",
}
# Fields that, if set, mean something other than W0 + s B A and what the record holds besides.
UNSUPPORTED = (
    "layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora", "kasa_config",
    "monteclora_config", "enable_lora",
)  # fmt: skip
OUT_PROJ = ".base_layer.out_proj"
TINKER = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def claims(source: Source) -> bool:
    """True if the config is PEFT's, or the tensors have PEFT's names."""
    if "peft_type" in source.config or {"r", "lora_alpha"} <= source.config.keys():
        # torchtune writes a config for PEFT, too
        return not any(key.endswith((".lora_a.weight", ".lora_b.weight")) for key in source.tensors)
    matches = (FACTOR.fullmatch(_without_wrappers(key)) for key in source.tensors)
    return any(m and (m["leaf"] or "embedding" in m["part"]) for m in matches)


def _without_wrappers(key: str) -> str:
    """Return a key without PEFT's prefix and the names of torch.compile's, FSDP's and DDP's wrappers."""
    key = re.sub(r"(^|\.)(_orig_mod|_fsdp_wrapped_module)(?=\.)", "", key).removeprefix(".")
    return key.removeprefix("module." if key.startswith("module.base_model.") else "").removeprefix(peft_layout.PREFIX)


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """Return the record; what is wrong goes into `problems`."""
    config = source.config or _config_in_header(source)
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        problems.append(f"peft_type is {kind!r}: only LORA is a pair of low-rank factors")
        return None
    if not config and hints.alpha is None:
        line = "it holds no record of alpha, without which its scale is unknown"
        problems.append(Problem(line, "give the directory with its adapter_config.json, or hints=Hints(alpha=...)"))
        return None
    factors: dict[str, Tensor] = {}
    tokens: dict[str, TokenRows] = {}
    replaced: dict[str, Tensor] = {}
    adapters = set()
    names: dict[tuple[str, str | None], str] = {}
    for key, t in source.tensors.items():
        name = _without_wrappers(key)
        m = FACTOR.fullmatch(name)
        whole = WHOLE.fullmatch(name)
        identity = (f"{m['path']}{_ending(m)}", m["adapter"]) if m else (name, None)
        if whole and not m:
            identity = site_name(whole["path"].replace(".base_layer", ""), whole["leaf"]), None
        if ".original_module." not in key and names.setdefault(identity, key) != key:
            problems.append(twice(names[identity], key))
        if m:
            factors[f"{peft_layout.PREFIX}{m['path']}{_ending(m)}"] = t
            adapters.add(m["adapter"])
        elif m := TOKENS.fullmatch(name):
            tokens |= _read_tokens(m["path"], t, config, problems)
        elif ".original_module." in key:
            continue  # the base's own tensor, in a raw dump
        elif (m := WHOLE.fullmatch(name)) and _is_saved(key, m, config):
            replaced[site_name(m["path"].replace(".base_layer", ""), m["leaf"])] = t
        else:
            problems.append(unexpected(key, {}))
    pairs = read_pairs(factors, ENDINGS, problems, translate=lambda path: path.removeprefix(peft_layout.PREFIX))
    if len(adapters) > 1:
        problems.append(f"it holds several adapters: {', '.join(sorted(map(str, adapters)))}")
    levels = Counter(path.replace(".base_layer", "") for path in pairs)
    has_magnitudes = any("magnitude" in pair.extras for pair in pairs.values())
    reading = Reading(config, hints, levels, has_magnitudes, problems, [])
    problems += _config_problems(config, reading, replaced)
    if problem := altered_base_problem(init := initialization(config), hints.original):
        problems.append(problem)
    _check_biases(config, pairs, replaced, reading)
    sites = [s for path, pair in pairs.items() for s in _read_sites(path, pair, factors, pairs, reading)]
    if init and hints.original is not None and not problems:
        sites = on_original_base(sites, init, hints.original, problems)
    return AdapterFile(path=source.path, format="peft", sites=tuple(sites), replaced=replaced, tokens=tokens,
                       config=dict(config) | ({"init_lora_weights": True} if init else {}), init=init or "kaiming",
                       notes=tuple(dict.fromkeys(reading.notes)))  # fmt: skip


def _config_in_header(source: Source) -> dict[str, Any]:
    """Return PEFT's config that save_lora_adapter of diffusers' models writes into the header; empty without one."""
    header = header_json(source, peft_layout.HEADER_CONFIG) or {}
    return header if {"r", "lora_alpha"} <= header.keys() else {}  # not that of a pipeline, which has "unet.r"


def _ending(match: re.Match[str]) -> str:
    if match["leaf"] == "bias":
        return ".lora_B.bias"
    return f".{match['part']}.weight" if match["part"] in ("lora_A", "lora_B") else f".{match['part']}"


def _config_problems(config: Mapping[str, Any], reading: Reading, replaced: Mapping[str, Tensor]) -> list[str]:
    """Return what the config asks for that is not LoRA, or that the tensors do not have."""
    problems = [f"{field} is set, which is not plain LoRA: not supported" for field in UNSUPPORTED if config.get(field)]
    if not isinstance(config.get("target_modules"), str | list | None):
        problems.append(f"target_modules is {config['target_modules']!r}, not a list of names or a pattern")
    if config.get("use_dora") and not reading.has_magnitudes:
        problems.append("use_dora is set, which is not plain LoRA, but there is no magnitude")
    if config.get("modules_to_save") and not replaced:
        problems.append("modules_to_save is set, but the file has no tensor of these modules")
    return problems


def _check_biases(
    config: Mapping[str, Any], pairs: Mapping[str, Pair], replaced: Mapping[str, Tensor], reading: Reading
) -> None:
    """Check a file without biases whose config says that biases were trained: right for a model that has none."""
    mode, model = config.get("bias", "none"), reading.hints.model
    if mode == "none" or any(name.endswith("bias") for name in replaced):
        return
    if model is None:
        reading.notes.append(f"bias is {mode!r}, but the file has no bias, which is right for a model without biases")
        return
    biases = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if mode != "all":
        biases = [name for name in biases if name.removesuffix(".bias") in pairs]
    if biases:
        reading.problems.append(f"bias is {mode!r}, and the model has {biases[0]}, but the file has no bias")


def _is_saved(key: str, match: re.Match[str], config: Mapping[str, Any]) -> bool:
    """True if a whole tensor is one that PEFT saves: of modules_to_save, a bias, or an embedding or head it adds."""
    path, modules = match["path"], config.get("modules_to_save") or []
    return (
        any(f".{m}." in f".{path}." for m in modules if isinstance(m, str))
        or any(mark in key for mark in (".base_layer.", ".modules_to_save."))
        or path.endswith(("embed_tokens", "lm_head"))
        or (match["leaf"] == "bias" and config.get("bias", "none") != "none")
    )


def _read_tokens(path: str, rows: Tensor, config: Mapping[str, Any], problems: list[str]) -> dict[str, TokenRows]:
    ids = config.get("trainable_token_indices")
    if isinstance(ids, dict):
        ids = next((i for name, i in ids.items() if path == name or path.endswith(f".{name}")), None)
    numbers = [i for i in ids if isinstance(i, int) and i >= 0] if isinstance(ids, list) else []
    if numbers != ids or rows.ndim != 2 or len(numbers) != len(rows):
        problems.append(
            f"{path}: the token rows have shape {tuple(rows.shape)}, but trainable_token_indices is {ids!r}"
        )
        return {}
    return {path: TokenRows(ids=tuple(numbers), rows=rows)}


def _read_sites(
    path: str, pair: Pair, factors: Mapping[str, Tensor], pairs: Mapping[str, Pair], reading: Reading
) -> list[StoredSite]:
    """Return the sites of one pair: one, or one per expert for Tinker's stacks."""
    A, B, leaf = pair.A, pair.B, path.rpartition(".")[2]
    if A.ndim == B.ndim == 3 and leaf in TINKER and path.endswith(f".experts.{leaf}"):
        return _read_tinker_stack(path.removesuffix(f".{leaf}"), TINKER[leaf], A, B, reading)
    module = path.replace(".base_layer", "")
    if module == "model.unembed_tokens":  # Tinker's name of the head
        module = "lm_head"
    if candidates := candidate_parameters(module, reading):
        return read_parameter(path, A, B, candidates, reading)
    if path.endswith(OUT_PROJ) or path + OUT_PROJ in pairs:
        return _read_attention(path, module, A, B, reading)
    magnitude = pair.extras.get("magnitude")
    if magnitude is None and reading.has_magnitudes:
        reading.problems.append(f"{module}: its magnitude is missing")
    if A.ndim == B.ndim == 3 and A.shape[0] == B.shape[0] and A.shape[1] == B.shape[2]:
        line = f"{module}: A {tuple(A.shape)} and B {tuple(B.shape)} are those of {len(A)} experts, stacked"
        step = f"write one pair for each expert, as in {module.replace('experts.', 'experts.0.', 1)}.lora_A.weight"
        reading.problems.append(Problem(line, step))
        return []
    if A.ndim > 2 and B.ndim > 1 and B.shape[1] not in (0, A.shape[0]):
        reading.problems.append(
            f"{module}: A {tuple(A.shape)} and B {tuple(B.shape)} are those of a grouped convolution, which not even"
            " PEFT can merge: not supported"
        )
        return []
    fields = as_matrices(A, B)
    if f"{peft_layout.PREFIX}{path}.lora_embedding_A" in factors:
        fields["kind"] = "embedding"
    if magnitude is not None:
        fields["magnitude"] = magnitude.flatten()
    return reading.finish(StoredSite(path=module, alpha=0, bias=pair.extras.get("bias"), **fields))


def _read_tinker_stack(path: str, leaf: str, A: Tensor, B: Tensor, reading: Reading) -> list[StoredSite]:
    """Return one linear per expert of A (E or 1, r, in) and B (E or 1, out, r); all experts share a single A or B."""
    count = max(len(A), len(B))
    if not {len(A), len(B)} <= {1, count}:
        shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
        reading.problems.append(f"{path}: {shapes} are for different numbers of experts")
        return []
    experts = [StoredSite(path=f"{path}.{e}.{leaf}", A=A[e % len(A)], B=B[e % len(B)], alpha=0) for e in range(count)]
    return [site for s in experts for site in reading.finish(s)]


def _read_attention(path: str, module: str, A: Tensor, B: Tensor, reading: Reading) -> list[StoredSite]:
    """Return in_proj_weight or out_proj of nn.MultiheadAttention; the config has both under the attention's path."""
    if not path.endswith(OUT_PROJ):
        shape = (*B.shape[:1], *A.shape[1:])
        s = StoredSite(path=module, parameter="in_proj_weight", kind="matrix", shape=shape, A=A, B=B, alpha=0)
        return reading.finish(s, name=module)
    factor = reading.hints.out_proj_factor
    if factor is None:
        factor, count = 1.0, "once, as later PEFT should do"
        if reading.version <= (0, 21, 2):
            factor, count = 2.0, "twice, as in PEFT up to 0.21.2, where it was trained so"
        reading.notes.append(f"the update of out_proj counts {count} (Hints(out_proj_factor=...) decides)")
    # PEFT would adapt out_proj in vain if it were a layer of its own: hence peft=False.
    s = StoredSite(path=module, A=A, B=B, alpha=0, peft=False)
    return reading.finish(s, factor, name=module.removesuffix(".out_proj"))


FORMAT = Format(name="peft", library="peft 0.21.2 (reads 0.7 and later)", claims=claims, read=read,
                write=peft_layout.write, scales="site",
                holds=frozenset({"stacks", "embeddings", "convolutions", "parameters", "magnitudes", "bias updates",
                                 "whole tensors", "tokens"}))  # fmt: skip
