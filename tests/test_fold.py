"""One tile: the checksum, and what is measured on a part of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorainject import blocks, fold
from lorainject.blocks import Product, chain, quick
from lorainject.fold import LANES, Desk, Fold, checksum, wide

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
    m, measured, _ = Desk().fold(w0, P, Q)
    d, error = P @ Q, m.double() - w0.double() - P @ Q
    asked: list[slice] = []
    fold.measured(w0, P, lambda rows: asked.append(rows) or d[rows].float())
    assert len(w0[asked[0]]) < len(w0) / 10
    assert len(asked) == 1
    assert measured.survival == pytest.approx(float(1 + (error * d).sum() / (d * d).sum()), abs=0.02)
    assert measured.lost == pytest.approx(float((error * error).sum()), rel=0.05)
    assert measured.asked == pytest.approx(float((d * d).sum()), rel=0.2)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_delta_of_one_row_or_column_is_not_missed(axis):
    """What is measured meets every row and every column in proportion, or else all is measured."""
    for at in (0, 17, 63):
        P, Q = weight((64, 2), torch.float64, 1), weight((2, 4096), torch.float64, 2)
        (P if axis == 0 else Q.T)[torch.arange(64 if axis == 0 else 4096) != at] = 0
        _, measured, _ = Desk().fold(weight((64, 4096), torch.bfloat16) * 0.02, P * 1e-5, Q)
        assert measured.asked > 0
        assert measured.survival < 0.9
        assert measured.lost > 0.1 * measured.asked


def test_a_delta_too_small_to_be_squared_is_measured():
    """Its squares vanish in float32; nothing of it survives, and that is said."""
    w0 = torch.ones(8, 64)
    _, measured, _ = Desk().fold(w0, torch.full((8, 1), 1e-15).double(), torch.full((1, 64), 1e-15).double())
    assert measured.survival == 0
    assert measured.lost == measured.asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_add_is_sum_in_place(dtype):
    """The same bits, the same measures; and of the fold that can be taken out, the same but for the last bit."""
    w0, P, Q = weight((64, 1000), dtype), weight((64, 4), torch.float64, 1), weight((4, 1000), torch.float64, 2)
    m, measured = Desk().sum(w0, quick(P, Q, dtype, 1.0))
    there, tally = w0.clone(), Fold()
    tally.add(0, there, quick(P, Q, dtype, 1.0), there)
    assert torch.equal(there, m)
    assert tally.measured == measured
    exact, also, _ = Desk().fold(w0, P, Q)
    step = torch.finfo(dtype).eps * (w0.abs().double() + 4 * P.abs() @ Q.abs())  # for each of the four ranks
    assert ((m.double() - exact.double()).abs() <= step).all()
    assert measured.asked == pytest.approx(also.asked, rel=1e-5)


@given(data=st.data())
def test_a_sum_is_the_same_however_the_matrix_is_cut(data):
    """By its definition, which says nothing of the tile: so a checkpoint whose tensors lie split, fused or transposed has memory's bits."""
    rows, width, r = data.draw(st.tuples(st.integers(1, 200), st.integers(1, 1600), st.sampled_from([1, 2, 3, 8, 16, 20, 64])))
    dtype, s = data.draw(
        st.tuples(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.sampled_from([1.0, 2.0, float(torch.tensor(1.7))]))
    )
    w0, P, Q = weight((rows, width), dtype), weight((rows, r), torch.float64, 1), weight((r, width), torch.float64, 2)
    P, Q, s = quick(s * P, Q, dtype, s)
    m, _ = Desk().sum(w0, Product(P, Q, s))
    turned, _ = Desk().sum(w0.T.contiguous(), Product(Q.T, P.T, s))
    d, narrow = (chain(P, Q), True) if P.dtype == torch.float32 else (P @ Q, False)
    exact = (w0.double() + s * d.double()).to(wide(dtype)).to(dtype)
    off = 0.0 if narrow else torch.finfo(dtype).eps  # where float64 is taken, it may be on the edge between two numbers
    torch.testing.assert_close(m, exact, rtol=off, atol=0)
    torch.testing.assert_close(turned.T, m, rtol=off, atol=0)


def test_where_the_library_adds_up_in_another_order_float64_is_taken(monkeypatch):
    P, Q = weight((8, 4), torch.float64, 1), weight((4, 64), torch.float64, 2)
    monkeypatch.setattr(blocks, "_chained", lambda: False)
    assert quick(P, Q, torch.float32, 2.0) == Product(P, Q, 1.0)


def test_where_there_are_too_many_ranks_float64_is_taken():
    P, Q = weight((8, 260), torch.float64, 1), weight((260, 64), torch.float64, 2)
    assert quick(P, Q, torch.float32, 2.0) == Product(P, Q, 1.0)


@pytest.fixture
def fewer_bits():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_a_sum_has_all_bits_whatever_torch_is_told(fewer_bits):
    """On processors with bfloat16 units, "medium" makes torch round the factors of a product to bfloat16."""
    w0, P, Q = weight((128, 512), torch.float32), weight((128, 128), torch.float64, 1), weight((128, 512), torch.float64, 2)
    m, _ = Desk().sum(w0, quick(P, Q, torch.float32, 1.0))
    assert torch.allclose(m.double(), w0.double() + P @ Q, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_factors_that_float32_does_not_hold_are_multiplied_in_float64(size):
    w0, P, Q = weight((8, 64), torch.float32), weight((8, 4), torch.float64, 1) * size**2, weight((4, 64), torch.float64, 2) / size**2
    m, _ = Desk().sum(w0, quick(P, Q, torch.float32, 1.0))
    assert torch.allclose(m.double(), w0.double() + P @ Q, rtol=1e-6, atol=1e-6)
