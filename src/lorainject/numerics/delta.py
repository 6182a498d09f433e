"""The low-rank delta of one weight: its factors, its scale, its norm, and the sum of several deltas.

    delta W = s P Q        P: (*stack, rows, r)        Q: (*stack, r, *rest)        W: (*stack, rows, *rest)

P and Q are B and A of the LoRA paper, in the orientation in which the weight is stored: P = B and Q = A for an
nn.Linear (out, in), and P = A^T, Q = B^T for a weight stored as (in, out). `rest` has several axes for a convolution,
and `stack` one for a stack of experts.

Source: Hu et al. 2021, arXiv 2106.09685, equation 3. The scale alpha / sqrt(r) is from Kalajdzievski 2023, arXiv
2312.03732. The product of large factors, which is formed in tiles, is in tiled_matmul.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

Strength = float | Tensor | None
"""What a delta is multiplied with: a float; a 0-d tensor in compiled code; or None, which means 1."""


class Factors(NamedTuple):
    """One delta s P Q in the orientation in which its weight is stored, and the extras that come with it."""

    P: Tensor
    """Shape (*stack, rows, r)."""
    Q: Tensor
    """Shape (*stack, r, *rest)."""
    s: Tensor
    """The scale, a 0-d tensor."""
    dropout: float = 0.0
    """Probability of dropping an element of the weight's input; 0 outside training."""
    gain: Tensor | None = None
    """What W0 is multiplied with (DoRA), in a shape that expands to the weight's; None: 1. P Q includes it."""
    update: Tensor | None = None
    """Update s b of the layer's bias, shape (out,); None if there is none."""
    value: tuple[Tensor, Tensor | None, Strength] | None = None
    """A tensor that replaces W0, the indices of the rows that it replaces (None: all rows), and the share of the
    difference from W0 that is taken (None: all); None if W0 stays."""

    @property
    def has_extras(self) -> bool:
        """True if a DoRA gain, a bias update or a replacement tensor comes with the delta."""
        return self.gain is not None or self.update is not None or self.value is not None

    def times(self, t: float | Tensor) -> Factors:
        """Return the factors of t times the whole difference from W0."""
        value = self.value
        return self._replace(
            s=scaled(self.s, t),
            gain=None if self.gain is None else 1 + (self.gain - 1) * t,
            update=None if self.update is None else self.update * t,
            value=None if value is None else (*value[:2], t if value[2] is None else value[2] * t),
        )


def is_finite(t: Tensor) -> bool:
    """True if every element is finite. Unless it overflows, the sum suffices, in a third of the time."""
    return math.isfinite(float(t.detach().sum())) or bool(t.isfinite().all())


def scale(alpha: float, r: int, scaling: str) -> float:
    """Return s: alpha / r for "standard" scaling (section 4.1 of the paper), alpha / sqrt(r) for "rslora"."""
    return alpha / math.sqrt(r) if scaling == "rslora" else alpha / r


def scaled(s: Tensor, strength: Strength) -> Tensor:
    """Return the scale s, a tensor, times the strength, in the dtype of s."""
    if strength is None:
        return s
    return s * (strength.to(s.dtype) if isinstance(strength, Tensor) else strength)


def alpha_of(s: float, r: int, scaling: str) -> float:
    """Return the alpha with which `scale` returns s, or, where rounding leaves no such number, the nearest one."""
    alpha = s * math.sqrt(r) if scaling == "rslora" else s * r
    candidates = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, 0))
    return min(candidates, key=lambda a: abs(scale(a, r, scaling) - s))


def delta(P: Tensor, Q: Tensor, s: Tensor | float) -> Tensor:
    """Return s P Q, shape (*stack, rows, width), with the axes of `rest` flattened to `width`."""
    return (P * s) @ Q.flatten(P.ndim - 1)


def flatten_factors(f: Factors) -> Factors:
    """Return the factors detached from autograd, with Q of shape (*stack, r, width)."""
    return f._replace(P=f.P.detach(), Q=f.Q.detach().flatten(f.P.ndim - 1), s=f.s.detach())


def clone_factors(f: Factors) -> Factors:
    """Return a flattened copy that does not change when A and B are trained, replaced or moved."""

    def copy(t: Tensor) -> Tensor:
        return t.detach().clone(memory_format=torch.contiguous_format)

    P, Q, s, *_ = flatten_factors(f)
    gain, update = (None if t is None else copy(t) for t in (f.gain, f.update))
    value = None if f.value is None else (copy(f.value[0]), *f.value[1:])
    return Factors(copy(P), copy(Q), copy(s), gain=gain, update=update, value=value)


def product_norm(P: Tensor, Q: Tensor) -> float:
    """Return the Frobenius norm of P Q without forming it: its square is <P^T P, Q Q^T>, both (r, r), in float64."""
    return float((_gram(P.mT) * _gram(Q)).sum().clamp(min=0)) ** 0.5


def _gram(Q: Tensor) -> Tensor:
    Q = Q.double()
    return Q @ Q.mT


def concat_factors(parts: Iterable[Factors]) -> tuple[Tensor, Tensor]:
    """Return P (*stack, rows, R) and Q (*stack, R, width) in float64, so that P Q is the sum of all deltas s P Q."""
    P, Q = zip(*((f.P.double() * f.s.double(), f.Q.double()) for f in parts), strict=True)
    return torch.cat(P, -1), torch.cat(Q, -2)


def total_gain(parts: Iterable[Factors]) -> Tensor | None:
    """Return what W0 is multiplied with in W0 + the sum of all (W - W0); None if no delta has a gain."""
    gains = [f.gain for f in parts if f.gain is not None]
    return None if not gains else sum((g - 1 for g in gains[1:]), start=gains[0])
