"""What a file was made from: digests of adapters, and the entry that says which verb made something of which adapters.

The digest is that of the content, the same for every format and every order of the sites, so that an adapter is
recognized after a conversion that changed no number.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import Any

from ..version import __version__
from .io import safetensors_file
from .record import AdapterFile


def adapter_digest(file: AdapterFile) -> str:
    """Return the SHA-256 of the names, scales, dtypes, shapes and CRC-32s of all that an adapter holds."""
    tensors = {f"{s.name} {s.scale!r} {name}": t for s in file.sites
               for name, t in (("A", s.A), ("B", s.B), ("m", s.magnitude), ("b", s.bias)) if t is not None}  # fmt: skip
    tensors |= {f"{name} whole": t for name, t in file.replaced.items()}
    tensors |= {f"{path} {t.ids}": t.rows for path, t in file.tokens.items()}
    lines = [f"{key} {t.dtype} {tuple(t.shape)} {zlib.crc32(safetensors_file.raw(t))}" for key, t in tensors.items()]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def adapter_origins(files: Sequence[AdapterFile], weights: Sequence[float]) -> list[dict[str, Any]]:
    """Return the entries of adapters that something was made from, with the weight of each."""
    return [
        {"file": file.path.name, "name": file.name, "format": file.format, "digest": adapter_digest(file), "weight": w}
        | ({"origin": file.origin} if file.origin else {})
        for file, w in zip(files, weights, strict=True)
    ]


def made_by(verb: str, **entries: Any) -> dict[str, Any]:
    """Return the origin of something that a verb of this version made."""
    return {"verb": verb, "lorainject": __version__} | entries


def origin_lines(origin: dict[str, Any]) -> list[str]:
    """Return an origin as text, one line each."""
    settings = {k: v for k, v in origin.items() if not isinstance(v, dict | list) and k not in ("verb", "lorainject")}
    shown = "".join(f", {key}={_number(value)}" for key, value in settings.items())
    lines = [f"made by {origin.get('verb')} of lorainject {origin.get('lorainject')}{shown}"]
    for adapter in origin.get("adapters", ()):
        digest, weight = str(adapter.get("digest"))[:12], _number(adapter.get("weight"))
        lines.append(f"from {adapter.get('file')} ({digest}), weight {weight}")
        if isinstance(adapter.get("origin"), dict):
            lines += [f"  {line}" for line in origin_lines(adapter["origin"])]
    return lines


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
