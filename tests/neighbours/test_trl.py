"""TRL's trainers beside PEFT: equal losses with the same A, B and data, references without a second base, stages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorainject as li
from lorainject import training

from models import bits, ids, llama, randomize
from texts import rows, tokenizer

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL warns a lot
TARGETS = ["q_proj", "down_proj"]


def base() -> nn.Module:
    torch.manual_seed(3)
    return llama()


def injected() -> nn.Module:
    model = li.inject(base(), TARGETS, r=4)
    randomize(model, std=0.02)
    return model


def of_peft(ours: nn.Module) -> Any:
    """Return PEFT's model with the A and B of ours."""
    import peft

    model = peft.get_peft_model(base(), peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    values = ours.state_dict()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                path, _, factor = name.removeprefix("base_model.model.").rpartition(".lora_")
                p.copy_(values[f"{path}.lora.default.{factor[0]}"])
    return model


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def run(
    kind: str, model: nn.Module, folder: Path, *, adapted: bool = True, settings: Any = None, **options: Any
) -> Any:
    """Make a trainer, its class with adapter checkpoints if `adapted`."""
    common = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2, "report_to": "none",
        "use_cpu": True, "save_strategy": "no", "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "learning_rate": 1e-2, "warmup_steps": 0, "logging_steps": 1,
    }  # fmt: skip
    common |= {"num_generations": 2, "max_completion_length": 4} if kind == "GRPO" else {"max_length": 16}
    options |= {"reward_funcs": reward} if kind == "GRPO" else {}
    cls = getattr(trl, f"{kind}Trainer")
    return (training.adapter_checkpoints(cls) if adapted else cls)(
        model=model, args=getattr(trl, f"{kind}Config")(**common | (settings or {})), train_dataset=rows(kind),
        processing_class=tokenizer(), **options,
    )  # fmt: skip


def logged(trainer: Any, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize(
    ("kind", "key", "settings"),
    [("SFT", "loss", {}), ("DPO", "loss", {}), ("DPO", "loss", {"precompute_ref_log_probs": True}),
     ("GRPO", "kl", {"beta": 0.1, "learning_rate": 0.1})],
)  # fmt: skip
def test_losses_are_those_of_peft(kind, key, settings, tmp_path):
    """Each step has the loss (GRPO: the divergence from the reference) that PEFT's model has with the same A, B and
    data. PEFT's reference is a copy of the adapter as it is at the start, and so is ours here."""
    model = injected()
    other = of_peft(model)
    options: dict[str, Any] = {}
    if kind != "SFT":
        li.save(model, tmp_path / "start")
        li.load(model, tmp_path / "start", "start")
        li.activate(model, "default")
        options = {"ref_model": training.reference(model, "start")}
    ours = run(kind, model, tmp_path / "ours", settings=settings, **options)
    ours.train()
    theirs = run(kind, other, tmp_path / "theirs", adapted=False, settings=settings)  # draws from the same seed
    theirs.train()
    expected = torch.tensor(logged(theirs, key))
    torch.testing.assert_close(torch.tensor(logged(ours, key)), expected, rtol=0, atol=1e-5)
    assert len(expected) == 4
    assert len({*expected.tolist()}) > 1, "nothing was learned, so that nothing was compared"
    if kind == "GRPO":
        assert ours.args.beta == 0.1


def test_sft_then_dpo(tmp_path):
    """DPO trains a second adapter on top of a frozen one, with the base and the first adapter as the reference; its
    checkpoints are resumed to the bit."""

    def second_stage(folder: Path) -> Any:
        model = li.inject(base(), TARGETS, r=4, name="sft")
        randomize(model, "sft")
        torch.manual_seed(0)
        li.inject(model, ["q_proj", "v_proj"], r=2, name="dpo")
        li.activate(model, "sft", "dpo")
        for p in li.parameters(model, "sft"):
            p.requires_grad_(False)
        settings = {"save_strategy": "steps", "save_steps": 2}
        return run("DPO", model, folder, settings=settings, ref_model=training.reference(model, "sft"))

    whole = second_stage(tmp_path / "whole")
    first = {n: bits(p) for n, p in whole.model.named_parameters() if ".sft." in n}
    whole.train()
    assert logged(whole)[0] == pytest.approx(0.6931, abs=1e-3)  # the policy begins as its reference
    assert {n: bits(p) for n, p in whole.model.named_parameters() if ".sft." in n} == first
    again = second_stage(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [bits(p) for p in again.model.parameters()] == [bits(p) for p in whole.model.parameters()]
    assert logged(again) == logged(whole)
    assert "LoRA for" in (tmp_path / "whole" / "README.md").read_text()


def test_a_trainer_that_was_made_already(tmp_path):
    """The instance of a trainer takes the reference as well."""
    model = injected()
    trainer = run("DPO", model, tmp_path, adapted=False, ref_model=training.reference(model))
    assert training.adapter_checkpoints(trainer) is trainer
    trainer.train()
    assert len(logged(trainer)) == 4


def test_what_is_refused(tmp_path):
    """A second base as the reference, an adapter of PEFT on top, and a reference that would be synchronized with the
    policy are refused, all at once, before anything is loaded."""
    import peft

    model = injected()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(
        li.StateError, match=r"(?s)peft_config was passed.*no reference was passed.*reference\(model, name\)"
    ):
        run("DPO", model, tmp_path, peft_config=config)
    with pytest.raises(li.StateError, match="no reference was passed"):
        run("GRPO", model, tmp_path, settings={"beta": 0.1})
    with pytest.raises(li.StateError, match="sync_ref_model would copy"):
        run("DPO", model, tmp_path, settings={"sync_ref_model": True}, ref_model=training.reference(model))
    with pytest.raises(li.StateError, match="set beta above 0"):
        run("GRPO", model, tmp_path, ref_model=training.reference(model))


def test_a_and_b_beside_4_bit_weights_keep_their_dtype(tmp_path):
    """TRL casts all that trains beside 4-bit weights to bfloat16; A and B keep float32, to the bit."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")
    li.inject(model, TARGETS, r=4)
    before = [bits(p) for p in li.parameters(model)]
    trainer = run("SFT", model, tmp_path / "run", settings={"save_strategy": "steps", "save_steps": 2})
    assert [bits(p) for p in li.parameters(model)] == before
    assert "_hf_peft_config_loaded" not in vars(model)
    trainer.train()
    assert {p.dtype for p in li.parameters(model)} == {torch.float32}
    assert (tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors").is_file()


def test_every_block_of_the_page_runs(tmp_path, monkeypatch):
    """The Python blocks of docs/training.md run, one after the other, with the recipe of the page."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    recipe, _, sweep = re.findall(r"^```yaml\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(recipe)
    Path("texts.jsonl").write_text("".join(json.dumps({"sentence": row["text"]}) + "\n" for row in rows("SFT")))
    base().save_pretrained("base")
    tokenizer().save_pretrained("base")
    data = [{"input_ids": row, "labels": row} for row in ids(rows=8)]
    settings = {"max_steps": 2, "report_to": "none", "use_cpu": True, "bf16": False, "save_steps": 2, "max_length": 16}
    names: dict[str, Any] = {
        "torch": torch, "model": base(), "base_model": base, "dataset": data, "settings": settings,
        "texts": rows("SFT"), "pairs": rows("DPO"), "tokenizer": tokenizer(), "tokens": ids(rows=160),
    }  # fmt: skip
    for block in blocks:
        if "SFTTrainer" in block or "training.sweep" in block:
            names["model"] = base()
        exec(block, names)
    assert len(blocks) == 9
    assert (tmp_path / "dpo" / "checkpoint-2" / "sft" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "second" / "report.md").is_file()
    Path("recipe.yaml").write_text(f"{recipe}\n{sweep}".replace("merged: true", "merged: false").replace(
        "  optimizer: {lr_ratio_b: 4}", ""))  # fmt: skip
    assert training.Recipe.read("recipe.yaml", ["output.directory=third"]).sweep.root.keys() == {"r4", "r16-fast"}
