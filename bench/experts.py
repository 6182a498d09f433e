"""One layer of stacked experts: the base, lorainject unmerged and merged, and PEFT, side by side.

    scripts/bench experts

Qwen3-MoE's block with 64 experts, 8 a token, hidden size 512, one intra-op thread. Time: one token, in random order within each round;
printed are medians of the wall time, and of the ratio to the base round by round. Memory: the peak resident size that one training step
on 64 tokens adds, each in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import lorainject as li

WHO = ("base", "unmerged", "merged", "PEFT")


class Layer(nn.Module):
    """The block under a name, so that PEFT can target its parameters."""

    def __init__(self, implementation: str, dtype: torch.dtype) -> None:
        super().__init__()
        config = Qwen3MoeConfig(hidden_size=512, moe_intermediate_size=512, num_experts=64, num_experts_per_tok=8)
        config._experts_implementation = implementation
        torch.manual_seed(0)
        self.mlp = Qwen3MoeSparseMoeBlock(config)
        for p in self.parameters():
            nn.init.normal_(p, std=0.02)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)
        return y[0] if isinstance(y, tuple) else y


def made(who: str, base: nn.Module) -> nn.Module:
    """One of the four, with random A and B."""
    model = copy.deepcopy(base)
    if who == "PEFT":
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=[], target_parameters=parameters))
    elif who != "base":
        li.inject(model, ["experts"], r=8)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and who != "base":
                p.normal_(std=0.05)
    if who == "merged":
        li.merge(model)
    return model


def times(implementation: str, dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """Seconds for one token, by variant and round."""
    base = Layer(implementation, dtype).eval()
    models, x = {who: made(who, base).eval() for who in WHO}, torch.randn(1, 1, 512, dtype=dtype)
    found: dict[str, list[float]] = {who: [] for who in WHO}
    with torch.no_grad():
        for n in range(rounds + 2):
            for who in random.sample(WHO, len(WHO)):
                start = time.perf_counter()
                models[who](x)
                if n >= 2:  # two rounds to warm up
                    found[who].append(time.perf_counter() - start)
    return found


def _peak(who: str, dtype: torch.dtype, out: Callable[[float], None]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = made(who, Layer("grouped_mm", dtype)).train()
    x = torch.randn(1, 64, 512, dtype=dtype)
    model(x[:, :1])  # libraries take their own memory at their first call
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here
    before = _resident("VmHWM")
    model(x).square().sum().backward()
    out((_resident("VmHWM") - before) / 1024)


def _resident(field: str) -> float:
    """KiB, by /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field))


def peak(who: str, dtype: torch.dtype) -> float:
    """MiB that one training step adds to the process's peak."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(who, dtype, send.send))
    process.start()
    found = receive.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = Table("experts", "dtype", *(f"{who}, ms" for who in WHO), "unmerged / base", "PEFT / base")
    for dtype in (torch.float32, torch.bfloat16):
        for implementation in ("eager", "batched_mm", "grouped_mm"):
            found = times(implementation, dtype, rounds)
            ratios = {who: statistics.median(a / b for a, b in zip(found[who], found["base"], strict=True)) for who in WHO}
            cells = [f"{1e3 * statistics.median(found[who]):.2f}" for who in WHO]
            table.add_row(implementation, str(dtype).removeprefix("torch."), *cells, f"{ratios['unmerged']:.2f}", f"{ratios['PEFT']:.0f}")
    console = Console(width=120)
    console.print(table)
    memory = Table("training step, peak MiB", "dtype", "unmerged", "PEFT")
    for dtype in (torch.float32, torch.bfloat16):
        memory.add_row("grouped_mm", str(dtype).removeprefix("torch."), *(f"{peak(who, dtype):.0f}" for who in ("unmerged", "PEFT")))
    console.print(memory)


if __name__ == "__main__":
    main()
