"""The checksum of a tensor changes with every change of its bits, of their positions, or of their number."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorainject.numerics.checksum import checksum

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 5), (7, 33), (64, 64), (1, 129), (63, 1111), (128, 512)]


def randn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(data=st.data())
def test_one_or_two_flipped_bits_change_the_checksum(shape, dtype, data):
    """Any bit of any element counts, and no two bits hide each other; equal bits give equal checksums."""
    w = randn(shape, dtype)
    before = checksum(w)
    assert checksum(w.clone()) == before
    raw = w.view(-1).view(torch.uint8)
    places = st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 7))
    for i, bit in data.draw(st.lists(places, min_size=1, max_size=2, unique=True)):
        raw[i] ^= 1 << bit
    assert checksum(w) != before


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_pairs_of_flipped_signs_have_different_checksums(dtype):
    """No pair of signs, in whatever positions, has the checksum of another pair, of one sign or of none."""
    w = randn((1, 160), dtype)
    seen = {checksum(w)}
    for flipped in (*((i,) for i in range(160)), *itertools.combinations(range(160), 2)):
        v = w.clone()
        v[:, list(flipped)] *= -1
        seen.add(checksum(v))
    assert len(seen) == 1 + 160 + 160 * 159 // 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (96, 1000), (128, 512)], ids=str)
def test_every_negated_part_changes_the_checksum(shape, dtype):
    """The weight, one row or column, and every k-th row, column or element, negated, have checksums of their own."""
    w = randn(shape, dtype)
    seen: dict[bytes, int] = {}
    for step in (1, 2, 3, 4, 8, 16, 64):
        for start in range(step):
            for cut in (lambda v, s: v[s], lambda v, s: v[:, s], lambda v, s: v.view(-1)[s]):
                negated = w.clone()
                cut(negated, slice(start, None, step)).neg_()
                seen[negated.view(torch.uint8).numpy().tobytes()] = checksum(negated)
    assert len(set(seen.values()) | {checksum(w)}) == len(seen) + 1


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_every_permutation_and_length_changes_the_checksum(dtype, data):
    """It sees exchanged elements, and zeros that were appended or taken away."""
    n = data.draw(st.integers(2, 3000))
    w = torch.arange(n).to(torch.int64 if dtype == torch.float64 else torch.int32).view(dtype).flatten()
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    i, j = data.draw(st.lists(st.integers(0, len(w) - 1), min_size=2, max_size=2, unique=True))
    exchanged = w.clone()
    exchanged[[i, j]] = w[[j, i]]
    for other in (w[order], w.flip(0), w.roll(1), exchanged):
        same = torch.equal(other.view(torch.uint8), w.view(torch.uint8))
        assert (checksum(other) == checksum(w)) == same
    assert (
        len({checksum(t) for t in (w, torch.cat([w, w.new_zeros(1)]), w[:-1], w.new_zeros(n), w.new_zeros(n + 1))}) == 5
    )


def test_a_unit_added_here_and_taken_there_changes_the_checksum():
    """Steps that cancel in a sum do not cancel in the checksum."""
    bits = torch.arange(4096, dtype=torch.int32) * 7
    seen = {checksum(bits)}
    for i, j in ((0, 1), (0, 64), (63, 64), (5, 4000), (4095, 0)):
        stepped = bits.clone()
        stepped[i] += 1
        stepped[j] -= 1
        seen.add(checksum(stepped))
    assert len(seen) == 6


def test_a_checksum_of_several_tensors_is_that_of_their_bytes():
    """How a tensor is cut into pieces, and whether it is contiguous, does not count."""
    w = randn((64, 48), torch.float32)
    assert checksum(*w.split(7)) == checksum(w) == checksum(w.T.contiguous().T)
    assert checksum(w[:1], w[1:]) != checksum(w[1:], w[:1])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_checksum_is_the_same_on_every_device(dtype):
    w = randn((63, 1111), dtype)
    assert checksum(w.cuda()) == checksum(w)
