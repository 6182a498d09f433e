"""What the tests of merges on disk share: a tiny Mixtral, and comparisons of checkpoints to the bit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

MOE_SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def mixtral() -> nn.Module:
    """Return a Mixtral with twelve experts, which transformers stores one by one."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**MOE_SIZES, num_local_experts=12)).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """True if both checkpoints have the same tensors, to the bit."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files in a folder, by their relative paths."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
