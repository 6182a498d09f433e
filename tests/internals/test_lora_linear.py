"""add_linear_term: its output and gradients against the formula in float64, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import checkpoint

import lorainject as li
from lorainject.lora.adapter import LoraAdapter
from lorainject.lora.kernels import gemm
from lorainject.lora.kernels.lora_linear import add_linear_term
from lorainject.lora.weight_kinds import returns_fresh_output

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
I, O = 24, 20  # noqa: E741


def make_adapter(
    r: int = 3, *, slices: tuple[range, ...] | None = None, dtype: torch.dtype = torch.float32
) -> LoraAdapter:
    """Return an adapter with random factors for a layer with I inputs and O outputs."""
    g = torch.Generator().manual_seed(1)
    rows = O if slices is None else sum(map(len, slices))
    A, B = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((r, I), (rows, r)))
    return LoraAdapter(A, B, alpha=5, scaling="standard", dropout=0.0, init="kaiming", slices=slices, out=O)


def formula(a: LoraAdapter, y: Tensor, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Return y + s x A^T B^T and the gradients of y, x, A and B, in float64, by autograd."""
    y, x, A, B = (t.detach().double().requires_grad_() for t in (y, x, a.A, a.B))
    term = a.scale * (x @ A.T @ B.T)
    if a.slices is not None:
        term = torch.zeros_like(y).index_add(-1, torch.tensor([i for part in a.slices for i in part]), term)
    output = y + term
    return [output.detach(), *torch.autograd.grad(output, (y, x, A, B), dy.double())]


def assert_close(result: Tensor, expected: Tensor, eps: float) -> None:
    """Assert that two tensors are equal within twenty roundings of the largest element."""
    assert result.shape == expected.shape
    largest = max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
    assert torch.allclose(result.double(), expected, rtol=20 * eps, atol=20 * eps * largest)


@st.composite
def inputs(draw) -> tuple[Tensor, Tensor, Tensor]:
    """Draw x, y and dy in one dtype and one of several shapes and memory layouts."""
    dtype = draw(st.sampled_from(DTYPES))
    batch = draw(st.sampled_from([(1,), (2,), (17,), (131,), (1, 1), (2, 9), (3, 1, 4), (0,), (2, 0)]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x, y, dy = (torch.randn(*batch, n, generator=g, dtype=torch.float64).to(dtype) for n in (I, O, O))
    if draw(st.booleans()):
        x, dy = (
            (t.mT.contiguous().mT for t in (x, dy)) if len(batch) > 1 else (x.expand(x.shape), dy.t().contiguous().t())
        )
    return x, y, dy


@pytest.mark.parametrize("grouped_size", [gemm.GROUPED_SIZE, 1])  # with 1, every float32 output is added to in groups
@pytest.mark.parametrize("has_instructions", [True, False])
@given(
    inputs(),
    st.integers(1, 5),
    st.sampled_from([None, (range(4, 9),), (range(3), range(10, 20)), (range(0, 20, 3),)]),
    st.booleans(),
    st.booleans(),
)
def test_output_and_gradients_are_those_of_the_formula(grouped_size, has_instructions, tensors, r, slices, ours, view):
    """For every dtype, layout, size and slice, with and without half-precision instructions, in training and not."""
    x, y, dy = tensors
    a = make_adapter(r, slices=slices, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "_has_half_instructions", lambda dtype: has_instructions)
        patch.setattr(gemm, "FEW_TOKENS", 4)
        patch.setattr(gemm, "CHUNK_SIZE", 60)
        patch.setattr(gemm, "GROUPED_SIZE", grouped_size)
        for t in (x, y):
            t.requires_grad_()
        fresh = (y.clone().view(1, *y.shape)[0] if view else y.clone()) if ours else y
        output = a(add_linear_term, fresh, x, ours)
        results = [output.detach(), *torch.autograd.grad(output, (y, x, a.A, a.B), dy)]
        kept = y.detach().clone()
        with torch.no_grad():
            inference = a(add_linear_term, kept.clone() if ours else kept, x, ours)
    eps, expected = torch.finfo(x.dtype).eps, formula(a, y, x, dy)
    for result, true in zip(results, expected, strict=True):
        assert_close(result, true, eps)
    assert_close(inference, expected[0], eps)
    assert torch.equal(kept, y.detach())


@pytest.mark.parametrize("ours", [True, False])
def test_the_term_is_added_in_place_only_if_the_output_is_ours(ours):
    a, x, y = make_adapter(), torch.randn(4, I), torch.randn(4, O)
    before = y.clone()
    with torch.no_grad():
        output = a(add_linear_term, y, x, ours)
    assert (output.data_ptr() == y.data_ptr()) == ours
    assert torch.equal(y, output if ours else before)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("slices", [None, (range(3),), (range(0, 20, 3),)], ids=str)
def test_a_scale_that_float32_cannot_represent_is_exact_in_float64(slices, grad):
    a = make_adapter(slices=slices, dtype=torch.float64)
    x, y = torch.randn(4, I, dtype=torch.float64), torch.randn(4, O, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        output = a(add_linear_term, y.clone(), x, True)
    assert torch.allclose(output, formula(a, y, x, y)[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_scale_is_float32_unless_A_is_float64(dtype):
    assert make_adapter(dtype=dtype).s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def adapted_layers(
    n: int = 1, *, bias: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return n linear layers of 64 features with random adapters."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(64, 64, bias=bias, dtype=dtype) for _ in range(n)])
    li.inject(model, [str(i) for i in range(n)], r=4, alpha=8, dropout=dropout)
    with torch.no_grad():
        for p in li.parameters(model):
            p.normal_(std=0.2)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(48, 64), (2, 24, 64)], ids=str)
def test_inference_writes_into_the_output_of_the_base_layer(bias, shape, monkeypatch):
    """Nothing of the size of the output is allocated, by the general way too."""
    base_outputs, original = [], nn.Linear.forward

    def forward(self, x):
        base_outputs.append(original(self, x))
        return base_outputs[-1]

    monkeypatch.setattr(nn.Linear, "forward", forward)
    model = adapted_layers(bias=bias)
    with torch.no_grad():
        y = model[0](torch.randn(shape))
    assert y.untyped_storage().data_ptr() == base_outputs[0].untyped_storage().data_ptr()
    assert y.shape == (*shape[:-1], 64)


def saved_bytes(call) -> int:
    """Return the bytes that autograd keeps for the backward of the call, parameters aside, every storage once."""
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
def test_layers_that_read_one_input_save_it_once(dtype, dropout):
    """Three layers save one x, and each an h and a cast of A and B, which are r wide. Dropout adds nothing."""
    model, x = adapted_layers(3, dropout=dropout, dtype=dtype).train(), torch.randn(2, 512, 64, dtype=dtype)
    thin = 3 * 4 * (1024 + 2 * 64) * 4
    assert x.nbytes <= saved_bytes(lambda: [layer(x) for layer in model]) <= x.nbytes + thin


def test_the_output_may_be_changed_in_place_before_the_backward():
    """A residual connection may add to the output in place."""
    for bias in (False, True):
        model, x = adapted_layers(bias=bias), torch.randn(2, 5, 64)
        model[0](x).add_(1).mul_(2).sum().backward()
        in_place = [p.grad.clone() for p in li.parameters(model)]
        model.zero_grad()
        ((model[0](x) + 1) * 2).sum().backward()
        for grad, p in zip(in_place, li.parameters(model), strict=True):
            assert torch.allclose(grad, p.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_dropout_mask(reentrant):
    """The recomputed forward drops what the first one dropped; another forward draws another mask."""
    model, x = adapted_layers(dropout=0.5).train(), torch.randn(3, 64, requires_grad=True)

    def gradients(run) -> list[Tensor]:
        torch.manual_seed(5)
        model.zero_grad()
        run().square().sum().backward()
        return [p.grad.clone() for p in li.parameters(model)]

    plain = gradients(lambda: model[0](x))
    again = gradients(lambda: checkpoint.checkpoint(model[0], x, use_reentrant=reentrant))
    assert all(map(torch.equal, plain, again))
    assert not torch.equal(model[0](x), model[0](x))


@pytest.mark.parametrize("has_instructions", [True, False])
@pytest.mark.parametrize("slices", [None, (range(3), range(10, 20))])
@pytest.mark.parametrize(("x_dtype", "y_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_base_layer_whose_output_has_another_dtype(x_dtype, y_dtype, slices, has_instructions, monkeypatch):
    """Every gradient has the dtype of its tensor, and the output is rounded no more than by the base itself."""
    monkeypatch.setattr(gemm, "CHUNK_SIZE", 60)
    monkeypatch.setattr(gemm, "_has_half_instructions", lambda dtype: has_instructions)
    a = make_adapter(slices=slices)
    x, y = (
        torch.randn(131, I, dtype=x_dtype, requires_grad=True),
        torch.randn(131, O, dtype=y_dtype, requires_grad=True),
    )
    output, dy = a(add_linear_term, y.clone(), x, True), torch.randn(131, O, dtype=y_dtype)
    results = [output.detach(), *torch.autograd.grad(output, (y, x, a.A, a.B), dy)]
    with torch.no_grad():
        results.append(a(add_linear_term, y.clone(), x, True))
    assert [t.dtype for t in results] == [y_dtype, y_dtype, x_dtype, torch.float32, torch.float32, y_dtype]
    limit = torch.finfo(torch.bfloat16).eps * (2 if has_instructions else 1)
    expected = formula(a, y, x, dy)
    for result, true in zip(results, [*expected, expected[0]], strict=True):
        assert float((result.double() - true).norm() / true.norm()) < limit


def test_dropout_keeps_the_mean_and_drops_its_share():
    """Elements are zero with probability p, and 1 / (1 - p) times as large otherwise."""
    masks = torch.cat([m for _, m in gemm._dropped_chunks(torch.ones(500, 100), torch.float32, 0.3, seed=1)])
    assert masks.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert float(masks.mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_decides_the_dtype(grad):
    """Under autocast to bfloat16 the output is that of the base in bfloat16, and A and B get float32 gradients."""
    model, x = adapted_layers(), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        y = model[0](x)
    assert y.dtype == torch.bfloat16
    expected = model[0](x).detach()
    assert torch.allclose(y.float(), expected, atol=0.05 * float(expected.abs().max()))
    if grad:
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in li.parameters(model))


def test_function_transforms_work():
    """vmap, jvp and func.grad see plain operators."""
    model, x = adapted_layers(), torch.randn(5, 64)
    assert torch.allclose(torch.vmap(model[0])(x), model[0](x), atol=1e-5)
    value, tangent = torch.func.jvp(model[0], (x,), (torch.ones_like(x),))
    assert torch.allclose(value, model[0](x), atol=1e-5)
    assert torch.allclose(tangent, model[0](x + 1) - model[0](x), atol=1e-4)
    per_sample = torch.vmap(torch.func.grad(lambda v: model[0](v).sum()))(x)
    assert torch.allclose(per_sample[0], torch.func.grad(lambda v: model[0](v).sum())(x[0]), atol=1e-5)


def test_selective_checkpointing_finds_the_outputs_that_it_kept():
    """A policy may keep the output of a product, which must not be written to then."""
    model, x = adapted_layers(), torch.randn(4, 64, requires_grad=True)

    def policy(ctx, op, *args, **kwargs):
        is_product = op is torch.ops.aten.mm.default
        return checkpoint.CheckpointPolicy.MUST_SAVE if is_product else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    def context():
        return checkpoint.create_selective_checkpoint_contexts(policy)

    y = checkpoint.checkpoint(lambda x: model[0](x).sin(), x, use_reentrant=False, context_fn=context)
    y.sum().backward()
    checkpointed = [p.grad.clone() for p in li.parameters(model)]
    model.zero_grad()
    model[0](x).sin().sum().backward()
    for grad, p in zip(checkpointed, li.parameters(model), strict=True):
        assert torch.allclose(grad, p.grad, atol=1e-6)


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_frozen_factor_gets_no_gradient(frozen):
    """LoRA-FA freezes A. The input gets its gradient all the same."""
    model, x = adapted_layers(), torch.randn(4, 64, requires_grad=True)
    a = model[0].lora["default"]
    getattr(a, frozen).requires_grad_(False)
    model[0](x).sum().backward()
    assert getattr(a, frozen).grad is None
    assert getattr(a, "B" if frozen == "A" else "A").grad is not None
    assert x.grad is not None


def test_only_the_forward_of_the_kind_returns_memory_that_no_one_else_holds():
    """The forward of a subclass may return memory that the layer still needs."""

    class Remembers(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            return self.last

    assert returns_fresh_output(nn.Linear)
    assert returns_fresh_output(type("Plain", (nn.Linear,), {}))
    assert not returns_fresh_output(Remembers)
    assert not returns_fresh_output(nn.Conv1d)
