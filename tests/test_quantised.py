"""Quantised linears on the CPU, as bitsandbytes, torchao and quanto make them: the base's own kernel, and then the low-rank term."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lorainject as li

from models import randomise

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, at import and while quantising


def bitsandbytes(model: nn.Sequential, bits: int) -> nn.Sequential:
    bnb = pytest.importorskip("bitsandbytes")
    for i in (0, 2):
        n, m = model[i].in_features, model[i].out_features
        layer = (
            bnb.nn.Linear4bit(n, m, compute_dtype=torch.float32, quant_type="nf4") if bits == 4 else bnb.nn.Linear8bitLt(n, m, has_fp16_weights=False)
        )
        layer.load_state_dict(model[i].state_dict())
        model[i] = layer.to("cpu")
    return model


def torchao(model: nn.Sequential, bits: int) -> nn.Sequential:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def quanto(model: nn.Sequential, bits: int) -> nn.Sequential:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8 if bits == 8 else quanto.qint4)
    quanto.freeze(model)
    return model


@pytest.fixture(params=[(bitsandbytes, 4), (bitsandbytes, 8), (torchao, 8), (quanto, 8), (quanto, 4)], ids=lambda p: f"{p[0].__name__}-{p[1]}bit")
def model(request: pytest.FixtureRequest) -> nn.Sequential:
    torch.manual_seed(0)
    quantise: Callable[[nn.Sequential, int], nn.Sequential]
    quantise, bits = request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = quantise(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval(), bits)
        made(torch.randn(4, 64))  # bitsandbytes quantises in the first forward
    return made


def test_a_quantised_linear(model, tmp_path):
    """Injected, trained, saved, loaded and ejected like any linear; sizes are the layer's, not those of the packed weight."""
    x = torch.randn(4, 64)
    with torch.no_grad():
        y = model(x)
    classes = [type(m) for m in model]
    plan = li.find(model, "all-linear", r=4)
    assert [(s.in_features, s.out_features, s.shape) for s in plan] == [(64, 64, (64, 64)), (64, 32, (32, 64))]
    li.inject(model, "all-linear", r=4)
    with torch.no_grad():
        assert torch.equal(model(x), y)
    randomise(model)
    a, base = model[0].lora["default"], type(model[0])._lora_base.forward(model[0], x)
    assert torch.allclose(model[0](x), base + x @ a.A.T @ a.B.T * a.scale, atol=1e-5)
    assert li.probe(model, x).reached == ("0", "2")
    model(x).sum().backward()
    assert all(bool(p.grad.any()) for p in li.parameters(model))
    path = li.save(model, tmp_path / "a.safetensors")
    with torch.no_grad():
        adapted = model(x)
        li.eject(model)
        assert [type(m) for m in model] == classes
        assert torch.equal(model(x), y)
        li.load(model, path)
        assert torch.equal(model(x), adapted)


def test_merging_is_refused(model):
    """By name, with the way out; nothing is changed."""
    li.inject(model, "all-linear", r=4)
    randomise(model)
    x = torch.randn(4, 64)
    with torch.no_grad():
        y = model(x)
        with pytest.raises(li.MergeError, match=r"0: its weight is quantised: keep the adapter unmerged"):
            li.merge(model)
        assert torch.equal(model(x), y)


def test_a_quantised_weight_that_others_read_is_refused():
    """The weight graft needs numbers: a parent that reads a quantised weight can't be served."""
    ao = pytest.importorskip("torchao.quantization")

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(64, 64)

        def forward(self, x):
            return nn.functional.linear(x, self.read.weight)

    model = Reads()
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    with pytest.raises(li.TargetError, match="read: Reads reads its weight itself, which is quantised"):
        li.inject(copy.deepcopy(model), ["read"])
