"""A guess of a tuned matrix from the base, round(W0 + P Q), that has the same bits on every machine.

P and Q are rounded to a grid of GRID_BITS bits. Then every product of two elements, and every sum of up to 1,024 of
them, is a number that float64 holds exactly, so the order in which a library adds does not matter.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .residuals import SIGNED

GRID_BITS = 21  # and a sign: 2 * 21 bits for a product, and 10 more for a sum of 1,024 products, make 52


def snap(P: Tensor) -> Tensor:
    """Return P, rounded to multiples of 2^-21 times the next power of two above its largest element."""
    largest = float(P.abs().max()) if P.numel() else 0.0
    if largest == 0:
        return P.float()
    step = 2.0 ** (math.frexp(largest)[1] - GRID_BITS)
    return ((P.double() / step).round() * step).float()


def guess_tile(w0: Tensor, P: Tensor | None, Q: Tensor | None) -> Tensor:
    """Return round(W0 + P Q) for some rows; W0 itself without factors."""
    if P is None or Q is None:
        return w0
    total = w0.double() + P.double() @ Q.double()
    return total.to(w0.dtype) if w0.dtype == torch.float64 else total.float().to(w0.dtype)


def bits_of(t: Tensor) -> np.ndarray:
    """Return the bits of a tensor as flat signed integers of the same size."""
    raw: np.ndarray = t.contiguous().view(-1).view(torch.uint8).numpy()
    return raw.view(SIGNED[t.element_size()])
