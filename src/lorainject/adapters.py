"""The adapters that sit on one module, and which of them are on.

Every grafted module has one child, `lora`: an `Adapters`, which holds a LowRank for each adapter name. Which names are on
is not the module's business: all modules of a model share one `Routing`, so switching is one assignment however many
adapters and layers there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .errors import StateError
from .lowrank import LowRank

FROZEN = "_lora_frozen"  # on each module of the base: the names of its parameters that inject froze, for eject to thaw


@dataclass
class Routing:
    """Which adapters are on: shared by all modules of one model, copied and pickled along with them."""

    active: tuple[str, ...] = ()
    """The adapters whose terms are added, in this order."""
    rows: dict[str, Tensor] | None = None
    """While `rows(...)` is open: for each adapter, the rows of the batch it serves."""
    batch: int = 0
    """While `rows(...)` is open: how many rows the batch has."""
    merged: tuple[str, ...] = ()
    """The adapters folded into the weights; while there are any, every module has its original class."""
    before: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """For each adapter, what was on when it came: what eject goes back to."""


@dataclass(frozen=True, kw_only=True)
class Folded:
    """What merge leaves on a module so that unmerge can take the fold out again, to the bit."""

    backup: Tensor | None
    """W0 as stored; None after merge(reversible=False)."""
    checksum: Tensor
    """Of the folded weight, so that unmerge knows whether somebody changed it since."""
    sample: Tensor | None
    """A few values of W0, for the fingerprint in files saved while merged."""


class Adapters(nn.Module):
    """All adapters of one module, by name; `forward(x, y)` adds the terms of those that are on to the base's output y."""

    def __init__(self, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.folded: Folded | None = None

    def __getitem__(self, name: str) -> LowRank:
        return cast(LowRank, self._modules[name])

    def __setitem__(self, name: str, adapter: LowRank) -> None:
        self._modules[name] = adapter  # not add_module, which reserves names such as "train" and "half"

    def __delitem__(self, name: str) -> None:
        del self._modules[name]

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.routing.rows is not None:
            return self._by_rows(x, y)
        for name in self.routing.active:
            if name in self._modules:
                y = self[name](x, y)
        return y

    def _by_rows(self, x: Tensor, y: Tensor) -> Tensor:
        """Each adapter on its own rows (axis 0) of the batch; rows that name no adapter keep the base's output."""
        routing = self.routing
        if x.shape[0] != routing.batch or y.shape[0] != routing.batch:
            raise StateError(
                f"rows(...) names {routing.batch} rows, but a module with adapters {tuple(self._modules)} got an input of shape"
                f" {tuple(x.shape)}, whose first axis is not these rows",
                way_out="give one name per row of the batch; exclude modules that see the batch in another layout",
            )
        for name, index in (routing.rows or {}).items():
            if name in self._modules:
                index = index.to(x.device)
                y = y.index_copy(0, index, self[name](x[index], y[index]))
        return y

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """While merged a model's state dict is the base's keys alone: its weights already hold A and B."""
        if self.routing.merged:
            return kwargs.get("destination", {})
        return super().state_dict(*args, **kwargs)


class Host(NamedTuple):
    """A module of the base that carries adapters."""

    module: nn.Module
    adapters: Adapters

    @property
    def weight(self) -> Tensor:
        """The module's weight as stored."""
        return weight_of(self.module)


def adapters_of(module: nn.Module) -> Adapters | None:
    """The adapters on this module; None if there are none."""
    child = getattr(module, "lora", None)
    return child if isinstance(child, Adapters) else None


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every path of every module of the base, a shared module under each of its paths; torch.compile's wrapper left out."""
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, Adapters | LowRank):
            yield ".".join(part for part in path.split(".") if part != "_orig_mod"), module


def hosts(model: nn.Module) -> dict[str, Host]:
    """The modules that carry adapters, each once, by the first of its paths; none, if there are none."""
    found: dict[int, tuple[str, Host]] = {}
    for path, module in walk(model):
        if (adapters := adapters_of(module)) is not None:
            found.setdefault(id(module), (path, Host(module, adapters)))
    return dict(found.values())


def require_hosts(model: nn.Module) -> dict[str, Host]:
    """The modules that carry adapters; raises StateError if none does."""
    if found := hosts(model):
        return found
    raise StateError("this model carries no adapter", way_out="inject(model, targets) or load(model, path) first")


def routings(model: nn.Module) -> list[Routing]:
    """The routings of a model: one, unless its parts were injected one by one."""
    return list({id(h.adapters.routing): h.adapters.routing for h in hosts(model).values()}.values())


def names_of(model: nn.Module) -> tuple[str, ...]:
    """The adapters on the model, in the order they came."""
    return tuple(dict.fromkeys(name for host in require_hosts(model).values() for name in host.adapters))


def require(model: nn.Module, names: tuple[str, ...]) -> None:
    """Raise StateError unless the model has all these adapters."""
    known = names_of(model)
    if unknown := [name for name in names if name not in known]:
        raise StateError(f"no adapter named {', '.join(map(repr, unknown))}", way_out=f"this model has {', '.join(map(repr, known))}")


def merged_names(model: nn.Module) -> list[str]:
    """The adapters that are folded into the weights."""
    return sorted({name for routing in routings(model) for name in routing.merged})


def require_unmerged(model: nn.Module, verb: str) -> None:
    """Raise StateError if adapters are folded into the weights: `verb` would then act on W0 + s B A, not on W0."""
    if merged := merged_names(model):
        raise StateError(f"can't {verb} while {', '.join(map(repr, merged))} is merged", way_out="unmerge(model) first")


def weight_of(module: nn.Module) -> Tensor:
    """The module's weight as stored, which for a known kind is a tensor."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def placement(module: nn.Module) -> torch.device:
    """The device on which the module computes: its weight's, or the one that accelerate brings an offloaded weight to."""
    device = weight_of(module).device
    execution = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device(execution) if device.type == "meta" and execution is not None else device
