"""ONNX Runtime's .onnx_adapter (onnxruntime 1.31.1), in Olive's layout: https://onnxruntime.ai/docs/genai.

    <path>.lora_A.weight (in, r)    <path>.lora_B.weight (r, out)    both transposed, and s multiplied into B

The names are those of the exported model's inputs. Alpha cannot be recovered; the update is exact.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ...errors import FileError
from ..format import Files, Format
from ..io.open_adapter import Hints, Source
from ..record import AdapterFile, StoredSite, checked_sites
from .pairs import read_pairs, unexpected

ENDINGS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_A": "A", ".lora_B": "B"}


def claims(source: Source) -> bool:
    """True if the file is an .onnx_adapter, by its first bytes."""
    return source.container == "onnx_adapter"


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """Return the record."""
    rest: dict[str, Tensor] = {}
    pairs = read_pairs(source.tensors, ENDINGS, problems, rest=rest)
    for key in rest:
        quantized = f"{key}: quantized to 4 bits; convert the adapter from which it was made"
        problems.append(quantized if ".quant." in key else unexpected(key, ENDINGS))
    sites = []
    for path, pair in pairs.items():
        A, B = (t.mT.contiguous() if t.ndim > 1 else t for t in (pair.A, pair.B))
        sites.append(StoredSite(path=path, A=A, B=B, alpha=B.shape[-1] if B.ndim else 1))
    return AdapterFile(
        path=source.path, format="onnx", sites=tuple(checked_sites(sites, problems)), config=dict(source.metadata)
    )


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """Return one file, with tensors of float32 and float16."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise FileError(
            "writing an .onnx_adapter needs the package onnxruntime", way_out='pip install "lorainject[formats]"'
        ) from None
    factors = {f"{s.path}.lora_{half}.weight": t for s in file.sites for half, t in (("A", s.A), ("B", s.B))}
    arrays = {
        key: t.mT.contiguous().to(t.dtype if t.dtype == torch.float16 else torch.float32).numpy()
        for key, t in factors.items()
    }
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(int(file.config.get("adapter_version", 1)))
    adapter.set_model_version(int(file.config.get("model_version", 1)))
    # The values lie in the memory of `arrays`, which must outlive the export.
    adapter.set_parameters({key: onnxruntime.OrtValue.ortvalue_from_numpy(a) for key, a in arrays.items()})
    with tempfile.TemporaryDirectory() as folder:
        adapter.export_adapter(str(Path(folder) / "a"))
        return {path: [(Path(folder) / "a").read_bytes()]}


FORMAT = Format(name="onnx", library="onnxruntime 1.31.1", claims=claims, read=read, write=write, scales="none",
                suffix=".onnx_adapter", holds=frozenset())  # fmt: skip
