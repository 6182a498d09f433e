"""Adapter H (Houlsby et al. 2019) and Adapter L (Lin et al. 2020): layers that are added to a GPT-2 and stay there.

    y + up(relu(down(y)))        down: (d, m)    up: (m, d)

Adapter H has one behind attention and one behind the MLP of each block; Adapter L one behind the MLP, on a LayerNorm of
y. They run in hooks, so that the model's classes stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AdapterLayer(nn.Module):
    """A bottleneck with a residual connection.

    Args:
        width: d.
        bottleneck: m.
        norm: Normalize the input of the bottleneck.
    """

    def __init__(self, width: int, bottleneck: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else None
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, y: Tensor) -> Tensor:
        """Return y plus what the bottleneck adds, shape (..., width)."""
        x = y if self.norm is None else self.norm(y)
        return y + self.up(F.relu(self.down(x)))


def add_adapter_layers(model: Any, method: str, bottleneck: int) -> list[nn.Parameter]:
    """Add the layers of "H" or "L" to a GPT-2, and return their parameters.

    Their output is y at first, because `up` is zero.
    """
    added = []
    for block in model.h:
        for module in (block.attn, block.mlp) if method == "H" else (block.mlp,):
            device = next(module.parameters()).device
            with torch.device(device):
                layer = AdapterLayer(model.config.n_embd, bottleneck, norm=method == "L")
            module.register_forward_hook(_through(layer))
            added += list(layer.parameters())
    return added


def _through(layer: AdapterLayer) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return (layer(output[0]), *output[1:]) if isinstance(output, tuple) else layer(output)

    return hook
