"""Projections that share the product with A: what they compute, when they may, and that nothing of it is left."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import checkpoint

import lorainject as li
from lorainject.lora.kernels import gemm, shared_input
from lorainject.lora.model_index import adapted_sites
from lorainject.targets.roles import input_group

D = 16


def same(x: Tensor) -> Tensor:
    return x


class Attention(nn.Module):
    """Three projections of one input, or of what `between` makes of it."""

    def __init__(self, bias: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, n, bias=bias, dtype=dtype) for n in (D, 8, 8))
        self.between = same

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(self.between(x)), self.v_proj(self.between(x))


def adapted(ranks: tuple[int, ...] = (3, 2, 4), names: tuple[str, ...] = ("default",), **given: object) -> Attention:
    model = Attention(**given)  # type: ignore[arg-type]
    for name in names:
        overrides = {p: {"r": r} for p, r in zip(("q_proj", "k_proj", "v_proj"), ranks, strict=True)}
        li.inject(model, list(overrides), overrides=overrides, name=name, alpha=5)
    li.activate(model, *names)
    for p in li.parameters(model):
        nn.init.normal_(p)
    return model


pays = shared_input.pays


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(shared_input, "pays", lambda x: True)


@pytest.fixture
def products(monkeypatch):
    """The widths of the products with A that are made for several."""
    made, lowered = [], shared_input.lowered
    monkeypatch.setattr(shared_input, "lowered", lambda x, A: made.append(len(A)) or lowered(x, A))
    return made


def apart(model: Attention) -> Attention:
    """The same, each by itself."""
    other = copy.deepcopy(model)
    for host in adapted_sites(other).values():
        host.adapters.siblings = None
    return other


def found(model: Attention, x: Tensor, dys: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of x, A and B."""
    leaf = x.clone().requires_grad_()
    ys = model(leaf * 1)
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, [leaf, *li.parameters(model)], dys)]


@pytest.mark.parametrize("instructions", [True, False])
def test_where_it_pays(instructions, monkeypatch):
    """On a CPU, for a large input that is cast, and for no other."""
    monkeypatch.setattr(gemm, "_has_instructions", lambda half: instructions)
    few, many, small = torch.ones(1, 64, 1024), torch.ones(1, 128, 1024), torch.ones(1, 1, 1024)
    assert not any(map(pays, (few, many, small)))
    assert [pays(x.bfloat16()) for x in (few, many, small)] == [True, not instructions, False]


@given(
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([(1,), (5,), (2, 7), (3, 1, 2), (0,)]),
    st.tuples(*[st.integers(1, 5)] * 3),
    st.booleans(),
    st.sampled_from([("default",), ("a", "b")]),
    st.booleans(),
)
def test_the_same_as_each_by_itself(dtype, batch, ranks, bias, names, trains):
    """Outputs and every gradient, whatever the dtype, shape, ranks, number of adapters that are on, and also of A that does not train."""
    torch.manual_seed(0)
    model = adapted(ranks, names, bias=bias, dtype=dtype)
    next(li.parameters(model)).requires_grad_(trains)
    x, dys = torch.randn(*batch, D).to(dtype), [torch.randn(*batch, n).to(dtype) for n in (D, 8, 8)]
    eps = torch.finfo(dtype).eps
    other, exact = apart(model), apart(model).double()
    want = found(exact, x.double(), [dy.double() for dy in dys])
    for one, two, true in zip(found(model, x, dys), found(other, x, dys), want, strict=True):
        most = float(true.abs().max()) if true.numel() else 1.0
        assert torch.allclose(one.double(), true, rtol=20 * eps, atol=20 * eps * max(1.0, most))
        assert torch.allclose(one, two, rtol=20 * eps, atol=20 * eps * max(1.0, most))
    with torch.no_grad():
        for one, true in zip(model(x), want, strict=False):
            assert torch.allclose(
                one.double(),
                true,
                rtol=20 * eps,
                atol=20 * eps * max(1.0, float(true.abs().max()) if true.numel() else 1.0),
            )


@pytest.mark.parametrize("train", [True, False])
def test_one_product(products, train):
    model, x = adapted(), torch.randn(4, D, requires_grad=train)
    with torch.set_grad_enabled(train):
        model(x * 1), model(x * 1)
    assert products == [9, 9]


def test_slices_of_one_weight(products):
    """They share without any name that says so."""
    model = nn.ModuleDict({"c_attn": nn.Linear(D, 24)})
    li.inject(model, ["c_attn[0:8]", "c_attn[16:24]"], r=2)
    for p in li.parameters(model):
        nn.init.normal_(p)
    x = torch.randn(3, D)
    with torch.no_grad():
        y = model["c_attn"](x)
    assert products == [4]
    for host in adapted_sites(model).values():
        host.adapters.siblings = None
    with torch.no_grad():
        assert torch.allclose(y, model["c_attn"](x), atol=1e-5)


def written(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.mul_(2)


@pytest.mark.parametrize(
    "between",
    [lambda x: x.clone(), lambda x: x * 2, lambda x: x.view(x.shape), written],
    ids=["copy", "other", "view", "write"],
)
def test_another_input_is_another(between, products):
    """Whatever happens to x on the way, each gets the term of its own; and the next time nobody computes for others in vain."""
    model = adapted()
    model.between = between
    other = apart(model)
    with torch.no_grad():
        x = torch.randn(4, D)
        for _ in range(2):
            for one, two in zip(model(x.clone()), other(x.clone()), strict=True):
                assert torch.allclose(one, two, atol=1e-5)
    assert products == [9]


def test_an_adapter_that_changed_in_between():
    model, x = adapted(), torch.randn(4, D)
    with torch.no_grad():
        model.q_proj(x)
        model.k_proj.lora["default"].A.mul_(2)
        assert torch.allclose(model.k_proj(x), apart(model).k_proj(x), atol=1e-5)


def test_switched_in_between():
    """What was made for one adapter is not used for another, nor with gradients what was made without."""
    model, x = adapted(names=("a", "b")), torch.randn(4, D, requires_grad=True) * 1
    with torch.no_grad():
        li.activate(model, "a")
        model.q_proj(x)
        li.activate(model, "b")
        assert torch.allclose(model.k_proj(x), apart(model).k_proj(x), atol=1e-5)
        model.q_proj(x)
    y = model.k_proj(x)
    y.sum().backward()
    assert model.k_proj.lora["b"].A.grad is not None


@pytest.mark.parametrize("needs", [True, False])
def test_each_output_has_a_backward_of_its_own(needs, products):
    """Where x is a leaf, as for the base alone."""
    model, x = adapted(), torch.randn(4, D, requires_grad=needs)
    for y in model(x):
        y.sum().backward()
    assert not products
    assert all(p.grad is not None for p in li.parameters(model))


def test_dropout_and_hooks_keep_to_themselves(products):
    model = Attention()
    li.inject(model, ["q_proj", "k_proj", "v_proj"], dropout=0.5)
    model(torch.randn(4, D))
    assert not products
    model.eval()
    model.v_proj.lora["default"].register_forward_pre_hook(lambda m, args: None)
    with torch.no_grad():
        model(torch.randn(4, D))
    assert products == [16]  # q and k


def test_factors_that_are_not_there_yet(products):
    """Exchanged for a call (functional_call), or sharded until their own layer runs: theirs is not taken beforehand."""
    model, x = adapted(), torch.randn(4, D)
    other = apart(model)
    given = {"k_proj.lora.default.A": torch.randn(2, D)}
    with torch.no_grad():
        for one, two in zip(
            torch.func.functional_call(model, given, x), torch.func.functional_call(other, given, x), strict=True
        ):
            assert torch.allclose(one, two, atol=1e-5)
        assert products == [7]  # q and v
        model.v_proj.lora["default"].A.data = torch.empty(0)  # as FSDP leaves it
        model.q_proj(x)
    assert products == [7, 5]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, products):
    model = adapted()
    x, dys = torch.randn(4, D), [torch.randn(4, n) for n in (D, 8, 8)]
    leaf = x.clone().requires_grad_()
    ys = checkpoint.checkpoint(model, leaf * 1, use_reentrant=reentrant)
    torch.autograd.backward(ys, dys)
    assert (
        len(products) == reentrant
    )  # the forward without gradients; then x is a leaf, or what is saved is packed away
    for got, want in zip(
        [leaf.grad, *(p.grad for p in li.parameters(model))], found(apart(model), x, dys)[3:], strict=True
    ):
        assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_nothing_is_left(train, fails):
    """Not the input, nor the graph, nor the product, whether all came to take it or the forward broke off."""
    model = adapted()

    def stop(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    if fails:
        model.between = stop
    with torch.set_grad_enabled(train):
        leaf = torch.randn(4, D, requires_grad=train)
        x = leaf * 1
        seen = weakref.ref(x)
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            model(x)
        del x, leaf
    gc.collect()
    made = model.q_proj.lora.siblings.made
    assert seen() is None
    assert made is None or made.h() is None


def test_copies_know_their_own():
    """A copied, and a pickled model share among themselves, and hold nothing of the original."""
    model, x = adapted(), torch.randn(4, D)
    with torch.no_grad():
        want = model(x)
        model.q_proj(x)  # something is made
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            mine = other.q_proj.lora.siblings
            assert mine.made is None
            assert all(
                m is n.lora for m, n in zip(mine.members, (other.q_proj, other.k_proj, other.v_proj), strict=True)
            )
            assert all(torch.equal(a, b) for a, b in zip(want, other(x), strict=True))


def test_nothing_is_made_for_one_alone(products):
    model = adapted(names=("b",))
    li.inject(model, ["q_proj"], name="a")
    with torch.no_grad():
        model(torch.randn(4, D))
    assert not products


def test_adapters_that_came_one_by_one():
    model = Attention()
    li.inject(model, ["q_proj"], name="a")
    li.inject(model, ["k_proj", "v_proj"], name="b")
    assert len(model.q_proj.lora.siblings.members) == 3
    li.activate(model, "a", "b")
    x = torch.randn(4, D)
    with torch.no_grad():
        model(x)
        li.eject(model, "b")
        assert torch.allclose(model(x)[0], apart(model)(x)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("paths", "together"),
    [
        ("layers.0.self_attn.q_proj layers.0.self_attn.v_proj", True),
        ("layer.0.attention.self.query layer.0.attention.self.key", True),
        ("layers.0.mlp.gate_proj layers.0.mlp.up_proj", True),
        ("layers.0.self_attn.q_proj layers.1.self_attn.q_proj", False),
        ("layers.0.encoder_attn.q_proj layers.0.encoder_attn.k_proj", False),
        ("layers.0.encoder_attn.v_proj layers.0.encoder_attn.k_proj", True),
        ("block.0.layer.1.EncDecAttention.q block.0.layer.1.EncDecAttention.k", False),
        ("layers.0.self_attn.q_proj layers.0.self_attn.o_proj", False),
        ("layers.0.mlp.up_proj layers.0.mlp.down_proj", False),
    ],
)
def test_who_may_be_siblings(paths, together):
    one, other = map(input_group, paths.split())
    assert (bool(one) and one == other) == together
