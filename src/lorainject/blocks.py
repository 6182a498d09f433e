"""The product s P Q of a delta, in tiles and, within them, in strips.

In float64 it comes out the same to float32's last bit whatever the tile, the BLAS library and the machine, but for what lies on the very edge.

In float32, in half the time, its bits are to be those of one definition (`chain`) however a matrix is cut, transposed or fused, on disk or in
memory. So it is made of products of a few sizes, for which a BLAS library does one thing: it adds up p_ik q_kj over k, in order, by fused
multiply-adds. For other sizes, and at the edges of some, it does others. Where it is seen to do something else here, float64 is taken, as on GPUs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .lowrank import Factors, joined, norm
from .workers import workers

TILE = 1 << 20  # elements: calling torch costs little beside the work on so many
GPU_TILE = 1 << 22  # there, what costs is the launch of a kernel
TALL, BROAD = 48, (1024, 2048, 4096)  # a product has so many columns, and a multiple of so many rows: of what a library's innermost loops do at once
LARGEST = TALL * BROAD[-1]  # elements of a product: what is at work on it lies in a core's own cache
DEEPEST = 128  # of its ranks: with 193, libraries have been seen to cut the sum over k

Room = Callable[..., Tensor]
"""(name, shape, dtype) -> memory."""


class Strip(NamedTuple):
    """A piece of P Q, of a size that the library multiplies as any other; where it is an edge, with zeros behind."""

    at: tuple[slice, slice]
    """Rows and columns."""
    P: Tensor
    Q: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Without the zeros."""
        rows, columns = self.at
        return rows.stop - rows.start, columns.stop - columns.start

    @property
    def is_edge(self) -> bool:
        """Whether there are such."""
        return self.shape != (len(self.P), self.Q.shape[1])

    def product(self, room: Room, dtype: torch.dtype) -> Tensor:
        """P Q, in this dtype."""
        rows, columns = self.shape
        d = torch.mm(self.P, self.Q, out=room("product", (len(self.P), self.Q.shape[1]), self.P.dtype))[:rows, :columns]
        return d if d.dtype == dtype else room("d", d.shape, dtype).copy_(d)


class Product(NamedTuple):
    """d = s P Q, in the dtype of the factors."""

    P: Tensor
    """(*stack, rows, R)"""
    Q: Tensor
    """(*stack, R, width)"""
    s: float = 1.0

    @property
    def norm(self) -> float:
        """|d|, Frobenius."""
        return abs(self.s) * norm(self.P, self.Q)

    @property
    def at_most(self) -> float:
        """No |d_ij| is larger, since |d_ij| <= |P_i| |Q_j|."""
        return abs(self.s) * float(self.P.square().sum(-1).amax() * self.Q.square().sum(-2).amax()) ** 0.5

    def whole(self) -> Tensor:
        """d itself."""
        return (self.P * self.s) @ self.Q

    def at(self, rows: slice) -> Product:
        """Of some rows."""
        return Product(self.P[rows], self.Q, self.s)

    def tiles(self) -> Iterator[slice]:
        """The rows of all its tiles."""
        return tiles(len(self.P), self.Q.shape[-1], self.P.device)

    def strips(self) -> Iterator[Strip]:
        """All of one tile."""
        rows, width = len(self.P), self.Q.shape[-1]
        on_cpu = self.P.device.type == "cpu"
        tall, broad = (TALL, BROAD) if on_cpu else (rows, (width,))
        for left in range(0, width, broad[-1]):
            Q = self.Q[:, left : left + broad[-1]]
            n, Q = Q.shape[1], padded(Q, 1, next(b for b in broad if b >= Q.shape[1]))
            step = LARGEST // Q.shape[1] if on_cpu else rows
            for top in range(0, rows, step):
                yield Strip((slice(top, min(top + step, rows)), slice(left, left + n)), padded(self.P[top : top + step], 0, tall), Q)

    @property
    def adds_as_it_is_formed(self) -> bool:
        """Whether the library may add it to a matrix of float32 at once: when it multiplies with s is its own affair, but a power of two rounds
        nothing."""
        exact = abs(self.s) >= 1 and math.frexp(abs(self.s))[0] == 0.5
        return exact and self.P.dtype == torch.float32 and self.P.device.type == "cpu" and _added_last()


def double(parts: Sequence[Factors]) -> Product:
    """The sum of the deltas, in float64."""
    return Product(*joined(parts))


def quick(parts: Sequence[Factors], dtype: torch.dtype) -> Product:
    """The same for a weight of this dtype: in float32 where that does, else as it is."""
    s = float(parts[0].s)
    if dtype == torch.float64 or not _in_range(parts, s) or not chained():
        return double(parts)
    # The first scale is taken out, which leaves a B of float32 as it is.
    P = [f.P.float() if float(f.s) == s else (f.P.double() * (float(f.s) / s)).float() for f in parts]
    return Product(_beside(P, -1), _beside([f.Q.float() for f in parts], -2), s)


def _beside(factors: Sequence[Tensor], axis: int) -> Tensor:
    return (factors[0] if len(factors) == 1 else torch.cat(list(factors), axis)).contiguous()


def _in_range(parts: Sequence[Factors], s: float) -> bool:
    """Whether float32 does for the factors, and a CPU is to multiply them."""
    if parts[0].P.device.type != "cpu" or sum(f.P.shape[-1] for f in parts) > DEEPEST:
        return False
    sizes = [float(f.s) for f in parts] + [float(t.abs().amax()) * abs(float(f.s) / s) for f in parts for t in (f.P, f.Q) if s and t.numel()]
    return s != 0 and all(x == 0 or 1e-18 < abs(x) < 1e18 for x in sizes)


def tiles(rows: int, width: int, device: torch.device, size: int | None = None) -> Iterator[slice]:
    """Whole rows of a matrix, as many as fit (on a CPU into this size), in whole blocks."""
    size, unit = (GPU_TILE, 1) if device.type != "cpu" else (size or TILE, TALL)
    step = max(unit, size // width // unit * unit)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def chained() -> bool:
    """Whether products are what they should be here: not, say, after torch.set_float32_matmul_precision("medium")."""
    return torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee") and _chained()  # type: ignore[attr-defined]


@functools.cache
def _chained() -> bool:
    return _hold(lambda P, Q, some: torch.equal(torch.mm(P, Q)[:, some], chain(P, Q[:, some])))


@functools.cache
def _added_last() -> bool:
    """Whether a product that is added to a part of a weight is a chain by itself first, and the sum is rounded once."""

    def is_added_last(P: Tensor, Q: Tensor, some: Tensor) -> bool:
        w = torch.linspace(-1, 1, len(P) * Q.shape[1] * 2).view(len(P), -1)[:, : Q.shape[1]]
        expected = torch.add(w[:, some], chain(P, Q[:, some]), alpha=2)
        return torch.equal(w.addmm_(P, Q, alpha=2)[:, some], expected)

    return _hold(is_added_last)


def _hold(test: Callable[[Tensor, Tensor, Tensor], bool]) -> bool:
    """Whether it holds for products of all sizes, in some columns: at every place of a library's blocks, and the last ones."""
    sizes = [(rows, r, broad) for broad in BROAD for rows in range(TALL, LARGEST // broad + 1, TALL) for r in (4, 8, 17)]
    found: list[bool] = []

    def one(rows: int, r: int, broad: int) -> None:
        g = torch.Generator().manual_seed(0)  # each its own: threads would take turns by chance
        P, Q = torch.rand(rows, r, generator=g), torch.rand(r, broad, generator=g)
        found.append(test(P, Q, torch.cat([torch.arange(0, broad, 61), torch.arange(broad - 64, broad)])))

    with workers() as each:  # in one thread, as it will be
        each(one, (*sizes, (TALL, DEEPEST, BROAD[0])))
    return all(found)


def chain(P: Tensor, Q: Tensor) -> Tensor:
    """P Q of float32, by its definition: over k, in order, each product added exactly and the sum rounded."""
    total = torch.zeros(len(P), Q.shape[1])
    for p, q in zip(P.double().T, Q.double(), strict=True):
        total = (total + torch.outer(p, q)).float()
    return total


def padded(x: Tensor, axis: int, n: int) -> Tensor:
    """With zeros behind, up to the next multiple of n."""
    return pad(x, (0, 0) * (x.dim() - 1 - axis) + (0, -x.shape[axis] % n)) if x.shape[axis] % n else x
