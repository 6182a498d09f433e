"""lorainject beside PEFT, in one process, verb by verb.

    scripts/bench            the table
    scripts/bench --rounds 5 fewer rounds

Both work on the same Llama-shaped base (16 blocks of 7 linears = 112 sites, d 512). In every round each variant runs once, in
random order; printed are medians of this process's CPU time and of the ratio round by round. One intra-op thread: the figures
are for comparing, not for bragging.
"""

from __future__ import annotations

import argparse
import copy
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn

import lorainject as li

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Row = tuple[str, Callable[[], object], Callable[[], object]]


def base(dtype: torch.dtype) -> nn.Module:
    """The Llama-shaped model that everything is measured on."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 16, "num_attention_heads": 8, "vocab_size": 1000}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(dtype).eval()


def config() -> peft.LoraConfig:
    return peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)


def ours(model: nn.Module) -> nn.Module:
    return randomised(li.inject(model, TARGETS, r=8, alpha=16))


def theirs(model: nn.Module) -> peft.PeftModel:
    return randomised(peft.get_peft_model(model, config()))


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Random A and B: a zero B would make merges and products unfairly easy."""
    for p in model.parameters():
        if p.requires_grad:
            p.normal_(std=0.05)
    return model


def rows(dtype: torch.dtype, folder: Path) -> list[Row]:
    """Each verb with ours and theirs, set up so that a call can be repeated."""
    plain, mine, other = base(dtype), ours(base(dtype)), theirs(base(dtype))
    li.save(mine, folder / "ours")
    other.save_pretrained(folder / "theirs")
    ids = torch.randint(0, 1000, (1, 128))
    spare = [copy.deepcopy(plain) for _ in range(2)]

    def forward(model: nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return model(input_ids=tokens, use_cache=False).logits

        return call

    def step(model: nn.Module) -> Callable[[], object]:
        def call() -> None:
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        return call

    def inject_peft() -> None:
        peft.get_peft_model(spare[1], config()).unload()

    def inject_ours() -> None:
        li.eject(li.inject(spare[0], TARGETS, r=8, alpha=16))

    def load_peft() -> None:
        peft.PeftModel.from_pretrained(spare[1], folder / "theirs").unload()

    def load_ours() -> None:
        li.eject(li.load(spare[0], folder / "ours", check_base=False))

    return [
        ("inject and eject", inject_ours, inject_peft),
        ("forward, 128 tokens", forward(mine, ids), forward(other, ids)),
        ("forward, 1 token", forward(mine, ids[:, :1]), forward(other, ids[:, :1])),
        ("forward and backward, 128 tokens", step(mine), step(other)),
        ("merge and unmerge", lambda: (li.merge(mine), li.unmerge(mine)), lambda: (other.merge_adapter(), other.unmerge_adapter())),
        ("save", lambda: li.save(mine, folder / "ours"), lambda: other.save_pretrained(folder / "theirs")),
        ("load and eject", load_ours, load_peft),
    ]


def measure(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    """Print one table a dtype."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    console = Console()
    console.print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__},"
                  f" peft {peft.__version__}, lorainject {li.__version__}; {rounds} rounds", highlight=False)  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        table = Table("verb", "ours, ms", "PEFT, ms", "ours / PEFT", title=str(dtype).removeprefix("torch."), box=None, header_style="bold")
        for column in table.columns[1:]:
            column.justify = "right"
        with tempfile.TemporaryDirectory() as folder:
            for name, mine, other in rows(dtype, Path(folder)):
                mine(), other()
                times: dict[bool, list[float]] = {True: [], False: []}
                for _ in range(rounds):
                    for which in random.sample([True, False], 2):
                        times[which].append(measure(mine if which else other))
                ratio = statistics.median(a / b for a, b in zip(times[True], times[False], strict=True))
                table.add_row(name, *(f"{statistics.median(times[w]) * 1e3:.1f}" for w in (True, False)), f"{ratio:.2f}")
        console.print(table)


if __name__ == "__main__":
    main()
