"""Our record in the header of a tensor file: what PEFT's names and shapes leave open, so that the file says all by itself.

It holds alpha, scaling, dropout and the other paths of a shared module by site, the fingerprint of the base, and a digest of
all that and of the tensors, by which a flipped bit anywhere is seen.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import FileError
from ...numerics.fingerprint import SAMPLES
from ...spec import INITS, SCALINGS
from ..format import FEATURES, Format
from ..io import safetensors_file
from ..io.open_adapter import CONFIG, TENSORS, Hints, Source, parsed
from ..record import NONE, AdapterFile, BasePrint, StoredSite, TokenRows, checked
from . import peft_layout

KEY = "lorainject"
VERSIONS = (1, 2, 3)
"""1: whole weights called `weight`, under PEFT's names. 2: parameters, stacks and slices too; written only where there are such.
3: magnitudes, biases, whole tensors, token rows; names of another library."""


def claims(source: Source) -> bool:
    """Whether our record is in its header."""
    return KEY in source.metadata


def read(source: Source, hints: Hints, problems: list[str]) -> AdapterFile | None:
    """The record; the file says all by itself, so no hint is needed."""
    return decode(source.path, source.tensors, source.metadata[KEY], source.config, problems)


def write(file: AdapterFile, path: Path, hints: Hints) -> dict[Path, Any]:
    """One file, if the path ends in .safetensors, else a directory; with PEFT's config in it unless PEFT would misread something."""
    extras = _extras(file)
    tensors = peft_layout.tensors(file.sites) | {key: t for key, (t, *_) in extras.items()}
    raws = {key: safetensors_file.raw(t) for key, t in tensors.items()}  # they may be copies, off a GPU: once
    metadata = {"format": "pt", KEY: encode(file, tensors, raws, {key: said for key, (_, *said) in extras.items()})}
    if path.suffix == ".safetensors":
        return {path: safetensors_file.dump(tensors, metadata, raws)}
    plain = all(map(peft_layout.holds, file.sites)) and not any(
        s.magnitude is not None and s.magnitude_axis == "in" for s in file.sites
    )
    text = (json.dumps(peft_layout.config(file), indent=2, sort_keys=True) + "\n").encode() if plain else None
    return {
        path / TENSORS: safetensors_file.dump(tensors, metadata, raws),
        path / CONFIG: None if text is None else [text],
    }


def encode(
    file: AdapterFile,
    tensors: Mapping[str, Tensor],
    raws: Mapping[str, memoryview],
    extras: Mapping[str, Sequence[Any]],
) -> str:
    """The record as JSON."""
    sites, base = file.sites, file.base
    more = {
        key: value
        for key, value in (("extras", extras), ("namespace", file.namespace if file.namespace != "hf" else ""))
        if value
    }
    body: dict[str, Any] = {
        "version": 3 if more else 1 if all(_is_plain(s) for s in sites) else 2,
        "name": file.name,
        "init": file.init,
        "sites": {
            s.name: {"alpha": s.alpha, "scaling": s.scaling, "dropout": s.dropout, "aliases": s.aliases} | _where(s)
            for s in sites
        },
        "base": base64.b64encode(safetensors_file.raw(torch.cat([base.sample[s.name] for s in sites]))).decode()
        if base
        else "",
        "base_dtypes": [str(base.dtype[s.name]).removeprefix("torch.") for s in sites] if base else [],
    } | more
    text = _text(body)
    return f'{text[:-1]},"digest":"{_digest(text, tensors, raws)}"}}'


def _extras(file: AdapterFile) -> dict[str, tuple[Any, ...]]:
    """All that is not A and B: by the tensor's name the tensor, what it is, of which site or module, and a detail."""
    found: dict[str, tuple[Any, ...]] = {}
    for s in file.sites:
        at = f"{peft_layout.PREFIX}{s.path}" if peft_layout.holds(s) else s.name
        if s.magnitude is not None:
            ones = [1] * (len(s.shape) - 2) if s.kind == "conv" else []
            key, t = (f"{at}.lora_magnitude_vector", s.magnitude.view(1, -1, *ones) if ones else s.magnitude)
            found[key if s.magnitude_axis == "out" else f"{at}.magnitude_in"] = (
                t,
                "magnitude",
                s.name,
                s.magnitude_axis,
            )
        if s.bias is not None:
            found[f"{at}.lora_B.bias"] = (s.bias, "bias", s.name)
    found |= {key: (t, "replaced", name) for name, (key, t) in peft_layout.whole(file).items()}
    return found | {
        f"{peft_layout.PREFIX}{path}.{peft_layout.TOKENS}": (t.rows, "tokens", path, t.ids)
        for path, t in file.tokens.items()
    }


def decode(
    path: Path, tensors: Mapping[str, Tensor], text: str, config: dict[str, Any], problems: list[str]
) -> AdapterFile | None:
    """The file that a record describes; None, and lines in `problems`, if it is damaged."""
    try:
        body = parsed("the record", text)
        digest = body.pop("digest")
        if body["version"] not in VERSIONS:
            problems.append(
                f"its record is of version {body['version']!r}, this library reads {VERSIONS[-1]} and older"
            )
            return None
        if digest != _digest(_text(body), tensors):
            problems.append("its digest does not match: bits were changed since it was written")
            return None
        extras: dict[str, list[Any]] = body.get("extras", {})
        own = {name: {} for name in body["sites"]}  # type: dict[str, dict[str, Any]]
        if odd := [name for _, name, *_ in extras.values() if not isinstance(name, str)]:
            raise ValueError(f"{odd[0]!r} is no name")
        for key, (role, name, *detail) in extras.items():
            if role in ("magnitude", "bias"):
                own[name] |= {role: tensors[key].flatten()} | (
                    {"magnitude_axis": str(detail[0])} if role == "magnitude" else {}
                )
        places = [_place(name, settings, tensors, own[name]) for name, settings in body["sites"].items()]
        keys = peft_layout.keys(places)
        sites = [
            _pair(tensors, keys[s.name], s, problems, alpha=x["alpha"], scaling=x["scaling"], dropout=x["dropout"])
            for s, x in zip(places, body["sites"].values(), strict=True)
        ]
        base = None
        if body["base"]:
            samples = torch.frombuffer(bytearray(base64.b64decode(body["base"])), dtype=torch.float32).split(SAMPLES)
            dtypes = [getattr(torch, name) for name in body["base_dtypes"]]
            base = BasePrint(
                dtype=dict(zip(body["sites"], dtypes, strict=True)),
                sample=dict(zip(body["sites"], samples, strict=True)),
            )
        name, init = body["name"], body["init"]
        if (
            not isinstance(name, str)
            or init not in INITS
            or any(x["scaling"] not in SCALINGS for x in body["sites"].values())
        ):
            raise ValueError(f"the name {name!r}, init {init!r} or a scaling is none that there is")
        used = {key for pair in keys.values() for key in pair} | extras.keys()
        problems += [f"{key}: unexpected, neither A nor B of a site" for key in tensors if key not in used]
        replaced = {name: tensors[key] for key, (role, name, *_) in extras.items() if role == "replaced"}
        tokens = {
            e[1]: TokenRows(ids=tuple(map(int, e[2])), rows=tensors[key])
            for key, e in extras.items()
            if e[0] == "tokens"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, FileError) as e:
        problems.append(f"its lorainject record is damaged: {type(e).__name__}: {e}")
        return None
    whole = tuple(s for s in sites if s is not None)
    if config:  # the record decides; a config edited by hand must not be passed over in silence
        try:
            problems += [
                f"{s.name}: adapter_config.json says scale {theirs:g}, the tensor file {s.scale:g}"
                for s in whole if abs((theirs := peft_layout.scale_of(config, s.name, s.r)) - s.scale) > 1e-9 * s.scale
            ]  # fmt: skip
        except (TypeError, ValueError, AttributeError) as e:
            problems.append(f"adapter_config.json is not a config as PEFT writes it: {e}")
    return AdapterFile(path=path, format="lorainject", sites=whole, name=name, init=init, base=base, config=config, replaced=replaced, tokens=tokens,
                       namespace=str(body.get("namespace", "hf")))  # fmt: skip


def _pair(tensors: Mapping[str, Tensor], at: tuple[str, str], s: StoredSite, problems: list[str], *, alpha: Any, scaling: Any,
          dropout: Any) -> StoredSite | None:  # fmt: skip
    """The site with its A and B, found under the two names."""
    if wrong := [f"{key}: missing" for key in at if key not in tensors]:
        problems += wrong
        return None
    A, B = (tensors[key] for key in at)
    with contextlib.suppress(RuntimeError, IndexError):  # shapes that can't be unpacked are named by what follows
        A, B = peft_layout.unpacked(A, B, s.kind, s.shape)
    return checked(s, A, B, problems, alpha=alpha, scaling=scaling, dropout=dropout)


def _is_plain(s: StoredSite) -> bool:
    return (s.parameter, s.label, s.named, s.peft) == ("weight", "", False, True) and s.kind in (
        "linear",
        "linear^T",
        "embedding",
    )


def _where(s: StoredSite) -> dict[str, Any]:
    """What the name alone does not tell."""
    if _is_plain(s):
        return {}
    rows = s.rows and [[part.start, part.stop, part.step] for part in s.rows]
    fields = {
        "parameter": s.parameter,
        "label": s.label,
        "rows": rows,
        "kind": s.kind,
        "shape": s.shape,
        "named": s.named,
        "apart": not s.peft,
    }
    return {"path": s.path} | {key: value for key, value in fields.items() if value}


def _place(
    name: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], beside: Mapping[str, Any]
) -> StoredSite:
    """A site without its A and B, but with what it has beside them."""
    texts = [
        settings.get("path", name),
        settings.get("parameter", ""),
        settings.get("label", ""),
        settings.get("kind", ""),
        *settings["aliases"],
    ]
    if odd := [t for t in texts if not isinstance(t, str)]:
        raise ValueError(f"{name}: {odd[0]!r} is no name")
    kind = "embedding" if f"{peft_layout.PREFIX}{name}{peft_layout.EMBEDDING[0]}" in tensors else "linear"
    return StoredSite(
        path=settings.get("path", name), parameter=settings.get("parameter", "weight"), label=settings.get("label", ""),
        rows=tuple(range(*part) for part in settings["rows"]) if settings.get("rows") else None,
        kind=settings.get("kind", kind), shape=tuple(settings.get("shape", ())), named=bool(settings.get("named")), peft=not settings.get("apart"),
        aliases=tuple(settings["aliases"]), A=NONE, B=NONE, alpha=0.0, **beside,
    )  # fmt: skip


def _text(body: Mapping[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"))


def _digest(text: str, tensors: Mapping[str, Tensor], raws: Mapping[str, memoryview] | None = None) -> str:
    """SHA-256 of the record and of the tensors' names, types, shapes and CRC-32s (which see damage as well, in a quarter of the time)."""
    marks = [text]
    for key in sorted(
        tensors
    ):  # one by one: they may be mapped (see Spool), and in memory for as long as somebody has them
        t = tensors[key]
        marks.append(f"{key} {t.dtype} {tuple(t.shape)} {zlib.crc32(raws[key] if raws else safetensors_file.raw(t))}")
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()


FORMAT = Format(name="lorainject", library="lorainject", claims=claims, read=read, write=write,
                holds=frozenset({*FEATURES, "whole tensors", "tokens"}), scales="site",
                names=frozenset({"hf", "kohya", "pipeline"}))  # fmt: skip
