"""A model's checkpoint on disk: its safetensors shards and what their headers say, checked before anything is done with them.

A shard begins with 8 bytes of header length (little endian) and a JSON header, which says of each tensor its dtype, its shape and where its
bytes are. Nothing of the tensors is read here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import FileError, system_errors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000  # bytes; the safetensors package refuses longer ones too
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
         "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}  # fmt: skip
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data")


@dataclass(frozen=True)
class Stored:
    """One tensor in a shard."""

    dtype: str
    """As safetensors writes it."""
    shape: tuple[int, ...]
    start: int
    """Of its bytes, from the beginning of the file."""
    stop: int


@dataclass(frozen=True)
class Shard:
    """One file, as it was when it was looked at."""

    path: Path
    tensors: dict[str, Stored]
    """In the order of their bytes."""
    size: int
    seen: tuple[int, int, int]
    """Inode, size and time of the last change (ns): another, and the file is another."""


def identity(stat: os.stat_result) -> tuple[int, int, int]:
    """By which a change is noticed."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def scan(folder: Path) -> list[Shard]:
    """The shards of the checkpoint in this folder. Raises FileError with all that is wrong with it."""
    if not folder.is_dir():
        raise FileError(
            f"{folder} is not a directory",
            way_out="give the directory with the model's config.json and .safetensors files",
        )
    index = folder / INDEX
    with system_errors(f"{folder} can't be read", way_out="check the files and their permissions"):
        if index.exists():
            named = _weight_map(index)
            names = sorted(set(named.values()))
        else:
            found = sorted(p.name for p in folder.glob("*.safetensors"))
            named, names = {}, [SINGLE] if SINGLE in found else found
        if not names or (len(names) > 1 and not named):
            raise _no_shards(folder, names)
        odd = [f"{name}: not a plain file name" for name in names if Path(name).name != name]
        missing = [
            f"{name}: in the index, but not in the directory"
            for name in names
            if not odd and not (folder / name).is_file()
        ]
        if odd or missing:
            raise FileError(
                f"{index} does not fit its directory:",
                odd + missing,
                "download the missing files, or the whole model anew",
            )
        shards = [_shard(folder / name) for name in names]
    if named:
        there = {key: shard.path.name for shard in shards for key in shard.tensors}
        wrong = [f"{key}: in {there.get(key, 'no shard')}, but the index says {named.get(key, 'nothing of it')}"
                 for key in sorted({*named, *there}) if named.get(key) != there.get(key)]  # fmt: skip
        if wrong or sum(len(s.tensors) for s in shards) != len(there):
            raise FileError(
                f"{index} does not fit the shards:", wrong or ["a tensor is in two shards"], "download the model anew"
            )
    return shards


def _shard(path: Path) -> Shard:
    with path.open("rb") as f:
        stat = os.fstat(f.fileno())
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= min(HEADER_LIMIT, stat.st_size - 8):
            raise FileError(f"{path} is not a whole safetensors file: its header would have {length:,} of the file's {stat.st_size:,} bytes",
                            way_out="get the file again from where it came")  # fmt: skip
        try:
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            tensors = {key: _stored(entry, 8 + length) for key, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise FileError(
                f"{path} has a header that can't be read: {e}", way_out="get the file again from where it came"
            ) from e
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1].start))
    end = 8 + length
    for key, t in tensors.items():
        if t.start != end:
            raise FileError(
                f"{path}: the bytes of {key} begin at {t.start:,}, not at {end:,}",
                way_out="get the file again from where it came",
            )
        end = t.stop
    if end != stat.st_size:
        raise FileError(f"{path} has {stat.st_size:,} bytes, its header speaks of {end:,}",
                        way_out="it was cut off while it was written or copied: get it again")  # fmt: skip
    return Shard(path, tensors, stat.st_size, identity(stat))


def _stored(entry: Mapping[str, Any], data: int) -> Stored:
    dtype, shape, (start, stop) = entry["dtype"], tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
    size = BYTES.get(dtype)
    for n in shape:
        size = None if size is None else size * n
    if min((0, *shape)) < 0 or not 0 <= start <= stop or (size is not None and stop - start != size):
        raise ValueError(f"{stop - start} bytes for {dtype} {shape}")
    return Stored(dtype, shape, data + start, data + stop)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        named = json.loads(index.read_bytes())["weight_map"]
        if isinstance(named, dict) and named and all(isinstance(x, str) for item in named.items() for x in item):
            return named
    except (ValueError, KeyError, TypeError):
        pass
    raise FileError(f"{index} holds no weight_map", way_out="download the model anew")


def _no_shards(folder: Path, names: list[str]) -> FileError:
    if names:
        return FileError(
            f"{folder} has several .safetensors files and no {INDEX}", [", ".join(names[:8])], "download the index, too"
        )
    others = sorted(p.name for p in folder.iterdir() if p.name.endswith((*OTHER_WEIGHTS, ".index.json")))
    if others:
        return FileError(f"{folder} has no .safetensors file", [f"it has {', '.join(others[:8])}"],
                         "save it as safetensors once: AutoModel.from_pretrained(...).save_pretrained(...)")  # fmt: skip
    return FileError(f"{folder} holds no weights", way_out="give the directory with the model's .safetensors files")
