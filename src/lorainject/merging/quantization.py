"""Out of a quantized linear's codes and back into them: what merging needs where a weight is not stored as numbers.

    codes -> dequantize -> W0, float32 -> (merge adds s B A) -> requantize -> codes and scales of the same scheme

The library's own quantizer does it, from float32, with the type, block size, nesting and dtypes that the weight had.
But W0 lies on the grid, so a d of less than half a step is rounded away again, and a larger one pays for one more
quantisation. For a Gaussian W0 and a d of 5 % (1 %) of its size, int8 keeps <W - W0, d> / <d, d> = 1.00 (0.95), float8
0.97 (0.37), nf4 0.23 (0.02): in 4 bits, merging an ordinary adapter is mostly losing it. QLoRA (Dettmers et al. 2023,
arXiv 2305.14314) keeps A and B apart.

Requantising W0 itself gives W0, codes and scales: rows that no adapter touches must not move. With most schemes that
is so because a block's extreme is the outermost code. Symmetric integers are not so sure of it (torchao stores 7.5
steps as 7): a grid found anew from stored values could be 13 % off (int4). There, a block keeps its scale while W
still fits it (`_kept`). The one exception is bitsandbytes' double quantisation, whose 8 bit scales are rounded around
their common mean: 1e-4 of the weight, 3e-3 with outliers.

One row a scheme, by the exact classes of layer and weight: whatever else is quantized (GPTQ, AWQ, HQQ layers,
quantized inputs, a weight that is still to be quantized) has none. No library is imported but that whose layer is
asked about.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..lora.graft import base_class


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one kind of quantized linear stores its weight. None of the functions but `install` changes the module."""

    name: str
    """For messages: the library's, and then what it calls the type of this weight."""
    layer: str
    """Dotted name of the class whose forward the layer has."""
    weights: tuple[str, ...]
    """Dotted names of the classes that the weight may have."""
    kind: Callable[[Any], str | None]
    """module -> the type, as `name` ends; None if this layer's settings or state can't be had again by requantizing."""
    dequantize: Callable[[Any], Tensor]
    """module -> (out, in), float32: codes times scales, before any rounding to the dtype that the forward computes
    in."""
    requantize: Callable[[Any, Tensor], nn.Parameter]
    """(module, W (out, in) float32) -> a new weight for this module, on the device of its present one, not
    installed."""
    install: Callable[[Any, Any], None]
    """(module, parameter): the forward uses this weight from now on. The one that leaves can be installed again."""
    codes: Callable[[Any], Tensor]
    """parameter -> uint8, one for each of out * in elements; two are equal where the codes mean the same."""

    def codes_changed(self, before: nn.Parameter, after: nn.Parameter) -> float:
        """The share of the elements whose code differs, whatever became of the scales."""
        a, b = self.codes(before), self.codes(after)
        return int(torch.count_nonzero(a != b)) / a.numel()


def find_scheme(module: nn.Module) -> Scheme | None:
    """The row for this layer, with the type in its name; None if there is none, or the weight is not (yet) stored
    quantized."""
    weight = module._parameters.get("weight")
    for row in SCHEMES:
        if (
            _dotted(type(weight)) in row.weights
            and _computes_as(base_class(type(module)), row.layer)
            and (kind := row.kind(module)) is not None
        ):
            return dataclasses.replace(row, name=f"{row.name} {kind}")
    return None


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _computes_as(cls: type[nn.Module], layer: str) -> bool:
    """Whether `cls` is `layer`, or inherits its forward."""
    return any(_dotted(c) == layer and vars(c).get("forward") is cls.forward for c in cls.__mro__)


# -- bitsandbytes, 4 bits: codes in pairs, and a QuantState with one absmax for each block


def _kind_4bit(module: Any) -> str | None:
    state = getattr(module.weight, "quant_state", None)
    if state is None or tuple(state.shape) != (
        module.out_features,
        module.in_features,
    ):  # not quantized yet, or made from (in, out)
        return None
    return str(state.quant_type)


def _stored_4bit(weight: Any) -> tuple[Tensor, Any, bool, torch.dtype]:
    """Packed codes, the state, whether its absmax was quantized too, and the dtype of what it was made from."""
    state = copy.copy(weight.quant_state)
    if not getattr(state, "packing_format_for_cpu", False):
        return weight.data, state, state.nested, state.dtype
    # A forward on a CPU with AVX512-BF16 has rearranged the codes and made absmax (in / block, out), bfloat16. The library's way
    # back quantises that absmax anew, but the forward multiplies by it as it is.
    absmax = state.absmax.T.reshape(-1).float()
    codes, state = import_module("bitsandbytes.functional")._convert_weight_packed_for_cpu_inverse(weight.data, state)
    nested, state.absmax, state.nested = state.nested, absmax, False
    return codes, state, nested, state.dtype


@torch.no_grad()
def _dequantize_4bit(module: Any) -> Tensor:
    codes, state, *_ = _stored_4bit(module.weight)
    state.dtype = torch.float32
    W: Tensor = import_module("bitsandbytes.functional").dequantize_4bit(codes.view(-1, 1), state)
    return W


@torch.no_grad()
def _requantize_4bit(module: Any, W: Tensor) -> nn.Parameter:
    old = module.weight
    _, state, nested, dtype = _stored_4bit(
        old
    )  # and not the parameter's own settings: from FSDP it comes back with the defaults
    how = {
        "blocksize": state.blocksize,
        "quant_type": state.quant_type,
        "compress_statistics": nested,
        "quant_storage": old.quant_storage,
    }
    codes, state = import_module("bitsandbytes.functional").quantize_4bit(W.to(old.device).contiguous(), **how)
    state.dtype = dtype
    new: nn.Parameter = import_module("bitsandbytes.nn").Params4bit(
        codes, requires_grad=old.requires_grad, quant_state=state, module=old.module, bnb_quantized=True, **how
    )
    return new


def _install_4bit(module: Any, parameter: Any) -> None:
    module.weight = parameter
    module.quant_state = parameter.quant_state  # a second reference, for FSDP


def _codes_4bit(weight: Any) -> Tensor:
    packed, state, *_ = _stored_4bit(weight)
    packed = packed.view(torch.uint8).flatten()
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[: state.shape.numel()]
    return codes.masked_fill(codes == 8, 0) if state.quant_type == "fp4" else codes  # fp4's 8 is minus zero


# -- bitsandbytes, 8 bits: rows of codes, and SCB, their absmax. The first forward moves both from the weight to the layer's state


def _stored_8bit(module: Any) -> tuple[Tensor | None, Tensor | None]:
    holder = module.state if module.weight.CB is None else module.weight
    return holder.CB, holder.SCB


def _kind_8bit(module: Any) -> str | None:
    # has_fp16_weights: the weight is a float that each forward quantises
    if module.state.has_fp16_weights or not hasattr(module.weight, "CB"):
        return None
    return "int8" if all(t is not None for t in _stored_8bit(module)) else None


@torch.no_grad()
def _dequantize_8bit(module: Any) -> Tensor:
    codes, absmax = _stored_8bit(module)
    assert codes is not None
    assert absmax is not None
    return codes.float() * (absmax * (1 / 127)).unsqueeze(1)


@torch.no_grad()
def _requantize_8bit(module: Any, W: Tensor) -> nn.Parameter:
    W = W.to(module.weight.device, torch.float16)  # its kernels know no other dtype
    codes, absmax, _ = import_module("bitsandbytes.functional").int8_vectorwise_quant(W)
    new: nn.Parameter = import_module("bitsandbytes.nn").Int8Params(codes, requires_grad=False, CB=codes, SCB=absmax)
    return new


def _install_8bit(module: Any, parameter: Any) -> None:
    module.weight.CB, module.weight.SCB = _stored_8bit(
        module
    )  # else the weight that leaves would leave its scales behind
    module.state.reset_grads()
    module.weight = parameter


def _codes_8bit(weight: Any) -> Tensor:
    return weight.data.view(torch.uint8).flatten()


# -- torchao and quanto: tensor subclasses, which the protocol of torch.compile takes apart and puts together again


def _rebuilt(tensor: Any, part: Callable[[str], Tensor], **attributes: Any) -> Any:
    """The same class and attributes, but for these, with other parts (codes, scales ...)."""
    names, meta = tensor.__tensor_flatten__()
    return type(tensor).__tensor_unflatten__(
        {n: part(n) for n in names}, {**meta, **attributes}, tensor.shape, tensor.stride()
    )


@torch.no_grad()
def _dequantize_subclass(module: Any) -> Tensor:
    """With scales of 16 bits as float32, so that their products with the codes are exact."""
    w = module.weight

    def part(name: str) -> Tensor:
        value: Tensor = getattr(w, name)
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value

    W: Tensor = _rebuilt(
        w, part, **({"dtype": torch.float32} if "dtype" in w.__tensor_flatten__()[1] else {})
    ).dequantize()
    return W


def _install_subclass(module: Any, parameter: Any) -> None:
    module.weight = parameter


def _kept(old: Tensor, new: Tensor, least: Tensor, top: float) -> Tensor:
    """The old scale of each block whose extreme still has the outermost code, or one of the two next to it; else the
    new one.

    `least` is the smallest scale that clips nothing: of the largest value over `top`, and the smallest over -top - 1.
    """
    extreme = least / old * top
    return torch.where((extreme >= max(top - 2.5, top / 2)) & (extreme <= top + 0.25), old, new.to(old.dtype))


def _kind_torchao(module: Any) -> str | None:
    w = module.weight
    kind = str(getattr(w, "target_dtype", w.qdata.dtype)).removeprefix("torch.")
    zero_point = getattr(
        w, "zero_point", None
    )  # only asymmetric mappings have one; Int8Tensor's own forward ignores it
    on_inputs = [getattr(w, name, None) for name in ("act_quant_kwargs", "act_pre_scale", "activation_quantization")]
    if kind == "int1" or any(a is not None for a in on_inputs) or (zero_point is not None and bool(zero_point.any())):
        return None
    return kind


@torch.no_grad()
def _requantize_torchao(module: Any, W: Tensor) -> nn.Parameter:
    w, W, block = module.weight, W.to(module.weight.device).contiguous(), list(module.weight.block_size)
    if type(w).__name__ == "Float8Tensor":
        q = type(w).from_hp(W, w.qdata.dtype, import_module("torchao.quantization").PerBlock(block))
        new = {"qdata": q.qdata, "scale": q.scale}
    else:
        ao = import_module("torchao.quantization.quant_primitives")
        bits = int(str(getattr(w, "target_dtype", torch.int8)).removeprefix("torch.int")) - bool(
            getattr(w, "reduce_range", False)
        )
        low, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        how = {"block_size": block, "target_dtype": torch.int8, "quant_min": low, "quant_max": top, "keepdim": True}
        least, zero = ao.choose_qparams_affine(W, ao.MappingType.SYMMETRIC_NO_CLIPPING_ERR, **how)
        scale, _ = ao.choose_qparams_affine(W, ao.MappingType.SYMMETRIC, eps=torch.finfo(torch.float32).eps, **how)
        new = {"scale": _kept(w.scale, scale, least, top)}
        new["qdata"] = ao.quantize_affine(W, block, new["scale"], zero, torch.int8, low, top)
    return nn.Parameter(_rebuilt(w, lambda name: new.get(name, getattr(w, name))), requires_grad=w.requires_grad)


def _codes_torchao(weight: Any) -> Tensor:
    return weight.qdata.view(torch.uint8).flatten()


def _kind_quanto(module: Any) -> str | None:
    return str(module.weight_qtype.name) if module.activation_qtype is None else None


@torch.no_grad()
def _requantize_quanto(module: Any, W: Tensor) -> nn.Parameter:
    """As its qweight property does, but from float32."""
    w, W = module.weight, W.to(module.weight.device).contiguous()
    how = {"qtype": w.qtype, "axis": 0} | ({} if w.qtype.bits == 8 else {"group_size": module.weight_group_size})
    if w.qtype.bits == 8:
        top = w.qtype.qmax
        least = torch.maximum(W / top, -W / (top + 1))
        least = least.amax(dim=1, keepdim=True) if w._scale.ndim else least.amax()
        scales = {"scale": _kept(w._scale, module.optimizer(W, **how), least, top)}
    else:
        scales = dict(zip(("scale", "shift"), (t.to(w.dtype) for t in module.optimizer(W, **how)), strict=True))
    q = import_module("optimum.quanto").quantize_weight(W, **how, **scales)
    return nn.Parameter(q, requires_grad=w.requires_grad)


def _codes_quanto(weight: Any) -> Tensor:
    data = weight._data
    return (data.unpack() if hasattr(data, "unpack") else data.view(torch.uint8)).flatten()


UNPICKLED = "torch.nn.parameter.Parameter"  # what bitsandbytes' weights are after torch.load, with all their attributes
SCHEMES = (
    Scheme(name="bitsandbytes", layer="bitsandbytes.nn.modules.Linear4bit",
           weights=("bitsandbytes.nn.modules.Params4bit", UNPICKLED), kind=_kind_4bit,
           dequantize=_dequantize_4bit, requantize=_requantize_4bit, install=_install_4bit, codes=_codes_4bit),
    Scheme(name="bitsandbytes", layer="bitsandbytes.nn.modules.Linear8bitLt",
           weights=("bitsandbytes.nn.modules.Int8Params", UNPICKLED), kind=_kind_8bit,
           dequantize=_dequantize_8bit, requantize=_requantize_8bit, install=_install_8bit, codes=_codes_8bit),
    Scheme(name="torchao", layer="torch.nn.modules.linear.Linear",
           weights=tuple(f"torchao.quantization.{c}" for c in ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")), kind=_kind_torchao,
           dequantize=_dequantize_subclass, requantize=_requantize_torchao, install=_install_subclass, codes=_codes_torchao),
    Scheme(name="quanto", layer="optimum.quanto.nn.qlinear.QLinear",
           weights=tuple(f"optimum.quanto.tensor.weights.{c}" for c in ("qbytes.WeightQBytesTensor", "qbits.WeightQBitsTensor",
                         "tinygemm.qbits.TinyGemmWeightQBitsTensor")), kind=_kind_quanto,
           dequantize=_dequantize_subclass, requantize=_requantize_quanto, install=_install_subclass, codes=_codes_quanto),
)  # fmt: skip
