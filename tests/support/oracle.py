"""What a record means, in dense tensors: an independent reading of the formulas that tests compare everything with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import lorainject as li

FIXTURES = Path(__file__).parent.parent / "fixtures" / "formats"


def site_delta(s: li.StoredSite) -> Tensor:
    """Return s B A (*stack, out, in) in float64; for a slice, the slice's rows alone."""
    return s.scale * (s.B.double() @ s.A.double())


def dense_deltas(file: li.AdapterFile) -> dict[str, Tensor]:
    """Return the update of every weight by the weight's name.

    The slices of a weight are summed up in the whole weight, if the file tells how large the weight is.
    """
    deltas: dict[str, Tensor] = {}
    for s in file.sites:
        delta, name = site_delta(s), ".".join(filter(None, (s.path, s.parameter)))
        if s.rows is not None:
            out = s.shape[-1] if s.kind == "linear^T" else s.shape[-2]
            whole = delta.new_zeros(*delta.shape[:-2], out, delta.shape[-1])
            whole[..., [i for part in s.rows for i in part], :] = delta
            delta = whole
        deltas[name] = deltas[name] + delta if name in deltas else delta
    return deltas


def merged_weights(
    file: li.AdapterFile, base: Mapping[str, Tensor], transposed: tuple[str, ...] = (), eps: float = 0.0
) -> dict[str, Tensor]:
    """Return the base's tensors with everything that the record holds merged into them, in float64.

    Args:
        file: The record.
        base: The base's tensors by name.
        transposed: Names of the weights that are stored (in, out), if their shape does not tell.
        eps: Added to the norm of DoRA, as LyCORIS does.
    """
    weights = {name: t.double().clone() for name, t in base.items()}
    magnitudes = {f"{s.path}.weight": s for s in file.sites if s.magnitude is not None}
    for name, delta in dense_deltas(file).items():
        shape, stored = tuple(delta.shape[-2:]), tuple(weights[name].shape[-2:])
        is_transposed = name in transposed or shape == stored[::-1] != stored
        w = weights[name].mT if is_transposed else weights[name]
        w = w + delta.reshape(w.shape)
        if (s := magnitudes.get(name)) is not None:
            axis = 0 if s.magnitude_axis == "out" else 1
            norm = w.transpose(0, axis).flatten(1).norm(dim=1) + eps
            w = w * (s.magnitude.double() / norm).view([-1 if i == axis else 1 for i in range(w.ndim)])
        weights[name] = w.mT if is_transposed else w
    for s in file.sites:
        if s.bias is not None:
            weights[f"{s.path}.bias"] += s.scale * s.bias.double()
    for name, t in file.replaced.items():
        weights[name if name in weights else f"{name}.weight"] = t.double()
    for path, tokens in file.tokens.items():
        weights[f"{path}.weight"][list(tokens.ids)] = tokens.rows.double()
    return weights


def module_tree(weights: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Return a module of linears and convolutions that has weights of these names and shapes."""
    root = nn.Module()
    for name, (out, in_, *kernel) in weights.items():
        *parents, leaf = name.removesuffix(".weight").split(".")
        module = root
        for part in parents:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.add_module(leaf, nn.Conv2d(in_, out, kernel) if kernel else nn.Linear(in_, out))
    return root


def max_error(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest difference of any element of the expected tensors."""
    return max(float((tensors[name].double() - t.double()).abs().max()) for name, t in expected.items())


def is_same_record(file: li.AdapterFile, other: li.AdapterFile) -> bool:
    """True if two records are the same to the bit, whatever formats they come from."""

    def bits(t: Tensor | None) -> object:
        if t is None:
            return None
        return t.dtype, tuple(t.shape), t.contiguous().flatten().view(torch.uint8).numpy().tobytes()

    def content(s: li.StoredSite) -> object:
        tensors = [bits(t) for t in (s.A, s.B, s.magnitude, s.bias)]
        return s.parameter, s.kind, tensors, round(s.scale, 12), s.magnitude_axis

    def whole(f: li.AdapterFile) -> object:
        tokens = {path: (t.ids, bits(t.rows)) for path, t in f.tokens.items()}
        return {s.name: content(s) for s in f.sites}, {name: bits(t) for name, t in f.replaced.items()}, tokens

    return whole(file) == whole(other)
