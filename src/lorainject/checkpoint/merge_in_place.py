"""Merge into a checkpoint itself, and restore it to the byte: `merge_in_place` and `unmerge_in_place`.

    model/.lorainject-merge/manifest.json       which shards are merged, with the SHA-256 of each before and after
    model/.lorainject-merge/000000.safetensors  of one patch (byte_runs.py): the journal, and the A and B that were used

Each shard is written under a temporary name, after its journal, and then renamed. So whenever the process is killed, a
shard is either the old or the new one. Lest a mixture be loaded, the index is kept beside the journal meanwhile, and
without the index no reader finds the shards. From any such state `unmerge_in_place` restores the old bytes.
"""

from __future__ import annotations

import contextlib
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
from ..files.io.atomic_write import SPACE, UNFINISHED, lock, new_file, sync_folder
from ..files.io.regular_file import as_path, is_plain_name, open_regular, read_regular
from ..files.io.safetensors_file import MAX_HEADER, TensorEntry
from ..files.origin import made_by
from ..files.record import AdapterFile
from ..merging.report import MergeReport, check_survival
from ..numerics.delta import Factors
from ..numerics.journal import Journal
from ..numerics.modes import in_default_modes
from ..numerics.tile_merge import TileMerger, TileWorkspace
from ..numerics.tiled_matmul import exact_product
from ..spec import explains_settings
from .byte_runs import Patch, Runs
from .copying import Meter, Progress, copy_bytes, copy_mode
from .plan import plan_merge
from .shard_writer import MergePlan
from .shards import INDEX_ENDING, Shard, open_unchanged

FOLDER, MANIFEST, VERSION = ".lorainject-merge", "manifest.json", 3  # 3: other checksums in the journals


@explains_settings
@in_default_modes
def merge_in_place(model_dir: str | Path,
                   adapters: str | Path | AdapterFile | Sequence[str | Path | AdapterFile], *,
                   weights: Sequence[float] | None = None, strict: bool = False, check_base: bool = True,
                   allow_missing: bool = False, progress: Progress | None = None) -> MergeReport:  # fmt: skip
    """Merge adapters into a checkpoint itself. `unmerge_in_place` restores the old files to the byte.

    The tensors have the bits of a reversible merge in memory, which may differ from those of `merge_checkpoint` in the
    last place (see numerics/tiled_matmul.py). On disk, a merge needs room for one more shard while it works, and for
    the journal afterwards: a few per cent. If anything is raised, the checkpoint is as it was. If even restoring it
    fails, because the disk stays full, the error says so, and `unmerge_in_place` restores the checkpoint later.

    Args:
        model_dir: The directory with the model's config.json and safetensors files.
        adapters, weights, strict, check_base, allow_missing, progress: See `merge_checkpoint`.

    Returns:
        What became of each weight's delta.

    Raises:
        StateError: An adapter is merged there already.
        SpecError, FileError, MergeError: See `merge_checkpoint`. FileError is also raised if a shard is a symlink.
    """
    base = as_path(model_dir)
    folder = base / FOLDER
    _check_not_merged(base)
    plan = plan_merge(base, adapters, weights, check_base, allow_missing)
    if links := [f"{shard.path.name} -> {os.readlink(shard.path)}" for shard in plan.shards if shard.path.is_symlink()]:
        raise FileError(
            f"{base} cannot be merged in place, because its shards are symlinks (as in a hub's cache):",
            links,
            "write the merged model to another directory, or merge into a copy without symlinks",
        )
    meter = Meter(sum(shard.size for shard in plan.changed_shards), progress)
    with lock(base, required=True), system_errors(f"{base} cannot be merged into", way_out=SPACE):
        _check_not_merged(base)  # another process may have merged meanwhile
        if strict:
            for shard in plan.changed_shards:
                with open_unchanged(shard) as source:
                    plan.write(shard, source, None, Meter())
            check_survival(plan.report().sites, strict)
            plan.reset_statistics()
        shutil.rmtree(folder, ignore_errors=True)  # left by a merge that was killed before it had a manifest
        folder.mkdir()
        try:
            manifest: dict[str, Any] = {"version": VERSION, "adapters": plan.names, "shards": {}}
            _save_manifest(folder, manifest)
            _move_index(base, folder)
            for shard in plan.changed_shards:
                _merge_shard(base, shard, plan, manifest, meter)
            _move_index(folder, base)
        except BaseException:
            if (folder / MANIFEST).exists():
                with _can_be_repeated(base):
                    _restore(base, Meter())
            else:
                shutil.rmtree(folder)
            raise
        report = plan.report()
        manifest["origin"] = made_by("merge_in_place", survival=report.survival, adapters=plan.adapters)
        _save_manifest(folder, manifest)
    check_survival(report.sites, strict=False)
    return report


@explains_settings
@in_default_modes
def unmerge_in_place(model_dir: str | Path, progress: Progress | None = None) -> Path:
    """Restore every shard of a checkpoint to what it was before `merge_in_place`, complete or interrupted, to the byte.

    All shards are tried before the first is written, and compared by SHA-256.

    Args:
        model_dir: The directory that `merge_in_place` merged into.
        progress: Called with the bytes done and the bytes in total.

    Returns:
        The directory.

    Raises:
        StateError: Nothing is merged there.
        FileError: The manifest cannot be read, or a file cannot be read or written. Call it again when that is mended.
        MergeError: A shard was changed after the merge, or would not come out as it was; nothing was changed.
    """
    base = as_path(model_dir)
    if not (base / FOLDER / MANIFEST).exists():
        raise StateError(
            f"nothing is merged in place in {base}",
            way_out="give the directory that was merged in place; a merged copy stays merged, but its base is intact",
        )
    with lock(base, required=True), _can_be_repeated(base):
        sizes = [(base / name).stat().st_size for name in _load_manifest(base)["shards"]]
        _restore(base, Meter(2 * sum(sizes), progress))
    return base


def _can_be_repeated(base: Path) -> contextlib.AbstractContextManager[None]:
    """Turn an error of the operating system while a checkpoint is restored into one that says how to go on."""
    return system_errors(
        f"{base} cannot be restored now",
        ["nothing is lost, but until it is restored it may have no index, and then cannot be loaded"],
        f"{SPACE}, then restore the checkpoint: lorainject unmerge {base}",
    )


def _check_not_merged(base: Path) -> None:
    if (base / FOLDER / MANIFEST).exists():
        raise StateError(
            f"{base} is merged already, or a merge into it was interrupted",
            way_out=f"restore the checkpoint first: lorainject unmerge {base}",
        )


def _merge_shard(base: Path, shard: Shard, plan: MergePlan, manifest: dict[str, Any], meter: Meter) -> None:
    """Write the journal of a shard, then the manifest, then the merged shard in the place of the old one."""
    folder, temporary = base / FOLDER, base / UNFINISHED.format(shard.path.name)
    records: list[dict[str, Any]] = []
    first = sum(len(record["patches"]) for record in manifest["shards"].values())

    def keep_journal(key: str, patch: Patch, merger: TileMerger) -> None:
        factors = patch.factors()
        tensors = vars(Journal.join(merger.journals)) | {"starts": torch.from_numpy(patch.runs.starts)}
        for i, f in enumerate(factors):
            tensors |= {f"P{i}": f.P.contiguous(), f"Q{i}": f.Q.contiguous()}
        name = f"{first + len(records):06}.safetensors"
        atomic_write.write({folder / name: safetensors_file.dump(tensors, {})})
        records.append({"file": name, "key": key, "width": patch.runs.width, "s": [float(f.s) for f in factors]})

    temporary.unlink(missing_ok=True)
    with open_unchanged(shard) as source, new_file(temporary) as target:
        plan.write(shard, source, target, meter, keep_journal)
        copy_mode(source, target)
    entries = {record["key"]: shard.tensors[record["key"]] for record in records}
    manifest["shards"][shard.path.name] = {
        "before": sha256(shard.path),
        "after": sha256(temporary),
        "tensors": {key: [entry.dtype, entry.shape, entry.start, entry.stop] for key, entry in entries.items()},
        "patches": records,
    }
    _save_manifest(folder, manifest)
    os.replace(temporary, shard.path)
    sync_folder(base)


def _restore(base: Path, meter: Meter) -> None:
    """Put the old shards in the places of the merged ones. Every shard is tried before the first is written."""
    folder, shards = base / FOLDER, _load_manifest(base)["shards"]
    hashes = {name: sha256(base / name) for name in shards}
    merged = {name: shard for name, shard in shards.items() if hashes[name] == shard["after"] != shard["before"]}
    changed = [name for name, shard in shards.items() if hashes[name] not in (shard["before"], shard["after"])]
    trials = [] if changed else [_unmerge_shard(base, name, shard, None, meter) for name, shard in merged.items()]
    if problems := [f"{name}: was changed after the merge" for name in changed] or [p for p in trials if p]:
        raise MergeError(f"{base} cannot be unmerged; nothing was changed:", problems, "download these shards again")
    _move_index(base, folder)
    for name, shard in merged.items():
        temporary = base / UNFINISHED.format(name)
        temporary.unlink(missing_ok=True)
        with new_file(temporary) as target:
            _unmerge_shard(base, name, shard, target, meter)
        if sha256(temporary) != shard["before"]:  # the trial excludes this
            temporary.unlink()
            raise MergeError(f"{base / name} does not come out as it was", way_out="download this shard again")
        os.replace(temporary, base / name)
        sync_folder(base)
    _move_index(folder, base)
    (folder / MANIFEST).unlink()
    sync_folder(folder)
    shutil.rmtree(folder)
    for stale in base.glob(UNFINISHED.format("*")):
        stale.unlink()


def _unmerge_shard(base: Path, name: str, shard: dict[str, Any], target: int | None, meter: Meter) -> str | None:
    """Write a shard with W0 into `target`, or only try to; return what is wrong, or None.

    Raises:
        FileError: The manifest or the journal describes something else than this shard.
    """
    try:
        return _unmerge_tiles(base, name, shard, target, meter)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, MemoryError, OverflowError) as e:
        raise _bad_manifest(base / FOLDER / MANIFEST) from e


def _unmerge_tiles(base: Path, name: str, shard: dict[str, Any], target: int | None, meter: Meter) -> str | None:
    """Do what `_unmerge_shard` does, for a manifest and a journal that describe the shard."""
    workspace = TileWorkspace()
    with open_regular(base / name) as f:
        source = f.fileno()
        size = os.fstat(source).st_size
        copy_bytes(source, target, 0, size, Meter())
        for record in shard["patches"]:
            dtype, shape, start, stop = shard["tensors"][record["key"]]
            entry = TensorEntry(dtype, tuple(shape), start, stop)
            t, _ = safetensors_file.read(base / FOLDER / record["file"])
            journal = Journal(*(t[field] for field in ("before", "after", "counts", "gaps", "bits")))
            runs = Runs(t["starts"].numpy(), record["width"])
            scales = [torch.tensor(s, dtype=torch.float64) for s in record["s"]]
            delta = exact_product([Factors(t[f"P{i}"], t[f"Q{i}"], s) for i, s in enumerate(scales)])
            tiles = list(delta.tiles())
            journals = journal.tiles((rows.stop - rows.start) * runs.width for rows in tiles)
            for rows, tile_journal in zip(tiles, journals, strict=True):
                m = runs.read_tile(source, entry, rows, workspace)
                w0 = workspace.unmerge(m, delta.select_rows(rows), tile_journal)
                if w0 is None:
                    return f"{name}: {record['key']} would not come out as it was (on another machine or BLAS library)"
                if target is not None:
                    runs.write_tile(target, entry, rows, w0)
        if target is not None:
            copy_mode(source, target)
        meter.add(size)
    return None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open_regular(path) as f:
        while n := f.readinto(buffer):
            digest.update(buffer[:n])
    return digest.hexdigest()


def _move_index(source: Path, target: Path) -> None:
    """Move the index, if there is one, from one folder to another."""
    for index in sorted(source.glob(f"*{INDEX_ENDING}")):
        os.replace(index, target / index.name)
        for folder in (source, target):
            sync_folder(folder)


def _save_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    atomic_write.write({folder / MANIFEST: [json.dumps(manifest).encode()]})


def _load_manifest(base: Path) -> dict[str, Any]:
    path = base / FOLDER / MANIFEST
    try:
        manifest = json.loads(read_regular(path, MAX_HEADER))
        files = [record["file"] for shard in manifest["shards"].values() for record in shard["patches"]]
        if manifest["version"] == VERSION and all(map(is_plain_name, (*manifest["shards"], *files))):
            return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise _bad_manifest(path)


def _bad_manifest(path: Path) -> FileError:
    return FileError(
        f"{path} is not a manifest that this version of lorainject can read",
        way_out="unmerge with the version that merged, or download the model again",
    )
