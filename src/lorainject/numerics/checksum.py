"""Tensors as bits: the positions where two tensors differ, bitwise equality, and a checksum of a tile.

The checksum of 8-byte words w_i is the sum of w_i c_i mod 2^64, with odd constants c_i that depend on the position i. A
product keeps little of a word's highest bits, so the sum of every LANE words is mixed (x ^ x >> 32) before it enters a
second sum of the same form. The checksum detects edits and numerical differences; it is no protection against forgery.

On CPUs numpy compares the bits and sums the words, because torch takes three to four times as long.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from .tiled_matmul import pad_to_multiple

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size of an element, in bytes
LANE = 64  # words of a checksum that are summed before their sum is mixed


def differing_positions(a: Tensor, b: Tensor) -> np.ndarray:
    """Return the positions (int64, ascending) where two contiguous tensors of one dtype and size differ in any bit."""
    a, b = (t.view(-1).view(BITS[t.itemsize]) for t in (a, b))
    if a.device.type != "cpu":
        return (a != b).nonzero().view(-1).cpu().numpy()
    return np.flatnonzero(a.numpy() != b.numpy())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True if two tensors of one dtype have the same shape and the same bits."""
    a, b = a.view(BITS[a.itemsize]), b.view(BITS[b.itemsize])
    return bool(np.array_equal(a.numpy(), b.numpy()) if a.device.type == "cpu" else torch.equal(a, b))


def checksum(tile: Tensor) -> int:
    """Return a checksum (a signed 64-bit integer) of a tensor's bits and their positions, the same on every device."""
    raw = tile.reshape(-1).view(torch.uint8)
    words = pad_to_multiple(raw, 0, 8 * LANE).view(torch.int64).view(-1, LANE)
    sums = _weighted_sums(words, _weights(LANE, raw.device))
    sums ^= sums >> 32
    weights = _weights(1 << (len(sums) - 1).bit_length(), raw.device)
    return int(_weighted_sums(sums.view(1, -1), weights[: len(sums)])) ^ len(raw)


def _weighted_sums(words: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of each row of `words` times `weights`, mod 2^64."""
    if words.device.type == "cpu":
        return torch.from_numpy(np.einsum("ij,j->i", words.numpy(), weights.numpy()))
    return (words * weights).sum(1)


@functools.lru_cache(maxsize=8)
def _weights(n: int, device: torch.device) -> Tensor:
    """Return n odd 64-bit numbers that no small multiples of each other cancel."""
    mixed = torch.arange(1, n + 1, device=device) * -7046029254386353131
    return (mixed ^ (mixed >> 29)) * -4658895280553007687 | 1
