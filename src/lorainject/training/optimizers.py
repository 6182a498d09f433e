"""Parameter groups for an optimizer: A, B, and whatever trains with them.

    A: lr        B: ratio * lr        all others: lr

At the start B is zero and A is not. With one learning rate for both, a wide layer learns slower than it could: the
update of B should be larger than that of A by a factor that grows with the width. Source: Hayou et al. 2024, "LoRA+:
Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354, who recommend a ratio of about 16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import SpecError
from ..lora.model_index import ModelIndex
from ..switching import parameters


def parameter_groups(
    model: nn.Module,
    lr: float,
    lr_ratio_b: float = 16.0,
    name: str | Sequence[str] | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer, with a higher learning rate for B than for A (LoRA+).

    To begin with, take about ten times the learning rate with which the same model is fine-tuned as a whole: 2e-4 where
    that is 2e-5. A and B hold few of the directions in which a weight can move, and their product is scaled by 1 / r,
    so that the best rate is larger, and nearly the same for every rank (Schulman et al. 2025, "LoRA Without Regret").
    With a ratio of 16, B moves 16 times as fast: if the loss is not stable, lower `lr` first.

    Args:
        model: A model with adapters.
        lr: The learning rate of A, and of all parameters that are neither A nor B.
        lr_ratio_b: The learning rate of B, divided by that of A. 1 is plain LoRA.
        name: The adapter or adapters that are trained. None means the active ones.
        weight_decay: The weight decay of all groups.

    Returns:
        Up to three groups, with the entries "params", "lr", "weight_decay" and "group_name": "A", "B" and "others". The
        last group has what else trains: magnitudes (DoRA), whole tensors, and parameters of the base that require a
        gradient. A group without parameters is left out.

    Raises:
        SpecError: A rate, the ratio or the weight decay is out of range.
        StateError: As for `li.parameters`.
    """
    numbers = {"lr": (lr, False), "lr_ratio_b": (lr_ratio_b, False), "weight_decay": (weight_decay, True)}
    problems = [
        f"{key} must be a finite number {'of at least' if may_be_zero else 'above'} 0, not {value!r}"
        for key, (value, may_be_zero) in numbers.items()
        if not (isinstance(value, int | float) and 0 <= value < math.inf and (value or may_be_zero))
    ]
    if problems:
        raise SpecError("no parameter groups were made:", problems, "correct the numbers and call again")
    trained = list(parameters(model, name))
    index = ModelIndex(model)
    adapters = [adapter for adapter_name in index.adapter_names for adapter in index.adapters_named(adapter_name)]
    role = {id(p): key for adapter in adapters for key, p in adapter.named_parameters()}
    trained += [p for p in model.parameters() if p.requires_grad and id(p) not in role]
    rates = {"A": lr, "B": lr * lr_ratio_b, "others": lr}
    groups: dict[str, list[nn.Parameter]] = {key: [] for key in rates}
    for p in trained:
        groups[key if (key := role.get(id(p))) in ("A", "B") else "others"].append(p)
    return [
        {"params": group, "lr": rates[key], "weight_decay": weight_decay, "group_name": key}
        for key, group in groups.items()
        if group
    ]
