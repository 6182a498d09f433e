"""The matrix products of a linear layer's low-rank term and of its gradients, on plain tensors.

    forward    h_RM = A_RI x_MI^T         y_MO += s h_RM^T B_OR^T
    backward   dh_RM = s B_OR^T dy_MO^T   dB_OR = s (h_RM dy_MO)^T   dx_MI += dh_RM^T A_RI   dA_RI = dh_RM x_MI

The term is added into y in place, by a matrix product with beta = 1: nothing of the size of y is allocated, scaled or
cast. What autograd saves, and when these products run, is decided in lora_linear.py.

**h lies with the rank first.** It costs no line, and a product with eight rows is faster than one with eight columns:
1.4 instead of 2.4 ms for dh at r 8 (M 512, 2048 x 2048, float32, Zen 3). At r 16 and 64 both take the same time.

**Half precision on a CPU.** A and B are float32. On a GPU, and on a CPU with instructions for half precision, they are
cast down to the dtype of y, which costs little. A CPU without such instructions (Zen 3, say) multiplies in float32
instead: in the row `forward` in bfloat16, M 512, 2048 x 2048, the two products then take 7 instead of 19 ms at r 8, and
20 instead of 129 ms at r 64. To keep the peak memory at 1.05 times the base's, x and y are cast in chunks of a fiftieth
of their elements. For few tokens every CPU computes in float32: a product in bfloat16 takes 24 us whatever its size.

Suffixes name axes: M tokens, I input features, O output features, R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, float32

from ..adapter import Parts

FEW_TOKENS = 64
"""Up to so many tokens a CPU computes in float32 rather than in half precision."""
CHUNK_SIZE = 1 << 17
"""Elements that are cast at a time: at most so many, so that the copy stays in the cache, ..."""
CHUNK_SHARE, SMALL_CHUNK_SIZE = 50, 1 << 13
"""... and at most this share of the matrix, so that the copy hardly takes memory, unless the matrix is small."""
GROUP_ROWS, GROUPED_RANKS, GROUPED_SIZE = 16, range(2, 17), 1 << 20
"""Rows per matrix of the grouped addition, the ranks it helps, and the elements of y from which on it does."""
HALF_DTYPES = (torch.bfloat16, torch.float16)


def compute_dtype(y: Tensor, tokens: int) -> torch.dtype:
    """Return the dtype of the products for an output y: float32 for half precision where a CPU is faster with it."""
    if y.dtype in HALF_DTYPES and y.is_cpu and (tokens <= FEW_TOKENS or not _has_half_instructions(y.dtype)):
        return float32
    return y.dtype


@functools.cache
def _has_half_instructions(dtype: torch.dtype) -> bool:
    """True if this CPU multiplies in this half precision."""
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, name)())


def down_project(x_MI: Tensor, A: Tensor, dropout: float = 0.0, seed: int = 0) -> Tensor:
    """Return A (m * x)^T, shape (R, M), in the dtype of A. The dropout mask m is drawn from the seed."""
    if dropout:
        return torch.cat([torch.mm(A, x.t()) for x, _ in _dropped_chunks(x_MI, A.dtype, dropout, seed)], 1)
    if x_MI.dtype == A.dtype:
        return torch.mm(A, x_MI.t())
    return torch.cat([torch.mm(A, x.to(A.dtype).t()) for x in x_MI.split(_rows_per_chunk(x_MI))], 1)


def add_up_projection(y_MO: Tensor, h_RM: Tensor, B: Tensor, s: float, parts: Parts = ()) -> None:
    """Add s h^T B^T to y in place, for a slice only to the outputs in `parts`."""
    for y, B_OR in _blocks(y_MO, B, parts):
        if y.dtype != B.dtype:
            _add_in_chunks(y, h_RM, B_OR, s)
        elif _is_grouped(y, len(h_RM)):
            _add_in_groups(y, h_RM, B_OR, s)
        else:
            y.addmm_(h_RM.t(), B_OR.t(), alpha=s)


def grad_h(dy_MO: Tensor, B: Tensor, s: float, parts: Parts) -> Tensor:
    """Return s B^T dy^T, shape (R, M), in the dtype of B."""
    return functools.reduce(torch.add, (down_project(dy, B_OR.t()) for dy, B_OR in _blocks(dy_MO, B, parts))) * s


def grad_B(dy_MO: Tensor, h_RM: Tensor, s: float, parts: Parts) -> Tensor:
    """Return s (h dy)^T, shape (O, R), in the dtype of h.

    dy^T h^T, whose result has eight columns, takes 6.5 instead of 2.3 ms (r 8, M 512, O 2048, float32, Zen 3).
    """
    slices = [dy_MO[:, columns] for columns, _ in parts] or [dy_MO]
    return torch.cat([_multiply(h_RM, dy) for dy in slices], 1).t() * s


def grad_x_and_A(
    dx_MI: Tensor | None, dh_RM: Tensor, x_MI: Tensor, A: Tensor, dropout: float, seed: int, needs_A: bool
) -> Tensor | None:
    """Add m * (dh^T A) to dx in place, if dx is given, and return dh (m * x), shape (R, I), if A needs its gradient.

    The dropout mask m is drawn again from the seed of the forward, once for both.
    """
    if not dropout:
        if dx_MI is not None:
            add_up_projection(dx_MI, dh_RM, A.t(), 1.0)
        return _multiply(dh_RM, x_MI) if needs_A else None
    dA, start = None, 0
    for x, mask in _dropped_chunks(x_MI, A.dtype, dropout, seed):
        dh = dh_RM.narrow(1, start, len(x))
        if dx_MI is not None:
            dx_MI.narrow(0, start, len(x)).add_((dh.t() @ A) * mask)
        if needs_A:
            dA = dh @ x if dA is None else dA + dh @ x
        start += len(x)
    return dA


def _multiply(h_RM: Tensor, t_MN: Tensor) -> Tensor:
    """Return h t, shape (R, N), in the dtype of h."""
    if t_MN.dtype == h_RM.dtype:
        return h_RM @ t_MN
    rows = _rows_per_chunk(t_MN)
    (h, t), *rest = zip(h_RM.split(rows, 1), t_MN.split(rows), strict=True)
    total = h @ t.to(h.dtype)
    for h, t in rest:
        total.addmm_(h, t.to(h.dtype))
    return total


def _add_in_chunks(y_MO: Tensor, h_RM: Tensor, B_OR: Tensor, s: float) -> None:
    """Add s h^T B^T to a y of lower precision: some rows at a time are cast, added to, and rounded once."""
    start = 0
    for h in h_RM.split(_rows_per_chunk(y_MO), 1):
        y = y_MO.narrow(0, start, h.shape[1])
        y.copy_(y.to(B_OR.dtype).addmm_(h.t(), B_OR.t(), alpha=s))
        start += h.shape[1]


def _is_grouped(y_MO: Tensor, r: int) -> bool:
    """True if `_add_in_groups` is faster than one product: for a large float32 y on a CPU and few ranks.

    In the row `forward`, M 512, 2048 x 2048, both products take 2.6 instead of 3.5 ms at r 8, and 3.8 instead of 4.4 at
    r 16; the must of that row, half of PEFT's 5.8 ms at r 8, needs it. At r 64 it takes longer (Zen 3). Autograd would
    not follow the views, so it is not used while a gradient is differentiated.
    """
    return (
        r in GROUPED_RANKS
        and y_MO.numel() >= GROUPED_SIZE
        and len(y_MO) >= GROUP_ROWS
        and y_MO.is_cpu
        and y_MO.dtype == float32
        and y_MO.is_contiguous()
        and not torch.is_grad_enabled()
    )


def _add_in_groups(y_MO: Tensor, h_RM: Tensor, B_OR: Tensor, s: float) -> None:
    """Add s h^T B^T to y by one batched product, whose matrices have GROUP_ROWS rows each, and one for the rest."""
    grouped = len(y_MO) // GROUP_ROWS * GROUP_ROWS
    h_NGR, y_NGO = (t.view(-1, GROUP_ROWS, t.shape[1]) for t in (h_RM.t()[:grouped], y_MO[:grouped]))
    y_NGO.baddbmm_(h_NGR, B_OR.t().expand(len(h_NGR), *B_OR.t().shape), alpha=s)
    y_MO[grouped:].addmm_(h_RM.t()[grouped:], B_OR.t(), alpha=s)


def _blocks(y_MO: Tensor, B: Tensor, parts: Parts) -> list[tuple[Tensor, Tensor]]:
    """Return each run of outputs of a slice with the rows of B that belong to it; y and B for a whole weight."""
    return [(y_MO[:, columns], B[rows]) for columns, rows in parts] if parts else [(y_MO, B)]


def _dropped_chunks(x_MI: Tensor, dtype: torch.dtype, dropout: float, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield m * x in this dtype, and the mask m of zeros and 1 / (1 - dropout), some rows at a time."""
    generator = torch.Generator(x_MI.device).manual_seed(seed)
    for x in x_MI.split(_rows_per_chunk(x_MI)):
        mask = torch.empty_like(x, dtype=dtype).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
        yield x.to(dtype) * mask, mask


def _rows_per_chunk(matrix: Tensor) -> int:
    """Return how many rows are cast at a time: all of a small matrix, and all on a GPU."""
    size = matrix.numel()
    if not matrix.is_cpu or size <= CHUNK_SIZE:
        return max(1, len(matrix))
    return max(1, min(CHUNK_SIZE, max(SMALL_CHUNK_SIZE, size // CHUNK_SHARE)) // matrix.shape[1])
