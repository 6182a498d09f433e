"""The forward graft: the base's own forward, untouched, and then the terms of the adapters that are on.

Beside the products with a single token what Python asks before them counts. So what is nearly always so, a frozen
nn.Linear with one adapter on, is told at once, by as few objects of the layer's own as will do (each has left the cache
since the last token), and goes straight to its products.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.nn.functional import linear

from .adapter import LoraAdapter
from .adapter_dict import AdapterDict
from .graft import Graft
from .hooks import HOOKED, is_hooked
from .kernels.gemm import FEW
from .kernels.lora_linear import accumulate_eagerly, in_inference, joins, together
from .weight_kinds import returns_fresh_output

LINEAR = nn.Linear.forward  # torch's own: what somebody puts in its place later may compute anything


class LoraForward(Graft):
    """The graft of a module that applies its weight itself, when it is called."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the base's; one frozen nn.Linear with one adapter on, which is the most of all calls, without what others
        need to be asked."""
        base, weight = type(self)._lora_base, cast(nn.Parameter, self._parameters.get("weight"))
        # Not of a quantised or sharded weight; and torch.compile does better without.
        own = type(weight) is nn.Parameter and not is_compiling()
        if own and base.forward is LINEAR and len(args) == 1 and not kwargs and (low := _only(self)) is not None:
            if not is_grad_enabled():
                if args[0].numel() > FEW * weight.shape[1]:  # few tokens are not asked what many are
                    return in_inference(low, args[0], weight, self._parameters["bias"])
                return accumulate_eagerly(low, linear(args[0], weight, self._parameters["bias"]), args[0], True)
            if joins(low, args[0], self):
                return together(low, args[0], weight, self._parameters["bias"])
        own = own and returns_fresh_output(base)  # type: ignore[arg-type]
        x = args[0] if args else next(iter(kwargs.values()))  # nn.Linear says `input`, Conv1D says `x`
        shape = x.shape if own and is_grad_enabled() and _would_be_view(self, x) else None
        if shape is not None:
            x = x.flatten(0, -2)
            args, kwargs = (x,), {}
        y = base.forward(self, *args, **kwargs)
        for child in self._modules.values():
            if isinstance(child, AdapterDict):
                y = child(x, y, own)
        return y if shape is None else y.unflatten(0, shape[:-1])


def _only(linear: nn.Module) -> LoraAdapter | None:
    """The adapter that is on, if all is as it mostly is: only one is on, nobody has hooks on it, and no siblings share
    what it computes. What can be otherwise is asked elsewhere, which costs more than the products with a single
    token."""
    own = linear.__dict__  # an attribute of a module costs as much as a few of these
    children = own["_modules"]
    if len(children) != 1 or len(own["_parameters"]) != 2:
        return None
    (child,) = children.values()
    of = child.__dict__
    if type(child) is not AdapterDict or is_hooked(child) or "forward" in of:
        return None
    state = of["state"]
    if state.rows is not None or len(state.active) != 1:
        return None
    low = of["_modules"].get(state.active[0])
    return low if type(low) is LoraAdapter and HOOKED not in low.__dict__ and "forward" not in low.__dict__ else None


def _would_be_view(linear: nn.Module, x: Tensor) -> bool:
    """Whether torch would flatten the input itself and return a view, of whose gradient autograd makes a copy when it
    is written to."""
    if linear._parameters.get("bias") is None or x.ndim < 3 or not x.is_contiguous() or not x.numel():
        return False
    return all(child.state.rows is None for child in linear._modules.values() if isinstance(child, AdapterDict))
