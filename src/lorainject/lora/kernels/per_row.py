"""One adapter a row: the low-rank terms of a whole batch in two batched products, however many adapters there are.

    y_LTO += (x_LTI A_LRI^T) (s B^T)_LRO

The batch goes in lanes: some rows with the same adapter, whose A and B lie one behind the other, copied once for as long as the batch has these
adapters; lower ranks are filled up with zeros, and so are the rows of the base. In few tokens a row that takes about as long as one product of them
all, where a product for each adapter would be a call each.

Legend: N rows of the batch, L lanes, T tokens of a row or a lane, I in, O out, R the highest rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..adapter import LoraAdapter
from ..hooks import HOOKED
from .gemm import computed_in
from .lora_linear import is_shareable

State = tuple[Tensor, Tensor, int, int, int, int]


class Lanes(NamedTuple):
    """A batch in lanes of equally many rows."""

    of: tuple[int | None, ...]
    """Which adapter each lane has; None: the base."""
    moves: tuple[Tensor, Tensor] | None = None
    """The rows of all lanes, one behind the other (a lane that is not full has its first row again), and where among them each row of the batch
    is. None: they are as in the batch."""


@functools.lru_cache(maxsize=64)
def lanes(rows: tuple[int | None, ...], device: torch.device) -> Lanes:
    """Of a batch whose row i has this adapter: a lane for each row, unless lanes of the mean length need half as many A and B or fewer."""
    own: dict[int | None, list[int]] = {}
    for n, i in enumerate(rows):
        own.setdefault(i, []).append(n)
    length = -(-len(rows) // len(own))
    found = [(i, at[k : k + length]) for i, at in own.items() for k in range(0, len(at), length)]
    if 2 * len(found) > len(rows):
        return Lanes(rows)
    of, order = tuple(i for i, _ in found), [n for _, lane in found for n in lane + lane[:1] * (length - len(lane))]
    if order == list(range(len(rows))):
        return Lanes(of)
    back = [order.index(n) for n in range(len(rows))]
    return Lanes(of, (torch.tensor(order, device=device), torch.tensor(back, device=device)))


class PerRowTerms:
    """The adapters of one layer, row by row."""

    def __init__(self, used: Sequence[LoraAdapter], rows: tuple[int | None, ...], y: Tensor) -> None:
        """`used` are the adapters themselves, `rows` says which of them each row has, None the base."""
        self.made_of, dtype = [_state(low) for low in used], computed_in(y, 1)
        A, B = [A for A, *_ in self.made_of], [B.t() for _, B, *_ in self.made_of]
        ranks, scales = [low.r for low in used], [low.scale for low in used]
        if len(set(ranks)) > 1:
            A, B = (
                [pad(t, (0, 0, 0, max(ranks) - r)) for t, r in zip(factors, ranks, strict=True)] for factors in (A, B)
            )
        of, self.moves = lanes(rows, y.device)
        s = torch.tensor(
            [0.0 if i is None else scales[i] for i in of],
            dtype=torch.promote_types(dtype, torch.float32),
            device=y.device,
        )
        self.A_LRI = torch.stack([A[i or 0] for i in of]).to(dtype)
        self.B_LRO = (torch.stack([B[i or 0] for i in of]) * s.view(-1, 1, 1)).to(dtype)
        self.parts = used[0].parts or ((slice(None), slice(None)),)

    @staticmethod
    def can_hold(used: Sequence[LoraAdapter], rows: tuple[int | None, ...], y: Tensor, x: Tensor) -> bool:
        """Whether these may be used so: all stand for the same outputs, and the copies are no larger than the base's own weight."""
        parts, ins, outs = used[0].parts, x.shape[-1], y.shape[-1]
        fits = len(lanes(rows, y.device).of) * max(low.r for low in used) * (ins + outs) <= ins * outs
        return fits and all(is_shareable(low, y.device) and low.parts == parts for low in used)

    def holds(self, used: Sequence[LoraAdapter]) -> bool:
        """Whether it is still what these are."""
        return len(used) == len(self.made_of) and all(map(_is_still, used, self.made_of))

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y (batch, ..., out), contiguous, with each row's term of x (batch, ..., in) added, in y's memory."""
        batch, (many, _, ins), outs = len(y), self.A_LRI.shape, y.shape[-1]
        if self.moves is not None:
            x = x.reshape(batch, -1, ins).index_select(0, self.moves[0])
        h_LTR = torch.bmm(x.reshape(many, -1, ins).to(self.A_LRI.dtype), self.A_LRI.mT)
        for columns, rows in self.parts:
            B_LRO = self.B_LRO[..., rows]
            if self.moves is not None:
                term = torch.bmm(h_LTR, B_LRO).view(len(x), -1, B_LRO.shape[-1]).index_select(0, self.moves[1])
                y.view(batch, -1, outs)[..., columns].add_(term)
            elif y.dtype == h_LTR.dtype:
                y.view(many, -1, outs)[..., columns].baddbmm_(h_LTR, B_LRO)
            else:
                y.view(many, -1, outs)[..., columns].add_(torch.bmm(h_LTR, B_LRO))
        return y


def _state(low: LoraAdapter) -> State:
    A, B = low._parameters["A"], low._parameters["B"]
    assert A is not None
    assert B is not None
    return A, B, A._version, B._version, A.data_ptr(), B.data_ptr()


def _is_still(low: LoraAdapter, state: State) -> bool:
    """Whether nobody has replaced, moved or written to A and B, or wants to be asked before they are used."""
    of, (A, B, *rest) = low.__dict__, state
    factors = of["_parameters"]
    return (factors["A"] is A and factors["B"] is B and rest == [A._version, B._version, A.data_ptr(), B.data_ptr()]
            and HOOKED not in of and "forward" not in of and not (of["training"] and of["dropout"]))  # fmt: skip
