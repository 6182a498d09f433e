"""Quantized linears of bitsandbytes, torchao and quanto, on the CPU: adapters on them, and merging into them."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lorainject as li
from lorainject.lora.weight_kinds import is_quantized
from lorainject.merging.quantization import find_scheme

from compilers import needs_compiler_and_ninja, unpack
from models import randomize

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the libraries' own, at import and while they quantize
    pytest.mark.usefixtures("quanto_in_python"),
]


def bitsandbytes(model: nn.Sequential, bits: int) -> nn.Sequential:
    bnb = pytest.importorskip("bitsandbytes")
    for i in (0, 2):
        n, m = model[i].in_features, model[i].out_features
        layer = (
            bnb.nn.Linear4bit(n, m, compute_dtype=torch.float32, quant_type="nf4")
            if bits == 4
            else bnb.nn.Linear8bitLt(n, m, has_fp16_weights=False)
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


@pytest.fixture(
    params=[(bitsandbytes, 4), (bitsandbytes, 8), (torchao, 8), (quanto, 8), (quanto, 4)],
    ids=lambda p: f"{p[0].__name__}-{p[1]}bit",
)
def model(request: pytest.FixtureRequest) -> nn.Sequential:
    torch.manual_seed(0)
    quantize: Callable[[nn.Sequential, int], nn.Sequential]
    quantize, bits = request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = quantize(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval(), bits)
        layers(torch.randn(4, 64))  # bitsandbytes quantizes in the first forward
    return layers


def test_a_quantized_linear_carries_adapters_like_any_linear(model, tmp_path):
    """It is injected, trained, saved, loaded and ejected; its sizes are the layer's, not those of the packed weight."""
    x = torch.randn(4, 64)
    with torch.no_grad():
        y = model(x)
    classes = [type(m) for m in model]
    plan = li.find(model, "all-linear", r=4)
    assert [(s.in_features, s.out_features, s.shape) for s in plan] == [(64, 64, (64, 64)), (64, 32, (32, 64))]
    li.inject(model, "all-linear", r=4)
    with torch.no_grad():
        assert torch.equal(model(x), y)
    randomize(model)
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


@pytest.mark.parametrize("method", ["requantized", "dequantized"])
def test_merge_requantizes_or_dequantizes(model, method, tmp_path):
    """It is quantized again by the same scheme, or becomes an nn.Linear. unmerge puts the same parameter object back,
    and the output has its old bits."""
    x = torch.randn(4, 64)
    with torch.no_grad():
        y = model(x)
    before = [m.weight for m in (model[0], model[2])]
    classes = [type(m) for m in model]
    li.inject(model, "all-linear", r=4)
    randomize(model, std=0.5)  # larger than a step
    with torch.no_grad():
        adapted = model(x)
        if method == "dequantized" and "QLinear" in str(classes):
            with pytest.raises(
                li.MergeError, match=r"0: a QLinear cannot become an nn.Linear: merge without dequantise=True"
            ):
                li.merge(model, dequantise=True)
            return
        report = li.merge(model, dequantise=method == "dequantized", strict=False)
        merged = model(x)
        assert [type(m) for m in model] == (classes if method == "requantized" else [nn.Linear, nn.ReLU, nn.Linear])
        error = float((merged - adapted).norm() / adapted.norm())
        assert error < (0.01 if method == "dequantized" else 0.25)
        changed = [s.codes_changed for s in report.sites]
        assert changed == [None, None] if method == "dequantized" else all(c is not None and c > 0.3 for c in changed)
        assert li.save(model, tmp_path / "a.safetensors").exists()
        li.unmerge(model)
        assert all(m.weight is w for m, w in zip((model[0], model[2]), before, strict=True))
        assert torch.equal(model(x), adapted)
        li.eject(model)
        assert torch.equal(model(x), y)


def test_a_delta_that_does_not_survive_is_refused(model):
    """A delta of a twentieth of a step is rounded away: the error says so, and nothing is changed."""
    li.inject(model, "all-linear", r=4)
    randomize(model, std=0.005)
    x = torch.randn(4, 64)
    with torch.no_grad():
        y = model(x)
        before = [m.weight for m in (model[0], model[2])]
        with pytest.raises(
            li.MergeError,
            match=r"(?s)nothing was merged: less than 0\.9 of a delta survives.*"
            r"0: keeps 0\.\d\d of its delta.*strict=False",
        ):
            li.merge(model)
        assert all(m.weight is w for m, w in zip((model[0], model[2]), before, strict=True))
        assert torch.equal(model(x), y)


def test_a_quantized_weight_that_its_parent_reads_is_refused():
    """The weight graft needs numbers: a parent that reads a quantized weight itself cannot be served."""
    ao = pytest.importorskip("torchao.quantization")

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(64, 64)

        def forward(self, x):
            return nn.functional.linear(x, self.read.weight)

    model = Reads()
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    with pytest.raises(
        li.TargetError, match="read: Reads reads it in its own code, which is not supported for a quantized weight"
    ):
        li.inject(copy.deepcopy(model), ["read"])


# -- requantizing: one layer of each scheme, before its first forward


def bnb4(dtype, **settings):
    bnb = pytest.importorskip("bitsandbytes")
    blocksize = settings.pop("blocksize", 64)
    layer = bnb.nn.Linear4bit(128, 96, compute_dtype=dtype, **settings).to(dtype)
    layer.weight.blocksize = blocksize
    return layer.to("cpu")


def bnb8(dtype):
    return pytest.importorskip("bitsandbytes").nn.Linear8bitLt(128, 96, has_fp16_weights=False).to(dtype).to("cpu")


def ao(dtype, config, **settings):
    q = pytest.importorskip("torchao.quantization")
    layers = nn.Sequential(nn.Linear(128, 96, dtype=dtype))
    q.quantize_(layers, getattr(q, config)(**{k: v(q) if callable(v) else v for k, v in settings.items()}))
    return layers[0]


def quanto_layer(dtype, qtype, features=128, **settings):
    q = pytest.importorskip("optimum.quanto")
    layers = nn.Sequential(nn.Linear(features, 96, dtype=dtype))
    q.quantize(layers, weights=getattr(q, qtype), **{k: getattr(q, v) for k, v in settings.items()})
    q.freeze(layers)
    return layers[0]


def groups_of_32(quantization):
    return quantization.PerGroup(32)


LAYERS = {
    "bitsandbytes nf4": lambda t: bnb4(t, quant_type="nf4", compress_statistics=False),
    "bitsandbytes nf4, nested": lambda t: bnb4(t, quant_type="nf4"),
    "bitsandbytes nf4, nested, blocks of 128, stored as bfloat16": lambda t: bnb4(
        t, quant_type="nf4", blocksize=128, quant_storage=torch.bfloat16),
    "bitsandbytes fp4": lambda t: bnb4(t, quant_type="fp4", compress_statistics=False),
    "bitsandbytes fp4, nested": lambda t: bnb4(t, quant_type="fp4"),
    "bitsandbytes int8": bnb8,
    "torchao int8": lambda t: ao(t, "Int8WeightOnlyConfig"),
    "torchao int8, groups": lambda t: ao(t, "Int8WeightOnlyConfig", granularity=groups_of_32),
    "torchao int8, tensor": lambda t: ao(t, "Int8WeightOnlyConfig", granularity=lambda q: q.PerTensor()),
    "torchao int8, unpacked": lambda t: ao(t, "IntxWeightOnlyConfig"),
    "torchao int4": lambda t: ao(t, "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=groups_of_32),
    "torchao int4, hqq": lambda t: ao(
        t, "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=groups_of_32,
        intx_choose_qparams_algorithm="hqq_scale_only"),
    "torchao int3": lambda t: ao(t, "IntxWeightOnlyConfig", weight_dtype=torch.int3, granularity=groups_of_32),
    "torchao int2": lambda t: ao(t, "IntxWeightOnlyConfig", weight_dtype=torch.int2),
    "torchao float8_e4m3fn": lambda t: ao(t, "Float8WeightOnlyConfig"),
    "torchao float8_e4m3fn, groups": lambda t: ao(t, "Float8WeightOnlyConfig", granularity=groups_of_32),
    "quanto qint8": lambda t: quanto_layer(t, "qint8"),
    "quanto qint4": lambda t: quanto_layer(t, "qint4"),
    "quanto qint4, groups": lambda t: quanto_layer(t, "qint4", 256),  # bfloat16: TinyGemmWeightQBitsTensor
    "quanto qint2": lambda t: quanto_layer(t, "qint2", 256),
    "quanto qfloat8_e4m3fn": lambda t: quanto_layer(t, "qfloat8"),
    "quanto qfloat8_e5m2": lambda t: quanto_layer(t, "qfloat8_e5m2"),
}  # fmt: skip


def quantized_layer(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a layer in training mode, which is exact: in eval mode bitsandbytes' int8 quantizes the input, too, and
    some CPUs round 4-bit scales to bfloat16."""
    torch.manual_seed(0)
    return LAYERS[name](dtype).requires_grad_(False)


@pytest.fixture(params=LAYERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def batch(layer: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)


def bits(value: torch.Tensor) -> bytes:
    if hasattr(value, "__tensor_flatten__"):
        return b"".join(bits(getattr(value, n)) for n in value.__tensor_flatten__()[0])
    return value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def state(layer: nn.Module) -> dict[str, bytes]:
    return {k: bits(v) for k, v in layer.state_dict().items()}


def perturb(W: torch.Tensor) -> torch.Tensor:
    return W + 0.3 * W.std() * torch.randn(W.shape, generator=torch.Generator().manual_seed(2))


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@DTYPES
def test_dequantize_gives_what_the_forward_multiplies_by(name, dtype):
    """The output is x W^T + b, within the rounding of the forward's dtype, and the layer is not changed."""
    layer = quantized_layer(name, dtype)
    s, x = find_scheme(layer), batch(layer, dtype)
    assert s.name == name.split(",")[0]
    W = s.dequantize(layer)
    assert (W.shape, W.dtype, W.requires_grad) == ((layer.out_features, layer.in_features), torch.float32, False)
    y = x.float() @ W.T + layer.bias.float()
    assert (layer(x).float() - y).norm() <= {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[
        dtype
    ] * y.norm()
    assert torch.equal(s.dequantize(layer), W)  # bitsandbytes' int8 has put its scales elsewhere by now


@DTYPES
def test_requantizing_the_same_weight_gives_the_same_codes(name, dtype):
    """The codes are equal, and the output is equal to the bit, with two exceptions.

    bitsandbytes' nested scales are rounded to 8 bits around their mean, and the mean of rounded scales is another
    (1e-4). In float32 (c s) / c is not always s, which changes a scale by its last bit.
    """
    layer = quantized_layer(name, dtype)
    s, x = find_scheme(layer), batch(layer, dtype)
    y, old, W = layer(x), layer.weight, s.dequantize(layer)
    before, settings = state(layer), set(vars(layer))
    new = s.requantize(layer, W)
    assert layer.weight is old  # and requantize changed nothing
    assert (state(layer), set(vars(layer))) == (before, settings)
    assert torch.equal(layer(x), y)
    assert type(new) is type(old)
    assert (new.dtype, new.shape, new.device, new.requires_grad) == (
        old.dtype,
        old.shape,
        old.device,
        old.requires_grad,
    )
    assert s.codes_changed(old, new) == 0
    s.install(layer, new)
    assert state(layer).keys() == before.keys()
    if "nested" in name:
        assert (s.dequantize(layer) - W).norm() <= 3e-4 * W.norm()
    elif dtype == torch.float32:
        assert torch.allclose(s.dequantize(layer), W, rtol=1e-6, atol=0)
    else:
        assert torch.equal(layer(x), y)


def test_unchanged_rows_keep_their_codes(name):
    """An adapter on a slice leaves other rows unchanged, scales included (unless all rows share a scale)."""
    layer = quantized_layer(name, torch.bfloat16)
    s = find_scheme(layer)
    W = s.dequantize(layer)
    target = W.clone()
    target[:8] = perturb(W[:8])
    s.install(layer, s.requantize(layer, target))
    if "tensor" not in name and "nested" not in name:
        assert torch.equal(s.dequantize(layer)[8:], W[8:])
    assert not torch.equal(s.dequantize(layer)[:8], W[:8])


def test_requantizing_is_as_precise_as_quantizing(name):
    """W0 + d is stored as precisely as in a layer that the library makes from W0 + d."""
    if "hqq" in name:
        pytest.skip(
            "hqq searches for better scales, which the tensor does not say: requantizing takes the ordinary ones"
        )
    layer = quantized_layer(name)
    s = find_scheme(layer)
    target = perturb(s.dequantize(layer))
    s.install(layer, s.requantize(layer, target))
    linear = nn.Linear.__init__

    def from_target(self, *args, **kwargs):
        linear(self, *args, **kwargs)
        with torch.no_grad():
            self.weight.copy_(target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "__init__", from_target)
        expected = quantized_layer(name)
    assert (s.dequantize(layer) - target).norm() <= 1.05 * (find_scheme(expected).dequantize(expected) - target).norm()


def pickled(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


UNCOPYABLE = {
    ("quanto", copy.deepcopy): "its tensors have no clone()",
    ("torchao", pickled): "its layers' extra_repr is a functools.partial",
}


@pytest.mark.parametrize("copied", [None, copy.deepcopy, pickled], ids=["itself", "deepcopy", "pickle"])
@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "called"])
def test_a_weight_can_be_installed_and_the_old_one_again(name, warm, copied):
    """The forward uses the installed weight; the old object gives the old output and state dict, to the bit."""
    layer = quantized_layer(name)
    x = batch(layer)
    y = layer(x)
    if not warm:
        layer = quantized_layer(name)
    if reason := UNCOPYABLE.get((name.split()[0], copied)):
        pytest.skip(reason)
    layer = copied(layer) if copied else layer
    s = find_scheme(layer)
    before, old = state(layer), layer.weight
    target = perturb(s.dequantize(layer))
    new = s.requantize(layer, target)
    assert 0 < s.codes_changed(old, new) <= 1
    for _ in range(2):
        s.install(layer, new)
        assert torch.allclose(layer(x), x @ s.dequantize(layer).T + layer.bias, atol=1e-5)
        assert not torch.equal(layer(x), y)
        merged = state(layer)
        s.install(layer, old)
        assert layer.weight is old
        assert state(layer) == before  # before a forward
        assert torch.equal(layer(x), y)
        assert state(layer) == before  # and after it
    assert merged.keys() == before.keys()


def test_codes_changed_counts_elements(name):
    """One element that takes the value of another element of its block changes one code."""
    layer = quantized_layer(name)
    s = find_scheme(layer)
    W = s.dequantize(layer)
    order = W[0, :32].argsort()
    W[0, order[8]] = W[0, order[24]]
    assert s.codes_changed(layer.weight, s.requantize(layer, W)) == 1 / W.numel()


def test_a_grafted_layer_has_the_scheme_of_its_base(model):
    """The grafted class changes neither the weight nor how it is stored."""
    names = [find_scheme(model[i]).name for i in (0, 2)]
    before = [bits(find_scheme(model[i]).dequantize(model[i])) for i in (0, 2)]
    li.inject(model, "all-linear", r=4)
    assert [find_scheme(model[i]).name for i in (0, 2)] == names
    assert [bits(find_scheme(model[i]).dequantize(model[i])) for i in (0, 2)] == before


def test_codes_that_were_repacked_for_the_cpu_are_read():
    """A CPU with AVX512-BF16 rearranges 4-bit codes and rounds their scales to bfloat16: the values are the rounded
    ones, the scheme is the old one."""
    layer = quantized_layer("bitsandbytes nf4, nested", torch.float16)
    s = find_scheme(layer)
    W, F = s.dequantize(layer), pytest.importorskip("bitsandbytes.functional")
    plain = copy.deepcopy(layer.weight)
    layer.weight.data, layer.weight.quant_state = F._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    assert layer.weight.quant_state.packing_format_for_cpu
    assert torch.allclose(s.dequantize(layer), W, rtol=2**-8, atol=0)
    assert s.codes_changed(plain, layer.weight) == 0
    new = s.requantize(layer, W)
    assert layer.weight.quant_state.packing_format_for_cpu
    assert s.codes_changed(plain, new) == 0
    assert (new.quant_state.nested, new.quant_state.dtype, new.shape) == (True, torch.float16, plain.shape)


class DoublingLinear(nn.Linear):
    """A subclass whose forward may do anything with the weight."""

    def forward(self, x):
        return super().forward(x) * 2


def with_another_forward(layer: nn.Module) -> nn.Module:
    layer.__class__ = DoublingLinear
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: pytest.importorskip("bitsandbytes").nn.Linear4bit(64, 64),
        lambda: pytest.importorskip("bitsandbytes").nn.Linear8bitLt(64, 64, has_fp16_weights=False),
        lambda: pytest.importorskip("bitsandbytes").nn.Linear8bitLt(64, 64).to("cpu"),
        lambda: pytest.importorskip("bitsandbytes").nn.Embedding4bit(64, 64).to("cpu"),
        lambda: ao(torch.float32, "Int8DynamicActivationInt8WeightConfig"),
        lambda: ao(torch.float32, "Int8DynamicActivationIntxWeightConfig", weight_dtype=torch.int4),
        lambda: ao(torch.float32, "IntxWeightOnlyConfig",
                   mapping_type=lambda q: q.quant_primitives.MappingType.ASYMMETRIC),
        lambda: ao(torch.float32, "IntxWeightOnlyConfig", weight_dtype=torch.int1),
        lambda: with_another_forward(ao(torch.float32, "Int8WeightOnlyConfig")),
        lambda: quanto_layer(torch.float32, "qint8", activations="qint8"),
    ],
    ids=["4bit-unquantized", "8bit-unquantized", "8bit-float-weight", "4bit-embedding", "int8-inputs",
         "int8-inputs-int4", "asymmetric", "1bit", "another-forward", "quanto-inputs"],
)  # fmt: skip
def test_weights_that_cannot_be_requantized_have_no_scheme(make):
    """They are quantized, but not in a form that the library can reproduce."""
    layer = make()
    assert is_quantized(layer)
    assert find_scheme(layer) is None


def test_a_plain_layer_has_no_scheme():
    assert find_scheme(nn.Linear(4, 4)) is None
    assert find_scheme(nn.ReLU()) is None


@pytest.mark.long
@needs_compiler_and_ninja
@pytest.mark.parametrize("bits", [2, 4])
def test_python_unpacks_as_quanto_does(bits, monkeypatch):
    """The other tests unpack quanto's weights in Python; here its C++ extension is built and must give the same
    numbers."""
    extensions = pytest.importorskip("optimum.quanto.library.extensions")
    extension = extensions.get_extension("quanto_cpp")
    monkeypatch.setattr(extension, "_lib", None)  # builds the extension when it is asked for
    packed = torch.arange(256).to(torch.uint8).reshape(32, 8)
    assert torch.equal(extension.lib.unpack(packed, bits), unpack(packed, bits))
