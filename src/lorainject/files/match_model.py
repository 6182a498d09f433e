"""Match an adapter file with a model: where its sites belong, and whether the model is the base that it was made for.

A site belongs to the weight of the same name. The weight must be able to carry an adapter and have the kind, the shape
and the slices for which A and B were made, and modules that were one when the adapter was saved must be one here too.

A file of ours also holds a fingerprint of its base: a few elements of each adapted weight (numerics/fingerprint.py). It
tells models of equal shapes apart, such as a model and its instruction-tuned version.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import FileError
from ..lora.adapter_dict import AdapterDict
from ..lora.model_index import AdaptedSite, ModelIndex
from ..lora.weight_kinds import is_quantized, stored_tensor, weight_shape
from ..merging.adapted_weight import merge_record
from ..numerics.delta import alpha_of
from ..numerics.fingerprint import SAMPLES, sample_values, samples_agree
from ..plan import Site, site_name
from ..targets.matcher import WeightMatch
from ..targets.model_weights import ModelWeight, model_weights, separate_weights
from ..targets.resolve import make_site, why_unsuitable
from .formats import peft_layout
from .record import AdapterFile, BasePrint, Problem, StoredSite, next_steps

OTHER_MODEL = "load it onto the model that it was trained on"
MISSING_STEP = "if the file is whole, accept what it lacks with allow_missing=True, as PEFT does"
Weights = Mapping[str, ModelWeight]
"""The weights of a model by each of their names."""


def weight_of(stored: StoredSite, weights: Weights) -> ModelWeight | None:
    """Return the model's weight that a site of a file is for, or None if the model has no such weight."""
    return weights.get(site_name(stored.path, stored.parameter))


def weights_for(file: AdapterFile, index: ModelIndex) -> dict[str, ModelWeight]:
    """Return the weights of a model by each of their names, as the sites of a file need them.

    A tied weight is one weight, unless the file has an adapter for each of several modules that share it, as PEFT's
    files do.
    """
    weights = {name: weight for weight in model_weights(index) for name in weight.names}
    sites = Counter(
        w.key for stored in file.sites if not stored.label and (w := weight_of(stored, weights)) is not None
    )
    if any(count > 1 for count in sites.values()):
        for alone in separate_weights(index):
            if sites[weights[alone.names[0]].key] > 1:
                weights |= dict.fromkeys(alone.names, alone)
    return weights


def match_sites(
    index: ModelIndex,
    file: AdapterFile,
    weights: Weights,
    dtype: torch.dtype | None,
    problems: Sequence[str] = (),
    missing: Sequence[str] = (),
) -> list[Site]:
    """Return the model's sites for the sites of a file, in the file's order.

    Args:
        index: The index of the model.
        file: The file, under the names of the model.
        weights: The weights of the model.
        dtype: The dtype that A and B will have. None keeps that of the file.
        problems: What the caller has found wrong with the file.
        missing: What `missing_targets` returned, if that is wrong.

    Raises:
        FileError: With `problems` and with everything in the file that does not fit the model.
    """
    sites, mismatches = [], []
    site_at: dict[tuple[int, str, str], str] = {}
    for stored in file.sites:
        weight = weight_of(stored, weights)
        if weight is None:
            module = index.modules.get(stored.path)
            kind = f"is a {type(module).__name__} in this model, which cannot carry an adapter"
            mismatches.append(f"{stored.name}: {'is not in this model' if module is None else kind}")
            continue
        mismatch = _mismatch(stored, weight, weights, dtype)
        if (other := site_at.setdefault((*weight.key, stored.label), stored.name)) != stored.name:
            mismatch = f"is the same module as {other} in this model, but the file has an adapter for each of them"
        if mismatch is None:
            sites.append(_site(index, file, stored, weight, dtype))
        else:
            mismatches.append(f"{stored.name}: {mismatch}")
    lines = [*mismatches, *problems]
    lines += [Problem(f"{path}: missing in the file, though its config targets it", MISSING_STEP) for path in missing]
    if lines:
        raise FileError(f"{file.path} does not fit this model:", lines, next_steps(lines, OTHER_MODEL))
    return sites


def missing_targets(file: AdapterFile, weights: Weights) -> list[str]:
    """Return the paths of the layers that the config of PEFT's file targets, but for which the file has no A and B.

    Such an adapter may be a part of another one, or damaged. PEFT loads it with a warning.
    """
    if file.format != "peft":
        return []
    layers = [name for name, w in weights.items() if w.parameter == "weight" and w.paths[0].startswith(file.part)]
    adapted = {stored.path for stored in file.sites}
    return [path for path in peft_layout.target_paths(file.config, layers) if path not in adapted]


def warn_of_missing(file: AdapterFile, missing: Sequence[str], stacklevel: int) -> None:
    """Warn of the layers without A and B, which stay as they are in the base."""
    if missing:
        names = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
        warnings.warn(
            f"{file.path}: {len(missing)} layers that its config targets have no A and B in the file, and stay as they"
            f" are: {names}",
            stacklevel=stacklevel + 1,
        )


def _site(
    index: ModelIndex, file: AdapterFile, stored: StoredSite, weight: ModelWeight, dtype: torch.dtype | None
) -> Site:
    if stored.path != weight.paths[0] or stored.named:
        paths = (stored.path, *(path for path in weight.paths if path != stored.path))
        readers = weight.surroundings if stored.named else weight.readers
        weight = replace(weight, paths=paths, readers=readers, named=stored.named)
    # A file has the factors and their initial values together, with twice the rank (extras.stored_factors).
    r = stored.r - stored.constant_ranks
    alpha = stored.alpha if r == stored.r else alpha_of(stored.scale, r, stored.scaling)
    return make_site(
        WeightMatch(weight, stored.label, stored.rows), index.first_paths, r=r, alpha=alpha,
        scaling=stored.scaling, dropout=stored.dropout, init=file.init, dtype=dtype or stored.dtype,
    )  # fmt: skip


def _mismatch(stored: StoredSite, weight: ModelWeight, weights: Weights, dtype: torch.dtype | None) -> str | None:
    """Return why a site of a file does not fit a weight; None if it does."""
    if (reason := why_unsuitable(weight, stored.label)) is not None:
        return reason
    if separate := [p for p in stored.aliases if weights.get(site_name(p, stored.parameter)) is not weight]:
        return f"was one module with {', '.join(separate)} when the adapter was saved, but is not in this model"
    if stored.shape and stored.kind != weight.kind.name:
        return f"was saved for a weight of kind {stored.kind}, but this model has a weight of kind {weight.kind.name}"
    if stored.embedding != (weight.kind.name == "embedding"):
        layer = "an embedding" if stored.embedding else "a linear layer"
        return f"was saved for {layer}, but this model has a weight of kind {weight.kind.name}"
    shape = weight_shape(weight.module, weight.parameter)
    if stored.shape and stored.shape != shape:
        return f"was saved for a weight of shape {stored.shape}, but this model's weight has shape {shape}"
    stack, out_features, in_features = weight.kind.sizes(shape)
    if stored.rows is not None:
        if (reason := _row_mismatch(stored, stored.rows, weight, out_features)) is not None:
            return reason
        out_features = sum(map(len, stored.rows))
    shapes = tuple(stored.A.shape), tuple(stored.B.shape)
    needed = (*stack, stored.r, in_features), (*stack, out_features, stored.r)
    if shapes != needed:
        have, need = (f"A {A} and B {B}" for A, B in (shapes, needed))
        return f"the file has {have}, but this model's weight needs {need}"
    if dtype is not None and not all(bool(t.to(dtype).isfinite().all()) for t in (stored.A, stored.B)):
        return f"its A or B exceeds the range of {dtype}"
    return None


def _row_mismatch(stored: StoredSite, rows: tuple[range, ...], weight: ModelWeight, out_features: int) -> str | None:
    """Return why the rows of a slice do not fit a weight; None if they do."""
    if any(part.start < 0 or part.stop > out_features or part.step < 1 for part in rows):  # before they are counted
        return f"the file has it on rows that are not all within 0:{out_features}"
    if len({i for part in rows for i in part}) < sum(map(len, rows)):
        return "the file names a row twice"
    if weight.parts.get(stored.label, rows) != rows:
        return f"its part {stored.label!r} has other rows in this model: the numbers of attention heads may differ"
    return None


def base_print(sites: Mapping[str, AdaptedSite]) -> BasePrint | None:
    """Return the fingerprint of the weights under these sites, or None if some of them cannot be sampled."""
    samples = {name: _sample(site.module, site.adapters.parameter) for name, site in sites.items()}
    known = {name: sample.cpu() for name, sample in samples.items() if sample is not None}
    records = {name: merge_record(site.adapters) for name, site in sites.items()}
    dtypes = {name: record.dtype if (record := records[name]) else site.weight.dtype for name, site in sites.items()}
    return BasePrint(dtype=dtypes, sample=known) if known.keys() == sites.keys() else None


def require_base(file: AdapterFile, weights: Weights, sites: Sequence[Site]) -> None:
    """Raise FileError if the base weights differ from those that the adapter was made for, as far as the file tells."""
    if file.base is None:
        return
    at_sites = {site.name: weights[site_name(site.path, site.parameter)] for site in sites}
    if differing := [name for name, weight in at_sites.items() if not _is_base(weight, name, file.base)]:
        problems = [f"{name}: differs from the base weight that this adapter was made for" for name in differing]
        way_out = "load it onto the base that it was trained on, or accept this one with check_base=False"
        raise FileError(f"{file.path} was made for another base model; nothing was loaded:", problems, way_out)


def _is_base(weight: ModelWeight, name: str, base: BasePrint) -> bool:
    """True if the fingerprint is that of this weight, or if the weight cannot be sampled."""
    stored, expected = stored_tensor(weight.module, weight.parameter), base.sample[name]
    sample = _sample(weight.module, weight.parameter, len(expected))
    if sample is None or stored is None:
        return True
    return samples_agree(sample.cpu(), expected, stored.dtype, base.dtype[name])


def _sample(module: nn.Module, parameter: str, count: int = SAMPLES) -> Tensor | None:
    """Return a few elements of W0; None if W0 cannot be read. While the weight is W0 + s B A, merge keeps SAMPLES."""
    for child in module._modules.values():
        if isinstance(child, AdapterDict) and child.parameter == parameter and (record := merge_record(child)):
            return record.sample
    weight = stored_tensor(module, parameter)
    return None if weight is None or is_quantized(module) else sample_values(weight, count)
