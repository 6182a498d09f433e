"""Two checkpoints on disk, tensor by tensor: which bytes are the same, and which tensors fit each other."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
import torch

from ..checkpoint.byte_runs import Runs
from ..checkpoint.copying import CHUNK
from ..checkpoint.shards import Shard, open_unchanged
from ..files.io.safetensors_file import TORCH_DTYPES, TensorEntry
from ..lora.weight_kinds import DTYPES

RECAST = "holds the base's values, rounded to another dtype"


class OpenShards:
    """The tensors of a checkpoint whose shards are open, and stay so until `stack` is closed."""

    def __init__(self, shards: Sequence[Shard], stack: ExitStack) -> None:
        self.entries = {key: entry for shard in shards for key, entry in shard.tensors.items()}
        self.file_of: dict[str, int] = {}
        for shard in shards:
            self.file_of |= dict.fromkeys(shard.tensors, stack.enter_context(open_unchanged(shard)))

    def at(self, key: str) -> tuple[int, TensorEntry]:
        """Return the file descriptor and the entry of a tensor."""
        return self.file_of[key], self.entries[key]

    def size(self, key: str) -> int:
        """Return the bytes of a tensor."""
        return self.entries[key].stop - self.entries[key].start

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Read some bytes of a tensor."""
        return os.pread(self.file_of[key], stop - start, self.entries[key].start + start)


class Pair(NamedTuple):
    """The checkpoint that another one is compared with, and the other one."""

    base: OpenShards
    other: OpenShards

    def why_apart(self, key: str) -> str:
        """Return why a tensor of the base has no counterpart of the same kind; empty if it has one."""
        if key not in self.other.entries:
            return "is not in the other checkpoint"
        mine, theirs = self.base.entries[key], self.other.entries[key]
        if mine.shape != theirs.shape:
            return f"has shape {list(theirs.shape)}, the base's has {list(mine.shape)}"
        if mine.dtype != theirs.dtype and not all(TORCH_DTYPES.get(e.dtype) in DTYPES for e in (mine, theirs)):
            return f"is stored as {theirs.dtype}, the base's as {mine.dtype}"
        return ""

    def difference(self, key: str, except_for: Sequence[Runs] = ()) -> str:
        """Return how a tensor differs from the base's, outside of some runs; empty if it has the same bytes there."""
        if why := self.why_apart(key):
            return why
        mine, theirs = self.base.entries[key], self.other.entries[key]
        dtypes = TORCH_DTYPES.get(mine.dtype, torch.uint8), TORCH_DTYPES.get(theirs.dtype, torch.uint8)
        starts = np.sort(np.concatenate([runs.starts for runs in except_for])) if except_for else None
        width = except_for[0].width if except_for else 0
        changed, step = 0, CHUNK // 8
        count = self.base.size(key) // dtypes[0].itemsize
        for first in range(0, count, step):
            pieces = [shards.read(key, first * d.itemsize, min(first + step, count) * d.itemsize)
                      for shards, d in zip(self, dtypes, strict=True)]  # fmt: skip
            if pieces[0] == pieces[1]:
                continue
            w0, m = (torch.frombuffer(bytearray(raw), dtype=d) for raw, d in zip(pieces, dtypes, strict=True))
            differs = _differing(w0, m) + first
            if starts is not None and len(differs):
                before = np.searchsorted(starts, differs, side="right") - 1
                differs = differs[(before < 0) | (differs - starts[before.clip(0)] >= width)]
            changed += len(differs)
        if changed:
            return f"{changed:,} of {count:,} elements differ from the base's"
        return RECAST if mine.dtype != theirs.dtype else ""


def _differing(w0: torch.Tensor, m: torch.Tensor) -> np.ndarray:
    """Return the positions at which two tensors differ in a bit; in a value, if they have two dtypes."""
    if w0.dtype != m.dtype:
        w0 = w0.to(m.dtype)
        return ((w0 != m) & ~(w0.isnan() & m.isnan())).nonzero().flatten().numpy()
    raw = [t.view(torch.uint8).view(-1, t.element_size()) for t in (w0, m)]
    return (raw[0] != raw[1]).any(1).nonzero().flatten().numpy()


@contextmanager
def opened(base: Sequence[Shard], other: Sequence[Shard]) -> Iterator[Pair]:
    """Open the shards of two checkpoints. Raise FileError if a file is changed meanwhile."""
    with ExitStack() as stack:
        yield Pair(OpenShards(base, stack), OpenShards(other, stack))


def new_tensors(pair: Pair, known: Collection[str]) -> list[str]:
    """Return a line per tensor of the other checkpoint that the base does not have."""
    return [f"{key}: is not in the base" for key in pair.other.entries if key not in known]
