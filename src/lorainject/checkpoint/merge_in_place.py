"""Merge into a checkpoint where it lies, and take it out again to the byte: `merge_in_place` and `unmerge_in_place`.

    model/.lorainject-merge/manifest.json       the state: which shards are merged, with the SHA-256 of each before and after
    model/.lorainject-merge/000000.safetensors  the journal of one patch (fold.py), with the A and B that were used

A shard is written anew beside its place, with its journal, and takes its place in one step; so each is the old or the new one, whenever
the process is killed. Lest a mixture be loaded, the index lies with the journal meanwhile, without which no reader finds
the shards. Whatever was interrupted, `unmerge_in_place` gives the old bytes back.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import FileError, MergeError, StateError, system_errors
from ..files.io import atomic_write, safetensors_file
from ..files.record import AdapterFile
from ..merging.report import MergeReport, check_survival
from ..numerics.delta import Factors
from ..numerics.journal import Journal
from ..numerics.tile_merge import TileMerger, TileWorkspace
from ..numerics.tiled_matmul import exact_product
from .byte_runs import Patch
from .copying import UNFINISHED, Meter, Progress, copy, locked, new, opened, sync
from .plan import plan_merge
from .shard_writer import MergePlan, get, put
from .shards import INDEX, Shard, Stored

FOLDER, MANIFEST, VERSION = ".lorainject-merge", "manifest.json", 2
SPACE = "check its permissions and the free space"


def merge_in_place(model_dir: str | Path, adapters: str | Path | AdapterFile | Sequence[str | Path | AdapterFile], *,
                   weights: Sequence[float] | None = None, strict: bool = False, check_base: bool = True,
                   progress: Progress | None = None) -> MergeReport:  # fmt: skip
    """Like `merge_checkpoint`, but into the checkpoint itself; `unmerge_in_place` gives the old files back, to the byte.

    Takes the place of one shard more on disk while it works, and the journal's afterwards: a few per cent. Raises StateError if an
    adapter is merged there already, else as merge_checkpoint does; whatever is raised, the checkpoint is as it was.
    """
    base = Path(model_dir)
    folder = base / FOLDER
    _refuse_merged(base)
    plan = plan_merge(base, adapters, weights, check_base)
    touched = [shard for shard in plan.shards if plan.touches(shard)]
    if links := [f"{shard.path.name} -> {os.readlink(shard.path)}" for shard in plan.shards if shard.path.is_symlink()]:
        raise FileError(f"{base} holds symlinks, as the hub's cache does; the files that they point to belong to others, too:", links,
                        "merge into a directory of its own")  # fmt: skip
    meter = Meter(sum(shard.size for shard in touched), progress)
    with locked(base), system_errors(f"{base} can't be merged into", way_out=SPACE):
        _refuse_merged(base)  # by somebody else meanwhile, whose journal lies there
        if strict:
            for shard in touched:
                with opened(shard) as source:
                    plan.write(shard, source, None, Meter(0, None))
            check_survival(plan.report().sites, strict, stacklevel=3)
            plan.forget()
        shutil.rmtree(folder, ignore_errors=True)  # a merge that was killed before it had a manifest
        folder.mkdir()
        try:
            state: dict[str, Any] = {"version": VERSION, "adapters": plan.names, "shards": {}}
            _save(folder, state)
            _hide_index(base)
            for shard in touched:
                _merge_shard(base, shard, plan, state, meter)
            _show_index(base)
        except BaseException:
            if (folder / MANIFEST).exists():
                _restore(base, Meter(0, None))
            else:
                shutil.rmtree(folder)
            raise
    report = plan.report()
    check_survival(report.sites, strict=False, stacklevel=3)
    return report


def _refuse_merged(base: Path) -> None:
    if (base / FOLDER / MANIFEST).exists():
        raise StateError(
            f"{base} is merged already, or a merge was interrupted there", way_out=f"lorainject unmerge {base}"
        )


def unmerge_in_place(model_dir: str | Path, progress: Progress | None = None) -> Path:
    """Give a checkpoint back what it was before `merge_in_place`, or before one that was interrupted: every shard to the byte (SHA-256).

    Raises StateError if nothing is merged there; MergeError, and changes nothing, where a shard was changed since or does not come out.
    """
    base = Path(model_dir)
    if not (base / FOLDER / MANIFEST).exists():
        raise StateError(f"nothing is merged in place in {base}", way_out="merge_in_place comes first")
    with locked(base), system_errors(f"{base} can't be unmerged", way_out=SPACE):
        _restore(base, Meter(sum(2 * (base / name).stat().st_size for name in _state(base)["shards"]), progress))
    return base


def _merge_shard(base: Path, shard: Shard, plan: MergePlan, state: dict[str, Any], meter: Meter) -> None:
    """Journal first, then the shard."""
    folder, temporary = base / FOLDER, base / UNFINISHED.format(shard.path.name)
    records: list[dict[str, Any]] = []

    def keep(key: str, patch: Patch, tally: TileMerger) -> None:
        name = f"{sum(len(s['patches']) for s in state['shards'].values()) + len(records):06}.safetensors"
        atomic_write.write({folder / name: safetensors_file.dump(_journal(patch, tally), {})})
        records.append({"file": name, "key": key, "width": patch.width, "s": [float(f.s) for f in patch.parts]})

    temporary.unlink(missing_ok=True)
    with opened(shard) as source, new(temporary) as target:
        plan.write(shard, source, target, meter, keep)
        os.fchmod(target, os.fstat(source).st_mode & 0o777)
    tensors = {
        key: [t.dtype, t.shape, t.start, t.stop]
        for key, t in shard.tensors.items()
        if any(r["key"] == key for r in records)
    }
    state["shards"][shard.path.name] = {
        "before": sha256(shard.path),
        "after": sha256(temporary),
        "tensors": tensors,
        "patches": records,
    }
    _save(folder, state)
    os.replace(temporary, shard.path)
    sync(base)


def _journal(patch: Patch, tally: TileMerger) -> dict[str, torch.Tensor]:
    """The patch's runs, its P and Q, and what the fold has kept: everything that is needed to take it out."""
    rows, columns = torch.from_numpy(patch.rows), torch.from_numpy(patch.columns)
    cut = [patch.cut(f, rows, columns) for f in patch.parts]
    factors = {f"{name}{i}": t.contiguous() for i, f in enumerate(cut) for name, t in (("P", f.P), ("Q", f.Q))}
    return vars(Journal.join(tally.journals)) | factors | {"starts": torch.from_numpy(patch.starts)}


def _restore(base: Path, meter: Meter) -> None:
    """The old shards, wherever there are new ones. All are tried before the first is written."""
    folder, state = base / FOLDER, _state(base)
    now = {name: sha256(base / name) for name in state["shards"]}
    merged = {
        name: record for name, record in state["shards"].items() if now[name] == record["after"] != record["before"]
    }
    changed = [
        f"{name}: was changed since it was merged"
        for name, record in state["shards"].items()
        if now[name] not in (record["before"], record["after"])
    ]
    problems = changed or [
        p for name, record in merged.items() if (p := _unmerge_shard(base, name, record, None, meter))
    ]
    if problems:
        raise MergeError(f"{base} was not unmerged:", problems, "download the shards anew")
    _hide_index(base)
    for name, record in merged.items():
        temporary = base / UNFINISHED.format(name)
        temporary.unlink(missing_ok=True)
        with new(temporary) as target:
            _unmerge_shard(base, name, record, target, meter)
            os.fchmod(target, (base / name).stat().st_mode & 0o777)
        if sha256(temporary) != record["before"]:  # cannot be, after the trial
            raise MergeError(f"{base / name} does not come out as it was", way_out="download it anew")
        os.replace(temporary, base / name)
        sync(base)
    _show_index(base)
    (folder / MANIFEST).unlink()
    sync(folder)
    shutil.rmtree(folder)
    for stale in base.glob(UNFINISHED.format("*")):
        stale.unlink()


def _unmerge_shard(base: Path, name: str, record: dict[str, Any], target: int | None, meter: Meter) -> str | None:
    """W0's bytes into `target`, or nowhere; what is wrong, or None."""
    desk = TileWorkspace()
    with (base / name).open("rb") as f:
        source = f.fileno()
        if target is not None:
            copy(source, target, 0, os.fstat(source).st_size, Meter(0, None))
        for entry in record["patches"]:
            dtype, shape, start, stop = record["tensors"][entry["key"]]
            stored = Stored(dtype, tuple(shape), start, stop)
            t, _ = safetensors_file.read(base / FOLDER / entry["file"])
            journal = Journal(*(t[field] for field in ("before", "after", "counts", "gaps", "bits")))
            parts = [
                Factors(t[f"P{i}"], t[f"Q{i}"], torch.tensor(s, dtype=torch.float64)) for i, s in enumerate(entry["s"])
            ]
            runs = torch.arange(len(t["starts"]))
            columns = torch.arange(entry["width"]).numpy()
            patch = Patch(
                entry["key"], entry["width"], t["starts"].numpy(), tuple(parts), (), runs.numpy(), columns, False
            )
            of = exact_product(patch.factors())
            of_tiles = list(of.tiles())
            for rows, kept in zip(
                of_tiles, journal.tiles((rows.stop - rows.start) * patch.width for rows in of_tiles), strict=True
            ):
                m = get(desk, source, stored, patch, rows)
                w0 = desk.unmerge(m, of.select_rows(rows), kept)
                if w0 is None:
                    return f"{name}: {entry['key']} does not come out as it was (another machine or BLAS library)"
                if target is not None:
                    put(target, stored, patch, rows, w0)
        meter.add(os.fstat(source).st_size)
    return None


def sha256(path: Path) -> str:
    """Of a file, as hex."""
    digest, room = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as f:
        while n := f.readinto(room):
            digest.update(room[:n])
    return digest.hexdigest()


def _hide_index(base: Path) -> None:
    if (base / INDEX).exists():
        os.replace(base / INDEX, base / FOLDER / INDEX)
        sync(base)


def _show_index(base: Path) -> None:
    if (base / FOLDER / INDEX).exists():
        os.replace(base / FOLDER / INDEX, base / INDEX)
        sync(base)


def _state(base: Path) -> dict[str, Any]:
    path = base / FOLDER / MANIFEST
    try:
        state = json.loads(path.read_bytes())
        if state["version"] == VERSION and all(Path(name).name == name for name in state["shards"]):
            return state
    except (ValueError, KeyError, TypeError):
        pass
    raise FileError(
        f"{path} is not a manifest that this version reads",
        way_out="use the version that merged, or download the model anew",
    )


def _save(folder: Path, state: dict[str, Any]) -> None:
    atomic_write.write({folder / MANIFEST: [json.dumps(state).encode()]})
