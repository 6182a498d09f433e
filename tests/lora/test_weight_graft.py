"""The weight graft on real modules: experts, attention, recurrent layers, convolutions, weights that a parent reads.

Most tests compare an adapted module with a copy whose adapters were merged: the outputs must agree.
"""

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

from models import randomize, state
from moe_models import SIZES, gpt_oss, mixtral, moe_model, moe_output


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    """True if no element differs by more than the tolerance times the largest element of b."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def inject_random(model: nn.Module, targets: str | list[str] = "all-linear", r: int = 2) -> None:
    """Inject an adapter and draw random values for A and B."""
    li.inject(model, targets, r=r)
    randomize(model)


def merged_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model with its adapters merged."""
    twin = copy.deepcopy(model)
    li.merge(twin)
    return twin


def has_grafts(model: nn.Module) -> bool:
    return any(isinstance(m, Graft) for m in model.modules())


def shadowed_weights(model: nn.Module) -> list[str]:
    """Return the names of the parameters that a lazy weight shadows at the moment."""
    return [f"{path}.{name}" for path, m in model.named_modules() for name in m._parameters if name in m.__dict__]


both_models = pytest.mark.parametrize("build", [mixtral, gpt_oss])
implementations = pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])


@both_models
@implementations
def test_adapted_experts_equal_merged_experts(build, implementation):
    """Adapted experts compute what merged ones do, without a dense sum, and every stack is reached."""
    model = moe_model(build, implementation)
    before, y = state(model), moe_output(model)
    li.inject(model, ["experts"], r=4)
    assert close(moe_output(model), y, 1e-6)
    randomize(model)
    adapted = moe_output(model)
    assert not close(adapted, y, 0.01)
    reach = li.probe(model, input_ids=torch.arange(14).reshape(2, 7))
    assert not reach.dense
    assert len(reach.reached) == 4
    li.merge(model)
    assert not has_grafts(model)
    assert close(moe_output(model), adapted)
    li.unmerge(model)
    assert torch.equal(moe_output(model), adapted)
    assert state(li.eject(model)) == before


@pytest.mark.parametrize(
    ("build", "implementation", "dtype"),
    [
        (mixtral, "grouped_mm", torch.float32),
        (gpt_oss, "batched_mm", torch.float32),
        pytest.param(mixtral, "batched_mm", torch.float32, marks=pytest.mark.long),
        pytest.param(gpt_oss, "grouped_mm", torch.float32, marks=pytest.mark.long),
        *(
            pytest.param(build, implementation, torch.bfloat16, marks=pytest.mark.long)
            for build in (mixtral, gpt_oss)
            for implementation in ("batched_mm", "grouped_mm")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")  # in transformers
def test_experts_compile_as_one_graph(build, implementation, dtype):
    """torch.compile makes one graph of a model with adapted experts, and the graph's numbers are the same."""
    model = moe_model(build, implementation, dtype)
    inject_random(model, ["experts", "q_proj"], r=4)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert close(moe_output(compiled), moe_output(model), 1e-5 if dtype is torch.float32 else 3e-2)
    torch._dynamo.reset()


@implementations
def test_dropout_acts_on_experts_while_training_only(implementation):
    """LoRA dropout acts on the experts' inputs in train mode and not in eval mode."""
    model = moe_model(mixtral, implementation)
    li.inject(model, ["experts"], r=4, dropout=0.5)
    randomize(model)
    assert torch.equal(moe_output(model), moe_output(model))
    model.train()
    assert not torch.equal(moe_output(model), moe_output(model))


def test_bf16_experts_with_fp32_factors_keep_their_dtype():
    """On a bfloat16 base A and B are float32 and the output is bfloat16; under autocast adapted equals merged."""
    model = moe_model(mixtral, "grouped_mm", torch.bfloat16)
    inject_random(model, ["experts"], r=4)
    assert moe_output(model).dtype is torch.bfloat16
    assert all(p.dtype is torch.float32 for p in li.parameters(model))
    wide = moe_model(mixtral, "eager")
    inject_random(wide, ["experts"], r=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert close(moe_output(wide).float(), moe_output(merged_copy(wide)).float(), 0.1)


def test_probe_lists_experts_without_a_token():
    """probe names the experts of a stack that got no token, by number, and does not raise because of them."""
    model = moe_model(mixtral)
    inject_random(model, ["experts"], r=4)
    reach = li.probe(model, input_ids=torch.tensor([[5]]))
    assert len(reach.idle) == 2 * 2 * 6  # 2 layers, 2 stacks, 2 of 8 experts per token
    assert all(name.rpartition(", ")[0].endswith("_proj") for name in reach.idle)


def test_aria_experts_are_stored_transposed():
    """Aria stores its experts (E, in, out); A is still (E, r, in) and B (E, out, r)."""
    model = AriaTextModel(AriaTextConfig(**SIZES, moe_num_experts=4, moe_topk=2))
    experts = next(m for m in model.modules() if isinstance(m, AriaExperts))
    plan = {s.name.rsplit(".", 1)[-1]: s for s in li.find(model, ["experts"], r=4, layers=[0])}
    assert (plan["gate_up_proj"].kind, plan["gate_up_proj"].in_features) == ("experts^T", 32)
    li.inject(model, ["experts"], r=4)
    assert experts.lora_gate_up_proj["default"].A.shape == (4, 4, 32)
    assert experts.lora_gate_up_proj["default"].B.shape == (4, experts.gate_up_proj.shape[2], 4)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(batch_first, separate, training):
    """Fused and separate projections act, in train mode and in eval mode, where torch's fused kernel must not run."""
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(
        8, 2, batch_first=batch_first, kdim=6 if separate else None, vdim=7 if separate else None
    ).train(training)
    q, k, v = torch.randn(3, 5, 8), torch.randn(3, 5, 6 if separate else 8), torch.randn(3, 5, 7 if separate else 8)
    li.inject(mha, "all-linear", r=2)
    assert set(adapted_sites(mha)) == (
        {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"} if separate else {"in_proj_weight", "out_proj"}
    )
    randomize(mha)
    merged = merged_copy(mha)
    for options in (
        {},
        {"need_weights": False},
        {"attn_mask": torch.zeros(5, 5) if batch_first else torch.zeros(3, 3)},
    ):
        assert close(mha(q, k, v, **options)[0], merged(q, k, v, **options)[0], 1e-5)
    assert not li.probe(mha, q, k, v).dense


@pytest.mark.parametrize("targets", ["all-linear", ["linear1"], ["out_proj"], ["in_proj_weight[q,v]"]])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the merged encoder, whose kernel is torch's
def test_transformer_encoder(targets, training):
    """In eval mode torch's encoder hands its layers' weights to a fused kernel; the adapters act all the same."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0), 2).train(
        training
    )
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    inject_random(encoder, targets)
    merged = merged_copy(encoder)
    is_token = ~padding
    with torch.no_grad():
        assert close(encoder(x), merged(x), 1e-5)
        assert close(
            encoder(x, src_key_padding_mask=padding)[is_token], merged(x, src_key_padding_mask=padding)[is_token], 1e-5
        )


@pytest.mark.parametrize(
    "layer", [nn.LSTM(5, 4, 2, bidirectional=True), nn.GRU(5, 4), nn.RNN(5, 4), nn.LSTM(5, 4, proj_size=3)]
)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_recurrent_layers(layer):
    """Adapters on recurrent layers act and get gradients; probe says that the dense sum was formed for each of them."""
    layer = copy.deepcopy(layer)
    before, x = state(layer), torch.randn(6, 2, 5)
    inject_random(layer)
    merged = merged_copy(layer)
    assert close(layer(x)[0], merged(x)[0], 1e-5)
    reach = li.probe(layer, x)
    assert set(reach.dense) == set(adapted_sites(layer))
    assert "the dense sum was formed for" in str(reach)
    assert state(li.eject(layer)) == before


def bloom() -> nn.Module:
    """Return a Bloom that reads its weights slice by slice."""
    return BloomModel(
        BloomConfig(vocab_size=99, hidden_size=16, n_layer=1, n_head=2, slow_but_exact=True, pretraining_tp=2)
    )


def mobilebert() -> nn.Module:
    """Return a MobileBERT, whose head concatenates two weights."""
    return MobileBertForMaskedLM(
        MobileBertConfig(vocab_size=99, hidden_size=16, embedding_size=8, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=16, intra_bottleneck_size=8, true_hidden_size=8)
    )  # fmt: skip


def detr() -> nn.Module:
    """Return a DETR, whose mask head uses the weights of two linears as convolutions."""
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=[f"stage{i}" for i in range(1, 5)]
    )
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=16,
        decoder_ffn_dim=16, num_queries=4,
    )  # fmt: skip
    return DetrForSegmentation(config)


IDS = {"input_ids": torch.arange(6)[None]}
READ_BY_MODELS = {
    "bloom by slices": (bloom, ["dense", "dense_4h_to_h"], IDS, ()),
    "mobilebert, concatenated": (mobilebert, ["predictions.dense"], IDS, ("cat",)),
    "detr as a convolution": (
        detr, ["bbox_attention.q_proj", "bbox_attention.k_proj"], {"pixel_values": torch.randn(1, 3, 64, 64)}, (),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("build", "targets", "inputs", "functions"), [pytest.param(*case, id=name) for name, case in READ_BY_MODELS.items()]
)
def test_weights_that_models_read(build, targets, inputs, functions):
    """inject finds the readers in the source of the model's classes; adapted weights act as merged ones do.

    Only the listed functions need the dense sum.
    """
    torch.manual_seed(0)
    model = build().eval()
    before = state(model)
    inject_random(model, targets)
    merged = merged_copy(model)
    with torch.no_grad():
        for a, b in zip(model(**inputs).to_tuple(), merged(**inputs).to_tuple(), strict=True):
            assert not isinstance(a, Tensor) or close(a, b)
    assert set().union(*li.probe(model, **inputs).dense.values()) == set(functions)
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
    "GRUCell": (nn.GRUCell(4, 5), [(2, 4), (2, 5)]),
    "LSTMCell": (nn.LSTMCell(4, 5), [(2, 4)]),
    "RNNCell": (nn.RNNCell(4, 5), [(2, 4), (2, 5)]),
    "Bilinear": (nn.Bilinear(4, 5, 3), [(2, 4), (2, 5)]),
}


@pytest.mark.parametrize(("layer", "shape"), [pytest.param(*case, id=name) for name, case in CONVOLUTIONS.items()])
def test_convolutions(layer, shape, tmp_path):
    """Adapted convolutions equal merged and loaded ones; W0 comes back to the bit and in its memory format."""
    torch.manual_seed(0)
    model, x = nn.Sequential(copy.deepcopy(layer)), torch.randn(shape)
    before, fresh = state(model), copy.deepcopy(model)
    inject_random(model, "all-conv")
    y = model(x)
    assert not li.probe(model, x).dense
    assert torch.equal(li.load(fresh, li.save(model, tmp_path / "a.safetensors"))(x), y)
    li.merge(model)
    assert close(model(x), y, 1e-5)
    li.unmerge(model)
    assert model[0].weight.stride() == layer.weight.stride()
    assert state(li.eject(model)) == before


@pytest.mark.parametrize(("layer", "shapes"), [pytest.param(*case, id=name) for name, case in CELLS.items()])
def test_cells_and_bilinear(layer, shapes):
    """Cells and bilinear layers use the dense sum, which is exact and counted as a fallback."""
    torch.manual_seed(0)
    layer, inputs = copy.deepcopy(layer), [torch.randn(shape) for shape in shapes]
    before = state(layer)
    inject_random(layer)
    merged = merged_copy(layer)
    output, expected = (y[0] if isinstance(y, tuple) else y for y in (layer(*inputs), merged(*inputs)))
    assert close(output, expected, 1e-5)
    output.sum().backward()
    assert any(site.adapters.fallbacks for site in adapted_sites(layer).values())
    assert any(bool(p.grad.any()) for p in li.parameters(layer))
    assert state(li.eject(layer)) == before


class Parent(nn.Module):
    """A module that calls `called`, reads `read`, and reads `hidden` in a way that its source does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.hidden = (nn.Linear(4, 4) for _ in range(3))
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.called(x), self.read.weight)
        if self.fail:
            raise RuntimeError("on purpose")
        return F.linear(x, next(p for name, p in self.hidden.named_parameters() if name == "weight"))


class DynamicReader(Parent):
    """A parent that reads a layer's weight by a name that is put together at run time."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self, "hid" + "den").weight)


def test_probe_names_a_read_that_the_source_does_not_show():
    """probe raises and says how to inject instead: with the weight itself as target, which works for every reader."""
    model = nn.Sequential(DynamicReader())
    li.inject(model, ["hidden"], r=2)
    x = torch.randn(2, 4)
    with pytest.raises(
        li.UnreachedAdapter,
        match=r"0\.hidden: its weight acts without .*\n=> eject, and inject with .*targets=\['0\.hidden\.weight'\]",
    ):
        li.probe(model, x)
    li.eject(model)
    before = state(model)
    inject_random(model, ["0.hidden.weight"])
    assert li.probe(model, x).reached == ("0.hidden",)
    merged = merged_copy(model)
    assert close(model(x), merged(x), 1e-5)
    assert state(li.eject(model)) == before


def test_a_weight_named_as_target_is_named_again_after_load(tmp_path):
    """A file keeps that the weight itself was the target, so a loaded adapter works for every reader too."""
    model = nn.Sequential(DynamicReader())
    fresh = copy.deepcopy(model)
    inject_random(model, ["0.hidden.weight"])
    li.load(fresh, li.save(model, tmp_path / "a.safetensors"))
    x = torch.randn(2, 4)
    assert torch.equal(fresh(x), model(x))
    assert li.probe(fresh, x)


def test_a_forward_that_raises_leaves_no_shadow():
    """After a forward that raised, the weight is the parameter again."""
    model = Parent()
    li.inject(model, ["read", "called"], r=2)
    model.fail = True
    with pytest.raises(RuntimeError, match="on purpose"):
        model(torch.randn(2, 4))
    assert not shadowed_weights(model)
    assert type(model.read.weight) is nn.Parameter


def test_a_weight_is_lazy_only_while_the_reader_runs():
    """While the reader runs the weight is the lazy sum; otherwise it is W0, as FSDP and optimizers need it."""
    model = nn.Sequential(Parent())
    li.inject(model, ["read"], r=2)
    seen = []
    model[0].called.register_forward_hook(lambda *_: seen.append(type(model[0].read.weight).__name__))
    model(torch.randn(2, 4))
    assert seen == ["ShadowedWeight"]
    assert type(model[0].read.weight) is nn.Parameter
    x = torch.randn(2, 4)
    with li.disabled(model):
        y = model(x)
    assert torch.equal(y, li.eject(model)(x))


def test_a_shared_layer_that_two_parents_read():
    """A layer that two parents share gets one adapter, which acts in both parents."""
    first, second = Parent(), Parent()
    second.read = first.read
    model = nn.Sequential(first, second)
    before, x = state(model), torch.randn(2, 4)
    inject_random(model, ["read"])
    merged = merged_copy(model)
    assert len(adapted_sites(model)) == 1
    assert close(model(x), merged(x), 1e-5)
    assert close(second(x), merged[1](x), 1e-5)
    assert state(li.eject(model)) == before


def test_gradient_checkpointing_gives_the_same_gradients():
    """A forward that runs again in the backward gives the gradients of a plain one, reentrant or not."""
    model = nn.Sequential(Parent())
    inject_random(model, ["read"])
    x = torch.randn(2, 4, requires_grad=True)
    expected = torch.autograd.grad(model(x).sum(), list(li.parameters(model)))
    recomputed = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sum(), list(li.parameters(model)))
    checkpoint(model, x, use_reentrant=True).sum().backward()
    reentrant = [p.grad for p in li.parameters(model)]
    for gradients in (recomputed, reentrant):
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert not shadowed_weights(model)


def test_concurrent_forwards_all_see_the_sum():
    """Forwards in several threads see the sum: the first to return does not unshadow the weight for the others."""
    model = nn.Sequential(*[Parent() for _ in range(3)])
    inject_random(model, ["read"])
    x = torch.randn(2, 4)
    with torch.no_grad():
        expected = model(x)
    wrong: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            for _ in range(200):
                if not torch.equal(y := model(x), expected):
                    wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert not shadowed_weights(model)


def test_copies_are_independent():
    """Training a deep copy or an unpickled copy does not change the original."""
    model = moe_model(mixtral)
    inject_random(model, ["experts"], r=4)
    y = moe_output(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(moe_output(twin), y)
        randomize(twin, seed=1)
        assert not torch.equal(moe_output(twin), y)
        assert torch.equal(moe_output(model), y)


@both_models
@implementations
def test_rows_choose_adapters_of_experts(build, implementation):
    """Within rows each row has the output and the gradients that it has alone with its adapter, experts included."""
    model = moe_model(build, implementation)
    x = torch.randint(0, 50, (3, 5), generator=torch.Generator().manual_seed(1))
    for seed, name in enumerate("ab"):
        li.inject(model, ["experts", "attention"], r=4, name=name)
        randomize(model, name, seed=seed)
    li.activate(model, "a", "b")

    def alone(row: int, name: str | None) -> torch.Tensor:
        with li.using(model, *([name] if name else [])):
            return model(input_ids=x[row : row + 1], use_cache=False).last_hidden_state[0]

    names = ["b", None, "a"]
    expected = torch.stack([alone(i, name) for i, name in enumerate(names)])
    expected.square().sum().backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with li.rows(model, names):
        output = model(input_ids=x, use_cache=False).last_hidden_state
        output.square().sum().backward()
    assert close(output, expected)
    for k, p in model.named_parameters():
        assert (p.grad is not None) == (k in grads)
        assert p.grad is None or close(p.grad, grads[k])
    with torch.no_grad(), li.rows(model, names):
        assert close(model(input_ids=x, use_cache=False).last_hidden_state, expected)


def test_rows_are_refused_where_the_batch_cannot_be_seen():
    """Within rows a module raises if its input is not certain to be the batch, unless all rows use the base model."""
    model = moe_model(mixtral)
    li.inject(model, ["experts"], r=4, name="a")
    experts = model.layers[0].mlp.experts
    with (
        li.rows(model, ["a", None]),
        pytest.raises(li.StateError, match=r"a MixtralExperts with adapters got inputs of the shapes \(5, 32\)"),
    ):
        experts(torch.randn(5, 32), torch.zeros(5, 2, dtype=torch.long), torch.ones(5, 2))
    with li.rows(model, ["a", None]), pytest.raises(li.StateError, match="not certain to be the tokens of these rows"):
        experts(torch.randn(4, 32))
    assert not shadowed_weights(model)
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
    """Two adapters on one stack of experts add up, merge and unmerge together, and are ejected one by one."""
    model = moe_model(mixtral)
    li.inject(model, ["experts"], r=4, name="a")
    li.inject(model, ["down_proj"], r=2, name="b")
    randomize(model, "a")
    randomize(model, "b", seed=1)
    li.activate(model, "a", "b")
    y = moe_output(model)
    li.merge(model)
    assert close(moe_output(model), y)
    li.unmerge(model)
    li.eject(model, "b")
    assert len(adapted_sites(model)) == 4
    assert not any("b" in site.adapters for site in adapted_sites(model).values())
    assert li.activate(model, "a") is None
    li.eject(model)
    assert not has_grafts(model)


def test_a_layer_in_a_plain_list_is_adapted():
    """A layer that its parent keeps in a plain Python list is the same object, so it is adapted there too."""

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


def test_a_linear_subclass_with_another_forward():
    """The forward of a router, which scales and returns a tuple, computes with the sum."""

    class Router(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = F.linear(x, self.weight) * 2
            return logits, logits.softmax(-1)

    model = Router(4, 3)
    x = torch.randn(2, 4)
    li.inject(nn.Sequential(model), ["0"], r=2)
    randomize(model)
    merged = merged_copy(model)
    assert close(model(x)[0], merged(x)[0], 1e-5)
    assert close(model(x)[1], merged(x)[1], 1e-5)


class Reader(nn.Module):
    """A module that reads a weight, and calls a function in the middle of its forward."""

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
    model = nn.Sequential(Reader())
    inject_random(model, ["read"])
    return model


def test_a_nested_forward_has_its_settings(reader):
    """The active adapters and the grad mode count at each use of a weight: an inner forward may train."""
    x, checks = torch.randn(2, 4), []
    with torch.no_grad():
        expected = reader(x)
        with li.disabled(reader):
            base = reader(x)

    def train() -> None:
        reader[0].meanwhile = lambda: None
        with torch.enable_grad():
            reader(x).sum().backward()
            checks.append(bool(reader[0].read.lora["default"].A.grad.any()))
        with li.disabled(reader):
            checks.append(torch.equal(reader(x), base))

    reader[0].meanwhile = train
    with torch.no_grad():
        assert torch.equal(reader(x), expected)
    assert checks == [True, True]
    assert not shadowed_weights(reader)


def test_eject_in_the_middle_of_a_forward(reader):
    """A forward during which the adapter is ejected goes on with the base, and no shadow is left."""
    x = torch.randn(2, 4)
    reader[0].meanwhile = lambda: li.eject(reader)
    y = reader(x)
    reader[0].meanwhile = lambda: None
    assert torch.equal(y, reader(x))
    assert not shadowed_weights(reader)
    assert type(reader[0]) is Reader


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_with_a_graph_break(reader):
    """A graph that was compiled while no adapter was active is not used when one is, nor the reverse."""
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


def test_a_compiled_submodule_is_adapted_and_ejected():
    """The weights of a submodule that was compiled alone are adapted, and eject restores it."""
    model = nn.Sequential(nn.Linear(4, 4), torch.compile(Parent(), backend="eager"))
    inject_random(model, ["read"])
    merged = merged_copy(model)
    x = torch.randn(2, 4)
    assert close(model(x), merged(x), 1e-5)
    li.eject(model)
    assert not has_grafts(model)
    torch._dynamo.reset()


def test_a_later_inject_adds_the_readers():
    """A layer that was injected alone gets its readers when the model that contains it is injected."""
    model = nn.Sequential(Parent())
    li.inject(model[0].read, [lambda path, module: True], r=2, name="a")
    li.inject(model, ["read"], r=2, name="b")
    randomize(model, "b")
    assert li.probe(model, torch.randn(2, 4)).reached == ("0.read",)
    li.eject(model)
    assert not has_grafts(model)


def test_the_rows_of_a_slice_leave_meta_with_the_factors():
    """The row numbers of a slice are no part of the state dict; they are set when A and B leave the meta device."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6))
    li.inject(model, ["0[1:3]"], r=2)
    model.to_empty(device="cpu")
    li.reset(model)
    assert adapted_sites(model)["0[1:3]"].adapters["default"].rows.tolist() == [1, 2]
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(4, 6))
    li.inject(other, ["0[1:3]"], r=2)
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(torch.ones(1, 4)).isnan(), model(torch.ones(1, 4)).isnan())
    assert adapted_sites(other)["0[1:3]"].adapters["default"].rows.device.type == "cpu"


def test_a_forward_that_changes_a_weight_in_place_raises():
    """A write that the source of the forward does not show raises with an adapter, instead of losing the change.

    What the source shows is refused by inject (test_weights_that_a_forward_writes_to_are_refused).
    """

    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                halve(self.read.weight)
            return self.read(x)

    def halve(weight: Tensor) -> None:
        weight.div_(2)

    model = nn.Sequential(Divides())
    li.inject(model, ["read"], r=2)
    before = model[0].read.weight.clone()
    with pytest.raises(li.StateError, match=r"changes an adapted weight in place \(div_\)"):
        model(torch.randn(2, 4))
    assert torch.equal(model[0].read.weight, before)


def test_comparisons_use_the_dense_sum():
    """Comparing a weight while its reader runs compares the sum's elements; the weight can still be hashed."""
    model = Parent()
    li.inject(model, ["read"], r=2)
    seen = []
    model.called.register_forward_hook(
        lambda *_: seen.append((model.read.weight != 0).sum() + (abs(model.read.weight) > 0).sum())
    )
    model(torch.randn(2, 4))
    assert int(seen[0]) == 32
    assert hash(model.read.weight)


def test_a_generator_that_reads_a_weight_is_refused():
    """inject refuses a weight that a generator reads, because its body runs after the weight is unshadowed."""

    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(4, 4)

        def forward(self, x: Tensor):
            yield F.linear(x, self.read.weight)

    with pytest.raises(li.TargetError, match="forward reads it, and is a generator"):
        li.inject(nn.Sequential(Later()), ["read"])


def test_parameters_in_a_list():
    """The reader of the parameters in a ParameterList is its parent, since the list has no forward."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ws = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.ws[0] @ self.ws[1]

    model, x = nn.Sequential(Listed()), torch.randn(2, 4)
    inject_random(model)
    assert li.probe(model, x).reached == ("0.ws.0", "0.ws.1")
    merged = merged_copy(model)
    assert close(model(x), merged(x), 1e-5)


def replica(model: nn.Module) -> nn.Module:
    """Return what torch.nn.parallel.replicate returns for one device, here on the CPU: parameters are plain tensors."""
    modules = list(model.modules())
    copies = {id(m): m._replicate_for_data_parallel() for m in modules}
    for m in modules:
        twin = copies[id(m)]
        twin._modules |= {name: copies[id(child)] for name, child in m._modules.items()}
        for name, t in m._parameters.items():
            setattr(twin, name, None if t is None else t * 1)
    return copies[id(model)]


def test_replicas_of_data_parallel_read_their_copies(reader):
    """A replica reads the sum with its copy of the parameter, which is in place again after the forward."""
    twin, x = replica(reader), torch.randn(2, 4)
    assert torch.equal(twin(x), reader(x))
    assert type(twin[0].read.__dict__["weight"]) is Tensor
    assert not shadowed_weights(reader)
