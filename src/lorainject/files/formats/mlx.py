"""mlx-lm's adapters (0.32.2): https://github.com/ml-explore/mlx-lm. adapters.safetensors (once .npz) and adapter_config.json.

<path>.lora_a (in, r)       <path>.lora_b (r, out)       linear; of embeddings (V, r) and (r, d)
<path>.lora_a (E, r, in)    <path>.lora_b (E, out, r)    experts: <layer>.mlp.switch_mlp.{gate,up,down}_proj
<path>.m (out,)                                          DoRA
config: lora_parameters.scale, which is s itself; in old files with an alpha beside it, and then s = scale * alpha / rank
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import transforms
from ..format import Files, Format
from ..io import safetensors_file
from ..io.open_adapter import CONFIG, Hints, Source
from ..record import NONE, AdapterFile, StoredSite, checked
from .names import stacks

ENDS = (".lora_a", ".lora_b")
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings")


def claims(source: Source) -> bool:
    """Whether its config is mlx-lm's, or any tensor is called <path>.lora_a."""
    ends = source.container != "gguf" and any(key.endswith(ENDS) for key in source.tensors)
    return ends or bool({"lora_parameters", "fine_tune_type"} & source.config.keys())


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """The record; what is wrong goes into `problems`."""
    given = source.config.get("lora_parameters", {})
    if (kind := source.config.get("fine_tune_type", "lora")) not in ("lora", "dora"):
        problems.append(f"fine_tune_type is {kind!r}: whole weights, no pair of low-rank factors")
        return None
    paths = dict.fromkeys(key[: -len(ENDS[0])] for key in source.tensors if key.endswith(ENDS))
    known = {at + end for at in paths for end in (*ENDS, ".m")}
    problems += [f"{at}{end}: missing" for at in paths for end in ENDS if at + end not in source.tensors]
    problems += [f"{key}: unexpected, neither lora_a nor lora_b" for key in source.tensors if key not in known]
    if "scale" not in given and hints.alpha is None:
        problems.append(
            "it holds no scale: give the directory with adapter_config.json, or say alpha, as in Hints(alpha=16)"
        )
    if problems:
        return None
    notes = [
        "alpha stands beside scale, so the scale is scale * alpha / rank, as mlx-lm of that time (before April 2025) trained"
    ] * ("alpha" in given)
    sites: list[StoredSite] = []
    for at in paths:
        a, b = (source.tensors[at + end] for end in ENDS)
        if not 2 <= min(a.ndim, b.ndim) <= max(a.ndim, b.ndim) <= 3:
            problems.append(
                f"{at}: lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)} are no pair (in, r) and (r, out)"
            )
            continue
        if b.ndim == 3 and a.ndim == 2:  # before October 2025
            a = a.reshape(b.shape[0], -1, a.shape[1])
        A, B = (a, b) if b.ndim == 3 else (a.mT.contiguous(), b.mT.contiguous())
        r = A.shape[-2]
        scale = given.get("scale", (hints.alpha or 0) / r)
        alpha = scale * r * (given["alpha"] / given.get("rank", r) if "alpha" in given else 1)
        embedding = at.rpartition(".")[2] in EMBEDDINGS
        s = StoredSite(path=at, kind="experts" if b.ndim == 3 else "embedding" if embedding else "linear", A=NONE, B=NONE, alpha=0,
                       magnitude=source.tensors.get(f"{at}.m"))  # fmt: skip
        if made := checked(s, A, B, problems, alpha=alpha, dropout=given.get("dropout", 0.0)):
            sites += _experts(made) if b.ndim == 3 else [made]
    return AdapterFile(path=source.path, format="mlx", sites=tuple(sites), config=source.config, notes=tuple(notes))


def _experts(s: StoredSite) -> list[StoredSite]:
    """switch_mlp's stack as the experts that checkpoints have."""
    block, _, leaf = s.path.rpartition(".")
    return transforms.split_experts(
        s, [f"{block.removesuffix('.switch_mlp')}.experts.{e}.{leaf}" for e in range(len(s.A))]
    )


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """The directory that mlx-lm reads. Raises FileError for experts of which some have no adapter."""
    tensors: dict[str, Tensor] = {}
    for s in stacks(file.sites, ".switch_mlp"):
        a, b = (s.A, s.B) if s.A.ndim == 3 else (s.A.mT, s.B.mT)
        tensors |= {f"{s.path}.lora_a": a.contiguous(), f"{s.path}.lora_b": b.contiguous()}
        tensors |= {f"{s.path}.m": s.magnitude} if s.magnitude is not None else {}
    first = file.sites[0]
    own = file.config if file.format == "mlx" else {}
    keys = sorted({re.sub(r"^.*?\.?layers\.\d+\.", "", key.rpartition(".")[0]) for key in tensors})
    config: dict[str, Any] = {
        "fine_tune_type": "dora" if any(s.magnitude is not None for s in file.sites) else "lora",
        "num_layers": -1,
    } | own
    config["lora_parameters"] = {"rank": first.r, "scale": first.scale, "dropout": first.dropout, "keys": keys}
    text = json.dumps(config, indent=4) + "\n"
    return {path / "adapters.safetensors": safetensors_file.dump(tensors, {}), path / CONFIG: [text.encode()]}


FORMAT = Format(
    name="mlx",
    library="mlx-lm 0.32.2",
    claims=claims,
    read=read,
    write=write,
    scales="one",
    holds=frozenset({"embeddings", "magnitudes"}),
)
