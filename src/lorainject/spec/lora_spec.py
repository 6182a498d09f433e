"""The settings of a LoRA, as one frozen value that cannot exist with an invalid field.

`inject` and `find` take these settings as arguments, with the same names and defaults. A LoraSpec knows no model. What
it comes to on one model is a Plan (plan.py), which targets/resolve.py makes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import SpecError
from . import peft_config, yaml_file

if TYPE_CHECKING:
    from peft import LoraConfig

Target = str | Callable[[str, nn.Module], bool]
"""One entry of LoraSpec.targets."""
KEYWORDS = ("all-linear", "all-conv")
SCALINGS = ("standard", "rslora")
INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora")
FUNCTION = "function"
"""What a file says of an `init` that was a function."""
BIASES = ("none", "all", "lora_only")
Init = str | Callable[[Tensor, Tensor, Tensor], None]
"""What LoraSpec.init can be."""
REGEX = re.compile(r"\.[*+]|[\\()|^${}]|\[[^\]]*\].")
"""Signs of a regular expression, which no name, glob or slice has."""


@dataclass(frozen=True, kw_only=True)
class Override:
    """Another rank or alpha for some of the sites. `None` keeps the value of the LoraSpec."""

    target: str
    """The sites concerned: one entry in the grammar of LoraSpec.targets, but no callable."""
    r: int | None = None
    """Rank; None keeps LoraSpec.r."""
    alpha: float | None = None
    """Numerator of the scale; None keeps LoraSpec.alpha, which itself may be the rank."""


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """The settings of one LoRA: which weights are adapted, and with which rank, scale, dropout and initial values.

    The weight becomes W0 + s B A, with A (r, in) and B (out, r). Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.

    Raises:
        SpecError: A value is invalid. The error lists every invalid value.
    """

    targets: tuple[Target, ...]
    """The weights to adapt, as a sequence or set of entries. A single callable, "all-linear" or "all-conv" needs no
    list. An entry is one of these:

    - A path, or the end of one from a dot on: "model.layers.0.mlp.up_proj", "self_attn.q_proj", "q_proj".
    - A glob over such names: "layers.*.mlp.up_proj". The characters * and ? also stand for dots.
    - "re:<pattern>": a pattern of the `regex` package that matches a whole path. All of them may take one second.
    - A callable (path, module) -> bool.
    - "all-linear": all weights that multiply activations, except the output head and the routers of mixtures of
      experts. "all-conv": the weights of all convolutions.
    - A role, in any architecture: "attention", "mlp", "experts", "query", "key", "value", "output", "router" or "head".

    A keyword or role can be limited to a part of the model: "language_model.all-linear". A path or glob can take slices
    of a fused weight, by part or by rows: "c_attn[q,v]", "c_attn[0:768,1536:2304]". Each entry must match something."""
    r: int = 8
    """Rank: the rows of A and the columns of B. A rank above the smaller side of the weight is allowed, if wasteful."""
    alpha: float | None = None
    """Numerator of the scale, from 1e-30 to 1e30. None means alpha = r, so that s = 1 with scaling="standard"."""
    dropout: float = 0.0
    """Probability p, with 0 <= p < 1, of zeroing an element of the adapter's input in training mode."""
    exclude: tuple[Target, ...] = ()
    """Weights to leave out, in the grammar of `targets`. The name of a container leaves out everything in it."""
    layers: tuple[int, ...] | None = None
    """Layer numbers, from 0, that limit `targets`; None means all. The layer number of a weight is the first number in
    its path: model.layers.3.mlp.up_proj is in layer 3."""
    scaling: str = "standard"
    """The scale s: "standard" is alpha / r; "rslora" is alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)."""
    init: Init = "kaiming"
    """Initial values of A and B, per matrix. The model's output does not change with any of them.

    - "kaiming": A is uniform with the bound 1 / sqrt(in), as in loralib and PEFT, and B is zero.
    - "gaussian": A is normal with the standard deviation 1 / r, and B is zero.
    - "orthogonal": the rows of A and the columns of B span orthogonal spaces of rank r / 2 each, as in PEFT; r is even.
    - "pissa": the r largest singular values of W0, with their vectors (Meng et al. 2024, arXiv 2404.02948, equation 3).
    - "olora": the first r columns of Q and rows of R, with W0 = Q R (Buyukakyuz 2024, arXiv 2406.01775).
    - A function (A, B, W0) -> None that writes to A (r, in) and B (out, r). W0 (out, in) is a copy in float32.

    Where B is not zero at the start, the update is s (B A - B0 A0), with the initial factors A0 and B0 held constant.
    W0 itself is not changed, as it would be by PEFT. A file holds the update as one of rank 2 r."""
    dtype: torch.dtype | None = None
    """Floating-point dtype of A and B, of at least 16 bits. None means float32, or float64 for a float64 weight."""
    overrides: tuple[Override, ...] = ()
    """Another r or alpha for some of the sites. The first override that matches a site applies. A mapping from a target
    to its settings is accepted, too: {"k_proj": {"r": 4}}."""
    dora: bool = False
    """True for weight-decomposed adapters: W = m (W0 + s B A) / |W0 + s B A|, with trained magnitudes m (Liu et al.
    2024, arXiv 2402.09353). Linear layers, convolutions and embeddings can have them, unless they are quantized."""
    modules_to_save: tuple[Target, ...] = ()
    """Modules all of whose parameters train, as they are, and are saved with the adapter: a new head, norms. An entry
    is a name, glob, "re:..." or callable as in `targets`. The values of the base stay where they are."""
    bias: str = "none"
    """Which biases train as well: "none", "all", or "lora_only", which are those of the adapted layers."""
    trainable_tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Rows of embeddings that train as well, as a mapping {"embed_tokens": [32000, 32001]}, or a sequence of its
    items. The name is a path, or the end of one from a dot on. An embedding that is tied to the head trains in both."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        normalized = {
            "targets": _entries("targets", self.targets, problems),
            "exclude": _entries("exclude", self.exclude, problems),
            "overrides": _overrides(self.overrides, problems),
            "layers": _layers(self.layers, problems),
            "modules_to_save": _entries("modules_to_save", self.modules_to_save, problems),
            "trainable_tokens": _tokens(self.trainable_tokens, problems),
        }
        for name, value in normalized.items():
            object.__setattr__(self, name, value)
        problems += _scale_problems(self.r, self.alpha)
        for o in self.overrides:
            if not (isinstance(o.target, str) and o.target):
                problems.append(f"override {o.target!r}: its target must be a name")
            problems += (f"{p} (override {o.target!r})" for p in _scale_problems(1 if o.r is None else o.r, o.alpha))
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            problems.append(f"dropout must be a probability p with 0 <= p < 1, not {self.dropout!r}")
        if self.scaling not in SCALINGS:
            problems.append(f"scaling must be one of {SCALINGS}, not {self.scaling!r}")
        if self.init not in INITS and not _is_predicate(self.init):
            problems.append(f"init must be one of {INITS}, or a function (A, B, W0) -> None, not {self.init!r}")
        if not isinstance(self.dora, bool):
            problems.append(f"dora must be True or False, not {self.dora!r}")
        if self.dora and self.init not in ("kaiming", "gaussian"):
            problems.append(f"dora goes with init 'kaiming' or 'gaussian', not with {self.init!r}")
        if self.bias not in BIASES:
            problems.append(f"bias must be one of {BIASES}, not {self.bias!r}")
        if not (self.dtype is None or _is_wide_float(self.dtype)):
            problems.append(f"dtype must be a floating-point torch.dtype of at least 16 bits, not {self.dtype!r}")
        if problems:
            raise SpecError("invalid LoRA settings:", problems, "correct them and call again; nothing was changed")

    def with_override(self, override: Override) -> LoraSpec:
        """Return these settings as they apply to a site that `override` matches."""
        alpha = self.alpha if override.alpha is None else override.alpha
        return replace(self, r=override.r or self.r, alpha=alpha, overrides=())

    @classmethod
    def from_peft(cls, config: LoraConfig | Mapping[str, Any] | str | Path) -> LoraSpec:
        """Return the settings of a LoraConfig of PEFT (versions up to 0.21).

        Args:
            config: A LoraConfig, its settings as a mapping, or a path to adapter_config.json or the folder that holds
                it.

        Returns:
            Settings with which `inject` adapts the same weights, with the same ranks and scales, with three exceptions.
            "all-linear" takes stacked experts and leaves the heads of tasks out. An entry of `exclude_modules` that
            names a container leaves out what is in it. "pissa" and "olora" begin with the factors that PEFT begins
            with, but do not alter the base. The heads that PEFT trains for the tasks SEQ_CLS and TOKEN_CLS train.

        Raises:
            SpecError: A setting cannot be expressed here. The error lists every such setting.
            FileError: The file cannot be read.
        """
        return cls(**peft_config.settings_of(config))

    def to_peft(self, plan: Iterable[Any] | None = None) -> LoraConfig:
        """Return the settings as a LoraConfig of PEFT.

        Args:
            plan: What `find` returned for these settings on the model. With it, the LoraConfig names every weight by
                its path, so that it means the same weights whichever targets the settings have; None keeps names,
                globs and patterns, and "all-linear", which PEFT does not take for stacked experts and does take for
                routers.

        Raises:
            SpecError: PEFT lacks a setting. The error lists every such setting.
            ModuleNotFoundError: The package peft is not installed.
        """
        from peft import LoraConfig

        return LoraConfig(**peft_config.config_of(self, plan))

    @classmethod
    def from_yaml(cls, path: str | Path) -> LoraSpec:
        """Return the settings in a YAML file: a mapping of fields to values, or a recipe, whose section `lora` is read.

        Raises:
            SpecError: A field does not exist, or a value is invalid. The error lists all of them.
            FileError: The file is missing, or is not YAML.
        """
        return cls(**yaml_file.read(Path(path), {*cls.__dataclass_fields__}))

    def to_yaml(self, path: str | Path) -> None:
        """Write the fields whose values are not the defaults to a YAML file.

        Raises:
            SpecError: A target or `init` is a function.
            FileError: The file cannot be written.
        """
        yaml_file.write(Path(path), self)


def is_alpha(value: object) -> bool:
    """True if `value` can be alpha: a number above 0 for which float32 can hold the scale."""
    return _is_number(value) and 1e-30 <= value <= 1e30  # type: ignore[operator]


def _scale_problems(r: object, alpha: object) -> Iterator[str]:
    if not _is_integer(r) or r < 1:  # type: ignore[operator]
        yield f"r must be a whole number of at least 1, not {r!r}"
    if alpha is not None and not is_alpha(alpha):
        yield f"alpha must be a finite number above 0 (1e-30 to 1e30), not {alpha!r}"


def _entries(field: str, value: Any, problems: list[str]) -> tuple[Target, ...]:
    """Return the entries of `targets` or `exclude` as a tuple, and add what is wrong with them to `problems`."""
    if _is_predicate(value) or (isinstance(value, str) and value in KEYWORDS):
        return (value,)
    if isinstance(value, str):
        entry = f"re:{value}" if REGEX.search(value) else value  # PEFT takes a regex as one string
        problems.append(f"{field}={value!r} is a string, but a list is expected: write {field}=[{entry!r}]")
        return ()
    if not isinstance(value, Sequence | set | frozenset):
        problems.append(f"{field} must be a list of names, not {brief(value)}")
        return ()
    if field == "targets" and not value:
        problems.append('targets is empty: name the weights, as in ["q_proj", "v_proj"], or pass "all-linear"')
    for entry in value:
        if not (_is_predicate(entry) or (isinstance(entry, str) and entry)):
            expected = "a non-empty string or a function (path, module) -> bool"
            problems.append(f"{field}: each entry must be {expected}, not {entry!r}")
    return tuple(value)


def _overrides(value: Any, problems: list[str]) -> tuple[Override, ...]:
    if value is None:
        return ()
    if isinstance(value, Mapping):
        malformed = [t for t, s in value.items() if not isinstance(s, Mapping) or s.keys() - {"r", "alpha"}]
        if not malformed:
            return tuple(Override(target=target, **settings) for target, settings in value.items())
        problems.append(f'overrides must look like {{"k_proj": {{"r": 4, "alpha": 8}}}}; these do not: {malformed}')
    elif isinstance(value, Sequence) and all(isinstance(o, Override) for o in value):
        return tuple(value)
    else:
        expected = "a mapping from a target to r and alpha, or a list of Override"
        problems.append(f"overrides must be {expected}, not {value!r}")
    return ()


def _layers(value: Any, problems: list[str]) -> tuple[int, ...] | None:
    if value is None:
        return None
    layers = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
    if not layers or not all(_is_integer(n) and n >= 0 for n in layers):
        problems.append(f"layers must be a list of layer numbers from 0, such as [0, 1] or range(4), not {value!r}")
    return layers


def _tokens(value: Any, problems: list[str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    items = value.items() if isinstance(value, Mapping) else value
    try:
        tokens = tuple((name, tuple(ids)) for name, ids in items)
    except (TypeError, ValueError):
        problems.append(f'trainable_tokens must look like {{"embed_tokens": [32000, 32001]}}, not {value!r}')
        return ()
    for name, ids in tokens:
        if not (isinstance(name, str) and name):
            problems.append(f"trainable_tokens: {name!r} must be the name of an embedding")
        if not ids or not all(_is_integer(i) and i >= 0 for i in ids) or len({*ids}) < len(ids):
            problems.append(f"trainable_tokens[{name!r}] must be different row numbers from 0, not {list(ids)!r}")
    return tokens


def brief(value: object) -> str:
    """Return the repr of a value, or its type if that is long, as that of PEFT's LoraConfig is."""
    text = repr(value)
    return text if len(text) <= 80 else f"a {type(value).__name__}"


def _is_predicate(value: Any) -> bool:
    return callable(value) and not isinstance(value, type | nn.Module)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_wide_float(dtype: object) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
