"""The weights of a model on disk, matrix by matrix, in a checkpoint and in another one of the same model.

Names and shapes on disk may differ from those in memory, and between the two checkpoints; transformers' loading rules
tell where each weight lies (files/weight_map.py). A weight is read as its matrices are stored in memory, (rows, width);
of a stack of experts one matrix at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint.byte_runs import Patch, cut_into_patches
from ..files.io.safetensors_file import TORCH_DTYPES, TensorEntry
from ..files.weight_map import StoredPiece, build_meta_model, locate_weights
from ..lora.weight_kinds import DTYPES
from ..numerics.tile_merge import TileWorkspace
from ..targets.model_weights import ModelWeight
from .pairs import OpenShards


class StoredModel:
    """Where the parameters of a model lie in one checkpoint.

    Args:
        model: The model, on the meta device.
        shards: The open shards of the checkpoint.
    """

    def __init__(self, model: nn.Module, shards: OpenShards) -> None:
        self.shards = shards
        self.pieces, self.reasons, self.unused = locate_weights(model, {k: e.shape for k, e in shards.entries.items()})

    def why_unreadable(self, name: str) -> str:
        """Return why a parameter cannot be read as numbers; empty if it can."""
        if name in self.reasons:
            return self.reasons[name]
        if name not in self.pieces:
            return "is not in the checkpoint"
        stored = {self.shards.entries[piece.key].dtype for piece in self.pieces[name]}
        if len(stored) > 1 or not all(TORCH_DTYPES.get(dtype) in DTYPES for dtype in stored):
            return f"is stored as {', '.join(sorted(stored))}"
        return ""

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a readable parameter."""
        return TORCH_DTYPES[self.shards.entries[self.pieces[name][0].key].dtype]

    def matrices(self, name: str, shape: tuple[int, ...], stacked: bool) -> Iterator[Tensor]:
        """Yield the matrices of a weight, each (rows, width), in the dtype on disk."""
        patches: dict[tuple[int, ...], list[tuple[str, Patch]]] = {}
        for piece in self.pieces[name]:
            for patch in cut_into_patches(piece, shape, stacked, ()):
                patches.setdefault(patch.matrix, []).append((piece.key, patch))
        rows, width = shape[stacked], math.prod(shape[stacked + 1 :])
        for matrix in sorted(patches):
            m = torch.empty(rows, width, dtype=self.dtype(name))
            for key, patch in patches[matrix]:
                file, entry = self.shards.at(key)
                values = patch.runs.read_tile(file, entry, slice(0, len(patch.runs.starts)), TileWorkspace())
                target = (_slice(patch.rows), _slice(patch.columns))
                if isinstance(target[0], slice) or isinstance(target[1], slice):
                    m[target] = values.mT if patch.transposed else values
                else:
                    m[target[0][:, None], target[1]] = values.mT if patch.transposed else values
            yield m

    def whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a parameter of any shape."""
        flat = torch.empty(math.prod(shape), dtype=self.dtype(name))
        for piece in self.pieces[name]:
            raw = bytearray(self.shards.read(piece.key, 0, self.shards.size(piece.key)))
            stored = torch.frombuffer(raw, dtype=flat.dtype)
            memory, disk = piece.memory, piece.disk
            flat.as_strided(memory.sizes, memory.strides, memory.offset).copy_(
                stored.as_strided(disk.sizes, disk.strides, disk.offset)
            )
        return flat.view(shape)


def _slice(index: np.ndarray) -> slice | Tensor:
    """Return an index as a slice where it is a range."""
    first, last = int(index[0]), int(index[-1])
    is_range = last - first + 1 == len(index) and bool((np.diff(index) == 1).all())
    return slice(first, last + 1) if is_range else torch.from_numpy(index)


def build_model(folder: Path, entries: Mapping[str, TensorEntry]) -> nn.Module:
    """Build the model of a checkpoint on the meta device; of an unknown model, a linear for each matrix."""
    model = build_meta_model(folder)
    if model is not None:
        return model
    model = nn.Module()
    for key, entry in entries.items():
        *parents, leaf, parameter = key.split(".") if "." in key else ("", key)
        if parameter != "weight" or len(entry.shape) != 2:
            continue
        module = model
        for name in parents:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        module.add_module(leaf, nn.Linear(entry.shape[1], entry.shape[0], bias=False, device="meta"))
    return model


def full_name(weight: ModelWeight) -> str:
    """Return the weight's name in model.named_parameters()."""
    return ".".join(filter(None, (weight.paths[0], weight.parameter)))


def keys_of(pieces: Mapping[str, Sequence[StoredPiece]]) -> set[str]:
    """Return the tensors on disk that hold a part of some parameter."""
    return {piece.key for parts in pieces.values() for piece in parts}
