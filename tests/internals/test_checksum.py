"""The checksum of a tile changes with every change of its bits or of their positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorainject.numerics.checksum import LANE, checksum

SHAPES = [(1, 1), (3, 5), (7, 33), (64, 64), (1, 2 * LANE + 1), (63, 1111), (128, 512)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(data=st.data())
def test_one_flipped_bit_changes_the_checksum(shape, dtype, data):
    """Any bit of any element counts, whatever the size; equal bits give equal checksums."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = checksum(w)
    assert checksum(w.clone()) == before
    raw = w.view(-1).view(torch.uint8)
    i, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    raw[i] ^= 1 << bit
    assert checksum(w) != before


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@given(data=st.data())
def test_an_exchange_and_opposite_steps_change_the_checksum(shape, data):
    """It sees two exchanged elements, and a unit added to one element and taken from another, which a plain sum would
    not."""
    bits = torch.arange(shape[0] * shape[1], dtype=torch.int32) * 7
    i, j = data.draw(st.lists(st.integers(0, len(bits) - 1), min_size=2, max_size=2, unique=True))
    exchanged, stepped = bits.clone(), bits.clone()
    exchanged[[i, j]] = bits[[j, i]]
    stepped[i] += 1
    stepped[j] -= 1
    assert len({checksum(t.view(torch.float32)) for t in (bits, exchanged, stepped)}) == 3
