"""What an adapter holds besides A and B: DoRA magnitudes, bias updates, replacement tensors and token rows.

Outputs, gradients and merged weights are compared with PEFT's, live and from files, and with dense tensors in float64.
"""

from __future__ import annotations

import copy
import pickle
import re
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorainject as li
from lorainject.lora.graft import Graft
from lorainject.lora.model_index import adapted_sites

from example_count import examples
from interrupts import interrupted
from models import bits, ids, llama, state
from oracle import FIXTURES, is_same_record, merged_weights

VARIANTS = ("plain", "dora", "lora_bias", "bias_all", "bias_lora_only", "tokens")
BASE = load_file(FIXTURES / "peft_base.safetensors")
laws = settings(
    max_examples=examples(15), deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.fixture(autouse=True)
def ignore_warnings():
    """Ignore the warnings of PEFT and of merges in half precision, which these tests do not concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(nn.Module):
    """One layer of every kind that can have extras. The forward uses all of them."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.emb = nn.Embedding(11, 8)
        self.lin = nn.Linear(8, 6)
        self.lin2 = nn.Linear(8, 8)
        self.c1 = Conv1D(6, 8)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 2)
        self.conv2 = nn.Conv2d(3, 5, (3, 2))
        self.conv1 = nn.Conv1d(3, 5, 3)
        self.mha = nn.MultiheadAttention(8, 2)
        self.lin3 = nn.Linear(8, 8, bias=False)

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        x = self.emb(ids)
        x = x + self.lin2(x) + self.lin3(x) + self.mha(x, x, x, need_weights=False)[0]
        text = self.head(self.norm(self.lin(x) + self.c1(x)))
        return torch.cat([t.flatten() for t in (text, self.conv2(image), self.conv1(image[:, :, 0]))])


def net(dtype: torch.dtype = torch.float32) -> Net:
    """Return a Net with the weights of the base of PEFT's files."""
    torch.manual_seed(0)
    model = Net()
    model.load_state_dict({k: t for k, t in BASE.items() if k in model.state_dict()}, strict=False)
    return model.to(dtype).eval()


def run_net(model: nn.Module) -> Tensor:
    """Return the output of a Net for one input."""
    g = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 5, 6, generator=g).to(next(p for p in model.parameters() if p.ndim == 2).dtype)
    return model(torch.arange(10).view(2, 5), image)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_of_peft_acts_as_peft_merged_it(variant, tmp_path):
    """A loaded PEFT file computes what PEFT's merged tensors compute, merges to them, and can be saved and copied.

    Disabled, unmerged and ejected, the model is the base to the bit.
    """
    folder, model = FIXTURES / f"peft_{variant}", net()
    expected, before, keys = net(), state(model), list(model.state_dict())
    merged_by_peft = load_file(folder / "expected_merged.safetensors")
    expected.load_state_dict({k: t for k, t in merged_by_peft.items() if k in keys}, strict=False)
    base_output, expected_output = run_net(model), run_net(expected)
    assert (base_output - expected_output).abs().max() > 1e-2
    li.load(model, folder)
    output = run_net(model)
    assert torch.allclose(output, expected_output, atol=1e-5)
    with li.disabled(model):
        assert torch.equal(run_net(model), base_output)
    li.merge(model)
    assert list(model.state_dict()) == keys
    assert all(torch.allclose(t, expected.state_dict()[k], atol=1e-6) for k, t in model.state_dict().items())
    assert is_same_record(li.read(li.save(model, tmp_path / "a", format="peft")), li.read(folder))
    li.unmerge(model)
    assert torch.equal(run_net(model), output)
    assert torch.equal(run_net(li.load(net(), li.save(model, tmp_path / "b.safetensors"))), output)
    assert torch.equal(run_net(copy.deepcopy(model)), output)
    assert torch.equal(run_net(pickle.loads(pickle.dumps(model))), output)
    li.merge(model)
    li.eject(model)
    assert state(model) == before


def peft_model(config: dict[str, object], base: nn.Module, folder: Path) -> nn.Module:
    """Return a PEFT model with random values in everything that trains, and save its adapter to the folder."""
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=6, **config)).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "magnitude" in key:
                p.mul_(1 + 0.3 * torch.rand(p.shape, generator=g))
            elif p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.3)
    theirs.save_pretrained(folder)
    return theirs


PEFT_CONFIGS = {
    "dora on linears": {"target_modules": ["lin", "lin3"], "use_dora": True},
    "dora on Conv1D": {"target_modules": ["c1"], "use_dora": True, "fan_in_fan_out": True},
    "dora on an embedding": {"target_modules": ["emb"], "use_dora": True},
    "dora on convolutions": {"target_modules": ["conv2", "conv1"], "use_dora": True, "use_rslora": True},
    "dora and the bias of the layer": {"target_modules": ["lin"], "use_dora": True, "bias": "lora_only"},
    "lora_bias": {"target_modules": ["lin", "c1", "conv2"], "lora_bias": True},
    "dora and all biases": {"target_modules": ["head"], "use_dora": True, "bias": "all"},
    "heads": {"target_modules": ["lin", "conv1"], "modules_to_save": ["head", "norm"]},
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_outputs_gradients_and_merges_equal_pefts(name, tmp_path):
    """Outputs, the gradients of everything that trains, and merged weights equal PEFT's within 1e-5."""
    theirs, ours = peft_model(PEFT_CONFIGS[name], net(), tmp_path), li.load(net(), tmp_path)
    output, expected = run_net(ours), run_net(theirs)
    assert torch.allclose(output, expected, atol=1e-5)
    w = torch.randn(len(output), generator=torch.Generator().manual_seed(2))
    (output * w).sum().backward()
    (expected * w).sum().backward()
    added_by_peft = re.compile(r"base_model\.model\.|\.default|\.base_layer|\.modules_to_save")
    grads = {added_by_peft.sub("", key): p.grad for key, p in theirs.named_parameters() if p.requires_grad}
    names = {
        "A": ("lora_A.weight", "lora_embedding_A"),
        "B": ("lora_B.weight", "lora_embedding_B"),
        "m": ("lora_magnitude_vector.weight",),
        "b": ("lora_B.bias",),
    }
    compared = set()
    for site_name, site in adapted_sites(ours).items():
        for part, p in site.adapters["default"].named_parameters():
            path = site_name if part == "value" else site_name.removesuffix(".weight")
            keys = [f"{path}.weight", path] if part == "value" else [f"{path}.{n}" for n in names[part]]
            key = next(k for k in keys if k in grads)
            assert torch.allclose(p.grad.flatten(), grads[key].flatten(), atol=1e-5, rtol=1e-4), key
            compared.add(key)
    assert compared == grads.keys()
    li.merge(ours)
    plain = theirs.merge_and_unload()
    assert all(torch.allclose(t, plain.state_dict()[k], atol=1e-5) for k, t in ours.state_dict().items())


def test_token_rows_of_a_tied_embedding_act_in_the_head(tmp_path):
    """Token rows of an embedding that is tied to the head act in both; a merge needs untie=True."""
    torch.manual_seed(0)
    base = llama(tie_word_embeddings=True)
    theirs = peft_model(
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5, 98]}}, base, tmp_path
    )
    ours, y = li.load(base, tmp_path), theirs(ids()).logits
    assert torch.allclose(ours(ids()).logits, y, atol=1e-5)
    with pytest.raises(li.MergeError, match=r"tied to .*embed_tokens"):
        li.merge(ours)
    before = state(ours)
    li.merge(ours, untie=True)
    assert torch.allclose(ours(ids()).logits, y, atol=1e-5)
    li.unmerge(ours)
    assert state(ours) == before
    assert li.read(li.save(ours, tmp_path / "again")).tokens.keys() == {"model.embed_tokens"}
    assert li.eject(ours).lm_head.weight is ours.model.embed_tokens.weight


class NewTensors(TorchDispatchMode):
    """Records the number of elements of every tensor that is not a view of one known tensor."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known, self.sizes = known.untyped_storage().data_ptr(), [0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)]
        self.sizes += [t.numel() for t in tensors if t.untyped_storage().data_ptr() != self.known]
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_forms_no_tensor_of_the_weights_size(dtype, tmp_path):
    """The norm of DoRA comes from W0 A^T and A A^T, and a weight in half precision is cast tile by tile."""
    model = nn.Sequential(nn.Linear(1024, 1024)).to(dtype)
    site = li.StoredSite(path="0", A=torch.randn(2, 1024), B=torch.randn(1024, 2), alpha=2, magnitude=torch.rand(1024))
    load_sites(model, tmp_path, site)
    with NewTensors(model[0].weight) as new:
        model(torch.randn(3, 1024, dtype=dtype))
    assert 1024 < max(new.sizes) <= 1 << 18


def load_sites(
    model: nn.Module, folder: Path, *sites: li.StoredSite, name: str = "default", **extras: object
) -> nn.Module:
    """Write an adapter with these sites and extras to a file, load the file onto the model, and return the model."""
    file = li.AdapterFile(path=folder, format="lorainject", sites=sites, name=name, **extras)
    return li.load(model, li.write(file, folder / f"{name}.safetensors").path)


@st.composite
def records(draw: st.DrawFn) -> tuple[tuple[li.StoredSite, ...], dict[str, object]]:
    """Draw the sites of an adapter for Net and its extras, of every kind."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shapes = {
        "lin": (6, 8),
        "lin3": (8, 8),
        "c1": (6, 8),
        "emb": (8, 11),
        "head": (2, 6),
        "conv2": (5, 18),
        "conv1": (5, 9),
    }
    kernels = {"conv2": (5, 3, 3, 2), "conv1": (5, 3, 3)}
    sites = []
    for path in draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, unique=True)):
        (o, i), r = shapes[path], draw(st.integers(1, 3))
        kind = "embedding" if path == "emb" else "conv" if path in kernels else "linear^T" if path == "c1" else "linear"
        rows = (range(1, 3), range(4, 6)) if path in ("lin", "c1") and draw(st.booleans()) else None
        shape = kernels.get(path, (i, o) if kind in ("linear^T", "embedding") else (o, i))
        o = o if rows is None else 4
        m = 0.1 + torch.rand(o, generator=g) if draw(st.booleans()) else None
        b = torch.randn(o, generator=g) if path not in ("emb", "lin3") and draw(st.booleans()) else None
        A, B = torch.randn(r, i, generator=g) * 0.3, torch.randn(o, r, generator=g) * 0.3
        label = "" if rows is None else "1:3,4:6"
        sites.append(
            li.StoredSite(
                path=path, kind=kind, shape=shape, rows=rows, label=label, alpha=2.0 * r, A=A, B=B, magnitude=m, bias=b
            )
        )
    adapted = {s.path for s in sites}
    updated_biases = {f"{s.path}.bias" for s in sites if s.bias is not None}
    replaceable = {
        "head.bias": (2,),
        "norm": (6,),
        "norm.bias": (6,),
        "conv1.bias": (5,),
        "lin.bias": (6,),
        "mha.out_proj.bias": (8,),
        "head": (2, 6),
    }
    names = draw(st.lists(st.sampled_from(sorted(replaceable)), unique=True))
    names = [n for n in names if n not in adapted and n not in updated_biases]
    tokens = {}
    if "emb" not in adapted and draw(st.booleans()):
        tokens["emb"] = li.TokenRows(ids=(2, 7), rows=torch.randn(2, 8, generator=g))
    return tuple(sites), {"replaced": {n: torch.randn(replaceable[n], generator=g) for n in names}, "tokens": tokens}


def merged_in_float64(model: nn.Module, file: li.AdapterFile) -> nn.Module:
    """Return a copy of the model in float64 into whose weights the record was merged by the oracle's formulas.

    The oracle reads whole weights, so sites are merged here: the DoRA norm of a slice is that of its rows alone.
    """
    plain = copy.deepcopy(model).double()
    tensors = {k: t.clone() for k, t in plain.state_dict().items()}
    for s in file.sites:
        W = tensors[f"{s.path}.weight"]
        W = W.mT if s.path in ("c1", "emb") else W.flatten(1)
        rows = [i for part in s.rows or (range(len(W)),) for i in part]
        V = W[rows] + s.scale * s.B.double() @ s.A.double()
        W[rows] = V if s.magnitude is None else V * (s.magnitude.double() / V.norm(dim=1)).unsqueeze(1)
        if s.bias is not None:
            tensors[f"{s.path}.bias"][rows] += s.scale * s.bias.double()
    plain.load_state_dict(merged_weights(replace(file, sites=()), tensors))
    return plain


@laws
@given(records(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_any_mixture_of_extras_obeys_the_laws(record, dtype):
    """Any mixture of extras computes the formula, merged or not, and is saved as it was loaded.

    Disabled, unmerged and ejected, the model is the base to the bit; merged, every module has its original class.
    """
    sites, extras = record
    model = net(dtype)
    before, y, keys = state(model), run_net(model), list(model.state_dict())
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        load_sites(model, Path(folder), *sites, **extras)
        file = li.read(Path(folder) / "default.safetensors")
        exact = run_net(merged_in_float64(net(dtype), file))
        tolerance = ROUNDING[dtype] * max(1.0, float(exact.abs().max()))
        unmerged = state(model)
        assert (run_net(model) - exact).abs().max() < tolerance
        with li.disabled(model):
            assert torch.equal(run_net(model), y)
        assert is_same_record(li.read(li.save(model, Path(folder) / "again.safetensors")), file)
        li.merge(model, strict=False)
        assert not any(isinstance(m, Graft) for m in model.modules())
        assert list(model.state_dict()) == keys
        assert (run_net(model) - exact).abs().max() < tolerance
        assert is_same_record(li.read(li.save(model, Path(folder) / "merged.safetensors")), file)
        adapters = [site.adapters["default"] for site in adapted_sites(model).values()]
        trained = [p for adapter in adapters for p in adapter.parameters()]
        torch._foreach_add_(trained, 1)  # a change of the adapter while it is merged must not matter
        li.unmerge(model)
        torch._foreach_sub_(trained, 1)
        assert {k: v[:4] for k, v in state(model).items()} == {k: v[:4] for k, v in unmerged.items()}
        li.eject(model)
    assert state(model) == before


@laws
@given(records(), records(), st.permutations([0, 1]))
def test_two_adapters_act_as_each_alone(first, second, order):
    """Of two adapters the active one acts as if it were alone; after eject in any order the base is left."""
    model = net()
    before, y = state(model), run_net(model)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        alone = []
        for sites, extras in (first, second):
            alone.append(run_net(load_sites(net(), Path(folder), *sites, **extras)))
        try:
            load_sites(model, Path(folder), *first[0], name="a", **first[1])
            load_sites(model, Path(folder), *second[0], name="b", **second[1])
        except li.FileError:
            assert any(
                s.bias is not None for s in (*first[0], *second[0])
            )  # one adapter updates a bias that the other replaces
            li.eject(model)
            assert state(model) == before
            return
        for name, expected in zip("ab", alone, strict=True):
            li.activate(model, name)
            assert torch.allclose(run_net(model), expected, atol=1e-5)
            li.merge(model)
            assert torch.allclose(run_net(model), expected, atol=1e-5)
            li.unmerge(model)
        li.activate(model)
        assert torch.equal(run_net(model), y)
        li.eject(model, "ab"[order[0]])
        li.activate(model, "ab"[order[1]])
        assert torch.allclose(run_net(model), alone[order[1]], atol=1e-5)
        li.eject(model)
    assert state(model) == before


def dora(path: str = "lin", o: int = 6, i: int = 8) -> li.StoredSite:
    """Return a site with random factors and magnitudes."""
    return li.StoredSite(path=path, A=torch.randn(2, i), B=torch.randn(o, 2), alpha=2, magnitude=torch.rand(o))


def test_dora_merges_with_another_adapter(tmp_path):
    """DoRA and another adapter on one weight cannot both be active, but can both be merged and unmerged."""
    model = li.inject(net(), ["lin"], r=2, name="plain")
    with torch.no_grad():
        adapted_sites(model)["lin"].adapters["plain"].B.normal_()
    load_sites(model, tmp_path, dora(), name="dora")
    W0 = bits(model.lin.weight)
    with pytest.raises(li.StateError, match="lin: dora, plain"):
        li.activate(model, "dora", "plain")
    with pytest.raises(li.StateError, match="lin: plain, dora"):
        li.activate(model, "plain", "dora")
    deltas = {n: {site: t for site, _, t in li.deltas(model, n)}["lin"] for n in ("plain", "dora")}
    expected = model.lin.weight + deltas["plain"] + deltas["dora"]
    li.merge(model, "dora")
    assert torch.allclose({site: t for site, _, t in li.deltas(model, "dora")}["lin"], deltas["dora"], atol=1e-6)
    li.merge(model, "plain")
    assert torch.allclose(model.lin.weight, expected, atol=1e-5)
    li.unmerge(model, "dora")
    assert torch.allclose(model.lin.weight, expected - deltas["dora"], atol=1e-5)
    li.unmerge(model)
    assert bits(model.lin.weight) == W0


def test_rows_with_magnitudes_and_replacements(tmp_path):
    """Within rows the DoRA gain acts on the rows of its adapter alone; a replacement for some rows is refused."""
    model, x = net(), torch.randn(3, 4, 8)
    y = model.lin(x)
    load_sites(model, tmp_path, dora(), name="dora")
    z = model.lin(x)
    with li.rows(model, [None, "dora", None]):
        assert torch.allclose(model.lin(x), torch.stack([y[0], z[1], y[2]]), atol=1e-6)
    load_sites(model, tmp_path, dora("head", 2, 6), name="whole", replaced={"lin.bias": torch.randn(6)})
    with li.rows(model, ["whole", None, None]), pytest.raises(li.StateError, match=r"rows\(\.\.\.\): the weight"):
        model.lin(x)


def test_inject_after_a_bias_was_replaced(tmp_path):
    """An adapter that is injected onto a layer whose bias was replaced acts together with the replacement."""
    model, x = net(), torch.randn(3, 8)
    load_sites(model, tmp_path, dora("head", 2, 6), replaced={"lin.bias": torch.ones(6)})
    li.inject(model, ["lin"], r=2, name="after")
    with torch.no_grad():
        adapter = adapted_sites(model)["lin"].adapters["after"]
        adapter.B.normal_()
        li.activate(model, "default", "after")
        assert torch.allclose(
            model.lin(x), F.linear(x, model.lin._parameters["weight"] + adapter.B @ adapter.A, torch.ones(6)), atol=1e-5
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_probe_reaches_all_extras(variant):
    """probe reaches every site of PEFT's files, and no dense sum is formed."""
    model = li.load(net(), FIXTURES / f"peft_{variant}")
    reach = li.probe(model, ids=torch.arange(10).view(2, 5), image=torch.randn(2, 3, 5, 6))
    assert set(reach.reached) == set(adapted_sites(model))
    assert not reach.dense


def test_extras_compile_as_one_graph(tmp_path):
    """torch.compile makes one graph of layers with magnitudes and replaced biases."""
    model, x = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 2)), torch.randn(3, 8)
    load_sites(model, tmp_path, dora("0"), replaced={"1.bias": torch.randn(6), "2.bias": torch.ones(2)})
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(x), model(x), atol=1e-6)


def test_magnitudes_of_a_slice(tmp_path):
    """The DoRA norm of a slice is that of its rows, and the other rows of the weight stay as they are."""
    model, x, rows = net(), torch.randn(3, 8), [1, 2, 4, 5]
    site = replace(dora(o=4), label="1:3,4:6", rows=(range(1, 3), range(4, 6)), shape=(6, 8))
    W = model.lin.weight.detach().clone()
    W[rows] += site.B @ site.A
    W[rows] *= (site.magnitude / W[rows].norm(dim=1)).unsqueeze(1)
    assert torch.allclose(load_sites(model, tmp_path, site).lin(x), F.linear(x, W, model.lin.bias), atol=1e-5)


INTERRUPTED = (
    "merging.strategies.as_matrix",
    "merging.adapted_weight.checksum",
    "merging.revert.checksum",
    "merging.merge.set_grafted",
    "merging.revert._install",
    "lora.mounting.change_class",
)


@pytest.mark.parametrize("function", INTERRUPTED)
@pytest.mark.parametrize("verb", [li.merge, li.unmerge])
def test_an_interrupted_verb_leaves_no_half_merge(function, verb, tmp_path):
    """An interrupted merge changes nothing; an interrupted unmerge changes nothing, or the next one finishes it."""
    model = net()
    load_sites(
        model,
        tmp_path,
        dora(),
        replace(dora("c1"), bias=torch.ones(6)),
        replaced={"head": torch.randn(2, 6), "norm.bias": torch.ones(6)},
    )
    before = state(model)
    for calls in range(8):
        if verb is li.unmerge:
            li.merge(model)
        try:
            with interrupted(function, calls):
                verb(model)
        except KeyboardInterrupt:
            if verb is li.merge:
                assert state(model) == before
        if any(site.adapters.merge_record for site in adapted_sites(model).values()):
            li.unmerge(model)
        assert state(model) == before


def test_training_moves_magnitudes_and_replacements(tmp_path):
    """An optimizer of parameters(model) moves everything that the adapter holds, and raises while merged."""
    model = net()
    load_sites(
        model,
        tmp_path,
        dora(),
        replaced={"head": torch.randn(2, 6)},
        tokens={"emb": li.TokenRows(ids=(3,), rows=torch.randn(1, 8))},
    )
    trained = list(li.parameters(model))
    assert len(trained) == 5
    optimizer, before = torch.optim.SGD(trained, lr=0.1), [bits(p) for p in trained]
    run_net(model).square().sum().backward()
    optimizer.step()
    assert all(bits(p) != b for p, b in zip(trained, before, strict=True))
    assert model.lin._parameters["weight"].grad is None
    li.merge(model)
    with pytest.raises(li.StateError, match="cannot train while merged"):
        optimizer.step()


FILE_REFUSED = {
    "a magnitude per input": (
        [replace(dora(), magnitude=torch.rand(8), magnitude_axis="in")], {}, "magnitudes by input"),
    "a replacement of another shape": (
        [dora()], {"replaced": {"head.bias": torch.ones(3)}},
        r"head\.bias: the file has \(3,\), this model's is \(2,\)"),
    "a replacement of nothing": ([dora()], {"replaced": {"nose": torch.ones(3)}}, "nose: is not in this model"),
    "adapted and replaced": (
        [dora()], {"replaced": {"lin": torch.ones(6, 8)}}, "lin: the file brings a whole base weight"),
    "updated and replaced": (
        [replace(dora(), bias=torch.ones(6))], {"replaced": {"lin.bias": torch.ones(6)}}, "has an update of the bias"),
    "a token that is not in the model": (
        [dora()], {"tokens": {"emb": li.TokenRows(ids=(11,), rows=torch.ones(1, 8))}},
        r"rows 11 to 11, this model's is \(11, 8\)"),
}  # fmt: skip


@pytest.mark.parametrize(("sites", "extras", "message"), FILE_REFUSED.values(), ids=FILE_REFUSED)
def test_a_file_that_does_not_fit_changes_nothing(sites, extras, message, tmp_path):
    """load names what does not fit, and leaves the model as it was."""
    model = net()
    before = state(model)
    with pytest.raises(li.FileError, match=message):
        load_sites(model, tmp_path, *sites, **extras)
    assert state(model) == before


def test_merging_a_bias_update_needs_a_bias(tmp_path):
    """merge names a layer without the bias that the adapter updates, and leaves the model as it was."""
    model = load_sites(net(), tmp_path, replace(dora("lin3", 8), bias=torch.ones(8), magnitude=None))
    before = state(model)
    with pytest.raises(li.MergeError, match="has no bias for the update"):
        li.merge(model)
    assert state(model) == before


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_unmerge_refuses_a_weight_that_was_edited_while_merged(part, tmp_path):
    """unmerge names a weight or bias that was changed since the merge, and changes nothing."""
    model = net()
    load_sites(model, tmp_path, replace(dora(), bias=torch.ones(6)))
    li.merge(model)
    with torch.no_grad():
        getattr(model.lin, part)[0] += 1
    before = state(model)
    with pytest.raises(li.MergeError, match="lin: was changed since it was merged"):
        li.unmerge(model)
    assert state(model) == before
