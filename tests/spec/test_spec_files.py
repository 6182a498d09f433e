"""LoraSpec as PEFT's LoraConfig and as YAML: the same weights, ranks and scales, or an error that says why not."""

from __future__ import annotations

import json
import warnings
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorainject as li

from models import llama
from moe_models import mixtral

CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "mlp.up_proj"], "r": 3, "lora_alpha": 7},
    {"target_modules": "all-linear", "use_rslora": True, "lora_dropout": 0.1},
    {"target_modules": r".*\.(q|v)_proj", "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*q_proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["up_proj", "q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 2}},
    {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {r"^model.layers.1.*": 2}},
    {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"0.self_attn.q_proj": 2, "[qk]_proj": 5, "q_proj": 6}},
    {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}, "use_dora": True},
]  # fmt: skip
SETTINGS: list[dict[str, Any]] = [
    {"targets": ["q_proj", "up_proj"], "r": 3, "alpha": 7, "dropout": 0.1, "scaling": "rslora"},
    {"targets": "all-linear", "init": "gaussian", "bias": "lora_only"},
    {"targets": ["layers.*.q_proj", "re:.*v_proj"], "exclude": ["layers.1"], "overrides": {"q_proj": {"r": 2}}},
    {"targets": ["q_proj", "k_proj"], "layers": [1], "overrides": {"re:.*k_proj": {"alpha": 3}}, "alpha": 5},
    {"targets": ["q_proj"], "dora": True, "modules_to_save": ["lm_head"]},
]


def adapted_by_peft(model: torch.nn.Module, config: peft.LoraConfig) -> dict[str, tuple[int, float, float, bool]]:
    """Return rank, scale, dropout and use of DoRA for each weight that PEFT adapts, by the name that it has here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
    adapted = {}
    for path, module in wrapped.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            parameter = getattr(module, "parameter_name", None)
            name = path.removesuffix(".base_layer") + (f".{parameter}" if parameter else "")
            dropout = getattr(module.lora_dropout["default"], "p", 0.0)
            adapted[name] = (module.r["default"], module.scaling["default"], dropout, module.use_dora["default"])
    return adapted


def planned(model: torch.nn.Module, spec: li.LoraSpec) -> dict[str, tuple[int, float, float, bool]]:
    """Return the same of a plan."""
    return {site.name: (site.r, site.scale, site.dropout, site.dora) for site in li.find(model, spec=spec)}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_config_of_peft_adapts_the_same_weights(config, tmp_path):
    """from_peft adapts what PEFT adapts, with the same ranks and scales, from a config, a mapping and a folder."""
    theirs = peft.LoraConfig(**config)
    theirs.save_pretrained(tmp_path)
    spec = li.LoraSpec.from_peft(theirs)
    assert li.LoraSpec.from_peft(tmp_path) == li.LoraSpec.from_peft(theirs.to_dict()) == spec
    assert planned(llama(), spec) == adapted_by_peft(llama(), theirs)


def test_parameters_of_peft_are_targets():
    """target_parameters are targets here, beside layers."""
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"], r=2)
    spec = li.LoraSpec.from_peft(config)
    assert spec.targets == ("q_proj", "experts.gate_up_proj")
    assert planned(mixtral(), spec) == adapted_by_peft(mixtral(), config)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_spec_means_the_same_to_peft(settings):
    """to_peft adapts the same weights in PEFT, with names and with the exact paths of a plan."""
    spec = li.LoraSpec(**settings)
    for plan in (None, li.find(llama(), spec=spec)):
        config = spec.to_peft(plan)
        assert adapted_by_peft(llama(), config) == planned(llama(), spec)
        assert (config.bias, config.modules_to_save) == (spec.bias, list(spec.modules_to_save) or None)


def test_a_plan_makes_every_target_exact():
    """With a plan, roles and stacked experts reach PEFT."""
    spec = li.LoraSpec(targets=["attention", "experts"], r=2, overrides={"experts": {"r": 4}})
    config = spec.to_peft(li.find(mixtral(), spec=spec))
    assert adapted_by_peft(mixtral(), config) == planned(mixtral(), spec)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva': the known ones are"),
        ({"init_lora_weights": False}, "init_lora_weights=False"),
        ({"target_modules": None}, "target_modules is None"),
        ({"lora_bias": True}, "lora_bias=True: there is no such setting here"),
        ({"layer_replication": [(0, 1), (0, 2)]}, "layer_replication="),
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"rank_pattern": {"q": 2}, "alpha_pattern": {"v": 2}}, "give both the same keys"),
    ],
)
def test_what_cannot_be_read_is_listed(config, line):
    """Settings of PEFT that have no counterpart are refused by name, all at once."""
    config = {"target_modules": ["q_proj"], "use_qalora": True} | config
    with pytest.raises(li.SpecError) as refusal:
        li.LoraSpec.from_peft(config)
    assert line in str(refusal.value)
    assert "use_qalora=True" in str(refusal.value)


def test_what_peft_lacks_is_listed():
    """Settings that PEFT lacks are refused by name, all at once."""
    spec = li.LoraSpec(targets=["c_attn[q]", "x.all-conv", lambda path, module: True], dtype=torch.float16,
                       init=lambda A, B, W0: None)  # fmt: skip
    with pytest.raises(li.SpecError) as refusal:
        spec.to_peft()
    assert len(refusal.value.problems) == 5
    with pytest.raises(li.SpecError, match="layers: PEFT limits names"):
        li.LoraSpec(targets="all-linear", layers=[0]).to_peft()
    moe = li.LoraSpec(targets=["experts"], dropout=0.1)
    with pytest.raises(li.SpecError, match="dropout: PEFT has none on parameters"):
        moe.to_peft(li.find(mixtral(), spec=moe))


@pytest.mark.parametrize("content", ["[]", "{", '{"r": 8}', None])
def test_a_file_that_is_no_config_is_refused(content, tmp_path):
    """What is no LoraConfig is refused in one sentence."""
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(li.LoraError):
        li.LoraSpec.from_peft(tmp_path)
    with pytest.raises(li.SpecError, match="not a int"):
        li.LoraSpec.from_peft(3)


names = st.text("abcxyz_.", min_size=1)
specs = st.builds(
    li.LoraSpec,
    targets=st.one_of(st.just("all-linear"), st.lists(names, min_size=1, max_size=3)),
    r=st.integers(1, 64), alpha=st.none() | st.floats(1e-3, 1e3), dropout=st.floats(0, 0.5),
    exclude=st.lists(names, max_size=2), layers=st.none() | st.lists(st.integers(0, 9), min_size=1),
    init=st.sampled_from(["kaiming", "gaussian"]), dtype=st.sampled_from([None, torch.bfloat16]),
    overrides=st.dictionaries(names, st.fixed_dictionaries({}, optional={"r": st.integers(1, 9)})),
    bias=st.sampled_from(["none", "all"]), modules_to_save=st.lists(names, max_size=2),
    trainable_tokens=st.dictionaries(names, st.lists(st.integers(0, 99), min_size=1, unique=True), max_size=2),
)  # fmt: skip


@given(specs)
def test_yaml_gives_the_same_spec_back(tmp_path_factory, spec):
    """from_yaml reads what to_yaml writes."""
    path = tmp_path_factory.mktemp("spec") / "lora.yaml"
    spec.to_yaml(path)
    assert li.LoraSpec.from_yaml(path) == spec


def test_a_spec_is_read_from_a_recipe(tmp_path):
    """The section `lora` of a recipe is a spec; a number may have an exponent alone."""
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {path: x}\nlora:\n  targets: [q_proj]\n  dropout: 1e-1\n  optimizer: {lr_ratio_b: 4}\n")
    assert li.LoraSpec.from_yaml(path) == li.LoraSpec(targets=["q_proj"], dropout=0.1)


def test_bad_yaml_is_refused(tmp_path):
    """Unknown settings are listed with the nearest name; functions cannot be written."""
    path = tmp_path / "lora.yaml"
    path.write_text(json.dumps({"target": ["q_proj"], "ranks": 3}))
    with pytest.raises(li.SpecError) as refusal:
        li.LoraSpec.from_yaml(path)
    assert "did you mean 'targets'?" in str(refusal.value)
    assert "targets is missing" in str(refusal.value)
    with pytest.raises(li.SpecError, match="functions cannot be written"):
        li.LoraSpec(targets=[lambda path, module: True]).to_yaml(path)
    with pytest.raises(li.FileError, match="there is no file"):
        li.LoraSpec.from_yaml(tmp_path / "absent.yaml")
