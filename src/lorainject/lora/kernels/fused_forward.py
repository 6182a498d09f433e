"""The door to the kernels for a whole layer: nn.Linear with a single active adapter.

Most calls are of this case. It skips the calls of the AdapterDict and of the LoraAdapter, and what nn.Module looks up
for them. Without it, the overhead of the row `decode` is 1.2 to 1.6 times as large (one token, 112 linears, d 512,
r 8, Zen 3): beside products of a single token, every look-up counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.functional import linear

from ..adapter import LoraAdapter
from ..adapter_dict import AdapterDict
from ..graft import Graft
from .lora_linear import active_dropout, add_in_place, can_fuse, fused_linear, is_hooked, is_plain_inference

TORCH_FORWARD = nn.Linear.forward
"""The forward that the kernels know. One that is put in its place later may compute anything."""


def fused_forward(layer: Graft, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the output of a grafted layer with its low-rank term, or None if the call needs the general way."""
    if is_compiling() or len(args) != 1 or kwargs or type(layer)._lora_base.forward is not TORCH_FORWARD:
        return None
    W0, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if type(W0) is not nn.Parameter or len(layer._parameters) != 2:  # quantized, sharded or parametrized
        return None
    single = single_plain_adapter(layer)
    if single is None:
        return None
    (adapter, s), x = single, args[0]
    # Reentrant checkpointing runs a training step without gradients first, which must draw the same dropout mask.
    if torch.is_grad_enabled() or active_dropout(adapter):
        return fused_linear(adapter, x, W0, bias, s) if can_fuse(adapter, x, layer) else None
    return add_in_place(adapter, linear(x, W0, bias), x, s) if is_plain_inference(adapter, x) else None


def single_plain_adapter(layer: nn.Module) -> tuple[LoraAdapter, float] | None:
    """Return the active adapter, and its scale times its strength, if it is the only one of the layer and nothing
    depends on its being called."""
    if len(layer._modules) != 1:
        return None
    (adapters,) = layer._modules.values()
    if type(adapters) is not AdapterDict:
        return None
    choice = adapters.state.choice
    if choice.rows is not None or len(choice.active) != 1:
        return None
    adapter = adapters._modules.get(choice.active[0])
    if type(adapter) is not LoraAdapter or is_hooked(adapters, adapter):
        return None
    strengths = choice.strengths.values
    return adapter, adapter.scale if strengths is None else adapter.scale * strengths[0]
