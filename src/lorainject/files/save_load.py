"""Between a model and its adapter file: `save` and `load`. The native file is a PEFT file that says more.

    adapter/adapter_config.json            as PEFT writes it, so that PEFT, transformers and vLLM read it
    adapter/adapter_model.safetensors      A and B under PEFT's names; in the header, our record (native.py)
    x.safetensors                          the same tensor file alone

Only A and B are written, never a weight of the base. The same adapter gives the same bytes in any process.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import FileError, StateError
from ..lora.adapter import LoraAdapter
from ..lora.adapter_dict import AdapterDict
from ..lora.graft import base_class
from ..lora.model_index import AdaptedSite, ModelIndex
from ..lora.replacement import ReplacementTensor
from ..lora.weight_kinds import is_quantized, is_sharded, weight_shape
from ..merging.adapted_weight import merge_record
from ..numerics.delta import is_finite
from ..numerics.fingerprint import sample_values, samples_agree
from ..plan import Plan, Site, site_name
from ..surgery import attach
from ..targets.matcher import WeightMatch
from ..targets.model_weights import ModelWeight, model_weights
from ..targets.resolve import count_parameters, make_site, name_problems, why_unsuitable, wrapper_problems
from . import extras, transforms
from .convert import FORMATS, read_source
from .formats import peft_layout
from .io import atomic_write
from .io.open_adapter import Hints, open_source
from .record import AdapterFile, BasePrint, StoredSite, TokenRows


def save(model: nn.Module, path: str | Path, name: str = "default", *, format: str = "lorainject") -> Path:
    """Write A and B of one adapter, and nothing of the base; returns where.

    A path that ends in .safetensors is one file, any other a directory, which PEFT reads too unless there are sites that PEFT has
    not: slices of fused weights (written as such, A and B of the slice alone), transposed convolutions. `format="peft"` writes the
    directory for PEFT's sake: slices are padded with zeros to the whole weight, exactly; what it can't hold is a FileError.

    Works while merged, too. What was there before is replaced whole or, on any error (FileError), left as it was. Warns of
    parameters that train beside A and B (a head, say), since they are not saved.
    """
    path = Path(path)
    if format not in ("lorainject", "peft"):
        raise FileError(f"format must be 'lorainject' or 'peft', not {format!r}", way_out="nothing was written")
    index = ModelIndex(model)
    index.require_adapters("save", name, merged=True, nested=True, part=True)
    on = {at: host for at, host in index.sites.items() if name in host.adapters}
    if problems := [f"{at}: {reason}" for at, host in on.items() if (reason := _unwritable(host, host.adapters[name]))]:
        raise FileError(f"adapter {name!r} was not saved:", problems, "bring back, gather or mend these weights first")
    modules = index.walked
    training = [f"{at}.{n}" for at, m in modules for n, p in m._parameters.items() if p is not None and p.requires_grad]
    if training:
        warnings.warn(
            f"{', '.join(training[:5])}{', ...' * (len(training) > 5)} train too, but save writes A and B alone: save them yourself",
            stacklevel=2,
        )
    beside = dict(extras.beside(on, name))
    on = {at: host for at, host in on.items() if not isinstance(host.adapters[name], ReplacementTensor)}
    by_place: dict[tuple[int, str], list[AdaptedSite]] = {}
    for host in on.values():
        by_place.setdefault(host.key, []).append(host)
    # In the model's order, whatever the order of injection: PEFT's names for a module's parameters go by it.
    stored = [
        (w, _stored(w, host, name))
        for w in model_weights(index)
        for host in sorted(by_place.get(w.key, ()), key=_first_row)
    ]
    sites = tuple(s for _, s in stored)
    if format == "peft":
        odd = {w.names[0]: reason for w, _ in stored if (reason := _beyond_peft(w))}
        sites = transforms.slices_to_whole(sites)
        if beyond := [f"{s.name}: {odd.get(s.name, s.kind)}" for s in sites if not peft_layout.can_hold(s)]:
            raise FileError(
                f"adapter {name!r} was not saved; PEFT has no place for:", beyond, "save it without format='peft'"
            )
        if path.suffix == ".safetensors":
            raise FileError("PEFT's format is a directory", way_out="give a path that does not end in .safetensors")
    if path.is_file() and path.suffix != ".safetensors":
        raise FileError(f"{path} is a file", way_out="give a directory, or a name that ends in .safetensors")
    init = next(iter(on.values())).adapters[name].init
    about = {"task_type": _task(model), "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
             "target_modules": _target_modules([at for at, _ in modules], [s for s in sites if not peft_layout.is_bare(s)])}  # fmt: skip
    base = _base(on) if format == "lorainject" else None
    file = AdapterFile(path=path, format=format, sites=sites, name=name, init=init, base=base, config=about,
                       replaced={at: t for at, t in beside.items() if isinstance(t, Tensor)},
                       tokens={at: t for at, t in beside.items() if isinstance(t, TokenRows)})  # fmt: skip
    atomic_write.write(FORMATS[format].write(file, path, Hints()))
    return path


def load(model: nn.Module, path: str | Path, name: str | None = None, *, dtype: torch.dtype | None = None, check_base: bool = True,
         allow_pickle: bool = False, hints: Hints | None = None) -> nn.Module:  # fmt: skip
    """Put a saved adapter onto a base model, in place, and switch it on; returns the same model.

    `name` is what it shall be called (None: as in the file), `dtype` that of A and B (None: as in the file). Reads every format in
    `li.FORMATS`; `allow_pickle` and `hints` are read's. Strict: one FileError lists every tensor that is missing, unexpected, of the wrong
    shape or not finite, what a file holds beside A and B and load can't put on (whole tensors, rows of tokens), and every weight that differs from
    the base that the adapter was made for (`check_base=False` accepts another base). Warns of what was taken for granted (AdapterFile.notes).
    """
    index = ModelIndex(model)
    index.require_ready("load an adapter")
    source = open_source(path, allow_pickle)
    file = read_source(source, hints=replace(hints or Hints(), model=model), index=index)
    for note in file.notes:
        warnings.warn(f"{file.path}: {note}", stacklevel=2)
    name = file.name if name is None else name
    if clashes := name_problems(index, name) + wrapper_problems(index):
        raise StateError("nothing was loaded:", clashes, "load(model, path, name=...) gives another name")
    by_name = {n: w for w in model_weights(index) for n in w.names}
    wrong = [
        f"{s.name}: {reason}"
        for s in file.sites
        if (reason := extras.problem(s, by_name.get(site_name(s.path, s.parameter)), dtype))
    ]
    replaced = extras.replacements(index, file, by_name, wrong)
    sites = fitted(index, file, by_name, dtype, wrong)
    if check_base:
        require_base(file, by_name, sites)
    factors = {s.name: extras.given(s, dtype) for s in file.sites}
    return attach(index, Plan(sites=tuple(sites), total=count_parameters(index)), name, factors, replaced)


def require_base(file: AdapterFile, by_name: Mapping[str, ModelWeight], sites: Sequence[Site]) -> None:
    """Raises FileError with every weight that differs from the one that the adapter was made for, as far as the file tells."""
    others = [
        s.name
        for s in sites
        if file.base and not _same_base(by_name[site_name(s.path, s.parameter)], s.name, file.base)
    ]
    if others:
        raise FileError(f"{file.path} was made for another base model; nothing was loaded:",
                        [f"{at}: another base weight than the one this adapter was made for" for at in others],
                        "load it onto its own base, or pass check_base=False")  # fmt: skip


def _task(model: nn.Module) -> str | None:
    """PEFT's word for what the model does, by which AutoPeftModel finds the class; None where it is not sure."""
    if type(model).__name__.endswith("ForCausalLM"):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else None


def _target_modules(paths: Sequence[str], sites: Sequence[StoredSite]) -> list[str]:
    """Leaf names if they mean exactly these sites among the model's paths, as people write them; else full paths; none, if there are no sites."""
    chosen = {s.path for s in sites}
    leaves = {path.rsplit(".", 1)[-1] for path in chosen}
    meant = {path for path in paths if path.rsplit(".", 1)[-1] in leaves}
    return sorted(leaves if meant == chosen else chosen)


def _stored(w: ModelWeight, host: AdaptedSite, name: str) -> StoredSite:
    a, own = host.adapters[name], host.adapters
    (m, b), A, B = extras.m_and_b(a), a._parameters["A"], a._parameters["B"]
    assert A is not None
    assert B is not None
    return StoredSite(path=w.paths[0], parameter=own.parameter, label=own.label, rows=a.slices, kind=own.kind.name, shape=host.shape,
                      named=own.named, peft=_beyond_peft(w) is None, aliases=w.paths[1:], A=A.detach(), B=B.detach(), alpha=a.alpha,
                      scaling=a.scaling, dropout=a.dropout, magnitude=m, bias=b)  # fmt: skip


def _first_row(host: AdaptedSite) -> int:
    if not host.adapters.label:  # the whole weight
        return 0
    return min((part.start for a in host.adapters for part in host.adapters[a].slices or ()), default=0)


def _beyond_peft(w: ModelWeight) -> str | None:
    """Why PEFT would apply an adapter on this layer wrongly, or not at all; None if it would not."""
    m = w.module
    if w.bypassed and w.kind.form is not None:
        return f"{base_class(type(w.readers[0])).__name__} reads its weight, where PEFT's layer does nothing"
    if isinstance(m, _ConvNd) and (m.groups > 1 or m.padding_mode != "zeros" or any(d != 1 for d in m.dilation)):
        return "PEFT passes over groups, dilation and padding_mode"
    return None


def _base(on: Mapping[str, AdaptedSite]) -> BasePrint | None:
    """The fingerprint of the base; None if a part of it is not there to be read."""
    samples = {
        at: p.cpu() for at, host in on.items() if (p := _print(host.module, host.adapters.parameter)) is not None
    }
    return (
        BasePrint(dtype={at: host.weight.dtype for at, host in on.items()}, sample=samples)
        if len(samples) == len(on)
        else None
    )


def _print(module: nn.Module, parameter: str) -> Tensor | None:
    for own in module._modules.values():
        if isinstance(own, AdapterDict) and own.parameter == parameter and (record := merge_record(own)):
            return record.sample
    weight = module._parameters[parameter]
    return None if weight is None or is_quantized(module) else sample_values(weight)


def _unwritable(host: AdaptedSite, a: LoraAdapter) -> str | None:
    if not host.fits(a):
        return f"its weight is {host.shape} now, for which A and B were not made (resized since inject?)"
    for p in a._parameters.values():
        if p is None:
            continue
        if p.is_meta:
            return "A and B lie on the meta device (offloaded, or never loaded)"
        if is_sharded(p) or p.numel() == 0:
            return "A and B are sharded over several processes"
        if not is_finite(p):
            return "A or B (or what comes with them) holds NaN or infinity"
    return None


def fitted(
    index: ModelIndex,
    file: AdapterFile,
    by_name: Mapping[str, ModelWeight],
    dtype: torch.dtype | None,
    problems: list[str],
) -> list[Site]:
    """The sites that the file's adapters take in this model, in the file's order. Raises FileError with all that does not fit, and `problems`."""
    wrong: list[str] = []
    sites = _fit(index, file, by_name, dtype, wrong)
    if file.format == "peft":
        expected, layers = (
            {stored.path for stored in file.sites},
            [n for n, w in by_name.items() if w.parameter == "weight"],
        )
        wrong += [
            f"{p}: missing in the file, though its config targets it"
            for p in peft_layout.target_paths(file.config, layers)
            if p not in expected
        ]
    if wrong or problems:
        raise FileError(
            f"{file.path} does not fit this model:", wrong + problems, "use it with the model it was made for"
        )
    return sites


def _fit(
    index: ModelIndex,
    file: AdapterFile,
    by_name: Mapping[str, ModelWeight],
    dtype: torch.dtype | None,
    problems: list[str],
) -> list[Site]:
    """The sites that the file's adapters take in this model; what does not fit goes into `problems`."""
    sites: list[Site] = []
    there = index.modules
    paths = index.first_paths
    taken: dict[tuple[int, str, str], str] = {}
    for stored in file.sites:
        w = by_name.get(site_name(stored.path, stored.parameter))
        if w is None:
            at = there.get(stored.path)
            what = (
                "not in this model"
                if at is None
                else f"a {type(at).__name__} in this model, which can't carry an adapter"
            )
            problems.append(f"{stored.name}: is {what}")
            continue
        problem = _misfit(stored, w, by_name, dtype)
        if (other := taken.setdefault((*w.key, stored.label), stored.name)) != stored.name:
            problem = f"is the same module as {other} in this model, which the file has another adapter for"
        if problem:
            problems.append(f"{stored.name}: {problem}")
        else:
            if stored.path != w.paths[0] or stored.named:
                first = (stored.path, *(p for p in w.paths if p != stored.path))
                w = replace(w, paths=first, readers=w.owners if stored.named else w.readers, named=stored.named)
            pick = WeightMatch(w, stored.label, stored.rows)
            sites.append(make_site(pick, paths, r=stored.r, alpha=stored.alpha, scaling=stored.scaling, dropout=stored.dropout, init=file.init,
                              dtype=dtype or stored.dtype))  # fmt: skip
    return sites


def _misfit(
    stored: StoredSite, w: ModelWeight, by_name: Mapping[str, ModelWeight], dtype: torch.dtype | None
) -> str | None:
    if (reason := why_unsuitable(w, stored.label)) is not None:
        return reason
    if apart := [p for p in stored.aliases if by_name.get(site_name(p, stored.parameter)) is not w]:
        return f"was one module with {', '.join(apart)} when the adapter was saved, and is not in this model"
    if stored.shape and stored.kind != w.kind.name:
        return f"the file has it on a weight of the kind {stored.kind}, this model has a {w.kind.name} there"
    if stored.embedding != (w.kind.name == "embedding"):
        return f"the file has it on {'an embedding' if stored.embedding else 'a linear layer'}, this model has a {w.kind.name} there"
    shape = weight_shape(w.module, w.parameter)
    stack, out, in_ = w.kind.sizes(shape)
    if stored.shape and stored.shape != shape:
        return f"the file has it on a weight {stored.shape}, this model's is {shape}"
    if stored.rows is not None and (wrong := _wrong_rows(stored, w, out)):
        return wrong
    r, out = stored.r, out if stored.rows is None else sum(map(len, stored.rows))
    needed = (*stack, r, in_), (*stack, out, r)
    if (tuple(stored.A.shape), tuple(stored.B.shape)) != needed:
        have = f"A {tuple(stored.A.shape)} and B {tuple(stored.B.shape)}"
        return f"the file has {have}, this model's weight needs A {needed[0]} and B {needed[1]}"
    if dtype is not None and not all(bool(t.to(dtype).isfinite().all()) for t in (stored.A, stored.B)):
        return f"its A or B does not fit into {dtype}"
    return None


def _wrong_rows(stored: StoredSite, w: ModelWeight, out: int) -> str | None:
    """What is wrong with a slice's rows in this model."""
    rows = stored.rows or ()
    if any(part.start < 0 or part.stop > out or part.step < 1 for part in rows):  # before anything counts them
        return f"the file has it on rows that are not all within 0:{out}"
    if len({i for part in rows for i in part}) < sum(map(len, rows)):
        return "the file names a row twice"
    known = w.parts
    if stored.label in known and known[stored.label] != rows:
        return f"its part {stored.label!r} has other rows in this model: the layouts differ (heads?)"
    return None


def _same_base(w: ModelWeight, name: str, base: BasePrint) -> bool:
    mine, weight = _print(w.module, w.parameter), w.module._parameters[w.parameter]
    return (
        mine is None or weight is None or samples_agree(mine.cpu(), base.sample[name], weight.dtype, base.dtype[name])
    )
