"""Code the difference of two tensors without loss: integers that are near 0 where the tensors are near each other.

    bits -> numbers in the order of the floats -> difference, modulo 2^n -> zigzag -> planes of bytes -> zlib

The order of the floats: a float's bits are a sign and a magnitude, so flipping the magnitude's bits of negative floats
gives integers of which neighboring floats have neighboring ones. Zigzag puts small differences of either sign into the
low bits (0, -1, 1, -2 become 0, 1, 2, 3), so that the planes of the high bytes are almost empty.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

LEVEL = 6
LENGTH = struct.Struct("<I")
SIGNED: dict[int, np.dtype[Any]] = {1: np.dtype("<i1"), 2: np.dtype("<i2"), 4: np.dtype("<i4"), 8: np.dtype("<i8")}


def encode(values: np.ndarray, guess: np.ndarray, is_float: bool) -> bytes:
    """Return the code of an array, from which `decode` restores it with the same guess.

    Args:
        values: The bits as signed integers, of 1, 2, 4 or 8 bytes.
        guess: What the values are likely to be, of the same dtype and length.
        is_float: True if the bits are those of floats.
    """
    if is_float:
        values, guess = _ordered(values), _ordered(guess)
    shift = values.dtype.itemsize * 8 - 1
    difference = values - guess
    zigzag = (difference << 1) ^ (difference >> shift)
    planes = zigzag.view(np.uint8).reshape(-1, values.dtype.itemsize).T
    parts = [zlib.compress(plane.tobytes(), LEVEL) if plane.any() else b"" for plane in planes]
    return b"".join(LENGTH.pack(len(part)) + part for part in parts)


def decode(read: Callable[[int], bytes], guess: np.ndarray, is_float: bool) -> np.ndarray:
    """Return the array that `encode` coded. Raise ValueError if the code is damaged.

    Args:
        read: Returns the next n bytes of the code.
        guess, is_float: As in `encode`.
    """
    size = guess.dtype.itemsize
    planes = np.zeros((len(guess), size), np.uint8)
    for i in range(size):
        (length,) = LENGTH.unpack(read(LENGTH.size))
        if length:
            planes[:, i] = np.frombuffer(inflate(read(length), len(guess)), np.uint8)
    zigzag = planes.reshape(-1).view(guess.dtype)
    unsigned = zigzag.view(f"<u{size}")
    difference = (unsigned >> 1).view(guess.dtype) ^ -(zigzag & 1)
    return _ordered((_ordered(guess) if is_float else guess) + difference) if is_float else guess + difference


def inflate(code: bytes, size: int) -> bytes:
    """Return what zlib compressed to `code`. Raise ValueError unless it has this many bytes."""
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(code, size + 1)
    except zlib.error as e:
        raise ValueError(str(e)) from e
    if len(data) != size:
        raise ValueError("it holds more or fewer bytes than its index says")
    return data


def _ordered(bits: np.ndarray) -> np.ndarray:
    """Return the bits of floats as integers in the order of the floats; applied twice, the bits again."""
    info = np.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)
