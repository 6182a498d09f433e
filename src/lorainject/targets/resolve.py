"""Model + targets -> Plan. Pure: nothing is changed, nothing is allocated, and the meta device will do.

Every entry must match something that can carry an adapter; a module that is named plainly but can't carry one is an error
too. All that is wrong is collected and raised once, so that nothing is half done later.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import regex
import torch
from torch import nn

from ..errors import TargetError
from ..lora.adapter_dict import adapters_of, child_name
from ..lora.graft import base_class, graft_obstacle
from ..lora.model_index import ModelIndex
from ..lora.weight_kinds import is_quantized, weight_shape, why_unsupported
from ..plan import Plan, Site
from ..spec import LoraSpec, Override, Target, spec_from_arguments
from .matcher import Matcher, Pick, is_pattern, out_of, sliced
from .model_weights import Weight, towers

WRAPPERS = {"DistributedDataParallel": "DDP", "FullyShardedDataParallel": "FSDP", "FSDPModule": "fully_shard"}


def find(model: nn.Module, targets: Target | Sequence[Target] | None = None, r: int = 8, *, alpha: float | None = None,
         dropout: float = 0.0, exclude: Target | Sequence[Target] = (), layers: Sequence[int] | None = None,
         scaling: str = "standard", init: str = "kaiming", dtype: torch.dtype | None = None,
         overrides: Mapping[str, Mapping[str, float]] | Sequence[Override] | None = (), name: str = "default",
         spec: LoraSpec | None = None) -> Plan:  # fmt: skip
    """What `inject` with these arguments (documented at LoraSpec) would do to `model`: print it as a table.

    Raises TargetError with every entry that matches nothing (and the nearest names) and every weight that can't carry an
    adapter; SpecError for settings that can't be meant.
    """
    spec = spec_from_arguments(spec, targets, r=r, alpha=alpha, dropout=dropout, exclude=exclude, layers=layers, scaling=scaling,
                       init=init, dtype=dtype, overrides=overrides or ())  # fmt: skip
    return resolve(ModelIndex(model), spec, name)


def resolve(index: ModelIndex, spec: LoraSpec, name: str) -> Plan:
    """Return the plan of a spec for an indexed model; raise TargetError with everything that is wrong (see `find`)."""
    matcher = Matcher(index)
    problems = name_problems(index, name) + wrapper_problems(index)
    excluded = _excluded(spec, matcher, problems)
    chosen = _in_layers(spec, _targeted(spec, matcher, excluded, problems), problems)
    settings = _settings(spec, matcher, chosen, problems)
    problems += _overlaps(chosen)
    problems += [f"{p.name}: {reason}" for p in chosen if (reason := why_unsuitable(p.weight, p.label))]
    if problems:
        raise TargetError(
            "this can't be injected; nothing was changed:",
            problems,
            "correct these and call again; exclude=[...] leaves modules out",
        )
    sites = tuple(
        make_site(p, matcher.paths, r=s.r, alpha=s.alpha, scaling=s.scaling, dropout=s.dropout, init=s.init, dtype=s.dtype)
        for p, s in zip(chosen, settings, strict=True)
    )  # fmt: skip
    taken = {p.weight.key for p in chosen}
    all_linear = any(isinstance(entry, str) and entry.rsplit(".", 1)[-1] == "all-linear" for entry in spec.targets)
    left_out = tuple(w.names[0] for w in matcher.aside if w.key not in taken) if all_linear else ()
    return Plan(sites=sites, total=count_parameters(index), left_out=left_out, towers=towers(index))


def _excluded(spec: LoraSpec, matcher: Matcher, problems: list[str]) -> set[tuple[int, str]]:
    excluded: set[tuple[int, str]] = set()
    for entry in spec.exclude:
        if isinstance(entry, str) and sliced(entry)[1]:
            problems.append(f"exclude {entry!r}: a slice can't be left out; name the slices that are wanted in targets")
            continue
        inside = {id(inner) for module in matcher.modules(entry) for inner in module.modules()}
        matched = {p.weight.key for p in matcher(entry, problems)} | {
            w.key for w in matcher.weights if id(w.module) in inside
        }
        excluded |= matched
        if not matched and not inside:
            problems.append(f"exclude {_show(entry)} matches nothing{matcher.nearest(entry)}")
    return excluded


def _targeted(spec: LoraSpec, matcher: Matcher, excluded: set[tuple[int, str]], problems: list[str]) -> list[Pick]:
    """What the targets name, in the model's order. A pattern passes over what can't carry an adapter; a plain name must not."""
    chosen: dict[tuple[tuple[int, str], str], Pick] = {}
    for entry in spec.targets:
        wrong = len(problems)
        matched = matcher(entry, problems)
        kept = [p for p in matched if p.weight.key not in excluded]
        if isinstance(entry, str) and not is_pattern(entry) and not matcher.is_role(entry):
            # Beside layers that fit, a container of the same name (BERT's `output`) is no mistake; another layer is.
            known = {id(w.module) for w in matcher.weights}
            for path, module in matcher.modules_by_path(entry):
                if id(module) not in known and (
                    not matched or next(module.parameters(recurse=False), None) is not None
                ):
                    problems.append(
                        f"{path} is a {type(module).__name__}, which can't carry an adapter{matcher.inside(path)}"
                    )
        if not kept and len(problems) == wrong:
            problems.append(
                f"{_show(entry)}: exclude leaves nothing of it"
                if matched
                else f"{_show(entry)} {matcher.why_nothing(entry)}"
            )
        chosen |= {(p.weight.key, p.label): p for p in kept}
    order = {w.key: n for n, w in enumerate(matcher.weights)}
    return sorted(chosen.values(), key=lambda p: (order[p.weight.key], p.rows[0].start if p.rows else 0))


def _overlaps(chosen: Sequence[Pick]) -> list[str]:
    """Weights of which the same rows were asked for twice."""
    problems = []
    of: dict[tuple[int, str], list[Pick]] = {}
    for p in chosen:
        of.setdefault(p.weight.key, []).append(p)
    for picks in of.values():
        taken: dict[int, Pick] = {}
        for p in picks if len(picks) > 1 else ():
            rows = range(out_of(p.weight)) if p.rows is None else [i for part in p.rows for i in part]
            if other := next((taken[i] for i in rows if i in taken), None):
                problems.append(f"{p.name} and {other.name} overlap: each row takes one of them")
            taken |= dict.fromkeys(rows, p)
    return problems


def _in_layers(spec: LoraSpec, chosen: list[Pick], problems: list[str]) -> list[Pick]:
    if spec.layers is None or not chosen:
        return chosen
    there = sorted({n for p in chosen if (n := layer_of(p.name)) is not None})
    where = f"; they lie in {there[0]} to {there[-1]}" if there else ""
    if beyond := sorted(set(spec.layers) - set(there)):
        problems.append(f"layers: no target lies in layer {', '.join(map(str, beyond))}{where}")
    return [p for p in chosen if layer_of(p.name) in spec.layers]


def _settings(spec: LoraSpec, matcher: Matcher, chosen: Sequence[Pick], problems: list[str]) -> list[LoraSpec]:
    """The spec as it holds for each site: the first override that matches decides."""
    settings = [spec] * len(chosen)
    for override in reversed(spec.overrides):  # the first is laid over the others
        picks = matcher(override.target, problems)
        matched = {(p.weight.key, p.label) for p in picks}
        hit = [bool({(p.weight.key, p.label), (p.weight.key, "")} & matched) for p in chosen]
        settings = [spec.with_override(override) if h else s for h, s in zip(hit, settings, strict=True)]
        if not any(hit):
            problems.append(
                f"override {override.target!r} matches none of the targets{matcher.nearest(override.target)}"
            )
    return settings


def why_unsuitable(weight: Weight, label: str = "") -> str | None:
    """Why this weight can't take an adapter; None if it can."""
    child = child_name(weight.parameter, label)
    if adapters_of(weight.module, weight.parameter, label) is None and hasattr(weight.module, child):
        return f"has an attribute `{child}` of its own (another library's adapter?)"
    if (reason := why_unsupported(weight.module, weight.parameter)) is not None:
        return reason
    if any(
        inspect.isgeneratorfunction(f) or inspect.iscoroutinefunction(f)
        for f in (base_class(type(m)).forward for m in weight.readers)
    ):
        return (
            "it is read by a forward that is a generator or a coroutine, which would run after the adapter is off again"
        )
    if weight.readers and is_quantized(weight.module):
        return f"{base_class(type(weight.readers[0])).__name__} reads its weight itself, which is quantised"
    return next(
        (
            f"{base_class(type(m)).__name__} reads it, and {reason}"
            for m in weight.readers
            if (reason := graft_obstacle(m)) is not None
        ),
        None,
    )


def wrapper_problems(index: ModelIndex) -> list[str]:
    """Whose model this is already: data-parallel wrappers, under which the ranks' new parameters would silently differ, and PEFT."""
    classes = {type(module) for _, module in index.walked}
    peft = any(cls.__module__.startswith("peft.") for cls in classes)
    by = {cls: WRAPPERS[c.__name__] for cls in classes for c in cls.__mro__ if c.__name__ in WRAPPERS}
    return ["the model carries PEFT's adapters, on which ours would be stacked: unload() them first"] * peft + [
        f"{path or 'the model'} is already wrapped by {by[type(module)]}, under which the ranks' adapters would diverge: inject first, wrap after"
        for path, module in index.walked
        if type(module) in by
    ]


def name_problems(index: ModelIndex, name: str) -> list[str]:
    """An adapter's name is new to the model, and fit to be part of state-dict keys and of folder names."""
    if not isinstance(name, str) or not regex.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        return [f"the adapter name {name!r} must be 1 to 64 letters, digits, '_' or '-'"]
    if name in index.adapter_names:
        return [f"the model already carries an adapter named {name!r}: eject it, or pass another name="]
    return []


def make_site(pick: Pick, paths: Mapping[int, str], *, r: int, alpha: float | None, scaling: str, dropout: float, init: str,
         dtype: torch.dtype | None) -> Site:  # fmt: skip
    """The site that this weight becomes under these settings (see LoraSpec); `paths` are those of the model's modules, by id."""
    w, rows = pick.weight, pick.rows
    shape = weight_shape(w.module, w.parameter)
    stack, out_features, in_features = w.kind.sizes(shape)
    stored = w.module._parameters[w.parameter]
    assert stored is not None
    wide = torch.float32 if is_quantized(w.module) else torch.promote_types(stored.dtype, torch.float32)
    return Site(
        path=w.paths[0], aliases=w.paths[1:], parameter=w.parameter, label=pick.label, rows=rows,
        kind=w.kind.name, shape=shape, stack=stack[0] if stack else 1, readers=tuple(paths[id(m)] for m in w.readers), named=w.named,
        in_features=in_features, out_features=out_features if rows is None else sum(map(len, rows)),
        r=r, alpha=float(r if alpha is None else alpha), scaling=scaling, dropout=float(dropout), init=init, dtype=dtype or wide,
    )  # fmt: skip


def count_parameters(index: ModelIndex) -> int:
    """Parameters of the base: each once, the adapters' not counted."""
    own = {id(p): p for _, module in index.walked for p in module._parameters.values() if p is not None}
    return sum(p.numel() for p in own.values())


def layer_of(path: str) -> int | None:
    """The first number in the path: model.layers.3.mlp.experts.5.w1 lies in layer 3."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _show(entry: Target) -> str:
    return repr(entry) if isinstance(entry, str) else f"the callable {getattr(entry, '__qualname__', entry)!r}"
