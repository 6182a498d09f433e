"""Which modules can carry an adapter, and how: one row a layer kind. A new kind is a new row.

A row says where the module's class is to be found, which axis of the stored weight is `in`, and what the low-rank term does
to the module's input. Everything else (creating A and B, folding, saving) follows from these three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .graft import Graft, bare, objection
from .lowrank import Term, look_up, project

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LoraForward(Graft):
    """The forward graft: the base's own forward, untouched, and then the adapters' terms."""

    lora: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))  # nn.Linear says `input`, Conv1D says `x`
        return self.lora(x, super().forward(*args, **kwargs))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of layer whose output is linear in its weight."""

    name: str
    """How plans, files and errors call it."""
    type: str
    """Dotted name of the class; subclasses count. A name, not a class: transformers is not imported for it."""
    in_axis: int
    """The axis of the stored weight that is `in`: 1 for nn.Linear's (out, in), 0 for Conv1D's (in, out)."""
    term: Term
    """(adapter, input) -> the low-rank term of the output."""

    def matrix(self, weight: Tensor) -> Tensor:
        """The stored weight as a view W (out, in)."""
        return weight if self.in_axis == 1 else weight.t()


KINDS = (
    Kind(name="linear", type="torch.nn.modules.linear.Linear", in_axis=1, term=project),
    Kind(name="conv1d", type="transformers.pytorch_utils.Conv1D", in_axis=0, term=project),
    Kind(name="embedding", type="torch.nn.modules.sparse.Embedding", in_axis=0, term=look_up),
)


def kind_of(module: nn.Module) -> Kind | None:
    """The row for this module, by its class or the nearest base class of it; None if it can't carry an adapter."""
    return _row(type(module))[0]


def refusal(module: nn.Module) -> str | None:
    """Why a module of a known kind can't carry an adapter all the same; None if it can."""
    kind, base = _row(type(module))
    assert kind is not None
    weight = module._parameters.get("weight")
    if (reason := objection(module)) is not None:
        return reason
    if hasattr(module, "parametrizations") or weight is None:
        return "its weight is computed (parametrised, or weight_norm): remove the parametrisation first"
    if isinstance(weight, UninitializedParameter):
        return "its shape is not known yet: run one forward first (lazy module)"
    if is_sharded(weight):
        return "its weight is already sharded (DTensor): inject first, shard after"
    if weight.numel() == 0:
        return f"its weight is empty: {tuple(weight.shape)}"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}: only {', '.join(str(d).removeprefix('torch.') for d in DTYPES)} are supported"
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention reads this weight itself and never calls the layer: an adapter would do nothing"
    if bare(type(module)).forward is not base.forward:
        return f"{type(module).__name__} has a forward of its own, not {base.__name__}'s: an adapter beside it could differ from the merged weight"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rewrites the base weight in every forward: set it to None first"
    return None


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this process holds a part (by name: importing torch.distributed.tensor takes a second)."""
    return any(c.__name__ == "DTensor" for c in type(tensor).__mro__)


def _row(cls: type[nn.Module]) -> tuple[Kind | None, type[nn.Module]]:
    for c in cls.__mro__:
        for kind in KINDS:
            if f"{c.__module__}.{c.__qualname__}" == kind.type and issubclass(c, nn.Module):
                return kind, c
    return None, nn.Module
