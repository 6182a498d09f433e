"""inject, activate, disabled, rows, parameters and eject, with several adapters on one model."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

import lorainject as li
from lorainject.lora.adapter import LoraAdapter

from interrupts import interrupted
from models import bits, ids, llama, randomize, run, state

X = {"input_ids": ids(rows=3)}


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return llama()


def add(model: nn.Module, name: str, targets: list[str], seed: int) -> None:
    """Inject an adapter with random values."""
    li.inject(model, targets, r=4, alpha=8, name=name)
    randomize(model, name, seed=seed)


def output_alone(base: nn.Module, name: str, targets: list[str], seed: int) -> torch.Tensor:
    """Return what a copy of the base computes with this adapter alone."""
    model = copy.deepcopy(base)
    add(model, name, targets, seed)
    return run(model, X).detach()


@pytest.fixture
def two(base):
    """A model with adapters fr and de on overlapping sites, and the outputs of the base and of each adapter alone."""
    expected = {
        None: run(base, X).detach(),
        "fr": output_alone(base, "fr", ["q_proj", "v_proj"], 1),
        "de": output_alone(base, "de", ["v_proj", "up_proj"], 2),
    }
    add(base, "fr", ["q_proj", "v_proj"], 1)
    add(base, "de", ["v_proj", "up_proj"], 2)
    return base, expected


def test_activate_chooses_the_adapter(two):
    """inject activates the new adapter alone; activate chooses others; without names the model is the base."""
    model, expected = two
    assert torch.allclose(run(model, X), expected["de"], atol=1e-6)
    li.activate(model, "fr")
    assert torch.allclose(run(model, X), expected["fr"], atol=1e-6)
    li.activate(model, ["fr"])
    assert torch.allclose(run(model, X), expected["fr"], atol=1e-6)
    li.activate(model)
    assert torch.equal(run(model, X), expected[None])
    with pytest.raises(li.StateError, match="no adapter is active"):
        li.parameters(model)


def test_active_adapters_add_up(two):
    """Two active adapters compute W0 + s1 B1 A1 + s2 B2 A2, and merge writes that sum into the weights."""
    model, _ = two
    li.activate(model, "fr", "de")
    y = run(model, X)
    sums = {path: w + d for path, w, d in li.deltas(model)}
    report = li.merge(model)
    assert report.names == ("fr", "de")
    assert len(report.sites) == 6
    for path, w in sums.items():
        assert torch.allclose(model.get_submodule(path).weight, w, atol=1e-7)
    assert torch.allclose(run(model, X), y, atol=1e-5)


def test_rows_choose_an_adapter_per_row(two):
    """Within rows each row of the batch uses the adapter named for it, or none."""
    model, expected = two
    with li.rows(model, ["de", None, "fr"]):
        y = run(model, X)
    assert torch.allclose(y, torch.stack([expected["de"][0], expected[None][1], expected["fr"][2]]), atol=1e-6)
    assert torch.allclose(run(model, X), expected["de"], atol=1e-6)


def test_rows_give_gradients_to_their_adapters(two):
    """Within rows an adapter gets the gradient of the rows that use it, and of no other row."""
    model, _ = two
    li.activate(model, "fr", "de")
    with li.rows(model, ["fr", "fr", None]):
        run(model, X)[2].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    with li.rows(model, ["fr", "fr", None]):
        run(model, X).square().sum().backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.any() for k, g in grads.items() if ".lora.fr." in k)
    assert all(g is None for k, g in grads.items() if ".lora.de." in k)


def test_rows_in_generate(two):
    """In greedy generation with a KV cache each row continues as it would alone with its adapter."""
    model, _ = two
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = []
    for row, name in zip(X["input_ids"], ["de", None, "fr"], strict=True):
        li.activate(model, *([name] if name else []))
        expected.append(model.generate(row[None], **settings)[0])
    with li.rows(model, ["de", None, "fr"]):
        assert torch.equal(model.generate(X["input_ids"], **settings), torch.stack(expected))


def test_wrong_rows_are_refused(two):
    """Too few names, an unknown name and a bare string raise, and the next forward is as before."""
    model, expected = two
    with (
        pytest.raises(li.StateError, match=r"rows\(\.\.\.\) names 2 rows, but .* got an input of shape \(3, 7, 32\)"),
        li.rows(model, ["fr", "de"]),
    ):
        run(model, X)
    with (
        pytest.raises(li.StateError, match=r"no adapter named 'es'\n=> this model has 'fr', 'de'"),
        li.rows(model, ["es", "de", None]),
    ):
        pass
    with pytest.raises(li.StateError, match=r"a list with one adapter name per row, not 'fr'"), li.rows(model, "fr"):
        pass
    assert torch.allclose(run(model, X), expected["de"], atol=1e-6)


def test_disabled_nests_and_recovers(two):
    """Within disabled, also nested, the model is the base; after an exception the adapter is active again."""
    model, expected = two
    with pytest.raises(RuntimeError, match="on purpose"), li.disabled(model):
        with li.disabled(model):
            assert torch.equal(run(model, X), expected[None])
        assert torch.equal(run(model, X), expected[None])
        raise RuntimeError("on purpose")
    assert torch.allclose(run(model, X), expected["de"], atol=1e-6)


@pytest.mark.parametrize("order", [("fr", "de"), ("de", "fr"), (None,)])
def test_eject_in_any_order(base, order):
    """Whichever adapter is ejected first, after the last one the model is as it was, to the bit."""
    before = state(base)
    add(base, "fr", ["q_proj", "v_proj"], 1)
    add(base, "de", ["v_proj", "up_proj"], 2)
    for name in order:
        li.eject(base, name)
    assert state(base) == before


def test_eject_activates_the_previous_adapter(two):
    """Ejecting the second adapter activates the first one, which was active before."""
    model, expected = two
    li.eject(model, "de")
    assert torch.allclose(run(model, X), expected["fr"], atol=1e-6)


def test_parameters_are_those_of_active_adapters(two):
    """parameters returns A and B of the active adapters, each once, and no weight of the base."""
    model, _ = two
    assert len(list(li.parameters(model, "de"))) == 8
    li.activate(model, "fr", "de")
    assert len(set(li.parameters(model))) == 16
    assert not any(p.requires_grad for k, p in model.named_parameters() if ".lora." not in k)


def test_training_moves_only_a_and_b(base):
    """In ten AdamW steps the loss falls and the base keeps its bits; eject restores the base."""
    before = state(base)
    li.inject(base, ["q_proj", "v_proj", "up_proj"], r=4)
    weights = {k: bits(p) for k, p in base.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(li.parameters(base), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = base(**X, labels=X["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {k: bits(p) for k, p in base.named_parameters() if not p.requires_grad} == weights
    assert state(li.eject(base)) == before


def test_dropout_follows_the_mode(base):
    """A model in eval mode stays so after inject; in train mode LoRA dropout acts on the adapter's term alone."""
    li.inject(base, ["q_proj"], r=4, dropout=0.5)
    randomize(base)
    assert not any(m.training for m in base.modules())
    assert torch.equal(run(base, X), run(base, X))
    base.train()
    assert not torch.equal(run(base, X), run(base, X))
    with li.disabled(base):
        assert torch.equal(run(base, X), run(base, X))


def test_embedding_dropout_drops_tokens():
    """LoRA dropout of an embedding drops whole tokens, and scales the others by 1 / (1 - p)."""
    model = li.inject(nn.Sequential(nn.Embedding(10, 6)), ["0"], r=3, dropout=0.5).train()
    randomize(model)
    x = torch.arange(10).repeat(50)
    with li.disabled(model):
        y0 = model(x)
    term = (next(li.deltas(model))[2])[x]
    kept = (model(x) - y0) / term
    assert torch.allclose(kept.min(1).values, kept.max(1).values, atol=1e-3)
    assert set(kept.mean(1).round().unique().tolist()) == {0.0, 2.0}


def test_padding_token_keeps_its_vector():
    """The padding token has no delta and no gradient in A, so its vector stays the base's."""
    model = li.inject(nn.Sequential(nn.Embedding(10, 6, padding_idx=3)), ["0"], r=3)
    with torch.no_grad():
        model[0].lora["default"].B.normal_()
    model(torch.arange(10)).square().sum().backward()
    assert not model[0].lora["default"].A.grad[:, 3].any()
    (_, w, d) = next(li.deltas(model))
    assert d.shape == w.shape
    assert not d[3].any()
    assert d[4].any()


@pytest.mark.parametrize(("init", "deviation"), [("kaiming", 1 / 48), ("gaussian", 1 / 64)])
def test_init_of_the_factors(init, deviation):
    """A is Kaiming uniform (a = sqrt 5, variance 1 / (3 in)) or normal (variance 1 / r^2), and B is zero."""
    torch.manual_seed(0)
    model = li.inject(nn.Sequential(nn.Linear(768, 8)), ["0"], r=64, init=init)
    adapter = model[0].lora["default"]
    assert isinstance(adapter, LoraAdapter)
    assert adapter.A.std().item() == pytest.approx(deviation, rel=0.02)
    assert not adapter.B.any()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_dtypes(dtype, expected):
    """A and B are float32 on half-precision bases, and the output keeps the base's dtype."""
    model = li.inject(nn.Sequential(nn.Linear(8, 8, dtype=dtype)), ["0"], r=2)
    assert {p.dtype for p in li.parameters(model)} == {expected}
    y = model(torch.randn(2, 8, dtype=dtype))
    assert y.dtype is dtype
    y.sum().backward()
    assert {p.grad.dtype for p in li.parameters(model)} == {expected}
    model = li.inject(nn.Sequential(nn.Linear(8, 8)), ["0"], r=2, dtype=torch.bfloat16)
    assert {p.dtype for p in li.parameters(model)} == {torch.bfloat16}


def test_float64_gradients():
    """The gradients of the output with respect to x, A and B agree with finite differences."""
    model = li.inject(nn.Sequential(nn.Linear(4, 3, dtype=torch.float64)), ["0"], r=2, alpha=3)
    randomize(model)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    adapter = model[0].lora["default"]

    def f(x, A, B):
        return torch.func.functional_call(model, {"0.lora.default.A": A, "0.lora.default.B": B}, (x,))

    assert torch.autograd.gradcheck(f, (x, adapter.A, adapter.B))


def test_a_model_injected_in_parts(base):
    """After two parts were injected, verbs on the whole model reach both, and one part can be ejected alone."""
    before = state(base)
    first, second = base.model.layers
    add(first, "fr", ["q_proj"], 1)
    add(second, "fr", ["q_proj"], 2)
    y0 = run(base, X)
    li.activate(base)
    off = run(base, X)
    assert not torch.allclose(y0, off)
    li.activate(base, "fr")
    assert torch.equal(run(base, X), y0)
    li.merge(base)
    assert torch.allclose(run(base, X), y0, atol=1e-5)
    li.unmerge(base)
    li.eject(first)
    li.eject(base)
    # Only the parts that were injected were frozen, so all flags are back.
    assert state(base) == before
    assert torch.equal(run(base, X), off)


@pytest.mark.parametrize("verb", [li.merge, li.unmerge, li.eject, li.activate, li.parameters, li.deltas])
def test_verbs_on_a_model_without_adapters(base, verb):
    """Every verb that needs an adapter says that there is none, and how to get one."""
    with pytest.raises(
        li.StateError,
        match=r"this model carries no adapter\n=> call inject\(model, targets\) or load\(model, path\) first",
    ):
        list(verb(base) or ())


def test_unknown_names(two):
    """Every verb that takes a name answers an unknown one with the names that exist."""
    model, _ = two
    for verb in (li.activate, li.eject, li.merge):
        with pytest.raises(li.StateError, match=r"no adapter named 'es'\n=> this model has 'fr', 'de'"):
            verb(model, "es")


@pytest.mark.parametrize(
    "verb",
    [
        li.merge,
        li.unmerge,
        li.eject,
        li.activate,
        lambda m: li.disabled(m).__enter__(),
        lambda m: li.inject(m, ["o_proj"], name="x"),
    ],
)
def test_a_part_of_the_whole_is_refused(two, verb):
    """A verb on a part of a model that was injected as a whole is refused: it would act outside of that part."""
    model, expected = two
    before = state(model)
    with pytest.raises(
        li.StateError,
        match=r"this is a part of a model that was injected as a whole\n=> call it on the whole LlamaForCausalLM",
    ):
        verb(model.model)
    assert state(model) == before
    assert torch.allclose(run(model, X), expected["de"], atol=1e-6)
    assert len(list(li.parameters(model.model.layers[0], "de"))) == 4


def test_a_copy_of_a_part_is_a_whole(two):
    """A deep copy of a part has its separate adapter state, so it can be merged and ejected."""
    model, expected = two
    layer = copy.deepcopy(model.model.layers[0])
    li.merge(layer)
    li.unmerge(layer)
    li.eject(layer)
    assert torch.allclose(run(model, X), expected["de"], atol=1e-6)


@pytest.mark.parametrize("verb", [li.merge, li.eject, li.activate, lambda m: li.inject(m, ["o_proj"], name="x")])
@pytest.mark.parametrize("context", [li.disabled, lambda m: li.rows(m, ["fr", None, "de"])])
def test_no_surgery_inside_a_context(two, verb, context):
    """Verbs that change what disabled and rows restore at their end are refused within them."""
    model, expected = two
    with context(model):
        before = state(model)
        with pytest.raises(
            li.StateError, match=r"cannot .* inside (disabled|rows)\(\.\.\.\)\n=> leave the context first"
        ):
            verb(model)
        assert state(model) == before
    assert torch.allclose(run(model, X), expected["de"], atol=1e-6)


@pytest.mark.parametrize("context", [li.disabled, lambda m: li.rows(m, ["fr", None, "de"])])
def test_a_copy_is_in_no_context(two, context):
    """A copy that is made within a context is not in it: the copy can be switched and merged."""
    model, expected = two
    with context(model):
        other = copy.deepcopy(model)
    li.activate(other, "de")
    assert torch.allclose(run(other, X), expected["de"], atol=1e-6)
    li.merge(other)
    assert torch.allclose(run(model, X), expected["de"], atol=1e-6)


def test_eject_from_the_middle(base):
    """After the second and the third of three adapters were ejected, the first is active."""
    expected = output_alone(base, "a", ["q_proj"], 1)
    for seed, name in enumerate("abc", 1):
        add(base, name, ["q_proj"], seed)
    li.eject(base, "b")
    li.eject(base, "c")
    assert torch.allclose(run(base, X), expected, atol=1e-6)


def test_one_name_is_one_adapter(two):
    """A second inject under the same name is refused, because it would silently join two adapters."""
    model, _ = two
    with pytest.raises(li.TargetError, match=r"the model already carries an adapter named 'fr'"):
        li.inject(model, ["o_proj"], name="fr")


def test_a_failed_inject_keeps_other_adapters():
    """An inject that fails halfway is undone, and the adapter that was on the model before stays."""

    class Strict(nn.Linear):
        def __init_subclass__(cls, *, tag, **kwargs):
            super().__init_subclass__(**kwargs)

    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": Strict(2, 2)})
    li.inject(model, ["a"])
    randomize(model)
    before = state(model)
    with pytest.raises(TypeError, match="tag"):
        li.inject(model, ["a", "b"], name="second")
    assert state(model) == before


def test_eject_thaws_a_parameter_frozen_twice(base):
    """A parameter that the user thaws between two injects is frozen by both, and thawed by eject."""
    before = state(base)
    li.inject(base, ["q_proj"], name="a")
    base.model.norm.weight.requires_grad_()
    li.inject(base, ["v_proj"], name="b")
    assert state(li.eject(base)) == before


def test_rows_refuses_inputs_that_may_be_transposed(two):
    """An input without a sequence axis, or with an axis 1 as long as the batch, is refused as ambiguous."""
    model, _ = two
    up = model.model.layers[0].mlp.up_proj
    with li.rows(model, ["de", None, "fr"]):
        for x in (torch.randn(3, 32), torch.randn(3, 3, 32)):
            with pytest.raises(li.StateError, match="whose first axis is not certain to be these rows"):
                up(x)
        assert up(torch.randn(3, 5, 32)).shape == (3, 5, 48)
    with pytest.raises(li.StateError, match="rows takes a list"), li.rows(model, None):
        pass


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"sparse": True}, {"padding_idx": 2}])
def test_options_of_an_embedding_do_not_change_gradients(options):
    """The options concern the gradient of the frozen table; A and B get the same dense gradients as without them."""
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(7, 4, **options)), torch.tensor([[1, 2, 1]])
    plain = nn.Sequential(nn.Embedding(7, 4, padding_idx=options.get("padding_idx")))
    plain.load_state_dict(model.state_dict())
    for m in (model, plain):
        li.inject(m, ["0"], r=2)
        randomize(m)
        m(ids).square().sum().backward()
    for a, b in zip(li.parameters(model), li.parameters(plain), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_eject_thaws_what_every_inject_froze():
    """A parameter that is added between two injects is frozen by the second; eject thaws what either one froze."""
    model = llama()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    head = model.lm_head.weight
    head.requires_grad_(False)
    li.inject(model, ["q_proj"], name="first")
    layer = model.model.layers[0]
    q_proj = layer.self_attn.q_proj
    q_proj.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
    li.inject(model, ["v_proj"], name="second")
    assert not q_proj.extra.requires_grad
    li.eject(model)
    assert q_proj.extra.requires_grad
    assert {n: p.requires_grad for n, p in model.named_parameters() if not n.endswith("extra")} == before | {
        "lm_head.weight": False
    }


@pytest.mark.parametrize("calls", range(3))
def test_the_next_eject_of_one_adapter_finishes_an_interrupted_one(calls):
    """Whatever the interrupted eject of one adapter of two has done already, the next one raises nothing."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    li.inject(model, ["0"], name="fr")
    before = state(model)
    li.inject(model, ["1"], name="de")
    with contextlib.suppress(KeyboardInterrupt), interrupted("surgery._restore_untouched", calls):
        li.eject(model, "de")
    if calls < 2:
        li.eject(model, "de")
    assert state(model) == before
