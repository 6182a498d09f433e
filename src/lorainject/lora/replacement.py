"""A tensor that stands in the place of a base tensor, or of some of its rows, while its adapter is active.

Files of PEFT hold such tensors: trained heads (modules_to_save), biases (bias="all"), and token vectors
(trainable_token_indices). No value of the base is overwritten. The weight graft (weight_graft.py) lets a forward read
the replacement instead of the base tensor, so switching takes no time. Rows alone are copied into the rest of W0 at
each use, which takes memory of the weight's size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics.delta import Factors, Strength
from .adapter import LoraAdapter, delta_factors
from .guards import remove_requirement, require_usable
from .strength import mixed
from .weight_kinds import Kind


class ReplacementTensor(LoraAdapter):
    """An adapter without A and B, which replaces a tensor of the base.

    Args:
        value: The replacement, in the dtype of its file. Shape `shape`, or (len(ids), *shape[1:]) if `ids` is given.
        shape: The shape of the base tensor.
        ids: The rows of the base tensor that are replaced. None for the whole tensor.
        is_tied_copy: True if this is the second of two replacements with one value, made because the base tensors are
            tied.
    """

    def __init__(self, value: nn.Parameter, shape: tuple[int, ...], ids: tuple[int, ...] | None = None,
                 is_tied_copy: bool = False) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.value, self.shape, self.ids, self.is_tied_copy = value, shape, ids, is_tied_copy
        self.register_buffer("index", None, persistent=False)
        self._rebuild()

    index: Tensor | None
    """`ids` as int64. None for the whole tensor."""

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return the factors with the replacement in them, or function(self, *args)."""
        require_usable(self, self.site, args)
        return self._factors(*args) if function is delta_factors else function(self, *args)

    def replace(self, W0: Tensor, strength: Strength = None) -> Tensor:
        """Return what stands in the place of W0, in W0's dtype."""
        return replace_rows(W0, self.value, self.index, strength)

    def _factors(self, transposed: bool, rest: tuple[int, ...]) -> Factors:
        P, Q = self.value.new_zeros(self.shape[0], 0), self.value.new_zeros(0, *(rest or (1,)))
        return Factors(P, Q, torch.ones((), device=P.device), value=(self.value, self.index, None))

    def _rebuild(self) -> None:
        if self.ids is not None:
            self.index = torch.tensor(self.ids, device=self.value.device)

    @torch.no_grad()
    def reset_parameters(self, weight: Tensor, kind: Kind) -> None:
        """Take the values of the base."""
        self.value.copy_(weight if self.index is None else weight[self.index])
        remove_requirement(self)

    def extra_repr(self) -> str:
        rows = "" if self.ids is None else f", rows={len(self.ids)} of {self.shape[0]}"
        return f"value={tuple(self.value.shape)}{rows}"


def replace_rows(W0: Tensor, value: Tensor, index: Tensor | None, strength: Strength = None) -> Tensor:
    """Return `value` in W0's dtype, or a copy of W0 with the rows `index` taken from `value`.

    At another strength t than 1, W0 + t (value - W0) takes the place of `value`.
    """
    if strength is not None:
        replaced = W0 if index is None else W0[index]
        value = mixed(replaced, value.to(torch.promote_types(W0.dtype, torch.float32)), strength)
    value = value.to(W0.dtype)
    return value if index is None else W0.index_copy(0, index, value)
