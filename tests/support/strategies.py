"""Hypothesis strategies: random small module trees with every kind of layer, and random adapters for them."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
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
        """Return the output of the model, or of another one, for the input."""
        model = self.model if model is None else model
        x = self.x.to(next(model.parameters()).dtype) if self.x.is_floating_point() else self.x
        with torch.no_grad():
            return model(x)


class Attention(nn.Module):
    """Self-attention over the sequence, whose weights torch's own code reads.

    Args:
        separate: Keep separate projections of query, key and value instead of a fused one.
    """

    def __init__(self, d: int, separate: bool) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(d, 1, batch_first=True, kdim=d + 1 if separate else None)
        self.separate = separate

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, nn.functional.pad(x, (0, 1)) if self.separate else x, x)[0].contiguous()


class Convolution(nn.Module):
    """A convolution over the sequence, in one of the forms that keep its length."""

    def __init__(self, d: int, transposed: bool, grouped: bool, mode: str) -> None:
        super().__init__()
        groups = d if grouped else 1
        if transposed:
            self.conv = nn.ConvTranspose1d(d, d, 3, padding=1, groups=groups)
        else:
            dilation = 2 if mode == "zeros" else 1
            self.conv = nn.Conv1d(d, d, 3, padding="same", dilation=dilation, groups=groups, padding_mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2).contiguous()


class Experts(nn.Module):
    """A stack of two experts, stored (experts, out, in) or transposed. Tokens go to the experts in turn."""

    def __init__(self, d: int, out: int, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.proj = nn.Parameter(torch.randn(2, d, out) if transposed else torch.randn(2, out, d))

    def forward(self, x: Tensor) -> Tensor:
        multiply = torch.matmul if self.is_transposed else nn.functional.linear
        return torch.stack([multiply(x[:, i::2], self.proj[i]) for i in range(2)], 2).flatten(1, 2)


class Recurrence(nn.Module):
    """A recurrent layer, whose kernel takes the weights from a list."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.gru = nn.GRU(d, out, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0].contiguous()


LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": lambda d, out: nn.Linear(d, out),
    "no bias": lambda d, out: nn.Linear(d, out, bias=False),
    "conv1d": lambda d, out: Conv1D(out, d),
    "block": lambda d, out: nn.Sequential(nn.LayerNorm(d), nn.Linear(d, out), nn.Tanh()),
    "attention": lambda d, out: Attention(d, separate=False),
    "separate attention": lambda d, out: Attention(d, separate=True),
    "conv": lambda d, out: Convolution(d, transposed=False, grouped=False, mode="zeros"),
    "conv^T": lambda d, out: Convolution(d, transposed=True, grouped=False, mode="zeros"),
    "grouped": lambda d, out: Convolution(d, transposed=False, grouped=True, mode="zeros"),
    "circular": lambda d, out: Convolution(d, transposed=False, grouped=False, mode="circular"),
    "experts": lambda d, out: Experts(d, out, transposed=False),
    "experts^T": lambda d, out: Experts(d, out, transposed=True),
    "gru": lambda d, out: Recurrence(d, out),
}
"""Layers of every kind, made for inputs of the width d; those of KEEPS_WIDTH have outputs of the width d, too."""
KEEPS_WIDTH = ("attention", "separate attention", "conv", "conv^T", "grouped", "circular")


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    """Draw a tree of 1 to 6 layers, perhaps with an embedding, a layer that is used twice, and frozen parameters."""
    torch.manual_seed(draw(st.integers(0, 2**16), label="seed"))
    width = draw(st.integers(1, 9))
    layers: list[nn.Module] = []
    if draw(st.booleans(), label="embedding"):
        layers.append(nn.Embedding(11, width, padding_idx=draw(st.sampled_from([None, 0, 3]))))
        x = torch.randint(0, 11, (3, 4))
    else:
        x = torch.randn(3, 4, width)
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(list(LAYERS)))
        out = width if kind in KEEPS_WIDTH else draw(st.integers(1, 9))
        layers.append(LAYERS[kind](width, out))
        width = out
    if draw(st.booleans(), label="shared"):
        layers += [shared := nn.Linear(width, width), nn.Sequential(nn.Tanh(), shared)]
    model = nn.Sequential(OrderedDict(net=nn.Sequential(*layers))).to(draw(st.sampled_from(dtypes)))
    for p in model.parameters():
        p.requires_grad_(draw(st.booleans()))
    model.train(draw(st.booleans()))
    x = x.to(next(model.parameters()).dtype) if x.is_floating_point() else x
    weights = draw(st.lists(st.sampled_from(model_weights(ModelIndex(model))), min_size=1, unique=True))
    settings = {
        "targets": [draw(_targets(w)) for w in weights],
        "r": draw(st.integers(1, 10)),
        "alpha": draw(st.none() | st.floats(0.25, 32)),
        "scaling": draw(st.sampled_from(["standard", "rslora"])),
        "init": draw(st.sampled_from(["kaiming", "gaussian"])),
    }
    return Case(model, x, settings)


@st.composite
def _targets(draw: st.DrawFn, weight: ModelWeight) -> str:
    """Draw a target that matches this weight and no other: the whole weight, or some of its rows."""
    name, shape = weight.names[0], tuple(weight.module.get_parameter(weight.parameter).shape)
    _, out_features, _ = weight.kind.sizes(shape)
    if draw(st.sampled_from([False, False, True]), label="slices"):
        first, last = sorted((draw(st.integers(0, out_features - 1)), draw(st.integers(1, out_features))))
        if first < last:
            return f"{name}[{first}:{last}]"
    return f"re:{re.escape(name)}"
