"""rows(...): every row of a batch gets the term of its own adapter, whichever kernel adds it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lorainject as li
from lorainject.lora.kernels import per_row


def randomize(model: nn.Module) -> None:
    """Fill A and B of the active adapters with random numbers."""
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.normal_(std=0.3)


def row_by_row(model: nn.Module, names: list[str | None], x: Tensor) -> Tensor:
    """Return the outputs of the rows, each computed alone, with its adapter active."""
    outputs = []
    for name, row in zip(names, x, strict=True):
        with li.using(model, *([name] if name else [])):
            outputs.append(model(row[None])[0])
    return torch.stack(outputs)


@pytest.fixture
def kernels_used(monkeypatch) -> list[per_row.PerRowTerms]:
    """Return a list to which every use of the batched kernel is appended."""
    used: list[per_row.PerRowTerms] = []
    add_terms = per_row.PerRowTerms.add_terms
    monkeypatch.setattr(per_row.PerRowTerms, "add_terms", lambda self, y, x: used.append(self) or add_terms(self, y, x))
    return used


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
@given(data=st.data())
def test_every_row_is_computed_as_by_its_adapter_alone(dtype, grad, data):
    """For adapters of different ranks, for short and long rows, and for rows of the base (None)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 50, bias=data.draw(st.booleans()), dtype=dtype))
    for i, name in enumerate("abc"):
        li.inject(model, [data.draw(st.sampled_from(["0", "0[0:7]"]))] if i else ["0"], r=i + 1, alpha=i + 2, name=name)
        randomize(model)
    li.activate(model, *"abc")
    names = data.draw(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=6))
    tokens = data.draw(st.sampled_from([1, 7, 30]))
    x = torch.randn(len(names), tokens, 64, dtype=dtype)
    if tokens == len(names) > 1:  # such a batch is refused, because it may be transposed
        return
    with torch.set_grad_enabled(grad):
        expected = row_by_row(model, names, x)
        with li.rows(model, names):
            result, again = model(x), model(x)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(result, expected, rtol=8 * eps, atol=30 * eps)
    assert torch.equal(result, again)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["0", "0[3:10,20:40]"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("pattern", ["c.abac", "abcabcabc", "aaabbbccc", "aab.aca"])
def test_short_rows_take_the_batched_kernel(dtype, target, mixed, tokens, pattern, kernels_used):
    """Adapters of other ranks, scales and dtypes, on a whole weight and on two slices, and rows of the base (".")."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 50, dtype=dtype))
    for i, name in enumerate("abc"):
        li.inject(model, [target], r=i + 1, alpha=i + 2, name=name)
        randomize(model)
    adapters = next(iter(model[0].children()))
    if mixed:
        adapters["a"].bfloat16()
    names = [None if name == "." else name for name in pattern]
    x = torch.randn(len(names), tokens, 64, dtype=dtype)
    with torch.no_grad():
        expected = row_by_row(model, names, x)
        with li.rows(model, names):
            result = model(x)
    assert [len(kernel.A_NRI) for kernel in kernels_used] == [len(names)] * len(list(model[0].children()))
    eps = torch.finfo(dtype).eps
    assert torch.allclose(result, expected, rtol=8 * eps, atol=30 * eps)


def test_copies_larger_than_the_weight_are_not_made(kernels_used):
    """The factors of 20 rows would take more memory than the weight; the adapters then run one after the other."""
    model, names = nn.Sequential(nn.Linear(64, 50)), ["a", "b", "c", None] * 5
    for name in "abc":
        li.inject(model, ["0"], r=4, name=name)
        randomize(model)
    x = torch.randn(len(names), 1, 64)
    with torch.no_grad():
        expected = row_by_row(model, names, x)
        with li.rows(model, names):
            result = model(x)
    assert not kernels_used
    assert torch.allclose(result, expected, atol=1e-5)


def _replace(adapter: nn.Module) -> None:
    adapter.A = nn.Parameter(-adapter.A)


def _exchange(adapter: nn.Module) -> None:
    adapter.B.data = -adapter.B


CHANGES = {
    "written to": lambda adapter: adapter.B.mul_(-1),
    "replaced": _replace,
    "other memory": _exchange,
    "hooked": lambda adapter: adapter.register_forward_pre_hook(lambda m, args: (*args[:2], -args[2], args[3])),
    "patched": lambda adapter: setattr(
        adapter, "forward", lambda term, y, *rest: 2 * y - type(adapter).forward(adapter, term, y.clone(), *rest)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_an_adapter_within_the_context_is_seen(change, kernels_used):
    """The copies are made anew, or not used, when an adapter has changed. Here every change inverts the sign of its
    term."""
    model, x, names = nn.Sequential(nn.Linear(64, 48)), torch.randn(4, 1, 64), ["a", "b", "c"]
    for name in names:
        li.inject(model, ["0"], r=4, name=name)
    with torch.no_grad():
        for adapter in model[0].lora.children():
            for p in adapter.parameters():
                p.normal_(std=0.3)
    with torch.no_grad(), li.rows(model, [*names, None]):
        first = model(x)
        again = model(x)
        assert len(kernels_used) == 2
        assert kernels_used[0] is kernels_used[1]
        CHANGES[change](model[0].lora["b"])
        second = model(x)
        assert kernels_used[0] not in kernels_used[2:]
    plain = nn.functional.linear(x, model[0].weight, model[0].bias)
    assert torch.equal(first, again)
    assert torch.allclose(second[1] - plain[1], plain[1] - first[1], atol=1e-5)
    assert torch.allclose(second[[0, 2, 3]], first[[0, 2, 3]], atol=1e-5)
    assert torch.equal(first[3], plain[3])


def test_autocast_and_dropout_within_the_context():
    """A forward in bfloat16 and one with dropout leave the next float32 forward as it was."""
    model, x, names = nn.Sequential(nn.Linear(64, 48)), torch.randn(3, 1, 64), ["a", "b", "c"]
    for name in names:
        li.inject(model, ["0"], r=4, name=name, dropout=0.5)
        randomize(model)
    with torch.no_grad():
        model.eval()
        with li.rows(model, names):
            first = model(x)
            with torch.autocast("cpu", torch.bfloat16):
                half = model(x)
            dropped = model.train()(x)
            assert torch.equal(model.eval()(x), first)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), first, atol=0.05 * float(first.abs().max()))
    assert not torch.allclose(dropped, first, atol=1e-3)
