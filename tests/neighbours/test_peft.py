"""PEFT, run live: the same numbers, files in both directions, and what happens in PEFT and must not happen here."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lorainject as li

from models import bits, gpt2, ids, llama, randomize, run
from moe_models import gpt_oss, mixtral, moe_model, moe_output

X = {"input_ids": ids()}
SITES = {"llama": (llama, ["q_proj", "v_proj", "down_proj"]), "gpt2": (gpt2, ["c_attn", "mlp.c_proj"])}


@pytest.fixture(autouse=True)
def _ignore_warnings():
    """Some of these tests are about what PEFT warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return llama()


def peft_model(base: nn.Module, seed: int = 0, **config: object) -> PeftModel:
    """Return a PEFT model with random A and B."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**{"r": 4, "lora_alpha": 8} | config))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    return model.eval()


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_same_factors_give_the_same_logits_and_gradients(name, use_rslora):
    """With the A and B of a PEFT model, the logits and the gradients of A and B agree within 1e-5."""
    build, targets = SITES[name]
    torch.manual_seed(0)
    base = build()
    theirs = peft_model(base, target_modules=targets, use_rslora=use_rslora)
    ours = li.inject(base, targets, r=4, alpha=8, scaling="rslora" if use_rslora else "standard")
    pairs = []
    for site in li.find(build(), targets):
        adapter = base.get_submodule(site.path).lora["default"]
        m = theirs.get_submodule(f"base_model.model.{site.path}")
        with torch.no_grad():
            adapter.A.copy_(m.lora_A["default"].weight)
            adapter.B.copy_(m.lora_B["default"].weight)
        pairs += [(adapter.A, m.lora_A["default"].weight), (adapter.B, m.lora_B["default"].weight)]
    our_logits, their_logits = run(ours, X), run(theirs, X)
    assert torch.allclose(our_logits, their_logits, rtol=1e-5, atol=1e-5)
    our_logits.square().mean().backward()
    their_logits.square().mean().backward()
    for p, q in pairs:
        assert q.grad is not None
        assert torch.allclose(p.grad, q.grad, rtol=1e-5, atol=1e-5)


CONFIGS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*\.[qv]_proj"},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 2, r"layers\.1\..*up_proj": 3},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 5, "up_proj": 7},
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("config", [pytest.param(c, id=name) for name, c in CONFIGS.items()])
def test_load_reads_what_peft_saved(base, config, tmp_path):
    """An adapter that PEFT saved loads, and computes the same."""
    theirs = peft_model(base, **config)
    theirs.save_pretrained(tmp_path)
    li.load(base, tmp_path)
    assert torch.allclose(run(base, X), run(theirs, X), atol=1e-5)


@pytest.mark.parametrize("name", SITES)
def test_peft_reads_what_save_wrote(name, tmp_path):
    """PeftModel and transformers' load_adapter read what save writes, also with different ranks and alphas."""
    build, targets = SITES[name]
    torch.manual_seed(0)
    base = build()
    fresh = [copy.deepcopy(base) for _ in range(2)]
    li.inject(base, targets, r=4, alpha=8, overrides={targets[1]: {"r": 2, "alpha": 3}})
    randomize(base)
    path = li.save(base, tmp_path / "a")
    assert torch.allclose(run(PeftModel.from_pretrained(fresh[0], path), X), run(base, X), atol=1e-5)
    fresh[1].load_adapter(str(path))
    assert torch.allclose(run(fresh[1].eval(), X), run(base, X), atol=1e-5)


def test_auto_peft_model_reads_what_save_wrote(base, tmp_path):
    """AutoPeftModelForCausalLM finds the task and the path of the base model in the saved config."""
    from peft import AutoPeftModelForCausalLM

    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    li.inject(model, ["q_proj"], r=4)
    randomize(model)
    path = li.save(model, tmp_path / "a")
    assert torch.allclose(run(AutoPeftModelForCausalLM.from_pretrained(path).eval(), X), run(model, X), atol=1e-5)


def test_peft_reads_an_adapted_embedding(base, tmp_path):
    """PEFT reads an adapted embedding; the file does not hold the base embedding, as PEFT's own file does."""
    fresh = copy.deepcopy(base)
    li.inject(base, ["embed_tokens"], r=4)
    randomize(base)
    path = li.save(base, tmp_path / "a")
    theirs = PeftModel.from_pretrained(fresh, path)
    assert torch.allclose(run(theirs, X), run(base, X), atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours_bytes, their_bytes = ((p / "adapter_model.safetensors").stat().st_size for p in (path, tmp_path / "theirs"))
    assert their_bytes > ours_bytes + base.model.embed_tokens.weight.nbytes // 2


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float64, 50), (torch.float32, 20)])
def test_training_gives_the_same_losses(base, dtype, exact):
    """Fifty AdamW steps from the same A and B on the same data give the same losses, step by step.

    In float32 only the first steps are compared: Adam divides a gradient by its size, so that the rounding of the
    smallest gradients grows, to 1e-4 of the loss.
    """
    base.to(dtype)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft_model(base, target_modules=targets)
    li.inject(base, targets, r=4, alpha=8)
    with torch.no_grad():
        for m in base.modules():
            if hasattr(m, "lora"):
                path = next(p for p, other in base.named_modules() if other is m)
                peer = theirs.get_submodule(f"base_model.model.{path}")
                m.lora["default"].A.copy_(peer.lora_A["default"].weight)
                m.lora["default"].B.copy_(peer.lora_B["default"].weight)
    losses = []
    for model, params in (
        (base, list(li.parameters(base))),
        (theirs, [p for p in theirs.parameters() if p.requires_grad]),
    ):
        optimizer = torch.optim.AdamW(params, lr=1e-2)
        losses.append([])
        for step in range(50):
            x = ids(rows=2, length=9) + step % 3
            loss = model(input_ids=x % 99, labels=x % 99).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][:exact] == pytest.approx(losses[1][:exact], rel=1e-6)
    assert losses[0][-1] < losses[0][0]


def test_a_misspelled_target_is_an_error(base):
    """PEFT silently ignores the misspelled target of ["q_proj", "v_porj"]; inject raises an error."""
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj", "v_porj"]))
    assert not any("v_proj.lora" in k for k, _ in theirs.named_modules())
    with pytest.raises(li.TargetError, match="v_porj"):
        li.inject(base, ["q_proj", "v_porj"])


def test_unmerge_does_not_drift(base):
    """In bfloat16 PEFT's merge and unmerge change base weights; unmerge here restores every bit."""
    base = base.to(torch.bfloat16)
    theirs = peft_model(base, target_modules=["q_proj"])
    before = theirs.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    assert not torch.equal(theirs.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight, before)
    li.inject(base, ["q_proj"], r=4)
    randomize(base)
    bits_before = bits(base.model.layers[0].self_attn.q_proj.weight)
    li.merge(base)
    assert bits(base.model.layers[0].self_attn.q_proj.weight) != bits_before
    li.unmerge(base)
    assert bits(base.model.layers[0].self_attn.q_proj.weight) == bits_before


def test_nan_leaves_nothing_half_merged(base):
    """With a NaN in the second layer, PEFT leaves the first layer merged; merge here changes nothing."""
    theirs = peft_model(base, target_modules=["q_proj"])
    li.inject(base, ["q_proj"], r=4)
    randomize(base)
    for model in (theirs.base_model.model, base):
        q = model.model.layers[1].self_attn.q_proj
        with torch.no_grad():
            (q.lora["default"].A if hasattr(q, "lora") else q.lora_A["default"].weight)[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        theirs.merge_adapter(safe_merge=True)
    assert theirs.base_model.model.model.layers[0].self_attn.q_proj.merged
    before = bits(base.model.layers[0].self_attn.q_proj.weight)
    with pytest.raises(li.MergeError, match="NaN"):
        li.merge(base)
    assert bits(base.model.layers[0].self_attn.q_proj.weight) == before


def test_a_merge_into_a_tied_embedding_is_refused():
    """PEFT merges an adapter on a tied embedding into the output head as well; merge here refuses."""
    tied = llama(tie_word_embeddings=True)
    theirs = peft_model(tied, target_modules=["embed_tokens"])
    hidden = torch.randn(2, 32)
    before = theirs.base_model.model.lm_head(hidden)
    theirs.merge_adapter()
    assert not torch.allclose(theirs.base_model.model.lm_head(hidden), before)
    li.inject(tied, ["embed_tokens"], r=4)
    with pytest.raises(li.MergeError, match="tied to lm_head"):
        li.merge(tied)


def test_another_base_with_the_same_shapes_is_refused(base, tmp_path):
    """PEFT loads an adapter onto a base that it was not made for; load here refuses it by the fingerprint."""
    li.inject(base, ["q_proj"], r=4)
    randomize(base)
    path = li.save(base, tmp_path / "a")
    torch.manual_seed(1)
    other = llama()
    PeftModel.from_pretrained(copy.deepcopy(other), path)
    with pytest.raises(li.FileError, match="made for another base model"):
        li.load(other, path)


def test_merge_and_eject_restore_class_and_flags(base):
    """PEFT's merged layer is a wrapper, and its unloaded base is frozen; here class and flags are the original ones."""
    theirs = peft_model(base, target_modules=["q_proj"])
    theirs.merge_adapter()
    assert type(theirs.base_model.model.model.layers[0].self_attn.q_proj) is not nn.Linear
    theirs.unmerge_adapter()
    assert not any(p.requires_grad for p in theirs.unload().parameters())
    li.inject(base, ["q_proj"], r=4)
    li.merge(base)
    assert type(base.model.layers[0].self_attn.q_proj) is nn.Linear
    assert all(p.requires_grad for p in li.eject(base).parameters())


def test_an_adapter_for_a_larger_model_is_refused(base, tmp_path):
    """PEFT silently drops the second layer of an adapter on a model with one layer; load here raises an error."""
    theirs = peft_model(base, target_modules=["q_proj"])
    theirs.save_pretrained(tmp_path)
    small = llama(num_hidden_layers=1)
    PeftModel.from_pretrained(copy.deepcopy(small), tmp_path)
    with pytest.raises(li.FileError, match=r"layers\.1\.self_attn\.q_proj: is not in this model"):
        li.load(small, tmp_path)


def test_a_checkpoint_of_the_base_still_loads(base):
    """PEFT renames the keys of the base, so that its checkpoint no longer loads; inject keeps them."""
    checkpoint = base.state_dict()
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"])).base_model.model
    assert theirs.load_state_dict(checkpoint, strict=False).missing_keys
    assert not li.inject(base, ["q_proj"]).load_state_dict(checkpoint).missing_keys


def test_a_module_at_two_paths_has_one_adapter():
    """PEFT adapts one of two paths of a module; here both have the same adapter."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    theirs = get_peft_model(Twice(), LoraConfig(target_modules=["first", "second"]))
    assert sum("lora_A.default" in k for k, _ in theirs.named_modules(remove_duplicate=False)) == 1
    ours = li.inject(Twice(), ["first", "second"])
    assert ours.first is ours.second
    assert ours.first.lora is ours.second.lora


EXPERTS = {
    "both stacks": (["experts"], {}),
    "one stack and a linear": (["down_proj", "q_proj"], {}),
    "the router too": (["router", "experts"], {}),
    "ranks that differ": (["experts"], {"overrides": {"gate_up_proj": {"r": 2, "alpha": 8}}}),
    "rslora": (["experts"], {"scaling": "rslora"}),
    "a slice, padded": (["gate_up_proj[up]"], {}),
}


@pytest.mark.parametrize("build", [mixtral, gpt_oss])
@pytest.mark.parametrize(("targets", "settings"), [pytest.param(*w, id=name) for name, w in EXPERTS.items()])
def test_peft_reads_stacked_experts(build, targets, settings, tmp_path):
    """Stacked experts, stored either way, are saved in PEFT's layout, and PEFT computes the same."""
    base = moe_model(build)
    model = li.inject(copy.deepcopy(base), targets, r=3, alpha=6, **settings)
    randomize(model)
    li.save(model, tmp_path, format="peft")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        y = moe_output(model)
        assert (moe_output(theirs) - y).abs().max() < 1e-4 * y.abs().max()
        assert (moe_output(base) - y).abs().max() > 1e-2 * y.abs().max()


def test_convolutions_in_both_directions(tmp_path):
    """PEFT and load read each other's convolutions; a transposed convolution, which PEFT has not, is refused."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1))
    model, x = li.inject(copy.deepcopy(base), "all-conv", r=2), torch.randn(2, 3, 8, 8)
    randomize(model)
    li.save(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(x), model(x), atol=1e-5)
        saved = peft_model(base, target_modules=["0", "1"], r=2, lora_alpha=4)
        saved.save_pretrained(tmp_path / "theirs")
        assert torch.allclose(li.load(copy.deepcopy(base), tmp_path / "theirs")(x), saved(x), atol=1e-5)
    upward = li.inject(nn.Sequential(nn.ConvTranspose2d(3, 6, 3)), "all-conv", r=2)
    with pytest.raises(li.FileError, match=r"PEFT has no place for:\n  - 0: conv\^T"):
        li.save(upward, tmp_path / "up", format="peft")


def test_peft_gets_no_config_for_what_it_would_apply_wrongly(tmp_path):
    """Adapters that PEFT would apply wrongly are saved without PEFT's config, and format="peft" refuses them."""
    circular = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"))
    attention = nn.Sequential(nn.MultiheadAttention(4, 2))
    for model, target, reason in (
        (circular, "0", "PEFT ignores groups, dilation and padding_mode"),
        (attention, "out_proj", "PEFT's layer does nothing"),
    ):
        fresh = copy.deepcopy(model)
        li.inject(model, [target], r=2)
        randomize(model)
        folder = li.save(model, tmp_path / target)
        assert not (folder / "adapter_config.json").exists()
        li.load(fresh, folder)
        assert [bits(p) for p in li.parameters(fresh)] == [bits(p) for p in li.parameters(model)]
        with pytest.raises(li.FileError, match=reason):
            li.save(model, tmp_path / "peft", format="peft")
