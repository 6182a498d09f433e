"""The safetensors reader and writer: every shape and data type, the spool, and files that change meanwhile."""

from __future__ import annotations

import errno
import json
import os
import resource
import weakref
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorainject as li
from lorainject.files.formats import native
from lorainject.files.io import safetensors_file

from models import bits, llama, mapped, randomize


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = li.inject(llama(), ["q_proj", "v_proj", "embed_tokens"], r=4, alpha=8)
    randomize(model)
    return model


@pytest.mark.parametrize("read", [safetensors_file.read, safetensors_file.spool])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16]
)
def test_tensors_of_any_shape_are_written_and_read(dtype, read, tmp_path):
    """Scalars, empty tensors and views come back, sorted by name, as the safetensors package reads them too."""
    matrix = torch.arange(24).view(4, 6).to(dtype)
    tensors = {
        "z": matrix,
        "a": matrix[:, ::2],
        "column": matrix[:, 1],
        "row": matrix.t(),
        "one": matrix[1, 2],
        "none": matrix[:0],
        "grad": matrix,
    }
    if dtype.is_floating_point:
        tensors["grad"] = matrix.clone().requires_grad_()
    (tmp_path / "x").write_bytes(b"".join(safetensors_file.dump(tensors, {"key": "value"})))
    loaded, metadata = read(tmp_path / "x")
    assert metadata == {"key": "value"}
    assert list(loaded) == sorted(tensors)
    for key, t in load_file(tmp_path / "x").items():
        assert t.dtype == loaded[key].dtype == dtype
        assert torch.equal(t, loaded[key])
        assert torch.equal(t, tensors[key])


@pytest.mark.parametrize("read", [safetensors_file.read, safetensors_file.spool])
def test_every_data_type_is_read(read, tmp_path):
    """Data types that no adapter has are read too, so that an error can name these tensors."""
    dtypes = [d for d in safetensors_file.TORCH_DTYPES.values() if d not in safetensors_file.DTYPE_NAMES]
    save_file(
        {
            str(d): torch.ones(3, dtype=torch.uint8 if d.itemsize == 1 else d).to(d)
            for d in [*safetensors_file.DTYPE_NAMES, *dtypes]
        },
        tmp_path / "x",
    )
    loaded, _ = read(tmp_path / "x")
    assert {key: (t.dtype, bits(t.view(torch.uint8))) for key, t in loaded.items()} == {
        key: (t.dtype, bits(t.view(torch.uint8))) for key, t in load_file(tmp_path / "x").items()
    }


def test_a_spool_takes_memory_only_for_tensors_that_are_held(model, tmp_path):
    """Memory is mapped while a tensor is held, and what happens to the file afterwards does not reach the tensors."""
    path = li.save(model, tmp_path / "a.safetensors")
    before, expected = mapped(), safetensors_file.read(path)[0]
    tensors, _ = safetensors_file.spool(path)
    assert isinstance(tensors, safetensors_file.Spool)
    assert mapped() == before
    key = next(iter(tensors))
    first, others = tensors[key], dict(tensors)
    assert mapped() == before
    path.write_bytes(b"")
    assert bits_of(others) == bits_of(expected)
    assert mapped() > before
    del others
    assert torch.equal(first, expected[key])
    del first
    assert mapped() == before


class OneByOne(Mapping):
    """A mapping that fails if a tensor is asked for while any but the one returned last is still held."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.returned = tensors, []

    def __getitem__(self, key: str) -> torch.Tensor:
        assert all(t() is None for t in self.returned[:-1]), (
            f"others than the last are still there when {key} is asked for"
        )
        t = self.tensors[key].clone()
        self.returned.append(weakref.ref(t))
        return t

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_the_digest_reads_one_tensor_at_a_time(model, tmp_path):
    """Otherwise a spooled adapter would be in memory as a whole before the first weight of a checkpoint is merged."""
    tensors, metadata = safetensors_file.read(li.save(model, tmp_path / "a.safetensors"))
    body = json.loads(metadata[native.KEY])
    assert len(tensors) > 2
    assert body.pop("digest") == native.digest(body, OneByOne(tensors))


def test_a_spool_of_many_tensors_takes_few_file_descriptors(tmp_path):
    """300 tensors are held at once by a process that may open 50 more files."""
    few = resource.getrlimit(resource.RLIMIT_NOFILE)
    save_file({f"{i}": torch.full((3,), i) for i in range(300)}, tmp_path / "x")
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 50, few[1]))
    try:
        tensors, _ = safetensors_file.spool(tmp_path / "x")
        held = dict(tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, few)
    assert isinstance(tensors, safetensors_file.Spool)
    assert all(int(t[0]) == int(key) for key, t in held.items())


def test_a_file_is_read_where_a_temporary_file_has_no_room(model, tmp_path, monkeypatch):
    """On a full disk, spool returns the tensors in memory."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = li.save(model, tmp_path / "a.safetensors")
    monkeypatch.setattr(safetensors_file.shutil, "copyfileobj", full)
    tensors, _ = safetensors_file.spool(path)
    assert isinstance(tensors, dict)
    assert bits_of(tensors) == bits_of(load_file(path))


def bits_of(tensors):
    return {key: bits(t) for key, t in tensors.items()}


def test_a_file_that_changes_while_it_is_read(model, tmp_path, monkeypatch):
    """A file that is cut short after its header was checked is refused; one that another file replaces is read to its
    end."""
    path, other = li.save(model, tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    before = [bits(p) for p in li.parameters(model)]
    randomize(model, seed=1)
    li.save(model, other)
    read_header = safetensors_file.read_header
    changes = [lambda: os.replace(other, path), lambda: os.truncate(path, path.stat().st_size - 8)]

    def then_changed(f, what):
        header = read_header(f, what)
        changes.pop(0)()
        return header

    monkeypatch.setattr(safetensors_file, "read_header", then_changed)
    assert sorted(bits(t) for s in li.read(path).sites for t in (s.A, s.B)) == sorted(before)
    li.save(model, other)
    with pytest.raises(li.FileError, match="cannot be read: it became shorter while it was being read"):
        li.read(path)
    changes.append(lambda: os.truncate(other, other.stat().st_size - 8))
    with pytest.raises(li.FileError, match="cannot be read: it became shorter while it was being read"):
        safetensors_file.spool(other)
    assert not changes
