"""A delta restricted to a place on disk, whatever the layout there, against the dense delta put there element by element."""

from __future__ import annotations

import math

import pytest
import torch

from lorainject.checkpoint.byte_runs import find, patches
from lorainject.files.weight_map import StoredPiece, StridedView
from lorainject.numerics.delta import Factors
from lorainject.numerics.tiled_matmul import exact_product

CASES = {  # shape in memory, stacked, elements on disk, disk view, memory view; how many patches, and their width
    "as it is": ((6, 8), False, 48, StridedView(0, (6, 8), (8, 1)), StridedView(0, (6, 8), (8, 1)), 1, 8),
    "transposed": ((6, 8), False, 48, StridedView(0, (6, 8), (1, 6)), StridedView(0, (6, 8), (8, 1)), 1, 6),
    "one long axis": ((6, 8), False, 48, StridedView(0, (48,), (1,)), StridedView(0, (48,), (1,)), 1, 8),
    "a stack": (
        (3, 6, 8),
        True,
        144,
        StridedView(0, (3, 6, 8), (48, 8, 1)),
        StridedView(0, (3, 6, 8), (48, 8, 1)),
        3,
        8,
    ),
    "a stack of transposed": (
        (3, 6, 8),
        True,
        144,
        StridedView(0, (3, 6, 8), (48, 1, 6)),
        StridedView(0, (3, 6, 8), (48, 8, 1)),
        3,
        6,
    ),
    "an expert's second half": (
        (3, 6, 8),
        True,
        24,
        StridedView(0, (3, 8), (8, 1)),
        StridedView(72, (3, 8), (8, 1)),
        1,
        8,
    ),
    "a convolution": (
        (4, 2, 3, 3),
        False,
        72,
        StridedView(0, (4, 2, 3, 3), (18, 9, 3, 1)),
        StridedView(0, (4, 2, 3, 3), (18, 9, 3, 1)),
        1,
        18,
    ),
    "a convolution, axes exchanged": (
        (4, 2, 3),
        False,
        24,
        StridedView(0, (4, 2, 3), (3, 12, 1)),
        StridedView(0, (4, 2, 3), (6, 3, 1)),
        2,
        3,
    ),
    "k of a fused qkv": ((6, 8), False, 144, StridedView(48, (6, 8), (8, 1)), StridedView(0, (6, 8), (8, 1)), 1, 8),
    "columns of a wider one": (
        (6, 8),
        False,
        144,
        StridedView(8, (6, 8), (24, 1)),
        StridedView(0, (6, 8), (8, 1)),
        1,
        8,
    ),
    "interleaved rows": (
        (6, 8),
        False,
        48,
        StridedView(0, (2, 3, 8), (24, 8, 1)),
        StridedView(0, (2, 3, 8), (8, 16, 1)),
        1,
        8,
    ),
    "a single column": ((6, 1), False, 6, StridedView(0, (6, 1), (1, 1)), StridedView(0, (6, 1), (1, 1)), 1, 6),
    "a single row": ((1, 8), False, 8, StridedView(0, (1, 8), (8, 1)), StridedView(0, (1, 8), (8, 1)), 1, 8),
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_dense_delta(case):
    """Every element of the place, and no other, gets what is its own; in as few patches as can be."""
    shape, stacked, numel, disk, memory, count, width = CASES[case]
    torch.manual_seed(0)
    stack, rows, columns = shape[:stacked], shape[stacked], math.prod(shape[stacked + 1 :])
    parts = tuple(
        Factors(torch.randn(*stack, rows, r), torch.randn(*stack, r, columns), torch.tensor(s))
        for r, s in ((2, 1.5), (3, -0.5))
    )
    delta = sum((f.P.double() * f.s.double()) @ f.Q.double() for f in parts).reshape(-1)
    want, got = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    want.as_strided(disk.sizes, disk.strides, disk.offset).copy_(
        delta.as_strided(memory.sizes, memory.strides, memory.offset)
    )
    found = list(patches(StoredPiece("key", disk, memory), shape, stacked, parts))
    for patch in found:
        P, Q, _ = exact_product(patch.factors())
        for start, values in zip(patch.starts, P @ Q, strict=True):
            got[start : start + patch.width] += values
    assert torch.allclose(got, want, rtol=0, atol=1e-12)
    assert [p.width for p in found] == [width] * count


@pytest.mark.parametrize("case", CASES)
def test_where_an_element_is(case):
    """`find` leads each element in memory to its own on disk."""
    _, _, numel, disk, memory, _, _ = CASES[case]
    on_disk = torch.arange(numel).as_strided(disk.sizes, disk.strides, disk.offset).reshape(-1)
    in_memory = torch.arange(1000).as_strided(memory.sizes, memory.strides, memory.offset).reshape(-1)
    assert [find([StoredPiece("key", disk, memory)], int(i)) for i in in_memory] == [("key", int(i)) for i in on_disk]
