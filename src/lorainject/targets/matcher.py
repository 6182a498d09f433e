"""Which weights of a model an entry of the targets means: a name, a pattern, a role, a keyword, a slice of any of these."""

from __future__ import annotations

import difflib
import fnmatch
import time
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import regex
from torch import nn

from ..errors import SpecError
from ..lora.model_index import ModelIndex
from ..lora.weight_kinds import kind_of, weight_shape
from ..spec import KEYWORDS, Target
from .fused_layouts import fused_parts
from .model_weights import Weight, heads, weights
from .roles import PART_ROLES, ROLES, role_names

REGEX_SECONDS = 1.0  # for all names together: patterns also come from files that strangers made


class Pick(NamedTuple):
    """A weight, or some of its rows."""

    weight: Weight
    label: str = ""
    rows: tuple[range, ...] | None = None

    @property
    def name(self) -> str:
        return self.weight.names[0] + (f"[{self.label}]" if self.label else "")


class Matcher:
    """Which weights of one model an entry names; one clock for all regular expressions."""

    def __init__(self, index: ModelIndex) -> None:
        self.weights = weights(index)
        self.named = index.walked
        self.paths = index.first_paths
        self.deadline = time.monotonic() + REGEX_SECONDS
        self.index = index

    @cached_property
    def roles(self) -> dict[tuple[int, str], frozenset[str]]:
        """Of the weights that multiply, by key. Names do without."""
        head = heads(self.index)
        return {w.key: _roles(w) | ({"head"} if id(w.module) in head else set()) for w in self.weights if w.multiplies}

    @property
    def aside(self) -> list[Weight]:
        """What "all-linear" leaves out."""
        return [w for w in self.weights if self.roles.get(w.key, frozenset()) & {"head", "router"}]

    def __call__(self, entry: Target, problems: list[str]) -> list[Pick]:
        """What an entry names, with its slices; a slice that the weight does not have is a problem."""
        if not isinstance(entry, str):
            return [Pick(w) for w in self._visible() if any(entry(path, w.module) for path in w.paths)]
        name, slices = sliced(entry)
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
        name = sliced(entry)[0]
        return [(self.paths[id(m)], m) for m in dict.fromkeys(m for path, m in self.named if _ends(path, name))]

    def _visible(self) -> list[Weight]:
        """What patterns see: layers, and bare parameters that multiply; not class tokens and position tables."""
        return [w for w in self.weights if w.parameter == "weight" or w.multiplies]

    def _named(self, name: str) -> list[Weight]:
        if name.startswith("re:"):
            return [w for w in self._visible() if any(self._regex(name[3:], n) for n in w.names)]
        if _is_glob(name):
            return [w for w in self._visible() if any(_globs(n, name) for n in w.names)]
        found = [w for w in self.weights if any(_ends(n, name) for n in w.names)]
        if not found and name.endswith(
            ".weight"
        ):  # a layer's weight by its own name: whoever reads it within the model shall be adapted
            layers = [
                w
                for w in self.weights
                if w.parameter == "weight" and any(_ends(n, name.removesuffix(".weight")) for n in w.names)
            ]
            found = [replace(w, readers=w.owners, named=True) for w in layers]
        return found

    def _role(self, entry: str) -> list[Pick]:
        confined, _, word = entry.rpartition(".")
        among = [w for w in self.weights if not confined or any(_within(n, confined) for n in w.names)]
        if word == "all-conv":
            return [Pick(w) for w in among if w.kind.name.startswith("conv")]
        among = [w for w in among if w.multiplies]
        if word == "all-linear":
            return [Pick(w) for w in among if not self.roles[w.key] & {"head", "router"}]
        whole = [Pick(w) for w in among if word in self.roles[w.key]]
        part = next((label for label, role in PART_ROLES.items() if role == word), None)
        return whole + [
            Pick(w, part, rows[part]) for w in among if word not in self.roles[w.key] and part in (rows := parts_of(w))
        ]

    def _slice(self, w: Weight, label: str, problems: list[str]) -> Pick | None:
        out = out_of(w)
        if by_row := regex.fullmatch(r"(\d+):(\d+)", label):
            rows = range(int(by_row[1]), int(by_row[2]))
            if len(rows) > 0 and rows.stop <= out:
                return Pick(w, label, (rows,))
            problems.append(f"{w.names[0]}[{label}]: it has the rows 0:{out}")
            return None
        known = parts_of(w)
        if label in known:
            return Pick(w, label, known[label])
        have = f"it has {', '.join(known)}" if known else "how it is laid out is not known"
        problems.append(f"{w.names[0]} has no part {label!r}: {have}; rows work too, as in [0:{out // 3 or out}]")
        return None

    def _regex(self, pattern: str, path: str) -> bool:
        try:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            return regex.fullmatch(pattern, path, timeout=left) is not None
        except regex.error as e:
            raise SpecError(
                f"re:{pattern} is not a regular expression: {e}", way_out="correct it; nothing was changed"
            ) from None
        except TimeoutError:
            raise SpecError(f"re:{pattern} took more than {REGEX_SECONDS:g} s on the names of this model",
                            way_out="simplify it (nested repetition, such as (a+)+, never ends); nothing was changed") from None  # fmt: skip

    def why_nothing(self, entry: Target) -> str:
        """What to say of an entry that names no weight."""
        if isinstance(entry, str) and self.is_role(entry):
            word = entry.rsplit(".", 1)[-1]
            if word in KEYWORDS:
                return "matches nothing: this model has no such weight" + (" there" if "." in entry else "")
            of_parts = {
                PART_ROLES[label] for w in self.weights if w.multiplies for label in parts_of(w) if label in PART_ROLES
            }
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
        entry = sliced(entry)[0]
        count = entry.count(".") + 1
        ends = {".".join(name.split(".")[-count:]) for w in among for name in w.names if name}
        if near := difflib.get_close_matches(entry, sorted(ends), n=3, cutoff=0.6):
            return f" (did you mean {' or '.join(map(repr, near))}?)"
        leaves = sorted({w.names[0].rsplit(".", 1)[-1] for w in among} - {""})
        return f" (this model has {', '.join(map(repr, leaves[:12]))}{', ...' if len(leaves) > 12 else ''})"

    def inside(self, path: str) -> str:
        """The layers inside a container that was named where a layer was meant."""
        inside = sorted(
            {name.rsplit(".", 1)[-1] for w in self._visible() for name in w.names if name.startswith(f"{path}.")}
        )
        return f": name the layers inside it ({', '.join(map(repr, inside[:8]))})" if inside else ""


def _home(w: Weight) -> tuple[tuple[nn.Module, ...], str]:
    """The modules from the root down to the one that has the layer (or the bare parameter), and what it is called there."""
    if kind_of(w.module, w.parameter) is None:
        return w.owners, w.parameter
    return w.owners[:-1], w.paths[0].rsplit(".", 1)[-1]


def parts_of(w: Weight) -> dict[str, tuple[range, ...]]:
    """The rows of each part of a fused weight; none if it is not fused, or how is not known."""
    owners, leaf = _home(w)
    return (fused_parts(getattr(owners[0], "config", None), owners[-1], leaf, out_of(w)) or {}) if owners else {}


def _roles(w: Weight) -> frozenset[str]:
    owners, leaf = _home(w)
    path = w.paths[0] if leaf != w.parameter else f"{w.paths[0]}.{leaf}".removeprefix(".")
    return role_names(path, owners, leaf) if owners else frozenset()


def out_of(w: Weight) -> int:
    return w.kind.sizes(weight_shape(w.module, w.parameter))[1]


def sliced(entry: str) -> tuple[str, list[str]]:
    """ "c_attn[q,v]" -> ("c_attn", ["q", "v"]); a regular expression has brackets of its own."""
    name, bracket, inside = entry.partition("[")
    if not bracket or not entry.endswith("]") or entry.startswith("re:"):
        return entry, []
    return name, [label.strip() for label in inside[:-1].split(",")]


def _ends(path: str, entry: str) -> bool:
    return f".{path}".endswith(f".{entry}")


def _globs(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")


def _within(path: str, confined: str) -> bool:
    """Whether `path` lies within a part of the model: language_model, vision_tower.*, layers.0"""
    return _globs(path, f"{confined.removesuffix('.*')}.*")


def is_pattern(entry: str) -> bool:
    return entry in KEYWORDS or entry.startswith("re:") or _is_glob(entry)


def _is_glob(entry: str) -> bool:
    return "*" in entry or "?" in entry
