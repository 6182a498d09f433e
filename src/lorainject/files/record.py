"""What an adapter file says, whatever its format: one record that every format reads into and writes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..lowrank import scale
from ..spec import site_name


@dataclass(frozen=True, kw_only=True)
class StoredSite:
    """A and B of one weight or slice, normalised: A (r, in), B (out, r), one each for every expert of a stack; the update is scale * B @ A."""

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

    @property
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
class AdapterFile:
    """One adapter, without a model."""

    path: Path
    """Where it was read from."""
    format: str
    """"lorainject" (PEFT-compatible, with our record in the header) or "peft"."""
    sites: tuple[StoredSite, ...]
    name: str = "default"
    init: str = "kaiming"
    base: BasePrint | None = None
    replaced: dict[str, Tensor] = field(default_factory=dict)
    """Whole base tensors that came along (PEFT does this for embeddings): allowed only where they equal the base's."""
    config: dict[str, Any] = field(default_factory=dict)
    """adapter_config.json as it stands."""

    @property
    def parameters(self) -> int:
        """Elements of all A and B."""
        return sum(s.A.numel() + s.B.numel() for s in self.sites)
