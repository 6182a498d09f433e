"""Bases on disk as people have them: quantized ones are refused by name, diffusers' sharded folders are merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorainject as li
from checkpoints import contents, tensors

from models import llama, randomize

pytestmark = pytest.mark.filterwarnings("ignore::lorainject.SurvivalWarning")


def packed(rows: int, columns: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.ones(rows, columns, dtype=dtype)


# What each method stores in place of `weight` (32, 32), with the config that it leaves in config.json.
QUANTIZED = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32},
             {"qweight": packed(4, 32), "qzeros": packed(1, 4), "scales": torch.ones(1, 32, dtype=torch.float16),
              "g_idx": torch.zeros(32, dtype=torch.int32)}),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
            {"qweight": packed(32, 4), "qzeros": packed(1, 4), "scales": torch.ones(1, 32, dtype=torch.float16)}),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
                           {"weight_packed": packed(32, 4), "weight_scale": torch.ones(32, 1),
                            "weight_shape": torch.tensor([32, 32])}),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True},
                     {"weight": packed(512, 1, torch.uint8), "weight.absmax": packed(16, 1, torch.uint8),
                      "weight.quant_map": torch.ones(16)}),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [32, 32]},
            {"weight": torch.ones(32, 32).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)}),
}  # fmt: skip


def quantized_base(folder: Path, method: str) -> None:
    """Write `base`, whose q_proj is quantized by this method, and `adapter`, which is on q_proj."""
    torch.manual_seed(0)
    model = llama()
    randomize(li.inject(model, ["q_proj"]))
    li.save(model, folder / "adapter")
    li.eject(model).save_pretrained(folder / "base")
    config, stored = QUANTIZED[method]
    file, about = folder / "base" / "model.safetensors", folder / "base" / "config.json"
    kept = {key: t for key, t in load_file(file).items() if "q_proj" not in key}
    for i in range(model.config.num_hidden_layers):
        kept |= {f"model.layers.{i}.self_attn.q_proj.{key}": t.clone() for key, t in stored.items()}
    save_file(kept, file, {"format": "pt"})
    about.write_text(json.dumps(json.loads(about.read_text()) | {"quantization_config": config}))


@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_bases_are_refused_by_method(method, in_place, tmp_path):
    """The error names the method and what is stored, and leads to the checkpoint before it was quantized."""
    quantized_base(tmp_path, method)
    before = contents(tmp_path)
    with pytest.raises(
        li.FileError, match=rf"(?s)q_proj: is quantized by {method}, stored as .*=> merge into .* before quantization"
    ) as e:
        if in_place:
            li.merge_in_place(tmp_path / "base", tmp_path / "adapter")
        else:
            li.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "in memory" not in str(e.value)
    assert contents(tmp_path) == before


def diffusers_folder(folder: Path) -> li.AdapterFile:
    """Write `base` as diffusers shards it, with its names of files, and return an adapter for it."""
    torch.manual_seed(0)
    base, shards, index = folder / "base", 2, "diffusion_pytorch_model"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel"}))
    paths = [f"transformer_blocks.{i}.attn.to_q" for i in range(2)]
    weight_map = {}
    for i, path in enumerate(paths):
        name = f"{index}-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({f"{path}.weight": torch.randn(8, 6), f"{path}.bias": torch.randn(8)}, base / name, {"format": "pt"})
        weight_map |= {f"{path}.weight": name, f"{path}.bias": name}
    (base / f"{index}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sites = [li.StoredSite(path=p, A=torch.randn(2, 6), B=torch.randn(8, 2), alpha=4) for p in paths]
    return li.AdapterFile(path=Path("made"), format="lorainject", sites=tuple(sites))


def test_sharded_folders_of_diffusers_are_merged(tmp_path):
    """Copied, with the index under its name, and in place; unmerge then gives back every byte."""
    file = diffusers_folder(tmp_path)
    base = tensors(tmp_path / "base")
    li.merge_checkpoint(tmp_path / "base", file, tmp_path / "out")
    merged = tensors(tmp_path / "out")
    for s in file.sites:
        key = f"{s.path}.weight"
        assert torch.allclose(merged[key], base[key] + s.scale * s.B @ s.A, atol=1e-5)
        assert torch.equal(merged[f"{s.path}.bias"], base[f"{s.path}.bias"])
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {p.name for p in (tmp_path / "base").iterdir()}
    before = contents(tmp_path / "base")
    li.merge_in_place(tmp_path / "base", li.write(file, tmp_path / "adapter").path)
    assert all(torch.allclose(t, merged[key], atol=1e-6) for key, t in tensors(tmp_path / "base").items())
    li.unmerge_in_place(tmp_path / "base")
    assert contents(tmp_path / "base") == before
