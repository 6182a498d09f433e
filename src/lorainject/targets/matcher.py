"""The weights of a model that one entry of the targets matches: by a name, pattern, role or keyword, or a slice of
these.

The grammar is documented at LoraSpec.targets. Patterns, roles and keywords see layers and the bare parameters that
multiply activations; a full name also reaches other parameters, such as position tables.
"""

from __future__ import annotations

import difflib
import fnmatch
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import regex
from torch import nn

from ..errors import SpecError
from ..lora.graft import base_class
from ..lora.model_index import ModelIndex
from ..lora.weight_kinds import kind_of, why_not_numbers
from ..plan import site_name
from ..spec import KEYWORDS, REGEX, Target
from .heads import ROUTER, find_heads
from .model_weights import ModelWeight, WeightKey, model_weights
from .roles import PART_ROLES, ROLES, role_names
from .source_analysis import weight_use

REGEX_SECONDS = 10.0  # for all patterns and names together: patterns also come from files that strangers made


class WeightMatch(NamedTuple):
    """A weight, or a slice of a fused weight, that an entry matches."""

    weight: ModelWeight
    label: str = ""
    """The slice as it was named ("q", "0:768"); empty for the whole weight."""
    rows: tuple[range, ...] | None = None
    """The rows of the slice; None for the whole weight."""

    @property
    def name(self) -> str:
        """The first name of the weight, with the slice in brackets."""
        return site_name(self.weight.paths[0], self.weight.parameter, self.label)


class Matcher:
    """Matches entries against the weights of one model. All regular expressions share one time limit.

    Args:
        index: The index of the model.
    """

    def __init__(self, index: ModelIndex) -> None:
        self.index = index
        self.weights = model_weights(index)
        self.problems: list[str] = []
        """What is wrong with the entries so far, one line each. `resolve` adds to it."""
        self._regex_seconds = REGEX_SECONDS

    @cached_property
    def heads(self) -> dict[WeightKey, str]:
        """The weights of the output head, with the reason for each."""
        return find_heads(self.index)

    @cached_property
    def roles(self) -> dict[WeightKey, frozenset[str]]:
        """The roles of each weight that multiplies activations."""
        roles = {}
        for w in self.weights:
            if w.multiplies:
                owners, leaf = w.location
                names = role_names(w.paths[0], owners, leaf) if owners else frozenset()
                roles[w.key] = names | {"head"} if any(key in self.heads for key in w.keys) else names
        return roles

    def why_left_out(self, w: ModelWeight) -> str | None:
        """Return why "all-linear" leaves a weight out that multiplies activations; None if it takes it."""
        if "head" in self.roles[w.key]:
            return next(self.heads[key] for key in w.keys if key in self.heads)
        return ROUTER if "router" in self.roles[w.key] else why_not_numbers(w.module, w.parameter)

    def left_out(self, scope: str = "") -> dict[str, str]:
        """Return what "all-linear" leaves out in a part of the model, with the reasons: weights that multiply
        activations, and linear layers whose weight is no parameter that can carry an adapter."""
        reasons = {w.names[0]: self.why_left_out(w) for w in self.weights if w.multiplies}
        known = {id(m) for w in self.weights if w.multiplies for m in w.modules}
        for path, module in self.index.walked:
            if id(module) not in known and _acts_as_linear(module):
                reasons[path] = f"a {type(module).__name__} keeps its weight in a form that cannot carry an adapter"
        return {n: reason for n, reason in reasons.items() if reason and (not scope or _is_within(n, scope))}

    def match(self, entry: Target) -> list[WeightMatch]:
        """Return the weights and slices that an entry matches; add slices that do not exist to `problems`."""
        if not isinstance(entry, str):
            return [WeightMatch(w) for w in self._visible_weights() if any(entry(path, w.module) for path in w.paths)]
        name, labels = split_slices(entry)
        if labels:
            slices = (self._slice(w, label) for w in self._match_name(name) for label in labels)
            return [s for s in slices if s is not None]
        return self._match_role(name) if self.is_role(name) else [WeightMatch(w) for w in self._match_name(name)]

    def is_role(self, entry: str) -> bool:
        """True if an entry is a keyword, or a role that is not the name of a weight; it may be limited to a part of the
        model."""
        word = entry.rsplit(".", 1)[-1]
        return word in KEYWORDS or (word in ROLES and not any(_is_end(n, entry) for w in self.weights for n in w.names))

    def modules(self, entry: Target) -> list[nn.Module]:
        """Return every module, of any kind, that an entry matches."""
        if not isinstance(entry, str):
            return [module for path, module in self.index.walked if entry(path, module)]
        return [module for path, module in self.index.walked if self._matches(path, split_slices(entry)[0])]

    def why_nothing(self, entry: Target) -> str:
        """Return the end of a sentence that says why an entry matches no weight."""
        if not (isinstance(entry, str) and self.is_role(entry)):
            return f"matches nothing{self.nearest(entry)}"
        scope, _, word = entry.rpartition(".")
        if word in KEYWORDS:
            left_out = self.left_out(scope) if word == "all-linear" else {}
            all_that = "; all that multiplies is left out: " + ", ".join(f"{n} ({r})" for n, r in left_out.items())
            return f"matches nothing: {scope or 'this model'} has no such weight" + all_that * bool(left_out)
        parts = {part for w in self.weights if w.multiplies for part in w.parts}
        roles = frozenset(PART_ROLES[part] for part in parts & PART_ROLES.keys()).union(*self.roles.values())
        existing = ", ".join(sorted(roles)) or "none"
        return f"is a role that no weight of {scope or 'this model'} has; the roles of this model are {existing}"

    def nearest(self, entry: Target) -> str:
        """Return what to add to "matches nothing": similar names, or else the names that exist, in parentheses."""
        weights = self._visible_weights()
        if not isinstance(entry, str) or not weights:
            return ""
        if entry.startswith("re:"):
            return " (a pattern must match a whole path, as re:.*\\.q_proj does)"
        if REGEX.search(entry) and self._matches_any(f"re:{entry}"):
            return f" (a regular expression is written {f're:{entry}'!r})"
        name = split_slices(entry)[0]
        length = name.count(".") + 1
        ends = {".".join(n.split(".")[-length:]) for w in weights for n in w.names if n}
        similar = list(dict.fromkeys(self._rewritten(name))) or difflib.get_close_matches(name, sorted(ends), n=3)
        if similar:
            return f" (did you mean {' or '.join(map(repr, similar))}?)"
        leaves = sorted({w.names[0].rsplit(".", 1)[-1] for w in weights} - {""})
        if not leaves:
            return ""
        return f" (this model has {', '.join(map(repr, leaves[:12]))}{', ...' if len(leaves) > 12 else ''})"

    def layers_inside(self, path: str) -> str:
        """Return what to say of a container that was named where a layer was meant: the layers inside it."""
        names = (n for w in self._visible_weights() for n in w.names if n.startswith(f"{path}."))
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
        return f": name the layers inside it ({', '.join(map(repr, leaves[:8]))})" if leaves else ""

    def _visible_weights(self) -> list[ModelWeight]:
        """Return what patterns see: layers, and bare parameters that multiply; no class tokens and position tables."""
        return [w for w in self.weights if w.parameter == "weight" or w.multiplies]

    def _match_name(self, name: str) -> list[ModelWeight]:
        weights = self._visible_weights() if is_pattern(name) else self.weights
        matched = [w for w in weights if any(self._matches(n, name) for n in w.names)]
        if matched or is_pattern(name) or not name.endswith(".weight"):
            return matched
        # A layer's weight by its own name: every module around it counts as a reader.
        layer = name.removesuffix(".weight")
        layers = [w for w in weights if w.parameter == "weight" and any(_is_end(n, layer) for n in w.names)]
        return [replace(w, readers=w.surroundings, named=True) for w in layers]

    def _match_role(self, entry: str) -> list[WeightMatch]:
        scope, _, word = entry.rpartition(".")
        weights = [w for w in self.weights if not scope or any(_is_within(n, scope) for n in w.names)]
        if word == "all-conv":
            return [WeightMatch(w) for w in weights if w.kind.name.startswith("conv")]
        weights = [w for w in weights if w.multiplies]
        if word == "all-linear":
            return [WeightMatch(w) for w in weights if self.why_left_out(w) is None]
        matches = [WeightMatch(w) for w in weights if word in self.roles[w.key]]
        for part in (part for part, role in PART_ROLES.items() if role == word):
            fused = (w for w in weights if word not in self.roles[w.key] and part in w.parts)
            matches += (WeightMatch(w, part, w.parts[part]) for w in fused)
        return matches

    def _slice(self, w: ModelWeight, label: str) -> WeightMatch | None:
        """Return the slice of a weight; None, and a line in `problems`, if it does not exist."""
        name, out = w.names[0], w.out_features
        if numbers := regex.fullmatch(r"(\d+):(\d+)", label):
            rows = range(int(numbers[1]), int(numbers[2]))
            if len(rows) > 0 and rows.stop <= out:
                return WeightMatch(w, label, (rows,))
            self.problems.append(f"{name}[{label}]: the weight has the rows 0:{out}")
            return None
        if label in w.parts:
            return WeightMatch(w, label, w.parts[label])
        parts = f"its parts are {', '.join(w.parts)}" if w.parts else "no layout is known for it"
        self.problems.append(f"{name} has no part {label!r}: {parts}; or give rows, as in [0:{out // 3 or out}]")
        return None

    def _rewritten(self, name: str) -> Iterator[str]:
        """Yield entries that a name without a match may mean: parts of fused weights, or names in a part of the
        model."""
        scope, _, leaf = name.rpartition(".")
        part = leaf.removesuffix("_proj")
        for w in self._visible_weights():
            if scope and any(_is_within(n, scope) and _is_end(n, leaf) for n in w.names):
                yield f"{scope}.*.{leaf}"
            elif part in w.parts and (not scope or any(_is_end(n.rpartition(".")[0], scope) for n in w.names)):
                yield f"{scope}.{w.location[1]}[{part}]".removeprefix(".")

    def _matches_any(self, entry: str) -> bool:
        try:
            return any(self._matches(n, entry) for w in self._visible_weights() for n in w.names)
        except SpecError:
            return False

    def _matches(self, path: str, name: str) -> bool:
        """True if a name without slices, a glob or a regular expression matches a path."""
        if name.startswith("re:"):
            return self._matches_regex(path, name[3:])
        return _matches_glob(path, name) if _is_glob(name) else _is_end(path, name)

    def _matches_regex(self, path: str, pattern: str) -> bool:
        start = time.monotonic()
        try:
            if self._regex_seconds <= 0:
                raise TimeoutError
            return regex.fullmatch(pattern, path, timeout=self._regex_seconds) is not None
        except regex.error as e:
            what = f"re:{pattern} is not a regular expression: {e}"
            raise SpecError(what, way_out="correct the pattern; nothing was changed") from None
        except TimeoutError:
            what = f"re:{pattern} took more than {REGEX_SECONDS:g} s on the names of this model"
            way_out = "simplify it (nested repetition, such as (a+)+, takes exponential time); nothing was changed"
            raise SpecError(what, way_out=way_out) from None
        finally:
            self._regex_seconds -= time.monotonic() - start


def _acts_as_linear(module: nn.Module) -> bool:
    """True if a module that is no known layer has the sizes of a linear layer, or multiplies by a buffer `weight`."""
    if kind_of(module) is not None or module._modules:
        return False
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    buffers = [name for name, buffer in module._buffers.items() if buffer is not None and "weight" in name]
    if all(isinstance(size, int) for size in sizes):
        return True
    return bool(buffers) and not weight_use(base_class(type(module))).products.keys().isdisjoint(buffers)


def split_slices(entry: str) -> tuple[str, list[str]]:
    """Return the name and the slices of an entry: "c_attn[q,v]" gives ("c_attn", ["q", "v"]). A regex has no slices."""
    name, bracket, labels = entry.partition("[")
    if not bracket or not entry.endswith("]") or entry.startswith("re:"):
        return entry, []
    return name, [label.strip() for label in labels[:-1].split(",")]


def is_pattern(entry: str) -> bool:
    """True if an entry is a keyword, a regular expression or a glob, which pass over what cannot carry an adapter."""
    return entry in KEYWORDS or entry.startswith("re:") or _is_glob(entry)


def _is_glob(entry: str) -> bool:
    return "*" in entry or "?" in entry


def _is_end(path: str, name: str) -> bool:
    """True if `name` is the path or the end of it from a dot on."""
    return f".{path}".endswith(f".{name}")


def _matches_glob(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")


def _is_within(path: str, scope: str) -> bool:
    """True if the path lies within a part of the model: language_model, vision_tower.*, layers.0."""
    return _matches_glob(path, f"{scope.removesuffix('.*')}.*")
