"""What an error says where somebody comes from PEFT, or has a model in a form that cannot carry an adapter."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn.utils import prune

import lorainject as li

from models import llama
from moe_models import mixtral

PEFT_SETTINGS = {
    "target_modules": (["q_proj"], r'target_modules: write targets=\["q_proj"\], or targets=\["re:'),
    "target_parameters": (["experts.down_proj"], "target_parameters: write targets="),
    "exclude_modules": (["q_proj"], "exclude_modules: write exclude="),
    "lora_alpha": (16, "lora_alpha: write alpha="),
    "lora_dropout": (0.1, "lora_dropout: write dropout="),
    "lora_r": (8, "lora_r: write r="),
    "layers_to_transform": ([0], r"layers_to_transform: write layers=\[0, 1\]"),
    "rank_pattern": ({"q_proj": 4}, r'rank_pattern: write overrides={"k_proj": {"r": 4'),
    "alpha_pattern": ({"q_proj": 4}, "alpha_pattern: write overrides="),
    "use_rslora": (True, 'use_rslora: write scaling="rslora"'),
    "init_lora_weights": ("gaussian", 'init_lora_weights: write init="gaussian"'),
    "use_dora": (True, "use_dora: (write dora=|there is no such setting)"),
    "adapter_name": ("fr", "adapter_name: write name="),
    "fan_in_fan_out": (True, "fan_in_fan_out: leave it out"),
}


@pytest.mark.parametrize("verb", [li.inject, li.find])
@pytest.mark.parametrize("key", PEFT_SETTINGS)
def test_peft_settings_are_translated(verb, key):
    """A setting under PEFT's name is refused with the name that it has here."""
    value, message = PEFT_SETTINGS[key]
    with pytest.raises(li.SpecError, match=rf"{verb.__name__} does not take .*\n  - {message}(.*\n)*=> "):
        verb(llama(), **{key: value})


def test_all_foreign_settings_are_listed_at_once():
    """Several of them are one error, and a misspelled one among them is in it."""
    with pytest.raises(li.SpecError) as e:
        li.inject(llama(), target_modules=["q_proj"], lora_alpha=16, alhpa=3)
    assert len(e.value.problems) == 3


def test_load_takes_no_settings_of_the_adapter():
    """The file has them; only the names of arguments are translated."""
    with pytest.raises(li.SpecError, match=r"(?s)r: inject sets it, and a file tells it.*adapter_name: write name="):
        li.load(llama(), "adapter", r=8, adapter_name="fr")


FUNCTIONS = {name: getattr(li, name) for name in li.__all__ if inspect.isfunction(getattr(li, name))}


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - {"probe"}))  # which hands its keywords to the model
def test_every_verb_explains_pefts_arguments(name):
    """No public function answers PEFT's arguments by a bare TypeError; the error comes before anything is looked at."""
    with pytest.raises(
        li.SpecError, match=rf"{name} does not take these arguments:\n(?s:.*)- lora_alpha: (?s:.*)\n=> "
    ) as e:
        FUNCTIONS[name](lora_alpha=16, adapter_name="fr", task_type="CAUSAL_LM", typo=1)
    assert len(e.value.problems) == 4
    assert "task_type: leave it out" in str(e.value)
    assert "typo: there is no such argument" in str(e.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: li.LoraSpec(targets=["q_proj"], lora_alpha=16), "LoraSpec does not .*lora_alpha: write alpha="),
        (lambda: replace(li.LoraSpec(targets=["q"]), use_dora=True), "LoraSpec does not .*use_dora: write dora="),
        (lambda: li.Override(target="k_proj", lora_alpha=3), "Override does not .*lora_alpha: write alpha="),
        (lambda: li.Hints(lora_alpha=3), "Hints does not .*lora_alpha: write alpha="),
        (lambda: li.eject(llama(), adapter_name="fr"), "adapter_name: write name="),
        (lambda: li.hotswap(llama(), "a", adapter_name="fr"), "adapter_name: write name="),
        (lambda: li.save(llama(), "a", selected_adapters=["fr"]), "selected_adapters: write name="),
        (
            lambda: li.merge(llama(), adapter_names=["fr"], safe_merge=True),
            "names: write names=.*safe_merge: write strict",
        ),
        (lambda: li.activate(llama(), adapter_name="fr"), "adapter_name: give the names without a keyword"),
        (lambda: li.read("a", lora_alpha=16), "lora_alpha: inject sets it, and a file tells it"),
    ],
)
def test_arguments_of_peft_elsewhere(call, message):
    """Settings as values, and verbs of which PEFT has a counterpart."""
    with pytest.raises(li.SpecError, match=f"(?s){message}.*\n=> "):
        call()


def test_a_spec_stays_a_class():
    """What explains the arguments changes neither its type, nor its signature, nor copies of it."""
    spec = li.LoraSpec(targets=["q_proj"], r=4)
    assert isinstance(spec, li.LoraSpec)
    assert list(inspect.signature(li.LoraSpec).parameters)[:3] == ["targets", "r", "alpha"]
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == replace(spec) == spec
    with pytest.raises(TypeError, match="typo"):
        li.LoraSpec(targets=["q_proj"], typo=1)


def test_warnings_point_to_the_caller(tmp_path):
    """However many functions a verb is wrapped in, its warnings name the line that called it."""
    model = li.inject(llama(), ["q_proj"], r=2)
    li.inject(model, ["v_proj"], r=2, name="other")
    other = li.inject(llama(), ["q_proj", "v_proj"], r=2)
    model.model.norm.requires_grad_(True)
    damaged = li.save(other, tmp_path / "a", format="peft")
    config = damaged / "adapter_config.json"
    config.write_text(config.read_text().replace('"q_proj",', '"q_proj", "k_proj",'))
    calls = {
        "parameters": lambda: li.parameters(model),
        "using": lambda: li.using(model.train(), "default").__enter__(),
        "save": lambda: li.save(model, tmp_path / "b", "other"),
        "load": lambda: li.load(llama(), damaged, allow_missing=True),
        "hotswap": lambda: li.hotswap(other, damaged, allow_missing=True),
    }
    for name, call in calls.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert [w.filename for w in caught] == [__file__] * len(caught), name
        assert caught, name
    other.model.layers[0].self_attn.q_proj = nn.Linear(16, 16)
    with pytest.warns(UserWarning, match="were replaced or removed") as caught:
        li.eject(other)
    assert {w.filename for w in caught} == {__file__}


def test_signatures_stay_those_of_the_verbs():
    """Help and editors show the arguments, not those of the function that translates."""
    assert [*inspect.signature(li.inject).parameters][:4] == ["model", "targets", "r", "alpha"]
    assert "hints" in inspect.signature(li.load).parameters


def test_a_config_of_peft_is_taken_as_spec():
    """In the place of the targets, it is named by its type: its repr would be a thousand characters."""
    config = LoraConfig(r=4, target_modules=["q_proj"])
    assert {site.r for site in li.find(llama(), spec=config)} == {4}
    with pytest.raises(li.SpecError, match=r"not a LoraConfig\n=> ") as e:
        li.inject(llama(), targets=config)
    assert len(str(e.value)) < 250


@pytest.mark.parametrize("pattern", [r".*\.[qv]_proj", "(q|v)_proj", "[qv]_proj", r".+q_proj"])
def test_a_regular_expression_of_peft(pattern):
    """As one string or in a list, a pattern without "re:" is answered by the entry that means it."""
    with pytest.raises(li.SpecError) as e:
        li.inject(llama(), pattern)
    assert f"write targets=[{'re:' + pattern!r}]" in str(e.value)


def test_a_pattern_without_re_in_a_list():
    """It is taken for a glob, which matches nothing; the answer is the entry that matches."""
    with pytest.raises(li.TargetError) as e:
        li.inject(llama(), [r".*\.[qv]_proj"])
    entry = r"re:.*\.[qv]_proj"
    assert f"a regular expression is written {entry!r}" in str(e.value)
    assert li.find(llama(), [entry])


@pytest.mark.parametrize(
    ("name", "part"), [("up_proj", "gate_up_proj[up]"), ("experts.gate_proj", "experts.gate_up_proj[gate]")]
)
def test_projections_of_stacked_experts(name, part):
    """The name of a linear that is a part of a stack is answered by the slice, which matches."""
    with pytest.raises(li.TargetError) as e:
        li.inject(mixtral(), [name])
    assert f"(did you mean {part!r}?)" in str(e.value)
    assert li.find(mixtral(), [part])


def test_a_name_in_a_part_of_the_model():
    """A name that is further inside the named part is answered by the glob, which matches in this part alone."""
    model = nn.ModuleDict({"language_model": llama(), "vision_tower": llama()})
    with pytest.raises(li.TargetError, match=r"did you mean 'language_model\.\*\.q_proj'\?"):
        li.inject(model, ["language_model.q_proj"])
    assert {s.path.partition(".")[0] for s in li.find(model, ["language_model.*.q_proj"])} == {"language_model"}


COMPUTED = {
    "pruned": (
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
        r"pruned\): call .*\.prune\.remove first",
    ),
    "weight_norm": (nn.utils.weight_norm, r"weight_norm\): call torch\.nn\.utils\.remove_weight_norm"),
    "spectral_norm": (nn.utils.spectral_norm, r"spectral_norm\): call torch\.nn\.utils\.remove_spectral_norm"),
    "parametrized": (nn.utils.parametrizations.weight_norm, r"parametrize\.remove_parametrizations"),
}
UNDO = {
    "pruned": lambda layer: prune.remove(layer, "weight"),
    "weight_norm": nn.utils.remove_weight_norm,
    "spectral_norm": nn.utils.remove_spectral_norm,
    "parametrized": lambda layer: nn.utils.parametrize.remove_parametrizations(layer, "weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_are_answered_by_what_undoes_them(name):
    """The function that is named makes the weight a parameter again, and inject then works."""
    change, message = COMPUTED[name]
    model = nn.Sequential(nn.Linear(4, 4))
    change(model[0])
    with pytest.raises(li.TargetError, match=message):
        li.inject(model, ["0"])
    UNDO[name](model[0])
    li.inject(model, ["0"], r=2)


def test_a_batch_of_vectors_gets_an_axis():
    """rows cannot tell a batch of vectors from tokens in any order; with the axis that the error asks for, it can."""
    model = li.inject(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), ["0"], r=2)
    x = torch.randn(3, 8)
    with (
        li.rows(model, ["default", None, "default"]),
        pytest.raises(li.StateError, match=r"=> .*model\(x\[:, None\]\)"),
    ):
        model(x)
    with li.rows(model, ["default", None, "default"]):
        assert torch.allclose(model(x[:, None])[:, 0], model(x[:, None]).flatten(0, 1))


@pytest.mark.usefixtures("process_group")
def test_models_that_transformers_has_distributed():
    """Neither tensor parallelism nor a sharding by from_pretrained can be undone, so the error names another way."""
    tensor_parallel = pytest.importorskip("transformers.distributed.tensor_parallel")
    from torch.distributed.device_mesh import init_device_mesh

    model = llama()
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    tensor_parallel.apply_tensor_parallelism(model, mesh, model._expand_parallel_plan(dict(model.tp_plan)))
    with pytest.raises(li.TargetError, match=r"tensor or expert parallelism.*without tp_plan.*merge_checkpoint"):
        li.inject(model, ["q_proj"])
    sharded = llama()
    q = sharded.model.layers[0].self_attn.q_proj
    q.weight = nn.Parameter(torch.distributed.tensor.distribute_tensor(q.weight.detach(), mesh))
    with pytest.raises(
        li.TargetError, match=r"already sharded.*if from_pretrained sharded it, load .* without tp_plan"
    ):
        li.inject(sharded, ["q_proj"], layers=[0])
