"""How many parameters each way of adapting a model trains: the baselines of the LoRA paper, for any model.

    FT          every parameter
    FT-top2     the last two blocks
    BitFit      every bias
    PreEmbed    d (l_p + l_i)                   vectors in front of (prefix) and behind (infix) the input
    PreLayer    L d (l_p + l_i)                 the same, after every block
    Adapter H   2 L (2 d m + m + d)             behind attention and MLP   (Houlsby et al. 2019)
    Adapter L   L (2 d m + m + d) + 2 L d       behind the MLP, with a LayerNorm   (Lin et al. 2020)
    Adapter P   L (2 d m + m + d)               behind the MLP   (Pfeiffer et al. 2021)
    Adapter D   K (2 d m + m + d)               Adapter P in the last K blocks   (Rücklé et al. 2020)
    LoRA        sum of r (in + out) over the adapted matrices; 2 L d r for each square matrix of a block

    L: blocks    d: width    m: bottleneck of an adapter    r: rank

Source: Hu et al. 2021, arXiv 2106.09685, section 5.1. The first three are counted in the model, and L and d are read
off it, so that a model on the meta device suffices. With several stacks of blocks, such as an encoder and a decoder,
every stack counts with the width that it has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..errors import SpecError, TargetError
from ..lora.model_index import ModelIndex
from ..plan import Site
from ..spec import Target
from ..targets.resolve import count_parameters, find


@dataclass(frozen=True, kw_only=True)
class BudgetRow:
    """What one way of adapting a model trains."""

    method: str
    parameters: int
    """Number of elements that train."""
    settings: str
    """The settings that the number follows from."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The parameters that each way of adapting a model trains. It prints as a table."""

    rows: tuple[BudgetRow, ...]
    total: int
    """Number of parameters of the model."""
    blocks: tuple[tuple[str, int, int], ...]
    """The stacks of blocks: path, number of blocks, width."""

    def __getitem__(self, method: str) -> int:
        return next(row.parameters for row in self.rows if row.method == method)

    def as_json(self) -> dict[str, Any]:
        """Return everything as values of JSON."""
        return asdict(self)

    def __str__(self) -> str:
        table = [("method", "parameters", "share", "settings")]
        for row in self.rows:
            table.append((row.method, f"{row.parameters:,}", f"{row.parameters / self.total:.3%}", row.settings))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        formats = f"{{:<{widths[0]}}}  {{:>{widths[1]}}}  {{:>{widths[2]}}}  {{}}"
        stacks = ", ".join(f"{path}: {count} of width {width}" for path, count, width in self.blocks)
        return "\n".join([*(formats.format(*row).rstrip() for row in table), f"blocks: {stacks}"])


def parameter_budget(
    model: nn.Module, r: int = 8, targets: Target | Sequence[Target] = ("query", "value"), *, prefix: int = 256,
    infix: int = 8, bottleneck: int = 64, kept: int | None = None,
) -> Budget:  # fmt: skip
    """Return how many parameters each baseline of the LoRA paper would train in a model.

    Args:
        model: The base model. It may be on the meta device.
        r: Rank of LoRA.
        targets: The weights that LoRA adapts, as in `inject`.
        prefix: l_p, the number of vectors in front of the input.
        infix: l_i, the number of vectors behind the input.
        bottleneck: m, the inner width of an adapter layer.
        kept: K, the number of blocks that keep their adapter in Adapter D. None for half of them.

    Returns:
        One row per method.

    Raises:
        SpecError: A setting is invalid, or the model has no stack of blocks.
        TargetError: A target matches nothing.
    """
    counts = {"prefix": prefix, "infix": infix, "bottleneck": bottleneck, **({} if kept is None else {"kept": kept})}
    wrong = [f"{name} must be a whole number of at least 0, not {n!r}" for name, n in counts.items()
             if not (isinstance(n, int) and n >= 0)]  # fmt: skip
    if wrong:
        raise SpecError("invalid settings of a budget:", wrong, "correct them and call again")
    index = ModelIndex(model)
    index.require_ready("count its parameters", nested=True, computed=True)
    plan = find(model, targets, r)
    stacks = _stacks(index)
    if not stacks:
        raise SpecError(
            "this model has no stack of blocks, so that neither L nor d is known",
            way_out="count LoRA alone with find(model, targets, r).trainable",
        )
    blocks = tuple((path, len(stack), width) for path, (stack, width) in stacks.items())
    depth = sum(n for _, n, _ in blocks)
    top = max(reversed(stacks.values()), key=lambda stack: sum(map(_count, stack[0])))[0][-2:]
    widths = [width for _, n, width in blocks for _ in range(n)]
    kept = depth // 2 if kept is None else min(kept, depth)
    tokens, vectors = prefix + infix, f"l_p={prefix}, l_i={infix}"

    def adapters(widths: Sequence[int]) -> int:
        return sum(2 * d * bottleneck + bottleneck + d for d in widths)

    biases = {id(p): p.numel() for _, m in index.walked for key, p in m._parameters.items()
              if p is not None and p.ndim == 1 and "bias" in key}  # fmt: skip
    lora = f"r={r}, {len(plan)} matrices"
    rows = [
        ("FT", count_parameters(index), "every parameter"),
        ("FT-top2", sum(map(_count, top)), "the last two blocks"),
        ("BitFit", sum(biases.values()), f"{len(biases)} vectors"),
        ("PreEmbed", widths[-1] * tokens, vectors),
        ("PreLayer", sum(widths) * tokens, vectors),
        ("Adapter H", 2 * adapters(widths), f"m={bottleneck}, two per block"),
        ("Adapter L", adapters(widths) + 2 * sum(widths), f"m={bottleneck}, with a LayerNorm"),
        ("Adapter P", adapters(widths), f"m={bottleneck}"),
        ("Adapter D", adapters(widths[depth - kept :]), f"m={bottleneck}, in the last {kept} of {depth} blocks"),
        ("LoRA", plan.trainable, lora),
        ("LoRA + PreEmbed", plan.trainable + widths[-1] * tokens, f"{lora}, {vectors}"),
        ("LoRA + PreLayer", plan.trainable + sum(widths) * tokens, f"{lora}, {vectors}"),
    ]
    return Budget(
        rows=tuple(BudgetRow(method=method, parameters=n, settings=settings) for method, n, settings in rows),
        total=count_parameters(index), blocks=blocks,
    )  # fmt: skip


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _stacks(index: ModelIndex) -> dict[str, tuple[list[nn.Module], int]]:
    """Return the stacks of blocks with attention, or with any linear layers if none has, by path: blocks and width.

    A block is the part of a path up to its first number. Its width is the input of its first projection.
    """
    for targets in (["attention"], ["all-linear"]):
        try:
            sites = list(find(index.model, targets, 1))
        except TargetError:
            continue
        first: dict[str, Site] = {}
        for site in sites:
            if match := re.match(r"(.+?)\.\d+\.", f"{site.name}."):
                first.setdefault(match[1], site)
        stacks = {}
        for path, site in first.items():
            container = index.modules.get(path)
            if isinstance(container, nn.ModuleList | nn.Sequential):
                stacks[path] = [*container], site.in_features
        if stacks:
            return stacks
    return {}
