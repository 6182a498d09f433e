"""What is asked for (LoraSpec) and what it comes to on one model (Plan of Sites): frozen values that can't exist invalid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .errors import SpecError

Target = str | Callable[[str, nn.Module], bool]
KEYWORDS = ("all-linear", "all-conv")
SCALINGS = ("standard", "rslora")
INITS = ("kaiming", "gaussian")


@dataclass(frozen=True, kw_only=True)
class Override:
    """Another r or alpha for the sites that `target` matches; None leaves the spec's."""

    target: str
    """One entry in the grammar of LoraSpec.targets."""
    r: int | None = None
    alpha: float | None = None


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Everything that `inject` can be told, as one value. Raises SpecError with all that is wrong.

    The update is W0 + s B A with s = alpha / r (arXiv 2106.09685 section 4.1) or alpha / sqrt(r) (arXiv 2312.03732).
    """

    targets: tuple[Target, ...]
    """Which weights. Each entry is a path or the dotted end of one ("q_proj", "self_attn.q_proj", "experts.down_proj"), a glob over
    such ("layers.*.mlp.up_proj"), "re:<pattern>" (the regex package, full match), a callable (path, module) -> bool, "all-linear"
    (every matmul weight but head and routers), "all-conv", or a role (roles.ROLES: "attention", "query", "experts", ...). A name may
    take slices of a fused weight, by part or by row: "c_attn[q,v]", "c_attn[0:768]"; a keyword or role may be confined to a part of the model:
    "language_model.all-linear"."""
    r: int = 8
    """Rank: rows of A, columns of B. May exceed the matrix's smaller side (it is then wasteful, not wrong)."""
    alpha: float | None = None
    """Numerator of the scale; None means alpha = r, so s = 1 under "standard"."""
    dropout: float = 0.0
    """Probability of dropping an element of the adapter's input while training; 0 <= p < 1."""
    exclude: tuple[Target, ...] = ()
    """Entries in the same grammar that are left out; a container with all that is in it."""
    layers: tuple[int, ...] | None = None
    """Only sites whose path's first number is one of these (model.layers.3.mlp.up_proj is in layer 3); None: all."""
    scaling: str = "standard"
    """"standard" or "rslora"."""
    init: str = "kaiming"
    """How A begins: "kaiming" (uniform, as in loralib and PEFT) or "gaussian" (deviation 1/r). B begins at zero."""
    dtype: torch.dtype | None = None
    """Of A and B; None means float32, or float64 on float64 weights."""
    overrides: tuple[Override, ...] = ()
    """Exceptions; the first that matches a site decides. A mapping {"k_proj": {"r": 4}} is taken too."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        set_ = object.__setattr__
        set_(self, "targets", _entries("targets", self.targets, problems))
        set_(self, "exclude", _entries("exclude", self.exclude, problems))
        set_(self, "overrides", _overrides(self.overrides, problems))
        problems += [
            f"override {o.target!r}: its target must be a name"
            for o in self.overrides
            if not (isinstance(o.target, str) and o.target)
        ]
        if not self.targets and not problems:
            problems.append('targets is empty: name the modules, as in ["q_proj", "v_proj"], or "all-linear"')
        for r, alpha, whose in [
            (self.r, self.alpha, ""),
            *((o.r, o.alpha, f" (override {o.target!r})") for o in self.overrides),
        ]:
            if not (r is None and whose) and (not isinstance(r, int) or isinstance(r, bool) or r < 1):
                problems.append(f"r must be a whole number of at least 1, not {r!r}{whose}")
            if alpha is not None and not is_alpha(alpha):
                problems.append(f"alpha must be a finite number above 0 (1e-30 to 1e30), not {alpha!r}{whose}")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            problems.append(f"dropout must be a probability p with 0 <= p < 1, not {self.dropout!r}")
        if self.layers is not None:
            layers = (
                tuple(self.layers) if isinstance(self.layers, Iterable) and not isinstance(self.layers, str) else ()
            )
            if not layers or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in layers):
                problems.append(
                    f"layers must be a list of layer numbers from 0, such as [0, 1] or range(4), not {self.layers!r}"
                )
            set_(self, "layers", layers)
        if self.scaling not in SCALINGS:
            problems.append(f"scaling must be one of {SCALINGS}, not {self.scaling!r}")
        if self.init not in INITS:
            problems.append(f"init must be one of {INITS}, not {self.init!r}")
        if self.dtype is not None and not (
            isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point and self.dtype.itemsize > 1
        ):
            problems.append(f"dtype must be a floating-point torch.dtype of 16 bits or more, not {self.dtype!r}")
        if problems:
            raise SpecError(
                "this LoRA can't be meant:", problems, "nothing was changed; correct the values and call again"
            )

    @classmethod
    def of(cls, spec: LoraSpec | None, targets: Any, **settings: Any) -> LoraSpec:
        """The spec itself, or one made of the settings; both at once is refused, since one would silently lose."""
        if spec is not None and not isinstance(spec, cls):
            raise SpecError(
                f"spec must be a LoraSpec, not {spec!r}", way_out="inject(model, spec=LoraSpec(targets=[...]))"
            )
        if spec is None:
            return cls(targets=() if targets is None else targets, **settings)
        changed = [k for k, v in settings.items() if v != cls.__dataclass_fields__[k].default]
        if targets is not None or changed:
            given = ", ".join(["targets"] * (targets is not None) + changed)
            raise SpecError(
                f"spec and {given} were both given", way_out="put them into the spec: dataclasses.replace(spec, ...)"
            )
        return spec

    def with_override(self, override: Override) -> LoraSpec:
        """This spec as it holds for a site that `override` matches."""
        return replace(
            self, r=override.r or self.r, alpha=self.alpha if override.alpha is None else override.alpha, overrides=()
        )


def _entries(field: str, value: Any, problems: list[str]) -> tuple[Target, ...]:
    if isinstance(value, str):
        if value in KEYWORDS:
            return (value,)
        problems.append(f'{field}="{value}" is a string where a list is meant: write {field}=["{value}"]')
        return ()
    if _is_predicate(value):
        return (value,)
    if not isinstance(value, Sequence | set | frozenset):
        problems.append(f"{field} must be a list of names, not {value!r}")
        return ()
    for entry in value:
        if not (_is_predicate(entry) or (isinstance(entry, str) and entry)):
            problems.append(
                f"{field}: each entry must be a non-empty string or a function (path, module) -> bool, not {entry!r}"
            )
    return tuple(value)


def _is_predicate(value: Any) -> bool:
    return callable(value) and not isinstance(value, type | nn.Module)


def _overrides(value: Any, problems: list[str]) -> tuple[Override, ...]:
    if isinstance(value, Mapping):
        if odd := [
            target
            for target, settings in value.items()
            if not isinstance(settings, Mapping) or settings.keys() - {"r", "alpha"}
        ]:
            problems.append(f'overrides must look like {{"k_proj": {{"r": 4, "alpha": 8}}}}; these do not: {odd}')
            return ()
        return tuple(Override(target=target, **settings) for target, settings in value.items())
    if value is None:
        return ()
    if not (isinstance(value, Sequence) and all(isinstance(o, Override) for o in value)):
        problems.append(
            f"overrides must be a mapping from a target to r and alpha, or a list of Override, not {value!r}"
        )
        return ()
    return tuple(value)


def is_alpha(value: object) -> bool:
    """Whether it can be alpha: finite, above 0, and such that float32 can hold s."""
    return _is_number(value) and 1e-30 <= value <= 1e30  # type: ignore[operator]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
