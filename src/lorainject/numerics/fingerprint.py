"""The fingerprint of a base weight: a few of its values, by which an adapter file knows the base that it was trained
on.

Values in float32 are compared, and not a hash of them, because a base in bfloat16 must be recognized by an adapter that
was trained on it in float32. Within one dtype the values must be equal; between two dtypes, both must be roundings of
one value, so they may differ by half a unit in the last place of each. Reading the values takes milliseconds for a
whole model.

The positions are part of the file format: one in each of SAMPLES equal parts of the flattened weight, at a place that a
hash chooses, so that they lie in many rows and many columns whatever the width. Files of version 3 and older have
OLD_SAMPLES values at equal distances, which all lie in column 0 where the width is a power of two.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SAMPLES, OLD_SAMPLES = 64, 8


def sample_values(weight: Tensor, count: int = SAMPLES) -> Tensor | None:
    """Return `count` values of a weight at fixed positions (float32, on its device); None on the meta device."""
    if weight.is_meta or weight.numel() == 0:
        return None
    return weight.detach().take(_position_tensor(weight.numel(), count, weight.device)).to(torch.float32)


@functools.lru_cache(maxsize=64)
def _position_tensor(numel: int, count: int, device: torch.device) -> Tensor:
    return torch.tensor(sample_positions(numel, count), device=device)


def sample_positions(numel: int, count: int = SAMPLES) -> list[int]:
    """Return the positions of the sampled elements in a flattened weight of `numel` elements, ascending.

    Args:
        numel: The number of elements, at least 1.
        count: SAMPLES, or OLD_SAMPLES for the positions of old files.
    """
    if count == OLD_SAMPLES:
        return [(2 * i + 1) * numel // (2 * count) for i in range(count)]
    return [(i * numel + (_hash(i) * numel >> 64)) // count for i in range(count)]


def _hash(i: int) -> int:
    """Return a 64-bit hash of i: the i-th output of SplitMix64 (Steele et al. 2014) from the seed 0."""
    x = (i + 1) * 0x9E3779B97F4A7C15 % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def samples_agree(a: Tensor, b: Tensor, a_dtype: torch.dtype, b_dtype: torch.dtype) -> bool:
    """True if two samples (float32, of one shape) can come from one weight that is stored in these two dtypes."""
    equal = (a == b) | (a.isnan() & b.isnan())
    if a_dtype != b_dtype:
        a, b = a.double(), b.double()
        largest = torch.maximum(a.abs(), b.abs())
        equal |= (a - b).abs() <= (ulp(largest, a_dtype) + ulp(largest, b_dtype)) / 2
    return bool(equal.all())


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance of neighboring numbers in this dtype at x >= 0 (float64), subnormal numbers included."""
    info = torch.finfo(dtype)
    exponent = x.clamp(min=info.smallest_normal).view(torch.int64) & (0x7FF << 52)  # the bits of the exponent alone
    return info.eps * exponent.view(torch.float64)
