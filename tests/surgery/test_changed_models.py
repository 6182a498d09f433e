"""Law 12: what was injected stays accounted for when a model changes afterwards."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import lorainject as li
from lorainject.lora.model_index import ModelIndex

from models import bits, ids, llama, randomize, run, state

X = {"input_ids": ids()}
VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "merge": li.merge,
    "probe": lambda m: li.probe(m, **X),
    "activate": lambda m: li.activate(m, "default"),
    "using": lambda m: li.using(m, "default").__enter__(),
    "disabled": lambda m: li.disabled(m).__enter__(),
    "rows": lambda m: li.rows(m, ["default", None]).__enter__(),
    "parameters": li.parameters,
    "deltas": lambda m: list(li.deltas(m)),
    "inject": lambda m: li.inject(m, ["o_proj"], name="other"),
    "rescale": lambda m: li.rescale(m, alpha=3),
    "reset": li.reset,
}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = li.inject(llama(), ["q_proj", "lm_head"], r=4, alpha=8)
    randomize(model)
    return model


def replace_head(model: nn.Module) -> None:
    model.lm_head = nn.Linear(32, 99, bias=False).requires_grad_(False)


def remove_layer(model: nn.Module) -> None:
    del model.model.layers[1]


def resize(model: nn.Module) -> None:
    model.resize_token_embeddings(101)


CHANGES = [(replace_head, "lm_head"), (remove_layer, r"model\.layers\.1\.self_attn\.q_proj"), (resize, "lm_head")]


# Modules that are replaced, removed or added


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("change", "name"), CHANGES)
def test_a_verb_names_what_is_not_in_the_model_any_more(model, verb, change, name):
    """A module that was replaced or removed since inject took its adapter along; no verb goes on with the rest."""
    change(model)
    for changed in (model, copy.deepcopy(model)):
        with pytest.raises(li.StateError, match=rf"not in the model any more.*\n  - {name}\n=> "):
            VERBS[verb](changed)


@pytest.mark.parametrize(("change", "name"), CHANGES)
def test_what_is_left_can_be_saved_and_ejected(model, tmp_path, change, name):
    """save and eject go on with what is left, and warn of what is not; then inject starts afresh."""
    change(model)
    with pytest.warns(UserWarning, match=f"are not saved: {name}"):
        li.save(model, tmp_path / "rest")
    assert len(li.read(tmp_path / "rest").sites) == 2
    with pytest.warns(UserWarning, match=f"replaced or removed since: {name}"):
        li.eject(model)
    li.inject(model, ["q_proj", "lm_head"], r=4)
    li.merge(model)


class FusableAttention(nn.Module):
    """What diffusers 0.42 does at `fuse_qkv_projections` (models/attention.py: AttentionModuleMixin)."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(4, 4, bias=False) for _ in range(4))
        self.fused_projections = False

    def fuse(self) -> None:
        self.to_qkv = nn.Linear(4, 12, bias=False).requires_grad_(False)
        with torch.no_grad():
            self.to_qkv.weight.copy_(torch.cat([m.weight.data for m in (self.to_q, self.to_k, self.to_v)]))
        self.fused_projections = True

    def unfuse(self) -> None:
        del self.to_qkv
        self.fused_projections = False

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.to_q, self.to_k, self.to_v)
        q, k, v = self.to_qkv(x).chunk(3, -1) if self.fused_projections else (layer(x) for layer in layers)
        return self.to_out(torch.softmax(q @ k.mT, -1) @ v)


def test_layers_that_were_fused_since_are_named(tmp_path):
    """Nothing calls to_q after fuse_qkv_projections, so that its adapter would do nothing in silence."""
    model, x = nn.Sequential(FusableAttention()), torch.randn(2, 3, 4)
    attention = model[0]
    li.inject(model, ["to_q", "to_v", "to_out"])
    randomize(model)
    y = model(x)
    attention.fuse()
    for verb in (li.merge, li.parameters, lambda m: li.activate(m, "default"), lambda m: li.disabled(m).__enter__()):
        with pytest.raises(li.StateError, match=r"(?s)0\.to_q.*0\.to_v.*unfuse_qkv_projections"):
            verb(model)
    li.save(model, tmp_path / "a")
    attention.unfuse()
    li.merge(model)
    attention.fuse()
    torch.testing.assert_close(model(x), y)
    for verb in (li.unmerge, li.eject):
        with pytest.raises(li.StateError, match=r"(?s)0\.to_q.*unfuse_qkv_projections"):
            verb(model)
    attention.unfuse()
    li.eject(model)
    attention.fuse()
    with pytest.raises(li.TargetError, match=r"0\.to_q: nothing calls it since fuse_qkv_projections"):
        li.inject(model, ["to_q"])
    with pytest.raises(li.LoraError, match="fuse_qkv_projections"):
        li.load(model, tmp_path / "a")
    li.inject(model, ["to_out"])
    li.eject(model)


def test_a_model_that_lost_all_adapters_says_so():
    """Without any adapter left in the model, a verb names what was injected all the same."""
    model = li.inject(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), ["1"], r=1)
    model[1] = nn.Linear(3, 3)
    with pytest.raises(li.StateError, match=r"not in the model any more.*\n  - 1\n"):
        li.merge(model)
    with pytest.warns(UserWarning, match="replaced or removed since: 1"):
        li.eject(model)
    li.inject(model, ["1"], r=1)


def test_a_layer_that_was_added_by_deepcopy_is_switched_along(model):
    """Contexts and activate act on every adapter in the model, whoever put it there."""
    base = copy.deepcopy(li.eject(copy.deepcopy(model)))
    li.activate(model, "default")
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    base.model.layers.append(copy.deepcopy(base.model.layers[0]))
    with li.disabled(model):
        assert torch.equal(run(model, X), run(base, X))
    li.activate(model)
    assert torch.equal(run(model, X), run(base, X))
    li.activate(model, "default")
    report = li.merge(model)
    assert len(report.sites) == 4


def test_a_part_of_another_model_is_refused_while_that_model_lives(model):
    """A verb on a model with a layer of another injected model would act on that one too, and names what it lost."""
    other = li.inject(llama(), ["q_proj"], r=2)
    randomize(other)
    li.activate(model, "default")
    model.model.layers[0] = other.model.layers[0]
    with pytest.raises(li.StateError, match=r"\n  - model\.layers\.0\.self_attn\.q_proj\n"):
        li.merge(model)
    with pytest.warns(UserWarning, match="replaced or removed"), pytest.raises(li.StateError, match="is a part of"):
        li.eject(model)
    del other
    li.eject(model)
    assert not ModelIndex(model).sites


def test_a_wrapped_or_shared_model_lacks_nothing(model):
    """A model within another module, or compiled, has all that was injected."""
    wrapper = nn.ModuleDict({"inner": model})
    assert len(list(li.parameters(wrapper))) == len(list(li.parameters(torch.compile(model)))) == 6
    li.merge(wrapper)
    li.unmerge(model)


# One truth for the scale


@pytest.mark.parametrize("attribute", ["alpha", "scale", "scaling", "r"])
def test_the_scale_cannot_be_set_past_rescale(model, attribute):
    """alpha, scale, scaling and r of an adapter are read-only, and the error names rescale."""
    adapter = model.lm_head.lora["default"]
    before = state(model)
    with pytest.raises(li.StateError, match=rf"{attribute} of an adapter cannot be set\n=> call rescale"):
        setattr(adapter, attribute, 3)
    assert state(model) == before


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("new", [{"alpha": 3.0}, {"scale": 0.7}])
def test_rescale_changes_the_scale_everywhere(tmp_path, scaling, new):
    """Forward, compiled forward, rows, deltas, file and merge have the new scale."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6)
    model = li.inject(nn.Sequential(nn.Linear(6, 5)), ["0"], r=3, alpha=8, scaling=scaling)
    randomize(model, std=1.0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x)
    unit = model[0].lora["default"].B.detach() @ model[0].lora["default"].A.detach()
    li.rescale(model, **new)
    s = model[0].lora["default"].scale
    wanted = new["scale"] if "scale" in new else 3.0 / (3**0.5 if scaling == "rslora" else 3)
    assert math.isclose(s, wanted, rel_tol=1e-15)
    expected = x @ (model[0].weight + s * unit).T + model[0].bias
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-5)
        assert torch.allclose(compiled(x), expected, atol=1e-5)
        with li.rows(model, ["default", "default"]):
            assert torch.allclose(model(x), expected, atol=1e-5)
    ((_, _, delta),) = li.deltas(model)
    assert torch.allclose(delta, s * unit, atol=1e-6)
    li.save(model, tmp_path / "a")
    assert li.read(tmp_path / "a").sites[0].scale == s
    li.merge(model)
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_rescale_within_rows_is_refused_and_bad_values_too(model):
    """rescale takes one finite positive number, no context and no merge."""
    for wrong in ({}, {"alpha": 1, "scale": 1}, {"alpha": 0}, {"scale": -1}, {"alpha": float("nan")}, {"scale": "2"}):
        with pytest.raises(li.SpecError, match="rescale takes either alpha or scale"):
            li.rescale(model, **wrong)
    with pytest.raises(li.StateError, match="no adapter named 'x'"):
        li.rescale(model, "x", alpha=1)
    with li.disabled(model), pytest.raises(li.StateError, match="inside disabled"):
        li.rescale(model, alpha=1)
    li.merge(model)
    with pytest.raises(li.StateError, match="cannot rescale while"):
        li.rescale(model, alpha=1)


# State dicts


def injected(name: str = "default", **settings: Any) -> nn.Module:
    torch.manual_seed(1)
    model = li.inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0", "1"], r=2, name=name, **settings)
    randomize(model, name)
    return model


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_of_another_name_is_an_error(strict, assign):
    """It names both adapters, strict or not: nothing of the adapter would be loaded."""
    model, checkpoint = injected("run2"), injected("run1").state_dict()
    with pytest.raises(RuntimeError, match=r"0\.lora: the state dict has the adapter 'run1', and the model 'run2'"):
        model.load_state_dict(checkpoint, strict=strict, assign=assign)


def test_further_adapters_of_a_state_dict_are_unexpected_keys():
    """A state dict with two adapters does not load strictly into a model with one of them."""
    both = injected("run1")
    li.inject(both, ["0"], r=2, name="run2")
    model = injected("run1")
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0\.lora\.run2\.A"'):
        model.load_state_dict(both.state_dict())
    result = model.load_state_dict(both.state_dict(), strict=False)
    assert not result.missing_keys
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.lora\.run2\.A"'):
        both.load_state_dict(injected("run1").state_dict())


@pytest.mark.parametrize("other", [{"alpha": 5}, {"scaling": "rslora"}])
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_with_another_scale_is_an_error(other, strict):
    """The same A and B with another alpha or scaling mean another update. rescale is the way out."""
    source, model = injected(**other), injected()
    with pytest.raises(RuntimeError, match=r"0\.lora\.default: the state dict has the scale .*, and the model 1, so"):
        model.load_state_dict(source.state_dict(), strict=strict)
    li.rescale(model, scale=source[0].lora["default"].scale)
    model.load_state_dict(source.state_dict(), strict=strict)
    x = torch.randn(3, 4)
    assert torch.equal(model(x), source(x))


def test_a_state_dict_without_scales_still_loads():
    """State dicts that were written before the scale was part of them have A and B alone."""
    source, model = injected(), injected()
    old = {key: value for key, value in source.state_dict().items() if not key.endswith(".s")}
    randomize(model, seed=3)
    assert model.load_state_dict(old).missing_keys == []
    assert bits(model[0].lora["default"].B) == bits(source[0].lora["default"].B)


# The guard against training while merged


def swap_tensors(model: nn.Module) -> nn.Module:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def assign(model: nn.Module) -> nn.Module:
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    return model


def to_empty(model: nn.Module) -> nn.Module:
    values = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(values)
    return model


DETOURS = [lambda m: m, assign, to_empty, swap_tensors, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]


@pytest.mark.parametrize("detour", DETOURS)
def test_no_optimizer_steps_while_merged(detour):
    """The guard does not depend on Parameter objects, which many detours exchange."""
    model = detour(injected())
    optimizer = torch.optim.SGD(li.parameters(model), lr=0.1)
    li.merge(model)
    with pytest.raises(li.StateError, match="cannot train while merged"):
        optimizer.step()
    li.unmerge(model)
    optimizer.step()


def test_eject_thaws_both_of_a_tie_that_was_ended():
    """load_state_dict(assign=True) ends ties; eject gives both parameters their flags back."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    before = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    li.inject(model, ["c"], r=1)
    assign(model)
    li.eject(model)
    assert {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)} == before


# Modes of torch


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("meta")])
def test_verbs_work_within_inference_mode_and_default_devices(tmp_path, mode):
    """A, B, files and journals are tensors that hold values and can be trained, whatever mode the caller is in."""
    source = injected()
    li.save(source, tmp_path / "a")
    base = li.eject(copy.deepcopy(source))
    weights = {name: bits(p) for name, p in base.named_parameters()}
    x = torch.randn(3, 4)
    model = copy.deepcopy(base)
    with mode():
        li.load(model, tmp_path / "a")
        li.inject(model, ["0"], r=2, name="fresh")
        li.activate(model, "default", "fresh")
        li.merge(model)
        li.unmerge(model)
        li.save(model, tmp_path / "b")
        file = li.read(tmp_path / "b")
        li.hotswap(model, tmp_path / "b")
    assert all(not t.is_meta and not t.is_inference() for s in file.sites for t in (s.A, s.B))
    assert torch.equal(model(x), source(x))
    model(x).sum().backward()
    assert all(p.grad is not None for p in li.parameters(model))
    li.eject(model)
    assert {name: bits(p) for name, p in model.named_parameters()} == weights


# Weights that become computed


def pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", 0.5)


def spectral(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.spectral_norm(module)


def weight_norm(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(module)


@pytest.mark.parametrize("compute", [pruned, spectral, weight_norm])
@pytest.mark.parametrize("verb", ["save", "deltas", "merge", "eject"])
def test_verbs_name_weights_that_are_computed(tmp_path, compute, verb):
    """prune, spectral_norm and weight_norm take the parameter out of the module: verbs that read it refuse by name."""
    model = injected()
    compute(model[0])
    model(torch.randn(2, 4))
    if verb == "eject":
        li.eject(model)
        assert all(p.requires_grad for p in model.parameters())
        assert not ModelIndex(model).sites
        return
    verbs = {"save": lambda m: li.save(m, tmp_path / "a"), "deltas": lambda m: list(li.deltas(m)), "merge": li.merge}
    error, line = (li.MergeError, "  - 0: ") if verb == "merge" else (li.StateError, "")
    with pytest.raises(error, match=f"{line}.*computed from other parameters since inject(.|\n)*undo that first"):
        verbs[verb](model)


@pytest.mark.parametrize("verb", [li.unmerge, li.eject])
def test_a_weight_that_is_pruned_while_merged_is_named(verb):
    """unmerge and eject refuse, and work once the pruning is undone."""
    model = injected()
    base = {name: bits(p) for name, p in li.eject(copy.deepcopy(model)).named_parameters()}
    li.merge(model)
    prune.identity(model[0], "weight")
    with pytest.raises(li.StateError, match=r"computed from other parameters since inject"):
        verb(model)
    prune.remove(model[0], "weight")
    li.eject(model)
    assert {name: bits(p) for name, p in model.named_parameters()} == base


def test_a_parametrized_layer_is_refused_by_name():
    """parametrize derives another class from the grafted one, which graft checks name."""
    model = injected()
    parametrizations.orthogonal(model[0])
    with pytest.raises(li.LoraError, match=r"\n  - 0"):
        li.merge(model)


# Memory without values


def on_meta() -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return li.inject(model, ["0", "1"], r=2)


USES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "forward": lambda m, path: m(torch.randn(2, 4)),
    "inference": lambda m, path: torch.no_grad()(m)(torch.randn(2, 4)),
    "merge": lambda m, path: li.merge(m),
    "deltas": lambda m, path: list(li.deltas(m)),
    "save": lambda m, path: li.save(m, path / "a"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("start", [on_meta, injected])
def test_a_and_b_without_values_are_not_used(tmp_path, use, start):
    """After to_empty A and B hold whatever was in memory: every use raises until reset has drawn them."""
    model = start().to_empty(device="cpu")
    model.load_state_dict(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).state_dict())
    with pytest.raises(li.LoraError, match=r"hold whatever was in memory"):
        USES[use](model, tmp_path)
    li.reset(model)
    USES[use](model, tmp_path)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith(".B"))
    assert all(p.any() for name, p in model.named_parameters() if name.endswith(".A"))


def test_a_state_dict_or_a_loop_gives_values_too(tmp_path):
    """A state dict with A and B, and code that writes both, end the refusal; one of the two does not."""
    values = injected().state_dict()
    model = on_meta().to_empty(device="cpu")
    model.load_state_dict(values)
    model(torch.randn(2, 4))
    model = on_meta().to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            if p.shape != (4, 2):
                p.normal_()
    with pytest.raises(li.StateError, match="hold whatever was in memory"):
        model(torch.randn(2, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    li.save(model, tmp_path / "a")
    assert isinstance(model(torch.randn(2, 4)), Tensor)


def test_reset_draws_anew(model):
    """reset is what inject does: the same seed gives the same A, B is zero, and the output is the base's."""
    base = li.eject(copy.deepcopy(model))
    torch.manual_seed(5)
    li.reset(model, "default")
    torch.manual_seed(5)
    fresh = li.inject(base, ["q_proj", "lm_head"], r=4, alpha=8)
    assert state(fresh) == state(model)
    with pytest.raises(li.StateError, match="no adapter named 'x'"):
        li.reset(model, "x")


@pytest.mark.parametrize("tokens", [1, 3, 200])
@pytest.mark.parametrize("grad", [True, False])
def test_factors_on_the_meta_device_are_not_used(tokens, grad):
    """load_state_dict(assign=True) of a base gives the weights values, but not A and B; reset gives them theirs."""
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = on_meta()
    model.load_state_dict(base.state_dict(), assign=True)
    x = torch.randn(tokens, 4)
    with torch.set_grad_enabled(grad), pytest.raises(li.StateError, match="0: A and B are on the meta device"):
        model(x)
    li.reset(model)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_no_values_either(duplicate):
    """Copies of A and B that hold whatever was in memory are refused as well."""
    model = duplicate(injected().to_empty(device="cpu"))
    with pytest.raises(li.StateError, match="hold whatever was in memory"):
        model(torch.randn(2, 4))


def test_a_shallow_copy_takes_no_ones_place():
    """copy.copy of the adapters of a layer leaves the layer's own accounted for."""
    model = injected()
    twin = copy.copy(model[0].lora)
    del twin
    assert len(li.merge(model).sites) == 2


def test_factors_that_were_frozen_can_be_swapped():
    """torch swaps no tensor that has a weak reference; the guard of lost gradients holds none."""
    model = injected("a")
    li.inject(model, ["0"], r=2, name="b")
    li.activate(model, "a")
    li.activate(model, "b")
    swap_tensors(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
