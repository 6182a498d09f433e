"""One tile: the checksum, and what is measured on a part of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorainject.fold import LANES, Desk, Fold, checksum, some

SHAPES = [(1, 1), (3, 5), (7, 33), (64, 64), (1, LANES + 1), (63, 1111), (128, 512)]


def weight(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(data=st.data())
def test_one_flipped_bit_changes_the_checksum(shape, dtype, data):
    """Any bit of any element, whatever the size; and the same bits give the same number."""
    w = weight(shape, dtype)
    before = checksum(w)
    assert checksum(w.clone()) == before
    raw = w.view(-1).view(torch.uint8)
    i, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    raw[i] ^= 1 << bit
    assert checksum(w) != before


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@given(data=st.data())
def test_an_exchange_and_opposite_steps_change_the_checksum(shape, data):
    """Two elements exchanged, and one a unit up and another a unit down, which a plain sum would not see."""
    bits = torch.arange(shape[0] * shape[1], dtype=torch.int32) * 7
    i, j = data.draw(st.lists(st.integers(0, len(bits) - 1), min_size=2, max_size=2, unique=True))
    exchanged, stepped = bits.clone(), bits.clone()
    exchanged[[i, j]] = bits[[j, i]]
    stepped[i] += 1
    stepped[j] -= 1
    assert len({checksum(t.view(torch.float32)) for t in (bits, exchanged, stepped)}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_part_that_is_measured_stands_for_all(dtype):
    """Survival and error of a large tile, as measured on a part, beside those of all its elements in float64."""
    w0, P, Q = weight((128, 2048), dtype) * 0.02, weight((128, 4), torch.float64, 1) * 0.002, weight((4, 2048), torch.float64, 2) * 0.05
    m, measured, _ = Desk().fold(w0, P, Q, keep=False)
    d, error = P @ Q, m.double() - w0.double() - P @ Q
    assert some(w0).numel() < w0.numel() / 10
    assert measured.survival == pytest.approx(float(1 + (error * d).sum() / (d * d).sum()), abs=0.02)
    assert measured.error == pytest.approx(float(error.norm() / d.norm()), rel=0.05)
    assert measured.asked == pytest.approx(float((d * d).sum()), rel=0.1)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_delta_of_one_row_or_column_is_not_missed(axis):
    """What is measured meets every row and every column in proportion, or else all is measured."""
    for at in (0, 17, 63):
        P, Q = weight((64, 2), torch.float64, 1), weight((2, 4096), torch.float64, 2)
        (P if axis == 0 else Q.T)[torch.arange(64 if axis == 0 else 4096) != at] = 0
        _, measured, _ = Desk().fold(weight((64, 4096), torch.bfloat16) * 0.02, P * 1e-5, Q, keep=False)
        assert measured.asked > 0
        assert measured.survival < 0.9
        assert measured.error > 0.3


def test_a_delta_too_small_to_be_squared_is_measured():
    """Its squares vanish in float32; nothing of it survives, and that is said."""
    w0 = torch.ones(8, 64)
    _, measured, _ = Desk().fold(w0, torch.full((8, 1), 1e-15).double(), torch.full((1, 64), 1e-15).double(), keep=False)
    assert measured.survival == 0
    assert measured.error == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_add_is_fold_in_place(dtype):
    """The way that keeps nothing gives the same bits and measures the same."""
    w0, P, Q = weight((64, 1000), dtype), weight((64, 4), torch.float64, 1), weight((4, 1000), torch.float64, 2)
    m, measured, _ = Desk().fold(w0, P, Q, keep=False)
    there, tally = w0.clone(), Fold()
    tally.add(0, there, P, Q, there)
    assert torch.equal(there, m)
    assert tally.measured == measured
