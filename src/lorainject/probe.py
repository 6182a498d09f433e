"""Which adapters does a real forward and backward reach? The answer to a silent no-op.

For each grafted weight W the probe asks autograd for the gradients of W itself and of B, under a random linear function of
all outputs. Where B gets none the adapter does nothing, and W's own gradient tells why: if W has one, the model reads the
weight without calling the layer; if W has none either, this forward does not use the layer at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Host, mounted, walk
from .errors import StateError, UnreachedAdapter


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What a probe found, when no adapter was bypassed."""

    reached: tuple[str, ...]
    """Paths whose adapters act on the output."""
    idle: tuple[str, ...] = ()
    """Paths of experts that got no token in this forward: other inputs may reach them."""

    def __str__(self) -> str:
        return f"{len(self.reached)} sites reached" + (f"; {len(self.idle)} experts got no token" if self.idle else "")


def probe(model: nn.Module, *args: Any, **inputs: Any) -> Reach:
    """Run one forward, as `model(*args, **inputs)` in the mode it is in, and one backward, and see which adapters they reach.

    Raises UnreachedAdapter with every site whose adapter does nothing, and why; StateError if no adapter is on or they are
    merged. Gradients, random state, buffers, modes and requires_grad flags are afterwards as before.
    """
    on = {
        path: host for path, host in mounted(model, "probe").items()
        if any(name in host.adapters for name in host.adapters.routing.active)
    }  # fmt: skip
    if not on:
        raise StateError("no adapter is on", way_out="activate(model, name) first")
    used, acting = _gradients(model, on, args, inputs)
    unreached = [path for path in on if path not in acting]
    idle = tuple(path for path in unreached if path not in used and "experts" in path.split("."))
    if problems := [f"{path}: {_why(path in used)}" for path in unreached if path not in idle]:
        raise UnreachedAdapter("these adapters do nothing in this forward:", problems, "eject, and inject without them: exclude=[...]")
    return Reach(reached=tuple(path for path in on if path in acting), idle=idle)


def _why(used: bool) -> str:
    if used:
        return "its weight acts without the layer being called: the model reads it itself, or through a tie"
    return "this forward does not use the layer, or the output does not depend on it"


def _gradients(model: nn.Module, on: Mapping[str, Host], args: tuple[Any, ...], inputs: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """The paths whose weight has a gradient, and those whose adapter has one (in B, or in A where B is trained)."""
    weights = {path: host.weight for path, host in on.items()}
    factors = {path: [a for n in host.adapters.routing.active if n in host.adapters for a in (host.adapters[n].A, host.adapters[n].B)]
               for path, host in on.items()}  # fmt: skip
    wanted = [t for path in on for t in (weights[path], *factors[path])]
    with _undisturbed(model), _requiring_grad(wanted), torch.enable_grad():
        outputs = [t for t in _tensors(model(*args, **inputs)) if t.requires_grad]
        g = torch.Generator().manual_seed(0)
        loss = sum(((t.float() * torch.randn(t.shape, generator=g).to(t.device)).sum() for t in outputs), torch.zeros(()))
        grads = torch.autograd.grad(loss, wanted, allow_unused=True) if outputs else [None] * len(wanted)
    alive = {id(t) for t, grad in zip(wanted, grads, strict=True) if grad is not None and bool(grad.any())}
    return {p for p in on if id(weights[p]) in alive}, {p for p in on if any(id(t) in alive for t in factors[p])}


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
    buffers = [(module, name, b, b.clone()) for _, module in walk(model) for name, b in module._buffers.items() if b is not None]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    buffer.copy_(value)
                    module._buffers[name] = buffer
