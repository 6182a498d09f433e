"""Runs of bytes on disk that a delta changes, and the delta of each run.

A weight may be stored in several pieces, transposed or interleaved (files/weight_map.py). Each piece is cut into
patches, which are runs of elements that are contiguous on disk. Whatever the layout is, the delta of a patch is again a
low-rank product, so nothing of the weight's size is ever formed. With P (rows, r) and Q (r, columns) of one matrix, the
n runs of a patch, `width` elements each, change by

    s P[rows] Q[:, columns]              (n, width)    if a run on disk goes along a row in memory
    s Q[:, columns]^T P[rows]^T          (n, width)    if it goes along a column: the matrix is stored transposed
"""

from __future__ import annotations

import errno
import functools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..files.io.safetensors_file import TORCH_DTYPES, TensorEntry
from ..files.weight_map import StoredPiece
from ..numerics.delta import Factors
from ..numerics.tile_merge import TileWorkspace
from .copying import start_writeback


@dataclass(frozen=True)
class Runs:
    """Runs of elements of a tensor on disk. A tile is a range of runs, as a matrix (runs, width)."""

    starts: np.ndarray
    """int64 (n,): the first element of each run, counted in the tensor."""
    width: int
    """Elements per run."""

    @functools.cached_property
    def is_contiguous(self) -> bool:
        """True if each run begins where the run before it ends."""
        return bool((np.diff(self.starts) == self.width).all())

    @property
    def numel(self) -> int:
        """The number of elements of all runs."""
        return len(self.starts) * self.width

    def read_tile(self, file: int, entry: TensorEntry, rows: slice, workspace: TileWorkspace) -> Tensor:
        """Read a tile of the tensor from a file descriptor. The same thread's next call overwrites the tile."""
        shape = rows.stop - rows.start, self.width
        tile = workspace.buffer("read", shape, TORCH_DTYPES[entry.dtype])
        for offset, memory in self._extents(entry, rows, tile):
            if os.preadv(file, [memory], offset) != len(memory):
                raise OSError(errno.EIO, "a shard became shorter while it was read")
        return tile

    def write_tile(self, file: int, entry: TensorEntry, rows: slice, tile: Tensor) -> None:
        """Write a tile of the tensor to a file descriptor."""
        for offset, memory in self._extents(entry, rows, tile.contiguous()):
            while memory:
                n = os.pwrite(file, memory, offset)
                if self.is_contiguous:
                    start_writeback(file, offset, n)
                memory, offset = memory[n:], offset + n

    def _extents(self, entry: TensorEntry, rows: slice, tile: Tensor) -> Iterator[tuple[int, memoryview]]:
        """Yield the offset in the file and the memory of each part of the tile that is contiguous in the file."""
        memory = memoryview(tile.view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]
        starts = self.starts[rows][:1] if self.is_contiguous else self.starts[rows]
        step = len(memory) if self.is_contiguous else self.width * tile.itemsize
        for i, start in enumerate(starts):
            yield entry.start + int(start) * tile.itemsize, memory[i * step : (i + 1) * step]


@dataclass(frozen=True)
class Patch:
    """Some runs of a tensor on disk, and what the deltas of one weight add to them."""

    runs: Runs
    deltas: tuple[Factors, ...]
    """The deltas of the whole weight: P (*stack, rows, r), Q (*stack, r, columns)."""
    matrix: tuple[int, ...]
    """The index of the matrix in a stack; () if the weight is no stack."""
    rows: np.ndarray
    """int64: rows of P, one per run; if transposed, one per element of a run."""
    columns: np.ndarray
    """int64: columns of Q, one per element of a run; if transposed, one per run."""
    transposed: bool
    """True if a run on disk is a part of a column in memory."""

    def factors(self) -> list[Factors]:
        """Return the deltas of the runs: P (n, r), Q (r, width) of each."""
        rows, columns = torch.from_numpy(self.rows), torch.from_numpy(self.columns)
        parts = [(f.P[self.matrix][rows], f.Q[self.matrix][:, columns], f.s) for f in self.deltas]
        return [Factors(Q.mT, P.mT, s) if self.transposed else Factors(P, Q, s) for P, Q, s in parts]


class _Axis(NamedTuple):
    """One axis of a piece: its size, and its strides in elements."""

    size: int
    on_disk: int
    in_memory: int


def cut_into_patches(
    piece: StoredPiece, shape: Sequence[int], stacked: bool, deltas: tuple[Factors, ...]
) -> Iterator[Patch]:
    """Yield the patches of a piece of a weight (*stack, rows, *rest) of this shape, in as few patches as possible."""
    rows, columns = shape[stacked], math.prod(shape[stacked + 1 :])
    axes = list(map(_Axis, piece.disk.sizes, piece.disk.strides, piece.memory.strides))
    axes.sort(key=lambda axis: -axis.on_disk)
    for unit in (columns, rows * columns):
        axes = [part for axis in axes for part in _split(axis, unit) if part.size > 1]

    def direction(axis: _Axis) -> str:
        if stacked and axis.in_memory % (rows * columns) == 0:
            return "stack"
        return "row" if axis.in_memory % columns == 0 else "column"

    along_run: list[_Axis] = []  # the innermost axes on disk, as long as they have no gaps and one direction
    while axes and axes[-1].on_disk == math.prod(axis.size for axis in along_run):
        if direction(axes[-1]) != direction((along_run or axes)[-1]) or direction(axes[-1]) == "stack":
            break
        along_run.insert(0, axes.pop())
    transposed = bool(along_run) and direction(along_run[-1]) == "row"
    across_runs: list[_Axis] = []  # the next axes, as long as they have the other direction of the matrix
    while axes and direction(axes[-1]) == ("column" if transposed else "row"):
        across_runs.insert(0, axes.pop())
    (run, run_memory), (starts, starts_memory) = _offsets(along_run), _offsets(across_runs)
    row_offsets, column_offsets = (run_memory, starts_memory) if transposed else (starts_memory, run_memory)
    for disk, memory in zip(*_offsets(axes), strict=True):
        matrix, element = divmod(int(memory) + piece.memory.offset, rows * columns)
        row, column = divmod(element, columns)
        yield Patch(
            Runs(piece.disk.offset + disk + starts, len(run)),
            deltas,
            (matrix,) if stacked else (),
            row + row_offsets // columns,
            column + column_offsets,
            transposed,
        )


def _split(axis: _Axis, unit: int) -> list[_Axis]:
    """Split an axis that crosses rows (or matrices) of `unit` elements in memory: one axis across, and one within."""
    size, on_disk, in_memory = axis
    if in_memory >= unit or size * in_memory <= unit:
        return [axis]
    inside = unit // in_memory
    assert unit % in_memory == size % inside == 0, "a piece covers whole rows, or lies within one"
    return [_Axis(size // inside, on_disk * inside, unit), _Axis(inside, on_disk, in_memory)]


def _offsets(axes: Sequence[_Axis]) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets on disk and in memory, int64, of all elements along these axes, the last axis fastest."""
    disk = memory = np.zeros(1, np.int64)
    for size, on_disk, in_memory in axes:
        index = np.arange(size, dtype=np.int64)
        disk = (disk[:, None] + index * on_disk).reshape(-1)
        memory = (memory[:, None] + index * in_memory).reshape(-1)
    return disk, memory


def locate_element(pieces: Sequence[StoredPiece], index: int) -> tuple[str, int]:
    """Return where element `index` of a weight is stored: the key, and the number of the element in that tensor."""
    for piece in pieces:
        rest, disk = index - piece.memory.offset, piece.disk.offset
        axes = sorted(zip(piece.memory.strides, piece.memory.sizes, piece.disk.strides, strict=True), reverse=True)
        for in_memory, size, on_disk in axes:
            if size > 1:
                i = min(max(rest // in_memory, 0), size - 1)
                rest, disk = rest - i * in_memory, disk + i * on_disk
        if rest == 0:
            return piece.key, disk
    raise AssertionError("the pieces of a weight cover it")
