"""Tables of names: what a library calls a weight, and what transformers does. And the heads, by which some sort the rows of q and k."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import FileError
from .. import transforms
from ..io.open_adapter import Hints
from ..record import StoredSite


@dataclass(frozen=True)
class Names:
    """Pairs of names, theirs and transformers', with {} for the layer's number."""

    table: Mapping[str, str]

    def ours(self, name: str) -> str | None:
        """transformers' name; None for one that is not in the table."""
        return _translated(name, self.table)

    def theirs(self, name: str) -> str | None:
        """The library's name for a path of transformers."""
        return _translated(name, {ours: theirs for theirs, ours in self.table.items()})


def _translated(name: str, table: Mapping[str, str]) -> str | None:
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    found = table.get(name if number is None else f"{name[: number.start()]}{{}}{name[number.end() :]}")
    return found if found is None or number is None else found.format(number.group())


def heads_of(hints: Hints) -> tuple[int, int] | None:
    """Attention heads of queries, and of keys and values: as told, or as the model's config says."""
    config: Any = getattr(hints.model, "config", None)
    config = getattr(config, "text_config", config)
    n = getattr(config, "num_attention_heads", None)
    return hints.heads or (None if n is None else (n, getattr(config, "num_key_value_heads", None) or n))


def reordered(s: StoredSite, heads: tuple[int, int], *, to_pairs: bool) -> StoredSite:
    """A site on q or k with its rows in rotary pairs or in halves; any other as it is."""
    leaf = s.path.rpartition(".")[2]
    if leaf not in ("q_proj", "k_proj"):
        return s
    at = (transforms.pairs_from_halves if to_pairs else transforms.halves_from_pairs)(
        s.B.shape[0], heads[leaf == "k_proj"]
    )
    return replace(
        s,
        B=s.B[at],
        magnitude=None if s.magnitude is None else s.magnitude[at],
        bias=None if s.bias is None else s.bias[at],
    )


EXPERT = re.compile(r"(?P<block>.*)\.experts\.(?P<n>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj)")


def stacks(sites: Sequence[StoredSite], level: str) -> Iterator[StoredSite]:
    """Experts that are linears of their own as stacks at <block><level>.<leaf>. Raises FileError where some have no adapter."""
    found: dict[str, dict[int, StoredSite]] = {}
    for s in sites:
        if at := EXPERT.fullmatch(s.path):
            found.setdefault(f"{at['block']}{level}.{at['leaf']}", {})[int(at["n"])] = s
        else:
            yield s
    for path, experts in found.items():
        if sorted(experts) != list(range(len(experts))) or len({s.r for s in experts.values()}) > 1:
            raise FileError(f"{path}: the experts {', '.join(map(str, sorted(experts)))} have adapters, not all of one rank",
                            way_out="there is a stack for all experts only")  # fmt: skip
        ordered = [experts[e] for e in range(len(experts))]
        yield replace(ordered[0], path=path, kind="experts", A=transforms.concat(path, [s.A[None] for s in ordered]),
                      B=transforms.concat(path, [s.B[None] for s in ordered]))  # fmt: skip


def pickled(tensors: Mapping[str, Any]) -> bytes:
    """What torch.save writes: the container of those libraries that have no other."""

    def own(value: Any) -> Any:
        return (
            value.detach().cpu().clone().contiguous()
            if isinstance(value, Tensor)
            else {k: own(v) for k, v in value.items()}
        )

    buffer = io.BytesIO()
    torch.save(own(tensors), buffer)
    return buffer.getvalue()
