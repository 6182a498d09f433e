"""Files for serving engines: under the engine's own rules they hold the same update of every weight, or are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

import lorainject as li

from adapter_files import LLAMA_HINTS, plain_gguf, records
from example_count import examples
from oracle import dense_deltas, site_delta


def site(path: str, out: int = 8, in_: int = 6, r: int = 2, alpha: float = 2, **more: object) -> li.StoredSite:
    return li.StoredSite(path=path, A=torch.randn(r, in_), B=torch.randn(out, r), alpha=alpha, **more)


def record(*sites: li.StoredSite, **more: object) -> li.AdapterFile:
    return li.AdapterFile(path=Path("made"), format="lorainject", sites=sites, **more)


def plain_peft(folder: Path) -> dict[str, torch.Tensor]:
    """Return the updates that an engine reads that knows only r and lora_alpha, without lorainject's reader."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert not any(config[field] for field in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"))
    assert config["bias"] == "none"
    assert config["init_lora_weights"] is True
    assert isinstance(config["target_modules"], list)
    updates = {}
    for key, A in tensors.items():
        if key.endswith((".lora_A.weight", ".lora_embedding_A")):
            path = key.removeprefix("base_model.model.").partition(".lora_")[0]
            B = tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            assert A.ndim == 2
            assert len(A) == config["r"]
            updates[f"{path}.weight"] = config["lora_alpha"] / config["r"] * (B.double() @ A.double())
    return updates


READERS = {"vllm": plain_peft, "sglang": plain_peft, "llama.cpp": plain_gguf}


@pytest.mark.parametrize("engine", READERS)
def test_engines_read_the_same_update(engine, tmp_path_factory):
    """Also if ranks, scales and scalings differ by site, which the engine ignores, each weight gets the same update."""

    @settings(max_examples=examples(12))
    @given(records())
    def check(file):
        path = tmp_path_factory.mktemp("engine") / ("a.gguf" if engine == "llama.cpp" else "a")
        done = li.write(file, path, engine=engine, hints=LLAMA_HINTS)
        updates, expected = READERS[engine](path), dense_deltas(file)
        assert done.lost == ()
        for name, d in updates.items():
            assert torch.allclose(d, expected.pop(name, torch.zeros((), dtype=d.dtype)), rtol=1e-5, atol=1e-5)
        assert not expected

    check()


def test_changes_are_listed(tmp_path):
    """`changed` has one line per kind of change, and none if nothing was changed."""
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


def test_stacks_are_split_and_slices_padded(tmp_path):
    """A stack becomes one linear per expert, for gate and up; a slice becomes an adapter on the whole weight."""
    E, out, in_, r = 3, 8, 6, 2
    stack = li.StoredSite(path="m.experts", parameter="gate_up_proj", kind="experts", shape=(E, out, in_),
                          parts={"gate": (range(4),), "up": (range(4, 8),)}, A=torch.randn(E, r, in_),
                          B=torch.randn(E, out, r), alpha=4)  # fmt: skip
    part = replace(site("m.qkv", out=3), label="k", rows=(range(3, 6),), shape=(9, 6))
    done = li.write(record(stack, part), tmp_path / "a", engine="sglang")
    assert done.changed[:2] == (
        "1 stacks of experts are written as one linear per expert",
        "1 slices are padded with zeros to the whole weight",
    )
    updates, d = plain_peft(tmp_path / "a"), site_delta(stack)
    for e in range(E):
        assert torch.allclose(updates[f"m.experts.{e}.gate_proj.weight"], d[e, : out // 2], atol=1e-6)
        assert torch.allclose(updates[f"m.experts.{e}.up_proj.weight"], d[e, out // 2 :], atol=1e-6)
    assert torch.allclose(updates["m.qkv.weight"][3:6], site_delta(part), atol=1e-6)
    assert not updates["m.qkv.weight"][[0, 1, 2, 6, 7, 8]].any()
    assert len(updates) == 2 * E + 1


def test_sglang_gets_an_adapter_on_v_for_each_on_q(tmp_path):
    """The adapter on v_proj is zero and has the size of the model's v_proj."""
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


ATTENTION = "model.layers.0.self_attn.v_proj"
DORA = replace(site("m.v_proj"), magnitude=torch.ones(8))
DORA_BY_INPUT = replace(site("m.v_proj"), magnitude=torch.ones(6), magnitude_axis="in")
BARE_PARAMETER = site("m", kind="matrix", parameter="in_proj_weight", shape=(8, 6))
INTERLEAVED_STACK = li.StoredSite(
    path="m.experts", parameter="gate_up_proj", kind="experts^T", shape=(3, 6, 8),
    A=torch.ones(3, 2, 6), B=torch.ones(3, 8, 2), alpha=2,
)  # fmt: skip
HEAD = {"lm_head": torch.ones(2, 2)}
TOKENS = {"m.embed_tokens": li.TokenRows(ids=(1,), rows=torch.ones(1, 2))}
REFUSED = {
    "vllm": {
        "DoRA": (record(DORA), r"vLLM has no place for:\n  - m\.v_proj: magnitudes\n=> serve a merged model"),
        "DoRA by input": (record(DORA_BY_INPUT), "m.v_proj: magnitudes by input"),
        "lora_bias": (record(replace(site("m.v_proj"), bias=torch.ones(8))), "m.v_proj: bias updates"),
        "a convolution": (record(site("m.v_proj"), conv()), "c: convolutions"),
        "a bare parameter": (record(BARE_PARAMETER), "m.in_proj_weight: parameters"),
        "an interleaved stack": (record(INTERLEAVED_STACK), "m.experts.gate_up_proj: stacks"),
        "a whole tensor": (record(site("m.v_proj"), replaced=HEAD), "lm_head: a whole tensor"),
        "a replaced bias": (
            record(site("m.v_proj"), replaced={"m.v_proj.bias": torch.ones(8)}),
            "m.v_proj.bias: a whole tensor",
        ),
        "tokens": (record(site("m.v_proj"), tokens=TOKENS), "rows of trained tokens"),
        "an embedding": (
            record(site("m.wte", kind="embedding")),
            r"m\.wte: only embeddings called embed_tokens or lm_head are served",
        ),
        "rank 513": (record(site("m.v_proj", r=513)), r"m\.v_proj: rank 513 is above 512"),
    },
    "sglang": {
        "DoRA": (record(DORA), "SGLang has no place for:\n  - m.v_proj: magnitudes"),
        "a head": (record(site("m.v_proj"), replaced={"score": torch.ones(2, 2)}), "score: a whole tensor"),
        "q alone": (record(site("m.q_proj")), r"m\.q_proj: SGLang needs an adapter on v_proj too; give the model"),
    },
    "llama.cpp": {
        "DoRA": (record(replace(site(ATTENTION), magnitude=torch.ones(8))), "llama.cpp has no place for"),
        "a head": (record(site(ATTENTION), replaced=HEAD), "lm_head: a whole tensor"),
        "a convolution": (record(conv()), "c: convolutions"),
        "an unknown weight": (record(site("model.layers.0.attn.wide")), "GGUF's llama has no weight of this name"),
    },
    "transformers": {"DoRA": (record(DORA), "transformers has no place for:\n  - m.v_proj: magnitudes")},
}
REFUSED_CASES = [
    pytest.param(engine, *case, id=f"{engine}, {what}")
    for engine, cases in REFUSED.items()
    for what, case in cases.items()
]


@pytest.mark.parametrize(("engine", "file", "message"), REFUSED_CASES)
def test_what_an_engine_cannot_serve_is_refused(engine, file, message, tmp_path):
    """The error names the reason and the next step, and nothing is written."""
    with pytest.raises(li.FileError, match=message):
        li.write(
            file,
            tmp_path / ("a.gguf" if engine == "llama.cpp" else "a"),
            engine=engine,
            hints=li.Hints(architecture="llama", heads=(1, 1)),
        )
    assert not list(tmp_path.iterdir())


def test_vllm_takes_the_heads_of_classifiers(tmp_path):
    """A replaced `score` is written for vLLM."""
    li.write(record(site("m.v_proj"), replaced={"score": torch.ones(2, 2)}), tmp_path / "a", engine="vllm")
    assert "base_model.model.score.weight" in load_file(tmp_path / "a" / "adapter_model.safetensors")


def test_lossy_leaves_out_what_an_engine_cannot_serve(tmp_path):
    """With lossy=True features are left out, and `lost` names them."""
    file = record(replace(site("m.v_proj"), magnitude=torch.ones(8)), conv())
    done = li.write(file, tmp_path / "a", engine="sglang", lossy=True)
    assert done.lost[:2] == ("m.v_proj: magnitudes", "c: convolutions")
    assert plain_peft(tmp_path / "a").keys() == {"m.v_proj.weight"}


def test_wrong_names_of_engines_are_refused():
    """An unknown engine, or an engine together with a format, is refused before anything is read."""
    with pytest.raises(
        li.SpecError, match=r"there is no engine 'vlm'\n=> choose one of vllm, sglang, llama\.cpp, transformers"
    ):
        li.convert("x", "y", engine="vlm")
    with pytest.raises(li.SpecError, match="exclude each other"):
        li.write(record(site("a")), "y", engine="vllm", format="peft")
    assert all(e.name == name and e.reads in li.FORMATS for name, e in li.ENGINES.items())


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.*have invalid shape")  # PEFT's, of its own biases
@pytest.mark.parametrize("variant", ["patterns", "lora_bias", "bias", "head", "tokens", "embedding"])
def test_transformers_itself_serves_what_is_written(variant, tmp_path):
    """load_adapter gives the same logits as PEFT for everything that is not refused."""
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, attention_bias=True, num_labels=3,
                         pad_token_id=0)  # fmt: skip
    options = {
        "patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3}},
        "lora_bias": {"lora_bias": True},
        "bias": {"bias": "all"},
        "head": {"modules_to_save": ["score"]},
        "tokens": {"trainable_token_indices": {"embed_tokens": [1, 5]}},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    }[variant]
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
    expected = tuned.eval()(ids).logits
    tuned.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    li.convert(tmp_path / "theirs", tmp_path / "ours", engine="transformers")
    served = deepcopy(base)
    served.load_adapter(str(tmp_path / "ours"))
    assert torch.allclose(served(ids).logits, expected, atol=1e-5)
    assert not torch.allclose(base(ids).logits, expected, atol=1e-2)
