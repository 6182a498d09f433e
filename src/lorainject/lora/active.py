"""Which adapters are on, for a whole model: what all its layers ask when they run.

All layers share one `Routing`, so switching is one assignment however many adapters and layers there are. While `rows(...)` is open it
holds a `Rows`: the batch, planned once for all layers.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .kernels.per_row import RowAssignment


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
