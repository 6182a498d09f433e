"""Change what a module does by changing its class, and change it back without a trace.

The object stays, and `module.__class__` becomes a subclass of what it was. Parameters, buffers, hooks, `isinstance`,
state-dict keys, tied and shared modules all survive, since nothing about the object changes but its methods. torch's
own `fully_shard` and `parametrize` work in the same way. The subclass is made once per base class and cached: with one
class per instance, torch.compile would compile every layer anew.

The graft overrides `forward`, not `__call__`, so that a user's hooks see the grafted output, pre-hooks may replace the
input, and `module.forward(x)` is grafted too. The graft has one weakness: a `forward` stored on the instance hides the
forward of the class. accelerate's hooks store one, and keep the original as the bound method `_old_forward`. Stored
bound methods of the module's own forward are therefore bound anew at each change of class, and any other patch is named
by `graft_obstacle` before anything is changed.

This module knows nothing of LoRA.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Graft(nn.Module):
    """Mixin of every grafted class. The forward under the graft is `type(self)._lora_base.forward`."""

    _lora_base: type[nn.Module]
    """The class that the module had before."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle base class, mixin and state, because a class made on the fly cannot be found by name."""
        recipe: Any = type(self)._lora_base.__reduce_ex__(self, max(protocol, 2))
        make, (cls, *args), *rest = recipe
        if not is_grafted(cls):  # a class that FSDP or parametrize derived from the grafted one, and pickles itself
            return make, (cls, *args), *rest
        return _regrow, (*cls.__bases__, *args), *rest


def _regrow(base: type[nn.Module], mixin: type[Graft], *args: Any) -> nn.Module:
    """Unpickle a grafted module, in this process or in another one."""
    return object.__new__(grafted_class(mixin, base), *args)


_CLASSES: dict[tuple[type[Graft], type[nn.Module]], type[nn.Module]] = {}


def grafted_class(mixin: type[Graft], base: type[nn.Module]) -> type[nn.Module]:
    """Return the cached class that puts `mixin` on top of `base`, such as LoraLinear(Linear, LoraForward).

    The base comes first, because Python lets an object change to a class only if the class extends its memory layout.
    The mixin's methods are therefore copied into the new class.
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
    """True if `cls` was made by `grafted_class`, and not derived from such a class."""
    return "_lora_base" in cls.__dict__


def base_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class under the graft, or `cls` itself if it is not grafted."""
    return cls.__bases__[0] if is_grafted(cls) else cls


def graft_obstacle(module: nn.Module) -> str | None:
    """Return the reason why the class of `module` cannot be changed, to a grafted one or back; None if it can."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "a ScriptModule has no class to change: inject before torch.jit.script or torch.jit.trace"
    if isinstance(module, Graft) and not is_grafted(cls):
        name = f"{cls.__module__}.{cls.__qualname__}"
        return f"{name} was derived from the grafted class (by fully_shard or parametrize): undo that first"
    stored = module.__dict__.get("forward")
    # accelerate's wrapper is stored as `forward` and calls `_old_forward`.
    original = module.__dict__.get("_old_forward") if "_hf_hook" in module.__dict__ else stored
    if stored is not None and not _is_forward(module, original):
        patch = getattr(stored, "__qualname__", None) or type(stored).__qualname__
        if str(getattr(stored, "__module__", "")).startswith("transformers.distributed"):
            return (
                "transformers has distributed it over several processes (tensor or expert parallelism), which bypasses"
                " an adapter: load the model without tp_plan and distributed_config, or merge the adapter into its"
                " checkpoint (merge_checkpoint) and load that in parallel"
            )
        return (
            f"its forward is replaced on the instance by {patch}, which would bypass an adapter:"
            " remove that patch first"
        )
    return None


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give `module` the class `cls`. The caller has checked `graft_obstacle` before."""
    stored = [key for key, value in module.__dict__.items() if _is_forward(module, value)]
    module.__class__ = cls
    for key in stored:
        module.__dict__[key] = types.MethodType(_forward_of(cls), module)


def _is_forward(module: nn.Module, value: object) -> bool:
    """True if `value` is the forward of the module's class, bound to the module."""
    if not isinstance(value, types.MethodType):
        return False
    return value.__self__ is module and value.__func__ is _forward_of(type(module))


def _forward_of(cls: type[nn.Module]) -> Callable[..., Any]:
    """Return the function that a class has as its forward."""
    return cls.forward
