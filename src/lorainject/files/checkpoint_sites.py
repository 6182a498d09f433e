"""Put the sites of an adapter under a checkpoint's names onto the parameters that transformers fills from them.

A checkpoint, or an older transformers, may have one linear per expert where the model has a stack, or three linears
where the model has a fused weight. weight_map.py tells which rows of which parameter transformers' loader would fill
from which rows on disk. The rows of B are then moved in the same way, and A does not change:

    experts.3.gate_proj    A, B (m, r)    ->    experts.gate_up_proj    A[3], B[3][:m]

A site whose weight the loader would transpose, or take pieces of rows from, has no such form and keeps its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..targets.model_weights import ModelWeight
from . import transforms
from .record import StoredSite
from .weight_map import StoredPiece, StridedView, locate_weights

EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<n>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj|w1|w2|w3)")
EXPERT_LEAVES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))  # each: gate, up, down


def convert_checkpoint_sites(
    sites: list[StoredSite], model: nn.Module, by_name: Mapping[str, ModelWeight]
) -> list[StoredSite]:
    """Return sites under a checkpoint's names as sites on the parameters that transformers' loader fills from them.

    A site whose weight leads to no parameter is returned as it is.
    """
    movable = {
        f"{s.path}.weight": s
        for s in sites
        if s.parameter == "weight" and s.kind == "linear" and s.A.ndim == 2 and s.magnitude is None
    }
    shapes = {key: (s.B.shape[0], s.A.shape[1]) for key, s in movable.items()}
    pieces, _, _ = locate_weights(model, _with_sibling_experts(shapes, model))
    pieces = {name: tuple(piece for piece in parts if piece.key in movable) for name, parts in pieces.items()}
    moved: dict[tuple[str, range], dict[int, StoredSite]] = {}
    unplaced: set[str] = set()  # what reaches a parameter in another way than by whole rows
    for name, parts in pieces.items():
        weight = by_name.get(name.removesuffix(".weight"))
        for piece in parts:
            if weight is None or (rows := _moved_rows(piece, weight, shapes[piece.key])) is None:
                unplaced.add(piece.key)
                continue
            expert, rows_in_memory, rows_on_disk = rows
            s = movable[piece.key]
            part = replace(s, B=s.B[rows_on_disk.start : rows_on_disk.stop])
            moved.setdefault((weight.names[0], rows_in_memory), {})[expert] = part
    placed = {piece.key for parts in pieces.values() for piece in parts} - unplaced
    return [_site_on_rows(by_name[name], rows, experts) for (name, rows), experts in moved.items()] + [
        s for s in sites if movable.get(f"{s.path}.weight") is not s or f"{s.path}.weight" not in placed
    ]


def _with_sibling_experts(shapes: Mapping[str, tuple[int, int]], model: nn.Module) -> dict[str, tuple[int, int]]:
    """Add the shapes of experts and parts without an adapter, because transformers stacks all of them."""
    complete = dict(shapes)
    count = max((p.shape[0] for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name), default=0)
    for key, shape in shapes.items():
        if (match := EXPERT.fullmatch(key.removesuffix(".weight"))) is None:
            continue
        leaves = EXPERT_LEAVES[match["leaf"].startswith("w")]
        up_shape = shape if match["leaf"] != leaves[2] else shape[::-1]
        for n in range(max(count, int(match["n"]) + 1)):
            for leaf in leaves:
                name = f"{match['experts']}.{n}.{leaf}.weight"
                complete.setdefault(name, up_shape if leaf != leaves[2] else up_shape[::-1])
    return complete


def _moved_rows(piece: StoredPiece, w: ModelWeight, shape: tuple[int, int]) -> tuple[int, range, range] | None:
    """Return the expert (0 without experts), the rows of the weight, and the rows on disk that they come from.

    None if the piece is something else than whole rows.
    """
    stored = tuple(w.module._parameters[w.parameter].shape)  # type: ignore[union-attr]
    count, width = math.prod(piece.disk.sizes), shape[1]
    is_contiguous = _is_contiguous(piece.disk) and _is_contiguous(piece.memory)
    if stored[-1] != width or w.kind.transposed or not is_contiguous or count % width or piece.disk.offset % width:
        return None
    n, on_disk = count // width, piece.disk.offset // width
    expert, offset = divmod(piece.memory.offset, math.prod(stored[-2:]))
    return expert, range(offset // width, offset // width + n), range(on_disk, on_disk + n)


def _is_contiguous(view: StridedView) -> bool:
    return all(stride == math.prod(view.sizes[i + 1 :]) for i, stride in enumerate(view.strides))


def _site_on_rows(w: ModelWeight, rows: range, experts: Mapping[int, StoredSite]) -> StoredSite:
    """Return one site on these rows of the weight. In a stack, experts that have no adapter get zeros."""
    shape = tuple(w.module._parameters[w.parameter].shape)  # type: ignore[union-attr]
    first, r = next(iter(experts.values())), max(s.r for s in experts.values())
    equal = {e: transforms.with_scale_folded(transforms.with_rank(s, r), first.scale) for e, s in experts.items()}
    like = next(iter(equal.values()))
    label = ""
    if len(rows) != shape[-2]:
        names = (name for name, parts in w.parts.items() if parts == (rows,))
        label = next(names, f"{rows.start}:{rows.stop}")
    A, B = like.A, like.B
    if len(shape) == 3:
        A = _stack_experts([equal[e].A if e in equal else None for e in range(shape[0])])
        B = _stack_experts([equal[e].B if e in equal else None for e in range(shape[0])])
    return replace(like, path=w.paths[0], parameter=w.parameter, label=label, rows=(rows,) if label else None,
                   kind=w.kind.name, shape=shape, parts=w.parts if len(shape) == 3 else {}, A=A, B=B)  # fmt: skip


def _stack_experts(tensors: list[Tensor | None]) -> Tensor:
    like = next(t for t in tensors if t is not None)
    transforms.checked_shape("a stack of experts", len(tensors), *like.shape)
    return torch.stack([torch.zeros_like(like) if t is None else t.to(like.dtype) for t in tensors])
