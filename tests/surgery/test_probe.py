"""probe names the adapters that a real forward and backward reach, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorainject as li

from models import TINY, ids, llama, randomize, state


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("trained", [False, True])
def test_every_site_of_real_architectures_is_reached(name, trained):
    """probe reaches every site of real architectures, whether freshly injected (B = 0) or trained."""
    tiny = TINY[name]
    targets = [t for t in tiny.targets if (name, t) != ("t5", "shared")]
    model = li.inject(tiny.build(), targets, r=4)
    if trained:
        randomize(model)
    plan = li.find(tiny.build(), targets, r=4)
    assert set(li.probe(model, **tiny.inputs()).reached) == {s.path for s in plan}


class Bypassing(nn.Module):
    """A model with layers that act, are read, are unused and get no gradient, and with an idle expert."""

    def __init__(self) -> None:
        super().__init__()
        self.acts, self.read, self.unused, self.cut = (nn.Linear(4, 4) for _ in range(4))
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        weight = getattr(self, "re" + "ad").weight  # the analysis of the source does not see this
        with torch.no_grad():
            cut = self.cut(x)
        return {
            "out": [nn.functional.linear(self.acts(x), weight) + cut + self.experts[1](x)],
            "ids": torch.ones(3, dtype=torch.long),
        }


def test_bypassed_adapters_are_named_with_the_reason():
    """probe raises and names layers that are read, unused or without gradient; an expert without a token is idle."""
    model = li.inject(Bypassing(), ["acts", "read", "unused", "cut", "experts.*"], r=2)
    x = torch.randn(3, 4)
    with pytest.raises(li.UnreachedAdapter) as error:
        li.probe(model, x=x)
    assert [p.split(":")[0] for p in error.value.problems] == ["read", "unused", "cut"]
    assert "its weight acts without the layer being called" in error.value.problems[0]
    assert "does not use the layer" in error.value.problems[1]
    reach = li.probe(li.inject(Bypassing(), ["acts", "experts.*"], r=2), x=x)
    assert reach.reached == ("acts", "experts.1")
    assert reach.idle == ("experts.0",)
    assert str(reach) == "2 sites reached; 1 experts got no token"


def test_an_embedding_is_reached_through_the_modules_that_share_it():
    """T5 never calls its shared embedding, but the adapter acts in encoder and decoder, which have the same weight."""
    tiny = TINY["t5"]
    model = li.inject(tiny.build(), ["shared", "q"], r=2)
    assert "shared" in li.probe(model, **tiny.inputs()).reached


def test_probe_leaves_the_model_as_it_was():
    """Gradients, random state, buffers, modes and flags are as before, in train mode and after an error too."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    li.inject(model, ["0", "3"], r=2, dropout=0.5)
    model.train()
    model(torch.randn(3, 4)).sum().backward()
    before, rng = state(model), torch.get_rng_state()
    grads = [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
    assert len(li.probe(model, input=torch.randn(8, 4)).reached) == 2
    with pytest.raises(RuntimeError):
        li.probe(model, input=torch.randn(8, 5))
    torch.set_rng_state(rng)
    rng = torch.get_rng_state()
    li.probe(model, input=torch.ones(8, 4))
    assert torch.equal(torch.get_rng_state(), rng)
    assert state(model) == before
    assert all(
        p.grad is None if g is None else torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True)
    )


def test_probe_needs_an_active_unmerged_adapter():
    """probe raises if no adapter is active, and while adapters are merged."""
    model = li.inject(llama(), ["q_proj"])
    li.activate(model)
    with pytest.raises(li.StateError, match="no adapter is active"):
        li.probe(model, input_ids=ids())
    li.activate(model, "default")
    li.merge(model)
    with pytest.raises(li.StateError, match="cannot probe while 'default' is merged"):
        li.probe(model, input_ids=ids())


def test_wrong_inputs_are_refused():
    """probe names arguments that the forward does not take; an error of the forward itself is passed on."""
    model = li.inject(llama(), ["q_proj"])
    before = state(model)
    small = li.inject(nn.Sequential(nn.Linear(2, 2)), ["0"])
    with pytest.raises(
        li.StateError, match=r"got an unexpected keyword argument 'pixels'\n=> Sequential\.forward takes input"
    ):
        li.probe(small, torch.ones(2), pixels=ids())
    with pytest.raises(li.StateError, match="missing a required argument: 'input'"):
        li.probe(small)
    with pytest.raises(IndexError):
        li.probe(model, input_ids=ids() + 10_000)
    assert state(model) == before
