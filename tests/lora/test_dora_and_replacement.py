"""DoRA, updates of biases, whole tensors and rows of tokens, on a model: beside PEFT called live, and the laws."""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections.abc import Callable
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
def _quiet():
    """PEFT warns of what it can't do, and half precision of what does not survive a merge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(nn.Module):
    """Every kind of layer that may have a payload; each forward uses all of them."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.emb, self.lin, self.lin2, self.c1, self.norm = (
            nn.Embedding(11, 8),
            nn.Linear(8, 6),
            nn.Linear(8, 8),
            Conv1D(6, 8),
            nn.LayerNorm(6),
        )
        self.head, self.conv2, self.conv1, self.mha = (
            nn.Linear(6, 2),
            nn.Conv2d(3, 5, (3, 2)),
            nn.Conv1d(3, 5, 3),
            nn.MultiheadAttention(8, 2),
        )
        self.lin3 = nn.Linear(8, 8, bias=False)

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        x = self.emb(ids)
        x = x + self.lin2(x) + self.lin3(x) + self.mha(x, x, x, need_weights=False)[0]
        text = self.head(self.norm(self.lin(x) + self.c1(x)))
        return torch.cat([t.flatten() for t in (text, self.conv2(image), self.conv1(image[:, :, 0]))])


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    model = Net()
    model.load_state_dict({k: t for k, t in BASE.items() if k in model.state_dict()}, strict=False)
    return model.to(dtype).eval()


def out(model: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 5, 6, generator=g).to(next(p for p in model.parameters() if p.ndim == 2).dtype)
    return model(torch.arange(10).view(2, 5), image)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fixtures(variant, tmp_path):
    """A file of PEFT's: the tensors that PEFT merged, forward and merge; off, unmerged and ejected the base; saved again the same record."""
    folder, model = FIXTURES / f"peft_{variant}", net()
    wanted, before, keys = net(), state(model), list(model.state_dict())
    expected = load_file(folder / "expected_merged.safetensors")
    wanted.load_state_dict({k: t for k, t in expected.items() if k in keys}, strict=False)
    y, z = out(model), out(wanted)
    assert (y - z).abs().max() > 1e-2
    li.load(model, folder)
    now = out(model)
    assert torch.allclose(now, z, atol=1e-5)
    with li.disabled(model):
        assert torch.equal(out(model), y)
    li.merge(model)
    assert list(model.state_dict()) == keys
    assert all(torch.allclose(t, wanted.state_dict()[k], atol=1e-6) for k, t in model.state_dict().items())
    assert is_same_record(li.read(li.save(model, tmp_path / "a", format="peft")), li.read(folder))
    li.unmerge(model)
    assert torch.equal(out(model), now)
    assert torch.equal(out(li.load(net(), li.save(model, tmp_path / "b.safetensors"))), now)
    assert torch.equal(out(copy.deepcopy(model)), now)
    assert torch.equal(out(pickle.loads(pickle.dumps(model))), now)
    li.merge(model)
    li.eject(model)
    assert state(model) == before


def peft_of(config: dict[str, object], base: nn.Module, tmp_path: Path) -> nn.Module:
    """A model of PEFT's with random values throughout, saved too."""
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=6, **config)).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "magnitude" in key:
                p.mul_(1 + 0.3 * torch.rand(p.shape, generator=g))
            elif p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.3)
    theirs.save_pretrained(tmp_path)
    return theirs


PEFT = {
    "dora on linears": {"target_modules": ["lin", "lin3"], "use_dora": True},
    "dora on Conv1D": {"target_modules": ["c1"], "use_dora": True, "fan_in_fan_out": True},
    "dora on an embedding": {"target_modules": ["emb"], "use_dora": True},
    "dora on convolutions": {"target_modules": ["conv2", "conv1"], "use_dora": True, "use_rslora": True},
    "dora beside a bias": {"target_modules": ["lin"], "use_dora": True, "bias": "lora_only"},
    "lora_bias": {"target_modules": ["lin", "c1", "conv2"], "lora_bias": True},
    "dora and all biases": {"target_modules": ["head"], "use_dora": True, "bias": "all"},
    "heads": {"target_modules": ["lin", "conv1"], "modules_to_save": ["head", "norm"]},
}


@pytest.mark.parametrize("name", PEFT)
def test_as_in_peft(name, tmp_path):
    """Outputs, the gradients of A, B, m and all that trains beside, and merged weights, within 1e-5."""
    theirs, ours = peft_of(PEFT[name], net(), tmp_path), li.load(net(), tmp_path)
    y, z = out(ours), out(theirs)
    assert torch.allclose(y, z, atol=1e-5)
    w = torch.randn(len(y), generator=torch.Generator().manual_seed(2))
    (y * w).sum().backward()
    (z * w).sum().backward()
    grads = {k.replace("base_model.model.", "").replace(".default", "").replace(".base_layer", "").replace(".modules_to_save", ""): p.grad
             for k, p in theirs.named_parameters() if p.requires_grad}  # fmt: skip
    names = {
        "A": ("lora_A.weight", "lora_embedding_A"),
        "B": ("lora_B.weight", "lora_embedding_B"),
        "m": ("lora_magnitude_vector.weight",),
        "b": ("lora_B.bias",),
    }
    compared = set()
    for at, host in adapted_sites(ours).items():
        for part, p in host.adapters["default"].named_parameters():
            path = at if part == "value" else at.removesuffix(".weight")
            keys = [f"{path}.weight", path] if part == "value" else [f"{path}.{n}" for n in names[part]]
            key = next(k for k in keys if k in grads)
            assert torch.allclose(p.grad.flatten(), grads[key].flatten(), atol=1e-5, rtol=1e-4), key
            compared.add(key)
    assert compared == grads.keys()
    li.merge(ours)
    plain = theirs.merge_and_unload()
    assert all(torch.allclose(t, plain.state_dict()[k], atol=1e-5) for k, t in ours.state_dict().items())


def test_tokens_of_a_tied_head(tmp_path):
    """Trained tokens count in the head too, where it is the embedding; merged they need memory of their own."""
    torch.manual_seed(0)
    base = llama(tie_word_embeddings=True)
    theirs = peft_of(
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5, 98]}}, base, tmp_path
    )
    ours, y, before = li.load(base, tmp_path), theirs(ids()).logits, None
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


class Watch(TorchDispatchMode):
    """The sizes of all that is newly made."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known, self.sizes = known.untyped_storage().data_ptr(), [0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.sizes += [t.numel() for t in (made if isinstance(made, tuple) else (made,))
                       if isinstance(t, Tensor) and t.untyped_storage().data_ptr() != self.known]  # fmt: skip
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_forms_nothing_of_the_weights_size(dtype, tmp_path):
    """The norm comes from W0 A^T and A A^T; of a half precision weight no more than a tile is cast."""
    model = nn.Sequential(nn.Linear(1024, 1024)).to(dtype)
    site = li.StoredSite(path="0", A=torch.randn(2, 1024), B=torch.randn(1024, 2), alpha=2, magnitude=torch.rand(1024))
    put(model, tmp_path, site)
    with Watch(model[0].weight) as watch:
        model(torch.randn(3, 1024, dtype=dtype))
    assert 1024 < max(watch.sizes) <= 1 << 18


def put(model: nn.Module, folder: Path, *sites: li.StoredSite, name: str = "default", **more: object) -> nn.Module:
    """A record, by way of a file, onto a model."""
    file = li.AdapterFile(path=folder, format="lorainject", sites=sites, name=name, **more)
    return li.load(model, li.write(file, folder / f"{name}.safetensors").path)


@st.composite
def records(draw: st.DrawFn) -> Callable[[], tuple[tuple[li.StoredSite, ...], dict[str, object]]]:
    """A record for Net with payloads of any kind, and what it is made of."""
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
        out_ = o if rows is None else 4
        shape = kernels.get(path, (i, o) if kind in ("linear^T", "embedding") else (o, i))
        m = 0.1 + torch.rand(out_, generator=g) if draw(st.booleans()) else None
        b = torch.randn(out_, generator=g) if path not in ("emb", "lin3") and draw(st.booleans()) else None
        sites.append(li.StoredSite(path=path, kind=kind, shape=shape, rows=rows, label="" if rows is None else "1:3,4:6", alpha=2.0 * r,
                                   A=torch.randn(r, i, generator=g) * 0.3, B=torch.randn(out_, r, generator=g) * 0.3, magnitude=m, bias=b))  # fmt: skip
    taken, free = {s.path for s in sites}, {s.path for s in sites if s.bias is None}
    whole = {
        "head.bias": (2,),
        "norm": (6,),
        "norm.bias": (6,),
        "conv1.bias": (5,),
        "lin.bias": (6,),
        "mha.out_proj.bias": (8,),
        "head": (2, 6),
    }
    wanted = [n for n in draw(st.lists(st.sampled_from(sorted(whole)), unique=True)) if n not in taken
              and (n.removesuffix(".bias") not in taken or n.removesuffix(".bias") in free)]  # fmt: skip
    tokens = (
        {"emb": li.TokenRows(ids=(2, 7), rows=torch.randn(2, 8, generator=g))}
        if "emb" not in taken and draw(st.booleans())
        else {}
    )
    return tuple(sites), {"replaced": {n: torch.randn(whole[n], generator=g) for n in wanted}, "tokens": tokens}


def dense(model: nn.Module, file: li.AdapterFile) -> nn.Module:
    """The same in float64, with the record in its weights as the oracle reads it; of a slice DoRA is of these rows alone."""
    plain = copy.deepcopy(model).double()
    tensors = {k: t.clone() for k, t in plain.state_dict().items()}
    for s in file.sites:
        W = tensors[f"{s.path}.weight"]
        W = W.mT if s.path in ("c1", "emb") else W.flatten(1)
        at = [i for part in s.rows or (range(len(W)),) for i in part]
        V = W[at] + s.scale * s.B.double() @ s.A.double()
        W[at] = V if s.magnitude is None else V * (s.magnitude.double() / V.norm(dim=1)).unsqueeze(1)
        if s.bias is not None:
            tensors[f"{s.path}.bias"][at] += s.scale * s.bias.double()
    plain.load_state_dict(merged_weights(replace(file, sites=()), tensors))
    return plain


@laws
@given(records(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 2**16))
def test_the_laws(record, dtype, seed):
    """Right in any mixture; merged as unmerged, in the original classes; off, unmerged and ejected the base, to the bit; saved as loaded."""
    sites, more = record
    model = net(dtype)
    before, y, keys = state(model), out(model), list(model.state_dict())
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        put(model, Path(folder), *sites, **more)
        file = li.read(Path(folder) / "default.safetensors")
        exact = out(dense(net(dtype), file).double())
        tolerance = ROUNDING[dtype] * max(1.0, float(exact.abs().max()))
        now, was = out(model), state(model)
        assert (now - exact).abs().max() < tolerance
        with li.disabled(model):
            assert torch.equal(out(model), y)
        assert is_same_record(li.read(li.save(model, Path(folder) / "again.safetensors")), file)
        li.merge(model, strict=False)
        assert [
            type(m) for m in model.modules() if type(m).__name__ in ("LoraLinear", "LoraConv2d", "LoraLayerNorm")
        ] == []
        assert list(model.state_dict()) == keys
        assert (out(model) - exact).abs().max() < tolerance
        assert is_same_record(li.read(li.save(model, Path(folder) / "merged.safetensors")), file)
        for p in (p for host in adapted_sites(model).values() for p in host.adapters["default"].parameters()):
            p.add_(1)  # trained meanwhile
        li.unmerge(model)
        for p in (p for host in adapted_sites(model).values() for p in host.adapters["default"].parameters()):
            p.sub_(1)
        assert {k: v[:4] for k, v in state(model).items()} == {k: v[:4] for k, v in was.items()}
        li.eject(model)
    assert state(model) == before


@laws
@given(records(), records(), st.permutations([0, 1]))
def test_two_records_in_and_out(first, second, order):
    """Two adapters, activated in turn: each as if it were alone; ejected in any order, the base."""
    model = net()
    before, y = state(model), out(model)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        alone = []
        for sites, more in (first, second):
            alone.append(out(put(net(), Path(folder), *sites, **more)))
        try:
            put(model, Path(folder), *first[0], name="a", **first[1])
            put(model, Path(folder), *second[0], name="b", **second[1])
        except li.FileError:
            assert any(s.bias is not None for s in (*first[0], *second[0]))  # of a bias that the other replaces
            li.eject(model)
            assert state(model) == before
            return
        for name, wanted in zip("ab", alone, strict=True):
            li.activate(model, name)
            assert torch.allclose(out(model), wanted, atol=1e-5)
            li.merge(model)
            assert torch.allclose(out(model), wanted, atol=1e-5)
            li.unmerge(model)
        li.activate(model)
        assert torch.equal(out(model), y)
        li.eject(model, "ab"[order[0]])
        li.activate(model, "ab"[order[1]])
        assert torch.allclose(out(model), alone[order[1]], atol=1e-5)
        li.eject(model)
    assert state(model) == before


def dora(path: str = "lin", o: int = 6, i: int = 8) -> li.StoredSite:
    return li.StoredSite(path=path, A=torch.randn(2, i), B=torch.randn(o, 2), alpha=2, magnitude=torch.rand(o))


def test_merging_magnitudes_with_another_adapter(tmp_path):
    """Changes of W0 add up, in one rounding, and come out again in any order; both at once unmerged are refused."""
    model = li.inject(net(), ["lin"], r=2, name="plain")
    with torch.no_grad():
        adapted_sites(model)["lin"].adapters["plain"].B.normal_()
    put(model, tmp_path, dora(), name="dora")
    W0 = bits(model.lin.weight)
    with pytest.raises(li.StateError, match="lin: dora, plain"):
        li.activate(model, "dora", "plain")
    with pytest.raises(li.StateError, match="lin: plain, dora"):
        li.activate(model, "plain", "dora")
    d = {n: {at: t for at, _, t in li.deltas(model, n)}["lin"] for n in ("plain", "dora")}
    wanted = model.lin.weight + d["plain"] + d["dora"]
    li.merge(model, "dora")
    assert torch.allclose({at: t for at, _, t in li.deltas(model, "dora")}["lin"], d["dora"], atol=1e-6)
    li.merge(model, "plain")
    assert torch.allclose(model.lin.weight, wanted, atol=1e-5)
    li.unmerge(model, "dora")
    assert torch.allclose(model.lin.weight, wanted - d["dora"], atol=1e-5)
    li.unmerge(model)
    assert bits(model.lin.weight) == W0


def test_rows_with_magnitudes(tmp_path):
    """One adapter a row: those rows alone have the gain; a tensor that is replaced can't be there for some rows."""
    model, x = net(), torch.randn(3, 4, 8)
    y = model.lin(x)
    put(model, tmp_path, dora(), name="dora")
    z = model.lin(x)
    with li.rows(model, [None, "dora", None]):
        assert torch.allclose(model.lin(x), torch.stack([y[0], z[1], y[2]]), atol=1e-6)
    put(model, tmp_path, dora("head", 2, 6), name="whole", replaced={"lin.bias": torch.randn(6)})
    with li.rows(model, ["whole", None, None]), pytest.raises(li.StateError, match=r"rows\(\.\.\.\): the weight"):
        model.lin(x)


def test_inject_after_a_bias_was_replaced(tmp_path):
    """A layer that reads a tensor of its own reads all of them: no adapter is lost, whichever came first."""
    model, x = net(), torch.randn(3, 8)
    put(model, tmp_path, dora("head", 2, 6), replaced={"lin.bias": torch.ones(6)})
    li.inject(model, ["lin"], r=2, name="after")
    with torch.no_grad():
        a = adapted_sites(model)["lin"].adapters["after"]
        a.B.normal_()
        li.activate(model, "default", "after")
        assert torch.allclose(
            model.lin(x), F.linear(x, model.lin._parameters["weight"] + a.B @ a.A, torch.ones(6)), atol=1e-5
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_is_reached(variant):
    """probe finds every payload acting, and no dense sum formed."""
    model = li.load(net(), FIXTURES / f"peft_{variant}")
    reach = li.probe(model, ids=torch.arange(10).view(2, 5), image=torch.randn(2, 3, 5, 6))
    assert set(reach.reached) == set(adapted_sites(model))
    assert not reach.dense


def test_compiled(tmp_path):
    """torch.compile makes one graph of magnitudes and of biases that are replaced."""
    model, x = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 2)), torch.randn(3, 8)
    put(model, tmp_path, dora("0"), replaced={"1.bias": torch.randn(6), "2.bias": torch.ones(2)})
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(x), model(x), atol=1e-6)


def test_magnitudes_of_a_slice(tmp_path):
    """The norms are those of the slice's own rows, and the other rows stay as they are."""
    model, x, rows = net(), torch.randn(3, 8), [1, 2, 4, 5]
    s = replace(dora(o=4), label="1:3,4:6", rows=(range(1, 3), range(4, 6)), shape=(6, 8))
    W = model.lin.weight.detach().clone()
    W[rows] += s.B @ s.A
    W[rows] *= (s.magnitude / W[rows].norm(dim=1)).unsqueeze(1)
    assert torch.allclose(put(model, tmp_path, s).lin(x), F.linear(x, W, model.lin.bias), atol=1e-5)


WHERE = (
    "merging.strategies.as_matrix",
    "merging.adapted_weight.checksum",
    "merging.revert.checksum",
    "merging.merge.set_grafted",
    "merging.revert._install",
    "lora.weight_graft.change_class",
)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("verb", [li.merge, li.unmerge])
def test_interrupted(where, verb, tmp_path):
    """A merge that is interrupted anywhere leaves all as it was; an unmerge too, or is finished by the next."""
    model = net()
    put(
        model,
        tmp_path,
        dora(),
        replace(dora("c1"), bias=torch.ones(6)),
        replaced={"head": torch.randn(2, 6), "norm.bias": torch.ones(6)},
    )
    before = state(model)
    for when in range(8):
        if verb is li.unmerge:
            li.merge(model)
        try:
            with interrupted(where, when):
                verb(model)
        except KeyboardInterrupt:
            if verb is li.merge:
                assert state(model) == before
        if any(h.adapters.merge_record for h in adapted_sites(model).values()):
            li.unmerge(model)
        assert state(model) == before


def test_training_moves_magnitudes_and_heads(tmp_path):
    """parameters() has A, B, m, b and what is replaced, all reached; the base's gets no gradient; merged nothing trains."""
    model = net()
    put(
        model,
        tmp_path,
        dora(),
        replaced={"head": torch.randn(2, 6)},
        tokens={"emb": li.TokenRows(ids=(3,), rows=torch.randn(1, 8))},
    )
    trained = list(li.parameters(model))
    assert len(trained) == 5
    optimizer, before = torch.optim.SGD(trained, lr=0.1), [bits(p) for p in trained]
    out(model).square().sum().backward()
    optimizer.step()
    assert all(bits(p) != b for p, b in zip(trained, before, strict=True))
    assert model.lin._parameters["weight"].grad is None
    li.merge(model)
    with pytest.raises(li.StateError, match="cannot train while merged"):
        optimizer.step()


REFUSED = {
    "no bias to fold into": ([replace(dora("lin3", 8), bias=torch.ones(8), magnitude=None)], {}, li.MergeError, "has no bias for the update"),
    "by input": ([replace(dora(), magnitude=torch.rand(8), magnitude_axis="in")], {}, li.FileError, "magnitudes by input"),
    "another shape": ([dora()], {"replaced": {"head.bias": torch.ones(3)}}, li.FileError, r"head\.bias: the file has \(3,\), this model's is \(2,\)"),
    "nowhere": ([dora()], {"replaced": {"nose": torch.ones(3)}}, li.FileError, "nose: is not in this model"),
    "adapted and replaced": ([dora()], {"replaced": {"lin": torch.ones(6, 8)}}, li.FileError, "lin: the file brings a whole base weight"),
    "updated and replaced": ([replace(dora(), bias=torch.ones(6))], {"replaced": {"lin.bias": torch.ones(6)}}, li.FileError, "has an update of the bias"),
    "no such token": ([dora()], {"tokens": {"emb": li.TokenRows(ids=(11,), rows=torch.ones(1, 8))}}, li.FileError, r"rows 11 to 11, this model's is \(11, 8\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_by_name(name, tmp_path):
    """And nothing is changed."""
    sites, more, error, message = REFUSED[name]
    model = net()
    before = state(model)
    with pytest.raises(error, match=message):
        put(model, tmp_path, *sites, **more)
        before = state(model)
        li.merge(model)
    assert state(model) == before


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_edited_while_merged(part, tmp_path):
    """unmerge knows that what it would take out is no longer what merge put in, and changes nothing."""
    model = net()
    put(model, tmp_path, replace(dora(), bias=torch.ones(6)))
    li.merge(model)
    with torch.no_grad():
        getattr(model.lin, part)[0] += 1
    before = state(model)
    with pytest.raises(li.MergeError, match="lin: was changed since it was merged"):
        li.unmerge(model)
    assert state(model) == before
