"""What torch's own calls take: the product of the base and those with A and B, in inference.

Nothing is looked up, hooked or cast. A library that uses torch's operators can do the same work in no less time.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorainject.lora.kernels.gemm import FEW_TOKENS, add_up_projection, compute_dtype, down_project

from .measure import Times
from .models import ALPHA, Trio, pairs

TORCH = "torch's calls alone"


class Products(nn.Linear):
    """A linear layer with one adapter, whose A and B are there in float32 and in the dtype of the weight."""

    factors: dict[torch.dtype, tuple[Tensor, Tensor]]

    def forward(self, x: Tensor) -> Tensor:
        tokens, y = x.numel() // x.shape[-1], F.linear(x, self.weight)
        A, B = self.factors[compute_dtype(y, tokens)]
        s = ALPHA / len(A)
        if tokens <= FEW_TOKENS:
            return y.add_(F.linear(F.linear(x.to(A.dtype), A), B), alpha=s)
        add_up_projection(y.view(-1, y.shape[-1]), down_project(x.view(tokens, -1), A), B, s)
        return y


def products(model: Trio) -> nn.Module:
    """Return the base of the model with the adapters of ours, by torch's calls alone."""
    result = copy.deepcopy(model.base, {id(p): p for p in model.base.parameters()})
    linears = [result.get_submodule(path) for path, m in model.ours.named_modules() if "lora" in m._modules]
    for linear, ((A, B), _) in zip(linears, pairs(model.ours, model.theirs), strict=True):
        linear.__class__ = Products
        linear.factors = {
            dtype: (A.detach().to(dtype), B.detach().to(dtype)) for dtype in (A.dtype, linear.weight.dtype)
        }
    return result


def least(times: Times) -> str:
    """Return the rho of torch's calls alone, as the table prints it."""
    return f"rho {times.rho(TORCH).value:.2f} by {TORCH}"
