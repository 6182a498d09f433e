"""merge and unmerge beside PEFT's, by the size of the delta: time, what is kept instead of a backup, and how far memory grows.

    scripts/bench merge              the tables
    scripts/bench merge --rounds 5   fewer rounds

Three linears of 4096 x 4096, rank 8. In every round ours and PEFT's run once, in random order; printed are medians of wall time and of the
ratio round by round, with one thread and with all. PEFT keeps nothing, and its unmerge does not give W0 back.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import lorainject as li

N, LAYERS, R = 4096, 3, 8
NAMES = [str(i) for i in range(LAYERS)]
SHARES = (0.003, 0.01, 0.03, 0.1, 0.3)


def pair(dtype: torch.dtype, share: float) -> tuple[nn.Module, peft.PeftModel]:
    """The same base with our adapter and with PEFT's; the delta's elements are about `share` of the weight's."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(N, N, bias=False, dtype=dtype) for _ in NAMES])
    for layer in model:
        nn.init.normal_(layer.weight, std=0.02)
    other = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=R, lora_alpha=R, target_modules=NAMES))
    li.inject(model, NAMES, r=R)
    for m in (model, other):
        for p in m.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=(0.02 * share / R**0.5) ** 0.5)
    return model, other


def timed(call: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def row(dtype: torch.dtype, share: float, rounds: int) -> list[str]:
    """One line of a table; checks that W0 comes back."""
    mine, other = pair(dtype, share)
    before = [p.clone() for n, p in mine.named_parameters() if "lora" not in n]
    times: dict[str, list[float]] = {k: [] for k in ("merge", "unmerge", "PEFT merge", "PEFT unmerge")}
    report = None
    for _ in range(rounds + 1):
        for ours in random.sample([True, False], 2):
            calls = (lambda: li.merge(mine), lambda: li.unmerge(mine)) if ours else (other.merge_adapter, other.unmerge_adapter)
            for name, call in zip(("merge", "unmerge") if ours else ("PEFT merge", "PEFT unmerge"), calls, strict=True):
                seconds, found = timed(call)
                times[name].append(seconds)
                report = found if name == "merge" else report
    assert all(torch.equal(a, b) for a, b in zip(before, (p for n, p in mine.named_parameters() if "lora" not in n), strict=True))
    assert isinstance(report, li.MergeReport)
    ms = {k: statistics.median(v[1:]) * 1e3 for k, v in times.items()}
    ratios = [statistics.median(a / b for a, b in zip(times[k][1:], times[f"PEFT {k}"][1:], strict=True)) for k in ("merge", "unmerge")]
    layers = zip(other.base_model.model, before, strict=True)
    drift = max(float((layer.get_base_layer().weight - w).abs().max() / w.abs().max()) for layer, w in layers)
    kept = report.journal_bytes / report.weight_bytes
    return [f"{share:.1%}", f"{ms['merge']:.0f}", f"{ratios[0]:.2f}", f"{ms['unmerge']:.0f}", f"{ratios[1]:.2f}", f"{kept:.1%}",
            f"{report.survival:.3f}", f"{report.sites[0].error:.0%}", f"{drift:.0e}"]  # fmt: skip


def growth(way: str) -> None:
    """In a process of its own: how far a merge makes it grow, in MiB."""
    mine, other = pair(torch.bfloat16, 0.01)
    li.merge(mine), li.unmerge(mine), other.merge_adapter(), other.unmerge_adapter()  # what the first call of each library loads
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    resident = memory("VmRSS")
    li.merge(mine) if way == "lorainject" else other.merge_adapter()
    print(json.dumps((memory("VmHWM") - resident) / 1024))


def memory(what: str) -> int:
    """Of this process, in KiB: VmRSS now, VmHWM at its peak."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)).split()[1])


def main() -> None:
    """Print one table for each dtype and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--growth", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.growth:
        return growth(args.growth)
    console, threads = Console(width=150), torch.get_num_threads()
    for n in dict.fromkeys((1, threads)):
        torch.set_num_threads(n)
        for dtype in (torch.bfloat16, torch.float32):
            title = f"{str(dtype).removeprefix('torch.')}, {n} thread{'s' * (n > 1)}"
            columns = ("|d| / |W|", "merge, ms", "/ PEFT", "unmerge, ms", "/ PEFT", "kept / backup", "survival", "error", "PEFT's drift")
            table = Table(*columns, box=None, header_style="bold", title=title)
            for share in SHARES if n == threads else (0.01,):
                table.add_row(*row(dtype, share, args.rounds))
            console.print(table)
    weights = LAYERS * N * N * 2 / 2**20
    for way in ("lorainject", "PEFT"):
        done = subprocess.run([sys.executable, __file__, "--growth", way], capture_output=True, text=True, check=True)
        console.print(f"merging {weights:.0f} MiB of bfloat16 makes the process grow by {json.loads(done.stdout.splitlines()[-1]):.0f} MiB: {way}")
    return None


if __name__ == "__main__":
    main()
