"""Which weights can carry an adapter, and how: one row a kind. A new kind is a new row.

A row says where the module's class is to be found, how the weight is stored, and, if the module is linear in its input and is
called (nn.Linear), what the low-rank term does to that input: the *forward graft*. A kind without a term takes the *weight graft*
(readers.py): the module's own code computes with a symbolic sum. Everything else (creating A and B, folding, saving) follows from
how the weight is stored: (*stack, rows, *rest), where rows are `out`, or `in` if transposed, and all axes of rest together the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .graft import base_class, graft_obstacle

Form = Literal["linear", "embedding"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
QUANTISED = (
    "bitsandbytes.",
    "optimum.quanto.",
    "torchao.",
)  # whose layers or tensors hold a weight that can't be read as numbers


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of weight."""

    name: str
    """How plans and errors call it; ^T where it is stored transposed."""
    type: str = ""
    """Dotted name of the module's class; subclasses count. A name, not a class: transformers is not imported for it."""
    transposed: bool = False
    """Whether the first axis (after a stack's) is `in`: Conv1D's (in, out), where nn.Linear has (out, in)."""
    stacked: bool = False
    """Whether the first axis counts experts, each with an A and a B of its own."""
    form: Form | None = None
    """What the layer computes with its weight, by which kernels/terms.py knows the function that adds the low-rank term to
    the output, for the forward graft; None for the weight graft."""

    def sizes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
        """(stack, out, in) of a stored shape."""
        stack, (rows, *rest) = (shape[:1], shape[1:]) if self.stacked else ((), shape)
        return (tuple(stack), math.prod(rest), rows) if self.transposed else (tuple(stack), rows, math.prod(rest))


LAYERS = (
    Kind(name="linear", type="torch.nn.modules.linear.Linear", form="linear"),
    Kind(name="linear^T", type="transformers.pytorch_utils.Conv1D", transposed=True, form="linear"),
    Kind(name="embedding", type="torch.nn.modules.sparse.Embedding", transposed=True, form="embedding"),
    Kind(name="conv^T", type="torch.nn.modules.conv._ConvTransposeNd", transposed=True),
    Kind(name="conv", type="torch.nn.modules.conv._ConvNd"),
)
STACKS = (Kind(name="experts", stacked=True), Kind(name="experts^T", stacked=True, transposed=True))
MATRIX = Kind(name="matrix")
"""Any other parameter with two axes or more."""
WHOLE = Kind(name="whole")
"""A parameter that can be replaced, but carries no A and B: a bias, a norm's weight."""
KINDS = {kind.name: kind for kind in (*LAYERS, *STACKS, MATRIX, WHOLE)}


def kind_of(module: nn.Module, parameter: str = "weight") -> Kind | None:
    """The row for a module's weight, by its class or the nearest base class of it; None if it is not a layer of a known kind."""
    cls: Any = type(module)
    return _row(cls)[0] if parameter == "weight" else None


def has_standard_forward(module: nn.Module) -> bool:
    """Whether the module's forward is that of its kind, and not one of its own."""
    cls: Any = type(module)
    return base_class(cls).forward is _row(cls)[1].forward or is_quantized(module)


@cache
def returns_fresh_output(cls: type[nn.Module]) -> bool:
    """Whether such a layer's forward returns memory that it has just taken, which nothing else sees: that of its kind does."""
    kind, row = _row(cls)  # type: ignore[arg-type]
    return kind is not None and kind.form is not None and cls.forward is row.forward


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight is stored in a form that only the module's own forward can use."""
    weight = module._parameters.get("weight")
    cls: Any = type(module)
    if type(weight) is nn.Parameter:  # whose data are a plain tensor
        return _quantise(cls, nn.Parameter)
    stored: Any = (type(weight), type(getattr(weight, "data", None)))
    return _quantise(cls, *stored)


@cache
def _quantise(*classes: Any) -> bool:
    return any(f"{c.__module__}.".startswith(QUANTISED) for cls in classes for c in cls.__mro__)


def weight_shape(module: nn.Module, parameter: str) -> tuple[int, ...]:
    """The weight's shape; a quantised one's is packed, and the layer's sizes tell."""
    if parameter == "weight" and is_quantized(module):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    weight = module._parameters[parameter]
    assert weight is not None
    return tuple(weight.shape)


def why_unsupported(module: nn.Module, parameter: str = "weight") -> str | None:
    """Why this weight can't carry an adapter all the same; None if it can."""
    weight = module._parameters.get(parameter)
    if (reason := graft_obstacle(module)) is not None:
        return reason
    if "parametrizations" in module._modules or weight is None:
        return "its weight is computed (parametrised, or weight_norm): torch.nn.utils.parametrize.remove_parametrizations first"
    if isinstance(weight, UninitializedParameter):
        return "its shape is not known yet: run one forward first (lazy module)"
    if is_sharded(weight):
        return "its weight is already sharded (DTensor): inject first, shard after"
    if weight.numel() == 0:
        return f"its weight is empty: {tuple(weight.shape)}"
    if weight.dtype not in DTYPES and not is_quantized(module):
        return f"its weight is {weight.dtype}: only {', '.join(str(d).removeprefix('torch.') for d in DTYPES)} are supported"
    if vars(module).get("max_norm") is not None:
        return "max_norm rewrites the base weight in every forward: set it to None first"
    return None


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this process holds a part (by name: importing torch.distributed.tensor takes a second)."""
    return _shards(type(tensor))


@cache
def _shards(cls: type[Tensor]) -> bool:
    return any(c.__name__ == "DTensor" for c in cls.__mro__)


@cache
def _row(cls: type[nn.Module]) -> tuple[Kind | None, type[nn.Module]]:
    for c in cls.__mro__:
        for kind in LAYERS:
            if f"{c.__module__}.{c.__qualname__}" == kind.type and issubclass(c, nn.Module):
                return kind, c
    return None, nn.Module
