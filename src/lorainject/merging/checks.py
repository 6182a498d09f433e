"""What merge and unmerge check before they begin: why a weight cannot be merged into, or W0 cannot be restored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import StateError
from ..lora.dora import DoraAdapter
from ..lora.graft import base_class
from ..lora.model_index import ModelIndex, WeightKey
from ..lora.replacement import ReplacementTensor
from ..lora.strength import read_strengths
from ..lora.weight_kinds import is_quantized, is_sharded, stored_tensor
from ..numerics.delta import is_finite
from .adapted_weight import AdaptedWeight
from .quantization import find_scheme
from .strategies import can_be_linear


def strengths_to_merge(
    index: ModelIndex, names: str | Sequence[str] | Mapping[str, float] | None, *, reversible: bool = True,
    instead: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Return the strength of each adapter that merge(model, names) merges.

    Args:
        index: An index of the model.
        names: As for `merge`.
        reversible: As for `merge`.
        instead: True if these adapters are merged instead of those that are merged or active now.

    Raises:
        SpecError: A strength is not a finite number.
        StateError: The model's state does not allow the merge.
    """
    merged, active = [] if instead else index.merged, index.active_strengths
    named = read_strengths("merge", [] if names is None else [names])
    if again := [name for name in merged if names is None or name in named]:
        raise StateError(
            f"{quoted(again)} is already merged",
            way_out="call unmerge(model) first, or use merged(model, ...) to merge something else for a while",
        )
    index.require_adapters("merge", *named, merged=True, computed=True)  # _why_not_mergeable names them
    index.require_idle("merge")
    if not reversible and index.is_inside_merged:
        raise StateError(
            "cannot merge with reversible=False inside merged(...), which restores the weights at its end",
            way_out="leave the context first",
        )
    if not isinstance(names, Mapping):
        named = {name: active.get(name, t) for name, t in named.items()}
    chosen = active if names is None else named
    if not chosen:
        raise StateError(
            "no adapter is active" if names is None else "no adapter was named",
            way_out="activate(model, name) first, or name the adapter: merge(model, name)",
        )
    if not merged and not instead and (dropped := [name for name in active if name not in chosen]):
        raise StateError(
            f"{quoted(dropped)} is active but would not be merged, which would change the output",
            way_out=f"call activate(model, {quoted(chosen)}) first, or merge all active adapters",
        )
    return chosen


def quoted(names: Iterable[str]) -> str:
    """Return names as messages list them."""
    return ", ".join(map(repr, names))


def unmergeable_weights(
    weights: Sequence[AdaptedWeight], names: Sequence[str], ties: Mapping[WeightKey, Sequence[str]], dequantize: bool
) -> list[str]:
    """Return one line, name and reason, for every weight into which these adapters cannot be merged."""
    reasons = {w.name: _why_not_mergeable(w, names, ties, dequantize) for w in weights if w.adapters(names)}
    return [f"{name}: {reason}" for name, reason in reasons.items() if reason]


def irreversible_weights(weights: Sequence[AdaptedWeight]) -> list[str]:
    """Return one line, name and reason, for every merged weight whose W0 cannot be restored, as far as can be seen."""
    return [f"{w.name}: {reason}" for w in weights if (reason := _why_not_reversible(w))]


def _why_not_mergeable(
    w: AdaptedWeight, names: Sequence[str], ties: Mapping[WeightKey, Sequence[str]], dequantize: bool
) -> str | None:
    module, adapters = w.module, w.adapters(names)
    weight = stored_tensor(module, w.key[1])
    if weight is None:
        return (
            "its weight is computed from other parameters since inject (by pruning, spectral_norm, weight_norm or a"
            " parametrization): undo that first"
        )
    quantized = is_quantized(module)
    if quantized and dequantize and not can_be_linear(module):
        return (
            f"a {base_class(type(module)).__name__} cannot become an nn.Linear: merge without dequantise=True,"
            " or before quantizing"
        )
    if quantized and find_scheme(module) is None:
        return (
            "its weight is quantized by a scheme that cannot be applied again: keep the adapter unmerged,"
            " or merge before quantizing"
        )
    if is_sharded(weight):
        return "its weight is sharded"
    if weight.is_inference():
        return "its weight was made under torch.inference_mode and cannot be changed"
    if not all(site.fits(site.adapters[name]) for site in w.sites for name in names if name in site.adapters):
        return (
            f"its weight is {tuple(weight.shape)} now, but A and B were made for another shape (resized since inject?)"
        )
    if weight.is_meta or any(p.is_meta for adapter in adapters for p in adapter.parameters()):
        return "is on the meta device (offloaded, or never loaded): bring it back first"
    if (reason := _why_not_one(w)) is not None:
        return reason
    if w.key in ties:
        return (
            f"its weight is tied to {', '.join(ties[w.key])}, which the merge would change as well"
            " (untie=True gives it memory of its own)"
        )
    if not all(is_finite(p) for adapter in adapters for p in adapter.parameters()):
        return "its A or B holds NaN or infinity"
    if quantized and any(isinstance(adapter, DoraAdapter | ReplacementTensor) for adapter in adapters):
        return (
            "its weight is quantized, and its adapter has magnitudes (DoRA), a bias update or a replacement tensor:"
            " keep the adapter unmerged"
        )
    if w.bias is None and any(isinstance(adapter, DoraAdapter) and adapter.b is not None for adapter in adapters):
        return (
            "its layer has no bias for the update of the bias to be merged into"
            " (a new bias would be a new key in the state dict)"
        )
    return None


def _why_not_reversible(w: AdaptedWeight) -> str | None:
    if (record := w.record) is None:
        return None
    if not record.is_reversible:
        return "was merged with reversible=False, which keeps nothing to restore it from"
    if (reason := _why_not_one(w)) is not None:
        return reason
    dtype, shape = w.weight.dtype, tuple(w.weight.shape)
    if (dtype, shape) != (record.dtype, record.shape):
        return f"is {dtype} {shape} now, but was {record.dtype} {record.shape} when it was merged"
    if (original := record.original) is None:
        return None
    if original.device != w.weight.device:
        return (
            f"lies on {w.weight.device} now, but the weight from before the merge lies on {original.device}:"
            " move the model back first"
        )
    if w.weight is not original and w.checksum(with_bias=record.original_bias is not None) != record.checksum:
        return "was changed since it was merged (trained, loaded or edited)"
    return None


def _why_not_one(w: AdaptedWeight) -> str | None:
    """Return why a weight that several modules shared at inject cannot be written for all of them."""
    site, parameter = w.sites[0], w.key[1]
    if any(module._parameters.get(parameter) is not w.weight for module in site.tied):
        return "is no longer tied to the modules that it was tied to at inject: tie them again (model.tie_weights())"
    has_update = any(isinstance(a, DoraAdapter) and a.b is not None for s in w.sites for a in s.adapters.children())
    if has_update and any(module._parameters.get("bias") is not w.bias for module in site.tied):
        return "is tied to a module with another bias, and its adapter has an update of the bias: keep it unmerged"
    return None


def tied_weights(index: ModelIndex) -> dict[WeightKey, list[str]]:
    """Return, for every weight that shares memory with other tensors of the model, in whole or in part, their paths.

    Modules that share a parameter and its adapters have one weight, which is not tied by that.
    """
    first = {(id(m), s.adapters.parameter): s.key for s in index.sites.values() for m in s.tied}
    spans: dict[int, list[tuple[int, int, WeightKey, str]]] = {}
    for path, module in index.walked:
        for name, t in (module._parameters | module._buffers).items():
            if t is not None and _has_memory(t):
                start, size = (
                    t.data_ptr(),
                    sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1,
                )
                key = first.get((id(module), name), (id(module), name))
                span = start, start + size * t.itemsize, key, f"{path}.{name}"
                spans.setdefault(t.untyped_storage().data_ptr(), []).append(span)
    ties: dict[WeightKey, list[str]] = {}
    for sharing in spans.values():
        for start, end, key, _ in sharing:
            others = [path for s, e, other, path in sharing if s < end and start < e and other != key]
            if others:
                ties.setdefault(key, others)
    return ties


def _has_memory(t: Tensor) -> bool:
    """True if the tensor has elements in a plain storage."""
    return not (is_sharded(t) or is_traceable_wrapper_subclass(t) or t.is_meta or t.numel() == 0)
