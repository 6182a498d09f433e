"""The weighted sum of adapters as one adapter: `combine`.

    sum_i w_i s_i B_i A_i = s B A        A = [A_1; A_2; ...]    B = [w_1 s_1 B_1 / s, w_2 s_2 B_2 / s, ...]

The ranks add up, and the sum is exact: A is copied, and B is multiplied by one number per adapter, which costs half a
unit in the last place of float32 at most, and nothing where the number is a power of two. So it does not matter whether
the adapters have different scales, ranks, rank-stabilized scales or signs of the weights. Slices of a fused weight stay
slices unless they overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileError, SpecError
from ..files import transforms
from ..files.origin import adapter_origins, made_by
from ..files.record import AdapterFile, BasePrint, StoredSite, TokenRows
from ..numerics.delta import alpha_of
from ..numerics.fingerprint import samples_agree
from ..numerics.modes import in_default_modes
from .reduce import Approximation, compress
from .terms import ONE_BASE, Adapter, as_records, by_weight, out_features, why_apart

IN_MEMORY = "leave these out of the sum, or load the adapters into the model and merge them there: li.merge(model)"


@in_default_modes
def combine(adapters: Sequence[Adapter], weights: Sequence[float] | None = None, *, r: int | None = None,
            name: str | None = None) -> AdapterFile | Approximation:  # fmt: skip
    """Return one adapter whose update of every weight is the weighted sum of the adapters' updates.

    Args:
        adapters: Paths of any format, or records. They may have different ranks, scales, targets and slices.
        weights: What each update is multiplied with, in the order of the adapters; negative ones subtract. 1 each by
            default. An adapter of weight 0 is left out.
        r: Compress the sum to this rank (see `compress`); otherwise the ranks add up, and the sum is exact.
        name: The name of the result; by default that of the adapters if they have one name, else "combined".

    Returns:
        The sum: a record, with `r` an Approximation, which is a record that tells its errors. Updates of biases are
        added up as well. DoRA's magnitudes, whole tensors and rows of tokens are taken over if only one adapter has
        them, with the weight 1, or if all have the same ones.

    Raises:
        SpecError: The weights are not one finite number per adapter, or all of them are 0; or `r` is impossible.
        FileError: The adapters belong to different weights or bases, or no sum is defined at some sites. All of them
            are listed.
    """
    files = as_records([adapters] if isinstance(adapters, str | Path | AdapterFile) else adapters)
    factors = [1.0] * len(files) if weights is None else [float(w) for w in weights]
    if len(factors) != len(files) or not any(factors) or not all(map(math.isfinite, factors)):
        raise SpecError(
            f"{len(files)} adapters cannot be combined with the weights {factors}",
            way_out="give at least one adapter, and one finite weight for each, of which one is not 0",
        )
    kept = [(w, file) for w, file in zip(factors, files, strict=True) if w]
    files = [file for _, file in kept]
    if problems := why_apart(files):
        raise FileError("these adapters are not for the same weights:", problems, ONE_BASE)
    terms: dict[str, list[tuple[float, StoredSite]]] = {}
    for w, file in kept:
        for weight, sites in by_weight(file).items():
            terms.setdefault(weight, []).extend((w, s) for s in sites)
    sites = [s for weight in terms.values() for s in _sum_on_weight(weight, problems)]
    total = AdapterFile(
        path=Path("combined"), format="lorainject", sites=tuple(sites), name=name or _common_name(files),
        base=_common_base(files, [s.name for s in sites], problems), config=_common_config(files),
        replaced=_carried([(w, f.replaced) for w, f in kept], "a whole tensor", problems),
        tokens=_carried([(w, f.tokens) for w, f in kept], "rows of trained tokens", problems),
        origin=made_by("combine", adapters=adapter_origins(files, [w for w, _ in kept])),
        namespace=files[0].namespace, part=files[0].part, notes=tuple(dict.fromkeys(n for f in files for n in f.notes)),
    )  # fmt: skip
    if problems:
        raise FileError("no sum of these adapters is defined:", problems, IN_MEMORY)
    return total if r is None else compress(total, r=r)


def _sum_on_weight(terms: Sequence[tuple[float, StoredSite]], problems: list[str]) -> list[StoredSite]:
    """Return the sum of all sites of one weight: one site, or one per slice where the slices do not overlap."""
    slices: dict[tuple[range, ...] | None, list[tuple[float, StoredSite]]] = {}
    for w, s in terms:
        slices.setdefault(s.rows, []).append((w, s))
    if not _overlap(list(slices)):
        return [site for group in slices.values() for site in _sum_sites(group, problems)]
    if special := [s for _, s in terms if s.magnitude is not None or s.bias is not None]:
        problems += [f"{s.name}: a magnitude or a bias update, where slices overlap" for s in special]
        return []
    sites = [s for _, s in terms]
    out, shape = out_features(sites), next((s.shape for s in sites if s.shape), ())
    whole = [replace(s, label="", rows=None, shape=shape, B=transforms.on_rows(s, out)) for s in sites]
    return _sum_sites([(w, s) for (w, _), s in zip(terms, whole, strict=True)], problems)


def _overlap(slices: Sequence[tuple[range, ...] | None]) -> bool:
    """True if two of the slices share a row; None is the whole weight."""
    if len(slices) == 1:
        return False
    rows = [i for part in slices if part is not None for span in part for i in span]
    return None in slices or len(set(rows)) < len(rows)


def _sum_sites(terms: Sequence[tuple[float, StoredSite]], problems: list[str]) -> list[StoredSite]:
    """Return the sum of sites on the same rows, in a list; none, and a line in `problems`, if it is not defined."""
    sites = [s for _, s in terms]
    if len(terms) == 1 and terms[0][0] == 1:
        return sites  # to the bit
    if any(s.magnitude is not None for s in sites):
        problems.append(f"{sites[0].name}: a magnitude (DoRA), whose update depends on the base weight")
        return []
    scale = abs(terms[0][0] * sites[0].scale)
    factors = [w * s.scale / scale for w, s in terms]
    B = torch.cat([transforms.scaled(s.B, f) for f, s in zip(factors, sites, strict=True)], -1)
    biases = [s.bias.double() * f for f, s in zip(factors, sites, strict=True) if s.bias is not None]
    if not B.isfinite().all():
        problems.append(f"{sites[0].name}: the sum exceeds the range of float32")
        return []
    typical = max(sites, key=lambda s: (bool(s.shape), s.kind != "linear"))
    return [replace(
        typical, label=sites[0].label, A=torch.cat([s.A for s in sites], -2), B=B, scaling="standard",
        alpha=alpha_of(scale, B.shape[-1], "standard"), bias=torch.stack(biases).sum(0).float() if biases else None,
        dropout=sites[0].dropout if len({s.dropout for s in sites}) == 1 else 0.0, constant_ranks=0,
        aliases=tuple(dict.fromkeys(alias for s in sites for alias in s.aliases)),
        parts=next((s.parts for s in sites if s.parts), {}), named=any(s.named for s in sites),
        peft=all(s.peft for s in sites),
    )]  # fmt: skip


def _carried(parts: Sequence[tuple[float, Mapping[str, Any]]], what: str, problems: list[str]) -> dict[str, Any]:
    """Return what stands in place of the base's tensors, where it is defined without a sum."""
    carried: dict[str, Any] = {}
    for name in dict.fromkeys(name for _, part in parts for name in part):
        values = [(w, part[name]) for w, part in parts if name in part]
        carried[name] = values[0][1]
        if not all(_is_same(value, values[0][1]) for _, value in values):
            problems.append(f"{name}: {what} in place of the base's, other ones in each adapter")
        elif len(values) == 1 and values[0][0] != 1:
            problems.append(f"{name}: {what} in place of the base's, which the weight {values[0][0]:g} does not scale")
    return carried


def _is_same(value: Tensor | TokenRows, other: Tensor | TokenRows) -> bool:
    if isinstance(value, TokenRows) and isinstance(other, TokenRows):
        return value.ids == other.ids and torch.equal(value.rows, other.rows)
    return isinstance(value, Tensor) and isinstance(other, Tensor) and torch.equal(value, other)


def _common_name(files: Sequence[AdapterFile]) -> str:
    names = {file.name for file in files}
    return names.pop() if len(names) == 1 else "combined"


def _common_config(files: Sequence[AdapterFile]) -> dict[str, Any]:
    """Return which base and task the configs name, where those that name one agree."""
    said = {key: {file.config[key] for file in files if isinstance(file.config.get(key), str)}
            for key in ("base_model_name_or_path", "task_type")}  # fmt: skip
    return {key: values.pop() for key, values in said.items() if len(values) == 1}


def _common_base(files: Sequence[AdapterFile], names: Sequence[str], problems: list[str]) -> BasePrint | None:
    """Return the fingerprint of the base at these sites, or None if some site has none. Note contradictions."""
    dtypes: dict[str, torch.dtype] = {}
    samples: dict[str, Tensor] = {}
    for file in (file for file in files if file.base is not None):
        assert file.base is not None
        for name, sample in file.base.sample.items():
            dtype = file.base.dtype[name]
            if name not in samples:
                dtypes[name], samples[name] = dtype, sample
            elif len(sample) == len(samples[name]) and not samples_agree(sample, samples[name], dtype, dtypes[name]):
                problems.append(f"{name}: {file.path} was made for another base weight than the adapters before it")
    if not all(name in samples for name in names) or len({len(samples[name]) for name in names}) != 1:
        return None
    return BasePrint(dtype={n: dtypes[n] for n in names}, sample={n: samples[n] for n in names})
