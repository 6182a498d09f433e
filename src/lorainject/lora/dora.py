"""What an adapter may hold beside A and B: magnitudes m (DoRA), and an update b of the layer's bias (PEFT's lora_bias).

    W = m / |W0 + s B A| * (W0 + s B A)        bias = bias0 + s b        m, b, and the norm of each output: (out,)

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, eq. 5; as in its section 4.3 the norm is a constant to the
gradient. With the gain g = m / |W0 + s B A| the weight is g W0 + s (g B) A: the base's, times a gain, and a term of low rank.

    y = g (W0 x + s B A x) + bias
    |W0 + s B A|^2 = |W0|^2 + 2 s <B, W0 A^T> + s^2 <B, B A A^T>        by output, with W0 A^T (out, r) and A A^T (r, r): the sum is not formed

PEFT drops W0's input too while LoRA dropout is on; here, as in plain LoRA, only that of A is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics.delta import Factors
from ..numerics.tile_merge import sum_dtype
from ..numerics.tiled_matmul import row_tiles
from .adapter import LoraAdapter, delta_factors

CAST = 1 << 18  # elements that are cast at a time


class DoraAdapter(LoraAdapter):
    """An adapter with m, b or both. It is used as any other, through `adapter(function, ...)`, so who uses it need not know.

    It knows the layer that it sits on, since the norm is W0's too.
    """

    def __init__(
        self,
        layer: nn.Module,
        transposed: bool,
        m: Tensor | None,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        **settings: Any,
    ) -> None:
        super().__init__(A, B, **settings)
        self.__dict__["layer"] = layer  # not as a child, which it is not
        self.transposed = transposed
        self.m, self.b = (None if t is None else nn.Parameter(t) for t in (m, b))

    layer: nn.Module
    m: nn.Parameter | None
    """(out,), or as many as a slice has rows."""
    b: nn.Parameter | None
    """Likewise."""

    def forward(self, use: Callable[..., Any], *args: Any) -> Any:
        """The function's answer for A and B, with m and b in it: that of `factors`, or of a Term."""
        if use is delta_factors:
            return self._factors(*args)
        y, x, own = args
        done, dtype, bias = use(self, y, x, own), y.dtype, self.layer._parameters.get("bias")
        if self.m is not None:
            g = self.gain()
            done = done * g if bias is None else done * g + (1 - g) * bias
        return (done if self.b is None else done + self.update()).to(dtype)

    def gain(self) -> Tensor:
        """g (out,), in float32 or better; 1 where a slice is not. An output that is 0 throughout stays 0."""
        assert self.m is not None
        W0 = self.layer._parameters["weight"]
        assert W0 is not None
        norms = norm_by_output(W0, self.A, self._whole(self.B, 0), self.scale, self.transposed)
        if self.rows is not None:
            norms = norms[self.rows]
        return self._whole(self.m / norms.clamp(min=torch.finfo(norms.dtype).tiny), 1)

    def update(self) -> Tensor:
        """s b (out,): 0 where a slice is not."""
        assert self.b is not None
        return self._whole(self.b * self.s, 0)

    def _whole(self, part: Tensor, rest: float) -> Tensor:
        if self.rows is None:
            return part
        return part.new_full((self.out, *part.shape[1:]), rest).index_copy(0, self.rows, part)

    def _factors(self, transposed: bool, rest: tuple[int, ...]) -> Factors:
        f = delta_factors(self, transposed, rest)._replace(update=None if self.b is None else self.update())
        if self.m is None:
            return f
        g = self.gain()
        gain = g.view(-1, *[1] * len(rest)) if not transposed else g
        return f._replace(P=f.P * g.unsqueeze(-1), gain=gain) if not transposed else f._replace(Q=f.Q * g, gain=gain)

    def extra_repr(self) -> str:
        return super().extra_repr() + ", m" * (self.m is not None) + ", b" * (self.b is not None)


@torch.no_grad()
def norm_by_output(W0: Tensor, A: Tensor, B: Tensor, s: float, transposed: bool) -> Tensor:
    """|W0 + s B A| (out,) for W0 as stored; in float32 or better, to which no more than a tile of W0 is cast at a time."""
    W, dtype = W0.flatten(1), sum_dtype(W0.dtype)
    A, B = A.to(dtype), B.to(dtype)
    norms, WA = [], []
    for rows in row_tiles(W.shape[0], W.shape[1], W.device, CAST) if W.dtype != dtype else (slice(None),):
        w = W[rows].to(dtype)
        norms.append(torch.linalg.vector_norm(w, dim=0 if transposed else 1))
        WA.append(w.mT @ A[:, rows].mT if transposed else w @ A.mT)
    norm, WA_OR = (
        (torch.stack(norms).norm(dim=0), torch.stack(WA).sum(0)) if transposed else (torch.cat(norms), torch.cat(WA))
    )
    return (norm.square() + (B * (2 * s * WA_OR + s * s * (B @ (A @ A.mT)))).sum(1)).clamp(min=0).sqrt()
