"""What an adapter file says, whatever its format: one record that every format reads into and writes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..lowrank import scale


@dataclass(frozen=True, kw_only=True)
class StoredSite:
    """A and B of one weight, normalised: A (r, in), B (out, r), and the update is scale * B @ A."""

    path: str
    """Of the module, in the naming of the model that the file was made for."""
    aliases: tuple[str, ...] = ()
    """Further paths of the same module in the model that it was saved from."""
    A: Tensor
    B: Tensor
    alpha: float
    scaling: str = "standard"
    dropout: float = 0.0
    embedding: bool = False
    """Whether it sits on an embedding, whose `in` is the vocabulary."""

    @property
    def r(self) -> int:
        """The rank: by the tensor, whatever a config says."""
        return self.A.shape[0]

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
    """By site path."""
    sample: dict[str, Tensor]
    """By site path: float32 (SAMPLES,)."""


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
