"""The low-rank term of a linear layer, on every route that it takes, beside the formula in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import checkpoint

import lorainject as li
from lorainject.lora.adapter import LoraAdapter
from lorainject.lora.kernels import gemm, per_row
from lorainject.lora.kernels.lora_linear import accumulate
from lorainject.lora.weight_kinds import returns_fresh_output

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
I, O = 24, 20  # noqa: E741


def low_rank(
    r: int = 3, *, slices: tuple[range, ...] | None = None, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> LoraAdapter:
    g = torch.Generator().manual_seed(1)
    rows = O if slices is None else sum(map(len, slices))
    A, B = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((r, I), (rows, r)))
    return LoraAdapter(A, B, alpha=5, scaling="standard", dropout=dropout, init="kaiming", slices=slices, out=O)


def exact(a: LoraAdapter, y: Tensor, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y + s x A^T B^T and the gradients for y, x, A and B, in float64, by autograd through the formula."""
    y, x, A, B = (t.detach().double().requires_grad_() for t in (y, x, a.A, a.B))
    term = a.scale * (x @ A.T @ B.T)
    if a.slices is not None:
        term = torch.zeros_like(y).index_add(-1, torch.tensor([i for part in a.slices for i in part]), term)
    out = y + term
    return [out.detach(), *torch.autograd.grad(out, (y, x, A, B), dy.double())]


@st.composite
def inputs(draw) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and dy in one dtype and several layouts."""
    dtype = draw(st.sampled_from(DTYPES))
    batch = draw(st.sampled_from([(1,), (2,), (17,), (131,), (1, 1), (2, 9), (3, 1, 4), (0,), (2, 0)]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x, y, dy = (torch.randn(*batch, n, generator=g, dtype=torch.float64).to(dtype) for n in (I, O, O))
    if draw(st.booleans()):
        x, dy = (
            (t.mT.contiguous().mT for t in (x, dy)) if len(batch) > 1 else (x.expand(x.shape), dy.t().contiguous().t())
        )
    return x, y, dy


@pytest.mark.parametrize("large", [gemm.LARGE, 1])  # with 1, all that is float32 goes some rows at a time
@pytest.mark.parametrize("instructions", [True, False])
@given(
    inputs(),
    st.integers(1, 5),
    st.sampled_from([None, (range(4, 9),), (range(3), range(10, 20)), (range(0, 20, 3),)]),
    st.booleans(),
    st.booleans(),
)
def test_the_formula(large, instructions, xy, r, slices, own, views):
    """Output and every gradient, in each dtype, layout, size and slice, with and without half-precision instructions."""
    x, y, dy = xy
    a = low_rank(r, slices=slices, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "_has_instructions", lambda half: instructions)
        patch.setattr(gemm, "CAST", 60)
        patch.setattr(gemm, "LARGE", large)
        for t in (x, y):
            t.requires_grad_()
        made = (y.clone() if not views else y.clone().view(1, *y.shape)[0]) if own else y
        out = a(accumulate, made, x, own)
        found = [out.detach(), *torch.autograd.grad(out, (y, x, a.A, a.B), dy)]
        with torch.no_grad():
            silent = a(accumulate, y.detach().clone(), x, own)
    eps = torch.finfo(x.dtype).eps
    for got, want in zip(found, exact(a, y, x, dy), strict=True):
        assert got.shape == want.shape
        assert torch.allclose(
            got.double(),
            want,
            rtol=20 * eps,
            atol=20 * eps * max(1.0, float(want.abs().max()) if want.numel() else 1.0),
        )
    assert torch.allclose(
        silent.double(),
        found[0].double(),
        rtol=4 * eps,
        atol=8 * eps * max(1.0, float(silent.abs().max()) if silent.numel() else 1.0),
    )


@pytest.mark.parametrize("slices", [None, (range(3),), (range(0, 20, 3),)], ids=str)
def test_a_scale_that_float32_does_not_hold(slices):
    """On every route the same, 5/3, beside float64."""
    a = low_rank(slices=slices, dtype=torch.float64)
    x, y = torch.randn(4, I, dtype=torch.float64), torch.randn(4, O, dtype=torch.float64)
    assert torch.allclose(a(accumulate, y.clone(), x, True), exact(a, y, x, y)[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_scale_is_float32_unless_A_is_float64(dtype):
    assert low_rank(dtype=dtype).s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("slices", [None, (range(1), range(3, 5))], ids=str)
@pytest.mark.parametrize("own", [True, False])
def test_gradients_of_first_and_second_order(dropout, slices, own):
    """gradcheck and gradgradcheck, with a seed that is the same each time."""
    rows = 5 if slices is None else 3
    A, B = torch.randn(2, 4, dtype=torch.float64), torch.randn(rows, 2, dtype=torch.float64)
    a = LoraAdapter(A, B, alpha=3, scaling="standard", dropout=dropout, init="kaiming", slices=slices, out=5).train()

    def f(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(3)
        return torch.func.functional_call(a, {"A": A, "B": B}, (accumulate, y * 1, x, own))

    args = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 1, 5), (2, 1, 4))] + [
        a.A,
        a.B,
    ]
    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args)


def layers(n: int = 1, *, bias: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(64, 64, bias=bias, dtype=dtype) for _ in range(n)])
    li.inject(model, [str(i) for i in range(n)], r=4, alpha=8, dropout=dropout)
    with torch.no_grad():
        for p in li.parameters(model):
            p.normal_(std=0.2)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(48, 64), (2, 24, 64)], ids=str)
def test_nothing_of_the_outputs_size_is_allocated(bias, grad, shape, monkeypatch):
    """The output's memory is that which the base's own forward has made."""
    model, made = layers(bias=bias), []
    original = nn.Linear.forward

    def forward(self, x):
        made.append(original(self, x))
        return made[-1]

    monkeypatch.setattr(nn.Linear, "forward", forward)
    li.eject(model)  # a class of our own holds the forward that it saw
    li.inject(model, ["0"], r=4)
    with torch.set_grad_enabled(grad):
        y = model[0](torch.randn(shape, requires_grad=grad))
    assert y.untyped_storage().data_ptr() == made[0].untyped_storage().data_ptr()
    assert y.shape == (*shape[:-1], 64)


def saved(call) -> int:
    """Bytes that autograd keeps, parameters and each memory once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter) and not isinstance(t._base, nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    assert y is not None
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_saved_for_backward(dtype, dropout):
    """Three layers that read one x save it once, and of width r each an h and a cast of A and B; dropout adds nothing."""
    model, x = layers(3, dropout=dropout, dtype=dtype).train(), torch.randn(2, 512, 64, dtype=dtype)
    thin = 3 * 4 * (1024 + 2 * 64) * 4
    assert x.nbytes <= saved(lambda: [layer(x) for layer in model]) <= x.nbytes + thin


def test_the_output_may_be_changed_in_place_afterwards():
    """As a residual connection does, in the forward and before the backward."""
    for bias in (False, True):
        model, x = layers(bias=bias), torch.randn(2, 5, 64)
        model[0](x).add_(1).mul_(2).sum().backward()
        first = [p.grad.clone() for p in li.parameters(model)]
        model.zero_grad()
        ((model[0](x) + 1) * 2).sum().backward()
        for a, p in zip(first, li.parameters(model), strict=True):
            assert torch.allclose(a, p.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_under_checkpointing(reentrant):
    """The mask that the forward drew is the one that the backward uses, when the forward runs again too; another forward draws another."""
    model, x = layers(dropout=0.5).train(), torch.randn(3, 64, requires_grad=True)

    def grads(run) -> list[Tensor]:
        torch.manual_seed(5)
        model.zero_grad()
        run().square().sum().backward()
        return [p.grad.clone() for p in li.parameters(model)]

    plain = grads(lambda: model[0](x))
    again = grads(lambda: checkpoint.checkpoint(model[0], x, use_reentrant=reentrant))
    assert all(map(torch.equal, plain, again))
    assert not torch.equal(model[0](x), model[0](x))


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("slices", [None, (range(3), range(10, 20))])
@pytest.mark.parametrize(("of_x", "of_y"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_base_whose_output_is_of_another_dtype(of_x, of_y, slices, instructions, monkeypatch):
    """Output and every gradient, each in its own dtype, cast some rows at a time."""
    monkeypatch.setattr(gemm, "CAST", 60)
    monkeypatch.setattr(gemm, "_has_instructions", lambda half: instructions)
    a, x, y = (
        low_rank(slices=slices),
        torch.randn(131, I, dtype=of_x, requires_grad=True),
        torch.randn(131, O, dtype=of_y, requires_grad=True),
    )
    out, dy = a(accumulate, y.clone(), x, True), torch.randn(131, O, dtype=of_y)
    found = [out.detach(), *torch.autograd.grad(out, (y, x, a.A, a.B), dy)]
    assert [t.dtype for t in found] == [of_y, of_y, of_x, torch.float32, torch.float32]
    most = torch.finfo(torch.bfloat16).eps * (
        2 if instructions else 1
    )  # A, B, x, h and dy are rounded, or the output alone
    for got, want in zip(found, exact(a, y, x, dy), strict=True):
        assert float((got.double() - want).norm() / want.norm()) < most


def test_dropout_keeps_the_mean_and_drops_its_share():
    """Elements are zero with probability p, the others 1 / (1 - p) times as large."""
    masks = torch.cat([m for _, m in gemm._dropped(torch.ones(500, 100), torch.float32, 0.3, seed=1)])
    assert masks.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert float(masks.mean()) == pytest.approx(1.0, abs=0.02)


def test_autocast_is_followed():
    """Under autocast to bfloat16 the output has the base's dtype, and float32 gradients reach A and B."""
    model, x = layers(), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = model[0](x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    want = model[0](x).detach()
    assert torch.allclose(y.float(), want, atol=0.05 * float(want.abs().max()))
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in li.parameters(model))


def test_transforms_of_functions():
    """vmap, jvp and func.grad see the formula in plain operators."""
    model = layers()
    x = torch.randn(5, 64)
    assert torch.allclose(torch.vmap(model[0])(x), model[0](x), atol=1e-5)
    value, tangent = torch.func.jvp(model[0], (x,), (torch.ones_like(x),))
    assert torch.allclose(value, model[0](x), atol=1e-5)
    assert torch.allclose(tangent, model[0](x + 1) - model[0](x), atol=1e-4)
    per_sample = torch.vmap(torch.func.grad(lambda v: model[0](v).sum()))(x)
    assert torch.allclose(per_sample[0], torch.func.grad(lambda v: model[0](v).sum())(x[0]), atol=1e-5)


def test_selective_checkpointing_keeps_what_it_kept():
    """A policy that keeps a product's output may not find it changed."""
    model, x = layers(), torch.randn(4, 64, requires_grad=True)

    def policy(ctx, op, *args, **kwargs):
        return (
            checkpoint.CheckpointPolicy.MUST_SAVE
            if op is torch.ops.aten.mm.default
            else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
        )

    def context():
        return checkpoint.create_selective_checkpoint_contexts(policy)

    y = checkpoint.checkpoint(lambda x: model[0](x).sin(), x, use_reentrant=False, context_fn=context)
    y.sum().backward()
    got = [p.grad.clone() for p in li.parameters(model)]
    model.zero_grad()
    model[0](x).sin().sum().backward()
    for a, p in zip(got, li.parameters(model), strict=True):
        assert torch.allclose(a, p.grad, atol=1e-6)


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_frozen_factor_gets_no_gradient(frozen):
    """LoRA-FA freezes A; x gets its gradient all the same."""
    model, x = layers(), torch.randn(4, 64, requires_grad=True)
    a = model[0].lora["default"]
    getattr(a, frozen).requires_grad_(False)
    model[0](x).sum().backward()
    assert getattr(a, frozen).grad is None
    assert getattr(a, "B" if frozen == "A" else "A").grad is not None
    assert x.grad is not None


def test_whose_output_may_be_written_to():
    """A layer's own, if its forward is that of its kind: a subclass may hand out memory that it still needs."""

    class Remembers(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            return self.last

    assert returns_fresh_output(nn.Linear)
    assert returns_fresh_output(type("Plain", (nn.Linear,), {}))
    assert not returns_fresh_output(Remembers)
    assert not returns_fresh_output(nn.Conv1d)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
@given(data=st.data())
def test_rows_of_a_batch(dtype, grad, data):
    """Any choice of adapters of different ranks by row, short and long rows: each row as its adapter alone would do it, and None as the base."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 50, bias=data.draw(st.booleans()), dtype=dtype))
    for i, name in enumerate("abc"):
        li.inject(model, [data.draw(st.sampled_from(["0", "0[0:7]"]))] if i else ["0"], r=i + 1, alpha=i + 2, name=name)
        with torch.no_grad():
            for p in li.parameters(model):
                p.normal_(std=0.3)
    names = data.draw(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=6))
    tokens = data.draw(st.sampled_from([1, 7, 30]))
    x = torch.randn(len(names), tokens, 64, dtype=dtype)
    want = []
    with torch.set_grad_enabled(grad):
        for name, row in zip(names, x, strict=True):
            li.activate(model, *([name] if name else []))
            want.append(model(row[None])[0])
        if tokens == len(names) > 1:
            return
        with li.rows(model, names):
            got, again = model(x), model(x)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(got, torch.stack(want), rtol=8 * eps, atol=30 * eps)
    assert torch.equal(got, again)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["0", "0[3:10,20:40]"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    ("names", "lanes", "moved"),
    [
        ("c.abac", 6, False),
        ("abcabcabc", 3, True),
        ("aaabbbccc", 3, False),
        ("aaaab.aacaaa", 6, True),
    ],  # last not all full
)
def test_short_rows_of_many_adapters(dtype, target, mixed, tokens, names, lanes, moved, monkeypatch):
    """In two batched products: adapters of other ranks, scales and dtypes, on a whole weight and on two slices, and rows of the base."""
    torch.manual_seed(0)
    model, used = nn.Sequential(nn.Linear(64, 50, dtype=dtype)), []
    for i, name in enumerate("abc"):
        li.inject(model, [target], r=i + 1, alpha=i + 2, name=name)
        with torch.no_grad():
            for p in li.parameters(model):
                p.normal_(std=0.3)
    low = next(m["a"] for m in model[0].children())
    if mixed:
        low.bfloat16()
    names = [None if name == "." else name for name in names]
    x, want = torch.randn(len(names), tokens, 64, dtype=dtype), []
    monkeypatch.setattr(
        per_row.PerRowTerms, "add", lambda self, y, x, add=per_row.PerRowTerms.add: used.append(self) or add(self, y, x)
    )
    with torch.no_grad():
        for name, row in zip(names, x, strict=True):
            li.activate(model, *([name] if name else []))
            want.append(model(row[None])[0])
        with li.rows(model, names):
            got = model(x)
    assert [(len(each.A_LRI), each.moves is not None) for each in used] == [(lanes, moved)] * len(
        list(model[0].children())
    )
    eps = torch.finfo(dtype).eps
    assert torch.allclose(got, torch.stack(want), rtol=8 * eps, atol=30 * eps)


def _replace(low: nn.Module) -> None:
    low.A = nn.Parameter(-low.A)


def _exchange(low: nn.Module) -> None:
    low.B.data = -low.B


CHANGES = {
    "written to": lambda low: low.B.mul_(-1),
    "replaced": _replace,
    "exchanged": _exchange,
    "hooked": lambda low: low.register_forward_hook(lambda m, args, y: y - 2 * (y - args[1])),
    "patched": lambda low: setattr(
        low, "forward", lambda term, y, x, *more: 2 * y - type(low).forward(low, term, y.clone(), x, *more)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_see_adapters_that_change(change, monkeypatch):
    """What is kept of them for a batch of short rows is made anew, or not used, when one has changed: here each change turns its sign."""
    model, x, names = nn.Sequential(nn.Linear(64, 48)), torch.randn(4, 1, 64), ["a", "b", "c"]
    for name in names:
        li.inject(model, ["0"], r=4, name=name)
    with torch.no_grad():
        for p in li.parameters(model):
            p.normal_(std=0.3)
    made = []
    monkeypatch.setattr(
        per_row.PerRowTerms, "add", lambda self, y, x, add=per_row.PerRowTerms.add: made.append(self) or add(self, y, x)
    )
    with torch.no_grad(), li.rows(model, [*names, None]):
        first = model(x)
        again = model(x)
        assert len(made) == 2
        assert made[0] is made[1]
        CHANGES[change](model[0].lora["b"])
        second = model(x)
        assert made[0] not in made[2:]
    plain = nn.functional.linear(x, model[0].weight, model[0].bias)
    assert torch.equal(first, again)
    assert torch.allclose(second[1] - plain[1], plain[1] - first[1], atol=1e-5)
    assert torch.allclose(second[[0, 2, 3]], first[[0, 2, 3]], atol=1e-5)
    assert torch.equal(first[3], plain[3])


def test_rows_under_autocast_and_with_dropout():
    """Short rows: a forward in bfloat16 amid those in float32, and one in which some of x is dropped."""
    model, x, names = nn.Sequential(nn.Linear(64, 48)), torch.randn(3, 1, 64), ["a", "b", "c"]
    for name in names:
        li.inject(model, ["0"], r=4, name=name, dropout=0.5)
    with torch.no_grad():
        for p in li.parameters(model):
            p.normal_(std=0.3)
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
