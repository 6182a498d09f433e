"""Hypothesis strategies: random small module trees with every kind of layer, and random adapters for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Case:
    """A random model, an input for it, and the arguments for inject."""

    model: nn.Module
    x: Tensor
    settings: dict[str, Any] = field(default_factory=dict)

    def output(self, model: nn.Module | None = None) -> Tensor:
        model = self.model if model is None else model
        x = self.x.to(next(model.parameters()).dtype) if self.x.is_floating_point() else self.x
        with torch.no_grad():
            return model(x)


def _layer(kind: str, d: int, out: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(d, out)
    if kind == "no bias":
        return nn.Linear(d, out, bias=False)
    if kind == "conv1d":
        return Conv1D(out, d)
    return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, out), nn.Tanh())


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    """A tree of 1 to 6 layers, perhaps with an embedding in front, a layer that is used twice, and frozen parameters."""
    torch.manual_seed(draw(st.integers(0, 2**16), label="seed"))
    width = draw(st.integers(1, 9))
    layers: list[nn.Module] = []
    if draw(st.booleans(), label="embedding"):
        layers.append(nn.Embedding(11, width, padding_idx=draw(st.sampled_from([None, 0, 3]))))
        x = torch.randint(0, 11, (3, 4))
    else:
        x = torch.randn(3, 4, width)
    for _ in range(draw(st.integers(1, 5))):
        out = draw(st.integers(1, 9))
        layers.append(_layer(draw(st.sampled_from(["linear", "no bias", "conv1d", "block"])), width, out))
        width = out
    if draw(st.booleans(), label="shared"):
        layers += [shared := nn.Linear(width, width), nn.Sequential(nn.Tanh(), shared)]
    model = nn.Sequential(*layers).to(draw(st.sampled_from(dtypes)))
    for p in model.parameters():
        p.requires_grad_(draw(st.booleans()))
    model.train(draw(st.booleans()))
    x = x.to(next(model.parameters()).dtype) if x.is_floating_point() else x
    able = [path for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding | Conv1D)]
    settings = {
        "targets": draw(st.lists(st.sampled_from(able), min_size=1, unique=True)),
        "r": draw(st.integers(1, 10)),
        "alpha": draw(st.none() | st.floats(0.25, 32)),
        "scaling": draw(st.sampled_from(["standard", "rslora"])),
        "init": draw(st.sampled_from(["kaiming", "gaussian"])),
    }
    settings["targets"] = [f"re:{path.replace('.', chr(92) + '.')}" for path in settings["targets"]]  # exactly these
    return Case(model, x, settings)
