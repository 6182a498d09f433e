"""llama.cpp's adapters in GGUF, by the package gguf (0.19.0): https://github.com/ggml-org/llama.cpp.

    <tensor name>.lora_a (r, in)    <tensor name>.lora_b (out, r)    adapter.lora.alpha, one for all; s = alpha / r, or 1 if alpha is 0
    token_embd.weight.lora_a (V, r), turned;  blk.N.ffn_{gate,up,down}_exps.weight.lora_a (E, r, in), .lora_b (E, out, r)

For the architecture `llama` (Llama, Mistral, Mixtral) the rows of q and k are in rotary pairs, where transformers has them in halves.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import FileError
from .. import transforms
from ..format import Files, Format
from ..io.open_adapter import Hints, Source
from ..record import NONE, AdapterFile, StoredSite, checked
from .names import Names, heads_of, reordered, stacks

NAMES = Names({f"blk.{{}}.{theirs}": f"model.layers.{{}}.{ours}" for theirs, ours in {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj", "ffn_down_exps": "mlp.experts.down_proj", "ffn_gate_inp": "mlp.gate"}.items()}
    | {"token_embd": "model.embed_tokens", "output": "lm_head"})  # fmt: skip
KEY = re.compile(r"(?P<name>.*)\.weight\.(?P<part>lora_[ab])")
IN_PAIRS = ("llama",)  # architectures whose converter sorts q and k
ALPHA = "adapter.lora.alpha"


def claims(source: Source) -> bool:
    """Whether it is a GGUF file at all: `read` says what is wrong with one that is no adapter."""
    return source.container == "gguf"


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """The record, in transformers' names and order; what is wrong, or not said, goes into `problems`."""
    about = source.metadata
    kind, arch = about.get("general.type"), str(about.get("general.architecture", ""))
    if kind != "adapter" or about.get("adapter.type") != "lora":
        problems.append(f"it is a {kind or 'model'} of the type {about.get('adapter.type')!r}, not a LoRA adapter")
        return None
    modules = [path for path, _ in hints.model.named_modules()] if hints.model is not None else []
    inverse = {name: path for path, name in _theirs(modules, arch).items()}
    found: dict[str, dict[str, Tensor]] = {}
    for key, t in source.tensors.items():
        known = KEY.fullmatch(key)
        path = known and (inverse.get(known["name"]) or NAMES.ours(known["name"]))
        if known is None or path is None:
            if not key.endswith("_norm.weight"):  # llama.cpp's loader passes over them too
                problems.append(f"{key}: unexpected, no weight that is known here; read it with the model")
        else:
            found.setdefault(path, {})[known["part"]] = t
    problems += [
        f"{at}: {half} is missing" for at, parts in found.items() for half in ("lora_a", "lora_b") if half not in parts
    ]
    heads = heads_of(hints) if arch in IN_PAIRS else (0, 0)
    if heads is None and any(at.endswith((".q_proj", ".k_proj")) for at in found):
        problems.append(
            "the rows of q and k are in another order than transformers': give the heads, as in Hints(heads=(32, 8)), or the model"
        )
    if problems:
        return None
    sites: list[StoredSite] = []
    alpha = float(about.get(ALPHA, 0.0))
    for at, parts in found.items():
        A, B = parts["lora_a"], parts["lora_b"]
        embedding = at == (inverse.get("token_embd") or NAMES.ours("token_embd"))
        s = StoredSite(
            path=at, kind="experts" if A.ndim == 3 else "embedding" if embedding else "linear", A=NONE, B=NONE, alpha=0
        )
        made = checked(s, A.mT.contiguous() if embedding else A, B, problems, alpha=alpha or B.shape[-1])
        if made is not None and made.A.ndim == 3:
            block, _, leaf = at.rpartition(".")
            sites += transforms.split_experts(made, [f"{block}.{e}.{leaf}" for e in range(len(made.A))])
        elif made is not None:
            sites.append(reordered(made, heads, to_pairs=False) if heads and heads[0] else made)
    return AdapterFile(path=source.path, format="gguf", sites=tuple(sites), config=dict(about))


def _theirs(paths: Sequence[str], arch: str) -> dict[str, str]:
    """GGUF's names of these paths: by llama.cpp's own table for the architecture, else by ours; paths that neither has are left out."""
    import gguf

    known = next((a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), None)
    layers = 1 + max((int(n[1]) for path in paths if (n := re.search(r"\.(\d+)\.", path))), default=0)
    table = gguf.get_tensor_name_map(known, layers) if known is not None else None
    names = {path: (table.get_name(path) if table else None) or NAMES.theirs(path) for path in paths}
    return {path: name for path, name in names.items() if name}


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """One file. Raises FileError for names that the architecture has not, and where it or the heads are not known."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise FileError("GGUF is written by the package gguf", way_out='pip install "lorainject[formats]"') from None
    arch = (
        hints.architecture
        or file.config.get("general.architecture")
        or getattr(getattr(hints.model, "config", None), "model_type", None)
    )
    arch = "llama" if arch in ("mistral", "mixtral") else arch
    heads, sites = heads_of(hints) if arch in IN_PAIRS else (0, 0), tuple(stacks(file.sites, ".experts"))
    names = _theirs([s.path for s in sites], str(arch))
    problems = [f"{s.name}: GGUF's {arch} has no such weight" for s in sites if s.path not in names]
    if arch is None or arch not in gguf.MODEL_ARCH_NAMES.values():
        problems.append(
            f"the architecture is {arch!r}: say llama.cpp's word for the base, as in Hints(architecture='llama')"
        )
    if heads is None and any(s.path.endswith((".q_proj", ".k_proj")) for s in sites):
        problems.append(
            "the rows of q and k are in another order there: give the heads, as in Hints(heads=(32, 8)), or the model"
        )
    if problems:
        raise FileError("this can't be written as GGUF:", problems, "choose another format")
    alpha = float(torch.tensor(sites[0].scale * sites[0].r, dtype=torch.float32))
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "a.gguf", str(arch))
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32(ALPHA, alpha)
        for s in sites:
            own = transforms.with_scale_folded(s, alpha / s.r)
            own = reordered(own, heads, to_pairs=True) if heads and heads[0] else own
            for part, t in (("lora_a", own.A.mT if s.embedding else own.A), ("lora_b", own.B)):
                _add(writer, f"{names[s.path]}.weight.{part}", t.contiguous())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {path: [(Path(folder) / "a.gguf").read_bytes()]}


def _add(writer: Any, name: str, t: Tensor) -> None:
    import gguf

    if t.dtype == torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quantize(t.float().numpy(), kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, (t.float() if t.dtype == torch.float64 else t).numpy())


FORMAT = Format(name="gguf", library="gguf 0.19.0", claims=claims, read=read, write=write, scales="alpha", suffix=".gguf", asks=("heads",),
                holds=frozenset({"embeddings"}))  # fmt: skip
