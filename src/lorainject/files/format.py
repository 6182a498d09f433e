"""What a format is: a row with a few functions, and what it can hold. And how a record is brought into what a format can hold.

A new format is a module with a `FORMAT` of its own, a line in convert.py's table, and one more test parameter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import FileError
from ..numerics.delta import product_norm
from . import transforms
from .io.open_adapter import Hints, Source
from .record import AdapterFile, StoredSite

Files = Mapping[Path, Iterable[bytes | memoryview] | None]
"""What is to be written: by path, the bytes in pieces; None for a file that must not be there."""

# Beyond linear weights: what a record may have and a format not hold, and how a site shows it.
FEATURES: dict[str, Callable[[StoredSite], bool]] = {
    "slices": lambda s: s.rows is not None,
    "stacks": lambda s: s.A.ndim == 3,
    "embeddings": lambda s: s.embedding,
    "convolutions": lambda s: s.kind in ("conv", "conv^T"),
    "parameters": lambda s: s.parameter != "weight" and s.A.ndim == 2,
    "magnitudes": lambda s: s.magnitude is not None and s.magnitude_axis == "out",
    "magnitudes by input": lambda s: s.magnitude is not None and s.magnitude_axis == "in",
    "bias updates": lambda s: s.bias is not None,
}
PAYLOAD: dict[str, dict[str, Any]] = {
    "magnitudes": {"magnitude": None}, "magnitudes by input": {"magnitude": None, "magnitude_axis": "out"}, "bias updates": {"bias": None},
}  # fmt: skip
"""Features that a site can be written without, by `lossy`."""


# What the tensors of other methods than LoRA are called.
OTHERS: dict[str, tuple[str, ...]] = {
    "LoHa (products of two pairs)": (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2"),
    "LoKr (Kronecker products)": (".lokr_w1", ".lokr_w2", ".lokr_t2"), "OFT (rotations)": (".oft_blocks", ".oft_diag", ".oft_R", ".rescale"),
    "IA3 (rescaled activations)": (".on_input", ".ia3_l"), "GLoRA": (".a1.weight", ".b1.weight", ".a2.weight", ".b2.weight"),
    "a full difference, of full rank": (".diff", ".diff_b"), "trained norms": (".w_norm", ".b_norm"),
    "VeRA (shared random matrices)": (".vera_lambda_", "vera_A", "vera_B"), "AdaLoRA": (".lora_E",),
    "cloneofsimo's numbered layers, whose places are not told": (":up", ":down"),
}  # fmt: skip


def method(key: str) -> str | None:
    """Which other method a tensor of this name belongs to."""
    return next((what for what, marks in OTHERS.items() if any(mark in key for mark in marks)), None)


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format of adapter files."""

    name: str
    library: str
    """What writes it, with the version that ours was tested against."""
    claims: Callable[[Source], bool]
    """Whether a source is of this format, by its content."""
    read: Callable[[Source, Hints, list[str]], AdapterFile | None]
    """The record; what is wrong with the source goes into the list, and None comes back if there is nothing to go on with."""
    write: Callable[[AdapterFile, Path, Hints], Files]
    """What to write for a record that has been fitted. Raises FileError where names or hints don't suffice."""
    holds: frozenset[str]
    """Of FEATURES, and "whole tensors", "tokens"."""
    scales: str
    """"site": each site has its scale; "alpha": one alpha, divided by each site's rank; "one": one rank and one alpha; "none": s = 1."""
    suffix: str = ""
    """Of its single file; empty for a directory."""
    names: frozenset[str] = frozenset({"hf"})
    """The namespaces of records that it can write."""
    heads: tuple[str, ...] = ()
    """Where it holds no whole tensors but those of heads: what these modules are called."""
    instead: str = "choose another format (lorainject holds all), or lossy=True to leave these out"
    """The way out for what has no place in it."""
    asks: tuple[str, ...] = ()
    """The hints that whoever reads such a file must be given, since it does not hold them."""

    def takes(self, whole: str) -> bool:
        """Whether a whole tensor of this name has a place in it."""
        return "whole tensors" in self.holds or whole.removesuffix(".bias").rpartition(".")[2] in self.heads


def fitted(file: AdapterFile, form: Format, lossy: bool) -> tuple[AdapterFile, tuple[str, ...]]:
    """The record within what the format holds, converted exactly; and what is lost, which is nothing unless `lossy`.

    Raises FileError with everything that has no exact form there.
    """
    sites = file.sites
    if file.namespace not in form.names:
        raise FileError(f"{form.name} is written under a model's own names, these are of the kind {file.namespace!r}",
                        way_out='read it with the model, and say which: hints=Hints(model=unet, component="unet")')  # fmt: skip
    if "slices" not in form.holds and any(map(FEATURES["slices"], sites)):
        cut = [s for s in sites if s.rows is not None]
        unknown = [f"{s.name}: a slice of a weight whose size the file does not tell" for s in cut if not s.shape]
        unknown += [
            f"{s.name}: a slice with a magnitude or a bias of its own"
            for s in cut
            if s.magnitude is not None or s.bias is not None
        ]
        if unknown:
            raise FileError(f"{form.name} has no place for:", unknown, "read it with the model: hints=Hints(model=...)")
        sites = transforms.padded(sites)
    if "stacks" not in form.holds:
        sites = tuple(part for s in sites for part in (_apart(s) if s.A.ndim == 3 else [s]))
    beyond = [(s, what) for s in sites for what, has in FEATURES.items() if what not in form.holds and has(s)]
    lost = [f"{s.name}: {what}" for s, what in beyond]
    lost += [f"{name}: a whole tensor" for name in file.replaced if not form.takes(name)]
    lost += [f"{path}: rows of trained tokens" for path in file.tokens if "tokens" not in form.holds]
    if lost and not lossy:
        raise FileError(f"{form.name} has no place for:", lost, form.instead)
    out = {s.name for s, what in beyond if what not in PAYLOAD}
    if out:
        whole, left = (sum(_norm(s) ** 2 for s in some) ** 0.5 for some in (sites, [s for s in sites if s.name in out]))
        lost.append(f"left out altogether: {len(out)} sites, {left / whole if whole else 0:.2g} of the update's norm")
    without = {
        s.name: {k: v for other, what in beyond if other is s and what in PAYLOAD for k, v in PAYLOAD[what].items()}
        for s in sites
    }
    sites = _scaled(tuple(replace(s, **without[s.name]) for s in sites if s.name not in out), form.scales)
    replaced = {name: t for name, t in file.replaced.items() if form.takes(name)}
    return replace(file, sites=sites, replaced=replaced, tokens=file.tokens if "tokens" in form.holds else {}), tuple(
        lost
    )


def changes(before: AdapterFile, after: AdapterFile) -> list[str]:
    """What was rewritten between the two, one line each; the update that they add to a weight is the same."""
    kept, names = {s.name: s for s in before.sites}, {s.name for s in after.sites}
    same = [(kept[s.name], s) for s in after.sites if s.name in kept]
    gone = [s for s in before.sites if s.name not in names]
    ranked, scaled = (
        [(getattr(a, what), getattr(b, what)) for a, b in same if getattr(a, what) != getattr(b, what)]
        for what in ("r", "scale")
    )
    stacks, slices = [s for s in gone if s.A.ndim == 3], [s for s in gone if s.rows is not None]
    wider = [b.name for a, b in same if (a.A.dtype, a.B.dtype) != (b.A.dtype, b.B.dtype)]
    plain = [b.alpha for a, b in same if a.scaling != b.scaling]
    lines = (
        (stacks, f"{len(stacks)} stacks of experts are their experts' own linears"),
        (slices, f"{len(slices)} slices are padded with zeros to the whole weight"),
        (
            ranked,
            f"rank {_some(b for _, b in ranked)} at {len(ranked)} sites, which had {_some(a for a, _ in ranked)}: filled up with zeros",
        ),
        (
            scaled,
            f"scale {_some(b for _, b in scaled)} at {len(scaled)} sites, which had {_some(a for a, _ in scaled)}: the rest is in B",
        ),
        (wider, f"A or B is wider at {len(wider)} sites, since its dtype could not hold the product"),
        (plain, f"rank-stabilised scales are written as plain alpha: {_some(plain)}"),
    )
    return [line for of, line in lines if of]


def _some(of: Iterable[Any]) -> str:
    some = list(dict.fromkeys(f"{v:.6g}" if isinstance(v, float) else str(v) for v in of))
    return ", ".join(some[:3]) + ", ..." * (len(some) > 3)


def _scaled(sites: tuple[StoredSite, ...], rule: str) -> tuple[StoredSite, ...]:
    """With scales that the rule can express: the commonest stays, the others go into B."""
    if rule == "site" or not sites:
        return sites
    if rule == "none":
        return tuple(transforms.folded(s, 1.0) for s in sites)
    if rule == "one":
        r = max(s.r for s in sites)
        common = Counter(s.scale for s in sites).most_common(1)[0][0]
        return tuple(transforms.folded(transforms.ranked(s, r), common) for s in sites)
    alpha = Counter(s.scale * s.r for s in sites).most_common(1)[0][0]
    return tuple(transforms.folded(s, alpha / s.r) for s in sites)


# How the parts of a stack are called as linears of their own, in transformers 4's files: by the stack's parameter, its parts in their order.
EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def _apart(s: StoredSite) -> list[StoredSite]:
    """A stack as linears, one an expert and part; the site itself, if nobody calls its parts so (interleaved ones have no rows in a row)."""
    names = EXPERTS.get(s.parameter)
    if names is None or s.kind != "experts" or s.rows is not None or s.B.shape[-2] % len(names):
        return [s]
    experts = transforms.apart(s, [f"{s.path}.{e}" for e in range(len(s.A))])
    if len(names) == 1:
        return [replace(one, path=f"{one.path}.{names[0]}") for one in experts]
    half = s.B.shape[-2] // 2
    return [part for one in experts
            for part in transforms.parts(one, {f"{one.path}.{names[0]}": [range(half)], f"{one.path}.{names[1]}": [range(half, 2 * half)]})]  # fmt: skip


def _norm(s: StoredSite) -> float:
    return (
        s.scale
        * sum(product_norm(B, A) ** 2 for A, B in zip(*(t.reshape(-1, *t.shape[-2:]) for t in (s.A, s.B)), strict=True))
        ** 0.5
    )
