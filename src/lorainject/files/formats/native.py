"""Our own format: PEFT's tensors with a record in the file's header, which says what PEFT's names and shapes leave
open.

The record is JSON under the header's key "lorainject". It holds alpha, scaling, dropout and the other paths of a shared
module by site, what each further tensor is, the fingerprint of the base, and a digest of all that and of the tensors,
which reveals a changed bit anywhere. So the file needs neither a config nor a hint. PEFT's config is written next to it
unless PEFT would apply something wrongly; where there is one, it must not contradict the record.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import FileError
from ...lora.weight_kinds import DTYPES
from ...numerics.fingerprint import OLD_SAMPLES, SAMPLES
from ...spec import FUNCTION, INITS, SCALINGS
from ..format import FEATURES, Files, Format
from ..io import safetensors_file
from ..io.open_adapter import CONFIG, TENSORS, Hints, Source, parse_json
from ..record import AdapterFile, BasePrint, StoredSite, TokenRows, checked_sites
from . import peft_layout

KEY = "lorainject"
VERSIONS = (1, 2, 3, 4)
"""1: whole weights called `weight`, under PEFT's names. 2: parameters, stacks and slices too; written only where there
are such. 3: magnitudes, biases, whole tensors, token rows; names of another library. 4: any of these, and fingerprints
of SAMPLES elements."""
ROLES = ("magnitude", "bias", "replaced", "tokens")
UNREAD = torch.empty(0)  # in place of A and B until their keys are known, which depend on all sites together


def claims(source: Source) -> bool:
    """True if our record is in the header."""
    return KEY in source.metadata


def write(file: AdapterFile, path: Path, hints: Hints) -> Files:
    """Return one file if the path ends in .safetensors, else a directory, with PEFT's config if PEFT has all sites."""
    extras = peft_layout.extra_tensors(file)
    tensors = peft_layout.factor_tensors(file.sites) | {key: extra.tensor for key, extra in extras.items()}
    raws = {key: safetensors_file.raw(t) for key, t in tensors.items()}  # copied once, if the tensors are on a GPU
    body = _encode(file, extras)
    record = _json(body | {"digest": digest(body, tensors, raws)})
    content = safetensors_file.dump(tensors, {"format": "pt", KEY: record}, raws)
    if path.suffix == ".safetensors":
        return {path: content}
    if not file.sites or not all(
        peft_layout.can_hold(s) and not FEATURES["magnitudes by input"](s) for s in file.sites
    ):
        return {path / TENSORS: content, path / CONFIG: None}
    config = json.dumps(peft_layout.config(file), indent=2, sort_keys=True) + "\n"
    return {path / TENSORS: content, path / CONFIG: [config.encode()]}


def _encode(file: AdapterFile, extras: Mapping[str, peft_layout.Extra]) -> dict[str, Any]:
    """Return the record, without its digest."""
    sites, base = file.sites, file.base
    version = 3 if extras or file.namespace != "hf" else 1 if all(map(_is_plain, sites)) else 2
    body: dict[str, Any] = {
        "version": 4 if base and all(len(sample) == SAMPLES for sample in base.sample.values()) else version,
        "name": file.name,
        "init": file.init,
        "sites": {s.name: _encode_site(s) for s in sites},
        "base": "",
        "base_dtypes": [],
    }
    if base:
        samples = torch.cat([base.sample[s.name] for s in sites])
        body["base"] = base64.b64encode(safetensors_file.raw(samples)).decode()
        body["base_dtypes"] = [str(base.dtype[s.name]).removeprefix("torch.") for s in sites]
    if extras:
        body["extras"] = {key: [extra.role, extra.name, *extra.detail] for key, extra in extras.items()}
    if file.namespace != "hf":
        body["namespace"] = file.namespace
    if file.origin:
        body["origin"] = file.origin
    return body


def _is_plain(s: StoredSite) -> bool:
    """True if the site's name alone tells which weight it is on."""
    is_weight = (s.parameter, s.label, s.named, s.peft) == ("weight", "", False, True)
    return is_weight and s.kind in ("linear", "linear^T", "embedding")


def _encode_site(s: StoredSite) -> dict[str, Any]:
    settings = {"alpha": s.alpha, "scaling": s.scaling, "dropout": s.dropout, "aliases": s.aliases}
    settings |= {"constant_ranks": s.constant_ranks} if s.constant_ranks else {}
    if _is_plain(s):
        return settings
    rows = s.rows and _encode_rows(s.rows)
    parts = {name: _encode_rows(part) for name, part in s.parts.items()}
    place = {"parameter": s.parameter, "label": s.label, "rows": rows, "kind": s.kind, "shape": s.shape,
             "named": s.named, "apart": not s.peft, "parts": parts,
             "experts": len(s.A) if s.A.ndim == 3 else 0}  # fmt: skip
    return settings | {"path": s.path} | {key: value for key, value in place.items() if value}


def _encode_rows(rows: Sequence[range]) -> list[list[int]]:
    return [[part.start, part.stop, part.step] for part in rows]


def _decode_rows(rows: Any) -> tuple[range, ...]:
    return tuple(range(*part) for part in rows)


def _json(body: Mapping[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"))


def digest(body: Mapping[str, Any], tensors: Mapping[str, Tensor], raws: Mapping[str, memoryview] | None = None) -> str:
    """Return the SHA-256 of the record and of the tensors' names, dtypes, shapes and CRC-32s.

    A CRC-32 detects damage as well as a SHA-256 and takes a quarter of the time. The tensors are read one by one,
    because they may be mapped files.
    """
    lines = [_json(body)]
    for key in sorted(tensors):
        t = tensors[key]
        lines.append(f"{key} {t.dtype} {tuple(t.shape)} {zlib.crc32(raws[key] if raws else safetensors_file.raw(t))}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """Return the record; None, and lines in `problems`, if it is damaged. No hint is needed."""
    try:
        file = _decode(source, problems)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, FileError) as e:
        problems.append(f"its lorainject record is damaged: {type(e).__name__}: {e}")
        return None
    if file is not None and source.config:
        try:
            problems += _contradictions(file)
        except (TypeError, ValueError, AttributeError) as e:
            problems.append(f"adapter_config.json is not a config as PEFT writes it: {e}")
    return file


def _decode(source: Source, problems: list[str]) -> AdapterFile | None:
    tensors = source.tensors
    body = parse_json("the record", source.metadata[KEY])
    expected = body.pop("digest")
    if body["version"] not in VERSIONS:
        problems.append(f"its record has version {body['version']!r}; this library reads up to {VERSIONS[-1]}")
        return None
    if expected != digest(body, tensors):
        problems.append("its digest does not match: bits were changed since it was written")
        return None
    extras = {
        key: peft_layout.Extra(tensors[key], role, _text(key, name), tuple(detail))
        for key, (role, name, *detail) in body.get("extras", {}).items()
    }
    places = [_decode_site(name, settings, tensors) for name, settings in body["sites"].items()]
    counts = {s.name: settings.get("experts", (*s.shape, 0)[0])
              for s, settings in zip(places, body["sites"].values(), strict=True)}  # fmt: skip
    keys = peft_layout.factor_keys(places)
    factors = dict.fromkeys(key for pair in keys.values() for key in pair)
    problems += [f"{key}: missing" for key in factors if key not in tensors]
    problems += [f"{key}: its role {extra.role!r} is unknown: a newer version wrote it"
                 for key, extra in extras.items() if extra.role not in ROLES]  # fmt: skip
    known = factors.keys() | extras.keys()
    problems += [f"{key}: unexpected, neither A nor B of a site" for key in tensors if key not in known]
    fields: dict[str, dict[str, Any]] = {name: {} for name in body["sites"]}
    for extra in extras.values():
        if extra.role in ("magnitude", "bias"):
            fields[extra.name][extra.role] = extra.tensor.flatten()
        if extra.role == "magnitude":
            fields[extra.name]["magnitude_axis"] = str(extra.detail[0])
    sites = [
        replace(s, **_factors(s, counts[s.name], *(tensors[key] for key in keys[s.name])), **fields[s.name])
        for s in places
        if all(key in tensors for key in keys[s.name])
    ]
    if body["init"] not in (*INITS, FUNCTION):
        raise ValueError(f"init is {body['init']!r}, not one of {', '.join((*INITS, FUNCTION))}")
    problems += [
        f"{s.name}: half of its ranks are constant, or none" for s in sites if s.constant_ranks * 2 not in (0, s.r)
    ]
    replaced = {extra.name: extra.tensor for extra in extras.values() if extra.role == "replaced"}
    tokens = {
        extra.name: TokenRows(ids=tuple(map(int, extra.detail[0])), rows=extra.tensor)
        for extra in extras.values()
        if extra.role == "tokens"
    }
    return AdapterFile(path=source.path, format="lorainject", sites=tuple(checked_sites(sites, problems)),
                       name=_text("the adapter", body["name"]), init=body["init"],
                       base=_decode_base(body) if body["base"] else None, config=source.config, replaced=replaced,
                       tokens=tokens, namespace=str(body.get("namespace", "hf")),
                       origin=dict(body.get("origin", {})))  # fmt: skip


def _decode_site(name: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StoredSite:
    """Return a site without its A and B."""
    if settings["scaling"] not in SCALINGS:
        raise ValueError(f"{name}: scaling is {settings['scaling']!r}, not one of {', '.join(SCALINGS)}")
    is_embedding = f"{peft_layout.PREFIX}{name}{peft_layout.EMBEDDING[0]}" in tensors
    return StoredSite(
        path=_text(name, settings.get("path", name)), parameter=_text(name, settings.get("parameter", "weight")),
        label=_text(name, settings.get("label", "")),
        rows=_decode_rows(settings["rows"]) if settings.get("rows") else None,
        parts={name: _decode_rows(part) for name, part in settings.get("parts", {}).items()},
        kind=_text(name, settings.get("kind", "embedding" if is_embedding else "linear")),
        shape=tuple(settings.get("shape", ())), named=bool(settings.get("named")), peft=not settings.get("apart"),
        aliases=tuple(_text(name, alias) for alias in settings["aliases"]), A=UNREAD, B=UNREAD,
        alpha=settings["alpha"], scaling=settings["scaling"], dropout=settings["dropout"],
        constant_ranks=int(settings.get("constant_ranks", 0)),
    )  # fmt: skip


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: {value!r} is no name")
    return value


def _factors(s: StoredSite, experts: int, A: Tensor, B: Tensor) -> dict[str, Any]:
    """Return A and B as the record has them; in PEFT's shapes, if they cannot be brought into others."""
    with contextlib.suppress(RuntimeError, IndexError, TypeError):
        if s.kind.startswith("experts"):
            columns = B.reshape(B.shape[0], -1, experts)
            A, B = A.reshape(experts, -1, A.shape[-1]), columns.permute(2, 0, 1).contiguous()
        elif A.ndim > 2 and B.shape[2:].numel() == 1:
            A, B = A.flatten(1), B.flatten(1)
    return {"A": A, "B": B}


def _decode_base(body: Mapping[str, Any]) -> BasePrint:
    samples = torch.frombuffer(bytearray(base64.b64decode(body["base"])), dtype=torch.float32)
    dtypes = [getattr(torch, name) for name in body["base_dtypes"]]
    if not set(dtypes) <= set(DTYPES):
        raise ValueError(f"base_dtypes holds other names than {', '.join(map(str, DTYPES))}")
    return BasePrint(
        dtype=dict(zip(body["sites"], dtypes, strict=True)),
        sample=dict(zip(body["sites"], samples.split(SAMPLES if body["version"] >= 4 else OLD_SAMPLES), strict=True)),
    )


def _contradictions(file: AdapterFile) -> list[str]:
    """Return where the config next to the tensors has another scale than the record, as after an edit by hand."""
    problems = []
    for s in file.sites:
        scale = peft_layout.config_scale(file.config, s.name, s.r)
        if abs(scale - s.scale) > 1e-9 * s.scale:
            problems.append(f"{s.name}: adapter_config.json says scale {scale:g}, the tensor file {s.scale:g}")
    return problems


FORMAT = Format(name="lorainject", library="lorainject", claims=claims, read=read, write=write, scales="site",
                holds=frozenset({*FEATURES, "whole tensors", "tokens"}),
                names=frozenset({"hf", "kohya", "pipeline"}))  # fmt: skip
