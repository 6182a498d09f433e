"""A reference model that is the policy with other adapters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorainject as li
from lorainject import training

from models import bits, gpt2, ids, llama, randomize


def two_adapters() -> nn.Module:
    model = li.inject(llama(), ["q_proj"], r=2, name="sft", dropout=0.5)
    li.inject(model, ["v_proj"], r=2, name="dpo", dropout=0.5)
    randomize(model, "sft")
    randomize(model, "dpo", seed=1)
    li.activate(model, "sft", "dpo")
    return model


@pytest.mark.parametrize("adapter", [None, "sft"])
def test_reference_is_the_policy_with_another_adapter(adapter):
    """The reference computes what the base, or the base with one adapter, computes, in eval mode and without a graph,
    while the policy trains with its dropout."""
    model = two_adapters()
    with li.using(model, *filter(None, [adapter])), torch.no_grad():
        expected = model(ids()).logits
    model.train()
    reference = training.reference(model, adapter)
    out = reference(ids())
    assert torch.equal(out.logits, expected)
    assert not out.logits.requires_grad
    assert model.training
    assert all(module.training for module in model.modules())
    assert model(ids()).logits.requires_grad
    assert not torch.equal(model(ids()).logits, expected)


def test_reference_has_dropout_off():
    """Dropout of the base itself is off in the reference, and on in the policy."""
    model = li.inject(gpt2(), ["c_attn"], r=2).train()
    reference = training.reference(model)
    assert torch.equal(reference(ids()).logits, reference(ids()).logits)
    assert not torch.equal(model(ids()).logits, model(ids()).logits)


def test_reference_takes_no_memory():
    """The reference has no parameters and no children; its attributes are the policy's; a patch of its forward, or
    train(), changes nothing."""
    model = two_adapters()
    reference = training.reference(model)
    assert isinstance(reference, nn.Module)
    assert list(reference.parameters()) == []
    assert list(reference.modules()) == [reference]
    assert reference.config is model.config
    assert reference.device == model.device
    reference.forward = lambda *_: None
    assert reference.train()(ids()).logits is not None
    assert not reference.training


@pytest.mark.parametrize("adapter", [None, "sft"])
def test_state_dict_of_a_reference(adapter):
    """The state dict, by which TRL knows a reference again, is that of the base and of the reference's adapter."""
    model = two_adapters()
    before = {key: bits(t) for key, t in training.reference(model, adapter).state_dict().items()}
    assert not any(".dpo." in key for key in before)
    assert any(".sft." in key for key in before) == (adapter == "sft")
    assert {key for key in model.state_dict() if ".lora." not in key} <= set(before)
    randomize(model, "dpo", seed=5)
    assert {key: bits(t) for key, t in training.reference(model, adapter).state_dict().items()} == before


def test_reference_generates():
    """generate() of the reference uses its adapter, too."""
    model = two_adapters()
    with li.disabled(model):
        expected = model.generate(ids(rows=1), max_new_tokens=5, do_sample=False)
    assert torch.equal(training.reference(model).generate(ids(rows=1), max_new_tokens=5, do_sample=False), expected)


def test_unknown_adapter():
    """A reference needs an adapter that the model has."""
    with pytest.raises(li.StateError, match="no adapter named 'x'"):
        training.reference(two_adapters(), "x")
    with pytest.raises(li.StateError, match="carries no adapter"):
        training.reference(llama())
