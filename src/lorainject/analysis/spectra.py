"""What an update is made of: its singular values, and how many directions it uses.

    dW = s B A = U diag(S) Vh        A: (*stack, r, in)    B: (*stack, out, r)    S: (*stack, k), k = min(r, in, out)

The update is never formed: the decomposition takes a QR of each factor and one of a matrix (r, r), in float64
(numerics/low_rank.py). A stack of experts is decomposed expert by expert, and every result keeps the axis of the stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SpecError
from ..numerics.delta import is_finite
from ..numerics.low_rank import product_svd
from ..numerics.modes import in_default_modes

NEGLIGIBLE = 1e-10  # singular values below this share of the largest one come from rounding


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """The singular value decomposition of one update, or of each update of a stack, in float64."""

    U: Tensor
    """Shape (*stack, out, k): the directions of the output, as orthonormal columns."""
    S: Tensor
    """Shape (*stack, k): the singular values, descending."""
    Vh: Tensor
    """Shape (*stack, k, in): the directions of the input, as orthonormal rows."""

    @property
    def norm(self) -> Tensor:
        """|dW|, the Frobenius norm, shape (*stack)."""
        return torch.linalg.vector_norm(self.S, dim=-1)

    @property
    def energy(self) -> Tensor:
        """Share of |dW|^2 in the first i directions, shape (*stack, k), ascending to 1; NaN for a zero update."""
        squares = self.S.square().cumsum(-1)
        return squares / squares[..., -1:]

    @property
    def rank(self) -> Tensor:
        """Number of singular values that do not come from rounding, shape (*stack)."""
        return is_used(self.S).sum(-1)

    @property
    def effective_rank(self) -> Tensor:
        """exp(-sum_i p_i log p_i) with p_i = S_i / sum_j S_j, shape (*stack): 1 for one direction, k for k equal ones.

        Source: Roy and Vetterli 2007, "The effective rank", definition 1. NaN for a zero update.
        """
        p = self.S / self.S.sum(-1, keepdim=True)
        return torch.special.entr(p).sum(-1).exp()

    @property
    def stable_rank(self) -> Tensor:
        """|dW|^2 / S_1^2, shape (*stack), which small singular values hardly change. NaN for a zero update."""
        return (self.norm / self.S[..., 0]).square()

    def rank_for(self, share: float = 0.95) -> Tensor:
        """Return the lowest rank that keeps this share of |dW|^2, shape (*stack): the best rank for compression.

        Args:
            share: A number above 0 and up to 1.

        Returns:
            Whole numbers; 0 for a zero update.

        Raises:
            SpecError: The share is out of range.
        """
        if not 0 < share <= 1:
            raise SpecError(f"share must be above 0 and at most 1, not {share!r}", way_out="pass 0.95, for example")
        below = (self.energy < share * (1 - 1e-12)).sum(-1) + 1
        return torch.minimum(below, self.rank)

    @property
    def input_directions(self) -> Tensor:
        """diag(S) Vh, shape (*stack, k, in): what `subspace_similarity` takes to compare directions of the input."""
        return self.S[..., None] * self.Vh

    @property
    def output_directions(self) -> Tensor:
        """diag(S) U^T, shape (*stack, k, out): what `subspace_similarity` takes to compare directions of the output."""
        return self.S[..., None] * self.U.mT


@in_default_modes
@torch.no_grad()
def spectrum(A: Tensor, B: Tensor, s: float = 1.0) -> Spectrum:
    """Return the singular value decomposition of s B A.

    Args:
        A: Shape (*stack, r, in).
        B: Shape (*stack, out, r).
        s: The scale.

    Raises:
        SpecError: The shapes do not fit, or a value is not finite. Everything that is wrong is listed.
    """
    require_matrices({"A": A, "B": B}, [("A", -2, "B", -1, "the rank r")])
    svd = product_svd(B, A, float(s))
    return Spectrum(U=svd.U, S=svd.S, Vh=svd.Vh)


def used_directions(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """Return U and Vh with zeros in place of directions whose singular value comes from rounding."""
    used = is_used(spectrum.S)
    return spectrum.U * used[..., None, :], spectrum.Vh * used[..., None]


def is_used(S: Tensor) -> Tensor:
    """True for the singular values that do not come from rounding. S: (*stack, k), descending."""
    return (NEGLIGIBLE * S[..., :1]).clamp(min=0) < S


def require_matrices(
    tensors: Mapping[str, Any], equal: list[tuple[str, int, str, int, str]], way_out: str = "pass A (r, in), B (out, r)"
) -> None:
    """Raise SpecError unless all are matrices, or stacks of one shape, with finite values and axes that fit.

    Args:
        tensors: The tensors by the names that messages give them.
        equal: Entries (name, axis, other name, other axis, what the axis is) for axes that must have one length.
        way_out: The next step that the error names.
    """
    problems = [f"{name} must be a tensor with two axes or more, not {_shown(t)}" for name, t in tensors.items()
                if not (isinstance(t, Tensor) and t.ndim >= 2 and t.is_floating_point())]  # fmt: skip
    if not problems:
        problems += [f"{name} is on the meta device, and has no values" for name, t in tensors.items() if t.is_meta]
        problems += [f"{name} {tuple(t.shape)} is empty" for name, t in tensors.items() if 0 in t.shape]
        problems += [
            f"{a} {tuple(tensors[a].shape)} and {b} {tuple(tensors[b].shape)} differ in {what}"
            for a, i, b, j, what in equal
            if tensors[a].shape[i] != tensors[b].shape[j]
        ]
        if len({t.shape[:-2] for t in tensors.values()}) > 1:
            problems.append("the stacks differ: " + ", ".join(f"{n} {tuple(t.shape)}" for n, t in tensors.items()))
    if not problems:
        problems += [f"{name} holds NaN or infinity" for name, t in tensors.items() if not is_finite(t)]
    if problems:
        raise SpecError("these matrices cannot be analyzed:", problems, way_out)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return repr(value)
