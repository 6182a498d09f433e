"""merge_in_place and unmerge_in_place: back to the byte, and nothing half done whatever fails or dies."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorainject as li
from checkpoints import contents, mixtral, same_bits, tensors
from lorainject.checkpoint import merge_in_place
from lorainject.checkpoint.byte_runs import Runs
from lorainject.checkpoint.shard_writer import WeightUpdate
from lorainject.files.io import atomic_write

from models import mapped, randomize

pytestmark = pytest.mark.filterwarnings("ignore::lorainject.SurvivalWarning")  # half precision and small deltas


def merge(folder: Path, in_place: bool) -> None:
    """Merge the first adapter into the checkpoint itself, or into a copy."""
    if in_place:
        li.merge_in_place(folder / "base", folder / "adapter0")
    else:
        li.merge_checkpoint(folder / "base", folder / "adapter0", folder / "out")


def test_merge_in_place_and_unmerge(folder):
    """merge_in_place writes what merge_checkpoint does; unmerge_in_place restores all files, and leaves no other."""
    before = contents(folder / "base")
    li.merge_checkpoint(folder / "base", [folder / "adapter0", folder / "adapter1"], folder / "out", weights=[0.5, -2])
    li.merge_in_place(folder / "base", [folder / "adapter0", folder / "adapter1"], weights=[0.5, -2])
    merged, copied = contents(folder / "base"), contents(folder / "out")
    del copied["lorainject_merge.json"]
    assert {k: v for k, v in merged.items() if not k.startswith(".lorainject-merge")} == copied
    assert any(k.startswith(".lorainject-merge") and v for k, v in merged.items())
    with pytest.raises(
        li.StateError,
        match=r"is merged already, or a merge .*was interrupted\n=> restore the checkpoint first: lorainject unmerge",
    ):
        li.merge_in_place(folder / "base", folder / "adapter1")
    assert li.unmerge_in_place(folder / "base") == folder / "base"
    assert contents(folder / "base") == before
    with pytest.raises(li.StateError, match="nothing is merged in place"):
        li.unmerge_in_place(folder / "base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_merge_in_place_has_the_bits_of_a_reversible_merge(dtype, tmp_path):
    """The tensors are those of a reversible merge in memory, to the bit."""
    torch.manual_seed(0)
    model = mixtral().to(dtype)
    model.save_pretrained(tmp_path / "base")
    randomize(li.inject(model, ["q_proj", "down_proj"], r=7, alpha=5))
    li.save(model, tmp_path / "adapter")
    li.merge(model)
    li.merge_in_place(tmp_path / "base", tmp_path / "adapter")
    loaded = type(model).from_pretrained(tmp_path / "base", dtype=dtype)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name


def test_symlinks_are_never_written_through(folder):
    """The links of a hub cache's snapshot are copied from, and never written to: merge_in_place refuses them."""
    cache = folder / "blobs"
    cache.mkdir()
    for i, file in enumerate(sorted(p for p in (folder / "base").iterdir() if p.is_file())):
        shutil.move(file, cache / str(i))
        file.symlink_to(cache / str(i))
    before = contents(cache)
    li.merge_checkpoint(folder / "base", folder / "adapter0", folder / "out")
    assert not any(p.is_symlink() for p in (folder / "out").iterdir())
    with pytest.raises(
        li.FileError, match=r"(?s)its shards are symlinks.*=> write the merged model to another directory"
    ):
        li.merge_in_place(folder / "base", folder / "adapter0")
    assert contents(cache) == before


def test_unmerge_refuses_changed_shards_and_manifests(folder):
    """A shard that was changed after the merge, or another manifest, is refused, and nothing is changed."""
    li.merge_in_place(folder / "base", folder / "adapter0")
    merged = contents(folder)
    shard = sorted((folder / "base").glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    changed = contents(folder)
    with pytest.raises(li.MergeError, match=rf"{shard.name}: was changed after the merge"):
        li.unmerge_in_place(folder / "base")
    assert contents(folder) == changed
    shard.write_bytes(merged[f"base/{shard.name}"])
    manifest = folder / "base" / ".lorainject-merge" / "manifest.json"
    older = manifest.read_text().replace('"version": 3', '"version": 2')  # with other checksums in its journals
    for content in ("{}", older):
        manifest.write_text(content)
        with pytest.raises(
            li.FileError, match=r"is not a manifest that this version.*\n=> unmerge with the version that"
        ):
            li.unmerge_in_place(folder / "base")
    manifest.write_bytes(merged["base/.lorainject-merge/manifest.json"])
    li.unmerge_in_place(folder / "base")


@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in place"])
def test_full_disk(folder, in_place, monkeypatch):
    """Whichever system call fails, one error is raised and everything is as it was."""
    before, calls = contents(folder), 0

    def failing(function, nth):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args)

        return call

    for function in ("pwrite", "copy_file_range", "fsync", "replace"):
        for nth in random.Random(0).sample(range(1, 12), 4):
            calls = 0
            with monkeypatch.context() as patch:
                patch.setattr(os, function, failing(getattr(os, function), nth))
                try:
                    merge(folder, in_place)
                except li.FileError as e:
                    assert "No space left on device" in str(e)  # noqa: PT017
            if in_place and (folder / "base" / ".lorainject-merge").exists():
                li.unmerge_in_place(folder / "base")  # the merge succeeded, or the error struck its restoring too
            shutil.rmtree(folder / "out", ignore_errors=True)
            assert contents(folder) == before


@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in place"])
def test_shard_that_changes_during_the_merge(folder, in_place, monkeypatch):
    """A merge is given up if another program writes to a shard that it reads."""
    shard = sorted((folder / "base").glob("*.safetensors"))[0]
    before, read_tile = contents(folder), Runs.read_tile

    def rewrite_shard(*args):
        shard.write_bytes(shard.read_bytes())
        return read_tile(*args)

    monkeypatch.setattr(Runs, "read_tile", rewrite_shard)
    with pytest.raises(li.FileError, match=r"was changed while it was being merged\n=> merge again"):
        merge(folder, in_place)
    assert contents(folder) == before


def test_second_process_is_refused(folder):
    """A merge into a directory that another process has locked is refused."""
    (folder / ".out.lorainject-unfinished").mkdir()
    with (
        atomic_write.lock(folder / ".out.lorainject-unfinished"),
        pytest.raises(li.FileError, match="another process is at work in"),
    ):
        li.merge_checkpoint(folder / "base", folder / "adapter0", folder / "out")
    with atomic_write.lock(folder / "base"), pytest.raises(li.FileError, match="another process is at work in"):
        li.merge_in_place(folder / "base", folder / "adapter0")


def test_merge_by_another_process_while_planning(folder, monkeypatch):
    """A merge by another process since the first look is noticed, and can still be unmerged."""
    before, plan = contents(folder / "base"), merge_in_place.plan_merge

    def planned(*args):
        result = plan(*args)
        monkeypatch.setattr(merge_in_place, "plan_merge", plan)
        li.merge_in_place(folder / "base", folder / "adapter1")
        return result

    monkeypatch.setattr(merge_in_place, "plan_merge", planned)
    with pytest.raises(li.StateError, match="is merged already"):
        li.merge_in_place(folder / "base", folder / "adapter0")
    li.unmerge_in_place(folder / "base")
    assert contents(folder / "base") == before


def test_float64_with_a_scale_that_float32_cannot_hold(tmp_path):
    """A scale of 5/3 is exact in float64 in memory, on disk and on the way back."""
    torch.manual_seed(0)
    base = mixtral().double()
    base.save_pretrained(tmp_path / "base")
    W0 = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = li.inject(base, ["q_proj", "experts"], r=3, alpha=5)
    randomize(model)
    li.save(model, tmp_path / "adapter")
    adapter = model.model.layers[0].self_attn.q_proj.lora["default"]
    li.merge(model, reversible=False)
    M = model.model.layers[0].self_attn.q_proj.weight
    assert torch.allclose(M, W0 + 5 / 3 * (adapter.B @ adapter.A), rtol=1e-14, atol=1e-14)
    li.eject(model).save_pretrained(tmp_path / "memory")
    li.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "disk")
    assert same_bits(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))
    before = tensors(tmp_path / "base")
    li.merge_in_place(tmp_path / "base", tmp_path / "adapter")
    assert same_bits(tensors(tmp_path / "base"), tensors(tmp_path / "memory"))
    li.unmerge_in_place(tmp_path / "base")
    assert same_bits(tensors(tmp_path / "base"), before)


@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in place"])
def test_adapter_memory_is_freed_with_the_last_tensor_of_a_weight(in_place, folder, monkeypatch):
    """A and B, maps of a temporary file, are freed when the last tensor on disk of their weight is written."""
    before, remaining, finish = mapped(), [], WeightUpdate.finish

    def record(update: WeightUpdate, key: str) -> None:
        finish(update, key)
        remaining.append(len(update.deltas))

    monkeypatch.setattr(WeightUpdate, "finish", record)
    merge(folder, in_place)
    assert remaining.count(0) == len(load_file(folder / "adapter0" / "adapter_model.safetensors")) / 2
    assert mapped() == before
