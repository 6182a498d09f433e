"""A stranger's file costs no more than its bytes, and nothing of the user's is overwritten or deleted."""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorainject as li
from lorainject.files.io.regular_file import open_regular, read_regular

NEEDS_PIPES = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["l"]}


def adapter(folder: Path, config: dict[str, Any] | None = PEFT) -> Path:
    """Write an adapter in PEFT's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(4, 2)}
    save_file({f"base_model.model.l.{k}.weight": t for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def checkpoint(folder: Path) -> Path:
    """Write a checkpoint with one weight, `l`."""
    folder.mkdir(parents=True)
    save_file({"l.weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    return folder


def merge(base: Path, tmp_path: Path, out: Path | None = None) -> li.MergeReport:
    return li.merge_checkpoint(base, adapter(tmp_path / "adapter"), out or tmp_path / "out", check_base=False)


# Pipes, devices, sparse files and impossible names


@NEEDS_PIPES
@pytest.mark.parametrize("name", ["adapter_model.safetensors", ".lorainject-save.json", "adapter_config.json"])
def test_a_pipe_in_a_folder_does_not_hang_its_reader(tmp_path, name):
    """A pipe in the place of any file of an adapter is refused, or not taken for a file."""
    folder = adapter(tmp_path / "a")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(li.FileError):
        li.read(folder)


@NEEDS_PIPES
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "README.md"])
def test_a_pipe_in_a_checkpoint_does_not_hang_a_merge(tmp_path, name):
    """A pipe among the files of a checkpoint is refused, or left out as it is no file."""
    base = checkpoint(tmp_path / "base")
    (base / name).unlink(missing_ok=True)
    os.mkfifo(base / name)
    if name == "README.md":
        merge(base, tmp_path)
        assert not (tmp_path / "out" / name).exists()
    else:
        with pytest.raises(li.FileError):
            merge(base, tmp_path)


@NEEDS_PIPES
def test_only_regular_files_are_opened(tmp_path):
    """Pipes, devices and directories are refused, and so is a file that is longer than its reader allows."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises((li.FileError, IsADirectoryError)):
            open_regular(path)
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(li.FileError, match="has more than 4 bytes"):
        read_regular(tmp_path / "file", 4)


def test_a_sparse_file_is_refused_by_its_size_on_the_disk(tmp_path):
    """Thirty gigabytes that take no room on the disk would take all memory."""
    size, path = 30 << 30, tmp_path / "sparse.safetensors"
    text = json.dumps({"l.lora_A.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + size)
    with pytest.raises(li.FileError, match="is sparse: it seems to have 32,"):
        li.read(path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_the_system_cannot_have_is_a_clear_error(tmp_path, name):
    """Every verb that takes a path says so, and writes nothing."""
    model = li.inject(nn.Sequential(nn.Linear(4, 4)), ["0"], r=2)
    a, base, wrong = adapter(tmp_path / "a"), checkpoint(tmp_path / "base"), tmp_path / name
    verbs: list[Callable[[], Any]] = [
        lambda: li.save(model, wrong),
        lambda: li.load(model, wrong),
        lambda: li.hotswap(model, wrong),
        lambda: li.read(wrong),
        lambda: li.write(li.read(a), wrong),
        lambda: li.convert(wrong, tmp_path / "b", format="peft"),
        lambda: li.merge_checkpoint(base, a, wrong),
        lambda: li.merge_checkpoint(wrong, a, tmp_path / "out"),
        lambda: li.merge_checkpoint(base, wrong, tmp_path / "out"),
        lambda: li.merge_in_place(wrong, a),
        lambda: li.unmerge_in_place(wrong),
    ]
    before = sorted(tmp_path.rglob("*"))
    for verb in verbs:
        with pytest.raises(li.FileError, match="cannot be looked up"):
            verb()
    assert sorted(tmp_path.rglob("*")) == before


# What a few bytes can announce


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30)), "it has aliases"),
        ("a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} {{<<: *a{i - 1}}}\n" for i in range(1, 30)), "it has aliases"),
        ("a: 1" + ":1" * 100_000, "a number in base 60"),
        ("a: !!int '1" + ":1" * 100_000 + "'", "a number in base 60"),
        ("a: 1" + ":1" * 100_000 + ".5", "a number in base 60"),
        ("a: " + "x" * 300_000, "has more than 262,144 bytes"),
        ("a: " + "9" * 100_000, "cannot be read as YAML"),
        ("[" * 10_000, "cannot be read as YAML"),
    ],
    ids=["aliases", "merge keys", "base 60", "tagged", "float", "long", "digits", "deep"],
)
def test_a_short_yaml_takes_no_time_and_no_memory(tmp_path, text, reason):
    """Aliases, base 60 and endless texts are refused before they are evaluated."""
    pytest.importorskip("yaml")
    folder = adapter(tmp_path / "a", None)
    (folder / "hyperparameters.yaml").write_text(text)
    with pytest.raises(li.FileError, match=reason):
        li.read(folder)


def test_a_plain_yaml_is_read(tmp_path):
    """Numbers, words and lists of a config are what they are in YAML."""
    pytest.importorskip("yaml")
    from lorainject.spec.safe_yaml import parse_yaml

    text = b"lora_r: 8\nlora_alpha: 16.5\nname: 'a:b'\ntime: x:1\nlist: [1, 2]\n"
    values = {"lora_r": 8, "lora_alpha": 16.5, "name": "a:b", "time": "x:1", "list": [1, 2]}
    assert parse_yaml(tmp_path / "a.yaml", text) == values
    assert parse_yaml(tmp_path / "a.yaml", b"- 1") == {}


def test_tensors_of_a_gguf_may_not_overlap(tmp_path):
    """Many tensors over the same bytes would take a multiple of the file's size."""
    name, tensors = b"t%04d", 100
    infos = b""
    for i in range(tensors):
        key = name % i
        infos += struct.pack("<Q", len(key)) + key + struct.pack("<IQQIQ", 2, 64, 64, 0, 0)
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, 0) + infos + bytes(64 * 64 * 4 + 4096))
    with pytest.raises(li.FileError, match="its tensors are larger than the file"):
        li.read(path)


def test_views_of_one_memory_may_not_multiply_it(tmp_path):
    """A pickle of many views of one tensor would take a multiple of its size when they become tensors of their own."""
    memory = torch.zeros(256, 256)
    torch.save({f"l{i}.lora_A": memory.T for i in range(100)}, tmp_path / "views.bin")
    with pytest.raises(li.FileError, match="which share 262,144 bytes"):
        li.read(tmp_path / "views.bin", allow_pickle=True)


# What is deleted and overwritten


def victim(tmp_path: Path) -> Path:
    folder = tmp_path / "victim"
    (folder / "sub").mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    return folder


@pytest.mark.parametrize("kind", ["link", "folder", "file"])
def test_nothing_of_the_users_is_taken_for_a_temporary_folder(tmp_path, kind):
    """A link, a folder or a file with the name of the temporary folder is refused, and all in it stays."""
    theirs, temporary = victim(tmp_path), tmp_path / ".out.lorainject-unfinished"
    if kind == "link":
        temporary.symlink_to(theirs, target_is_directory=True)
    elif kind == "folder":
        theirs.rename(temporary)
    else:
        temporary.write_text("years of work")
    before = {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}
    base = checkpoint(tmp_path / "model" / "base")
    with pytest.raises(li.FileError, match="is not a temporary folder of lorainject, so nothing in it is deleted"):
        merge(base, tmp_path)
    assert all(path.exists() and (data is None or path.read_bytes() == data) for path, data in before.items())


def test_what_a_killed_merge_left_is_deleted(tmp_path):
    """A temporary folder of lorainject's is taken over, links in it are not followed, and its mark does not remain."""
    theirs, base = victim(tmp_path), checkpoint(tmp_path / "base")
    script = (
        "import os, sys, lorainject as li\n"
        "li.merge_checkpoint(*sys.argv[1:], check_base=False, progress=lambda done, total: os._exit(9))\n"
    )
    arguments = [str(base), str(adapter(tmp_path / "adapter")), str(tmp_path / "out")]
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", script, *arguments]).returncode == 9
    temporary = tmp_path / ".out.lorainject-unfinished"
    assert temporary.is_dir()
    (temporary / "link").symlink_to(theirs, target_is_directory=True)
    merge(base, tmp_path)
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["lorainject_merge.json", "model.safetensors"]
    assert (theirs / "thesis.txt").read_text() == "years of work"
    assert not temporary.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_a_merged_shard_keeps_its_mode(tmp_path):
    """A private shard stays private, in a copy, in place, and unmerged; so do the other files of a copy."""
    base = checkpoint(tmp_path / "base")
    shard = base / "model.safetensors"
    (base / "README.md").write_text("private")
    for path in (shard, base / "README.md"):
        path.chmod(0o600)
    merge(base, tmp_path)
    li.merge_in_place(base, adapter(tmp_path / "adapter"), check_base=False)
    merged = stat.S_IMODE(shard.stat().st_mode)
    li.unmerge_in_place(base)
    copies = [tmp_path / "out" / name for name in ("model.safetensors", "README.md")]
    assert {merged, *(stat.S_IMODE(path.stat().st_mode) for path in (shard, *copies))} == {0o600}


# Manifests of merges in place


def merged_in_place(tmp_path: Path) -> tuple[Path, Path]:
    """Return a checkpoint that is merged in place, and its manifest."""
    base = checkpoint(tmp_path / "base")
    li.merge_in_place(base, adapter(tmp_path / "adapter"), check_base=False)
    return base, base / ".lorainject-merge" / "manifest.json"


def test_names_in_a_manifest_do_not_leave_their_folder(tmp_path):
    """Neither a shard nor a journal may have a path."""
    base, manifest = merged_in_place(tmp_path)
    good = json.loads(manifest.read_text())
    (shard,) = good["shards"].values()
    for bad in ("../adapter/adapter_model.safetensors", "/etc/passwd", "", ".."):
        shard["patches"][0]["file"] = bad
        manifest.write_text(json.dumps(good))
        with pytest.raises(li.FileError, match="is not a manifest that this version of lorainject can read"):
            li.unmerge_in_place(base)
        manifest.write_text(json.dumps(good | {"shards": {bad: shard}}))
        with pytest.raises(li.FileError):
            li.unmerge_in_place(base)


def damages(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, item in items for inner in damages(item, (*path, key)))]


@pytest.mark.parametrize("bad", [None, 10**30, "x", [[]]])
def test_a_malformed_manifest_is_a_clear_error(tmp_path, bad):
    """Whatever value of a manifest is replaced, unmerge_in_place raises a LoraError, or restores the checkpoint."""
    original = (checkpoint(tmp_path / "original") / "model.safetensors").read_bytes()
    base, manifest = merged_in_place(tmp_path)
    shard, good = base / "model.safetensors", json.loads(manifest.read_text())
    merged = shard.read_bytes()
    for path in damages(good)[1:]:
        damaged = json.loads(json.dumps(good))
        holder = damaged
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = bad
        manifest.write_text(json.dumps(damaged))
        try:
            li.unmerge_in_place(base)
        except li.LoraError:
            assert shard.read_bytes() == merged
            assert sorted(p.name for p in base.iterdir()) == [".lorainject-merge", "model.safetensors"]
        else:
            assert shard.read_bytes() == original, path
            li.merge_in_place(base, tmp_path / "adapter", check_base=False)
