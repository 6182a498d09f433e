"""Find out which adapters a real forward and backward reach: the answer to adapters that silently do nothing.

For each adapted weight W, `probe` asks autograd for the gradients of W and of the adapter's parameters, under a random
linear function of all outputs. Where an adapter gets no gradient it does nothing, and W's own gradient tells why: if W
has one, the model reads the weight without calling the layer; if W has none either, this forward does not use the layer
at all.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import StateError, UnreachedAdapter
from .lora.active import choose, choosing
from .lora.checkpoint_region import region_being_run
from .lora.graft import base_class
from .lora.model_index import AdaptedSite, ModelIndex
from .lora.weight_kinds import is_sharded
from .numerics.modes import in_default_modes


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What a probe found, when no adapter was bypassed."""

    reached: tuple[str, ...]
    """Names of the sites whose adapters act on the output."""
    idle: tuple[str, ...] = ()
    """Experts that got no token in this forward; other inputs may reach them. An expert of a stack has its number
    behind the name of the stack: "experts.down_proj, 3"."""
    dense: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Sites for which the sum W0 + s B A had to be formed, with the torch functions that needed it. The result is
    exact, but costs memory of the weight's size and no less time than a merge."""

    def __str__(self) -> str:
        idle = f"; {len(self.idle)} experts got no token" if self.idle else ""
        lines = [f"{len(self.reached)} sites reached{idle}"]
        lines += [f"{name}: the dense sum was formed for {', '.join(by)}" for name, by in self.dense.items()]
        return "\n".join(lines)


@in_default_modes
def probe(model: nn.Module, *args: Any, **inputs: Any) -> Reach:
    """Run one forward and one backward, and return which adapters they reach.

    The forward is `model(*args, **inputs)`, in the mode that the model is in. Gradients, random state, buffers, modes
    and requires_grad flags are afterwards as before.

    Args:
        model: A model with active adapters.
        args: Positional arguments of the forward.
        inputs: Keyword arguments of the forward.

    Raises:
        UnreachedAdapter: At least one adapter does nothing. The message names each of them, with the reason.
        StateError: No adapter is active, adapters are merged, a weight is sharded or on the meta device, a region is
            checkpointed with use_reentrant=True, or the forward does not take these arguments. Errors of the forward
            itself are passed on.
    """
    index = ModelIndex(model)
    index.require_adapters("probe")
    sites = {name: site for name, site in index.sites.items() if site.adapters.active}
    if not sites:
        raise StateError("no adapter is active", way_out="call activate(model, name) first")
    _require_gradients(sites)
    _require_arguments(model, args, inputs)
    fallbacks = {name: Counter(site.adapters.fallbacks) for name, site in sites.items()}
    gradients = _gradients(index, sites, args, inputs)
    unreached = [name for name in sites if name not in gradients.adapters]
    idle = [name for name in unreached if name not in gradients.weights and "experts" in name.split(".")]
    if bypassed := [name for name in unreached if name not in idle]:
        raise UnreachedAdapter(
            "these adapters do nothing in this forward:",
            [f"{name}: {_reason(name in gradients.weights)}" for name in bypassed],
            _way_out([name for name in unreached if name in gradients.weights and not sites[name].adapters.is_read]),
        )
    dense = {name: tuple(site.adapters.fallbacks - fallbacks[name]) for name, site in sites.items()}
    return Reach(
        reached=tuple(name for name in sites if name in gradients.adapters),
        idle=(*gradients.idle_experts, *idle),
        dense={name: functions for name, functions in dense.items() if functions},
    )


def _require_gradients(sites: Mapping[str, AdaptedSite]) -> None:
    """Raise StateError if a weight or an adapter is sharded or on the meta device, where no gradient is to be seen."""
    for name, site in sites.items():
        if any(map(is_sharded, (site.weight, *site.adapters.parameters()))):
            raise StateError(
                f"{name} is sharded (fully_shard), so that its gradients are not to be seen here",
                way_out="call probe before the model is sharded: sharding does not change what a forward reaches",
            )
        if site.weight.is_meta or any(p.is_meta for p in site.adapters.parameters()):
            raise StateError(
                f"{name} is on the meta device (offloaded), where it gets no gradient",
                way_out="call probe before the model is offloaded",
            )


def _require_arguments(model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> None:
    """Raise StateError if the model's forward does not take these arguments."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **inputs)
    except TypeError as e:
        raise StateError(
            f"the model cannot be called with these inputs: {e}",
            way_out=f"{base_class(type(model)).__name__}.forward takes {', '.join(signature.parameters)}",
        ) from None


def _reason(weight_has_gradient: bool) -> str:
    if weight_has_gradient:
        return "its weight acts without the layer being called: the model reads the weight itself, or through a tie"
    return "this forward does not use the layer, or the output does not depend on it"


def _way_out(read_directly: list[str]) -> str:
    if not read_directly:
        return "eject, and inject without these layers: exclude=[...]"
    target = f"{read_directly[0]}.weight"
    return (
        f"eject, and inject with the weight itself as target, as in targets=[{target!r}], or without it: exclude=[...]"
    )


class _Gradients(NamedTuple):
    """Which tensors a backward reached, by the names of their sites."""

    weights: set[str]
    """Sites whose base weight has a gradient."""
    adapters: set[str]
    """Sites with a gradient in B, or in A if B is not zero."""
    idle_experts: list[str]
    """Members of reached stacks without a gradient."""


def _gradients(
    index: ModelIndex, sites: Mapping[str, AdaptedSite], args: tuple[Any, ...], inputs: Mapping[str, Any]
) -> _Gradients:
    # A quantized weight gets no gradient.
    weights = {name: site.weight for name, site in sites.items() if site.weight.is_floating_point()}
    factors = {name: [p for a, _ in site.adapters.active for p in a.parameters()] for name, site in sites.items()}
    wanted = {id(t): t for name in sites for t in (*factors[name], *([weights[name]] if name in weights else []))}
    with _undisturbed(index), _requiring_grad(list(wanted.values())), torch.enable_grad():
        at_1 = choose(dict.fromkeys(index.active, 1.0))  # at 0 nothing would get a gradient
        with _refusing_reentrant_checkpoints(index), choosing(index.states, at_1, "probe"):
            outputs = [t for t in tree_leaves(_plain(index.model(*args, **inputs))) if _has_grad(t)]
        generator = torch.Generator().manual_seed(0)
        random = (torch.randn(t.shape, generator=generator).to(t.device) for t in outputs)
        loss = sum(((t.float() * r).sum() for t, r in zip(outputs, random, strict=True)), torch.zeros(()))
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True) if outputs else [None] * len(wanted)
    reached = {key: grad for key, grad in zip(wanted, grads, strict=True) if grad is not None and bool(grad.any())}
    idle = []
    for name, site in sites.items():
        if site.adapters.kind.stacked:
            by_factor = [reached[id(t)].flatten(1).any(1) for t in factors[name] if id(t) in reached]
            has_tokens = torch.stack(by_factor).any(0).tolist() if by_factor else []
            idle += [f"{name}, {expert}" for expert, has_token in enumerate(has_tokens) if not has_token]
    return _Gradients(
        weights={name for name, weight in weights.items() if id(weight) in reached},
        adapters={name for name in sites if any(id(t) in reached for t in factors[name])},
        idle_experts=idle,
    )


def _plain(output: Any) -> Any:
    """Return an output with its mappings and dataclasses as dicts, whose tensors torch's pytree finds however they are
    nested."""
    if isinstance(output, Mapping):
        return {key: _plain(value) for key, value in output.items()}
    if isinstance(output, list | tuple):
        return [_plain(value) for value in output]
    if is_dataclass(output) and not isinstance(output, type):
        return {f.name: _plain(getattr(output, f.name, None)) for f in fields(output)}
    return output


def _has_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad


@contextmanager
def _refusing_reentrant_checkpoints(index: ModelIndex) -> Iterator[None]:
    """Raise StateError if a module is called within a checkpointed region that runs without a graph.

    Such a region gives no gradient to torch.autograd.grad, and none at all if its input requires none.
    """

    def refuse(module: nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled() and region_being_run() is not None:
            raise StateError(
                f"{index.first_paths[id(module)]} runs within an autograd function that runs it again in the backward"
                " (reentrant gradient checkpointing, or reversible layers), in which probe cannot see gradients",
                way_out="with checkpointing, call gradient_checkpointing_enable(gradient_checkpointing_kwargs="
                "{'use_reentrant': False}), or gradient_checkpointing_disable() for the probe; with use_reentrant=True"
                " the input of a region must require a gradient, or nothing in it trains: enable_input_require_grads()",
            )

    handles = [module.register_forward_pre_hook(refuse) for module in index.modules.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _requiring_grad(tensors: list[Tensor]) -> Iterator[None]:
    """Let all these tensors require a gradient within the context."""
    before = [t.requires_grad for t in tensors]
    try:
        for t in tensors:
            t.requires_grad_(True)
        yield
    finally:
        for t, required in zip(tensors, before, strict=True):
            t.requires_grad_(required)


@contextmanager
def _undisturbed(index: ModelIndex) -> Iterator[None]:
    """Restore random state and buffers after the context: a training forward draws dropout masks and moves batch
    statistics."""
    modules = [module for _, module in index.walked]
    buffers = [(m, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    parameters = [p for m in modules for p in m._parameters.values() if p is not None]
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    buffer.copy_(value)
                    module._buffers[name] = buffer
