"""One adapter a row: the low-rank terms of a whole batch in two batched products, however many adapters there are.

    y_NTO += (x_NTI A_NRI^T) (s B^T)_NRO

A and B of each row lie one behind the other, copied once for as long as the batch has these adapters; lower ranks are filled up with zeros, and so
are the rows of the base. In few tokens a row that takes about as long as one product of them all, where a product for each row would be a call each.

Legend: N rows of the batch, T tokens a row, I in, O out, R the highest rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .accumulate import is_shareable
from .lowrank import HOOKED, LowRank
from .term import computed_in

State = tuple[Tensor, Tensor, int, int, int, int]


class Batched:
    """The adapters of one layer, row by row."""

    def __init__(self, used: Sequence[LowRank], rows: Sequence[int | None], y: Tensor) -> None:
        """`used` are the adapters themselves, `rows` says which of them each row has, None the base."""
        self.made_of, dtype = [_state(low) for low in used], computed_in(y, 1)
        A, B = [A for A, *_ in self.made_of], [B.t() for _, B, *_ in self.made_of]
        ranks, scales = [low.r for low in used], [low.scale for low in used]
        if len(set(ranks)) > 1:
            A, B = ([pad(t, (0, 0, 0, max(ranks) - r)) for t, r in zip(factors, ranks, strict=True)] for factors in (A, B))
        s = torch.tensor([0.0 if i is None else scales[i] for i in rows], dtype=torch.promote_types(dtype, torch.float32), device=y.device)
        self.A_NRI = torch.stack([A[i or 0] for i in rows]).to(dtype)
        self.B_NRO = (torch.stack([B[i or 0] for i in rows]) * s.view(-1, 1, 1)).to(dtype)
        self.parts = used[0].parts or ((slice(None), slice(None)),)

    @staticmethod
    def can_hold(used: Sequence[LowRank], rows: Sequence[int | None], y: Tensor, x: Tensor) -> bool:
        """Whether these may be used so: all stand for the same outputs, and the copies are no larger than the base's own weight."""
        parts, ins, outs = used[0].parts, x.shape[-1], y.shape[-1]
        fits = len(rows) * max(low.r for low in used) * (ins + outs) <= ins * outs
        return fits and all(is_shareable(low, y.device) and low.parts == parts for low in used)

    def holds(self, used: Sequence[LowRank]) -> bool:
        """Whether it is still what these are."""
        return len(used) == len(self.made_of) and all(map(_is_still, used, self.made_of))

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y (batch, ..., out), contiguous, with each row's term of x (batch, ..., in) added, in y's memory."""
        h_NTR = torch.bmm(x.reshape(len(self.A_NRI), -1, x.shape[-1]).to(self.A_NRI.dtype), self.A_NRI.mT)
        y_NTO = y.view(len(self.A_NRI), -1, y.shape[-1])
        for columns, rows in self.parts:
            if y.dtype == h_NTR.dtype:
                y_NTO[..., columns].baddbmm_(h_NTR, self.B_NRO[..., rows])
            else:
                y_NTO[..., columns].add_(torch.bmm(h_NTR, self.B_NRO[..., rows]))
        return y


def _state(low: LowRank) -> State:
    A, B = low._parameters["A"], low._parameters["B"]
    assert A is not None
    assert B is not None
    return A, B, A._version, B._version, A.data_ptr(), B.data_ptr()


def _is_still(low: LowRank, state: State) -> bool:
    """Whether nobody has replaced, moved or written to A and B, or wants to be asked before they are used."""
    of, (A, B, *rest) = low.__dict__, state
    factors = of["_parameters"]
    return (factors["A"] is A and factors["B"] is B and rest == [A._version, B._version, A.data_ptr(), B.data_ptr()]
            and HOOKED not in of and "forward" not in of and not (of["training"] and of["dropout"]))  # fmt: skip
