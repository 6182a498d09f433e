"""The low-rank term of a linear layer and its gradients, in products of bare matrices: what autograd saves, and when, is accumulate.py's affair.

    forward    h_RM = A_RI x_MI^T                y_MO += s h_RM^T B_OR^T
    backward   dh_RM = s B_OR^T dy_MO^T          dB_OR = s (h_RM dy_MO)^T          dx_MI += dh_RM^T A_RI      dA_RI = dh_RM x_MI

h has few rows rather than few columns: for products with eight columns a CPU's library takes two to four times as long as for those with eight rows.

A and B, kept in float32, are cast down to y's dtype, which is small beside casting x up. A CPU without instructions for half precision computes
in float32 instead, some rows of x and y at a time, so that what is cast stays in the cache and hardly takes memory (bfloat16 costs it 18 times as
much).

Legend: M tokens, I in, O out, R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import (
    Tensor,
    float32,
    is_grad_enabled,
)  # by their own names: torch's dictionary has left the cache since the last token
from torch.nn.functional import linear

from ...numerics.tiled_matmul import add_product_by_rows
from ..adapter import Parts

FEW = 16  # tokens up to which a term of its own costs less than the calls that save it
FEW_HALF = 64  # the same in half precision, whose products with so few cost any CPU more than those in float32
CAST = 1 << 17  # elements that are cast at a time: their copies shall lie in the cache
LITTLE, SHARE = 1 << 13, 50  # and hardly take memory: of what is larger a fiftieth at most, or this many
SOME, LARGE, THIN = (
    16,
    1 << 20,
    range(2, 13),
)  # tokens that are added to at a time, of how many elements on, and for which ranks
HALVES = (torch.bfloat16, torch.float16)


def applied(
    x: Tensor, W_OI: Tensor, bias: Tensor | None, h_RM: Tensor, B_OR: Tensor, s: float, parts: Parts = ()
) -> Tensor:
    """x W^T + bias + s h^T B^T (..., out), and no view. (The bias gets no gradient.)

    In full precision a CPU makes the term first and adds the large product to it, with the bits that this has by itself. That takes no longer than
    to store it, since a library adds up in y anyway; added afterwards, the term would fetch y from memory and send it back once more. (In half
    precision y is written once, from float32, and to add it to something takes longer.)
    """
    if parts or not x.is_cpu or x.dtype in HALVES:
        y = linear(x, W_OI, bias)  # with a bias perhaps a view, which nobody could write to afterwards
        return accumulated(y.detach() if y._is_view() else y, h_RM, B_OR, s, parts, own=y.is_contiguous())
    y = x.new_empty(*x.shape[:-1], len(W_OI))
    y_MO = y.view(-1, len(W_OI))
    if bias is not None:
        y_MO.copy_(bias)
    add_product(y_MO, h_RM, B_OR, s, beta=int(bias is not None))
    y_MO.addmm_(x.reshape(-1, x.shape[-1]), W_OI.t())
    return y


def accumulated(y: Tensor, h_RM: Tensor, B: Tensor, s: float, parts: Parts, own: bool) -> Tensor:
    """y + s h^T B^T, in y's memory if that may be written to: if it is our `own`."""
    same = y.dtype == B.dtype
    if same and not (own or parts):
        return torch.addmm(y.reshape(-1, y.shape[-1]), h_RM.t(), B.t(), alpha=s).view(y.shape)
    out = y if own else y.clone(memory_format=torch.contiguous_format)
    for out_MO, B_OR in _pairs(out.view(-1, out.shape[-1]), B, parts):
        if same:
            add_product(out_MO, h_RM, B_OR, s)
        else:
            _add_cast(out_MO, h_RM, B_OR, s)
    return out


def add_product(y_MO: Tensor, h_RM: Tensor, B_OR: Tensor, s: float, beta: int = 1) -> None:
    """y = beta y + s h^T B^T, in y's memory: a large y, for few ranks, some tokens at a time in one call, half of what all at once takes a CPU."""
    h_MR, B_RO, whole = h_RM.t(), B_OR.t(), len(y_MO) // SOME * SOME
    is_large = y_MO.numel() >= LARGE and whole and y_MO.is_cpu and y_MO.dtype == float32 and y_MO.is_contiguous()
    if not is_large or len(B_RO) not in THIN or is_grad_enabled():  # (autograd would not follow a part of a part)
        y_MO.addmm_(h_MR, B_RO, beta=beta, alpha=s)
        return
    add_product_by_rows(h_MR.narrow(0, 0, whole), B_RO, s, y_MO.narrow(0, 0, whole), SOME, beta)
    if rest := len(y_MO) - whole:
        add_product(y_MO.narrow(0, whole, rest), h_RM.narrow(1, whole, rest), B_OR, s, beta)


def projected(x_MI: Tensor, A: Tensor, p: float = 0.0, seed: int = 0) -> Tensor:
    """A (m * x)^T in A's dtype."""
    if p:
        return torch.cat([thin(A, x) for x, _ in _dropped(x_MI, A.dtype, p, seed)], 1)
    if x_MI.dtype == A.dtype:
        return thin(A, x_MI)
    return torch.cat([thin(A, x.to(A.dtype)) for x in x_MI.split(_at_a_time(x_MI, SHARE))], 1)


def thin(A: Tensor, x_MI: Tensor) -> Tensor:
    """A x^T (R, M); of few tokens by way of x A^T, which is as fast or faster then."""
    return torch.mm(A, x_MI.t()) if x_MI.shape[0] >= FEW else linear(x_MI, A).t()


def to_h(dy_MO: Tensor, B: Tensor, s: float, parts: Parts) -> Tensor:
    """s B^T dy^T."""
    return functools.reduce(torch.add, (projected(dy, B_OR.t()) for dy, B_OR in _pairs(dy_MO, B, parts))) * s


def to_B(dy_MO: Tensor, h_RM: Tensor, s: float, parts: Parts) -> Tensor:
    """s (h dy)^T."""
    found = (
        torch.cat([_gathered(h_RM, dy_MO[:, columns]) for columns, _ in parts], 1) if parts else _gathered(h_RM, dy_MO)
    )
    return found.t() * s


def to_x_and_A(
    dx: Tensor | None, dh_RM: Tensor, x_MI: Tensor, A: Tensor, p: float, seed: int, wants_A: bool
) -> Tensor | None:
    """dh (m * x); m * (dh^T A) is added into dx."""
    if not p:
        if dx is not None:
            accumulated(dx, dh_RM, A.t(), 1.0, (), own=True)
        return _gathered(dh_RM, x_MI) if wants_A else None
    dA, n = None, _at_a_time(x_MI)
    for i, (x, mask) in enumerate(_dropped(x_MI, A.dtype, p, seed)):
        dh = dh_RM.narrow(1, i * n, len(x))
        if dx is not None:
            dx.narrow(0, i * n, len(x)).add_((dh.t() @ A) * mask)
        if wants_A:
            dA = dh @ x if dA is None else dA + dh @ x
    return dA


def computed_in(y: Tensor, tokens: int) -> torch.dtype:
    """The dtype of the products."""
    if y.dtype in HALVES and y.is_cpu and (tokens <= FEW_HALF or not _has_instructions(y.dtype)):
        return float32
    return y.dtype


@functools.cache
def _has_instructions(half: torch.dtype) -> bool:
    """Whether this CPU multiplies in half precision."""
    asked = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported
        if half == torch.bfloat16
        else torch.ops.mkldnn._is_mkldnn_fp16_supported
    )
    return bool(asked())


def _add_cast(y_MO: Tensor, h_RM: Tensor, B_OR: Tensor, s: float) -> None:
    """y += s h^T B^T for y of another dtype, in the wider of the two: some rows of y are cast, added to and rounded once."""
    wide = torch.promote_types(y_MO.dtype, B_OR.dtype)
    n, B_RO = _at_a_time(y_MO, SHARE), B_OR.to(wide).t()
    for i, h in enumerate(h_RM.to(wide).split(n, 1)):
        rows = y_MO.narrow(0, i * n, h.shape[1])
        rows.copy_(rows.to(wide).addmm_(h.t(), B_RO, alpha=s))


def _gathered(h_RM: Tensor, dy_MO: Tensor) -> Tensor:
    """h dy (R, O), in h's dtype."""
    if dy_MO.dtype == h_RM.dtype:
        return h_RM @ dy_MO
    n = _at_a_time(dy_MO, SHARE)
    (h, dy), *more = zip(h_RM.split(n, 1), dy_MO.split(n), strict=True)
    total = h @ dy.to(h.dtype)
    for h, dy in more:
        total.addmm_(h, dy.to(h.dtype))
    return total


def _dropped(x_MI: Tensor, dtype: torch.dtype, p: float, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """m * x in this dtype, and m, some rows at a time."""
    generator = torch.Generator(x_MI.device).manual_seed(seed)
    for x in x_MI.split(_at_a_time(x_MI)):
        mask = torch.empty_like(x, dtype=dtype).bernoulli_(1 - p, generator=generator).div_(1 - p)
        yield x.to(dtype) * mask, mask


def _pairs(y_MO: Tensor, B: Tensor, parts: Parts) -> list[tuple[Tensor, Tensor]]:
    """The columns of y, and their rows of B."""
    return [(y_MO[:, columns], B[rows]) for columns, rows in parts] if parts else [(y_MO, B)]


def _at_a_time(matrix: Tensor, share: int = 1) -> int:
    """As many rows as are cast at a time, of many no more than 1/share."""
    elements = matrix.numel()
    if not matrix.is_cpu or elements <= CAST:
        return max(1, len(matrix))
    return max(1, min(CAST, max(LITTLE, elements // share)) // matrix.shape[1])
