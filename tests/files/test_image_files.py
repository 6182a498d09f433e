"""Adapters of image models: kohya's flat names, LyCORIS' factors, diffusers' components and its older names."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lorainject as li

from oracle import FIXTURES, dense_deltas, is_same_record, module_tree

DIFFUSERS = FIXTURES / "diffusers"
WEIGHTS = {key: tuple(t.shape) for key, t in load_file(DIFFUSERS / "expected_delta.safetensors").items()}


def part(component: str) -> nn.Module:
    """The adapted layers of one component."""
    return module_tree({key.partition(".")[2]: shape for key, shape in WEIGHTS.items() if key.startswith(f"{component}.")})


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_one_component_onto_its_model(component):
    """A pipeline's file goes onto one of its models, named by hand; the rest of the file is somebody else's."""
    model = li.load(
        part(component), DIFFUSERS / "pytorch_lora_weights.safetensors", hints=li.Hints(component=component)
    )
    wanted = {
        key: t for key, t in load_file(DIFFUSERS / "expected_delta.safetensors").items() if key.startswith(component)
    }
    found = {f"{component}.{path}.weight": d for path, _, d in li.deltas(model)}
    assert found.keys() == wanted.keys()
    assert all((found[key] - t).abs().max() < 1e-5 for key, t in wanted.items())


def test_a_whole_pipelines_file_is_too_much_for_one_model():
    """Without a word on which component, what does not belong to the model is refused, not dropped."""
    with pytest.raises(
        li.FileError, match=r"text_encoder\.encoder\.layers\.0\.self_attn\.q_proj: is not in this model"
    ):
        li.load(
            module_tree({key: shape for key, shape in WEIGHTS.items() if key.startswith("unet.")}),
            DIFFUSERS / "pytorch_lora_weights.safetensors",
        )


def test_without_the_header_the_scale_is_one():
    """As diffusers reads it, and with a note; the header makes the difference of alpha / r."""
    with_, without = (
        li.read(DIFFUSERS / name) for name in ("pytorch_lora_weights.safetensors", "no_header.safetensors")
    )
    assert {s.scale for s in without.sites} == {1}
    assert {s.scale for s in with_.sites if s.path.startswith("unet.")} == {2}
    assert {s.scale for s in with_.sites if s.path.startswith("text_encoder.")} == {3}
    assert "scale was taken to be 1" in without.notes[0]
    with pytest.warns(UserWarning, match="no header tells alpha, so the scale was taken to be 1, as in diffusers"):
        li.load(part("unet"), DIFFUSERS / "no_header.safetensors", hints=li.Hints(component="unet"))
    assert not with_.notes


def test_diffusers_own_export_for_kohya():
    """Its kohya file is its other file under flat names, with alpha = rank (diffusers loses alpha there)."""
    flat = li.read(DIFFUSERS / "kohya.safetensors")
    dotted = li.read(DIFFUSERS / "no_header.safetensors")
    found = {key.removesuffix(".weight").removeprefix("lora_unet_"): d for key, d in dense_deltas(flat).items()}
    wanted = {key.removesuffix(".weight").partition(".")[2].replace(".", "_"): d for key, d in dense_deltas(dotted).items()}
    shared = found.keys() & wanted.keys()
    assert len(shared) == sum(key.startswith("unet.") for key in WEIGHTS) == len(flat.sites)
    assert all(torch.equal(found[key], wanted[key]) for key in shared)
    assert {s.scale for s in flat.sites} == {1}


@pytest.mark.parametrize("format", ["kohya", "diffusers", "lorainject"])
def test_pipelines_between_the_formats(format, tmp_path):
    """Scales, components and convolutions survive; kohya's prefixes stand for diffusers' components."""
    file = li.read(DIFFUSERS / "pytorch_lora_weights.safetensors")
    place = tmp_path / "a.safetensors" if format != "diffusers" else tmp_path / "a"
    li.write(file, place, format=format)
    for component in ("unet", "text_encoder"):
        hints = li.Hints(component=component, model=part(component))
        once = li.read(DIFFUSERS / "pytorch_lora_weights.safetensors", hints=hints)
        again = li.read(place, hints=hints)
        assert is_same_record(again, once)
        assert len(once.sites) == sum(key.startswith(f"{component}.") for key in WEIGHTS)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_component_is_a_peft_directory(component, tmp_path):
    """One directory for each part, which PEFT itself puts onto the part; and back into one file."""
    from peft import PeftModel

    hints = li.Hints(component=component)
    li.convert(DIFFUSERS / "pytorch_lora_weights.safetensors", tmp_path / "a", format="peft", hints=hints)
    base = part(component)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a")).merge_and_unload()
    for path, weight, d in li.deltas(li.load(copy.deepcopy(base), tmp_path / "a")):
        assert torch.allclose(theirs.get_submodule(path).weight, weight + d, atol=1e-5)
    li.convert(tmp_path / "a", tmp_path / "b", format="diffusers", hints=hints)
    assert is_same_record(
        li.read(tmp_path / "b", hints=hints), li.read(DIFFUSERS / "pytorch_lora_weights.safetensors", hints=hints)
    )


def test_a_model_without_text_model(tmp_path):
    """CLIP's level `text_model`, which transformers 5 took away, is found with and without."""
    for name in ("lora_te_text_model_encoder_fc1", "text_encoder.text_model.encoder.fc1"):
        ends = (".lora_down.weight", ".lora_up.weight") if "lora_te" in name else (".lora_A.weight", ".lora_B.weight")
        save_file(
            {name + ends[0]: torch.ones(2, 3), name + ends[1]: torch.ones(4, 2), f"{name}.alpha": torch.tensor(2.0)},
            tmp_path / "x.safetensors",
        )
        for prefix in ("", "text_model."):
            model = li.load(module_tree({f"{prefix}encoder.fc1.weight": (4, 3)}), tmp_path / "x.safetensors")
            assert [name for name, _, _ in li.deltas(model)] == [f"{prefix}encoder.fc1"]


OLD = {
    "unet.mid.attn1.processor.to_q_lora.down.weight": "unet.mid.attn1.to_q", "unet.mid.attn1.processor.to_out_lora.down.weight": "unet.mid.attn1.to_out.0",
    "text_encoder.layers.0.self_attn.to_q_lora.down.weight": "text_encoder.layers.0.self_attn.q_proj", "unet.mid.to_q.lora.down.weight": "unet.mid.to_q",
    "unet.mid.to_q.lora_linear_layer.down.weight": "unet.mid.to_q", "transformer.blocks.0.to_q.lora_A.weight": "transformer.blocks.0.to_q",
    "diffusion_model.blocks.0.q.lora_down.weight": "diffusion_model.blocks.0.q",
}  # fmt: skip


@pytest.mark.parametrize(("key", "path"), OLD.items())
def test_names_of_every_generation(key, path, tmp_path):
    """Each of them means A, its twin B, and one path."""
    twin = key.replace("down.weight", "up.weight").replace("lora_A", "lora_B")
    save_file({key: torch.ones(2, 3), twin: torch.ones(4, 2)}, tmp_path / "x.safetensors")
    (s,) = li.read(tmp_path / "x.safetensors").sites
    assert (s.path, s.A.shape, s.B.shape) == (path, (2, 3), (4, 2))


def test_gpt2_is_no_pipeline(tmp_path):
    """transformer.h.0 is a language model's, whatever it begins with."""
    save_file(
        {
            "transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(2, 3),
            "transformer.h.0.attn.c_attn.lora_B.weight": torch.ones(9, 2),
        },
        tmp_path / "x.safetensors",
    )
    assert li.read(tmp_path / "x.safetensors", hints=li.Hints(alpha=2)).format == "peft"


def test_kohya_scales(tmp_path):
    """alpha / r, 1 without alpha, and A1111's scale before both."""
    tensors = {}
    for name, more in {
        "a": {},
        "b": {"alpha": torch.tensor(6)},
        "c": {"alpha": torch.tensor(6.0), "scale": torch.tensor(0.25)},
    }.items():
        tensors |= {
            f"lora_unet_{name}.lora_down.weight": torch.ones(2, 3),
            f"lora_unet_{name}.lora_up.weight": torch.ones(4, 2),
        }
        tensors |= {f"lora_unet_{name}.{key}": t for key, t in more.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    assert {s.path[-1]: s.scale for s in li.read(tmp_path / "x.safetensors").sites} == {"a": 1, "b": 3, "c": 0.25}


def test_names_that_collide_without_dots(tmp_path):
    """Two paths that differ in a dot alone have no two names there; and in a model, a flat name may mean two modules."""
    sites = tuple(
        li.StoredSite(path=path, A=torch.ones(2, 3), B=torch.ones(4, 2), alpha=2) for path in ("a.b_c", "a_b.c")
    )
    file = li.AdapterFile(path=Path("drawn"), format="lorainject", sites=sites)
    with pytest.raises(li.FileError, match=r"a_b\.c and a\.b_c are both lora_unet_a_b_c"):
        li.write(file, tmp_path / "x.safetensors", format="kohya", hints=li.Hints(component="unet"))
    with pytest.raises(li.FileError, match="kohya has no prefix for None"):
        li.write(replace(file, sites=sites[:1]), tmp_path / "x.safetensors", format="kohya")
    li.write(
        replace(file, sites=sites[:1]), tmp_path / "x.safetensors", format="kohya", hints=li.Hints(component="unet")
    )
    with pytest.raises(li.FileError, match=r"may mean a\.b_c or a_b\.c"):
        li.read(
            tmp_path / "x.safetensors", hints=li.Hints(model=module_tree({"a.b_c.weight": (4, 3), "a_b.c.weight": (4, 3)}))
        )


def test_flat_names_are_not_written_as_paths(tmp_path):
    """What kohya calls a module is nobody else's name: the model has to tell first."""
    at = FIXTURES / "kohya_lycoris" / "lora.safetensors"
    with pytest.raises(li.FileError, match=r"the names of this record are of the kind 'kohya'"):
        li.convert(at, tmp_path / "a", format="peft", lossy=True)
    done = li.convert(at, tmp_path / "a.safetensors", format="lorainject")
    assert is_same_record(li.read(done.path), li.read(at))


def test_dora_by_input_is_peft_s_neither(tmp_path):
    """LyCORIS has magnitudes for inputs; PEFT has not, and our own file has, without a config that PEFT would misread."""
    base = load_file(FIXTURES / "kohya_lycoris" / "base.safetensors")
    hints = li.Hints(model=module_tree({key: tuple(t.shape) for key, t in base.items()}))
    file = li.read(FIXTURES / "kohya_lycoris" / "lora.safetensors", hints=hints)
    with pytest.raises(li.FileError, match=r"peft has no place for:\n  - mid_block\.dora_in: magnitudes by input"):
        li.write(file, tmp_path / "a", format="peft")
    li.write(file, tmp_path / "b")
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["adapter_model.safetensors"]
    assert is_same_record(li.read(tmp_path / "b"), file)


def test_diffusers_reads_what_we_write(tmp_path):
    """The header is PEFT's config of each component, as diffusers expects it."""
    from peft import LoraConfig

    li.convert(DIFFUSERS / "pytorch_lora_weights.safetensors", tmp_path, format="diffusers")
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", framework="pt") as f:
        said = json.loads(f.metadata()["lora_adapter_metadata"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for component, alpha in (("unet", 4), ("text_encoder", 6)):
            own = {key.removeprefix(f"{component}."): v for key, v in said.items() if key.startswith(f"{component}.")}
            config = LoraConfig(**{k: v for k, v in own.items() if k not in ("peft_type",)})
            assert (config.r, config.lora_alpha) == (2, alpha)


SAI = {
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
    "input_blocks_2_0_in_layers_2": "down_blocks.0.resnets.1.conv1",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "middle_block_0_out_layers_3": "mid_block.resnets.0.conv2",
    "middle_block_1_transformer_blocks_9_ff_net_2": "mid_block.attentions.0.transformer_blocks.9.ff.net.2",
    "middle_block_2_emb_layers_1": "mid_block.resnets.1.time_emb_proj",
    "output_blocks_0_1_transformer_blocks_1_attn2_to_out_0": "up_blocks.0.attentions.0.transformer_blocks.1.attn2.to_out.0",
    "output_blocks_5_0_in_layers_2": "up_blocks.1.resnets.2.conv1",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}


def kohya(at: Path, shapes: dict[str, tuple[int, ...]], r: int = 2) -> dict[str, torch.Tensor]:
    """A file with a linear of each shape; each delta by its flat name."""
    tensors = {}
    for name, (out, in_) in shapes.items():
        tensors |= {
            f"{name}.lora_down.weight": torch.randn(r, in_),
            f"{name}.lora_up.weight": torch.randn(out, r),
            f"{name}.alpha": torch.tensor(1.0),
        }
    save_file(tensors, at)
    return {name: tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"] / r for name in shapes}


def test_names_of_the_original_unet(tmp_path):
    """SDXL's adapters with Stability's names, onto diffusers' U-Net."""
    wanted = kohya(tmp_path / "x.safetensors", {f"lora_unet_{name}": (4, 3) for name in SAI})
    model = li.load(module_tree({f"{path}.weight": (4, 3) for path in SAI.values()}), tmp_path / "x.safetensors")
    found = {path: d for path, _, d in li.deltas(model)}
    assert found.keys() == set(SAI.values())
    assert all(torch.allclose(found[path], wanted[f"lora_unet_{name}"], atol=1e-6) for name, path in SAI.items())


FLUX = {
    "double_blocks_0_img_attn_qkv": [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.attn.to_v",
    ],
    "double_blocks_11_txt_attn_qkv": [f"transformer_blocks.11.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks_0_img_attn_proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks_0_txt_mlp_2": ["transformer_blocks.0.ff_context.net.2"],
    "double_blocks_0_img_mod_lin": ["transformer_blocks.0.norm1.linear"],
    "single_blocks_3_linear1": [
        f"single_transformer_blocks.3.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ],
    "single_blocks_3_linear2": ["single_transformer_blocks.3.proj_out"],
}


def test_names_of_the_original_flux(tmp_path):
    """Fused weights go to their parts by rows, exactly, also where the parts differ in size; an adapter with magnitudes too."""
    sizes = {path: 8 if path.endswith("proj_mlp") else 4 for paths in FLUX.values() for path in paths}
    at = tmp_path / "x.safetensors"
    wanted = kohya(at, {f"lora_unet_{name}": (sum(sizes[p] for p in paths), 3) for name, paths in FLUX.items()})
    model = li.load(module_tree({f"{path}.weight": (n, 3) for path, n in sizes.items()}), at)
    found = {path: d for path, _, d in li.deltas(model)}
    assert found.keys() == sizes.keys()
    for name, paths in FLUX.items():
        assert torch.allclose(torch.cat([found[p] for p in paths]), wanted[f"lora_unet_{name}"], atol=1e-6)
    tensors = load_file(at)
    m = torch.rand(20, 1) + 1
    save_file(tensors | {"lora_unet_single_blocks_3_linear1.dora_scale": m}, at)
    model = li.load(module_tree({f"{path}.weight": (n, 3) for path, n in sizes.items()}), at)
    assert torch.equal(model.get_submodule("single_transformer_blocks.3.proj_mlp").lora["default"].m, m[12:].flatten())


@pytest.mark.parametrize("onto", ["diffusers", "original"])
def test_comfyui_s_names(onto, tmp_path):
    """The original code's paths behind `diffusion_model.`: onto diffusers' modules, or onto the original model."""
    path, A, B = "double_blocks.0.img_attn.qkv", torch.randn(2, 3), torch.randn(12, 2)
    save_file(
        {f"diffusion_model.{path}.lora_A.weight": A, f"diffusion_model.{path}.lora_B.weight": B},
        tmp_path / "x.safetensors",
    )
    there = (
        {f"{path}.weight": (12, 3)}
        if onto == "original"
        else {f"{p}.weight": (4, 3) for p in FLUX["double_blocks_0_img_attn_qkv"]}
    )
    with pytest.warns(UserWarning, match="the scale was taken to be 1"):
        model = li.load(module_tree(there), tmp_path / "x.safetensors")
    assert torch.allclose(torch.cat([d for _, _, d in li.deltas(model)]), B @ A, atol=1e-6)


@pytest.mark.parametrize("change", ["rows", "missing"])
def test_what_is_no_flux_is_said_so(change, tmp_path):
    """Rows that are not the parts' together, or a model without one of the parts."""
    kohya(tmp_path / "x.safetensors", {"lora_unet_double_blocks_0_img_attn_qkv": (12 + (change == "rows"), 3)})
    model = module_tree({f"transformer_blocks.0.attn.to_{x}.weight": (4, 3) for x in ("qkv" if change == "rows" else "qk")})
    with pytest.raises(li.FileError, match=r"double_blocks_0_img_attn_qkv: is not in this model"):
        li.load(model, tmp_path / "x.safetensors")
