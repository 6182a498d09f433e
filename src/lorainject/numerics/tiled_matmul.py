"""The product s P Q of large low-rank factors: row tiles, strips within a tile, and the fast ways to multiply them.

    d = s P Q        P: (rows, R)        Q: (R, width)        R: the sum of the ranks of all adapters that are merged

`exact_product` multiplies in float64. Rounded to float32, the result has the same bits whatever the tile, the BLAS
library and the machine, except for values that lie within float64's error of the middle between two float32 numbers.
It is what merge uses when the merge can be undone.

`fast_product` multiplies in float32, in half the time. Its bits, too, must not depend on how a matrix is cut,
transposed or fused, on disk or in memory, so they are given a definition (`fma_chain`): d_ij adds up p_ik q_kj over k,
in order, by fused multiply-adds. BLAS libraries do that for some sizes only, which leads to the surprising part of
this module:

**Strips of fixed sizes.** A float32 product is cut into strips of 48 rows (or a multiple) and 1024, 2048 or 4096
columns, with zeros appended at the edges. These are multiples of what the innermost loops of the common libraries
process at once, so a library treats every element alike. What it buys: float32 at all, hence half of float64's time.
What it costs: one call per strip, and the zeros. When it applies: on CPUs, up to MAX_CHAIN_RANK ranks (with 193,
libraries cut the sum over k), for factors within float32's range, and only if a trial, run once per process, finds the
bits of `fma_chain` (`has_fma_chain`). Otherwise, and always on GPUs, `fast_product` is the exact product.

**Padded rows.** The rows of a product lie `width + ROW_PADDING` elements apart. Rows that are a power of two apart
compete for the same few places of a cache, and such products took 2.5 times as long. The padding costs 64 bytes per
row of a strip.
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

TILE = 1 << 20  # elements per tile on a CPU: a call of torch costs little compared with the work on so many
GPU_TILE = 1 << 22  # elements per tile on a GPU, where the cost is the launch of a kernel
STRIP_ROWS, STRIP_COLUMNS = 48, (1024, 2048, 4096)  # a strip has a multiple of so many rows, and one of these widths
STRIP_ELEMENTS = STRIP_ROWS * STRIP_COLUMNS[-1]  # the most elements of a strip: it fits into a core's own cache
ROW_PADDING = 16  # elements between the end of a product's row and the next row
MAX_CHAIN_RANK = 128  # the most ranks for a product in float32

Allocate = Callable[..., Tensor]
"""(name, shape, dtype) -> an uninitialized tensor, which may be overwritten when this name is asked for again."""


class Strip(NamedTuple):
    """A piece of P Q of one of the sizes above, with zeros appended where it lies at the edge of the matrix."""

    P: Tensor
    """Shape (rows, R)."""
    Q: Tensor
    """Shape (R, columns)."""
    edge: tuple[int, int] | None
    """How many rows and columns belong to the matrix; None if all of them do."""

    def product(self, allocate: Allocate) -> Tensor:
        """Return P Q without the appended zeros."""
        d = padded_matmul(self.P, self.Q, allocate)
        return d if self.edge is None else d[: self.edge[0], : self.edge[1]]


class LowRankProduct(NamedTuple):
    """The delta d = s P Q of a matrix, or of a stack of matrices, not yet multiplied.

    The dtype of P and Q, float32 or float64, is the one that they are multiplied in. `exact_product` and
    `fast_product` make one from the factors of several adapters. Only `dense` and `norm` accept a stack.
    """

    P: Tensor
    """Shape (*stack, rows, R)."""
    Q: Tensor
    """Shape (*stack, R, width)."""
    s: float = 1.0

    @property
    def norm(self) -> float:
        """The Frobenius norm of d."""
        return abs(self.s) * product_norm(self.P, self.Q)

    @property
    def max_abs_bound(self) -> float:
        """An upper bound of all |d_ij|."""
        return abs(self.s) * self.P.shape[-1] * float(self.P.abs().amax()) * float(self.Q.abs().amax())

    def dense(self) -> Tensor:
        """Return d itself, shape (*stack, rows, width)."""
        return (self.P * self.s) @ self.Q

    def select_rows(self, rows: slice) -> LowRankProduct:
        """Return the product for some rows of the matrix."""
        return LowRankProduct(self.P[rows], self.Q, self.s)

    def tiles(self) -> Iterator[slice]:
        """Yield the rows of each tile of the matrix."""
        return row_tiles(len(self.P), self.Q.shape[-1], self.P.device)

    def strips(self, *matrices: Tensor) -> Iterator[tuple[Strip, Sequence[Tensor]]]:
        """Yield the strips of one tile, each with the parts of these matrices (rows, width) that it covers."""
        on_cpu, (rows, width) = self.P.device.type == "cpu", (self.P.shape[0], self.Q.shape[1])
        strip_rows, strip_columns = (STRIP_ROWS, STRIP_COLUMNS) if on_cpu else (rows, (width,))
        for left in range(0, width, strip_columns[-1]):
            Q = self.Q[:, left : left + strip_columns[-1]]
            n = Q.shape[1]
            Q = pad_to_multiple(Q, 1, next(size for size in strip_columns if size >= n))
            step = STRIP_ELEMENTS // Q.shape[1] if on_cpu else rows
            columns = (self.P, *(matrix[:, left : left + n] for matrix in matrices))
            for P, *parts in zip(
                *(t.split(step) for t in columns), strict=True
            ):  # split is faster than one slice per strip
                edge = (P.shape[0], n) if P.shape[0] % strip_rows or n != Q.shape[1] else None
                yield Strip(pad_to_multiple(P, 0, strip_rows) if edge else P, Q, edge), parts


def exact_product(parts: Sequence[Factors]) -> LowRankProduct:
    """Return the sum of the deltas as one product in float64."""
    return LowRankProduct(*concat_factors(parts))


def fast_product(parts: Sequence[Factors], dtype: torch.dtype) -> LowRankProduct:
    """Return the sum of the deltas for a weight of this dtype, as one product in float32 where that is exact enough.

    It is the exact product for float64 weights, on GPUs, for too many ranks, for factors beyond float32's range, and
    where the BLAS library does not compute `fma_chain`.
    """
    s = float(parts[0].s)
    if dtype == torch.float64 or not _fits_float32(parts, s) or not has_fma_chain():
        return exact_product(parts)
    # The first scale stays outside, so that a single adapter's B in float32 is used as it is.
    P = [f.P.float() if float(f.s) == s else (f.P.double() * (float(f.s) / s)).float() for f in parts]
    return LowRankProduct(_concat(P, -1), _concat([f.Q.float() for f in parts], -2), s)


def _concat(factors: list[Tensor], axis: int) -> Tensor:
    return (factors[0] if len(factors) == 1 else torch.cat(factors, axis)).contiguous()


def _fits_float32(parts: Sequence[Factors], s: float) -> bool:
    """True if the factors, relative to the scale s, lie on a CPU and within float32's range, with few enough ranks."""
    if s == 0 or parts[0].P.device.type != "cpu" or sum(f.P.shape[-1] for f in parts) > MAX_CHAIN_RANK:
        return False
    sizes = [float(f.s) for f in parts]
    sizes += [float(t.abs().amax()) * abs(float(f.s) / s) for f in parts for t in (f.P, f.Q) if t.numel()]
    return all(x == 0 or 1e-18 < abs(x) < 1e18 for x in sizes)


def row_tiles(rows: int, width: int, device: torch.device, size: int | None = None) -> Iterator[slice]:
    """Yield slices of rows that cut a matrix into tiles.

    Args:
        rows: Rows of the matrix.
        width: Elements per row.
        device: Where the matrix lies; a tile on a GPU has up to GPU_TILE elements.
        size: Elements per tile on a CPU (default: TILE). The number of rows is a multiple of STRIP_ROWS.
    """
    size, unit = (GPU_TILE, 1) if device.type != "cpu" else (size or TILE, STRIP_ROWS)
    step = max(unit, size // width // unit * unit)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def has_fma_chain() -> bool:
    """True if torch's float32 products of the strips' sizes have the bits of `fma_chain`.

    They have not after torch.set_float32_matmul_precision("medium") on a processor with bfloat16 units, for example.
    """
    precision: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return precision in ("none", "ieee") and _strips_are_fma_chains()


@functools.cache
def _strips_are_fma_chains() -> bool:
    """Try all sizes of strips; compare some columns, at every position within a library's blocks, and the last ones."""
    sizes = [
        (rows, r, columns)
        for columns in STRIP_COLUMNS
        for rows in range(STRIP_ROWS, STRIP_ELEMENTS // columns + 1, STRIP_ROWS)
        for r in (4, 8, 17)
    ]
    equal: list[bool] = []

    def compare(rows: int, r: int, columns: int) -> None:
        g = torch.Generator().manual_seed(0)  # not shared: the order of the threads must not decide the numbers
        P, Q = torch.rand(rows, r, generator=g), torch.rand(r, columns, generator=g)
        some = torch.cat([torch.arange(0, columns, 61), torch.arange(columns - 64, columns)])
        equal.append(torch.equal(padded_matmul(P, Q, _allocate)[:, some], fma_chain(P, Q[:, some])))

    with thread_pool() as for_each:  # one thread of torch's per product, as in a merge
        for_each(compare, (*sizes, (STRIP_ROWS, MAX_CHAIN_RANK, STRIP_COLUMNS[0])))
    return all(equal)


def padded_matmul(P: Tensor, Q: Tensor, allocate: Allocate) -> Tensor:
    """Return P Q, shape (rows, columns), with rows that lie `columns + ROW_PADDING` elements apart."""
    rows, columns = P.shape[0], Q.shape[1]
    return torch.mm(P, Q, out=allocate("product", (rows, columns + ROW_PADDING), P.dtype)[:, :columns])


def _allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def fma_chain(P: Tensor, Q: Tensor) -> Tensor:
    """Return P Q in float32 by its definition: in the order of k, products are added exactly, and sums rounded."""
    total = torch.zeros(len(P), Q.shape[1])
    for p, q in zip(P.double().T, Q.double(), strict=True):
        total = (total + torch.outer(p, q)).float()
    return total


def pad_to_multiple(x: Tensor, axis: int, n: int) -> Tensor:
    """Return x with zeros appended along an axis, up to the next multiple of n; x itself if nothing is missing."""
    return pad(x, (0, 0) * (x.dim() - 1 - axis) + (0, -x.shape[axis] % n)) if x.shape[axis] % n else x
