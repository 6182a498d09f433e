"""The weight graft: while a module's own forward runs, the weights that it reads are W0 + s B A.

For a weight that is not applied by calling its module: stacked experts, attention that hands `self.q_proj.weight` to a function,
convolutions. The *reader* is the module whose forward reads it, often the one that owns it. While a reader runs, and only then, an
entry in the owner's instance `__dict__` hides the parameter (nn.Module looks into `_parameters` only where ordinary lookup
fails): a LowRankSum. Never for longer, since FSDP and state_dict read parameters too, and must see W0.

Readers nest (torch's encoder layer and the attention in it), run again in a backward (checkpointing) and side by side in
threads: the entry stays until the last of them is done.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .adapters import Adapters, Host, LoraForward, child_name, hosts, walk
from .errors import StateError
from .graft import Graft, bare, change_class, grafted, objection
from .lowrank import factors
from .products import teach_dynamo
from .symbolic import LowRankSum

READS = "_lora_reads"  # on a reader: [(path of the owner from the reader, as parts, the parameter's name)]
_LOCK = threading.Lock()


class LoraReader(Graft):
    """The weight graft of one reader."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        opened: list[tuple[nn.Module, str]] = []
        try:
            for path, name in self.__dict__[READS]:
                owner = _owner(self, path)
                if _open(owner, name):
                    opened.append((owner, name))
            return type(self)._lora_base.forward(self, *args, **kwargs)
        finally:
            for owner, name in opened:
                _close(owner, name)


def value(host: Host, siblings: list[Adapters]) -> LowRankSum | None:
    """W0 + s B A of all adapters that are on, for one weight (`siblings`: itself, or its slices); None if none is on."""
    routing, kind = host.adapters.routing, host.adapters.kind
    if routing.rows is not None and any(name in a for name in routing.rows for a in siblings):
        raise StateError(
            f"rows(...): the weight {host.adapters.parameter!r} of a {bare(type(host.module)).__name__} is read by the model's own code, which may"
            " see the batch in any order",
            way_out="inject the adapters without it: exclude=[...]",
        )
    W0 = host.weight
    rest = tuple(W0.shape[kind.stacked + 1 :])
    found = tuple(low(factors, kind.transposed, rest) for a in siblings for low in ([] if routing.rows is not None else a.on))
    return LowRankSum(W0, found, host.adapters.fallbacks) if found else None


def mount(paths: Sequence[str], module: nn.Module, adapters: Adapters, readers: Sequence[tuple[str, nn.Module]]) -> None:
    """Give a module (under all its paths) the child that holds a weight's adapters, and graft it, or the weight's readers, each with a path."""
    if adapters.kind.stacked:
        teach_dynamo()
    module._modules[child_name(adapters.parameter, adapters.label)] = adapters.train(module.training)
    for reader_path, reader in readers:
        reads = reader.__dict__.setdefault(READS, [])
        below = next(p for p in paths if reader_path in ("", p) or p.startswith(f"{reader_path}."))
        entry = (tuple(filter(None, below.removeprefix(reader_path).split("."))), adapters.parameter)
        if entry not in reads:
            reads.append(entry)
        _regraft(reader, True)
    if not readers:
        _regraft(module, True)


def unmount(model: nn.Module, gone: Sequence[Host]) -> None:
    """Take these children away again, and the grafts of modules that have nothing left to do."""
    grafted_before = grafts(model)
    for host in gone:
        del host.module._modules[child_name(host.adapters.parameter, host.adapters.label)]
    for module in grafted_before.values():
        if READS in module.__dict__:
            kept = [(path, name) for path, name in module.__dict__[READS] if _siblings(_owner(module, path), name)]
            module.__dict__[READS] = kept
            if not kept:
                del module.__dict__[READS]
                change_class(module, bare(type(module)))
        elif not any(isinstance(child, Adapters) for child in module._modules.values()):
            change_class(module, bare(type(module)))


def grafts(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that is grafted, or was before a merge, by its first path."""
    called = {id(h.module) for h in hosts(model).values() if not h.adapters.read}
    found: dict[int, tuple[str, nn.Module]] = {}
    for path, module in walk(model):
        if READS in module.__dict__ or id(module) in called:
            found.setdefault(id(module), (path, module))
    return dict(found.values())


def objections(model: nn.Module) -> list[str]:
    """Every grafted module whose class can't be changed, and why."""
    return [f"{path}: {reason}" for path, module in grafts(model).items() if (reason := objection(module)) is not None]


def set_grafts(model: nn.Module, on: bool) -> None:
    """Give all of them the grafted class, or their own."""
    for module in grafts(model).values():
        _regraft(module, on)


def _regraft(module: nn.Module, on: bool) -> None:
    cls = bare(type(module))
    change_class(module, grafted(LoraReader if READS in module.__dict__ else LoraForward, cls) if on else cls)


def _siblings(owner: nn.Module, name: str) -> list[Adapters]:
    """The adapters of one weight: on the whole of it, or on its slices."""
    return [child for child in owner._modules.values() if isinstance(child, Adapters) and child.parameter == name]


def _owner(reader: nn.Module, path: tuple[str, ...]) -> nn.Module:
    module: Any = reader
    for part in path:
        module = module._modules[part]
    return module


def _open(owner: nn.Module, name: str) -> bool:
    """Hide the parameter, if an adapter is on; whether `_close` must follow."""
    siblings = _siblings(owner, name)
    if not siblings:
        return False
    with contextlib.nullcontext() if torch.compiler.is_compiling() else _LOCK:  # a lock can't be traced
        return _enter(owner, name, siblings)


def _enter(owner: nn.Module, name: str, siblings: list[Adapters]) -> bool:
    first = siblings[0]
    if first.readers == 0:
        if (new := value(Host(owner, first), siblings)) is None:
            return False
        owner.__dict__[name] = new
        if isinstance(owner, nn.RNNBase):  # whose forward uses its own list of the parameters
            owner.__dict__["_flat_weights"] = [owner.__dict__.get(n, owner._parameters.get(n)) for n in owner._flat_weights_names]
    first.readers += 1
    return True


def _close(owner: nn.Module, name: str) -> None:
    with contextlib.nullcontext() if torch.compiler.is_compiling() else _LOCK:
        _leave(owner, name)


def _leave(owner: nn.Module, name: str) -> None:
    first = _siblings(owner, name)[0]
    first.readers -= 1
    if first.readers == 0:
        del owner.__dict__[name]
        if isinstance(owner, nn.RNNBase):
            owner.__dict__["_flat_weights"] = [owner._parameters.get(n) for n in owner._flat_weights_names]
