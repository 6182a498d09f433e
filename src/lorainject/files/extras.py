"""What an adapter holds besides A and B, between an adapter file and a model.

magnitudes      DoRA's m (lora/dora.py)
bias update     is added to the layer's bias, times the scale (PEFT's lora_bias)
replacement     a tensor that stands in a base tensor's place (PEFT's modules_to_save), or trained rows of an
embedding
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..lora.adapter import LoraAdapter
from ..lora.adapter_dict import AdapterDict
from ..lora.dora import DoraAdapter
from ..lora.model_index import AdaptedSite, ModelIndex, execution_device
from ..lora.replacement import ReplacementTensor
from ..lora.weight_kinds import is_quantized, why_unsupported
from ..plan import site_name
from ..surgery import LoadedFactors, PlannedReplacement
from ..targets.model_weights import ModelWeight
from .record import AdapterFile, StoredSite, TokenRows

BIAS_KINDS = ("linear", "linear^T", "conv")
"""The kinds of weights whose layer can have a bias update."""
DORA_KINDS = (*BIAS_KINDS, "embedding")
"""The kinds of weights that can have magnitudes."""


def loaded_factors(stored: StoredSite, dtype: torch.dtype | None) -> LoadedFactors:
    """Return A, B, magnitudes and bias update of a site; the last two in `dtype`, if one is given."""
    m, b = (t if t is None or dtype is None else t.to(dtype) for t in (stored.magnitude, stored.bias))
    return stored.A, stored.B, m, b


def why_extras_unsupported(stored: StoredSite, weight: ModelWeight | None, dtype: torch.dtype | None) -> str | None:
    """Return why the magnitudes or the bias update cannot go onto a weight; None if they can, or if there are none."""
    m, b = stored.magnitude, stored.bias
    if weight is None or (m is None and b is None):
        return None
    what = "magnitudes (DoRA)" if m is not None else "a bias update"
    if weight.parameter != "weight" or weight.kind.name not in (DORA_KINDS if b is None else BIAS_KINDS):
        return f"has {what}, which are not supported on a weight of kind {weight.kind.name}"
    if m is not None and stored.magnitude_axis == "in":
        return "has magnitudes by input (LyCORIS's DoRA without wd_on_output): not supported, merge them with LyCORIS"
    if m is not None and is_quantized(weight.module):
        return "has magnitudes (DoRA), which are not supported on a quantized weight, whose norm is not exact"
    is_read = weight.readers or any(child.is_read for child in _adapter_dicts(weight.module))
    if b is not None and weight.kind.name != "conv" and is_read:
        return "has an update of a bias that the model's own code reads or another adapter replaces: not supported"
    if dtype is not None and not all(bool(t.to(dtype).isfinite().all()) for t in (m, b) if t is not None):
        return f"its magnitudes or its bias update exceed the range of {dtype}"
    return None


def plan_replacements(
    index: ModelIndex, file: AdapterFile, weights: Mapping[str, ModelWeight], problems: list[str]
) -> list[PlannedReplacement]:
    """Return the replacements that a file makes in a model. Tensors that the model has already are left out.

    Args:
        index: The index of the model.
        file: The file, under the names of the model.
        weights: The weights of the model by name.
        problems: Gets a line for each replacement that is not possible.
    """
    if not file.replaced and not file.tokens:
        return []
    paths: dict[int, list[str]] = {}
    for path, module in index.walked:
        paths.setdefault(id(module), []).append(path)
    planned: list[PlannedReplacement] = []
    wanted: list[tuple[str, Tensor, tuple[int, ...] | None]] = [(name, t, None) for name, t in file.replaced.items()]
    wanted += [(path, tokens.rows, tokens.ids) for path, tokens in file.tokens.items()]
    for name, value, ids in wanted:
        path, parameter = (name, "weight") if name in index.modules else name.rpartition(".")[::2]
        module = index.modules.get(path, nn.Module())
        W0 = module._parameters.get(parameter)
        if W0 is None:
            problems.append(f"{name}: is not in this model, but the file replaces it")
            continue
        same_shape = ids is None and W0.shape == value.shape
        if same_shape and torch.equal(W0.detach().cpu().to(value.dtype), value):
            continue  # PEFT also saves embeddings that did not change
        tied = _tied_parameters(index, module, W0)
        tied_paths = [paths[id(other)][0] for other, _ in tied]
        if reason := _why_irreplaceable(file, name, module, parameter, W0, value, ids, tied_paths):
            problems.append(f"{name}: {reason}")
            continue
        tensor = nn.Parameter(value.to(execution_device(module, parameter)))
        for other, other_parameter in [(module, parameter), *(tied if ids is not None else [])]:
            first = paths[id(other)][0]
            readers = weights[first].readers if first in weights else ()
            shape = tuple(other._parameters[other_parameter].shape)  # type: ignore[union-attr]
            planned.append(
                PlannedReplacement(
                    tuple(paths[id(other)]), other_parameter,
                    tuple((paths[id(reader)][0], reader) for reader in readers if reader is not other),
                    ReplacementTensor(tensor, shape, ids, is_tied_copy=other is not module),
                )
            )  # fmt: skip
    return planned


def _tied_parameters(index: ModelIndex, module: nn.Module, weight: Tensor) -> list[tuple[nn.Module, str]]:
    """Return the other modules that have this weight, with its name in each."""
    others = {id(m): m for _, m in index.walked if m is not module}
    return [(m, name) for m in others.values() for name, p in m._parameters.items() if p is weight]


def _why_irreplaceable(file: AdapterFile, name: str, module: nn.Module, parameter: str, W0: Tensor, value: Tensor,
                       ids: tuple[int, ...] | None, tied: Sequence[str]) -> str | None:  # fmt: skip
    """Return why a tensor of the base cannot be replaced by that of the file; None if it can."""
    if (reason := why_unsupported(module, parameter)) is not None:
        return reason
    if is_quantized(module):
        return "the file replaces this tensor, which is not supported for a quantized layer"
    if any(site_name(s.path, s.parameter) == name for s in file.sites) or (ids is not None and name in file.replaced):
        others = "A and B (or rows of tokens) for it as well: not supported"
        return f"the file brings a whole base weight that is not this model's, and {others}"
    other_rows = len(value) != len(W0) if ids is None else max(ids) >= len(W0)
    if value.shape[1:] != W0.shape[1:] or other_rows:
        shape = f"{tuple(value.shape)}" + ("" if ids is None else f" for the rows {min(ids)} to {max(ids)}")
        way_out = "resize it first (resize_token_embeddings)"
        return f"the file has {shape}, this model's is {tuple(W0.shape)}: {way_out}"
    saved = [m for m in file.config.get("modules_to_save") or [] if isinstance(m, str)]
    if tied and ids is None and not any(name == m or name.endswith(f".{m}") for m in saved):
        return f"is tied to {', '.join(tied)}, and the file does not say whether it replaces both"
    if not bool(value.to(W0.dtype).isfinite().all()):
        return f"the file's tensor exceeds the range of {W0.dtype}"
    in_file = any(s.bias is not None and site_name(s.path, "bias") == name for s in file.sites)
    adapters = [adapter for child in _adapter_dicts(module) for adapter in child.children()]
    if in_file or any(isinstance(adapter, DoraAdapter) and adapter.b is not None for adapter in adapters):
        return "is replaced, but another adapter or the file itself has an update of the bias: not supported"
    return None


def _adapter_dicts(module: nn.Module) -> list[AdapterDict]:
    return [child for child in module.children() if isinstance(child, AdapterDict)]


def stored_replacements(sites: Mapping[str, AdaptedSite], name: str) -> tuple[dict[str, Tensor], dict[str, TokenRows]]:
    """Return the whole tensors and the rows of tokens that an adapter on a model replaces, as a record holds them."""
    tensors: dict[str, Tensor] = {}
    tokens: dict[str, TokenRows] = {}
    for key, site in sites.items():
        adapter = site.adapters[name]
        if isinstance(adapter, ReplacementTensor) and not adapter.is_tied_copy:
            value = adapter.value.detach()
            if adapter.ids is None:
                tensors[key] = value
            else:
                tokens[key] = TokenRows(ids=adapter.ids, rows=value)
    return tensors, tokens


def magnitude_and_bias(adapter: LoraAdapter) -> tuple[Tensor | None, Tensor | None]:
    """Return the magnitudes and the bias update of an adapter; None for each that it does not have."""
    if not isinstance(adapter, DoraAdapter):
        return None, None
    m, b = adapter.m, adapter.b
    return None if m is None else m.detach(), None if b is None else b.detach()
