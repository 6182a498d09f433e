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
import threading
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..numerics.delta import Factors, Strength, scaled, total_gain
from .active import AdapterState, choose, choosing
from .adapter import LoraAdapter, factors_at
from .adapter_dict import AdapterDict
from .dora import DoraAdapter
from .graft import Graft, base_class
from .lazy_weight import LazyWeight
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
                owner, user = owner_of(self, path), None if torch.compiler.is_compiling() else object()
                shadowed.append((owner, name, user))  # before _shadow, so that an interrupt within it is undone
                _shadow(owner, name, user)
            return type(self)._lora_base.forward(self, *args, **kwargs)
        finally:
            while shadowed:
                _unshadow(*shadowed[-1])
                shadowed.pop()


def _state_with_rows(reader: nn.Module) -> AdapterState | None:
    """Return the adapter state if the reader is a stack of experts and `rows` is open with adapters that it carries."""
    dicts = [a for path, name in reader.__dict__[READS] for a in adapters_on(owner_of(reader, path), name)]
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
        with choosing([state], choose({} if name is None else {name: rows.strengths[run.start]}), "rows"):
            outputs.append(experts.forward(*(select(value, tokens) for value in args), **selected))
    return torch.cat(outputs)


class ShadowedWeight(LazyWeight):
    """The lazy weight that shadows a parameter: W0 + s B A of the adapters that are active when the weight is used.

    Args:
        owner: The module that owns the parameter.
        name: The name of the parameter.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner, self.name = owner, name
        self.adapters = adapters_on(owner, name)
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
            for adapter, strength in self.active:
                if isinstance(adapter, ReplacementTensor):
                    W0 = adapter(ReplacementTensor.replace, W0, strength)
            W0 = W0 if gain is None else (W0 * gain).to(W0.dtype)
        return W0

    def updated_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return the layer's bias with the updates of the active adapters."""
        for adapter, strength in self.active if self.has_extras else ():
            if isinstance(adapter, DoraAdapter) and adapter.b is not None:
                update = scaled(adapter.bias_update(), strength).to(self.stored.dtype)
                bias = update if bias is None else bias + update
        return bias

    @property
    def active(self) -> list[tuple[LoraAdapter, Strength]]:
        """The active adapters of the weight, each with its strength."""
        choice = self.adapters[0].state.choice
        if choice.rows is not None:
            if any(name in a for name in choice.rows.names if name is not None for a in self.adapters):
                raise StateError(
                    f"rows(...): the weight {self.name!r} of a {base_class(type(self.owner)).__name__} is read by the"
                    " model's own code, which may see the batch in any order",
                    way_out="inject the adapters without it: exclude=[...]",
                )
            return []
        return [active for a in self.adapters for active in a.active]

    @property
    def factors(self) -> tuple[Factors, ...]:  # type: ignore[override]
        """The factors of the active adapters that have A and B."""
        rest = tuple(self.stored.shape[self.stack + 1 :])
        return tuple(
            factors_at(adapter, strength, self.kind.transposed, rest)
            for adapter, strength in self.active
            if not isinstance(adapter, ReplacementTensor)
        )


def adapters_on(owner: nn.Module, name: str) -> list[AdapterDict]:
    """Return the adapters of one weight: those on the whole weight, or those on each of its slices."""
    return [child for child in owner._modules.values() if isinstance(child, AdapterDict) and child.parameter == name]


def owner_of(reader: nn.Module, path: tuple[str, ...]) -> nn.Module:
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
    if not adapters_on(owner, name):
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


def remove_stale_shadows(owner: nn.Module) -> None:
    """Remove shadows that a forward has left because it was interrupted while it removed them."""
    for name, shadow in list(owner.__dict__.items()):
        if isinstance(shadow, ShadowedWeight):
            _remove_shadow(owner, name, shadow)
