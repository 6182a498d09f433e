"""The fingerprint of a base weight: a few of its values, by which an adapter file knows the base that it was trained
on.

Values are compared, and not a hash of them, because a base in bfloat16 must be recognized by an adapter that was
trained on it in float32. Within one dtype the bits must agree; between two dtypes, the values may differ by the
rounding of the coarser one. Reading the values takes milliseconds for a whole model.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SAMPLES = 8
EPS = {torch.float64: 0.0, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
TINY = 2.0**-24  # the smallest positive float16


def sample_values(weight: Tensor) -> Tensor | None:
    """Return SAMPLES values of a weight at fixed positions (float32, on its device); None on the meta device."""
    if weight.is_meta or weight.numel() == 0:
        return None
    return weight.detach().take(_position_tensor(weight.numel(), weight.device)).to(torch.float32)


@functools.lru_cache(maxsize=64)
def _position_tensor(numel: int, device: torch.device) -> Tensor:
    return torch.tensor(sample_positions(numel), device=device)


def sample_positions(numel: int) -> list[int]:
    """Return the positions of the sampled elements in a flattened weight of `numel` elements, spread evenly."""
    return [(2 * i + 1) * numel // (2 * SAMPLES) for i in range(SAMPLES)]


def samples_agree(a: Tensor, b: Tensor, a_dtype: torch.dtype, b_dtype: torch.dtype) -> bool:
    """True if two samples (float32, shape (SAMPLES,)) can come from one weight that is stored in these two dtypes."""
    if a_dtype == b_dtype:
        return torch.equal(a, b)
    eps = max(EPS.get(a_dtype, 0.0), EPS.get(b_dtype, 0.0))
    return bool(((a - b).abs() <= eps * torch.maximum(a.abs(), b.abs()) + TINY).all())
