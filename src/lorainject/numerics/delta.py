"""The low-rank delta s P Q as a value: its factors, its norm, and sums of several."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """s P Q with P (*stack, rows, r) and Q (*stack, r, *rest): a delta in the shape (*stack, rows, *rest) of the weight as stored."""

    P: Tensor
    Q: Tensor
    s: Tensor
    dropout: float = 0.0
    """Probability of dropping an element of the weight's input; 0 outside training."""
    gain: Tensor | None = None
    """What W0 itself is multiplied with (DoRA, see payload.py), in a shape that expands to the weight's; P Q has it already. None: 1."""
    update: Tensor | None = None
    """s b (out,), what comes with it for the layer's bias; None: nothing."""

    value: tuple[Tensor, Tensor | None] | None = None
    """What stands in W0's place (see replaced.py): a tensor, and which rows it is, if not all. None: W0."""

    @property
    def beside(self) -> bool:
        """Whether there is more to it than P Q."""
        return self.gain is not None or self.update is not None or self.value is not None


def is_finite(t: Tensor) -> bool:
    """Whether every element is. (The sum tells, unless it overflows, in a third of the time.)"""
    return math.isfinite(float(t.detach().sum())) or bool(t.isfinite().all())


def scale(alpha: float, r: int, scaling: str) -> float:
    """s = alpha / r ("standard", arXiv 2106.09685 section 4.1) or alpha / sqrt(r) ("rslora", arXiv 2312.03732)."""
    return alpha / math.sqrt(r) if scaling == "rslora" else alpha / r


def delta(P: Tensor, Q: Tensor, s: Tensor | float) -> Tensor:
    """s P Q, the delta itself: (*stack, rows, all of rest as one axis)."""
    return (P * s) @ Q.flatten(P.ndim - 1)


def flatten_factors(f: Factors) -> Factors:
    """Detached, with Q (*stack, r, width)."""
    return f._replace(P=f.P.detach(), Q=f.Q.detach().flatten(f.P.ndim - 1), s=f.s.detach())


def clone_factors(f: Factors) -> Factors:
    """The same, as a copy that no training, replacing or moving of A and B changes."""
    total_gain, update = (None if t is None else t.detach().clone() for t in (f.gain, f.update))
    value = None if f.value is None else (f.value[0].detach().clone(), f.value[1])
    P, Q, s, *_ = flatten_factors(f)
    return Factors(
        P.clone(memory_format=torch.contiguous_format),
        Q.clone(),
        s.clone(),
        gain=total_gain,
        update=update,
        value=value,
    )


def product_norm(P: Tensor, Q: Tensor) -> float:
    """|P Q|, Frobenius, without forming it: its square is <P^T P, Q Q^T>, both (r, r), in float64."""
    return float((_gram(P.mT) * _gram(Q)).sum().clamp(min=0)) ** 0.5


def _gram(Q: Tensor) -> Tensor:
    Q = Q.double()
    return Q @ Q.mT


def concat_factors(parts: Iterable[Factors]) -> tuple[Tensor, Tensor]:
    """P (*stack, rows, R) and Q (*stack, R, width), float64, with P Q the sum of all s P Q: one product however many there are.

    In float64, so that it comes out the same to float32's last bit whatever the tile, the BLAS library and the machine.
    """
    P, Q = zip(*((f.P.double() * f.s.double(), f.Q.double()) for f in parts), strict=True)
    return torch.cat(P, -1), torch.cat(Q, -2)


def total_gain(parts: Iterable[Factors]) -> Tensor | None:
    """What W0 is multiplied with in W0 + the sum of all (W - W0); None if that is 1."""
    gains = [f.gain for f in parts if f.gain is not None]
    return None if not gains else sum((g - 1 for g in gains[1:]), start=gains[0])
