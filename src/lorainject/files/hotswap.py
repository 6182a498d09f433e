"""Give an adapter on a model the values of a file, while everything else about the model stays as it is.

The model may be compiled or in use: only values change, in the memory where they are. So nothing is compiled again, no
optimizer loses its parameters, and no CUDA graph loses its addresses.

The adapter on the model has room for its own rank: inject(model, targets, r=64) makes room for all adapters of rank 64
and less. A and B of a lower rank are filled up with zeros, which is exact.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..lora.adapter import LoraAdapter
from ..lora.model_index import ModelIndex
from ..lora.weight_kinds import is_sharded
from ..numerics.modes import in_default_modes
from ..numerics.threads import defer_interrupt
from ..spec import explains_settings
from . import transforms
from .convert import read_source
from .io.open_adapter import Hints, open_source
from .match_model import match_sites, missing_targets, require_base, warn_of_missing, weight_of, weights_for
from .record import StoredSite


@explains_settings
@in_default_modes
def hotswap(model: nn.Module, path: str | Path, name: str = "default", *, check_base: bool = True,
            allow_missing: bool = False, allow_pickle: bool = False,
            hints: Hints | None = None) -> nn.Module:  # fmt: skip
    """Give an adapter on the model the values of a file, in place and without a recompilation.

    The file may have other ranks (up to those on the model), scales and scalings. A weight that the file does not adapt
    gets B = 0, so that it acts as the base weight. A and B keep their dtype, their device and their dropout.

    Args:
        model: The model.
        path: An adapter in any format of `li.FORMATS`.
        name: The adapter on the model.
        check_base: As in `load`.
        allow_missing: As in `load`.
        allow_pickle: As in `load`.
        hints: As in `load`.

    Returns:
        The same model.

    Raises:
        StateError: If the model has no adapter of this name, or if it is merged.
        FileError: With all that `load` would refuse, and with every site for which the model has no room. All values
            are then unchanged.
    """
    index = ModelIndex(model)
    index.require_adapters("swap", name)
    names, adapters = {}, {}
    for key, site in index.sites.items():
        if name in site.adapters:
            place = (*site.key, site.adapters.label)
            names[place], adapters[place] = key, site.adapters[name]
    file = read_source(open_source(path, allow_pickle), hints=replace(hints or Hints(), model=model), index=index)
    weights = weights_for(file, index)
    problems = [f"{key}: the file replaces this tensor, but only A and B can be swapped" for key in file.replaced]
    problems += [f"{key}: the file has rows of tokens, but only A and B can be swapped" for key in file.tokens]
    values: dict[tuple[int, str, str], StoredSite] = {}
    for stored in file.sites:
        if (weight := weight_of(stored, weights)) is None:  # match_sites reports it
            continue
        place = (*weight.key, stored.label)
        adapter = adapters.get(place)
        if adapter is None:
            problems.append(f"{stored.name}: carries no such adapter in this model: inject one there before compiling")
        elif reason := _why_no_room(stored, adapter):
            problems.append(f"{stored.name}: {reason}")
        else:
            values[place] = transforms.with_rank(transforms.to_standard_scaling(stored), adapter.r)
    unswappable = {names[place]: _why_unswappable(adapter) for place, adapter in adapters.items()}
    problems += [f"{key}: {reason}" for key, reason in unswappable.items() if reason is not None]
    missing = missing_targets(file, weights)
    sites = match_sites(index, file, weights, None, problems, () if allow_missing else missing)
    if check_base:
        require_base(file, weights, sites)
    warn_of_missing(file, missing, stacklevel=4)
    index.note_change()
    with torch.no_grad(), defer_interrupt():
        for place, adapter in adapters.items():
            _fill(adapter, values.get(place))
    return model


def _why_no_room(stored: StoredSite, adapter: LoraAdapter) -> str | None:
    """Return why an adapter cannot take the values of a site in a file; None if it can."""
    if stored.magnitude is not None or stored.bias is not None:
        return "has magnitudes (DoRA) or a bias update, which cannot be swapped: call load(model, path) instead"
    if stored.rows != adapter.slices:
        return "is another slice of the weight"
    if not all(bool(t.to(adapter.A.dtype).isfinite().all()) for t in (stored.A, stored.B)):
        return f"its A or B exceeds the range of {adapter.A.dtype}"
    if stored.r > adapter.r:
        return f"has rank {stored.r}, but there is room for {adapter.r}: inject with r={stored.r} or more"
    return None


def _why_unswappable(adapter: LoraAdapter) -> str | None:
    """Return why the values of an adapter on the model cannot be changed; None if they can."""
    if type(adapter) is not LoraAdapter:
        return "the adapter on the model has more than A and B: eject it, and load the file"
    if any(p.is_meta or is_sharded(p) for p in adapter.parameters()):
        return "A and B are on the meta device or sharded: bring them back or gather them first"
    return None


def _fill(adapter: LoraAdapter, stored: StoredSite | None) -> None:
    if stored is None:
        adapter.B.zero_()
        adapter.A.nan_to_num_(0, 0, 0)  # 0 times infinity is no zero
        return
    adapter.A.copy_(stored.A)
    adapter.B.copy_(stored.B)
    adapter.rescale(stored.alpha, stored.scaling)
