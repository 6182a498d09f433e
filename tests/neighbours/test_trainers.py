"""TRL's trainers and liger-kernel's fused loss train every adapter, that of the head included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorainject as li

from models import ids, llama, randomize
from texts import rows, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # those libraries warn a lot


def trainer(kind: str, model: nn.Module, folder: str) -> Any:
    trl = pytest.importorskip("trl")
    common = {
        "output_dir": folder, "max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "learning_rate": 1e-2, "warmup_steps": 0,
    }  # fmt: skip
    if kind == "GRPO":
        common |= {"num_generations": 2, "max_completion_length": 4}
        options = {"reward_funcs": lambda completions, **_: [float(i) for i in range(len(completions))]}
    else:
        common |= {"max_length": 16}
        options = {"ref_model": llama()} if kind == "DPO" else {}
    args = getattr(trl, f"{kind}Config")(**common)
    return getattr(trl, f"{kind}Trainer")(
        model=model, args=args, train_dataset=rows(kind), processing_class=tokenizer(), **options
    )


@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
@pytest.mark.parametrize("target", ["lm_head", "lm_head.weight"])
def test_trl_trains_the_head(kind, target, tmp_path):
    """TRL's trainers multiply by the head's weight in a fused loss: the adapter on the head trains all the same, and
    probe says of the trainer's own forward that it reaches the head."""
    torch.manual_seed(0)
    model = li.inject(llama(), ["q_proj", target], r=2)
    run = trainer(kind, model, str(tmp_path))
    reach = li.probe(model, input_ids=ids(), labels=ids(), fused_lm_head=True)
    assert "lm_head" in {name.removesuffix(".weight") for name in reach.reached}
    run.train()
    untrained = [n for n, p in model.named_parameters() if n.endswith(".B") and not p.any()]
    assert untrained == []


def test_ligers_fused_loss_trains_the_head(monkeypatch):
    """liger-kernel's forward of a causal language model, whose kernel is replaced here by its formula (it needs a GPU),
    gives the head's adapter the gradient of the plain forward."""
    pytest.importorskip("liger_kernel")
    import types

    import liger_kernel.transformers.model.llama as liger

    def formula(hidden_states: torch.Tensor, lm_head_weight: torch.Tensor, labels: torch.Tensor, **_: Any) -> Any:
        assert type(lm_head_weight) is torch.Tensor
        logits = hidden_states[:, :-1] @ lm_head_weight.t()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    monkeypatch.setattr(liger, "LigerForCausalLMLoss", formula)
    model = li.inject(llama().train(), ["q_proj", "lm_head"], r=2)
    randomize(model)
    X = {"input_ids": ids(), "labels": ids(), "use_cache": False}
    expected = torch.autograd.grad(model(**X).loss, list(li.parameters(model)))
    model.forward = types.MethodType(liger.lce_forward, model)
    torch.testing.assert_close(torch.autograd.grad(model(**X).loss, list(li.parameters(model))), expected)
    assert "lm_head" in li.probe(model, **X).reached
