"""The safetensors container: bounded reads, the same bytes in every process.

A header is checked by the safetensors package; the bytes are then read once, each tensor's into memory of its own, or copied to a file that
is mapped, where each is wanted for a while alone. Writing is ours, since
that package orders header metadata by a random hash, makes files of mode 0600 and does not fsync (commit.py). The format: 8 bytes of
header length (little endian), a JSON header padded with spaces to a multiple of 8, then the tensors' bytes in the header's order.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import mmap
import os
import shutil
import struct
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from ...errors import FileError

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32",
          torch.uint16: "U16"}  # fmt: skip
READ = {name: dtype for dtype, name in DTYPES.items()} | {
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""By its name in a header. What is no float of an adapter is read too, to be named with all else that is wrong."""
NEAR = 1 << 20  # bytes around a page within which the system maps others along with it
TRIES = 100  # while other files are renamed over the one that is read
T = TypeVar("T")
NOT_NUMPYS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}
"""What numpy has not, and what has as many bits."""


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its header's metadata. Raises FileError if it is anything else."""
    return _read(path, _all)


def spool(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """The same without memory for them, in a temporary file (see Spool), if there is room for that."""

    def tensors(f: io.BufferedReader, header: Any) -> Mapping[str, Tensor]:
        start = f.tell()
        with contextlib.suppress(OSError):
            return Spool(f, header)
        f.seek(start)
        return _all(f, header)

    return _read(path, tensors)


def _all(f: io.BufferedReader, header: Any) -> dict[str, Tensor]:
    # Not taken from safe_open's map of the file: rewritten or cut short, that would change or kill the model loaded from it.
    found = {key: _next(f, header.get_slice(key)) for key in header.offset_keys()}
    return {key: found[key] for key in header.keys()}  # noqa: SIM118


def _read(path: Path, tensors: Callable[[io.BufferedReader, Any], T]) -> tuple[T, dict[str, str]]:
    """What `tensors` makes of a file at its first tensor's bytes and of safe_open's header, and the header's metadata."""
    try:
        size = path.stat().st_size
        if size == 0:
            raise FileError(f"{path} is empty", way_out="it was cut off while it was written or copied: get it again")
        for _ in range(TRIES):
            with path.open("rb") as f, safe_open(path, framework="pt") as header:
                if os.path.samestat(os.fstat(f.fileno()), path.stat()):  # else another took its place between the two
                    f.seek(8 + int.from_bytes(f.read(8), "little"))
                    return tensors(f, header), header.metadata() or {}
        raise ValueError("other files take its place again and again")
    except SafetensorError as e:
        raise FileError(
            f"{path} is not a whole safetensors file: {e}", [_guess(path)], "get the file again from where it came"
        ) from None
    except FileError:
        raise
    except (OSError, ValueError, RuntimeError) as e:  # safetensors raises RuntimeError for a file that can't be opened
        reason = getattr(e, "strerror", None) or e
        raise FileError(
            f"{path} can't be read: {reason}",
            way_out="check the path and its permissions; a hub's name is not taken: download the adapter first",
        ) from e


class Spool(Mapping[str, Tensor]):
    """The tensors of a file, which is copied to a temporary one that nobody else changes, and mapped: what has been read of a tensor is in memory
    for as long as somebody has it. They are not to be written to.
    """

    def __init__(self, f: io.BufferedReader, header: Any) -> None:
        self.entries: dict[str, tuple[int, int, torch.dtype, list[int]]] = {}
        """By name: where it starts and ends, its type and shape."""
        end = 0
        for key in header.offset_keys():
            entry = header.get_slice(key)
            start, dtype, shape = end, _dtype(entry), entry.get_shape()
            end += math.prod(shape) * dtype.itemsize
            self.entries[key] = start, end, dtype, shape
        self.names = list(header.keys())
        with tempfile.TemporaryFile() as file:
            shutil.copyfileobj(f, file, 1 << 20)
            if file.tell() < end:
                raise ValueError("it became shorter while it was read")
            file.write(b" ")  # a map can't be empty
            file.flush()
            # One for all: each map of Python's keeps a file descriptor, of which a process may have no more than a thousand.
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __getitem__(self, key: str) -> Tensor:
        start, end, dtype, shape = self.entries[key]
        if start == end or start % dtype.itemsize:
            tensor = torch.empty(shape, dtype=dtype)
            raw(tensor)[:] = self.map[start:end]
            return tensor
        first = start - start % NEAR
        memory = memoryview(self.map)[start:end]
        weakref.finalize(
            memory, self.map.madvise, mmap.MADV_DONTNEED, first, min(end + NEAR, len(self.map)) - first
        ).atexit = False
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.entries)


def _dtype(entry: Any) -> torch.dtype:
    if (dtype := READ.get(entry.get_dtype())) is None:
        raise ValueError(f"tensors of the type {entry.get_dtype()} are not known here")
    return dtype


def _next(f: io.BufferedReader, entry: Any) -> Tensor:
    """The tensor whose bytes come next; in a file that was checked, they lie side by side."""
    tensor = torch.empty(entry.get_shape(), dtype=_dtype(entry))
    if f.readinto(raw(tensor)) != tensor.nbytes:
        raise ValueError("it became shorter while it was read")
    return tensor


def parse(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same of a file in memory, which was in an archive at `path`."""
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    except (SafetensorError, ValueError, struct.error) as e:
        raise FileError(
            f"{path} holds no whole safetensors file: {e}", way_out="get the file again from where it came"
        ) from None
    return tensors, header.get("__metadata__", {})


def dump(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], raws: Mapping[str, memoryview] | None = None
) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces: the header, then one piece a tensor, in the order of the names. `raws` are the tensors' bytes, where there
    are such already."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for key, t in sorted(tensors.items()):
        header[key] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for key, t in sorted(tensors.items()):
        yield raw(t) if raws is None else raws[key]


def raw(tensor: Tensor) -> memoryview:
    """The tensor's elements as little-endian bytes; its own memory if it lies on the CPU, contiguous."""
    assert sys.byteorder == "little", "safetensors is little endian"
    if (bits := NOT_NUMPYS.get(tensor.dtype)) is not None:
        tensor = tensor.view(bits)
    return tensor.numpy(force=True).ravel().view(numpy.uint8).data  # in a third of the time that torch's views take


def _guess(path: Path) -> str:
    """What the first bytes look like, for a file that is not safetensors."""
    with path.open("rb") as f:
        start = f.read(64)
    known = {b"PK\x03\x04": "a zip, perhaps a torch pickle", b"\x80": "a pickle (torch.save)", b"GGUF": "a GGUF file",
             b"version https://git-lfs": "a git-lfs pointer: the file itself was not fetched", b"<": "a web page"}  # fmt: skip
    looks = next((what for magic, what in known.items() if start.startswith(magic)), None)
    return f"it looks like {looks}" if looks else f"it has {path.stat().st_size:,} bytes and begins {start[:16]!r}"
