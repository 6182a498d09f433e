"""What trains besides A and B: modules_to_save, biases, rows of tokens, magnitudes; and how A and B begin."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import lorainject as li
from lorainject.lora.model_index import ModelIndex, adapted_sites
from lorainject.lora.offset import OffsetAdapter

from models import gpt2, ids, llama, state

X = {"input_ids": ids()}
EXTRAS: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ["classifier"]},
    "norms and a head": {"modules_to_save": ["LayerNorm", "classifier"]},
    "all biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only", "modules_to_save": ["classifier"]},
    "tokens": {"trainable_tokens": {"word_embeddings": X["input_ids"][0, :3].tolist()}},
    "dora": {"dora": True},
    "dora and a head": {"dora": True, "modules_to_save": ["classifier"]},
}


def bert(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                        num_labels=3, initializer_range=0.3, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0)  # fmt: skip
    return BertForSequenceClassification(config).to(dtype).eval()


def inject(model: nn.Module, **settings: Any) -> nn.Module:
    torch.manual_seed(1)
    return li.inject(model, ["query", "value"], r=4, alpha=8, **settings)


def train(model: nn.Module, steps: int = 3, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """Take some steps, with Adam unless an optimizer is given; return the losses."""
    names = ModelIndex(model).default
    optimizer = optimizer or torch.optim.Adam(li.parameters(model, names), lr=0.03)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(**X).logits, torch.tensor([0, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_training(model: nn.Module, peft: nn.Module) -> None:
    """Both have the same loss in each of ten steps with SGD, in float64."""
    parameters = [p for p in peft.parameters() if p.requires_grad]
    losses, expected = (
        train(m, 10, torch.optim.SGD(p, lr=0.5)) for m, p in ((model, li.parameters(model)), (peft, parameters))
    )
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    assert max(losses) - min(losses) > 1e-4


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**X).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_what_trains_with_an_adapter_keeps_all_laws(extras, dtype, tmp_path):
    """The output does not change at inject; the extras train, are saved, loaded, switched, merged and ejected with the
    adapter; and the base keeps its own values, to the bit."""
    model = bert(dtype)
    before, y0 = state(model), logits(model)
    plan = li.find(model, ["query", "value"], r=4, alpha=8, **extras)
    inject(model, **extras)
    assert torch.equal(logits(model), y0)
    assert plan.trainable == sum(p.numel() for p in dict.fromkeys(li.parameters(model)))
    values = {id(p): p.detach().clone() for p in li.parameters(model)}
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, values[id(p)]) for p in li.parameters(model))
    y = logits(model)
    assert not torch.allclose(y, y0, atol=1e-2)
    with li.disabled(model):
        assert torch.equal(logits(model), y0)

    li.save(model, tmp_path / "a")
    fresh = li.load(bert(dtype), tmp_path / "a")
    assert torch.equal(logits(fresh), y)
    li.save(fresh, tmp_path / "b")
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)

    li.merge(model)
    torch.testing.assert_close(logits(model), y, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0)
    li.unmerge(model)
    assert torch.equal(logits(model), y)
    li.eject(model)
    assert torch.equal(logits(model), y0)
    assert state(model) == before


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_peft_reads_what_trained(extras, tmp_path):
    """PEFT computes the same from the saved directory."""
    model = inject(bert(), **extras)
    train(model)
    li.save(model, tmp_path / "a")
    peft = PeftModel.from_pretrained(bert(), tmp_path / "a").eval()
    torch.testing.assert_close(logits(peft), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"modules_to_save": ["classifier"]}, {"bias": "all"}, {"bias": "lora_only"},
                                      {"use_dora": True}], ids=str)  # fmt: skip
def test_training_is_that_of_peft(settings):
    """With the same A, every step has the same loss as PEFT's."""
    ours = {"dora" if key == "use_dora" else key: value for key, value in settings.items()}
    model = inject(bert(torch.float64), **ours)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], **settings)
    peft = get_peft_model(bert(torch.float64), config).eval()
    sites = adapted_sites(model)
    for name, module in peft.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            site = sites[name.removeprefix("base_model.model.")]
            module.lora_A["default"].weight.data.copy_(site.adapters["default"].A)
    assert_same_training(model, peft)


def test_several_adapters_have_heads_each(tmp_path):
    """A head is switched with its adapter."""
    model = inject(bert(), modules_to_save=["classifier"], name="a")
    train(model)
    a = logits(model)
    inject(model, modules_to_save=["classifier"], name="b")
    train(model, 5)
    b = logits(model)
    li.activate(model, "a")
    assert torch.equal(logits(model), a)
    with li.using(model, "b"):
        assert torch.equal(logits(model), b)
    li.save(model, tmp_path / "b", "b")
    li.eject(model, "b")
    assert torch.equal(logits(model), a)
    assert torch.equal(logits(li.load(bert(), tmp_path / "b")), b)


def test_tokens_of_a_tied_embedding_train_in_both_places(tmp_path):
    """Rows of an embedding that is tied to the head are the same in the head, and are saved once."""
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True)
    li.inject(model, ["q_proj"], r=4, trainable_tokens={"embed_tokens": [3, 5]})
    tensors = [p for p in dict.fromkeys(li.parameters(model)) if p.shape == (2, 32)]
    assert len(tensors) == 1
    loss = model(**X, labels=X["input_ids"]).loss
    loss.backward()
    with torch.no_grad():
        tensors[0].add_(1)
    li.save(model, tmp_path / "a")
    torch.manual_seed(0)
    fresh = li.load(llama(tie_word_embeddings=True), tmp_path / "a")
    assert torch.equal(logits(fresh), logits(model))


def test_plan_and_model_say_what_trains():
    """The table of the plan has a line for each setting."""
    plan = str(li.find(bert(), ["query"], modules_to_save=["classifier"], bias="lora_only"))
    assert "trains as well (modules_to_save): classifier, classifier.bias: 99" in plan
    assert "trains as well (bias): bert.encoder.layer.*.attention.self.query.bias: 64" in plan


def test_all_problems_of_trained_tensors_are_listed():
    """Everything wrong is said at once, and nothing is changed."""
    model = llama(tie_word_embeddings=True)
    before = state(model)
    with pytest.raises(li.TargetError) as e:
        li.inject(model, ["q_proj"], modules_to_save=["lm_head", "nonsense"],
                  trainable_tokens={"embed_tokens": [99], "q_proj": [1]})  # fmt: skip
    message = str(e.value)
    assert "lm_head is tied to model.embed_tokens" in message
    assert "modules_to_save 'nonsense' matches no module" in message
    assert "model.embed_tokens has the rows 0 to 98, but not 99" in message
    assert "trainable_tokens 'q_proj' matches no embedding" in message
    assert state(model) == before
    with pytest.raises(li.TargetError, match=r"q_proj.*exclude|q_proj.*modules_to_save"):
        li.inject(model, ["q_proj"], modules_to_save=["q_proj"])
    with pytest.raises(li.SpecError, match=r"(?s)trainable_tokens.*different row numbers.*bias must be"):
        li.LoraSpec(targets=["q"], bias="some", trainable_tokens={"embed_tokens": [1, 1]})


def test_other_parameters_that_train_are_named_with_the_way_to_save_them(tmp_path):
    """save does not write a head that was thawed by hand, and says how it would be."""
    model = inject(bert())
    model.classifier.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"classifier\.weight.*modules_to_save"):
        li.save(model, tmp_path / "a")


# Initial values


def draw(A: Tensor, B: Tensor, W0: Tensor) -> None:
    A.copy_(W0[: A.shape[0]])
    B.fill_(0.25)


INITS = {"pissa": "pissa", "olora": "olora", "orthogonal": "orthogonal", "function": draw}


@pytest.mark.parametrize("init", INITS.values(), ids=INITS)
@pytest.mark.parametrize("make", [lambda: (gpt2(), ["c_attn[q,v]", "c_fc"]), lambda: (llama(), ["q_proj", "up_proj"])],
                         ids=["gpt2", "llama"])  # fmt: skip
def test_the_base_is_not_changed_by_any_init(make, init, tmp_path):
    """B A is not zero, but the output is the base's to the bit, and W0 is the base's own."""
    torch.manual_seed(0)
    model, targets = make()
    before, y0 = state(model), logits(model)
    torch.manual_seed(0)
    li.inject(model, targets, r=4, alpha=8, init=init, scaling="rslora")
    assert torch.equal(logits(model), y0)
    for site in adapted_sites(model).values():
        adapter = site.adapters["default"]
        assert isinstance(adapter, OffsetAdapter)
        assert adapter.B.any()
    optimizer = torch.optim.SGD(li.parameters(model), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**X, labels=X["input_ids"]).loss.backward()
        optimizer.step()
    y = logits(model)
    assert not torch.equal(y, y0)
    li.save(model, tmp_path / "a")
    torch.manual_seed(0)
    fresh = li.load(make()[0], tmp_path / "a")
    assert torch.equal(logits(fresh), y)
    assert sum(p.numel() for p in li.parameters(fresh)) == sum(p.numel() for p in li.parameters(model))
    li.save(fresh, tmp_path / "b")
    tensors = "adapter_model.safetensors"
    assert (tmp_path / "a" / tensors).read_bytes() == (tmp_path / "b" / tensors).read_bytes()
    li.rescale(model, alpha=4)
    li.rescale(model, alpha=8)
    li.merge(model)
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=0)
    li.eject(model)
    assert state(model) == before


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_init_is_that_of_peft(init):
    """A and B are PEFT's (up to the signs of singular vectors), and 5 steps of training give the same losses."""
    torch.manual_seed(0)
    model = li.inject(bert(), ["query", "value"], r=4, alpha=8, init=init)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], init_lora_weights=init)
    peft = get_peft_model(bert(), config).eval()
    model.double(), peft.double()  # the initial values of PEFT are in float32
    for name, site in adapted_sites(model).items():
        layer, adapter = peft.base_model.model.get_submodule(name), site.adapters["default"]
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if init != "orthogonal":
            torch.testing.assert_close(B @ A, adapter.B @ adapter.A, atol=1e-5, rtol=0)
        with torch.no_grad():
            adapter.A.copy_(A), adapter.B.copy_(B), adapter.start.A.copy_(A), adapter.start.B.copy_(B)
    assert_same_training(model, peft)


def test_orthogonal_factors_have_no_product():
    """B A is zero but for rounding, as its source says."""
    model = li.inject(bert(), ["query"], r=4, init="orthogonal")
    for site in adapted_sites(model).values():
        adapter = site.adapters["default"]
        assert (adapter.B @ adapter.A).abs().max() < 1e-6
        assert 0.02 < adapter.A.std() < 0.15


@pytest.mark.parametrize("extras", [{"init": "pissa"}, *EXTRAS.values()], ids=["pissa", *EXTRAS])
def test_reset_gives_the_values_of_inject(extras):
    """After reset the output is the base's again."""
    model = bert()
    y0 = logits(model)
    inject(model, **extras)
    train(model)
    li.reset(model)
    assert torch.equal(logits(model), y0)


def test_an_adapter_of_a_function_is_not_reset_from_its_file(tmp_path):
    """The function is not in the file."""
    li.save(inject(bert(), init=draw), tmp_path / "a")
    model = li.load(bert(), tmp_path / "a")
    with pytest.raises(li.StateError, match="initialized by a function"):
        li.reset(model)


def test_dropout_is_one_mask_for_both_terms():
    """Training with dropout starts from the base's output too."""
    model = inject(bert(), init="pissa", dropout=0.5)
    y0 = logits(bert())
    model.train()
    assert torch.equal(logits(model), y0)


def test_inits_and_dora_that_do_not_fit_are_refused():
    """The weights, with the reasons, are all named."""
    model = bert()
    with pytest.raises(li.TargetError, match=r"query: init='pissa' needs a rank of at most 32, not 64"):
        li.inject(model, ["query"], r=64, init="pissa")
    with pytest.raises(li.TargetError, match=r"query: init='orthogonal' needs an even rank, not 3"):
        li.inject(model, ["query"], r=3, init="orthogonal")
    with pytest.raises(li.TargetError, match=r"word_embeddings: init='olora' is not for embeddings"):
        li.inject(model, ["word_embeddings"], r=4, init="olora")
    with pytest.raises(li.SpecError, match=r"dora goes with init 'kaiming' or 'gaussian'"):
        li.inject(model, ["query"], dora=True, init="pissa")
    assert state(model) == state(bert())


def test_a_copy_trains_apart():
    """A deep copy has its own trained tensors and initial factors."""
    for extras in ({"init": "pissa"}, {"modules_to_save": ["classifier"], "dora": True}):
        model = inject(bert(), **extras)
        twin = copy.deepcopy(model)
        before = logits(model)
        train(twin)
        assert torch.equal(logits(model), before)
        assert not torch.equal(logits(twin), before)
