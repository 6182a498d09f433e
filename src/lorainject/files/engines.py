"""Serving engines, one row per engine: what an adapter may hold, so that the engine serves it as it was trained.

An engine reads one of the file formats, but applies less of it than the format can hold. Its row is that format with
fewer features. Converting to the row (format.py) rewrites exactly what the engine would ignore: different ranks and
scales become one rank and one scale, rank-stabilized alpha becomes plain alpha, a stack becomes one linear per expert,
a slice becomes an adapter on the whole weight. What has no exact form is refused with the reason.

Paths stay the checkpoint's own: a qkv_proj that is one weight in the checkpoint (Phi-3) is one weight for the engine
too.

Sources: the code of vLLM 0.33, SGLang 0.5.23 and llama.cpp's converter, read and not run; transformers 5.23, run in a
test.
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
"""Returns the record as the engine needs it, and appends to the list what the engine cannot serve."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank accepts
MERGED = (
    "serve a merged model: load(model, adapter), merge(model, reversible=False), eject(model),"
    " model.save_pretrained(...); merge_checkpoint does this on disk, for adapters of A and B alone"
)
SERVED_EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One serving engine."""

    name: str
    reads: str
    """The format that it reads, a name in `li.FORMATS`."""
    form: Format
    """That format, with only the features that the engine applies."""
    checks: tuple[Check, ...] = ()
    """Rules that no field of a Format expresses."""
    asks: Callable[[AdapterFile], str | None] = lambda file: None
    """Returns the options that the engine must be started with to serve the adapter; None if it needs none."""


def engine(name: str) -> Engine:
    """Return the row of an engine. Raises SpecError if there is no engine of this name."""
    if name not in ENGINES:
        raise SpecError(f"there is no engine {name!r}", way_out=f"choose one of {', '.join(ENGINES)}")
    return ENGINES[name]


def _restricted(form: Format, name: str, library: str, **fields: object) -> Format:
    """Return the format under the engine's name, with these fields changed."""
    instead = f"{MERGED}, or pass lossy=True to leave these out"
    return replace(form, name=name, library=library, instead=instead, **fields)  # type: ignore[arg-type]


def _check_embeddings(file: AdapterFile, hints: Hints, problems: list[str]) -> AdapterFile:
    """Refuse embeddings that are not called as in Llama: vLLM and SGLang find embeddings by these names."""
    problems += [f"{s.name}: only embeddings called {' or '.join(SERVED_EMBEDDINGS)} are served"
                 for s in file.sites if s.embedding and s.path.rpartition(".")[2] not in SERVED_EMBEDDINGS]  # fmt: skip
    return file


def _check_vllm_rank(file: AdapterFile, hints: Hints, problems: list[str]) -> AdapterFile:
    highest = VLLM_RANKS[-1]
    too_high = [s for s in file.sites if s.r > highest]
    problems += [f"{s.name}: rank {s.r} is above {highest}, the highest that vLLM serves" for s in too_high]
    return file


def _add_values(file: AdapterFile, hints: Hints, problems: list[str]) -> AdapterFile:
    """Add an adapter of zeros on v_proj wherever only q_proj has one: SGLang refuses an adapter on q without v."""
    paths, added = {s.path for s in file.sites}, []
    modules = {} if hints.model is None else dict(hints.model.named_modules())
    for s in file.sites:
        block, _, leaf = s.path.rpartition(".")
        value = f"{block}.v_proj".removeprefix(".")
        if leaf != "q_proj" or value in paths:
            continue
        if value in modules:
            B = s.B.new_zeros(weight_shape(modules[value], "weight")[0], s.r)
            added.append(StoredSite(path=value, A=torch.zeros_like(s.A), B=B, alpha=s.alpha, scaling=s.scaling))
        else:
            problems.append(
                f"{s.name}: SGLang needs an adapter on v_proj too; give the model, which says how large v_proj is"
            )
    return replace(file, sites=(*file.sites, *added))


def _vllm_options(file: AdapterFile) -> str | None:
    r = max(s.r for s in file.sites)
    return f"start vLLM with --enable-lora --max-lora-rank {next(n for n in VLLM_RANKS if n >= r)}"


def _sglang_options(file: AdapterFile) -> str | None:
    return f"start SGLang with --enable-lora --max-lora-rank {max(s.r for s in file.sites)}, or more"


PEFT = peft_reader.FORMAT
ENGINES: dict[str, Engine] = {e.name: e for e in (
    Engine(name="vllm", reads="peft", checks=(_check_embeddings, _check_vllm_rank), asks=_vllm_options,
           form=_restricted(PEFT, "vLLM", "vllm 0.33", holds=frozenset({"embeddings"}), scales="one",
                            heads=("classifier", "score"))),
    Engine(name="sglang", reads="peft", checks=(_check_embeddings, _add_values), asks=_sglang_options,
           form=_restricted(PEFT, "SGLang", "sglang 0.5.23", holds=frozenset({"embeddings"}), scales="one")),
    Engine(name="llama.cpp", reads="gguf", form=_restricted(gguf.FORMAT, "llama.cpp", "gguf 0.19.0")),
    # Its load_adapter looks for magnitudes under a name that PEFT does not write, and continues without them.
    Engine(name="transformers", reads="peft",
           form=_restricted(PEFT, "transformers", "transformers 5.23", holds=PEFT.holds - {"magnitudes"})),
)}  # fmt: skip
