"""PEFT's files of every version and variant: read, put onto a model, and written again."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorainject as li

from models import ids
from oracle import FIXTURES, is_same_record, max_error, merged_weights

VARIANTS = ("plain", "dora", "lora_bias", "bias_all", "bias_lora_only", "tokens", "params")
BASE = FIXTURES / "peft_base.safetensors"


@pytest.fixture(autouse=True)
def _quiet():
    """PEFT warns of what it can't do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_record_means_what_peft_computes(variant):
    """DoRA, biases, heads, tokens, convolutions and experts: the record, taken at its word, gives PEFT's own merged tensors."""
    folder = FIXTURES / f"peft_{variant}"
    file = li.read(folder)
    assert max_error(merged_weights(file, load_file(BASE)), load_file(folder / "expected_merged.safetensors")) < 1e-5


@pytest.mark.parametrize("format", ["peft", "lorainject"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant, format, tmp_path):
    """write(read(x)) is x: in PEFT's format tensor for tensor under the same names."""
    file = li.read(FIXTURES / f"peft_{variant}")
    done = li.write(file, tmp_path / "a", format=format)
    assert done.lost == ()
    assert is_same_record(li.read(tmp_path / "a"), file)
    if format == "peft":
        theirs, ours = (
            load_file(p / "adapter_model.safetensors") for p in (FIXTURES / f"peft_{variant}", tmp_path / "a")
        )
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(t, ours[key]) for key, t in theirs.items())


@pytest.mark.parametrize("name", ["qwen3moe", "gptoss"])
@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", "0.19.1", "0.21.2"])
def test_expert_stacks_of_every_version(version, name):
    """target_parameters, whichever side of the matrices A faced: the logits that this version of PEFT computed."""
    from transformers import AutoModelForCausalLM

    folder = FIXTURES / "peft_target_parameters"
    model = AutoModelForCausalLM.from_pretrained(folder / name).eval()
    wanted = torch.load(folder / version / f"{name}.pt")
    with torch.no_grad():
        before = model(wanted["ids"]).logits
        after = li.load(model, folder / version / f"{name}_ad")(wanted["ids"]).logits
    assert (after - wanted["lora"]).abs().max() < 1e-5 < 1e-3 < (before - wanted["lora"]).abs().max()


class Square(nn.Module):
    """Experts whose shapes don't tell which side is which."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.is_transposed = transposed
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 4))


@pytest.mark.parametrize(
    ("version", "transposed", "turned"),
    [("0.17.1", False, True), (None, False, True), ("0.18.1", True, False), ("0.19.0", False, True), ("0.19.0", True, True), ("0.19.1", False, False),
     ("0.22.0.dev0", True, False)],
)  # fmt: skip
def test_square_stacks_go_by_the_version(version, transposed, turned, tmp_path):
    """Where both readings fit, PEFT's history decides."""
    A, B = torch.randn(4, 4), torch.randn(4, 4)
    save_file(
        {"base_model.model.experts.lora_A.weight": A, "base_model.model.experts.lora_B.weight": B},
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["experts.gate_up_proj"]} | (
        {"peft_version": version} if version else {}
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (s,) = li.read(tmp_path, hints=li.Hints(model=Square(transposed))).sites
    first = B.reshape(4, 2, 2).permute(2, 0, 1) @ A.reshape(2, 2, 4)
    assert torch.allclose(s.B @ s.A, first.mT if turned else first)


@pytest.mark.parametrize("version", [None, "0.18.1", "0.19.0", "0.21.2"])
@pytest.mark.parametrize("turned", [False, True])
def test_with_the_model_the_shapes_decide(turned, version, tmp_path):
    """Whatever the config says of the version, or doesn't."""
    model = Square(False)
    model.experts.gate_up_proj = nn.Parameter(torch.zeros(2, 5, 3))
    A, B = (torch.randn(4, 5), torch.randn(3, 4)) if turned else (torch.randn(4, 3), torch.randn(5, 4))
    save_file(
        {"base_model.model.experts.lora_A.weight": A, "base_model.model.experts.lora_B.weight": B},
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["experts.gate_up_proj"]} | (
        {"peft_version": version} if version else {}
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (s,) = li.read(tmp_path, hints=li.Hints(model=model)).sites
    first = B.reshape(len(B), 2, 2).permute(2, 0, 1) @ A.reshape(2, 2, -1)
    assert s.shape == (2, 5, 3)
    assert torch.allclose(s.B @ s.A, first.mT if turned else first)


@pytest.mark.parametrize(
    ("config", "hints", "grouped"),
    [
        ({}, {}, False),
        ({"lora_B_layout": "grouped_by_expert"}, {}, True),
        (
            {
                "unsloth_fused_expert_lora": {
                    "parameters": {"experts.gate_up_proj": {"lora_B_layout": "grouped_by_expert"}}
                }
            },
            {},
            True,
        ),
        ({"auto_mapping": {"unsloth_fixed": True, "base_model_class": "Qwen3MoeForCausalLM"}}, {}, True),
        (
            {
                "auto_mapping": {
                    "unsloth_fixed": True,
                    "base_model_class": "Qwen3MoeForCausalLM",
                    "lora_B_layout": "rank_major",
                }
            },
            {},
            False,
        ),
        (
            {"auto_mapping": {"unsloth_fixed": True, "base_model_class": "Qwen3MoeForCausalLM"}},
            {"expert_order": "rank_major"},
            False,
        ),
        ({}, {"expert_order": "grouped_by_expert"}, True),
    ],
)
def test_unsloths_order(config, hints, grouped, tmp_path):
    """B's columns by rank, or by expert: as the caller says, else the file, else what unsloth did before it said so."""
    A, B = torch.randn(6, 4), torch.randn(5, 6)
    save_file(
        {"base_model.model.experts.lora_A.weight": A, "base_model.model.experts.lora_B.weight": B},
        tmp_path / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_parameters": ["experts.gate_up_proj"],
        "peft_version": "0.21.2",
    } | config
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    file = li.read(tmp_path, hints=li.Hints(**hints))
    wanted = torch.stack([B[:, 2 * e : 2 * e + 2] if grouped else B[:, e::3] for e in range(3)])
    assert torch.equal(file.sites[0].B, wanted)
    assert any("unsloth" in note for note in file.notes) == (grouped and "unsloth_fixed" in str(config) and not hints)


def _moe(name: str) -> tuple[nn.Module, tuple[str, str, str], str]:
    import transformers as t

    sizes = {
        "vocab_size": 99,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
    }
    torch.manual_seed(0)
    if name == "mixtral":
        return (
            t.MixtralForCausalLM(t.MixtralConfig(**sizes, intermediate_size=12, num_local_experts=4)),
            ("w1", "w3", "w2"),
            "block_sparse_moe",
        )
    config = t.Qwen3MoeConfig(**sizes, moe_intermediate_size=12, intermediate_size=24, head_dim=8, num_experts=4)
    return t.Qwen3MoeForCausalLM(config), ("gate_proj", "up_proj", "down_proj"), "mlp"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_adapters_of_transformers_4s_experts(name, tmp_path):
    """Each expert was a linear then, now there are stacks: gate alone in one layer, some experts only, mixed ranks; the dense sum is the judge."""
    model, (gate, up, down), block = _moe(name)
    dense, tensors = copy.deepcopy(model.eval()), {}
    for layer, expert, leaf, r in [(0, 0, gate, 3), (0, 3, gate, 2), (0, 3, up, 3), (0, 1, down, 2), (1, 2, gate, 2)]:
        out, in_ = (16, 12) if leaf == down else (12, 16)
        A, B = torch.randn(r, in_), torch.randn(out, r)
        at = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{leaf}"
        tensors |= {f"{at}.lora_A.weight": A, f"{at}.lora_B.weight": B}
        experts = dense.model.layers[layer].mlp.experts
        weight = experts.down_proj if leaf == down else experts.gate_up_proj
        weight.data[expert, slice(12 if leaf == up else 0, None if leaf == up else out)] += 6 / r * B @ A
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": "never"})
    )
    with torch.no_grad():
        before, wanted = model(ids()).logits, dense(ids()).logits
        assert (
            (li.load(model, tmp_path)(ids()).logits - wanted).abs().max() < 1e-5 < 1e-3 < (before - wanted).abs().max()
        )


def test_attention_whose_update_counts_twice(tmp_path):
    """nn.MultiheadAttention in PEFT applies out_proj's update twice: what was trained so is read so, and is one hint away from once."""
    from peft import LoraConfig, PeftModel, get_peft_model

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.mha(x, x, x)[0]

    torch.manual_seed(0)
    base, x = Attend().eval(), torch.randn(2, 3, 8)
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=3, target_modules=["mha"])).eval()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "lora_" in key:
                p.normal_(std=0.3)
        theirs.save_pretrained(tmp_path)
        assert torch.allclose(li.load(copy.deepcopy(base), tmp_path)(x), theirs(x), atol=1e-5)
    file, once = li.read(tmp_path), li.read(tmp_path, hints=li.Hints(out_proj_factor=1))
    assert "counts twice" in file.notes[0]
    assert {s.name: s.scale for s in once.sites} == {"mha.out_proj": 1.5, "mha.in_proj_weight": 1.5}
    li.write(file, tmp_path / "peft", format="peft")
    ours, they = (load_file(p / "adapter_model.safetensors") for p in (tmp_path / "peft", tmp_path))
    assert ours.keys() == they.keys()
    assert all(torch.equal(t, they[key]) for key, t in ours.items())
    with torch.no_grad():
        li.write(once, tmp_path / "once", format="peft")
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "once").eval()
        assert torch.allclose(
            again(x), li.load(copy.deepcopy(base), tmp_path, hints=li.Hints(out_proj_factor=1))(x), atol=1e-5
        )
    assert is_same_record(li.read(li.write(file, tmp_path / "native").path), file)
    assert not (tmp_path / "native" / "adapter_config.json").exists()  # in which PEFT's out_proj would do nothing


def test_tinkers_experts(tmp_path):
    """One A for all experts, a B for each; w1, w3 and w2; the head by another name: onto a model with stacks."""
    model = _moe("qwen3_moe")[0].eval()
    dense, at, tensors = copy.deepcopy(model), "base_model.model.model.layers.1.mlp.experts", {}
    for leaf, (out, in_), (a, b) in (("w1", (12, 16), (1, 4)), ("w3", (12, 16), (1, 4)), ("w2", (16, 12), (4, 1))):
        A, B = torch.randn(a, 2, in_), torch.randn(b, out, 2)
        tensors |= {f"{at}.{leaf}.lora_A.weight": A, f"{at}.{leaf}.lora_B.weight": B}
        experts = dense.model.layers[1].mlp.experts
        weight, rows = (
            (experts.down_proj, slice(None))
            if leaf == "w2"
            else (experts.gate_up_proj, slice(12) if leaf == "w1" else slice(12, None))
        )
        weight.data[:, rows] += 2 * B @ A
    A, B = torch.randn(2, 16), torch.randn(99, 2)
    tensors |= {
        "base_model.model.model.unembed_tokens.lora_A.weight": A,
        "base_model.model.model.unembed_tokens.lora_B.weight": B,
    }
    dense.lm_head.weight.data += 2 * B @ A
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    with torch.no_grad():
        assert torch.allclose(li.load(model, tmp_path)(ids()).logits, dense(ids()).logits, atol=1e-4)


def test_transformers_4s_experts_into_a_checkpoint(tmp_path):
    """On disk as in memory: the stacks' update lies in the experts' own tensors there."""
    from transformers import AutoModelForCausalLM

    model, (gate, _, down), block = _moe("mixtral")
    model.save_pretrained(tmp_path / "base")
    tensors = {}
    for leaf, out, in_ in ((gate, 12, 16), (down, 16, 12)):
        at = f"base_model.model.model.layers.0.{block}.experts.2.{leaf}"
        tensors |= {f"{at}.lora_A.weight": torch.randn(2, in_), f"{at}.lora_B.weight": torch.randn(out, 2)}
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    li.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    merged_, loaded = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(),
        li.load(model.eval(), tmp_path / "a"),
    )
    with torch.no_grad():
        assert torch.allclose(merged_(ids()).logits, loaded(ids()).logits, atol=1e-5)
    with pytest.raises(li.FileError, match=r"lin: a magnitude \(DoRA\); merging does not put it on yet"):
        li.merge_checkpoint(tmp_path / "base", FIXTURES / "peft_dora", tmp_path / "dora")


def test_tensors_in_a_pickle(tmp_path):
    """adapter_model.bin, as PEFT wrote it before 0.7; beside safetensors it is passed over."""
    theirs = FIXTURES / "peft_plain"
    torch.save(load_file(theirs / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_bytes((theirs / "adapter_config.json").read_bytes())
    assert is_same_record(li.read(tmp_path, allow_pickle=True), li.read(theirs))
    (tmp_path / "adapter_model.safetensors").write_bytes((theirs / "adapter_model.safetensors").read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"spoilt")
    assert is_same_record(li.read(tmp_path), li.read(theirs))


def raw(tensors):
    """As a trainer dumps them: the adapter's name in the keys, wrappers in front, a head and its original beside each other."""
    named = {
        key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): t
        for key, t in tensors.items()
        if "head" not in key
    }
    named = {
        key.replace("embedding_A", "embedding_A.default").replace("embedding_B", "embedding_B.default"): t
        for key, t in named.items()
    }
    heads = {key.replace("head.", "head.modules_to_save.default."): t for key, t in tensors.items() if "head" in key}
    return {
        f"module.{key}": t
        for key, t in (named | heads | {"base_model.model.head.original_module.weight": torch.zeros(2, 6)}).items()
    }


DIALECTS = {
    "raw": raw,
    "no prefix": lambda tensors: {key.removeprefix("base_model.model."): t for key, t in tensors.items()},
    "fsdp": lambda tensors: {
        key.replace("base_model.model.", "base_model.model._fsdp_wrapped_module."): t for key, t in tensors.items()
    },
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_of_the_keys(dialect, tmp_path):
    """Trainers' dumps, transformers' own keys and wrappers' names are the same adapter."""
    folder = FIXTURES / "peft_plain"
    save_file(
        DIALECTS[dialect](load_file(folder / "adapter_model.safetensors")), tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    assert is_same_record(li.read(tmp_path), li.read(folder))


def test_tensors_alone_need_their_alpha(tmp_path):
    """Without a config the scale is unknown, until it is said."""
    save_file({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(4, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(li.FileError, match=r"no record of alpha.*Hints\(alpha="):
        li.read(tmp_path / "x.safetensors")
    assert li.read(tmp_path / "x.safetensors", hints=li.Hints(alpha=6)).sites[0].scale == 3
    assert li.read(tmp_path / "x.safetensors", hints=li.Hints(alpha=6, scaling="rslora")).sites[
        0
    ].scale == pytest.approx(6 / 2**0.5)


@pytest.mark.parametrize("variant", ["plain", "params"])
def test_peft_reads_what_we_write(variant, tmp_path):
    """Converted to our format and back, PEFT's own code still finds every tensor in its place."""
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    li.convert(FIXTURES / f"peft_{variant}", tmp_path / "ours.safetensors", format="lorainject")
    li.convert(tmp_path / "ours.safetensors", tmp_path / "back", format="peft")
    config = PeftConfig.from_pretrained(str(tmp_path / "back"))
    assert (config.r, config.lora_alpha) == (2, 6)
    theirs = load_file(FIXTURES / f"peft_{variant}" / "adapter_model.safetensors")
    back = load_peft_weights(str(tmp_path / "back"), device="cpu")
    assert theirs.keys() == back.keys()
    assert all(torch.equal(t, back[key]) for key, t in theirs.items())
