"""llama.cpp's adapters in GGUF, by the package gguf (0.19.0): https://github.com/ggml-org/llama.cpp.

    <tensor name>.lora_a (r, in)    <tensor name>.lora_b (out, r)
    token_embd.weight.lora_a (V, r)                                              transposed
    blk.N.ffn_{gate,up,down}_exps.weight.lora_a (E, r, in), .lora_b (E, out, r)
    adapter.lora.alpha in the header, one for all: s = alpha / r, or 1 if alpha is 0

Names are those of the package gguf for the architecture. In which order the rows are is in gguf_rows.py.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import FileError
from .. import transforms
from ..format import Files, Format
from ..io.open_adapter import Hints, Source
from ..record import AdapterFile, StoredSite, checked_sites, collected, require_writable
from .gguf_rows import MODEL_TYPES, RULES, heads_of, missing_heads, row_order, unknown_rows
from .language_model_names import NameTable, stack_experts
from .pairs import read_pairs

ENDINGS = {".weight.lora_a": "A", ".weight.lora_b": "B"}
NAMES = NameTable({
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
    "blk.{}.ffn_gate_exps": "model.layers.{}.mlp.experts.gate_proj",
    "blk.{}.ffn_up_exps": "model.layers.{}.mlp.experts.up_proj",
    "blk.{}.ffn_down_exps": "model.layers.{}.mlp.experts.down_proj",
    "blk.{}.ffn_gate_inp": "model.layers.{}.mlp.gate",
})  # fmt: skip
ALPHA = "adapter.lora.alpha"


def claims(source: Source) -> bool:
    """True if the file is GGUF at all; `read` says what is wrong with one that is no adapter."""
    return source.container == "gguf"


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """Return the record, in transformers' names and order of rows, with stacks of experts as one linear per expert."""
    header = source.metadata
    kind, architecture = header.get("general.type"), str(header.get("general.architecture", ""))
    if kind != "adapter" or header.get("adapter.type") != "lora":
        problems.append(f"it is a {kind or 'model'} of the type {header.get('adapter.type')!r}, not a LoRA adapter")
        return None
    modules = [path for path, _ in hints.model.named_modules()] if hints.model is not None else []
    known = {name: path for path, name in _tensor_names(modules, architecture).items()}

    def module_path(name: str) -> str | None:
        return known.get(name) or NAMES.to_transformers(name)

    rest: dict[str, Tensor] = {}
    pairs = read_pairs(source.tensors, ENDINGS, problems, translate=module_path, rest=rest)
    problems += [
        f"{key}: unexpected, no weight of this name is known: read the file with the model"
        for key in rest
        if not key.endswith("_norm.weight")  # llama.cpp's loader ignores them too
    ]
    heads = heads_of(architecture, hints)
    problems += unknown_rows(architecture) + missing_heads(architecture, pairs, heads)
    if problems:
        return None
    alpha, embedding = float(header.get(ALPHA, 0.0)), module_path("token_embd")
    stored = []
    for path, pair in pairs.items():
        A, kind = pair.A, "experts" if pair.A.ndim == 3 else "linear"
        if path == embedding:
            A, kind = A.mT.contiguous(), "embedding" if A.ndim < 3 else kind
        stored.append(StoredSite(path=path, kind=kind, A=A, B=pair.B, alpha=alpha or pair.B.shape[-1]))
    sites: list[StoredSite] = []
    for s in checked_sites(stored, problems):
        if s.A.ndim == 3:
            block, _, leaf = s.path.rpartition(".")
            sites += transforms.split_experts(s, [f"{block}.{n}.{leaf}" for n in range(len(s.A))])
        else:
            order = row_order(architecture, s.path, s.B.shape[0], heads)
            sites.append(s if order is None else replace(s, B=s.B[torch.argsort(order)]))
    return AdapterFile(path=source.path, format="gguf", sites=tuple(sites), config=dict(header))


def _tensor_names(paths: Iterable[str], architecture: str) -> dict[str, str]:
    """Return GGUF's names by path, from the package's table for the architecture."""
    import gguf

    arch = next((a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    layers = 1 + max((int(match[1]) for path in paths if (match := re.search(r"\.(\d+)\.", path))), default=0)
    if arch is None:
        return {}
    table = gguf.get_tensor_name_map(arch, layers)
    names = {path: table.get_name(path) for path in paths}
    return {path: name for path, name in names.items() if name}


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """Return one file.

    Raises:
        FileError: If the architecture or the heads are unknown, or the architecture has no weight of some name.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise FileError("writing GGUF needs the package gguf", way_out='pip install "lorainject[formats]"') from None
    architecture = (
        hints.architecture
        or file.config.get("general.architecture")
        or getattr(getattr(hints.model, "config", None), "model_type", None)
    )
    architecture = MODEL_TYPES.get(str(architecture), str(architecture))
    heads = heads_of(architecture, hints)
    problems = unknown_rows(architecture)
    sites = stack_experts(file.sites, ".experts", problems)
    paths = [s.path for s in sites]
    names = _tensor_names(paths, architecture)
    orders: dict[str, Tensor | None] = {}
    if architecture in RULES:
        problems += missing_heads(architecture, paths, heads)
        problems += [f"{path}: GGUF's {architecture} has no weight of this name" for path in paths if path not in names]
        for s in sites:
            with collected(problems, s.path):
                orders[s.path] = row_order(architecture, s.path, s.B.shape[-2], heads)
    require_writable("GGUF", problems, "give what is missing, or choose another format")
    alpha = float(torch.tensor(sites[0].scale * sites[0].r, dtype=torch.float32))
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "a.gguf", architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32(ALPHA, alpha)
        for s in sites:
            s, order = transforms.with_scale_folded(s, alpha / s.r), orders[s.path]
            s = s if order is None else replace(s, B=s.B[order])
            _add_tensor(writer, f"{names[s.path]}.weight.lora_a", s.A.mT if s.embedding else s.A)
            _add_tensor(writer, f"{names[s.path]}.weight.lora_b", s.B)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {path: [(Path(folder) / "a.gguf").read_bytes()]}


def _add_tensor(writer: Any, name: str, t: Tensor) -> None:
    import gguf

    t = t.contiguous()
    if t.dtype == torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quantize(t.float().numpy(), kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, (t.float() if t.dtype == torch.float64 else t).numpy())


FORMAT = Format(name="gguf", library="gguf 0.19.0", claims=claims, read=read, write=write, scales="alpha",
                suffix=".gguf", asks=("heads", "model"), holds=frozenset({"embeddings"}))  # fmt: skip
