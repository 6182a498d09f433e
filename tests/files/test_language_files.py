"""Adapters of language models in other libraries' files: what each version wrote, what has to be told, and what they make of ours."""

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
def test_rows_in_rotary_pairs(format, tmp_path):
    """Pair i's part p is row 2 i + p of a head there, and row p d/2 + i in transformers; v is left alone."""
    d, B = 8, torch.arange(16.0)[:, None]
    sites = tuple(
        li.StoredSite(path=f"model.layers.0.self_attn.{leaf}", A=torch.ones(1, 3), B=B, alpha=1)
        for leaf in ("q_proj", "k_proj", "v_proj")
    )
    done = li.write(li.AdapterFile(path=tmp_path, format="peft", sites=sites), tmp_path / f"a{li.FORMATS[format].suffix}", format=format,
                    hints=li.Hints(heads=(2, 1), architecture="llama"))  # fmt: skip
    if format == "torchtune":
        found = {key.split(".")[3]: t for key, t in torch.load(done.path, weights_only=True).items() if "lora_b" in key}
    else:
        from gguf import GGUFReader

        names = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj"}
        found = {
            names[t.name.split(".")[2]]: torch.from_numpy(t.data.copy())
            for t in GGUFReader(done.path).tensors
            if t.name.endswith("lora_b")
        }
    for leaf, size in (("q_proj", d), ("k_proj", 2 * d)):
        wanted = [
            float(head * size + p * size // 2 + i)
            for head in range(16 // size)
            for i in range(size // 2)
            for p in range(2)
        ]
        assert found[leaf].flatten().tolist() == wanted
    assert torch.equal(found["v_proj"], B)


def test_gguf_without_alpha(tmp_path):
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


def test_gguf_of_another_architecture(tmp_path):
    """Names by llama.cpp's own table for the base, both ways, with its embedding turned, in bfloat16 and half; q and k as they are."""
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
        li.FileError,
        match=r"blk\.1\.attn_qkv\.weight\.lora_a: unexpected, no weight of this name is known: read the file with the model",
    ):
        li.read(done.path)


def test_mlx_of_old(tmp_path):
    """With an alpha beside the scale: scale * alpha / rank; experts' lora_a as one matrix."""
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
def test_adapterhub_before_it_scaled(version, scale, tmp_path):
    """Until 1.1.0 alpha was passed over in training."""
    config = json.loads((FIXTURES / "adapterhub_bert" / "adapter_config.json").read_text()) | {"version": version}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_adapter.bin").write_bytes((FIXTURES / "adapterhub_bert" / "pytorch_adapter.bin").read_bytes())
    assert {s.scale for s in li.read(tmp_path, allow_pickle=True).sites} == {scale}


def test_loralib_onto_a_model():
    """MergedLinear's groups, an embedding, a convolution: loaded, and merged as loralib does."""
    model, at = LoralibBase(), FIXTURES / "loralib"
    model.load_state_dict(
        {key.replace("conv.conv", "conv"): t for key, t in load_file(at / "base.safetensors").items()}
    )
    li.merge(li.load(model, at / "lora.pt", allow_pickle=True, hints=LORALIB_HINTS), reversible=False)
    wanted = {key.replace("conv.conv", "conv"): t for key, t in load_file(at / "expected_merged.safetensors").items()}
    assert max_error(li.eject(model).state_dict(), wanted) < 1e-5


def test_biases_become_pefts(tmp_path):
    """loralib's lora_bias.pt as PEFT's files: the biases are of adapted layers, and the config says so."""
    file = li.read(FIXTURES / "loralib" / "lora_bias.pt", allow_pickle=True, hints=LORALIB_HINTS)
    li.write(file, tmp_path / "a", format="peft")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["bias"] == "lora_only"
    assert set(li.read(tmp_path / "a").replaced) == {"lin.bias", "m101.bias", "m111.bias", "mf.bias"}


def test_loralib_reads_what_we_write(tmp_path):
    """Its own layers, run live: the state dict fits, and merging gives the same weights."""
    import loralib

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.emb = loralib.Linear(5, 4, r=2, lora_alpha=6), loralib.Embedding(7, 4, r=2, lora_alpha=6)
            self.m101 = loralib.MergedLinear(5, 12, r=2, lora_alpha=6, enable_lora=[True, False, True])

    file = li.read(FIXTURES / "loralib" / "lora.pt", allow_pickle=True, hints=LORALIB_HINTS)
    file = replace(file, sites=tuple(s for s in file.sites if s.path in ("lin", "emb", "m101")))
    done = li.write(file, tmp_path / "a.pt", format="loralib")
    theirs, base = Theirs().train(), load_file(FIXTURES / "loralib" / "base.safetensors")
    missing = theirs.load_state_dict(
        {key: t for key, t in base.items() if key.partition(".")[0] in ("lin", "emb", "m101")}, strict=False
    ).missing_keys
    written = torch.load(done.path, weights_only=True)
    assert sorted(written) == sorted(missing)
    theirs.load_state_dict(written, strict=False)
    merged_ = theirs.eval().state_dict()
    wanted = load_file(FIXTURES / "loralib" / "expected_merged.safetensors")
    assert all((merged_[key] - wanted[key]).abs().max() < 1e-6 for key in ("lin.weight", "emb.weight", "m101.weight"))


def test_loralib_whole_checkpoints(tmp_path):
    """Saved in eval mode the weights hold the update already: A and B are read, the weights passed over, and it says so."""
    at = FIXTURES / "loralib"
    whole, alone = (
        li.read(at / n, allow_pickle=True, hints=LORALIB_HINTS) for n in ("full_eval_mode_already_merged.pt", "lora.pt")
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
def test_what_a_file_does_not_say_is_asked_for(fixture, hints, message):
    """By name, with the words to say it."""
    with pytest.raises(li.FileError, match=message):
        li.read(FIXTURES / fixture, allow_pickle=True, hints=hints)
