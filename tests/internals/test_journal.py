"""The journal of a tile: which elements of W0 it keeps, and how their positions are stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorainject.numerics.journal import MAX_GAP, Journal, TileJournal

N = 3 * MAX_GAP + 7


@pytest.mark.parametrize(
    "missed",
    [[], [0], [MAX_GAP], [MAX_GAP + 1], [MAX_GAP - 1, 2 * MAX_GAP], [N - 1], [3, 2 * MAX_GAP + 9], [40000, 40001]],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_positions_at_any_distance_are_kept(missed, dtype):
    """Gaps of 32,768 elements and more fill the sign bit of their 16 bits; those beyond 65,535 are bridged."""
    assert_restored(missed, dtype)


@given(missed=st.lists(st.integers(0, N - 1), max_size=20, unique=True))
def test_any_positions_are_kept(missed):
    assert_restored(sorted(missed), torch.float32)


def assert_restored(missed: list[int], dtype: torch.dtype) -> None:
    w0 = torch.randn(1, N, generator=torch.Generator().manual_seed(0)).to(dtype)
    guess = w0.clone()
    guess[0, missed] *= -2
    journal = TileJournal.record(w0, guess, np.array(missed, dtype=np.int64))
    assert journal.gaps is not None
    assert len(journal.gaps) <= len(missed) + N // MAX_GAP + 1
    weight = Journal.join({0: journal, 1: journal})
    for tile in weight.tiles([N, N]):
        assert torch.equal(tile.correct(guess.clone()), w0)
        other = guess.clone()
        other[0, min({1, 2, *range(4, 30)} - set(missed))] += 1  # an element that is not kept
        assert tile.correct(other) is None
