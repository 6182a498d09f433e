"""The value W0 + s B A that is never computed, and the one place where its formula stands.

    y = x W0^T + s (x A^T) B^T        A_RI (r, in)   B_OR (out, r)   W0 (out, in)   s = alpha / r, or alpha / sqrt(r)

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, eq. 3; the second scaling is
Kalajdzievski 2023, "rsLoRA", arXiv 2312.03732.

A and B are kept in float32 by default and cast *down* to the activations' dtype where they are used: they are small, the
activations are not, and the optimiser needs the precision.

Legend of the suffixes: R rank, I in, O out, and for embeddings V vocabulary (= in), D width (= out).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Term = Callable[["LowRank", Tensor], Tensor]


class LowRank(nn.Module):
    """One adapter on one weight: parameters A (r, in) and B (out, r), and the scale s as a 0-d float32 buffer.

    s is a buffer, since a Python float would make torch.compile build anew whenever it changes, and it follows from
    `alpha`, `r` and `scaling`, so that neither `.to(bfloat16)` nor `.to_empty()` can harm it.

    `forward(x, y)` returns y + s (x A^T) B^T in y's dtype. It is called as a module (never read around), so that hooks
    which bring weights to the right device (accelerate) or gather them (FSDP) do so for A and B as well.
    """

    def __init__(self, A: Tensor, B: Tensor, *, alpha: float, scaling: str, dropout: float, init: str, term: Term,
                 padding_idx: int | None = None) -> None:  # fmt: skip
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.r, self.alpha, self.scaling, self.dropout, self.init = A.shape[0], alpha, scaling, dropout, init
        self.term, self.padding_idx = term, padding_idx
        self.register_buffer("s", self._scale_on(A.device), persistent=False)

    @property
    def scale(self) -> float:
        """s as a Python float."""
        return scale(self.alpha, self.r, self.scaling)

    s: Tensor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.term(self, x).to(y.dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A ~ Kaiming uniform (as in loralib and PEFT) or Gaussian of deviation 1/r; B = 0, so the output is the base's."""
        if self.init == "gaussian":
            nn.init.normal_(self.A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if self.padding_idx is not None:  # the padding token keeps its vector: its column of A gets no gradient
            self.A[:, self.padding_idx] = 0
        nn.init.zeros_(self.B)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRank:
        super()._apply(fn, recurse)
        self.s = self._scale_on(self.A.device)
        return self

    def _scale_on(self, device: torch.device) -> Tensor:
        return torch.tensor(self.scale, dtype=torch.float32, device=device)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):  # else it may be the base's own checkpoint: Adapters decides
            super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"in={self.A.shape[1]}, out={self.B.shape[0]}, r={self.r}, alpha={self.alpha:g}, scale={self.scale:g}, dropout={self.dropout:g}"


def scale(alpha: float, r: int, scaling: str) -> float:
    """s = alpha / r ("standard", arXiv 2106.09685 section 4.1) or alpha / sqrt(r) ("rslora", arXiv 2312.03732)."""
    return alpha / math.sqrt(r) if scaling == "rslora" else alpha / r


def project(adapter: LowRank, x: Tensor) -> Tensor:
    """s (x A^T) B^T for x (..., in) -> (..., out), in x's dtype."""
    x = F.dropout(x, adapter.dropout, adapter.training)
    h_R = F.linear(x, adapter.A.to(x.dtype)) * adapter.s
    return F.linear(h_R, adapter.B.to(h_R.dtype))


def look_up(adapter: LowRank, ids: Tensor) -> Tensor:
    """The same for an embedding, whose x is one-hot: column `id` of A. ids (...) -> (..., width), in A's dtype.

    Dropout on a one-hot row drops or keeps its single 1, so it acts on whole tokens.
    """
    h_R = F.embedding(ids, adapter.A.t(), padding_idx=adapter.padding_idx) * adapter.s
    h_R = h_R * F.dropout(h_R.new_ones(*ids.shape, 1), adapter.dropout, adapter.training)
    return F.linear(h_R, adapter.B)


def delta(adapter: LowRank, rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows of s B A, (len(rows), in), computed in `dtype`."""
    return (adapter.B[rows].to(dtype) * adapter.scale) @ adapter.A.to(dtype)
