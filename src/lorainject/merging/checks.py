"""Why a weight can't be folded into, or can't be given back what it was: all that merge and unmerge look at before they begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..lora.dora import DoraAdapter
from ..lora.graft import base_class
from ..lora.model_index import ModelIndex
from ..lora.replacement import ReplacementTensor
from ..lora.weight_kinds import is_quantized, is_sharded
from ..numerics.delta import is_finite
from .exchange import can_be_linear
from .quantization import scheme
from .strategies import AdaptedWeight, parameter_checksum


def why_not_mergeable(
    w: AdaptedWeight, names: Sequence[str], ties: Mapping[tuple[int, str], list[str]], dequantise: bool
) -> str | None:
    """Why nothing can be folded into this weight; None if it can."""
    host = w.hosts[0]
    weight = host.module._parameters.get(host.adapters.parameter)
    if weight is None:
        return "its weight is computed (parametrised since inject)"
    if dequantise and is_quantized(host.module) and not can_be_linear(host.module):
        return f"a {base_class(type(host.module)).__name__} can't become an nn.Linear: merge without dequantise=True, or before quantising"
    if is_quantized(host.module) and scheme(host.module) is None:
        return "its weight is quantised in a way that can't be redone: keep the adapter unmerged, or merge into the model before quantising"
    if is_sharded(weight):
        return "its weight is sharded"
    if weight.is_inference():
        return "its weight was made under torch.inference_mode and can't be changed"
    if any(not h.fits(a) for h in w.hosts for n in names if n in h.adapters for a in [h.adapters[n]]):
        return f"its weight is {tuple(weight.shape)} now, for which A and B were not made (resized since inject?)"
    if weight.is_meta or any(p.is_meta for a in w.adapters(names) for p in a.parameters()):
        return "lies on the meta device (offloaded, or never loaded): bring it back first"
    if host.key in ties:
        return f"its weight is tied to {', '.join(ties[host.key])}, which the fold would change as well (untie=True gives it memory of its own)"
    if not all(is_finite(p) for a in w.adapters(names) for p in a.parameters()):
        return "its A or B holds NaN or infinity"
    if is_quantized(host.module) and any(isinstance(a, DoraAdapter | ReplacementTensor) for a in w.adapters(names)):
        return "its weight is quantised, and magnitudes or an update of the bias come with A and B: keep the adapter unmerged"
    if w.bias is None and any(isinstance(a, DoraAdapter) and a.b is not None for a in w.adapters(names)):
        return "its layer has no bias for the update of the bias to be folded into (a new one would be a new key in the state dict)"
    return None


def why_not_reversible(w: AdaptedWeight) -> str | None:
    """Why W0 can't be given back to this weight; None if it can, as far as one sees."""
    if (folded := w.folded) is None:
        return None
    if not folded.reversible:
        return "was merged with reversible=False, which keeps nothing to go back by"
    now, shape = (w.weight.dtype, tuple(w.weight.shape)), folded.like[1]
    if now != folded.like:
        return f"is {now[0]} {now[1]} now, but was {folded.like[0]} {shape} when it was merged"
    if folded.original is not None and folded.original.device != w.weight.device:
        return f"lies on {w.weight.device} now, but what it had before on {folded.original.device}: move the model back first"
    if (
        folded.original is not None
        and w.weight is not folded.original
        and parameter_checksum(w, folded.bias is not None) != folded.mark
    ):
        return "was changed since it was merged (trained, loaded or edited)"
    return None


def tied_weights(index: ModelIndex) -> dict[tuple[int, str], list[str]]:
    """For each weight (module's id, parameter) that other tensors of the model share memory with, in whole or in part: their paths."""
    spans: dict[int, list[tuple[int, int, tuple[int, str], str]]] = {}
    for path, module in index.walked:
        for name, t in (module._parameters | module._buffers).items():
            if (
                t is not None
                and not is_sharded(t)
                and not is_traceable_wrapper_subclass(t)
                and not t.is_meta
                and t.numel()
            ):
                extent = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
                spans.setdefault(t.untyped_storage().data_ptr(), []).append(
                    (t.data_ptr(), t.data_ptr() + extent * t.itemsize, (id(module), name), f"{path}.{name}")
                )
    tied_weights: dict[tuple[int, str], list[str]] = {}
    for sharing in spans.values():
        for start, end, mine, _ in sharing:
            if others := [p for s, e, whose, p in sharing if s < end and start < e and whose != mine]:
                tied_weights.setdefault(mine, others)
    return tied_weights
