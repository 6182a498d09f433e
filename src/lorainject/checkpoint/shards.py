"""The safetensors shards of a model's checkpoint, and what their headers say.

A checkpoint is one file, or several with an index that says which tensor is in which file. All of it is checked before
a merge begins; no tensor is read here. files/io/safetensors_file.py parses the headers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FileError, system_errors
from ..files.io.regular_file import is_plain_name, open_regular, read_regular
from ..files.io.safetensors_file import BITS, MAX_HEADER, TensorEntry, read_header
from ..numerics.fingerprint import sample_positions

INDEX = "model.safetensors.index.json"
INDEX_ENDING = ".safetensors.index.json"  # diffusers calls it diffusion_pytorch_model.safetensors.index.json
SINGLE = "model.safetensors"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data",
                ".index.json")  # fmt: skip
"""How the names of files with weights, in any format, and of their indices end."""
FINGERPRINT_SAMPLES = 16  # elements of each tensor
DOWNLOAD = "download the missing files, or the whole model again"


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint, as it was when its header was read."""

    path: Path
    tensors: dict[str, TensorEntry]
    """In the order of their bytes."""
    size: int
    identity: tuple[int, int, int]
    """Inode, size in bytes, and time of the last change in ns: if one of them differs, the file was changed."""


def _identity(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@contextlib.contextmanager
def open_unchanged(shard: Shard) -> Iterator[int]:
    """Open a shard and yield its file descriptor. Raise FileError if the file was changed, before or meanwhile."""

    def check() -> None:
        if not _identity(os.fstat(f.fileno())) == _identity(shard.path.stat()) == shard.identity:
            raise FileError(
                f"{shard.path} was changed while it was being merged",
                way_out="merge again when no other program writes to the checkpoint",
            )

    with open_regular(shard.path) as f:
        check()
        yield f.fileno()
        check()


def read_shards(folder: Path) -> list[Shard]:
    """Return the shards of the checkpoint in this folder. Raise FileError with everything that is wrong with it."""
    if not folder.is_dir():
        raise FileError(
            f"{folder} is not a directory",
            way_out="give the directory with the model's config.json and .safetensors files",
        )
    index = find_index(folder)
    with system_errors(f"{folder} cannot be read", way_out="check that the files exist and may be read"):
        shard_of = _read_index(index) if index.exists() else {}
        names = sorted(set(shard_of.values())) or sorted(path.name for path in folder.glob("*.safetensors"))
        if not shard_of and SINGLE in names:
            names = [SINGLE]
        if not names or (len(names) > 1 and not shard_of):
            raise _no_checkpoint(folder, names)
        problems = [f"{name}: is not a plain file name" for name in names if not is_plain_name(name)]
        if not problems:
            absent = [name for name in names if not (folder / name).is_file()]
            problems = [f"{name}: is in the index, but not in the directory" for name in absent]
        if problems:
            raise FileError(f"{index} does not fit its directory:", problems, DOWNLOAD)
        shards = [_read_shard(folder / name) for name in names]
    if shard_of:
        _check_index(index, shard_of, shards)
    return shards


def fingerprint(shards: Sequence[Shard]) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and some elements of all tensors, whatever shards they are in."""
    lines = []
    for shard in shards:
        with open_unchanged(shard) as file:
            for key, entry in shard.tensors.items():
                size = entry.stop - entry.start
                count = size * 8 // BITS.get(entry.dtype, 8)
                width = max(1, size // count) if count else 0
                positions = sample_positions(count, FINGERPRINT_SAMPLES) if count else []
                sample = b"".join(os.pread(file, width, entry.start + min(i * width, size - width)) for i in positions)
                lines.append(f"{key} {entry.dtype} {list(entry.shape)} {sample.hex()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def find_index(folder: Path) -> Path:
    """Return the path of a checkpoint's index, which need not exist: transformers' index, or else the only one."""
    others = sorted(folder.glob(f"*{INDEX_ENDING}"))
    return others[0] if len(others) == 1 else folder / INDEX


def _read_shard(path: Path) -> Shard:
    with open_regular(path) as f:
        stat = os.fstat(f.fileno())
        header = read_header(f, path)
    return Shard(path, header.tensors, header.size, _identity(stat))


def _read_index(index: Path) -> dict[str, str]:
    try:
        shard_of = json.loads(read_regular(index, MAX_HEADER))["weight_map"]
        if isinstance(shard_of, dict) and shard_of and all(isinstance(x, str) for x in shard_of.values()):
            return shard_of
    except (ValueError, KeyError, TypeError):
        pass
    raise FileError(
        f"{index} has no weight_map, which should name a file for each tensor",
        way_out="download the index again, or the whole model",
    )


def _check_index(index: Path, shard_of: dict[str, str], shards: Sequence[Shard]) -> None:
    """Raise FileError unless each tensor is in the shard that the index names, and in no other."""
    actual = {key: shard.path.name for shard in shards for key in shard.tensors}
    problems = [
        f"{key}: is in {actual.get(key, 'no shard')}, but the index says {shard_of.get(key, 'nothing of it')}"
        for key in sorted({*shard_of, *actual})
        if shard_of.get(key) != actual.get(key)
    ]
    if not problems and sum(len(shard.tensors) for shard in shards) != len(actual):
        problems = ["a tensor is in two shards"]
    if problems:
        raise FileError(f"{index} does not fit its shards:", problems, DOWNLOAD)


def _no_checkpoint(folder: Path, names: list[str]) -> FileError:
    """Return the error for a folder that has no shards, or several without an index."""
    if names:
        what = f"{folder} has several .safetensors files, but no {INDEX} that says which tensor is in which:"
        return FileError(what, [", ".join(names[:8])], "download the index too, or keep one model per directory")
    others = sorted(path.name for path in folder.iterdir() if path.name.endswith(WEIGHT_FILES))
    if others:
        return FileError(
            f"{folder} has no .safetensors file; its weights are in another format:",
            [", ".join(others[:8])],
            "save the model as safetensors once: AutoModel.from_pretrained(...).save_pretrained(...)",
        )
    return FileError(f"{folder} holds no weights", way_out="give the directory with the model's .safetensors files")
