"""Model + targets -> Plan. Pure: nothing is changed, nothing is allocated, and the meta device will do.

Every entry must match something that can carry an adapter; a module that is named plainly but can't carry one is an error
too. All that is wrong is collected and raised once, so that nothing is half done later.
"""

from __future__ import annotations

import difflib
import fnmatch
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import regex
import torch
from torch import nn

from .adapters import adapters_of, names_of, walk, weight_of
from .anatomy import heads, missed, read_around
from .errors import SpecError, TargetError
from .kinds import kind_of, refusal
from .spec import KEYWORDS, LoraSpec, Override, Plan, Site, Target

REGEX_SECONDS = 1.0  # for all names together: patterns also come from files that strangers made
WRAPPERS = {"DistributedDataParallel": "DDP", "FullyShardedDataParallel": "FSDP", "FSDPModule": "fully_shard"}


@dataclass(frozen=True)
class Candidate:
    """A module of the model under all of its paths."""

    paths: tuple[str, ...]
    module: nn.Module


def find(model: nn.Module, targets: Target | Sequence[Target] | None = None, r: int = 8, *, alpha: float | None = None,
         dropout: float = 0.0, exclude: Target | Sequence[Target] = (), layers: Sequence[int] | None = None,
         scaling: str = "standard", init: str = "kaiming", dtype: torch.dtype | None = None,
         overrides: Mapping[str, Mapping[str, float]] | Sequence[Override] | None = (), name: str = "default",
         spec: LoraSpec | None = None) -> Plan:  # fmt: skip
    """What `inject` with these arguments (documented at LoraSpec) would do to `model`: print it as a table.

    Raises TargetError with every entry that matches nothing (and the nearest names) and every module that can't carry an
    adapter; SpecError for settings that can't be meant.
    """
    if not isinstance(model, nn.Module):
        raise TargetError(f"the model must be an nn.Module, not {model!r}", way_out="load it first, as with AutoModel.from_pretrained")
    spec = LoraSpec.of(spec, targets, r=r, alpha=alpha, dropout=dropout, exclude=exclude, layers=layers, scaling=scaling,
                       init=init, dtype=dtype, overrides=overrides or ())  # fmt: skip
    everything = candidates(model)
    able = [c for c in everything if kind_of(c.module) is not None]
    matcher = Matcher(heads(model) if "all-linear" in spec.targets else set())
    problems = name_problems(model, name) + wrapped(model)
    excluded = _excluded(spec, matcher, everything, problems)
    chosen = _in_layers(spec, _targeted(spec, matcher, everything, able, excluded, problems), problems)
    settings = _settings(spec, matcher, chosen, problems)
    around = read_around(model, {id(c.module) for c in chosen})
    problems += [f"{c.paths[0]}: {reason}" for c in chosen if (reason := unfit(c.module) or around.get(id(c.module)))]
    if "all-linear" in spec.targets:
        problems += [f"{c.paths[0]}: {reason}" for c in everything if id(c.module) not in excluded and (reason := missed(c.module))]
    if problems:
        raise TargetError("this can't be injected; nothing was changed:", problems, "correct these and call again; exclude=[...] leaves modules out")
    sites = tuple(
        site(c, r=s.r, alpha=s.alpha, scaling=s.scaling, dropout=s.dropout, init=s.init, dtype=s.dtype)
        for c, s in zip(chosen, settings, strict=True)
    )  # fmt: skip
    return Plan(sites=sites, total=total(model), left_out=tuple(c.paths[0] for c in able if id(c.module) in matcher.head))


def _excluded(spec: LoraSpec, matcher: Matcher, everything: Sequence[Candidate], problems: list[str]) -> set[int]:
    excluded: set[int] = set()
    for entry in spec.exclude:
        matched = matcher(entry, everything)
        excluded |= {id(inner) for c in matched for inner in c.module.modules()}
        if not matched:
            problems.append(f"exclude {_show(entry)} matches nothing{_nearest(entry, everything)}")
    return excluded


def _targeted(spec: LoraSpec, matcher: Matcher, everything: Sequence[Candidate], able: Sequence[Candidate], excluded: set[int],
              problems: list[str]) -> list[Candidate]:  # fmt: skip
    """What the targets name, in the model's order. A pattern passes over what can't carry an adapter; a plain name must not."""
    chosen: set[int] = set()
    for entry in spec.targets:
        among = everything if isinstance(entry, str) and not _is_pattern(entry) else able
        matched = [c for c in matcher(entry, among) if id(c.module) not in excluded]
        fit = {id(c.module) for c in matched if kind_of(c.module) is not None}
        for c in matched:
            # Beside layers that fit, a container of the same name (BERT's `output`) is no mistake; another layer is.
            if id(c.module) not in fit and (not fit or next(c.module.parameters(recurse=False), None) is not None):
                problems.append(f"{c.paths[0]} is a {type(c.module).__name__}, which can't carry an adapter{_inside(c, able)}")
        if not matched:
            all_excluded = bool(matcher(entry, among))
            problems.append(
                f"{_show(entry)}: exclude leaves nothing of it" if all_excluded else f"{_show(entry)} matches nothing{_nearest(entry, able)}"
            )
        chosen |= fit
    return [c for c in able if id(c.module) in chosen]


def _in_layers(spec: LoraSpec, chosen: list[Candidate], problems: list[str]) -> list[Candidate]:
    if spec.layers is None or not chosen:
        return chosen
    there = sorted({n for c in chosen if (n := layer_of(c.paths[0])) is not None})
    where = f"; they lie in {there[0]} to {there[-1]}" if there else ""
    if beyond := sorted(set(spec.layers) - set(there)):
        problems.append(f"layers: no target lies in layer {', '.join(map(str, beyond))}{where}")
    return [c for c in chosen if layer_of(c.paths[0]) in spec.layers]


def _settings(spec: LoraSpec, matcher: Matcher, chosen: Sequence[Candidate], problems: list[str]) -> list[LoraSpec]:
    """The spec as it holds for each site: the first override that matches decides."""
    settings = {id(c.module): spec for c in chosen}
    for override in reversed(spec.overrides):  # the first is laid over the others
        matched = matcher(override.target, chosen)
        settings |= {id(c.module): spec.with_override(override) for c in matched}
        if not matched:
            problems.append(f"override {override.target!r} matches none of the targets{_nearest(override.target, chosen)}")
    return [settings[id(c.module)] for c in chosen]


def candidates(model: nn.Module) -> list[Candidate]:
    """Every module of the base, each once, in order."""
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in walk(model):
        paths.setdefault(id(module), []).append(path)
        modules[id(module)] = module
    return [Candidate(tuple(paths[key]), module) for key, module in modules.items()]


def unfit(module: nn.Module) -> str | None:
    """Why this module of a known kind can't take an adapter; None if it can."""
    if adapters_of(module) is None and hasattr(module, "lora"):
        return "has an attribute `lora` of its own (another library's adapter?)"
    return refusal(module)


def wrapped(model: nn.Module) -> list[str]:
    """Whose model this is already: data-parallel wrappers, under which the ranks' new parameters would silently differ, and PEFT."""
    peft = [path for path, module in walk(model) if type(module).__module__.startswith("peft.")]
    return ["the model carries PEFT's adapters, on which ours would be stacked: unload() them first"] * bool(peft) + [
        f"{path or 'the model'} is already wrapped by {WRAPPERS[c.__name__]}, under which the ranks' adapters would diverge: inject first, wrap after"
        for path, module in walk(model)
        for c in type(module).__mro__
        if c.__name__ in WRAPPERS
    ]


def name_problems(model: nn.Module, name: str) -> list[str]:
    """An adapter's name is new to the model, and fit to be part of state-dict keys and of folder names."""
    if not isinstance(name, str) or not regex.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        return [f"the adapter name {name!r} must be 1 to 64 letters, digits, '_' or '-'"]
    if name in names_of(model):
        return [f"the model already carries an adapter named {name!r}: eject it, or pass another name="]
    return []


def site(c: Candidate, *, r: int, alpha: float | None, scaling: str, dropout: float, init: str, dtype: torch.dtype | None) -> Site:
    """The site that this module becomes under these settings (see LoraSpec)."""
    kind, weight = kind_of(c.module), weight_of(c.module)
    assert kind is not None
    out_features, in_features = kind.matrix(weight).shape
    return Site(
        path=c.paths[0], aliases=c.paths[1:], kind=kind.name, shape=tuple(weight.shape),
        in_features=in_features, out_features=out_features,
        r=r, alpha=float(r if alpha is None else alpha), scaling=scaling,
        dropout=float(dropout), init=init, dtype=dtype or torch.promote_types(weight.dtype, torch.float32),
    )  # fmt: skip


def total(model: nn.Module) -> int:
    """Parameters of the base: each once, the adapters' not counted."""
    own = {id(p): p for _, module in walk(model) for p in module.parameters(recurse=False)}
    return sum(p.numel() for p in own.values())


def layer_of(path: str) -> int | None:
    """The first number in the path: model.layers.3.mlp.experts.5.w1 lies in layer 3."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


class Matcher:
    """Which candidates an entry names; one clock for all regular expressions."""

    def __init__(self, head: set[int]) -> None:
        self.head = head
        self.deadline = time.monotonic() + REGEX_SECONDS

    def __call__(self, entry: Target, among: Sequence[Candidate]) -> list[Candidate]:
        if callable(entry):
            return [c for c in among if any(entry(path, c.module) for path in c.paths)]
        if entry == "all-linear":
            return [c for c in among if (kind := kind_of(c.module)) and kind.name in ("linear", "conv1d") and id(c.module) not in self.head]
        if entry.startswith("re:"):
            return [c for c in among if any(self._regex(entry[3:], path) for path in c.paths)]
        if _is_glob(entry):
            return [c for c in among if any(fnmatch.fnmatchcase(path, entry) or fnmatch.fnmatchcase(path, f"*.{entry}") for path in c.paths)]
        return [c for c in among if any(path == entry or path.endswith(f".{entry}") for path in c.paths)]

    def _regex(self, pattern: str, path: str) -> bool:
        try:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            return regex.fullmatch(pattern, path, timeout=left) is not None
        except regex.error as e:
            raise SpecError(f"re:{pattern} is not a regular expression: {e}", way_out="correct it; nothing was changed") from None
        except TimeoutError:
            raise SpecError(f"re:{pattern} took more than {REGEX_SECONDS:g} s on the names of this model",
                            way_out="simplify it (nested repetition, such as (a+)+, never ends); nothing was changed") from None  # fmt: skip


def _is_pattern(entry: str) -> bool:
    return entry in KEYWORDS or entry.startswith("re:") or _is_glob(entry)


def _is_glob(entry: str) -> bool:
    return "*" in entry or "?" in entry


def _show(entry: Target) -> str:
    return repr(entry) if isinstance(entry, str) else f"the callable {getattr(entry, '__qualname__', entry)!r}"


def _nearest(entry: Target, among: Sequence[Candidate]) -> str:
    """What to add to "matches nothing": (did you mean ...?), by the dotted ends that have as many parts as the entry."""
    if not isinstance(entry, str) or not among:
        return ""
    if entry.startswith("re:"):
        return " (a pattern must match a whole path, as re:.*\\.q_proj does)"
    parts = entry.count(".") + 1
    ends = {".".join(path.split(".")[-parts:]) for c in among for path in c.paths if path}
    if near := difflib.get_close_matches(entry, sorted(ends), n=3, cutoff=0.6):
        return f" (did you mean {' or '.join(map(repr, near))}?)"
    leaves = sorted({c.paths[0].rsplit(".", 1)[-1] for c in among} - {""})
    return f" (this model has {', '.join(map(repr, leaves[:12]))}{', ...' if len(leaves) > 12 else ''})"


def _inside(c: Candidate, able: Sequence[Candidate]) -> str:
    """The layers inside a container that was named where a layer was meant."""
    inside = sorted({path.rsplit(".", 1)[-1] for a in able for path in a.paths if path.startswith(f"{c.paths[0]}.")})
    return f": name the layers inside it ({', '.join(map(repr, inside[:8]))})" if inside else ""
