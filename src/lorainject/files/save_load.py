"""Between a model and an adapter file: `save` and `load`.

    adapter/adapter_config.json            as PEFT writes it, so that PEFT, transformers and vLLM can read it
    adapter/adapter_model.safetensors      A and B under PEFT's names, and our record in the header (formats/native.py)
    x.safetensors                          the same tensor file alone

Only A and B are written, never a weight of the base. The same adapter gives the same bytes in any process.

How a file is matched with a model is in match_model.py, DoRA's magnitudes and whatever else a file can hold in
extras.py, and the formats of other libraries in convert.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..errors import FileError, StateError
from ..lora.adapter import LoraAdapter
from ..lora.graft import base_class
from ..lora.model_index import AdaptedSite, ModelIndex
from ..lora.replacement import ReplacementTensor
from ..lora.weight_kinds import is_sharded
from ..numerics.delta import is_finite
from ..numerics.modes import in_default_modes
from ..plan import Plan
from ..spec import FUNCTION, explains_settings
from ..surgery import attach
from ..targets.model_weights import ModelWeight, model_weights
from ..targets.resolve import count_parameters, name_problems, wrapper_problems
from . import extras, transforms
from .convert import FORMATS, read_source
from .formats import peft_layout
from .io import atomic_write
from .io.open_adapter import Hints, open_source
from .io.regular_file import as_path
from .match_model import (
    base_print,
    match_sites,
    missing_targets,
    require_base,
    warn_of_missing,
    weight_of,
    weights_for,
)  # fmt: skip
from .record import AdapterFile, StoredSite


@explains_settings
@in_default_modes
def save(model: nn.Module, path: str | Path, name: str = "default", *, format: str = "lorainject") -> Path:
    """Write the A and B of one adapter, and nothing of the base. The adapter may be merged.

    What `modules_to_save`, `bias` and `trainable_tokens` of inject let train is a part of the adapter, and is written
    with it. Other parameters that train are not saved; a warning names them.

    Args:
        model: A model that carries the adapter.
        path: A path that ends in .safetensors becomes one file, any other a directory. PEFT can read the directory too,
            unless the adapter has sites that PEFT does not know, such as slices of fused weights. An adapter that is
            there already is replaced as a whole.
        name: The adapter's name.
        format: "lorainject", or "peft" for a directory that PEFT can always read: slices are then padded with zeros to
            the whole weight, which is exact.

    Returns:
        The path.

    Raises:
        StateError: If the model has no adapter of this name, or is a part of a model that was injected as a whole.
        FileError: If A and B are not finite, not in this process or no longer fit their weights, if `format="peft"`
            cannot hold them, or if the file cannot be written. What was at the path before is then unchanged.
    """
    path = as_path(path)
    if format not in ("lorainject", "peft"):
        way_out = "leave format out, or write other formats with read and write, or convert"
        raise FileError(f"format must be 'lorainject' or 'peft', not {format!r}", way_out=way_out)
    index = ModelIndex(model)
    index.require_adapters("save", name, merged=True, nested=True, lost=True, superseded=True)
    _warn_of_pipeline_stage(index)
    if index.lost:
        warnings.warn(
            f"these weights were injected, but their modules were replaced or removed since, so that their A and B are"
            f" not saved: {', '.join(index.lost)}",
            stacklevel=4,
        )
    sites = {key: site for key, site in index.sites.items() if name in site.adapters}
    reasons = {key: _why_unsavable(site, site.adapters[name]) for key, site in sites.items()}
    if problems := [f"{key}: {reason}" for key, reason in reasons.items() if reason is not None]:
        raise FileError(f"adapter {name!r} was not saved:", problems, "correct these sites first; nothing was written")
    _warn_of_trained_parameters(index)
    replaced, tokens = extras.stored_replacements(sites, name)
    sites = {key: site for key, site in sites.items() if not isinstance(site.adapters[name], ReplacementTensor)}
    stored = _stored_sites(index, sites, name)
    if format == "peft":
        stored = _require_peft(stored, path, name)
    elif path.is_file() and path.suffix != ".safetensors":
        raise FileError(f"{path} is a file", way_out="give a directory, or a path that ends in .safetensors")
    init = next((site.adapters[name].init for site in sites.values()), "kaiming")
    file = AdapterFile(
        path=path, format=format, sites=tuple(site for _, site in stored), name=name,
        init=init if isinstance(init, str) else FUNCTION,
        base=base_print(sites) if format == "lorainject" and sites else None,
        config=_config(index, [site for _, site in stored], replaced), replaced=replaced, tokens=tokens,
    )  # fmt: skip
    atomic_write.write(FORMATS[format].write(file, path, Hints()))
    return path


@explains_settings
@in_default_modes
def load(model: nn.Module, path: str | Path, name: str | None = None, *, dtype: torch.dtype | None = None,
         check_base: bool = True, allow_missing: bool = False, allow_pickle: bool = False,
         hints: Hints | None = None) -> nn.Module:  # fmt: skip
    """Put a saved adapter onto a base model, in place, and activate it.

    A warning names each assumption that had to be made about the file (AdapterFile.notes).

    Args:
        model: The base model. It may carry other adapters.
        path: An adapter in any format of `li.FORMATS`.
        name: The adapter's name on the model. None takes the name in the file.
        dtype: The dtype of A and B. None keeps that of the file.
        check_base: Refuse a model other than the one that the adapter was made for, if the file has a fingerprint.
        allow_missing: Accept a file of PEFT without A and B for some of the layers that its config targets, with a
            warning that names them. They stay as they are in the base.
        allow_pickle: As in `read`.
        hints: As in `read`. The model itself is always a hint.

    Returns:
        The same model.

    Raises:
        StateError: If adapters are merged, or if the name is in use.
        FileError: With every tensor that is missing, unexpected, not finite or of the wrong shape, with everything that
            the file holds besides A and B and that cannot go onto the model, and with every weight that differs from
            the base. The model is then unchanged.
    """
    index = ModelIndex(model)
    index.require_ready("load an adapter", computed=True)
    file = read_source(open_source(path, allow_pickle), hints=replace(hints or Hints(), model=model), index=index)
    for note in file.notes:
        warnings.warn(f"{file.path}: {note}", stacklevel=4)
    name = file.name if name is None else name
    if problems := name_problems(index, name) + wrapper_problems(index):
        raise StateError("nothing was loaded:", problems, "if the name is in use, pass another one: name=...")
    weights = weights_for(file, index)
    checked = {s.name: extras.why_extras_unsupported(s, weight_of(s, weights), dtype) for s in file.sites}
    problems = [f"{key}: {reason}" for key, reason in checked.items() if reason is not None]
    replacements = extras.plan_replacements(index, file, weights, problems)
    missing = missing_targets(file, weights)
    sites = match_sites(index, file, weights, dtype, problems, () if allow_missing else missing)
    if check_base:
        require_base(file, weights, sites)
    warn_of_missing(file, missing, stacklevel=4)
    factors = {s.name: extras.loaded_factors(s, dtype) for s in file.sites}
    return attach(index, Plan(sites=tuple(sites), total=count_parameters(index)), name, factors, replacements)


def _why_unsavable(site: AdaptedSite, adapter: LoraAdapter) -> str | None:
    if not site.fits(adapter):
        return f"its weight now has shape {site.shape}, for which A and B were not made (was it resized after inject?)"
    if adapter.is_undrawn:
        return "A and B hold whatever was in memory, because to_empty() gave them no values: call reset(model)"
    for p in adapter._parameters.values():
        if p is None:
            continue
        if p.is_meta:
            return "A and B are on the meta device (offloaded, or never loaded): bring them back to a real device"
        if is_sharded(p) or p.numel() == 0:
            return "A and B are sharded over several processes: gather them"
        if not is_finite(p):
            return "A or B (or a tensor that belongs to them) holds NaN or infinity"
    return None


def _warn_of_pipeline_stage(index: ModelIndex) -> None:
    if any(type(module).__name__ == "PipelineIdentityLayer" for _, module in index.walked):
        warnings.warn(
            "this model is one stage of a pipeline, and the file holds the adapters of this stage alone. Save every"
            " stage under a path of its own, and join the files: a, b = map(li.read, paths);"
            " li.write(dataclasses.replace(a, sites=a.sites + b.sites, base=None), path)",
            stacklevel=5,
        )


def _warn_of_trained_parameters(index: ModelIndex) -> None:
    parameters = ((f"{path}.{key}", p) for path, m in index.walked for key, p in m._parameters.items())
    if names := [key for key, p in parameters if p is not None and p.requires_grad]:
        shown = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
        warnings.warn(
            f"{shown} train too, but belong to no adapter, so that save does not write them: inject with"
            " modules_to_save=[...], which trains and saves them with the adapter, or save them yourself",
            stacklevel=5,
        )


def _stored_sites(
    index: ModelIndex, sites: Mapping[str, AdaptedSite], name: str
) -> list[tuple[ModelWeight, StoredSite]]:
    """Return the sites of an adapter in the model's order, because PEFT names a module's parameters by that order."""
    by_weight: dict[tuple[int, str], list[AdaptedSite]] = {}
    for site in sites.values():
        by_weight.setdefault(site.key, []).append(site)
    return [
        (weight, _stored_site(weight, site, name))
        for weight in model_weights(index)
        for site in sorted(by_weight.get(weight.key, ()), key=_first_row)
    ]


def _stored_site(weight: ModelWeight, site: AdaptedSite, name: str) -> StoredSite:
    adapters, adapter = site.adapters, site.adapters[name]
    magnitude, bias = extras.magnitude_and_bias(adapter)
    return StoredSite(
        path=weight.paths[0], parameter=adapters.parameter, label=adapters.label, rows=adapter.slices,
        kind=adapters.kind.name, shape=site.shape, parts=weight.parts if adapters.kind.stacked else {},
        named=adapters.named, peft=why_not_peft(weight) is None,
        aliases=weight.paths[1:], magnitude=magnitude, bias=bias,
        **extras.stored_factors(adapter),
    )  # fmt: skip


def _first_row(site: AdaptedSite) -> int:
    """Return the first row of a slice; 0 for the whole weight."""
    adapters = site.adapters
    if not adapters.label:
        return 0
    return min((part.start for name in adapters for part in adapters[name].slices or ()), default=0)


def why_not_peft(weight: ModelWeight) -> str | None:
    """Return why PEFT would apply an adapter on this weight wrongly or not at all; None if it would apply it
    rightly."""
    module = weight.module
    if weight.bypassed and weight.kind.form is not None:
        return f"{base_class(type(weight.readers[0])).__name__} reads its weight, where PEFT's layer does nothing"
    if isinstance(module, _ConvNd) and (module.groups, module.padding_mode, {*module.dilation}) != (1, "zeros", {1}):
        return "PEFT ignores groups, dilation and padding_mode"
    return None


def _require_peft(
    stored: Sequence[tuple[ModelWeight, StoredSite]], path: Path, name: str
) -> list[tuple[ModelWeight, StoredSite]]:
    """Return the sites as PEFT can hold them, slices as whole weights. Raise FileError with those that PEFT cannot
    hold."""
    weights = {weight.names[0]: weight for weight, _ in stored}
    problems: list[str] = []
    sites = transforms.slices_to_whole([site for _, site in stored], problems)
    problems += [f"{s.name}: {why_not_peft(weights[s.name]) or s.kind}" for s in sites if not peft_layout.can_hold(s)]
    problems += [] if stored else ["an adapter without A and B"]
    if problems:
        raise FileError(f"adapter {name!r} was not saved; PEFT has no place for:", problems, "leave format='peft' out")
    if path.suffix == ".safetensors" or path.is_file():
        raise FileError(f"PEFT's format is a directory, but {path} is a file", way_out="give the path of a directory")
    return [(weights[site.name], site) for site in sites]


def _config(index: ModelIndex, sites: Sequence[StoredSite], replaced: Iterable[str]) -> dict[str, Any]:
    """Return what PEFT's config says about the model: its task, its name and the targets."""
    config = getattr(index.model, "config", None)
    task = "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else None
    name = type(index.model).__name__
    if name.endswith("ForCausalLM"):
        task = "CAUSAL_LM"
    elif {"classifier", "score"} & {path.rpartition(".")[2] for path in replaced}:  # PEFT expects them for these tasks
        tasks = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
        task = next((label for ending, label in tasks.items() if name.endswith(ending)), task)
    # Targets are the last parts of the paths, as people write them, if these match no other module.
    targets = {s.path for s in sites if not peft_layout.is_bare(s)}
    leaves = {path.rsplit(".", 1)[-1] for path in targets}
    matched = {path for path, _ in index.walked if path.rsplit(".", 1)[-1] in leaves}
    return {
        "task_type": task,
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "target_modules": sorted(leaves if matched == targets else targets),
    }
