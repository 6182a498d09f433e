"""Several adapters on one model: which are on, for which rows, and taking them off in any order."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lorainject as li
from lorainject.lora import model_index
from lorainject.lora.adapter import LoraAdapter

from models import bits, ids, llama, randomise, run, state

X = {"input_ids": ids(rows=3)}


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return llama()


def add(model: nn.Module, name: str, targets: list[str], seed: int) -> None:
    li.inject(model, targets, r=4, alpha=8, name=name)
    randomise(model, name, seed=seed)


def alone(base: nn.Module, name: str, targets: list[str], seed: int) -> torch.Tensor:
    """What the base computes with just this adapter."""
    model = copy.deepcopy(base)
    add(model, name, targets, seed)
    return run(model, X).detach()


@pytest.fixture
def two(base):
    """A model with adapters on overlapping sites, and what base, fr, de compute."""
    wanted = {
        None: run(base, X).detach(),
        "fr": alone(base, "fr", ["q_proj", "v_proj"], 1),
        "de": alone(base, "de", ["v_proj", "up_proj"], 2),
    }
    add(base, "fr", ["q_proj", "v_proj"], 1)
    add(base, "de", ["v_proj", "up_proj"], 2)
    return base, wanted


def test_the_new_adapter_is_on(two):
    """inject switches the new adapter on, alone; activate chooses; none means the base."""
    model, wanted = two
    assert torch.allclose(run(model, X), wanted["de"], atol=1e-6)
    li.activate(model, "fr")
    assert torch.allclose(run(model, X), wanted["fr"], atol=1e-6)
    li.activate(model, ["fr"])
    assert torch.allclose(run(model, X), wanted["fr"], atol=1e-6)
    li.activate(model)
    assert torch.equal(run(model, X), wanted[None])
    with pytest.raises(li.StateError, match="no adapter is active"):
        li.parameters(model)


def test_adapters_add_up(two):
    """Two adapters that are on are W0 + s1 B1 A1 + s2 B2 A2; merged, they are one rounding of that sum."""
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


def test_rows(two):
    """Each row of the batch gets its own adapter, or none."""
    model, wanted = two
    with li.rows(model, ["de", None, "fr"]):
        y = run(model, X)
    assert torch.allclose(y, torch.stack([wanted["de"][0], wanted[None][1], wanted["fr"][2]]), atol=1e-6)
    assert torch.allclose(run(model, X), wanted["de"], atol=1e-6)


def test_rows_train(two):
    """Within rows each adapter gets the gradient of its own rows alone."""
    model, _ = two
    with li.rows(model, ["fr", "fr", None]):
        run(model, X)[2].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    with li.rows(model, ["fr", "fr", None]):
        run(model, X).square().sum().backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.any() for k, g in grads.items() if ".lora.fr." in k)
    assert all(g is None for k, g in grads.items() if ".lora.de." in k)


def test_rows_in_generate(two):
    """Greedy generation with a KV cache: each row continues as it would alone."""
    model, _ = two
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = []
    for row, name in zip(X["input_ids"], ["de", None, "fr"], strict=True):
        li.activate(model, *([name] if name else []))
        wanted.append(model.generate(row[None], **settings)[0])
    with li.rows(model, ["de", None, "fr"]):
        assert torch.equal(model.generate(X["input_ids"], **settings), torch.stack(wanted))


def test_rows_mistakes_leave_nothing_behind(two):
    """Too few names, an unknown name, a bare string: a clear error, and the next forward is as before."""
    model, wanted = two
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
    assert torch.allclose(run(model, X), wanted["de"], atol=1e-6)


def test_disabled_nests_and_recovers(two):
    """disabled is the base, also nested, and an exception inside leaves nothing switched off."""
    model, wanted = two
    with pytest.raises(RuntimeError, match="mine"), li.disabled(model):
        with li.disabled(model):
            assert torch.equal(run(model, X), wanted[None])
        assert torch.equal(run(model, X), wanted[None])
        raise RuntimeError("mine")
    assert torch.allclose(run(model, X), wanted["de"], atol=1e-6)


@pytest.mark.parametrize("order", [("fr", "de"), ("de", "fr"), (None,)])
def test_eject_in_any_order(base, order):
    """Whichever goes first, the other is untouched, and after the last the model is as it was."""
    before = state(base)
    add(base, "fr", ["q_proj", "v_proj"], 1)
    add(base, "de", ["v_proj", "up_proj"], 2)
    for name in order:
        li.eject(base, name)
    assert state(base) == before


def test_eject_goes_back_to_what_was_on(two):
    """Law 2 for the second adapter: eject leaves the first one on, as before inject."""
    model, wanted = two
    li.eject(model, "de")
    assert torch.allclose(run(model, X), wanted["fr"], atol=1e-6)


def test_parameters_are_those_that_are_on(two):
    """The optimiser gets A and B of the adapters that are on, each once, and no weight of the base."""
    model, _ = two
    assert len(list(li.parameters(model))) == 8
    li.activate(model, "fr", "de")
    assert len(set(li.parameters(model))) == 16
    assert not any(p.requires_grad for k, p in model.named_parameters() if ".lora." not in k)


def test_training_moves_only_a_and_b(base):
    """Ten AdamW steps: the loss falls, the base's bits stay, and eject gives the base back."""
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


def test_train_and_eval_are_respected(base):
    """An eval model stays in eval after inject: no dropout; in train mode the dropout is the adapter's alone."""
    li.inject(base, ["q_proj"], r=4, dropout=0.5)
    randomise(base)
    assert not any(m.training for m in base.modules())
    assert torch.equal(run(base, X), run(base, X))
    base.train()
    assert not torch.equal(run(base, X), run(base, X))
    with li.disabled(base):
        assert torch.equal(run(base, X), run(base, X))


def test_embedding_dropout_drops_tokens():
    """Dropout on a one-hot input keeps or drops the whole token, and scales what it keeps by 1 / (1 - p)."""
    model = li.inject(nn.Sequential(nn.Embedding(10, 6)), ["0"], r=3, dropout=0.5).train()
    randomise(model)
    x = torch.arange(10).repeat(50)
    with li.disabled(model):
        y0 = model(x)
    term = (next(li.deltas(model))[2])[x]
    kept = (model(x) - y0) / term
    assert torch.allclose(kept.min(1).values, kept.max(1).values, atol=1e-3)
    assert set(kept.mean(1).round().unique().tolist()) == {0.0, 2.0}


def test_padding_token_keeps_its_vector():
    """The padding token's vector neither starts nor trains away from the base's."""
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
def test_init(init, deviation):
    """A ~ Kaiming uniform(a = sqrt 5): variance 1 / (3 in); or N(0, 1 / r^2). B = 0."""
    torch.manual_seed(0)
    model = li.inject(nn.Sequential(nn.Linear(768, 8)), ["0"], r=64, init=init)
    adapter = model[0].lora["default"]
    assert isinstance(adapter, LoraAdapter)
    assert adapter.A.std().item() == pytest.approx(deviation, rel=0.02)
    assert not adapter.B.any()


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_dtypes(dtype, wanted):
    """A and B are float32 on half-precision bases, and the output keeps the base's dtype."""
    model = li.inject(nn.Sequential(nn.Linear(8, 8, dtype=dtype)), ["0"], r=2)
    assert {p.dtype for p in li.parameters(model)} == {wanted}
    y = model(torch.randn(2, 8, dtype=dtype))
    assert y.dtype is dtype
    y.sum().backward()
    assert {p.grad.dtype for p in li.parameters(model)} == {wanted}
    model = li.inject(nn.Sequential(nn.Linear(8, 8)), ["0"], r=2, dtype=torch.bfloat16)
    assert {p.dtype for p in li.parameters(model)} == {torch.bfloat16}


def test_float64_gradients():
    """The low-rank term's gradients with respect to x, A and B, against finite differences."""
    model = li.inject(nn.Sequential(nn.Linear(4, 3, dtype=torch.float64)), ["0"], r=2, alpha=3)
    randomise(model)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    adapter = model[0].lora["default"]

    def f(x, A, B):
        return torch.func.functional_call(model, {"0.lora.default.A": A, "0.lora.default.B": B}, (x,))

    assert torch.autograd.gradcheck(f, (x, adapter.A, adapter.B))


def test_parts_and_wholes(base):
    """Injected part by part, verbs on the whole reach every part; one part can go alone."""
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
    """One clear error."""
    with pytest.raises(
        li.StateError,
        match=r"this model carries no adapter\n=> call inject\(model, targets\) or load\(model, path\) first",
    ):
        list(verb(base) or ())


def test_unknown_names(two):
    """Every verb that takes a name says which there are."""
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
    """Adapters injected as a whole share their routing: a verb on a part would switch off, or fold, what lies outside it."""
    model, wanted = two
    before = state(model)
    with pytest.raises(
        li.StateError,
        match=r"this is a part of a model that was injected as a whole\n=> call it on the whole LlamaForCausalLM",
    ):
        verb(model.model)
    assert state(model) == before
    assert torch.allclose(run(model, X), wanted["de"], atol=1e-6)
    assert len(list(li.parameters(model.model.layers[0]))) == 4


def test_a_copy_of_a_part_is_a_whole(two):
    """A deep copy of a part has a routing of its own, and can be merged and ejected."""
    model, wanted = two
    layer = copy.deepcopy(model.model.layers[0])
    li.merge(layer)
    li.unmerge(layer)
    li.eject(layer)
    assert torch.allclose(run(model, X), wanted["de"], atol=1e-6)


@pytest.mark.parametrize("verb", [li.merge, li.eject, li.activate, lambda m: li.inject(m, ["o_proj"], name="x")])
@pytest.mark.parametrize("context", [li.disabled, lambda m: li.rows(m, ["fr", None, "de"])])
def test_no_surgery_inside_a_context(two, verb, context):
    """disabled and rows put things back at their end: what would change in between is refused."""
    model, wanted = two
    with context(model):
        before = state(model)
        with pytest.raises(
            li.StateError, match=r"cannot .* inside (disabled|rows)\(\.\.\.\)\n=> leave the context first"
        ):
            verb(model)
        assert state(model) == before
    assert torch.allclose(run(model, X), wanted["de"], atol=1e-6)


@pytest.mark.parametrize("context", [li.disabled, lambda m: li.rows(m, ["fr", None, "de"])])
def test_a_copy_is_in_no_context(two, context):
    """A copy that was made inside one is free: what computes there by the context's word, is switched by its own."""
    model, wanted = two
    with context(model):
        other = copy.deepcopy(model)
    li.activate(other, "de")
    assert torch.allclose(run(other, X), wanted["de"], atol=1e-6)
    li.merge(other)
    assert torch.allclose(run(model, X), wanted["de"], atol=1e-6)


def test_eject_from_the_middle(base):
    """With three adapters, whichever order they leave in, the one that is on is the last that is still there."""
    wanted = alone(base, "a", ["q_proj"], 1)
    for seed, name in enumerate("abc", 1):
        add(base, name, ["q_proj"], seed)
    li.eject(base, "b")
    li.eject(base, "c")
    assert torch.allclose(run(base, X), wanted, atol=1e-6)


def test_one_name_is_one_adapter(two):
    """The same name for other modules is refused: it would silently join two adapters, and a failure would remove the first."""
    model, _ = two
    with pytest.raises(li.TargetError, match=r"the model already carries an adapter named 'fr'"):
        li.inject(model, ["o_proj"], name="fr")


def test_a_failed_inject_leaves_other_adapters_alone(base):
    """Law 4 with an adapter already there: what fails halfway takes away only what it brought."""

    class Strict(nn.Linear):
        def __init_subclass__(cls, *, tag, **kwargs):
            super().__init_subclass__(**kwargs)

    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": Strict(2, 2)})
    li.inject(model, ["a"])
    randomise(model)
    before = state(model)
    with pytest.raises(TypeError, match="tag"):
        li.inject(model, ["a", "b"], name="second")
    assert state(model) == before


def test_flags_thawed_and_frozen_again(base):
    """A parameter that the user thaws between two injects does not make eject forget what the first one froze."""
    before = state(base)
    li.inject(base, ["q_proj"], name="a")
    base.model.norm.weight.requires_grad_()
    li.inject(base, ["v_proj"], name="b")
    assert state(li.eject(base)) == before


def test_rows_refuses_what_it_cannot_be_sure_of(two):
    """Tokens without a sequence axis (routed to experts, pooled), or an axis 1 as long as the batch, may be in any order."""
    model, _ = two
    up = model.model.layers[0].mlp.up_proj
    with li.rows(model, ["de", None, "fr"]):
        for x in (torch.randn(3, 32), torch.randn(3, 3, 32)):
            with pytest.raises(li.StateError, match="whose first axis is not for certain these rows"):
                up(x)
        assert up(torch.randn(3, 5, 32)).shape == (3, 5, 48)
    with pytest.raises(li.StateError, match="rows takes a list"), li.rows(model, None):
        pass


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"sparse": True}, {"padding_idx": 2}])
def test_options_of_an_embedding(options):
    """They concern the frozen table's own gradient: A and B get theirs as from any other embedding, dense, and none at the padding token."""
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(7, 4, **options)), torch.tensor([[1, 2, 1]])
    plain = nn.Sequential(nn.Embedding(7, 4, padding_idx=options.get("padding_idx")))
    plain.load_state_dict(model.state_dict())
    for m in (model, plain):
        li.inject(m, ["0"], r=2)
        randomise(m)
        m(ids).square().sum().backward()
    for a, b in zip(li.parameters(model), li.parameters(plain), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_switching_asks_no_layer(two, monkeypatch):
    """activate, disabled and rows cost the same however many layers there are; copies, parts and mistakes are looked at as before."""
    model, _ = two
    twin = copy.deepcopy(model)
    walked = []
    walk = model_index.iter_modules
    monkeypatch.setattr(model_index, "iter_modules", lambda m: walked.append(m) or walk(m))
    li.activate(model, "fr")
    with li.disabled(model), li.rows(model, ["de", None]):
        pass
    assert not walked
    li.activate(twin, "de")
    assert walked
    assert [r.active for r in model_index.ModelIndex(model).states] == [("fr",)]
    assert [r.active for r in model_index.ModelIndex(twin).states] == [("de",)]
    with pytest.raises(li.StateError, match="no adapter named 'es'"):
        li.activate(model, "es")
    with pytest.raises(li.StateError, match="part of a model that was injected as a whole"):
        li.activate(model.model.layers[0], "de")
    li.merge(model)
    with pytest.raises(li.StateError, match="cannot activate while 'fr' is merged"):
        li.activate(model, "de")
    li.eject(model)
    with pytest.raises(li.StateError, match="carries no adapter"):
        li.activate(model, "de")


def test_eject_thaws_what_every_inject_froze():
    """A parameter that was thawed between two injects (a new head) is frozen by the second, and both lists are thawed by eject."""
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
