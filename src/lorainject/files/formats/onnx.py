"""ONNX Runtime's adapters (.onnx_adapter; onnxruntime 1.31.1), in the layout that Olive gives them: https://onnxruntime.ai/docs/genai.

    <path>.lora_A.weight (in, r)    <path>.lora_B.weight (r, out)    both turned, and s multiplied into B

The names are those of the exported model's inputs. alpha is not recoverable; the update is exact.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ...errors import FileError
from ..format import Files, Format
from ..io.open_adapter import Hints, Source
from ..record import NONE, AdapterFile, StoredSite, checked

KEY = re.compile(r"(?P<path>.*)\.lora_(?P<part>[AB])(?:\.weight)?")


def claims(source: Source) -> bool:
    """Whether it is such a file at all."""
    return source.container == "onnx_adapter"


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """The record; what is wrong goes into `problems`."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, t in source.tensors.items():
        if known := KEY.fullmatch(key):
            found.setdefault(known["path"], {})[known["part"]] = t
        else:
            problems.append(
                f"{key}: {'quantised to 4 bits: convert the original adapter' if '.quant.' in key else 'unexpected, neither A nor B'}"
            )
    problems += [f"{at}.lora_{half}: missing" for at, parts in found.items() for half in "AB" if half not in parts]
    sites: list[StoredSite] = []
    for at, parts in found.items():
        if parts.keys() == {"A", "B"}:
            A, B = (parts[half].mT.contiguous() if parts[half].ndim > 1 else parts[half] for half in "AB")
            made = checked(StoredSite(path=at, A=NONE, B=NONE, alpha=0), A, B, problems, alpha=A.shape[0])
            sites += [made] if made else []
    return AdapterFile(path=source.path, format="onnx", sites=tuple(sites), config=dict(source.metadata))


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """One file, of float32 and float16."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise FileError(
            "such files are written by the package onnxruntime", way_out='pip install "lorainject[formats]"'
        ) from None
    halves = {f"{s.path}.lora_{half}.weight": t for s in file.sites for half, t in (("A", s.A), ("B", s.B))}
    arrays = {
        key: t.mT.contiguous().to(t.dtype if t.dtype == torch.float16 else torch.float32).numpy()
        for key, t in halves.items()
    }
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(int(file.config.get("adapter_version", 1)))
    adapter.set_model_version(int(file.config.get("model_version", 1)))
    # `arrays` has to outlive the export: the values lie in its memory.
    adapter.set_parameters({key: onnxruntime.OrtValue.ortvalue_from_numpy(a) for key, a in arrays.items()})
    with tempfile.TemporaryDirectory() as folder:
        adapter.export_adapter(str(Path(folder) / "a"))
        return {path: [(Path(folder) / "a").read_bytes()]}


FORMAT = Format(name="onnx", library="onnxruntime 1.31.1", claims=claims, read=read, write=write, scales="none", suffix=".onnx_adapter",
                holds=frozenset())  # fmt: skip
