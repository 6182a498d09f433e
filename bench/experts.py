"""One layer of stacked experts and one token: the base, ours and PEFT's.

The layer is Qwen3-MoE's block with 64 experts, 8 per token, and hidden size 512, by each of the implementations of
experts in transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import peft
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import lorainject as li

from .measure import Setup, Timed, allocations, interleaved, process_growth, profile_excess
from .models import agree, dtype_name, mebibytes
from .row import Figure, Goal, Row, exact_value

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class Layer(nn.Module):
    """One mixture-of-experts block under a name, so that PEFT can target its parameters."""

    def __init__(self, implementation: str, dtype: torch.dtype) -> None:
        super().__init__()
        config = Qwen3MoeConfig(hidden_size=512, moe_intermediate_size=512, num_experts=64, num_experts_per_tok=8)
        config._experts_implementation = implementation
        torch.manual_seed(0)
        self.mlp = Qwen3MoeSparseMoeBlock(config)
        for p in self.parameters():
            nn.init.normal_(p, std=0.02)
        self.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)
        return y[0] if isinstance(y, tuple) else y


@torch.no_grad()
def three(implementation: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return the base, ours and PEFT's with the same A and B.

    PEFT keeps the factors of all experts in one matrix each: A (experts r, in) and B (out, r experts).
    """
    base = Layer(implementation, dtype)
    ours = li.inject(copy.deepcopy(base), ["experts"], r=8)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=8, lora_alpha=8, target_modules=[], target_parameters=PARAMETERS)
    )
    wrapped = {m.parameter_name: m for m in theirs.modules() if hasattr(m, "parameter_name")}
    for parameter in ("gate_up_proj", "down_proj"):
        adapter = ours.mlp.experts.get_submodule(f"lora_{parameter}")["default"]
        adapter.A.normal_(std=512**-0.5), adapter.B.normal_(std=0.02)
        other = wrapped[parameter]
        other.lora_A["default"].weight.copy_(adapter.A.flatten(0, 1))
        other.lora_B["default"].weight.copy_(adapter.B.permute(1, 2, 0).flatten(1))
    return {"base": base.eval(), "ours": ours.eval(), "PEFT": theirs.eval()}


def token(setup: Setup) -> Iterator[Figure]:
    """Measure one token by each implementation of experts, and the memory of a training step."""
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        for dtype in setup.dtypes:
            models, x = three(implementation, dtype), torch.randn(1, 1, 512, dtype=dtype)
            calls = {who: Timed(torch.no_grad()(partial(m, x))) for who, m in models.items()}
            differ = agree([calls["ours"].call()], [calls["PEFT"].call()], dtype)
            case, times = f"{dtype_name(dtype)}, {implementation}", interleaved(calls, setup)
            yield Figure(
                case=case,
                metric="T / T(base)",
                value=times.ratio("ours", "base"),
                beside=times.summary(),
                differ=differ,
                limit="the base, and the A and B of 8 experts",
                why=partial(profile_excess, calls["ours"], calls["base"], setup),
            )
            largest = {who: float(max(allocations(call.call))) for who, call in calls.items()}
            stack = min(models["base"].mlp.experts.get_parameter(p.rpartition(".")[2]).nbytes for p in PARAMETERS)
            share = exact_value(largest["ours"] / stack)
            yield Figure(
                case=case, metric="largest allocation / the smaller stack", value=share, beside=mebibytes(largest)
            )
    for dtype in setup.dtypes:
        mib = {who: process_growth(step, who, dtype) for who in ("base", "ours", "PEFT")}
        beside = ", ".join(f"{who} {n:.3g}" for who, n in mib.items()) + " MiB"
        yield Figure(
            case=f"{dtype_name(dtype)}, grouped_mm, training step of 64 tokens",
            metric="growth, MiB",
            value=exact_value(mib["ours"]),
            beside=beside,
        )


def step(who: str, dtype: torch.dtype) -> Callable[[], object]:
    """Return one training step, for a fresh process. The step of the base computes the gradient of x alone."""
    model, x = three("grouped_mm", dtype)[who].train(), torch.randn(1, 64, 512, dtype=dtype, requires_grad=True)
    model(x[:, :1])  # libraries take memory of their own at their first call
    return lambda: model(x).square().sum().backward()


ROWS = (
    Row(
        name="experts",
        what="stacked experts, one token, 64 experts",
        limit="base, and each used A and B read once",
        goals={"T / T(base)": Goal(2, 1.3), "largest allocation / the smaller stack": Goal(0.999)},
        measure=token,
        bound="Small products, and the dispatch of torch functions to the lazy weight: two more pairs of products of"
        " rank 8 per expert of a token, with a base that takes a few milliseconds.",
    ),
)
