"""Write the pairs of the demo as files for configs/code-search.yaml: `python -m code_search.write_pairs FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .data import distinct, split_by_module, stdlib_pairs
from .demo import HELD_OUT


def write_pairs(folder: Path, root: Path | None = None, held_out: int = HELD_OUT) -> None:
    """Write train.jsonl and test.jsonl, which share no module, from the standard library or the folder `root`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = split_by_module(distinct(stdlib_pairs(root)), held_out, seed=0)
    for name, part in zip(("train", "test"), parts, strict=True):
        lines = (json.dumps({"query": pair.query, "positive": pair.positive}) + "\n" for pair in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_pairs(Path(sys.argv[1]))
