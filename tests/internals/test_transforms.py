"""The exact conversions of transforms.py."""

from __future__ import annotations

import pytest
import torch

import lorainject as li
from lorainject.files.transforms import with_scale_folded


@pytest.mark.parametrize(
    ("factor", "dtype"), [(2.0, torch.bfloat16), (0.125, torch.bfloat16), (3.0, torch.float32), (1 / 3, torch.float32)]
)
def test_folding_a_scale_is_exact_in_every_dtype(factor, dtype):
    """A scale goes into bfloat16 factors where that loses nothing, and makes them float32 elsewhere."""
    s = li.StoredSite(path="a", A=torch.randn(2, 3).bfloat16(), B=torch.randn(64, 2).bfloat16(), alpha=2 * factor)
    folded = with_scale_folded(s, 1.0)
    assert folded.scale == 1
    assert folded.B.dtype == dtype
    assert torch.allclose(folded.B.double(), s.B.double() * factor, rtol=1e-7, atol=0)
