"""The weight graft: while a module's own forward runs, the weights that it reads are W0 + s B A.

It serves weights that are not applied by calling their module: stacked experts, attention that hands
`self.q_proj.weight` to a function, convolutions. The *reader* is the module whose forward reads the weight, often the
module that owns it. While a reader runs, an entry in the owner's instance `__dict__` shadows the parameter with a lazy
weight (lazy_weight.py): nn.Module looks into `_parameters` only where ordinary attribute lookup fails. The entry is
gone when the forward returns, because FSDP and state_dict read parameters too, and must see W0.

Readers nest (torch's encoder layer and the attention in it), run again in a backward (checkpointing), and run side by
side in threads. The entry stays until the last of them has returned.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..numerics.delta import Factors, total_gain
from .active import AdapterState, Choice, choosing
from .adapter import LoraAdapter, delta_factors
from .adapter_dict import AdapterDict, child_name
from .dora import DoraAdapter
from .forward_graft import LoraForward
from .graft import Graft, base_class, change_class, graft_obstacle, grafted_class
from .lazy_weight import METADATA, LazyWeight
from .lazy_weight_ops import teach_dynamo
from .model_index import ModelIndex
from .replacement import ReplacementTensor

READS = "_lora_reads"
"""The attribute of a reader that lists what it reads: [(path from the reader to the owner, name of the parameter)]."""
_LOCK = threading.Lock()


class LoraReader(Graft):
    """The weight graft of one reader."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward while each weight that it reads is shadowed; unshadow them whatever happens."""
        if (state := _state_with_rows(self)) is not None:
            return _forward_by_rows(self, state, args, kwargs)
        shadowed: list[tuple[nn.Module, str, Any]] = []
        try:
            for path, name in self.__dict__[READS]:
                owner, user = _owner(self, path), None if torch.compiler.is_compiling() else object()
                shadowed.append((owner, name, user))  # before _shadow, so that an interrupt within it is undone
                _shadow(owner, name, user)
            return type(self)._lora_base.forward(self, *args, **kwargs)
        finally:
            while shadowed:
                _unshadow(*shadowed[-1])
                shadowed.pop()


def _state_with_rows(reader: nn.Module) -> AdapterState | None:
    """Return the adapter state if the reader is a stack of experts and `rows` is open with adapters that it carries."""
    dicts = [a for path, name in reader.__dict__[READS] for a in _adapters_on(_owner(reader, path), name)]
    if not dicts or (rows := dicts[0].state.choice.rows) is None or not all(a.kind.stacked for a in dicts):
        return None
    return dicts[0].state if any(name in a for name in rows.names if name is not None for a in dicts) else None


def _forward_by_rows(experts: nn.Module, state: AdapterState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Run the tokens of each adapter through the experts by themselves, which treat each token alone.

    Raises StateError if the inputs are not certain to be the batch's tokens in their order. They are if they have the
    shape (rows * tokens, in), or have the batch on an axis of its own, and if there is an integer input (rows * tokens,
    k) with the experts that each token chose. Without it, tokens may have been sorted or repeated (Llama 4).
    """
    rows, tensors = state.choice.rows, [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    assert rows is not None
    batch, n, axes = len(rows.names), len(tensors[0]), tensors[0].ndim - 1
    has_choices = any(not t.is_floating_point() and t.ndim == 2 for t in tensors)
    in_order = n % batch == 0 if axes == 1 else n == batch and (tensors[0].shape[1] != batch or batch == 1)
    if not has_choices or not in_order or any(len(t) != n for t in tensors):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise StateError(
            f"rows(...) names {batch} rows, but a {base_class(type(experts)).__name__} with adapters got inputs of the"
            f" shapes {shapes}, which are not certain to be the tokens of these rows in their order",
            way_out="give one name per row of the batch, or inject the adapters without its weights: exclude=[...]",
        )

    def select(value: Any, tokens: slice) -> Any:
        return value[tokens] if isinstance(value, Tensor) else value

    outputs = []
    for name, run in rows.runs:
        tokens = slice(run.start * n // batch, run.stop * n // batch)
        selected = {key: select(value, tokens) for key, value in kwargs.items()}
        with choosing([state], Choice(() if name is None else (name,)), "rows"):
            outputs.append(experts.forward(*(select(value, tokens) for value in args), **selected))
    return torch.cat(outputs)


class ReadFromOutside(Graft):
    """Mixin of an output head's graft: what other code reads as its weight is the sum W0 + s B A.

    Fused losses (TRL, liger-kernel, cut-cross-entropy) multiply by the head's weight instead of calling the head. Their
    code is often a forward that is stored on the model after inject, and a kernel that takes plain tensors only. A read
    of the weight or bias therefore returns the dense sum if it happens while some module is called, and is not the
    head's own: in a training forward as a node of the graph, so that A and B get their gradients. It takes memory of
    the weight's size. All other reads return the parameter, as those of FSDP, accelerate and state dicts must.
    """

    def __getattr__(self, name: str) -> Any:
        """Return the parameter, or what a forward that reads it must multiply by."""
        value = super().__getattr__(name)
        if name not in ("weight", "bias") or type(value) is not nn.Parameter or value.is_meta:  # quantized, sharded
            return value
        if torch.compiler.is_compiling() or (reader := _reading_forward(self)) is None:
            return value
        shadow = ShadowedWeight(self, "weight")
        return shadow.dense(reader) if name == "weight" else shadow.updated_bias(value)


def _reading_forward(head: nn.Module) -> str | None:
    """Return the name of the function that reads a parameter of the head right now, if the sum must be read.

    That is: a module is being called, which is not the head running its base's forward; the reader is none of the
    libraries that move parameters; and it does not just ask for the dtype or device.
    """
    reader = sys._getframe(2)
    if str(reader.f_globals.get("__name__")).startswith(("torch.", "accelerate.")):
        return None
    if _next_attribute(reader.f_code, reader.f_lasti) in ("dtype", "device", "shape", "ndim", *METADATA):
        return None
    frame: FrameType | None = reader
    while frame is not None:
        if frame.f_code in _GRAFTED_FORWARDS and frame.f_locals.get("self") is head:
            return None
        if frame.f_code is _MODULE_CALL:
            return reader.f_code.co_name
        frame = frame.f_back
    return None


@functools.cache
def _next_attribute(code: CodeType, offset: int) -> str | None:
    """Return the attribute that code looks up on the result of the instruction at this offset, as `dtype` in
    head.weight.dtype; None if it does something else with the result."""
    after = next((i for i in dis.get_instructions(code) if i.offset > offset and i.opname != "EXTENDED_ARG"), None)
    return str(after.argval) if after is not None and after.opname in ("LOAD_ATTR", "LOAD_METHOD") else None


class LoraHead(ReadFromOutside, LoraForward):
    """The forward graft of an output head."""


class LoraHeadReader(ReadFromOutside, LoraReader):
    """The weight graft of an output head, for one whose weight was named as the target."""


_GRAFTED_FORWARDS = (LoraForward.forward.__code__, LoraReader.forward.__code__)
_MODULE_CALL = nn.Module._call_impl.__code__


class ShadowedWeight(LazyWeight):
    """The lazy weight that shadows a parameter: W0 + s B A of the adapters that are active when the weight is used.

    Args:
        owner: The module that owns the parameter.
        name: The name of the parameter.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner, self.name = owner, name
        self.adapters = _adapters_on(owner, name)
        self.kind, self.fallbacks = self.adapters[0].kind, self.adapters[0].fallbacks
        self.stack = int(self.kind.stacked)
        self.previous = owner.__dict__.get(name)
        self.users: set[Any] = set()
        self.tracing_users = 0
        all_adapters = [adapter for a in self.adapters for adapter in a.children()]
        self.has_extras = any(isinstance(adapter, DoraAdapter | ReplacementTensor) for adapter in all_adapters)

    previous: Any
    """What the owner's `__dict__` held under this name: a replica of DataParallel keeps its parameters there."""
    users: set[Any]
    """The forwards that are reading the weight now."""
    tracing_users: int
    """The number of further ones under torch.compile, which cannot be interrupted."""
    has_extras: bool
    """True if any adapter on the weight holds more than A and B."""

    @property
    def stored(self) -> Tensor:
        """The parameter, wherever accelerate or FSDP have put it by now."""
        return self.owner._parameters[self.name] if self.previous is None else self.previous  # type: ignore[return-value]

    @property
    def W0(self) -> Tensor:  # type: ignore[override]
        """The parameter or its replacement. With DoRA it is multiplied by the gain, which takes memory of the weight's
        size."""
        W0 = self.stored
        if self.has_extras:
            gain = total_gain(self.factors)
            for adapter in self.active:
                if isinstance(adapter, ReplacementTensor):
                    W0 = adapter(ReplacementTensor.replace, W0)
            W0 = W0 if gain is None else (W0 * gain).to(W0.dtype)
        return W0

    def updated_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return the layer's bias with the updates of the active adapters."""
        for adapter in self.active if self.has_extras else ():
            if isinstance(adapter, DoraAdapter) and adapter.b is not None:
                update = adapter.bias_update().to(self.stored.dtype)
                bias = update if bias is None else bias + update
        return bias

    @property
    def active(self) -> list[LoraAdapter]:
        """The active adapters of the weight."""
        choice = self.adapters[0].state.choice
        if choice.rows is not None:
            if any(name in a for name in choice.rows.names if name is not None for a in self.adapters):
                raise StateError(
                    f"rows(...): the weight {self.name!r} of a {base_class(type(self.owner)).__name__} is read by the"
                    " model's own code, which may see the batch in any order",
                    way_out="inject the adapters without it: exclude=[...]",
                )
            return []
        return [adapter for a in self.adapters for adapter in a.active]

    @property
    def factors(self) -> tuple[Factors, ...]:  # type: ignore[override]
        """The factors of the active adapters that have A and B."""
        rest = tuple(self.stored.shape[self.stack + 1 :])
        adapters = [adapter for adapter in self.active if not isinstance(adapter, ReplacementTensor)]
        return tuple(adapter(delta_factors, self.kind.transposed, rest) for adapter in adapters)


def mount(
    paths: Sequence[str], module: nn.Module, adapters: AdapterDict, readers: Sequence[tuple[str, nn.Module]]
) -> None:
    """Attach the adapters of a weight to the module that owns it, and graft the module, or the readers of the weight.

    Args:
        paths: All paths of the module.
        module: The module that owns the weight.
        adapters: The adapters. They may be attached already, in which case only the readers are new.
        readers: The modules whose code reads the weight, with their paths. Empty for a weight that is applied by
            calling
            its module.
    """
    if adapters.kind.stacked:
        teach_dynamo()
    child = child_name(adapters.parameter, adapters.label)
    if child not in module._modules:
        vars(adapters)["training"] = module.training  # train() takes 5 us per module
        module._modules[child] = adapters
        adapters.state.members[adapters.site] = weakref.ref(adapters)
    # A module that reads one of its weights reads all of them: its grafted forward is LoraReader's.
    if READS in module.__dict__ or any(reader is module for _, reader in readers):
        readers = list(dict.fromkeys([*readers, (paths[0], module)]))
        adapters.is_read = True
        for other in module._modules.values():
            if isinstance(other, AdapterDict) and not other.is_read and other is not adapters:
                mount(paths, module, other, [(paths[0], module)])
    adapters.is_read = adapters.is_read or bool(readers)
    for reader_path, reader in readers:
        reads = reader.__dict__.setdefault(READS, [])
        owner_path = next(p for p in paths if reader_path in ("", p) or p.startswith(f"{reader_path}."))
        entry = (tuple(filter(None, owner_path.removeprefix(reader_path).split("."))), adapters.parameter)
        if entry not in reads:
            reads.append(entry)
        _set_class(reader, True)
    if not readers:
        _set_class(module, True)


def mount_all(
    modules: Mapping[str, nn.Module], paths: Sequence[str], adapters: AdapterDict, readers: Sequence[str]
) -> None:
    """Call `mount` for each module that owns a weight: one, or several that are tied.

    Args:
        modules: The modules of the model by path.
        paths: The paths of all modules that own the weight.
        adapters: The adapters of the weight.
        readers: The paths of the modules whose code reads the weight.
    """
    owners = list(dict.fromkeys(modules[path] for path in paths))
    if len(owners) > 1 and any(READS in owner.__dict__ for owner in owners):
        readers = [*readers, *paths]
    for owner in owners:
        own = [path for path in paths if modules[path] is owner]
        around = [r for r in readers if any(r in ("", path) or path.startswith(f"{r}.") for path in own)]
        mount(own, owner, adapters, [(path, modules[path]) for path in around])


def unmount(index: ModelIndex, names: Sequence[str]) -> None:
    """Take the AdapterDicts of these sites off the model, and the grafts of modules that have nothing left to do.

    The AdapterDicts go last: where an interrupt leaves one, the next eject finds it and finishes.
    """
    leaving = {id(index.sites[name].adapters) for name in names}

    def any_stays(adapters: Iterable[AdapterDict]) -> bool:
        return any(id(a) not in leaving for a in adapters)

    for module in grafted_modules(index).values():
        if READS in module.__dict__:
            reads = module.__dict__[READS]
            remaining = [(path, name) for path, name in reads if any_stays(_adapters_on(_owner(module, path), name))]
            if remaining:
                module.__dict__[READS] = remaining
            else:
                change_class(module, base_class(type(module)))
                del module.__dict__[READS]
        elif not any_stays(child for child in module._modules.values() if isinstance(child, AdapterDict)):
            change_class(module, base_class(type(module)))
    for name in names:
        site = index.sites.pop(name)
        for module in site.modules:
            _remove_stale_shadows(module)
            del module._modules[child_name(site.adapters.parameter, site.adapters.label)]
        site.adapters.state.members.pop(site.adapters.site, None)


def grafted_modules(index: ModelIndex) -> dict[str, nn.Module]:
    """Return every module that is grafted, or was before a merge, by its first path."""
    called = {id(m) for site in index.sites.values() if not site.adapters.is_read for m in site.modules}
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
        for module in site.modules:
            _remove_stale_shadows(module)
    for module in grafted_modules(index).values():
        _set_class(module, on)


def _set_class(module: nn.Module, grafted: bool) -> None:
    cls = base_class(type(module))
    is_head = any(isinstance(child, AdapterDict) and child.is_head for child in module._modules.values())
    if READS in module.__dict__:
        mixin: type[Graft] = LoraHeadReader if is_head else LoraReader
    else:
        mixin = LoraHead if is_head else LoraForward
    change_class(module, grafted_class(mixin, cls) if grafted else cls)


def _adapters_on(owner: nn.Module, name: str) -> list[AdapterDict]:
    """Return the adapters of one weight: those on the whole weight, or those on each of its slices."""
    return [child for child in owner._modules.values() if isinstance(child, AdapterDict) and child.parameter == name]


def _owner(reader: nn.Module, path: tuple[str, ...]) -> nn.Module:
    """Return the module at a path below the reader. Parts of the path may be compiled."""
    module: Any = reader
    for part in path:
        module = module._modules.get("_orig_mod", module)._modules[part]
    return module._modules.get("_orig_mod", module)


def _lock() -> contextlib.AbstractContextManager[Any]:
    """Return the lock over shadows; under torch.compile, which cannot trace a lock, a context that does nothing."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _LOCK


def _shadow(owner: nn.Module, name: str, user: Any) -> None:
    """Shadow a parameter for one user; None stands for a user under torch.compile."""
    if not _adapters_on(owner, name):
        return
    with _lock():
        shadow = owner.__dict__.get(name)
        if not isinstance(shadow, ShadowedWeight):
            shadow = owner.__dict__[name] = ShadowedWeight(owner, name)
            _update_flat_weights(owner)
        if user is None:
            shadow.tracing_users += 1
        else:
            shadow.users.add(user)


def _unshadow(owner: nn.Module, name: str, user: Any) -> None:
    """End one user's use of a shadow, and remove the shadow with its last user. May be called twice for one user."""
    with _lock():
        shadow = owner.__dict__.get(name)
        if isinstance(shadow, ShadowedWeight):
            if user is None:
                shadow.tracing_users -= 1
            else:
                shadow.users.discard(user)
            if not shadow.users and not shadow.tracing_users:
                _remove_shadow(owner, name, shadow)


def _remove_shadow(owner: nn.Module, name: str, shadow: ShadowedWeight) -> None:
    if shadow.previous is None:
        del owner.__dict__[name]
    else:
        owner.__dict__[name] = shadow.previous
    _update_flat_weights(owner)


def _update_flat_weights(owner: nn.Module) -> None:
    """Update the list of parameters that the forward of a recurrent layer reads instead of its attributes."""
    if isinstance(owner, nn.RNNBase):
        weights = [owner.__dict__.get(name, owner._parameters.get(name)) for name in owner._flat_weights_names]
        owner.__dict__["_flat_weights"] = weights


def _remove_stale_shadows(owner: nn.Module) -> None:
    """Remove shadows that a forward has left because it was interrupted while it removed them."""
    for name, shadow in list(owner.__dict__.items()):
        if isinstance(shadow, ShadowedWeight):
            _remove_shadow(owner, name, shadow)
