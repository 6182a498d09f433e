"""Initial values of A and B, for one weight matrix.

"kaiming" and "gaussian" leave B zero. The others begin with a product B0 A0 that is not, and that is subtracted again
(offset.py), so that the model's output does not change either.

Suffixes name axes: R rank, I input features, O output features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import FUNCTION, Init
from .weight_kinds import Kind, is_quantized


def kaiming(A: Tensor, B: Tensor, W0: Tensor, s: float) -> None:
    """Draw A Kaiming-uniform with a = sqrt(5), as loralib and PEFT do, and set B to zero."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    B.zero_()


def gaussian(A: Tensor, B: Tensor, W0: Tensor, s: float) -> None:
    """Draw A from a normal distribution with standard deviation 1 / r, and set B to zero."""
    nn.init.normal_(A, std=1 / A.shape[0])
    B.zero_()


def orthogonal(A: Tensor, B: Tensor, W0: Tensor, s: float) -> None:
    """Draw A and B with B A = 0: the rows of A and the columns of B are random mixtures of two halves of one orthogonal
    basis of R^r. The standard deviation of the elements is 0.1 / sqrt(2), as in PEFT."""
    r = A.shape[0]
    Q_RR = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0].to(A)
    A.copy_((A.new_empty(A.shape[1], r // 2).normal_() @ Q_RR[0::2]).mT / 10)
    B.copy_((B.new_empty(B.shape[0], r // 2).normal_() @ Q_RR[1::2]) / 10)


def pissa(A: Tensor, B: Tensor, W0: Tensor, s: float) -> None:
    """Set s B A to the r largest singular values of W0 with their vectors, divided evenly between A and B.

    Source: Meng et al. 2024, "PiSSA", arXiv 2404.02948, equations 2 and 3.
    """
    U, S, V = torch.linalg.svd(W0, full_matrices=False)
    r = A.shape[0]
    root = (S[:r] / s).sqrt()
    A.copy_(root.unsqueeze(1) * V[:r])
    B.copy_(U[:, :r] * root)


def olora(A: Tensor, B: Tensor, W0: Tensor, s: float) -> None:
    """Set B to the first r columns of Q, and A to the first r rows of R, with W0 = Q R.

    Source: Buyukakyuz 2024, "OLoRA", arXiv 2406.01775, section 3.
    """
    Q, R = torch.linalg.qr(W0)
    A.copy_(R[: A.shape[0]])
    B.copy_(Q[:, : A.shape[0]])


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, float], None]] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
}


def starts_at_zero(init: Init) -> bool:
    """True if B is zero at the start."""
    return init in ("kaiming", "gaussian")


@torch.no_grad()
def initialize(A: Tensor, B: Tensor, W0: Tensor | None, *, init: Init, s: float) -> None:
    """Write initial values to A and B.

    Args:
        A: Shape (*stack, r, in).
        B: Shape (*stack, out, r).
        W0: Shape (*stack, out, in). None if `init` does not need it.
        init: As in LoraSpec.
        s: The scale.
    """
    for a, b, w in zip(*(t if A.ndim == 3 else [t] for t in (A, B, A if W0 is None else W0)), strict=True):
        if callable(init):
            init(a, b, w)
        else:
            FUNCTIONS[init](a, b, w, s)


def why_uninitialized(init: Init, r: int, module: nn.Module, kind: Kind, shape: tuple[int, ...]) -> str | None:
    """Return why `init` has no values for a weight; None if it has.

    Args:
        init: As in LoraSpec.
        r: The rank.
        module: The module that has the weight.
        kind: The weight's kind.
        shape: The weight's shape as stored.
    """
    if init == FUNCTION:
        return "A and B were initialized by a function, which the file does not hold"
    if starts_at_zero(init):
        return None
    name = "the function" if callable(init) else repr(init)
    if is_quantized(module):
        return f"init={name} reads W0, which is quantized: use 'kaiming'"
    if kind.form == "embedding":
        return f"init={name} is not for embeddings: use 'kaiming', or leave the embedding out"
    smaller = min(kind.sizes(shape)[1:])
    if init in ("pissa", "olora") and r > smaller:
        return f"init={name} needs a rank of at most {smaller}, not {r}"
    return f"init={name} needs an even rank, not {r}" if init == "orthogonal" and r % 2 else None


def as_matrices(weight: Tensor, kind: Kind, rows: Any = None) -> Tensor:
    """Return a copy of a stored weight in float32 (float64 for float64), with the shape (*stack, out, in).

    Args:
        weight: The weight as stored.
        kind: Its kind.
        rows: The rows of W (out, in) that are wanted, as an index tensor. None for all of them.
    """
    W = weight.detach().flatten(kind.stacked + 1)
    W = W.mT if kind.transposed else W
    W = W if rows is None else W.index_select(-2, rows)
    return W.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
