"""PEFT's target_parameters: stacks of experts and other bare parameters, in files of any version.

A file leaves three things open, which the base model tells if it is given (Hints.model); else the likeliest is taken,
and noted:

- Which parameter is which. Several parameters of a module are nested (<path>.base_layer. ...) in the order in which the
  module registers them, the last outermost.
- Which side of a stack's matrices A faces. From 0.19.1 on the input; in 0.19.0 the output; before that the first axis
as
  stored. With the base at hand the shapes decide, and the version only where they are square. PEFT itself cannot read
  its older files.
- How the columns of a stack's B are sorted. PEFT sorts them by rank, unsloth up to 2026.9.5 by expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ...lora.weight_kinds import STACKS
from ...plan import site_name
from ...targets.fused_layouts import stacked_parts
from .. import transforms
from ..io.open_adapter import Hints
from ..record import StoredSite, checked_sites
from . import peft_layout

# The order in which transformers registers the parameters.
ORDER = ("in_proj_weight", "gate_up_proj", "down_proj")
# Classes whose experts are stored (E, in, out), by how their names begin.
STORED_IN_OUT = ("GptOss", "Aria", "OpenAIPrivacyFilter")
# Model types whose experts unsloth (up to 2026.9.5) trained with B's columns by expert, without a mark in the file.
UNSLOTH = (
    "deepseekv3", "ernie45moe", "ernie45vlmoe", "gemma4", "glm4moe", "glm4moelite", "gptoss", "lfm2moe", "mixtral",
    "qwen35moe", "qwen3moe", "qwen3next", "qwen3vlmoe",
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What the reader of one file works with: config, hints, what holds for the whole file, and the lists that collect
    problems and notes."""

    config: Mapping[str, Any]
    hints: Hints
    levels: Mapping[str, int]
    """How many pairs each module has, of which all but one lie inside of wrappers (`.base_layer`)."""
    has_magnitudes: bool
    problems: list[str]
    notes: list[str]

    def finish(self, s: StoredSite, factor: float = 1.0, name: str | None = None) -> list[StoredSite]:
        """Return the site with the settings of the config, as a list of one; an empty list if it is impossible.

        Args:
            s: The site, with A and B.
            factor: A number by which the scale is multiplied.
            name: The name by which the config's patterns know the site, if it is not the site's own.
        """
        config, hints = self.config, self.hints
        default = hints.alpha if "r" not in config and hints.alpha else peft_layout.DEFAULT_ALPHA
        default = config.get("lora_alpha", default)
        alpha = peft_layout.match_pattern(config.get("alpha_pattern"), s.name if name is None else name, default)
        alpha = alpha * factor if factor != 1 and isinstance(alpha, int | float) else alpha
        scaling = "rslora" if config.get("use_rslora") else "standard" if config else hints.scaling
        dropout = config.get("lora_dropout", 0.0)
        r = peft_layout.match_pattern(config.get("rank_pattern"), s.name if name is None else name, config.get("r"))
        is_pair = s.A.ndim > 1 and s.B.ndim > 1 and s.A.shape[-2] == s.B.shape[-1]
        if isinstance(r, int) and is_pair and r != s.A.shape[-2]:
            self.problems.append(f"{s.name}: A has the rank {s.A.shape[-2]}, but the config says {r}")
            return []
        return checked_sites([replace(s, alpha=alpha, scaling=scaling, dropout=dropout)], self.problems)

    @property
    def version(self) -> tuple[int, ...]:
        """PEFT's version; if the config is silent, as it was until 0.18, the oldest that had target_parameters."""
        match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(self.config.get("peft_version", "0.17.0")))
        return tuple(int(part or 0) for part in match.groups()) if match else (0, 17, 0)

    @property
    def base_class(self) -> str:
        """The name of the base model's class, as far as the model or the config tells it."""
        if self.hints.model is not None:
            return type(self.hints.model).__name__
        auto = self.config.get("auto_mapping")
        return str(auto.get("base_model_class", "")) if isinstance(auto, dict) else ""

    @property
    def package(self) -> str:
        """The package of the base model in transformers, as far as the config tells it; else empty."""
        auto = self.config.get("auto_mapping")
        library = str(auto.get("parent_library", "")) if isinstance(auto, dict) else ""
        match = re.fullmatch(r"transformers\.models\.(\w+)\.\w+", library)
        return match[1] if match else ""

    def module(self, path: str) -> nn.Module | None:
        """Return the base's module at a path; None without a model, or if the model has no such module."""
        try:
            return None if self.hints.model is None else self.hints.model.get_submodule(path)
        except AttributeError:
            return None


def candidate_parameters(path: str, reading: Reading) -> list[str]:
    """Return the parameters of a module that target_parameters may mean, in the order in which the module has them."""
    names = []
    for entry in reading.config.get("target_parameters") or []:
        owner, _, name = str(entry).rpartition(".")
        if not owner or path == owner or path.endswith(f".{owner}"):
            names.append(name)
    if (module := reading.module(path)) is not None:
        return [name for name in module._parameters if name in names]
    return sorted(dict.fromkeys(names), key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def read_parameter(
    wrapped_path: str, A: Tensor, B: Tensor, candidates: Sequence[str], reading: Reading
) -> list[StoredSite]:
    """Return the site of one parameter, as a list of one; an empty list if it cannot be told.

    Args:
        wrapped_path: The path as the file has it, with one `.base_layer` per wrapper around the parameter.
        A, B: The factors as stored.
        candidates: The parameters of the module that the config may mean, in the module's order.
        reading: The config, the hints, and the lists of problems and notes.
    """
    path = wrapped_path.replace(".base_layer", "")
    depth = wrapped_path.count(".base_layer")
    levels = reading.levels[path]
    if depth >= levels or levels != len(candidates):
        reading.problems.append(
            f"{path}: the file adapts {levels} of its parameters, and the config's target_parameters names"
            f" {', '.join(candidates)}"
        )
        return []
    parameter, module = candidates[levels - 1 - depth], reading.module(path)
    name = site_name(path, parameter)
    if module is None and levels > 1 and not set(candidates) <= set(ORDER):
        reading.notes.append(
            f"which of {', '.join(candidates)} is which was taken from the config's order:"
            " read it with the model to be sure"
        )
    weight = None if module is None else module._parameters.get(parameter)
    rows = A.shape[0] if A.ndim == 2 else 0
    if weight is not None:
        experts = weight.shape[0] if weight.ndim == 3 else 1
        is_stack = weight.ndim != 2
    else:
        rank = peft_layout.match_pattern(reading.config.get("rank_pattern"), name, reading.config.get("r"))
        if not (isinstance(rank, int) and rank > 0 and rows % rank == 0):
            reading.problems.append(f"{name}: A {tuple(A.shape)} cannot be that of experts with rank {rank!r} each")
            return []
        experts = rows // rank
        is_stack = experts > 1
    if not is_stack:
        s = StoredSite(path=path, parameter=parameter, A=A, B=B, alpha=0)
        if parameter == "weight":
            return reading.finish(s, name=f"{path}.weight")
        return reading.finish(replace(s, kind="matrix", shape=(B.shape[0], A.shape[1])))
    if rows == 0 or rows % experts or B.ndim != 2 or B.shape[1] != rows:
        reading.problems.append(
            f"{name}: A {tuple(A.shape)} and B {tuple(B.shape)} cannot be those of a stack of {experts} experts"
        )
        return []
    return _read_stack(path, parameter, A, B, experts, weight, reading)


def _read_stack(
    path: str, parameter: str, A: Tensor, B: Tensor, experts: int, weight: Tensor | None, reading: Reading
) -> list[StoredSite]:
    """Return the site of a stack from A (E r, in) and B (out, E r), where in and out may be exchanged."""
    if _column_order(parameter, reading) == "grouped_by_expert":
        B = B.reshape(len(B), experts, -1).permute(1, 0, 2)
    else:
        B = B.reshape(len(B), -1, experts).permute(2, 0, 1)
    module = reading.module(path)
    if module is not None:
        in_out = bool(getattr(module, "is_transposed", False))
    else:
        in_out = reading.base_class.startswith(STORED_IN_OUT)
    A = A.reshape(experts, -1, A.shape[1])
    s = StoredSite(path=path, parameter=parameter, kind=STACKS[in_out].name, A=A, B=B.contiguous(), alpha=0)
    sites = []
    for site in reading.finish(s):
        if _faces_output(site, weight, in_out, reading):
            site = transforms.transposed(site)
        out, in_ = site.B.shape[-2], site.A.shape[-1]
        if module is not None or reading.base_class:  # else whether the stack is stored transposed is unknown
            parts = stacked_parts(reading.package, parameter, out) or {}
            site = replace(site, shape=(experts, in_, out) if in_out else (experts, out, in_), parts=parts)
        sites.append(site)
    return sites


def _faces_output(s: StoredSite, weight: Tensor | None, in_out: bool, reading: Reading) -> bool:
    """True if A of the stack faces the output of the experts' matrices, as in some versions of PEFT."""
    if weight is not None and weight.shape[1] != weight.shape[2]:
        _, out, in_ = STACKS[in_out].sizes(tuple(weight.shape))
        return (s.A.shape[-1], s.B.shape[-2]) == (out, in_)
    if reading.version >= (0, 19):
        return reading.version == (0, 19, 0)
    if weight is None:
        reading.notes.append(
            "which side of the experts' matrices A faces was taken from the version and the model's name:"
            " read it with the model to be sure"
        )
    return not in_out


def _column_order(parameter: str, reading: Reading) -> str:
    """Return how the columns of a stack's B are sorted: "rank_major" (PEFT) or "grouped_by_expert" (unsloth).

    The hint decides, then the marks in the config, then whether unsloth trained this type of model by expert before it
    marked its files.
    """
    config, auto = reading.config, reading.config.get("auto_mapping")
    configs = [config, auto if isinstance(auto, dict) else {}]
    marks = [reading.hints.expert_order]
    for marked in configs:
        fused = marked.get("unsloth_fused_expert_lora")
        parameters = fused.get("parameters") if isinstance(fused, dict) else None
        for key, settings in parameters.items() if isinstance(parameters, dict) else ():
            if isinstance(settings, dict) and (key == parameter or str(key).endswith(f".{parameter}")):
                marks.append(settings.get("lora_B_layout"))
        marks.append(marked.get("lora_B_layout"))
    if order := next((mark for mark in marks if mark is not None), None):
        if order not in ("rank_major", "grouped_by_expert"):
            reading.problems.append(
                f"the columns of a stack's B are in the order {order!r}, neither rank_major nor grouped_by_expert"
            )
        return str(order)
    if any(marked.get("unsloth_fixed") for marked in configs) and reading.base_class.lower().startswith(UNSLOTH):
        reading.notes.append(
            "unsloth's experts without a mark: B's columns were taken to be sorted by expert, as up to 2026.9.5"
            " (Hints(expert_order=...) decides)"
        )
        return "grouped_by_expert"
    return "rank_major"
