"""fused_forward: what a plain linear layer with one adapter computes in one go, when it may, and what it takes."""

from __future__ import annotations

import copy

import pytest
import torch
from bench.measure import Setup, Timed, peak
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils import checkpoint

import lorainject as li
from lorainject.lora.kernels import fused_forward, gemm, lora_linear
from lorainject.lora.model_index import adapted_sites

I, O = 24, 20  # noqa: E741
SEED = 3
GROUPED_SIZES = [gemm.GROUPED_SIZE, 1]  # with 1, every float32 output is added to in groups


def adapted_layer(target: str = "0", *, bias: bool = True, dropout: float = 0.0, dtype: torch.dtype = torch.float32,
                  sizes: tuple[int, int] = (I, O), r: int = 3) -> nn.Sequential:  # fmt: skip
    """Return a linear layer in training mode with random factors on it, or on a slice of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes, bias=bias, dtype=dtype)).train()
    li.inject(model, [target], r=r, alpha=5, dropout=dropout, dtype=dtype if dtype == torch.float64 else torch.float32)
    for p in li.parameters(model):
        nn.init.normal_(p, std=0.3)
    return model


def is_fused(y: Tensor) -> bool:
    """True if base and term were one node of the graph."""
    return type(y.grad_fn).__name__ == "FusedLinearBackward"


def unfused(call, *args):
    """Return what a call gives if no kernel takes whole layers: the base runs, and the term is added after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_forward, "TORCH_FORWARD", None)
        return call(*args)


def output_and_gradients(model: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Return the output, and the gradients of x, A and B, None for one that needs no gradient."""
    torch.manual_seed(SEED)
    leaves = [x, *(p for site in adapted_sites(model).values() for p in site.adapters.parameters())]
    y = model(x)
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy))
    return y, [next(grads) if t.requires_grad else None for t in leaves]


def dropout_mask(x: Tensor, dtype: torch.dtype, dropout: float) -> Tensor:
    """Return the mask that the first forward after manual_seed(SEED) draws."""
    torch.manual_seed(SEED)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    chunks = gemm._dropped_chunks(x.reshape(-1, x.shape[-1]), dtype, dropout, seed)
    return torch.cat([mask for _, mask in chunks]).view(x.shape)


def formula(model: nn.Module, x: Tensor, dy: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Return the output of the layer and the gradients of x, A and B by the formula, in float64."""
    (site,) = adapted_sites(model).values()
    ((adapter, _),) = site.adapters.active
    x, A, B = (t.detach().double().requires_grad_() for t in (x, adapter.A, adapter.B))
    term = adapter.scale * ((x if mask is None else x * mask) @ A.T @ B.T)
    if adapter.rows is not None:
        term = torch.zeros(*x.shape[:-1], O, dtype=torch.float64).index_add(-1, adapter.rows, term)
    bias = site.module.bias
    y = x @ site.module.weight.double().T + (0 if bias is None else bias.double()) + term
    return [y.detach(), *torch.autograd.grad(y, (x, A, B), dy.double())]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_instructions", [True, False])
@given(data=st.data())
def test_training_output_and_gradients_are_those_of_the_formula(dtype, has_instructions, data):
    """For every dtype, layout and size, for a slice, with dropout, and if x or B needs no gradient, both ways."""
    batch = data.draw(st.sampled_from([(), (1,), (17,), (131,), (2, 9), (3, 1, 4), (0,), (2, 0)]))
    dropout = data.draw(st.sampled_from([0.0, 0.4]))
    model = adapted_layer(
        data.draw(st.sampled_from(["0", "0[2:9]"])), bias=data.draw(st.booleans()), dropout=dropout, dtype=dtype
    )
    x, dy = torch.randn(*batch, I).to(dtype), torch.randn(*batch, O).to(dtype)
    if len(batch) > 1 and data.draw(st.booleans()):
        x, dy = (t.mT.contiguous().mT for t in (x, dy))
    x.requires_grad_(data.draw(st.booleans()))
    next(iter(adapted_sites(model).values())).adapters["default"].B.requires_grad_(data.draw(st.booleans()))
    eps = torch.finfo(dtype).eps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "_has_half_instructions", lambda dtype: has_instructions)
        patch.setattr(gemm, "FEW_TOKENS", 4)
        patch.setattr(gemm, "CHUNK_SIZE", 60)
        patch.setattr(gemm, "GROUPED_SIZE", data.draw(st.sampled_from(GROUPED_SIZES)))
        y, grads = output_and_gradients(model, x, dy)
        mask = None
        if dropout:
            mask = dropout_mask(x, gemm.compute_dtype(x, x.shape[:-1].numel()), dropout)
            other = []
        else:
            other, other_grads = unfused(output_and_gradients, model, x, dy)
            assert not is_fused(other)
            other = [other, *other_grads]
    assert is_fused(y)
    expected = formula(model, x, dy, mask)
    for result, true in [*zip([y, *grads], expected, strict=True), *zip(other, expected, strict=False)]:
        if result is not None:
            assert result.shape == true.shape
            largest = max(1.0, float(true.detach().abs().max()) if true.numel() else 1.0)
            assert torch.allclose(result.double(), true, rtol=20 * eps, atol=20 * eps * largest)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_instructions", [True, False])
@given(data=st.data())
def test_inference_output_is_that_of_the_formula(dtype, has_instructions, data):
    """For every dtype, layout, size and slice, within two roundings of the norm."""
    batch = data.draw(st.sampled_from([(), (1,), (16,), (17,), (131,), (2, 40), (3, 1, 9), (0,), (2, 0)]))
    model = adapted_layer(
        data.draw(st.sampled_from(["0", "0[2:9]"])), bias=data.draw(st.booleans()), dropout=0.4, dtype=dtype
    ).eval()
    x = torch.randn(*batch, I).to(dtype)
    if len(batch) > 1 and data.draw(st.booleans()):
        x = x.mT.contiguous().mT
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode() if data.draw(st.booleans()) else torch.no_grad():
        patch.setattr(gemm, "_has_half_instructions", lambda dtype: has_instructions)
        patch.setattr(gemm, "CHUNK_SIZE", 60)
        patch.setattr(gemm, "GROUPED_SIZE", data.draw(st.sampled_from(GROUPED_SIZES)))
        y = model(x)
    expected = formula(model, x, torch.zeros(*batch, O, dtype=dtype))[0]
    assert (y.shape, y.dtype) == (expected.shape, dtype)
    if y.numel():
        assert float((y.double() - expected).norm() / expected.norm()) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(
    st.integers(1, 700),
    st.one_of(st.integers(1, 300), st.sampled_from([768, 1376, 3000])),
    st.integers(1, 300),
    st.booleans(),
    st.sampled_from(GROUPED_SIZES),
)
def test_a_zero_term_leaves_every_bit_of_the_output(grad, dtype, tokens, width, out, bias, grouped_size):
    """Law 1: with B = 0 the output is that of the base layer, to the bit."""
    model = adapted_layer(bias=bias, dtype=dtype, sizes=(width, out))
    nn.init.zeros_(model[0].lora["default"].B)
    x = torch.randn(tokens, width, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(grad):
        patch.setattr(gemm, "GROUPED_SIZE", grouped_size)
        y = model(x)
    assert torch.equal(y, nn.functional.linear(x, model[0].weight, model[0].bias))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(512,), (2, 256)], ids=str)
def test_a_training_step_takes_the_memory_of_a_frozen_layer(dtype, bias, shape):
    """The peak is an output and a gradient of x. What is r wide is small, and the general way takes more."""
    model, x, dy = (
        adapted_layer(bias=bias, dtype=dtype, sizes=(1024, 1024), r=4),
        *(torch.randn(*shape, 1024, dtype=dtype) for _ in range(2)),
    )
    x.requires_grad_()

    def step(model: nn.Module) -> None:
        x.grad = None
        model(x).backward(dy)

    def peak_of_a_step(model: nn.Module) -> int:
        step(model)  # what is made at the first call
        return peak(Timed(lambda: step(model), before=lambda: setattr(x, "grad", None)), Setup())

    ours = peak_of_a_step(model)
    other = unfused(peak_of_a_step, model)
    base = peak_of_a_step(li.eject(model).requires_grad_(False))
    assert ours <= 1.05 * base < other


@pytest.mark.parametrize("shape", [(512,), (2, 256)], ids=str)
def test_autograd_sums_the_gradients_of_several_layers_in_place(shape):
    """Of frozen layers there are two gradients of x at a time; with more than two axes there are three."""
    model, x, dy = (
        nn.ModuleList(nn.Linear(1024, 1024) for _ in range(4)),
        *(torch.randn(*shape, 1024) for _ in range(2)),
    )
    x.requires_grad_()

    def step() -> None:
        x.grad = None
        torch.autograd.backward([linear(x) for linear in model], [dy] * 4)

    def peak_of_a_step() -> int:
        step()
        return peak(Timed(step, before=lambda: setattr(x, "grad", None)), Setup())

    model.requires_grad_(False)
    base = peak_of_a_step()
    li.inject(model, list("0123"), r=2)
    assert peak_of_a_step() <= (1.05 if len(shape) == 1 else 0.9) * base


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("target", ["0", "0[1:4]"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_first_and_second_order(dropout, target, bias):
    model = adapted_layer(target, dropout=dropout, dtype=torch.float64, bias=bias, sizes=(4, 5), r=2)
    adapter = model[0]._modules["lora" if target == "0" else "lora[1:4]"]["default"]

    def f(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(3)
        y = lora_linear.FusedLinear.apply(
            x, A, B, model[0].weight, model[0].bias, adapter.scale, dropout, 7, adapter.parts
        )
        assert is_fused(y)
        return y

    args = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), adapter.A, adapter.B)
    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args)


@pytest.mark.parametrize("target", ["0", "0[2:9]"])
@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("grouped_size", GROUPED_SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_batched_gradients_are_those_one_by_one(target, tokens, grouped_size, dtype, monkeypatch):
    """The backward runs under vmap (is_grads_batched), in float32 and if x is cast in chunks, both ways."""
    monkeypatch.setattr(gemm, "CHUNK_SIZE", 60)
    monkeypatch.setattr(gemm, "GROUPED_SIZE", grouped_size)
    monkeypatch.setattr(gemm, "_has_half_instructions", lambda dtype: False)
    model = adapted_layer(target, dtype=dtype)
    x, dys = torch.randn(tokens, I, dtype=dtype, requires_grad=True), torch.randn(4, tokens, O, dtype=dtype)
    leaves = [x, *li.parameters(model)]
    for y in (model(x), unfused(model, x)):
        one_by_one = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
        at_once = torch.autograd.grad(y, leaves, dys, is_grads_batched=True)
        for found_at_once, each in zip(at_once, zip(*one_by_one, strict=True), strict=True):
            torch.testing.assert_close(found_at_once, torch.stack(each))


def test_a_penalty_on_the_gradient_trains_A_and_B():
    """The second derivatives are those of the general way."""
    model, x = adapted_layer(), torch.randn(5, I, requires_grad=True)

    def penalty() -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *li.parameters(model)])

    for result, expected in zip(penalty(), unfused(penalty), strict=True):
        assert torch.allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, I), (2, 5, I)], ids=str)
def test_what_may_be_done_around_a_fused_step(shape):
    """The output may be written to, the backward may run twice, hooks see output and gradients, saved tensors may be
    offloaded, and the step may be checkpointed."""
    model, x = adapted_layer(dropout=0.3), torch.randn(shape, requires_grad=True)
    dy = torch.randn(*shape[:-1], O)
    _, expected = output_and_gradients(model, x, dy)

    def grads(run) -> list[Tensor | None]:
        x.grad = None
        model.zero_grad()
        torch.manual_seed(3)
        run()
        return [x.grad, *(p.grad for p in li.parameters(model))]

    def writes() -> None:
        y = model(x)
        assert is_fused(y)
        y.add_(1).mul_(2).backward(dy / 2)

    def twice() -> None:
        y = model(x)
        y.backward(dy / 2, retain_graph=True)
        y.backward(dy / 2)

    seen = []

    def hooked() -> None:
        handles = [
            model[0].register_forward_hook(lambda m, args, y: seen.append(y.shape)),
            model[0].register_full_backward_hook(lambda m, dx, dy: seen.append(dy[0].shape)),
        ]
        model(x).backward(dy)
        for handle in handles:
            handle.remove()

    def offloaded() -> None:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy):
            y = model(x)
        y.backward(dy)

    def checkpointed(reentrant: bool) -> None:
        checkpoint.checkpoint(model, x, use_reentrant=reentrant).backward(dy)

    for run in (writes, twice, hooked, offloaded, lambda: checkpointed(True), lambda: checkpointed(False)):
        for result, true in zip(grads(run), expected, strict=True):
            assert torch.allclose(result, true, rtol=1e-5, atol=1e-5)
    assert seen == [dy.shape, dy.shape]


def test_only_x_and_what_is_r_wide_is_saved():
    """No parameter is copied, and the backward does not write to x."""
    model, x = adapted_layer(dtype=torch.bfloat16), torch.randn(2, 9, I, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    ours = {t.data_ptr() for t in (x, model[0].weight, *li.parameters(model))}
    assert sum(t.numel() for t in kept if t.data_ptr() not in ours) == 18 * 3
    before = x.detach().clone()
    y.sum().backward()
    assert torch.equal(x, before)


def test_when_a_step_is_fused():
    """It is not if someone must see the product of the base or the adapter by itself, or if the layer itself trains."""
    x = torch.randn(5, I, requires_grad=True)
    assert is_fused(adapted_layer()(x))
    assert is_fused(adapted_layer(bias=False)(x))

    model = adapted_layer()
    model[0].weight.requires_grad_(True)
    y = model(x)
    y.sum().backward()
    assert not is_fused(y)
    assert model[0].weight.grad is not None

    model = adapted_layer()
    model[0].bias.requires_grad_(True)
    assert not is_fused(model(x))

    model = adapted_layer()
    next(li.parameters(model)).requires_grad_(False)  # A, without whose gradient x need not be saved
    assert not is_fused(model(x))

    for hooked in (lambda m: m[0].lora, lambda m: m[0].lora["default"]):
        model, seen = adapted_layer(), []
        hooked(model).register_forward_pre_hook(lambda m, args, seen=seen: seen.append(m))
        assert not is_fused(model(x))
        assert len(seen) == 1
        model = adapted_layer()
        hooked(model).register_forward_hook(lambda m, args, y, seen=seen: seen.append(type(y.grad_fn).__name__))
        assert not is_fused(model(x))
        assert seen[1:] == ["AddBackward0"]
    handle = torch_module.register_module_forward_hook(lambda m, args, y: None)
    assert not is_fused(adapted_layer()(x))
    handle.remove()

    model = adapted_layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fused(model(x))
    with li.disabled(model):
        assert not model(x).requires_grad or not is_fused(model(x))
    li.inject(model, ["0"], r=2, name="other")
    li.activate(model, "default", "other")
    assert not is_fused(model(x))
    with li.rows(model, ["default", "other"]):
        assert not is_fused(model(torch.randn(2, 3, I, requires_grad=True)))

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(I, O))
    li.inject(model, ["0"], r=2)
    assert torch.equal(model(x), 2 * nn.functional.linear(x, model[0].weight, model[0].bias))


HOOKS = ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook", "backward_hook")


@pytest.mark.filterwarnings("ignore:Using non-full backward hooks:FutureWarning")
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("on", [lambda m: m[0].lora, lambda m: m[0].lora["default"]], ids=["all", "one"])
def test_every_kind_of_hook_on_an_adapter_is_called(kind, on):
    """A hook is called also if the layer was called without it before."""
    model, seen, x = adapted_layer(), [], torch.randn(1, 3, I, requires_grad=True)
    model(x)
    handle = getattr(on(model), f"register_{kind}")(lambda *args: seen.append(kind))
    model(x).sum().backward()
    assert seen == [kind]
    handle.remove()
    model(x).sum().backward()
    assert seen == [kind]


@pytest.mark.parametrize("grad", [True, False])
def test_what_the_fused_forward_does_not_cover(grad):
    """Hooks on adapters, a forward stored on one, a computed bias, several active adapters and none."""
    x = torch.randn(5, I)

    def term(model: nn.Module, name: str = "default") -> Tensor:
        adapter = model[0].lora[name]
        return adapter.scale * (x @ adapter.A.T @ adapter.B.T)

    with torch.set_grad_enabled(grad):
        model = adapted_layer()
        plain = nn.functional.linear(x, model[0].weight, model[0].bias)
        whole = plain + term(model)
        assert torch.allclose(model(x), whole, atol=1e-5)

        for hooked in (lambda m: m[0].lora, lambda m: m[0].lora["default"]):
            model, seen = adapted_layer(), []
            hooked(model).register_forward_pre_hook(lambda m, args, seen=seen: seen.append(m))
            hooked(model).register_forward_hook(lambda m, args, y: y + 1)
            assert torch.allclose(model(x), whole + 1, atol=1e-5)
            assert len(seen) == 1
            assert torch.allclose(copy.deepcopy(model)(x), whole + 1, atol=1e-5)
            model = adapted_layer()
            original = hooked(model).forward
            hooked(model).forward = lambda *args, original=original: original(*args) + 1
            assert torch.allclose(model(x), whole + 1, atol=1e-5)

        model = adapted_layer()
        nn.utils.parametrize.register_parametrization(model[0], "bias", Doubled())
        assert torch.allclose(model(x), whole + model[0].parametrizations.bias.original, atol=1e-5)

        model = adapted_layer()
        with li.disabled(model):
            assert torch.equal(model(x), plain)
        li.inject(model, ["0"], r=2, name="other")
        nn.init.normal_(model[0].lora["other"].B.data)
        for on in ((), ("other",), ("default", "other")):
            li.activate(model, *on)
            assert torch.allclose(model(x), plain + sum(term(model, name) for name in on), atol=1e-4)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_replaced_forward_of_torch_is_called(monkeypatch):
    calls, original = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append(self) or original(self, x))
    adapted_layer()(torch.randn(5, I))
    assert len(calls) == 1


@pytest.mark.parametrize("grad", [True, False])
def test_wrong_arguments_raise_the_error_of_the_base_layer(grad):
    model, base = adapted_layer(), nn.Linear(I, O)
    wrong = [
        torch.randn(40, I).double(),
        torch.randn(40, I + 1),
        torch.randn(2, 20, I - 1),
        torch.randn(()),
        torch.ones(40, I, dtype=torch.int64),
    ]
    with torch.set_grad_enabled(grad):
        for args, kwargs in [((torch.randn(2, I),) * 2, {}), ((), {"nothing": torch.randn(2, I)})]:
            with pytest.raises(TypeError):
                model[0](*args, **kwargs)
        assert model[0](input=torch.randn(2, I)).shape == (2, O)
        for x in wrong:
            with pytest.raises(RuntimeError) as refused:
                base(x)
            with pytest.raises(RuntimeError) as raised:
                model(x)
            assert str(raised.value) == str(refused.value)
