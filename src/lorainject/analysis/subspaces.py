"""Which directions two updates share: the subspace similarity of the LoRA paper, for all ranks at once.

    phi(A1, A2, i, j) = |V1_i^T V2_j|^2 / min(i, j)        V1_i: (in, i), the first i right-singular vectors of A1

phi is 1 if the smaller of the two subspaces lies in the larger one, and 0 if they are orthogonal. Two independent
random subspaces of R^in have phi = max(i, j) / in on average, which is what a figure has to be compared with.

Source: Hu et al. 2021, arXiv 2106.09685, section 7.2, equation 4, and appendix G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics.modes import in_default_modes
from .spectra import is_used, require_matrices


@in_default_modes
@torch.no_grad()
def subspace_similarity(A1: Tensor, A2: Tensor) -> Tensor:
    """Return phi for every i and j: how much of the top i directions of A1 is in the top j directions of A2.

    The rows span the subspaces. To compare the factors of two adapters, pass A of each (directions of the input) or B^T
    of each (directions of the output), as the paper does. To compare the updates s B A, whose directions do not depend
    on how an update is divided between A and B, pass `Spectrum.input_directions` or `output_directions` of each.

    Args:
        A1: Shape (*stack, r1, in).
        A2: Shape (*stack, r2, in). The ranks may differ.

    Returns:
        Shape (*stack, k1, k2) in float64, with k = min(r, in); entry [i - 1, j - 1] is phi(A1, A2, i, j). NaN where a
        matrix has fewer than i or j directions.

    Raises:
        SpecError: The widths differ, or a value is not finite.
    """
    require_matrices(
        {"A1": A1, "A2": A2}, [("A1", -1, "A2", -1, "the width")], "pass matrices (r, in) of one width, such as two A"
    )
    V1, V2 = _directions(A1), _directions(A2)
    shared = (V1 @ V2.mT).square().cumsum(-2).cumsum(-1)
    return shared / _smaller(shared.shape[-2], shared.shape[-1]).to(shared.device)


def random_similarity(width: int, r1: int, r2: int) -> Tensor:
    """Return the mean of phi for independent random subspaces of R^width: max(i, j) / width, shape (r1, r2)."""
    i, j = torch.arange(1.0, r1 + 1, dtype=torch.float64)[:, None], torch.arange(1.0, r2 + 1, dtype=torch.float64)
    return torch.maximum(i, j) / width


def _smaller(r1: int, r2: int) -> Tensor:
    return torch.minimum(torch.arange(1, r1 + 1)[:, None], torch.arange(1, r2 + 1))


def _directions(A: Tensor) -> Tensor:
    """Return the right-singular vectors of A as rows, in the order of the singular values; NaN for those of zero."""
    _, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    return Vh.where(is_used(S)[..., None], torch.nan)
