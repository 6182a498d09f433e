"""combine, compress and compare: against dense algebra in float64, over records and files of several formats."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorainject as li
from lorainject import algebra

from adapter_files import LLAMA_HINTS, records
from example_count import examples
from oracle import FIXTURES, dense_deltas

FORMATS = ["lorainject", "peft", "gguf", "kohya", "mlx", "diffusers", "onnx"]
WEIGHTS = st.floats(-4, 4).filter(lambda w: abs(w) > 1e-3)


def site(path="q", out=6, in_=5, r=2, seed=0, **fields):
    """Return a site with random factors."""
    g = torch.Generator().manual_seed(seed)
    stack = fields.pop("stack", ())
    A, B = torch.randn(*stack, r, in_, generator=g), torch.randn(*stack, out, r, generator=g)
    return li.StoredSite(path=path, A=A, B=B, **{"alpha": 3.0} | fields)


def record(*sites, **fields):
    """Return a record of these sites."""
    return li.AdapterFile(path=Path("drawn"), format="lorainject", sites=sites, **fields)


def dense_sum(weights, files):
    """Return the weighted sum of the dense updates."""
    total = {}
    for w, file in zip(weights, files, strict=True):
        for name, d in dense_deltas(file).items():
            total[name] = total.get(name, 0) + w * d
    return total


def assert_same(deltas, expected, share=2e-6, sizes=None):
    """Assert that both have the same names and, relative to the sizes of the parts, the same values."""
    assert deltas.keys() == expected.keys()
    for name, d in deltas.items():
        assert torch.allclose(d, expected[name], rtol=0, atol=share * (sizes or {}).get(name, float(d.abs().max()))), (
            name
        )


@settings(max_examples=examples(80))
@given(files=st.lists(records(), min_size=1, max_size=3), data=st.data())
def test_combine_is_the_weighted_sum_of_dense_updates(files, data):
    """Whatever the formats, ranks, scales and signs, the update of the sum is the sum of the updates."""
    weights = data.draw(st.lists(WEIGHTS, min_size=len(files), max_size=len(files)))
    formats = data.draw(st.lists(st.sampled_from(FORMATS), min_size=len(files), max_size=len(files)))
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i, (file, form) in enumerate(zip(files, formats, strict=True)):
            path = Path(folder) / f"{i}{li.FORMATS[form].suffix}"
            li.write(file, path, format=form, hints=LLAMA_HINTS)
            paths.append(li.read(path, hints=LLAMA_HINTS))
        total = algebra.combine(paths, weights)
        sizes = dense_sum([abs(w) for w in weights], [absolute(file) for file in files])
        sizes = {name: float(d.max()) for name, d in sizes.items()}
        assert_same(dense_deltas(total), dense_sum(weights, files), sizes=sizes)
        li.write(total, Path(folder) / "sum")
        assert_same(dense_deltas(li.read(Path(folder) / "sum")), dense_deltas(total), 1e-12)


def absolute(file):
    """Return the record with |A| and |B|, whose updates bound what rounding can do."""
    return replace(file, sites=tuple(replace(s, A=s.A.abs(), B=s.B.abs()) for s in file.sites))


def test_ranks_add_up_and_factors_keep_their_bits():
    """A is copied, and so is B where all scales are equal, or differ by a power of two; nothing is rounded."""
    a, b = record(site(r=2)), record(site(r=4, alpha=12.0, seed=1))
    total = algebra.combine([a, b], [1, -2])
    (s,) = total.sites
    assert s.r == 6
    assert s.scale == a.sites[0].scale
    assert torch.equal(s.A, torch.cat([a.sites[0].A, b.sites[0].A]))
    assert torch.equal(s.B, torch.cat([a.sites[0].B, b.sites[0].B * -4], 1))
    assert algebra.combine([a]).sites == a.sites


@pytest.mark.parametrize("kind", ["experts", "experts^T", "conv", "embedding", "linear^T"])
def test_kinds_stay_what_they_are(kind):
    """Stacks, convolutions and embeddings are summed up like linears, and stay on the same weight."""
    shapes = {"experts": (3, 6, 5), "experts^T": (3, 5, 6), "conv": (6, 5, 1, 1), "embedding": (5, 6),
              "linear^T": (5, 6)}  # fmt: skip
    stack = (3,) if kind.startswith("experts") else ()
    a, b = (record(site(r=r, seed=r, kind=kind, shape=shapes[kind], stack=stack)) for r in (2, 3))
    total = algebra.combine([a, b], [0.3, -0.7])
    assert (total.sites[0].kind, total.sites[0].shape) == (kind, shapes[kind])
    expected = 0.3 * delta(a.sites[0]) - 0.7 * delta(b.sites[0])
    assert torch.allclose(delta(total.sites[0]), expected, atol=1e-6)
    half = algebra.compress(total, r=3)
    error = float((delta(half.sites[0]) - expected).norm() / expected.norm())
    assert half.error == pytest.approx(error, rel=1e-4)


def delta(s):
    """Return s B A in float64."""
    return s.scale * s.B.double() @ s.A.double()


def test_slices_stay_slices_unless_they_overlap():
    """Slices with the same rows add up, others stay apart; where slices overlap, the sum is on the whole weight."""
    q = site("c", 2, label="q", rows=(range(2),), shape=(6, 5))
    v = site("c", 2, label="v", rows=(range(4, 6),), shape=(6, 5), seed=1)
    both = algebra.combine([record(q), record(v), record(q)])
    assert [(s.name, s.r) for s in both.sites] == [("c[q]", 4), ("c[v]", 2)]
    whole = site("c", 6, seed=2, alpha=5.0)
    files = [record(q), record(whole), record(site("c", 3, label="1:4", rows=(range(1, 4),), shape=(6, 5), seed=3))]
    total = algebra.combine(files, [1, 0.5, 2])
    assert [(s.name, s.r) for s in total.sites] == [("c", 6)]
    assert_same(dense_deltas(total), dense_sum([1, 0.5, 2], files))


def test_bias_updates_add_up():
    """The update of a bias is scale * bias, and its sum is defined."""
    a, b = (record(site(seed=i, alpha=alpha, bias=torch.full((6,), 1.0 + i))) for i, alpha in ((0, 2.0), (1, 6.0)))
    (s,) = algebra.combine([a, b], [0.5, -1]).sites
    assert torch.allclose(s.bias * s.scale, torch.full((6,), 0.5 * 1 - 3 * 2.0))


def test_what_has_no_sum_is_refused_with_every_site():
    """DoRA with another adapter on the same weight, and whole tensors that differ, are listed; nothing is returned."""
    dora = record(site(magnitude=torch.ones(6)), site("k"), replaced={"head": torch.zeros(2, 2)})
    plain = record(site(seed=1), site("k"), replaced={"head": torch.ones(2, 2)})
    with pytest.raises(li.FileError) as error:
        algebra.combine([dora, plain])
    assert len(error.value.problems) == 2
    assert "q: a magnitude" in str(error.value)
    assert "head: a whole tensor" in str(error.value)
    alone = algebra.combine([dora, record(site("v"))])
    assert alone.sites[0] is dora.sites[0]
    assert alone.replaced.keys() == {"head"}
    with pytest.raises(li.FileError, match=r"weight 0\.5 does not scale"):
        algebra.combine([record(replaced={"head": torch.zeros(2, 2)}), plain], [0.5, 0])


def test_adapters_of_other_models_are_refused_with_every_site():
    """Other sizes, other kinds and other bases are listed, one line per weight."""
    a = record(site("q"), site("k"), site("v", kind="conv", shape=(6, 5, 1)), site("o"))
    b = record(site("q", in_=7), site("k", out=4), site("v"), site("o"))
    for verb in (lambda: algebra.combine([a, b]), lambda: algebra.compare(a, b)):
        with pytest.raises(li.FileError) as error:
            verb()
        assert [line.split(":")[0] for line in error.value.problems] == ["q", "k", "v"]
    with pytest.raises(li.FileError, match="names of the kind 'kohya'"):
        algebra.combine([a, replace(a, namespace="kohya")])
    prints = [
        li.files.record.BasePrint(dtype={"q": torch.float32}, sample={"q": torch.full((64,), x)}) for x in (1.0, 2)
    ]
    same, other = (record(site("q"), base=p) for p in prints)
    assert algebra.combine([same, same]).base.sample["q"][0] == 1
    with pytest.raises(li.FileError, match="made for another base weight"):
        algebra.combine([same, other])


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [math.nan, 1], [math.inf, 1], [0, 0]])
def test_impossible_weights_are_refused(weights):
    """There must be one finite weight per adapter, and one of them must not be 0."""
    with pytest.raises(li.SpecError, match="cannot be combined with the weights"):
        algebra.combine([record(site()), record(site())], weights)


def test_nan_is_refused_with_every_site():
    """A record with NaN is refused by every function."""
    bad = record(replace(site(), A=torch.full((2, 5), math.nan)), site("k"))
    for verb in (lambda: algebra.combine([bad]), lambda: algebra.compress(bad, r=1), lambda: algebra.compare(bad, bad)):
        with pytest.raises(li.FileError, match="q holds NaN"):
            verb()


@settings(max_examples=examples(60))
@given(files=st.lists(records(), min_size=1, max_size=3), r=st.integers(1, 5))
def test_compress_is_optimal_and_tells_its_error(files, r):
    """The error is that of the best approximation of the rank (Eckart and Young), and the one that is reported."""
    total = algebra.combine(files)
    small = algebra.compress(total, r=r) if any(s.r >= r for s in total.sites) else None
    if small is None:
        with pytest.raises(li.SpecError, match="higher than the rank of every site"):
            algebra.compress(total, r=r)
        return
    before, after = dense_deltas(total), dense_deltas(small)
    for s, entry in zip(small.sites, small.reduced, strict=True):
        name = f"{s.path}.weight"
        S = torch.linalg.svdvals(before[name])
        best = float(S[r:].square().sum().sqrt() / S.square().sum().sqrt())
        error = float((before[name] - after[name]).norm() / before[name].norm())
        assert s.r <= r
        assert error == pytest.approx(best, rel=1e-4, abs=2e-6)
        assert entry.error == pytest.approx(error, rel=1e-4, abs=1e-6)


@settings(max_examples=examples(40))
@given(file=records(), error=st.floats(0, 1))
def test_compress_finds_the_lowest_rank_within_an_error(file, error):
    """One rank less would break the bound, and error and energy mean the same."""
    total = algebra.combine([file, file])
    small = algebra.compress(total, error=error)
    before = dense_deltas(total)
    for s in small.sites:
        S = torch.linalg.svdvals(before[f"{s.path}.weight"])
        tails = (S.square().flip(0).cumsum(0).flip(0) / S.square().sum()).sqrt().tolist()
        if s.r < 2 * next(t for t in file.sites if t.path == s.path).r:
            assert s.r == len(tails) or tails[s.r] <= error + 1e-7
        assert s.r == 1 or tails[s.r - 1] > error - 1e-7
    if error > 1e-3:  # 1 - error^2 is a float
        assert [s.r for s in algebra.compress(total, energy=1 - error**2).sites] == [s.r for s in small.sites]


@pytest.mark.parametrize("wrong", [{}, {"r": 1, "error": 0.1}, {"r": 0}, {"r": 1.5}, {"error": -1}, {"energy": 2},
                                   {"error": math.nan}])  # fmt: skip
def test_compress_refuses_impossible_settings(wrong):
    """There must be exactly one possible setting."""
    with pytest.raises(li.SpecError, match="no rank can be chosen"):
        algebra.compress(record(site()), **wrong)


def test_a_stack_has_one_rank():
    """Experts share a rank, and the error is that of all of them together."""
    file = record(site("e", parameter="up", kind="experts", shape=(3, 6, 5), stack=(3,), r=4))
    small = algebra.compress(file, error=0.5)
    d, e = delta(file.sites[0]), delta(small.sites[0])
    assert small.sites[0].r < 4
    assert float((d - e).norm() / d.norm()) <= 0.5
    assert small.error == pytest.approx(float((d - e).norm() / d.norm()), rel=1e-5)


def test_combine_with_r_compresses_the_sum():
    """The result tells its errors, and can be written."""
    files = [record(site(r=4, seed=i)) for i in range(3)]
    small = algebra.combine(files, r=4)
    assert isinstance(small, algebra.Approximation)
    assert small.sites[0].r == 4
    assert f"{small.error:.2e}" in str(small)


@settings(max_examples=examples(40))
@given(a=records(), b=records())
def test_compare_is_dense_geometry(a, b):
    """Norms, angles and overlaps are those of the dense updates."""
    result = algebra.compare(a, b)
    first, second = dense_deltas(a), dense_deltas(b)
    assert {f"{w.path}.weight" for w in result.weights} == first.keys() & second.keys()
    assert {f"{name}.weight" for name in result.only_first} == first.keys() - second.keys()
    for w in result.weights:
        D, E = first[f"{w.path}.weight"], second[f"{w.path}.weight"]
        cosine = float((D * E).sum() / (D.norm() * E.norm()))
        assert math.cos(math.radians(w.angle)) == pytest.approx(cosine, abs=1e-9)
        assert w.norms == pytest.approx((float(D.norm()), float(E.norm())))
        assert w.difference == pytest.approx(float((D - E).norm()), abs=1e-6 * float(D.norm()))
        assert 0 <= w.overlap_in <= 1 + 1e-9
        for overlap, pair in ((w.overlap_in, (D, E)), (w.overlap_out, (D.T, E.T))):
            V, W = (torch.linalg.svd(x).Vh[: torch.linalg.matrix_rank(x)] for x in pair)
            assert overlap == pytest.approx(float((V @ W.T).square().sum()) / min(len(V), len(W)), abs=1e-6)


def test_compare_knows_equal_opposite_and_orthogonal_updates():
    """The same update under other factors has angle 0 and overlap 1; a negative multiple has angle 180."""
    a = record(site(r=2))
    s = a.sites[0]
    M = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    other = record(replace(s, A=M @ s.A, B=s.B @ M.inverse() * -3))
    (w,) = algebra.compare(a, other).weights
    assert w.angle == pytest.approx(180, abs=1e-3)
    assert w.overlap_in == pytest.approx(1)
    assert w.overlap_out == pytest.approx(1)
    rows = torch.eye(5)
    first, second = (record(replace(s, A=rows[i : i + 2], B=s.B)) for i in (0, 2))
    (w,) = algebra.compare(first, second).weights
    assert w.angle == pytest.approx(90)
    assert w.overlap_in == pytest.approx(0)
    assert "overlap" in str(algebra.compare(first, second))
    (w,) = algebra.compare(a, record(replace(s, B=torch.zeros(6, 2)))).weights
    assert math.isnan(w.angle)


def test_files_of_peft_are_summed():
    """PEFT's own files, with convolutions and embeddings, are arguments as they are."""
    plain = replace(li.read(FIXTURES / "peft_plain"), replaced={})
    total = algebra.combine([plain, plain], [1, -0.5])
    assert_same(dense_deltas(total), dense_sum([0.5], [plain]))


def test_import_does_not_load_the_package():
    """`import lorainject` does not import algebra."""
    code = "import sys, lorainject; print('lorainject.algebra' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
