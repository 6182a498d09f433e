"""The exact difference of two checkpoints, in a folder of its own: `diff`.

    FOLDER/manifest.json            the files and tensors of the tuned checkpoint, in the order of their bytes
    FOLDER/low_rank.safetensors     P and Q of each matrix whose change has a low-rank part (rank_search.py)
    FOLDER/rest.bin                 tuned - round(W0 + P Q), coded without loss (residuals.py), and the other files

The guess round(W0 + P Q) has the same bits on every machine (low_rank_guess.py). After a merge it is right in nearly
all elements, so that the rest is small. It is used where it makes the difference smaller, which is tried on the first
tile of each matrix; otherwise the guess is W0 itself. rebuild.py reads the folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.copying import Meter, Progress
from ..checkpoint.merge_copy import other_files
from ..checkpoint.shards import Shard, read_shards
from ..errors import FileError
from ..files.io import atomic_write, safetensors_file
from ..files.io.atomic_write import new_file, new_folder
from ..files.io.regular_file import as_path
from ..files.io.safetensors_file import TORCH_DTYPES, TensorEntry
from ..lora.weight_kinds import DTYPES
from ..numerics.modes import in_default_modes
from ..numerics.tiled_matmul import row_tiles
from .low_rank_guess import bits_of, guess_tile, snap
from .pairs import Pair, opened
from .rank_search import find_low_rank
from .reduce import table
from .residuals import LENGTH, LEVEL, encode

MANIFEST, FACTORS, REST, VERSION = "manifest.json", "low_rank.safetensors", "rest.bin", 1
Factors = tuple[Tensor, Tensor] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodedTensor:
    """How one tensor of the tuned checkpoint is coded."""

    key: str
    how: str
    """"base" (equal to it), "low-rank" (P, Q and a rest), "rest" (the difference from the base), "alone" (not in the
    base, or there with another shape or dtype)."""
    r: int
    """The highest rank of its matrices; 0 without a low-rank part."""
    size: int
    """Bytes of the tensor."""
    coded: int
    """Bytes of its factors and its rest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """What `diff` wrote. Prints as a table of what each kind of tensor costs."""

    path: Path
    tensors: tuple[CodedTensor, ...]
    size: int
    """Bytes of the tuned checkpoint."""
    coded: int
    """Bytes of the folder."""

    def as_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON can hold."""
        return dataclasses.asdict(self) | {"path": str(self.path)}

    def __str__(self) -> str:
        rows = [("tensors", "number", "bytes", "coded", "share")]
        for how in ("base", "low-rank", "rest", "alone"):
            group = [t for t in self.tensors if t.how == how]
            size, coded = sum(t.size for t in group), sum(t.coded for t in group)
            if group:
                rows.append((how, str(len(group)), f"{size:,}", f"{coded:,}", f"{coded / max(size, 1):.2%}"))
        lines = table(rows)
        if any(t.how == "rest" for t in self.tensors):
            lines.append("rest: the change has no low-rank part that pays; its difference from the base is coded")
        lines.append(f"{self.coded:,} bytes in {self.path}, {self.coded / max(self.size, 1):.2%} of {self.size:,}")
        return "\n".join(lines)


@in_default_modes
def diff(base: str | Path, tuned: str | Path, path: str | Path, *, progress: Progress | None = None) -> Difference:
    """Write what makes a base into a tuned checkpoint, to the byte: low-rank factors and an exact rest.

    Memory is needed for one matrix in the base, in the tuned checkpoint and in float32.

    Args:
        base: The directory of the base.
        tuned: The directory of a checkpoint that was trained or merged from it. Every file of it is restored by
            `patch`, but for hidden ones.
        path: The directory to write. It must be empty or not exist.
        progress: Called with the bytes done and the bytes in total.

    Returns:
        What each tensor costs.

    Raises:
        FileError: A checkpoint cannot be read, or `path` cannot be written.
    """
    base, tuned, out = as_path(base), as_path(tuned), as_path(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out} already exists and is not an empty directory", way_out="give a new or empty directory")
    shards = read_shards(tuned)
    with opened(read_shards(base), shards) as pair, new_folder(out) as folder:
        with new_file(folder / REST) as rest:
            coder = _Coder(pair, rest, Meter(sum(shard.size for shard in shards), progress))
            files = [coder.shard(shard) for shard in shards]
            files += [coder.other(path, tuned, base) for path in other_files(tuned, shards)]
        body = {"version": VERSION, "files": files}
        atomic_write.write({folder / FACTORS: safetensors_file.dump(coder.factors, {})})
        atomic_write.write({folder / MANIFEST: [json.dumps(body).encode()]})
        coded = sum(file.stat().st_size for file in folder.iterdir())
    size = sum(shard.size for shard in shards)
    return Difference(path=out, tensors=tuple(coder.tensors), size=size, coded=coded)


class _Coder:
    """Writes the rest of one file after the other.

    Args:
        pair: The base and the tuned checkpoint.
        rest: The file descriptor of rest.bin.
        meter: Counts the bytes of the tuned checkpoint.
    """

    def __init__(self, pair: Pair, rest: int, meter: Meter) -> None:
        self.pair, self.rest, self.meter = pair, rest, meter
        self.factors: dict[str, Tensor] = {}
        self.tensors: list[CodedTensor] = []

    def shard(self, shard: Shard) -> dict[str, Any]:
        """Code a shard, and return its entry in the manifest."""
        header_end = min((entry.start for entry in shard.tensors.values()), default=shard.size)
        with open(shard.path, "rb") as f:
            header = f.read(header_end)
        self._write(header)
        digest = hashlib.sha256(header)
        entries = [self._tensor(key, entry, digest) for key, entry in shard.tensors.items()]
        return {"name": shard.path.name, "sha256": digest.hexdigest(), "tensors": entries}

    def other(self, path: Path, tuned: Path, base: Path) -> dict[str, Any]:
        """Code a file that is no shard, and return its entry in the manifest."""
        name, data = path.relative_to(tuned), path.read_bytes()
        entry = {"name": str(name), "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        if (base / name).is_file() and (base / name).read_bytes() == data:
            return entry | {"base": True}
        self._write(data)
        return entry

    def _write(self, data: bytes) -> None:
        code = zlib.compress(data, LEVEL)
        os.write(self.rest, LENGTH.pack(len(data)) + LENGTH.pack(len(code)) + code)

    def _tensor(self, key: str, entry: TensorEntry, digest: Any) -> dict[str, Any]:
        """Code a tensor, and return its entry in the manifest."""
        has_base = key in self.pair.base.entries and self.pair.base.entries[key][:2] == entry[:2]
        size, start, crc = entry.stop - entry.start, os.lseek(self.rest, 0, os.SEEK_CUR), 0
        ranks, is_same, costs = list[int](), has_base, 0
        for i, (first, rows, width) in enumerate(matrices(entry)):
            m = read_matrix(self.pair.other.read(key, *span(entry, first, rows * width)), entry, rows, width)
            digest.update(bits_of(m).data)
            w0 = torch.zeros_like(m)
            if has_base:
                raw = self.pair.base.read(key, *span(entry, first, rows * width))
                crc, w0 = zlib.crc32(raw, crc), read_matrix(raw, entry, rows, width)
            factors = self._low_rank(w0, m) if has_base and m.dtype in DTYPES and min(rows, width) > 1 else None
            ranks.append(0 if factors is None else factors[1].shape[0])
            if factors is not None:
                self.factors |= {f"{key}|{i}|{name}": t for name, t in zip("PQ", factors, strict=True)}
                costs += sum(t.nbytes for t in factors)
            for tile in row_tiles(rows, width, m.device):
                code = _code(w0, m, tile, factors)
                is_same = is_same and factors is None and len(code) == LENGTH.size * m.element_size()
                os.write(self.rest, code)
        self.meter.add(size)
        costs += os.lseek(self.rest, 0, os.SEEK_CUR) - start
        how = "alone" if not has_base else "base" if is_same else "low-rank" if any(ranks) else "rest"
        self.tensors.append(CodedTensor(key=key, how=how, r=max(ranks, default=0), size=size, coded=costs))
        return {"key": key, "dtype": entry.dtype, "shape": entry.shape, "ranks": ranks, "base": crc if has_base else -1}

    def _low_rank(self, w0: Tensor, m: Tensor) -> Factors:
        """Return the low-rank part of a change, on the grid, if it makes the code shorter."""
        if torch.equal(w0, m) or not bool(m.isfinite().all() and w0.isfinite().all()):
            return None
        part = find_low_rank(w0, m, "auto")
        if part is None:
            return None
        factors = snap(part.P), snap(part.Q)
        tiles = list(row_tiles(m.shape[0], m.shape[1], m.device))
        without, within = (len(_code(w0, m, tiles[0], f)) for f in (None, factors))
        pays = (without - within) * len(tiles) > sum(t.nbytes for t in factors)
        return factors if pays else None


def _code(w0: Tensor, m: Tensor, tile: slice, factors: Factors) -> bytes:
    P, Q = (None, None) if factors is None else (factors[0][tile], factors[1])
    return encode(bits_of(m[tile]), bits_of(guess_tile(w0[tile], P, Q)), m.dtype in DTYPES)


def matrices(entry: TensorEntry) -> list[tuple[int, int, int]]:
    """Return the first element, the rows and the width of each matrix of a tensor on disk.

    A tensor with three axes is a stack of matrices. A tensor of a type that torch lacks is a row of bytes.
    """
    shape, count = entry.shape, (entry.stop - entry.start) // dtype_of(entry).itemsize
    if entry.dtype not in TORCH_DTYPES or len(shape) < 2 or count == 0:
        return [(0, 1, count)] if count else []
    if len(shape) == 3:
        return [(i * shape[1] * shape[2], shape[1], shape[2]) for i in range(shape[0])]
    return [(0, shape[0], count // shape[0])]


def dtype_of(entry: TensorEntry) -> torch.dtype:
    """Return the dtype in which a tensor on disk is coded: bytes, if torch has no such type."""
    dtype = TORCH_DTYPES.get(entry.dtype, torch.int8)
    return torch.float32 if dtype.is_complex else dtype


def span(entry: TensorEntry, first: int, count: int) -> tuple[int, int]:
    """Return the first byte of some elements within a tensor, and the first byte behind them."""
    itemsize = dtype_of(entry).itemsize
    return first * itemsize, (first + count) * itemsize


def read_matrix(raw: bytes, entry: TensorEntry, rows: int, width: int) -> Tensor:
    """Return a matrix of these bytes."""
    return torch.frombuffer(bytearray(raw), dtype=dtype_of(entry)).view(rows, width)
