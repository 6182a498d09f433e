"""What a record means, in dense tensors: an independent reading of the formulas that the tests compare everything with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import lorainject as li

FIXTURES = Path(__file__).parent.parent / "fixtures" / "formats"


def delta(s: li.StoredSite) -> Tensor:
    """s B A (*stack, out, in), float64; of a slice, its own rows."""
    return s.scale * (s.B.double() @ s.A.double())


def deltas(file: li.AdapterFile) -> dict[str, Tensor]:
    """By weight name; slices summed up in the whole weight, as far as the file tells how large that is."""
    found: dict[str, Tensor] = {}
    for s in file.sites:
        d, name = delta(s), ".".join(filter(None, (s.path, s.parameter)))
        if s.rows is not None:
            whole = torch.zeros(
                *d.shape[:-2], s.shape[-1] if s.kind == "linear^T" else s.shape[-2], d.shape[-1], dtype=d.dtype
            )
            whole[..., [i for part in s.rows for i in part], :] = d
            d = whole
        found[name] = found[name] + d if name in found else d
    return found


def merged(
    file: li.AdapterFile, base: Mapping[str, Tensor], transposed: tuple[str, ...] = (), eps: float = 0.0
) -> dict[str, Tensor]:
    """The base's tensors with the whole record in them; `transposed` weights are stored (in, out)."""
    now = {name: t.double().clone() for name, t in base.items()}
    magnitudes = {f"{s.path}.weight": s for s in file.sites if s.magnitude is not None}
    for name, d in deltas(file).items():
        turned = (
            name in transposed or tuple(d.shape[-2:]) == tuple(now[name].shape[-2:])[::-1] != tuple(d.shape[-2:])[::-1]
        )
        w = now[name].mT if turned else now[name]
        v = w + d.reshape(w.shape)
        if (s := magnitudes.get(name)) is not None:
            axis = 0 if s.magnitude_axis == "out" else 1
            shape = [-1 if i == axis else 1 for i in range(v.ndim)]
            v = v * (s.magnitude.double() / (v.transpose(0, axis).flatten(1).norm(dim=1) + eps)).view(shape)
        now[name] = v.mT if turned else v
    for s in file.sites:
        if s.bias is not None:
            now[f"{s.path}.bias"] += s.scale * s.bias.double()
    for name, t in file.replaced.items():
        now[name if name in now else f"{name}.weight"] = t.double()
    for path, t in file.tokens.items():
        now[f"{path}.weight"][list(t.ids)] = t.rows.double()
    return now


def tree(weights: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A model of linears and convolutions, by the names and shapes of their weights."""
    root = nn.Module()
    for name, (out, in_, *kernel) in weights.items():
        *parents, leaf = name.removesuffix(".weight").split(".")
        at = root
        for part in parents:
            at = (
                at._modules[part] if part in at._modules else at.register_module(part, nn.Module()) or at._modules[part]
            )
        at.add_module(leaf, nn.Conv2d(in_, out, kernel) if kernel else nn.Linear(in_, out))
    return root


def error(now: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest difference."""
    return max(float((now[name].double() - t.double()).abs().max()) for name, t in wanted.items())


def alike(file: li.AdapterFile, other: li.AdapterFile) -> bool:
    """Whether two records are the same to the bit, whatever formats they come from."""

    def bits(t: Tensor | None) -> object:
        return (
            None
            if t is None
            else (t.dtype, tuple(t.shape), t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        )

    def said(f: li.AdapterFile) -> object:
        sites = {
            s.name: (
                s.parameter,
                s.kind,
                bits(s.A),
                bits(s.B),
                round(s.scale, 12),
                bits(s.magnitude),
                s.magnitude_axis,
                bits(s.bias),
            )
            for s in f.sites
        }
        return (
            sites,
            {n: bits(t) for n, t in f.replaced.items()},
            {n: (t.ids, bits(t.rows)) for n, t in f.tokens.items()},
        )

    return said(file) == said(other)
