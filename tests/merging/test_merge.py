"""Merge and unmerge: what they compute, report, refuse and leave behind."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import lorainject as li
from lorainject.lora.model_index import adapted_sites
from lorainject.numerics.journal import TileJournal
from lorainject.numerics.tile_merge import TileWorkspace

from models import TINY, bits, gpt2, ids, llama, randomize, run, state

X = {"input_ids": ids(), "use_cache": False}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = li.inject(llama(), ["q_proj", "v_proj", "down_proj", "embed_tokens"], r=4, alpha=8)
    randomize(model)
    return model


def one_linear(dtype: torch.dtype = torch.float32, std: float = 0.1, features: int = 64) -> nn.Module:
    """Return a linear layer with an adapter, whose delta has elements of about std^2 * sqrt(r)."""
    torch.manual_seed(0)
    model = li.inject(nn.Sequential(nn.Linear(features, features, dtype=dtype)), ["0"], r=4)
    randomize(model, std=std)
    return model


def test_a_merged_model_has_its_original_classes_and_runs_the_base_operators(model):
    """Every module has its original class, and a forward calls exactly the operators of the base model."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operators(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    def operators(m: nn.Module) -> list[str]:
        with Operators() as mode, torch.no_grad():
            run(m, X)
        return mode.names

    base = llama()
    li.merge(model)
    assert [type(m) for p, m in model.named_modules() if ".lora" not in p] == [type(m) for m in base.modules()]
    assert operators(model) == operators(base)
    li.unmerge(model)
    assert len(operators(model)) > len(operators(base))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "whisper"])
def test_eject_after_merge(name):
    """After merge(reversible=False) eject leaves the merged weights; after a reversible merge, the base model."""
    tiny = TINY[name]
    base = tiny.build()
    before = state(base)
    model = li.inject(copy.deepcopy(base), list(tiny.targets), r=4)
    randomize(model)
    y, plain = run(model, tiny.inputs()), run(base, tiny.inputs())
    merged = copy.deepcopy(model)
    report = li.merge(merged, reversible=False)
    assert report.journal_bytes == 0
    with pytest.raises(li.MergeError, match="reversible=False, which keeps nothing to restore it from"):
        li.unmerge(merged)
    li.eject(merged)
    assert [(type(m), list(m.__dict__), list(m._modules)) for m in merged.modules()] == [
        (type(m), list(m.__dict__), list(m._modules)) for m in base.modules()
    ]
    assert [p.requires_grad for p in merged.parameters()] == [p.requires_grad for p in base.parameters()]
    assert torch.allclose(run(merged, tiny.inputs()), y, atol=1e-4)
    assert not torch.allclose(run(merged, tiny.inputs()), plain, atol=1e-4)
    li.merge(model)
    assert state(li.eject(model)) == before


def test_an_irreversible_merge_is_as_exact_and_keeps_nothing(monkeypatch):
    """With reversible=False weights are written at once, and no journal is recorded unless a sum might overflow.

    The delta is formed in float32 then, so a float32 sum may differ in its last bit.
    """
    recorded = []
    monkeypatch.setattr(TileJournal, "record", spy_on(TileJournal.record, recorded))
    for dtype in (torch.float32, torch.bfloat16):
        plain, reversible, large = one_linear(dtype), one_linear(dtype), one_linear(dtype)
        li.merge(plain, reversible=False)
        assert not recorded
        li.merge(reversible)
        torch.testing.assert_close(
            plain[0].weight,
            reversible[0].weight,
            rtol=0,
            atol=torch.finfo(dtype).eps * float(plain[0].weight.abs().max()),
        )
        with torch.no_grad():
            large[0].weight[0, 0] = torch.finfo(dtype).max
        before = state(large)
        recorded.clear()
        li.merge(large, reversible=False)
        assert recorded
        large = one_linear(dtype)
        with torch.no_grad():
            large[0].weight[0, 0] = torch.finfo(dtype).max
            large[0].lora["default"].B[0] = large[0].lora["default"].A[:, 0] * torch.finfo(dtype).max ** 0.5
            large[0].lora["default"].A.mul_(torch.finfo(dtype).max ** 0.5)
        before = state(large)
        with pytest.raises(li.MergeError, match="not finite"):
            li.merge(large, reversible=False)
        assert state(large) == before
        recorded.clear()


def spy_on(function, calls: list):
    """Return the function, with each call's arguments appended to `calls`."""

    def call(*args):
        calls.append(args)
        return function(*args)

    return call


def test_an_irreversible_merge_that_runs_out_of_memory_says_so(model, monkeypatch):
    """Halfway through, with nothing kept, the error says that weights are half merged."""
    original, calls = TileWorkspace.merge_into, iter(range(100))

    def broken(*args):
        if next(calls) == 3:
            raise MemoryError
        return original(*args)

    monkeypatch.setattr(TileWorkspace, "merge_into", broken)
    with pytest.raises(
        li.MergeError, match=r"stopped halfway: some weights are merged.*\n=> load the base model again"
    ):
        li.merge(model, reversible=False)


def test_survival_is_the_share_of_the_delta_that_rounding_left():
    """In bfloat16 most of a small delta is lost, and the report says how much; in float32 all of it survives."""
    assert li.merge(one_linear(std=0.1)).survival == pytest.approx(1, abs=1e-5)
    large = li.merge(one_linear(torch.bfloat16, std=0.3))
    with pytest.warns(
        li.SurvivalWarning,
        match=r"(?s)less than 0\.9 of a delta survives.*"
        r"- 0: keeps 0\.4. of its delta, with a rounding error of 8.%\n=> keep",
    ) as caught:
        small = li.merge(one_linear(torch.bfloat16, std=0.005))
    assert caught[0].filename == __file__
    assert large.sites[0].error < 0.05 < 0.5 < small.sites[0].error
    model = one_linear(torch.bfloat16, std=0.005)
    w0, (_, _, d) = model[0].weight.float().clone(), next(li.deltas(model))
    with pytest.warns(li.SurvivalWarning):
        report = li.merge(model)
    change = model[0].weight.float() - w0
    assert report.survival == pytest.approx(float((change * d).sum() / (d * d).sum()), rel=1e-4)
    assert report.sites[0].error == pytest.approx(float((change - d).norm() / d.norm()), rel=1e-4)
    assert report.sites[0].norm == pytest.approx(float(d.norm()), rel=1e-4)
    assert report.weight_bytes == w0.numel() * 2
    factors = 4 * 4 * (64 + 64)
    assert factors < report.journal_bytes < 1.1 * factors  # the delta is so small that hardly a guess misses
    assert str(report).startswith(
        f"merged default into 1 weights (8,192 bytes, {report.journal_bytes:,} kept for unmerge); 0.4"
    )


def test_strict_refuses_before_anything_is_written():
    """strict=True measures first; strict=False only warns."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(torch.bfloat16)
    li.inject(model, ["0", "1"], r=4)
    randomize(model, std=0.3)
    with torch.no_grad():
        model[1].lora["default"].B *= 3e-4
    before, versions = state(model), [p._version for p in model.parameters()]
    with pytest.raises(
        li.MergeError,
        match=r"(?s)nothing was merged: less than 0\.9.*"
        r"- 1: keeps 0\.4. of its delta, with a rounding error of 8.%\n=> keep",
    ) as e:
        li.merge(model, strict=True)
    assert len(e.value.problems) == 1
    assert (state(model), [p._version for p in model.parameters()]) == (before, versions)
    with pytest.warns(li.SurvivalWarning):
        li.merge(model, strict=False)
    assert state(li.unmerge(model)) == before


def test_the_journal_is_small_and_never_larger_than_a_backup():
    """In bfloat16 it takes 3 % of a copy for a delta of 1 % of the weight, and no more than a copy for a large one."""
    shares = {}
    for share in (0.003, 0.01, 0.03, 0.1, 0.3, 10):
        model = nn.Sequential(nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16))
        nn.init.normal_(model[0].weight, std=0.02)
        li.inject(model, ["0"], r=4)
        randomize(model, std=(0.02 * share / 2) ** 0.5)  # |d| = std^2 sqrt(r) per element
        a = model[0].lora["default"]
        report = li.merge(model)
        shares[share] = (report.journal_bytes - a.A.nbytes - a.B.nbytes) / report.weight_bytes
    assert shares[0.01] < 0.03 < shares[0.03] < 0.08
    assert sorted(shares.values()) == list(shares.values())
    assert shares[10] < 1.001


def three_adapters(dtype: torch.dtype) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return two layers with three adapters, and the first layer's deltas in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 300), nn.Linear(300, 48)).to(dtype)
    for i, (name, targets, r) in enumerate([("a", ["0", "1"], 2), ("b", ["0"], 5), ("c", ["0", "1"], 3)]):
        li.inject(model, targets, r=r, alpha=3, name=name)
        randomize(model, name, seed=i)
    adapters = {n: model[0].lora[n] for n in "abc"}
    return model, {n: (a.scale * a.B.double() @ a.A.double()).detach() for n, a in adapters.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_order_of_merges_and_unmerges_gives_the_same_bits(dtype):
    """Any set of adapters, however it was reached, gives the bits of one merge of them from W0."""
    model, d = three_adapters(dtype)
    li.activate(model, "a", "b", "c")
    before, w0 = state(model), model[0].weight.detach().clone()
    direct = {}
    for names in ("a", "b", "c", "ab", "ac", "bc", "abc"):
        li.activate(model, *names)
        li.merge(model, list(names))
        direct[names] = bits(model[0].weight), bits(model[1].weight)
        exact = w0.double() + sum(d[n] for n in names)
        assert (model[0].weight != exact.to(dtype)).float().mean() < {
            torch.float32: 0.25,
            torch.bfloat16: 2e-4,
            torch.float16: 1e-3,
        }[dtype]  # d is rounded to float32 first
        li.unmerge(model)
    li.activate(model, "a", "b", "c")
    li.merge(model)
    merged = state(model)

    def weight_bits() -> tuple[bytes, bytes]:
        return bits(model[0].weight), bits(model[1].weight)

    assert weight_bits() == direct["abc"]
    for first, then in ("bc", "cb", "ab", "ba", "ac", "ca"):
        li.unmerge(model, first)
        assert weight_bits() == direct["abc".replace(first, "")]
        li.unmerge(model, [then])
        left = next(n for n in "abc" if n not in (first, then))
        assert weight_bits() == direct[left]
        with pytest.raises(li.StateError, match=rf"'{first}' is not merged\n=> merged are '{left}'"):
            li.unmerge(model, first)
        li.merge(model, [first])
        li.merge(model, then)
        assert weight_bits()[0] == direct["abc"][0]  # (the order of the sum may differ, by float32's rounding)
        with pytest.raises(li.StateError, match=rf"'{then}' is already merged"):
            li.merge(model, then)
        li.unmerge(model)
        li.activate(model, "a", "b", "c")
        assert state(model) == before
        li.merge(model)
        assert state(model) == merged


def test_a_further_merge_that_fails_leaves_the_first(model):
    """Law 4 while merged: what was merged stays merged, to the bit."""
    li.inject(model, ["q_proj"], r=2, name="second")
    randomize(model, "second")
    li.activate(model, "default")
    li.merge(model)
    merged = state(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.lora["second"].B.fill_(1e38).neg_()
        model.model.layers[1].self_attn.q_proj.lora["second"].A.fill_(1e38)
    merged = {k: v for k, v in state(model).items() if "lora" not in k}
    with pytest.raises(li.MergeError, match="is not finite"):
        li.merge(model, "second")
    assert {k: v for k, v in state(model).items() if "lora" not in k} == merged
    with pytest.raises(li.StateError, match="'default' is already merged"):
        li.merge(model)


@pytest.mark.parametrize("spoil", ["irreversible", "cast", "edited"])
def test_a_further_merge_needs_w0(model, spoil):
    """Where W0 cannot be restored nothing more is merged, because unmerge would give back what never was W0."""
    li.inject(model, ["q_proj"], r=2, name="second")
    randomize(model, "second")
    li.activate(model, "default")
    li.merge(model, reversible=spoil != "irreversible")
    if spoil == "cast":
        model.to(torch.bfloat16)
    if spoil == "edited":
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    before = state(model)
    match = {
        "irreversible": "reversible=False, which keeps nothing",
        "cast": r"is torch\.bfloat16 .* now",
        "edited": "was changed since it was merged",
    }
    with pytest.raises(li.MergeError, match=match[spoil]):
        li.merge(model, "second")
    assert state(model) == before


def test_an_adapter_that_was_unmerged_alone_is_inactive(model):
    """It stays inactive when the remaining adapters are unmerged."""
    li.inject(model, ["q_proj"], r=2, name="second")
    randomize(model, "second")
    li.activate(model, "second")
    only = run(model, X)
    li.activate(model, "default", "second")
    li.merge(model)
    li.unmerge(model, "default")
    assert torch.allclose(run(model, X), only, atol=1e-6)
    li.unmerge(model)
    assert torch.equal(run(model, X), only)


@pytest.mark.parametrize("plain", [False, pytest.param(True, marks=pytest.mark.long)], ids=["torch.save", "pickle"])
def test_a_fresh_process_can_unmerge(plain, model, tmp_path):
    """The journal is pickled with the model, by torch.save and by pickle."""
    before = {k: bits(v) for k, v in model.state_dict().items() if "lora" not in k}
    li.merge(model)
    if plain:
        (tmp_path / "model.pt").write_bytes(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
    load = "pickle.load(open(sys.argv[1], 'rb'))" if plain else "torch.load(sys.argv[1], weights_only=False)"
    script = (
        "import pickle, sys, torch, lorainject as li\n"
        f"model = li.unmerge({load})\n"
        "torch.save({k: v for k, v in model.state_dict().items() if 'lora' not in k}, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "model.pt", tmp_path / "back.pt"], check=True)
    assert {k: bits(v) for k, v in torch.load(tmp_path / "back.pt").items()} == before


def test_a_delta_with_other_bits_is_refused_unless_the_tile_was_kept(model, monkeypatch):
    """On another device or BLAS library d may differ in its last bits: unmerge sees it, and changes nothing. A tile
    that was kept whole is restored all the same."""
    before = state(model)
    li.merge(model)
    merged = state(model)
    blocks = TileWorkspace._blocks

    def falsify_by(share: float) -> None:
        monkeypatch.setattr(
            TileWorkspace, "_blocks", lambda *args: ((d * (1 + share), parts) for d, parts in blocks(*args))
        )

    falsify_by(1e-5)
    with pytest.raises(li.MergeError, match=r"s B A has other bits here \(another machine or BLAS library\)"):
        li.unmerge(model)
    assert state(model) == merged
    monkeypatch.setattr(TileWorkspace, "_blocks", blocks)
    assert state(li.unmerge(model)) == before
    large = one_linear(torch.bfloat16, std=5)
    before = state(large)
    li.merge(large)
    falsify_by(1e-2)
    assert state(li.unmerge(large)) == before


def test_an_unmerge_that_fails_at_the_last_weight_merges_the_first_again(model):
    """Law 4 for unmerge, in place and with a tile that was kept whole."""
    randomize(model, std=3)
    li.merge(model)
    last = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        last[0, 0] += 1
    merged = state(model)
    with pytest.raises(li.MergeError, match=r"layers\.1\.mlp\.down_proj: was changed") as e:
        li.unmerge(model)
    assert len(e.value.problems) == 1
    assert state(model) == merged


def test_untie_gives_a_tied_weight_memory_of_its_own_until_unmerge(tmp_path):
    """The other module keeps W0, and unmerge ties the two again, with the same Parameter object."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=1, n_head=4)).eval()
    li.inject(model, ["lm_head", "c_attn"], r=4)
    randomize(model)
    before, w0, y = state(model), bits(model.lm_head.weight), run(model, X)
    li.merge(model, untie=True)
    assert bits(model.transformer.wte.weight) == w0 != bits(model.lm_head.weight)
    assert torch.allclose(run(model, X), y, atol=1e-4)
    with torch.no_grad():
        element = model.lm_head.weight[0, 0].clone()
        model.lm_head.weight[0, 0] += 1
        with pytest.raises(li.MergeError, match="lm_head: was changed since it was merged"):
            li.unmerge(model)
        model.lm_head.weight[0, 0] = element
    li.unmerge(model)
    assert state(model) == before
    assert model.lm_head.weight is model.transformer.wte.weight
    y = run(model, X)
    li.merge(model, untie=True, reversible=False)
    li.eject(model)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    assert torch.allclose(run(GPT2LMHeadModel.from_pretrained(tmp_path), X), y, atol=1e-4)


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_is_no_further_from_the_exact_sum_than_peft(dtype, reversible):
    """Compared with W0 + s B A in float64, rounded, no more elements differ than in PEFT's merge, and the error is no
    larger.

    With reversible=False the delta is in float32, as PEFT's is: in half precision a few elements differ that lie next
    to the middle between two numbers.
    """
    import peft

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 384, bias=False, dtype=dtype))
    peft_model = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=8, lora_alpha=12, target_modules=["0"]))
    li.inject(model, ["0"], r=8, alpha=12)
    randomize(model, std=0.05)
    adapter, layer = model[0].lora["default"], peft_model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(adapter.A)
        layer.lora_B["default"].weight.copy_(adapter.B)
    exact = model[0].weight.detach().double() + (adapter.scale * adapter.B.double() @ adapter.A.double()).detach()
    li.merge(model, reversible=reversible)
    peft_model.merge_adapter()

    def errors_of(merged: torch.Tensor) -> tuple[float, float]:
        return float((merged != exact.to(dtype)).float().mean()), float((merged.double() - exact).norm())

    ours, theirs = errors_of(model[0].weight.detach()), errors_of(layer.get_base_layer().weight.detach())
    assert ours[0] <= theirs[0] or (ours[0] < 2e-4 and not reversible and dtype is not torch.float32)
    assert ours[1] <= theirs[1] * (1 + 1e-6)
    assert ours[0] < {torch.float32: 0.3, torch.bfloat16: 2e-4, torch.float16: 2e-3}[dtype]


def test_a_fresh_adapter_changes_no_bit():
    """With B = 0 the weight stays W0, and survival is 1 by convention."""
    model = li.inject(nn.Sequential(nn.Linear(8, 8)), ["0"])
    before = bits(model[0].weight)
    report = li.merge(model)
    assert (report.survival, report.sites[0].error) == (1.0, 0.0)
    assert bits(model[0].weight) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(dtype):
    """In half precision it is the float64 sum, rounded, except for sums next to the middle between two numbers."""
    model = one_linear(dtype, std=0.2, features=256)
    a, w0 = model[0].lora["default"], model[0].weight.detach().double()
    d = (a.scale * a.B.double() @ a.A.double()).detach()
    li.merge(model)
    merged = model[0].weight.detach()
    float32_error = torch.finfo(torch.float32).eps * (
        w0.abs() + d.abs() + 4 * 0.2**2
    )  # of the sum, and of r = 4 products
    half_a_step = torch.finfo(dtype).eps / 2 * (w0 + d).abs() * (dtype is not torch.float32)
    assert bool(((merged.double() - (w0 + d)).abs() <= half_a_step + float32_error + 2.0**-25).all())
    if dtype is not torch.float32:
        assert (merged != (w0 + d).to(dtype)).float().mean() < 1e-3


def test_special_values_are_restored():
    """-0, denormals, the largest finite number, infinity and NaN in W0 come back to the bit."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = one_linear(dtype)
        info = torch.finfo(dtype)
        odd = [-0.0, 0.0, info.smallest_normal / 4, info.max, -info.max, float("inf"), -float("inf"), float("nan")]
        with torch.no_grad():
            model[0].weight[0, : len(odd)] = torch.tensor(odd, dtype=dtype)
            model[0].lora["default"].B[0] *= 1e-4  # keeps the largest finite below overflow
        before = bits(model[0].weight)
        li.merge(model)
        li.unmerge(model)
        assert bits(model[0].weight) == before


def test_an_overflow_refuses_the_whole_merge(model):
    """A sum beyond the dtype's range in the last weight leaves the first ones unchanged, too."""
    model.half()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 65504
        last = model.model.layers[1].mlp.down_proj.lora["default"]
        last.A.fill_(8)
        last.B.fill_(8)
    before = state(model)
    with pytest.raises(
        li.MergeError, match=r"layers\.1\.mlp\.down_proj: W0 \+ s B A is not finite in torch\.float16\n=> lower alpha"
    ):
        li.merge(model)
    assert state(model) == before


def test_a_second_merge_or_unmerge_is_refused(model):
    """Either is an error that changes nothing."""
    with pytest.raises(li.StateError, match=r"nothing is merged\n=> merge\(model\) comes first"):
        li.unmerge(model)
    li.merge(model)
    before = state(model)
    with pytest.raises(li.StateError, match=r"'default' is already merged\n=> call unmerge\(model\) first"):
        li.merge(model)
    assert state(model) == before


def test_verbs_that_need_w0_are_refused_while_merged(model, tmp_path):
    """They would act on W0 + s B A, so each error says to unmerge first."""
    saved = li.save(model, tmp_path / "a.safetensors")
    li.merge(model)
    before = state(model)
    verbs = {
        "inject": lambda: li.inject(model, ["k_proj"], name="b"),
        "load an adapter": lambda: li.load(model, saved, name="b"),
        "activate": lambda: li.activate(model),
        "disable the adapters": lambda: li.disabled(model).__enter__(),
        "route rows": lambda: li.rows(model, [None]).__enter__(),
        "train": lambda: li.parameters(model),
    }
    for verb, call in verbs.items():
        with pytest.raises(
            li.StateError, match=rf"cannot {verb} while 'default' is merged\n=> call unmerge\(model\) first"
        ):
            call()
    assert state(model) == before


def test_training_while_merged_is_refused(model):
    """An optimizer from before the merge cannot step over A and B, which are out of the graph; after unmerge it can."""
    head = model.lm_head.weight.requires_grad_()
    optimizer = torch.optim.SGD([*li.parameters(model), head], lr=0.1)
    li.merge(model)
    before = bits(head)
    run(model, X).sum().backward()
    with pytest.raises(li.StateError, match=r"cannot train while merged.*\n=> call unmerge\(model\) first"):
        optimizer.step()
    assert bits(head) == before
    li.unmerge(model)
    optimizer.step()
    assert bits(head) != before


def test_a_weight_that_was_edited_is_not_overwritten(model):
    """Unmerge writes W0 only over the bits that merge wrote."""
    li.merge(model)
    q = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        q.weight[0, 0] += 1
    before = state(model)
    with pytest.raises(li.MergeError, match=r"layers\.0\.self_attn\.q_proj: was changed since it was merged") as e:
        li.unmerge(model)
    assert len(e.value.problems) == 1
    assert state(model) == before
    with torch.no_grad():
        q.weight[0, 0] -= 1


def test_a_model_that_was_cast_while_merged_is_refused(model):
    """The merged bits are gone in another dtype; the error names both dtypes."""
    li.merge(model)
    model.to(torch.bfloat16)
    before = state(model)
    with pytest.raises(li.MergeError, match=r"q_proj: is torch\.bfloat16 .* but was torch\.float32"):
        li.unmerge(model)
    assert state(model) == before


def test_a_and_b_may_change_while_merged(model):
    """W0 is restored even if A and B were replaced meanwhile."""
    before = [bits(p) for k, p in model.named_parameters() if ".lora." not in k]
    li.merge(model)
    randomize(model, seed=7, std=3)
    li.unmerge(model)
    assert [bits(p) for k, p in model.named_parameters() if ".lora." not in k] == before


def test_names_must_include_the_active_adapters(model):
    """To leave an active adapter out would change the output, and is refused."""
    li.inject(model, ["q_proj"], r=2, name="second")
    randomize(model, "second")
    li.activate(model, "default", "second")
    with pytest.raises(li.StateError, match=r"'second' is active but would not be merged"):
        li.merge(model, "default")
    y = run(model, X)
    li.merge(model, ["default", "second"])
    assert torch.allclose(run(model, X), y, atol=1e-5)
    li.unmerge(model)
    li.activate(model)
    with pytest.raises(li.StateError, match="no adapter is active"):
        li.merge(model)
    li.merge(model, "second")
    li.unmerge(model)
    assert torch.allclose(run(model, X), run(li.eject(model), X), atol=0)


def test_a_tied_weight_is_refused():
    """GPT-2's wte is its lm_head: an adapter on either cannot be merged; on other weights it can."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=1, n_head=4)).eval()
    for target in ("wte", "lm_head"):
        li.inject(model, [target, "c_attn"])
        with pytest.raises(li.MergeError, match=rf"{target}: its weight is tied to"):
            li.merge(model)
        li.eject(model)
    li.inject(model, ["c_attn"])
    assert li.merge(model).survival == 1


def test_deltas_have_the_stored_orientation():
    """For Conv1D, whose weight is (in, out), the delta is transposed; for an embedding (V, d), too."""
    model = li.inject(gpt2(), ["c_attn", "wte"], r=3, alpha=6)
    randomize(model)
    deltas = {path: d for path, w, d in li.deltas(model) if d.shape == w.shape}
    a = model.transformer.h[0].attn.c_attn.lora["default"]
    assert torch.allclose(deltas["transformer.h.0.attn.c_attn"], 2 * (a.B @ a.A).T, atol=1e-6)
    assert set(deltas) == {"transformer.wte", "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"}
    assert not next(li.deltas(model, "default"))[2].requires_grad


def test_shared_memory_is_a_tie():
    """A view of the weight at any offset is a tie, and so is a buffer; a bias that two layers share is not."""
    model = nn.ModuleDict({"q": nn.Linear(4, 4, bias=False), "all": nn.Linear(4, 12, bias=False)})
    model["q"].weight = nn.Parameter(model["all"].weight.data[4:8])
    with pytest.raises(li.MergeError, match=r"q: its weight is tied to all\.weight"):
        li.merge(li.inject(model, ["q"]))
    model = nn.ModuleDict({"q": nn.Linear(4, 4)})
    model["q"].register_buffer("copy", model["q"].weight.detach())
    with pytest.raises(li.MergeError, match=r"q: its weight is tied to q\.copy"):
        li.merge(li.inject(model, ["q"]))
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
    model["k"].bias = model["q"].bias
    assert li.merge(li.inject(model, ["q", "k"])).survival == 1


def test_a_permuted_weight_is_not_overwritten():
    """The checksum tells a weight from one with the same values in other positions."""
    for shuffle in (lambda w: w.flip(0), lambda w: w.flip(1), lambda w: w.t(), lambda w: w.roll(1)):
        model = one_linear()
        li.merge(model)
        with torch.no_grad():
            model[0].weight.copy_(shuffle(model[0].weight.clone()))
        with pytest.raises(li.MergeError, match="was changed since it was merged"):
            li.unmerge(model)


def test_an_interrupted_unmerge_is_finished_by_the_next(model, monkeypatch):
    """Law 4 for unmerge: the second call restores every bit."""
    before = state(model)
    li.merge(model)
    module, calls = sys.modules["lorainject.lora.mounting"], iter(range(100))
    original = module.change_class

    def interrupt(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(module, "change_class", interrupt)
    with pytest.raises(KeyboardInterrupt):
        li.unmerge(model)
    li.unmerge(model)
    assert state(model) == before


def test_loading_a_state_dict_while_merged_is_an_error(model):
    """No merged weight is overwritten, so that unmerge restores the state. A copy refuses as well."""
    checkpoint = {k: torch.full_like(v, 2) for k, v in model.state_dict().items() if ".lora." not in k}
    W0 = {name: site.weight.clone() for name, site in adapted_sites(model).items()}
    li.merge(model)
    twin = pickle.loads(pickle.dumps(model))
    for merged in (model, copy.deepcopy(model), twin):
        with pytest.raises(li.StateError, match=r"(?s)while adapters are merged.*call unmerge\(model\) first"):
            merged.load_state_dict(checkpoint)
        li.unmerge(merged)
        assert all(torch.equal(site.weight, W0[name]) for name, site in adapted_sites(merged).items())
        merged.load_state_dict(checkpoint)


def test_a_state_dict_loads_after_a_merge_for_good_and_eject(model):
    """What refuses to load ends with eject."""
    li.merge(model, reversible=False)
    with pytest.raises(li.StateError, match=r"eject\(model\)"):
        model.load_state_dict(model.state_dict())
    li.eject(model)
    model.load_state_dict(model.state_dict())


def test_the_optimizer_guard_holds_for_copies_and_ends_with_eject(model):
    """A copy of a merged model is guarded, too; after eject the optimizer is free."""
    li.merge(model)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for k, p in twin.named_parameters() if ".lora." in k], lr=0.1)
    with pytest.raises(li.StateError, match="cannot train while merged"):
        optimizer.step()
    li.eject(twin)
    optimizer.step()


def test_a_resized_weight_is_refused(tmp_path):
    """An embedding that grew under its adapter cannot be merged, and its A and B cannot be saved as if they fitted."""
    model = llama(tie_word_embeddings=False)
    li.inject(model, ["embed_tokens"])
    model.resize_token_embeddings(120, mean_resizing=False)
    with pytest.raises(
        li.MergeError, match=r"embed_tokens: its weight is \(120, 32\) now, but A and B were made for another shape"
    ):
        li.merge(model)
    with pytest.raises(li.FileError, match=r"embed_tokens: its weight now has shape \(120, 32\)"):
        li.save(model, tmp_path / "a")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_cuda(dtype):
    """On a GPU the merged output is the unmerged one, and W0 is restored even if the model moved meanwhile."""
    torch.manual_seed(0)
    model = li.inject(llama(hidden_size=256, intermediate_size=512), ["q_proj", "down_proj", "embed_tokens"], r=8).to(
        "cuda", dtype
    )
    randomize(model, std=0.05)
    before, y = state(model), run(model, X)
    for _ in range(100):
        li.merge(model)
        li.unmerge(model)
    assert state(model) == before
    li.merge(model)
    assert torch.allclose(run(model, X).float(), y.float(), atol=torch.finfo(dtype).eps * 30)
    li.unmerge(model.cpu())
    assert state(model) == before


EDITS = {
    "negated": lambda w: w.neg_(),
    "odd columns negated": lambda w: w[:, 1::2].neg_(),
    "every fourth column negated": lambda w: w[:, 3::4].neg_(),
    "odd rows negated": lambda w: w[1::2].neg_(),
    "two signs": lambda w: w.view(-1)[1:4:2].neg_(),
    "last bit": lambda w: w.view(torch.uint8).view(-1)[-1:].bitwise_xor_(1),
    "transposed": lambda w: w.copy_(w.T.clone()),
}


@pytest.mark.parametrize("std", [1e-3, 1.0, 1e3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.filterwarnings("ignore::lorainject.SurvivalWarning")
def test_no_edit_is_undone_as_if_it_were_the_merge(edit, dtype, std):
    """Signs, columns, rows and single bits that were changed since the merge are noticed, and unmerge changes nothing,
    whether the weight was overwritten or replaced."""
    for untie in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64, bias=False)).to(dtype)
        if untie:
            model[1].weight = model[0].weight
        adapter = li.inject(model, ["1"], r=2)[1].lora["default"]
        nn.init.normal_(adapter.B, std=min(std, 100.0) if dtype == torch.float16 else std)
        li.merge(model, untie=untie)
        with torch.no_grad():
            EDITS[edit](model[1].weight)
        edited = state(model)
        with pytest.raises(li.MergeError, match="was changed since it was merged"):
            li.unmerge(model)
        assert state(model) == edited


def test_rows_beside_an_adapted_slice_are_guarded():
    """An edit of rows that have no delta is noticed, too."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.c_attn = nn.Linear(64, 192).double()
    li.inject(model, ["c_attn[0:64]"], r=2)
    randomize(model)
    li.merge(model)
    with torch.no_grad():
        model.c_attn.weight[64:128].neg_()
    with pytest.raises(li.MergeError, match="was changed since it was merged"):
        li.unmerge(model)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("copied", ["pickle", "torch.save", "deepcopy"])
def test_a_merged_model_can_be_copied(copied, merged, model):
    """pickle, torch.save and deepcopy give a model that is merged as well, and that is unmerged to the bit."""
    before = state(model)
    if merged:
        li.merge(model)
    if copied == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif copied == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(model)
    assert state(twin) == state(model)
    for m in (twin, model) if merged else ():
        assert state(li.unmerge(m)) == before


def test_a_merged_model_with_new_parameters_can_be_pickled():
    """The original of an untied weight comes back from a pickle, tied as it was."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(99, 32), nn.Linear(32, 99, bias=False))
    model[1].weight = model[0].weight
    randomize(li.inject(model, ["1"], r=2))
    before = state(model)
    li.merge(model, untie=True)
    twin = li.unmerge(pickle.loads(pickle.dumps(model)))
    assert state(twin) == before
    assert twin[0].weight is twin[1].weight


def test_adapters_merged_one_by_one_are_added_in_the_order_of_the_model():
    """In float64, where the order of the terms changes bits, every order of merges gives those of one merge."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 300)).double()
    for i, name in enumerate("abc"):
        li.inject(model, ["0"], r=5, name=name)
        randomize(model, name, seed=i)
    results = set()
    for order in itertools.permutations("abc"):
        li.activate(model, order[0])
        for name in order:
            li.merge(model, name)
        results.add(bits(model[0].weight))
        li.unmerge(model)
    assert len(results) == 1
