"""The parameter groups of LoRA+ (arXiv 2402.12354)."""

from __future__ import annotations

import pytest
import torch

import lorainject as li
from lorainject import training

from models import llama


def names(model: torch.nn.Module, group: dict[str, object]) -> list[str]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [by_id[id(p)] for p in group["params"]]


def test_b_learns_faster():
    """A and B form two groups; the rate of B is that of A times the ratio."""
    model = li.inject(llama(), ["q_proj", "embed_tokens"], r=2)
    a, b = training.parameter_groups(model, lr=2e-4, weight_decay=0.1)
    assert (a["lr"], b["lr"]) == (2e-4, 16 * 2e-4)
    assert (a["weight_decay"], b["weight_decay"]) == (0.1, 0.1)
    assert {name.rpartition(".")[2] for name in names(model, a)} == {"A"}
    assert {name.rpartition(".")[2] for name in names(model, b)} == {"B"}
    assert {*a["params"], *b["params"]} == set(li.parameters(model))
    torch.optim.AdamW([a, b]).step()


def test_all_that_trains_is_in_one_group(tmp_path):
    """What is neither A nor B (magnitudes, parameters of the base) forms a third group, with the rate of A; nothing is
    left out and nothing is in two groups."""
    import peft

    model = llama()
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    theirs.save_pretrained(tmp_path)
    li.load(model, tmp_path)
    model.model.norm.weight.requires_grad_(True)
    groups = training.parameter_groups(model, lr=1e-3, lr_ratio_b=4)
    assert [(group["group_name"], group["lr"]) for group in groups] == [("A", 1e-3), ("B", 4e-3), ("others", 1e-3)]
    assert {name.rpartition(".")[2] for name in names(model, groups[2])} == {"m", "weight"}
    everything = [p for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything))
    assert set(everything) == {p for p in model.parameters() if p.requires_grad}


def test_groups_of_one_adapter():
    """With a name, the parameters of other active adapters are left out."""
    model = li.inject(llama(), ["q_proj"], r=2, name="a")
    li.inject(model, ["q_proj"], r=2, name="b")
    li.activate(model, "a", "b")
    groups = training.parameter_groups(model, 1e-3, name="b")
    assert all(".b." in name for group in groups for name in names(model, group))
    assert sum(len(group["params"]) for group in groups) == 4


def test_wrong_numbers_are_refused():
    """All wrong numbers are listed, and an inactive adapter is refused as by li.parameters."""
    model = li.inject(llama(), ["q_proj"], r=2)
    with pytest.raises(li.SpecError, match=r"(?s)lr must .* not 0.*lr_ratio_b .* not -1.*weight_decay .* not nan"):
        training.parameter_groups(model, 0, -1, weight_decay=float("nan"))
    li.activate(model)
    with pytest.raises(li.StateError, match="no adapter is active"):
        training.parameter_groups(model, 1e-3)
