"""What an adapter may hold besides A and B: magnitudes m (DoRA), and an update b of the layer's bias (PEFT's
lora_bias).

    W = m / |W0 + s B A| * (W0 + s B A)        bias = bias0 + s b        m, b, and the norm per output: (out_features,)

With the gain g = m / |W0 + s B A| the weight is g W0 + s (g B) A: the base weight times a gain, plus a term of low
rank.

    y = g (W0 x + s B A x) + bias
    |W0 + s B A|^2 = |W0|^2 + 2 s <B, W0 A^T> + s^2 <B, B A A^T>        per output

The norm needs W0 A^T, shape (out_features, r), and A A^T, shape (r, r), but not the sum W0 + s B A.

LoRA dropout acts on the input of A alone, as it does without magnitudes. PEFT drops elements of W0's input, too.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, equation 5. As in its section
4.3, the norm is a constant to the gradient.
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
from .guards import require_usable
from .strength import mixed
from .weight_kinds import Kind

BIAS_KINDS = ("linear", "linear^T", "conv")
"""The kinds of weights whose layer can have a bias update."""
DORA_KINDS = (*BIAS_KINDS, "embedding")
"""The kinds of weights that can have magnitudes."""
CAST_SIZE = 1 << 18
"""Number of elements of a half-precision W0 that are cast to float32 at once."""


class DoraAdapter(LoraAdapter):
    """An adapter with magnitudes, an update of the bias, or both.

    It is used like any other adapter, by `adapter(function, *args)`, so that callers need not know of m and b.

    Args:
        layer: The layer that the adapter is on: the norm depends on W0.
        transposed: True if the layer's weight is stored as (in, out).
        m: Magnitudes, shape (out_features,), or one per row of a slice. None for an adapter without them.
        b: Update of the bias, shaped like m. None for an adapter without one.
        A: As for LoraAdapter.
        B: As for LoraAdapter.
        settings: The other arguments of LoraAdapter.
    """

    def __init__(self, layer: nn.Module, transposed: bool, m: Tensor | None, b: Tensor | None, A: Tensor, B: Tensor,
                 **settings: Any) -> None:  # fmt: skip
        super().__init__(A, B, **settings)
        self.__dict__["layer"] = layer  # nn.Module would register the layer as a child of its own adapter
        self.transposed = transposed
        self.m, self.b = (None if t is None else nn.Parameter(t) for t in (m, b))

    layer: nn.Module
    m: nn.Parameter | None
    b: nn.Parameter | None

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return what `function`, which is `delta_factors` or a Term, returns for A and B, with m and b included."""
        require_usable(self, self.site, args)
        if function is delta_factors:
            return self._factors(*args)
        y, x, y_is_ours, strength = args
        dtype, bias = y.dtype, self.layer._parameters.get("bias")
        output = function(self, y, x, y_is_ours and strength is None, None)
        if self.m is not None:
            g = self.gain()
            output = output * g if bias is None else output * g + (1 - g) * bias
        output = output if self.b is None else output + self.bias_update()
        return mixed(y, output, strength).to(dtype)

    @torch.no_grad()
    def reset_parameters(self, weight: Tensor, kind: Kind) -> None:
        """Draw A, set B and b to zero, and m to the norms of W0, so that the gain is 1."""
        super().reset_parameters(weight, kind)
        if self.m is not None:
            self.m.copy_(self._norms(weight))
        if self.b is not None:
            self.b.zero_()

    def _norms(self, weight: Tensor) -> Tensor:
        """Return |W0 + s B A| per output; for a slice, those of its rows."""
        norms = output_norms(weight, self.A, self._expand(self.B, 0), self.scale, self.transposed)
        return norms if self.rows is None else norms[self.rows]

    def gain(self) -> Tensor:
        """Return g, shape (out_features,), in float32 or wider; 1 outside a slice. An output whose weights are all 0
        stays 0."""
        assert self.m is not None
        W0 = self.layer._parameters["weight"]
        assert W0 is not None
        norms = self._norms(W0)
        return self._expand(self.m / norms.clamp(min=torch.finfo(norms.dtype).tiny), 1)

    def bias_update(self) -> Tensor:
        """Return s b, shape (out_features,); 0 outside a slice."""
        assert self.b is not None
        return self._expand(self.b * self.s, 0)

    def _expand(self, values: Tensor, fill: float) -> Tensor:
        """Return values of a slice as values of the whole weight, with `fill` outside the slice."""
        if self.rows is None:
            return values
        return values.new_full((self.out, *values.shape[1:]), fill).index_copy(0, self.rows, values)

    def _factors(self, transposed: bool, rest: tuple[int, ...]) -> Factors:
        f = delta_factors(self, transposed, rest)._replace(update=None if self.b is None else self.bias_update())
        if self.m is None:
            return f
        g = self.gain()
        if transposed:
            return f._replace(Q=f.Q * g, gain=g)
        return f._replace(P=f.P * g.unsqueeze(-1), gain=g.view(-1, *[1] * len(rest)))

    def extra_repr(self) -> str:
        return super().extra_repr() + ", m" * (self.m is not None) + ", b" * (self.b is not None)


@torch.no_grad()
def output_norms(W0: Tensor, A: Tensor, B: Tensor, s: float, transposed: bool) -> Tensor:
    """Return |W0 + s B A| per output, shape (out_features,), in float32 or wider.

    Args:
        W0: The weight as stored: (out, *rest), or (in, out) if `transposed`. A tile of it at most is cast at once.
        A: Shape (r, in_features).
        B: Shape (out_features, r).
        s: The scale.
        transposed: True if the weight is stored as (in, out).
    """
    W, dtype = W0.flatten(1), sum_dtype(W0.dtype)
    A, B = A.to(dtype), B.to(dtype)
    tile_norms, tile_products = [], []
    for rows in row_tiles(W.shape[0], W.shape[1], W.device, CAST_SIZE) if W.dtype != dtype else (slice(None),):
        w = W[rows].to(dtype)
        tile_norms.append(torch.linalg.vector_norm(w, dim=0 if transposed else 1))
        tile_products.append(w.mT @ A[:, rows].mT if transposed else w @ A.mT)
    if transposed:
        norm, WA_OR = torch.stack(tile_norms).norm(dim=0), torch.stack(tile_products).sum(0)
    else:
        norm, WA_OR = torch.cat(tile_norms), torch.cat(tile_products)
    cross_terms = (B * (2 * s * WA_OR + s * s * (B @ (A @ A.mT)))).sum(1)
    return (norm.square() + cross_terms).clamp(min=0).sqrt()
