"""The weight graft on real owners: experts under each implementation, attention, recurrent layers, weights that a parent reads."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AriaTextConfig,
    AriaTextModel,
    BloomConfig,
    BloomModel,
    DetrConfig,
    DetrForSegmentation,
    MobileBertConfig,
    MobileBertForMaskedLM,
    ResNetConfig,
)  # fmt: skip
from transformers.models.aria.modeling_aria import AriaExperts

import lorainject as li
from lorainject.lora.graft import Graft
from lorainject.lora.model_index import adapted_sites

from models import randomise, state
from moe_models import SIZES, gpt_oss, mixtral, moe_model, moe_output


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


every = pytest.mark.parametrize("build", [mixtral, gpt_oss])
implementations = pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])


@every
@implementations
def test_experts(build, implementation):
    """Adapted experts compute what merged ones do, no dense sum is formed, and A and B of all that got a token have gradients."""
    model = moe_model(build, implementation)
    before, y = state(model), moe_output(model)
    li.inject(model, ["experts"], r=4)
    assert close(moe_output(model), y, 1e-6)
    randomise(model)
    adapted = moe_output(model)
    assert not close(adapted, y, 0.01)
    reach = li.probe(model, input_ids=torch.arange(14).reshape(2, 7))
    assert not reach.dense
    assert len(reach.reached) == 4
    li.merge(model)
    assert not any(isinstance(m, Graft) for m in model.modules())
    assert close(moe_output(model), adapted)
    li.unmerge(model)
    assert torch.equal(moe_output(model), adapted)
    assert state(li.eject(model)) == before


@every
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")  # in transformers
def test_experts_compile_as_one_graph(build, implementation, dtype):
    """torch.compile takes adapted experts whole, and gets the same numbers."""
    model = moe_model(build, implementation, dtype)
    li.inject(model, ["experts", "q_proj"], r=4)
    randomise(model)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert close(moe_output(compiled), moe_output(model), 1e-5 if dtype is torch.float32 else 3e-2)
    torch._dynamo.reset()


@implementations
def test_experts_dropout(implementation):
    """LoRA dropout acts on the experts' inputs while training, and only then."""
    model = moe_model(mixtral, implementation)
    li.inject(model, ["experts"], r=4, dropout=0.5)
    randomise(model)
    assert torch.equal(moe_output(model), moe_output(model))
    model.train()
    assert not torch.equal(moe_output(model), moe_output(model))


def test_bf16_experts_with_fp32_factors_keep_their_dtype():
    """A and B are float32 on a bfloat16 base; the output is bfloat16, and autocast changes nothing about that."""
    model = moe_model(mixtral, "grouped_mm", torch.bfloat16)
    li.inject(model, ["experts"], r=4)
    randomise(model)
    assert moe_output(model).dtype is torch.bfloat16
    assert all(p.dtype is torch.float32 for p in li.parameters(model))
    wide = moe_model(mixtral, "eager")
    li.inject(wide, ["experts"], r=4)
    randomise(wide)
    with torch.autocast("cpu", torch.bfloat16):
        assert close(moe_output(wide).float(), moe_output(li.unmerge(wide) if li.merge(wide) else wide).float(), 0.1)


def test_every_expert_without_a_token_is_said_apart():
    """probe names the experts of a stack, by number, that this input did not reach; they are no failure."""
    model = moe_model(mixtral)
    li.inject(model, ["experts"], r=4)
    randomise(model)
    reach = li.probe(model, input_ids=torch.tensor([[5]]))
    assert len(reach.idle) == 2 * 2 * 6  # 2 layers, 2 stacks, 2 of 8 experts a token
    assert all(name.rpartition(", ")[0].endswith("_proj") for name in reach.idle)


def test_aria_experts_are_transposed():
    """(E, in, out): A (E, r, in) and B (E, out, r) all the same."""
    model = AriaTextModel(AriaTextConfig(**SIZES, moe_num_experts=4, moe_topk=2))
    experts = next(m for m in model.modules() if isinstance(m, AriaExperts))
    plan = {s.name.rsplit(".", 1)[-1]: s for s in li.find(model, ["experts"], r=4, layers=[0])}
    assert (plan["gate_up_proj"].kind, plan["gate_up_proj"].in_features) == ("experts^T", 32)
    li.inject(model, ["experts"], r=4)
    assert experts.lora_gate_up_proj["default"].A.shape == (4, 4, 32)
    assert experts.lora_gate_up_proj["default"].B.shape == (4, experts.gate_up_proj.shape[2], 4)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(batch_first, apart, training):
    """in_proj or separate projections, and out_proj, in train and eval mode, where torch has a fused path that must not run."""
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(
        8, 2, batch_first=batch_first, kdim=6 if apart else None, vdim=7 if apart else None
    ).train(training)
    q, k, v = torch.randn(3, 5, 8), torch.randn(3, 5, 6 if apart else 8), torch.randn(3, 5, 7 if apart else 8)
    li.inject(mha, "all-linear", r=2)
    assert set(adapted_sites(mha)) == (
        {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"} if apart else {"in_proj_weight", "out_proj"}
    )
    randomise(mha)
    dense = copy.deepcopy(mha)
    li.merge(dense)
    for extra in ({}, {"need_weights": False}, {"attn_mask": torch.zeros(5, 5) if batch_first else torch.zeros(3, 3)}):
        assert close(mha(q, k, v, **extra)[0], dense(q, k, v, **extra)[0], 1e-5)
    assert not li.probe(mha, q, k, v).dense


@pytest.mark.parametrize("targets", ["all-linear", ["linear1"], ["out_proj"], ["in_proj_weight[q,v]"]])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the merged encoder, whose kernel is torch's
def test_encoder_layers(targets, training):
    """torch's encoder reads its layers' weights in eval mode, two levels up: whatever is adapted, the fused kernel does not hide it."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0), 2).train(
        training
    )
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    li.inject(encoder, targets, r=2)
    randomise(encoder)
    dense = copy.deepcopy(encoder)
    li.merge(dense)
    kept = ~padding
    with torch.no_grad():
        assert close(encoder(x), dense(x), 1e-5)
        assert close(encoder(x, src_key_padding_mask=padding)[kept], dense(x, src_key_padding_mask=padding)[kept], 1e-5)


@pytest.mark.parametrize(
    "layer", [nn.LSTM(5, 4, 2, bidirectional=True), nn.GRU(5, 4), nn.RNN(5, 4), nn.LSTM(5, 4, proj_size=3)]
)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_recurrent_layers(layer):
    """Their weights are found, act, train, and are known to need the dense sum."""
    layer = copy.deepcopy(layer)
    before, x = state(layer), torch.randn(6, 2, 5)
    li.inject(layer, "all-linear", r=2)
    randomise(layer)
    dense = copy.deepcopy(layer)
    li.merge(dense)
    assert close(layer(x)[0], dense(x)[0], 1e-5)
    reach = li.probe(layer, x)
    assert set(reach.dense) == set(adapted_sites(layer))
    assert "the dense sum was formed for" in str(reach)
    assert state(li.eject(layer)) == before


def _detr() -> nn.Module:
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=[f"stage{i}" for i in range(1, 5)]
    )
    return DetrForSegmentation(DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=16,
                                          encoder_layers=1, decoder_layers=1, encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=16,
                                          decoder_ffn_dim=16, num_queries=4))  # fmt: skip


READ = {
    "Bloom's slow path, by slices": (
        lambda: BloomModel(BloomConfig(vocab_size=99, hidden_size=16, n_layer=1, n_head=2, slow_but_exact=True, pretraining_tp=2)),
        ["dense", "dense_4h_to_h"], {"input_ids": torch.arange(6)[None]}, ()),
    "MobileBERT's head, concatenated": (
        lambda: MobileBertForMaskedLM(MobileBertConfig(vocab_size=99, hidden_size=16, embedding_size=8, num_hidden_layers=1, num_attention_heads=2,
                                                       intermediate_size=16, intra_bottleneck_size=8, true_hidden_size=8)),
        ["predictions.dense"], {"input_ids": torch.arange(6)[None]}, ("cat",)),
    "DETR's masks, as a convolution": (_detr, ["bbox_attention.q_proj", "bbox_attention.k_proj"], {"pixel_values": torch.randn(1, 3, 64, 64)}, ()),
}  # fmt: skip


@pytest.mark.parametrize(
    ("build", "targets", "inputs", "dense"), [pytest.param(*w, id=name) for name, w in READ.items()]
)
def test_weights_that_models_read(build, targets, inputs, dense):
    """Found by the source of the class that reads them; adapted they do what merged ones do."""
    torch.manual_seed(0)
    model = build().eval()
    before = state(model)
    li.inject(model, targets, r=2)
    randomise(model)
    merged = copy.deepcopy(model)
    li.merge(merged)
    with torch.no_grad():
        for a, b in zip(model(**inputs).to_tuple(), merged(**inputs).to_tuple(), strict=True):
            assert not isinstance(a, Tensor) or close(a, b)
    assert {by for each in li.probe(model, **inputs).dense.values() for by in each} == set(dense)
    assert state(li.eject(model)) == before


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding_mode="replicate", padding=1), (2, 4, 11)),
    "2d in groups": (nn.Conv2d(4, 6, 3, groups=2, padding="same", padding_mode="reflect"), (2, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 7, 7)),
    "2d, channels last": (nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (2, 4, 7, 7)),
    "3d": (nn.Conv3d(4, 6, (1, 2, 3), stride=2), (1, 4, 5, 5, 5)),
    "3d, a point": (nn.Conv3d(4, 6, 1), (1, 4, 3, 3, 3)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 7)),
    "transposed 2d in groups": (nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2, padding=1), (2, 4, 7, 7)),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 2), (1, 4, 3, 3, 3)),
}
CELLS = {
    "GRUCell": (nn.GRUCell(4, 5), [(2, 4), (2, 5)]), "LSTMCell": (nn.LSTMCell(4, 5), [(2, 4)]), "RNNCell": (nn.RNNCell(4, 5), [(2, 4), (2, 5)]),
    "Bilinear": (nn.Bilinear(4, 5, 3), [(2, 4), (2, 5)]),
}  # fmt: skip


@pytest.mark.parametrize(("layer", "shape"), [pytest.param(*w, id=name) for name, w in CONVOLUTIONS.items()])
def test_convolutions(layer, shape, tmp_path):
    """With every option: adapted is merged, which is saved and loaded; W0 comes back to the bit, and in its memory format."""
    torch.manual_seed(0)
    model, x = nn.Sequential(copy.deepcopy(layer)), torch.randn(shape)
    before, fresh = state(model), copy.deepcopy(model)
    li.inject(model, "all-conv", r=2)
    randomise(model)
    y = model(x)
    assert not li.probe(model, x).dense
    assert torch.equal(li.load(fresh, li.save(model, tmp_path / "a.safetensors"))(x), y)
    li.merge(model)
    assert close(model(x), y, 1e-5)
    li.unmerge(model)
    assert model[0].weight.stride() == layer.weight.stride()
    assert state(li.eject(model)) == before


@pytest.mark.parametrize(("layer", "shapes"), [pytest.param(*w, id=name) for name, w in CELLS.items()])
def test_cells_and_bilinear(layer, shapes):
    """Their kernels take whole weights: the dense sum, exact and counted."""
    torch.manual_seed(0)
    layer, inputs = copy.deepcopy(layer), [torch.randn(shape) for shape in shapes]
    before = state(layer)
    li.inject(layer, "all-linear", r=2)
    randomise(layer)
    dense = copy.deepcopy(layer)
    li.merge(dense)
    got, want = (y[0] if isinstance(y, tuple) else y for y in (layer(*inputs), dense(*inputs)))
    assert close(got, want, 1e-5)
    got.sum().backward()
    assert any(host.adapters.fallbacks for host in adapted_sites(layer).values())
    assert any(bool(p.grad.any()) for p in li.parameters(layer))
    assert state(li.eject(layer)) == before


class Parent(nn.Module):
    """Reads `read` in its forward, and `hidden` in a way that its source does not show; calls `called`."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.hidden = (nn.Linear(4, 4) for _ in range(3))
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.called(x), self.read.weight)
        if self.fail:
            raise RuntimeError("on purpose")
        return F.linear(x, next(p for name, p in self.hidden.named_parameters() if name == "weight"))


class Secretive(Parent):
    """Reads a layer's weight by a name made at run time."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self, "hid" + "den").weight)


def test_a_read_that_no_source_shows_is_named_and_can_be_mended():
    """probe says so, and how to inject instead: naming the weight itself, which adapts whoever reads it."""
    model = nn.Sequential(Secretive())
    li.inject(model, ["hidden"], r=2)
    x = torch.randn(2, 4)
    with pytest.raises(
        li.UnreachedAdapter,
        match=r"0\.hidden: its weight acts without .*\n=> eject, and inject naming .*targets=\['0\.hidden\.weight'\]",
    ):
        li.probe(model, x)
    li.eject(model)
    before = state(model)
    li.inject(model, ["0.hidden.weight"], r=2)
    randomise(model)
    assert li.probe(model, x).reached == ("0.hidden",)
    dense = copy.deepcopy(model)
    li.merge(dense)
    assert close(model(x), dense(x), 1e-5)
    assert state(li.eject(model)) == before


def test_that_choice_is_saved(tmp_path):
    """A weight that was named itself is so again when the adapter is loaded."""
    model = nn.Sequential(Secretive())
    fresh = copy.deepcopy(model)
    li.inject(model, ["0.hidden.weight"], r=2)
    randomise(model)
    li.load(fresh, li.save(model, tmp_path / "a.safetensors"))
    x = torch.randn(2, 4)
    assert torch.equal(fresh(x), model(x))
    assert li.probe(fresh, x)


def shadows(model: nn.Module) -> list[str]:
    """Weights that are hidden at the moment."""
    return [f"{path}.{name}" for path, m in model.named_modules() for name in m._parameters if name in m.__dict__]


def test_nothing_is_left_behind_by_a_forward_that_raises():
    """Outside a forward a weight is W0, whatever happened inside."""
    model = Parent()
    li.inject(model, ["read", "called"], r=2)
    model.fail = True
    with pytest.raises(RuntimeError, match="on purpose"):
        model(torch.randn(2, 4))
    assert not shadows(model)
    assert type(model.read.weight) is nn.Parameter


def test_inside_and_outside():
    """While the reader runs the weight is the sum, and in between W0: what FSDP, state_dict and optimisers see."""
    model = nn.Sequential(Parent())
    li.inject(model, ["read"], r=2)
    seen = []
    model[0].called.register_forward_hook(lambda *_: seen.append(type(model[0].read.weight).__name__))
    model(torch.randn(2, 4))
    assert seen == ["Hidden"]
    assert type(model[0].read.weight) is nn.Parameter
    x = torch.randn(2, 4)
    with li.disabled(model):
        y = model(x)
    assert torch.equal(y, li.eject(model)(x))


def test_a_shared_layer_that_two_parents_read():
    """One adapter, found from either parent, whichever path comes first."""
    first, second = Parent(), Parent()
    second.read = first.read
    model = nn.Sequential(first, second)
    before, x = state(model), torch.randn(2, 4)
    li.inject(model, ["read"], r=2)
    randomise(model)
    dense = copy.deepcopy(model)
    li.merge(dense)
    assert len(adapted_sites(model)) == 1
    assert close(model(x), dense(x), 1e-5)
    assert close(second(x), dense[1](x), 1e-5)
    assert state(li.eject(model)) == before


def test_checkpointing_and_recursion():
    """A forward that runs again in the backward, and one inside another, get the same gradients as a plain one."""
    model = nn.Sequential(Parent())
    li.inject(model, ["read"], r=2)
    randomise(model)
    x = torch.randn(2, 4, requires_grad=True)
    wanted = torch.autograd.grad(model(x).sum(), list(li.parameters(model)))
    for reentrant in (True, False):
        got = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sum(), list(li.parameters(model)))
        if reentrant:
            model.zero_grad()
            checkpoint(model, x, use_reentrant=True).sum().backward()
            got = tuple(p.grad for p in li.parameters(model))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not shadows(model)


def test_threads():
    """Forwards side by side all see the sum: the first that is done does not take it from the others."""
    model = nn.Sequential(*[Parent() for _ in range(3)])
    li.inject(model, ["read"], r=2)
    randomise(model)
    x = torch.randn(2, 4)
    with torch.no_grad():
        wanted = model(x)
    wrong: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            for _ in range(200):
                if not torch.equal(y := model(x), wanted):
                    wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert not shadows(model)


def test_pickle_and_deepcopy():
    """A copy has its own readers: training it leaves the original alone."""
    model = moe_model(mixtral)
    li.inject(model, ["experts"], r=4)
    randomise(model)
    y = moe_output(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(moe_output(twin), y)
        randomise(twin, seed=1)
        assert not torch.equal(moe_output(twin), y)
        assert torch.equal(moe_output(model), y)


@every
@implementations
def test_rows_through_experts(build, implementation):
    """Each row's tokens use its own adapter in experts too, in the forward and in its gradients, as each row alone would."""
    model = moe_model(build, implementation)
    x = torch.randint(0, 50, (3, 5), generator=torch.Generator().manual_seed(1))
    for seed, name in enumerate("ab"):
        li.inject(model, ["experts", "attention"], r=4, name=name)
        randomise(model, name, seed=seed)

    def alone(row: int, name: str | None) -> torch.Tensor:
        li.activate(model, *([name] if name else []))
        return model(input_ids=x[row : row + 1], use_cache=False).last_hidden_state[0]

    names = ["b", None, "a"]
    want = torch.stack([alone(i, name) for i, name in enumerate(names)])
    want.square().sum().backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with li.rows(model, names):
        got = model(input_ids=x, use_cache=False).last_hidden_state
        got.square().sum().backward()
    assert close(got, want)
    for k, p in model.named_parameters():
        assert (p.grad is not None) == (k in grads)
        assert p.grad is None or close(p.grad, grads[k])
    with torch.no_grad(), li.rows(model, names):
        assert close(model(input_ids=x, use_cache=False).last_hidden_state, want)


def test_rows_are_refused_where_the_batch_can_not_be_seen():
    """Weights read by a model's own code, tokens that are not the rows': rows(...) says so instead of mixing adapters up; the base's rows are fine."""
    model = moe_model(mixtral)
    li.inject(model, ["experts"], r=4, name="a")
    experts = model.layers[0].mlp.experts
    with (
        li.rows(model, ["a", None]),
        pytest.raises(li.StateError, match=r"a MixtralExperts with adapters got inputs of the shapes \(5, 32\)"),
    ):
        experts(torch.randn(5, 32), torch.zeros(5, 2, dtype=torch.long), torch.ones(5, 2))
    with li.rows(model, ["a", None]), pytest.raises(li.StateError, match="not for certain these rows' tokens"):
        experts(torch.randn(4, 32))
    assert not shadows(model)
    with li.rows(model, [None, None]):
        moe_output(model)
    conv = nn.Sequential(nn.Conv1d(4, 4, 3))
    li.inject(conv, ["0"], r=2, name="a")
    with (
        li.rows(conv, ["a", None]),
        pytest.raises(li.StateError, match=r"the weight 'weight' of a Conv1d is read by the model's own code"),
    ):
        conv(torch.randn(2, 4, 8))


def test_two_adapters_on_one_stack():
    """Their terms add up; merging both and taking them out again gives W0 to the bit."""
    model = moe_model(mixtral)
    li.inject(model, ["experts"], r=4, name="a")
    li.inject(model, ["down_proj"], r=2, name="b")
    randomise(model, "a")
    randomise(model, "b", seed=1)
    li.activate(model, "a", "b")
    y = moe_output(model)
    li.merge(model)
    assert close(moe_output(model), y)
    li.unmerge(model)
    li.eject(model, "b")
    assert len(adapted_sites(model)) == 4
    assert not any("b" in host.adapters for host in adapted_sites(model).values())
    assert li.activate(model, "a") is None
    li.eject(model)
    assert not any(isinstance(m, Graft) for m in model.modules())


def test_layers_in_plain_lists():
    """A layer kept in a plain Python list by its parent is the same object, so it is adapted there too."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.kept = [self.a]

        def forward(self, x: Tensor) -> Tensor:
            return self.kept[0](x)

    model = Listed()
    li.inject(model, ["a"], r=2)
    assert li.probe(model, torch.randn(2, 4)).reached == ("a",)


def test_a_linear_with_a_forward_of_its_own():
    """A router that returns a tuple, a linear that scales: their own code computes with the sum."""

    class Router(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = F.linear(x, self.weight) * 2
            return logits, logits.softmax(-1)

    model = Router(4, 3)
    x = torch.randn(2, 4)
    li.inject(nn.Sequential(model), ["0"], r=2)
    randomise(model)
    dense = copy.deepcopy(model)
    li.merge(dense)
    assert close(model(x)[0], dense(x)[0], 1e-5)
    assert close(model(x)[1], dense(x)[1], 1e-5)


class Grad(nn.Module):
    """A reader that lets another thing happen in the middle of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(4, 4)
        self.meanwhile = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        self.meanwhile()
        return F.linear(x, self.read.weight)


@pytest.fixture
def reader() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Grad())
    li.inject(model, ["read"], r=2)
    randomise(model)
    return model


def test_a_forward_inside_another(reader):
    """What is on and whether gradients flow is asked at each use, not by whoever came first: without grad outside, with grad inside."""
    x, seen = torch.randn(2, 4), []
    with torch.no_grad():
        wanted = reader(x)
        with li.disabled(reader):
            base = reader(x)

    def train() -> None:
        reader[0].meanwhile = lambda: None
        with torch.enable_grad():
            reader(x).sum().backward()
            seen.append(bool(reader[0].read.lora["default"].A.grad.any()))
        with li.disabled(reader):
            seen.append(torch.equal(reader(x), base))

    reader[0].meanwhile = train
    with torch.no_grad():
        assert torch.equal(reader(x), wanted)
    assert seen == [True, True]
    assert not shadows(reader)


def test_eject_in_the_middle_of_a_forward(reader):
    """The forward goes on with the base, and nothing stays hidden."""
    x = torch.randn(2, 4)
    reader[0].meanwhile = lambda: li.eject(reader)
    y = reader(x)
    reader[0].meanwhile = lambda: None
    assert torch.equal(y, reader(x))
    assert not shadows(reader)
    assert type(reader[0]) is Grad


@pytest.mark.parametrize("where", ["_shadow", "_unshadow", "_remove_shadow", "_update_flat_weights"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_forward(reader, where, when, monkeypatch):
    """An interrupt at any step of hiding and showing: at the latest the next verb shows the weight again."""
    import lorainject.lora.weight_graft as readers

    original, x = getattr(readers, where), torch.randn(2, 4)
    y = reader(x)

    def interrupted(*args):
        monkeypatch.setattr(readers, where, original)
        if when == "after":
            original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(readers, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        reader(x)
    assert torch.equal(reader(x), y)
    li.merge(reader)
    li.unmerge(reader)
    li.eject(reader)
    assert not shadows(reader)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_with_a_graph_break(reader):
    """Off and on again: the graph that was made while all was off must not be taken for the other."""
    x = torch.randn(2, 4)
    reader[0].meanwhile = torch._dynamo.graph_break
    compiled = torch.compile(reader, backend="eager")
    with torch.no_grad():
        on = compiled(x)
        with li.disabled(reader):
            off = compiled(x)
        assert not torch.equal(on, off)
        assert torch.equal(compiled(x), on)
        li.activate(reader)
        assert torch.equal(compiled(x), off)
        li.activate(reader, "default")
        assert torch.equal(compiled(x), on)
    torch._dynamo.reset()


def test_a_compiled_part():
    """A part that was compiled on its own is reached all the same, and ejected."""
    model = nn.Sequential(nn.Linear(4, 4), torch.compile(Parent(), backend="eager"))
    li.inject(model, ["read"], r=2)
    randomise(model)
    dense = copy.deepcopy(model)
    li.merge(dense)
    x = torch.randn(2, 4)
    assert close(model(x), dense(x), 1e-5)
    li.eject(model)
    assert not any(isinstance(m, Graft) for m in model.modules())
    torch._dynamo.reset()


def test_a_second_adapter_brings_its_readers():
    """Injected into a part that reads nothing, a weight gets its readers when the whole is injected."""
    model = nn.Sequential(Parent())
    li.inject(model[0].read, [lambda path, module: True], r=2, name="a")
    li.inject(model, ["read"], r=2, name="b")
    randomise(model, "b")
    assert li.probe(model, torch.randn(2, 4)).reached == ("0.read",)
    li.eject(model)
    assert not any(isinstance(m, Graft) for m in model.modules())


def test_a_slice_on_meta():
    """A slice's rows are no state: they come to life with A and B."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6))
    li.inject(model, ["0[1:3]"], r=2)
    model.to_empty(device="cpu")
    assert adapted_sites(model)["0[1:3]"].adapters["default"].rows.tolist() == [1, 2]
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(4, 6))
    li.inject(other, ["0[1:3]"], r=2)
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(torch.ones(1, 4)).isnan(), model(torch.ones(1, 4)).isnan())
    assert adapted_sites(other)["0[1:3]"].adapters["default"].rows.device.type == "cpu"


def test_what_changes_its_weight_in_place_is_refused():
    """RWKV divides its weights in its own forward: an error that says so, instead of a change that is lost."""

    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.read.weight.div_(2)
            return self.read(x)

    model = nn.Sequential(Divides())
    li.inject(model, ["read"], r=2)
    was = model[0].read.weight.clone()
    with pytest.raises(li.StateError, match=r"changes an adapted weight in place \(div_\)"):
        model(torch.randn(2, 4))
    assert torch.equal(model[0].read.weight, was)


def test_a_class_without_a_module_source():
    """A class made in a notebook cell, whose module has no file: its methods are read one by one."""
    import linecache

    from lorainject.targets.source_analysis import weight_use

    source = "class Cell(nn.Module):\n    def forward(this, x):\n        return [F.linear(x, l.weight) for i, l in enumerate(this.layers)][0]\n"
    linecache.cache["<cell 1>"] = (len(source), None, source.splitlines(True), "<cell 1>")
    names = {"nn": nn, "F": F, "__name__": "no_such_module"}
    exec(compile(source, "<cell 1>", "exec"), names)
    assert "layers.*.weight" in weight_use(names["Cell"]).reads


def test_comparisons_and_hash():
    """They are the dense sum's, not Python's identity."""
    model = Parent()
    li.inject(model, ["read"], r=2)
    seen = []
    model.called.register_forward_hook(
        lambda *_: seen.append((model.read.weight != 0).sum() + (abs(model.read.weight) > 0).sum())
    )
    model(torch.randn(2, 4))
    assert int(seen[0]) == 32
    assert hash(model.read.weight)


def test_a_forward_that_runs_later_is_refused():
    """A generator's body runs when the adapter is off again."""

    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(4, 4)

        def forward(self, x: Tensor):
            yield F.linear(x, self.read.weight)

    with pytest.raises(li.TargetError, match="forward reads it, and is a generator"):
        li.inject(nn.Sequential(Later()), ["read"])


def test_parameters_in_a_list():
    """The list has no forward: its parent is the reader."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ws = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.ws[0] @ self.ws[1]

    model, x = nn.Sequential(Listed()), torch.randn(2, 4)
    li.inject(model, "all-linear", r=2)
    randomise(model)
    assert li.probe(model, x).reached == ("0.ws.0", "0.ws.1")
    dense = copy.deepcopy(model)
    li.merge(dense)
    assert close(model(x), dense(x), 1e-5)


def replica(model: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes one, on the CPU: copies of the modules whose parameters are plain tensors."""
    modules = list(model.modules())
    copies = {id(m): m._replicate_for_data_parallel() for m in modules}
    for m in modules:
        own = copies[id(m)]
        own._modules |= {name: copies[id(child)] for name, child in m._modules.items()}
        for name, t in m._parameters.items():
            setattr(own, name, None if t is None else t * 1)
    return copies[id(model)]


def test_replicas_of_data_parallel(reader):
    """A replica reads its own copies, and shows them again."""
    twin, x = replica(reader), torch.randn(2, 4)
    assert torch.equal(twin(x), reader(x))
    assert type(twin[0].read.__dict__["weight"]) is Tensor
    assert not shadows(reader)
