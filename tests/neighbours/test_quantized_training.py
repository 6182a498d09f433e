"""Quantized bases train in transformers' Trainer, with the losses that PEFT has, and are resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorainject as li
from lorainject import training

from models import bits, ids, llama

TARGETS = ["q_proj", "down_proj"]
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quanto_in_python")]


def bitsandbytes(**settings: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**settings)


def torchao(**settings: Any) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    return TorchAoConfig(IntxWeightOnlyConfig(granularity=PerGroup(32), **settings))


def torchao_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quanto(weights: str) -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights=weights)


CONFIGS: dict[str, Callable[[], Any]] = {
    "bitsandbytes nf4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes int8": lambda: bitsandbytes(load_in_8bit=True),
    "torchao int8": torchao_int8,
    "torchao int4": lambda: torchao(weight_dtype=torch.int4),
    "quanto int8": lambda: quanto("int8"),
    "quanto int4": lambda: quanto("int4"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(3)
    llama(hidden_size=64, intermediate_size=64).save_pretrained(path)
    return path


def load(folder: Path, name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIGS[name](), device_map="cpu")


def train(model: Any, folder: Path, *, adapted: bool, **options: Any) -> list[float]:
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in ids(rows=16)]
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, logging_steps=1, max_steps=4, save_steps=2,
    )  # fmt: skip
    trainer = (training.adapter_checkpoints(Trainer) if adapted else Trainer)(model, args, train_dataset=data)
    trainer.train(**options)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * name.endswith("int4")) for name in CONFIGS]
)
def test_quantized_bases_train_as_with_peft(name, folder, tmp_path):
    """The losses are those of PEFT with the same A and B, which keep float32, and a resumed training is the same."""
    import peft

    ours = li.inject(load(folder, name), TARGETS, r=4)
    start = {key: t.clone() for key, t in ours.state_dict().items() if ".lora." in key}
    theirs = peft.get_peft_model(load(folder, name), peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "lora_" in key:
                path, _, factor = key.removeprefix("base_model.model.").rpartition(".lora_")
                p.copy_(start[f"{path}.lora.default.{factor[0]}"])
    theirs.get_base_model()._hf_peft_config_loaded = True  # transformers refuses PEFT on torchao's int4 without it
    losses = train(ours, tmp_path / "ours", adapted=True)
    assert losses == pytest.approx(train(theirs, tmp_path / "theirs", adapted=False), abs=1e-5)
    assert {p.dtype for p in li.parameters(ours)} == {torch.float32}
    again = li.load(load(folder, name), tmp_path / "ours" / "checkpoint-2")
    train(again, tmp_path / "ours", adapted=True, resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    assert [bits(p) for p in li.parameters(again)] == [bits(p) for p in li.parameters(ours)]


def test_without_it_transformers_refuses(folder, tmp_path):
    """transformers' own Trainer takes no quantized model without adapters of PEFT."""
    with pytest.raises(ValueError, match="purely quantized"):
        train(li.inject(load(folder, "bitsandbytes nf4"), TARGETS, r=4), tmp_path, adapted=False)
