"""Model + targets -> Plan. Pure: nothing is changed, nothing is allocated, and the meta device will do.

Every entry must match something that can carry an adapter; a module that is named plainly but can't carry one is an error
too. All that is wrong is collected and raised once, so that nothing is half done later.
"""

from __future__ import annotations

import difflib
import fnmatch
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import regex
import torch
from torch import nn

from .adapters import adapters_of, child_name, names_of, walk
from .anatomy import Weight, heads, towers, weights
from .errors import SpecError, TargetError
from .graft import objection
from .kinds import is_quantised, kind_of, refusal, shape_of
from .layouts import parts
from .roles import PART_ROLES, ROLES, role_names
from .spec import KEYWORDS, LoraSpec, Override, Plan, Site, Target

REGEX_SECONDS = 1.0  # for all names together: patterns also come from files that strangers made
WRAPPERS = {"DistributedDataParallel": "DDP", "FullyShardedDataParallel": "FSDP", "FSDPModule": "fully_shard"}


class Pick(NamedTuple):
    """A weight, or some of its rows."""

    weight: Weight
    label: str = ""
    rows: tuple[range, ...] | None = None

    @property
    def name(self) -> str:
        return self.weight.names[0] + (f"[{self.label}]" if self.label else "")


def find(model: nn.Module, targets: Target | Sequence[Target] | None = None, r: int = 8, *, alpha: float | None = None,
         dropout: float = 0.0, exclude: Target | Sequence[Target] = (), layers: Sequence[int] | None = None,
         scaling: str = "standard", init: str = "kaiming", dtype: torch.dtype | None = None,
         overrides: Mapping[str, Mapping[str, float]] | Sequence[Override] | None = (), name: str = "default",
         spec: LoraSpec | None = None) -> Plan:  # fmt: skip
    """What `inject` with these arguments (documented at LoraSpec) would do to `model`: print it as a table.

    Raises TargetError with every entry that matches nothing (and the nearest names) and every weight that can't carry an
    adapter; SpecError for settings that can't be meant.
    """
    if not isinstance(model, nn.Module):
        raise TargetError(f"the model must be an nn.Module, not {model!r}", way_out="load it first, as with AutoModel.from_pretrained")
    spec = LoraSpec.of(spec, targets, r=r, alpha=alpha, dropout=dropout, exclude=exclude, layers=layers, scaling=scaling,
                       init=init, dtype=dtype, overrides=overrides or ())  # fmt: skip
    matcher = Matcher(model)
    problems = name_problems(model, name) + wrapped(model)
    excluded = _excluded(spec, matcher, problems)
    chosen = _in_layers(spec, _targeted(spec, matcher, excluded, problems), problems)
    settings = _settings(spec, matcher, chosen, problems)
    problems += _overlaps(chosen)
    problems += [f"{p.name}: {reason}" for p in chosen if (reason := unfit(p.weight, p.label))]
    if problems:
        raise TargetError("this can't be injected; nothing was changed:", problems, "correct these and call again; exclude=[...] leaves modules out")
    readers = matcher.paths
    sites = tuple(
        site(p, readers, r=s.r, alpha=s.alpha, scaling=s.scaling, dropout=s.dropout, init=s.init, dtype=s.dtype)
        for p, s in zip(chosen, settings, strict=True)
    )  # fmt: skip
    taken = {p.weight.key for p in chosen}
    left_out = tuple(w.names[0] for w in matcher.aside if w.key not in taken)
    return Plan(sites=sites, total=total(model), left_out=left_out if matcher.all_linear else (), towers=towers(model))


def _excluded(spec: LoraSpec, matcher: Matcher, problems: list[str]) -> set[tuple[int, str]]:
    excluded: set[tuple[int, str]] = set()
    for entry in spec.exclude:
        if isinstance(entry, str) and _sliced(entry)[1]:
            problems.append(f"exclude {entry!r}: a slice can't be left out; name the slices that are wanted in targets")
            continue
        inside = {id(inner) for module in matcher.modules(entry) for inner in module.modules()}
        matched = {p.weight.key for p in matcher(entry, problems)} | {w.key for w in matcher.weights if id(w.module) in inside}
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
        if isinstance(entry, str) and not _is_pattern(entry) and not matcher.is_role(entry):
            # Beside layers that fit, a container of the same name (BERT's `output`) is no mistake; another layer is.
            known = {id(w.module) for w in matcher.weights}
            for path, module in matcher.modules_by_path(entry):
                if id(module) not in known and (not matched or next(module.parameters(recurse=False), None) is not None):
                    problems.append(f"{path} is a {type(module).__name__}, which can't carry an adapter{matcher.inside(path)}")
        if not kept and len(problems) == wrong:
            problems.append(f"{_show(entry)}: exclude leaves nothing of it" if matched else f"{_show(entry)} {matcher.why_nothing(entry)}")
        chosen |= {(p.weight.key, p.label): p for p in kept}
    order = {w.key: n for n, w in enumerate(matcher.weights)}
    return sorted(chosen.values(), key=lambda p: (order[p.weight.key], p.rows[0].start if p.rows else 0))


def _overlaps(chosen: Sequence[Pick]) -> list[str]:
    """Weights of which the same rows were asked for twice."""
    problems = []
    taken: dict[tuple[int, str], dict[int, Pick]] = {}
    for p in (p for p in chosen if p.rows is not None or any(q.rows is not None and q.weight.key == p.weight.key for q in chosen)):
        mine = taken.setdefault(p.weight.key, {})
        rows = range(_out(p.weight)) if p.rows is None else [i for part in p.rows for i in part]
        if other := next((mine[i] for i in rows if i in mine), None):
            problems.append(f"{p.name} and {other.name} overlap: each row takes one of them")
        mine |= dict.fromkeys(rows, p)
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
            problems.append(f"override {override.target!r} matches none of the targets{matcher.nearest(override.target)}")
    return settings


def unfit(weight: Weight, label: str = "") -> str | None:
    """Why this weight can't take an adapter; None if it can."""
    child = child_name(weight.parameter, label)
    if adapters_of(weight.module, weight.parameter, label) is None and hasattr(weight.module, child):
        return f"has an attribute `{child}` of its own (another library's adapter?)"
    if (reason := refusal(weight.module, weight.parameter)) is not None:
        return reason
    if weight.readers and is_quantised(weight.module):
        return f"{type(weight.readers[0]).__name__} reads its weight itself, which is quantised"
    return next((f"{type(m).__name__} reads it, and {reason}" for m in weight.readers if (reason := objection(m)) is not None), None)


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


def site(pick: Pick, paths: Mapping[int, str], *, r: int, alpha: float | None, scaling: str, dropout: float, init: str,
         dtype: torch.dtype | None) -> Site:  # fmt: skip
    """The site that this weight becomes under these settings (see LoraSpec); `paths` are those of the model's modules, by id."""
    w, rows = pick.weight, pick.rows
    shape = shape_of(w.module, w.parameter)
    stack, out_features, in_features = w.kind.sizes(shape)
    stored = w.module._parameters[w.parameter]
    assert stored is not None
    wide = torch.float32 if is_quantised(w.module) else torch.promote_types(stored.dtype, torch.float32)
    return Site(
        path=w.paths[0], aliases=w.paths[1:], parameter=w.parameter, label=pick.label, rows=rows,
        kind=w.kind.name, shape=shape, stack=stack[0] if stack else 1, readers=tuple(paths[id(m)] for m in w.readers),
        in_features=in_features, out_features=out_features if rows is None else sum(map(len, rows)),
        r=r, alpha=float(r if alpha is None else alpha), scaling=scaling, dropout=float(dropout), init=init, dtype=dtype or wide,
    )  # fmt: skip


def total(model: nn.Module) -> int:
    """Parameters of the base: each once, the adapters' not counted."""
    own = {id(p): p for _, module in walk(model) for p in module.parameters(recurse=False)}
    return sum(p.numel() for p in own.values())


def layer_of(path: str) -> int | None:
    """The first number in the path: model.layers.3.mlp.experts.5.w1 lies in layer 3."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


class Matcher:
    """Which weights of one model an entry names; one clock for all regular expressions."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = weights(model)
        self.config = getattr(model, "config", None)
        self.named = list(walk(model))
        self.paths = {id(module): path for path, module in reversed(self.named)}
        self.all_linear = False
        self.deadline = time.monotonic() + REGEX_SECONDS
        head = heads(model)
        self.roles = {w.key: _roles(w) | ({"head"} if id(w.module) in head else set()) for w in self.weights if w.multiplies}
        self.aside = [w for w in self.weights if self.roles.get(w.key, frozenset()) & {"head", "router"}]

    def __call__(self, entry: Target, problems: list[str]) -> list[Pick]:
        """What an entry names, with its slices; a slice that the weight does not have is a problem."""
        if not isinstance(entry, str):
            return [Pick(w) for w in self._visible() if any(entry(path, w.module) for path in w.paths)]
        name, slices = _sliced(entry)
        if not slices:
            return self._role(name) if self.is_role(name) else [Pick(w) for w in self._named(name)]
        return [pick for w in self._named(name) for label in slices if (pick := self._slice(w, label, problems))]

    def is_role(self, entry: str) -> bool:
        """Whether it is a role or keyword, perhaps confined to a part of the model; a layer of that name goes first."""
        word = entry.rsplit(".", 1)[-1]
        return word in KEYWORDS or (word in ROLES and not any(_ends(n, entry) for w in self.weights for n in w.names))

    def modules(self, entry: Target) -> list[nn.Module]:
        """Every module that an entry names, of whatever kind."""
        if callable(entry):
            return [m for path, m in self.named if entry(path, m)]
        if entry.startswith("re:"):
            return [m for path, m in self.named if self._regex(entry[3:], path)]
        if _is_glob(entry):
            return [m for path, m in self.named if _globs(path, entry)]
        return [m for _, m in self.modules_by_path(entry)]

    def modules_by_path(self, entry: str) -> list[tuple[str, nn.Module]]:
        """The modules that a plain name means."""
        return [(self.paths[id(m)], m) for m in dict.fromkeys(m for path, m in self.named if _ends(path, _sliced(entry)[0]))]

    def _visible(self) -> list[Weight]:
        """What patterns see: layers, and bare parameters that multiply; not class tokens and position tables."""
        return [w for w in self.weights if w.parameter == "weight" or w.multiplies]

    def _named(self, name: str) -> list[Weight]:
        if name.startswith("re:"):
            return [w for w in self._visible() if any(self._regex(name[3:], n) for n in w.names)]
        if _is_glob(name):
            return [w for w in self._visible() if any(_globs(n, name) for n in w.names)]
        found = [w for w in self.weights if any(_ends(n, name) for n in w.names)]
        if not found and name.endswith(".weight"):  # a layer's weight by its own name: whoever reads it within the model shall be adapted
            layers = [w for w in self.weights if w.parameter == "weight" and any(_ends(n, name.removesuffix(".weight")) for n in w.names)]
            found = [replace(w, readers=w.owners[1:] or w.owners) for w in layers]
        return found

    def _role(self, entry: str) -> list[Pick]:
        confined, _, word = entry.rpartition(".")
        among = [w for w in self.weights if not confined or any(_within(n, confined) for n in w.names)]
        if word == "all-conv":
            return [Pick(w) for w in among if w.kind.name.startswith("conv")]
        among = [w for w in among if w.multiplies]
        if word == "all-linear":
            self.all_linear = True
            return [Pick(w) for w in among if not self.roles[w.key] & {"head", "router"}]
        whole = [Pick(w) for w in among if word in self.roles[w.key]]
        part = next((label for label, role in PART_ROLES.items() if role == word), None)
        return whole + [Pick(w, part, rows[part]) for w in among if word not in self.roles[w.key] and part in (rows := self._parts(w))]

    def _slice(self, w: Weight, label: str, problems: list[str]) -> Pick | None:
        out = _out(w)
        if by_row := regex.fullmatch(r"(\d+):(\d+)", label):
            rows = range(int(by_row[1]), int(by_row[2]))
            if len(rows) > 0 and rows.stop <= out:
                return Pick(w, label, (rows,))
            problems.append(f"{w.names[0]}[{label}]: it has the rows 0:{out}")
            return None
        known = self._parts(w)
        if label in known:
            return Pick(w, label, known[label])
        have = f"it has {', '.join(known)}" if known else "how it is laid out is not known"
        problems.append(f"{w.names[0]} has no part {label!r}: {have}; rows work too, as in [0:{out // 3 or out}]")
        return None

    def _parts(self, w: Weight) -> dict[str, tuple[range, ...]]:
        owners, leaf = _home(w)
        return (parts(self.config, owners[-1], leaf, _out(w)) or {}) if owners else {}

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

    def why_nothing(self, entry: Target) -> str:
        """What to say of an entry that names no weight."""
        if isinstance(entry, str) and self.is_role(entry):
            word = entry.rsplit(".", 1)[-1]
            if word in KEYWORDS:
                return "matches nothing: this model has no such weight" + (" there" if "." in entry else "")
            of_parts = {PART_ROLES[label] for w in self.weights if w.multiplies for label in self._parts(w) if label in PART_ROLES}
            there = sorted(of_parts.union(*self.roles.values()))
            return f"is a role that this model has not; it has {', '.join(there) or 'none'}"
        return f"matches nothing{self.nearest(entry)}"

    def nearest(self, entry: Target) -> str:
        """What to add to "matches nothing": (did you mean ...?), by the dotted ends that have as many parts as the entry."""
        among = self._visible()
        if not isinstance(entry, str) or not among:
            return ""
        if entry.startswith("re:"):
            return " (a pattern must match a whole path, as re:.*\\.q_proj does)"
        entry = _sliced(entry)[0]
        count = entry.count(".") + 1
        ends = {".".join(name.split(".")[-count:]) for w in among for name in w.names if name}
        if near := difflib.get_close_matches(entry, sorted(ends), n=3, cutoff=0.6):
            return f" (did you mean {' or '.join(map(repr, near))}?)"
        leaves = sorted({w.names[0].rsplit(".", 1)[-1] for w in among} - {""})
        return f" (this model has {', '.join(map(repr, leaves[:12]))}{', ...' if len(leaves) > 12 else ''})"

    def inside(self, path: str) -> str:
        """The layers inside a container that was named where a layer was meant."""
        inside = sorted({name.rsplit(".", 1)[-1] for w in self._visible() for name in w.names if name.startswith(f"{path}.")})
        return f": name the layers inside it ({', '.join(map(repr, inside[:8]))})" if inside else ""


def _home(w: Weight) -> tuple[tuple[nn.Module, ...], str]:
    """The modules from the root down to the one that has the layer (or the bare parameter), and what it is called there."""
    if kind_of(w.module, w.parameter) is None:
        return w.owners, w.parameter
    return w.owners[:-1], w.paths[0].rsplit(".", 1)[-1]


def _roles(w: Weight) -> frozenset[str]:
    owners, leaf = _home(w)
    path = w.paths[0] if leaf != w.parameter else f"{w.paths[0]}.{leaf}".removeprefix(".")
    return role_names(path, owners, leaf) if owners else frozenset()


def _out(w: Weight) -> int:
    return w.kind.sizes(shape_of(w.module, w.parameter))[1]


def _sliced(entry: str) -> tuple[str, list[str]]:
    """ "c_attn[q,v]" -> ("c_attn", ["q", "v"]); a regular expression has brackets of its own."""
    name, bracket, inside = entry.partition("[")
    if not bracket or not entry.endswith("]") or entry.startswith("re:"):
        return entry, []
    return name, [label.strip() for label in inside[:-1].split(",")]


def _ends(path: str, entry: str) -> bool:
    return path == entry or path.endswith(f".{entry}")


def _globs(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")


def _within(path: str, confined: str) -> bool:
    """Whether `path` lies within a part of the model: language_model, vision_tower.*, layers.0"""
    return _globs(path, f"{confined.removesuffix('.*')}.*")


def _is_pattern(entry: str) -> bool:
    return entry in KEYWORDS or entry.startswith("re:") or _is_glob(entry)


def _is_glob(entry: str) -> bool:
    return "*" in entry or "?" in entry


def _show(entry: Target) -> str:
    return repr(entry) if isinstance(entry, str) else f"the callable {getattr(entry, '__qualname__', entry)!r}"
