"""What an adapter holds besides A and B, between an adapter file and a model.

magnitudes      DoRA's m (lora/dora.py)
bias update     is added to the layer's bias, times the scale (PEFT's lora_bias)
replacement     a tensor that stands in a base tensor's place (PEFT's modules_to_save), or trained rows of an
embedding
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..lora.adapter import LoraAdapter
from ..lora.adapter_dict import AdapterDict
from ..lora.dora import BIAS_KINDS, DORA_KINDS, DoraAdapter
from ..lora.model_index import AdaptedSite, ModelIndex, execution_device
from ..lora.offset import OffsetAdapter
from ..lora.replacement import ReplacementTensor
from ..lora.weight_kinds import is_quantized, why_unsupported
from ..numerics.delta import alpha_of
from ..plan import site_name
from ..surgery import LoadedFactors
from ..targets.model_weights import ModelWeight
from ..targets.trained_tensors import PlannedReplacement, replacements, tied_parameters
from .record import AdapterFile, StoredSite, TokenRows


def loaded_factors(stored: StoredSite, dtype: torch.dtype | None) -> LoadedFactors:
    """Return what a file has for a site; magnitudes and bias update in `dtype`, if one is given."""
    m, b = (t if t is None or dtype is None else t.to(dtype) for t in (stored.magnitude, stored.bias))
    if not stored.constant_ranks:
        return LoadedFactors(stored.A, stored.B, m, b)
    (A, A0), (B, B0) = stored.A.chunk(2, -2), stored.B.chunk(2, -1)
    return LoadedFactors(A, B, A0=A0, B0=-B0)


def stored_factors(adapter: LoraAdapter) -> dict[str, Any]:
    """Return A and B with their settings as fields of a StoredSite: of rank 2 r if the initial product is
    subtracted."""
    settings = {"scaling": adapter.scaling, "dropout": adapter.dropout}
    if not isinstance(adapter, OffsetAdapter):
        return settings | {"A": adapter.A.detach(), "B": adapter.B.detach(), "alpha": adapter.alpha}
    A, B = (t.detach() for t in adapter.joined)
    alpha = alpha_of(adapter.scale, 2 * adapter.r, adapter.scaling)
    return settings | {"A": A, "B": B, "alpha": alpha, "constant_ranks": adapter.r}


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
        if same_shape and file.format == "peft" and torch.equal(W0.detach().cpu().to(value.dtype), value):
            continue  # PEFT also saves embeddings that did not change
        tied = tied_parameters(index, module, W0)
        tied_paths = [paths[id(other)][0] for other, _ in tied]
        if reason := _why_irreplaceable(file, name, module, parameter, W0, value, ids, tied_paths):
            problems.append(f"{name}: {reason}")
            continue
        planned += replacements(index, weights, module, parameter, value.to(execution_device(module, parameter)), ids)
    return planned


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
        is_embedding = isinstance(module, nn.Embedding) or ids is not None
        way_out = (
            "resize it first (resize_token_embeddings)"
            if is_embedding
            else "build the model with the same sizes, as with from_pretrained(..., num_labels=...)"
        )
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
