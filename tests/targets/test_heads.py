"""Which weights "all-linear" leaves out: output heads, found by what they are, and layers that cannot carry an
adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import lorainject as li

from models import state

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 19,
    "max_position_embeddings": 16,
}  # fmt: skip
VISION = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
VISION |= {"image_size": 8, "patch_size": 4}
T5 = {"vocab_size": 19, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
LXMERT = {
    "vocab_size": 19, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "l_layers": 1,
    "x_layers": 1, "r_layers": 1, "visual_feat_dim": 8, "num_qa_labels": 5,
    "num_object_labels": 4, "num_attr_labels": 4,
}  # fmt: skip
FSMT = {
    "langs": ["en", "de"], "src_vocab_size": 19, "tgt_vocab_size": 19, "d_model": 16, "encoder_layers": 1,
    "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}  # fmt: skip
DECODER = {f"decoder_{k}": VISION[k] for k in VISION if k in ("hidden_size", "num_attention_heads",
                                                               "num_hidden_layers", "intermediate_size")}  # fmt: skip
BERT_HEADS = ("cls.predictions.transform.dense", "cls.predictions.decoder")

HEADS = {
    "LlamaForCausalLM": (SIZES, ("lm_head",)),
    "BertForSequenceClassification": (SIZES, ("classifier",)),
    "BertForPreTraining": (SIZES, (*BERT_HEADS, "cls.seq_relationship")),
    "VisualBertForRegionToPhraseAlignment": (SIZES | {"visual_embedding_dim": 8},
                                             (*BERT_HEADS, "cls.seq_relationship")),
    "RobertaForSequenceClassification": (SIZES, ("classifier.dense", "classifier.out_proj")),
    "DistilBertForSequenceClassification": ({"vocab_size": 19, "dim": 16, "hidden_dim": 16, "n_layers": 1,
                                             "n_heads": 2}, ("pre_classifier", "classifier")),
    "T5ForQuestionAnswering": (T5, ("qa_outputs",)),
    "LxmertForPreTraining": (LXMERT, (*BERT_HEADS, "cls.seq_relationship", "obj_predict_head.transform.dense",
                                      "obj_predict_head.decoder_dict.obj", "obj_predict_head.decoder_dict.attr",
                                      "obj_predict_head.decoder_dict.feat", "answer_head.logit_fc.0",
                                      "answer_head.logit_fc.3")),
    "FSMTForConditionalGeneration": (FSMT, ("model.decoder.output_projection",)),
    "FSMTModel": (FSMT, ("decoder.output_projection",)),
    "CLIPForImageClassification": ({"vision_config": VISION, "text_config": SIZES}, ("classifier",)),
    "SiglipForImageClassification": ({"vision_config": VISION, "text_config": SIZES}, ("classifier",)),
    "VideoMAEForPreTraining": (VISION | DECODER | {"num_frames": 2}, ("decoder.head",)),
    "ViTMAEForPreTraining": (VISION | DECODER, ("decoder.decoder_pred",)),
    "BertModel": (SIZES, ()),
    "CLIPModel": ({"vision_config": VISION, "text_config": SIZES}, ()),
    "AltCLIPModel": ({"vision_config": VISION, "text_config": SIZES}, ()),
}  # fmt: skip


def build(name: str, device: str = "meta") -> nn.Module:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    with torch.device(device):
        return cls(cls.config_class(**HEADS[name][0])).eval()


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_what_leaves_a_model(name):
    """all-linear leaves out exactly the layers whose output leaves a task's model, or that are tied to the word
    embeddings, and takes every layer in the middle; a base model has no other head."""
    model = build(name)
    plan = li.find(model, "all-linear")
    assert tuple(plan.left_out) == HEADS[name][1]
    assert all(reason.startswith("output head: ") for reason in plan.left_out.values())
    linear = {path for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {site.path for site in plan} >= linear - plan.left_out.keys()


def test_a_wrapped_model_has_the_heads_of_the_model():
    """The heads of a model are found wherever it is in the module that is injected."""
    assert tuple(li.find(nn.ModuleDict({"a": build("T5ForQuestionAnswering")}), "all-linear").left_out) == (
        "a.qa_outputs",
    )


def test_find_reads_no_values_and_changes_nothing():
    """Heads are found on the meta device, and find leaves the model as it was."""
    model = build("CLIPForImageClassification", "cpu")
    before = state(model)
    li.find(model, "all-linear")
    assert state(model) == before


@pytest.mark.parametrize("name", ["CLIPForImageClassification", "T5ForQuestionAnswering",
                                  "DistilBertForSequenceClassification"])  # fmt: skip
def test_an_adapter_loads_onto_a_fresh_classifier(name, tmp_path: Path):
    """What all-linear adapts is the pretrained part: an adapter loads onto the same base with another new head."""
    model, fresh = build(name, "cpu"), build(name, "cpu")
    path = li.save(li.inject(model, "all-linear", r=2), tmp_path / "adapter")
    for head in HEADS[name][1]:
        nn.init.normal_(fresh.get_submodule(head).weight)
    assert len(list(li.deltas(li.load(fresh, path)))) == len(list(li.deltas(model)))


def test_a_model_whose_only_linear_is_its_head_says_so():
    """The error of all-linear names the head that is all that multiplies."""
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    model = transformers.ResNetForImageClassification(config)
    with pytest.raises(li.TargetError, match=r"all that multiplies is left out: classifier\.1 \(output head: "):
        li.inject(model, "all-linear")
    li.inject(model, ["head"])


class Packed(nn.Module):
    """Multiplies by a packed weight, and does not say its sizes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(size, size, dtype=torch.uint8))

    def forward(self, x):
        return x @ self.qweight.to(x.dtype).T


def with_unsupported() -> nn.Module:
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "packed": Packed(4), "float8": nn.Linear(4, 4)})
    model["float8"].weight = nn.Parameter(model["float8"].weight.to(torch.float8_e4m3fn), requires_grad=False)
    return model


def test_linear_layers_that_cannot_carry_an_adapter_are_named():
    """all-linear adapts the rest; the plan names each layer with the reason, and inject warns of it."""
    model = with_unsupported()
    plan = li.find(model, "all-linear", r=2)
    assert [site.path for site in plan] == ["plain"]
    assert plan.unsupported == plan.left_out
    assert plan.left_out["packed"] == "a Packed keeps its weight in a form that cannot carry an adapter"
    assert plan.left_out["float8"].startswith("its weight is torch.float8_e4m3fn")
    assert "left out: packed (a Packed keeps" in str(plan)
    with pytest.warns(UserWarning, match=r"2 layers were left out, and will not train: .*float8.*packed"):
        li.inject(model, "all-linear", r=2)


def test_nothing_but_unsupported_layers_is_an_error():
    """Where all-linear leaves nothing, the error names every layer with the reason."""
    with pytest.raises(li.TargetError, match=r"all that multiplies is left out: 0 \(a Packed keeps its weight"):
        li.inject(nn.Sequential(Packed(4)), "all-linear")


class Rescaling(nn.Module):
    """Rescales the weights of its blocks in place in eval mode, as RWKV does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.other = nn.Linear(4, 4)

    def forward(self, x):
        self._rescale()
        for block in self.blocks:
            x = block(x)
        return self.other(x)

    def _rescale(self) -> None:
        for i, block in enumerate(self.blocks):
            block.weight.data.div_(2**i)

    def halve(self) -> None:
        """Write to a weight, but not in a forward."""
        self.other.weight.data.mul_(0.5)


class Overwriting(nn.Module):
    """Assigns to its weight in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        self.layer.weight.data[0] *= 0.5
        return self.layer(x)


def test_weights_that_a_forward_writes_to_are_refused():
    """A weight that the model's forward changes in place is refused with the reason, and the model is unchanged."""
    for model, names in ((Rescaling(), ["blocks.0", "blocks.1"]), (Overwriting(), ["layer"])):
        before = state(model)
        with pytest.raises(li.TargetError, match=f"the forward of {type(model).__name__} writes to it") as e:
            li.inject(model, "all-linear")
        assert [problem.split(":")[0] for problem in e.value.problems] == names
        assert state(model) == before
    li.inject(Rescaling(), ["other"])


def test_rwkv_is_refused():
    """RWKV's forward rescales two weights of each block, so that an adapter on them would have a wrong scale."""
    config = transformers.RwkvConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, attention_hidden_size=8)
    with pytest.raises(li.TargetError, match="the forward of RwkvModel writes to it") as e:
        li.inject(transformers.RwkvModel(config), "all-linear")
    assert [p.split(":")[0] for p in e.value.problems] == [
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("attention.output", "feed_forward.value")
    ]
