"""Shadows of weights after an interrupt, and reads in classes whose source is not in a file."""

from __future__ import annotations

import linecache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorainject as li
from lorainject.lora import weight_graft
from lorainject.targets.source_analysis import weight_use

from models import randomize


class Reader(nn.Module):
    """A module that reads a weight of its child."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.read.weight)


@pytest.mark.parametrize("step", ["_shadow", "_unshadow", "_remove_shadow", "_update_flat_weights"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_forward_leaves_no_shadow_for_long(step, when, monkeypatch):
    """After an interrupt at any step of shadowing, the next forward is right, and eject leaves no shadow."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Reader()), torch.randn(2, 4)
    li.inject(model, ["read"], r=2)
    randomize(model)
    original, y = getattr(weight_graft, step), model(x)

    def interrupted(*args):
        monkeypatch.setattr(weight_graft, step, original)
        if when == "after":
            original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(weight_graft, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert torch.equal(model(x), y)
    li.merge(model)
    li.unmerge(model)
    li.eject(model)
    assert "weight" not in model[0].read.__dict__


def test_a_class_without_a_source_file():
    """The methods of a class from a notebook cell, whose module has no file, are analyzed one by one."""
    source = """class Cell(nn.Module):
    def forward(this, x):
        return [F.linear(x, l.weight) for i, l in enumerate(this.layers)][0]
"""
    linecache.cache["<cell 1>"] = (len(source), None, source.splitlines(True), "<cell 1>")
    names = {"nn": nn, "F": F, "__name__": "no_such_module"}
    exec(compile(source, "<cell 1>", "exec"), names)
    assert "layers.*.weight" in weight_use(names["Cell"]).reads
