"""Which adapters of a model are active or merged: one state that all its layers share.

All modules of a model refer to one `AdapterState`, so that switching is one assignment, however many adapters and
layers there are. While `rows(...)` is open, the state holds the assignment of rows to adapters (kernels/per_row.py),
which is planned once for all layers.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .kernels.per_row import RowAssignment


@dataclass
class AdapterState:
    """Which adapters of a model are active and merged.

    The state belongs to the process, not to a thread. It is copied and pickled along with the modules, without an open
    context.
    """

    active: tuple[str, ...] = ()
    """The adapters whose terms are added, in this order."""
    rows: RowAssignment | None = None
    """Which row uses which adapter, while `rows(...)` is open."""
    context: str | None = None
    """The context that is open: "disabled" or "rows"."""
    merged: tuple[str, ...] = ()
    """The adapters that are merged into the weights. While there are any, every module has its original class."""
    before: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """For every adapter on the model, which adapters were active when it was added. `eject` activates them again."""
    root: weakref.ref[nn.Module] | None = None
    """The model that was injected. None in a copy, which may be a copy of a part."""
    loading: StateDictLoad | None = None
    """The latest call of load_state_dict."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"root": None, "loading": None, "rows": None, "context": None}


ROOTS: weakref.WeakKeyDictionary[nn.Module, AdapterState] = weakref.WeakKeyDictionary()
"""The state of every model that was injected as a whole."""


@dataclass
class StateDictLoad:
    """One call of load_state_dict. A checkpoint may have all keys of an adapter or none, but not some of them."""

    missing_keys: list[str]
    """torch's own list of missing keys, by whose identity one call is told from the next."""
    absent: list[str] = field(default_factory=list)
    """Keys of adapters that the checkpoint does not have, as long as it has none at all."""
    has_adapter_keys: bool = False
    """True once a key of an adapter was found."""
