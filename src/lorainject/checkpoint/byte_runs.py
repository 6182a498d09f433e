"""Which bytes of a checkpoint an adapter changes, and by what: A and B, cut to what each run of elements on disk needs.

A parameter in memory may lie on disk in parts, transposed, or under several keys (see places.py). Whatever the way, a delta s P Q
restricted to a place is again rows of P times columns of Q, so nothing of the weight's size is ever formed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..files.weight_map import StoredPiece
from ..numerics.delta import Factors

Axis = tuple[int, int, int]
"""Count, step on disk, step in memory (in elements)."""


@dataclass(frozen=True)
class Patch:
    """Runs of `width` elements that are contiguous on disk; run i gets row i of P Q."""

    key: str
    width: int
    starts: np.ndarray
    """int64 (runs,): the first element of each in the tensor on disk."""
    parts: tuple[Factors, ...]
    """Of the whole parameter: P (*stack, rows, r), Q (*stack, r, columns)."""
    at: tuple[int, ...]
    """Which matrix of a stack."""
    rows: np.ndarray
    """int64: of P, one for each run; if `turned`, one for each element of a run."""
    columns: np.ndarray
    """int64: of Q, the other way round."""
    turned: bool
    """Whether a run on disk is a column in memory."""

    def factors(self) -> list[Factors]:
        """Each with P (runs, r) and Q (r, width)."""
        rows, columns = torch.from_numpy(self.rows), torch.from_numpy(self.columns)
        return [self.cut(f, rows, columns) for f in self.parts]

    def cut(self, f: Factors, rows: Tensor, columns: Tensor) -> Factors:
        P, Q = f.P[self.at][rows], f.Q[self.at][:, columns]
        return Factors(Q.mT, P.mT, f.s) if self.turned else Factors(P, Q, f.s)

    @functools.cached_property
    def whole(self) -> bool:
        """Whether its runs follow each other without a gap."""
        return bool((np.diff(self.starts) == self.width).all())


def patches(place: StoredPiece, shape: Sequence[int], stacked: bool, parts: tuple[Factors, ...]) -> Iterator[Patch]:
    """What becomes of a place of a parameter of this shape. `parts` are its deltas."""
    rows, columns = shape[stacked], math.prod(shape[stacked + 1 :])
    axes = sorted(
        zip(place.disk.sizes, place.disk.strides, place.memory.strides, strict=True), key=lambda axis: -axis[1]
    )
    for unit in (columns, rows * columns):
        axes = [part for axis in axes for part in _split(axis, unit) if part[0] > 1]

    def goes(axis: Axis) -> str:
        return "stack" if axis[2] % (rows * columns) == 0 and stacked else "row" if axis[2] % columns == 0 else "column"

    inner: list[Axis] = []
    while (
        axes
        and axes[-1][1] == math.prod(n for n, _, _ in inner)
        and goes(axes[-1]) in ("row", "column")
        and goes(axes[-1]) == goes((inner or axes)[-1])
    ):
        inner.insert(0, axes.pop())
    turned = bool(inner) and goes(inner[-1]) == "row"
    outer: list[Axis] = []
    while axes and goes(axes[-1]) == ("column" if turned else "row"):
        outer.insert(0, axes.pop())
    run, runs = _steps(inner), _steps(outer)
    for disk, memory in zip(*_steps(axes), strict=True):
        memory = memory + place.memory.offset
        row, column = divmod(memory % (rows * columns), columns)
        along_runs, along_run = runs[1], run[1]
        yield Patch(
            key=place.key, width=len(run[0]), starts=place.disk.offset + disk + runs[0], parts=parts, turned=turned,
            at=(int(memory // (rows * columns)),) if stacked else (),
            rows=row + (along_run if turned else along_runs) // columns, columns=column + (along_runs if turned else along_run),
        )  # fmt: skip


def _split(axis: Axis, unit: int) -> list[Axis]:
    """An axis that runs over the end of a row (or matrix) of so many elements, in two that don't."""
    n, disk, memory = axis
    if memory >= unit or n * memory <= unit:
        return [axis]
    inside = unit // memory
    assert unit % memory == n % inside == 0, "a place covers whole rows, or lies within one"
    return [(n // inside, disk * inside, unit), (inside, disk, memory)]


def _steps(axes: Sequence[Axis]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets on disk and in memory of all elements along these axes, in order: int64."""
    disk = memory = np.zeros(1, np.int64)
    for n, on_disk, in_memory in axes:
        along = np.arange(n, dtype=np.int64)
        disk = (disk[:, None] + along * on_disk).reshape(-1)
        memory = (memory[:, None] + along * in_memory).reshape(-1)
    return disk, memory


def find(places: Sequence[StoredPiece], index: int) -> tuple[str, int]:
    """Where element `index` of a parameter is: the key on disk, and the element of that tensor."""
    for place in places:
        rest, disk = index - place.memory.offset, place.disk.offset
        axes = sorted(zip(place.memory.strides, place.memory.sizes, place.disk.strides, strict=True), reverse=True)
        for step, n, on_disk in axes:
            if n > 1:
                i = min(max(rest // step, 0), n - 1)
                rest, disk = rest - i * step, disk + i * on_disk
        if rest == 0:
            return place.key, disk
    raise AssertionError("the places of a parameter cover it")
