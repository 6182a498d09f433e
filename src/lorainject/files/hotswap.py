"""Exchange what an adapter holds for what a file holds, under a model that stays as it is: also one that is compiled, or served just now.

The adapter on the model has room for its own rank: inject(model, targets, r=64) makes room for any adapter of rank 64 and less. A and B of a
lower rank are filled up with zeros, exactly. Values alone change, in the memory that they lie in, so nothing is compiled anew, no optimiser
loses its parameters, and no CUDA graph its addresses.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..lora.adapter import LoraAdapter
from ..lora.model_index import AdaptedSite, ModelIndex
from ..lora.weight_kinds import is_sharded
from ..numerics.threads import defer_interrupt
from ..plan import site_name
from ..targets.model_weights import model_weights
from . import transforms
from .convert import read_source
from .io.open_adapter import Hints, open_source
from .record import StoredSite
from .save_load import fitted, require_base


def hotswap(model: nn.Module, path: str | Path, name: str = "default", *, check_base: bool = True, allow_pickle: bool = False,
            hints: Hints | None = None) -> nn.Module:  # fmt: skip
    """Let the adapter `name` be what a file holds, in place, without a recompilation; returns the same model.

    Whatever ranks (up to those on the model), scales and scaling the file has. A weight that the file does not adapt gets B = 0, its base. A and B
    keep their dtype, device and dropout. The arguments are load's.

    Raises StateError where there is no such adapter or it is merged, FileError with all that load would refuse, and with every
    weight for which the model has no room; all values are then as they were.
    """
    index = ModelIndex(model)
    index.require_adapters("swap", name)
    on = {(*host.key, host.adapters.label): (at, host) for at, host in index.sites.items() if name in host.adapters}
    source = open_source(path, allow_pickle)
    file = read_source(source, hints=replace(hints or Hints(), model=model), index=index)
    by_name = {n: w for w in model_weights(index) for n in w.names}
    wrong = [f"{at}: stands beside A and B, which alone can be exchanged" for at in (*file.replaced, *file.tokens)]
    new: dict[tuple[int, str, str], StoredSite] = {}
    for s in file.sites:
        if (w := by_name.get(site_name(s.path, s.parameter))) is not None:
            found = on.get((*w.key, s.label))
            if reason := _unfit(s, None if found is None else found[1].adapters[name]):
                wrong.append(f"{s.name}: {reason}")
            elif found is not None:
                new[(*w.key, s.label)] = transforms.with_rank(
                    transforms.to_standard_scaling(s), found[1].adapters[name].r
                )
    wrong += [f"{at}: {reason}" for at, host in on.values() if (reason := _fixed(host, name))]
    sites = fitted(index, file, by_name, None, wrong)
    if check_base:
        require_base(file, by_name, sites)
    with torch.no_grad(), defer_interrupt():
        for place, (_, host) in on.items():
            _fill(host.adapters[name], new.get(place))
    return model


def _unfit(s: StoredSite, low: LoraAdapter | None) -> str | None:
    if low is None:
        return "carries no such adapter in this model: inject one there before compiling"
    if s.magnitude is not None or s.bias is not None:
        return "has magnitudes (DoRA) or an update of the bias: load(model, path) instead"
    if s.rows != low.slices:
        return "is another slice of the weight"
    if not all(bool(t.to(low.A.dtype).isfinite().all()) for t in (s.A, s.B)):
        return f"its A or B does not fit into {low.A.dtype}"
    return f"rank {s.r}, and there is room for {low.r}: inject with r={s.r} or more" if s.r > low.r else None


def _fixed(host: AdaptedSite, name: str) -> str | None:
    low = host.adapters[name]
    if type(low) is not LoraAdapter:
        return "the adapter on the model is more than A and B: eject it, and load the file"
    if any(p.is_meta or is_sharded(p) for p in low.parameters()):
        return "A and B lie on the meta device, or are sharded"
    return None


def _fill(low: LoraAdapter, s: StoredSite | None) -> None:
    if s is None:
        low.B.zero_()
        return
    low.A.copy_(s.A)
    low.B.copy_(s.B)
    low.rescale(s.alpha, s.scaling)
