"""The safetensors container: bounded reads, the same bytes in every process.

Reading is the safetensors package's. Writing is ours, since that package orders header metadata by a random hash, makes
files of mode 0600 and does not fsync (commit.py). The format: 8 bytes of header length (little endian), a JSON header padded with spaces
to a multiple of 8, then the tensors' bytes in the header's order.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from ..errors import FileError

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32",
          torch.uint16: "U16"}  # fmt: skip


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its header's metadata. Raises FileError if it is anything else."""
    try:
        size = path.stat().st_size
        if size == 0:
            raise FileError(f"{path} is empty", way_out="it was cut off while it was written or copied: get it again")
        with safe_open(path, framework="pt") as f:
            # Cloned, since the file is mapped: rewritten or cut short, it would change or kill the model that was loaded from it.
            return {key: f.get_tensor(key).clone() for key in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except SafetensorError as e:
        raise FileError(f"{path} is not a whole safetensors file: {e}", [_guess(path)], "get the file again from where it came") from None
    except FileError:
        raise
    except (OSError, ValueError, RuntimeError) as e:  # safetensors raises RuntimeError for a file that can't be opened
        reason = getattr(e, "strerror", None) or e
        raise FileError(
            f"{path} can't be read: {reason}", way_out="check the path and its permissions; a hub's name is not taken: download the adapter first"
        ) from e


def parse(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same of a file in memory, which was in an archive at `path`."""
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    except (SafetensorError, ValueError, struct.error) as e:
        raise FileError(f"{path} holds no whole safetensors file: {e}", way_out="get the file again from where it came") from None
    return tensors, header.get("__metadata__", {})


def dump(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces: the header, then one piece a tensor, in the order of the names."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for key, t in sorted(tensors.items()):
        header[key] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, t in sorted(tensors.items()):
        yield raw(t)


def raw(tensor: Tensor) -> memoryview:
    """The tensor's elements as little-endian bytes; its own memory if it lies on the CPU, contiguous."""
    assert sys.byteorder == "little", "safetensors is little endian"
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _guess(path: Path) -> str:
    """What the first bytes look like, for a file that is not safetensors."""
    with path.open("rb") as f:
        start = f.read(64)
    known = {b"PK\x03\x04": "a zip, perhaps a torch pickle", b"\x80": "a pickle (torch.save)", b"GGUF": "a GGUF file",
             b"version https://git-lfs": "a git-lfs pointer: the file itself was not fetched", b"<": "a web page"}  # fmt: skip
    looks = next((what for magic, what in known.items() if start.startswith(magic)), None)
    return f"it looks like {looks}" if looks else f"it has {path.stat().st_size:,} bytes and begins {start[:16]!r}"
