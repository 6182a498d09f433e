"""The verbs that write to disk, broken at chosen moments (tools/faults.py): never half, never lost."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

import faults
import lorainject as li

pytestmark = [
    pytest.mark.filterwarnings("ignore::lorainject.SurvivalWarning"),  # half precision and small deltas
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
SAMPLE = {"killed": 3, "disk full": 2, "two at once": 1}


@pytest.mark.parametrize("moments", [SAMPLE, pytest.param(dict.fromkeys(faults.FAULTS, 100), marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["merge_checkpoint", "merge_in_place", "unmerge_in_place", "save"])
def test_faults_at_chosen_moments(name, moments, folder, tmp_path):
    """After each fault everything is as before or as after, or the documented next call restores it to the byte."""
    faults.keep(folder, tmp_path / "kept")
    verb = faults.VERBS[name](tmp_path / "kept")
    for fault, count in moments.items():
        assert list(faults.run(verb, fault, count))


@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in place"])
def test_merged_shards_keep_their_modes(in_place, folder):
    """A private shard stays private, whatever the umask: in a copy, merged in place, and unmerged."""
    private, *others = sorted((folder / "base").glob("*.safetensors"))
    private.chmod(0o600)
    for other in others:
        other.chmod(0o664)

    def modes(target: Path) -> list[int]:
        return [stat.S_IMODE(path.stat().st_mode) for path in sorted(target.glob("*.safetensors"))]

    expected = modes(folder / "base")
    if in_place:
        li.merge_in_place(folder / "base", folder / "adapter0")
        assert modes(folder / "base") == expected
        li.unmerge_in_place(folder / "base")
        assert modes(folder / "base") == expected
    else:
        li.merge_checkpoint(folder / "base", folder / "adapter0", folder / "out")
        assert modes(folder / "out") == expected


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
