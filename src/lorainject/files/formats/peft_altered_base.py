"""Files of PEFT's PiSSA and OLoRA, as adapters of rank 2 r on the original base.

PEFT begins both with a product B0 A0 of the base's own values, and subtracts it from the base:

    altered base    W0 - s B0 A0             what the file's A and B are for
    together        W0 + s (B A - B0 A0)     so on the original base the update is s [B, -B0] [A; A0]

B0 A0 is a function of W0 (lora/initial_values.py), so with the original base it can be computed again. It is exact up
to float32's rounding of the decomposition, and up to the rounding that PEFT made when it stored the altered base.
Initializations that draw random numbers or read data (pissa_niter_4, corda, loftq, lora_ga) cannot be computed again.

Source: `pissa_init` and `olora_init` in tuners/lora/layer.py of peft 0.21.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...lora.initial_values import as_matrices, initialize, why_uninitialized
from ...lora.weight_kinds import kind_of, weight_shape
from ...numerics.delta import alpha_of
from ..record import Problem, StoredSite

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations that altered the base itself
COMPUTABLE = ("pissa", "olora")


def initialization(config: Mapping[str, Any]) -> str:
    """Return the initialization that altered the base; empty if none did."""
    init = str(config.get("init_lora_weights", "")).lower()
    return init if init.startswith(CHANGES_BASE) else ""


def altered_base_problem(init: str, original: nn.Module | None) -> str | None:
    """Return why the sites of a file cannot be put onto the original base; None if they can."""
    if not init or (init in COMPUTABLE and original is not None):
        return None
    line = f"init_lora_weights is {init!r}: the adapter belongs to an altered base"
    if init in COMPUTABLE:
        return Problem(line, "give the original base with its values: hints=Hints(original=model)")
    return Problem(line, "save it with PEFT's path_initial_model_for_weight_conversion, or merge it with PEFT")


def on_original_base(
    sites: Sequence[StoredSite], init: str, original: nn.Module, problems: list[str]
) -> list[StoredSite]:
    """Return the sites with the initial product subtracted. What is impossible goes into `problems`.

    Args:
        sites: The sites of the file, for the altered base.
        init: "pissa" or "olora".
        original: The original base, with values.
        problems: Receives a line per site that the original base has no matrix for.
    """
    moved = []
    modules = dict(original.named_modules())
    for s in sites:
        module = modules.get(s.path)
        weight = None if module is None else module._parameters.get("weight")
        kind = None if module is None else kind_of(module)
        if module is None or weight is None or kind is None or kind.form != "linear":
            problems.append(f"{s.name}: the original base has no linear layer of this name")
        elif weight.is_meta:
            problems.append(f"{s.name}: the original base has no values (it is on the meta device)")
        elif (why := why_uninitialized(init, s.r, module, kind, weight_shape(module, "weight"))) is not None:
            problems.append(f"{s.name}: {why}")
        elif (W0 := as_matrices(weight, kind)).shape != (s.B.shape[0], s.A.shape[1]):
            problems.append(f"{s.name}: the original base has {tuple(W0.shape)}, the file {s.B.shape[0], s.A.shape[1]}")
        else:
            A0, B0 = (torch.empty(t.shape, dtype=W0.dtype) for t in (s.A, s.B))
            initialize(A0, B0, W0.cpu(), init=init, s=s.scale)
            A, B = torch.cat([s.A.to(W0.dtype), A0]), torch.cat([s.B.to(W0.dtype), -B0], 1)
            moved.append(replace(s, A=A, B=B, alpha=alpha_of(s.scale, 2 * s.r, s.scaling), constant_ranks=s.r))
    return moved
