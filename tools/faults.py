"""kill -9 at random points of a merge on disk, and what must hold afterwards: `python tools/faults.py FOLDER KILLS`.

FOLDER holds `base`, a sharded checkpoint, and `adapter0`. Each time a child process begins a verb and is killed at a random moment
of its usual time.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

import lorainject as li

INDEX = "model.safetensors.index.json"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def child(verb: Callable[[], object]) -> int:
    """Run it in another process."""
    pid = os.fork()
    if pid == 0:
        try:
            verb()
        finally:
            os._exit(0)
    return pid


def main() -> None:
    """Kill, look, clean up, again."""
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    base, out, adapter = folder / "base", folder / "out", folder / "adapter0"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    verbs: dict[str, Callable[[], object]] = {
        "merge_checkpoint": lambda: li.merge_checkpoint(base, adapter, out),
        "merge_in_place": lambda: li.merge_in_place(base, adapter),
        "unmerge_in_place": lambda: li.unmerge_in_place(base),
    }
    before = contents(base)
    li.merge_checkpoint(base, adapter, out)
    merged = contents(out)
    shutil.rmtree(out)
    usual, seen = {}, Counter()
    for name in verbs:
        start = time.perf_counter()
        os.waitpid(child(verbs[name]), 0)
        usual[name] = time.perf_counter() - start
        shutil.rmtree(out, ignore_errors=True)
    assert contents(base) == before
    rng = random.Random(kills)
    for i in range(kills):
        name = list(verbs)[i % 3]
        if name == "unmerge_in_place":
            li.merge_in_place(base, adapter)
        pid = child(verbs[name])
        time.sleep(rng.uniform(0, 1.1 * usual[name]))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        weights = {k: v for k, v in contents(base).items() if not k.startswith(".")}
        if name == "merge_checkpoint":
            assert weights == before
            assert not out.exists() or contents(out) == merged
            seen[name, "done" if out.exists() else "undone"] += 1
            shutil.rmtree(out, ignore_errors=True)
            li.merge_checkpoint(base, adapter, out)
            assert contents(out) == merged
            shutil.rmtree(out)
            assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        else:
            whole = weights in (before, merged)
            seen[name, "whole" if whole else "index hidden"] += 1
            assert whole or INDEX not in weights, "a reader would load a mixture"
            if (base / ".lorainject-merge" / "manifest.json").exists():
                li.unmerge_in_place(base)
            else:  # so early or late that all is as before; what is left over troubles nobody
                assert weights == before
                li.merge_in_place(base, adapter)
                li.unmerge_in_place(base)
        assert contents(base) == before
    print(f"{kills} kills", dict(seen))


if __name__ == "__main__":
    main()
