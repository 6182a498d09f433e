"""The record: what an adapter file says, in one form that every format is read into and written from.

A record (AdapterFile) has one StoredSite per adapted weight or slice, with A (r, in), B (out, r) and what gives the
scale s of W0 + s B A. It also carries what a file may hold besides: DoRA's magnitudes, updates of biases, whole tensors
in place of the base's, and trained rows of embeddings. So a file can be inspected and converted without loss even where
a model could not take all of it.

Readers build StoredSites from whatever a file says and pass them to `checked_sites`, which reports what is impossible.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileError
from ..lora.weight_kinds import DTYPES, KINDS
from ..numerics.delta import is_finite, scale
from ..plan import site_name
from ..spec import is_alpha


@dataclass(frozen=True, kw_only=True)
class StoredSite:
    """A and B of one weight or slice; the update is scale * B @ A, for a stack one product per expert.

    For a convolution `in` is in_channels * kernel size, as in W.flatten(1); `shape` then tells the kernel. A site with
    a magnitude m is DoRA's (arXiv 2402.09353): W = m * (W0 + D) / |W0 + D|, where D is the update and the norm is taken
    per output (`magnitude_axis` "out") or per input ("in").
    """

    path: str
    """Path of the module, in the naming of the model that the file was made for."""
    parameter: str = "weight"
    """Name of the weight in its module."""
    label: str = ""
    """Name of the slice, if the site is a slice of the weight; else empty."""
    rows: tuple[range, ...] | None = None
    """The slice's rows of W (out, in)."""
    kind: str = "linear"
    """A name in weight_kinds.KINDS. Most formats do not tell "linear" from "linear^T"."""
    shape: tuple[int, ...] = ()
    """Shape of the whole weight as stored; empty if the file does not tell."""
    parts: Mapping[str, tuple[range, ...]] = field(default_factory=dict)
    """For a stack of experts, the rows of each part of an expert: {"gate": ..., "up": ...}; empty if the stack has no
    parts, or if the file does not tell."""
    named: bool = False
    """True if the weight itself was named as a target, so that every module that has this weight reads the sum."""
    peft: bool = True
    """True if PEFT, reading this site under PEFT's own names, would apply it correctly."""
    aliases: tuple[str, ...] = ()
    """Further paths of the same module in the model that the adapter was saved from."""
    A: Tensor
    """Shape (*stack, r, in)."""
    B: Tensor
    """Shape (*stack, out, r)."""
    alpha: float
    """Numerator of the scale."""
    scaling: str = "standard"
    """"standard" (s = alpha / r) or "rslora" (s = alpha / sqrt(r))."""
    dropout: float = 0.0
    """Probability of dropping an element of the input while training."""
    magnitude: Tensor | None = None
    """DoRA's m, shape (out,) or (in_channels,)."""
    magnitude_axis: str = "out"
    """"out" or "in"."""
    bias: Tensor | None = None
    """Shape (out,). Added to the layer's bias times `scale` (PEFT's lora_bias)."""
    constant_ranks: int = 0
    """How many of the last rows of A and columns of B never train, because they subtract the initial product: r / 2,
    or 0 if B was zero at the start (lora/offset.py)."""

    @cached_property
    def name(self) -> str:
        """The path, followed by the parameter if that is not `weight`, and by the slice if there is one."""
        return site_name(self.path, self.parameter, self.label)

    @property
    def embedding(self) -> bool:
        """True if the site is on an embedding, whose `in` is the vocabulary."""
        return self.kind == "embedding"

    @property
    def r(self) -> int:
        """The rank, read off A, whatever a config says."""
        return self.A.shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds both A and B without loss."""
        return torch.promote_types(self.A.dtype, self.B.dtype)

    @property
    def scale(self) -> float:
        """The s of W0 + s B A."""
        return scale(self.alpha, self.r, self.scaling)


@dataclass(frozen=True, kw_only=True)
class BasePrint:
    """The fingerprint of the base that the adapter was made for (see numerics/fingerprint.py)."""

    dtype: dict[str, torch.dtype]
    """The base weight's dtype by site name."""
    sample: dict[str, Tensor]
    """Elements of the base weight by site name: float32, SAMPLES each, or OLD_SAMPLES from old files."""


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Rows of an embedding that were trained directly, without A and B."""

    ids: tuple[int, ...]
    """The numbers of the rows in the embedding."""
    rows: Tensor
    """Shape (len(ids), width): the values that stand in place of the base's."""


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """One adapter that was read from a file: the record, which needs no model."""

    path: Path
    """The file or directory that was read."""
    format: str
    """Name of its format in `li.FORMATS`."""
    sites: tuple[StoredSite, ...]
    """The adapted weights and slices, in the order of the file."""
    name: str = "default"
    """Name of the adapter, where the file tells it."""
    init: str = "kaiming"
    """How A was initialized, where the file tells it."""
    base: BasePrint | None = None
    """The fingerprint of the base, where the file has one."""
    replaced: dict[str, Tensor] = field(default_factory=dict)
    """Whole tensors in place of the base's, by site name: heads, biases, and embeddings that PEFT saved as well."""
    tokens: dict[str, TokenRows] = field(default_factory=dict)
    """Trained rows by the path of the embedding."""
    config: dict[str, Any] = field(default_factory=dict)
    """The config next to the tensors, or in their header, as it stands."""
    namespace: str = "hf"
    """Whose names the paths are: "hf" (the model's own), "kohya" (dots became underscores) or "pipeline" (a component's
    name comes first)."""
    part: str = ""
    """Path of the part of the model that the adapter was made for, with a dot at the end, once the sites have the names
    of a larger model; else empty."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What the file was made from (files/origin.py), where the file tells it."""
    notes: tuple[str, ...] = ()
    """What the reader assumed because the file does not say, one line each."""

    @property
    def parameters(self) -> int:
        """The number of elements of all A and B."""
        return sum(s.A.numel() + s.B.numel() for s in self.sites)

    @property
    def is_empty(self) -> bool:
        """True if the file has neither A and B nor anything that stands in place of the base's tensors."""
        return not (self.sites or self.replaced or self.tokens)

    @property
    def beside(self) -> tuple[str, ...]:
        """The magnitudes, bias updates and token rows that the file holds besides A and B, one line each."""
        dora = [f"{s.name}: a magnitude (DoRA)" for s in self.sites if s.magnitude is not None]
        biases = [f"{s.name}: an update of the bias (lora_bias)" for s in self.sites if s.bias is not None]
        return (*dora, *biases, *(f"{path}: {len(t.ids)} rows of trained tokens" for path, t in self.tokens.items()))


class Problem(str):
    """A line of an error, with the next step that helps with it. Lines without one are plain strings."""

    step: str

    def __new__(cls, line: str, step: str) -> Problem:
        """Return the line."""
        problem = super().__new__(cls, line)
        problem.step = step
        return problem


def next_steps(problems: Iterable[str], default: str) -> str:
    """Return the next steps of all problems, each once; the default is that of lines without one."""
    return "; ".join(dict.fromkeys(getattr(problem, "step", default) for problem in problems))


@contextmanager
def collected(problems: list[str], name: str = "") -> Iterator[None]:
    """Put what a FileError within the context says into `problems`, after this name, instead of raising it.

    A writer that converts site by site so reports all sites that it cannot convert.
    """
    try:
        yield
    except FileError as e:
        line = " ".join(filter(None, (f"{name}:" * bool(name), e.what, ", ".join(e.problems))))
        problems.append(Problem(line, e.way_out))


def require_writable(library: str, problems: Sequence[str], default: str = "choose another format") -> None:
    """Raise FileError if a writer has found problems, with the next steps of all of them."""
    if problems:
        raise FileError(f"this adapter cannot be written for {library}:", problems, next_steps(problems, default))


def checked_sites(sites: Iterable[StoredSite], problems: list[str]) -> list[StoredSite]:
    """Return the sites whose factors and settings are possible, with alpha and dropout as floats.

    Args:
        sites: Built from what a file says; alpha, scaling and dropout may be of any type here.
        problems: Receives a line for everything that is wrong with the other sites.
    """
    good = []
    for s in sites:
        if wrong := _site_problems(s):
            problems += [f"{s.name}: {problem}" for problem in wrong]
        else:
            good.append(replace(s, alpha=float(s.alpha), dropout=float(s.dropout)))
    return good


def _site_problems(s: StoredSite) -> list[str]:
    A, B = tuple(s.A.shape), tuple(s.B.shape)
    wrong = []
    if not is_alpha(s.alpha):
        wrong.append(f"alpha must be a finite number above 0, not {s.alpha!r}")
    if not isinstance(s.dropout, int | float) or not 0 <= s.dropout < 1:
        wrong.append(f"dropout must be a probability p with 0 <= p < 1, not {s.dropout!r}")
    if 0 in (s.A.numel(), s.B.numel()):
        wrong.append(f"A {A} with B {B} is empty: a sharded model was saved without gathering its parameters")
    elif len(A) != len(B) or len(A) not in (2, 3) or A[-2] != B[-1] or A[:-2] != B[:-2]:
        wrong.append(f"A {A} with B {B} is no pair (r, in) and (out, r)")
    elif (s.shape or s.kind.startswith("conv")) and _matrix_sizes(s) != (*A[:-2], B[-2], A[-1]):
        wrong.append(f"A {A} with B {B} does not fit a weight of shape {s.shape} and kind {s.kind}")
    else:
        out, in_ = B[-2], s.shape[1] if s.kind == "conv" and s.shape else A[-1]
        sizes = (("magnitude", s.magnitude, out if s.magnitude_axis == "out" else in_), ("bias update", s.bias, out))
        wrong += [
            f"the {what} has shape {tuple(t.shape)}, but ({n},) is needed"
            for what, t, n in sizes
            if t is not None and tuple(t.shape) != (n,)
        ]
    return wrong


def _matrix_sizes(s: StoredSite) -> tuple[int, ...] | None:
    """Return (*stack, out, in) of the site by the shape of its weight; None if no weight of the kind has the shape."""
    if s.kind not in KINDS or len(s.shape) < 2:
        return None
    stack, out, in_ = KINDS[s.kind].sizes(s.shape)
    return (*stack, out if s.rows is None else sum(map(len, s.rows)), in_)


def payload_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a line for each tensor that is not made of finite floats, but for 0-d integers (kohya's alpha)."""
    return [f"{key}: {wrong}" for key in tensors if (wrong := _payload_problem(tensors[key])) is not None]


def _payload_problem(t: Tensor) -> str | None:
    if t.dtype in DTYPES:
        return None if is_finite(t) else "holds NaN or infinity"
    return f"{t.dtype} is not a floating-point type of 16 bits or more" if t.ndim else None
