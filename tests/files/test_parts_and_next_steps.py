"""Files for a part of a model or for several components, and errors whose next step helps with what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorainject as li
from lorainject.files.formats.pairs import other_method

from oracle import module_tree

TEXT = {f"layers.{i}.self_attn.{leaf}.weight": (6, 6) for i in range(2) for leaf in ("q_proj", "v_proj")}


def multimodal(vision: int) -> nn.Module:
    """Return a model with a language part and a vision tower of this width, whose layers have the same names."""
    shapes = {f"model.language_model.{key}": shape for key, shape in TEXT.items()}
    return module_tree(shapes | {f"model.vision_tower.encoder.{key}": (vision, vision) for key in TEXT})


def peft(folder: Path, paths: list[str], **config: Any) -> Path:
    """Write an adapter in PEFT's layout on modules of width 6."""
    folder.mkdir()
    tensors = {f"base_model.model.{p}.lora_A.weight": torch.ones(2, 6) for p in paths}
    tensors |= {f"base_model.model.{p}.lora_B.weight": torch.ones(6, 2) for p in paths}
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def text_paths(prefix: str) -> list[str]:
    """Return the paths of the text model's layers."""
    return [prefix + key.removesuffix(".weight") for key in TEXT]


def test_text_adapters_go_onto_the_language_part_and_back(tmp_path):
    """The levels in front of the layers may differ; the vision tower's layers of the same names stay as they are."""
    path = peft(tmp_path / "text", text_paths("model."))
    with pytest.warns(UserWarning, match=r"model\.layers\.0.*taken for model\.language_model\.layers\.0"):
        model = li.load(multimodal(vision=4), path)
    assert [name for name, _, _ in li.deltas(model)] == text_paths("model.language_model.")
    path = peft(tmp_path / "multimodal", text_paths("model.language_model."))
    with pytest.warns(UserWarning, match="taken for"):
        model = li.load(module_tree({f"model.{key}": shape for key, shape in TEXT.items()}), path)
    assert [name for name, _, _ in li.deltas(model)] == text_paths("model.")


def test_an_adapter_that_fits_several_parts_is_refused(tmp_path):
    """If the shapes cannot tell the parts apart, both are named, and the next step says how to choose."""
    path = peft(tmp_path / "a", text_paths("model."))
    with pytest.raises(
        li.FileError, match=r"(?s)several parts.*language_model.*vision_tower.*\n=> .*model\.get_submodule\("
    ):
        li.load(multimodal(vision=6), path)


def test_other_levels_in_place_of_the_models_are_no_match(tmp_path):
    """An adapter of a decoder does not go onto an encoder, though the rest of the names and the shapes agree."""
    path = peft(tmp_path / "a", text_paths("model.decoder."), target_modules=None)
    with pytest.raises(li.FileError, match="is not in this model"):
        li.load(module_tree({f"model.encoder.{key}": shape for key, shape in TEXT.items()}), path)


def test_missing_targets_are_accepted_only_on_request(tmp_path):
    """The error names the argument; with it, the layers that stay as they are in the base are named in a warning."""
    shapes = {f"model.{key}": shape for key, shape in TEXT.items()}
    path = peft(tmp_path / "a", text_paths("model.")[:-1])
    with pytest.raises(li.FileError, match=r"(?s)layers\.1.*v_proj: missing in the file.*=> .*allow_missing=True"):
        li.load(module_tree(shapes), path)
    with pytest.warns(UserWarning, match=r"1 layers .* no A and B in the file.*layers\.1\.self_attn\.v_proj"):
        model = li.load(module_tree(shapes), path, allow_missing=True)
    assert len(list(li.deltas(model))) == len(TEXT) - 1


def kohya(path: Path, *names: str) -> Path:
    """Write a kohya file with these flat names."""
    ends = ((".lora_down.weight", (2, 3)), (".lora_up.weight", (4, 2)))
    save_file({name + end: torch.ones(shape) for name in names for end, shape in ends}, path)
    return path


def test_the_t5_of_flux_is_the_second_text_encoder(tmp_path):
    """kohya's third text encoder is taken for text_encoder_2 if the file has no second one."""
    name = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    path = kohya(tmp_path / "a.safetensors", "lora_unet_x", name)
    for component in ("text_encoder_2", "text_encoder_3"):
        assert [s.path for s in li.read(path, hints=li.Hints(component=component)).sites] == [name]
    both = kohya(tmp_path / "b.safetensors", "lora_te2_x", name)
    assert [s.path for s in li.read(both, hints=li.Hints(component="text_encoder_2")).sites] == ["lora_te2_x"]


def test_a_component_that_a_file_lacks(tmp_path):
    """The error names the components that the file has."""
    path = kohya(tmp_path / "a.safetensors", "lora_unet_x")
    with pytest.raises(li.FileError, match=r"(?s)no A and B of text_encoder.*unet or transformer.*component='unet'"):
        li.read(path, hints=li.Hints(component="text_encoder"))


def test_a_name_that_begins_like_a_method_is_not_that_method():
    """`.diffusion_model` is no `.diff`, and the parts of LoKr are LoKr."""
    assert other_method("model.diffusion_model.x.lora_down.weight") is None
    assert "full difference" in str(other_method("diffusion_model.x.diff_b"))
    assert "LoKr" in str(other_method("base_model.model.x.lokr_w1_a"))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"bundle_emb.x.string_to_param.*": (2, 3)}, r"(?s)textual inversion.*=> write the file without it"),
        ({"base_model.model.x.lokr_w1": (2, 3)}, r"(?s)LoKr.*=> merge what is not plain LoRA"),
        ({"base_model.model.experts.down_proj.lora_A.weight": (4, 2, 3),
          "base_model.model.experts.down_proj.lora_B.weight": (4, 5, 2)}, r"(?s)4 experts, stacked.*experts\.0\.down"),
    ],
    ids=["bundled", "lokr", "stacked experts"],
)  # fmt: skip
def test_next_steps_fit_the_problem(extra, expected, tmp_path):
    """What is beside an adapter is named, with a next step for it instead of advice about damaged files."""
    path = peft(tmp_path / "a", ["q_proj"])
    tensors = {"base_model.model.q_proj.lora_A.weight": (2, 6), "base_model.model.q_proj.lora_B.weight": (6, 2)}
    save_file({k: torch.ones(s) for k, s in (tensors | extra).items()}, path / "adapter_model.safetensors")
    with pytest.raises(li.FileError, match=expected) as caught:
        li.read(path)
    assert "damaged" not in str(caught.value)


def test_two_pairs_for_one_weight_are_refused(tmp_path):
    """A file in which two names mean one weight is refused: a record would keep either of them (found by fuzzing)."""
    path = peft(tmp_path / "a", ["mlp.experts", "mlp.experts.base_layer"], target_modules=None)
    with pytest.raises(
        li.FileError, match=r"mlp\.experts: .* 2 adapters for it: .*base_layer\.lora_A\.weight, .*experts\.lora_A"
    ):
        li.read(path)
