"""Linear layers whose weight only their own forward can use: adapters go onto them without knowing the scheme."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.bitnet import BitLinear
from transformers.integrations.gemma_quant import QuantizedLinear

import lorainject as li

from models import randomize, state


class PackedLinear(nn.Module):
    """A layer as those of GPTQ, AWQ and HQQ: integers and scales in buffers, and no parameter."""

    def __init__(self, in_features: int, out_features: int, has_backward: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.has_backward = in_features, out_features, has_backward
        self.register_buffer("qweight", torch.randint(-8, 8, (in_features, out_features), dtype=torch.int32))
        self.register_buffer("scales", torch.rand(1, out_features))
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.qweight.to(x.dtype) * self.scales)
        return y if self.has_backward else y.detach()


class Fp8Linear(nn.Linear):
    """A subclass of nn.Linear with a weight in float8, as transformers' FP8Linear and FbgemmFp8Linear."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def gemma(in_features: int, out_features: int) -> nn.Module:
    layer = QuantizedLinear(in_features, out_features)
    layer.weight.data.random_(-8, 8)
    for p in (*layer.parameters(), *layer.buffers()):
        if p.is_floating_point():
            p.data.fill_(0.1)
    return layer.requires_grad_(False)


LAYERS: dict[str, Callable[[int, int], nn.Module]] = {"packed": PackedLinear, "float8": Fp8Linear, "gemma": gemma}


def model_of(make: Callable[[int, int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), make(16, 16), nn.ReLU(), make(16, 16), nn.Linear(16, 4)).eval()


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def make(request) -> Callable[[int, int], nn.Module]:
    return request.param


def test_adapters_on_opaque_layers_keep_the_laws(make, tmp_path):
    """The output is unchanged at inject, and y + s B A x afterwards; A and B train, are saved, loaded and ejected."""
    model, x = model_of(make), torch.randn(5, 16)
    before, y0 = state(model), model(x)
    li.inject(model, "all-linear", r=4, alpha=8, exclude=["4"])
    assert {s.path for s in li.find(model_of(make), "all-linear", exclude=["4"])} == {"0", "1", "3"}
    assert torch.equal(model(x), y0)
    randomize(model)
    h = model[0](x)
    adapter = model[1].lora["default"]
    expected = type(model[1])._lora_base.forward(model[1], h) + 2 * (h @ adapter.A.T) @ adapter.B.T
    torch.testing.assert_close(model[1](h), expected)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in li.parameters(model))
    assert set(li.probe(model, x).reached) == {"0", "1", "3"}
    y = model(x)
    li.save(model, tmp_path / "a")
    assert torch.equal(li.load(model_of(make), tmp_path / "a")(x), y)
    with pytest.raises(li.MergeError, match=r"1: its weight is quantized by a scheme that cannot be applied again"):
        li.merge(model)
    with pytest.raises(li.TargetError, match=r"1: dora=True needs the norms of W0, which is quantized"):
        li.inject(model, ["1"], name="dora", dora=True)
    li.eject(model)
    assert state(model) == before
    assert torch.equal(model(x), y0)


def test_a_layer_without_backward_is_named():
    """A warning of inject names it, and a training forward raises."""
    model = model_of(lambda i, o: PackedLinear(i, o, has_backward=False))
    with pytest.warns(UserWarning, match="no gradient flows through these quantized layers: 1, 3"):
        li.inject(model, ["0", "1"])


def test_bitnet_layers_are_adapted():
    """transformers' BitLinear keeps its weight in a buffer."""
    torch.manual_seed(0)
    layer = BitLinear(16, 16, bias=False)
    layer.weight.random_(0, 255)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may have no backward
        model = li.inject(nn.Sequential(layer), ["0"], r=2)
    assert "0" in {s.path for s in li.find(nn.Sequential(BitLinear(16, 16, bias=False)), "all-linear")}
    assert len(list(li.parameters(model))) == 2


def test_modules_that_only_look_linear_are_not_taken():
    """A module with the sizes of a linear layer, but with a matrix of ordinary numbers, is what its weight is."""

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features = self.out_features = 4
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    (site,) = li.find(nn.Sequential(Custom()), "all-linear")
    assert site.kind == "matrix"
