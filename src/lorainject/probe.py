"""Which adapters does a real forward and backward reach? The answer to a silent no-op.

For each grafted weight W the probe asks autograd for the gradients of W itself and of B, under a random linear function of
all outputs. Where B gets none the adapter does nothing, and W's own gradient tells why: if W has one, the model reads the
weight without calling the layer; if W has none either, this forward does not use the layer at all.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import StateError, UnreachedAdapter
from .lora.adapter_dict import AdaptedSite, mounted, walk
from .lora.graft import base_class


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What a probe found, when no adapter was bypassed."""

    reached: tuple[str, ...]
    """Names of the sites whose adapters act on the output."""
    idle: tuple[str, ...] = ()
    """Experts that got no token in this forward: other inputs may reach them. One of a stack has its number: "experts.down_proj, 3"."""
    dense: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Sites for which the sum W0 + s B A had to be formed, and the torch functions that asked for it: exact, but no faster than a merge."""

    def __str__(self) -> str:
        lines = [
            f"{len(self.reached)} sites reached" + (f"; {len(self.idle)} experts got no token" if self.idle else "")
        ]
        lines += [f"{name}: the dense sum was formed for {', '.join(by)}" for name, by in self.dense.items()]
        return "\n".join(lines)


def probe(model: nn.Module, *args: Any, **inputs: Any) -> Reach:
    """Run one forward, as `model(*args, **inputs)` in the mode it is in, and one backward, and see which adapters they reach.

    Raises UnreachedAdapter with every site whose adapter does nothing, and why; StateError if no adapter is on or they are
    merged, or if the forward can't be called so. What the forward itself raises, it raises. Gradients, random state, buffers, modes
    and requires_grad flags are afterwards as before.
    """
    on = {name: host for name, host in mounted(model, "probe").items() if host.adapters.on}
    if not on:
        raise StateError("no adapter is on", way_out="activate(model, name) first")
    if offloaded := [
        name for name, host in on.items() if host.weight.is_meta or any(p.is_meta for p in host.adapters.parameters())
    ]:
        raise StateError(
            f"{offloaded[0]} lies on the meta device (offloaded), where it gets no gradient",
            way_out="probe before it is offloaded",
        )
    try:
        inspect.signature(model.forward).bind(*args, **inputs)
    except TypeError as e:
        takes = ", ".join(inspect.signature(model.forward).parameters)
        raise StateError(
            f"the model can't be called with these inputs: {e}",
            way_out=f"{base_class(type(model)).__name__}.forward takes {takes}",
        ) from None
    asked = {name: Counter(host.adapters.fallbacks) for name, host in on.items()}
    used, acting, idle = _gradients(model, on, args, inputs)
    unreached = [name for name in on if name not in acting]
    idle += [name for name in unreached if name not in used and "experts" in name.split(".")]
    if problems := [f"{name}: {_why(name in used)}" for name in unreached if name not in idle]:
        raise UnreachedAdapter(
            "these adapters do nothing in this forward:", problems, _way_out(on, used & set(unreached))
        )
    dense = {name: tuple(host.adapters.fallbacks - asked[name]) for name, host in on.items()}
    return Reach(
        reached=tuple(name for name in on if name in acting),
        idle=tuple(idle),
        dense={name: by for name, by in dense.items() if by},
    )


def _why(used: bool) -> str:
    if used:
        return "its weight acts without the layer being called: the model reads it itself, or through a tie"
    return "this forward does not use the layer, or the output does not depend on it"


def _way_out(on: Mapping[str, AdaptedSite], read: set[str]) -> str:
    around = next((name for name in on if name in read and not on[name].adapters.read), None)
    if around is None:
        return "eject, and inject without them: exclude=[...]"
    return f"eject, and inject naming the weight itself, as in targets=[{around + '.weight'!r}], or without them: exclude=[...]"


def _gradients(
    model: nn.Module, on: Mapping[str, AdaptedSite], args: tuple[Any, ...], inputs: Mapping[str, Any]
) -> tuple[set[str], set[str], list[str]]:
    """The names whose weight has a gradient, those whose adapter has one (in B, or in A where B is trained), and idle experts."""
    weights = {
        name: host.weight for name, host in on.items() if host.weight.is_floating_point()
    }  # a quantised weight has no gradient
    factors = {name: [t for a in host.adapters.on for t in a.parameters()] for name, host in on.items()}
    wanted = list(
        {id(t): t for name in on for t in (*([weights[name]] if name in weights else []), *factors[name])}.values()
    )
    with _undisturbed(model), _requiring_grad(wanted), torch.enable_grad():
        outputs = [t for t in _tensors(model(*args, **inputs)) if t.requires_grad]
        g = torch.Generator().manual_seed(0)
        loss = sum(
            ((t.float() * torch.randn(t.shape, generator=g).to(t.device)).sum() for t in outputs), torch.zeros(())
        )
        grads = torch.autograd.grad(loss, wanted, allow_unused=True) if outputs else [None] * len(wanted)
    by = {id(t): grad for t, grad in zip(wanted, grads, strict=True) if grad is not None and bool(grad.any())}
    idle = []
    for name, host in on.items():
        if host.adapters.kind.stacked and any(id(t) in by for t in factors[name]):
            lively = torch.stack([by[id(t)].flatten(1).any(1) for t in factors[name] if id(t) in by]).any(0)
            idle += [f"{name}, {e}" for e in range(len(lively)) if not lively[e]]
    used = {name for name, w in weights.items() if id(w) in by}
    return used, {name for name in on if any(id(t) in by for t in factors[name])}, idle


def _tensors(value: Any) -> Iterator[Tensor]:
    """All floating-point tensors in an output, however it is nested."""
    if isinstance(value, Tensor):
        yield from [value] if value.is_floating_point() else []
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


@contextmanager
def _requiring_grad(tensors: list[Tensor]) -> Iterator[None]:
    before = [t.requires_grad for t in tensors]
    try:
        for t in tensors:
            t.requires_grad_(True)
        yield
    finally:
        for t, required in zip(tensors, before, strict=True):
            t.requires_grad_(required)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Random state and buffers are put back: a training forward draws dropout masks and moves batch statistics."""
    buffers = [
        (module, name, b, b.clone())
        for _, module in walk(model)
        for name, b in module._buffers.items()
        if b is not None
    ]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    buffer.copy_(value)
                    module._buffers[name] = buffer
