"""Merging on disk, compared with `cp -r` and with PEFT's load, merge and save.

The checkpoints are random, in bfloat16, shaped like Llama and Mixtral, with a rank-16 adapter on every linear layer.
Every run has a fresh process with all cores. Measured are the wall time without the imports, and how far the resident
set of the process grows at its peak. The source files are in the page cache, and all three end with an fsync of what
they wrote (PEFT's own save does none, so it is given one).
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import peft
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.core_model_loading import revert_weight_conversion

import lorainject as li
from lorainject.lora.adapter import LoraAdapter

from .measure import MOST, Setup, Times, growth_during, in_fresh_process
from .row import Figure, Goal, Row, exact_value

SHARD = 2 << 30  # bytes


def checkpoint(folder: Path, gigabytes: float, experts: int = 0) -> None:
    """Write a random bfloat16 checkpoint with the tensor names that such models have on disk."""
    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    }
    kind = MixtralForCausalLM if experts else LlamaForCausalLM
    if experts:
        config = MixtralConfig(**sizes | {"intermediate_size": 1408}, num_local_experts=experts, num_hidden_layers=1)
    else:
        config = LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=False)
    with torch.device("meta"):
        one = kind(config).to(torch.bfloat16)
    layer = sum(p.nbytes for n, p in one.named_parameters() if ".layers." in n)
    rest = sum(p.nbytes for n, p in one.named_parameters() if ".layers." not in n)
    config.num_hidden_layers = max(1, round((gigabytes * 1e9 - rest) / layer))
    config.architectures, config.dtype = [kind.__name__], torch.bfloat16
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = kind(config).to(torch.bfloat16)
    # What its tensors are called on disk, transformers knows.
    names = revert_weight_conversion(model, dict(model.state_dict())) if experts else model.state_dict()
    shards: list[dict[str, torch.Tensor]] = [{}]
    for key, t in names.items():
        if sum(x.nbytes for x in shards[-1].values()) + t.nbytes > SHARD:
            shards.append({})
        shards[-1][key] = t
    index = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(
            {k: torch.randn(t.shape, dtype=torch.bfloat16) * 0.02 for k, t in shard.items()},
            folder / file,
            {"format": "pt"},
        )
        index |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in names.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )


def adapter(folder: Path, base: Path) -> None:
    """Write an adapter of rank 16 for every linear layer, whose deltas are about 2 % of the weights."""
    config = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    li.inject(model, "all-linear", r=16, alpha=16)
    for module in model.modules():
        if isinstance(module, LoraAdapter):
            module.to_empty(device="cpu")
            with torch.no_grad():
                module.A.normal_(std=0.01)
                module.B.normal_(std=0.01)
    li.save(model, folder)


def ours(base: Path, adapter: Path, out: Path) -> None:
    """Merge with lorainject."""
    li.merge_checkpoint(base, adapter, out)


def theirs(base: Path, adapter: Path, out: Path) -> None:
    """Merge with PEFT: load, merge, save, and flush to the disk."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="2GB")
    subprocess.run(["sync", *out.iterdir()], check=True)


def cp(base: Path, adapter: Path, out: Path) -> None:
    """Copy the checkpoint, and flush it to the disk."""
    subprocess.run(["cp", "-r", base, out], check=True)
    subprocess.run(["sync", *out.iterdir()], check=True)


WAYS = {"ours": ours, "cp": cp, "PEFT": theirs}


def one(way: str, base: Path, adapter: Path, out: Path) -> tuple[float, float]:
    """Return the seconds that one merge takes, and the MiB that this process grows by."""
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    mib = growth_during(partial(WAYS[way], base, adapter, out))
    return time.perf_counter() - start, mib


def merge(setup: Setup) -> Iterator[Figure]:
    """Measure merges of checkpoints of several sizes, with and without experts."""
    for gigabytes, experts, most_rounds in [(0.3, 0, 3)] if setup.quick else [(1, 0, MOST), (1, 16, MOST), (6.2, 0, 3)]:
        with tempfile.TemporaryDirectory() as name:
            base, lora = Path(name, "base"), Path(name, "adapter")
            checkpoint(base, gigabytes, experts)
            adapter(lora, base)
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            mib: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(min(setup.rounds, most_rounds)):
                for way in random.sample(list(WAYS), len(WAYS)):
                    took, grew = in_fresh_process(one, way, base, lora, Path(name, way))
                    seconds[way].append(took)
                    mib[way].append(grew)
                differ = None if experts else agreed(Path(name, "ours"), Path(name, "PEFT"))
                for way in WAYS:
                    shutil.rmtree(Path(name, way))
            size = sum(p.stat().st_size for p in base.glob("*.safetensors")) / 1e9
            case, times = f"bf16, {size:.1f} GB{', 16 experts a layer' * bool(experts)}", Times(seconds)
            beside = ", ".join(f"{way} {times.ms(way) / 1e3:.3g}" for way in WAYS) + " s, wall time"
            copy = f"{times.ratio('cp', 'PEFT').value:.2g}: cp"
            metric = "T / PEFT's, experts" if experts else "T / PEFT's"
            yield Figure(
                case=case, metric=metric, value=times.ratio("ours", "PEFT"), beside=beside, limit=copy, differ=differ
            )
            yield Figure(case=case, metric="T / cp's", value=times.ratio("ours", "cp"), beside=beside, limit="1")
            median = {way: statistics.median(values) for way, values in mib.items()}
            yield Figure(
                case=case,
                metric="growth, MiB",
                value=exact_value(median["ours"]),
                beside=f"PEFT {median['PEFT']:.0f} MiB",
                limit="a tile: 1",
            )


def agreed(ours: Path, theirs: Path) -> float:
    """Return the largest relative difference between the tensors of two results, which must have the same names."""
    files = [
        {key: file for f in folder.glob("*.safetensors") for file in [safe_open(f, "pt")] for key in file.keys()}  # noqa: SIM118
        for folder in (ours, theirs)
    ]
    assert files[0].keys() == files[1].keys(), "the same tensors"
    pairs = ((files[0][key].get_tensor(key).float(), files[1][key].get_tensor(key).float()) for key in files[0])
    differ = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    assert differ < 0.01, f"the merged checkpoints are {differ:.2g} apart"
    return differ


ROWS = (
    Row(
        name="disk",
        what="merge a checkpoint on disk, all-linear",
        limit="one copy of the checkpoint, less with reflinks; memory: one tile",
        goals={
            "T / PEFT's": Goal(0.35, 0.2),
            "T / PEFT's, experts": Goal(None, 0.35),
            "T / cp's": Goal(None, 2),
            "growth, MiB": Goal(100, 48),
        },
        measure=merge,
        bound="The copy and its fsync, which alone take the share of PEFT's time that `cp` has here. Every adapted"
        " tensor is also read, merged and written once, by two threads that wait for Python's lock a third of their"
        " time. A disk that others write to may be four times as slow from one minute to the next; the quartiles show"
        " where it was. The memory is the tiles of the threads, and the skeleton of the model in transformers: A and"
        " B lie in a temporary file, and are mapped while they are used.",
    ),
)
