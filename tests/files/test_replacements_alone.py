"""Adapters without A and B: whole tensors and rows of tokens alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import lorainject as li

from models import ids, llama, run

X = {"input_ids": ids()}


def head_alone(tmp_path) -> tuple[nn.Module, li.AdapterFile]:
    """Return a base, and a record with a new head and nothing else."""
    torch.manual_seed(0)
    base = llama()
    li.save(li.inject(copy.deepcopy(base), ["q_proj"], r=2), tmp_path / "some")
    some = li.read(tmp_path / "some")
    head = torch.randn(base.lm_head.weight.shape)
    return base, replace(some, sites=(), base=None, replaced={"lm_head": head})


@pytest.mark.parametrize("place", ["a", "a.safetensors"])
def test_a_new_head_alone_is_saved_and_loaded(tmp_path, place):
    """It is written, read, loaded, saved again with the same bytes, switched off and ejected, like any adapter."""
    base, file = head_alone(tmp_path)
    expected, before = copy.deepcopy(base), run(base, X)
    with torch.no_grad():
        expected.lm_head.weight.copy_(file.replaced["lm_head"])
    path = li.write(file, tmp_path / place).path
    model = li.load(copy.deepcopy(base), path)
    assert torch.equal(run(model, X), run(expected, X))
    again = li.save(model, tmp_path / f"again_{place}")
    assert torch.equal(li.read(again).replaced["lm_head"], file.replaced["lm_head"])
    with li.disabled(model):
        assert torch.equal(run(model, X), before)
    li.merge(model)
    assert torch.equal(run(model, X), run(expected, X))
    assert torch.equal(run(li.eject(model), X), before)


def test_pefts_format_has_no_head_alone(tmp_path):
    """PEFT refuses a config that targets nothing, so its format is refused, and ours has no config for PEFT."""
    base, file = head_alone(tmp_path)
    with pytest.raises(li.FileError, match="peft has no place for an adapter without A and B"):
        li.write(file, tmp_path / "b", format="peft")
    model = li.load(base, li.write(file, tmp_path / "a").path)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["adapter_model.safetensors"]
    with pytest.raises(li.FileError, match="PEFT has no place for:\n  - an adapter without A and B"):
        li.save(model, tmp_path / "b", format="peft")


def test_formats_without_whole_tensors_refuse_it(tmp_path):
    """The tensor is named, and with lossy=True nothing would be left."""
    _, file = head_alone(tmp_path)
    with pytest.raises(li.FileError, match=r"mlx has no place for:\n  - lm_head: a whole tensor"):
        li.write(file, tmp_path / "a", format="mlx")
    with pytest.raises(li.FileError, match="no place for an adapter without A and B"):
        li.write(file, tmp_path / "a", format="mlx", lossy=True)
    with pytest.raises(li.FileError, match="holds no A and B"):
        li.write(replace(file, replaced={}), tmp_path / "a")
    assert not (tmp_path / "a").exists()
