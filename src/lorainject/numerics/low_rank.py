"""Singular value decompositions of low-rank products and of large matrices, and the rank that an error asks for.

    P Q = (U_P R_P) (U_Q R_Q)^T = U_P (R_P R_Q^T) U_Q^T        P: (*stack, rows, r)    Q: (*stack, r, width)

The singular values of P Q are those of R_P R_Q^T, a matrix (r, r), so the product is never formed. The best
approximation of a lower rank keeps the largest of them, and its error is the root of the squares that it leaves out
(Eckart and Young 1936). A matrix that is no product is projected onto the range that a few random vectors find in it
(Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLING = 8  # random vectors beyond the rank that is asked for
POWER_ITERATIONS = 2  # products with D D^T, which make the largest singular values stand out
WHOLE = 512  # a matrix with a shorter side up to this length is decomposed as a whole


class SVD(NamedTuple):
    """The largest singular values of a matrix D, or of each matrix of a stack: D is about U diag(S) Vh."""

    U: Tensor
    """Shape (*stack, rows, k), with orthonormal columns."""
    S: Tensor
    """Shape (*stack, k), descending."""
    Vh: Tensor
    """Shape (*stack, k, width), with orthonormal rows."""
    rest: float = 0.0
    """The sum of the squares of all singular values that are not in S."""

    def factors(self, r: int) -> tuple[Tensor, Tensor]:
        """Return P (*stack, rows, r) and Q (*stack, r, width) of the best approximation of rank r, equally large."""
        root = self.S[..., :r].sqrt()
        return self.U[..., :r] * root[..., None, :], self.Vh[..., :r, :] * root[..., None]

    def lost(self, r: int) -> float:
        """Return the sum of the squares of all singular values beyond the r largest."""
        return float(self.S[..., r:].square().sum()) + self.rest

    def rank_within(self, share: float) -> int | None:
        """Return the lowest rank, at least 1, that leaves out at most this share of the sum of all squares.

        None if all of S do not suffice.
        """
        allowed = share * self.lost(0) * (1 + 1e-12)
        return next((r for r in range(1, self.S.shape[-1] + 1) if self.lost(r) <= allowed), None)


def product_svd(P: Tensor, Q: Tensor, s: float = 1.0) -> SVD:
    """Return the decomposition of s P Q in float64, with as many singular values as the product can have.

    Args:
        P: Shape (*stack, rows, r).
        Q: Shape (*stack, r, width).
        s: The scale.
    """
    U, R = torch.linalg.qr(P.double() * s)
    V, T = torch.linalg.qr(Q.double().mT)
    left, S, right = torch.linalg.svd(R @ T.mT, full_matrices=False)
    return SVD(U @ left, S, right @ V.mT)


def matrix_svd(D: Tensor, k: int) -> SVD:
    """Return the k largest singular values of a matrix with their vectors, in the dtype of the matrix.

    Args:
        D: Shape (rows, width), float32 or float64. If its shorter side is at most WHOLE long, the result is exact up to
            rounding; else it is found with random vectors, the same ones each time.
        k: How many singular values are wanted; fewer are returned if the matrix has no more.
    """
    shorter, total = min(D.shape), float(torch.linalg.vector_norm(D, dtype=torch.float64)) ** 2
    if shorter <= WHOLE or k + OVERSAMPLING >= shorter:
        U, S, Vh = torch.linalg.svd(D.double(), full_matrices=False)
        rest = max(0.0, float(S[k:].square().sum()))
        return SVD(U[:, :k].to(D.dtype), S[:k].to(D.dtype), Vh[:k].to(D.dtype), rest)
    g = torch.Generator().manual_seed(0)
    Y = D @ torch.randn(D.shape[1], k + OVERSAMPLING, generator=g, dtype=D.dtype)
    for _ in range(POWER_ITERATIONS):
        Y = D @ torch.linalg.qr(D.mT @ torch.linalg.qr(Y).Q).Q
    basis = torch.linalg.qr(Y).Q
    left, S, Vh = torch.linalg.svd((basis.mT @ D).double(), full_matrices=False)
    U, S, Vh = (basis @ left.to(D.dtype))[:, :k], S[:k], Vh[:k]
    return SVD(U, S.to(D.dtype), Vh.to(D.dtype), max(0.0, total - float(S.square().sum())))
