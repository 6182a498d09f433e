"""Merge adapters into a copy of a checkpoint on disk, shard by shard, without loading the model: `merge_checkpoint`.

dtype, shape and header of every tensor stay the same, so a shard is copied, and only the bytes of adapted weights pass
through memory (shard_writer.py). The copy is built in a temporary directory beside `out_dir`, and renamed at the end.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import FileError
from ..files.io import atomic_write
from ..files.io.atomic_write import new_file, new_folder
from ..files.io.regular_file import as_path, open_regular, read_regular
from ..files.io.safetensors_file import MAX_HEADER
from ..files.origin import made_by
from ..files.record import AdapterFile
from ..merging.report import MergeReport, check_survival
from ..numerics.modes import in_default_modes
from ..spec import explains_settings
from .copying import Meter, Progress, copy_bytes, copy_mode
from .plan import plan_merge
from .shard_writer import MergePlan
from .shards import WEIGHT_FILES, Shard, find_index, fingerprint, open_unchanged

ORIGIN = "lorainject_merge.json"
"""The manifest beside a merged checkpoint: base, adapters, weights and version."""


@explains_settings
@in_default_modes
def merge_checkpoint(base_dir: str | Path,
                     adapters: str | Path | AdapterFile | Sequence[str | Path | AdapterFile],
                     out_dir: str | Path, *, weights: Sequence[float] | None = None, strict: bool = False,
                     check_base: bool = True, allow_missing: bool = False,
                     progress: Progress | None = None) -> MergeReport:  # fmt: skip
    """Write a copy of a checkpoint with W0 + s B A in place of every adapted weight.

    The tensors have the bits that load, merge(reversible=False), eject and save_pretrained write. Names, order, dtypes,
    headers, index, config and all other files stay as they are. Memory is needed for a few tiles and the adapter,
    however large the model is. If anything is raised, or the process is killed, `out_dir` is as it was.

    Args:
        base_dir: The directory with the model's config.json and safetensors files.
        adapters: One adapter or several, as paths or as records that `read` returned.
        out_dir: The directory to write, outside of `base_dir`. It must be empty or not exist.
        weights: What each adapter's delta is multiplied with; 1 each by default. The sum is rounded once.
        strict: Raise MergeError where less than 0.9 of a delta survives the rounding, instead of a SurvivalWarning.
        check_base: Raise FileError if the adapter's fingerprint says that it was made for another base.
        allow_missing: As in `load`.
        progress: Called with the bytes done and the bytes in total.

    Returns:
        What became of each weight's delta.

    Raises:
        SpecError: The weights are not one finite number per adapter.
        FileError: A file cannot be read or written, or something does not fit; everything wrong is listed.
        MergeError: A sum is not finite, or, if strict, too little of a delta survives.
    """
    base, out = as_path(base_dir), as_path(out_dir)
    plan = plan_merge(base, adapters, weights, check_base, allow_missing)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out} already exists and is not an empty directory", way_out="give a new or empty directory")
    if out.resolve().is_relative_to(base.resolve()):
        raise FileError(f"{out} lies in the checkpoint that is to be merged", way_out="give a directory outside of it")
    others = [path for path in other_files(base, plan.shards) if path != base / ORIGIN]
    total = sum(shard.size for shard in plan.shards) + sum(path.stat().st_size for path in others)
    meter = Meter(total, progress)
    with new_folder(out) as folder:
        for path in others:
            copy_path = folder / path.relative_to(base)
            copy_path.parent.mkdir(parents=True, exist_ok=True)
            with open_regular(path) as source, new_file(copy_path) as target:
                copy_bytes(source.fileno(), target, 0, os.fstat(source.fileno()).st_size, meter)
                copy_mode(source.fileno(), target)
        for shard in plan.shards:
            with open_unchanged(shard) as shard_file, new_file(folder / shard.path.name) as target:
                plan.write(shard, shard_file, target, meter)
                copy_mode(shard_file, target)
        report = plan.report()
        check_survival(report.sites, strict)
        origin = merge_origin("merge_checkpoint", base, plan, report)
        atomic_write.write({folder / ORIGIN: [json.dumps(origin, indent=1).encode()]})
    return report


def merge_origin(verb: str, base: Path, plan: MergePlan, report: MergeReport) -> dict[str, Any]:
    """Return what a merged checkpoint is made of, for its manifest."""
    entry: dict[str, Any] = {"directory": base.resolve().name, "fingerprint": fingerprint(plan.shards)}
    if previous := read_origin(base):
        entry["origin"] = previous
    return made_by(verb, survival=report.survival, base=entry, adapters=plan.adapters)


def read_origin(folder: Path) -> dict[str, Any] | None:
    """Return what a merged checkpoint says of itself; None if it has no manifest that can be read."""
    try:
        origin = json.loads(read_regular(folder / ORIGIN, MAX_HEADER))
    except (OSError, ValueError, RecursionError):
        return None
    return origin if isinstance(origin, dict) else None


def other_files(base: Path, shards: Sequence[Shard]) -> list[Path]:
    """Return the model's files besides the shards, and warn of weights in other formats: they would stay unmerged."""
    shard_paths = {shard.path for shard in shards}
    others, skipped = list[Path](), list[str]()
    for path in sorted(base.rglob("*")):
        name = path.relative_to(base)
        if path in shard_paths or not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if path.name.endswith(WEIGHT_FILES) and path != find_index(base):
            skipped.append(str(name))
        else:
            others.append(path)
    if skipped:
        names = ", ".join(skipped[:5]) + ", ..." * (len(skipped) > 5)
        warnings.warn(f"{names}: not copied, because these weights are not merged", stacklevel=5)
    return others
