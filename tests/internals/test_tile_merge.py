"""One tile: the checksum, and what is measured on a part of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorainject.numerics import tiled_matmul
from lorainject.numerics.checksum import LANE, checksum
from lorainject.numerics.delta import Factors
from lorainject.numerics.tile_merge import ENOUGH, TileMerger, TileWorkspace, sum_dtype
from lorainject.numerics.tiled_matmul import LowRankProduct, chain, exact_product, fast_product

SHAPES = [(1, 1), (3, 5), (7, 33), (64, 64), (1, 2 * LANE + 1), (63, 1111), (128, 512)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the workers: several would share one product among them, and cut it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def of(P: torch.Tensor, Q: torch.Tensor, s: float = 1.0, dtype: torch.dtype = torch.float32) -> LowRankProduct:
    return fast_product([Factors(P, Q, torch.tensor(s))], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_part_that_is_measured_stands_for_all(dtype):
    """Survival and error of a large matrix, as measured on a part, beside those of all its elements in float64."""
    w0, P, Q = (
        weight((256, 2048), dtype) * 0.02,
        weight((256, 4), torch.float32, 1) * 0.002,
        weight((4, 2048), torch.float32, 2) * 0.05,
    )
    m, measured = TileWorkspace().sum(w0, of(P, Q))
    d = P.double() @ Q.double()
    error = m.double() - w0.double() - d
    assert measured.survival == pytest.approx(float(1 + (error * d).sum() / (d * d).sum()), abs=0.02)
    assert measured.lost == pytest.approx(float((error * error).sum()), rel=0.05)
    assert measured.asked == pytest.approx(float((d * d).sum()), rel=0.2)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_delta_of_one_row_or_column_is_not_missed(axis):
    """What is measured meets rows and columns in proportion, or else all is measured."""
    for at in (0, 18, 63):
        P, Q = weight((64, 2), torch.float32, 1), weight((2, 4096), torch.float32, 2)
        (P if axis == 0 else Q.T)[torch.arange(64 if axis == 0 else 4096) != at] = 0
        _, measured = TileWorkspace().sum(weight((64, 4096), torch.bfloat16) * 0.02, of(P * 1e-5, Q))
        assert measured.asked > 0
        assert measured.survival < 0.9
        assert measured.lost > 0.1 * measured.asked


def test_little_is_measured():
    """Of a large tile: to measure all of it would take as long as the sum."""
    P = torch.zeros(768, 1)
    P[1] = 1  # not among the rows that stand for all
    _, seen = TileWorkspace().sum(weight((768, 1024), torch.float32), of(P + 1e-6, torch.ones(1, 1024)))
    assert seen.asked < 1e-6
    assert 8 * ENOUGH < 768 * 1024


def test_a_delta_too_small_to_be_squared_is_measured():
    """Its squares vanish in float32; nothing of it survives, and that is said."""
    w0 = torch.ones(8, 64)
    for d in (of, lambda P, Q: exact_product([Factors(P, Q, torch.tensor(1.0))])):
        _, measured = TileWorkspace().sum(w0, d(torch.full((8, 1), 1e-15), torch.full((1, 64), 1e-15)))
        assert measured.survival == 0
        assert measured.lost == measured.asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_add_is_sum_in_place(dtype):
    """The same bits, the same measures; and of the fold that can be taken out, the same but for the last bit."""
    w0, P, Q = weight((64, 3000), dtype), weight((64, 4), dtype, 1), weight((4, 3000), dtype, 2)
    d = of(P, Q, 1.7, dtype)
    m, measured = TileWorkspace().sum(w0, d)
    there, tally = w0.clone(), TileMerger()
    tally.measure(0, there, d)
    tally.desk.merge_into(there, d, there)
    assert torch.equal(there, m)
    assert tally.measured == measured
    exact, also, _ = TileWorkspace().fold(w0, exact_product([Factors(P, Q, torch.tensor(1.7))]))
    step = torch.finfo(dtype).eps * (
        w0.abs().double() + 1.7 * 4 * P.double().abs() @ Q.double().abs()
    )  # for each of the four ranks
    assert ((m.double() - exact.double()).abs() <= step).all()
    assert measured.asked == pytest.approx(also.asked, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_m_must_be_what_it_was(dtype):
    """Even where what was kept of W0 would cover the change."""
    desk, w0, d = (
        TileWorkspace(),
        weight((96, 1100), dtype),
        exact_product([Factors(weight((96, 4), dtype, 1), weight((4, 1100), dtype, 2), torch.tensor(0.02))]),
    )
    m, _, kept = desk.fold(w0, d)
    m = m.clone()
    assert torch.equal(desk.unfold(m, d, kept), w0)
    assert kept.gaps is not None
    m.view(-1)[int(kept.gaps[0])] *= 2
    assert desk.unfold(m, d, kept) is None


@given(data=st.data())
def test_a_sum_is_the_same_however_the_matrix_is_cut(data):
    """By its definition, which says nothing of the tile: so a checkpoint whose tensors lie split, fused or transposed has memory's bits."""
    rows, width, r = data.draw(
        st.tuples(st.integers(1, 200), st.integers(1, 2600), st.sampled_from([1, 2, 3, 8, 16, 20, 64, 128]))
    )
    dtype, s = data.draw(
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
            st.sampled_from([1.0, 2.0, float(torch.tensor(1.7))]),
        )
    )
    w0, P, Q = weight((rows, width), dtype), weight((rows, r), torch.float32, 1), weight((r, width), torch.float32, 2)
    d = of(P, Q, s, dtype)
    m, _ = TileWorkspace().sum(w0, d)
    turned, _ = TileWorkspace().sum(w0.T.contiguous(), of(Q.T, P.T, s, dtype))
    narrow = d.P.dtype == torch.float32
    exact = (
        (w0.double() + (s * chain(P, Q).double() if narrow else (d.P @ d.Q).to(sum_dtype(dtype)).double()))
        .to(sum_dtype(dtype))
        .to(dtype)
    )
    off = 0.0 if narrow else torch.finfo(dtype).eps  # where float64 is taken, d may be on the edge between two numbers
    allowed = off * (w0.abs().double() + d.whole().abs().double())
    assert ((m.double() - exact.double()).abs() <= allowed).all()
    assert ((turned.T.double() - m.double()).abs() <= allowed).all()


@given(data=st.data())
def test_a_sum_for_good_has_the_bits_of_its_definition(data):
    """Wherever the weight lies, in place or not."""
    some = st.one_of(st.integers(1, 300), st.integers(1, 40).map(lambda n: tiled_matmul.FEW * n))
    rows, width, r = data.draw(st.tuples(some, st.integers(1, 5000), st.sampled_from([1, 3, 8, 16, 64, 128])))
    dtype, s = data.draw(
        st.tuples(st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1.0, 2.0, -4.0, 0.5, 1.7, 128.0]))
    )
    left, in_place = data.draw(st.tuples(st.sampled_from([0, 16]), st.booleans()))
    w0 = weight((rows, width + left), dtype)[:, left:]
    d = of(weight((rows, r), torch.float32, 1), weight((r, width), torch.float32, 2), s)
    out, exact = (
        w0 if in_place else torch.empty_like(w0),
        torch.add(w0.float(), tiled_matmul.chain(d.P, d.Q), alpha=s).to(dtype),
    )
    TileWorkspace().merge_into(w0, d, out)
    assert not tiled_matmul.chained() or torch.equal(out, exact)


def test_where_the_library_adds_up_in_another_order_float64_is_taken(monkeypatch):
    P, Q = weight((8, 4), torch.float32, 1), weight((4, 64), torch.float32, 2)
    monkeypatch.setattr(tiled_matmul, "_chained", lambda: False)
    assert of(P, Q, 2.0).P.dtype == torch.float64
    assert of(P, Q, 2.0).s == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_product_and_sum_may_be_one_call_they_are(dtype, monkeypatch):
    monkeypatch.setattr(tiled_matmul, "_adds", lambda r, width, s: True)
    monkeypatch.setattr(TileWorkspace, "_strips", None)
    w0, d = (
        weight((4 * tiled_matmul.FEW, 100), dtype),
        LowRankProduct(weight((4 * tiled_matmul.FEW, 8), torch.float32, 1), weight((8, 100), torch.float32, 2), 2.0),
    )
    exact, out = w0.double() + 2 * d.P.double() @ d.Q.double(), torch.empty_like(w0)
    TileWorkspace().merge_into(w0, d, out)
    assert torch.allclose(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_a_library_that_adds_otherwise_in_one_call_is_found_out(monkeypatch):
    tried = tiled_matmul._adds.__wrapped__

    def from_w0_on(P, Q, s, out):
        for p, q in zip(P.T, Q, strict=True):
            out.addr_(p, q, alpha=s)

    monkeypatch.setattr(tiled_matmul, "add_product_by_rows", from_w0_on)
    assert not tried(8, 100, 2.0)


def test_where_there_are_too_many_ranks_float64_is_taken():
    assert of(weight((8, 129), torch.float32, 1), weight((129, 64), torch.float32, 2)).P.dtype == torch.float64


@pytest.fixture
def fewer_bits():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_a_sum_has_all_bits_whatever_torch_is_told(fewer_bits):
    """On processors with bfloat16 units, "medium" makes torch round the factors of a product to bfloat16."""
    w0, P, Q = (
        weight((96, 512), torch.float32),
        weight((96, 128), torch.float32, 1),
        weight((128, 512), torch.float32, 2),
    )
    m, _ = TileWorkspace().sum(w0, of(P, Q))
    assert torch.allclose(m.double(), w0.double() + P.double() @ Q.double(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_factors_that_float32_does_not_hold_are_multiplied_in_float64(size):
    w0, P, Q = (
        weight((8, 64), torch.float32),
        weight((8, 4), torch.float32, 1) * size**2,
        weight((4, 64), torch.float32, 2) / size**2,
    )
    m, _ = TileWorkspace().sum(w0, of(P, Q))
    assert torch.allclose(m.double(), w0.double() + P.double() @ Q.double(), rtol=1e-6, atol=1e-6)


def test_several_adapters_are_one_product():
    """Each with its scale; the first one's B is taken as it is."""
    parts = [
        Factors(weight((8, 4), torch.float32, i), weight((4, 64), torch.float32, i + 9), torch.tensor(s))
        for i, s in enumerate((0.3, 2.0))
    ]
    d = fast_product(parts, torch.float32)
    assert not tiled_matmul.chained() or torch.equal(d.P[:, :4], parts[0].P)
    expected = sum(float(f.s) * f.P.double() @ f.Q.double() for f in parts)
    assert torch.allclose(d.whole().double(), expected, rtol=1e-5, atol=1e-5)
