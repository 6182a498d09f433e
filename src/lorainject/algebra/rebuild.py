"""Rebuild a tuned checkpoint to the byte from a base and a difference: `patch`. difference.py describes the folder.

Each file must have the SHA-256 that it had, or nothing is left of it. The base's tensors are recognized by a CRC-32, so
that another base is named before the end.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.copying import Meter, Progress
from ..checkpoint.shards import read_shards
from ..errors import FileError
from ..files.io import safetensors_file
from ..files.io.atomic_write import new_file, new_folder
from ..files.io.regular_file import as_path, open_regular, read_regular
from ..files.io.safetensors_file import BITS, MAX_HEADER, TensorEntry
from ..lora.weight_kinds import DTYPES
from ..numerics.modes import in_default_modes
from ..numerics.tiled_matmul import row_tiles
from .difference import FACTORS, MANIFEST, REST, VERSION, dtype_of, matrices, read_matrix, span
from .low_rank_guess import bits_of, guess_tile
from .pairs import OpenShards, opened
from .residuals import LENGTH, decode, inflate

MAX_FILE = 1 << 32  # bytes of a file other than a shard
AGAIN = "copy the difference again, or write it again with diff"


@in_default_modes
def patch(base: str | Path, difference: str | Path, path: str | Path, *, progress: Progress | None = None) -> Path:
    """Rebuild the tuned checkpoint that `diff` was given, to the byte.

    Args:
        base: The directory of the base; it may be cut into other shards than it was then.
        difference: The folder that `diff` wrote.
        path: The directory to write. It must be empty or not exist.
        progress: Called with the bytes done and the bytes in total.

    Returns:
        The directory.

    Raises:
        FileError: The base is another one (each tensor that differs is listed), the difference is damaged, or a file
            cannot be read or written. Nothing is left of `path`.
    """
    base, folder, out = as_path(base), as_path(difference), as_path(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out} already exists and is not an empty directory", way_out="give a new or empty directory")
    files = _read_manifest(folder)
    shards = read_shards(base)
    tensors = [t for file in files for t in file.get("tensors", ())]
    meter = Meter(sum(_size(t) for t in tensors), progress)
    with opened(shards, ()) as pair, new_folder(out) as new, open_regular(folder / REST) as rest:
        _require_base(base, files, pair.base)
        factors, _ = safetensors_file.read(folder / FACTORS)
        rebuilder = _Rebuilder(pair.base, factors, rest, meter)
        try:
            for file in files:
                rebuilder.write(file, base, new)
        except (ValueError, KeyError, TypeError, IndexError, RuntimeError, zlib.error, struct.error) as e:
            raise _damaged(folder, str(e)) from e
        if rebuilder.other_base:
            raise FileError(f"{base} is not the base of {folder}:", rebuilder.other_base, "give the base of `diff`")
        if rebuilder.wrong:
            raise _damaged(folder, f"{', '.join(rebuilder.wrong)} would not come out as it was")
    return out


class _Rebuilder:
    """Writes one file after the other, in the order of the rest."""

    def __init__(self, base: OpenShards, factors: Mapping[str, Tensor], rest: BufferedReader, meter: Meter) -> None:
        self.base, self.factors, self.rest, self.meter = base, factors, rest, meter
        self.other_base: list[str] = []
        self.wrong: list[str] = []

    def write(self, file: Mapping[str, Any], base: Path, out: Path) -> None:
        """Write one file of the manifest."""
        target = out / file["name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with new_file(target) as fd:
            if "tensors" not in file:
                data = read_regular(base / file["name"], MAX_FILE) if file.get("base") else self._piece()
                digest.update(data)
                _write_all(fd, data)
            else:
                header = self._piece()
                digest.update(header)
                _write_all(fd, header)
                for tensor in file["tensors"]:
                    self._tensor(tensor, fd, digest)
        if digest.hexdigest() != file["sha256"]:
            self.wrong.append(file["name"])

    def _read(self, n: int) -> bytes:
        data = self.rest.read(n)
        if len(data) != n:
            raise ValueError(f"{REST} ends too early")
        return data

    def _piece(self) -> bytes:
        size, length = (LENGTH.unpack(self._read(LENGTH.size))[0] for _ in range(2))
        return inflate(self._read(length), size)

    def _tensor(self, tensor: Mapping[str, Any], fd: int, digest: Any) -> None:
        """Write one tensor."""
        entry, key, crc = _entry(tensor), tensor["key"], 0
        for i, (first, rows, width) in enumerate(matrices(entry)):
            w0 = torch.zeros(rows, width, dtype=dtype_of(entry))
            if tensor["base"] >= 0:
                raw = self.base.read(key, *span(entry, first, rows * width))
                crc, w0 = zlib.crc32(raw, crc), read_matrix(raw, entry, rows, width)
            P, Q = (self.factors[f"{key}|{i}|{name}"] if tensor["ranks"][i] else None for name in "PQ")
            for tile in row_tiles(rows, width, w0.device):
                guess = bits_of(guess_tile(w0[tile], None if P is None else P[tile], Q))
                data = decode(self._read, guess, w0.dtype in DTYPES).data
                digest.update(data)
                _write_all(fd, data)
        if tensor["base"] >= 0 and crc != tensor["base"]:
            self.other_base.append(f"{key}: has other values than the base's")
        self.meter.add(entry.stop - entry.start)


def _write_all(fd: int, data: bytes | memoryview) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(fd, rest) :]


def _entry(tensor: Mapping[str, Any]) -> TensorEntry:
    shape = tuple(tensor["shape"])
    return TensorEntry(tensor["dtype"], shape, 0, math.prod(shape) * BITS[tensor["dtype"]] // 8)


def _size(tensor: Mapping[str, Any]) -> int:
    entry = _entry(tensor)
    return entry.stop - entry.start


def _require_base(base: Path, files: Sequence[Mapping[str, Any]], shards: OpenShards) -> None:
    """Raise FileError unless the base has every tensor and every file that the difference was taken from."""
    problems = []
    for t in (t for file in files for t in file.get("tensors", ()) if t["base"] >= 0):
        entry, key = shards.entries.get(t["key"]), t["key"]
        if entry is None:
            problems.append(f"{key}: is not in the base")
        elif (entry.dtype, list(entry.shape)) != (t["dtype"], list(t["shape"])):
            problems.append(f"{key}: is {entry.dtype} {list(entry.shape)}, not {t['dtype']} {list(t['shape'])}")
    for file in (file for file in files if file.get("base")):
        path = base / file["name"]
        if not path.is_file() or hashlib.sha256(read_regular(path, MAX_FILE)).hexdigest() != file["sha256"]:
            problems.append(f"{file['name']}: is not in the base as it was")
    if problems:
        raise FileError(f"{base} is not the base of this difference:", problems, "give the base that diff was given")


def _read_manifest(folder: Path) -> list[Mapping[str, Any]]:
    """Return the entries of the files. Raise FileError if the manifest is missing or impossible."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileError(f"{folder} has no {MANIFEST}", way_out="give a folder that diff wrote")
    try:
        body = json.loads(read_regular(path, MAX_HEADER))
        if body["version"] != VERSION:
            raise ValueError(f"version {body['version']!r} is not known here")
        for file in body["files"]:
            name = PurePosixPath(file["name"])
            if name.is_absolute() or ".." in name.parts or not name.parts or "\0" in file["name"]:
                raise ValueError(f"{file['name']!r} leads out of the folder")
            for tensor in file.get("tensors", ()):
                ranks = [isinstance(r, int) and r >= 0 for r in tensor["ranks"]]
                if not isinstance(tensor["base"], int) or len(ranks) != len(matrices(_entry(tensor))) or not all(ranks):
                    raise ValueError(f"{tensor['key']!r} is described wrongly")
        return list(body["files"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, ZeroDivisionError) as e:
        raise _damaged(folder, f"{MANIFEST}: {e}") from e


def _damaged(folder: Path, why: str) -> FileError:
    return FileError(f"{folder} cannot be used: {why}", way_out=AGAIN)
