"""PEFT's target_parameters: stacks of experts and other bare parameters, in files of any version.

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

from ...lora.weight_kinds import STACKS
from ...plan import site_name
from .. import transforms
from ..io.open_adapter import Hints
from ..record import NONE, StoredSite, checked
from . import peft_layout

ORDER = ("in_proj_weight", "gate_up_proj", "down_proj")  # as transformers registers them
STORED_IN_OUT = (
    "GptOss",
    "Aria",
    "OpenAIPrivacyFilter",
)  # classes whose experts are (E, in, out), by how their names begin
# Model types whose stacked experts unsloth (up to 2026.9.5) trained with B's columns by expert, and said nothing of it.
UNSLOTH = ("deepseekv3", "ernie45moe", "ernie45vlmoe", "gemma4", "glm4moe", "glm4moelite", "gptoss", "lfm2moe", "mixtral", "qwen35moe", "qwen3moe",
           "qwen3next", "qwen3vlmoe")  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What the reading of one file goes by: its config and the hints; and where problems and notes are collected."""

    config: Mapping[str, Any]
    hints: Hints
    problems: list[str]
    notes: list[str]

    def alpha(self, name: str) -> Any:
        """As the config says for a site of this name, whatever type that has."""
        given = self.config.get(
            "lora_alpha", self.hints.alpha if "r" not in self.config and self.hints.alpha else peft_layout.DEFAULT_ALPHA
        )
        return peft_layout.pattern(self.config.get("alpha_pattern"), name, given)

    def made(
        self, s: StoredSite, A: Tensor, B: Tensor, factor: float = 1.0, at: str | None = None
    ) -> StoredSite | None:
        """The site with its A and B, and the settings that hold for its name (or for another one's, `at`)."""
        alpha = self.alpha(s.name if at is None else at)
        if factor != 1 and isinstance(alpha, int | float):
            alpha = alpha * factor
        scaling = "rslora" if self.config.get("use_rslora") else self.hints.scaling if not self.config else "standard"
        return checked(
            s, A, B, self.problems, alpha=alpha, scaling=scaling, dropout=self.config.get("lora_dropout", 0.0)
        )

    @property
    def version(self) -> tuple[int, ...]:
        """PEFT's; the oldest that had target_parameters, where the config is silent, as it was until 0.18."""
        found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(self.config.get("peft_version", "0.17.0")))
        return tuple(int(part or 0) for part in found.groups()) if found else (0, 17, 0)


def parameters(at: str, reading: Reading) -> list[str]:
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


def parameter(
    path: str, at: str, A: Tensor, B: Tensor, groups: Mapping[str, Any], candidates: Sequence[str], reading: Reading
) -> StoredSite | None:
    """The site of one of them, by how many wrappers lie around it; None, and lines in the problems, if it can't be told."""
    depth, levels = path.count(".base_layer"), sum(other.replace(".base_layer", "") == at for other in groups)
    if depth >= levels or levels != len(candidates):
        reading.problems.append(f"{at}: {levels} adapted parameters, where the config names {', '.join(candidates)}")
        return None
    name = candidates[levels - 1 - depth]
    module, rank = (
        _module(reading.hints.model, at),
        peft_layout.pattern(reading.config.get("rank_pattern"), site_name(at, name), reading.config.get("r")),
    )
    weight = None if module is None else module._parameters.get(name)
    if module is None and levels > 1 and not set(candidates) <= set(ORDER):
        reading.notes.append(
            f"which of {', '.join(candidates)} is which was taken from the config's order: read it with the model to be sure"
        )
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
        reading.problems.append(
            f"{site_name(at, name)}: {tuple(A.shape)} and {tuple(B.shape)} are no stack of {E} experts"
        )
        return None
    by_expert = _order(name, reading) == "grouped_by_expert"
    B = B.reshape(len(B), E, -1).permute(1, 0, 2) if by_expert else B.reshape(len(B), -1, E).permute(2, 0, 1)
    transposed = _stored_in_out(module, reading)
    s = reading.made(
        StoredSite(path=at, parameter=name, kind=STACKS[transposed].name, A=NONE, B=NONE, alpha=0),
        A.reshape(E, -1, A.shape[1]),
        B.contiguous(),
    )
    if s is None:
        return None
    s = transforms.transposed(s) if _is_turned(s, weight, transposed, reading) else s
    out, in_ = s.B.shape[-2], s.A.shape[-1]
    return replace(s, shape=(E, in_, out) if transposed else (E, out, in_))


def _is_turned(s: StoredSite, weight: Tensor | None, transposed: bool, reading: Reading) -> bool:
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


def _stored_in_out(module: nn.Module | None, reading: Reading) -> bool:
    if module is not None:
        return bool(getattr(module, "is_transposed", False))
    return _class_name(reading).startswith(STORED_IN_OUT)


def _order(name: str, reading: Reading) -> str:
    """How the columns of B go: as the caller or the file says; unsloth's, where it trained by expert before it said so; else PEFT's."""
    config, auto = reading.config, reading.config.get("auto_mapping")
    places = [config, auto if isinstance(auto, dict) else {}]
    marks = [reading.hints.expert_order]
    for place in places:
        fused = place.get("unsloth_fused_expert_lora")
        of = fused.get("parameters") if isinstance(fused, dict) else None
        if isinstance(of, dict):
            marks += [
                m.get("lora_B_layout")
                for key, m in of.items()
                if isinstance(m, dict) and (key == name or str(key).endswith(f".{name}"))
            ]
        marks.append(place.get("lora_B_layout"))
    if said := next((mark for mark in marks if mark is not None), None):
        if said not in ("rank_major", "grouped_by_expert"):
            reading.problems.append(
                f"the order of an expert stack's columns is {said!r}, neither rank_major nor grouped_by_expert"
            )
        return str(said)
    if any(place.get("unsloth_fixed") for place in places) and _class_name(reading).lower().startswith(UNSLOTH):
        reading.notes.append(
            "unsloth's experts without a mark: B's columns were taken to go by expert, as up to 2026.9.5 (Hints(expert_order=...) decides)"
        )
        return "grouped_by_expert"
    return "rank_major"


def _class_name(reading: Reading) -> str:
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
