"""probe: what a real forward and backward reach, said by name, with nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorainject as li

from models import TINY, ids, llama, randomise, state


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("trained", [False, True])
def test_everything_is_reached(name, trained):
    """On real architectures every site is reached, freshly injected (B = 0) or trained."""
    tiny = TINY[name]
    targets = [t for t in tiny.targets if (name, t) != ("t5", "shared")]
    model = li.inject(tiny.build(), targets, r=4)
    if trained:
        randomise(model)
    plan = li.find(tiny.build(), targets, r=4)
    assert set(li.probe(model, **tiny.inputs()).reached) == {s.path for s in plan}


class Odd(nn.Module):
    """Four ways in which a layer can be there and yet not act, and one in which it acts."""

    def __init__(self) -> None:
        super().__init__()
        self.acts, self.read, self.unused, self.cut = (nn.Linear(4, 4) for _ in range(4))
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        weight = getattr(self, "re" + "ad").weight  # in a way that no look at the source finds
        with torch.no_grad():
            cut = self.cut(x)
        return {
            "out": [nn.functional.linear(self.acts(x), weight) + cut + self.experts[1](x)],
            "ids": torch.ones(3, dtype=torch.long),
        }


def test_what_is_not_reached_is_named():
    """Read around, unused, cut from the gradient: each an error by name; an expert without a token is said apart."""
    model = li.inject(Odd(), ["acts", "read", "unused", "cut", "experts.*"], r=2)
    x = torch.randn(3, 4)
    with pytest.raises(li.UnreachedAdapter) as e:
        li.probe(model, x=x)
    assert [p.split(":")[0] for p in e.value.problems] == ["read", "unused", "cut"]
    assert "its weight acts without the layer being called" in e.value.problems[0]
    assert "does not use the layer" in e.value.problems[1]
    reach = li.probe(li.inject(Odd(), ["acts", "experts.*"], r=2), x=x)
    assert reach.reached == ("acts", "experts.1")
    assert reach.idle == ("experts.0",)
    assert str(reach) == "2 sites reached; 1 experts got no token"


def test_t5s_shared_embedding():
    """T5 has an embedding that it never calls; an adapter on it is a silent no-op everywhere else."""
    tiny = TINY["t5"]
    model = li.inject(tiny.build(), ["shared", "q"], r=2)
    with pytest.raises(
        li.UnreachedAdapter, match=r"shared: its weight acts without the layer being called: .* or through a tie"
    ):
        li.probe(model, **tiny.inputs())


def test_nothing_is_left_behind():
    """Gradients, random state, batch statistics, modes and flags are as before, in train mode too, and after an error."""
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


def test_only_what_is_on_is_probed():
    """Merged or switched off there is nothing to reach: a clear error."""
    model = li.inject(llama(), ["q_proj"])
    li.activate(model)
    with pytest.raises(li.StateError, match="no adapter is active"):
        li.probe(model, input_ids=ids())
    li.activate(model, "default")
    li.merge(model)
    with pytest.raises(li.StateError, match="cannot probe while 'default' is merged"):
        li.probe(model, input_ids=ids())


def test_inputs_that_the_model_can_not_take():
    """Said before anything runs, with what it takes; what the forward itself raises comes through."""
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
