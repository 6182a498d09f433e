"""Two tiny mixture-of-experts models, one stored as (experts, out, in) and one as (experts, in, out)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def mixtral() -> nn.Module:
    """Return a Mixtral, whose experts are stored (experts, out, in)."""
    from transformers import MixtralConfig, MixtralModel

    return MixtralModel(MixtralConfig(**SIZES, num_local_experts=8))


def gpt_oss() -> nn.Module:
    """Return a gpt-oss, whose experts are stored (experts, in, out)."""
    from transformers import GptOssConfig, GptOssModel

    return GptOssModel(GptOssConfig(**SIZES, head_dim=16, num_local_experts=8, num_experts_per_tok=2))


def moe_model(
    build: Callable[[], nn.Module], implementation: str = "eager", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Build a model with random weights, biases and norms included, that runs its experts by one of transformers' ways.

    Args:
        implementation: "eager", "batched_mm" or "grouped_mm".
    """
    torch.manual_seed(0)
    model = build().to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    model.set_experts_implementation(implementation)
    return model


def moe_output(model: nn.Module) -> Tensor:
    """Return the hidden states for two rows of seven tokens, shape (2, 7, hidden_size)."""
    return model(input_ids=torch.arange(14).reshape(2, 7)).last_hidden_state
