"""The verbs that write to disk, broken at chosen moments (tools/faults.py): never half, never lost."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

import faults
import lorainject as li

from models import llama, randomize

pytestmark = [
    pytest.mark.filterwarnings("ignore::lorainject.SurvivalWarning"),  # half precision and small deltas
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
VERBS = ["merge_checkpoint", "merge_in_place", "unmerge_in_place", "save"]


@pytest.mark.long
@pytest.mark.parametrize("name", VERBS)
def test_faults_at_chosen_moments(name, folder, tmp_path):
    """After each fault everything is as before or as after, or the documented next call restores it to the byte."""
    faults.keep(folder, tmp_path / "kept")
    verb = faults.VERBS[name](tmp_path / "kept")
    for fault in faults.FAULTS:
        assert list(faults.run(verb, fault, 100 if fault in faults.SPREAD else 10))


def test_faults_at_a_few_moments(tmp_path):
    """The same for each verb at six moments, on a checkpoint that takes few calls to merge."""
    torch.manual_seed(0)
    model = llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    for i in range(2):
        randomize(li.inject(model, ["q_proj"], r=2 + i), seed=i)
        li.save(model, tmp_path / f"adapter{i}")
        li.eject(model)
    faults.keep(tmp_path, tmp_path / "kept")
    for name in VERBS:
        verb = faults.VERBS[name](tmp_path / "kept")
        for fault, count in (("killed", 4), ("disk full", 1), ("two at once", 1)):
            assert len(list(faults.run(verb, fault, count))) == count


def test_killed_just_before_the_copy_gets_its_name(folder, monkeypatch):
    """A merge that was killed at its last step can be made again: the copy without a name is known for ours."""

    def interrupted(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # the process would be dead
        with pytest.raises(KeyboardInterrupt):
            li.merge_checkpoint(folder / "base", folder / "adapter0", folder / "out")
    assert not (folder / "out").exists()
    li.merge_checkpoint(folder / "base", folder / "adapter0", folder / "out")
    assert not list(folder.glob(".*"))


def test_a_full_disk_during_both_a_merge_and_its_restoring_says_how_to_go_on(folder, monkeypatch):
    """If the disk stays full, the error names the call that restores the checkpoint later."""
    before = faults.contents(folder / "base")
    writes, real = 0, os.copy_file_range

    def full(*args):
        nonlocal writes
        writes += 1
        if writes > 3:
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", full)
        with pytest.raises(li.FileError, match=r"(?s)cannot be restored now: No space.*=> .*lorainject unmerge"):
            li.merge_in_place(folder / "base", folder / "adapter0")
    li.unmerge_in_place(folder / "base")
    assert faults.contents(folder / "base") == before


def test_no_room_for_the_copy_that_is_read_back(folder, monkeypatch):
    """An error of the directory for temporary files is a FileError, and leaves what was there."""
    before = faults.contents(folder / "adapter1")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(li.FileError, match=r"(?s)cannot be written: No space.*unchanged.*=> check the free space"):
        li.write(li.read(folder / "adapter0"), folder / "adapter1")
    assert faults.contents(folder / "adapter1") == before
