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


def component_model(component: str) -> nn.Module:
    """Return a model with the adapted layers of one component."""
    return module_tree(
        {key.partition(".")[2]: shape for key, shape in WEIGHTS.items() if key.startswith(f"{component}.")}
    )


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_one_component_is_loaded_onto_its_model(component):
    """With Hints(component=...) one part of a pipeline's file is loaded, and the rest is ignored."""
    model = li.load(
        component_model(component), DIFFUSERS / "pytorch_lora_weights.safetensors", hints=li.Hints(component=component)
    )
    expected = {
        key: t for key, t in load_file(DIFFUSERS / "expected_delta.safetensors").items() if key.startswith(component)
    }
    deltas = {f"{component}.{path}.weight": d for path, _, d in li.deltas(model)}
    assert deltas.keys() == expected.keys()
    assert all((deltas[key] - t).abs().max() < 1e-5 for key, t in expected.items())


def test_a_whole_pipeline_is_refused_by_one_model():
    """Without Hints(component=...), sites that do not belong to the model are refused, not dropped."""
    with pytest.raises(
        li.FileError,
        match=r"(?s)several components.*unet: 24 sites, all of which this model has\n=> .*component='unet'",
    ):
        li.load(
            module_tree({key: shape for key, shape in WEIGHTS.items() if key.startswith("unet.")}),
            DIFFUSERS / "pytorch_lora_weights.safetensors",
        )


def test_diffusers_without_a_header_has_scale_one():
    """The scale is 1 without a header, as in diffusers, with a note; with a header it is alpha / r."""
    with_, without = (
        li.read(DIFFUSERS / name) for name in ("pytorch_lora_weights.safetensors", "no_header.safetensors")
    )
    assert {s.scale for s in without.sites} == {1}
    assert {s.scale for s in with_.sites if s.path.startswith("unet.")} == {2}
    assert {s.scale for s in with_.sites if s.path.startswith("text_encoder.")} == {3}
    assert "scale was taken to be 1" in without.notes[0]
    with pytest.warns(UserWarning, match="no header tells alpha, so the scale was taken to be 1, as in diffusers"):
        li.load(component_model("unet"), DIFFUSERS / "no_header.safetensors", hints=li.Hints(component="unet"))
    assert not with_.notes


def test_a_model_of_diffusers_saved_alone_has_its_config_in_the_header(tmp_path):
    """save_lora_adapter of a model writes PEFT's keys without a component, and alpha in the header alone."""
    A, B = torch.ones(2, 3), torch.ones(4, 2)
    tensors = {"blocks.0.to_q.lora_A.weight": A, "blocks.0.to_q.lora_B.weight": B}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["to_q"]}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    assert [(s.path, s.scale) for s in li.read(tmp_path).sites] == [("blocks.0.to_q", 3)]
    pipeline = {f"unet.{key}": value for key, value in config.items()}
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(pipeline)})
    with pytest.raises(li.FileError, match="no record of alpha"):
        li.read(tmp_path)


def test_diffusers_export_for_kohya_has_the_same_deltas():
    """diffusers' kohya file is its other file under flat names, with alpha = rank: diffusers loses alpha there."""
    flat = li.read(DIFFUSERS / "kohya.safetensors")
    dotted = li.read(DIFFUSERS / "no_header.safetensors")
    deltas = {key.removesuffix(".weight").removeprefix("lora_unet_"): d for key, d in dense_deltas(flat).items()}
    expected = {
        key.removesuffix(".weight").partition(".")[2].replace(".", "_"): d for key, d in dense_deltas(dotted).items()
    }
    shared = deltas.keys() & expected.keys()
    assert len(shared) == sum(key.startswith("unet.") for key in WEIGHTS) == len(flat.sites)
    assert all(torch.equal(deltas[key], expected[key]) for key in shared)
    assert {s.scale for s in flat.sites} == {1}


@pytest.mark.parametrize("format", ["kohya", "diffusers", "lorainject"])
def test_pipelines_survive_conversion(format, tmp_path):
    """Scales, components and convolutions are kept; kohya's prefixes stand for diffusers' components."""
    file = li.read(DIFFUSERS / "pytorch_lora_weights.safetensors")
    place = tmp_path / "a.safetensors" if format != "diffusers" else tmp_path / "a"
    li.write(file, place, format=format)
    for component in ("unet", "text_encoder"):
        hints = li.Hints(component=component, model=component_model(component))
        once = li.read(DIFFUSERS / "pytorch_lora_weights.safetensors", hints=hints)
        again = li.read(place, hints=hints)
        assert is_same_record(again, once)
        assert len(once.sites) == sum(key.startswith(f"{component}.") for key in WEIGHTS)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_component_becomes_a_peft_directory(component, tmp_path):
    """PEFT itself merges the directory of one component to the same weights, and it converts back into one file."""
    from peft import PeftModel

    hints = li.Hints(component=component)
    li.convert(DIFFUSERS / "pytorch_lora_weights.safetensors", tmp_path / "a", format="peft", hints=hints)
    base = component_model(component)
    merged = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a")).merge_and_unload()
    for path, weight, d in li.deltas(li.load(copy.deepcopy(base), tmp_path / "a")):
        assert torch.allclose(merged.get_submodule(path).weight, weight + d, atol=1e-5)
    li.convert(tmp_path / "a", tmp_path / "b", format="diffusers", hints=hints)
    assert is_same_record(
        li.read(tmp_path / "b", hints=hints), li.read(DIFFUSERS / "pytorch_lora_weights.safetensors", hints=hints)
    )


def test_clips_text_model_level_is_optional(tmp_path):
    """Sites are deltas with and without the level `text_model`, which transformers 5 removed from CLIP."""
    for name in ("lora_te_text_model_encoder_fc1", "text_encoder.text_model.encoder.fc1"):
        ends = (".lora_down.weight", ".lora_up.weight") if "lora_te" in name else (".lora_A.weight", ".lora_B.weight")
        save_file(
            {name + ends[0]: torch.ones(2, 3), name + ends[1]: torch.ones(4, 2), f"{name}.alpha": torch.tensor(2.0)},
            tmp_path / "x.safetensors",
        )
        for prefix in ("", "text_model."):
            model = li.load(module_tree({f"{prefix}encoder.fc1.weight": (4, 3)}), tmp_path / "x.safetensors")
            assert [name for name, _, _ in li.deltas(model)] == [f"{prefix}encoder.fc1"]


KEYS = {
    "unet.mid.attn1.processor.to_q_lora.down.weight": "unet.mid.attn1.to_q",
    "unet.mid.attn1.processor.to_out_lora.down.weight": "unet.mid.attn1.to_out.0",
    "text_encoder.layers.0.self_attn.to_q_lora.down.weight": "text_encoder.layers.0.self_attn.q_proj",
    "unet.mid.to_q.lora.down.weight": "unet.mid.to_q",
    "unet.mid.to_q.lora_linear_layer.down.weight": "unet.mid.to_q",
    "transformer.blocks.0.to_q.lora_A.weight": "transformer.blocks.0.to_q",
    "diffusion_model.blocks.0.q.lora_down.weight": "diffusion_model.blocks.0.q",
}


@pytest.mark.parametrize(("key", "path"), KEYS.items())
def test_keys_of_every_diffusers_version(key, path, tmp_path):
    """Every spelling of a key means A, its counterpart means B, and both have one path."""
    twin = key.replace("down.weight", "up.weight").replace("lora_A", "lora_B")
    save_file({key: torch.ones(2, 3), twin: torch.ones(4, 2)}, tmp_path / "x.safetensors")
    (s,) = li.read(tmp_path / "x.safetensors").sites
    assert (s.path, s.A.shape, s.B.shape) == (path, (2, 3), (4, 2))


def test_gpt2_is_no_pipeline(tmp_path):
    """transformer.h.0 belongs to a language model, although `transformer` is a component of pipelines."""
    save_file(
        {
            "transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(2, 3),
            "transformer.h.0.attn.c_attn.lora_B.weight": torch.ones(9, 2),
        },
        tmp_path / "x.safetensors",
    )
    assert li.read(tmp_path / "x.safetensors", hints=li.Hints(alpha=2)).format == "peft"


def test_kohya_scales(tmp_path):
    """The scale is alpha / r, 1 without alpha, and A1111's `scale` where there is one."""
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


def test_ambiguous_flat_names_are_refused(tmp_path):
    """Two paths that differ only in a dot, and a flat name that may mean two modules, are refused."""
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
            tmp_path / "x.safetensors",
            hints=li.Hints(model=module_tree({"a.b_c.weight": (4, 3), "a_b.c.weight": (4, 3)})),
        )


def test_flat_names_are_not_written_as_paths(tmp_path):
    """kohya's flat names cannot be written in PEFT's format; lorainject's format keeps them as they are."""
    file = FIXTURES / "kohya_lycoris" / "lora.safetensors"
    with pytest.raises(li.FileError, match=r"the names of this record are of the kind 'kohya'"):
        li.convert(file, tmp_path / "a", format="peft", lossy=True)
    done = li.convert(file, tmp_path / "a.safetensors", format="lorainject")
    assert is_same_record(li.read(done.path), li.read(file))


def test_magnitudes_by_input_are_refused_for_peft(tmp_path):
    """LyCORIS has magnitudes per input, PEFT has not. Our own file keeps them."""
    base = load_file(FIXTURES / "kohya_lycoris" / "base.safetensors")
    hints = li.Hints(model=module_tree({key: tuple(t.shape) for key, t in base.items()}))
    file = li.read(FIXTURES / "kohya_lycoris" / "lora.safetensors", hints=hints)
    with pytest.raises(li.FileError, match=r"peft has no place for:\n  - mid_block\.dora_in: magnitudes by input"):
        li.write(file, tmp_path / "a", format="peft")
    li.write(file, tmp_path / "b")
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["adapter_model.safetensors"]
    assert is_same_record(li.read(tmp_path / "b"), file)


def test_header_for_diffusers_is_pefts_config(tmp_path):
    """The header holds PEFT's config of each component, as diffusers expects it."""
    from peft import LoraConfig

    li.convert(DIFFUSERS / "pytorch_lora_weights.safetensors", tmp_path, format="diffusers")
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", framework="pt") as f:
        metadata = json.loads(f.metadata()["lora_adapter_metadata"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for component, alpha in (("unet", 4), ("text_encoder", 6)):
            prefix = f"{component}."
            fields = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
            config = LoraConfig(**{k: v for k, v in fields.items() if k != "peft_type"})
            assert (config.r, config.lora_alpha) == (2, alpha)


STABILITY_NAMES = {
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
    "input_blocks_2_0_in_layers_2": "down_blocks.0.resnets.1.conv1",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "middle_block_0_out_layers_3": "mid_block.resnets.0.conv2",
    "middle_block_1_transformer_blocks_9_ff_net_2": "mid_block.attentions.0.transformer_blocks.9.ff.net.2",
    "middle_block_2_emb_layers_1": "mid_block.resnets.1.time_emb_proj",
    "output_blocks_0_1_transformer_blocks_1_attn2_to_out_0": (
        "up_blocks.0.attentions.0.transformer_blocks.1.attn2.to_out.0"
    ),
    "output_blocks_5_0_in_layers_2": "up_blocks.1.resnets.2.conv1",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}


def save_kohya_file(path: Path, shapes: dict[str, tuple[int, ...]], r: int = 2) -> dict[str, torch.Tensor]:
    """Write a file with one linear per shape, and return the delta by flat name."""
    tensors = {}
    for name, (out, in_) in shapes.items():
        tensors |= {
            f"{name}.lora_down.weight": torch.randn(r, in_),
            f"{name}.lora_up.weight": torch.randn(out, r),
            f"{name}.alpha": torch.tensor(1.0),
        }
    save_file(tensors, path)
    return {name: tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"] / r for name in shapes}


def test_names_of_the_original_unet(tmp_path):
    """Adapters of SDXL under Stability's names are loaded onto diffusers' U-Net."""
    expected = save_kohya_file(tmp_path / "x.safetensors", {f"lora_unet_{name}": (4, 3) for name in STABILITY_NAMES})
    model = li.load(
        module_tree({f"{path}.weight": (4, 3) for path in STABILITY_NAMES.values()}), tmp_path / "x.safetensors"
    )
    deltas = {path: d for path, _, d in li.deltas(model)}
    assert deltas.keys() == set(STABILITY_NAMES.values())
    assert all(
        torch.allclose(deltas[path], expected[f"lora_unet_{name}"], atol=1e-6) for name, path in STABILITY_NAMES.items()
    )


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
    """Adapters of fused weights are split by rows, also where the parts differ in size or have magnitudes."""
    sizes = {path: 8 if path.endswith("proj_mlp") else 4 for paths in FLUX.values() for path in paths}
    file = tmp_path / "x.safetensors"
    expected = save_kohya_file(
        file, {f"lora_unet_{name}": (sum(sizes[p] for p in paths), 3) for name, paths in FLUX.items()}
    )
    model = li.load(module_tree({f"{path}.weight": (n, 3) for path, n in sizes.items()}), file)
    deltas = {path: d for path, _, d in li.deltas(model)}
    assert deltas.keys() == sizes.keys()
    for name, paths in FLUX.items():
        assert torch.allclose(torch.cat([deltas[p] for p in paths]), expected[f"lora_unet_{name}"], atol=1e-6)
    tensors = load_file(file)
    m = torch.rand(20, 1) + 1
    save_file(tensors | {"lora_unet_single_blocks_3_linear1.dora_scale": m}, file)
    model = li.load(module_tree({f"{path}.weight": (n, 3) for path, n in sizes.items()}), file)
    assert torch.equal(model.get_submodule("single_transformer_blocks.3.proj_mlp").lora["default"].m, m[12:].flatten())


@pytest.mark.parametrize("onto", ["diffusers", "original"])
def test_comfyui_names(onto, tmp_path):
    """Paths of the original code after `diffusion_model.` are loaded onto diffusers' modules or the original model."""
    path, A, B = "double_blocks.0.img_attn.qkv", torch.randn(2, 3), torch.randn(12, 2)
    save_file(
        {f"diffusion_model.{path}.lora_A.weight": A, f"diffusion_model.{path}.lora_B.weight": B},
        tmp_path / "x.safetensors",
    )
    weights = (
        {f"{path}.weight": (12, 3)}
        if onto == "original"
        else {f"{p}.weight": (4, 3) for p in FLUX["double_blocks_0_img_attn_qkv"]}
    )
    with pytest.warns(UserWarning, match="the scale was taken to be 1"):
        model = li.load(module_tree(weights), tmp_path / "x.safetensors")
    assert torch.allclose(torch.cat([d for _, _, d in li.deltas(model)]), B @ A, atol=1e-6)


@pytest.mark.parametrize("change", ["rows", "missing"])
def test_fused_weights_that_do_not_fit_the_parts_are_refused(change, tmp_path):
    """The number of rows differs from that of the parts together, or the model has not all parts."""
    save_kohya_file(
        tmp_path / "x.safetensors", {"lora_unet_double_blocks_0_img_attn_qkv": (12 + (change == "rows"), 3)}
    )
    model = module_tree(
        {f"transformer_blocks.0.attn.to_{x}.weight": (4, 3) for x in ("qkv" if change == "rows" else "qk")}
    )
    with pytest.raises(li.FileError, match=r"double_blocks_0_img_attn_qkv: is not in this model"):
        li.load(model, tmp_path / "x.safetensors")
