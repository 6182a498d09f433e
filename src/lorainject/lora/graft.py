"""Change what a module does by changing its class, and change it back without a trace.

The object stays; `module.__class__` becomes a subclass of what it was, made once per base class and cached (one class per
*instance* would make torch.compile build every layer anew). Parameters, buffers, hooks, `isinstance`, state-dict keys,
tied and shared modules all survive, since nothing about the object changes but its methods. torch's own `fully_shard` and
`parametrize` work the same way.

The graft overrides `forward`, not `__call__`: so a user's hooks see the grafted output, pre-hooks may replace the input, and
`module.forward(x)` is grafted too. Its one weakness: a `forward` stored on the *instance* hides the class's. accelerate's
hooks do that, and keep the original as the bound method `_old_forward`; bound methods of ours are therefore bound anew at
each change of class, and any other patch is named by `objection` before anything is changed.

This file knows nothing of LoRA.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Graft(nn.Module):
    """Mixin of every grafted class. Its `forward` finds the one under the graft as `type(self)._lora_base.forward`."""

    _lora_base: type[nn.Module]
    """The class that the module had."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the recipe (base class, mixin, state): a class made on the fly has no name to be found by."""
        recipe: Any = type(self)._lora_base.__reduce_ex__(self, max(protocol, 2))
        make, (cls, *args), *rest = recipe
        if not is_grafted(cls):  # somebody derived from our class (FSDP, parametrize): theirs to pickle
            return make, (cls, *args), *rest
        return _regrow, (*cls.__bases__, *args), *rest


def _regrow(base: type[nn.Module], mixin: type[Graft], *args: Any) -> nn.Module:
    """Unpickle one grafted module, in this process or in a fresh one."""
    return object.__new__(grafted_class(mixin, base), *args)


_CLASSES: dict[tuple[type[Graft], type[nn.Module]], type[nn.Module]] = {}  # a handful: one per class of layer


def grafted_class(mixin: type[Graft], base: type[nn.Module]) -> type[nn.Module]:
    """The one class that puts `mixin` on top of `base`, such as LoraLinear(Linear, LoraForward).

    The base comes first, since Python lets an object change to a class only if that extends its own memory layout; the mixin's
    methods therefore stand in the new class itself.
    """
    if (mixin, base) not in _CLASSES:
        body = {
            "__module__": base.__module__,
            "_lora_base": base,
            "forward": mixin.forward,
            "__reduce_ex__": Graft.__reduce_ex__,
        }
        _CLASSES[mixin, base] = types.new_class(
            f"Lora{base.__name__}", (base, mixin), exec_body=lambda namespace: namespace.update(body)
        )
    return _CLASSES[mixin, base]


def is_grafted(cls: type) -> bool:
    """Whether `cls` is exactly a class made by `grafted`, and not one that somebody derived from it."""
    return "_lora_base" in cls.__dict__


def base_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class under the graft; `cls` itself if there is none."""
    return cls.__bases__[0] if is_grafted(cls) else cls


def graft_obstacle(module: nn.Module) -> str | None:
    """Why the class of `module` can't be changed, up or back; None if it can."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "a ScriptModule has no class to change: inject before torch.jit.script or torch.jit.trace"
    if isinstance(module, Graft) and not is_grafted(cls):
        return f"{cls.__module__}.{cls.__qualname__} was derived from the grafted class (by fully_shard or parametrize): undo that first"
    own = module.__dict__.get("forward")
    wrapped = (
        module.__dict__.get("_old_forward") if "_hf_hook" in module.__dict__ else own
    )  # accelerate's wrapper calls _old_forward
    if own is not None and not _is_forward(module, wrapped):
        whose = getattr(own, "__qualname__", None) or type(own).__qualname__
        return f"its forward is replaced on the instance by {whose}, which would bypass an adapter: remove that patch first"
    return None


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give `module` the class `cls`; the caller has asked `objection` before."""
    stored = [
        key
        for key, value in module.__dict__.items()
        if isinstance(value, types.MethodType) and _is_forward(module, value)
    ]
    module.__class__ = cls
    for key in stored:
        module.__dict__[key] = types.MethodType(_forward_of(cls), module)


def _is_forward(module: nn.Module, value: object) -> bool:
    """Whether `value` is the class's own forward, bound to `module` and stored on the instance."""
    return (
        isinstance(value, types.MethodType) and value.__self__ is module and value.__func__ is _forward_of(type(module))
    )


def _forward_of(cls: type[nn.Module]) -> Callable[..., Any]:
    return cls.forward
