"""The forward graft: run the base layer, then add the low-rank terms of the active adapters.

It serves modules that apply their weight when they are called: nn.Linear and its subclasses, transformers' Conv1D,
nn.Embedding, and quantized linear layers. Weights that other code reads need the weight graft (weight_graft.py).

The forward of the base layer runs as it is, unless a kernel takes the call: fused_forward computes a plain nn.Linear
with its term (kernels/fused_forward.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from .adapter_dict import AdapterDict
from .graft import Graft
from .kernels.fused_forward import fused_forward
from .kernels.terms import may_write_to_output


class LoraForward(Graft):
    """The graft of a module that applies its weight when it is called."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the base layer plus the low-rank terms of the active adapters."""
        if (output := fused_forward(self, args, kwargs)) is not None:
            return output
        y = type(self)._lora_base.forward(self, *args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))  # nn.Linear calls it `input`, Conv1D calls it `x`
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad and not y.requires_grad:
            _refuse_cut_graph(self)
        y_is_ours = may_write_to_output(self)
        for child in self._modules.values():
            if isinstance(child, AdapterDict):
                y = child(x, y, y_is_ours)
        return y


def _refuse_cut_graph(layer: nn.Module) -> None:
    """Raise StateError if a layer with active adapters is to be trained, whose base passes no gradient on."""
    for child in layer._modules.values():
        if isinstance(child, AdapterDict) and child.active:
            raise StateError(
                f"{child.site}: no gradient flows through its base layer, so that adapters before it would train on a"
                " wrong gradient",
                way_out="quantize the weights only, without dynamic activations (torchao's Int8WeightOnlyConfig); or"
                " inject into this layer alone; for inference, use torch.no_grad()",
            )
