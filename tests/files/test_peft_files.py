"""PEFT's files of every version and variant: read, put onto a model, and written again."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorainject as li

from models import ids
from oracle import FIXTURES, is_same_record, max_error, merged_weights

VARIANTS = ("plain", "dora", "lora_bias", "bias_all", "bias_lora_only", "tokens", "params")
BASE = FIXTURES / "peft_base.safetensors"
PREFIX = "base_model.model."
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(autouse=True)
def _quiet():
    """Silence PEFT's warnings of what it cannot do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_peft(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], config: Mapping[str, Any]) -> Path:
    """Write an adapter as PEFT does: A and B by path, and a config."""
    folder.mkdir(exist_ok=True)
    tensors = {f"{PREFIX}{path}.lora_A.weight": A for path, (A, _) in factors.items()}
    tensors |= {f"{PREFIX}{path}.lora_B.weight": B for path, (_, B) in factors.items()}
    save_file(tensors, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA"} | dict(config)))
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_record_means_what_peft_computes(variant):
    """DoRA, biases, heads, tokens, convolutions and experts: the record gives PEFT's own merged tensors."""
    folder = FIXTURES / f"peft_{variant}"
    weights = merged_weights(li.read(folder), load_file(BASE))
    assert max_error(weights, load_file(folder / "expected_merged.safetensors")) < 1e-5


@pytest.mark.parametrize("format", ["peft", "lorainject"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_written_again_has_the_same_record(variant, format, tmp_path):
    """write(read(x)) is x; in PEFT's format tensor by tensor under the same keys."""
    folder = FIXTURES / f"peft_{variant}"
    file = li.read(folder)
    done = li.write(file, tmp_path / "a", format=format)
    assert done.lost == ()
    assert is_same_record(li.read(tmp_path / "a"), file)
    if format == "peft":
        theirs, ours = load_file(folder / TENSORS), load_file(tmp_path / "a" / TENSORS)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(t, ours[key]) for key, t in theirs.items())


@pytest.mark.parametrize("name", ["qwen3moe", "gptoss"])
@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", "0.19.1", "0.21.2"])
def test_expert_stacks_of_every_version(version, name):
    """target_parameters, whichever side of the matrices A faced: the logits are those of this version of PEFT."""
    from transformers import AutoModelForCausalLM

    folder = FIXTURES / "peft_target_parameters"
    model = AutoModelForCausalLM.from_pretrained(folder / name).eval()
    expected = torch.load(folder / version / f"{name}.pt")
    with torch.no_grad():
        before = model(expected["ids"]).logits
        after = li.load(model, folder / version / f"{name}_ad")(expected["ids"]).logits
    assert (after - expected["lora"]).abs().max() < 1e-5 < 1e-3 < (before - expected["lora"]).abs().max()


class Experts(nn.Module):
    """A model with one stack of two experts."""

    def __init__(self, rows: int, columns: int, transposed: bool = False) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.is_transposed = transposed
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(2, rows, columns))


STACK = {"r": 2, "lora_alpha": 2, "target_parameters": ["experts.gate_up_proj"]}


def stack_config(version: str | None) -> dict[str, Any]:
    """Return the config of an adapter on a stack of experts; older versions of PEFT did not state theirs."""
    return STACK | ({"peft_version": version} if version else {})


def stored_product(A: Tensor, B: Tensor) -> Tensor:
    """Return B A of two experts of rank 2 from the tensors of a file: rows of A by expert, columns of B by rank."""
    return B.reshape(len(B), 2, 2).permute(2, 0, 1) @ A.reshape(2, 2, -1)


@pytest.mark.parametrize(
    ("version", "transposed", "is_turned"),
    [
        ("0.17.1", False, True),
        (None, False, True),
        ("0.18.1", True, False),
        ("0.19.0", False, True),
        ("0.19.0", True, True),
        ("0.19.1", False, False),
        ("0.22.0.dev0", True, False),
    ],
)
def test_the_version_decides_on_square_stacks(version, transposed, is_turned, tmp_path):
    """Where A fits both sides of the experts' matrices, PEFT's history tells which one it faces."""
    A, B = torch.randn(4, 4), torch.randn(4, 4)
    save_peft(tmp_path, {"experts": (A, B)}, stack_config(version))
    (s,) = li.read(tmp_path, hints=li.Hints(model=Experts(4, 4, transposed))).sites
    product = stored_product(A, B)
    assert torch.allclose(s.B @ s.A, product.mT if is_turned else product)


@pytest.mark.parametrize("version", [None, "0.18.1", "0.19.0", "0.21.2"])
@pytest.mark.parametrize("is_turned", [False, True])
def test_the_shapes_of_the_model_decide_on_other_stacks(is_turned, version, tmp_path):
    """With the model at hand the version does not matter, whether the config states it or not."""
    A, B = (torch.randn(4, 5), torch.randn(3, 4)) if is_turned else (torch.randn(4, 3), torch.randn(5, 4))
    save_peft(tmp_path, {"experts": (A, B)}, stack_config(version))
    (s,) = li.read(tmp_path, hints=li.Hints(model=Experts(5, 3))).sites
    assert s.shape == (2, 5, 3)
    product = stored_product(A, B)
    assert torch.allclose(s.B @ s.A, product.mT if is_turned else product)


MARK = {"lora_B_layout": "grouped_by_expert"}
UNSLOTH = {"unsloth_fixed": True, "base_model_class": "Qwen3MoeForCausalLM"}


@pytest.mark.parametrize(
    ("config", "hints", "is_grouped"),
    [
        ({}, {}, False),
        (MARK, {}, True),
        ({"unsloth_fused_expert_lora": {"parameters": {"experts.gate_up_proj": MARK}}}, {}, True),
        ({"auto_mapping": UNSLOTH}, {}, True),
        ({"auto_mapping": UNSLOTH | {"lora_B_layout": "rank_major"}}, {}, False),
        ({"auto_mapping": UNSLOTH}, {"expert_order": "rank_major"}, False),
        ({}, {"expert_order": "grouped_by_expert"}, True),
    ],
)
def test_the_order_of_the_columns_of_a_stack(config, hints, is_grouped, tmp_path):
    """B's columns are sorted by rank or by expert: the hint decides, then the file, then what unsloth did unmarked."""
    A, B = torch.randn(6, 4), torch.randn(5, 6)
    save_peft(tmp_path, {"experts": (A, B)}, stack_config("0.21.2") | config)
    file = li.read(tmp_path, hints=li.Hints(**hints))
    experts = [B[:, 2 * e : 2 * e + 2] if is_grouped else B[:, e::3] for e in range(3)]
    assert torch.equal(file.sites[0].B, torch.stack(experts))
    has_note = any("unsloth" in note for note in file.notes)
    assert has_note == (is_grouped and "unsloth_fixed" in str(config) and not hints)


def moe_model(name: str) -> tuple[nn.Module, tuple[str, str, str], str]:
    """Return a model with stacked experts, and transformers 4's names of gate, up, down and the block around them."""
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
        config = t.MixtralConfig(**sizes, intermediate_size=12, num_local_experts=4)
        return t.MixtralForCausalLM(config).eval(), ("w1", "w3", "w2"), "block_sparse_moe"
    config = t.Qwen3MoeConfig(**sizes, moe_intermediate_size=12, intermediate_size=24, head_dim=8, num_experts=4)
    return t.Qwen3MoeForCausalLM(config).eval(), ("gate_proj", "up_proj", "down_proj"), "mlp"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_adapters_of_transformers_4_go_onto_stacked_experts(name, tmp_path):
    """Experts that were linear layers then (gate alone, some experts, mixed ranks) are merged as the dense sum."""
    model, (gate, up, down), block = moe_model(name)
    dense, factors = copy.deepcopy(model), {}
    for layer, expert, leaf, r in [(0, 0, gate, 3), (0, 3, gate, 2), (0, 3, up, 3), (0, 1, down, 2), (1, 2, gate, 2)]:
        out, in_ = (16, 12) if leaf == down else (12, 16)
        A, B = torch.randn(r, in_), torch.randn(out, r)
        factors[f"model.layers.{layer}.{block}.experts.{expert}.{leaf}"] = (A, B)
        experts = dense.model.layers[layer].mlp.experts
        weight = experts.down_proj if leaf == down else experts.gate_up_proj
        weight.data[expert, slice(12 if leaf == up else 0, None if leaf == up else out)] += 6 / r * B @ A
    ranks = {path: len(A) for path, (A, _) in factors.items() if len(A) != 2}
    save_peft(tmp_path, factors, {"r": 2, "lora_alpha": 6, "target_modules": "never", "rank_pattern": ranks})
    with torch.no_grad():
        before, expected = model(ids()).logits, dense(ids()).logits
        after = li.load(model, tmp_path)(ids()).logits
    assert (after - expected).abs().max() < 1e-5 < 1e-3 < (before - expected).abs().max()


class Attention(nn.Module):
    """A model with one nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x)[0]


def test_attention_whose_update_counts_twice(tmp_path):
    """PEFT applies out_proj's update of nn.MultiheadAttention twice, in training, too; a hint reads it once."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    base, x = Attention().eval(), torch.randn(2, 3, 8)
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=3, target_modules=["mha"])).eval()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "lora_" in key:
                p.normal_(std=0.3)
        theirs.save_pretrained(tmp_path)
        assert torch.allclose(li.load(copy.deepcopy(base), tmp_path)(x), theirs(x), atol=1e-5)
    hints = li.Hints(out_proj_factor=1)
    file, once = li.read(tmp_path), li.read(tmp_path, hints=hints)
    assert "counts twice" in file.notes[0]
    assert {s.name: s.scale for s in once.sites} == {"mha.out_proj": 1.5, "mha.in_proj_weight": 1.5}

    li.write(file, tmp_path / "peft", format="peft")
    ours, original = load_file(tmp_path / "peft" / TENSORS), load_file(tmp_path / TENSORS)
    assert ours.keys() == original.keys()
    assert all(torch.equal(t, original[key]) for key, t in ours.items())

    with torch.no_grad():
        li.write(once, tmp_path / "once", format="peft")
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "once").eval()
        assert torch.allclose(again(x), li.load(copy.deepcopy(base), tmp_path, hints=hints)(x), atol=1e-5)

    assert is_same_record(li.read(li.write(file, tmp_path / "native").path), file)
    assert not (tmp_path / "native" / CONFIG).exists()  # under which PEFT's out_proj would do nothing


def test_tinkers_experts(tmp_path):
    """One A for all experts and a B for each, or the reverse; w1, w3 and w2; the head under another name."""
    model = moe_model("qwen3_moe")[0]
    dense, factors = copy.deepcopy(model), {}
    experts = dense.model.layers[1].mlp.experts
    cases = [
        ("w1", (12, 16), (1, 4), experts.gate_up_proj, slice(12)),
        ("w3", (12, 16), (1, 4), experts.gate_up_proj, slice(12, None)),
        ("w2", (16, 12), (4, 1), experts.down_proj, slice(None)),
    ]
    for leaf, (out, in_), (count_A, count_B), weight, rows in cases:
        A, B = torch.randn(count_A, 2, in_), torch.randn(count_B, out, 2)
        factors[f"model.layers.1.mlp.experts.{leaf}"] = (A, B)
        weight.data[:, rows] += 2 * B @ A
    A, B = torch.randn(2, 16), torch.randn(99, 2)
    factors["model.unembed_tokens"] = (A, B)
    dense.lm_head.weight.data += 2 * B @ A
    save_peft(tmp_path, factors, {"r": 2, "lora_alpha": 4})
    (tmp_path / CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 4}))  # Tinker's config has no peft_type
    with torch.no_grad():
        assert torch.allclose(li.load(model, tmp_path)(ids()).logits, dense(ids()).logits, atol=1e-4)


def test_adapters_of_transformers_4_merge_into_a_checkpoint(tmp_path):
    """On disk as in memory: the update of a stack goes into the experts' own tensors there."""
    from transformers import AutoModelForCausalLM

    model, (gate, _, down), block = moe_model("mixtral")
    model.save_pretrained(tmp_path / "base")
    factors = {
        f"model.layers.0.{block}.experts.2.{leaf}": (torch.randn(2, in_), torch.randn(out, 2))
        for leaf, out, in_ in ((gate, 12, 16), (down, 16, 12))
    }
    save_peft(tmp_path / "a", factors, {"r": 2, "lora_alpha": 6})
    li.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    loaded = li.load(model, tmp_path / "a")
    with torch.no_grad():
        assert torch.allclose(merged(ids()).logits, loaded(ids()).logits, atol=1e-5)
    with pytest.raises(li.FileError, match=r"lin: a magnitude \(DoRA\); only A and B can be merged on disk"):
        li.merge_checkpoint(tmp_path / "base", FIXTURES / "peft_dora", tmp_path / "dora")


def test_tensors_in_a_pickle(tmp_path):
    """adapter_model.bin is read, as PEFT wrote it before 0.7; next to safetensors it is not opened."""
    folder = FIXTURES / "peft_plain"
    torch.save(load_file(folder / TENSORS), tmp_path / "adapter_model.bin")
    (tmp_path / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    assert is_same_record(li.read(tmp_path, allow_pickle=True), li.read(folder))
    (tmp_path / TENSORS).write_bytes((folder / TENSORS).read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"spoilt")
    assert is_same_record(li.read(tmp_path), li.read(folder))


def raw_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as a trainer dumps them: with the adapter's name, DDP's wrapper, the head and its original."""
    renamed = {}
    for key, t in tensors.items():
        for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            key = f"{key}.".replace(f".{part}.", f".{part}.default.").removesuffix(".")
        renamed[key.replace("head.", "head.modules_to_save.default.")] = t
    renamed[f"{PREFIX}head.original_module.weight"] = torch.zeros(2, 6)
    return {f"module.{key}": t for key, t in renamed.items()}


SPELLINGS = {
    "raw": raw_keys,
    "no prefix": lambda tensors: {key.removeprefix(PREFIX): t for key, t in tensors.items()},
    "fsdp": lambda tensors: {key.replace(PREFIX, f"{PREFIX}_fsdp_wrapped_module."): t for key, t in tensors.items()},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_the_keys(spelling, tmp_path):
    """Trainers' dumps, transformers' own keys and the keys of wrapped models are the same adapter."""
    folder = FIXTURES / "peft_plain"
    tensors = SPELLINGS[spelling](load_file(folder / TENSORS))
    assert tensors.keys().isdisjoint(load_file(folder / TENSORS))
    save_file(tensors, tmp_path / TENSORS)
    (tmp_path / CONFIG).write_text((folder / CONFIG).read_text())
    assert is_same_record(li.read(tmp_path), li.read(folder))


def test_tensors_without_a_config_need_alpha(tmp_path):
    """Without a config the scale is unknown, until a hint tells alpha."""
    path = tmp_path / "x.safetensors"
    save_file({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(4, 2)}, path)
    with pytest.raises(li.FileError, match=r"(?s)no record of alpha.*=> .*Hints\(alpha="):
        li.read(path)
    (s,) = li.read(path, hints=li.Hints(alpha=6)).sites
    assert s.scale == 3
    (s,) = li.read(path, hints=li.Hints(alpha=6, scaling="rslora")).sites
    assert s.scale == pytest.approx(6 / 2**0.5)


@pytest.mark.parametrize("variant", ["plain", "params"])
def test_peft_reads_what_we_write(variant, tmp_path):
    """After a conversion to our format and back, PEFT's own code finds every tensor in its place."""
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    li.convert(FIXTURES / f"peft_{variant}", tmp_path / "ours.safetensors", format="lorainject")
    li.convert(tmp_path / "ours.safetensors", tmp_path / "back", format="peft")
    config = PeftConfig.from_pretrained(str(tmp_path / "back"))
    assert (config.r, config.lora_alpha) == (2, 6)
    theirs = load_file(FIXTURES / f"peft_{variant}" / TENSORS)
    ours = load_peft_weights(str(tmp_path / "back"), device="cpu")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(t, ours[key]) for key, t in theirs.items())


# A file says one thing once


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """Write tensors under these names, with a config of PEFT's."""
    folder.mkdir()
    save_file({key: t.clone() for key, t in tensors.items()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["l"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


A, B = torch.ones(2, 4), torch.ones(4, 2)
PLAIN = {"base_model.model.l.lora_A.weight": A, "base_model.model.l.lora_B.weight": B}


@pytest.mark.parametrize(
    "again",
    [
        {"l.lora_A.weight": 2 * A},
        {"base_model.model._orig_mod.l.lora_B.weight": 2 * B},
        {"module.base_model.model.l.lora_A.weight": 2 * A},
        {"base_model.model.l.lora_embedding_A": 2 * A},
        {"base_model.model.lm_head.weight": A, "base_model.model.lm_head.base_layer.weight": 2 * A},
        {"base_model.model.h.weight": A, "h.modules_to_save.default.weight": 2 * A},
    ],
)
def test_two_keys_for_one_tensor_are_refused(tmp_path, again):
    """A prefix, a wrapper's name or another spelling makes no second tensor: which of the two counts is not known."""
    folder = write_tensors(tmp_path / "a", PLAIN | again, modules_to_save=["h"])
    with pytest.raises(li.FileError, match="is the same tensor as") as error:
        li.read(folder)
    assert list(again)[-1] in str(error.value)


def test_a_rank_that_the_config_contradicts_is_refused(tmp_path):
    """r and rank_pattern must be those of the tensors, since PEFT's scale is alpha / r."""
    with pytest.raises(li.FileError, match="l: A has the rank 2, but the config says 8"):
        li.read(write_tensors(tmp_path / "a", PLAIN, r=8))
    with pytest.raises(li.FileError, match="l: A has the rank 2, but the config says 4"):
        li.read(write_tensors(tmp_path / "b", PLAIN, rank_pattern={"l": 4}))
    assert li.read(write_tensors(tmp_path / "c", PLAIN, r=8, rank_pattern={"l": 2})).sites[0].r == 2


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_of_a_model_without_biases(tmp_path, bias):
    """PEFT writes no bias for a model that has none, whatever `bias` says; where there are biases, they are missed."""
    folder = write_tensors(tmp_path / "a", PLAIN, bias=bias)
    (note,) = (note for note in li.read(folder).notes if "no bias" in note)
    assert note == f"bias is {bias!r}, but the file has no bias, which is right for a model without biases"
    model = nn.ModuleDict({"l": nn.Linear(4, 4, bias=False)})
    li.load(model, folder)
    with pytest.raises(li.FileError, match=r"and the model has l\.bias, but the file has no bias"):
        li.load(nn.ModuleDict({"l": nn.Linear(4, 4)}), folder)
