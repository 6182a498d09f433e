"""Which adapters are on, for a whole model: what all its layers ask when they run.

All layers share one `Routing`, so switching is one assignment however many adapters and layers there are. While `rows(...)` is open it
holds a `Rows`: the batch, planned once for all layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from .adapter import LoraAdapter, Term
from .kernels.lora_linear import accumulate, is_watched
from .kernels.per_row import PerRowTerms

SHORT = 24  # tokens an adapter up to which two batched products for all rows are faster than two for each adapter,
SOME = 3  # and from so many adapters on


@dataclass
class AdapterState:
    """Which adapters are on: shared by all modules of one model, copied and pickled along with them (but not the context that is open).

    The state is the process's, not a thread's.
    """

    active: tuple[str, ...] = ()
    """The adapters whose terms are added, in this order."""
    rows: RowAssignment | None = None
    """While `rows(...)` is open."""
    context: str | None = None
    """The context that is open: "disabled" or "rows"."""
    merged: tuple[str, ...] = ()
    """The adapters folded into the weights; while there are any, every module has its original class."""
    before: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """For each adapter, what was on when it came: what eject goes back to."""
    root: weakref.ref[nn.Module] | None = None
    """The model that was injected. Unknown in a copy, which may be of a part."""
    loading: StateDictLoad | None = None
    """The load_state_dict that is under way, or was last."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"root": None, "loading": None, "rows": None, "context": None}


ROOTS: weakref.WeakKeyDictionary[nn.Module, AdapterState] = weakref.WeakKeyDictionary()
"""By model, where all of it was injected as a whole."""


@dataclass
class StateDictLoad:
    """One call of load_state_dict: a checkpoint with all of an adapter's keys or with none is fine, one with some is not."""

    missing: list[str]
    """torch's own list of missing keys, by which one call is told from the next."""
    absent: list[str] = field(default_factory=list)
    """Keys of A and B that the checkpoint does not have, as long as it has none at all."""
    some: bool = False
    """Whether it has any key of A or B."""


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
