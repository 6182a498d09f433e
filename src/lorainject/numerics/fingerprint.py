"""Is this the base that the adapter was made for? A few values of each adapted weight tell, in milliseconds.

The values are compared, not hashed: the same base in bfloat16 must be recognised by an adapter that was trained on it in
float32. Within one dtype the bits must agree; between two, up to the rounding of the coarser one.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SAMPLES = 8
EPS = {torch.float64: 0.0, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
TINY = 2.0**-24  # float16 has nothing between 0 and this


def sample_values(weight: Tensor) -> Tensor | None:
    """SAMPLES values of a weight (float32, on the weight's device), at fixed places spread over it; None on the meta device."""
    if weight.is_meta or weight.numel() == 0:
        return None
    return weight.detach().take(_where(weight.numel(), weight.device)).to(torch.float32)


@functools.lru_cache(maxsize=64)
def _where(numel: int, device: torch.device) -> Tensor:
    return torch.tensor(sample_positions(numel), device=device)


def sample_positions(numel: int) -> list[int]:
    """Which elements of a weight are its sample."""
    return [(2 * i + 1) * numel // (2 * SAMPLES) for i in range(SAMPLES)]


def samples_agree(mine: Tensor, theirs: Tensor, my_dtype: torch.dtype, their_dtype: torch.dtype) -> bool:
    """Whether two samples (float32, (SAMPLES,)) can come from the same weight, stored in these dtypes."""
    if my_dtype == their_dtype:
        return torch.equal(mine, theirs)
    eps = max(EPS.get(my_dtype, 0.0), EPS.get(their_dtype, 0.0))
    return bool(((mine - theirs).abs() <= eps * torch.maximum(mine.abs(), theirs.abs()) + TINY).all())
