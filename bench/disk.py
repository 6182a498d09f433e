"""Merging on disk beside `cp -r` and beside PEFT's load + merge + save.

    scripts/bench disk                   1 GB and 6 GB in bf16, all-linear adapters, and per-expert files
    scripts/bench disk --sizes 1 --rounds 5

The checkpoints are Llama- and Mixtral-shaped and random, made on the spot in bfloat16. Each run is a process of its own with all cores;
printed are medians of wall time without the imports, of the ratio round by round, and of how far the process's memory (peak resident
set) grew. Source files are in the page cache; ours and `cp` end with an fsync of what they wrote, PEFT does not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

import lorainject as li

SHARD = 2 << 30  # bytes


def checkpoint(folder: Path, gigabytes: float, experts: int = 0) -> None:
    """A random checkpoint in bf16, with the names that such models have on disk, and a rank-16 adapter for it."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000}
    if experts:
        config = transformers.MixtralConfig(**sizes | {"intermediate_size": 1408}, num_local_experts=experts, num_hidden_layers=1)
    else:
        config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=False)
    with torch.device("meta"):
        one = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    layer = sum(p.nbytes for n, p in one.named_parameters() if ".layers." in n)
    rest = sum(p.nbytes for n, p in one.named_parameters() if ".layers." not in n)
    config.num_hidden_layers = max(1, round((gigabytes * 1e9 - rest) / layer))
    config.architectures, config.dtype = [type(one).__name__], torch.bfloat16
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = type(one)(config).to(torch.bfloat16)
    # What its tensors are called on disk, transformers knows.
    from transformers.core_model_loading import revert_weight_conversion

    names = revert_weight_conversion(model, dict(model.state_dict())) if experts else model.state_dict()
    shards: list[dict[str, torch.Tensor]] = [{}]
    for key, t in names.items():
        if sum(x.nbytes for x in shards[-1].values()) + t.nbytes > SHARD:
            shards.append({})
        shards[-1][key] = t
    index = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file({k: torch.randn(t.shape, dtype=torch.bfloat16) * 0.02 for k, t in shard.items()}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in names.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))


def adapter(folder: Path, base: Path) -> None:
    """Rank 16 on every linear, of about 2 % of the weights."""
    config = transformers.AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    li.inject(model, "all-linear", r=16, alpha=16)
    for module in model.modules():
        if type(module).__name__ == "LowRank":
            module.to_empty(device="cpu")
            with torch.no_grad():
                module.A.normal_(std=0.01)
                module.B.normal_(std=0.01)
    li.save(model, folder)


def ours(base: Path, adapter: Path, out: Path) -> None:
    li.merge_checkpoint(base, adapter, out)


def theirs(base: Path, adapter: Path, out: Path) -> None:
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="2GB")


def cp(base: Path, adapter: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", base, out], check=True)
    subprocess.run(["sync", *out.iterdir()], check=True)


WAYS = {"lorainject": ours, "cp -r": cp, "PEFT": theirs}


def child(way: str, base: Path, adapter: Path, out: Path) -> None:
    """One run, measured from within."""
    warnings.simplefilter("ignore")
    _ = transformers.LlamaForCausalLM, transformers.MixtralForCausalLM  # to import them takes seconds, and both need them
    if way == "PEFT":
        import peft  # noqa: F401
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    resident, start = memory("VmRSS"), time.perf_counter()
    WAYS[way](base, adapter, out)
    print(json.dumps([time.perf_counter() - start, memory("VmHWM") - resident]))


def memory(what: str) -> int:
    """Of this process, in KiB: VmRSS now, VmHWM at its peak."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)).split()[1])


def main() -> None:
    """Print one table a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=float, nargs="*", default=[1, 6], help="gigabytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", type=float, default=1, help="gigabytes of a checkpoint with 16 experts a layer; 0: none")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], *map(Path, args.child[1:]))
    console = Console()
    for gigabytes, experts in [*((size, 0) for size in args.sizes), *([(args.experts, 16)] if args.experts else [])]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            checkpoint(folder / "base", gigabytes, experts)
            adapter(folder / "adapter", folder / "base")
            seen: dict[str, list[tuple[float, int]]] = {way: [] for way in WAYS}
            for _ in range(args.rounds):
                for way, found in seen.items():
                    call = [sys.executable, __file__, "--child", way, folder / "base", folder / "adapter", folder / "out"]
                    done = subprocess.run(call, capture_output=True, text=True, check=True)
                    found.append(tuple(json.loads(done.stdout.splitlines()[-1])))
                    if way == "lorainject":
                        shutil.rmtree(folder / "ours", ignore_errors=True)
                        shutil.move(folder / "out", folder / "ours")
                    shutil.rmtree(folder / "out", ignore_errors=True)
            size = sum(p.stat().st_size for p in (folder / "base").iterdir())
            shards = len(list((folder / "base").glob("*.safetensors")))
            title = f"{size / 1e9:.1f} GB, {shards} shard{'s' * (shards > 1)}{', 16 experts a layer' * bool(experts)}"
            table = Table("way", "seconds", "ours / it", "growth, MiB", box=None, header_style="bold", title=title)
            for way, found in seen.items():
                ratio = statistics.median(a[0] / b[0] for a, b in zip(seen["lorainject"], found, strict=True))
                seconds, growth = (statistics.median(x) for x in zip(*found, strict=True))
                table.add_row(way, f"{seconds:.1f}", f"{ratio:.2f}", f"{growth / 1024:.0f}")
            console.print(table)
            keys = {k for f in (folder / "ours").glob("*.safetensors") for k in load_file(f)}
            assert keys == set(json.loads((folder / "base" / "model.safetensors.index.json").read_text())["weight_map"])
    return None


if __name__ == "__main__":
    main()
