"""read_pairs: the tensors of a file grouped by site, and what it reports about the others."""

from __future__ import annotations

import torch

from lorainject.files.formats.pairs import as_matrices, read_pairs
from lorainject.files.record import StoredSite, checked_sites

ENDINGS = {".lora_A.weight": "A", ".lora_down": "A", ".lora_B.weight": "B", ".lora_up": "B", ".m": "magnitude"}


def tensors(*keys: str) -> dict[str, torch.Tensor]:
    return {key: torch.full((1, 1), float(n)) for n, key in enumerate(keys)}


def test_tensors_are_grouped_by_site_in_the_order_of_the_file():
    """Every spelling of A and B is understood, and the other tensors of a site come under their roles."""
    file, problems = tensors("b.lora_down", "a.lora_A.weight", "b.lora_up", "b.m", "a.lora_B.weight"), []
    pairs = read_pairs(file, ENDINGS, problems)
    assert list(pairs) == ["b", "a"]
    assert pairs["b"].A is file["b.lora_down"]
    assert pairs["b"].B is file["b.lora_up"]
    assert pairs["b"].extras == {"magnitude": file["b.m"]}
    assert pairs["a"].extras == {}
    assert problems == []


def test_a_missing_half_is_reported_in_the_spelling_of_the_other():
    """All missing halves are reported at once, and such a site is left out."""
    problems = []
    pairs = read_pairs(tensors("a.lora_down", "b.lora_B.weight", "c.m", "d.lora_down", "d.lora_up"), ENDINGS, problems)
    assert list(pairs) == ["d"]
    assert problems == [
        "a.lora_up: missing",
        "b.lora_A.weight: missing",
        "c.lora_A.weight: missing",
        "c.lora_B.weight: missing",
    ]


def test_unexpected_keys_are_reported_with_a_reason():
    """Another method's tensor, a module that the format does not have, and any other key are told apart."""
    problems = []
    pairs = read_pairs(tensors("a.hada_w1_a", "norm.m", "step"), ENDINGS, problems, translate={"a": "model.a"}.get)
    assert pairs == {}
    assert problems == [
        "a.hada_w1_a: LoHa (products of two pairs), which is no pair of low-rank factors",
        "norm.m: unexpected, this format has no module of that name",
        f"step: unexpected, neither A nor B: the names in this format end in {', '.join(ENDINGS)}",
    ]


def test_translated_paths_and_the_rest():
    """Sites come under the translated path; with `rest`, other tensors are handed back and not reported."""
    problems, rest = [], {}
    file = tensors("a.lora_down", "a.lora_up", "head.weight")
    pairs = read_pairs(file, ENDINGS, problems, translate=lambda path: f"model.{path}", rest=rest)
    assert list(pairs) == ["model.a"]
    assert rest == {"head.weight": file["head.weight"]}
    assert problems == []


def test_factors_of_convolutions_become_matrices():
    """A (r, in, *kernel) and B (out, r, 1, 1) are flattened; what is no such pair is left for the check of shapes."""
    site = as_matrices(torch.zeros(2, 3, 5, 5), torch.zeros(4, 2, 1, 1))
    assert (site["kind"], site["shape"]) == ("conv", (4, 3, 5, 5))
    assert (site["A"].shape, site["B"].shape) == ((2, 75), (4, 2))
    A, B = torch.zeros(2, 3), torch.zeros(4, 2)
    assert as_matrices(A, B) == {"kind": "linear", "shape": (), "A": A, "B": B}
    assert as_matrices(A, B.view(4, 2, 1, 1))["B"].shape == (4, 2)
    A, B = torch.zeros(2, 3, 5), torch.zeros(2, 4, 3)  # these would pass for a stack of two experts
    problems = []
    assert checked_sites([StoredSite(path="a", alpha=1.0, **as_matrices(A, B))], problems) == []
    assert problems == ["a: A (2, 3, 5) with B (2, 4, 3) does not fit a weight of shape (2, 3, 5) and kind conv"]
