"""The native adapter file, which is a PEFT file that says more: `save`, `load` and `read`.

    adapter/adapter_config.json            as PEFT writes it, so that PEFT, transformers and vLLM read it
    adapter/adapter_model.safetensors      A and B under PEFT's names; in the header, our record (native.py)
    x.safetensors                          the same tensor file alone

Only A and B are written, never a weight of the base. The same adapter gives the same bytes in any process.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Host, adapters_of, mounted, ready, walk, weight_of
from ..anatomy import read_around
from ..errors import FileError, StateError
from ..find import Candidate, candidates, name_problems, site, total, unfit, wrapped
from ..fingerprint import agree, sample
from ..kinds import is_sharded, kind_of
from ..lowrank import LowRank
from ..spec import Plan, Site
from ..surgery import attach
from . import container, native, peft
from .record import AdapterFile, BasePrint, StoredSite

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def save(model: nn.Module, path: str | Path, name: str = "default") -> Path:
    """Write A and B of one adapter, and nothing of the base; returns where.

    A path that ends in .safetensors is one file, any other a PEFT-compatible directory. Works while merged, too. What was
    there before is replaced whole or, on any error (FileError), left as it was. Warns of parameters that train beside A and B
    (a head, say), since they are not saved.
    """
    path = Path(path)
    on = {at: host for at, host in mounted(model, "save", name, merged=True, nested=True, part=True).items() if name in host.adapters}
    if problems := [f"{at}: {reason}" for at, host in on.items() if (reason := _unwritable(host, host.adapters[name]))]:
        raise FileError(f"adapter {name!r} was not saved:", problems, "bring back, gather or mend these weights first")
    beside = [f"{at}.{n}" for at, m in walk(model) for n, p in m.named_parameters(recurse=False) if p.requires_grad]
    if beside:
        warnings.warn(
            f"{', '.join(beside[:5])}{', ...' * (len(beside) > 5)} train too, but save writes A and B alone: save them yourself", stacklevel=2
        )
    aliases = {c.paths[0]: c.paths[1:] for c in candidates(model) if len(c.paths) > 1}
    sites = tuple(_stored(at, host, name, aliases.get(at, ())) for at, host in on.items())
    tensors = peft.tensors(sites)
    init = next(iter(on.values())).adapters[name].init
    header = {"format": "pt", native.KEY: native.encode(name, init, sites, _base(on), tensors)}
    if path.suffix == ".safetensors":
        container.write({path: container.dump(tensors, header)})
        return path
    if path.is_file():
        raise FileError(f"{path} is a file", way_out="give a directory, or a name that ends in .safetensors")
    config = json.dumps(peft.config(model, sites), indent=2, sort_keys=True) + "\n"
    container.write({path / TENSORS: container.dump(tensors, header), path / CONFIG: [config.encode()]})
    return path


def load(model: nn.Module, path: str | Path, name: str | None = None, *, dtype: torch.dtype | None = None, check_base: bool = True) -> nn.Module:
    """Put a saved adapter onto a base model, in place, and switch it on; returns the same model.

    `name` is what it shall be called (None: as in the file), `dtype` that of A and B (None: as in the file). Reads our own
    files and PEFT's. Strict: one FileError lists every tensor that is missing, unexpected, of the wrong shape or not finite,
    and every weight that differs from the base that the adapter was made for (`check_base=False` accepts another base).
    """
    ready(model, "load an adapter")
    file = read(path)
    name = file.name if name is None else name
    if clashes := name_problems(model, name) + wrapped(model):
        raise StateError("nothing was loaded:", clashes, "load(model, path, name=...) gives another name")
    by_path = {p: c for c in candidates(model) for p in c.paths}
    problems: list[str] = []
    sites = _fit(file, by_path, read_around(model, {id(by_path[s.path].module) for s in file.sites if s.path in by_path}), dtype, problems)
    if file.format == "peft":
        expected = {stored.path for stored in file.sites}
        problems += [f"{p}: missing in the file, though its config targets it" for p in peft.targeted(file.config, by_path) if p not in expected]
    problems += [f"{p}: {reason}" for p, tensor in file.replaced.items() if (reason := _replaces(by_path.get(p), tensor))]
    if problems:
        raise FileError(f"{file.path} does not fit this model; nothing was loaded:", problems, "load it onto the model it was made for")
    others = [s.path for s in sites if check_base and file.base and not _same_base(by_path[s.path].module, s.path, file.base)]
    if others:
        raise FileError(f"{file.path} was made for another base model; nothing was loaded:",
                        [f"{at}: another base weight than the one this adapter was made for" for at in others],
                        "load it onto its own base, or pass check_base=False")  # fmt: skip
    factors = {s.path: (s.A, s.B) for s in file.sites}
    return attach(model, Plan(sites=tuple(sites), total=total(model)), name, factors)


def read(path: str | Path) -> AdapterFile:
    """Read an adapter file or directory without a model. Raises FileError with all that is wrong with it."""
    path = Path(path)
    tensor_file = path / TENSORS if path.is_dir() else path
    if path.is_dir() and not tensor_file.exists():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        below = [p.parent for p in path.glob(f"*/{TENSORS}")]  # PEFT puts an adapter that is not called "default" there
        raise FileError(
            f"{path} holds no {TENSORS}", [f"it holds {found}"], f"give {below[0] if below else 'the directory that save (or PEFT) wrote'}"
        )
    config = _config(path / CONFIG) if path.is_dir() and (path / CONFIG).exists() else {}
    tensors, metadata = container.read(tensor_file)
    problems = peft.payload_problems(tensors)
    if native.KEY not in metadata and not config:
        raise FileError(f"{path} holds no record of alpha, without which its scale is unknown",
                        way_out=f"give the directory with its {CONFIG}")  # fmt: skip
    try:
        if native.KEY in metadata:
            file = native.decode(path, tensors, metadata[native.KEY], config, problems)
        else:
            file = peft.record(path, tensors, config, problems)
    except (TypeError, ValueError, AttributeError) as e:
        raise FileError(f"{path / CONFIG} is not a config as PEFT writes it: {e}", way_out="get the file again, or save the adapter anew") from e
    if problems or file is None:
        raise FileError(f"{path} can't be used:", problems, "get a damaged file again; what is not plain LoRA, merge or convert with PEFT first")
    return file


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as e:
        raise FileError(f"{path} can't be read as JSON: {e}", way_out="get the file again, or save the adapter anew") from e
    if not isinstance(config, dict):
        raise FileError(f"{path} is not a JSON object", way_out="get the file again, or save the adapter anew")
    return config


def _stored(path: str, host: Host, name: str, aliases: tuple[str, ...]) -> StoredSite:
    kind, a = kind_of(host.module), host.adapters[name]
    return StoredSite(path=path, aliases=aliases, A=a.A.detach(), B=a.B.detach(), alpha=a.alpha, scaling=a.scaling, dropout=a.dropout,
                      embedding=kind is not None and kind.name == "embedding")  # fmt: skip


def _base(on: Mapping[str, Host]) -> BasePrint | None:
    """The fingerprint of the base; None if a part of it is not there to be read."""
    samples = {at: p.cpu() for at, host in on.items() if (p := _print(host.module)) is not None}
    return BasePrint(dtype={at: host.weight.dtype for at, host in on.items()}, sample=samples) if len(samples) == len(on) else None


def _print(module: nn.Module) -> Tensor | None:
    own = adapters_of(module)
    return own.folded.sample if own and own.folded else sample(weight_of(module))


def _unwritable(host: Host, a: LowRank) -> str | None:
    kind = kind_of(host.module)
    if kind is None or kind.matrix(host.weight).shape != (a.B.shape[0], a.A.shape[1]):
        return f"its weight is {tuple(host.weight.shape)} now, for which A and B were not made (resized since inject?)"
    if a.A.is_meta or a.B.is_meta:
        return "A and B lie on the meta device (offloaded, or never loaded)"
    if is_sharded(a.A) or 0 in (a.A.numel(), a.B.numel()):
        return "A and B are sharded over several processes"
    if not (a.A.isfinite().all() and a.B.isfinite().all()):
        return "A or B holds NaN or infinity"
    return None


def _fit(
    file: AdapterFile, by_path: Mapping[str, Candidate], around: Mapping[int, str], dtype: torch.dtype | None, problems: list[str]
) -> list[Site]:
    """The sites that the file's adapters take in this model; what does not fit goes into `problems`."""
    sites: list[Site] = []
    taken: dict[int, str] = {}
    for stored in file.sites:
        c = by_path.get(stored.path)
        if c is None:
            problems.append(f"{stored.path}: is not in this model")
            continue
        problem = _misfit(stored, c, by_path, dtype) or around.get(id(c.module))
        if (other := taken.setdefault(id(c.module), stored.path)) != stored.path:
            problem = f"is the same module as {other} in this model, which the file has another adapter for"
        if problem:
            problems.append(f"{stored.path}: {problem}")
        else:
            paths = (stored.path, *(p for p in c.paths if p != stored.path))
            sites.append(site(Candidate(paths, c.module), r=stored.r, alpha=stored.alpha, scaling=stored.scaling, dropout=stored.dropout,
                              init=file.init, dtype=dtype or stored.dtype))  # fmt: skip
    return sites


def _misfit(stored: StoredSite, c: Candidate, by_path: Mapping[str, Candidate], dtype: torch.dtype | None) -> str | None:
    if (kind := kind_of(c.module)) is None:
        return f"is a {type(c.module).__name__} in this model, which can't carry an adapter"
    if (reason := unfit(c.module)) is not None:
        return reason
    if apart := [p for p in stored.aliases if by_path.get(p) is not c]:
        return f"was one module with {', '.join(apart)} when the adapter was saved, and is not in this model"
    if stored.embedding != (kind.name == "embedding"):
        return f"the file has it on {'an embedding' if stored.embedding else 'a linear layer'}, this model has a {kind.name} there"
    out, in_ = kind.matrix(weight_of(c.module)).shape
    r = stored.r
    if (tuple(stored.A.shape), tuple(stored.B.shape)) != ((r, in_), (out, r)):
        return f"the file has A {tuple(stored.A.shape)} and B {tuple(stored.B.shape)}, this model's weight needs A {(r, in_)} and B {(out, r)}"
    if dtype is not None and not all(bool(t.to(dtype).isfinite().all()) for t in (stored.A, stored.B)):
        return f"its A or B does not fit into {dtype}"
    return None


def _same_base(module: nn.Module, path: str, base: BasePrint) -> bool:
    mine = _print(module)
    return mine is None or agree(mine.cpu(), base.sample[path], weight_of(module).dtype, base.dtype[path])


def _replaces(c: Candidate | None, tensor: Tensor) -> str | None:
    weight = None if c is None else c.module._parameters.get("weight")
    if weight is not None and weight.shape == tensor.shape and torch.equal(weight.detach().cpu().to(tensor.dtype), tensor):
        return None
    return "the file brings a whole base weight that is not this model's; adapters that replace weights are not supported"
