"""What an adapter refuses to do in silence: run on memory without values, train in vain, or lose a gradient.

None of these checks costs anything in the calls that need none of them (kernels/fused_forward.py): they are hooks that
are there only when they are needed, or are made in the general way through an adapter.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError


def require_usable(adapter: nn.Module, site: str, args: Sequence[Any]) -> None:
    """Raise StateError if an adapter has no values, or would lose its gradients, in the call with these arguments."""
    parameters = [p for p in adapter._parameters.values() if p is not None]
    if any(p.is_meta for p in parameters) and any(isinstance(t, Tensor) and not t.is_meta for t in args[:1]):
        raise StateError(
            f"{site}: A and B are on the meta device, where they have no values",
            way_out="call reset(model), which draws A and sets B to zero on the device of the weight; or"
            " hotswap(model, path), for the values of a file",
        )
    hook = None if torch.compiler.is_compiling() else adapter.__dict__.get("_hf_hook")
    if hook is None or not torch.is_grad_enabled() or not any(p.requires_grad for p in parameters):
        return
    if any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,))):
        raise StateError(
            f"{site}: accelerate offloads A and B, and drops their gradients with them after every forward",
            way_out="offload the base first (cpu_offload, disk_offload, dispatch_model), and inject or load"
            " afterwards: A and B then stay where they are used. For inference, use torch.no_grad()",
        )


class RequireWritten:
    """A forward pre-hook of an adapter whose A and B hold whatever was in memory: it raises until both were written.

    Args:
        adapter: The adapter.
    """

    def __init__(self, adapter: nn.Module) -> None:
        self.versions = [p._version for p in adapter.parameters()]

    def is_met(self, adapter: nn.Module) -> bool:
        """True if every parameter was written to since the hook was made."""
        return all(p._version != before for p, before in zip(adapter.parameters(), self.versions, strict=True))

    def __call__(self, adapter: nn.Module, *_: Any) -> None:
        """Take the hook off if it is met, or else raise StateError."""
        if not self.is_met(adapter):
            raise StateError(
                "A and B hold whatever was in memory, because to_empty() gave them memory without values",
                way_out="call reset(model), which draws A and sets B to zero; or load a state dict that has them; or"
                " hotswap(model, path), for the values of a file",
            )
        remove_requirement(adapter)


def remove_requirement(adapter: nn.Module) -> None:
    """Take the hook RequireWritten off an adapter, if it has one."""
    for key in [key for key, hook in adapter._forward_pre_hooks.items() if type(hook) is RequireWritten]:
        del adapter._forward_pre_hooks[key]


class LostGradient:
    """A hook on a frozen parameter that raises StateError if a gradient would be lost.

    A forward may have used the parameter before it was frozen. torch then drops its gradient in silence.

    Args:
        adapter: The adapter that has the parameter. torch swaps no tensor that has a weak reference, so that the
            reference is to the adapter.
        name: The name of the parameter.
    """

    __torch_unserializable__ = True  # torch would warn of a hook that a pickle leaves out

    def __init__(self, adapter: nn.Module, name: str) -> None:
        self.adapter, self.name = weakref.ref(adapter), name

    def __call__(self, grad: Tensor) -> None:
        """Raise StateError if the parameter is frozen."""
        adapter = self.adapter()
        p = None if adapter is None else adapter._parameters[self.name]
        if p is not None and not p.requires_grad:
            raise lost_gradient()


def refuse_to_load(module: nn.Module, *_: Any) -> None:
    """Raise StateError: the hook of a merged module, which must not be overwritten before it is unmerged."""
    raise StateError(
        "cannot load a state dict while adapters are merged: neither unmerge nor the file would give W0 + s B A then",
        way_out="call unmerge(model) first; after merge(reversible=False), eject(model)",
    )


def warn_if_saved_as_base(names: Iterable[str]) -> None:
    """Warn if save_pretrained (transformers, diffusers) asks for the state dict of a model with these adapters.

    It writes the adapters' tensors among the weights of the base, where from_pretrained ignores them.
    """
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_code.co_name != "save_pretrained":
        frame, level = frame.f_back, level + 1  # type: ignore[assignment]
    if frame is not None:
        warnings.warn(
            f"save_pretrained writes the weights of the base, and from_pretrained will not restore the adapters on it"
            f" ({', '.join(map(repr, names))}). Save these with li.save(model, path); for one model without adapters,"
            " call merge(model) or eject(model) before save_pretrained; for the checkpoints of a trainer, use"
            " lorainject.training.adapter_checkpoints(trainer)",
            stacklevel=level + 1,
        )


def lost_gradient() -> StateError:
    """Return the error of a backward that comes after its adapter was deactivated."""
    return StateError(
        "an adapter was deactivated between a forward and its backward, so that its gradient would be lost",
        way_out="run the backward first; or activate every adapter that trains, and choose among them by"
        " using(model, name), which freezes nothing",
    )


def changed_forward() -> StateError:
    """Return the error of a checkpointed backward that can no longer compute what its forward computed."""
    return StateError(
        "adapters were merged, ejected, rescaled or swapped between a forward with gradient checkpointing and its"
        " backward, which runs that forward again",
        way_out="run the backward first, or unmerge",
    )
