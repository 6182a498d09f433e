"""The product s P Q of a delta, in tiles and, within them, in strips.

In float64 it comes out the same to float32's last bit whatever the tile, the BLAS library and the machine, but for what lies on the very edge.

In float32, in half the time, its bits are to be those of one definition (`chain`) however a matrix is cut, transposed or fused, on disk or in
memory. So it is made of products of a few sizes, for which a BLAS library does one thing: it adds up p_ik q_kj over k, in order, by fused
multiply-adds. For other sizes, and at the edges of some, it does others. Where it is seen to do something else here, float64 is taken, as on GPUs.
With few ranks product and sum are one call, where that is seen to have the same bits: it takes 0.6 to 0.75 of the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .delta import Factors, concat_factors, product_norm
from .threads import thread_pool

TILE = 1 << 20  # elements: calling torch costs little beside the work on so many
GPU_TILE = 1 << 22  # there, what costs is the launch of a kernel
TALL, BROAD = (
    48,
    (1024, 2048, 4096),
)  # a product has so many columns, and a multiple of so many rows: of what a library's innermost loops do at once
LARGEST = TALL * BROAD[-1]  # elements of a product: what is at work on it lies in a core's own cache
FEW, THIN = 8, 16  # rows that are added to at a time, and for how many ranks at most: from 24 on strips take less
BETWEEN = 16  # elements from the end of one row of it to the next
DEEPEST = 128  # of its ranks: with 193, libraries have been seen to cut the sum over k

Room = Callable[..., Tensor]
"""(name, shape, dtype) -> memory."""


class Strip(NamedTuple):
    """A piece of P Q, of a size that the library multiplies as any other; where it is an edge, with zeros behind."""

    P: Tensor
    Q: Tensor
    edge: tuple[int, int] | None
    """How many of its rows and columns are not such zeros; None: all."""

    def product(self, room: Room, dtype: torch.dtype) -> Tensor:
        """P Q, in this dtype."""
        d = multiplied(self.P, self.Q, room)
        if self.edge is not None:
            d = d[: self.edge[0], : self.edge[1]]
        return d if d.dtype == dtype else room("d", d.shape, dtype).copy_(d)


class LowRankProduct(NamedTuple):
    """d = s P Q, in the dtype of the factors."""

    P: Tensor
    """(*stack, rows, R)"""
    Q: Tensor
    """(*stack, R, width)"""
    s: float = 1.0

    @property
    def norm(self) -> float:
        """|d|, Frobenius."""
        return abs(self.s) * product_norm(self.P, self.Q)

    @property
    def at_most(self) -> float:
        """No |d_ij| is larger."""
        return abs(self.s) * self.P.shape[-1] * float(self.P.abs().amax()) * float(self.Q.abs().amax())

    def whole(self) -> Tensor:
        """d itself."""
        return (self.P * self.s) @ self.Q

    def at(self, rows: slice) -> LowRankProduct:
        """Of some rows."""
        return LowRankProduct(self.P[rows], self.Q, self.s)

    def tiles(self) -> Iterator[slice]:
        """The rows of all its tiles."""
        return row_tiles(len(self.P), self.Q.shape[-1], self.P.device)

    def adds(self, s: float) -> bool:
        """Whether s P Q may be added in one call (`add`): fast, and with the bits of the product and the sum."""
        (rows, r), width = self.P.shape, self.Q.shape[1]
        return (
            r <= THIN
            and rows % FEW == 0
            and self.P.dtype == torch.float32
            and self.P.device.type == "cpu"
            and _adds(r, width, s)
        )

    def strips(self, *row_tiles: Tensor) -> Iterator[tuple[Strip, Sequence[Tensor]]]:
        """All of one tile, each with those of these matrices of its shape. (To split them at once takes less than a slice of each.)"""
        on_cpu, (rows, width) = self.P.device.type == "cpu", (self.P.shape[0], self.Q.shape[1])
        tall, broad = (TALL, BROAD) if on_cpu else (rows, (width,))
        for left in range(0, width, broad[-1]):
            Q = self.Q[:, left : left + broad[-1]]
            n, Q = Q.shape[1], pad_to_multiple(Q, 1, next(b for b in broad if b >= Q.shape[1]))
            step = LARGEST // Q.shape[1] if on_cpu else rows
            for P, *parts in zip(
                *(t.split(step) for t in (self.P, *(tile[:, left : left + n] for tile in row_tiles))), strict=True
            ):
                edge = (P.shape[0], n) if P.shape[0] % tall or n != Q.shape[1] else None
                yield Strip(pad_to_multiple(P, 0, tall) if edge else P, Q, edge), parts


def exact_product(parts: Sequence[Factors]) -> LowRankProduct:
    """The sum of the deltas, in float64."""
    return LowRankProduct(*concat_factors(parts))


def fast_product(parts: Sequence[Factors], dtype: torch.dtype) -> LowRankProduct:
    """The same for a weight of this dtype: in float32 where that does, else as it is."""
    s = float(parts[0].s)
    if dtype == torch.float64 or not _in_range(parts, s) or not chained():
        return exact_product(parts)
    # The first scale is taken out, which leaves a B of float32 as it is.
    P = [f.P.float() if float(f.s) == s else (f.P.double() * (float(f.s) / s)).float() for f in parts]
    return LowRankProduct(_beside(P, -1), _beside([f.Q.float() for f in parts], -2), s)


def _beside(factors: Sequence[Tensor], axis: int) -> Tensor:
    return (factors[0] if len(factors) == 1 else torch.cat(list(factors), axis)).contiguous()


def _in_range(parts: Sequence[Factors], s: float) -> bool:
    """Whether float32 does for the factors, and a CPU is to multiply them."""
    if parts[0].P.device.type != "cpu" or sum(f.P.shape[-1] for f in parts) > DEEPEST:
        return False
    sizes = [float(f.s) for f in parts] + [
        float(t.abs().amax()) * abs(float(f.s) / s) for f in parts for t in (f.P, f.Q) if s and t.numel()
    ]
    return s != 0 and all(x == 0 or 1e-18 < abs(x) < 1e18 for x in sizes)


def row_tiles(rows: int, width: int, device: torch.device, size: int | None = None) -> Iterator[slice]:
    """Whole rows of a matrix, as many as fit (on a CPU into this size), in whole blocks."""
    size, unit = (GPU_TILE, 1) if device.type != "cpu" else (size or TILE, TALL)
    step = max(unit, size // width // unit * unit)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def chained() -> bool:
    """Whether products are what they should be here: not, say, after torch.set_float32_matmul_precision("medium")."""
    return torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee") and _chained()  # type: ignore[attr-defined]


@functools.cache
def _chained() -> bool:
    """By products of all sizes, in some columns: at every place of a library's blocks, and the last ones."""
    sizes = [
        (rows, r, broad) for broad in BROAD for rows in range(TALL, LARGEST // broad + 1, TALL) for r in (4, 8, 17)
    ]
    found: list[bool] = []

    def one(rows: int, r: int, broad: int) -> None:
        g = torch.Generator().manual_seed(0)  # each its own: threads would take turns by chance
        P, Q = torch.rand(rows, r, generator=g), torch.rand(r, broad, generator=g)
        some = torch.cat([torch.arange(0, broad, 61), torch.arange(broad - 64, broad)])
        found.append(torch.equal(multiplied(P, Q, _new)[:, some], chain(P, Q[:, some])))

    with thread_pool() as each:  # in one thread, as it will be
        each(one, (*sizes, (TALL, DEEPEST, BROAD[0])))
    return all(found)


def add_product_by_rows(P: Tensor, Q: Tensor, s: float, out: Tensor, few: int = FEW, beta: int = 1) -> None:
    """out = beta out + s P Q, of a multiple of `few` rows, so many at a time in one call: a library takes less for few ranks than for all at once."""
    many = len(P) // few
    out.view(many, few, -1).baddbmm_(P.view(many, few, -1), Q.expand(many, *Q.shape), beta=beta, alpha=s)


@functools.cache
def _adds(r: int, width: int, s: float) -> bool:
    """Whether that has the bits of the product and the sum. (Where a library scales the factors instead, no s has but powers of two.)"""
    g = torch.Generator().manual_seed(0)
    P, Q, out = (torch.rand(shape, generator=g) for shape in ((TALL, r), (r, width), (TALL, width)))
    want = out.clone()
    for strip, (part,) in LowRankProduct(P, Q).strips(want):
        part.add_(strip.product(_new, out.dtype), alpha=s)
    add_product_by_rows(P, Q, s, out)
    return torch.equal(out, want)


def multiplied(P: Tensor, Q: Tensor, room: Room) -> Tensor:
    """P Q. Its rows lie no power of two apart, since they would be kept in the same few places of a cache: such products took 2.5 times as long."""
    rows, columns = P.shape[0], Q.shape[1]
    return torch.mm(P, Q, out=room("product", (rows, columns + BETWEEN), P.dtype)[:, :columns])


def _new(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def chain(P: Tensor, Q: Tensor) -> Tensor:
    """P Q of float32, by its definition: over k, in order, each product added exactly and the sum rounded."""
    total = torch.zeros(len(P), Q.shape[1])
    for p, q in zip(P.double().T, Q.double(), strict=True):
        total = (total + torch.outer(p, q)).float()
    return total


def pad_to_multiple(x: Tensor, axis: int, n: int) -> Tensor:
    """With zeros behind, up to the next multiple of n."""
    return pad(x, (0, 0) * (x.dim() - 1 - axis) + (0, -x.shape[axis] % n)) if x.shape[axis] % n else x
