"""What torch's own calls take: the base's product and two with A and B, by the kernels that are the fastest here, in inference.

Nothing is asked, hooked or cast: a library can do the same work, and what it needs beside it, in no less by torch's operators.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorainject.lora.kernels.gemm import applied

from .measure import Times
from .models import ALPHA, Trio, pairs

TORCH = "torch's calls alone"


class Products(nn.Linear):
    """A linear with one adapter. A and B are there in float32 and in the weight's dtype."""

    factors: tuple[Tensor, Tensor]
    cast: tuple[Tensor, Tensor]

    def forward(self, x: Tensor) -> Tensor:
        tokens, s = x.numel() // x.shape[-1], ALPHA / len(self.factors[0])
        if tokens > (16 if x.dtype == torch.float32 else 64):
            A, B = self.cast
            return applied(x, self.weight, None, torch.mm(A, x.view(tokens, -1).t()), B, s)
        y, (A, B) = F.linear(x, self.weight), self.factors
        if tokens > 1:
            return y.add_(F.linear(F.linear(x.float(), A), B), alpha=s)
        h_R = torch.mv(A, x.view(-1).float())
        if x.dtype != torch.float32:
            return y.add_(torch.mv(B, h_R), alpha=s)
        y.view(-1).addmv_(B, h_R, alpha=s)
        return y


def products(model: Trio) -> nn.Module:
    """The base with the adapters of ours, by torch's calls alone."""
    found = copy.deepcopy(model.base, {id(p): p for p in model.base.parameters()})
    linears = [found.get_submodule(path) for path, m in model.ours.named_modules() if "lora" in m._modules]
    for linear, (AB, _) in zip(linears, pairs(model.ours, model.theirs), strict=True):
        linear.__class__ = Products
        linear.factors = tuple(t.detach() for t in AB)
        linear.cast = tuple(t.to(linear.weight.dtype) for t in linear.factors)
    return found


def least(times: Times) -> str:
    """Their rho."""
    return f"rho {times.rho(TORCH).value:.2f} by {TORCH}"
