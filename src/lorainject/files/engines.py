"""Serving engines, by one table: what each takes of an adapter, so that it is served as it was trained, or refused with the reason.

An engine is a format with less room than the one it reads. What it has no room for is rewritten where that is exact (format.py): ranks and
scales that it would pass over become one rank and one scale, rank-stabilised alpha becomes plain alpha, stacks become their experts' linears,
slices the whole weight. Paths stay the checkpoint's own: a qkv_proj that is one weight there (Phi-3) is one weight for the engine, too.

The facts were read in the sources of vLLM 0.33, SGLang 0.5.23 and llama.cpp's converter, which don't run here; transformers' were tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..errors import SpecError
from ..lora.weight_kinds import weight_shape
from .format import Format
from .formats import gguf, peft_reader
from .io.open_adapter import Hints
from .record import AdapterFile, StoredSite

Check = Callable[[AdapterFile, Hints, list[str]], AdapterFile]
"""The file as the engine wants it; what is wrong with it goes into the list."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
SERVED_EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine."""

    name: str
    reads: str
    """A name in `li.FORMATS`."""
    form: Format
    """That format, with what of it the engine has room for."""
    checks: tuple[Check, ...] = ()
    """What no format's row says."""
    asks: Callable[[AdapterFile], str | None] = lambda file: None
    """What the engine must be told when it is started."""


def _narrowed(form: Format, name: str, library: str, **room: object) -> Format:
    way_out = "have it merged into the base instead (PEFT's merge_and_unload), or lossy=True to leave these out"
    return replace(form, name=name, library=library, instead=way_out, **room)  # type: ignore[arg-type]


def _embeddings(file: AdapterFile, hints: Hints, problems: list[str]) -> AdapterFile:
    """The engine knows embeddings by their names in Llama-like models."""
    problems += [f"{s.name}: an embedding that is not called {' or '.join(SERVED_EMBEDDINGS)} is not served"
                 for s in file.sites if s.embedding and s.path.rpartition(".")[2] not in SERVED_EMBEDDINGS]  # fmt: skip
    return file


def _vllm_rank(file: AdapterFile, hints: Hints, problems: list[str]) -> AdapterFile:
    problems += [
        f"{s.name}: rank {s.r}, above {VLLM_RANKS[-1]}, the highest that vLLM serves"
        for s in file.sites
        if s.r > VLLM_RANKS[-1]
    ]
    return file


def _value_beside_query(file: AdapterFile, hints: Hints, problems: list[str]) -> AdapterFile:
    """SGLang stacks q, k and v, and refuses a q_proj without its v_proj: one of zeros changes nothing."""
    by_path, sites = {s.path: s for s in file.sites}, list(file.sites)
    for s in file.sites:
        block, _, leaf = s.path.rpartition(".")
        value = f"{block}.v_proj".removeprefix(".")
        if leaf != "q_proj" or value in by_path:
            continue
        if (out := _rows(value, hints)) is None:
            problems.append(
                f"{s.name}: SGLang takes no q_proj without v_proj, and how large that is the file does not tell: give the model"
            )
        else:
            sites.append(
                StoredSite(
                    path=value, A=torch.zeros_like(s.A), B=s.B.new_zeros(out, s.r), alpha=s.alpha, scaling=s.scaling
                )
            )
    return replace(file, sites=tuple(sites))


def _rows(path: str, hints: Hints) -> int | None:
    """The outputs of a layer of the model."""
    module = dict(hints.model.named_modules()).get(path) if hints.model is not None else None
    return None if module is None else weight_shape(module, "weight")[0]


def _vllm_start(file: AdapterFile) -> str | None:
    r = max(s.r for s in file.sites)
    return f"start vLLM with --enable-lora --max-lora-rank {next(n for n in VLLM_RANKS if n >= r)}"


def _sglang_start(file: AdapterFile) -> str | None:
    return f"start SGLang with --enable-lora --max-lora-rank {max(s.r for s in file.sites)}, or more"


PEFT = peft_reader.FORMAT
ENGINES: dict[str, Engine] = {e.name: e for e in (
    Engine(name="vllm", reads="peft", checks=(_embeddings, _vllm_rank), asks=_vllm_start,
           form=_narrowed(PEFT, "vLLM", "vllm 0.33", holds=frozenset({"embeddings"}), scales="one", heads=("classifier", "score"))),
    Engine(name="sglang", reads="peft", checks=(_embeddings, _value_beside_query), asks=_sglang_start,
           form=_narrowed(PEFT, "SGLang", "sglang 0.5.23", holds=frozenset({"embeddings"}), scales="one")),
    Engine(name="llama.cpp", reads="gguf", form=_narrowed(gguf.FORMAT, "llama.cpp", "gguf 0.19.0")),
    # Its load_adapter looks for magnitudes by a name that PEFT does not write, and goes on without them.
    Engine(name="transformers", reads="peft", form=_narrowed(PEFT, "transformers", "transformers 5.23", holds=PEFT.holds - {"magnitudes"})),
)}  # fmt: skip


def engine(name: str) -> Engine:
    """The row. Raises SpecError for a name that is none."""
    if name not in ENGINES:
        raise SpecError(f"there is no engine {name!r}", way_out=f"choose one of {', '.join(ENGINES)}")
    return ENGINES[name]
