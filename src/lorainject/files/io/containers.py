"""The containers that adapters come in, and how each is opened without trusting it.

Which one a file is say its first bytes, never its name. Pickles are opened by torch's restricted unpickler alone, and only if the caller
allows it (source.py); there is no second try. What a header says of sizes is checked before anything is allocated.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import FileError, system_errors
from . import safetensors_file

Opened = tuple[dict[str, Tensor], dict[str, Any]]
SMALL = 2**28  # bytes that any archive may unpack to; else 100 times its own size, and no more
PICKLES = {b"P": "a zip, perhaps a torch pickle", b"\x80": "a pickle (torch.save)"}
REFUSED = {
    b"ggla": "a LoRA of old llama.cpp, which its own successors no longer read: convert the original adapter anew",
    b"ggml": "a model of old llama.cpp, no adapter", b"ggjt": "a model of old llama.cpp, no adapter",
    b"age-encryption.org/v1": "encrypted (age): decrypt it first",
    b"version https://git-lfs": "a git-lfs pointer: the file itself was not fetched",
    b"<": "a web page",
}  # fmt: skip
WRAPPERS = ("model_state_dict", "state_dict", "model")  # keys under which trainers put the tensors


def sniff(path: Path) -> str:
    """Which container it is, by its first bytes; safetensors, if they say nothing. FileError for those that hold no LoRA we could read."""
    first = start(path)
    if first[4:9] == b"\0\0\0\0{":  # a header's length may look like any of the marks below
        return "safetensors"
    if reason := next((why for magic, why in REFUSED.items() if first.startswith(magic)), None):
        raise FileError(
            f"{path} is not a whole safetensors file",
            [f"it looks like {reason}"],
            "get the adapter itself, in a format of li.FORMATS",
        )
    if first.startswith(b"PK\x03\x04"):
        return _zip(path)
    if first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if first[257:262] == b"ustar" or first[:2] == b"\x1f\x8b":
        return "tar"
    return "gguf" if first[:4] == b"GGUF" else "onnx_adapter" if first[4:8] == b"TORT" else "safetensors"


def start(path: Path) -> bytes:
    """The first bytes. Raises FileError for what is not there or empty."""
    with system_errors(
        f"{path} can't be read",
        way_out="check the path and its permissions; a hub's name is not taken: download the adapter first",
    ):
        if path.stat().st_size == 0:
            raise FileError(f"{path} is empty", way_out="it was cut off while it was written or copied: get it again")
        with path.open("rb") as f:
            return f.read(512)


def _pickle(path: Path) -> Opened:
    try:
        # Not the path, by whose ending torch may take it for something else; nor the file, of which a forged pickle asks for more than there is.
        value = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a forged file makes the unpickler raise
        why = next(iter(str(e).splitlines()), type(e).__name__)
        raise FileError(f"{path} is no pickle of tensors alone: {why}", way_out="it is not opened in any other way; ask for the"
                        " adapter as safetensors") from None  # fmt: skip
    for key in WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in value.items()):
        raise FileError(f"{path} holds no flat table of tensors", ["a list of tensors (cloneofsimo/lora) says nothing of where they belong"]
                        * isinstance(value, list), "convert it with the tool that made it")  # fmt: skip
    if odd := [
        key for key, t in value.items() if t.layout is not torch.strided or t.device.type != "cpu" or t.is_quantized
    ]:
        raise FileError(
            f"{path} holds tensors that are not plain:",
            [f"{key}: sparse, quantised or without data" for key in odd],
            "ask for dense ones",
        )
    if large := [key for key, t in value.items() if t.numel() * t.itemsize > t.untyped_storage().nbytes()]:
        raise FileError(
            f"{path} says more than it holds:",
            [f"{key}: its elements are not all in the file" for key in large],
            "get the file again",
        )
    return {key: t.detach().contiguous() for key, t in value.items()}, {}


def _zip(path: Path) -> str:
    """Which of the containers that are zips it is. Nothing is ever unpacked to disk, so members' names lead nowhere."""
    try:
        with zipfile.ZipFile(path) as z:
            members = z.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "pickle"  # refused there, in its words
    if (size := sum(m.file_size for m in members)) > max(SMALL, 100 * path.stat().st_size):
        raise FileError(
            f"{path} would unpack to {size:,} bytes", way_out="no adapter is that large: it was made to do harm"
        )
    return "npz" if members and all(m.filename.endswith(".npy") for m in members) else "pickle"


def _npz(path: Path) -> Opened:
    import numpy

    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key].copy()) for key in arrays.files}, {}
    except Exception as e:  # of a forged member's header, which is parsed as Python, anything
        raise FileError(f"{path} is no whole npz file of numbers: {e}", way_out="get the file again") from None


def _gguf(path: Path) -> Opened:
    _check_gguf(path)
    try:
        import gguf
        import numpy
    except ModuleNotFoundError:
        raise FileError(f"{path} is a GGUF file", way_out='pip install "lorainject[formats]"') from None
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        tensors = {}
        for t in reader.tensors:
            kind = gguf.GGMLQuantizationType(t.tensor_type)
            if kind.name not in ("F32", "F16", "BF16", "Q8_0"):
                raise ValueError(f"{t.name} is {kind.name}; adapters are F32, F16, BF16 or Q8_0")
            values = t.data if kind.name in ("F32", "F16") else gguf.dequantize(t.data, kind)
            whole = torch.from_numpy(numpy.array(values))
            tensors[str(t.name)] = whole.bfloat16() if kind.name == "BF16" else whole
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError) as e:
        raise FileError(f"{path} is no whole GGUF file: {e}", way_out="get the file again") from e
    return tensors, metadata


def _check_gguf(path: Path) -> None:
    """Walk the header and its counts, by which the gguf package would loop and allocate: all must lie within the file."""
    sizes = {
        0: 1,
        1: 1,
        2: 2,
        3: 2,
        4: 4,
        5: 4,
        6: 4,
        7: 1,
        10: 8,
        11: 8,
        12: 8,
    }  # by GGUF's number of the type; 8 is a string, 9 an array
    end = path.stat().st_size
    with path.open("rb") as f:

        def number(form: str) -> int:
            return int(struct.unpack(form, f.read(struct.calcsize(form)))[0])

        def skip(length: int) -> None:
            if f.tell() + length > end:
                raise ValueError("what its header announces is longer than the file")
            f.seek(length, 1)

        def value(kind: int, depth: int = 0) -> None:
            """Pass over one, whatever it is."""
            if kind == 8:
                skip(number("<Q"))
            elif kind == 9 and depth < 4:
                inner, count = number("<I"), number("<Q")
                if inner in sizes:
                    skip(sizes[inner] * count)
                elif count > end:
                    raise ValueError("an array is longer than the file")
                else:
                    for _ in range(count):
                        value(inner, depth + 1)
            elif kind in sizes:
                skip(sizes[kind])
            else:
                raise ValueError(f"a value of the unknown type {kind}")

        try:
            f.seek(8)
            tensors, keys = number("<Q"), number("<Q")
            for _ in range(keys):
                skip(number("<Q"))
                value(number("<I"))
            for _ in range(tensors):
                skip(number("<Q"))
                axes = number("<I")
                if axes > 4 or math.prod(number("<Q") for _ in range(axes)) > 8 * end:
                    raise ValueError("a tensor is larger than the file")
                skip(12)
        except (ValueError, struct.error) as e:
            raise FileError(f"{path} is no whole GGUF file: {e}", way_out="get the file again") from None


def _onnx_adapter(path: Path) -> Opened:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise FileError(f"{path} is an adapter of ONNX Runtime", way_out='pip install "lorainject[formats]"') from None
    try:
        adapter = onnxruntime.AdapterFormat.read_adapter(str(path))
        tensors = {name: torch.from_numpy(value.numpy().copy()) for name, value in adapter.get_parameters().items()}
        return tensors, {"adapter_version": adapter.get_adapter_version(), "model_version": adapter.get_model_version()}
    except Exception as e:  # onnxruntime's own errors have no common class
        raise FileError(f"{path} is no whole adapter of ONNX Runtime: {e}", way_out="get the file again") from None


OPEN: dict[str, Callable[[Path], Opened]] = {
    "safetensors": safetensors_file.read, "pickle": _pickle, "npz": _npz, "gguf": _gguf, "onnx_adapter": _onnx_adapter,
}  # fmt: skip
