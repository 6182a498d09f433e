"""How an update relates to the weight that it is added to: size, amplification, and directions that are new.

    W = W0 + dW        dW = s B A = U diag(S) Vh        W0: (*stack, out, in)

Only `intruder_dimensions` decomposes a whole weight; everything else takes products with the r directions of dW.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SpecError
from ..numerics.delta import product_norm
from ..numerics.low_rank import matrix_svd
from ..numerics.modes import in_default_modes
from .spectra import require_matrices, spectrum, used_directions

FITTING = "pass A (r, in), B (out, r) and W0 (out, in) of one layer"


@dataclass(frozen=True, kw_only=True, eq=False)
class Amplification:
    """How strongly an update amplifies the directions that it has, as in table 7 of the LoRA paper. All in float64."""

    delta_norm: Tensor
    """|dW|, shape (*stack)."""
    weight_norm: Tensor
    """|W0|, shape (*stack)."""
    projected_norm: Tensor
    """|U^T W0 V|, shape (*stack): how much of W0 lies in the directions of dW."""
    random_norm: Tensor
    """Root of the mean square of |U^T W0 V| for random U and V, shape (*stack): |W0| rank / sqrt(in out)."""
    top_norm: Tensor | None = None
    """|U^T W0 V| for the top directions of W0, as many as dW has: the largest that is possible. None unless asked
    for."""

    @property
    def factor(self) -> Tensor:
        """|dW| / |U^T W0 V|, shape (*stack): the amplification factor. NaN for a zero update."""
        return self.delta_norm / self.projected_norm

    @property
    def relative_size(self) -> Tensor:
        """|dW| / |W0|, shape (*stack)."""
        return self.delta_norm / self.weight_norm


@in_default_modes
@torch.no_grad()
def amplification(A: Tensor, B: Tensor, W0: Tensor, s: float = 1.0, *, top: bool = False) -> Amplification:
    """Return how much of W0 lies in the directions of s B A, and by what factor the update amplifies it.

    Source: Hu et al. 2021, arXiv 2106.09685, section 7.3 and table 7, whose columns are `projected_norm`, `top_norm`
    and `random_norm`. The last one is computed here, and not drawn.

    Args:
        A: Shape (*stack, r, in).
        B: Shape (*stack, out, r).
        W0: Shape (*stack, out, in).
        s: The scale.
        top: Compute `top_norm` as well. It needs the largest singular values of W0, which takes longer than all else.

    Raises:
        SpecError: The shapes do not fit, or a value is not finite.
    """
    _require_layer(A, B, W0)
    parts = spectrum(A, B, s)
    U, Vh = used_directions(parts)
    W = W0.double()
    norm = torch.linalg.matrix_norm(W)
    out, in_ = W.shape[-2:]
    return Amplification(
        delta_norm=parts.norm, weight_norm=norm, projected_norm=torch.linalg.matrix_norm(U.mT @ W @ Vh.mT),
        random_norm=norm * parts.rank / (out * in_) ** 0.5, top_norm=_top_norm(W, parts.rank) if top else None,
    )  # fmt: skip


@torch.no_grad()
def relative_size(A: Tensor, B: Tensor, W0: Tensor, s: float = 1.0) -> float:
    """Return |s B A| / |W0| (Frobenius); of a stack, of all its matrices together.

    Args:
        A: Shape (*stack, r, in).
        B: Shape (*stack, out, r).
        W0: Shape (*stack, out, in).
        s: The scale.

    Raises:
        SpecError: The shapes do not fit, or a value is not finite.
    """
    _require_layer(A, B, W0)
    norm = float(torch.linalg.vector_norm(W0, dtype=torch.float64))
    delta = abs(float(s)) * product_norm(B, A)
    return delta / norm if norm else float("inf") if delta else float("nan")


@dataclass(frozen=True, kw_only=True, eq=False)
class IntruderDimensions:
    """The top singular vectors of a tuned weight, compared with all singular vectors of the base weight."""

    similarity: Tensor
    """Shape (*stack, k): the largest |cos| between the j-th left-singular vector of W and any of W0."""
    threshold: float
    """A direction below this similarity is an intruder."""

    @property
    def count(self) -> Tensor:
        """The number of intruder dimensions, shape (*stack)."""
        return (self.similarity < self.threshold).sum(-1)


@in_default_modes
@torch.no_grad()
def intruder_dimensions(W0: Tensor, W: Tensor, k: int = 10, threshold: float = 0.5) -> IntruderDimensions:
    """Count the top singular vectors of a tuned weight that resemble no singular vector of the base weight.

    Low ranks with a large scale put such vectors among the largest of W; full fine-tuning hardly does. W may be tuned
    in any way: pass W0 + s B A for an adapter.

    Source: Shuttleworth et al. 2024, arXiv 2410.21228, algorithm 1, with the absolute value of the cosine, because the
    sign of a singular vector is arbitrary.

    Args:
        W0: Shape (*stack, out, in).
        W: The same shape.
        k: How many of the top singular vectors of W are examined; all of them if W has no more.
        threshold: The similarity below which a vector counts, above 0 and up to 1.

    Raises:
        SpecError: The shapes do not fit, a value is not finite, or a setting is out of range.
    """
    fits = [("W0", -1, "W", -1, "the width"), ("W0", -2, "W", -2, "the rows")]
    require_matrices({"W0": W0, "W": W}, fits, "pass the weight before and after training")
    problems = [] if isinstance(k, int) and k >= 1 else [f"k must be a whole number of at least 1, not {k!r}"]
    problems += [] if 0 < threshold <= 1 else [f"threshold must be above 0 and at most 1, not {threshold!r}"]
    if problems:
        raise SpecError("invalid settings:", problems, "pass k=10, threshold=0.5, for example")
    dtype = torch.promote_types(torch.promote_types(W0.dtype, W.dtype), torch.float32)
    before, after = (torch.linalg.svd(t.to(dtype), full_matrices=False).U for t in (W0, W))
    return IntruderDimensions(similarity=(after[..., :k].mT @ before).abs().amax(-1).double(), threshold=threshold)


def _require_layer(A: Tensor, B: Tensor, W0: Tensor) -> None:
    fits = [("A", -2, "B", -1, "the rank r"), ("A", -1, "W0", -1, "the inputs"), ("B", -2, "W0", -2, "the outputs")]
    require_matrices({"A": A, "B": B, "W0": W0}, fits, FITTING)


def _top_norm(W: Tensor, ranks: Tensor) -> Tensor:
    """Return the norm of the largest `ranks` singular values of each matrix."""
    matrices = zip(W.reshape(-1, *W.shape[-2:]), ranks.flatten().tolist(), strict=True)
    norms = [float(torch.linalg.vector_norm(matrix_svd(w, r).S)) if r else 0.0 for w, r in matrices]
    return torch.tensor(norms, dtype=torch.float64).reshape(ranks.shape)
