"""Measure extract, diff, patch and verify on a checkpoint that is made on the spot, beside reading it once.

    python tools/algebra_costs.py FOLDER --gb 2

Makes a Llama checkpoint of about this size in bfloat16, an adapter of rank 16 on every linear, and the merged
checkpoint. Each verb then runs in a process of its own; its peak of memory above that of the imports is measured, and
its time. Prints a table, and what a byte-wise difference costs: XOR of the bytes, one plane per byte of an element,
zlib at level 6.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import zlib
from pathlib import Path

import torch

RUN = """
import json, resource, sys, time, warnings
from pathlib import Path
import lorainject as li
from lorainject import algebra
from transformers import LlamaForCausalLM
warnings.simplefilter("ignore")
folder, verb = Path(sys.argv[1]), sys.argv[2]
base, merged = folder / "base", folder / "merged"
verbs = {
    "read both once": lambda: [f.read_bytes() and None for f in sorted(folder.glob("[bm]*/*.safetensors"))],
    "verify": lambda: str(algebra.verify(base, folder / "adapter", merged)),
    "extract r=16": lambda: str(algebra.extract(base, merged, 16).error),
    "extract auto": lambda: str(algebra.extract(base, merged)),
    "diff": lambda: str(algebra.diff(base, merged, folder / "diff")),
    "patch": lambda: str(algebra.patch(base, folder / "diff", folder / "rebuilt")),
}
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
text = verbs[verb]()
seconds = time.perf_counter() - start
print(json.dumps({"s": seconds, "MiB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
                  "said": text if isinstance(text, str) else ""}))
"""
VERBS = ("read both once", "verify", "extract r=16", "extract auto", "diff", "patch")


def make(folder: Path, size: float) -> None:
    """Write base, adapter and merged checkpoint."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import lorainject as li

    hidden = 2048
    sizes = {"hidden_size": hidden, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4,
             "vocab_size": 8192}  # fmt: skip
    per_layer = 2 * (2 * hidden * hidden + 2 * hidden * 512 + 3 * hidden * 5632)
    layers = max(1, round((size * 1e9 - 4 * 8192 * hidden) / per_layer))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "base", max_shard_size="1GB")
    li.inject(model, ["all-linear"], r=16)
    with torch.no_grad():
        for p in li.parameters(model):
            p.copy_(torch.randn_like(p) * 0.02)
    li.save(model, folder / "adapter")
    del model
    li.merge_checkpoint(folder / "base", folder / "adapter", folder / "merged")


def bytewise(folder: Path) -> int:
    """Return the bytes of the byte-wise difference of the two checkpoints."""
    from safetensors import safe_open

    total = 0
    for shard in sorted((folder / "base").glob("*.safetensors")):
        with safe_open(shard, "pt") as a, safe_open(folder / "merged" / shard.name, "pt") as b:
            for key in a.keys():  # noqa: SIM118  (safe_open is no mapping)
                raw = [f.get_tensor(key).view(torch.uint8).numpy().reshape(-1, 2) for f in (a, b)]
                for plane in (raw[0] ^ raw[1]).T:
                    total += len(zlib.compress(plane.tobytes(), 6))
    return total


def main() -> None:
    """Make the checkpoints, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=2.0)
    options = parser.parse_args()
    if not (options.folder / "merged").exists():
        options.folder.mkdir(parents=True, exist_ok=True)
        make(options.folder, options.gb)
    size = sum(f.stat().st_size for f in (options.folder / "base").glob("*.safetensors"))
    print(f"checkpoint: {size:,} bytes", flush=True)
    print("| verb | time | growth of memory |\n|---|---|---|", flush=True)
    said = {}
    for verb in VERBS:
        done = subprocess.run([sys.executable, "-c", RUN, options.folder, verb], capture_output=True, text=True)
        if done.returncode:
            print(f"| {verb} | failed | {done.stderr.strip().splitlines()[-1]} |", flush=True)
            continue
        result = json.loads(done.stdout.splitlines()[-1])
        said[verb] = result["said"]
        print(f"| {verb} | {result['s']:.1f} s | {result['MiB']:.0f} MiB |", flush=True)
    start = time.perf_counter()
    print(f"byte-wise difference: {bytewise(options.folder):,} bytes, {time.perf_counter() - start:.1f} s")
    for verb in ("verify", "diff"):
        print(said.get(verb, ""))


if __name__ == "__main__":
    main()
