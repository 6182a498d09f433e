"""Find the pairs A and B in a file: the step that nearly every reader begins with.

A format names its tensors <module><ending>. Its reader states the endings in a table, by the role that each has:

    ENDINGS = {".lora_a.weight": "A", ".lora_b.weight": "B", ".magnitude": "magnitude"}
    pairs = read_pairs(source.tensors, ENDINGS, problems)      # {module: Pair(A=..., B=..., extras={"magnitude": ...})}

What is missing or unexpected goes into `problems`, in the same words for every format. Whether the shapes of A and B
fit each other is checked later, by `record.checked_sites`, when the reader has brought them into the record's
orientation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..record import Problem

# Parts of the tensor names that methods other than LoRA use.
OTHER_METHODS: dict[str, tuple[str, ...]] = {
    "LoHa (products of two pairs)": (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2"),
    "LoKr (Kronecker products)": (".lokr_w1", ".lokr_w2", ".lokr_t2"),
    "OFT (rotations)": (".oft_blocks", ".oft_diag", ".oft_R", ".rescale"),
    "IA3 (rescaled activations)": (".on_input", ".ia3_l"),
    "GLoRA": (".a1.weight", ".b1.weight", ".a2.weight", ".b2.weight"),
    "a full difference, of full rank": (".diff", ".diff_b"),
    "trained norms": (".w_norm", ".b_norm"),
    "VeRA (shared random matrices)": (".vera_lambda", "vera_A", "vera_B"),
    "AdaLoRA": (".lora_E",),
    "cloneofsimo's numbered layers, whose modules the file does not name": (":up", ":down"),
}


METHOD_PATTERNS = {
    method: re.compile(rf"({'|'.join(map(re.escape, marks))})(?![a-zA-Z0-9])")
    for method, marks in OTHER_METHODS.items()
}  # a mark ends where a word does: .diffusion_model is no .diff
WITHOUT_BUNDLED = "save_file({k: t for k, t in load_file(path).items() if not k.startswith('bundle_emb.')}, new_path)"
REMOVE_ONE = "remove one of the two from the file"
BUNDLED = "bundle_emb."  # kohya's and A1111's: an embedding of textual inversion in the same file


def other_method(key: str) -> str | None:
    """Return the method other than LoRA that a tensor of this name belongs to, or None."""
    return next((method for method, pattern in METHOD_PATTERNS.items() if pattern.search(key)), None)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The tensors that a file holds for one site, as they are stored there."""

    A: Tensor
    B: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    """The other tensors of the site, by role."""


def read_pairs(
    tensors: Mapping[str, Tensor],
    endings: Mapping[str, str],
    problems: list[str],
    *,
    translate: Callable[[str], str | None] = lambda path: path,
    rest: dict[str, Tensor] | None = None,
) -> dict[str, Pair]:
    """Group the tensors of a file by site.

    Args:
        tensors: The file's tensors by key.
        endings: The role of a key by its ending; the first ending that fits counts. The roles "A" and "B" are needed
            at each site, all others are optional. A format with several spellings lists as many endings for A as for
            B, in the same order.
        problems: Receives one line per missing half, per unexpected key, and per tensor that is there twice.
        translate: Returns the path of a site for the part of a key in front of its ending, or None if the format has
            no such module.
        rest: If given, receives the tensors that belong to no site, instead of one line each in `problems`.

    Returns:
        The complete pairs by the path of their site, in the order of the file.
    """
    keys: dict[str, dict[str, str]] = {}  # {path: {role: key}}
    for key in tensors:
        ending = _ending(key, endings)
        path = translate(key.removesuffix(ending)) if ending else None
        if path is not None:
            roles, role = keys.setdefault(path, {}), endings[ending]
            if role in roles:
                problems.append(twice(roles[role], key))
            roles[role] = key
        elif rest is not None:
            rest[key] = tensors[key]
        else:
            problems.append(unexpected(key, endings))
    pairs = {}
    for path, roles in keys.items():
        if missing := [_missing_key(roles, role, endings) for role in "AB" if role not in roles]:
            problems += [f"{key}: missing" for key in missing]
        else:
            extras = {role: tensors[key] for role, key in roles.items() if role not in ("A", "B")}
            pairs[path] = Pair(A=tensors[roles["A"]], B=tensors[roles["B"]], extras=extras)
    return pairs


def renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str], problems: list[str]) -> dict[str, Tensor]:
    """Return the tensors under other keys. Two keys that become one are reported, because readers would differ."""
    old: dict[str, str] = {}
    for key in tensors:
        if old.setdefault(rename(key), key) != key:
            problems.append(twice(old[rename(key)], key))
    return {new: tensors[key] for new, key in old.items()}


def rank_problems(name: str, B: Tensor, stated: Any) -> list[str]:
    """Return a problem if a config states another rank than B (out, r) has."""
    if type(stated) is not int or B.ndim < 2 or B.shape[1] == stated:
        return []
    return [f"{name}: B has the rank {B.shape[1]}, but the config says {stated}"]


def unexpected(key: str, endings: Mapping[str, str]) -> str:
    """Return the line that reports a key which belongs to no site."""
    if key.startswith(BUNDLED):
        line = f"{key}: an embedding (textual inversion) is bundled with the adapter"
        return Problem(line, "write the file without it: " + WITHOUT_BUNDLED)
    if method := other_method(key):
        line = f"{key}: {method}, which is no pair of low-rank factors"
        return Problem(line, "merge what is not plain LoRA into its base with the library that trained it")
    if _ending(key, endings):
        return f"{key}: unexpected, this format has no module of that name"
    return (
        f"{key}: unexpected, neither A nor B{': the names in this format end in ' * bool(endings)}{', '.join(endings)}"
    )


def twice(first: str, second: str) -> str:
    """Return the line that reports two keys for one tensor: readers would differ in which of them they take."""
    return Problem(f"{second}: is the same tensor as {first}, under another name", REMOVE_ONE)


def _ending(key: str, endings: Mapping[str, str]) -> str:
    return next((ending for ending in endings if key.endswith(ending)), "")


def _missing_key(roles: Mapping[str, str], role: str, endings: Mapping[str, str]) -> str:
    """Return the key that a missing A or B would have, in the spelling of the half that the file has."""
    spellings = {half: [ending for ending, other in endings.items() if other == half] for half in "AB"}
    partner = "B" if role == "A" else "A"
    key = roles.get(partner) or next(iter(roles.values()))
    ending = _ending(key, endings)
    n = spellings[partner].index(ending) if partner in roles else 0
    return key.removesuffix(ending) + spellings[role][n]


def as_matrices(A: Tensor, B: Tensor) -> dict[str, Any]:
    """Return the fields `kind`, `shape`, `A` and `B` of a StoredSite for the factors of a linear or a convolution.

    A convolution has A (r, in, *kernel) and B (out, r, *ones), which are flattened to (r, in * kernel) and (out, r).
    The B of a linear may have axes of length 1 too. If B has any other shape, nothing is flattened, and `checked_sites`
    reports that A and B do not fit the weight.
    """
    shape = (*B.shape[:1], *A.shape[1:]) if A.ndim > 2 else ()
    if B.ndim >= 2 and B.shape[2:].numel() == 1:
        A, B = A.flatten(1) if shape else A, B.flatten(1)
    return {"kind": "conv" if shape else "linear", "shape": shape, "A": A, "B": B}
