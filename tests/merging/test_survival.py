"""What a merge reports of its deltas is measured on every element: it agrees with a dense computation in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lorainject as li

from models import llama, randomize

pytestmark = pytest.mark.filterwarnings("ignore::lorainject.SurvivalWarning")
OUT, IN, R = 1024, 1792, 4
TOLERANCE = 2e-6


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain() -> tuple[Tensor, Tensor, Tensor]:
    """Return W0 (OUT, IN), A and B of a delta of a few per cent of the weight."""
    return randn(OUT, IN, seed=0) * 0.02, randn(R, IN, seed=1) * 0.02, randn(OUT, R, seed=2) * 1e-2


def large_columns() -> tuple[Tensor, Tensor, Tensor]:
    """The delta is in five columns, where the weights are large."""
    W, A, B = plain()
    columns = [3, 12, 500, 1001, 1500]
    W[:, columns] *= 100
    A *= 0.005
    A[:, columns] = 3.0
    return W, A, B * 0.01


def large_rows() -> tuple[Tensor, Tensor, Tensor]:
    """The delta is in three rows, where the weights are huge."""
    W, A, B = plain()
    rows = [5, 17, 600]
    W[rows] *= 1e4
    B[rows] = 0.3
    return W, A, B


def three_rows() -> tuple[Tensor, Tensor, Tensor]:
    """The delta is in three rows and survives; it is noise elsewhere and vanishes."""
    W, A, B = plain()
    B *= 1e-4
    B[[5, 17, 600]] = 1.0
    return W, A, B


def every_seventh_column() -> tuple[Tensor, Tensor, Tensor]:
    """One column of seven survives, and another does not."""
    W, A, B = plain()
    A *= torch.arange(IN) % 7 < 2
    W[:, 1::7] *= 3000
    return W, A, B


def equal_elements() -> tuple[Tensor, Tensor, Tensor]:
    """All elements of the delta are equal, so that the rounding errors of a sum do not cancel."""
    W, A, B = plain()
    return W, torch.full_like(A, 0.013), torch.full_like(B, 0.0017)


def tiny() -> tuple[Tensor, Tensor, Tensor]:
    """The squares of the delta vanish in float32."""
    W, A, B = plain()
    return W * 1e-22, A * 1e-12, B * 1e-12


CASES = (plain, large_columns, large_rows, three_rows, every_seventh_column, equal_elements, tiny)


def linear(case: Callable[[], tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype) -> nn.Module:
    """Return a model with one linear layer and the adapter of a case."""
    W, A, B = case()
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False, dtype=dtype))
    model[0].weight.data.copy_(W)
    li.inject(model, ["0"], r=R, alpha=R)
    adapter = model[0].lora["default"]
    adapter.A.data.copy_(A)
    adapter.B.data.copy_(B)
    return model


def oracle(W0: Tensor, M: Tensor, d: Tensor) -> tuple[float, float, float]:
    """Return survival, error and norm by their definitions, in float64."""
    W0, M, d = (t.detach().double().flatten() for t in (W0, M, d))
    change = M - W0
    return float((change @ d) / (d @ d)), float((change - d).norm() / d.norm()), float(d.norm())


def product(model: nn.Module) -> Tensor:
    adapter = model[0].lora["default"]
    return (adapter.B.double() @ adapter.A.double()).detach()


def assert_measured(site: li.MergedSite, W0: Tensor, M: Tensor, d: Tensor) -> None:
    survival, error, norm = oracle(W0, M, d)
    assert site.survival == pytest.approx(survival, abs=TOLERANCE)
    assert site.error == pytest.approx(error, rel=1e-4, abs=1e-6)  # d is formed in float32
    assert site.norm == pytest.approx(norm, rel=TOLERANCE)


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_survival_is_measured_on_every_element(case, dtype, reversible):
    """Survival, error and norm are those of the dense sum, wherever in the weight the delta is."""
    model = linear(case, dtype)
    W0, d = model[0].weight.detach().clone(), product(model)
    report = li.merge(model, reversible=reversible)
    assert_measured(report.sites[0], W0, model[0].weight, d)
    assert report.survival == pytest.approx(report.sites[0].survival)


def test_strict_refuses_what_a_sample_would_accept():
    """A delta that drowns in a few large columns is refused, and nothing is written."""
    model = linear(large_columns, torch.bfloat16)
    W0 = model[0].weight.detach().clone()
    with pytest.raises(li.MergeError, match=r"(?s)less than 0\.9 of a delta survives"):
        li.merge(model, strict=True)
    assert torch.equal(model[0].weight, W0)
    li.merge(linear(three_rows, torch.bfloat16), strict=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_survival_of_an_untied_weight_is_measured(dtype):
    """A weight that gets memory of its own is measured as one that is overwritten."""
    model = linear(large_columns, dtype)
    model.append(nn.Linear(IN, OUT, bias=False, dtype=dtype))
    model[1].weight = model[0].weight
    d = product(model)
    for reversible in (True, False):
        report = li.merge(model, untie=True, reversible=reversible)
        assert_measured(report.sites[0], model[1].weight, model[0].weight, d)
        if reversible:
            li.unmerge(model)


def test_survival_of_an_embedding_with_few_trained_rows_is_measured():
    """Twenty rows of an embedding are trained, and the others hold noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32000, 64)).bfloat16()
    model[0].weight.data.normal_(std=0.02)
    adapter = li.inject(model, ["0"], r=4, alpha=4)[0].lora["default"]
    adapter.A.data.normal_(std=1e-9)
    adapter.A.data[:, torch.randperm(32000)[:20]] = torch.randn(4, 20)
    adapter.B.data.normal_()
    W0, d = model[0].weight.detach().clone(), product(model).T
    assert_measured(li.merge(model).sites[0], W0, model[0].weight, d)


def test_only_elements_where_the_weight_is_finite_are_measured():
    """Infinity and NaN in W0 stay, and do not count."""
    model = linear(plain, torch.bfloat16)
    W = model[0].weight.data
    W[3, 5], W[3, 6], W[700, 1] = float("inf"), float("nan"), float("-inf")
    W0, d = W.clone(), product(model)
    site = li.merge(model).sites[0]
    finite = W0.isfinite()
    assert_measured(site, W0[finite], model[0].weight[finite], d[finite])


@pytest.mark.parametrize("in_place", [False, True])
def test_survival_on_disk_is_measured(in_place, tmp_path: Path):
    """A merge of a checkpoint reports what its files hold."""
    model = llama(hidden_size=96, intermediate_size=1792).bfloat16()
    model.save_pretrained(tmp_path / "base")
    randomize(li.inject(model, ["down_proj"], r=R, alpha=R), std=1e-5)
    for layer in model.model.layers:
        adapter = layer.mlp.down_proj.lora["default"]
        adapter.A.data[:, [3, 12, 500]] = 3.0
        layer.mlp.down_proj.weight.data[:, [3, 12, 500]] *= 100
    li.save(model, tmp_path / "adapter")
    deltas = {name: d.double() for name, _, d in li.deltas(model)}
    W0 = {name: w.clone() for name, w, _ in li.deltas(model)}
    li.eject(model).save_pretrained(tmp_path / "base")
    if in_place:
        report, out = li.merge_in_place(tmp_path / "base", tmp_path / "adapter", check_base=False), tmp_path / "base"
    else:
        out = tmp_path / "out"
        report = li.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", out, check_base=False)
    merged = type(model).from_pretrained(out, dtype=torch.bfloat16)
    assert {site.path for site in report.sites} == deltas.keys()
    for site in report.sites:
        assert_measured(site, W0[site.path], merged.get_submodule(site.path).weight, deltas[site.path])
        assert site.survival < 0.9


@given(data=st.data())
def test_survival_of_any_matrix_is_measured(data):
    """It does not depend on the shape, the rank, the scale, or where the delta is concentrated."""
    out, in_, r = (data.draw(st.integers(1, n)) for n in (300, 2200, 8))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
    alpha = data.draw(st.sampled_from([1e-3, 0.7, 1.0, 32.0]))
    model = nn.Sequential(nn.Linear(in_, out, bias=False, dtype=dtype))
    li.inject(model, ["0"], r=r, alpha=alpha)
    adapter = model[0].lora["default"]
    seed = data.draw(st.integers(0, 1000))
    adapter.A.data.copy_(randn(r, in_, seed=seed) * 4 ** randn(in_, seed=seed + 1))
    adapter.B.data.copy_(randn(out, r, seed=seed + 2) * 0.01 * 4 ** randn(out, 1, seed=seed + 3))
    W0, d = model[0].weight.detach().clone(), adapter.scale * product(model)
    site = li.merge(model, reversible=data.draw(st.booleans())).sites[0]
    assert_measured(site, W0, model[0].weight, d)
