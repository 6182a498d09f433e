"""The safetensors format: the project's one parser of headers, bounded reads, and writes that give the same bytes.

    8 bytes    the length of the header, little endian
    header     JSON, padded with spaces: {"__metadata__": {name: text}, tensor: {"dtype", "shape", "data_offsets"}, ...}
    data       the tensors' bytes, little endian, side by side and without gaps

A header is checked against the size of the file before anything is allocated. Each tensor is then read once, into
memory that it shares with no other.

The safetensors package is not used. Its reader maps the file into memory: if the file were rewritten or cut short
later, the model loaded from it would change, or the process would be killed. Its writer orders the metadata by a random
hash, gives the file the mode 0600 and does not fsync (see atomic_write.py).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import mmap
import os
import shutil
import struct
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from ...errors import FileError
from .regular_file import open_regular

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
               torch.int64: "I64", torch.int32: "I32", torch.int16: "I16"}  # fmt: skip
"""The data types that are written, with their names in a header."""
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {
    "U16": torch.uint16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""The data types that are read. Some occur in no adapter: an error can then list them with all other problems."""
BITS = {name: 8 * dtype.itemsize for name, dtype in TORCH_DTYPES.items()} | {
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4
}  # fmt: skip
"""The number of bits per element."""
SAME_BITS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}
"""The data types that numpy lacks, each with one of the same size that numpy has."""
MAX_HEADER = 100_000_000  # bytes; the safetensors package refuses longer headers too
MAP_AROUND = 1 << 20  # bytes: with the page that is read, the system maps the pages of such a block
COPY_AGAIN = "the file is damaged: copy or download it again and compare its size with the original's, or save it again"
CHECK_PATH = "check the path and its permissions (a hub repository's name is not a path: download the adapter first)"


class TensorEntry(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    """The data type's name in safetensors, such as "BF16"."""
    shape: tuple[int, ...]
    start: int
    """Position of the first byte, counted from the beginning of the file."""
    stop: int


@dataclass(frozen=True)
class Header:
    """A header that fits its file."""

    tensors: dict[str, TensorEntry]
    """In the order of their bytes."""
    metadata: dict[str, str]
    size: int
    """The size of the file in bytes."""


def read_header(f: io.BufferedIOBase, what: object) -> Header:
    """Read and check the header of an open file, and leave the file at the first tensor's first byte.

    Args:
        f: The file.
        what: The name of the file, for error messages.

    Returns:
        The header. A tensor of a data type that is not in `BITS` is accepted with any number of bytes.

    Raises:
        FileError: If the file is not safetensors, or if the tensors do not fill it exactly.
    """
    size = f.seek(0, os.SEEK_END)
    f.seek(0)
    start = f.read(64)
    try:
        length = int.from_bytes(start[:8], "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"its header would have {length:,} bytes")
        f.seek(8)
        content = json.loads(f.read(length).decode(), object_pairs_hook=_object, parse_constant=_no_constant)
        metadata = content.pop("__metadata__", None) or {}
        tensors = {key: _entry(key, entry, 8 + length) for key, entry in content.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not text")
        "".join((*tensors, *metadata, *metadata.values())).encode()  # refuses half of a surrogate pair
        tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
        end = 8 + length
        for key, entry in tensors.items():
            if entry.start != end:
                raise ValueError(f"the bytes of {key} begin at {entry.start:,}, not at {end:,}")
            end = entry.stop
        if end != size:
            raise ValueError(f"its header describes {end:,} bytes")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        reason = f"it has no {e}" if isinstance(e, KeyError) else e
        contents = f"it has {size:,} bytes and begins with {start[:16]!r}"
        raise FileError(f"{what} is not a whole safetensors file: {reason}", [contents], COPY_AGAIN) from None
    return Header(tensors, metadata, size)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, unless a name occurs twice: readers would differ in which value they take."""
    if len(content := dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice in its header")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"its header holds {name}, which is not JSON")


def _entry(key: str, entry: Mapping[str, Any], data_start: int) -> TensorEntry:
    dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    numbers = (*shape, start, stop)
    if not isinstance(dtype, str) or {*map(type, numbers)} != {int} or min(numbers) < 0:
        raise ValueError(f"{key} has no valid dtype, shape and data_offsets")
    bits = math.prod(shape) * BITS[dtype] if dtype in BITS else (stop - start) * 8
    if math.prod(filter(None, shape)) >= 2**63 or stop < start or bits != (stop - start) * 8:
        raise ValueError(f"{key} has {stop - start:,} bytes, which do not fit {dtype} {list(shape)}")
    return TensorEntry(dtype, shape, data_start + start, data_start + stop)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, sorted by name, and its metadata. Raise FileError for other files."""
    with _opened(path) as f:
        return _read_all(f, path)


def parse(data: bytes, what: object) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file in memory. `what` names it in error messages."""
    return _read_all(io.BytesIO(data), what)


def spool(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Return what `read` returns, with the tensors in a temporary file (see Spool) if there is room for one."""
    with _opened(path) as f:
        header = read_header(f, path)
        _check_dtypes(header, path)
        with contextlib.suppress(OSError):
            return Spool(f, header), header.metadata
        return _read_all(f, path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    try:
        with open_regular(path) as f:
            yield f
    except FileError:
        raise
    except (OSError, ValueError, RuntimeError, MemoryError) as e:  # RuntimeError: torch has no memory
        reason = getattr(e, "strerror", None) or e
        raise FileError(f"{path} cannot be read: {reason}", way_out=CHECK_PATH) from e


def _read_all(f: io.BufferedIOBase, what: object) -> tuple[dict[str, Tensor], dict[str, str]]:
    header = read_header(f, what)
    _check_dtypes(header, what)
    tensors = {}
    for key, entry in header.tensors.items():  # in the order of their bytes, which lie side by side
        tensors[key] = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        if f.readinto(raw(tensors[key])) != entry.stop - entry.start:
            raise ValueError("it became shorter while it was being read")
    return dict(sorted(tensors.items())), header.metadata


def _check_dtypes(header: Header, what: object) -> None:
    if unknown := [f"{key}: {entry.dtype}" for key, entry in header.tensors.items() if entry.dtype not in TORCH_DTYPES]:
        way_out = "save the adapter in float32, bfloat16 or float16"
        raise FileError(f"{what} holds tensors of unsupported data types:", unknown, way_out)


class Spool(Mapping[str, Tensor]):
    """The tensors of a file, in a copy that nobody else can change.

    The copy is a temporary file that is mapped into memory. What has been read of a tensor takes memory only while
    somebody holds the tensor. The tensors must not be written to.
    """

    def __init__(self, f: io.BufferedReader, header: Header) -> None:
        self.entries = dict(sorted(header.tensors.items()))
        with tempfile.TemporaryFile() as copy:
            f.seek(0)
            shutil.copyfileobj(f, copy, 1 << 20)
            if copy.tell() < header.size:
                raise ValueError("it became shorter while it was being read")
            copy.flush()
            # One map for all tensors: each mmap object keeps a file descriptor, and a process may have only a thousand.
            self.map = mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_COPY)

    def __getitem__(self, key: str) -> Tensor:
        entry = self.entries[key]
        dtype = TORCH_DTYPES[entry.dtype]
        if entry.start == entry.stop or entry.start % dtype.itemsize:
            tensor = torch.empty(entry.shape, dtype=dtype)
            raw(tensor)[:] = self.map[entry.start : entry.stop]
            return tensor
        first = entry.start - entry.start % MAP_AROUND
        memory = memoryview(self.map)[entry.start : entry.stop]
        length = min(entry.stop + MAP_AROUND, len(self.map)) - first
        weakref.finalize(memory, self.map.madvise, mmap.MADV_DONTNEED, first, length).atexit = False
        return torch.frombuffer(memory, dtype=dtype).view(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def dump(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], raws: Mapping[str, memoryview] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file in pieces: the header, then the bytes of each tensor, sorted by name.

    Args:
        tensors: The tensors by name.
        metadata: Text for the header's "__metadata__".
        raws: The bytes of each tensor, if the caller has them already (see `raw`).
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    names = sorted(tensors)
    stops = list(itertools.accumulate(tensors[name].nbytes for name in names))
    for name, stop in zip(names, stops, strict=True):
        t = tensors[name]
        header[name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [stop - t.nbytes, stop]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        yield raw(tensors[name]) if raws is None else raws[name]


def raw(tensor: Tensor) -> memoryview:
    """Return a tensor's elements as little-endian bytes: its memory itself if it is contiguous and on the CPU.

    numpy's views take a third of the time of torch's.
    """
    assert sys.byteorder == "little", "safetensors is little endian"
    if (bits := SAME_BITS.get(tensor.dtype)) is not None:
        tensor = tensor.view(bits)
    return tensor.numpy(force=True).ravel().view(numpy.uint8).data
