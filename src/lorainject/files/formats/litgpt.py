"""litgpt's lit_model.pth.lora (0.5.13): https://github.com/Lightning-AI/litgpt. A pickle; r and alpha are in hyperparameters.yaml beside it.

    transformer.h.N.attn.qkv.lora_A (k r, in)    .lora_B (rows of the enabled among q, k, v; r)    k of them, each with r rows of A
    transformer.h.N.attn.proj, .mlp.fc_1 (gate), .mlp.fc_2 (up), .mlp.proj (down), lm_head:    .lora_A (r, in)    .lora_B (out, r)

q has n_head heads of rows, k and v n_query_groups each (model_config.yaml, or Hints(heads=...)).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import FileError
from .. import transforms
from ..format import Files, Format
from ..io.open_adapter import Hints, Source
from ..record import NONE, AdapterFile, StoredSite, checked
from .names import Names, heads_of, pickled

QKV = ("query", "key", "value")
NAMES = Names({
    "transformer.h.{}.attn.proj": "model.layers.{}.self_attn.o_proj", "transformer.h.{}.mlp.fc_1": "model.layers.{}.mlp.gate_proj",
    "transformer.h.{}.mlp.fc_2": "model.layers.{}.mlp.up_proj", "transformer.h.{}.mlp.proj": "model.layers.{}.mlp.down_proj", "lm_head": "lm_head",
    "transformer.h.{}.attn.query": "model.layers.{}.self_attn.q_proj", "transformer.h.{}.attn.key": "model.layers.{}.self_attn.k_proj",
    "transformer.h.{}.attn.value": "model.layers.{}.self_attn.v_proj",
})  # fmt: skip
ENDS = (".lora_A", ".lora_B")
HYPER, MODEL, FILE = "hyperparameters.yaml", "model_config.yaml", "lit_model.pth.lora"
SWITCHES = {"projection": ".o_proj", "mlp": ("gate_proj", "up_proj", "down_proj"), "head": "lm_head"}


def claims(source: Source) -> bool:
    """Whether its tensors have litgpt's names."""
    known = (".attn.qkv", ".attn.proj", ".attn.attn", ".mlp.fc_1", ".mlp.fc_2", ".mlp.fc", ".mlp.proj")
    paths = [key[: -len(ENDS[0])] for key in source.tensors if key.endswith(ENDS)]
    return HYPER in source.configs or (
        bool(paths) and all(p == "lm_head" or (p.startswith("transformer.h.") and p.endswith(known)) for p in paths)
    )


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """The record, in transformers' names; what is wrong, or not said, goes into `problems`."""
    hyper, model = source.configs.get(HYPER, {}), source.configs.get(MODEL, {})
    paths = dict.fromkeys(key[: -len(ENDS[0])] for key in source.tensors if key.endswith(ENDS))
    problems += [f"{key}: unexpected, neither A nor B" for key in source.tensors if not key.endswith(ENDS)]
    problems += [f"{at}{end}: missing" for at in paths for end in ENDS if at + end not in source.tensors]
    alpha = hints.alpha if hints.alpha is not None else hyper.get("lora_alpha")
    heads = (model["n_head"], model.get("n_query_groups") or model["n_head"]) if "n_head" in model else heads_of(hints)
    fused = [at for at in paths if at.endswith(".attn.qkv")]
    if alpha is None:
        problems.append(f"it holds no alpha: give the directory with {HYPER}, or say it, as in Hints(alpha=16)")
    if fused and heads is None:
        problems.append(
            f"how the rows of qkv are shared out is not said: give the directory with {MODEL}, or Hints(heads=(32, 8))"
        )
    for at in paths:
        if at.endswith(".attn.attn"):
            problems.append(f"{at}: a file of an old litgpt, whose rows were in groups of heads: not supported")
        elif at not in fused and NAMES.ours(at) is None:
            problems.append(
                f"{at}: the names of {model.get('mlp_class_name', 'this model')} are not known here; only those of LLaMAMLP are"
            )
    if problems:
        return None
    sites = []
    for at in paths:
        A, B = (source.tensors[at + end] for end in ENDS)
        for path, a, b in _parts(at, A, B, hyper, heads, problems) if at in fused else [(NAMES.ours(at) or at, A, B)]:
            s = StoredSite(path=path, A=NONE, B=NONE, alpha=0)
            made = checked(s, a, b, problems, alpha=alpha, dropout=hyper.get("lora_dropout", 0.0))
            sites += [made] if made else []
    return AdapterFile(path=source.path, format="litgpt", sites=tuple(sites), config=hyper)


def _parts(at: str, A: Tensor, B: Tensor, hyper: dict[str, Any], heads: tuple[int, int] | None,
           problems: list[str]) -> Iterator[tuple[str, Tensor, Tensor]]:  # fmt: skip
    """A fused qkv's q, k and v, as far as they are enabled."""
    assert heads is not None
    r, n = B.shape[1], (heads[0], heads[1], heads[1])
    on = [bool(hyper.get(f"lora_{part}", True)) for part in QKV]
    units = sum(size for size, used in zip(n, on, strict=True) if used)
    if not any(on) or A.shape[0] != sum(on) * r or B.shape[0] % units:
        problems.append(f"{at}: A {tuple(A.shape)} and B {tuple(B.shape)} do not hold {', '.join(p for p, u in zip(QKV, on, strict=True) if u)}"
                        f" of {heads[0]} and {heads[1]} heads")  # fmt: skip
        return
    d, row = B.shape[0] // units, 0
    for j, (part, size) in enumerate((part, size) for part, size, used in zip(QKV, n, on, strict=True) if used):
        path = NAMES.ours(at.replace("attn.qkv", f"attn.{part}"))
        yield path or at, A[j * r : (j + 1) * r], B[row : row + size * d]
        row += size * d


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """The directory; model_config.yaml is the base's and not written. Raises FileError for names that litgpt has not."""
    if strange := [f"{s.name}: litgpt has no such weight" for s in file.sites if NAMES.theirs(s.path) is None]:
        raise FileError("this can't be written as litgpt's:", strange, "choose another format")
    at = {NAMES.theirs(s.path) or "": s for s in file.sites}
    on = [part for part in QKV if any(name.endswith(f".attn.{part}") for name in at)]
    tensors = {
        f"{name}{end}": t
        for name, s in at.items()
        if not name.endswith(QKV)
        for end, t in zip(ENDS, (s.A, s.B), strict=True)
    }
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in at if name.endswith(QKV)):
        parts = [at.get(f"{layer}.{part}") or _zero(f".attn.{part}", at, layer) for part in on]
        tensors |= {
            f"{layer}.qkv{end}": transforms.concat(f"{layer}.qkv", [getattr(s, end[-1]) for s in parts]) for end in ENDS
        }
    first, leaves = file.sites[0], {s.path.rpartition(".")[2] for s in file.sites}
    hyper: dict[str, Any] = {"lora_r": first.r, "lora_alpha": first.alpha, "lora_dropout": first.dropout}
    hyper |= {f"lora_{part}": part in on for part in QKV}
    hyper |= {
        f"lora_{switch}": any(leaf in ends or f".{leaf}" == ends for leaf in leaves)
        for switch, ends in SWITCHES.items()
    }
    text = "".join(f"{key}: {str(value).lower()}\n" for key, value in hyper.items())
    return {path / FILE: [pickled({"model": tensors})], path / HYPER: [text.encode()]}


def _zero(end: str, at: dict[str, StoredSite], layer: str) -> StoredSite:
    """What stands for a part that other layers have: as any of theirs, but zero. litgpt enables a part in all layers or none."""
    like = next(s for name, s in at.items() if name.endswith(end))
    A = next(s.A for name, s in at.items() if name.startswith(f"{layer}.") and name.endswith(QKV))
    return StoredSite(path=layer, A=torch.zeros_like(A), B=torch.zeros_like(like.B), alpha=like.alpha)


FORMAT = Format(
    name="litgpt",
    library="litgpt 0.5.13",
    claims=claims,
    read=read,
    write=write,
    scales="one",
    asks=("heads",),
    holds=frozenset(),
)
