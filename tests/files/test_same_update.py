"""What one tool wrote and another reads is the same update, or is refused: layouts, orders of rows, names, doubles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorainject as li
from lorainject.files.formats import gguf_rows, mlx
from lorainject.files.formats.gguf import FORMAT as GGUF


def site(path: str, out: int = 8, in_: int = 6, r: int = 2, **more: object) -> li.StoredSite:
    return li.StoredSite(path=path, A=torch.randn(r, in_), B=torch.randn(out, r), alpha=3, **more)


def record(*sites: li.StoredSite) -> li.AdapterFile:
    return li.AdapterFile(path=Path("made"), format="lorainject", sites=sites)


class MaintainedAttention(nn.Module):
    """Lets another object call its layers, as diffusers' Attention does, and can fuse their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4)
        self.processor = lambda attention, x: attention.to_q(x)

    def forward(self, x):
        return self.processor(self, x)

    @torch.no_grad()
    def fuse_projections(self):
        self.fused = torch.cat([self.to_q.weight.data])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = MaintainedAttention()

    def forward(self, x):
        return self.attn(x)


def test_a_method_that_maintains_a_module_bypasses_no_layer(tmp_path):
    """diffusers' fuse_projections reads weights, but forward calls the layers: PEFT's layout and config are written."""
    model = li.inject(Block(), ["to_q"], r=2)
    li.save(model, tmp_path / "a")
    assert (tmp_path / "a" / "adapter_config.json").exists()
    li.save(model, tmp_path / "b", format="peft")


def grouped(B: torch.Tensor, n: int, kv: int) -> torch.Tensor:
    """Return the rows as llama.cpp's FalconModel has them, written anew here."""
    groups = B.view(kv, n // kv + 2, -1, B.shape[1])
    return torch.cat([groups[:, :-2].reshape(-1, B.shape[1]), groups[:, -2].reshape(-1, B.shape[1]),
                      groups[:, -1].reshape(-1, B.shape[1])])  # fmt: skip


def in_pairs(B: torch.Tensor, n: int) -> torch.Tensor:
    return B.reshape(n, 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape)


Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
PAIRED = ("llama", "llama-embed", "mistral3", "granite", "granitemoe", "granitehybrid", "arcee", "smollm3", "olmo",
          "minicpm", "arctic", "chameleon", "deepseek")  # fmt: skip
GGUF_CASES = [
    *((arch, Q, "blk.0.attn_q", lambda B: in_pairs(B, 4)) for arch in PAIRED),
    *((arch, K, "blk.0.attn_k", lambda B: in_pairs(B, 2)) for arch in PAIRED),
    ("llada", "model.transformer.blocks.0.k_proj", "blk.0.attn_k", lambda B: in_pairs(B, 2)),
    ("falcon", "transformer.h.0.self_attention.query_key_value", "blk.0.attn_qkv", lambda B: grouped(B, 4, 2)),
    ("bloom", "h.0.self_attention.query_key_value", "blk.0.attn_qkv", lambda B: grouped(B, 4, 4)),
    ("gptneox", "gpt_neox.layers.0.attention.query_key_value", "blk.0.attn_qkv", lambda B: grouped(B, 4, 4)),
    ("qwen2", Q, "blk.0.attn_q", lambda B: B),
    ("llama4", K, "blk.0.attn_k", lambda B: B),
    ("apertus", K, "blk.0.attn_k", lambda B: B),
]


@pytest.mark.parametrize(("architecture", "path", "name", "rule"), GGUF_CASES)
def test_rows_are_in_the_order_of_llama_cpp(architecture, path, name, rule, tmp_path):
    """Each architecture has the order of rows that its converter gives the base."""
    import gguf

    kv = 4 if architecture in ("bloom", "gptneox") else 2  # which have no heads that share keys and values
    s = site(path, out=48 if kv == 4 else 32)
    li.write(record(s), tmp_path / "a.gguf", format="gguf", hints=li.Hints(architecture=architecture, heads=(4, kv)))
    tensors = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert torch.equal(tensors[f"{name}.weight.lora_b"], rule(s.B))


def test_an_architecture_of_unknown_order_is_refused_by_name(tmp_path):
    """Nothing is guessed for an architecture whose converter was not read."""
    import gguf

    hints = li.Hints(architecture="internlm2", heads=(4, 2))
    with pytest.raises(li.FileError, match=r"rows of the architecture 'internlm2' is not known here: merge"):
        li.write(record(site(Q)), tmp_path / "a.gguf", format="gguf", hints=hints)
    assert not list(tmp_path.iterdir())
    assert gguf_rows.RULES.keys() <= set(gguf.MODEL_ARCH_NAMES.values())
    assert set(gguf_rows.MODEL_TYPES.values()) <= gguf_rows.RULES.keys()


@pytest.mark.parametrize("component", ["transformer", "prior"])
def test_kohya_names_of_a_transformer_are_refused(component, tmp_path):
    """diffusers takes them for an error (Flux, Wan) or applies nothing (SD3)."""
    with pytest.raises(li.FileError, match=r"no names that diffusers reads.*\n=> write the format diffusers"):
        li.write(record(site("blocks.0.to_q")), tmp_path / "a.safetensors", format="kohya",
                 hints=li.Hints(component=component))  # fmt: skip


def test_the_embedding_of_sdxl_has_its_original_name_in_kohyas_files(tmp_path):
    """diffusers' reader makes another module of add_embedding_linear_1."""
    li.write(record(site("add_embedding.linear_1")), tmp_path / "a.safetensors", format="kohya",
             hints=li.Hints(component="unet"))  # fmt: skip
    assert "lora_unet_label_emb_0_0.alpha" in load_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize("odd", [{"peft": False}, {"named": True}])
def test_diffusers_gets_no_site_that_it_would_ignore(odd, tmp_path):
    """Keys that no layer of PEFT has are not written, and conv^T has no place at all."""
    with pytest.raises(li.FileError, match="diffusers has PEFT's layers, which do nothing here"):
        li.write(record(site("a", **odd)), tmp_path / "a", format="diffusers", hints=li.Hints(component="unet"))
    transposed = site("c", out=4, in_=18, kind="conv^T", shape=(2, 4, 3, 3))
    for format in ("diffusers", "kohya"):
        with pytest.raises(li.FileError, match="c: transposed convolutions"):
            li.write(record(transposed), tmp_path / "b.safetensors", format=format, hints=li.Hints(component="unet"))


@pytest.mark.parametrize("fault", ["another value", "a site less", "a site more"])
def test_a_writer_that_changes_something_is_found_out(fault, tmp_path, monkeypatch):
    """Whatever the format, what was written is read back before it is put in place."""
    write = mlx.FORMAT.write

    def faulty(file, path, hints):
        first, *rest = file.sites
        sites = {
            "another value": [replace(first, B=first.B + 0.01), *rest],
            "a site less": rest,
            "a site more": [first, *rest, replace(first, path="c")],
        }[fault]
        return write(replace(file, sites=tuple(sites)), path, hints)

    monkeypatch.setitem(li.FORMATS, "mlx", replace(mlx.FORMAT, write=faulty))
    with pytest.raises(li.FileError, match="would read it as something else"):
        li.write(record(site("a"), site("b")), tmp_path / "x", format="mlx")
    assert not list(tmp_path.iterdir())
    assert "model" in GGUF.asks


def test_slices_of_half_precision_are_joined_exactly(tmp_path):
    """Slices with different scales: what bfloat16 cannot hold goes into float32."""
    a, b = (replace(site("c", out=2, label=f"{i}:{i + 2}", rows=(range(i, i + 2),), shape=(4, 6)), alpha=alpha)
            for i, alpha in ((0, 3.0), (2, 1.1)))  # fmt: skip
    a, b = (replace(s, A=s.A.bfloat16(), B=s.B.bfloat16()) for s in (a, b))
    done = li.write(record(a, b), tmp_path / "x", format="peft")
    (whole,) = li.read(done.path).sites
    expected = torch.cat([s.scale * (s.B.double() @ s.A.double()) for s in (a, b)])
    assert torch.allclose(whole.scale * (whole.B.double() @ whole.A.double()), expected, rtol=1e-6)


def test_two_keys_for_one_tensor_are_refused_in_other_formats(tmp_path):
    """A wrapper's prefix (loralib) and a key of 2023 (diffusers) make no second tensor."""
    A, B = torch.ones(2, 3), torch.ones(4, 2)
    torch.save({"l.lora_A": A, "l.lora_B": B, "module.l.lora_A": 2 * A}, tmp_path / "a.pt")
    with pytest.raises(li.FileError, match=r"module\.l\.lora_A: is the same tensor as l\.lora_A"):
        li.read(tmp_path / "a.pt", allow_pickle=True, hints=li.Hints(alpha=2))
    names = ("unet.m.processor.to_q_lora.down.weight", "unet.m.to_q.lora.down.weight", "unet.m.to_q.lora.up.weight")
    save_file({name: t.clone() for name, t in zip(names, (A, 2 * A, B), strict=True)}, tmp_path / "b.safetensors")
    with pytest.raises(li.FileError, match="is the same tensor as"):
        li.read(tmp_path / "b.safetensors")


def test_a_rank_that_mlx_contradicts_is_refused(tmp_path):
    """The config's rank must be that of the tensors."""
    done = li.write(record(site("a")), tmp_path / "x", format="mlx")
    config = done.path / "adapter_config.json"
    config.write_text(config.read_text().replace('"rank": 2', '"rank": 8'))
    with pytest.raises(li.FileError, match="a: B has the rank 2, but the config says 8"):
        li.read(done.path)
