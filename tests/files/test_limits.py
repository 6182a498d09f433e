"""At the limits of what a format or a model can take, an adapter is refused by name or kept as it is, never bent."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorainject as li
from lorainject.files import checkpoint_sites, transforms
from lorainject.files.formats import native
from lorainject.files.io import safetensors_file
from lorainject.files.weight_map import StoredPiece, StridedView

from models import bits, randomize
from moe_models import gpt_oss
from oracle import module_tree

A, B = torch.ones(2, 6), torch.ones(6, 2)


def site(path: str, out: int = 8, in_: int = 6, **more: object) -> li.StoredSite:
    return li.StoredSite(path=path, A=torch.randn(2, in_), B=torch.randn(out, 2), alpha=3, **more)


def record(*sites: li.StoredSite) -> li.AdapterFile:
    return li.AdapterFile(path=Path("made"), format="lorainject", sites=sites)


@pytest.mark.parametrize("format", ["gguf", "mlx", "kohya", "diffusers", "loralib", "onnx"])
def test_stacks_of_gpt_oss_need_the_model(format, tmp_path):
    """PEFT's file of interleaved experts does not say how they are stored: without the model nothing is written, and
    with the model the format still has no linears for them."""
    from peft import LoraConfig, get_peft_model

    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    # With a task, PEFT writes no auto_mapping, which would tell the class of the model.
    config = LoraConfig(r=2, target_modules=[], target_parameters=stacks, task_type="FEATURE_EXTRACTION")
    theirs = get_peft_model(gpt_oss(), config)
    theirs.save_pretrained(tmp_path / "a")
    path = tmp_path / f"b{li.FORMATS[format].suffix}"
    hints = li.Hints(component="transformer", architecture="gpt-oss")
    with pytest.raises(
        li.FileError, match=r"(?s)gate_up_proj.*down_proj.*=> read it with the model.*hints=Hints\(model="
    ):
        li.convert(tmp_path / "a", path, format=format, hints=hints)
    with pytest.raises(li.FileError, match=r"no place for:\n.*gate_up_proj: (stacks|experts)"):
        li.convert(tmp_path / "a", path, format=format, hints=replace(hints, model=gpt_oss()))
    assert not path.exists()


def test_two_names_for_one_weight_of_the_model_are_refused(tmp_path):
    """Names that differ in the file and mean one weight of the model are an error with both keys."""
    keys = [f"lora_te_text_model_x{half}" for half in (".lora_down.weight", ".lora_up.weight")]
    keys += [key.replace("text_model_", "") for key in keys]
    save_file({key: (A if "down" in key else B).clone() for key in keys}, tmp_path / "a.safetensors")
    with pytest.raises(li.FileError, match=r"twice.*\n.*x: .* 2 adapters for it: lora_te_.*down.*, lora_te_.*down"):
        li.load(module_tree({"text_model.x.weight": (6, 6)}), tmp_path / "a.safetensors")


def adapter_of_a_checkpoint(folder: Path, path: str) -> Path:
    save_file({f"base_model.model.{path}.lora_A.weight": A, f"base_model.model.{path}.lora_B.weight": B},
              folder / "adapter_model.safetensors")  # fmt: skip
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [path]}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


VIEWS = {
    "transposed": (StridedView(0, (6, 6), (6, 1)), StridedView(0, (6, 6), (1, 6))),
    "a part of a row": (StridedView(0, (4,), (1,)), StridedView(0, (4,), (1,))),
    "from the middle of a row": (StridedView(2, (6,), (1,)), StridedView(0, (6,), (1,))),
}


@pytest.mark.parametrize("disk", VIEWS.values(), ids=VIEWS)
def test_a_weight_that_is_not_moved_by_rows_keeps_its_name_and_is_refused(disk, monkeypatch, tmp_path):
    """Where a loader would transpose a weight, or take pieces of rows, its adapter cannot follow by whole rows: the
    site stays under the checkpoint's name, and load says that the model has no such weight."""
    piece = StoredPiece("old.weight", *disk)
    monkeypatch.setattr(checkpoint_sites, "locate_weights", lambda model, shapes: ({"new.weight": (piece,)}, {}, ()))
    model, path = module_tree({"new.weight": (6, 6)}), adapter_of_a_checkpoint(tmp_path, "old")
    assert [s.path for s in li.read(path, hints=li.Hints(model=model)).sites] == ["old"]
    with pytest.raises(li.FileError, match="old: is not in this model"):
        li.load(model, path)
    whole = StoredPiece("old.weight", StridedView(0, (36,), (1,)), StridedView(0, (36,), (1,)))
    monkeypatch.setattr(checkpoint_sites, "locate_weights", lambda model, shapes: ({"new.weight": (whole,)}, {}, ()))
    assert [s.path for s in li.read(path, hints=li.Hints(model=model)).sites] == ["new"]


def test_a_merged_linear_has_a_limit_of_groups(tmp_path):
    """A slice of one row in a huge weight would need a group per row; it is written as the whole weight instead."""
    shape = (transforms.MAX_IDLE_GROUPS + 2, 6)
    s = site("x", out=1, label="0:1", rows=(range(1),), shape=shape)
    assert transforms.join_merged_linear([s]) is None
    few = replace(s, shape=(transforms.MAX_IDLE_GROUPS + 1, 6))
    _, _, groups = transforms.join_merged_linear([few])
    assert groups == [True] + [False] * transforms.MAX_IDLE_GROUPS
    model = module_tree({"x.weight": shape})
    done = li.write(record(s), tmp_path / "a.pt", format="loralib", hints=li.Hints(model=model))
    again = li.read(done.path, allow_pickle=True, hints=li.Hints(alpha=3, model=model))
    assert torch.allclose(again.sites[0].B[:1] @ again.sites[0].A, s.B @ s.A)
    assert not again.sites[0].B[1:].any()


def test_a_tensor_of_an_unknown_role_is_refused(tmp_path):
    """A record of a later version with a tensor of another role is not read as if the tensor were not there."""
    path = tmp_path / "a.safetensors"
    li.write(record(site("x", bias=torch.ones(8))), path)
    tensors, metadata = safetensors_file.read(path)
    body = json.loads(metadata[native.KEY])
    del body["digest"]
    body["extras"] = {key: ["gate", *rest] for key, (_, *rest) in body["extras"].items()}
    text = json.dumps(body | {"digest": native.digest(body, tensors)})
    path.write_bytes(b"".join(safetensors_file.dump(tensors, {"format": "pt", native.KEY: text})))
    with pytest.raises(li.FileError, match=r"x\.lora_B\.bias: its role 'gate' is unknown: a newer version wrote it"):
        li.read(path)


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.Linear(3, 3)], ids=["no weights", "the root"])
def test_no_empty_list_of_names(model):
    """A model without names to suggest gets no empty "this model has"."""
    with pytest.raises(li.TargetError, match=r"'q_proj' matches nothing\n"):
        li.inject(model, ["q_proj"])


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("component", [None, "unet", "transformer"])
def test_comfyuis_prefixes_are_one_component(prefix, component, tmp_path):
    """Both spellings are read, alone and as either component that the prefix may stand for, and load onto a model."""
    keys = {f"{prefix}blocks.0.x.lora_A.weight": A, f"{prefix}blocks.0.x.lora_B.weight": B}
    save_file(keys, tmp_path / "a.safetensors")
    hints = li.Hints(component=component)
    assert [s.path for s in li.read(tmp_path / "a.safetensors", hints=hints).sites] == ["diffusion_model.blocks.0.x"]
    with pytest.warns(UserWarning, match="scale was taken to be 1"):
        model = li.load(module_tree({"blocks.0.x.weight": (6, 6)}), tmp_path / "a.safetensors", hints=hints)
    (path, _, delta), = li.deltas(model)  # fmt: skip
    assert path == "blocks.0.x"
    assert torch.equal(delta, B @ A)
    with pytest.raises(li.FileError, match=r"no A and B of text_encoder: its components are unet or transformer"):
        li.read(tmp_path / "a.safetensors", hints=li.Hints(component="text_encoder"))


@pytest.mark.parametrize("place", ["a", "a.safetensors"])
def test_attention_as_the_whole_model(place, tmp_path):
    """nn.MultiheadAttention as the root, whose parameters have no path, is saved and loaded to the bit."""
    torch.manual_seed(0)
    base = nn.MultiheadAttention(8, 2).eval()
    model = li.inject(copy.deepcopy(base), "all-linear", r=2)
    randomize(model)
    path = li.save(model, tmp_path / place)
    again = li.load(copy.deepcopy(base), path)
    x = torch.randn(3, 2, 8)
    assert bits(again(x, x, x)[0]) == bits(model(x, x, x)[0])
    assert not torch.allclose(again(x, x, x)[0], base(x, x, x)[0])
    assert bits(li.eject(again)(x, x, x)[0]) == bits(base(x, x, x)[0])
    assert li.convert(path, tmp_path / f"again_{place}").lost == ()
    assert len(load_file(path / "adapter_model.safetensors" if place == "a" else path)) == 4
