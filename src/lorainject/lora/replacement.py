"""A whole tensor in place of one of the base's, or some of its rows: trained heads and biases, and trained tokens (what PEFT calls
modules_to_save, bias="all" and trainable_token_indices).

No value of the base is ever overwritten. The tensor is hidden by the weight graft (readers.py) while a forward reads it, so that what is
on decides, in every thread, and switching costs nothing. Rows alone are copied into the rest of W0 at each use, which then takes the
weight's size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics.delta import Factors
from .adapter import LoraAdapter, delta_factors


class ReplacementTensor(LoraAdapter):
    """An adapter without A and B: `value` (*shape), or with `ids` the rows (len(ids), *shape[1:]) alone. In the dtype of the file."""

    def __init__(
        self, value: nn.Parameter, shape: tuple[int, ...], ids: tuple[int, ...] | None = None, twin: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self.value, self.shape, self.ids, self.twin = value, shape, ids, twin
        self.register_buffer("index", None, persistent=False)
        self._rebuild()

    index: Tensor | None
    twin: bool
    """Whether it is there for a tied weight, with the value of another, which a file names."""

    def forward(self, use: Callable[..., Any], *args: Any) -> Any:
        return self._factors(*args) if use is delta_factors else use(self, *args)

    def of(self, W0: Tensor) -> Tensor:
        """What stands in W0's place, in its dtype."""
        return placed(W0, self.value, self.index)

    def _factors(self, transposed: bool, rest: tuple[int, ...]) -> Factors:
        P, Q = self.value.new_zeros(self.shape[0], 0), self.value.new_zeros(0, *(rest or (1,)))
        return Factors(P, Q, torch.ones((), device=P.device), value=(self.value, self.index))

    def _rebuild(self) -> None:
        if self.ids is not None:
            self.index = torch.tensor(self.ids, device=self.value.device)

    def reset_parameters(self) -> None:
        """There is nothing to draw: it comes from a file."""

    def extra_repr(self) -> str:
        return f"value={tuple(self.value.shape)}" + (
            f", rows={len(self.ids)} of {self.shape[0]}" if self.ids is not None else ""
        )


def placed(W0: Tensor, value: Tensor, index: Tensor | None) -> Tensor:
    """The value, or W0 with these rows of it."""
    value = value.to(W0.dtype)
    return value if index is None else W0.index_copy(0, index, value)
