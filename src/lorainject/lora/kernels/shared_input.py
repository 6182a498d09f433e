"""Projections that read the same input (q, k and v; gate and up; slices of one weight): one product with all their A instead of one each.

    h_SM = A_SI x_MI^T        S: the ranks of all of them together

x is read once, and in training its gradient takes one product and one sum instead of as many as there are projections.

Who may be siblings is guessed from the module tree. Whether they do read the same input is seen when they run: the product is used only for
the very tensor that it was made of, if that was not written to since. Siblings that once read different tensors are none from then on.

In training they share a node of the graph, which backward can pass once, as it can what x came from. Where x came from nothing (a leaf, or
it needs no gradient) each computes alone, so that their outputs can still have a backward of their own. So they do within gradient
checkpointing, under tracing and transforms, with dropout, and where hooks bring A and B.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from ..adapter import LoraAdapter
from .gemm import computed_in
from .lora_linear import is_shareable, is_watched, lowered

WORTH = 1 << 16  # elements of an input from which sharing it may save more than it costs


def pays(x: Tensor) -> bool:
    """Whether to share x saves more than it costs: on a GPU, and where x is cast. Else a CPU does the products of few rows one by one as fast, and in
    training the way back of each is a part of its linear layer's (accumulate.Together)."""
    return x.numel() >= WORTH and (not x.is_cpu or computed_in(x, x.shape[:-1].numel()) != x.dtype)


class Made(NamedTuple):
    """The product that the first of them has made for all."""

    of: weakref.ref[Tensor]
    version: int
    dtype: torch.dtype
    may_grad: bool
    h: Tensor | TensorWeakRef
    """(S, M); one that needs a gradient is kept by the graph alone."""
    places: Mapping[LoraAdapter, tuple[int, int]]
    """For each adapter the first of its rows, and the version of its A."""


class SharedInput:
    """The adapters of such projections."""

    def __init__(self, members: Iterable[nn.Module]) -> None:
        self.members = list(members)
        self.made: Made | None = None

    members: list[nn.Module]
    """The Adapters; the first is called first."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"made": None}

    def may_share(self, mine: nn.Module, given: Tensor) -> bool:
        """Whether a product with `given` can be one for all."""
        if not pays(given) or len(self.members) < 2 or mine not in self.members or given.is_inference():
            return False
        return not torch.is_grad_enabled() or not (
            given.is_leaf or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        )

    def lowered(
        self, mine: nn.Module, active: tuple[str, ...], y: Tensor, x: Tensor, given: Tensor
    ) -> Mapping[LoraAdapter, Tensor]:
        """A x^T (r, M) for the adapters of one of them, as far as it was made for all. `given` is what the module was called with; x is that, or
        a view of it."""
        if not self.may_share(mine, given) or is_watched(y):
            return {}
        may_grad, dtype = torch.is_grad_enabled(), computed_in(y, x.shape[:-1].numel())
        if mine is self.members[0]:
            self._make(active, y, x, given, dtype, may_grad)
        if (made := self.made) is None:
            return {}
        if made.of() is not given or made.version != given._version:
            self.members, self.made = [], None
            return {}
        h = made.h() if isinstance(made.h, TensorWeakRef) else made.h
        if h is None or (made.dtype, made.may_grad) != (dtype, may_grad):
            return {}
        found = {}
        for name in active:
            low = cast("LoraAdapter | None", mine._modules.get(name))
            if low is not None and low in made.places:
                start, version = made.places[low]
                if low.A._version == version:
                    found[low] = h.narrow(0, start, low.r)
        return found

    def _make(
        self, active: tuple[str, ...], y: Tensor, x: Tensor, given: Tensor, dtype: torch.dtype, may_grad: bool
    ) -> None:
        self.made = None
        lows = [cast(LoraAdapter, m._modules[name]) for m in self.members for name in active if name in m._modules]
        lows = [low for low in lows if is_shareable(low, y.device)]
        if len(lows) < 2:
            return
        places, end = {}, 0
        for low in lows:
            places[low] = end, low.A._version
            end += low.r
        h = lowered(x.reshape(-1, x.shape[-1]), torch.cat([low.A.to(dtype) for low in lows]))
        self.made = Made(
            weakref.ref(given, self._forget),
            given._version,
            dtype,
            may_grad,
            TensorWeakRef(h) if h.requires_grad else h,
            places,
        )

    def _forget(self, x: weakref.ref[Tensor]) -> None:
        """What was made of an input goes when that does."""
        if self.made is not None and self.made.of is x:
            self.made = None
