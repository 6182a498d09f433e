"""An adapter whose initial product B0 A0 is not zero, and is subtracted again.

    W = W0 + s (B A - B0 A0)

So training starts from W0 as it is, which PEFT's PiSSA and OLoRA overwrite with W0 - s B0 A0: this rounds W0, and makes
every file depend on the changed base. Here A0 and B0 are an adapter of their own, which never trains. Its term is
computed in the same way as that of A and B, so that the two cancel to the bit at the start.

Whatever needs the delta as a whole (merge, files, weights that other code reads) gets one of rank 2 r, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics.delta import Factors, Strength, scaled
from .adapter import LoraAdapter, add_term, delta_factors
from .guards import require_usable
from .weight_kinds import Kind


class OffsetAdapter(LoraAdapter):
    """An adapter with the update s (B A - B0 A0).

    Args:
        A0: Shaped like A. None if A and B are not drawn yet (`reset_parameters`).
        B0: Shaped like B. None if A0 is None.
        A: As for LoraAdapter.
        B: As for LoraAdapter.
        settings: The other arguments of LoraAdapter.
    """

    def __init__(self, A0: Tensor | None, B0: Tensor | None, A: Tensor, B: Tensor, **settings: Any) -> None:
        super().__init__(A, B, **settings)
        A0, B0 = (A.clone(), B.clone()) if A0 is None or B0 is None else (A0, B0)
        self.start = LoraAdapter(A0, B0, **settings).requires_grad_(False)

    start: LoraAdapter
    """A0 and B0."""

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return y plus the difference of the two terms; or the factors of the whole delta."""
        require_usable(self, self.site, args)
        if function is delta_factors:
            return self._factors(*args)
        y, x, _, strength = args
        x = F.dropout(x, self.dropout, self.training)  # one mask for both terms
        return add_term(self, y, lambda _, x, t: _term(self, x, t) - _term(self.start, x, t), x, strength)

    def _factors(self, transposed: bool, rest: tuple[int, ...]) -> Factors:
        f, f0 = (delta_factors(adapter, transposed, rest) for adapter in (self, self.start))
        stacked = f.P.ndim - 2
        return f._replace(P=torch.cat([f.P, -f0.P], -1), Q=torch.cat([f.Q, f0.Q], stacked))

    @property
    def joined(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole update, of rank 2 r, with the same scale."""
        return torch.cat([self.A, self.start.A], -2), torch.cat([self.B, -self.start.B], -1)

    def rescale(self, alpha: float, scaling: str) -> None:
        """Change the scale of A and B, and of A0 and B0."""
        super().rescale(alpha, scaling)
        self.start.rescale(alpha, scaling)

    @torch.no_grad()
    def reset_parameters(self, weight: Tensor, kind: Kind) -> None:
        """Draw A and B, and keep them as A0 and B0 as well."""
        super().reset_parameters(weight, kind)
        self.start.A.copy_(self.A)
        self.start.B.copy_(self.B)


def _term(adapter: LoraAdapter, x: Tensor, strength: Strength) -> Tensor:
    """Return t s (x A^T) B^T in the dtype of x, without dropout, always by the same operations."""
    h_R = F.linear(x, adapter.A.to(x.dtype)) * scaled(adapter.s, strength)
    return F.linear(h_R, adapter.B.to(h_R.dtype))
