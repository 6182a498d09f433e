"""Turn a quantized linear's codes into numbers and back: what a merge into a quantized weight needs.

    codes -> dequantize -> W0 in float32 -> (merge adds s B A) -> requantize -> codes and scales of the same scheme

The library's own quantizer does the last step, from float32, with the type, block size, nesting and dtypes that the
weight had. W0 lies on the grid of the codes, so a delta smaller than half a step is rounded away again, and a larger
one pays for one more quantization: in 4 bits, most of an ordinary adapter's delta is lost (figures in
docs/merging.md). QLoRA (Dettmers et al. 2023, arXiv 2305.14314) therefore keeps A and B apart.

The surprising decision: requantizing W0 itself must give W0, codes and scales, because rows that no adapter touches
must not change. With most schemes it does, since a block's extreme value has the outermost code. Symmetric integers do
not always have it (torchao stores 7.5 steps as 7), so a new scale computed from stored values could be 13 % off
(int4). Such a block keeps its scale while W still fits it (`_keep_scales`). The exception is bitsandbytes' double
quantization, whose 8-bit scales are rounded around their common mean: W0 changes by 1e-4 of its norm, or 3e-3 with
outliers.

`find_scheme` goes by the exact classes of layer and weight. Whatever else is quantized has no scheme: GPTQ, AWQ and
HQQ layers, layers that quantize their inputs, and weights that are still to be quantized. No library is imported but
the one whose layer is asked about.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..lora.graft import base_class

UNPICKLED = (
    "torch.nn.parameter.Parameter"  # the class of bitsandbytes' weights after torch.load, which keeps their attributes
)


class Scheme(ABC):
    """How one kind of quantized linear stores its weight. Only `install` changes a module.

    Args:
        weight_type: What the library calls the type of this weight.
    """

    library: ClassVar[str]
    layer: ClassVar[str]
    """Dotted name of the class whose forward the layer has."""
    weights: ClassVar[tuple[str, ...]]
    """Dotted names of the classes that the weight may have."""

    def __init__(self, weight_type: str) -> None:
        self.name = f"{self.library} {weight_type}"

    name: str
    """The library and the type of the weight, for messages."""

    @staticmethod
    @abstractmethod
    def weight_type(module: Any) -> str | None:
        """Return the type of the layer's weight; None if requantizing cannot reproduce its settings or state."""

    @abstractmethod
    def dequantize(self, module: Any) -> Tensor:
        """Return codes times scales, shape (out, in), in float32: before the forward rounds them to its dtype."""

    @abstractmethod
    def requantize(self, module: Any, W: Tensor) -> nn.Parameter:
        """Return W (out, in), float32, as a new weight for this layer, on the device of its present weight."""

    def install(self, module: Any, parameter: Any) -> None:
        """Let the layer's forward use this weight. The weight that it replaces can be installed again."""
        module.weight = parameter

    @abstractmethod
    def codes(self, weight: Any) -> Tensor:
        """Return one code (uint8) for each of out * in elements; codes that mean the same are equal."""

    def codes_changed(self, before: nn.Parameter, after: nn.Parameter) -> float:
        """Return the share of the elements whose code differs, whatever happened to the scales."""
        a, b = self.codes(before), self.codes(after)
        return int(torch.count_nonzero(a != b)) / a.numel()


def find_scheme(module: nn.Module) -> Scheme | None:
    """Return the scheme by which the layer's weight is quantized; None if there is none, or it is not quantized yet."""
    weight_class, layer_class = _dotted(type(module._parameters.get("weight"))), base_class(type(module))
    for scheme in SCHEMES:
        is_this = weight_class in scheme.weights and _has_forward_of(layer_class, scheme.layer)
        if is_this and (weight_type := scheme.weight_type(module)) is not None:
            return scheme(weight_type)
    return None


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _has_forward_of(cls: type[nn.Module], layer: str) -> bool:
    """True if `cls` is the class of this dotted name, or inherits that class's forward."""
    return any(_dotted(c) == layer and vars(c).get("forward") is cls.forward for c in cls.__mro__)


class Bitsandbytes4bit(Scheme):
    """Two codes per byte, and a QuantState with one absmax per block, which may be quantized too (nested)."""

    library = "bitsandbytes"
    layer = "bitsandbytes.nn.modules.Linear4bit"
    weights = ("bitsandbytes.nn.modules.Params4bit", UNPICKLED)

    @staticmethod
    def weight_type(module: Any) -> str | None:
        state = getattr(module.weight, "quant_state", None)
        if state is None or tuple(state.shape) != (module.out_features, module.in_features):
            return None  # not quantized yet, or made from a weight (in, out)
        return str(state.quant_type)

    @torch.no_grad()
    def dequantize(self, module: Any) -> Tensor:
        codes, state, *_ = self._stored(module.weight)
        state.dtype = torch.float32
        return import_module("bitsandbytes.functional").dequantize_4bit(codes.view(-1, 1), state)

    @torch.no_grad()
    def requantize(self, module: Any, W: Tensor) -> nn.Parameter:
        old = module.weight
        _, state, nested, dtype = self._stored(old)
        settings = {  # of the state: a parameter that FSDP made has the defaults itself
            "blocksize": state.blocksize,
            "quant_type": state.quant_type,
            "compress_statistics": nested,
            "quant_storage": old.quant_storage,
        }
        functional = import_module("bitsandbytes.functional")
        codes, state = functional.quantize_4bit(W.to(old.device).contiguous(), **settings)
        state.dtype = dtype
        settings |= {"quant_state": state, "module": old.module, "bnb_quantized": True}
        return import_module("bitsandbytes.nn").Params4bit(codes, requires_grad=old.requires_grad, **settings)

    def install(self, module: Any, parameter: Any) -> None:
        module.weight = parameter
        module.quant_state = parameter.quant_state  # a second reference, for FSDP

    def codes(self, weight: Any) -> Tensor:
        packed, state, *_ = self._stored(weight)
        packed = packed.view(torch.uint8).flatten()
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[: state.shape.numel()]
        return codes.masked_fill(codes == 8, 0) if state.quant_type == "fp4" else codes  # code 8 of fp4 is minus zero

    @staticmethod
    def _stored(weight: Any) -> tuple[Tensor, Any, bool, torch.dtype]:
        """Return packed codes, state, whether its absmax was quantized too, and the dtype before quantization."""
        state = copy.copy(weight.quant_state)
        if not getattr(state, "packing_format_for_cpu", False):
            return weight.data, state, state.nested, state.dtype
        # A forward on a CPU with AVX512-BF16 has rearranged the codes and stored absmax (in / block, out) in bfloat16.
        # The library's inverse quantizes that absmax again, but the forward multiplies by it as it is.
        absmax = state.absmax.T.reshape(-1).float()
        functional = import_module("bitsandbytes.functional")
        codes, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
        nested, state.absmax, state.nested = state.nested, absmax, False
        return codes, state, nested, state.dtype


class Bitsandbytes8bit(Scheme):
    """Codes, and one absmax per row. The first forward moves both from the weight to the layer's state."""

    library = "bitsandbytes"
    layer = "bitsandbytes.nn.modules.Linear8bitLt"
    weights = ("bitsandbytes.nn.modules.Int8Params", UNPICKLED)

    @staticmethod
    def weight_type(module: Any) -> str | None:
        # With has_fp16_weights the weight is a float that each forward quantizes.
        if module.state.has_fp16_weights or not hasattr(module.weight, "CB"):
            return None
        return "int8" if all(t is not None for t in _int8_codes_and_absmax(module)) else None

    @torch.no_grad()
    def dequantize(self, module: Any) -> Tensor:
        codes, absmax = _int8_codes_and_absmax(module)
        return codes.float() * (absmax * (1 / 127)).unsqueeze(1)

    @torch.no_grad()
    def requantize(self, module: Any, W: Tensor) -> nn.Parameter:
        W = W.to(module.weight.device, torch.float16)  # the only dtype of its kernels
        codes, absmax, _ = import_module("bitsandbytes.functional").int8_vectorwise_quant(W)
        return import_module("bitsandbytes.nn").Int8Params(codes, requires_grad=False, CB=codes, SCB=absmax)

    def install(self, module: Any, parameter: Any) -> None:
        module.weight.CB, module.weight.SCB = _int8_codes_and_absmax(module)  # the old weight must keep its scales
        module.state.reset_grads()
        module.weight = parameter

    def codes(self, weight: Any) -> Tensor:
        return weight.data.view(torch.uint8).flatten()


def _int8_codes_and_absmax(module: Any) -> tuple[Any, Any]:
    holder = module.state if module.weight.CB is None else module.weight
    return holder.CB, holder.SCB


class TensorSubclass(Scheme):
    """A tensor subclass, which torch.compile's protocol (__tensor_flatten__) takes apart and puts together again."""

    @torch.no_grad()
    def dequantize(self, module: Any) -> Tensor:
        w = module.weight

        def part(name: str) -> Tensor:  # 16-bit scales in float32, so that their products with the codes are exact
            value: Tensor = getattr(w, name)
            return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value

        attributes = {"dtype": torch.float32} if "dtype" in w.__tensor_flatten__()[1] else {}
        return _rebuild(w, part, **attributes).dequantize()


def _rebuild(tensor: Any, part: Callable[[str], Tensor], **attributes: Any) -> Any:
    """Return a tensor of the same class with other parts (codes, scales ...) and, of its attributes, these changed."""
    names, meta = tensor.__tensor_flatten__()
    parts = {name: part(name) for name in names}
    return type(tensor).__tensor_unflatten__(parts, {**meta, **attributes}, tensor.shape, tensor.stride())


def _keep_scales(old: Tensor, new: Tensor, smallest: Tensor, top: float) -> Tensor:
    """Return the old scale of each block whose extreme still has the outermost code or one of the two next to it, else
    the new scale.

    Args:
        old: The scales that the weight has.
        new: The scales that the library computes from W.
        smallest: The smallest scales that clip nothing: the larger of max(W) / top and min(W) / (-top - 1).
        top: The largest code.
    """
    extreme = smallest / old * top
    return torch.where((extreme >= max(top - 2.5, top / 2)) & (extreme <= top + 0.25), old, new.to(old.dtype))


class Torchao(TensorSubclass):
    """torchao's weight-only integers and float8."""

    library = "torchao"
    layer = "torch.nn.modules.linear.Linear"
    weights = tuple(f"torchao.quantization.{c}" for c in ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor"))

    @staticmethod
    def weight_type(module: Any) -> str | None:
        w = module.weight
        name = str(getattr(w, "target_dtype", w.qdata.dtype)).removeprefix("torch.")
        zero_point = getattr(w, "zero_point", None)  # of asymmetric mappings only; Int8Tensor's own forward ignores it
        for_inputs = ("act_quant_kwargs", "act_pre_scale", "activation_quantization")
        quantizes_inputs = any(getattr(w, attribute, None) is not None for attribute in for_inputs)
        if name == "int1" or quantizes_inputs or (zero_point is not None and bool(zero_point.any())):
            return None
        return name

    @torch.no_grad()
    def requantize(self, module: Any, W: Tensor) -> nn.Parameter:
        w, W, block = module.weight, W.to(module.weight.device).contiguous(), list(module.weight.block_size)
        if type(w).__name__ == "Float8Tensor":
            q = type(w).from_hp(W, w.qdata.dtype, import_module("torchao.quantization").PerBlock(block))
            new = {"qdata": q.qdata, "scale": q.scale}
        else:
            ao = import_module("torchao.quantization.quant_primitives")
            bits = int(str(getattr(w, "target_dtype", torch.int8)).removeprefix("torch.int"))
            bits -= bool(getattr(w, "reduce_range", False))
            bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            choose = functools.partial(ao.choose_qparams_affine, W, block_size=block, target_dtype=torch.int8,
                                       quant_min=bottom, quant_max=top, keepdim=True)  # fmt: skip
            smallest, zero = choose(ao.MappingType.SYMMETRIC_NO_CLIPPING_ERR)
            scale, _ = choose(ao.MappingType.SYMMETRIC, eps=torch.finfo(torch.float32).eps)
            new = {"scale": _keep_scales(w.scale, scale, smallest, top)}
            new["qdata"] = ao.quantize_affine(W, block, new["scale"], zero, torch.int8, bottom, top)
        return nn.Parameter(_rebuild(w, lambda name: new.get(name, getattr(w, name))), requires_grad=w.requires_grad)

    def codes(self, weight: Any) -> Tensor:
        return weight.qdata.view(torch.uint8).flatten()


class Quanto(TensorSubclass):
    """optimum-quanto's frozen layers."""

    library = "quanto"
    layer = "optimum.quanto.nn.qlinear.QLinear"
    weights = tuple(
        f"optimum.quanto.tensor.weights.{c}"
        for c in ("qbytes.WeightQBytesTensor", "qbits.WeightQBitsTensor", "tinygemm.qbits.TinyGemmWeightQBitsTensor")
    )

    @staticmethod
    def weight_type(module: Any) -> str | None:
        return str(module.weight_qtype.name) if module.activation_qtype is None else None

    @torch.no_grad()
    def requantize(self, module: Any, W: Tensor) -> nn.Parameter:  # as the layer's qweight property, but from float32
        w, W = module.weight, W.to(module.weight.device).contiguous()
        if w.qtype.bits == 8:
            settings, top = {"qtype": w.qtype, "axis": 0}, w.qtype.qmax
            smallest = torch.maximum(W / top, -W / (top + 1))
            smallest = smallest.amax(dim=1, keepdim=True) if w._scale.ndim else smallest.amax()
            scales = {"scale": _keep_scales(w._scale, module.optimizer(W, **settings), smallest, top)}
        else:
            settings = {"qtype": w.qtype, "axis": 0, "group_size": module.weight_group_size}
            scale, shift = module.optimizer(W, **settings)
            scales = {"scale": scale.to(w.dtype), "shift": shift.to(w.dtype)}
        q = import_module("optimum.quanto").quantize_weight(W, **settings, **scales)
        return nn.Parameter(q, requires_grad=w.requires_grad)

    def codes(self, weight: Any) -> Tensor:
        data = weight._data
        return (data.unpack() if hasattr(data, "unpack") else data.view(torch.uint8)).flatten()


SCHEMES: tuple[type[Scheme], ...] = (Bitsandbytes4bit, Bitsandbytes8bit, Torchao, Quanto)
