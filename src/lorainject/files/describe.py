"""Describe an adapter file without its base: sizes, scales, norms, and what is unusual. `lorainject inspect` prints
it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ..numerics.delta import product_norm
from .record import AdapterFile

BASE_KEYS = (
    "base_model_name_or_path", "model", "model_name", "ss_sd_model_name", "ss_base_model_version",
    "modelspec.architecture", "general.base_model.0.name", "general.architecture", "checkpoint_dir",
)  # fmt: skip
"""Where the configs and headers of the formats name the base."""
OUTLIER = 10.0  # times the median norm


def describe(file: AdapterFile) -> dict[str, Any]:
    """Return what can be said of a file, as values that JSON can hold.

    The keys are "format", "name", "base", "sites" (one row per site, "norm" is the Frobenius norm of s B A),
    "parameters" (elements of A and B), "beside" (what the file holds besides A and B, which `load` puts onto the model
    too), "unusual" (one line for each oddity) and "origin" (what it was made from).
    """
    rows = [
        {
            "path": s.name, "in": s.A.shape[-1], "out": s.B.shape[-2], "r": s.r, "alpha": s.alpha, "scale": s.scale,
            "dtype": str(s.dtype).removeprefix("torch."), "norm": s.scale * product_norm(s.B, s.A),
        }
        for s in file.sites
    ]  # fmt: skip
    replaced = [f"{name}: a whole tensor {tuple(t.shape)} in place of the base's" for name, t in file.replaced.items()]
    return {
        "format": file.format, "name": file.name, "base": _base_name(file.config), "sites": rows,
        "parameters": file.parameters, "beside": [*file.beside, *replaced],
        "unusual": [*file.notes, *_oddities(file, rows)], "origin": file.origin,
    }  # fmt: skip


def _oddities(file: AdapterFile, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    zero = [row["path"] for row in rows if row["norm"] == 0]
    if len(zero) == len(rows):
        lines.append("every B is zero: the adapter was not trained, or its tensors were lost")
    elif zero:
        lines.append(f"B is zero at {len(zero)} sites: {_shorten(zero)}")
    usual = median(row["norm"] for row in rows)
    if large := [row["path"] for row in rows if row["norm"] > OUTLIER * usual > 0]:
        lines.append(f"the norm is more than {OUTLIER:g} times the median: {_shorten(large)}")
    if wide := [row["path"] for row in rows if row["r"] > min(row["in"], row["out"])]:
        lines.append(f"the rank is higher than that of the weight: {_shorten(wide)}")
    for column in ("r", "scale", "dtype"):
        if len(values := sorted({row[column] for row in rows})) > 1:
            shown = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in values[:6])
            lines.append(f"{column} differs by site: {', '.join(shown)}")
    if any(s.scaling == "rslora" for s in file.sites):
        lines.append("rank-stabilized: the scale is alpha / sqrt(r)")
    if file.namespace != "hf":
        lines.append(f"its names are those of {file.namespace}; loading translates them to the model's own")
    if file.base is None:
        lines.append("it has no fingerprint of the base, so load cannot tell whether the base is the right one")
    return lines


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + f", ... ({len(names)} in all)" * (len(names) > 3)


def _base_name(config: Mapping[str, Any]) -> str | None:
    """Return the base's name in a config or header; for an image pipeline, the keys begin with the component's name."""
    values = [config.get(key) for key in BASE_KEYS]
    values += [value for key, value in config.items() if key.endswith(".base_model_name_or_path")]
    return next((value for value in values if isinstance(value, str) and value), None)
