"""Code that reads the weight of an adapted head instead of calling the head uses its adapter, and trains it."""

from __future__ import annotations

import copy
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorainject as li

from models import bits, ids, llama, randomize, state

X = ids()


class FusedLoss(torch.autograd.Function):
    """A fused head and loss, which takes plain tensors and computes its gradients by hand, as real ones do."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (hidden, weight)]
            loss = F.cross_entropy(inputs[0] @ inputs[1].t(), labels)
        ctx.save_for_backward(*torch.autograd.grad(loss, inputs))
        return loss.detach()

    @staticmethod
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        return grad * d_hidden, grad * d_weight if ctx.needs_input_grad[1] else None, None


def fused_forward(self, input_ids, labels=None, **kwargs):
    hidden = self.model(input_ids, use_cache=False).last_hidden_state[:, :-1]
    head = self.get_output_embeddings()
    hidden = hidden.to(head.weight.device)
    return FusedLoss.apply(hidden.flatten(0, 1), head.weight, input_ids[:, 1:].flatten())


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, list(li.parameters(model)))


def plain_loss(model: nn.Module) -> torch.Tensor:
    logits = model(X, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), X[:, 1:].flatten())


@pytest.mark.parametrize("target", ["lm_head", "lm_head.weight"])
def test_a_fused_forward_that_was_patched_on_later_trains_the_head(target):
    """A forward that is stored on the model after inject, and reads the head's weight, gives the loss and the gradients
    of the called head; probe says that the head is reached, and that the dense sum is formed."""
    model = llama()
    randomize(li.inject(model, ["q_proj", target], r=2))
    loss = plain_loss(model)
    expected = gradients(model, loss)
    model.forward = types.MethodType(fused_forward, model)
    fused = model(X, labels=X)
    assert model.lm_head.lora.fallbacks == {"fused_forward": 1}  # asking for the device does not form the sum
    torch.testing.assert_close(fused, loss)
    torch.testing.assert_close(gradients(model, fused), expected)
    reach = li.probe(model, X)
    assert "lm_head" in {name.removesuffix(".weight") for name in reach.reached}
    assert reach.dense == {"lm_head": ("fused_forward",)}
    with li.disabled(model):
        assert not torch.equal(model(X, labels=X), fused)
    with li.rows(model, ["default", None]), pytest.raises(li.StateError, match="read by the model's own code"):
        model(X)


def test_a_head_whose_own_forward_is_patched_uses_the_adapter():
    """A forward that is stored on the head itself (TRL casts the head to float32 so) multiplies by the sum."""
    model = llama()
    randomize(li.inject(model, ["lm_head"], r=2))
    expected, head = model(X).logits, model.lm_head
    head.forward = lambda x: F.linear(x.float(), head.weight.float())
    torch.testing.assert_close(model(X).logits, expected)


def test_the_parameter_is_read_outside_of_forwards():
    """Outside of a forward, the head's weight is the parameter, however it is read; copies, pickles and eject work."""
    model = llama()
    before = state(model)
    li.inject(model, ["lm_head"], r=2)
    randomize(model)
    assert model.lm_head.weight is model.lm_head._parameters["weight"]
    assert dict(model.named_parameters())["lm_head.weight"] is model.lm_head.weight
    expected = bits(model(X).logits)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert bits(other(X).logits) == expected
    li.merge(model)
    assert type(model.lm_head) is nn.Linear
    li.unmerge(model)
    assert bits(model(X).logits) == expected
    li.eject(model)
    assert state(model) == before


def test_the_forward_of_the_head_reads_the_parameter():
    """A head that takes the general way (two adapters) reads its parameter, and adds each term once."""
    model = llama()
    li.inject(model, ["lm_head"], r=2, name="a")
    li.inject(model, ["lm_head"], r=2, name="b")
    li.activate(model, "a", "b")
    randomize(model, "a")
    randomize(model, "b", seed=1)
    deltas = sum(d for _, _, d in li.deltas(model))
    hidden = model.model(X).last_hidden_state
    expected = F.linear(hidden, model.lm_head._parameters["weight"] + deltas)
    torch.testing.assert_close(model(X).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_loss_reads_the_same_weight_again(reentrant):
    """A loss that reads the head's weight within a checkpointed region gets the sum in the second run as well."""
    torch.manual_seed(0)
    model = li.inject(llama(), ["lm_head", "q_proj"], r=2)
    randomize(model)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def part(self, hidden: torch.Tensor) -> torch.Tensor:
            return (hidden @ self.model.lm_head.weight.T).square().mean()

        def forward(self, checkpointed: bool) -> torch.Tensor:
            hidden = self.model.model(input_ids=X, use_cache=False).last_hidden_state
            return checkpoint(self.part, hidden, use_reentrant=reentrant) if checkpointed else self.part(hidden)

    def grads(checkpointed: bool) -> list[torch.Tensor]:
        model.zero_grad()
        Loss()(checkpointed).backward()
        return [p.grad.clone() for p in li.parameters(model)]

    for a, b in zip(grads(True), grads(False), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
