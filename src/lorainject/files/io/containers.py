"""The containers of tensors (safetensors, pickle, npz, GGUF, ONNX Runtime), each opened without trusting what it says.

The first bytes of a file decide which container it is, never its name. Pickles are opened by torch's restricted
unpickler only, and only if the caller allows it (open_adapter.py). Sizes in a header are compared with the file's size
before anything is allocated.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...errors import FileError, system_errors
from . import safetensors_file
from .regular_file import open_regular, read_regular, require_dense
from .safetensors_file import CHECK_PATH, COPY_AGAIN

Contents = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and the header's metadata."""
MIN_UNPACKED, MAX_RATIO = 2**28, 100  # an archive may unpack to so many bytes, or to so many times its own size
MAX_SHARED = 4  # times the bytes of their memory that the tensors of a pickle may have together (tied weights)
PICKLES = {b"P": "a zip, perhaps a torch pickle", b"\x80": "a pickle (torch.save)"}
REFUSED = {
    b"ggla": ("a LoRA of old llama.cpp, which later versions no longer read", "convert the original adapter again"),
    b"ggml": ("a model of old llama.cpp, not an adapter", "give the adapter's own file"),
    b"ggjt": ("a model of old llama.cpp, not an adapter", "give the adapter's own file"),
    b"age-encryption.org/v1": ("encrypted (age)", "decrypt it first"),
    b"version https://git-lfs": ("a git-lfs pointer: the file itself was not fetched", "run git lfs pull"),
    b"<": ("a web page", "download the file itself, not the page that shows it"),
}  # fmt: skip
WRAPPERS = ("model_state_dict", "state_dict", "model")  # keys under which training programs put the tensors
INSTALL = 'pip install "lorainject[formats]"'
GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by GGUF's number of its type. Type 8 is a string, type 9 an array."""
GGUF_STRING, GGUF_ARRAY = 8, 9


def detect(path: Path) -> str:
    """Return the container of a file: a key of `READERS`, or "tar". A file that looks like none counts as safetensors.

    Raises:
        FileError: If the file is empty or cannot be read, or if no container that holds adapters begins like it.
    """
    start = first_bytes(path)
    if start[4:9] == b"\0\0\0\0{":  # safetensors; the length of its header may look like any of the marks below
        return "safetensors"
    for mark, (kind, way_out) in REFUSED.items():
        if start.startswith(mark):
            raise FileError(f"{path} is not an adapter file", [f"it looks like {kind}"], way_out)
    if start.startswith(b"PK\x03\x04"):
        return _zip_container(path)
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if start[257:262] == b"ustar" or start[:2] == b"\x1f\x8b":
        return "tar"
    return "gguf" if start[:4] == b"GGUF" else "onnx_adapter" if start[4:8] == b"TORT" else "safetensors"


def first_bytes(path: Path) -> bytes:
    """Return the first 512 bytes of a file. Raise FileError if there is no such file, or if it is empty."""
    with system_errors(f"{path} cannot be read", way_out=CHECK_PATH):
        with open_regular(path) as f:
            start = f.read(512)
        if not start:
            way_out = "it was cut off while it was written or copied: copy or download it again, or save it again"
            raise FileError(f"{path} is empty", way_out=way_out)
        require_dense(path)
        return start


def _zip_container(path: Path) -> str:
    """Tell numpy's zips from torch's. Nothing is unpacked to disk, so the names of members do no harm."""
    try:
        with zipfile.ZipFile(path) as z:
            members = z.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "pickle"  # whose reader refuses it
    if (size := sum(m.file_size for m in members)) > max(MIN_UNPACKED, MAX_RATIO * path.stat().st_size):
        way_out = "no adapter is that large, so the file may be an attack: get the adapter from a source that you trust"
        raise FileError(f"{path} would unpack to {size:,} bytes", way_out=way_out)
    return "npz" if members and all(m.filename.endswith(".npy") for m in members) else "pickle"


def _read_pickle(path: Path) -> Contents:
    try:
        # From memory: torch would choose a loader by the path's ending, and a forged pickle would ask the file for more
        # bytes than there are.
        value = torch.load(io.BytesIO(read_regular(path, path.stat().st_size)), map_location="cpu", weights_only=True)
    except Exception as e:  # a forged file can make the unpickler raise anything
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        way_out = "no other way of opening it is safe: ask for the adapter as safetensors"
        raise FileError(f"{path} is not a pickle that holds only tensors: {reason}", way_out=way_out) from None
    for key in WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in value.items()):
        problems = [f"it is a {type(value).__name__}"]
        if isinstance(value, list):
            problems = ["it is a list of tensors (cloneofsimo/lora), which does not say where they belong"]
        elif isinstance(value, dict):
            others = {str(k)[:40]: type(t).__name__ for k, t in value.items() if not isinstance(t, Tensor)}
            problems = [f"{key}: {kind}" for key, kind in others.items()] or ["its keys are not names"]
        raise FileError(f"{path} is not a table of tensors by name", problems, "convert it with the tool that wrote it")
    if odd := [
        k for k, t in value.items() if t.layout is not torch.strided or t.device.type != "cpu" or t.is_quantized
    ]:
        problems = [f"{key}: sparse, quantized or without data" for key in odd]
        raise FileError(f"{path} holds tensors that are not dense:", problems, "ask for an adapter with dense tensors")
    if large := [k for k, t in value.items() if t.numel() * t.itemsize > t.untyped_storage().nbytes()]:
        problems = [f"{key}: its elements are not all in the file" for key in large]
        raise FileError(
            f"{path} describes larger tensors than it holds:", problems, "ask for the adapter as safetensors"
        )
    stored = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in value.values()}.values())
    if (size := sum(t.numel() * t.itemsize for t in value.values())) > MAX_SHARED * stored:
        raise FileError(
            f"{path} describes {size:,} bytes of tensors, which share {stored:,} bytes",
            way_out="no adapter shares that much, so the file may be an attack: ask for the adapter as safetensors",
        )
    return {key: t.detach().contiguous() for key, t in value.items()}, {}


def _read_npz(path: Path) -> Contents:
    import numpy

    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key].copy()) for key in arrays.files}, {}
    except Exception as e:  # numpy parses a member's header as Python, so a forged one can raise anything
        raise FileError(f"{path} is not a whole npz file of numbers: {e}", way_out=COPY_AGAIN) from None


def _read_gguf(path: Path) -> Contents:
    with open_regular(path) as f:
        try:
            check_gguf(f, path.stat().st_size)
        except (ValueError, struct.error) as e:
            raise FileError(f"{path} is not a whole GGUF file: {e}", way_out=COPY_AGAIN) from None
    try:
        import gguf
        import numpy
    except ModuleNotFoundError:
        raise FileError(f"{path} is a GGUF file", way_out=INSTALL) from None
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        tensors = {}
        for t in reader.tensors:
            kind = gguf.GGMLQuantizationType(t.tensor_type)
            if kind.name not in ("F32", "F16", "BF16", "Q8_0"):
                raise ValueError(f"{t.name} is {kind.name}; adapters are F32, F16, BF16 or Q8_0")
            values = t.data if kind.name in ("F32", "F16") else gguf.dequantize(t.data, kind)
            tensor = torch.from_numpy(numpy.array(values))
            tensors[str(t.name)] = tensor.bfloat16() if kind.name == "BF16" else tensor
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError) as e:
        raise FileError(f"{path} is not a whole GGUF file: {e}", way_out=COPY_AGAIN) from e
    return tensors, metadata


def check_gguf(f: BinaryIO, size: int) -> None:
    """Raise ValueError or struct.error unless all that the header announces lies within the file.

    The gguf package would loop and allocate by the header's counts.
    """

    def number(form: str) -> int:
        return int(struct.unpack(form, f.read(struct.calcsize(form)))[0])

    def skip(length: int) -> None:
        if f.tell() + length > size:
            raise ValueError("its header announces more bytes than it has")
        f.seek(length, 1)

    def skip_value(kind: int, depth: int = 0) -> None:
        if kind == GGUF_STRING:
            skip(number("<Q"))
        elif kind == GGUF_ARRAY and depth < 4:
            inner, count = number("<I"), number("<Q")
            if inner in GGUF_SIZES:
                skip(GGUF_SIZES[inner] * count)
            elif count > size:
                raise ValueError("an array is longer than the file")
            else:
                for _ in range(count):
                    skip_value(inner, depth + 1)
        elif kind in GGUF_SIZES:
            skip(GGUF_SIZES[kind])
        else:
            raise ValueError(f"a value has the unknown type {kind}")

    f.seek(8)
    tensors, keys = number("<Q"), number("<Q")
    for _ in range(keys):
        skip(number("<Q"))
        skip_value(number("<I"))
    elements = 0  # of at least a byte each, in the types that adapters have
    for _ in range(tensors):
        skip(number("<Q"))
        axes = number("<I")
        elements += math.prod(number("<Q") for _ in range(axes)) if axes <= 4 else size + 1
        if elements > size:
            raise ValueError("its tensors are larger than the file")
        skip(12)


def _read_onnx_adapter(path: Path) -> Contents:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise FileError(f"{path} is an adapter of ONNX Runtime", way_out=INSTALL) from None
    try:
        adapter = onnxruntime.AdapterFormat.read_adapter(str(path))
        tensors = {name: torch.from_numpy(value.numpy().copy()) for name, value in adapter.get_parameters().items()}
        return tensors, {"adapter_version": adapter.get_adapter_version(), "model_version": adapter.get_model_version()}
    except Exception as e:  # onnxruntime's own errors have no common class
        raise FileError(f"{path} is not a whole adapter of ONNX Runtime: {e}", way_out=COPY_AGAIN) from None


READERS: dict[str, Callable[[Path], Contents]] = {
    "safetensors": safetensors_file.read,
    "pickle": _read_pickle,
    "npz": _read_npz,
    "gguf": _read_gguf,
    "onnx_adapter": _read_onnx_adapter,
}
