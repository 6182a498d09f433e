"""What it costs to go from one merged adapter to another, beside reloading the base and beside PEFT.

    PYTHONPATH=src python tools/switch_costs.py --rounds 9 | tee switches.jsonl

A model of random weights, 8 blocks of a Llama's seven linears, has three adapters. The ways:

    merged     `with li.merged(model, name)`, each begun before the last one ends
    peft       unmerge_adapter and merge_adapter
    copy       W0 from a copy in memory, then merge(reversible=False); the copy is as large as the weights
    reload     W0 from a safetensors file in the page cache, then merge(reversible=False)

Each line of the output is one way and dtype: milliseconds of CPU time per switch, the median of the rounds; the bytes
that are kept for the way back, relative to the weights; and how many elements differ from W0 after the last one was
taken out. The ways take turns, so that other load on the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import lorainject as li

NAMES = ("fr", "de", "es")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(width: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=8,
                         num_attention_heads=8, num_key_value_heads=8)  # fmt: skip
    return LlamaModel(config).to(dtype).eval()


def draw_factors(model: nn.Module) -> None:
    """Give A and B values with which the delta is about 3 % of the weight."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.02)


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "lora" not in name}


class Merged:
    """A model whose adapters are merged by `li.merged`."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.model = build(width, dtype)
        for name in NAMES:
            li.inject(self.model, TARGETS, r=8, name=name)
        draw_factors(self.model)
        self.W0, self.open, self.kept = {n: t.clone() for n, t in base_weights(self.model).items()}, ExitStack(), 0

    def switch(self, name: str) -> None:
        following = ExitStack()
        report = following.enter_context(li.merged(self.model, name))
        self.open.close()
        self.open, self.kept = following, report.journal_bytes

    def finish(self) -> dict[str, Tensor]:
        self.open.close()
        return base_weights(self.model)


class Peft:
    """A model whose adapters are merged by PEFT."""

    kept = 0

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS)
        self.model = peft.get_peft_model(build(width, dtype), config, NAMES[0])
        for name in NAMES[1:]:
            self.model.add_adapter(name, config)
        draw_factors(self.model)
        self.W0 = {n: t.clone() for n, t in base_weights(self.model).items()}

    def switch(self, name: str) -> None:
        self.model.unmerge_adapter()
        self.model.merge_adapter([name])

    def finish(self) -> dict[str, Tensor]:
        self.model.unmerge_adapter()
        return base_weights(self.model)


class Restored:
    """A model whose W0 is written again before each merge: from memory, or from a file."""

    def __init__(self, width: int, dtype: torch.dtype, path: Path | None) -> None:
        self.model = build(width, dtype)
        self.W0 = {n: t.clone() for n, t in base_weights(self.model).items()}
        self.path, self.kept = path, 0
        if path is None:
            self.kept = sum(t.nbytes for t in self.W0.values())
        else:
            save_file(self.W0, path)
        for name in NAMES:
            li.inject(self.model, TARGETS, r=8, name=name)
        draw_factors(self.model)
        self.adapters = {n: p.detach().clone() for n, p in self.model.named_parameters() if "lora" in n}

    def restore(self) -> None:
        values = self.W0 if self.path is None else load_file(self.path)
        with torch.no_grad():
            for name, p in base_weights(self.model).items():
                p.copy_(values[name])

    def switch(self, name: str) -> None:
        li.eject(self.model)
        self.restore()
        li.inject(self.model, TARGETS, r=8, name=name)
        with torch.no_grad():
            for key, p in self.model.named_parameters():
                if "lora" in key:
                    p.copy_(self.adapters[key])
        li.merge(self.model, reversible=False)

    def finish(self) -> dict[str, Tensor]:
        self.restore()
        return base_weights(self.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for dtype in args.dtype:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "base.safetensors"
            makers: dict[str, Callable[[], Merged | Peft | Restored]] = {
                "merged": lambda dtype=dtype: Merged(args.width, getattr(torch, dtype)),
                "peft": lambda dtype=dtype: Peft(args.width, getattr(torch, dtype)),
                "copy": lambda dtype=dtype: Restored(args.width, getattr(torch, dtype), None),
                "reload": lambda dtype=dtype, path=path: Restored(args.width, getattr(torch, dtype), path),
            }
            ways = {name: make() for name, make in makers.items()}
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for i in range(args.rounds + 1):
                for name, way in ways.items():
                    start = time.process_time()
                    way.switch(NAMES[i % len(NAMES)])
                    seconds[name].append(time.process_time() - start)
            for name, way in ways.items():
                size, after = sum(t.nbytes for t in way.W0.values()), way.finish()
                changed = sum(int((after[key] != t).sum()) for key, t in way.W0.items())
                line = {
                    "dtype": dtype,
                    "way": name,
                    "ms": round(statistics.median(seconds[name][1:]) * 1e3, 1),
                    "kept / weights": round(way.kept / size, 3),
                    "elements changed": changed,
                    "elements": sum(t.numel() for t in way.W0.values()),
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
