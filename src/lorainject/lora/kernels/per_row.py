"""One adapter a row: the low-rank terms of a whole batch in two batched products, however many adapters there are.

    y_LTO += (x_LTI A_LRI^T) (s B^T)_LRO

The batch goes in lanes: some rows with the same adapter, whose A and B lie one behind the other, copied once for as long as the batch has these
adapters; lower ranks are filled up with zeros, and so are the rows of the base. In few tokens a row that takes about as long as one product of them
all, where a product for each adapter would be a call each.

Legend: N rows of the batch, L lanes, T tokens of a row or a lane, I in, O out, R the highest rank.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import StateError
from ..adapter import LoraAdapter, Term
from ..hooks import HOOKED
from .gemm import computed_in
from .lora_linear import accumulate, is_shareable, is_watched

SHORT = 24  # tokens an adapter up to which two batched products for all rows are faster than two for each adapter,
SOME = 3  # and from so many adapters on
State = tuple[Tensor, Tensor, int, int, int, int]


class RowAssignment:
    """A batch whose row i (axis 0) uses the adapter names[i], or the base where that is None."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.used = tuple(dict.fromkeys(name for name in names if name is not None))
        self.runs: list[tuple[str | None, slice]] = []
        for name, group in groupby(range(len(names)), key=self.names.__getitem__):
            rows = list(group)
            self.runs.append((name, slice(rows[0], rows[-1] + 1)))
        self.places: list[tuple[str, slice | Tensor]] = []
        for name in self.used:
            own = [rows for other, rows in self.runs if other == name]
            self.places.append(
                (name, own[0] if len(own) == 1 else torch.tensor([i for i, other in enumerate(names) if other == name]))
            )
        self.batched: dict[int, PerRowTerms] = {}

    names: tuple[str | None, ...]
    used: tuple[str, ...]
    """The adapters among them."""
    runs: list[tuple[str | None, slice]]
    """Rows one after the other with the same adapter; the base's among them."""
    places: list[tuple[str, slice | Tensor]]
    """All rows of each adapter: a run, or their numbers."""
    batched: dict[int, PerRowTerms]
    """By layer: its adapters, row by row. They go with the context."""

    def add(self, lows: Mapping[str | None, LoraAdapter], term: Term, y: Tensor, x: Tensor, own: bool) -> Tensor:
        """y (batch, tokens, ..., out) with each adapter's term of x on its own rows. `lows` are those of one layer, by name."""
        used = [name for name in self.used if name in lows]
        if not used:
            return y
        self._check(lows, y, x)
        if len(self.runs) == 1:  # one adapter for all
            return lows[self.names[0]](term, y, x, own)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            sizes = [rows.stop - rows.start for _, rows in self.runs]
            parts = zip(self.runs, y.split(sizes), x.split(sizes), strict=True)
            return torch.cat(
                [lows[name](term, part, its, False) if name in lows else part for (name, _), part, its in parts]
            )
        y = y if own and y.is_contiguous() else y.clone(memory_format=torch.contiguous_format)
        if term is accumulate and (batched := self._batched(lows, used, y, x)) is not None:
            return batched.add(y, x)
        for name, rows in self.places:
            if name in lows:
                part = y[rows]  # a copy, unless they are a run
                found = lows[name](term, part, x[rows], True)
                if isinstance(rows, Tensor) or found.data_ptr() != part.data_ptr():
                    y[rows] = found
        return y

    def _batched(
        self, lows: Mapping[str | None, LoraAdapter], names: Sequence[str], y: Tensor, x: Tensor
    ) -> PerRowTerms | None:
        """Of this layer, as its A and B are now; None if they can't be taken together, or are as fast one by one."""
        short = len(names) >= SOME and y.shape[:-1].numel() <= SHORT * len(names)
        if not short or is_watched(y) or torch.is_autocast_enabled(y.device.type):
            return None
        used = [lows[name] for name in names]
        if (found := self.batched.get(id(lows))) is None or not found.holds(used):
            rows = tuple(names.index(name) if name in names else None for name in self.names)
            if not PerRowTerms.can_hold(used, rows, y, x):
                return None
            found = self.batched[id(lows)] = PerRowTerms(used, rows, y)
        return found

    def _check(self, lows: Mapping[str | None, LoraAdapter], y: Tensor, x: Tensor) -> None:
        """Axis 0 must be the batch for certain: an input without a sequence axis may be tokens in any order (experts), and one whose axis 1
        is as long may be transposed. Raises StateError where it is not."""
        batch, axes = len(self.names), y.shape[:-1]
        if len(axes) < 2 or axes[0] != batch or axes[1] == batch > 1:
            raise StateError(
                f"rows(...) names {batch} rows, but a module with the adapters {', '.join(map(repr, lows))} got an input of shape"
                f" {tuple(x.shape)}, whose first axis is not for certain these rows",
                way_out="give one name per row of the batch, pad a batch that is as long as it has rows, and exclude modules"
                " that see the batch in another layout (pooled, flattened, transposed); with beams name each row num_beams times",
            )


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
