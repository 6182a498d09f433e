"""Merge into a checkpoint on disk, shard by shard, without loading the model: `merge_checkpoint`.

dtype, shape and header of every tensor stay the same, so a shard is copied, and only the bytes of adapted tensors take a way through
memory, one tile at a time (sums.py). A new directory is built beside the place where it shall be, and renamed at the end; nothing else
is ever to be seen there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import FileError
from ..files.record import AdapterFile
from ..merging.report import MergeReport, check_survival
from .copying import Meter, Progress, building, copy, new, opened
from .plan import plan_merge
from .shards import INDEX, OTHER_WEIGHTS, Shard


def merge_checkpoint(base_dir: str | Path, adapters: str | Path | AdapterFile | Sequence[str | Path | AdapterFile], out_dir: str | Path, *,
                     weights: Sequence[float] | None = None, strict: bool = False, check_base: bool = True,
                     progress: Progress | None = None) -> MergeReport:  # fmt: skip
    """Write a copy of the checkpoint in `base_dir` with W0 + s B A in it to `out_dir`, which must not exist or be empty.

    The bits of every tensor are those that load, merge and save_pretrained give; memory is one tile's, whatever the model's size. Names,
    order, dtypes, headers, index, config and all files beside the weights stay as they are. Several adapters are added with these
    `weights` (1 each), and rounded once. `progress(done, total)` is called with bytes.

    Raises FileError with all that does not fit, MergeError where a sum is not finite, or with `strict=True` where less than 0.9
    of a delta survives the rounding (else a SurvivalWarning). In any case, and if killed, `out_dir` is as it was.
    """
    base, out = Path(base_dir), Path(out_dir)
    plan = plan_merge(base, adapters, weights, check_base)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out} already exists", way_out="name a directory that does not, or is empty")
    if out.resolve().is_relative_to(base.resolve()):
        raise FileError(f"{out} lies in the checkpoint that is to be merged", way_out="name a directory outside of it")
    beside = list(_beside(base, plan.shards))
    meter = Meter(sum(s.size for s in plan.shards) + sum(p.stat().st_size for p in beside), progress)
    with building(out) as folder:
        for path in beside:
            target = folder / path.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as source, new(target) as f:
                copy(source.fileno(), f, 0, os.fstat(source.fileno()).st_size, meter)
        for shard in plan.shards:
            with opened(shard) as source, new(folder / shard.path.name) as f:
                plan.write(shard, source, f, meter)
        report = plan.report()
        check_survival(report.sites, strict, stacklevel=3)
    return report


def _beside(base: Path, found: Sequence[Shard]) -> Iterator[Path]:
    """All other files of the model; warns of weights in other formats, which would be the unmerged ones."""
    mine, left = {shard.path for shard in found}, []
    for path in sorted(base.rglob("*")):
        if path in mine or not path.is_file() or any(part.startswith(".") for part in path.relative_to(base).parts):
            continue
        if path.name.endswith((*OTHER_WEIGHTS, ".index.json")) and path.name != INDEX:
            left.append(str(path.relative_to(base)))
        else:
            yield path
    if left:
        warnings.warn(
            f"{', '.join(left[:5])}{', ...' * (len(left) > 5)}: not copied, since nothing was merged into these weights",
            stacklevel=4,
        )
