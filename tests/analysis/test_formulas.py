"""The formulas of the analysis: constructed cases with known answers, and dense matrices with numpy's SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lorainject as li
from lorainject import analysis

from models import ids, llama, randomize, state


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(width: int, n: int, seed: int = 0) -> Tensor:
    """Return n orthonormal rows of this width."""
    return torch.linalg.qr(gaussian(width, n, seed=seed)).Q.mT


def update(S: list[float], out: int = 7, in_: int = 9) -> tuple[Tensor, Tensor]:
    """Return A and B of an update with these singular values, divided between A and B at random."""
    r = len(S)
    mix = gaussian(r, r, seed=3)
    U, V = orthonormal(out, r, seed=1), orthonormal(in_, r, seed=2)
    return torch.linalg.inv(mix) @ V, (U.mT * torch.tensor(S, dtype=torch.float64)) @ mix


shapes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.sampled_from([(), (3,)]))


@given(shapes, st.floats(-3, 3).filter(lambda s: abs(s) > 0.01))
def test_spectrum_is_that_of_the_dense_update(shape, s):
    """Singular values, rank and vectors are those of numpy for the dense s B A, also for r larger than the sides."""
    out, in_, r, stack = shape
    A, B = gaussian(*stack, r, in_), gaussian(*stack, out, r, seed=1)
    dense = s * (B @ A)
    result = analysis.spectrum(A, B, s)
    S = np.linalg.svd(dense.numpy(), compute_uv=False)
    n = min(S.shape[-1], result.S.shape[-1])
    np.testing.assert_allclose(result.S[..., :n], S[..., :n], atol=1e-9)
    assert not (result.S[..., n:] > 1e-9).any()
    torch.testing.assert_close((result.U * result.S[..., None, :]) @ result.Vh, dense)
    assert (result.rank == torch.linalg.matrix_rank(dense)).all()


def test_ranks_of_known_spectra():
    """Equal singular values use all directions; one large one uses one; the energy says how many are needed."""
    equal, one = analysis.spectrum(*update([2.0, 2.0, 2.0, 2.0])), analysis.spectrum(*update([5.0, 1e-30]))
    assert float(equal.effective_rank) == pytest.approx(4)
    assert float(equal.stable_rank) == pytest.approx(4)
    assert float(one.effective_rank) == pytest.approx(1)
    assert int(one.rank) == 1
    mixed = analysis.spectrum(*update([3.0, 2.0, 1.0]))
    torch.testing.assert_close(mixed.energy, torch.tensor([9, 13, 14], dtype=torch.float64) / 14)
    assert [int(mixed.rank_for(share)) for share in (9 / 14, 0.65, 13 / 14, 0.95, 1.0)] == [1, 2, 2, 3, 3]
    p = np.array([3, 2, 1]) / 6
    assert float(mixed.effective_rank) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert float(mixed.norm) == pytest.approx(14**0.5)


def test_spectrum_of_a_fresh_adapter():
    """A zero update has rank 0 and no effective rank."""
    fresh = analysis.spectrum(gaussian(4, 9), torch.zeros(7, 4))
    assert int(fresh.rank) == int(fresh.rank_for(0.95)) == 0
    assert float(fresh.norm) == 0
    assert fresh.effective_rank.isnan()


def test_similarity_of_known_subspaces():
    """phi is 1 for identical and nested subspaces, 0 for orthogonal ones, and counts what is shared."""
    V = orthonormal(12, 6)
    scales = torch.tensor([6.0, 5, 4, 3, 2, 1], dtype=torch.float64)[:, None]
    ordered = V * scales
    same = analysis.subspace_similarity(ordered[:4], ordered[:4])
    assert torch.allclose(same.diagonal(), torch.ones(4, dtype=torch.float64))
    nested = analysis.subspace_similarity(ordered[:2], ordered)
    torch.testing.assert_close(nested[1, 1:], torch.ones(5, dtype=torch.float64))
    assert float(nested[1, 0]) == pytest.approx(1)  # j = 1 lies in i = 2
    apart = analysis.subspace_similarity(ordered[:3], ordered[3:])
    assert float(apart.abs().max()) < 1e-20
    half = analysis.subspace_similarity(ordered[[0, 1]], ordered[[1, 2]])
    torch.testing.assert_close(half, torch.tensor([[0, 0], [1, 0.5]], dtype=torch.float64))


@given(st.integers(2, 9), st.integers(1, 5), st.integers(1, 5), st.sampled_from([(), (2,)]))
def test_similarity_is_the_formula_of_the_paper(width, r1, r2, stack):
    """The whole grid equals |U_i^T V_j|^2 / min(i, j), computed pair by pair with numpy."""
    A1, A2 = gaussian(*stack, r1, width), gaussian(*stack, r2, width, seed=1)
    grid = analysis.subspace_similarity(A1, A2)
    for n in range(len(A1) if stack else 1):
        a, b = (A1[n], A2[n]) if stack else (A1, A2)
        V1, V2 = (np.linalg.svd(t.numpy(), full_matrices=False)[2] for t in (a, b))
        for i in range(1, len(V1) + 1):
            for j in range(1, len(V2) + 1):
                phi = np.linalg.norm(V1[:i] @ V2[:j].T) ** 2 / min(i, j)
                assert float((grid[n] if stack else grid)[i - 1, j - 1]) == pytest.approx(phi, abs=1e-9)


def test_similarity_of_updates_ignores_how_they_are_divided():
    """input_directions and output_directions of an update do not depend on A and B, which share it in many ways."""
    A, B = update([3.0, 2.0, 1.0])
    mix = gaussian(3, 3, seed=8)
    first, second = analysis.spectrum(A, B), analysis.spectrum(mix @ A, B @ torch.linalg.inv(mix))
    for a, b in (
        (first.input_directions, second.input_directions),
        (first.output_directions, second.output_directions),
    ):
        phi = analysis.subspace_similarity(a, b)
        torch.testing.assert_close(phi.diagonal(), torch.ones(3, dtype=torch.float64))


def test_random_baseline_of_the_similarity():
    """The mean of phi over random subspaces is max(i, j) / width."""
    draws = [
        analysis.subspace_similarity(gaussian(3, 40, seed=2 * n), gaussian(5, 40, seed=2 * n + 1)) for n in range(400)
    ]
    torch.testing.assert_close(torch.stack(draws).mean(0), analysis.random_similarity(40, 3, 5), atol=0.012, rtol=0)


def test_similarity_beyond_the_rank_is_unknown():
    """A matrix of rank 1 has no second direction, and phi is NaN there instead of arbitrary."""
    A = torch.ones(2, 5)
    grid = analysis.subspace_similarity(A, gaussian(2, 5))
    assert grid[0].isfinite().all()
    assert grid[1].isnan().all()


def test_amplification_along_and_across_the_top_direction():
    """An update along W0's top direction amplifies it by |dW| / S_1; one across all directions of W0 has no bound."""
    U, V = orthonormal(7, 7, seed=1).mT, orthonormal(9, 7, seed=2)
    S = torch.tensor([8.0, 4, 2, 1, 0.5, 0.25, 0], dtype=torch.float64)
    W0 = (U * S) @ V
    along = analysis.amplification(V[:1], 3 * U[:, :1], W0, 0.5, top=True)
    assert float(along.factor) == pytest.approx(1.5 / 8)
    assert float(along.projected_norm) == pytest.approx(float(along.top_norm)) == pytest.approx(8)
    assert float(along.relative_size) == pytest.approx(1.5 / float(W0.norm()))
    assert analysis.relative_size(V[:1], 3 * U[:, :1], W0, 0.5) == pytest.approx(1.5 / float(W0.norm()))
    small = analysis.amplification(V[4:5], U[:, 4:5], W0)
    assert float(small.factor) == pytest.approx(2)
    assert float(analysis.amplification(V[6:], U[:, 6:], W0).factor) > 1e12
    assert analysis.amplification(V[:1], 0 * U[:, :1], W0).factor.isnan()


def test_amplification_of_a_stack_is_that_of_each_matrix():
    """A stack of experts gives one value per expert, each as if it were alone, and as numpy computes it densely."""
    A, B, W0 = gaussian(3, 2, 9), gaussian(3, 7, 2, seed=1), gaussian(3, 7, 9, seed=2)
    stacked = analysis.amplification(A, B, W0, 2.0, top=True)
    for n in range(3):
        U, S, Vh = np.linalg.svd(2 * (B[n] @ A[n]).numpy(), full_matrices=False)
        projected = np.linalg.norm(U[:, :2].T @ W0[n].numpy() @ Vh[:2].T)
        assert float(stacked.factor[n]) == pytest.approx(np.linalg.norm(S) / projected)
        top = np.linalg.norm(np.linalg.svd(W0[n].numpy(), compute_uv=False)[:2])
        assert float(stacked.top_norm[n]) == pytest.approx(top)
    assert analysis.relative_size(A, B, W0, 2.0) == pytest.approx(float((2 * B @ A).norm() / W0.norm()))


def test_random_column_of_table_7():
    """The root mean square of |U^T W0 V| over random U and V is |W0| r / sqrt(in out)."""
    W0 = gaussian(20, 30, seed=9)
    computed = analysis.amplification(gaussian(4, 30), gaussian(20, 4, seed=1), W0).random_norm
    squares = [
        torch.linalg.norm(orthonormal(20, 4, seed=n) @ W0 @ orthonormal(30, 4, seed=n + 5000).mT) ** 2
        for n in range(2000)
    ]
    assert float(torch.stack(squares).mean().sqrt()) == pytest.approx(float(computed), rel=0.02)


def test_intruder_dimensions():
    """A large update orthogonal to no direction of W0 in particular is an intruder; scaling W0 makes none."""
    U, V = orthonormal(30, 30, seed=1).mT, orthonormal(30, 30, seed=2)
    W0 = (U * torch.linspace(3, 1, 30, dtype=torch.float64)) @ V
    new = torch.ones(30, 1, dtype=torch.float64) / 30**0.5
    spread = U @ new  # as much in every direction of W0
    result = analysis.intruder_dimensions(W0, W0 + 50 * spread @ gaussian(1, 30), k=5)
    assert int(result.count) == 1
    assert float(result.similarity[0]) < 0.3
    assert int(analysis.intruder_dimensions(W0, 2 * W0).count) == 0
    stacked = analysis.intruder_dimensions(torch.stack([W0, W0]), torch.stack([W0, W0 + 50 * spread @ gaussian(1, 30)]))
    assert stacked.count.tolist() == [0, 1]


@pytest.mark.parametrize(("call", "problems"), [
    (lambda: analysis.spectrum(gaussian(3, 5), gaussian(4, 2)), ["A (3, 5) and B (4, 2) differ in the rank r"]),
    (lambda: analysis.spectrum([1], torch.ones(3)), ["A must be a tensor", "B must be a tensor"]),
    (lambda: analysis.spectrum(gaussian(3, 5) / 0, gaussian(4, 3) / 0), ["A holds NaN", "B holds NaN"]),
    (lambda: analysis.spectrum(gaussian(3, 5).to("meta"), gaussian(4, 3)), ["A is on the meta device"]),
    (lambda: analysis.subspace_similarity(gaussian(3, 5), gaussian(3, 6)), ["differ in the width"]),
    (lambda: analysis.amplification(gaussian(3, 5), gaussian(4, 3), gaussian(5, 4)), ["the inputs", "the outputs"]),
    (lambda: analysis.intruder_dimensions(gaussian(3, 3), gaussian(3, 3), k=0, threshold=0), ["k must", "threshold"]),
    (lambda: analysis.spectrum(gaussian(2, 3, 5), gaussian(3, 4, 3)), ["the stacks differ"]),
])  # fmt: skip
def test_bad_input_is_listed(call, problems):
    """Everything that is wrong is in one error."""
    with pytest.raises(li.SpecError) as error:
        call()
    assert all(any(p in line for line in error.value.problems) for p in problems)
    assert "=> " in str(error.value)


def test_gradient_norms_fall_with_the_rank_unless_rank_stabilized():
    """With alpha / r the gradient falls with the rank, with alpha / sqrt(r) it does not; the model is as before."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    x, y, before = torch.randn(128, 64), torch.randn(128, 64), state(net)
    norms = analysis.gradient_norms(
        net, lambda model, step: (model(x) - y).square().mean(), "all-linear", [4, 64], steps=15, lr=0.1,
        optimizer=torch.optim.SGD,
    )  # fmt: skip
    fall = {scaling: by_rank[64][-1] / by_rank[4][-1] for scaling, by_rank in norms.items()}
    assert fall["standard"] < 0.4  # 1 / sqrt(16), and a little
    assert 0.8 < fall["rslora"] < 1.25
    assert all(len(steps) == 15 for by_rank in norms.values() for steps in by_rank.values())
    assert state(net) == before


def test_gradient_norms_leave_other_adapters_as_they_were():
    """Adapters on the model are off meanwhile, and active again afterwards; an error of the loss changes nothing."""
    model = llama()
    li.inject(model, ["q_proj"], r=2, name="mine")
    randomize(model)
    expected = model(ids()).logits

    def loss(model: nn.Module, step: int) -> Tensor:
        if step == 1:
            raise RuntimeError("out of data")
        return model(ids()).logits.square().mean()

    with pytest.raises(RuntimeError, match="out of data"):
        analysis.gradient_norms(model, loss, ["v_proj"], [2], steps=2)
    assert torch.equal(model(ids()).logits, expected)
    with pytest.raises(li.SpecError) as error:
        analysis.gradient_norms(model, loss, ["nothing"], [0], steps=0)
    assert len(error.value.problems) >= 3
