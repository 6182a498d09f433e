"""kohya's files: the header that other programs recognize a file by, and the names of the text encoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorainject as li
from lorainject.files.formats import kohya

from oracle import module_tree

CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
T5 = "encoder.block.0.layer.0.SelfAttention.q"


def site(path: str, in_: int = 6, r: int = 2, **more: object) -> li.StoredSite:
    return li.StoredSite(path=path, A=torch.randn(r, in_), B=torch.randn(8, r), alpha=4, **more)


def record(*sites: li.StoredSite, namespace: str = "hf") -> li.AdapterFile:
    return li.AdapterFile(path=Path("made"), format="lorainject", sites=sites, namespace=namespace)


def header(file: li.AdapterFile, path: Path) -> dict[str, str]:
    """Write a record of a U-Net, and return the header."""
    li.write(file, path, format="kohya", hints=li.Hints(component="unet"))
    with safe_open(path, framework="pt") as f:
        return f.metadata()


@pytest.mark.parametrize("width", [768, 1024, 2048, 6])
def test_the_header_names_the_base(width, tmp_path):
    """sd-scripts' words for the version of the base, without which A1111 takes every file for Stable Diffusion 1."""
    version = {768: ("sd_v1", "False"), 1024: ("sd_v2", "True"), 2048: ("sdxl_base_v1-0", "False")}.get(width)
    expected = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "4.0"}
    if version is not None:
        expected |= {"ss_base_model_version": version[0], "ss_v2": version[1]}
    file = record(site("mid_block.attentions.0.proj_in"), site(CROSS, width))
    assert header(file, tmp_path / "a.safetensors") == expected


def test_several_ranks_are_called_dynamic(tmp_path):
    """As sd-scripts' resize_lora.py calls them."""
    found = header(record(site("a"), site("b", r=3)), tmp_path / "a.safetensors")
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("Dynamic", "4.0")


def test_dora_is_a_network_of_lycoris(tmp_path):
    """sd-scripts' own module would ignore dora_scale."""
    found = header(record(site("a", magnitude=torch.ones(8))), tmp_path / "a.safetensors")
    assert found["ss_network_module"] == "lycoris.kohya"
    assert '"dora_wd": "True"' in found["ss_network_args"]


def test_the_header_of_a_kohya_file_is_kept(tmp_path):
    """Tags, hashes and comments of a file stay in it."""
    header(record(site("a")), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    about = {"ss_network_dim": "8", "ss_tag_frequency": "{}"}
    save_file(tensors, tmp_path / "b.safetensors", about)
    li.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", format="kohya")
    with safe_open(tmp_path / "c.safetensors", framework="pt") as f:
        assert f.metadata() == about


PIPELINES = {
    "SD": {"text_encoder.a": "lora_te_a"},
    "SDXL": {"text_encoder.a": "lora_te1_a", "text_encoder_2.a": "lora_te2_a"},
    "SD3": {"text_encoder.a": "lora_te1_a", f"text_encoder_3.{T5}": f"lora_te3_{T5.replace('.', '_')}"},
    "Flux": {"text_encoder.a": "lora_te1_a", f"text_encoder_2.{T5}": f"lora_te3_{T5.replace('.', '_')}"},
}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_text_encoders_have_the_names_of_sd_scripts(pipeline, tmp_path):
    """A T5 is the third text encoder, whichever one it is for diffusers; what is written loads onto the encoder."""
    names = PIPELINES[pipeline]
    file = record(*map(site, names), namespace="pipeline")
    done = li.write(file, tmp_path / "a.safetensors", format="kohya")
    assert {key.partition(".")[0] for key in load_file(done.path)} == set(names.values())
    for path, s in zip(names, file.sites, strict=True):
        component, _, module = path.partition(".")
        model = module_tree({f"{module}.weight": (8, 6)})
        li.load(model, done.path, hints=li.Hints(component=component))
        ((loaded, _, delta),) = li.deltas(model)
        assert loaded == module
        assert torch.allclose(delta, 2 * s.B @ s.A, atol=1e-6)


@pytest.mark.parametrize("prefix", ["lora_te2_", "lora_te3_"])
def test_both_names_of_fluxs_t5_are_read(prefix, tmp_path):
    """sd-scripts' first version for Flux called the T5 the second text encoder."""
    name = prefix + T5.replace(".", "_")
    save_file({f"{name}.lora_down.weight": torch.ones(2, 6), f"{name}.lora_up.weight": torch.ones(8, 2)},
              tmp_path / "a.safetensors")  # fmt: skip
    model = li.load(module_tree({f"{T5}.weight": (8, 6)}), tmp_path / "a.safetensors",
                    hints=li.Hints(component="text_encoder_2"))  # fmt: skip
    assert [path for path, _, _ in li.deltas(model)] == [T5]


def test_names_are_made_once_per_site():
    """A pipeline with many sites is not walked anew for each of them."""

    class Counted(tuple):
        walks = 0

        def __iter__(self):
            Counted.walks += 1
            return super().__iter__()

    sites = Counted(site(f"text_encoder.a.{i}") for i in range(50))
    names = kohya.flat_names(replace(record(namespace="pipeline"), sites=sites), li.Hints(), [])
    assert len(names) == 50
    assert Counted.walks <= 2
