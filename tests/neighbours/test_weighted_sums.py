"""PEFT's add_weighted_adapter beside algebra.combine: the error of each against the sum in float64."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import lorainject as li
from lorainject import algebra

from models import llama

WEIGHTS = (0.7, -0.4)
NAMES = ("first", "second")
KINDS = {
    "plain": ({"lora_alpha": 8}, {"lora_alpha": 8}),
    "two scales": ({"lora_alpha": 8}, {"lora_alpha": 2}),
    "two ranks": ({"lora_alpha": 8}, {"lora_alpha": 8, "r": 2}),
    "rank-stabilized": ({"lora_alpha": 8, "use_rslora": True}, {"lora_alpha": 8, "use_rslora": True}),
    "DoRA": ({"lora_alpha": 8, "use_dora": True}, {"lora_alpha": 8, "use_dora": True}),
}
TYPES = ("linear", "cat", "svd")


def make(folder: Path, kind: str) -> PeftModel:
    """Return a model with two random adapters, which are saved as well."""
    torch.manual_seed(0)
    configs = [LoraConfig(**{"r": 4, "target_modules": ["q_proj", "up_proj"]} | fields) for fields in KINDS[kind]]
    model = get_peft_model(llama(), configs[0], adapter_name=NAMES[0])
    model.add_adapter(NAMES[1], configs[1])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                p.copy_(torch.randn_like(p) * 0.1)
            if "magnitude" in name:
                p.mul_(1.1)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def merged_delta(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """Return W - W0 of every adapted weight with one adapter, as PEFT computes the layer: by its outputs."""
    model.set_adapter(name)
    deltas = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            eye = torch.eye(module.in_features, dtype=torch.float64)
            module.double()
            deltas[path] = (module(eye) - module.base_layer(eye)).mT
            module.float()
    return deltas


def errors(folder: Path, kind: str) -> dict[str, float | str]:
    """Return the relative error of each way to form the sum, or why there is none."""
    model = make(folder, kind)
    first, second = (merged_delta(model, name) for name in NAMES)
    total = {path: WEIGHTS[0] * first[path] + WEIGHTS[1] * second[path] for path in first}
    norm = sum(float(d.square().sum()) for d in total.values()) ** 0.5

    def error(deltas):
        return sum(float((deltas[path] - total[path]).square().sum()) for path in total) ** 0.5 / norm

    results: dict[str, float | str] = {}
    for how in TYPES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.add_weighted_adapter(list(NAMES), list(WEIGHTS), how, combination_type=how)
            results[how] = error(merged_delta(model, how))
        except Exception as e:
            results[how] = f"{type(e).__name__}"
    try:
        file = algebra.combine([folder / name for name in NAMES], WEIGHTS)
        sums = {s.path: s.scale * s.B.double() @ s.A.double() for s in file.sites}
        results["combine"] = error({path: sums[path.removeprefix("base_model.model.")] for path in total})
    except li.FileError:
        results["combine"] = "refused"
    return results


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "DoRA"])
def test_our_sum_is_exact(kind, tmp_path):
    """The error of combine is rounding alone, and no larger than that of any way of PEFT."""
    result = errors(tmp_path, kind)
    assert result["combine"] < 1e-6
    assert all(result["combine"] <= value * 1.01 + 1e-7 for value in result.values() if isinstance(value, float))


def test_a_sum_of_dora_adapters_is_refused(tmp_path):
    """PEFT returns some adapter for DoRA, which is far from the sum; combine refuses it."""
    result = errors(tmp_path, "DoRA")
    assert result["combine"] == "refused"
    assert all(not isinstance(value, float) or value > 0.01 for value in result.values())
