"""What targets match, and the errors for mistakes in targets and settings, which change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorainject as li

from models import bert, gpt2, llama, state, t5


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """One model for all tests of this file, since find changes nothing (which a test below checks)."""
    return llama()


def paths(model: nn.Module, targets: object, **settings: object) -> list[str]:
    return [s.name for s in li.find(model, targets, **settings)]


LAYERS = [f"model.layers.{i}" for i in (0, 1)]


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (["q_proj"], [f"{x}.self_attn.q_proj" for x in LAYERS]),
        (["self_attn.q_proj"], [f"{x}.self_attn.q_proj" for x in LAYERS]),
        (["model.layers.1.self_attn.q_proj"], ["model.layers.1.self_attn.q_proj"]),
        (["model.layers.*.mlp.up_proj"], [f"{x}.mlp.up_proj" for x in LAYERS]),
        (["layers.0.*_proj"], [f"{LAYERS[0]}.self_attn.{x}_proj" for x in "qkvo"]
                              + [f"{LAYERS[0]}.mlp.{x}_proj" for x in ("gate", "up", "down")]),
        (["?_proj"], [f"{x}.self_attn.{y}_proj" for x in LAYERS for y in "qkvo"]),
        ([r"re:.*\.(q|v)_proj"], [f"{x}.self_attn.{y}_proj" for x in LAYERS for y in "qv"]),
        (["v_proj", "q_proj", "q_proj"], [f"{x}.self_attn.{y}_proj" for x in LAYERS for y in "qv"]),
        (lambda path, m: isinstance(m, nn.Linear) and m.out_features == 99, ["lm_head"]),
        (["embed_tokens"], ["model.embed_tokens"]),
        ({"q_proj"}, [f"{x}.self_attn.q_proj" for x in LAYERS]),
    ],
)  # fmt: skip
def test_each_form_of_entry_matches(model, targets, wanted):
    """Every form of an entry matches the expected sites, in the model's order, each once."""
    assert paths(model, targets) == wanted


def test_a_suffix_begins_at_a_dot(model):
    """An entry matches the end of a path from a dot on, not the end of a word."""
    with pytest.raises(li.TargetError, match="'proj' matches nothing"):
        li.find(model, ["proj"])


def test_all_linear_leaves_out_the_head(model):
    """All linear layers are matched but the head; a classifier next to the base model is a head."""
    assert len(paths(model, "all-linear")) == len(paths(model, ["all-linear"])) == 14
    from transformers import BertConfig, BertForSequenceClassification

    classifier = BertForSequenceClassification(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    assert "classifier" not in paths(classifier, "all-linear")
    assert "bert.pooler.dense" in paths(classifier, "all-linear")
    assert paths(classifier, ["classifier"]) == ["classifier"]
    assert len(paths(gpt2(), "all-linear")) == 8


def test_layers_and_exclude_limit_the_targets(model):
    """The layer number is the first number in a path; exclude has the grammar of targets, and containers."""
    assert paths(model, ["q_proj"], layers=[1]) == ["model.layers.1.self_attn.q_proj"]
    assert len(paths(model, "all-linear", layers=range(1))) == 7
    assert paths(model, "all-linear", exclude=["mlp", "layers.0"]) == [
        f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"
    ]  # with all inside
    assert paths(model, ["?_proj"], exclude=["layers.0.*", "re:.*[kvo]_proj"]) == ["model.layers.1.self_attn.q_proj"]


def test_the_first_matching_override_applies(model):
    """The first override that matches a site sets its r and alpha; alpha=None still means alpha = r."""
    plan = li.find(model, ["q_proj", "v_proj"], r=8, overrides={"layers.0.*": {"r": 4}, "q_proj": {"r": 2, "alpha": 6}})
    assert [(s.r, s.alpha, s.scale) for s in plan] == [(4, 4, 1), (4, 4, 1), (2, 6, 3), (8, 8, 1)]
    plan = li.find(model, ["q_proj"], r=8, alpha=16, overrides=[li.Override(target="layers.1.*", r=4)])
    assert [(s.r, s.alpha, s.scale) for s in plan] == [(8, 16, 2), (4, 16, 4)]


def test_a_plan_describes_its_sites_and_prints_a_table(model):
    """Shapes, scale and counts of the sites, and the lines of the printed table."""
    plan = li.find(model, ["v_proj", "embed_tokens"], r=4, alpha=8, scaling="rslora")
    v = plan.sites[1]
    assert (v.kind, v.parameter, v.shape, v.rows, v.in_features, v.out_features) == (
        "linear",
        "weight",
        (16, 32),
        None,
        32,
        16,
    )
    assert v.scale == 8 / 4**0.5
    assert v.trainable == 4 * (32 + 16)
    assert plan.sites[0].kind == "embedding"
    assert plan.trainable == 4 * (99 + 32) + 2 * v.trainable
    assert plan.bytes == 4 * plan.trainable
    assert plan.total == sum(p.numel() for p in model.parameters())
    lines = str(plan).splitlines()
    assert lines[0].split() == ["module", "kind", "weight", "r", "alpha", "scale", "sites", "trainable"]
    assert lines[2].split() == ["model.layers.*.self_attn.v_proj", "linear", "16x32", "4", "8", "4", "2", "384"]
    assert lines[-1].startswith(f"3 sites; 908 trainable of {plan.total:,}")


def test_find_changes_nothing_and_inject_carries_out_its_plan(model):
    """find leaves the model's state alone; inject with the same arguments trains as many parameters as planned."""
    before = state(model)
    plan = li.find(model, ["q_proj"], r=4, dropout=0.1)
    assert state(model) == before
    fresh = llama()
    li.inject(fresh, spec=li.LoraSpec(targets=["q_proj"], r=4, dropout=0.1))
    assert sum(p.numel() for p in li.parameters(fresh)) == plan.trainable
    assert fresh.model.layers[0].self_attn.q_proj.lora["default"].dropout == 0.1


def test_the_trainable_count_follows_the_formula():
    """All linear layers of a BERT together have sum of r (in + out) trainable parameters."""
    plan = li.find(bert(), "all-linear", r=3)
    assert plan.trainable == 3 * (2 * (4 * (32 + 32) + 2 * (32 + 48)) + (32 + 32))


TARGET_MISTAKES = {
    "a typo among good targets": (["q_proj", "v_porj"], {}, r"'v_porj' matches nothing \(did you mean 'v_proj'"),
    "a typo in a dotted name": (
        ["self_atn.q_proj"],
        {},
        r"'self_atn.q_proj' matches nothing \(did you mean 'self_attn.q_proj'",
    ),
    "nothing like it": (["xyzzy"], {}, r"'xyzzy' matches nothing \(this model has 'down_proj', 'embed_tokens'"),
    "a container": (
        ["self_attn"],
        {},
        r"self_attn is a LlamaAttention, .*name the layers inside it \('k_proj', 'o_proj', 'q_proj', 'v_proj'\)",
    ),
    "a layer that cannot": (
        ["input_layernorm"],
        {},
        r"input_layernorm is a LlamaRMSNorm, which cannot carry an adapter",
    ),
    "a glob over such": (["*layernorm"], {}, r"'\*layernorm' matches nothing"),
    "a regex that matches a part": ([r"re:.*q_pro"], {}, r"'re:\.\*q_pro' matches nothing"),
    "a callable that says no": (lambda path, m: False, {}, r"the callable '.*lambda.*' matches nothing"),
    "exclude that matches nothing": (
        ["q_proj"],
        {"exclude": ["k_porj"]},
        r"exclude 'k_porj' matches nothing \(did you mean 'k_proj'",
    ),
    "everything excluded": (["q_proj"], {"exclude": ["q_proj"]}, r"'q_proj': exclude leaves nothing of it"),
    "a layer too many": (["q_proj"], {"layers": [1, 7]}, r"no target is in layer 7; the targets are in layers 0 to 1"),
    "an override for nothing": (
        ["q_proj"],
        {"overrides": {"v_proj": {"r": 2}}},
        r"override 'v_proj' matches none of the targets",
    ),
    "a bad adapter name": (["q_proj"], {"name": "../up"}, r"the adapter name '\.\./up' must be 1 to 64 letters"),
    "a dotted adapter name": (["q_proj"], {"name": "a.b"}, r"the adapter name 'a\.b' must be"),
}
SETTING_MISTAKES = {
    "a bare name": ("q_proj", {}, r"targets='q_proj' is a string, but a list is expected: write targets=\['q_proj'\]"),
    "a bare regex": (".*q_proj", {}, r"is a string, but a list is expected: write targets=\['re:\.\*q_proj'\]"),
    "a number": (7, {}, r"targets must be a list of names, not 7"),
    "no targets": ([], {}, r"targets is empty"),
    "nothing at all": (None, {}, r"targets is empty"),
    "an empty name": (["q_proj", ""], {}, r"each entry must be a non-empty string"),
    "a broken regex": (["re:(q"], {}, r"re:\(q is not a regular expression: missing \)"),
    "r = 0": (["q_proj"], {"r": 0}, r"r must be a whole number of at least 1, not 0"),
    "r negative": (["q_proj"], {"r": -8}, r"r must be a whole number of at least 1, not -8"),
    "r a float": (["q_proj"], {"r": 8.0}, r"r must be a whole number of at least 1, not 8\.0"),
    "r a bool": (["q_proj"], {"r": True}, r"not True"),
    "alpha NaN": (["q_proj"], {"alpha": float("nan")}, r"alpha must be a finite number above 0 .*, not nan"),
    "alpha 0": (["q_proj"], {"alpha": 0}, r"alpha must be a finite number above 0 .*, not 0"),
    "dropout 1.5": (["q_proj"], {"dropout": 1.5}, r"dropout must be a probability p with 0 <= p < 1, not 1\.5"),
    "dropout 1": (["q_proj"], {"dropout": 1.0}, r"0 <= p < 1, not 1\.0"),
    "layers a string": (["q_proj"], {"layers": "12"}, r"layers must be a list of layer numbers"),
    "layers a number": (["q_proj"], {"layers": 0}, r"layers must be a list of layer numbers from 0, .* not 0"),
    "a class": (nn.Linear, {}, r"targets must be a list of names, not <class"),
    "a list of classes": ([nn.Identity], {}, r"each entry must be a non-empty string or a function"),
    "a spec that is none": (None, {"spec": {"r": 4}}, r"spec must be a LoraSpec, not \{'r': 4\}"),
    "alpha beyond float32": (["q_proj"], {"alpha": 1e300}, r"alpha must be"),
    "a nameless override": (
        ["q_proj"],
        {"overrides": [li.Override(target=None)]},
        r"override None: its target must be a name",
    ),
    "layers negative": (["q_proj"], {"layers": [-1]}, r"layers must be a list of layer numbers from 0"),
    "scaling": (["q_proj"], {"scaling": "rs"}, r"scaling must be one of \('standard', 'rslora'\)"),
    "init": (["q_proj"], {"init": "svd"}, r"init must be one of \('kaiming', 'gaussian', "),
    "dtype": (["q_proj"], {"dtype": torch.int8}, r"dtype must be a floating-point torch.dtype"),
    "a typo in an override": (
        ["q_proj"],
        {"overrides": {"q_proj": {"rank": 4}}},
        r"overrides must look like .* these do not: .*q_proj",
    ),
    "a bad override": (["q_proj"], {"overrides": {"q_proj": {"r": 0}}}, r"r must be .* not 0 \(override 'q_proj'\)"),
}


@pytest.mark.parametrize(
    ("targets", "settings", "message"),
    [pytest.param(*w, id=name) for name, w in (TARGET_MISTAKES | SETTING_MISTAKES).items()],
)
def test_mistakes_raise_and_change_nothing(model, targets, settings, message):
    """A mistake raises one error that says what is wrong and ends with the next step, and the model is unchanged."""
    before = state(model)
    with pytest.raises(li.LoraError, match=message) as e:
        li.inject(model, targets, **settings)
    assert "\n=> " in str(e.value)
    assert state(model) == before


def test_one_error_lists_all_mistakes(model):
    """An error has one line for each mistake."""
    with pytest.raises(li.SpecError) as e:
        li.LoraSpec(targets="q_proj", r=0, alpha=-1, dropout=2, scaling="?", init="?", layers=[], dtype=1)
    assert len(e.value.problems) == 8
    with pytest.raises(li.TargetError) as e:
        li.find(model, ["q_porj", "v_porj", "norm"], exclude=["zzz"])
    assert len(e.value.problems) == 4


def test_regexes_have_a_time_limit(monkeypatch):
    """A pattern that would run for hours is stopped by its time limit, and the error says so."""
    monkeypatch.setattr("lorainject.targets.matcher.REGEX_SECONDS", 0.5)
    long = nn.ModuleDict({"a" * 60: nn.Linear(2, 2)})
    with pytest.raises(li.SpecError, match=r"took more than 0\.5 s"):
        li.find(long, [r"re:(a|a|aa)+b"])


def test_the_rank_may_exceed_the_matrix():
    """A rank above the sides of the matrix is accepted, and merges exactly."""
    model = nn.Sequential(nn.Linear(3, 2))
    li.inject(model, ["0"], r=50)
    assert li.merge(model).survival == 1.0


def test_spec_and_settings_exclude_each_other(model):
    """A spec and other settings together are refused, since one of them would be ignored."""
    spec = li.LoraSpec(targets=["q_proj"])
    with pytest.raises(li.SpecError, match=r"spec and targets, alpha cannot be passed together"):
        li.inject(model, ["v_proj"], alpha=3, spec=spec)
    assert paths(model, None, spec=spec) == paths(model, ["q_proj"])


def test_unknown_arguments_are_refused(model):
    """No function accepts arbitrary keywords, so a misspelled argument is a TypeError."""
    with pytest.raises(TypeError, match="alhpa"):
        li.inject(model, ["q_proj"], alhpa=3)


def test_a_second_adapter_needs_another_name():
    """inject refuses a name that is in use, with a message about the name only, and accepts another one."""
    model = li.inject(llama(), ["q_proj"])
    before = state(model)
    with pytest.raises(
        li.TargetError, match=r"the model already carries an adapter named 'default': eject it, or pass another name="
    ) as e:
        li.inject(model, ["q_proj"])
    assert "exclude" not in str(e.value)
    assert state(model) == before
    li.inject(model, ["q_proj"], name="other")


class Scaled(nn.Linear):
    """A subclass whose forward is its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A subclass that changes nothing that matters."""


def emptied(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(torch.empty(2, 0))
    return linear


REFUSED = {
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), r"its weight is computed"),
    "lazy": (lambda: nn.LazyLinear(2), r"its shape is not known yet"),
    "max_norm": (lambda: nn.Embedding(2, 2, max_norm=1.0), r"max_norm rewrites the base weight"),
    "complex": (lambda: nn.Linear(2, 2, dtype=torch.complex64), r"its weight is torch\.complex64"),
    "empty": (lambda: emptied(nn.Linear(2, 2)), r"its weight is empty"),
}


@pytest.mark.parametrize(("build", "message"), [pytest.param(*w, id=name) for name, w in REFUSED.items()])
def test_unsupported_layers_are_refused(build, message):
    """A layer whose adapter could silently be wrong is refused, with its path and the reason."""
    model = nn.ModuleDict({"good": nn.Linear(2, 2), "bad": build()})
    with pytest.raises(li.TargetError, match=rf"bad: {message}"):
        li.inject(model, ["good", "bad"])
    assert type(model["good"]) is nn.Linear


def test_subclasses_that_inherit_forward_are_accepted():
    """A subclass of nn.Linear that inherits forward is adapted like nn.Linear."""
    model = nn.Sequential(Renamed(2, 2))
    li.inject(model, ["0"])
    assert isinstance(model[0], Renamed)
    assert type(model[0]).__name__ == "LoraRenamed"


def test_other_objects_and_peft_models_are_refused(model):
    """The model must be a module, and must not already carry adapters of PEFT."""
    from peft import LoraConfig, get_peft_model

    with pytest.raises(li.TargetError, match=r"the model must be an nn\.Module, not 'llama'"):
        li.find("llama", ["q_proj"])
    with pytest.raises(li.TargetError, match=r"the model carries adapters of PEFT, .*: unload\(\) them first"):
        li.inject(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), ["base_layer"])


def test_attributes_of_other_libraries_are_not_overwritten():
    """A layer that already has another attribute `lora` is refused."""
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].lora = nn.Linear(2, 2)
    with pytest.raises(li.TargetError, match=r"0: the module already has an attribute `lora`, not from lorainject"):
        li.inject(model, ["0"])


def test_all_linear_matches_every_weight_that_multiplies():
    """all-linear takes layers, also if a parent reads them, and weights of attention and recurrent cells; no tables."""
    model = nn.Sequential(
        nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.LSTM(4, 4), nn.Embedding(3, 4), nn.Bilinear(4, 4, 2)
    )
    assert paths(model, "all-linear") == [
        "0",
        "1.in_proj_weight",
        "1.out_proj",
        "2.weight_ih_l0",
        "2.weight_hh_l0",
        "4",
    ]
    assert paths(model, "all-linear", exclude=["1", "2", "4"]) == ["0"]
    assert paths(Attention(), "all-linear") == ["read", "called"]


def test_trainable_counts_match_the_paper():
    """The number of trainable parameters in Hu et al. 2021, tables 4 and 2, for GPT-3, RoBERTa base and large."""
    from transformers import OPTConfig, OPTModel, RobertaConfig, RobertaModel

    with torch.device("meta"):
        gpt3 = OPTModel(OPTConfig(vocab_size=50257, hidden_size=12288, word_embed_proj_dim=12288, num_hidden_layers=96,
                                  num_attention_heads=96, ffn_dim=4 * 12288))  # fmt: skip
        base = RobertaModel(RobertaConfig())
        large = RobertaModel(
            RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        )
    for r, wanted in ((1, 4_718_592), (4, 18_874_368), (8, 37_748_736)):
        assert li.find(gpt3, ["q_proj", "v_proj"], r=r).trainable == wanted
    li.inject(gpt3, ["q_proj", "v_proj"], r=4)
    assert sum(p.numel() for p in gpt3.parameters() if p.requires_grad) == 18_874_368
    assert li.find(base, ["query", "value"], r=8).trainable == 294_912
    assert li.find(large, ["query", "value"], r=8).trainable == 786_432


class Attention(nn.Module):
    """Reads the weight of one layer instead of calling it, as WavLM's attention does, and calls another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(self.called(x.to(self.called.weight.dtype)), self.read.weight)


def test_readers_of_a_weight_are_found():
    """A weight that a parent reads in its own code, also in torch's encoder layer, lists the parent as its reader."""
    readers = {site.name: site.readers for site in li.find(Attention(), ["called", "read"])}
    assert readers == {"called": (), "read": ("", "read")}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    assert li.find(encoder, ["linear1"]).sites[0].readers == ("", "layers.0", "layers.0.linear1")
    from transformers import MambaConfig, MambaModel, WavLMConfig, WavLMModel

    mamba = MambaModel(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1))
    assert li.find(mamba, ["dt_proj"]).sites[0].readers == ("layers.0.mixer", "layers.0.mixer.dt_proj")
    wavlm = WavLMModel(WavLMConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                                   conv_dim=(8,), conv_kernel=(2,), conv_stride=(2,), num_conv_pos_embeddings=4,
                                   num_conv_pos_embedding_groups=2))  # fmt: skip
    assert li.find(wavlm, ["q_proj"]).sites[0].readers[0] == "encoder.layers.0.attention"
    assert not any(
        site.readers for site in li.find(t5(), ["wo"])
    )  # it asks isinstance(self.wo.weight, Tensor), and for its dtype


def test_the_plan_shows_the_heads_that_all_linear_leaves_out(model):
    """The plan lists what "all-linear" leaves out; a decoder next to the base model is not left out."""
    assert str(li.find(model, "all-linear")).endswith("left out: lm_head (output head: the model's output embeddings)")
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    mae = ViTMAEForPreTraining(ViTMAEConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                            intermediate_size=8, decoder_hidden_size=8, decoder_num_hidden_layers=1,
                                            decoder_num_attention_heads=2, decoder_intermediate_size=8))  # fmt: skip
    assert any("decoder_layers" in path for path in paths(mae, "all-linear"))
    wrapped = nn.ModuleDict({"inner": model})
    assert len(paths(wrapped, "all-linear")) == len(paths(model, "all-linear"))
