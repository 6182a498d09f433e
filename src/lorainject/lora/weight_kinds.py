"""The kinds of weights that can carry an adapter: one row of a table per kind.

A row says which class of module holds the weight, how the weight is stored, and what the layer computes with it:

- A layer that is linear in its input and is called as a module (nn.Linear, nn.Embedding) has a `form` and takes the
*forward
  graft* (forward_graft.py): the base layer runs, and the low-rank term is added to its output.
- Every other kind takes the *weight graft* (weight_graft.py): the module's own code computes with a lazy weight.
Stacked
  experts, convolutions, and parameters that other modules read are such kinds.

Everything else (creating A and B, merging, saving) follows from how the weight is stored: as (*stack, rows, *rest),
where the rows are the outputs, or the inputs if `transposed`, and the axes of `rest` together are the other.
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
"""What a layer computes with its weight. The kernel that adds the low-rank term is looked up by it (kernels/)."""
LINEAR_FORWARD = nn.Linear.forward
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPUTED = (
    ("pruned", "_mask", "prune.remove"),
    ("weight_norm", "_g", "remove_weight_norm"),
    ("spectral_norm", "_u", "remove_spectral_norm"),
)
"""What computes a weight from other tensors: the ending of the name of one of them, and what makes it a parameter."""
QUANTIZERS = ("bitsandbytes.", "optimum.quanto.", "torchao.")
"""Packages whose layers or tensors hold weights that only their own forward can use."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of weight."""

    name: str
    """The name in plans and messages; with ^T for a weight that is stored transposed."""
    type: str = ""
    """Dotted name of the module's class, of which subclasses count. It is a name so that transformers need not be
    imported."""
    transposed: bool = False
    """True if the weight is stored as (in, out), as in Conv1D, and not as (out, in), as in nn.Linear."""
    stacked: bool = False
    """True if the first axis counts experts, with one A and one B per expert."""
    form: Form | None = None
    """What the layer computes with its weight, for the forward graft. None for the weight graft."""

    def sizes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
        """Return (stack, out_features, in_features) of a stored shape; `stack` is empty or (experts,)."""
        stack, (rows, *rest) = (shape[:1], shape[1:]) if self.stacked else ((), shape)
        return (tuple(stack), math.prod(rest), rows) if self.transposed else (tuple(stack), rows, math.prod(rest))


LINEAR = Kind(name="linear", type="torch.nn.modules.linear.Linear", form="linear")
LAYERS = (
    LINEAR,
    Kind(name="linear^T", type="transformers.pytorch_utils.Conv1D", transposed=True, form="linear"),
    Kind(name="embedding", type="torch.nn.modules.sparse.Embedding", transposed=True, form="embedding"),
    Kind(name="conv^T", type="torch.nn.modules.conv._ConvTransposeNd", transposed=True),
    Kind(name="conv", type="torch.nn.modules.conv._ConvNd"),
)
STACKS = (Kind(name="experts", stacked=True), Kind(name="experts^T", stacked=True, transposed=True))
MATRIX = Kind(name="matrix")
"""Any other parameter with two axes or more."""
WHOLE = Kind(name="whole")
"""A parameter that can be replaced as a whole, but cannot carry A and B: a bias, the weight of a norm."""
KINDS = {kind.name: kind for kind in (*LAYERS, *STACKS, MATRIX, WHOLE)}
FUSED_PROJECTIONS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""The layers that `fuse_projections` of diffusers' attention modules puts in the place of others (diffusers 0.42,
models/attention.py)."""


def kind_of(module: nn.Module, parameter: str = "weight") -> Kind | None:
    """Return the kind of a layer's weight, by its class or the nearest base class; None for any other module or
    parameter."""
    cls: Any = type(module)
    if parameter != "weight":
        return None
    return _row(cls)[0] or (LINEAR if is_opaque_linear(module) else None)


def has_standard_forward(module: nn.Module) -> bool:
    """True if the module inherits the forward of the class that its kind names. A quantized layer counts as such."""
    cls: Any = type(module)
    return base_class(cls).forward is _row(cls)[1].forward or is_quantized(module)


@cache
def returns_fresh_output(cls: type[nn.Module]) -> bool:
    """True if the forward of a layer returns freshly allocated memory, which the term may be added to in place."""
    kind, row = _row(cls)  # type: ignore[arg-type]
    return kind is not None and kind.form is not None and cls.forward is row.forward


def is_quantized(module: nn.Module) -> bool:
    """True if the weight is stored in a form that only the module's own forward can use."""
    if is_opaque_linear(module):
        return True
    weight = module._parameters.get("weight")
    cls: Any = type(module)
    if type(weight) is nn.Parameter:  # its data are a plain tensor
        return _comes_from_quantizer(cls, nn.Parameter)
    stored: Any = (type(weight), type(getattr(weight, "data", None)))
    return _comes_from_quantizer(cls, *stored)


def is_opaque_linear(module: nn.Module) -> bool:
    """True if a module acts as a linear layer whose weight is in a form that only its own forward can use.

    It says `in_features` and `out_features`, has no modules inside, and no matrix of ordinary numbers: GPTQ, AWQ, HQQ,
    EETQ, BitNet, FP8 and their like. A torch.nn.Linear whose class has no forward of its own needs ordinary numbers.
    """
    sizes = vars(module).get("in_features"), vars(module).get("out_features")
    if not all(isinstance(size, int) for size in sizes):
        return False
    if isinstance(module, nn.Linear):
        weight = module._parameters.get("weight")
        has_forward = base_class(type(module)).forward is not LINEAR_FORWARD
        return weight is not None and weight.dtype not in DTYPES and has_forward
    if any(not name.startswith("lora") for name in module._modules):
        return False
    parameters = [p for p in module._parameters.values() if p is not None]
    has_tensors = bool(parameters) or any(buffer is not None for buffer in module._buffers.values())
    return has_tensors and not any(p.dtype in DTYPES and p.ndim > 1 for p in parameters)


def stored_tensor(module: nn.Module, parameter: str = "weight") -> Tensor | None:
    """Return a weight as it is stored; of an opaque linear, which may have several tensors, the largest one."""
    weight = module._parameters.get(parameter)
    if weight is not None or parameter != "weight" or not is_opaque_linear(module):
        return weight
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    return max(tensors, key=Tensor.numel)


@cache
def _comes_from_quantizer(*classes: Any) -> bool:
    return any(f"{c.__module__}.".startswith(QUANTIZERS) for cls in classes for c in cls.__mro__)


def weight_shape(module: nn.Module, parameter: str) -> tuple[int, ...]:
    """Return the shape of a weight; of a quantized weight, whose storage is packed, the shape before it was
    quantized."""
    if parameter == "weight" and is_quantized(module):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    weight = module._parameters[parameter]
    assert weight is not None
    return tuple(weight.shape)


def why_unsupported(module: nn.Module, parameter: str = "weight") -> str | None:
    """Return the reason why a weight of a known kind cannot carry an adapter; None if it can."""
    weight = stored_tensor(module, parameter)
    if "_diffusers_hook" in module.__dict__:
        return "diffusers has hooks on it (layerwise casting, for instance): inject first, then enable them"
    if (reason := graft_obstacle(module)) is not None:
        return reason
    if "parametrizations" in module._modules or weight is None:
        return _why_computed(module, parameter)
    if isinstance(weight, UninitializedParameter):
        return "its shape is not known yet: run one forward first (lazy module)"
    if is_sharded(weight):
        return (
            "its weight is already sharded (DTensor): inject first, shard after; if from_pretrained sharded it, load"
            " the model without tp_plan and distributed_config"
        )
    if weight.numel() == 0:
        return f"its weight is empty: {tuple(weight.shape)}"
    if (reason := why_not_numbers(module, parameter)) is not None:
        return reason
    if vars(module).get("max_norm") is not None:
        return "max_norm rewrites the base weight in every forward: set it to None first"
    return None


def _why_computed(module: nn.Module, parameter: str) -> str:
    """Return why a weight that is no parameter of its module cannot carry an adapter, with what makes it one."""
    tensors = module._parameters.keys() | module._buffers.keys()
    for by, mark, undo in COMPUTED:
        if f"{parameter}{mark}" in tensors:
            return f"its {parameter} is computed in each forward ({by}): call torch.nn.utils.{undo} first"
    return f"its {parameter} is computed (parametrized): call torch.nn.utils.parametrize.remove_parametrizations first"


def why_not_numbers(module: nn.Module, parameter: str = "weight") -> str | None:
    """Return why the elements of a weight are not numbers that a delta can be added to; None if they are."""
    weight = module._parameters.get(parameter)
    if weight is None or weight.dtype in DTYPES or is_quantized(module):
        return None
    supported = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
    return f"its weight is {weight.dtype}: only {supported} are supported"


def superseded_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers of a module that are still in it, but that diffusers' `fuse_qkv_projections` has replaced."""
    if not vars(module).get("fused_projections"):
        return []
    children = module._modules
    names = [name for fused in FUSED_PROJECTIONS if fused in children for name in FUSED_PROJECTIONS[fused]]
    return [child for name in names if (child := children.get(name)) is not None]


def is_sharded(tensor: Tensor) -> bool:
    """True if the tensor is a DTensor, which is told by name: importing torch.distributed.tensor takes a second."""
    return _is_dtensor(type(tensor))


@cache
def _is_dtensor(cls: type[Tensor]) -> bool:
    return any(c.__name__ == "DTensor" for c in cls.__mro__)


@cache
def _row(cls: type[nn.Module]) -> tuple[Kind | None, type[nn.Module]]:
    """Return the kind of a layer class, and the class that the kind names."""
    for c in cls.__mro__:
        for kind in LAYERS:
            if f"{c.__module__}.{c.__qualname__}" == kind.type and issubclass(c, nn.Module):
                return kind, c
    return None, nn.Module
