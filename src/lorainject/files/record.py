"""What an adapter file says, whatever its format: one record that every format reads into and writes from.

A record holds more than `load` can put onto a model: DoRA's magnitudes, biases, whole tensors and token rows are carried, so that a file
can be inspected and converted without loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..lora.weight_kinds import DTYPES, KINDS
from ..numerics.delta import is_finite, scale
from ..plan import site_name
from ..spec import is_alpha

NONE = torch.empty(0)  # in place of A and B until they are found


@dataclass(frozen=True, kw_only=True)
class StoredSite:
    """A and B of one weight or slice, normalised: A (r, in), B (out, r), one each for every expert of a stack; the update is scale * B @ A.

    For a convolution `in` is in_channels * kernel, as in W.flatten(1); `shape` then tells the kernel. With a magnitude m it is DoRA
    (arXiv 2402.09353): W = m * (W0 + D) / |W0 + D|, D the update, the norm taken for each output (`magnitude_axis` "out") or input ("in").
    """

    path: str
    """Of the module, in the naming of the model that the file was made for."""
    parameter: str = "weight"
    """The weight's name in its module."""
    label: str = ""
    """Which slice of the weight, if it is one."""
    rows: tuple[range, ...] | None = None
    """The slice's rows of W (out, in)."""
    kind: str = "linear"
    """A row of kinds.KINDS; a file of another library does not tell linear from linear^T."""
    shape: tuple[int, ...] = ()
    """Of the whole weight as stored; empty if the file does not tell."""
    named: bool = False
    """Whether the weight itself was named as a target, so that all modules it lies in read it."""
    peft: bool = True
    """Whether PEFT, reading this site as its own, would apply it rightly."""
    aliases: tuple[str, ...] = ()
    """Further paths of the same module in the model that it was saved from."""
    A: Tensor
    """(*stack, r, in)"""
    B: Tensor
    """(*stack, out, r)"""
    alpha: float
    scaling: str = "standard"
    dropout: float = 0.0
    magnitude: Tensor | None = None
    """DoRA's m, (out,) or (in_channels,)."""
    magnitude_axis: str = "out"
    bias: Tensor | None = None
    """(out,), added to the layer's bias times `scale` (PEFT's lora_bias)."""

    @cached_property
    def name(self) -> str:
        """The path; with the parameter, if that is not `weight`, and the slice."""
        return site_name(self.path, self.parameter, self.label)

    @property
    def embedding(self) -> bool:
        """Whether it sits on an embedding, whose `in` is the vocabulary."""
        return self.kind == "embedding"

    @property
    def r(self) -> int:
        """The rank: by the tensor, whatever a config says."""
        return self.A.shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        """That holds both A and B without loss."""
        return torch.promote_types(self.A.dtype, self.B.dtype)

    @property
    def scale(self) -> float:
        """s in W0 + s B A."""
        return scale(self.alpha, self.r, self.scaling)


@dataclass(frozen=True, kw_only=True)
class BasePrint:
    """The fingerprint of the base that the adapter was made for (see fingerprint.py)."""

    dtype: dict[str, torch.dtype]
    """By site name."""
    sample: dict[str, Tensor]
    """By site name: float32 (SAMPLES,)."""


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Rows of an embedding that were trained as they are."""

    ids: tuple[int, ...]
    rows: Tensor
    """(len(ids), width): the new rows, in place of the base's."""


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """One adapter, without a model."""

    path: Path
    """Where it was read from."""
    format: str
    """A name in `li.FORMATS`."""
    sites: tuple[StoredSite, ...]
    name: str = "default"
    init: str = "kaiming"
    base: BasePrint | None = None
    replaced: dict[str, Tensor] = field(default_factory=dict)
    """Whole tensors in place of the base's, by their names (site_name): heads, biases, embeddings that PEFT let come along."""
    tokens: dict[str, TokenRows] = field(default_factory=dict)
    """By the path of the embedding."""
    config: dict[str, Any] = field(default_factory=dict)
    """The config beside the tensors, or in their header, as it stands."""
    namespace: str = "hf"
    """Whose names the paths are: "hf" (the model's own), "kohya" (dots became underscores) or "pipeline" (a component's name first)."""
    notes: tuple[str, ...] = ()
    """What was taken for granted while reading, since the file does not say."""

    @property
    def parameters(self) -> int:
        """Elements of all A and B."""
        return sum(s.A.numel() + s.B.numel() for s in self.sites)

    @property
    def beside(self) -> tuple[str, ...]:
        """What is neither A and B nor a whole tensor, one line each."""
        dora = [f"{s.name}: a magnitude (DoRA)" for s in self.sites if s.magnitude is not None]
        biases = [f"{s.name}: an update of the bias (lora_bias)" for s in self.sites if s.bias is not None]
        return (*dora, *biases, *(f"{path}: {len(t.ids)} rows of trained tokens" for path, t in self.tokens.items()))


def checked(
    s: StoredSite,
    A: Tensor,
    B: Tensor,
    problems: list[str],
    *,
    alpha: Any,
    scaling: Any = "standard",
    dropout: Any = 0.0,
) -> StoredSite | None:
    """The site with these A (*stack, r, in) and B (*stack, out, r); None, and lines in `problems`, if they or the settings can't be meant."""
    wrong = []
    if not is_alpha(alpha):
        wrong.append(f"{s.name}: alpha must be a finite number above 0, not {alpha!r}")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        wrong.append(f"{s.name}: dropout must be a probability p with 0 <= p < 1, not {dropout!r}")
    if 0 in (A.numel(), B.numel()):
        wrong.append(
            f"{s.name}: A {tuple(A.shape)} with B {tuple(B.shape)} is empty: a sharded run was saved without being gathered"
        )
    elif A.ndim != B.ndim or A.ndim not in (2, 3) or A.shape[-2] != B.shape[-1] or A.shape[:-2] != B.shape[:-2]:
        wrong.append(f"{s.name}: A {tuple(A.shape)} with B {tuple(B.shape)} is no pair (r, in) and (out, r)")
    elif s.shape and _sizes(s) != (*A.shape[:-2], B.shape[-2], A.shape[-1]):
        wrong.append(
            f"{s.name}: A {tuple(A.shape)} with B {tuple(B.shape)} does not go with a weight {s.shape} of the kind {s.kind}"
        )
    else:
        out, in_ = B.shape[-2], s.shape[1] if s.kind == "conv" and s.shape else A.shape[-1]
        wrong += [f"{s.name}: {what} {tuple(t.shape)}, where ({n},) is needed"
                  for what, t, n in (("magnitude", s.magnitude, out if s.magnitude_axis == "out" else in_), ("bias update", s.bias, out))
                  if t is not None and tuple(t.shape) != (n,)]  # fmt: skip
    if wrong:
        problems += wrong
        return None
    return replace(s, A=A, B=B, alpha=float(alpha), scaling=scaling, dropout=float(dropout))


def _sizes(s: StoredSite) -> tuple[int, ...] | None:
    """(*stack, out, in) of what A and B are for, by the weight's shape; None if there is no such weight."""
    if s.kind not in KINDS or len(s.shape) < 2:
        return None
    stack, out, in_ = KINDS[s.kind].sizes(s.shape)
    return (*stack, out if s.rows is None else sum(map(len, s.rows)), in_)


def payload_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors that are not finite floats, whatever they are called; single numbers (kohya's alpha) may be whole."""
    return [f"{key}: {wrong}" for key in tensors if (wrong := _wrong(tensors[key])) is not None]


def _wrong(t: Tensor) -> str | None:
    if t.dtype in DTYPES:
        return None if is_finite(t) else "holds NaN or infinity"
    return f"{t.dtype} is not a floating-point type of 16 bits or more" if t.ndim else None
