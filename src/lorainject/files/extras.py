"""What a file holds beside A and B, between the record and a model: magnitudes, updates of biases, whole tensors and rows of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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

BIASED = ("linear", "linear^T", "conv")
DORA = (*BIASED, "embedding")
"""The kinds of layers whose bias may have an update, and that may have magnitudes."""


def given(stored: StoredSite, dtype: torch.dtype | None) -> LoadedFactors:
    """A and B, and what belongs to them, in this dtype (None: as in the file)."""
    m, b = (t if t is None or dtype is None else t.to(dtype) for t in (stored.magnitude, stored.bias))
    return stored.A, stored.B, m, b


def problem(stored: StoredSite, w: ModelWeight | None, dtype: torch.dtype | None) -> str | None:
    """Why the magnitudes or the update of the bias can't go onto this weight; None if there are none, or they can."""
    m, b = stored.magnitude, stored.bias
    if w is None or (m is None and b is None):
        return None
    what = "magnitudes (DoRA)" if m is not None else "an update of a bias"
    if w.parameter != "weight" or w.kind.name not in (DORA if b is None else BIASED):
        return f"{what} on a weight of the kind {w.kind.name}: not supported"
    if m is not None and stored.magnitude_axis == "in":
        return "magnitudes by input (LyCORIS's DoRA without wd_on_output): not supported, merge them with LyCORIS"
    if m is not None and is_quantized(w.module):
        return "magnitudes (DoRA) on a quantised weight: not supported, since their norm is of the weight's own numbers"
    if (
        b is not None
        and w.kind.name != "conv"
        and (w.readers or any(a.is_read for a in w.module.children() if isinstance(a, AdapterDict)))
    ):
        return "an update of a bias that the model's own code reads, or that another adapter replaces: not supported"
    if dtype is not None and not all(bool(t.to(dtype).isfinite().all()) for t in (m, b) if t is not None):
        return f"its magnitudes or update of the bias do not fit into {dtype}"
    return None


def replacements(
    index: ModelIndex, file: AdapterFile, by_name: Mapping[str, ModelWeight], problems: list[str]
) -> list[PlannedReplacement]:
    """The whole tensors and rows of tokens for this model, but for those that it has already; what is wrong goes into `problems`."""
    if not file.replaced and not file.tokens:
        return []
    paths: dict[int, list[str]] = {}
    for path, module in index.walked:
        paths.setdefault(id(module), []).append(path)
    there, found = index.modules, []
    wanted: list[tuple[str, Tensor, tuple[int, ...] | None]] = [(name, t, None) for name, t in file.replaced.items()]
    for name, value, ids in wanted + [(path, t.rows, t.ids) for path, t in file.tokens.items()]:
        path, parameter = (name, "weight") if name in there else name.rpartition(".")[::2]
        module = there.get(path, nn.Module())
        W0 = module._parameters.get(parameter)
        if (
            W0 is not None
            and W0.shape == value.shape
            and ids is None
            and torch.equal(W0.detach().cpu().to(value.dtype), value)
        ):
            continue  # PEFT lets embeddings come along as they are
        twins = [
            (m, p)
            for _, m in dict.fromkeys(index.walked)
            for p, t in m._parameters.items()
            if t is W0 and m is not module
        ]
        twins = list(dict.fromkeys(twins))
        if reason := _unreplaceable(file, name, module, parameter, value, ids, [paths[id(m)][0] for m, _ in twins]):
            problems.append(f"{name}: {reason}")
            continue
        tensor = nn.Parameter(value.to(execution_device(module, parameter)))
        for m, p in [(module, parameter), *(twins if ids is not None else [])]:
            readers = by_name[paths[id(m)][0]].readers if paths[id(m)][0] in by_name else ()
            found.append(
                PlannedReplacement(
                    tuple(paths[id(m)]), p, tuple((paths[id(r)][0], r) for r in readers if r is not m),
                    ReplacementTensor(tensor, tuple(m._parameters[p].shape), ids, is_tied_copy=m is not module),  # type: ignore[union-attr]
                )
            )  # fmt: skip
    return found


def _unreplaceable(file: AdapterFile, name: str, module: nn.Module, parameter: str, value: Tensor, ids: tuple[int, ...] | None,
                   tied: list[str]) -> str | None:  # fmt: skip
    W0 = module._parameters.get(parameter)
    if W0 is None:
        return "is not in this model, but the file replaces it"
    if (reason := why_unsupported(module, parameter)) is not None:
        return reason
    if is_quantized(module):
        return "its layer is quantised, and the file replaces a tensor of it: not supported"
    if any(site_name(s.path, s.parameter) == name for s in file.sites) or (ids is not None and name in file.replaced):
        return "the file brings a whole base weight that is not this model's, and A and B (or rows of tokens) for it as well: not supported"
    if (
        value.shape[1:] != W0.shape[1:]
        or (ids is None and len(value) != len(W0))
        or (ids is not None and max(ids) >= len(W0))
    ):
        rows = "" if ids is None else f" for the rows {min(ids)} to {max(ids)}"
        return f"the file has {tuple(value.shape)}{rows}, this model's is {tuple(W0.shape)}: resize it first (resize_token_embeddings)"
    saved = file.config.get("modules_to_save") or []
    if tied and ids is None and not any(name == m or name.endswith(f".{m}") for m in saved if isinstance(m, str)):
        return f"is tied to {', '.join(tied)}, and the file does not say whether it replaces both"
    if not bool(value.to(W0.dtype).isfinite().all()):
        return f"does not fit into {W0.dtype}"
    others = [a for own in module.children() if isinstance(own, AdapterDict) for a in own.children()]
    if any(s.bias is not None and site_name(s.path, "bias") == name for s in file.sites) or any(
        isinstance(a, DoraAdapter) and a.b is not None for a in others
    ):
        return "is replaced, where another adapter, or the file itself, has an update of the bias: not supported"
    return None


def beside(on: Mapping[str, AdaptedSite], name: str) -> Iterator[tuple[str, Tensor | TokenRows]]:
    """The whole tensors and rows of tokens of an adapter on a model, each once, as a record has them."""
    for at, host in on.items():
        a = host.adapters[name]
        if isinstance(a, ReplacementTensor) and not a.is_tied_copy:
            yield at, a.value.detach() if a.ids is None else TokenRows(ids=a.ids, rows=a.value.detach())


def m_and_b(adapter: LoraAdapter) -> tuple[Tensor | None, Tensor | None]:
    """The magnitudes and the update of the bias of one, as a record has them."""
    m, b = (adapter.m, adapter.b) if isinstance(adapter, DoraAdapter) else (None, None)
    return None if m is None else m.detach(), None if b is None else b.detach()
