"""Slices of fused weights: the paper's W_q and W_v in GPT-2, by part, by row and by role, in memory and in files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import loralib
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXModel,
    GptOssConfig,
    GptOssModel,
    LlavaConfig,
    LlavaModel,
)

import lorainject as li
from lorainject.lora.model_index import adapted_sites

from models import gpt2, ids, llama, randomize, run, state

X = {"input_ids": ids()}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return gpt2().eval()


def names(model: nn.Module, targets: object, **settings: object) -> list[str]:
    return [s.name for s in li.find(model, targets, **settings)]


@pytest.mark.parametrize(("shape", "count"), [
    ({"n_embd": 1024, "n_layer": 24, "n_head": 16}, 393_216),
    ({"n_embd": 1280, "n_layer": 36, "n_head": 20}, 737_280)])  # fmt: skip
def test_trainable_counts_match_the_paper(shape, count):
    """GPT-2 medium and large with LoRA of rank 4 on q and v have the counts of Hu et al. 2021, table 3."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**shape))
    width = shape["n_embd"]
    for targets in (["c_attn[q,v]"], [f"c_attn[0:{width},{2 * width}:{3 * width}]"], ["query", "value"]):
        assert li.find(model, targets, r=4).trainable == count


def test_slices_agree_with_loralib(model):
    """loralib's MergedLinear with enable_lora=[True, False, True] has the output and merged weight of the slices."""
    attention = model.transformer.h[0].attn.c_attn
    li.inject(model, ["h.0.attn.c_attn[q,v]"], r=4, alpha=8)
    randomize(model)
    q, v = (adapted_sites(model)[f"transformer.h.0.attn.c_attn[{part}]"].adapters["default"] for part in "qv")
    in_, out = attention.weight.shape
    theirs = loralib.MergedLinear(in_, out, r=4, lora_alpha=8, enable_lora=[True, False, True], fan_in_fan_out=True)
    with torch.no_grad():
        theirs.weight.copy_(attention.weight)
        theirs.bias.copy_(attention.bias)
        theirs.lora_A.copy_(torch.cat([q.A, v.A]))
        theirs.lora_B.copy_(torch.cat([q.B, v.B]))
        x = torch.randn(2, 5, in_)
        assert torch.allclose(attention(x), theirs(x), atol=1e-5)
        li.merge(model)
        theirs.eval()
        assert torch.allclose(attention.weight, theirs.weight, atol=1e-6)


def test_merging_leaves_the_other_rows_alone(model):
    """Merging adapters on q and v keeps every bit of k, and unmerging restores every bit of q and v."""
    before = state(model)
    weight = model.transformer.h[0].attn.c_attn.weight
    third = weight.shape[1] // 3
    was = weight.detach().clone()
    li.inject(model, ["c_attn[q,v]"], r=4)
    randomize(model)
    y = run(model, X)
    li.merge(model)
    assert torch.equal(weight[:, third : 2 * third], was[:, third : 2 * third])
    assert not torch.isclose(weight[:, :third], was[:, :third]).any(1).all()
    assert torch.allclose(run(model, X), y, atol=1e-5)
    li.unmerge(model)
    assert torch.equal(weight, was)
    assert state(li.eject(model)) == before


def test_a_slice_is_saved_under_its_own_name(model, tmp_path):
    """The file has A and B of the slice only, and no adapter_config.json, with which PEFT would load nothing."""
    base = copy.deepcopy(model)
    li.inject(model, ["c_attn[q]", "mlp.c_fc"], r=4)
    randomize(model)
    tensors = load_file(li.save(model, tmp_path / "a.safetensors"))
    width = model.config.n_embd
    assert tensors["transformer.h.0.attn.c_attn[q].lora_A"].shape == (4, width)
    assert tensors["transformer.h.0.attn.c_attn[q].lora_B"].shape == (width, 4)
    folder = tmp_path / "a"
    li.save(model, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_model.safetensors"]
    assert {s.name for s in li.read(folder).sites} == set(adapted_sites(model))
    fresh = li.load(copy.deepcopy(base), folder)
    assert torch.equal(run(fresh, X), run(model, X))
    li.eject(model)
    li.inject(model, ["mlp.c_fc"], r=4)
    li.save(model, folder)
    assert (folder / "adapter_config.json").exists()
    li.eject(model)
    li.inject(model, ["c_attn[q]"], r=4)
    li.save(model, folder)
    assert not (folder / "adapter_config.json").exists()


@pytest.mark.parametrize("targets", [["c_attn[q,v]"], ["query", "mlp"], ["c_attn[3:9,1:2]", "mlp.c_proj"]])
def test_the_peft_format_pads_slices(model, targets, tmp_path):
    """format="peft" pads slices with zeros to the whole weight: PEFT and lorainject compute the same from the file."""
    base = copy.deepcopy(model)
    li.inject(model, targets, r=3, alpha=5)
    randomize(model)
    y = run(model, X)
    li.save(model, tmp_path, format="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.allclose(run(theirs, X), y, atol=1e-5)
    assert torch.allclose(run(li.load(base, tmp_path), X), y, atol=1e-5)


def test_the_peft_format_pads_slices_of_different_scales(model, tmp_path):
    """Slices with different r and alpha are saved with one scale, and compute the same when they are loaded."""
    base = copy.deepcopy(model)
    li.inject(model, ["c_attn[q,v]"], r=3, alpha=5, overrides={"c_attn[v]": {"r": 2, "alpha": 7}})
    randomize(model)
    li.save(model, tmp_path, format="peft")
    assert torch.allclose(run(li.load(base, tmp_path), X), run(model, X), atol=1e-5)


def merged_after_a_file(model: nn.Module, targets: list[str], weight: nn.Parameter, folder: Path) -> torch.Tensor:
    """Merge slices into a model and return W0. Asserts that a file and the merge give the same output."""
    fresh, was = copy.deepcopy(model), weight.detach().clone()
    li.inject(model, targets, r=2)
    randomize(model)
    y = model(**X).last_hidden_state
    assert torch.equal(li.load(fresh, li.save(model, folder / "a.safetensors"))(**X).last_hidden_state, y)
    li.merge(model)
    assert torch.allclose(model(**X).last_hidden_state, y, atol=1e-4)
    return was


def test_a_slice_of_interleaved_heads(tmp_path):
    """In GPT-NeoX, which keeps q, k, v of a head together, only the first third of each head changes."""
    torch.manual_seed(0)
    model = GPTNeoXModel(
        GPTNeoXConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).eval()
    site = li.find(model, ["query_key_value[q]"], r=2).sites[0]
    assert site.rows == (range(8), range(24, 32))
    weight = model.layers[0].attention.query_key_value.weight
    was = merged_after_a_file(model, ["query_key_value[q]"], weight, tmp_path)
    changed = (weight != was).any(1)
    assert torch.equal(changed.nonzero().flatten(), torch.tensor([*range(8), *range(24, 32)]))


def test_a_slice_of_interleaved_experts(tmp_path):
    """In gpt-oss, which alternates gate and up and stores (E, in, out), only the columns of up change."""
    torch.manual_seed(0)
    config = GptOssConfig(vocab_size=99, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
                          num_attention_heads=2, num_key_value_heads=2, head_dim=8,
                          num_local_experts=4, num_experts_per_tok=2)  # fmt: skip
    model = GptOssModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    weight = model.layers[0].mlp.experts.gate_up_proj
    was = merged_after_a_file(model, ["gate_up_proj[up]"], weight, tmp_path)
    assert torch.equal(weight[..., ::2], was[..., ::2])
    assert (weight[..., 1::2] != was[..., 1::2]).any((0, 1)).all()


ROLES = {
    "query": ["self_attn.q_proj"], "key": ["self_attn.k_proj"], "value": ["self_attn.v_proj"],
    "output": ["self_attn.o_proj"],
    "attention": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    "mlp": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
}  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
def test_each_role_matches_its_projections(role):
    """Every role matches the projections of a Llama that play it."""
    assert names(llama(), [role], layers=[0]) == [f"model.layers.0.{name}" for name in ROLES[role]]


def test_the_head_is_matched_by_role_or_name_only():
    """all-linear leaves the head out and lists it in left_out; the role or name of the head matches it."""
    model = llama()
    assert li.find(model, "all-linear").left_out.keys() == {"lm_head"}
    assert names(model, ["head"]) == ["lm_head"]
    assert li.find(model, ["all-linear", "head"]).left_out == {}


def test_targets_limited_to_a_tower():
    """A keyword, role or glob with the path of a tower matches in this tower only; the plan counts sites per tower."""
    text = {
        "model_type": "llama",
        "vocab_size": 99,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    model = LlavaModel(LlavaConfig(text_config=text, vision_config=vision))
    for targets in (["language_model.all-linear"], ["language_model.*.all-linear"]):
        assert all(name.startswith("language_model.") for name in names(model, targets))
        assert len(names(model, targets)) == 7
    assert names(model, ["vision_tower.query"]) == ["vision_tower.encoder.layers.0.self_attn.q_proj"]
    assert len(names(model, ["language_model.*_proj"])) == 7
    assert str(li.find(model, ["query"])).endswith("of these 1 in vision_tower, 1 in language_model")
    assert "of these 1 in language_model; none in vision_tower" in str(li.find(model, ["language_model.query"]))


WRONG = {
    "a part that is not there": (
        ["c_attn[x]"],
        r"h\.\*\.attn\.c_attn has no part 'x': its parts are q, k, v; or give rows",
    ),
    "an unknown layout": (
        ["mlp.c_fc[q]"],
        r"h\.\*\.mlp\.c_fc has no part 'q': no layout is known for it; or give rows",
    ),
    "rows out of range": (["c_attn[0:9999]"], r"c_attn\[0:9999\]: the weight has the rows 0:96"),
    "no rows": (["c_attn[5:5]"], r"c_attn\[5:5\]: the weight has the rows 0:96"),
    "rows that overlap": (["c_attn[0:9]", "c_attn[8:12]"], r"c_attn\[8:12\] and .*c_attn\[0:9\] overlap"),
    "a part and the whole": (["c_attn[q]", "attn.c_attn"], r"c_attn and .*c_attn\[q\] overlap"),
    "a role that is not there": (
        ["experts"],
        r"'experts' is a role that no weight of this model has; the roles of this model are attention, head, key, "
        r"mlp, output, query, value",
    ),
    "no convolutions": ("all-conv", r"'all-conv' matches nothing: this model has no such weight"),
    "a tower that is not there": (
        ["vision_tower.query"],
        r"'vision_tower\.query' is a role that no weight of vision_tower has",
    ),
    "a slice of nothing": (["c_atn[q]"], r"'c_atn\[q\]' matches nothing \(did you mean 'c_attn'"),
    "a part that is fused": (["q_proj"], r"'q_proj' matches nothing \(did you mean 'c_attn\[q\]'\?\)"),
    "a name in a container": (["h.0.c_attn"], r"'h\.0\.c_attn' matches nothing \(did you mean 'h\.0\.\*\.c_attn'\?\)"),
}


@pytest.mark.parametrize(("targets", "message"), [pytest.param(*w, id=name) for name, w in WRONG.items()])
def test_mistakes_raise_and_change_nothing(model, targets, message):
    """A mistake raises one error that says what the model has instead, and the model is unchanged."""
    before = state(model)
    with pytest.raises(li.TargetError, match=message):
        li.inject(model, targets)
    assert state(model) == before


def test_slices_cannot_be_excluded(model):
    """exclude refuses slices: the other parts of the weight could be meant to stay or not."""
    with pytest.raises(li.TargetError, match=r"exclude 'c_attn\[k\]': a slice cannot be left out"):
        li.inject(model, ["c_attn"], exclude=["c_attn[k]"])


def test_a_slice_by_rows_changes_these_outputs_only():
    """An adapter on rows of a linear changes these outputs only, also with one adapter per row of the batch."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    li.inject(model, ["0[1:3,4:6]"], r=2, name="a")
    randomize(model, "a")
    x = torch.randn(2, 3, 4)
    base = model[0]._lora_base.forward(model[0], x)
    changed = (model[0](x) != base).flatten(0, 1).any(0)
    assert changed.tolist() == [False, True, True, False, True, True]
    with li.rows(model, ["a", None]):
        y = model[0](x)
    assert torch.equal(y[1], base[1])
    assert torch.equal(y[0], model[0](x)[0])
