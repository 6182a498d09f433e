"""What can be said of an adapter file without its base: sizes, scales, norms, and what is unusual."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from ..numerics.delta import product_norm
from .record import AdapterFile, StoredSite

# Where formats tell of the base that the adapter was made for.
BASES = ("base_model_name_or_path", "model", "model_name", "ss_sd_model_name", "ss_base_model_version", "modelspec.architecture",
         "general.base_model.0.name", "general.architecture", "checkpoint_dir")  # fmt: skip
OUTLIER = 10.0  # times the median norm


def survey(file: AdapterFile) -> dict[str, Any]:
    """For JSON: format, base, counts, a row for each site, all that is beside A and B, and what is unusual."""
    rows = [
        {"path": s.name, "in": s.A.shape[-1], "out": s.B.shape[-2], "r": s.r, "alpha": s.alpha, "scale": s.scale,
         "dtype": str(s.dtype).removeprefix("torch."), "norm": _norm(s)} for s in file.sites
    ]  # fmt: skip
    whole = [f"{name}: a whole tensor {tuple(t.shape)} in place of the base's" for name, t in file.replaced.items()]
    came_along = {s.path for s in file.sites if s.embedding}
    return {"format": file.format, "name": file.name, "base": _base(file.config), "sites": rows, "parameters": file.parameters,
            "beside": [*file.beside, *whole], "loads": not file.beside and file.replaced.keys() <= came_along,
            "unusual": [*file.notes, *_unusual(file, rows)]}  # fmt: skip


def _unusual(file: AdapterFile, rows: list[dict[str, Any]]) -> list[str]:
    found = []
    if all(row["norm"] == 0 for row in rows):
        found.append("every B is zero: untrained, or its keys were lost")
    elif zero := [row["path"] for row in rows if row["norm"] == 0]:
        found.append(f"B is zero at {len(zero)} sites: {_some(zero)}")
    usual = median(row["norm"] for row in rows)
    if far := [row["path"] for row in rows if row["norm"] > OUTLIER * usual > 0]:
        found.append(f"more than {OUTLIER:g} times the usual norm: {_some(far)}")
    if wide := [row["path"] for row in rows if row["r"] > min(row["in"], row["out"])]:
        found.append(f"the rank is higher than the matrix's: {_some(wide)}")
    for what in ("r", "scale", "dtype"):
        if len(values := sorted({row[what] for row in rows})) > 1:
            found.append(
                f"{what} differs by site: {', '.join(f'{v:.4g}' if isinstance(v, float) else str(v) for v in values[:6])}"
            )
    if rows and any(s.scaling == "rslora" for s in file.sites):
        found.append("rank-stabilised: the scale is alpha / sqrt(r)")
    if file.namespace != "hf":
        found.append(f"its names are {file.namespace}'s: loading goes by the model's own")
    if file.base is None:
        found.append("no fingerprint of the base: load can't tell whether it fits")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + f", ... ({len(names)} in all)" * (len(names) > 3)


def _base(config: Mapping[str, Any]) -> str | None:
    """What the file calls its base."""
    said = [config[key] for key in BASES if isinstance(config.get(key), str) and config[key]]
    said += [
        value
        for key, value in config.items()
        if key.endswith(".base_model_name_or_path") and isinstance(value, str) and value
    ]
    return said[0] if said else None


def _norm(s: StoredSite) -> float:
    return s.scale * product_norm(s.B, s.A)
