"""Adapters of language models in other libraries' files: what each version wrote, and which hints a file needs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorainject as li

from adapter_files import LORALIB_HINTS, LoralibBase
from oracle import FIXTURES, is_same_record, max_error, module_tree


@pytest.mark.parametrize("format", ["torchtune", "gguf"])
def test_rows_of_q_and_k_are_stored_in_rotary_pairs(format, tmp_path):
    """Part p of pair i is row 2 i + p of a head in the file, and row p d/2 + i in transformers; v keeps its order."""
    d, B = 8, torch.arange(16.0)[:, None]
    sites = tuple(
        li.StoredSite(path=f"model.layers.0.self_attn.{leaf}", A=torch.ones(1, 3), B=B, alpha=1)
        for leaf in ("q_proj", "k_proj", "v_proj")
    )
    file = li.AdapterFile(path=tmp_path, format="peft", sites=sites)
    hints = li.Hints(heads=(2, 1), architecture="llama")
    done = li.write(file, tmp_path / f"a{li.FORMATS[format].suffix}", format=format, hints=hints)
    if format == "torchtune":
        stored = {
            key.split(".")[3]: t for key, t in torch.load(done.path, weights_only=True).items() if "lora_b" in key
        }
    else:
        from gguf import GGUFReader

        names = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj"}
        stored = {
            names[t.name.split(".")[2]]: torch.from_numpy(t.data.copy())
            for t in GGUFReader(done.path).tensors
            if t.name.endswith("lora_b")
        }
    for leaf, size in (("q_proj", d), ("k_proj", 2 * d)):
        expected = [
            float(head * size + p * size // 2 + i)
            for head in range(16 // size)
            for i in range(size // 2)
            for p in range(2)
        ]
        assert stored[leaf].flatten().tolist() == expected
    assert torch.equal(stored["v_proj"], B)


def test_gguf_with_alpha_zero_has_scale_one(tmp_path):
    """alpha = 0 means that the scale is 1, as in llama.cpp."""
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "a.gguf", "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for part, shape in (("lora_a", (2, 3)), ("lora_b", (4, 2))):
        writer.add_tensor(f"blk.3.ffn_up.weight.{part}", torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (s,) = li.read(tmp_path / "a.gguf").sites
    assert (s.path, s.scale) == ("model.layers.3.mlp.up_proj", 1)


def test_gguf_uses_llama_cpps_names_of_any_architecture(tmp_path):
    """GPT-2 is written and read by llama.cpp's own name table, in half and bfloat16; reading needs the model."""
    sites = (
        li.StoredSite(
            path="transformer.h.1.attn.c_attn", A=torch.randn(2, 6).half(), B=torch.randn(18, 2).half(), alpha=4
        ),
        li.StoredSite(
            path="transformer.wte",
            kind="embedding",
            A=torch.randn(2, 9).bfloat16(),
            B=torch.randn(6, 2).bfloat16(),
            alpha=4,
        ),
    )
    file = li.AdapterFile(path=tmp_path, format="peft", sites=sites)
    model = module_tree({"transformer.h.1.attn.c_attn.weight": (18, 6), "transformer.wte.weight": (9, 6)})
    done = li.write(file, tmp_path / "a.gguf", format="gguf", hints=li.Hints(architecture="gpt2"))
    assert is_same_record(li.read(done.path, hints=li.Hints(model=model)), file)
    with pytest.raises(
        li.FileError, match=r"blk\.1\.attn_qkv\.weight\.lora_a: unexpected, .* is known: read the file with the model"
    ):
        li.read(done.path)


def test_old_mlx_files_have_alpha_and_flat_experts(tmp_path):
    """Next to an alpha the scale is scale * alpha / rank, and the lora_a of experts may be one matrix (E r, in)."""
    tensors = {
        "m.layers.0.mlp.switch_mlp.up_proj.lora_a": torch.randn(6, 4),
        "m.layers.0.mlp.switch_mlp.up_proj.lora_b": torch.randn(3, 5, 2),
    }
    save_file(tensors, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"lora_parameters": {"rank": 2, "alpha": 16, "scale": 10.0, "dropout": 0.0}})
    )
    file = li.read(tmp_path)
    assert [s.path for s in file.sites] == [f"m.layers.0.mlp.experts.{e}.up_proj" for e in range(3)]
    assert {s.scale for s in file.sites} == {80}
    assert torch.equal(file.sites[1].A, tensors["m.layers.0.mlp.switch_mlp.up_proj.lora_a"][2:4])
    assert "scale * alpha / rank" in file.notes[0]


@pytest.mark.parametrize(
    ("version", "scale"),
    [("adapters.1.0.1", 1), ("adapters.0.2.0", 1), ("adapters.1.1.0", 3), ("adapter-transformers.3.2", 3)],
)
def test_adapterhub_before_1_1_ignored_alpha(version, scale, tmp_path):
    """The scale is 1 in files of adapters before 1.1.0, and alpha / r in all others, adapter-transformers included."""
    config = json.loads((FIXTURES / "adapterhub_bert" / "adapter_config.json").read_text()) | {"version": version}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_adapter.bin").write_bytes((FIXTURES / "adapterhub_bert" / "pytorch_adapter.bin").read_bytes())
    assert {s.scale for s in li.read(tmp_path, allow_pickle=True).sites} == {scale}


def test_loralib_merges_as_loralib_does():
    """Groups of a MergedLinear, an embedding and a convolution are loaded onto a model and merged."""
    model, folder = LoralibBase(), FIXTURES / "loralib"
    model.load_state_dict(
        {key.replace("conv.conv", "conv"): t for key, t in load_file(folder / "base.safetensors").items()}
    )
    li.merge(li.load(model, folder / "lora.pt", allow_pickle=True, hints=LORALIB_HINTS), reversible=False)
    expected = {
        key.replace("conv.conv", "conv"): t for key, t in load_file(folder / "expected_merged.safetensors").items()
    }
    assert max_error(li.eject(model).state_dict(), expected) < 1e-5


def test_loralib_biases_become_pefts(tmp_path):
    """The biases of adapted layers are written for PEFT with bias = "lora_only" in the config."""
    file = li.read(FIXTURES / "loralib" / "lora_bias.pt", allow_pickle=True, hints=LORALIB_HINTS)
    li.write(file, tmp_path / "a", format="peft")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["bias"] == "lora_only"
    assert set(li.read(tmp_path / "a").replaced) == {"lin.bias", "m101.bias", "m111.bias", "mf.bias"}


def test_loralib_itself_reads_what_is_written(tmp_path):
    """loralib's layers take the state dict, and merging gives the same weights."""
    import loralib

    class LoralibModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.emb = loralib.Linear(5, 4, r=2, lora_alpha=6), loralib.Embedding(7, 4, r=2, lora_alpha=6)
            self.m101 = loralib.MergedLinear(5, 12, r=2, lora_alpha=6, enable_lora=[True, False, True])

    file = li.read(FIXTURES / "loralib" / "lora.pt", allow_pickle=True, hints=LORALIB_HINTS)
    file = replace(file, sites=tuple(s for s in file.sites if s.path in ("lin", "emb", "m101")))
    done = li.write(file, tmp_path / "a.pt", format="loralib")
    model, base = LoralibModel().train(), load_file(FIXTURES / "loralib" / "base.safetensors")
    missing = model.load_state_dict(
        {key: t for key, t in base.items() if key.partition(".")[0] in ("lin", "emb", "m101")}, strict=False
    ).missing_keys
    written = torch.load(done.path, weights_only=True)
    assert sorted(written) == sorted(missing)
    model.load_state_dict(written, strict=False)
    merged = model.eval().state_dict()
    expected = load_file(FIXTURES / "loralib" / "expected_merged.safetensors")
    assert all((merged[key] - expected[key]).abs().max() < 1e-6 for key in ("lin.weight", "emb.weight", "m101.weight"))


def test_loralib_whole_state_dicts(tmp_path):
    """Saved in eval mode, weights hold the update already: they are ignored, and a note says so."""
    folder = FIXTURES / "loralib"
    whole, alone = (
        li.read(folder / n, allow_pickle=True, hints=LORALIB_HINTS)
        for n in ("full_eval_mode_already_merged.pt", "lora.pt")
    )
    assert all(torch.equal(a.A, b.A) and torch.equal(a.B, b.B) for a, b in zip(whole.sites, alone.sites, strict=True))
    assert "may hold the update already" in whole.notes[0]
    assert "head" in whole.replaced
    assert "lin" not in whole.replaced


@pytest.mark.parametrize(
    ("fixture", "hints", "message"),
    [
        ("loralib/lora.pt", li.Hints(), r"does not store alpha: pass it, as in Hints\(alpha=32\)"),
        (
            "loralib/lora.pt",
            li.Hints(alpha=6),
            r'm101: .* are 2 enabled groups of a MergedLinear: say which, as in Hints\(groups=\{"m101"',
        ),
        (
            "loralib/lora.pt",
            li.Hints(alpha=6, groups={"m101": [True] * 2, "m111": [True], "mf": [True]}),
            r"m111: .* do not hold 1 of 1 groups",
        ),
        ("torchtune/adapter_model.pt", li.Hints(alpha=6), r"give the heads, as in Hints\(heads="),
        (
            "torchtune/adapter_model.pt",
            li.Hints(alpha=6, heads=(5, 2)),
            r"16 rows cannot be those of 5 attention heads",
        ),
        ("torchtune/adapter_model.pt", li.Hints(heads=(4, 2)), r"it holds no alpha: give the directory"),
    ],
)
def test_missing_hints_are_named(fixture, hints, message):
    """What a file does not say is asked for by name, with an example of the hint."""
    with pytest.raises(li.FileError, match=message):
        li.read(FIXTURES / fixture, allow_pickle=True, hints=hints)
