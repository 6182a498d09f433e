"""torchtune's native adapter_model.pt (0.6.1): https://github.com/pytorch/torchtune. A pickle in Meta's names; alpha is in the config beside it.

    layers.N.attn.{q,k,v}_proj, .output_proj, layers.N.mlp.w1, .w2, .w3, output
    <name>.lora_a.weight (r, in)    <name>.lora_b.weight (out, r)    <name>.magnitude (out,)     DoRA

The rows of q and k are in rotary pairs, as Meta has them, for all models but those in UNSORTED; transformers has them in halves.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from ...errors import FileError
from ..format import Files, Format
from ..io.open_adapter import Hints, Source
from ..record import NONE, AdapterFile, StoredSite, checked
from .names import Names, heads_of, pickled, reordered

NAMES = Names({
    "layers.{}.attn.q_proj": "model.layers.{}.self_attn.q_proj", "layers.{}.attn.k_proj": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attn.v_proj": "model.layers.{}.self_attn.v_proj", "layers.{}.attn.output_proj": "model.layers.{}.self_attn.o_proj",
    "layers.{}.mlp.w1": "model.layers.{}.mlp.gate_proj", "layers.{}.mlp.w2": "model.layers.{}.mlp.down_proj",
    "layers.{}.mlp.w3": "model.layers.{}.mlp.up_proj", "output": "lm_head",
})  # fmt: skip
KEY = re.compile(r"(?P<path>.*)\.(?P<part>lora_a\.weight|lora_b\.weight|magnitude)")
UNSORTED = ("qwen2", "qwen3", "phi3", "phi")  # model types whose q and k torchtune leaves as they are


def claims(source: Source) -> bool:
    """Whether any tensor is called <name>.lora_a.weight."""
    return any(key.endswith(".lora_a.weight") for key in source.tensors)


def _heads(hints: Hints) -> tuple[int, int] | None:
    """(0, 0) where rows are not sorted; None where nobody says."""
    kind = hints.architecture or getattr(getattr(hints.model, "config", None), "model_type", "")
    return (0, 0) if kind in UNSORTED else heads_of(hints)


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """The record, in transformers' names and order; what is wrong, or not said, goes into `problems`."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, t in source.tensors.items():
        known = KEY.fullmatch(key)
        if known is None or NAMES.ours(known["path"]) is None:
            problems.append(f"{key}: unexpected, no weight of a text model of torchtune's")
        else:
            found.setdefault(known["path"], {})[known["part"]] = t
    problems += [
        f"{at}.{half}: missing"
        for at, parts in found.items()
        for half in ("lora_a.weight", "lora_b.weight")
        if half not in parts
    ]
    alpha, heads = hints.alpha if hints.alpha is not None else source.config.get("lora_alpha"), _heads(hints)
    if alpha is None:
        problems.append(
            "it holds no alpha: give the directory with adapter_config.json, or say it, as in Hints(alpha=16)"
        )
    if heads is None and any(at.endswith((".q_proj", ".k_proj")) for at in found):
        problems.append(
            "the rows of q and k are in another order than transformers': give the heads, as in Hints(heads=(32, 8)), or the model"
        )
    if problems:
        return None
    sites = []
    for at, parts in found.items():
        s = StoredSite(path=NAMES.ours(at) or at, A=NONE, B=NONE, alpha=0, magnitude=parts.get("magnitude"))
        if made := checked(
            s, parts["lora_a.weight"], parts["lora_b.weight"], problems, alpha=alpha, scaling=hints.scaling
        ):
            sites.append(reordered(made, heads, to_pairs=False) if heads and heads[0] else made)
    return AdapterFile(path=source.path, format="torchtune", sites=tuple(sites), config=source.config)


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """One pickle. Raises FileError for names that torchtune has not, and where the heads are not known."""
    heads = _heads(hints)
    problems = [f"{s.name}: torchtune has no such weight" for s in file.sites if NAMES.theirs(s.path) is None]
    if heads is None and any(s.path.endswith((".q_proj", ".k_proj")) for s in file.sites):
        problems.append(
            "the rows of q and k are in another order there: give the heads, as in Hints(heads=(32, 8)), or the model"
        )
    if problems or heads is None:
        raise FileError("this can't be written as torchtune's:", problems, "choose another format")
    tensors: dict[str, Tensor] = {}
    for s in file.sites:
        own, at = reordered(s, heads, to_pairs=True) if heads[0] else s, NAMES.theirs(s.path)
        tensors |= {f"{at}.lora_a.weight": own.A, f"{at}.lora_b.weight": own.B}
        tensors |= {f"{at}.magnitude": own.magnitude} if own.magnitude is not None else {}
    return {path: [pickled(tensors)]}


FORMAT = Format(name="torchtune", library="torchtune 0.6.1", claims=claims, read=read, write=write, scales="one", suffix=".pt",
                asks=("alpha", "heads"), holds=frozenset({"magnitudes"}))  # fmt: skip
