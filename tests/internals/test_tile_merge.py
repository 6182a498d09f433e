"""One tile: its sum with a low-rank product, what is measured of the delta, and when it is restored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorainject.numerics import tiled_matmul
from lorainject.numerics.delta import Factors
from lorainject.numerics.tile_merge import DeltaStats, TileMerger, TileWorkspace, sum_dtype
from lorainject.numerics.tiled_matmul import LowRankProduct, exact_product, fast_product, fma_chain, has_fma_chain


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Let torch use one thread, as in a merge: several would divide one product among them, and cut it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def factors(P: torch.Tensor, Q: torch.Tensor, s: float = 1.0) -> list[Factors]:
    return [Factors(P, Q, torch.tensor(s))]


def product(P: torch.Tensor, Q: torch.Tensor, s: float = 1.0, dtype: torch.dtype = torch.float32) -> LowRankProduct:
    return fast_product(factors(P, Q, s), dtype)


def merge(w0: torch.Tensor, delta: LowRankProduct) -> tuple[torch.Tensor, DeltaStats]:
    """Merge without a journal, with new buffers."""
    m, stats, journal = TileWorkspace().merge(w0, delta, reversible=False)
    assert journal is None
    return m, stats


def test_a_delta_too_small_to_be_squared_is_measured():
    """Where d^2 vanishes in float32, the statistics say that nothing of the delta survives."""
    for size in (1e-15, 1e-30):  # in float32 the square of d vanishes, or d itself
        P, Q = torch.full((8, 1), size), torch.full((1, 64), size)
        for delta in (product(P, Q), exact_product(factors(P, Q))):
            _, stats = merge(torch.ones(8, 64), delta)
            assert stats.survival == 0
            assert stats.lost == stats.asked == pytest.approx(8 * 64 * size**4, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merge_into_gives_the_bits_of_merge(dtype):
    """Bits and statistics are those of a merge without a journal; a reversible merge differs by a last bit at most."""
    w0, P, Q = (randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(64, 3000), (64, 4), (4, 3000)]))
    delta = product(P, Q, 1.7, dtype)
    m, stats = merge(w0, delta)
    out, merger = w0.clone(), TileMerger()
    merger.merge_into(0, out, delta, out)
    assert torch.equal(out, m)
    assert merger.total == stats
    exact, exact_stats, _ = TileWorkspace().merge(w0, exact_product(factors(P, Q, 1.7)))
    four_roundings = torch.finfo(dtype).eps * (w0.abs().double() + 1.7 * 4 * P.double().abs() @ Q.double().abs())
    assert ((m.double() - exact.double()).abs() <= four_roundings).all()  # one for each rank
    assert stats.asked == pytest.approx(exact_stats.asked, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_tile_that_was_edited_is_not_restored(dtype):
    """The tile is refused even where the edited element is one that the journal holds."""
    workspace, w0 = TileWorkspace(), randn(96, 1100, dtype=dtype)
    P, Q = randn(96, 4, seed=1, dtype=dtype), randn(4, 1100, seed=2, dtype=dtype)
    delta = exact_product(factors(P, Q, 0.02))
    m, _, journal = workspace.merge(w0, delta)
    m = m.clone()
    assert torch.equal(workspace.unmerge(m, delta, journal), w0)
    assert journal.gaps is not None
    m.view(-1)[int(journal.gaps[0])] *= 2
    assert workspace.unmerge(m, delta, journal) is None


@given(data=st.data())
def test_a_sum_is_the_same_however_the_matrix_is_cut(data):
    """It has the bits of its definition, so split, fused or transposed tensors on disk get memory's bits."""
    ranks = st.sampled_from([1, 2, 3, 8, 16, 20, 64, 128])
    rows, width, r = data.draw(st.tuples(st.integers(1, 200), st.integers(1, 2600), ranks))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    s = data.draw(st.sampled_from([1.0, 2.0, float(torch.tensor(1.7))]))
    w0, P, Q = randn(rows, width, dtype=dtype), randn(rows, r, seed=1), randn(r, width, seed=2)
    delta = product(P, Q, s, dtype)
    m, _ = merge(w0, delta)
    transposed, _ = merge(w0.T.contiguous(), product(Q.T, P.T, s, dtype))
    in_float32 = delta.P.dtype == torch.float32
    d = s * fma_chain(P, Q).double() if in_float32 else (delta.P @ delta.Q).to(sum_dtype(dtype)).double()
    exact = (w0.double() + d).to(sum_dtype(dtype)).to(dtype)
    eps = 0.0 if in_float32 else torch.finfo(dtype).eps  # in float64, d may lie at the middle between two numbers
    allowed = eps * (w0.abs().double() + delta.dense().abs().double())
    assert ((m.double() - exact.double()).abs() <= allowed).all()
    assert ((transposed.T.double() - m.double()).abs() <= allowed).all()


@given(data=st.data())
def test_merge_into_has_the_bits_of_its_definition(data):
    """It has them in place or not, for whole matrices and for columns of one."""
    rows = data.draw(st.integers(1, 320))
    width, r = data.draw(st.tuples(st.integers(1, 5000), st.sampled_from([1, 3, 8, 16, 64, 128])))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    s = data.draw(st.sampled_from([1.0, 2.0, -4.0, 0.5, 1.7, 128.0]))
    left, in_place = data.draw(st.tuples(st.sampled_from([0, 16]), st.booleans()))
    w0 = randn(rows, width + left, dtype=dtype)[:, left:]
    delta = product(randn(rows, r, seed=1), randn(r, width, seed=2), s)
    exact = torch.add(w0.float(), fma_chain(delta.P, delta.Q), alpha=s).to(dtype)
    out = w0 if in_place else torch.empty_like(w0)
    TileWorkspace().merge_into(w0, delta, out)
    assert not has_fma_chain() or torch.equal(out, exact)


def test_the_product_is_in_float64_where_the_library_sums_in_another_order(monkeypatch):
    P, Q = randn(8, 4, seed=1), randn(4, 64, seed=2)
    monkeypatch.setattr(tiled_matmul, "_strips_are_fma_chains", lambda: False)
    assert product(P, Q, 2.0).P.dtype == torch.float64
    assert product(P, Q, 2.0).s == 1


def test_the_product_is_in_float64_where_there_are_too_many_ranks():
    assert product(randn(8, 129, seed=1), randn(129, 64, seed=2)).P.dtype == torch.float64


@pytest.fixture
def medium_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_a_sum_is_precise_whatever_precision_torch_is_set_to(medium_precision):
    """On processors with bfloat16 units, "medium" makes torch round the factors of a product to bfloat16."""
    w0, P, Q = randn(96, 512), randn(96, 128, seed=1), randn(128, 512, seed=2)
    m, _ = merge(w0, product(P, Q))
    assert torch.allclose(m.double(), w0.double() + P.double() @ Q.double(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_factors_beyond_the_range_of_float32_are_multiplied_in_float64(size):
    w0, P, Q = randn(8, 64), randn(8, 4, seed=1) * size**2, randn(4, 64, seed=2) / size**2
    m, _ = merge(w0, product(P, Q))
    assert torch.allclose(m.double(), w0.double() + P.double() @ Q.double(), rtol=1e-6, atol=1e-6)


def test_several_adapters_are_one_product():
    """Each delta has its scale, and the first adapter's B is used as it is."""
    parts = [Factors(randn(8, 4, seed=i), randn(4, 64, seed=i + 9), torch.tensor(s)) for i, s in enumerate((0.3, 2.0))]
    delta = fast_product(parts, torch.float32)
    assert not has_fma_chain() or torch.equal(delta.P[:, :4], parts[0].P)
    expected = sum(float(f.s) * f.P.double() @ f.Q.double() for f in parts)
    assert torch.allclose(delta.dense().double(), expected, rtol=1e-5, atol=1e-5)
