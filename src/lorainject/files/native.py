"""Our record in the header of a tensor file: what PEFT's names and shapes leave open, so that the file says all by itself.

It holds alpha, scaling, dropout and the other paths of a shared module by site, the fingerprint of the base, and a digest of
all that and of the tensors, by which a flipped bit anywhere is seen.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..fingerprint import SAMPLES
from ..spec import INITS, SCALINGS
from . import container, peft
from .record import AdapterFile, BasePrint, StoredSite

KEY = "lorainject"
VERSIONS = (1, 2)
"""1: whole weights called `weight`, under PEFT's names. 2: parameters, stacks and slices too; written only where there are such."""


def encode(name: str, init: str, sites: tuple[StoredSite, ...], base: BasePrint | None, tensors: Mapping[str, Tensor]) -> str:
    """The record as JSON."""
    body: dict[str, Any] = {
        "version": 1 if all(_is_plain(s) for s in sites) else 2,
        "name": name,
        "init": init,
        "sites": {s.name: {"alpha": s.alpha, "scaling": s.scaling, "dropout": s.dropout, "aliases": s.aliases} | _where(s) for s in sites},
        "base": base64.b64encode(container.raw(torch.cat([base.sample[s.name] for s in sites]))).decode() if base else "",
        "base_dtypes": [str(base.dtype[s.name]).removeprefix("torch.") for s in sites] if base else [],
    }
    return json.dumps(body | {"digest": _digest(body, tensors)}, separators=(",", ":"))


def decode(path: Path, tensors: Mapping[str, Tensor], text: str, config: dict[str, Any], problems: list[str]) -> AdapterFile | None:
    """The file that a record describes; None, and lines in `problems`, if it is damaged."""
    try:
        body = json.loads(text)
        digest = body.pop("digest")
        if body["version"] not in VERSIONS:
            problems.append(f"its record is of version {body['version']!r}, this library reads {VERSIONS[-1]} and older")
            return None
        if digest != _digest(body, tensors):
            problems.append("its digest does not match: bits were changed since it was written")
            return None
        places = [_place(name, settings, tensors) for name, settings in body["sites"].items()]
        keys = peft.keys(places)
        sites = [
            peft.pair(tensors, keys[s.name], s, problems, alpha=x["alpha"], scaling=x["scaling"], dropout=x["dropout"])
            for s, x in zip(places, body["sites"].values(), strict=True)
        ]
        base = None
        if body["base"]:
            samples = torch.frombuffer(bytearray(base64.b64decode(body["base"])), dtype=torch.float32).split(SAMPLES)
            dtypes = [getattr(torch, name) for name in body["base_dtypes"]]
            base = BasePrint(dtype=dict(zip(body["sites"], dtypes, strict=True)), sample=dict(zip(body["sites"], samples, strict=True)))
        name, init = body["name"], body["init"]
        if init not in INITS or any(x["scaling"] not in SCALINGS for x in body["sites"].values()):
            raise ValueError(f"init {init!r} or a scaling is none that there is")
        used = {key for pair in keys.values() for key in pair}
        problems += [f"{key}: unexpected, neither A nor B of a site" for key in tensors if key not in used]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as e:
        problems.append(f"its lorainject record is damaged: {type(e).__name__}: {e}")
        return None
    whole = tuple(s for s in sites if s is not None)
    if config:  # the record decides; a config edited by hand must not be passed over in silence
        problems += [
            f"{s.name}: adapter_config.json says scale {theirs:g}, the tensor file {s.scale:g}"
            for s in whole if abs((theirs := peft.scale_of(config, s.name, s.r)) - s.scale) > 1e-9 * s.scale
        ]  # fmt: skip
    return AdapterFile(path=path, format="lorainject", sites=whole, name=name, init=init, base=base, config=config)


def _is_plain(s: StoredSite) -> bool:
    return (s.parameter, s.label, s.named, s.peft) == ("weight", "", False, True) and s.kind in ("linear", "linear^T", "embedding")


def _where(s: StoredSite) -> dict[str, Any]:
    """What the name alone does not tell."""
    if _is_plain(s):
        return {}
    rows = s.rows and [[part.start, part.stop, part.step] for part in s.rows]
    fields = {"parameter": s.parameter, "label": s.label, "rows": rows, "kind": s.kind, "shape": s.shape, "named": s.named, "apart": not s.peft}
    return {"path": s.path} | {key: value for key, value in fields.items() if value}


def _place(name: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StoredSite:
    """A site without its A and B."""
    kind = "embedding" if f"{peft.PREFIX}{name}{peft.EMBEDDING[0]}" in tensors else "linear"
    return StoredSite(
        path=settings.get("path", name), parameter=settings.get("parameter", "weight"), label=settings.get("label", ""),
        rows=tuple(range(*part) for part in settings["rows"]) if settings.get("rows") else None,
        kind=settings.get("kind", kind), shape=tuple(settings.get("shape", ())), named=bool(settings.get("named")), peft=not settings.get("apart"),
        aliases=tuple(settings["aliases"]), A=peft.NONE, B=peft.NONE, alpha=0.0,
    )  # fmt: skip


def _digest(body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    for key, t in sorted(tensors.items()):
        digest.update(f"{key} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(container.raw(t))
    return digest.hexdigest()
