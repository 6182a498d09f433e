"""Read what was written again, before it is put in place, and compare it with the record that was to be written.

Every conversion ends here, whatever the format: each weight must get the same update s B A up to the rounding of
float32, with the same magnitudes, biases, tensors and rows of tokens. So a writer that loses, renames or reorders
something, or a name that the format's reader takes for another weight, is an error instead of a wrong file.

The dense updates are never formed. With P = [s1 B1, -s2 B2] and Q = [A1; A2], the difference of two updates is P Q,
whose norm costs two products (r, r). It is compared with the norms of the factors, because rounding is relative to
those.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import FileError
from ..numerics.delta import product_norm
from ..plan import site_name
from . import transforms
from .format import Files, Format
from .formats import kohya
from .io.open_adapter import Hints, open_source
from .record import AdapterFile, StoredSite, payload_problems

TOLERANCE = 1e-6
"""Of |B| |A|: float32 rounds B, and in some formats alpha, by 6e-8."""
Weights = Mapping[str, Sequence[StoredSite]]


def require_same(file: AdapterFile, fit: AdapterFile, form: Format, files: Files, path: Path, hints: Hints) -> None:
    """Raise FileError unless the format's reader finds in the written files what the record says.

    The files are written to a temporary folder and read again, so that a conversion takes the time and the space of a
    second copy. Nothing is in place yet.

    Args:
        file: The record that was given.
        fit: The record as it was fitted into the format.
        form: The format.
        files: What its writer returned.
        path: Where the adapter is to be written.
        hints: What the writer was told.
    """
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        for place, pieces in files.items():
            target = copy / place.relative_to(path)
            if pieces is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "wb") as f:
                    f.writelines(pieces)
        try:
            source = open_source(copy, allow_pickle=True)
            problems += payload_problems(source.tensors)
            again = form.read(source, _reader_hints(fit, form, hints), problems)
            if again is not None and not problems:
                problems += _differences(file, fit, again, hints)
        except FileError as e:
            problems.append(" ".join(str(e).replace(str(copy), "it").split()))
    if problems:
        raise FileError(
            f"this adapter cannot be written in the format {form.name}, which would read it as something else:",
            problems,
            "choose another format (lorainject holds everything); nothing was written",
        )


def _reader_hints(fit: AdapterFile, form: Format, hints: Hints) -> Hints:
    """Return the hints for what the format does not hold, as the record has it."""
    if not fit.sites:  # our own format, which needs no hints
        return replace(hints, component=None)
    first = fit.sites[0]
    known: dict[str, object] = {"component": None}
    if "alpha" in form.asks:
        known |= {"alpha": first.scale * first.r, "scaling": "standard"}
    if "groups" in form.asks:
        by_path: dict[str, list[StoredSite]] = {}
        for s in fit.sites:
            by_path.setdefault(s.path, []).append(s)
        merged = {path: transforms.join_merged_linear(sites) for path, sites in by_path.items() if sites[0].rows}
        known["groups"] = {path: groups[2] for path, groups in merged.items() if groups is not None}
    if "heads" in form.asks and hints.heads is None and hints.model is None:  # their ratio is enough to cut a fused qkv
        rows = {s.path.rpartition(".")[2]: s.B.shape[-2] for s in fit.sites}
        kv = rows.get("k_proj", rows.get("v_proj", rows.get("q_proj", 1)))
        known["heads"] = rows.get("q_proj", kv), kv
    if "model" in form.asks and hints.model is None:
        known["model"] = _skeleton(fit.sites)
    return replace(hints, **known)  # type: ignore[arg-type]


def _skeleton(sites: Sequence[StoredSite]) -> nn.Module:
    """Return a model that has layers for the sites, without values."""
    root = nn.Module()
    for s in sites:
        *parents, leaf = s.path.split(".")
        module = root
        for name in parents:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        out, in_ = s.shape[:2] if s.rows is not None else (s.B.shape[-2], s.A.shape[-1])
        layer = nn.Embedding(in_, out, device="meta") if s.embedding else nn.Linear(in_, out, False, device="meta")
        module._modules[leaf or "0"] = layer
    return root


def _differences(file: AdapterFile, fit: AdapterFile, again: AdapterFile, hints: Hints) -> list[str]:
    """Return a line for everything that the records `fit` and `again` say differently.

    The updates are compared with those of `file`, but for weights that `fit` has under other names.
    """

    flat = kohya.flat_names(fit, hints, []) if again.namespace == "kohya" else {}

    def name(s: StoredSite) -> str:
        path = flat.get(s.path, s.path)
        if again.namespace == "pipeline" != fit.namespace:
            path = f"{hints.component}.{path}"
        return site_name(path, s.parameter)

    wanted, found = _by_weight(fit.sites, name), _by_weight(again.sites, lambda s: site_name(s.path, s.parameter))
    given = _by_weight(file.sites, name)
    lines = [f"{key}: is not read back" for key in wanted if key not in found]
    lines += [f"{key}: is read, but the record does not have it"
              for key, sites in found.items() if key not in wanted and any(s.B.any() for s in sites)]  # fmt: skip
    for key in wanted.keys() & found.keys():
        first, other = wanted[key][0], found[key][0]
        if first.kind.startswith("conv") and first.shape[2:] != other.shape[2:]:
            lines.append(f"{key}: is a convolution {first.shape}, and is read with the shape {other.shape}")
        elif not _have_same_update(given.get(key, wanted[key]), found[key]):
            lines.append(f"{key}: is read back with another update")
        elif not _have_same_extras(first, other):
            lines.append(f"{key}: is read back with other magnitudes or another update of the bias")
    for old, new in ((fit.replaced, again.replaced), _token_rows(fit, again)):
        lines += [f"{key}: is not read back" for key in old if key not in new or not _are_close(old[key], new[key])]
    return lines


def _by_weight(sites: Sequence[StoredSite], name: object) -> dict[str, list[StoredSite]]:
    weights: dict[str, list[StoredSite]] = {}
    for s in sites:
        weights.setdefault(name(s), []).append(s)  # type: ignore[operator]
    return weights


def _have_same_update(sites: Sequence[StoredSite], others: Sequence[StoredSite]) -> bool:
    """True if the sites add the same to their weight, each on its rows."""
    signed = [(s.scale, s) for s in sites] + [(-s.scale, s) for s in others]
    out = max(max((part.stop for part in s.rows), default=0) if s.rows else s.B.shape[-2] for _, s in signed)
    if len({(*s.A.shape[:-2], s.A.shape[-1]) for _, s in signed}) > 1:
        return False
    if len({s.B.shape[-2] for _, s in signed if s.rows is None} - {out}) > 0:
        return False
    size = sum(abs(scale) * float(s.B.double().norm() * s.A.double().norm()) for scale, s in signed)
    P = torch.cat([scale * transforms.on_rows(s, out).double() for scale, s in signed], -1)
    return product_norm(P, torch.cat([s.A.double() for _, s in signed], -2)) <= TOLERANCE * size


def _have_same_extras(s: StoredSite, other: StoredSite) -> bool:
    m, n = s.magnitude, other.magnitude
    b, c = (None if x.bias is None else x.bias.double() * x.scale for x in (s, other))
    same_axis = m is None or s.magnitude_axis == other.magnitude_axis
    return same_axis and all(
        (t is None) == (u is None) and (t is None or u is None or _are_close(t, u)) for t, u in ((m, n), (b, c))
    )


def _token_rows(file: AdapterFile, other: AdapterFile) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the rows of tokens of both records, by embedding and the numbers of the rows."""
    first, second = ({f"{path}{list(t.ids)}": t.rows for path, t in f.tokens.items()} for f in (file, other))
    return first, second


def _are_close(t: Tensor, other: Tensor) -> bool:
    return t.shape == other.shape and torch.allclose(t.double(), other.double(), rtol=TOLERANCE, atol=0)
