"""Strengths: an adapter at strength t acts as one whose scale is t times as large, in every verb that uses adapters.

The oracle of A and B is a twin whose B is multiplied with t. What is more than A and B is compared with dense weights
W0 + t (W1 - W0) in float64.
"""

from __future__ import annotations

import copy
import math
import pickle
import threading
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import lorainject as li
from lorainject.lora.model_index import ModelIndex

from compilers import needs_compiler
from example_count import examples
from models import bits, ids, llama, randomize
from moe_models import mixtral, moe_model, moe_output
from strategies import cases

laws = settings(max_examples=examples(25), deadline=None, suppress_health_check=list(HealthCheck))
STRENGTHS = (0.7, -0.5, 0.0, 1.0, 3.0)
X = ids(rows=3)


def adapted(dtype: torch.dtype = torch.float64, **changes: object) -> nn.Module:
    """Return a Llama with two adapters, the first one active."""
    torch.manual_seed(0)
    model = llama(**changes).to(dtype)
    for seed, name in enumerate(("fr", "de")):
        li.inject(model, ["q_proj", "v_proj", "down_proj", "embed_tokens"], r=4, alpha=6, name=name)
        randomize(model, name, std=0.3, seed=seed)
    li.activate(model, "fr")
    return model.eval()


@pytest.fixture
def model() -> nn.Module:
    return adapted()


def run(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(input_ids=x, use_cache=False).logits  # type: ignore[no-any-return]


def times(model: nn.Module, **strengths: float) -> nn.Module:
    """Return a copy of the model in which the delta of each adapter is multiplied with a strength, by its B."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, t in strengths.items():
            for adapter in ModelIndex(twin).adapters_named(name):
                adapter.B.mul_(t)
    li.activate(twin, *strengths)
    return twin


def base_bits(model: nn.Module) -> dict[str, bytes | str]:
    return {name: bits(p) for name, p in model.named_parameters() if ".lora" not in name}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max()) <= tolerance * (1 + float(b.abs().max()))


@laws
@given(case=cases((torch.float64,)), t=st.sampled_from(STRENGTHS), init=st.sampled_from(["kaiming", "pissa"]))
def test_a_strength_multiplies_the_scale(case, t, init):
    """In the forward, in training, in deltas and in a merge, for every kind of weight: t s B A in place of s B A."""
    case.settings["init"] = init
    try:
        li.inject(case.model, **case.settings)
    except li.LoraError:  # this kind of weight has no such initial values
        case.settings["init"] = "kaiming"
        li.inject(case.model, **case.settings)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in li.parameters(case.model):
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype))
    twin = copy.deepcopy(case.model)
    with torch.no_grad():
        for adapter in ModelIndex(twin).adapters_named("default"):
            adapter.B.mul_(t)
            if hasattr(adapter, "start"):
                adapter.start.B.mul_(t)
    li.activate(case.model, {"default": t})
    y, expected = case.model(case.x), twin(case.x)
    assert close(y.detach(), expected.detach())
    assert close(case.output(), case.output(twin))
    y.square().sum().backward()
    expected.square().sum().backward()
    gradients = ((n, p.grad) for n, p in twin.named_parameters() if ".lora" in n)
    for name, grad in gradients:
        ours = case.model.get_parameter(name).grad
        assert (ours is None) == (grad is None)
        if grad is not None:  # the twin's B is t B, so that its gradient is 1 / t of ours
            assert close(ours, grad * t if name.endswith(".B") else grad, 1e-8)
    for (path, _, delta), (_, _, other) in zip(li.deltas(case.model), li.deltas(twin), strict=True):
        assert close(delta, other), path
    li.merge(case.model)
    li.merge(twin)
    assert close(case.output(), case.output(twin))
    before = base_bits(case.model)
    li.unmerge(case.model)
    li.activate(case.model, "default")
    li.merge(case.model, {"default": t})
    assert base_bits(case.model) == before


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_at_a_strength_has_the_bits_of_a_rescaled_one(dtype, scaling):
    """Strength and scale are multiplied before either is rounded, so that no bit tells them apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30)).to(dtype)
    li.inject(model, ["0"], r=6, alpha=7, scaling=scaling)
    with torch.no_grad():
        [p.normal_() for p in li.parameters(model)]
    other, t = copy.deepcopy(model), 0.7
    li.merge(model, {"default": t})
    li.rescale(other, scale=other[0].lora["default"].scale * t)
    li.merge(other)
    assert bits(model[0].weight) == bits(other[0].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_1_is_todays_path_to_the_bit(dtype):
    """A mapping to 1 changes no bit of a forward, a gradient or a merge."""
    models = [adapted(dtype) for _ in range(2)]
    li.activate(models[1], {"fr": 1.0})
    outputs = [run(m) for m in models]
    assert torch.equal(*outputs)
    gradients = [
        torch.autograd.grad(m(input_ids=X, labels=X).loss, [p for p in m.parameters() if p.requires_grad])
        for m in models
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    li.merge(models[0])
    li.merge(models[1], {"fr": 1})
    assert [bits(p) for p in models[0].parameters()] == [bits(p) for p in models[1].parameters()]


@pytest.mark.parametrize("strengths", [{"fr": 0.7, "de": -0.5}, {"fr": 0.0, "de": 2.0}, {}])
def test_activate_and_using_take_strengths(model, strengths):
    """Deltas add up at their strengths, by default and within a context, which goes before the default."""
    expected = run(times(model, **strengths))
    with li.using(model, strengths):
        assert close(run(model), expected)
    li.activate(model, strengths)
    assert close(run(model), expected)
    with li.using(model, "de"):
        assert close(run(model), run(times(model, de=1.0)))
    with li.disabled(model):
        assert close(run(model), run(times(model)))
    assert close(run(model), expected)


ROWS = [
    [("fr", 0.7), None, "de"],
    [("fr", 0.7), ("fr", -2), ("fr", 0.7)],
    [("fr", 0.7), ("fr", 0.7), ("fr", 0.7)],
    [("de", 0), "de", ("fr", 1)],
]


@pytest.mark.parametrize("entries", ROWS)
@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize("grad", [False, True])
def test_rows_take_strengths(model, entries, length, grad):
    """Each row has the strength that is named with it, whichever kernel adds the terms."""
    x = ids(rows=3, length=length)
    expected = []
    for i, entry in enumerate(entries):
        name, t = entry if isinstance(entry, tuple) else (entry, 1.0)
        expected.append(run(times(model, **({} if name is None else {name: t})), x[i : i + 1]))
    li.activate(model, "fr", "de")
    with li.rows(model, entries), torch.set_grad_enabled(grad):
        assert close(model(input_ids=x, use_cache=False).logits, torch.cat(expected))


def test_rows_of_three_adapters_use_the_batched_kernel():
    """Three adapters and more in one batch of few tokens: one product for all rows, with the strength of each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48)).eval()
    for name in "abc":
        li.inject(model, ["0"], r=2, name=name)
    with torch.no_grad():
        [p.normal_() for name, p in model.named_parameters() if ".lora" in name]
        x, entries = torch.randn(5, 1, 64), ["a", ("b", 0.5), ("a", -1), ("c", 0), ("c", 2)]
        assignment: list[Any] = []
        with li.rows(model, entries):
            y = model(x)
            assignment.append(model[0].lora.state.choice.rows)
        assert assignment[0].kernels, "the batched kernel was not used"
        for i, entry in enumerate(entries):
            with li.using(model, dict([entry if isinstance(entry, tuple) else (entry, 1)])):
                assert torch.allclose(model(x[i : i + 1]), y[i : i + 1], atol=1e-5)


def test_rows_reach_experts_at_their_strengths():
    """The tokens of each row go through a stack of experts at the strength of the row."""
    model = moe_model(mixtral)
    for seed, name in enumerate(("fr", "de")):
        li.inject(model, ["gate_up_proj", "down_proj"], r=2, name=name)
        randomize(model, name, seed=seed)
    with torch.no_grad():
        with li.rows(model, [("fr", 0.5), ("de", -1)]):
            y = moe_output(model)
        for i, strengths in enumerate(({"fr": 0.5}, {"de": -1})):
            with li.using(model, strengths):
                assert close(moe_output(model)[i], y[i], 1e-5)


# What is more than A and B


class Net(nn.Module):
    """Layers whose adapters have magnitudes, biases, rows of tokens and whole tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin, self.norm, self.head = (
            nn.Embedding(11, 8),
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids) + self.lin(self.emb(ids)).tanh()
        return self.head(self.norm(self.conv(x.mT).mT + x))  # type: ignore[no-any-return]


EXTRAS: dict[str, dict[str, Any]] = {
    "magnitudes": {"targets": ["emb", "lin", "conv"], "dora": True},
    "whole tensors": {"targets": ["lin"], "modules_to_save": ["head", "norm"]},
    "biases": {"targets": ["lin", "conv"], "bias": "all"},
    "rows of tokens": {"targets": ["lin"], "trainable_tokens": {"emb": [1, 4]}},
    "initial values": {"targets": ["lin", "conv"], "init": "pissa"},
}


def with_extras(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = Net().to(dtype).eval()
    li.inject(model, r=2, dtype=dtype, **EXTRAS.get(kind, {"targets": ["emb", "lin", "conv"]}))
    with torch.no_grad():
        for p in li.parameters(model):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p.dtype) * 0.3)
    return model


IDS = torch.arange(10).view(2, 5)


@pytest.mark.parametrize("t", STRENGTHS)
@pytest.mark.parametrize("kind", EXTRAS)
def test_extras_are_interpolated(kind, t):
    """The weights are W0 + t (W1 - W0), with W1 at strength 1: in the forward, in a merge, and in deltas."""
    model = with_extras(kind)
    W1 = copy.deepcopy(model)
    li.merge(W1, reversible=False)
    li.eject(W1)
    bare = copy.deepcopy(model)
    li.eject(bare)
    W0 = dict(bare.named_parameters())
    tuned = {name: p.detach() for name, p in W1.named_parameters()}
    weights = {name: p.detach() + t * (tuned[name] - p.detach()) for name, p in W0.items()}
    expected = functional_call(bare, weights, (IDS,))
    li.activate(model, {"default": t})
    assert close(model(IDS), expected)
    with torch.no_grad():
        assert close(model(IDS), expected)
    found = {path: d for path, _, d in li.deltas(model)}
    named = {path: d for path, _, d in li.deltas(model, "default")}
    before = base_bits(model)
    report = li.merge(model)
    assert report.strengths == (t,)
    with torch.no_grad():
        assert close(model(IDS), expected)
    for path, _, d in li.deltas(model):
        name = path if path in W0 else f"{path}.weight"
        assert close(found[path], weights[name] - W0[name])
        assert close(d, found[path])
        assert close(named[path], tuned[name] - W0[name])
    if t:
        assert all(close(d, named[path], 1e-8) for path, _, d in li.deltas(model, "default"))
    li.unmerge(model)
    assert base_bits(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", EXTRAS)
def test_extras_at_0_are_the_base_to_the_bit(kind, dtype):
    """At 0 nothing of an adapter is left, at 1 nothing of the mixture."""
    model = with_extras(kind, dtype)
    whole = model(IDS)
    with li.using(model, {"default": 1}):
        assert torch.equal(model(IDS), whole)
    with li.disabled(model):
        base = model(IDS)
    with li.using(model, {"default": 0}):
        assert torch.equal(model(IDS), base)


def test_the_delta_of_magnitudes_merged_at_0_is_refused_by_name():
    """The gain of DoRA depends on W0, which the journal of an empty merge does not tell."""
    model = with_extras("magnitudes")
    li.merge(model, {"default": 0})
    assert all(not d.any() for _, _, d in li.deltas(model))
    with pytest.raises(li.StateError, match=r"merged at strength 0\n=> call unmerge"):
        list(li.deltas(model, "default"))


# torch.compile


@pytest.mark.parametrize("kind", ["plain", *(pytest.param(kind, marks=pytest.mark.long) for kind in EXTRAS)])
def test_a_strength_compiles_nothing_again(kind):
    """One graph serves every strength: from no strength to one, to 0 and to negative ones."""
    torch._dynamo.reset()
    model = with_extras(kind)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert close(compiled(IDS), model(IDS))
    for t in STRENGTHS:
        li.activate(model, {"default": t})
        assert close(compiled(IDS), model(IDS))
    assert counter.frame_count == 1
    for t in STRENGTHS:
        with li.using(model, {"default": t}):
            assert close(compiled(IDS), model(IDS))
    assert counter.frame_count == 2, "one more for contexts"


def test_strengths_of_rows_compile_nothing_again():
    """The assignment of rows to adapters is compiled, and their strengths are not."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4)).double()
    for name in ("fr", "de"):
        li.inject(model, ["0"], r=2, name=name)
    counter, x = CompileCounter(), torch.randn(3, 5, 4).double()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        [p.normal_() for name, p in model.named_parameters() if ".lora" in name]
        for t in STRENGTHS:
            with li.rows(model, [("fr", t), None, "de"]):
                assert close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.long
@needs_compiler
def test_inductor_follows_strengths():
    """Code that inductor has generated, in float32, agrees with eager code in output and gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(16, 16))
    li.inject(layer, ["0"], r=2)
    with torch.no_grad():
        [p.normal_() for p in li.parameters(layer)]
    compiled, x = torch.compile(layer, fullgraph=True), torch.randn(5, 16)
    for t in STRENGTHS:
        li.activate(layer, {"default": t})
        results = [
            (f(x), torch.autograd.grad(f(x).square().sum(), list(li.parameters(layer)))) for f in (compiled, layer)
        ]
        for a, b in zip((results[0][0], *results[0][1]), (results[1][0], *results[1][1]), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_an_exported_model_has_the_strength_of_the_export():
    """torch.export takes strengths as numbers: the program needs no tensor of the model's state."""
    model = nn.Sequential(nn.Linear(4, 4)).double()
    li.inject(model, ["0"], r=2)
    with torch.no_grad():
        [p.normal_() for p in li.parameters(model)]
    li.activate(model, {"default": 0.7})
    x = torch.randn(3, 4).double()
    program = torch.export.export(model, (x,))
    assert not program.constants
    assert close(program.module()(x), model(x))


def test_strengths_that_were_made_in_inference_mode_can_train():
    """activate within torch.inference_mode leaves nothing that a later backward cannot save."""
    model = nn.Sequential(nn.Linear(4, 4))
    li.inject(model, ["0"], r=2)
    torch._dynamo.reset()
    with torch.inference_mode(), torch.device("meta"):
        li.activate(model, {"default": 0.5})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(3, 4)).sum().backward()


# Whose choice it is


def test_threads_have_their_own_strengths(model):
    """A strength of a context is that of the thread that opened it."""
    strengths = [0.3, -1.0, 2.0, 0.0]
    expected = [run(times(model, fr=t)) for t in strengths]
    barrier, wrong = threading.Barrier(len(strengths)), []

    def work(t: float, want: Tensor) -> None:
        with li.using(model, {"fr": t}):
            for _ in range(5):
                barrier.wait(60)
                if not close(run(model), want):
                    wrong.append(t)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(strengths, expected, strict=True)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong
    assert close(run(model), run(times(model, fr=1.0)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("change", ["activate", "using"])
def test_a_recomputation_has_the_strength_of_its_forward(reentrant, change):
    """A checkpointed backward after the strength was changed has the gradients of the forward's strength."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    li.inject(model, ["0", "2"], r=2)
    with torch.no_grad():
        [p.normal_() for p in li.parameters(model)]
    x = torch.randn(3, 6).double().requires_grad_()

    def gradients(later: float, checkpointed: bool) -> list[Tensor]:
        model.zero_grad()
        li.activate(model, {"default": 0.7})
        y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        if change == "activate":
            li.activate(model, {"default": later})
            y.square().sum().backward()
        else:
            with li.using(model, {"default": later}):
                y.square().sum().backward()
        return [p.grad for p in li.parameters(model)]

    expected = gradients(0.7, False)
    assert all(close(a, b) for a, b in zip(gradients(-3, True), expected, strict=True))


def test_a_checkpointed_backward_refuses_a_rescaled_adapter(model):
    """rescale changes the adapter itself, which no recomputation can undo."""
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 48).double().requires_grad_()
    li.activate(model, {"fr": 0.7})
    y = checkpoint(layer, x, use_reentrant=False)
    li.rescale(model, "fr", scale=2)
    with pytest.raises(li.StateError, match="rescaled"):
        y.sum().backward()


# What keeps a strength


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_the_strengths_of_its_original(model, duplicate):
    """Copies and pickles carry the default along, and later change it for themselves."""
    li.activate(model, {"fr": 0.7})
    twin = duplicate(model)
    assert close(run(twin), run(model))
    before = run(model)
    li.activate(twin, {"fr": -0.3})
    assert torch.equal(run(model), before)


def test_eject_brings_strengths_back(model):
    """Without the newest adapter, what was active before is active again, at its strengths."""
    li.activate(model, {"fr": 0.7, "de": -0.5})
    before = run(model)
    li.inject(model, ["q_proj"], r=2, name="es")
    li.eject(model, "es")
    assert torch.equal(run(model), before)
    li.eject(model, "fr")
    assert close(run(model), run(times(model, de=-0.5)))


def test_hotswap_and_rescale_keep_the_strength(model, tmp_path):
    """A strength belongs to the choice of adapters: other values and another scale of the adapter leave it."""
    li.activate(model, "de")
    li.save(model, tmp_path / "de", "de")
    li.activate(model, {"fr": 0.7})
    li.hotswap(model, tmp_path / "de", "fr")
    assert close(run(model), run(times(model, de=0.7)))
    li.rescale(model, "fr", scale=0.5)
    other = copy.deepcopy(model)
    li.rescale(other, "de", scale=0.5)
    assert close(run(model), run(times(other, de=0.7)))


def test_a_file_has_the_adapter_and_not_the_strength(model, tmp_path):
    """save writes A, B and the scale, at whatever strength the adapter is used."""
    expected = run(times(model, fr=1.0))
    li.activate(model, {"fr": 0.3})
    li.save(model, tmp_path / "fr", "fr")
    other = adapted()
    li.eject(other)
    li.load(other, tmp_path / "fr")
    assert close(run(other), expected)


def test_an_adapter_at_0_trains_nothing_and_is_reached():
    """At 0 the gradient of A and B is 0. probe asks what a forward reaches, and not how strongly."""
    model = nn.Sequential(nn.Linear(4, 4))
    li.inject(model, ["0"], r=2)
    with torch.no_grad():
        [p.normal_() for p in li.parameters(model)]
    li.activate(model, {"default": 0})
    assert li.probe(model, torch.randn(3, 4)).reached == ("0",)
    model(torch.randn(3, 4)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in li.parameters(model))


# Merges


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merges_at_strengths_are_undone_to_the_bit(dtype):
    """merge(model, {...}) rounds W0 + the sum of t s B A once, in any order, and unmerge gives W0 back."""
    model = adapted(dtype)
    before = base_bits(model)
    twin = times(model, fr=0.5, de=-0.25)  # exact factors: B is multiplied without rounding
    li.merge(twin)
    report = li.merge(model, {"fr": 0.5, "de": -0.25})
    merged = base_bits(model)
    assert merged == base_bits(twin)
    assert (report.names, report.strengths) == (("fr", "de"), (0.5, -0.25))
    assert "merged fr (0.5), de (-0.25) into" in str(report)
    li.unmerge(model)
    li.merge(model, {"de": -0.25, "fr": 0.5})
    li.unmerge(model, "fr")
    li.merge(model, {"fr": 0.5})
    assert base_bits(model) == merged
    li.unmerge(model)
    assert base_bits(model) == before


def test_a_merge_without_strengths_takes_those_that_are_active(model):
    """merge changes no output: an active adapter is merged as strongly as it is active."""
    li.activate(model, {"fr": 0.7})
    before = run(model)
    for names in (None, "fr", ["fr"]):
        assert li.merge(model, names).strengths == (0.7,)
        assert close(run(model), before)
        li.unmerge(model)
    assert li.merge(model, ["fr", "de"]).strengths == (0.7, 1.0)
    li.unmerge(model)
    assert li.merge(model, {"fr": 1, "de": 0}).strengths == (1.0, 0.0)
    li.unmerge(model)
    assert not any(site.norm for site in li.merge(model, {"fr": 0}).sites)


def test_deltas_have_strengths(model):
    """deltas sums the active adapters at their strengths; a name means strength 1, and a mapping any strength."""

    def norms(*args: Any) -> list[float]:
        return [float(d.norm()) for _, _, d in li.deltas(model, *args)]

    whole = norms("fr")
    assert norms({"fr": -0.5}) == pytest.approx([0.5 * n for n in whole])
    li.activate(model, {"fr": 0.25})
    assert norms() == pytest.approx([0.25 * n for n in whole])
    assert norms("fr") == whole
    li.merge(model, {"fr": 2})
    assert norms() == pytest.approx([2 * n for n in whole])
    assert norms("fr") == whole


# Bad input


WRONG = (math.nan, math.inf, -math.inf, 10**400, "0.7", None, True, torch.tensor(0.5), 1j)


@pytest.mark.parametrize("verb", ["activate", "using", "rows", "merge", "merged", "deltas"])
def test_a_strength_that_is_no_finite_number_is_refused(model, verb):
    """Every wrong strength is listed at once, and nothing is changed."""
    before = run(model)

    def call(t: object) -> None:
        if verb == "rows":
            li.rows(model, [("fr", t), ("de", 1), ("de", math.nan)]).__enter__()
        elif verb == "deltas":
            list(li.deltas(model, {"fr": t, "de": math.nan}))
        else:
            result = getattr(li, verb)(model, {"fr": t, "de": math.nan})
            if verb in ("using", "merged"):
                result.__enter__()

    for wrong in WRONG:
        with pytest.raises(li.SpecError, match="a strength must be a finite number:") as e:
            call(wrong)
        assert [line.split(":")[0] for line in e.value.problems] == ["'fr'", "'de'"]
        assert str(e.value).splitlines()[-1].startswith("=> ")
    assert torch.equal(run(model), before)


def test_numbers_of_any_kind_are_strengths(model):
    """Integers, fractions and numbers of numpy."""
    for t in (2, Fraction(1, 2), np.float32(0.5), np.int64(-1)):
        li.activate(model, {"fr": t})
        assert close(run(model), run(times(model, fr=float(t))))


def test_other_mistakes_are_refused_as_without_strengths(model):
    """Unknown names, adapters that share a weight with magnitudes, and a strength for rescale."""
    with pytest.raises(li.StateError, match="no adapter named 'es'"):
        li.activate(model, {"es": 0.5})
    with pytest.raises(li.StateError, match="no adapter named 'es'"), li.rows(model, [("es", 0.5)]):
        pass
    with pytest.raises(li.StateError, match="no adapter was named"):
        li.merge(model, {})
    with pytest.raises(li.StateError, match="'fr' is active but would not be merged"):
        li.merge(model, {"de": 0.5})
    with pytest.raises(li.SpecError, match="A strength may be 0 or negative"):
        li.rescale(model, "fr", scale=-0.5)
    li.inject(model, ["q_proj"], r=2, dora=True, name="dora")
    with pytest.raises(li.StateError, match="cannot be active with another adapter"):
        li.activate(model, {"dora": 0.5, "fr": 0.5})
