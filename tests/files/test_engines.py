"""What is written for a serving engine: the same update of every weight, under the rules that the engine reads by; or a refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

import lorainject as li
from lorainject.files.transforms import halves_from_pairs

from adapter_files import LLAMA_HINTS, records
from example_count import examples
from oracle import dense_deltas, site_delta


def site(path: str, out: int = 8, in_: int = 6, r: int = 2, alpha: float = 2, **more: object) -> li.StoredSite:
    return li.StoredSite(path=path, A=torch.randn(r, in_), B=torch.randn(out, r), alpha=alpha, **more)


def record(*sites: li.StoredSite, **more: object) -> li.AdapterFile:
    return li.AdapterFile(path=Path("made"), format="lorainject", sites=sites, **more)


def plain_peft(folder: Path) -> dict[str, torch.Tensor]:
    """The updates as an engine reads them that knows nothing but r and lora_alpha: independent of our reader."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    assert not any(config[field] for field in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"))
    assert config["bias"] == "none"
    assert config["init_lora_weights"] is True
    assert isinstance(config["target_modules"], list)
    found = {}
    for key, A in tensors.items():
        if key.endswith((".lora_A.weight", ".lora_embedding_A")):
            path = (
                key.removeprefix("base_model.model.").removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
            )
            B = tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            assert A.ndim == 2
            assert len(A) == config["r"]
            found[f"{path}.weight"] = config["lora_alpha"] / config["r"] * (B.double() @ A.double())
    return found


def plain_gguf(path: Path) -> dict[str, torch.Tensor]:
    """The same of llama.cpp, whose q and k are sorted in pairs."""
    import gguf

    reader = gguf.GGUFReader(path)
    alpha, tensors = (
        reader.fields["adapter.lora.alpha"].contents(),
        {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors},
    )
    if any(t.dtype == torch.uint8 for t in tensors.values()):
        tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}  # fmt: skip
    found = {}
    for key, A in tensors.items():
        if key.endswith(".lora_a"):
            _, layer, leaf, *_ = key.split(".")
            B = tensors[key.replace(".lora_a", ".lora_b")].double()
            B = B[halves_from_pairs(len(B), {"attn_q": 4, "attn_k": 2}[leaf])] if leaf in ("attn_q", "attn_k") else B
            found[f"model.layers.{layer}.{names[leaf]}.weight"] = alpha / B.shape[1] * (B @ A.double())
    return found


READ = {"vllm": plain_peft, "sglang": plain_peft, "llama.cpp": plain_gguf}


@pytest.mark.parametrize("engine", READ)
def test_the_same_update(engine, tmp_path_factory):
    """Ranks, scales and scalings that differ by site: an engine that passes over them comes to the very update of each weight."""

    @settings(max_examples=examples(12))
    @given(records())
    def check(file):
        place = tmp_path_factory.mktemp("engine") / "a.gguf"
        place = place if engine == "llama.cpp" else place.with_suffix("")
        done = li.write(file, place, engine=engine, hints=LLAMA_HINTS)
        found, wanted = READ[engine](place), dense_deltas(file)
        assert done.lost == ()
        for name, d in found.items():
            assert torch.allclose(d, wanted.pop(name, torch.zeros((), dtype=d.dtype)), rtol=1e-5, atol=1e-5)
        assert not wanted

    check()


def test_what_was_changed_is_said(tmp_path):
    """Line by line, and nothing where nothing was."""
    a, b = site("m.q_proj", r=2, alpha=4), site("m.v_proj", r=4, alpha=4, scaling="rslora")
    done = li.write(record(a, b, site("m.o_proj", r=4, alpha=8)), tmp_path / "a", engine="vllm")
    assert done.changed == (
        "1 sites are padded with zeros from rank 2 to rank 4",
        "rank-stabilized scales are written as plain alpha: 8",
    )
    assert done.asks == "start vLLM with --enable-lora --max-lora-rank 8"
    done = li.write(record(replace(a, alpha=3), b), tmp_path / "b", engine="vllm")
    assert (
        "1 sites are rescaled from scale 2 to scale 1.5: the rest of the scale is in B" in done.changed
        or "1 sites are rescaled from scale 1.5 to scale 2: the rest of the scale is in B" in done.changed
    )
    assert li.write(record(site("m.v_proj", r=4)), tmp_path / "c", engine="vllm").changed == ()


def test_experts_and_slices(tmp_path):
    """A stack goes apart, by expert, gate and up; a slice becomes the whole weight."""
    E, out, in_, r = 3, 8, 6, 2
    stack = li.StoredSite(path="m.experts", parameter="gate_up_proj", kind="experts", shape=(E, out, in_), A=torch.randn(E, r, in_),
                          B=torch.randn(E, out, r), alpha=4)  # fmt: skip
    part = replace(site("m.qkv", out=3), label="k", rows=(range(3, 6),), shape=(9, 6))
    done = li.write(record(stack, part), tmp_path / "a", engine="sglang")
    assert done.changed[:2] == (
        "1 stacks of experts are written as one linear per expert",
        "1 slices are padded with zeros to the whole weight",
    )
    found, d = plain_peft(tmp_path / "a"), site_delta(stack)
    for e in range(E):
        assert torch.allclose(found[f"m.experts.{e}.gate_proj.weight"], d[e, : out // 2], atol=1e-6)
        assert torch.allclose(found[f"m.experts.{e}.up_proj.weight"], d[e, out // 2 :], atol=1e-6)
    assert torch.allclose(found["m.qkv.weight"][3:6], site_delta(part), atol=1e-6)
    assert not found["m.qkv.weight"][[0, 1, 2, 6, 7, 8]].any()
    assert len(found) == 2 * E + 1


def test_sglang_gets_a_value_beside_each_query(tmp_path):
    """Of zeros, with the model's own size."""
    done = li.write(
        record(site("model.layers.0.self_attn.q_proj", 16, 8)), tmp_path / "a", engine="sglang", hints=LLAMA_HINTS
    )
    assert done.changed == (
        "1 sites of zeros are added, without which SGLang refuses it: model.layers.0.self_attn.v_proj",
    )
    value = plain_peft(tmp_path / "a")["model.layers.0.self_attn.v_proj.weight"]
    assert value.shape == (8, 8)
    assert not value.any()


def conv() -> li.StoredSite:
    return li.StoredSite(path="c", kind="conv", shape=(8, 2, 3, 3), A=torch.randn(2, 18), B=torch.randn(8, 2), alpha=2)


REFUSED = {
    "vllm, DoRA": ("vllm", record(replace(site("m.v_proj"), magnitude=torch.ones(8))), r"vLLM has no place for:\n  - m\.v_proj: magnitudes\n=> serve a merged model"),
    "vllm, DoRA by input": ("vllm", record(replace(site("m.v_proj"), magnitude=torch.ones(6), magnitude_axis="in")), "m.v_proj: magnitudes by input"),
    "vllm, lora_bias": ("vllm", record(replace(site("m.v_proj"), bias=torch.ones(8))), "m.v_proj: bias updates"),
    "vllm, a convolution": ("vllm", record(site("m.v_proj"), conv()), "c: convolutions"),
    "vllm, a bare parameter": ("vllm", record(site("m", kind="matrix", parameter="in_proj_weight", shape=(8, 6))), "m.in_proj_weight: parameters"),
    "vllm, an interleaved stack": ("vllm", record(li.StoredSite(path="m.experts", parameter="gate_up_proj", kind="experts^T", shape=(3, 6, 8), A=torch.ones(3, 2, 6), B=torch.ones(3, 8, 2), alpha=2)), "m.experts.gate_up_proj: stacks"),
    "vllm, a whole tensor": ("vllm", record(site("m.v_proj"), replaced={"lm_head": torch.ones(2, 2)}), "lm_head: a whole tensor"),
    "vllm, a bias of its own": ("vllm", record(site("m.v_proj"), replaced={"m.v_proj.bias": torch.ones(8)}), "m.v_proj.bias: a whole tensor"),
    "vllm, tokens": ("vllm", record(site("m.v_proj"), tokens={"m.embed_tokens": li.TokenRows(ids=(1,), rows=torch.ones(1, 2))}), "rows of trained tokens"),
    "vllm, an embedding": ("vllm", record(site("m.wte", kind="embedding")), r"m\.wte: only embeddings called embed_tokens or lm_head are served"),
    "vllm, rank 513": ("vllm", record(site("m.v_proj", r=513)), r"m\.v_proj: rank 513 is above 512"),
    "sglang, DoRA": ("sglang", record(replace(site("m.v_proj"), magnitude=torch.ones(8))), "SGLang has no place for:\n  - m.v_proj: magnitudes"),
    "sglang, a head": ("sglang", record(site("m.v_proj"), replaced={"score": torch.ones(2, 2)}), "score: a whole tensor"),
    "sglang, q alone": ("sglang", record(site("m.q_proj")), r"m\.q_proj: SGLang needs an adapter on v_proj too; give the model"),
    "llama.cpp, DoRA": ("llama.cpp", record(replace(site("model.layers.0.self_attn.v_proj"), magnitude=torch.ones(8))), "llama.cpp has no place for"),
    "llama.cpp, a head": ("llama.cpp", record(site("model.layers.0.self_attn.v_proj"), replaced={"lm_head": torch.ones(2, 2)}), "lm_head: a whole tensor"),
    "llama.cpp, a convolution": ("llama.cpp", record(conv()), "c: convolutions"),
    "llama.cpp, no such weight": ("llama.cpp", record(site("model.layers.0.attn.wide")), "GGUF's llama has no weight of this name"),
    "transformers, DoRA": ("transformers", record(replace(site("m.v_proj"), magnitude=torch.ones(8))), "transformers has no place for:\n  - m.v_proj: magnitudes"),
}  # fmt: skip


@pytest.mark.parametrize(("engine", "file", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(engine, file, message, tmp_path):
    """With the reason, the way out, and nothing written."""
    with pytest.raises(li.FileError, match=message):
        li.write(
            file,
            tmp_path / ("a.gguf" if engine == "llama.cpp" else "a"),
            engine=engine,
            hints=li.Hints(architecture="llama", heads=(1, 1)),
        )
    assert not list(tmp_path.iterdir())


def test_a_head_that_vllm_takes(tmp_path):
    """`score` and `classifier` go along with it."""
    li.write(record(site("m.v_proj"), replaced={"score": torch.ones(2, 2)}), tmp_path / "a", engine="vllm")
    assert "base_model.model.score.weight" in load_file(tmp_path / "a" / "adapter_model.safetensors")


def test_lossy(tmp_path):
    """What an engine has no room for is left out only when asked for, and named."""
    file = record(replace(site("m.v_proj"), magnitude=torch.ones(8)), conv())
    done = li.write(file, tmp_path / "a", engine="sglang", lossy=True)
    assert done.lost[:2] == ("m.v_proj: magnitudes", "c: convolutions")
    assert plain_peft(tmp_path / "a").keys() == {"m.v_proj.weight"}


def test_names_of_engines():
    """Misspelt, or beside a format: before anything is read."""
    with pytest.raises(
        li.SpecError, match=r"there is no engine 'vlm'\n=> choose one of vllm, sglang, llama\.cpp, transformers"
    ):
        li.convert("x", "y", engine="vlm")
    with pytest.raises(li.SpecError, match="exclude each other"):
        li.write(record(site("a")), "y", engine="vllm", format="peft")
    assert all(e.name == name and e.reads in li.FORMATS for name, e in li.ENGINES.items())


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.*have invalid shape")  # PEFT's, of its own biases
@pytest.mark.parametrize("variant", ["patterns", "lora_bias", "bias", "head", "tokens", "embedding"])
def test_transformers_itself(variant, tmp_path):
    """Its load_adapter computes what PEFT does, of everything that we let through (and not of DoRA, which it drops with a report)."""
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         attention_bias=True, num_labels=3, pad_token_id=0)  # fmt: skip
    options = {
        "patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3}}, "lora_bias": {"lora_bias": True}, "bias": {"bias": "all"},
        "head": {"modules_to_save": ["score"]}, "tokens": {"trainable_token_indices": {"embed_tokens": [1, 5]}}, "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    }[variant]  # fmt: skip
    base = (LlamaForSequenceClassification if variant == "head" else LlamaForCausalLM)(config).eval()
    tuned = get_peft_model(
        deepcopy(base),
        LoraConfig(
            r=4,
            lora_alpha=16,
            task_type="SEQ_CLS" if variant == "head" else "CAUSAL_LM",
            **({"target_modules": ["q_proj", "v_proj"]} | options),
        ),
    )
    for p in tuned.parameters():
        if p.requires_grad:
            p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    ids = torch.arange(1, 9)[None]
    wanted = tuned.eval()(ids).logits
    tuned.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    li.convert(tmp_path / "theirs", tmp_path / "ours", engine="transformers")
    served = deepcopy(base)
    served.load_adapter(str(tmp_path / "ours"))
    assert torch.allclose(served(ids).logits, wanted, atol=1e-5)
    assert not torch.allclose(base(ids).logits, wanted, atol=1e-2)
