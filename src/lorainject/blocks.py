"""Products in float32 whose bits do not depend on how a matrix is cut, transposed or fused, on disk or in memory.

All of it is made of products of one size, for which a BLAS library does one thing: it adds up p_ik q_kj over k, in order, by fused multiply-adds
(`chain`). For other sizes, and at the edges of some, it does others. Where it is seen to do something else here, float64 is taken, as on GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .workers import workers

BLOCK = 48, 1024  # rows and columns: multiples of what the innermost loops of a library do at once
STRIP = 4 * BLOCK[1]  # columns that are put together
DEEPEST = 256  # of its ranks: with more, the sum over k is cut


class Product(NamedTuple):
    """d = s P Q."""

    P: Tensor
    """(*stack, rows, R)"""
    Q: Tensor
    """(*stack, R, width)"""
    s: float = 1.0


def quick(P: Tensor, Q: Tensor, dtype: torch.dtype, s: float) -> Product:
    """P Q of float64 as Desk.sum and Desk.add want it for a weight of this dtype: in float32 where that does, else as it is.

    `s` is a scale that is in P; taken out, it leaves a B of float32 as it was.
    """
    if s:
        largest = [float(f.abs().amax()) if f.numel() else 0.0 for f in (P / s, Q)]
        in_range = 1e-18 < abs(s) < 1e18 and all(x == 0 or 1e-18 < x < 1e18 for x in largest)
        does = dtype != torch.float64 and P.device.type == "cpu" and Q.shape[-2] <= DEEPEST
        if in_range and does and chained():
            return Product((P / s).float(), Q.float(), s)
    return Product(P, Q)


def chained() -> bool:
    """Whether blocks are what they should be here: not, say, after torch.set_float32_matmul_precision("medium")."""
    return torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee") and _chained()  # type: ignore[attr-defined]


@functools.cache
def _chained() -> bool:
    P, Q = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) for shape in ((BLOCK[0], 8), (8, BLOCK[1])))
    found: list[Tensor] = []
    with workers() as each:  # in one thread, as it will be
        each(lambda: found.append(torch.mm(P, Q)), [()])
    return torch.equal(found[0], chain(P, Q))


def chain(P: Tensor, Q: Tensor) -> Tensor:
    """P Q of float32, by its definition: over k, in order, each product added exactly and the sum rounded."""
    total = torch.zeros(len(P), Q.shape[1])
    for p, q in zip(P.double().T, Q.double(), strict=True):
        total = (total + torch.outer(p, q)).float()
    return total


def strips(P: Tensor, Q: Tensor, room: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
    """P Q piece by piece, in blocks with zeros around: where it is, the piece, and room for as much again. `room` is (2, rows of a block, STRIP)."""
    height, breadth = BLOCK
    blocks = room[0].split(breadth, 1)
    for left in range(0, Q.shape[1], STRIP):
        strip = Q[:, left : left + STRIP]
        parts = [padded(part, 1, breadth) for part in strip.split(breadth, 1)]
        for top in range(0, len(P), height):
            rows = P[top : top + height]
            whole = padded(rows, 0, height)
            for part, block in zip(parts, blocks, strict=False):
                torch.mm(whole, part, out=block)
            d, more = room[:, : len(rows), : strip.shape[1]]
            yield (slice(top, top + height), slice(left, left + STRIP)), d, more


def padded(x: Tensor, axis: int, n: int) -> Tensor:
    """With zeros behind, up to the next multiple of n."""
    return pad(x, (0, 0) * (x.dim() - 1 - axis) + (0, -x.shape[axis] % n)) if x.shape[axis] % n else x
