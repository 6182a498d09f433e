"""What is measured: one model as frozen base, with lorainject and with PEFT, with the same random A and B."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorainject as li

R, ALPHA = 8, 16
RANKS = (8, 16, 64)  # the ranks at which `forward`, `train` and `decode` are measured
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
APART = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
"""The largest relative difference that is rounding. A mistake gives one near 1."""

FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
SIZES = {
    "112 linears, d 512": (512, 1376, 16, 8, 1000),
    "110M": (768, 2048, 12, 12, 32000),
    "340M": (1024, 2816, 24, 16, 32000),
    "8B's shapes, 2 layers": (4096, 14336, 2, 32, 1000),
}
SMALL = "112 linears, d 512"


def llama(size: str, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """Return a Llama-shaped model with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**dict(zip(FIELDS, SIZES[size], strict=True)), tie_word_embeddings=True)
    return LlamaForCausalLM(config).to(device, dtype).eval()


class Block(nn.Module):
    """Linear layers that read one x, as q_proj, k_proj and v_proj do."""

    def __init__(self, names: Sequence[str], k: int, n: int, dtype: torch.dtype, device: str = "cpu") -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            self.add_module(name, nn.Linear(k, n, bias=False, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.children()]


@dataclass(frozen=True)
class Trio:
    """The frozen base, ours and PEFT's, of one model."""

    base: nn.Module
    ours: nn.Module
    theirs: peft.PeftModel
    shared: bool
    """True if W0 is the same memory in all three."""
    r: int = R
    """The rank of every adapter."""

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        return iter({"base": self.base, "ours": self.ours, "PEFT": self.theirs}.items())


def trio(base: nn.Module, targets: Sequence[str] = TARGETS, *, names: Sequence[str] = ("default",),
         dropout: float = 0.0, shared: bool = True, r: int = R) -> Trio:  # fmt: skip
    """Return three models of the same weights, two of which carry the same A and B, drawn for each of the names.

    The matrices of W0 are shared, except for merges. In separate copies, where the system places them decides how fast
    they are read, which can make more of a difference than an adapter does.
    """
    base.requires_grad_(False)
    ours, other = (
        copy.deepcopy(base, {id(p): p for p in base.parameters() if shared and p.ndim > 1}) for _ in range(2)
    )
    config = config_of(targets, dropout, r)
    theirs = peft.get_peft_model(other, config, adapter_name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, config)
    for name in names:
        li.inject(ours, list(targets), r=r, alpha=ALPHA, dropout=dropout, name=name)
        for (A, B), their_factors in pairs(ours, theirs, name):
            draw(A, B)
            for factor, theirs_too in zip((A, B), their_factors, strict=True):
                theirs_too.data.copy_(factor)
    li.activate(ours, names[0])
    return Trio(base, ours.train(base.training), theirs.train(base.training), shared, r)


def config_of(targets: Sequence[str] = TARGETS, dropout: float = 0.0, r: int = R) -> peft.LoraConfig:
    """Return PEFT's configuration of these adapters."""
    return peft.LoraConfig(r=r, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(targets))


@torch.no_grad()
def draw(A: Tensor, B: Tensor) -> None:
    """Fill A (r, in) and B (out, r) so that the term is about a quarter of the base's output."""
    A.normal_(std=A.shape[1] ** -0.5)
    B.normal_(std=0.02)


def pairs(
    ours: nn.Module, theirs: nn.Module, name: str = "default"
) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Yield (A, B) of ours and (A, B) of PEFT's, site by site."""
    other = {
        path.removeprefix("base_model.model."): module
        for path, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    adapters = {path: module.lora[name] for path, module in ours.named_modules() if "lora" in module._modules}
    assert adapters, "there are sites"
    assert adapters.keys() == other.keys(), "the same sites"
    for path, adapter in adapters.items():
        module = other[path]
        yield (adapter.A, adapter.B), (module.lora_A[name].weight, module.lora_B[name].weight)


@torch.no_grad()
def relative_difference(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative difference |a - b| / |b|."""
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(values, expected, strict=True))


def agree(values: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> float:
    """Return the largest relative difference, and raise AssertionError if it is more than rounding."""
    differ = relative_difference(values, expected)
    if not differ <= APART[dtype]:
        raise AssertionError(f"ours and the other's results are {differ:.2g} apart, more than {APART[dtype]:g}")
    return differ


def compare_gradients(model: Trio, step: Callable[[nn.Module], object], dtype: torch.dtype) -> float:
    """Return how far the gradients of A and B after one step are from PEFT's, and raise AssertionError if too far."""
    for m in (model.ours, model.theirs):
        m.zero_grad()
        step(m)
    grads = [[p.grad for AB in side for p in AB] for side in zip(*pairs(model.ours, model.theirs), strict=True)]
    assert all(g is not None and g.abs().max() > 0 for side in grads for g in side), "no gradient is missing or zero"
    differ = agree(*grads, dtype)
    model.ours.zero_grad(), model.theirs.zero_grad()
    return differ


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in the table."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def mebibytes(sizes: Mapping[str, float]) -> str:
    """Return bytes by variant as text, in MiB."""
    return ", ".join(f"{who} {n / 2**20:.3g}" for who, n in sizes.items()) + " MiB"
