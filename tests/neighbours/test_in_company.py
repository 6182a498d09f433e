"""Casts, quantization, averaging, checkpointing and sharding around an adapter: it trains, or the reason is named."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import lorainject as li

from models import bits, ids, llama, randomize

X = {"input_ids": ids(), "use_cache": False}


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).to(dtype)


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return torch.autograd.grad(model(x).float().square().sum(), list(li.parameters(model)))


@pytest.mark.filterwarnings("ignore")
def test_layerwise_casting_leaves_the_adapters_alone():
    """diffusers stores layers in float8 between forwards; A and B stay in float32, and train as on the cast base."""
    hooks = pytest.importorskip("diffusers.hooks")
    model, twin = (li.inject(small(torch.bfloat16), ["0", "2"], r=2) for _ in range(2))
    for m in (model, twin):
        randomize(m)
    for layer in (twin[0], twin[2]):  # the base as float8 rounds it
        for p in layer._parameters.values():
            p.data = p.data.to(torch.float8_e4m3fn).to(torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    expected = gradients(twin, x)
    hooks.apply_layerwise_casting(model, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=["no such layer"])
    for _ in range(2):
        assert model[0].weight.dtype == torch.float8_e4m3fn
        assert {p.dtype for p in li.parameters(model)} == {torch.float32}
        torch.testing.assert_close(gradients(model, x), expected)
    hooks.apply_layerwise_casting(cast := small(), torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=["none"])
    with pytest.raises(li.TargetError, match=r"0: diffusers has hooks on it .* inject first, then enable them"):
        li.inject(cast, ["0"])


def test_factors_are_never_cast_to_float8():
    """A cast of the model to float8 leaves A and B in their dtype, and so does the cast back."""
    model = li.inject(small(), ["0"], r=2)
    A = bits(next(li.parameters(model)))
    model.to(torch.float8_e4m3fn)
    assert model[0].weight.dtype == torch.float8_e4m3fn
    model.to(torch.bfloat16)
    assert bits(next(li.parameters(model))) == A


def test_factors_are_drawn_by_reset_after_the_meta_device():
    """A model that is built and injected on the meta device gets its A and B from reset, once to_empty has given it
    memory: the same as one that was injected there, and a checkpoint of the base then gives the output of the base."""
    with torch.device("meta"):
        model = li.inject(small(), ["0", "2"], r=2)
    torch.manual_seed(1)
    model.to_empty(device="cpu").load_state_dict(small().state_dict())
    torch.manual_seed(1)
    li.reset(model)
    base = small()
    torch.manual_seed(1)
    expected = li.inject(base, ["0", "2"], r=2)
    assert all(torch.equal(p, q) for p, q in zip(li.parameters(model), li.parameters(expected), strict=True))
    assert bits(model(torch.ones(1, 64))) == bits(small()(torch.ones(1, 64)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantized_layers_without_gradient_are_named():
    """torchao's dynamic activations pass no gradient on: inject and load name the layers, and a training forward in
    which an adapter before them would get a wrong gradient is refused. Inference, and training behind them, go on."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    def quantized(config: object) -> nn.Module:
        model = small()
        quantize_(model, config)
        return model

    x = torch.randn(3, 64)
    model = quantized(Int8DynamicActivationInt8WeightConfig())
    with pytest.warns(UserWarning, match=r"no gradient flows through these quantized layers: 0, 2\."):
        li.inject(model, ["0", "2"], r=2)
    randomize(model)
    with pytest.raises(li.StateError, match=r"2: no gradient flows through its base layer"):
        model(x)
    with torch.no_grad():
        assert not torch.equal(model(x), quantized(Int8DynamicActivationInt8WeightConfig())(x))
    last = quantized(Int8DynamicActivationInt8WeightConfig())
    with pytest.warns(UserWarning, match="no gradient flows"):
        li.inject(last, ["2"], r=2)
    assert all(g is not None for g in gradients(last, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(li.inject(quantized(Int8WeightOnlyConfig()), ["0", "2"], r=2), x)


class GoesAround(nn.Module):
    """A model that reads the weight of a layer in a way that its source does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(self.used(x), getattr(self, "re" + "ad").weight)


def test_the_first_step_names_adapters_without_a_gradient():
    """An optimizer's first step warns of active adapters that got no gradient, once; probe gives the reason."""
    model = li.inject(GoesAround(), ["used", "read"], r=2)
    optimizer = torch.optim.AdamW(li.parameters(model))
    optimizer.step()  # without any gradient there is nothing to say
    for step in range(2):
        model(torch.randn(3, 4)).sum().backward()
        if step == 0:
            with pytest.warns(UserWarning, match=r"these adapters got no gradient in the first step.*: read\."):
                optimizer.step()
        optimizer.step()
    with pytest.raises(li.UnreachedAdapter, match="read: its weight acts without the layer being called"):
        li.probe(model, torch.randn(3, 4))


@pytest.mark.parametrize("inputs_require_grad", [False, True])
def test_probe_refuses_reentrant_checkpointing(inputs_require_grad):
    """probe cannot see gradients within reentrant checkpointing, and says so; without it, it sees them."""
    model = li.inject(llama().train(), ["q_proj"], r=2)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    if inputs_require_grad:
        model.enable_input_require_grads()
    with pytest.raises(
        li.StateError, match=r"layers\.0.* runs within an autograd function.*reentrant gradient checkpointing"
    ):
        li.probe(model, **X)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert len(li.probe(model, **X).reached) == 2


@pytest.mark.usefixtures("process_group")
def test_probe_refuses_a_sharded_model():
    """probe says that it cannot see the gradients of shards, instead of accusing adapters that train."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = li.inject(llama(), ["q_proj"], r=2)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(li.StateError, match=r"q_proj is sharded \(fully_shard\).*\n=> call probe before"):
        li.probe(model, **X)


def test_an_averaged_model_is_saved_under_the_names_of_the_model(tmp_path):
    """save and probe leave out what AveragedModel adds to the paths, so that a fresh model loads the average."""
    model = li.inject(llama(), ["q_proj"], r=2)
    randomize(model)
    average = AveragedModel(model)
    randomize(model, seed=1)
    average.update_parameters(model)
    expected = bits(average(**X).logits)
    assert all(name.startswith("model.layers.") for name in li.probe(average, **X).reached)
    li.save(average, tmp_path / "average")
    torch.manual_seed(0)
    fresh = llama()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if ".lora." not in k})
    assert bits(li.load(fresh, tmp_path / "average")(**X).logits) == expected


def test_a_part_of_a_model_is_not_saved(tmp_path):
    """save refuses a part of a model, whose names would not be those of the whole."""
    model = li.inject(llama(), ["q_proj"], r=2)
    with pytest.raises(li.StateError, match=r"cannot save: this is a part.*\n=> call it on the whole LlamaForCausalLM"):
        li.save(model.model, tmp_path / "part")


class PipelineIdentityLayer(nn.Identity):
    """What transformers puts in the place of layers that another stage of a pipeline has, under this name."""


def test_stages_of_a_pipeline_are_saved_with_a_warning_and_can_be_joined(tmp_path):
    """save says that a stage's file is a part, and how to join the files of all stages; the joined file loads."""
    import dataclasses

    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    for stage, path in enumerate(paths):
        torch.manual_seed(0)
        model = llama()
        model.model.layers[1 - stage] = PipelineIdentityLayer()
        randomize(li.inject(model, ["q_proj"], r=2))
        with pytest.warns(UserWarning, match="this model is one stage of a pipeline"):
            li.save(model, path)
    a, b = map(li.read, paths)
    li.write(dataclasses.replace(a, sites=a.sites + b.sites, base=None), tmp_path / "whole")
    torch.manual_seed(0)
    assert len(li.probe(li.load(llama(), tmp_path / "whole"), **X).reached) == 2
