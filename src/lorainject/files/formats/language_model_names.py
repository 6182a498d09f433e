"""Names of language models' weights in adapter files, and the two places where a name decides how a weight is stored.

Name tables translate between a library's names and transformers' names of Llama-like models.

q and k: Meta's code keeps the rows of a head in rotary pairs, (d/2, 2), transformers in halves, (2, d/2). Formats with
Meta's order need the number of heads, because A and B do not tell it.

Experts: checkpoints have one linear per expert, <block>.experts.N.up_proj; mlx-lm and GGUF have one stack for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import transforms
from ..io.open_adapter import Hints
from ..record import Problem, StoredSite, collected

UNCHANGED = (0, 0)
"""In place of the numbers of heads, for models whose rows of q and k have the same order in both libraries."""
EXPERT = re.compile(r"(?P<block>.*)\.experts\.(?P<n>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj)")


@dataclass(frozen=True)
class NameTable:
    """A library's names of weights and transformers' names for them; {} stands for the number of the layer."""

    table: Mapping[str, str]
    """transformers' name by the library's."""

    def to_transformers(self, name: str) -> str | None:
        """Return transformers' name for a weight of the library; None if the table does not have it."""
        return _translate(name, self.table)

    def from_transformers(self, path: str) -> str | None:
        """Return the library's name for a weight of transformers; None if the table does not have it."""
        return _translate(path, {ours: theirs for theirs, ours in self.table.items()})


def _translate(name: str, table: Mapping[str, str]) -> str | None:
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    if number is None:
        return table.get(name)
    translated = table.get(f"{name[: number.start()]}{{}}{name[number.end() :]}")
    return None if translated is None else translated.format(number.group())


def attention_heads(hints: Hints) -> tuple[int, int] | None:
    """Return the number of heads of queries, and of keys and values, by the hints or the model's config."""
    config: Any = getattr(hints.model, "config", None)
    config = getattr(config, "text_config", config)
    n = getattr(config, "num_attention_heads", None)
    return hints.heads or (None if n is None else (n, getattr(config, "num_key_value_heads", None) or n))


def missing_heads(paths: Iterable[str], heads: tuple[int, int] | None) -> list[str]:
    """Return a problem if some path is a q or k and the heads are unknown."""
    if heads is not None or not any(path.endswith((".q_proj", ".k_proj")) for path in paths):
        return []
    return ["the rows of q and k have another order in this format than in transformers:"
            " give the heads, as in Hints(heads=(32, 8)), or the model"]  # fmt: skip


def missing_alpha(config: str) -> str:
    """Return the problem of a file without alpha, which its config of this name would hold."""
    return f"it holds no alpha: give the directory with {config}, or pass alpha, as in Hints(alpha=16)"


def with_rotary_order(s: StoredSite, heads: tuple[int, int] | None, *, to_pairs: bool) -> StoredSite:
    """Return a site on q or k with its rows in rotary pairs, or in halves as in transformers; any other site unchanged.

    Raises:
        FileError: If the rows cannot be shared among the heads.
    """
    leaf = s.path.rpartition(".")[2]
    if heads is None or heads == UNCHANGED or leaf not in ("q_proj", "k_proj"):
        return s
    order = transforms.pairs_from_halves if to_pairs else transforms.halves_from_pairs
    rows = order(s.B.shape[0], heads[leaf == "k_proj"])
    magnitude, bias = (None if t is None else t[rows] for t in (s.magnitude, s.bias))
    return replace(s, B=s.B[rows], magnitude=magnitude, bias=bias)


def stack_experts(sites: Sequence[StoredSite], level: str, problems: list[str]) -> list[StoredSite]:
    """Return the sites with each expert's linear in a stack <block><level>.<leaf> of all experts.

    `problems` receives a line per stack with an expert that has no adapter, another rank or another shape.
    """
    stacked: list[StoredSite] = []
    experts: dict[str, dict[int, StoredSite]] = {}
    for s in sites:
        if match := EXPERT.fullmatch(s.path):
            experts.setdefault(f"{match['block']}{level}.{match['leaf']}", {})[int(match["n"])] = s
        else:
            stacked.append(s)
    for path, by_number in experts.items():
        if sorted(by_number) != list(range(len(by_number))) or len({s.r for s in by_number.values()}) > 1:
            numbers = ", ".join(map(str, sorted(by_number)))
            line = (
                f"{path}: a stack needs an adapter of the same rank on every expert, and only {numbers} have one,"
                " or their ranks differ"
            )
            problems.append(Problem(line, "choose a format with one linear per expert, such as lorainject or peft"))
            continue
        parts = [by_number[n] for n in range(len(by_number))]
        with collected(problems):
            A = transforms.concat(path, [s.A[None] for s in parts])
            B = transforms.concat(path, [s.B[None] for s in parts])
            stacked.append(replace(parts[0], path=path, kind="experts", A=A, B=B))
    return stacked
