"""The value W0 + s B A that is never computed, and the one place where its formula stands.

    y = x W0^T + s (x A^T) B^T        A_RI (r, in)   B_OR (out, r)   W0 (out, in)   s = alpha / r, or alpha / sqrt(r)

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, eq. 3; the second scaling is
Kalajdzievski 2023, "rsLoRA", arXiv 2312.03732. A stack of experts has one A and one B each: A (E, r, in), B (E, out, r).

A and B are kept in float32 by default and cast *down* to the activations' dtype where they are used: they are small, the
activations are not, and the optimiser needs the precision.

Legend of the suffixes: R rank, I in, O out, and for embeddings V vocabulary (= in), D width (= out).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..numerics.delta import Factors, scale
from .hooks import HookAware

Term = Callable[["LoraAdapter", Tensor, Tensor, bool], Tensor]
"""(adapter, output y, input x, whether y may be written to) -> y with the low-rank term of x added."""
Parts = tuple[tuple[slice, slice], ...]
"""Of a slice: runs of the outputs, and the rows of B that stand for them; empty for the whole weight."""


class LoraAdapter(HookAware):
    """One adapter on one weight: parameters A (*stack, r, in) and B (*stack, out, r), and the scale s as a 0-d buffer.

    s is in float32, or float64 beside such an A. It is a buffer, since a Python float would make torch.compile build anew whenever it
    changes, and it follows from `alpha`, `r` and `scaling`, so that neither `.to(bfloat16)` nor `.to_empty()` can harm it. So is `rows`
    (int64), which follows from `slices`: those of the full weight's outputs that B's rows stand for, where only a slice of a fused weight
    is adapted.

    A and B are used by calling the module, `adapter(function, ...)` -> function(adapter, ...), never read around it, so that
    hooks which bring weights to the right device (accelerate) or gather them (FSDP) do so for A and B as well.
    """

    def __init__(self, A: Tensor, B: Tensor, *, alpha: float, scaling: str, dropout: float, init: str,
                 padding_idx: int | None = None, slices: tuple[range, ...] | None = None, out: int | None = None) -> None:  # fmt: skip
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        vars(self).update(  # what is no tensor: nn.Module's way takes 10 us each
            r=A.shape[-2], alpha=alpha, scaling=scaling, dropout=dropout, init=init, padding_idx=padding_idx,
            out=B.shape[-2] if out is None else out, slices=slices, parts=_parts(slices),
        )  # fmt: skip
        self.register_buffer("s", None, persistent=False)
        self.register_buffer("rows", None, persistent=False)
        self._rebuild()

    r: int
    alpha: float
    scaling: str
    dropout: float
    init: str
    padding_idx: int | None
    out: int
    """Outputs of the whole weight."""
    slices: tuple[range, ...] | None
    s: Tensor
    scale: float
    """The same as a Python float."""
    rows: Tensor | None
    parts: Parts | None
    """The same in runs; None if it has none."""

    def forward(self, use: Callable[..., Any], *args: Any) -> Any:
        return use(self, *args)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A ~ Kaiming uniform (as in loralib and PEFT) or Gaussian of deviation 1/r; B = 0, so the output is the base's."""
        for A_RI in self.A if self.A.ndim == 3 else [self.A]:
            if self.init == "gaussian":
                nn.init.normal_(A_RI, std=1 / self.r)
            else:
                nn.init.kaiming_uniform_(A_RI, a=math.sqrt(5))
        if self.padding_idx is not None:  # the padding token keeps its vector: its column of A gets no gradient
            self.A[:, self.padding_idx] = 0
        nn.init.zeros_(self.B)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraAdapter:
        super()._apply(fn, recurse)
        self._rebuild()
        return self

    @torch.no_grad()
    def rescale(self, alpha: float, scaling: str) -> None:
        """Another s in the memory of the old one, where what was compiled looks for it."""
        vars(self).update(alpha=alpha, scaling=scaling, scale=scale(alpha, self.r, scaling))
        self.s.copy_(torch.tensor(self.scale, dtype=torch.float64))  # fill_ refuses what float32 does not hold

    def _rebuild(self) -> None:
        """What follows from Python values, on the device that A is on."""
        vars(self)["scale"] = scale(self.alpha, self.r, self.scaling)
        dtype = torch.float64 if self.A.dtype == torch.float64 else torch.float32  # float8 has no promotion
        self.s = torch.tensor(self.scale, dtype=dtype, device=self.A.device)
        if self.slices is not None:
            self.rows = torch.tensor([i for part in self.slices for i in part], device=self.A.device)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if any(
            key.startswith(prefix) for key in state_dict
        ):  # else it may be the base's own checkpoint: Adapters decides
            super()._load_from_state_dict(state_dict, prefix, *args)
            self._rebuild()  # assign=True may have brought A to another device

    def extra_repr(self) -> str:
        return f"in={self.A.shape[-1]}, out={self.B.shape[-2]}, r={self.r}, alpha={self.alpha:g}, scale={self.scale:g}, dropout={self.dropout:g}"


def _parts(slices: tuple[range, ...] | None) -> Parts | None:
    if any(part.step != 1 for part in slices or ()):
        return None
    ends = list(itertools.accumulate(map(len, slices or ())))
    return tuple(
        (slice(part.start, part.stop), slice(end - len(part), end))
        for part, end in zip(slices or (), ends, strict=True)
    )


def add_term(adapter: LoraAdapter, y: Tensor, term: Callable[[LoraAdapter, Tensor], Tensor], x: Tensor) -> Tensor:
    """y + term(x), in y's dtype; a slice's term goes to the outputs that are its rows."""
    t = term(adapter, x).to(y.dtype)
    return y + t if adapter.rows is None else y.index_add(-1, adapter.rows, t)


def lora_term(adapter: LoraAdapter, x: Tensor) -> Tensor:
    """s (x A^T) B^T for x (..., in) -> (..., out), in x's dtype."""
    x = F.dropout(x, adapter.dropout, adapter.training)
    h_R = F.linear(x, adapter.A.to(x.dtype)) * adapter.s
    return F.linear(h_R, adapter.B.to(h_R.dtype))


def embedding_term(adapter: LoraAdapter, ids: Tensor) -> Tensor:
    """The same for an embedding, whose x is one-hot: column `id` of A. ids (...) -> (..., width), in A's dtype.

    Dropout on a one-hot row drops or keeps its single 1, so it acts on whole tokens.
    """
    h_R = F.embedding(ids, adapter.A.t(), padding_idx=adapter.padding_idx) * adapter.s
    h_R = h_R * F.dropout(h_R.new_ones(*ids.shape, 1), adapter.dropout, adapter.training)
    return F.linear(h_R, adapter.B)


def add_embedding_term(adapter: LoraAdapter, y: Tensor, ids: Tensor, own: bool) -> Tensor:
    """y plus what `look_up` finds."""
    return add_term(adapter, y, embedding_term, ids)


def delta_factors(adapter: LoraAdapter, transposed: bool, rest: tuple[int, ...]) -> Factors:
    """The delta as factors in the stored orientation: rows are `out`, or `in` where the weight is stored transposed.

    `rest` is the stored shape after the rows' axis: (in,), (in, kernel, kernel), or (out,) if transposed. A slice's missing rows
    are zeros.
    """
    A: Tensor = adapter.A
    B: Tensor = adapter.B
    if adapter.rows is not None:
        B = B.new_zeros(*B.shape[:-2], adapter.out, adapter.r).index_copy(-2, adapter.rows, B)
    P, Q = (A.mT, B.mT) if transposed else (B, A)
    return Factors(P, Q.reshape(*Q.shape[:-1], *rest), adapter.s, adapter.dropout if adapter.training else 0.0)
