"""The fingerprint of a base weight."""

from __future__ import annotations

import torch

from lorainject.numerics.fingerprint import sample_values, samples_agree


def test_samples_agree_across_dtypes_but_not_after_training():
    """Samples of one weight agree up to rounding in any dtype; those of a weight that was trained a little further do
    not."""
    w = torch.randn(64, 64)
    for dtype in (torch.bfloat16, torch.float16):
        assert samples_agree(sample_values(w), sample_values(w.to(dtype)), torch.float32, dtype)
        assert samples_agree(
            sample_values(w.to(torch.bfloat16)), sample_values(w.to(torch.float16)), torch.bfloat16, torch.float16
        )
    assert not samples_agree(sample_values(w), sample_values(w * 1.0001), torch.float32, torch.float32)
    assert not samples_agree(
        sample_values(w), sample_values(w + 0.02 * torch.randn(64, 64)), torch.float32, torch.bfloat16
    )
    assert sample_values(w).shape == (8,)
