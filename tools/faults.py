"""Kill merges on disk at random moments, and check what is left: `python tools/faults.py FOLDER KILLS`.

FOLDER holds `base`, a sharded checkpoint, and `adapter0`. Each time a child process begins one of the three verbs, and
is killed (SIGKILL) at a random moment of the verb's usual time. Afterwards a reader must find the old checkpoint, the
merged one, or none that it can load; and unmerging or merging again must succeed.
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
    """Return the bytes of all files in a folder, by their relative paths."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def start_child(verb: Callable[[], object]) -> int:
    """Run a verb in another process, and return its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            verb()
        finally:
            os._exit(0)
    return pid


def main() -> None:
    """Kill a verb, check what is left, restore the checkpoint; again and again."""
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
    usual_seconds, outcomes = {}, Counter()
    for name, verb in verbs.items():
        start = time.perf_counter()
        os.waitpid(start_child(verb), 0)
        usual_seconds[name] = time.perf_counter() - start
        shutil.rmtree(out, ignore_errors=True)
    assert contents(base) == before
    rng = random.Random(kills)
    for i in range(kills):
        name = list(verbs)[i % 3]
        if name == "unmerge_in_place":
            li.merge_in_place(base, adapter)
        pid = start_child(verbs[name])
        time.sleep(rng.uniform(0, 1.1 * usual_seconds[name]))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        visible = {k: v for k, v in contents(base).items() if not k.startswith(".")}
        if name == "merge_checkpoint":
            assert visible == before
            assert not out.exists() or contents(out) == merged
            outcomes[name, "done" if out.exists() else "undone"] += 1
            shutil.rmtree(out, ignore_errors=True)
            li.merge_checkpoint(base, adapter, out)
            assert contents(out) == merged
            shutil.rmtree(out)
            assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        else:
            complete = visible in (before, merged)
            outcomes[name, "complete" if complete else "index hidden"] += 1
            assert complete or INDEX not in visible, "a reader would load a mixture"
            if (base / ".lorainject-merge" / "manifest.json").exists():
                li.unmerge_in_place(base)
            else:  # killed so early or so late that the checkpoint is the old one; what is left must not disturb
                assert visible == before
                li.merge_in_place(base, adapter)
                li.unmerge_in_place(base)
        assert contents(base) == before
    print(f"{kills} kills", dict(outcomes))


if __name__ == "__main__":
    main()
