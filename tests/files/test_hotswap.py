"""hotswap: another adapter in the place of one, under a model that stays compiled."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import lorainject as li
from lorainject.lora.adapter import LoraAdapter

from models import llama, randomize, run, state

X = {"input_ids": torch.arange(12).view(2, 6)}
MAX_RANK = 8


@pytest.fixture
def fresh():
    """Return a function that makes models with the same weights."""
    weights = llama().state_dict()

    def make() -> nn.Module:
        model = llama()
        model.load_state_dict(weights)
        return model.eval()

    return make


@pytest.fixture
def files(fresh, tmp_path):
    """Return adapters of several ranks, scales and dtypes, one of them on fewer weights: (file, output with it)."""
    files = []
    for i, (r, alpha, scaling, targets, dtype) in enumerate(
        [
            (2, 16, "standard", ["q_proj", "v_proj", "up_proj"], None),
            (8, 4, "standard", ["q_proj", "v_proj", "up_proj"], torch.bfloat16),
            (5, 7, "rslora", ["q_proj", "v_proj", "up_proj"], None),
            (3, 3, "standard", ["v_proj"], None),
        ]
    ):
        model = li.inject(fresh(), targets, r, alpha=alpha, scaling=scaling, dtype=dtype)
        randomize(model, seed=i)
        files.append((li.save(model, tmp_path / f"{i}"), run(model, X)))
    return files


def roomy(model: nn.Module, **settings: object) -> nn.Module:
    li.inject(model, ["q_proj", "v_proj", "up_proj"], r=MAX_RANK, **settings)
    randomize(model, seed=9)
    return model


def test_swaps_do_not_recompile(fresh, files):
    """Adapters of any rank, scale and choice of weights run in one compilation, with the outputs of load."""
    model, counter = roomy(fresh()), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        run(compiled, X)
        for path, wanted in [*files, *reversed(files)]:
            assert li.hotswap(model, path) is model
            assert torch.allclose(run(compiled, X), wanted, atol=1e-5)
            assert torch.allclose(run(model, X), wanted, atol=1e-5)
    assert counter.frame_count == 1


def test_long_and_short_inputs_compile_once():
    """Special cases for large inputs apply to eager calls only, so they make no graph of their own."""
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 4)})
    li.inject(model, ["q_proj", "k_proj"], r=2)
    counter = CompileCounter()
    compiled = torch.compile(
        lambda x: model["q_proj"](x) + model["k_proj"](x), backend=counter, fullgraph=True, dynamic=True
    )
    with torch.no_grad():
        for n in (2**13, 2**15):
            compiled(torch.randn(n, 4))
    assert counter.frame_count == 1


def test_parameters_stay_in_place(fresh, files):
    """Parameters and their addresses stay, so that an optimizer goes on with them."""
    model = roomy(fresh())
    before = [(id(p), p.data_ptr()) for p in li.parameters(model)]
    optimizer = torch.optim.SGD(li.parameters(model), lr=0.1)
    li.hotswap(model, files[0][0])
    assert [(id(p), p.data_ptr()) for p in li.parameters(model)] == before
    model(**X).logits.sum().backward()
    optimizer.step()
    assert not torch.allclose(run(model, X), files[0][1], atol=1e-5)


def test_a_swapped_adapter_is_saved_and_merged_like_any(fresh, files, tmp_path):
    model = roomy(fresh())
    for path, wanted in files:
        li.hotswap(model, path)
        again = li.load(fresh(), li.save(model, tmp_path / "again"))
        assert torch.allclose(run(again, X), wanted, atol=1e-5)
        li.merge(model)
        assert torch.allclose(run(model, X), wanted, atol=1e-5)
        li.unmerge(model)


def test_one_of_several_adapters_is_swapped(fresh, files):
    """The named adapter changes, active or not, and the others stay."""
    model = roomy(fresh(), name="other")
    other = run(model, X)
    roomy(model)
    li.activate(model, "other")
    li.hotswap(model, files[0][0])
    assert torch.equal(run(model, X), other)
    li.activate(model, "default")
    assert torch.allclose(run(model, X), files[0][1], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_the_model_is_kept(fresh, files, dtype):
    model = roomy(fresh(), dtype=dtype)
    li.hotswap(model, files[0][0])
    assert {p.dtype for p in li.parameters(model)} == {dtype}
    assert torch.allclose(run(model, X), files[0][1], atol=0.05)


def test_refusals_list_all_and_change_nothing(fresh, files, tmp_path):
    """Higher ranks and weights without the adapter are listed in one error; all values stay."""
    model = li.inject(fresh(), ["q_proj", "v_proj"], r=4)
    randomize(model)
    before = state(model)
    with pytest.raises(li.FileError) as e:
        li.hotswap(model, files[1][0])
    for message in (
        r"self_attn\.q_proj: has rank 8, but there is room for 4",
        r"v_proj: has rank 8",
        r"up_proj: carries no such adapter",
    ):
        assert re.search(message, str(e.value))
    with pytest.raises(li.StateError, match="no adapter named 'fr'"):
        li.hotswap(model, files[3][0], "fr")
    li.merge(model)
    with pytest.raises(li.StateError, match="merged"):
        li.hotswap(model, files[3][0])
    li.unmerge(model)
    assert state(model) == before


def test_more_than_a_and_b_is_refused(fresh, tmp_path, files):
    """Values beyond the range of A's dtype are refused, and magnitudes on either side."""
    large = li.inject(fresh(), ["q_proj"], r=2)
    with torch.no_grad():
        for p in li.parameters(large):
            p.fill_(1e5)
    path = li.save(large, tmp_path / "large")
    model = li.inject(fresh(), ["q_proj"], r=2, dtype=torch.float16)
    with pytest.raises(li.FileError, match=r"q_proj: its A or B exceeds the range of torch\.float16"):
        li.hotswap(model, path)
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(fresh(), peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    theirs.save_pretrained(tmp_path / "dora")
    with pytest.raises(li.FileError, match=r"q_proj: has magnitudes"):
        li.hotswap(model, tmp_path / "dora")
    with pytest.raises(li.FileError, match=r"q_proj: the adapter on the model has more than A and B"):
        li.hotswap(li.load(fresh(), tmp_path / "dora"), path)


def test_another_base_is_refused(fresh, files):
    """A model with other base weights is refused, unless check_base=False."""
    model = roomy(fresh())
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.5)
    before = state(model)
    with pytest.raises(li.FileError, match=r"layers\.1\.self_attn\.q_proj: differs from the base weight"):
        li.hotswap(model, files[0][0])
    assert state(model) == before
    li.hotswap(model, files[0][0], check_base=False)


def test_a_new_scale_is_in_the_same_memory():
    """Compiled code reads s in its old place; a scale beyond float32's range becomes infinite there."""
    adapter = LoraAdapter(torch.ones(4, 3), torch.ones(5, 4), alpha=8, scaling="standard", dropout=0.0, init="kaiming")
    s = adapter.s
    for alpha, scaling, want in ((6.0, "rslora", 3.0), (6.0, "standard", 1.5)):
        adapter.rescale(alpha, scaling)
        assert adapter.s is s
        assert (float(s), adapter.scale, adapter.alpha, adapter.scaling) == (want, want, alpha, scaling)
    adapter.rescale(1e300, "standard")
    assert (float(s), adapter.scale) == (float("inf"), 2.5e299)
