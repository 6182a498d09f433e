"""The updates of an adapter with the weights that they are added to, from a model that carries it or from a file.

A base weight is read when it is asked for, and one at a time, so that a report on a large model needs no second copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FileError
from ..files.convert import read
from ..files.describe import describe
from ..files.extras import stored_factors
from ..files.io.open_adapter import Hints
from ..files.match_model import match_sites, require_base, weights_for
from ..files.record import AdapterFile
from ..files.rename import rename_for_model
from ..files.weight_map import build_meta_model
from ..lora.initial_values import as_matrices
from ..lora.model_index import ModelIndex
from ..lora.replacement import ReplacementTensor
from ..lora.weight_kinds import Kind, is_quantized, is_sharded, stored_tensor
from ..numerics.delta import scale
from ..plan import site_name

Source = nn.Module | AdapterFile | str | Path
"""A model that carries adapters, a record, or the path of an adapter file."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteUpdate:
    """The update s B A of one site, and the base weight of the site."""

    name: str
    """The name of the site."""
    kind: str
    """The kind of the weight."""
    A: Tensor
    """Shape (*stack, r, in)."""
    B: Tensor
    """Shape (*stack, out, r)."""
    s: float
    """The scale."""
    has_magnitude: bool = False
    """True for DoRA, whose weight is not W0 + s B A."""
    dtype: torch.dtype | None = None
    """The dtype of the base weight. None without a base."""
    read_base: Callable[[], Tensor] | None = None
    """Returns W0 as matrices (*stack, out, in) in float32 or float64. None if W0 is not known."""
    why_no_base: str = ""
    """Why W0 is not known. Empty if it is."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterUpdates:
    """All updates of one adapter."""

    name: str
    updates: tuple[SiteUpdate, ...]
    notes: tuple[str, ...] = ()
    """What a file says, or does not say, that is unusual."""


def adapter_updates(
    source: Source, base: nn.Module | None, *, check_base: bool = True, allow_pickle: bool = False,
    hints: Hints | None = None,
) -> Iterator[AdapterUpdates]:  # fmt: skip
    """Yield every adapter of a source with the updates of its sites.

    Args:
        source: A model that carries adapters, a record, or the path of an adapter file.
        base: The base model of a record or file. None if it is not known.
        check_base: Refuse a base other than the one that a file was made for.
        allow_pickle, hints: As in `read`.

    Raises:
        StateError: The model carries no adapter, or adapters are merged.
        FileError: The file cannot be read, or does not fit the base.
    """
    if isinstance(source, nn.Module):
        yield from _on_model(ModelIndex(source))
        return
    if not isinstance(source, AdapterFile):
        source = read(source, allow_pickle=allow_pickle, hints=hints or (base and Hints(model=base)) or None)
    notes = (*describe(source)["unusual"], *source.beside)
    yield AdapterUpdates(name=source.name, updates=tuple(_of_file(source, base, check_base)), notes=notes)


def _on_model(index: ModelIndex) -> Iterator[AdapterUpdates]:
    index.require_adapters("analyze", nested=True)
    for name in index.adapter_names:
        updates = []
        for site_path, site in index.sites.items():
            if name not in site.adapters or isinstance(site.adapters[name], ReplacementTensor):
                continue
            adapter = site.adapters[name]
            f = stored_factors(adapter)
            updates.append(SiteUpdate(
                name=site_path, kind=site.adapters.kind.name, A=f["A"], B=f["B"],
                s=scale(f["alpha"], f["A"].shape[-2], f["scaling"]), has_magnitude="m" in adapter._parameters,
                **_base(site.module, site.adapters.parameter, site.adapters.kind, adapter.slices),
            ))  # fmt: skip
        yield AdapterUpdates(name=name, updates=tuple(updates))


def _of_file(file: AdapterFile, base: nn.Module | None, check_base: bool) -> Iterator[SiteUpdate]:
    weights = {}
    if base is not None:
        index = ModelIndex(base)
        file = rename_for_model(file, index)
        weights = weights_for(file, index)
        sites = match_sites(index, file, weights, None)
        if check_base:
            require_base(file, weights, sites)
    for s in file.sites:
        weight = weights.get(site_name(s.path, s.parameter))
        known = {} if weight is None else _base(weight.module, weight.parameter, weight.kind, s.rows)
        yield SiteUpdate(name=s.name, kind=s.kind if weight is None else weight.kind.name, A=s.A, B=s.B, s=s.scale,
                         has_magnitude=s.magnitude is not None,
                         **(known or {"why_no_base": "no base was passed"}))  # fmt: skip


def _base(module: nn.Module, parameter: str, kind: Kind, rows: tuple[range, ...] | None) -> dict[str, Any]:
    """Return the fields of SiteUpdate that tell the base weight, or why it cannot be read."""
    weight = stored_tensor(module, parameter)
    assert weight is not None
    if is_quantized(module):
        return {"why_no_base": f"the base weight is quantized ({type(module).__name__})"}
    if weight.is_meta:
        return {"why_no_base": "the base weight is on the meta device, and has no values"}
    if is_sharded(weight):
        return {"why_no_base": "the base weight is sharded over several processes"}
    index = None if rows is None else torch.tensor([i for part in rows for i in part], device=weight.device)
    return {"dtype": weight.dtype, "read_base": lambda: as_matrices(weight, kind, index)}


def load_base(folder: Path) -> nn.Module:
    """Load the model of a checkpoint, in the dtype in which it is stored, by the class that its config names.

    Raises:
        FileError: The folder is no checkpoint that transformers can load.
    """
    way_out = "give a directory with config.json and safetensors, or load the model and pass it as base="
    try:
        model = build_meta_model(folder)
        if model is None:
            raise FileError(f"{folder} has no config.json of a model that transformers knows", way_out=way_out)
        model_class: type = type(model)
        return model_class.from_pretrained(folder, dtype="auto", local_files_only=True).eval()  # type: ignore[attr-defined]
    except (OSError, ValueError, RuntimeError) as e:
        if isinstance(e, FileError):
            raise
        raise FileError(f"{folder} cannot be loaded: {e}", way_out=way_out) from e
