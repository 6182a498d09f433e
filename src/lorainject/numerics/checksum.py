"""Tensors as bits: where two differ, whether they are the same, and a checksum by which one is known again."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from .tiled_matmul import pad_to_multiple

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
LANE = 64  # words of a checksum that are summed without mixing


def differing_positions(a: Tensor, b: Tensor) -> np.ndarray:
    """Where two contiguous tensors of one dtype have other bits: int64, in order."""
    a, b = (t.view(-1).view(BITS[t.itemsize]) for t in (a, b))
    if a.device.type != "cpu":
        return (a != b).nonzero().view(-1).cpu().numpy()
    return np.flatnonzero(a.numpy() != b.numpy())  # torch takes three times as long


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype have the same bits."""
    a, b = a.view(BITS[a.itemsize]), b.view(BITS[b.itemsize])
    return bool(
        np.array_equal(a.numpy(), b.numpy()) if a.device.type == "cpu" else torch.equal(a, b)
    )  # torch takes four times as long


def checksum(tile: Tensor) -> int:
    """Of the tile's bits and their places: words of 8 bytes times odd numbers that their places decide, mod 2^64.

    Of such a number times a word's highest bits little is left: so after each LANE of words their sum is mixed before it goes on.
    """
    raw = tile.reshape(-1).view(torch.uint8)
    words = pad_to_multiple(raw, 0, 8 * LANE).view(torch.int64).view(-1, LANE)
    sums = _weighted(words, _weights(LANE, raw.device))
    sums ^= sums >> 32
    total = _weighted(sums.view(1, -1), _weights(1 << (len(sums) - 1).bit_length(), raw.device)[: len(sums)])
    return int(total) ^ len(raw)


def _weighted(words: Tensor, weights: Tensor) -> Tensor:
    """The sum of each row, times these numbers."""
    if words.device.type == "cpu":  # of all ways the fastest by far
        return torch.from_numpy(np.einsum("ij,j->i", words.numpy(), weights.numpy()))
    return (words * weights).sum(1)


@functools.lru_cache(maxsize=8)
def _weights(n: int, device: torch.device) -> Tensor:
    """Odd numbers of 64 bits that no small multiples of each other cancel."""
    mixed = torch.arange(1, n + 1, device=device) * -7046029254386353131
    return (mixed ^ (mixed >> 29)) * -4658895280553007687 | 1
