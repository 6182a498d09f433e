"""Modules that share a parameter and use it in the same way have one adapter."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lorainject as li

from models import bits, llama, randomize, state

KINDS = {"linear": lambda: nn.Linear(6, 6), "embedding": lambda: nn.Embedding(6, 6), "conv": lambda: nn.Conv1d(6, 6, 1)}


class Tied(nn.Module):
    """Layers with one weight, of which the last is never called, and another layer; a weight may be read instead."""

    def __init__(self, kind: str = "linear", twins: int = 3, read: bool = False) -> None:
        super().__init__()
        self.kind, self.read = kind, read
        self.twins = nn.ModuleList(KINDS[kind]() for _ in range(twins))
        self.body = nn.Linear(6, 6)
        for twin in self.twins[1:]:
            twin.weight = self.twins[0].weight

    def forward(self, x):
        y = 0
        for twin in self.twins[:-1]:
            if self.kind == "embedding":
                y = y + twin(x)
            elif self.kind == "conv":
                y = y + twin(x.mT).mT.tanh()
            else:
                y = y + twin(x).tanh()
        if self.read:
            y = y + nn.functional.linear(y, self.twins[0].weight)
        return self.body(y)


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(6)[None] if kind == "embedding" else torch.randn(2, 3, 6, dtype=dtype)


def dense(model: nn.Module) -> nn.Module:
    """Return a copy of the base whose weights are W0 + s B A."""
    copied = copy.deepcopy(model)
    sums = {name: W + delta.to(W.dtype) for name, W, delta in li.deltas(copied)}
    li.eject(copied)
    with torch.no_grad():
        for name, W in sums.items():
            copied.get_submodule(name).weight.copy_(W)
    return copied


@given(kind=st.sampled_from(sorted(KINDS)), twins=st.integers(2, 4), read=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))  # fmt: skip
def test_a_tied_weight_has_one_adapter(kind, twins, read, dtype):
    """It acts in all modules that share the weight; merge changes the weight for all of them, in place and without
    untie; unmerge and eject restore every bit."""
    torch.manual_seed(0)
    model = Tied(kind, twins, read and kind == "linear").to(dtype)
    before, W0, x = state(model), bits(model.twins[0].weight), inputs(kind, dtype)
    li.inject(model, ["twins.1", "body"], r=2)
    assert [name for name, *_ in li.deltas(model)] == ["twins.0", "body"]
    assert len({id(child) for twin in model.twins for child in twin.children()}) == 1
    assert len(list(li.parameters(model))) == 4
    randomize(model)
    want = model(x)
    exact = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(want, dense(model)(x), atol=exact, rtol=exact)
    torch.testing.assert_close(copy.deepcopy(model)(x), want)
    li.merge(model)
    assert all(type(t) is type(KINDS[kind]()) and t.weight is model.twins[0].weight for t in model.twins)
    torch.testing.assert_close(model(x), want, atol=exact, rtol=exact)
    li.unmerge(model)
    assert bits(model.twins[0].weight) == W0
    torch.testing.assert_close(model(x), want)
    li.eject(model)
    assert state(model) == before


def test_gradients_of_a_tied_weight_are_the_sum_over_its_users():
    """The gradient of B is that of the dense weight, which all modules use; a module that is never called adds none."""
    torch.manual_seed(0)
    model = li.inject(Tied(), "all-linear", r=2)
    randomize(model)
    oracle, x = dense(model), inputs("linear")
    model(x).square().sum().backward()
    oracle.twins[0].weight.requires_grad_()
    (gradient,) = torch.autograd.grad(oracle(x).square().sum(), oracle.twins[0].weight)
    adapter = model.twins[0].lora["default"]
    torch.testing.assert_close(adapter.B.grad, gradient @ adapter.A.T, rtol=1e-4, atol=1e-4)
    assert li.probe(model, x).reached == ("twins.0", "body")


@pytest.mark.parametrize("form", ["adapter.safetensors", "adapter"])
def test_a_tied_weight_is_saved_once_and_loads(form, tmp_path: Path):
    """The file has one adapter for the weight; onto a model without the tie it is refused, with the names."""
    model = li.inject(Tied(), "all-linear", r=2)
    randomize(model)
    path, x = li.save(model, tmp_path / form), inputs("linear")
    assert [site.path for site in li.read(path).sites] == ["twins.0", "body"]
    base = li.eject(copy.deepcopy(model))
    torch.testing.assert_close(li.load(copy.deepcopy(base), path)(x), model(x), rtol=0, atol=0)
    if form != "adapter":  # PEFT's layout has no room for further names of a weight
        base.twins[1].weight = nn.Parameter(base.twins[1].weight.detach().clone())
        with pytest.raises(li.FileError, match=r"twins\.0: was one module with twins\.1"):
            li.load(base, path)


def test_a_file_with_an_adapter_for_each_module_keeps_them_apart(tmp_path: Path):
    """PEFT adapts each module by itself. Such a file loads as it is, runs rightly, and is saved again whole."""
    separate = Tied()
    for twin in separate.twins[1:]:
        twin.weight = nn.Parameter(twin.weight.detach().clone())
    li.inject(separate, "all-linear", r=2)
    randomize(separate)
    path, x = li.save(separate, tmp_path / "adapter"), inputs("linear")
    model = li.eject(copy.deepcopy(separate))
    for twin in model.twins[1:]:
        twin.weight = model.twins[0].weight
    li.load(model, path)
    torch.testing.assert_close(model(x), separate(x))
    assert [site.path for site in li.read(li.save(model, tmp_path / "again")).sites] == [
        *(f"twins.{i}" for i in range(3)), "body",
    ]  # fmt: skip
    with pytest.raises(li.MergeError, match=r"twins\.0: its weight is tied to twins\.1"):
        li.merge(model)
    li.inject(model, "all-linear", r=2, name="other")
    assert len(list(li.parameters(model, "other"))) == 8


def test_a_tie_that_was_lost_is_refused_at_merge():
    """If a module got a weight of its own since inject, merge names it, since its weight would miss the delta."""
    model = li.inject(Tied(), "all-linear", r=2)
    randomize(model)
    model.twins[1].weight = nn.Parameter(model.twins[1].weight.detach().clone(), requires_grad=False)
    before = state(model)
    with pytest.raises(li.MergeError, match=r"twins\.0: is no longer tied to the modules that it was tied to"):
        li.merge(model)
    assert state(model) == before


def test_a_tie_that_was_lost_while_merged_is_refused_at_unmerge():
    """unmerge would restore W0 in one of the modules only, so that it refuses, too."""
    model = li.inject(Tied(), "all-linear", r=2)
    randomize(model)
    li.merge(model)
    model.twins[1].weight = nn.Parameter(model.twins[1].weight.detach().clone(), requires_grad=False)
    with pytest.raises(li.MergeError, match=r"twins\.0: is no longer tied"):
        li.unmerge(model)


def test_exclude_and_names_mean_the_weight():
    """Any of the names adapts the weight, and excluding any of its modules leaves it out."""
    assert [s.path for s in li.find(Tied(), ["twins.2"])] == ["twins.0"]
    assert [s.aliases for s in li.find(Tied(), ["twins.2"])] == [("twins.1", "twins.2")]
    assert [s.path for s in li.find(Tied(), "all-linear", exclude=["twins.2"])] == ["body"]


def test_a_tied_model_is_pickled_with_one_adapter():
    """A pickled model has one adapter per tied weight, too."""
    model = li.inject(Tied(), "all-linear", r=2)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert again.twins[0].lora is again.twins[2].lora
    li.eject(again)


def test_an_embedding_and_its_output_head_stay_two_weights():
    """They use their weight in two ways, so that a merge into one would change the other: it is refused."""
    model = llama(tie_word_embeddings=True)
    li.inject(model, ["embed_tokens", "lm_head"], r=2)
    assert len(list(li.deltas(model))) == 2
    with pytest.raises(li.MergeError, match=r"lm_head: its weight is tied to model\.embed_tokens\.weight"):
        li.merge(model)
