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
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..numerics.delta import Factors, total_gain
from .active import AdapterState
from .adapter import LoraAdapter, delta_factors
from .adapter_dict import AdapterDict, child_name
from .dora import DoraAdapter
from .forward_graft import LoraForward
from .graft import Graft, base_class, change_class, graft_obstacle, grafted_class
from .lazy_weight import LazyWeight
from .lazy_weight_ops import teach_dynamo
from .model_index import ModelIndex
from .replacement import ReplacementTensor

READS = "_lora_reads"  # on a reader: [(path of the owner from the reader, as parts, the parameter's name)]
_LOCK = threading.Lock()


class LoraReader(Graft):
    """The weight graft of one reader."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward; around it each weight that it reads is hidden, and shown again whatever happens."""
        if (state := _routed(self)) is not None:
            return _by_rows(self, state, args, kwargs)
        opened: list[tuple[nn.Module, str, Any]] = []
        try:
            for path, name in self.__dict__[READS]:
                owner, me = _owner(self, path), None if torch.compiler.is_compiling() else object()
                opened.append((owner, name, me))  # before it is opened: an interrupt must find it here
                _open(owner, name, me)
            return type(self)._lora_base.forward(self, *args, **kwargs)
        finally:
            while opened:
                _close(*opened[-1])
                opened.pop()


def _routed(reader: nn.Module) -> AdapterState | None:
    """The routing, if the reader is a stack of experts in whose batch each row has an adapter of its own."""
    found = [a for path, name in reader.__dict__[READS] for a in _siblings(_owner(reader, path), name)]
    if not found or (rows := found[0].state.rows) is None or not all(a.kind.stacked for a in found):
        return None
    return found[0].state if any(name in a for name in rows.names if name is not None for a in found) else None


def _by_rows(experts: nn.Module, state: AdapterState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Experts treat each token by itself, so each adapter's tokens go through them on their own.

    Raises StateError if the inputs are not for certain the batch's tokens in their order: (rows * tokens, in), or with the batch on an axis of
    its own, and beside it the experts that each token chose, (rows * tokens, k). Without these they may be sorted or repeated (Llama 4).
    """
    rows, tensors = state.rows, [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    assert rows is not None
    batch, n, axes = len(rows.names), len(tensors[0]), tensors[0].ndim - 1
    chosen = [t for t in tensors if not t.is_floating_point() and t.ndim == 2]
    in_order = n % batch == 0 if axes == 1 else n == batch and (tensors[0].shape[1] != batch or batch == 1)
    if not chosen or not in_order or any(len(t) != n for t in tensors):
        raise StateError(
            f"rows(...) names {batch} rows, but a {base_class(type(experts)).__name__} with adapters got inputs of the shapes"
            f" {', '.join(str(tuple(t.shape)) for t in tensors)}, which are not for certain these rows' tokens in their order",
            way_out="give one name per row of the batch, or inject the adapters without its weights: exclude=[...]",
        )

    def part(value: Any, tokens: slice) -> Any:
        return value[tokens] if isinstance(value, Tensor) else value

    found, before = [], state.active
    try:
        state.rows = None
        for name, run in rows.runs:
            tokens = slice(run.start * n // batch, run.stop * n // batch)
            state.active = () if name is None else (name,)
            found.append(
                experts.forward(*(part(a, tokens) for a in args), **{key: part(v, tokens) for key, v in kwargs.items()})
            )
    finally:
        state.rows, state.active = rows, before
    return torch.cat(found)


class ShadowedWeight(LazyWeight):
    """What hides a parameter: W0 + s B A of the adapters that are on *when it is used*, in any thread and grad mode."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner, self.name = owner, name
        self.adapters = _siblings(owner, name)
        self.kind, self.fallbacks = self.adapters[0].kind, self.adapters[0].fallbacks
        self.stack = int(self.kind.stacked)
        self.under = owner.__dict__.get(name)  # a replica of DataParallel has its parameters there
        self.users: set[Any] = set()
        self.traced = 0
        self.payload = any(
            isinstance(low, DoraAdapter | ReplacementTensor) for a in self.adapters for low in a.children()
        )

    users: set[Any]
    """The forwards that read it now."""
    traced: int
    """And how many while torch.compile traces, where no interrupt can come in between."""

    payload: bool
    """Whether any adapter on it has more than A and B."""

    @property
    def stored(self) -> Tensor:
        """The parameter, wherever accelerate or FSDP have put it by now."""
        return self.owner._parameters[self.name] if self.under is None else self.under  # type: ignore[return-value]

    @property
    def W0(self) -> Tensor:  # type: ignore[override]
        """The parameter, or what replaces it; with DoRA times its gain, which takes the weight's size while it is used."""
        W0 = self.stored
        if self.payload:
            c = total_gain(self.factors)
            for low in self.on:
                W0 = low(ReplacementTensor.of, W0) if isinstance(low, ReplacementTensor) else W0
            W0 = W0 if c is None else (W0 * c).to(W0.dtype)
        return W0

    def biased(self, bias: Tensor | None) -> Tensor | None:
        """The layer's bias, with the updates of the adapters that are on."""
        for low in self.on if self.payload else ():
            if isinstance(low, DoraAdapter) and low.b is not None:
                update = low.update().to(self.stored.dtype)
                bias = update if bias is None else bias + update
        return bias

    @property
    def on(self) -> list[LoraAdapter]:
        """The adapters that are on."""
        state = self.adapters[0].state
        if state.rows is not None:
            if any(name in a for name in state.rows.names if name is not None for a in self.adapters):
                raise StateError(
                    f"rows(...): the weight {self.name!r} of a {base_class(type(self.owner)).__name__} is read by the model's own code, which may"
                    " see the batch in any order",
                    way_out="inject the adapters without it: exclude=[...]",
                )
            return []
        return [low for a in self.adapters for low in a.active]

    @property
    def factors(self) -> tuple[Factors, ...]:  # type: ignore[override]
        """Of these, as far as they have A and B."""
        rest = tuple(self.stored.shape[self.stack + 1 :])
        return tuple(
            low(delta_factors, self.kind.transposed, rest) for low in self.on if not isinstance(low, ReplacementTensor)
        )


def mount(
    paths: Sequence[str], module: nn.Module, adapters: AdapterDict, readers: Sequence[tuple[str, nn.Module]]
) -> None:
    """Give a module (under all its paths) the child that holds a weight's adapters, and graft it, or the weight's readers, each with a path.

    A weight that has adapters already may get further readers.
    """
    if adapters.kind.stacked:
        teach_dynamo()
    if child_name(adapters.parameter, adapters.label) not in module._modules:
        vars(adapters)["training"] = module.training  # not by train(), which takes 5 us
        module._modules[child_name(adapters.parameter, adapters.label)] = adapters
    if READS in module.__dict__ or any(
        reader is module for _, reader in readers
    ):  # a module that reads a weight of its own reads all
        readers = list(dict.fromkeys([*readers, (paths[0], module)]))
        adapters.read = True
        for other in module._modules.values():
            if isinstance(other, AdapterDict) and not other.read and other is not adapters:
                mount(paths, module, other, [(paths[0], module)])
    adapters.read = adapters.read or bool(readers)
    for reader_path, reader in readers:
        reads = reader.__dict__.setdefault(READS, [])
        below = next(p for p in paths if reader_path in ("", p) or p.startswith(f"{reader_path}."))
        entry = (tuple(filter(None, below.removeprefix(reader_path).split("."))), adapters.parameter)
        if entry not in reads:
            reads.append(entry)
        _regraft(reader, True)
    if not readers:
        _regraft(module, True)


def unmount(index: ModelIndex, names: Sequence[str]) -> None:
    """Take the AdapterDicts of these sites off the model, and the grafts of modules that have nothing left to do.

    The AdapterDicts go last: where an interrupt leaves one, the next eject finds it and finishes.
    """
    leaving = {id(index.sites[name].adapters) for name in names}

    def stay(adapters: Iterable[AdapterDict]) -> bool:
        return any(id(a) not in leaving for a in adapters)

    for module in grafted_modules(index).values():
        if READS in module.__dict__:
            reads = module.__dict__[READS]
            reads_left = [(path, name) for path, name in reads if stay(_siblings(_owner(module, path), name))]
            if not reads_left:
                change_class(module, base_class(type(module)))
                del module.__dict__[READS]
            else:
                module.__dict__[READS] = reads_left
        elif not stay(child for child in module._modules.values() if isinstance(child, AdapterDict)):
            change_class(module, base_class(type(module)))
    for name in names:
        site = index.sites.pop(name)
        _forget(site.module)
        del site.module._modules[child_name(site.adapters.parameter, site.adapters.label)]


def grafted_modules(index: ModelIndex) -> dict[str, nn.Module]:
    """Return every module that is grafted, or was before a merge, by its first path."""
    called = {id(site.module) for site in index.sites.values() if not site.adapters.read}
    grafted: dict[int, tuple[str, nn.Module]] = {}
    for path, module in index.walked:
        if READS in module.__dict__ or id(module) in called:
            grafted.setdefault(id(module), (path, module))
    return dict(grafted.values())


def graft_obstacles(index: ModelIndex) -> list[str]:
    """Return one line for every grafted module whose class cannot be changed, with the reason."""
    reasons = {path: graft_obstacle(module) for path, module in grafted_modules(index).items()}
    return [f"{path}: {reason}" for path, reason in reasons.items() if reason is not None]


def set_grafted(index: ModelIndex, on: bool) -> None:
    """Give every grafted module the grafted class, or, if not `on`, the class that it had before."""
    for site in index.sites.values():
        _forget(site.module)
    for module in grafted_modules(index).values():
        _regraft(module, on)


def _regraft(module: nn.Module, on: bool) -> None:
    cls = base_class(type(module))
    change_class(module, grafted_class(LoraReader if READS in module.__dict__ else LoraForward, cls) if on else cls)


def _siblings(owner: nn.Module, name: str) -> list[AdapterDict]:
    """The adapters of one weight: on the whole of it, or on its slices."""
    return [child for child in owner._modules.values() if isinstance(child, AdapterDict) and child.parameter == name]


def _owner(reader: nn.Module, path: tuple[str, ...]) -> nn.Module:
    module: Any = reader
    for part in path:
        module = module._modules.get("_orig_mod", module)._modules[part]  # a part may be compiled
    return module._modules.get("_orig_mod", module)


def _open(owner: nn.Module, name: str, me: Any) -> None:
    """Hide the parameter, for `me` too."""
    if not _siblings(owner, name):
        return
    with contextlib.nullcontext() if torch.compiler.is_compiling() else _LOCK:  # a lock can't be traced
        hidden = owner.__dict__.get(name)
        if not isinstance(hidden, ShadowedWeight):
            hidden = owner.__dict__[name] = ShadowedWeight(owner, name)
            _tell_kernel(owner)
        if me is None:
            hidden.traced += 1
        else:
            hidden.users.add(me)


def _close(owner: nn.Module, name: str, me: Any) -> None:
    """Done with it; the last one shows the parameter again. May be called twice."""
    with contextlib.nullcontext() if torch.compiler.is_compiling() else _LOCK:
        hidden = owner.__dict__.get(name)
        if isinstance(hidden, ShadowedWeight):
            if me is None:
                hidden.traced -= 1
            else:
                hidden.users.discard(me)
            if not hidden.users and not hidden.traced:
                _show(owner, name, hidden)


def _show(owner: nn.Module, name: str, hidden: ShadowedWeight) -> None:
    if hidden.under is None:
        del owner.__dict__[name]
    else:
        owner.__dict__[name] = hidden.under
    _tell_kernel(owner)


def _tell_kernel(owner: nn.Module) -> None:
    """A recurrent layer's forward uses its own list of the parameters."""
    if isinstance(owner, nn.RNNBase):
        owner.__dict__["_flat_weights"] = [
            owner.__dict__.get(n, owner._parameters.get(n)) for n in owner._flat_weights_names
        ]


def _forget(owner: nn.Module) -> None:
    """Show what a forward that was interrupted while it cleaned up has left hidden."""
    for name, hidden in list(owner.__dict__.items()):
        if isinstance(hidden, ShadowedWeight):
            _show(owner, name, hidden)
