"""From a model and its LoRA settings to a Plan. Nothing is changed or allocated; models on the meta device are
accepted.

Every entry of the targets must match a weight that can carry an adapter. A pattern passes over modules that cannot
carry one; a plain name of such a module is an error. All problems are collected and raised at once, before anything is
changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import regex
import torch
from torch import nn

from ..errors import TargetError
from ..lora.adapter_dict import adapters_of, child_name
from ..lora.dora import DORA_KINDS
from ..lora.graft import base_class, graft_obstacle
from ..lora.initial_values import starts_at_zero, why_uninitialized
from ..lora.model_index import ModelIndex, is_offloaded
from ..lora.ranks import data_parallel_wrapper
from ..lora.weight_kinds import is_quantized, stored_tensor, superseded_layers, weight_shape, why_unsupported
from ..plan import Plan, Site
from ..spec import Init, LoraSpec, Override, Target, explains_settings, spec_from_arguments
from .matcher import Matcher, WeightMatch, is_pattern, split_slices
from .model_weights import ModelWeight, WeightKey, towers
from .trained_tensors import resolve_biases, resolve_trained_tensors, within_trained_modules

WRAPPERS = {"DistributedDataParallel": "DDP", "FullyShardedDataParallel": "FSDP", "FSDPModule": "fully_shard"}
UNSYNCHRONIZED = (
    "which does not synchronize parameters that are added later: inject or load first, then wrap"
    " (accelerator.prepare wraps, too)"
)


@explains_settings
def find(model: nn.Module, targets: Target | Sequence[Target] | None = None, r: int = 8, *, alpha: float | None = None,
         dropout: float = 0.0, exclude: Target | Sequence[Target] = (), layers: Sequence[int] | None = None,
         scaling: str = "standard", init: Init = "kaiming", dtype: torch.dtype | None = None,
         overrides: Mapping[str, Mapping[str, float]] | Sequence[Override] | None = (), dora: bool = False,
         modules_to_save: Target | Sequence[Target] = (), bias: str = "none",
         trainable_tokens: Mapping[str, Sequence[int]] | Sequence[tuple[str, Sequence[int]]] = (),
         name: str = "default", spec: LoraSpec | None = None) -> Plan:  # fmt: skip
    """Return what `inject` would do with the same arguments, without changing the model.

    Args:
        model: The model to search. It may be on the meta device.
        targets: The weights to adapt: names, patterns, roles or keywords. The grammar is documented at
            LoraSpec.targets.
        r: Rank.
        alpha: Numerator of the scale s = alpha / r. None means alpha = r.
        dropout: Probability of zeroing an element of an adapter's input in training mode.
        exclude: Weights to leave out, in the grammar of `targets`.
        layers: Layer numbers that limit `targets`. None means all layers.
        scaling: "standard" for s = alpha / r, or "rslora" for s = alpha / sqrt(r).
        init: Initial values of A and B: "kaiming", "gaussian", "orthogonal", "pissa", "olora", or a function
            (A, B, W0) -> None.
        dtype: Dtype of A and B. None means float32, or float64 for a float64 weight.
        overrides: Another r or alpha for some of the sites, as {"k_proj": {"r": 4}} or a list of Override.
        dora: True for weight-decomposed adapters (DoRA).
        modules_to_save: Modules that train as they are and are saved with the adapter, such as a new head.
        bias: Which biases train as well: "none", "all" or "lora_only".
        trainable_tokens: Rows of embeddings that train as well, as {"embed_tokens": [32000, 32001]}.
        name: Name of the adapter, 1 to 64 letters, digits, "_" or "-". No other adapter of the model may have it.
        spec: All settings but the name as one LoraSpec, instead of the arguments above.

    Returns:
        The plan: the sites with their settings. It prints as a table.

    Raises:
        SpecError: A setting is invalid.
        TargetError: An entry matches nothing, or matches a module that cannot carry an adapter; or the model is
            wrapped, or already has an adapter with this name. The error lists every problem, with the nearest names.
    """
    spec = spec_from_arguments(spec, targets, r=r, alpha=alpha, dropout=dropout, exclude=exclude, layers=layers,
                               scaling=scaling, init=init, dtype=dtype, overrides=overrides or (), dora=dora,
                               modules_to_save=modules_to_save, bias=bias,
                               trainable_tokens=trainable_tokens)  # fmt: skip
    return resolve(ModelIndex(model), spec, name)


def resolve(index: ModelIndex, spec: LoraSpec, name: str) -> Plan:
    """Return the plan of a spec for an indexed model; raise TargetError as documented at `find`."""
    matcher = Matcher(index)
    problems = matcher.problems
    problems += name_problems(index, name) + wrapper_problems(index)
    tensors = resolve_trained_tensors(spec, matcher)
    matches = _match_targets(spec, matcher, _match_excluded(spec, matcher) | within_trained_modules(spec, matcher))
    matches = _limit_to_layers(spec, matches, problems)
    settings = _apply_overrides(spec, matcher, matches)
    problems += _overlaps(matches)
    tensors += resolve_biases(spec, matcher, matches, tensors)
    unsuitable = [
        f"{m.name}: {reason}"
        for m, s in zip(matches, settings, strict=True)
        if (reason := why_unsuitable(m.weight, m.label) or _why_unsuitable_settings(m.weight, s))
    ]
    problems += unsuitable
    if problems:
        way_out = "correct the arguments and call again" + "; exclude=[...] leaves weights out" * bool(unsuitable)
        raise TargetError("cannot inject this LoRA; nothing was changed:", problems, way_out)
    sites = tuple(
        make_site(m, index.first_paths, r=s.r, alpha=s.alpha, scaling=s.scaling, dropout=s.dropout, init=s.init,
        dtype=s.dtype, dora=s.dora) for m, s in zip(matches, settings, strict=True)
    )  # fmt: skip
    left_out: dict[str, str] = {}
    if any(isinstance(entry, str) and entry.rsplit(".", 1)[-1] == "all-linear" for entry in spec.targets):
        chosen = {m.weight.names[0] for m in matches}
        left_out = {name: reason for name, reason in matcher.left_out().items() if name not in chosen}
    total = count_parameters(index)
    return Plan(sites=sites, tensors=tuple(tensors), total=total, left_out=left_out, towers=towers(index))


def make_site(match: WeightMatch, paths: Mapping[int, str], *, r: int, alpha: float | None, scaling: str,
              dropout: float, init: Init, dtype: torch.dtype | None, dora: bool = False) -> Site:  # fmt: skip
    """Return the site that a weight or slice becomes with these settings (see LoraSpec).

    Args:
        match: The weight or slice.
        paths: The path of each module of the model, by the module's id.
    """
    weight, rows = match.weight, match.rows
    shape = weight_shape(weight.module, weight.parameter)
    stack, out_features, in_features = weight.kind.sizes(shape)
    stored = stored_tensor(weight.module, weight.parameter)
    assert stored is not None
    wide = torch.float32 if is_quantized(weight.module) else torch.promote_types(stored.dtype, torch.float32)
    return Site(
        path=weight.paths[0], aliases=weight.paths[1:], parameter=weight.parameter, label=match.label, rows=rows,
        kind=weight.kind.name, shape=shape, stack=stack[0] if stack else 1, in_features=in_features,
        out_features=out_features if rows is None else sum(map(len, rows)),
        readers=tuple(paths[id(reader)] for reader in weight.readers), named=weight.named,
        r=r, alpha=float(r if alpha is None else alpha), scaling=scaling, dropout=float(dropout), init=init,
        dora=dora, dtype=dtype or wide,
    )  # fmt: skip


def why_unsuitable(weight: ModelWeight, label: str = "") -> str | None:
    """Return why a weight (or the slice `label` of it) cannot carry an adapter; None if it can."""
    for other in weight.tied:
        if (reason := why_unsuitable(other, label)) is not None:
            return f"{reason} ({other.names[0]})"
    module, child = weight.module, child_name(weight.parameter, label)
    if adapters_of(module, weight.parameter, label) is None and hasattr(module, child):
        return f"the module already has an attribute `{child}`, not from lorainject (another library's adapter?)"
    if (reason := why_unsupported(module, weight.parameter)) is not None:
        return reason
    if any(module in superseded_layers(owner) for owner in weight.owners):
        return "nothing calls it since fuse_qkv_projections() was called: call unfuse_qkv_projections() first"
    if weight.written_by and not is_quantized(module):  # bitsandbytes moves the codes, which merging/ knows
        return f"the forward of {weight.written_by} writes to it, which would undo a merge or scale the adapter wrongly"
    for reader in weight.readers:
        cls = base_class(type(reader))
        if inspect.isgeneratorfunction(cls.forward) or inspect.iscoroutinefunction(cls.forward):
            return (
                f"{cls.__name__}.forward reads it, and is a generator or coroutine, which would run without the adapter"
            )
        if is_quantized(module):
            return f"{cls.__name__} reads it in its own code, which is not supported for a quantized weight"
        if (reason := graft_obstacle(reader)) is not None:
            return f"{cls.__name__} reads it, and {reason}"
    return None


def _why_unsuitable_settings(weight: ModelWeight, spec: LoraSpec) -> str | None:
    """Return why a weight cannot carry an adapter with these settings; None if it can."""
    if spec.dora and (weight.parameter != "weight" or weight.kind.name not in DORA_KINDS):
        return f"dora=True is for layers ({', '.join(DORA_KINDS)}), and this weight is of kind {weight.kind.name}"
    if spec.dora and is_quantized(weight.module):
        return "dora=True needs the norms of W0, which is quantized"
    if (spec.dora or not starts_at_zero(spec.init)) and is_offloaded(weight.module, weight.parameter):
        return "dora=True and this init read W0, which is offloaded: inject first, or use init='kaiming'"
    shape = weight_shape(weight.module, weight.parameter)
    return why_uninitialized(spec.init, spec.r, weight.module, weight.kind, shape)


def wrapper_problems(index: ModelIndex) -> list[str]:
    """Return what is wrong if the model carries adapters of PEFT or is already wrapped for data-parallel training."""
    classes = {type(module) for _, module in index.walked}
    wrappers = {cls: WRAPPERS[c.__name__] for cls in classes for c in cls.__mro__ if c.__name__ in WRAPPERS}
    problems: list[str] = []
    if any(cls.__module__.startswith("peft.") for cls in classes):
        problems.append("the model carries adapters of PEFT, and a second LoRA would come on top: unload() them first")
    for path, module in index.walked:
        if (wrapper := wrappers.get(type(module))) is not None:
            problems.append(f"{path or 'the model'} is already wrapped by {wrapper}, {UNSYNCHRONIZED}")
    if not problems and (wrapper := data_parallel_wrapper([module for _, module in index.walked])) is not None:
        problems.append(f"the model is inside a module that is already wrapped by {wrapper}, {UNSYNCHRONIZED}")
    return problems


def name_problems(index: ModelIndex, name: str) -> list[str]:
    """Return what is wrong with the name of a new adapter, which becomes a part of state-dict keys and folder names."""
    if not isinstance(name, str) or not regex.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        return [f"the adapter name {name!r} must be 1 to 64 letters, digits, '_' or '-'"]
    if name in index.adapter_names:
        return [f"the model already carries an adapter named {name!r}: eject it, or pass another name="]
    return []


def count_parameters(index: ModelIndex) -> int:
    """Return the number of parameters of the base model. Shared parameters count once, adapters do not count."""
    parameters = {id(p): p for _, module in index.walked for p in module._parameters.values() if p is not None}
    return sum(p.numel() for p in parameters.values())


def layer_of(path: str) -> int | None:
    """Return the first number in a path: model.layers.3.mlp.experts.5.w1 is in layer 3. None if there is none."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _match_excluded(spec: LoraSpec, matcher: Matcher) -> set[WeightKey]:
    """Return the keys of the weights that are left out, with everything in the modules that an entry matches."""
    excluded: set[WeightKey] = set()
    for entry in spec.exclude:
        if isinstance(entry, str) and split_slices(entry)[1]:
            why = "a slice cannot be left out; name the wanted slices in targets"
            matcher.problems.append(f"exclude {entry!r}: {why}")
            continue
        inside = {id(inner) for module in matcher.modules(entry) for inner in module.modules()}
        keys = {w.key for w in matcher.weights if any(id(m) in inside for m in w.modules)} | {
            m.weight.key for m in matcher.match(entry)
        }
        excluded |= keys
        if not keys and not inside:
            matcher.problems.append(f"exclude {_show(entry)} matches nothing{matcher.nearest(entry)}")
    return excluded


def _match_targets(spec: LoraSpec, matcher: Matcher, excluded: set[WeightKey]) -> list[WeightMatch]:
    """Return what the targets match, in the model's order, each weight or slice once."""
    chosen: dict[tuple[WeightKey, str], WeightMatch] = {}
    for entry in spec.targets:
        problems_before = len(matcher.problems)
        matches = matcher.match(entry)
        kept = [m for m in matches if m.weight.key not in excluded]
        if isinstance(entry, str) and not is_pattern(entry) and not matcher.is_role(entry):
            matcher.problems += _named_modules_without_weight(entry, matcher, matched=bool(matches))
        if not kept and len(matcher.problems) == problems_before:
            why = ": exclude leaves nothing of it" if matches else f" {matcher.why_nothing(entry)}"
            matcher.problems.append(_show(entry) + why)
        chosen |= {(m.weight.key, m.label): m for m in kept}
    order = {w.key: position for position, w in enumerate(matcher.weights)}
    return sorted(chosen.values(), key=lambda m: (order[m.weight.key], m.rows[0].start if m.rows else 0))


def _named_modules_without_weight(entry: str, matcher: Matcher, *, matched: bool) -> list[str]:
    """Return a problem for each module that a plain name means, but that cannot carry an adapter.

    Where the name also matches weights, a container of the same name (BERT's `output`) is no mistake, but a layer is.
    """
    adaptable = {id(m) for w in matcher.weights for m in w.modules}
    problems = []
    for module in dict.fromkeys(matcher.modules(entry)):
        is_layer = next(module.parameters(recurse=False), None) is not None
        if id(module) not in adaptable and (is_layer or not matched):
            path = matcher.index.first_paths[id(module)]
            what = f"{path} is a {type(module).__name__}, which cannot carry an adapter"
            problems.append(what + matcher.layers_inside(path))
    return problems


def _limit_to_layers(spec: LoraSpec, matches: list[WeightMatch], problems: list[str]) -> list[WeightMatch]:
    if spec.layers is None or not matches:
        return matches
    existing = sorted({layer for m in matches if (layer := layer_of(m.name)) is not None})
    if missing := sorted(set(spec.layers) - set(existing)):
        where = f"; the targets are in layers {existing[0]} to {existing[-1]}" if existing else ""
        problems.append(f"layers: no target is in layer {', '.join(map(str, missing))}{where}")
    return [m for m in matches if layer_of(m.name) in spec.layers]


def _apply_overrides(spec: LoraSpec, matcher: Matcher, matches: Sequence[WeightMatch]) -> list[LoraSpec]:
    """Return the settings of each match: the first override that matches it applies."""
    settings = [spec] * len(matches)
    for override in reversed(spec.overrides):  # so that the first one is applied last, and wins
        targeted = {(m.weight.key, m.label) for m in matcher.match(override.target)}
        concerned = [bool({(m.weight.key, m.label), (m.weight.key, "")} & targeted) for m in matches]
        settings = [spec.with_override(override) if c else s for c, s in zip(concerned, settings, strict=True)]
        if not any(concerned):
            nearest = matcher.nearest(override.target)
            matcher.problems.append(f"override {override.target!r} matches none of the targets{nearest}")
    return settings


def _overlaps(matches: Sequence[WeightMatch]) -> list[str]:
    """Return a problem for each pair of matches that share rows of a weight."""
    problems = []
    by_weight: dict[WeightKey, list[WeightMatch]] = {}
    for match in matches:
        by_weight.setdefault(match.weight.key, []).append(match)
    for slices in by_weight.values():
        taken: dict[int, WeightMatch] = {}
        for match in slices if len(slices) > 1 else ():
            rows = range(match.weight.out_features) if match.rows is None else [i for part in match.rows for i in part]
            if other := next((taken[i] for i in rows if i in taken), None):
                problems.append(f"{match.name} and {other.name} overlap: a row can belong to one of them only")
            taken |= dict.fromkeys(rows, match)
    return problems


def _show(entry: Target) -> str:
    return repr(entry) if isinstance(entry, str) else f"the callable {getattr(entry, '__qualname__', entry)!r}"
