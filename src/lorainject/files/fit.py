"""Fit a record into a format: convert exactly what the format has no place for, and refuse the rest.

    the record has                      a format without it gets
    slices                              the whole weight, B zero outside the slice
    stacks of experts                   one linear per expert, gate and up apart
    a scale per site                    the most frequent scale, and the rest folded into B
    a rank per site                     zeros up to the highest rank

The conversions themselves are in transforms.py. With `lossy` the rest is left out instead, and listed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ..errors import FileError
from ..numerics.delta import product_norm
from . import transforms
from .format import FEATURES, Format
from .record import AdapterFile, Problem, StoredSite, next_steps

# Features that a site can be written without (`lossy`), with the fields that then change.
OPTIONAL: dict[str, dict[str, Any]] = {
    "magnitudes": {"magnitude": None},
    "magnitudes by input": {"magnitude": None, "magnitude_axis": "out"},
    "bias updates": {"bias": None},
}
UNKNOWN_STACK = "a stack of experts; the file does not tell how it is stored, or which of its rows are gate and up"
ASK_MODEL = "read it with the model, which tells: hints=Hints(model=...)"
# What transformers 4 calls the parts of a stack as linears: by the stack's parameter, in the order of its rows.
EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def fit_record(file: AdapterFile, form: Format, lossy: bool) -> tuple[AdapterFile, tuple[str, ...]]:
    """Return the record in the form that the format holds, and what was left out, one line each.

    Args:
        file: The record.
        form: The format.
        lossy: Leave out what has no exact form in the format, instead of raising.

    Raises:
        FileError: The format cannot express the record's names; or, without `lossy`, it has no place for some of the
            record. All of it is listed.
    """
    if file.namespace not in form.names:
        raise FileError(
            f"{form.name} is written under a model's own names, but the names of this record are of the kind"
            f" {file.namespace!r}",
            way_out='read it with the model, and say which: hints=Hints(model=unet, component="unet")',
        )
    sites, problems = file.sites, list[str]()
    if "slices" not in form.holds and any(map(FEATURES["slices"], sites)):
        sites = _without_slices(sites, problems)
    if "stacks" not in form.holds:
        problems += [Problem(f"{s.name}: {UNKNOWN_STACK}", ASK_MODEL) for s in sites if _is_layout_unknown(s)]
        known = [s for s in sites if not _is_layout_unknown(s)]
        sites = tuple(part for s in known for part in (_split_stack(s) if s.A.ndim == 3 else [s]))
    beyond = {s.name: [what for what, has in FEATURES.items() if what not in form.holds and has(s)] for s in sites}
    lost = [f"{name}: {what}" for name, features in beyond.items() for what in features]
    lost += [f"{name}: a whole tensor" for name in file.replaced if not form.takes(name)]
    lost += [f"{path}: rows of trained tokens" for path in file.tokens if "tokens" not in form.holds]
    if problems or (lost and not lossy):
        problems += [Problem(line, form.instead) for line in lost if not lossy]
        raise FileError(f"{form.name} has no place for:", problems, next_steps(problems, ""))
    kept = []
    for s in sites:
        if OPTIONAL.keys() >= set(beyond[s.name]):
            kept.append(
                replace(s, **{field: value for what in beyond[s.name] for field, value in OPTIONAL[what].items()})
            )
    if len(kept) < len(sites):
        names = {s.name for s in kept}
        total, left_out = _norm(sites), _norm([s for s in sites if s.name not in names])
        share = left_out / total if total else 0
        lost.append(f"left out altogether: {len(sites) - len(kept)} sites, {share:.2g} of the update's norm")
    fit = replace(
        file,
        sites=_with_common_scales(kept, form.scales),
        replaced={name: t for name, t in file.replaced.items() if form.takes(name)},
        tokens=file.tokens if "tokens" in form.holds else {},
    )
    return fit, tuple(lost)


def _without_slices(sites: Sequence[StoredSite], problems: list[str]) -> tuple[StoredSite, ...]:
    """Return the sites with slices as whole weights, but for those that are added to `problems`."""
    whole = []
    for s in sites:
        if s.rows is not None and not s.shape:
            problems.append(Problem(f"{s.name}: a slice of a weight whose size the file does not tell", ASK_MODEL))
        elif s.rows is not None and (s.magnitude is not None or s.bias is not None):
            line = f"{s.name}: a slice with a magnitude or a bias update"
            problems.append(Problem(line, "choose a format that has slices (lorainject)"))
        else:
            whole.append(s)
    return transforms.slices_to_whole(whole, problems)


def _split_stack(s: StoredSite) -> list[StoredSite]:
    """Return a stack as one linear per expert and part; the site itself if no library names its parts.

    Checkpoints have gate and up one after the other. Where they alternate (gpt-oss) or are stored transposed, no
    library has linears for the experts.
    """
    names = EXPERTS.get(s.parameter)
    if names is None or s.kind != "experts" or s.rows is not None:
        return [s]
    half = s.B.shape[-2] // 2
    if len(names) == 2 and dict(s.parts) != {"gate": (range(half),), "up": (range(half, 2 * half),)}:
        return [s]
    experts = transforms.split_experts(s, [f"{s.path}.{e}" for e in range(len(s.A))])
    if len(names) == 1:
        return [replace(expert, path=f"{expert.path}.{names[0]}") for expert in experts]
    parts = []
    for expert in experts:
        gate, up = (f"{expert.path}.{name}" for name in names)
        parts += transforms.split_rows(expert, {gate: [range(half)], up: [range(half, 2 * half)]})
    return parts


def _is_layout_unknown(s: StoredSite) -> bool:
    """True if the record does not tell how a stack of experts is stored, or which of its rows are gate and up."""
    is_stack = s.A.ndim == 3 and s.parameter in EXPERTS
    is_split = s.kind == "experts" and len(EXPERTS.get(s.parameter, ())) > 1
    return is_stack and (not s.shape or (is_split and not s.parts))


def _with_common_scales(sites: Sequence[StoredSite], rule: str) -> tuple[StoredSite, ...]:
    """Return the sites with scales that the rule (Format.scales) can express: the most frequent one stays."""
    if rule == "site" or not sites:
        return tuple(sites)
    if rule == "none":
        return tuple(transforms.with_scale_folded(s, 1.0) for s in sites)
    if rule == "one":
        r = max(s.r for s in sites)
        scale = Counter(s.scale for s in sites).most_common(1)[0][0]
        return tuple(transforms.with_scale_folded(transforms.with_rank(s, r), scale) for s in sites)
    alpha = Counter(s.scale * s.r for s in sites).most_common(1)[0][0]
    return tuple(transforms.with_scale_folded(s, alpha / s.r) for s in sites)


def _norm(sites: Iterable[StoredSite]) -> float:
    """Return the Frobenius norm of the updates of all sites together."""
    total = 0.0
    for s in sites:
        stack = zip(*(t.reshape(-1, *t.shape[-2:]) for t in (s.B, s.A)), strict=True)
        total += s.scale**2 * sum(product_norm(B, A) ** 2 for B, A in stack)
    return total**0.5


def describe_changes(before: AdapterFile, after: AdapterFile) -> list[str]:
    """Return what `fit_record` rewrote, one line each; the update of every weight is the same before and after."""
    names, old = {s.name for s in after.sites}, {s.name: s for s in before.sites}
    gone = [s for s in before.sites if s.name not in names]
    same = [(old[s.name], s) for s in after.sites if s.name in old]
    stacks, slices = sum(s.A.ndim == 3 for s in gone), sum(s.rows is not None for s in gone)
    ranks = [(a.r, b.r) for a, b in same if a.r != b.r]
    scales = [(a.scale, b.scale) for a, b in same if a.scale != b.scale]
    wider = sum((a.A.dtype, a.B.dtype) != (b.A.dtype, b.B.dtype) for a, b in same)
    plain = [b.alpha for a, b in same if a.scaling != b.scaling]
    lines = []
    if stacks:
        lines.append(f"{stacks} stacks of experts are written as one linear per expert")
    if slices:
        lines.append(f"{slices} slices are padded with zeros to the whole weight")
    if ranks:
        lines.append(f"{len(ranks)} sites are padded with zeros {_from_to(ranks, 'rank')}")
    if scales:
        lines.append(f"{len(scales)} sites are rescaled {_from_to(scales, 'scale')}: the rest of the scale is in B")
    if wider:
        lines.append(f"{wider} sites have a wider dtype, because their own could not hold the product with the scale")
    if plain:
        lines.append(f"rank-stabilized scales are written as plain alpha: {_first_few(plain)}")
    return lines


def _from_to(pairs: Sequence[tuple[Any, Any]], what: str) -> str:
    return f"from {what} {_first_few(old for old, _ in pairs)} to {what} {_first_few(new for _, new in pairs)}"


def _first_few(values: Iterable[Any]) -> str:
    distinct = list(dict.fromkeys(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values))
    return ", ".join(distinct[:3]) + ", ..." * (len(distinct) > 3)
