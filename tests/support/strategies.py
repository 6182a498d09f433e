"""Hypothesis strategies: random small module trees with every kind of layer, and random adapters for them."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorainject.lora.model_index import ModelIndex
from lorainject.targets.model_weights import ModelWeight, model_weights

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


class Attend(nn.Module):
    """Self-attention over the sequence; its weights are read by torch's own code."""

    def __init__(self, d: int, apart: bool) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(d, 1, batch_first=True, kdim=d + 1 if apart else None)
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, nn.functional.pad(x, (0, 1)) if self.apart else x, x)[0].contiguous()


class Convolve(nn.Module):
    """A convolution over the sequence, in any of the forms that keep its length."""

    def __init__(self, d: int, transposed: bool, grouped: bool, mode: str) -> None:
        super().__init__()
        groups = d if grouped else 1
        self.conv = nn.ConvTranspose1d(d, d, 3, padding=1, groups=groups) if transposed else nn.Conv1d(
            d, d, 3, padding="same", dilation=2 if mode == "zeros" else 1, groups=groups, padding_mode=mode)  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2).contiguous()


class Experts(nn.Module):
    """A stack of experts, stored either way, each token for the expert of its place."""

    def __init__(self, d: int, out: int, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.proj = nn.Parameter(torch.randn(2, d, out) if transposed else torch.randn(2, out, d))

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            torch.matmul(x[:, i::2], self.proj[i])
            if self.is_transposed
            else nn.functional.linear(x[:, i::2], self.proj[i])
            for i in range(2)
        ]
        return torch.stack(parts, 2).flatten(1, 2)


class Recur(nn.Module):
    """A recurrent layer, whose weights torch's kernel takes from a list."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.gru = nn.GRU(d, out, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0].contiguous()


LAYERS = (
    "linear",
    "no bias",
    "conv1d",
    "block",
    "attention",
    "attention apart",
    "conv",
    "conv^T",
    "grouped",
    "circular",
    "experts",
    "experts^T",
    "gru",
)


def _layer(kind: str, d: int, out: int) -> tuple[nn.Module, int]:
    """A layer and the width it puts out."""
    match kind:
        case "linear" | "no bias":
            return nn.Linear(d, out, bias=kind == "linear"), out
        case "conv1d":
            return Conv1D(out, d), out
        case "attention" | "attention apart":
            return Attend(d, kind == "attention apart"), d
        case "conv" | "conv^T" | "grouped" | "circular":
            return Convolve(d, kind == "conv^T", kind == "grouped", "circular" if kind == "circular" else "zeros"), d
        case "experts" | "experts^T":
            return Experts(d, out, kind == "experts^T"), out
        case "gru":
            return Recur(d, out), out
    return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, out), nn.Tanh()), out


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
        layer, width = _layer(draw(st.sampled_from(LAYERS)), width, draw(st.integers(1, 9)))
        layers.append(layer)
    if draw(st.booleans(), label="shared"):
        layers += [shared := nn.Linear(width, width), nn.Sequential(nn.Tanh(), shared)]
    model = nn.Sequential(OrderedDict(net=nn.Sequential(*layers))).to(draw(st.sampled_from(dtypes)))
    for p in model.parameters():
        p.requires_grad_(draw(st.booleans()))
    model.train(draw(st.booleans()))
    x = x.to(next(model.parameters()).dtype) if x.is_floating_point() else x
    able = model_weights(ModelIndex(model))
    chosen = draw(st.lists(st.sampled_from(able), min_size=1, unique=True))
    settings = {
        "targets": [target for w in chosen for target in draw(_of(w))],
        "r": draw(st.integers(1, 10)),
        "alpha": draw(st.none() | st.floats(0.25, 32)),
        "scaling": draw(st.sampled_from(["standard", "rslora"])),
        "init": draw(st.sampled_from(["kaiming", "gaussian"])),
    }
    return Case(model, x, settings)


@st.composite
def _of(draw: st.DrawFn, weight: ModelWeight) -> list[str]:
    """How to target this weight and no other: the whole, or one or two slices of its rows."""
    name, (_, out, _) = weight.names[0], weight.kind.sizes(tuple(weight.module.get_parameter(weight.parameter).shape))
    if not draw(st.sampled_from([False, False, True]), label="slices"):
        return [f"re:{re.escape(name)}"]
    first, last = sorted((draw(st.integers(0, out - 1)), draw(st.integers(1, out))))
    return [f"{name}[{first}:{last}]"] if first < last else [f"re:{re.escape(name)}"]
