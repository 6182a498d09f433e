"""The delta of a piece on disk, whatever the layout there, compared with the dense delta placed element by element."""

from __future__ import annotations

import math

import pytest
import torch

from lorainject.checkpoint.byte_runs import cut_into_patches, locate_element
from lorainject.files.weight_map import StoredPiece
from lorainject.files.weight_map import StridedView as view
from lorainject.numerics.delta import Factors
from lorainject.numerics.tiled_matmul import exact_product

# Shape in memory, stacked, size of the tensor on disk, view on disk, view in memory; number and width of the patches.
CASES = {
    "as it is": ((6, 8), False, 48, view(0, (6, 8), (8, 1)), view(0, (6, 8), (8, 1)), 1, 8),
    "transposed": ((6, 8), False, 48, view(0, (6, 8), (1, 6)), view(0, (6, 8), (8, 1)), 1, 6),
    "one long axis": ((6, 8), False, 48, view(0, (48,), (1,)), view(0, (48,), (1,)), 1, 8),
    "a stack": ((3, 6, 8), True, 144, view(0, (3, 6, 8), (48, 8, 1)), view(0, (3, 6, 8), (48, 8, 1)), 3, 8),
    "a stack, transposed": ((3, 6, 8), True, 144, view(0, (3, 6, 8), (48, 1, 6)), view(0, (3, 6, 8), (48, 8, 1)), 3, 6),
    "an expert's second half": ((3, 6, 8), True, 24, view(0, (3, 8), (8, 1)), view(72, (3, 8), (8, 1)), 1, 8),
    "a convolution": (
        (4, 2, 3, 3), False, 72, view(0, (4, 2, 3, 3), (18, 9, 3, 1)), view(0, (4, 2, 3, 3), (18, 9, 3, 1)), 1, 18
    ),
    "a convolution, axes exchanged": (
        (4, 2, 3), False, 24, view(0, (4, 2, 3), (3, 12, 1)), view(0, (4, 2, 3), (6, 3, 1)), 2, 3
    ),
    "k of a fused qkv": ((6, 8), False, 144, view(48, (6, 8), (8, 1)), view(0, (6, 8), (8, 1)), 1, 8),
    "columns of a wider one": ((6, 8), False, 144, view(8, (6, 8), (24, 1)), view(0, (6, 8), (8, 1)), 1, 8),
    "interleaved rows": ((6, 8), False, 48, view(0, (2, 3, 8), (24, 8, 1)), view(0, (2, 3, 8), (8, 16, 1)), 1, 8),
    "a single column": ((6, 1), False, 6, view(0, (6, 1), (1, 1)), view(0, (6, 1), (1, 1)), 1, 6),
    "a single row": ((1, 8), False, 8, view(0, (1, 8), (8, 1)), view(0, (1, 8), (8, 1)), 1, 8),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_patches_give_the_dense_delta(case):
    """Every element of the piece, and no other, gets its own delta, in as few patches as possible."""
    shape, stacked, numel, disk, memory, count, width = CASES[case]
    torch.manual_seed(0)
    stack, rows, columns = shape[:stacked], shape[stacked], math.prod(shape[stacked + 1 :])
    deltas = tuple(
        Factors(torch.randn(*stack, rows, r), torch.randn(*stack, r, columns), torch.tensor(s))
        for r, s in ((2, 1.5), (3, -0.5))
    )
    dense = sum((f.P.double() * f.s.double()) @ f.Q.double() for f in deltas).reshape(-1)
    expected, actual = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    in_memory = dense.as_strided(memory.sizes, memory.strides, memory.offset)
    expected.as_strided(disk.sizes, disk.strides, disk.offset).copy_(in_memory)
    patches = list(cut_into_patches(StoredPiece("key", disk, memory), shape, stacked, deltas))
    for patch in patches:
        P, Q, _ = exact_product(patch.factors())
        for start, values in zip(patch.runs.starts, P @ Q, strict=True):
            actual[start : start + patch.runs.width] += values
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12)
    assert [patch.runs.width for patch in patches] == [width] * count


@pytest.mark.parametrize("case", CASES)
def test_locate_element(case):
    """Each element in memory is located at the element of the same number in the view on disk."""
    _, _, numel, disk, memory, _, _ = CASES[case]
    on_disk = torch.arange(numel).as_strided(disk.sizes, disk.strides, disk.offset).reshape(-1)
    in_memory = torch.arange(1000).as_strided(memory.sizes, memory.strides, memory.offset).reshape(-1)
    pieces = [StoredPiece("key", disk, memory)]
    assert [locate_element(pieces, int(i)) for i in in_memory] == [("key", int(i)) for i in on_disk]
