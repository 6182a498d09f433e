"""Files of PEFT's PiSSA and OLoRA belong to an altered base; on the original base they are adapters of rank 2 r."""

from __future__ import annotations

import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lorainject as li
from lorainject.cli import main

from models import llama, run

INPUTS = {"input_ids": torch.arange(14).view(2, 7)}


def train_with_peft(folder, init):
    """Save a base, and an adapter that PEFT initialized from the base; return the output of the trained model."""
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(folder / "base")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p) * 0.05)
    wrapped.save_pretrained(folder / "adapter")
    return run(wrapped, INPUTS).detach()


def original(folder):
    """Return the original base."""
    return type(llama()).from_pretrained(folder / "base").eval()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_on_the_original_base_the_outputs_agree(init, tmp_path):
    """With the original base as a hint, load, merge and merge_checkpoint give what PEFT computes on the altered one."""
    y = train_with_peft(tmp_path, init)
    base = original(tmp_path)
    hints = li.Hints(original=base)
    file = li.read(tmp_path / "adapter", hints=hints)
    assert [(s.r, s.constant_ranks) for s in file.sites] == [(8, 4)] * 4
    model = li.load(original(tmp_path), tmp_path / "adapter", hints=hints)
    assert torch.allclose(run(model, INPUTS), y, atol=1e-5)
    li.write(file, tmp_path / "plain", format="peft")
    assert torch.allclose(run(li.load(original(tmp_path), tmp_path / "plain"), INPUTS), y, atol=1e-5)
    li.merge_checkpoint(tmp_path / "base", file, tmp_path / "merged")
    assert torch.allclose(run(type(model).from_pretrained(tmp_path / "merged").eval(), INPUTS), y, atol=1e-5)


def test_without_the_original_base_they_are_refused(tmp_path):
    """The error says how to give the base; a model that is loaded onto is not taken for the original."""
    train_with_peft(tmp_path, "pissa")
    for call in (lambda: li.read(tmp_path / "adapter"), lambda: li.load(original(tmp_path), tmp_path / "adapter")):
        with pytest.raises(li.FileError, match=r"altered base\n=> give the original base with its values: hints="):
            call()


def test_the_shell_converts_with_the_original_base(tmp_path, monkeypatch, capsys):
    """`convert --original` writes the adapter for the original base, and the error without it says so."""
    y = train_with_peft(tmp_path, "pissa")
    call = ["lorainject", "convert", str(tmp_path / "adapter"), str(tmp_path / "plain"), "--to", "peft"]
    for options, status in (([], 1), (["--original", str(tmp_path / "base")], 0)):
        monkeypatch.setattr(sys, "argv", [*call, *options])
        with pytest.raises(SystemExit) as end:
            main()
        assert (end.value.code or 0) == status
    assert "convert ADAPTER OUT --original MODEL" in capsys.readouterr().err
    assert torch.allclose(run(li.load(original(tmp_path), tmp_path / "plain"), INPUTS), y, atol=1e-5)


def test_a_base_that_does_not_fit_is_refused_with_every_site(tmp_path):
    """Missing layers, other shapes and a base without values are listed by site."""
    train_with_peft(tmp_path, "pissa")
    with torch.device("meta"):
        meta = llama()
    cases = {"no linear layer of this name": torch.nn.Module(), "meta device": meta, "has \\(": llama(hidden_size=64)}
    for message, base in cases.items():
        with pytest.raises(li.FileError, match=message) as error:
            li.read(tmp_path / "adapter", hints=li.Hints(original=base))
        assert len(error.value.problems) == 4


def test_a_random_initialization_cannot_be_computed_again(tmp_path):
    """pissa_niter_4 draws random vectors, so that no base helps."""
    train_with_peft(tmp_path, "pissa_niter_4")
    with pytest.raises(li.FileError, match="path_initial_model_for_weight_conversion"):
        li.read(tmp_path / "adapter", hints=li.Hints(original=original(tmp_path)))
