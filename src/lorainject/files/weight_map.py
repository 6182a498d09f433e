"""Locate the weights of a model in the files of its checkpoint, without reading a single element.

transformers 5 gives many checkpoints other names and shapes in memory: it stacks the matrices of experts, splits a
fused qkv, transposes matrices and sorts rotary halves apart. To copy its rules would mean to follow every release.
Instead, its own conversions run here on tensors of the meta device, under a TorchDispatchMode that notes what fills
each storage:

    a stand-in for a tensor on disk         the key of that tensor
    clone (contiguous, reshape), stack,     pairs (view of the new storage, tensor that was copied into it)
      cat
    any other operator that allocates       the operator's name: the values that it computes are nowhere on disk

Views need no note, because they share a storage, and meta tensors have offset and strides. To locate a weight, its
elements are followed from storage to storage back to the disk, by arithmetic on strides. So whatever only moves
elements is known exactly, and a conversion that computes new values is refused by name. The result is a list of
pieces, each a pair of strided views with equal sizes:

    parameter.as_strided(piece.memory.sizes, piece.memory.strides, piece.memory.offset)     in memory, contiguous
      == tensor.as_strided(piece.disk.sizes, piece.disk.strides, piece.disk.offset)         on disk, named piece.key

Example: two experts a and b, stored as (3, 2), become one weight (2, 2, 3) by
torch.stack([a, b]).transpose(1, 2).contiguous(). The pieces of this weight are

    StoredPiece("a", disk=StridedView(0, (3, 2), (2, 1)), memory=StridedView(0, (3, 2), (1, 3)))
    StoredPiece("b", disk=StridedView(0, (3, 2), (2, 1)), memory=StridedView(6, (3, 2), (1, 3)))

Element (1, i, j) of the weight, number 6 + 3 i + j in memory, is element (j, i) of b, number 2 j + i on disk.

No other module touches transformers' internals of loading (PEFT uses them too). Where they cannot be imported, and for
modules that are not transformers' models, names and shapes on disk are taken to be those in memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class StridedView:
    """Elements of a contiguous tensor, selected as torch.as_strided selects them."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class StoredPiece:
    """A piece of a parameter and where it is stored: the elements of `disk` and of `memory` correspond one to one."""

    key: str
    """The name of the tensor on disk."""
    disk: StridedView
    memory: StridedView


class WeightMap(NamedTuple):
    """The stored pieces of a model's parameters, by the names of `model.named_parameters(remove_duplicate=False)`."""

    pieces: dict[str, tuple[StoredPiece, ...]]
    """The pieces of each located parameter, which cover every element once. Parameters may share a tensor on disk: each
    takes a part of it (q, k and v of a fused qkv), or all of it (tied weights)."""
    reasons: dict[str, str]
    """Why a parameter that the checkpoint fills cannot be located."""
    unused: dict[str, str]
    """Keys on disk that fill nothing in the model, with the names that transformers' renamings give them."""


def build_meta_model(folder: Path) -> nn.Module | None:
    """Build the model that a checkpoint's config.json describes, on the meta device.

    Return None without a config.json, or if transformers lacks the model type: code that comes with a checkpoint is
    never run. Raise whatever the model's class raises while it is built.
    """
    import transformers

    if not (folder / "config.json").is_file():
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        name = (getattr(config, "architectures", None) or [""])[0]
        build: Any = getattr(transformers, name, None) or transformers.AutoModel._model_mapping[type(config)]
    except (ValueError, KeyError):  # an unknown model type, or one without a model
        return None
    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # some classes still draw random numbers on the CPU
        return build(config)


def locate_weights(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> WeightMap:
    """Locate each parameter of the model on disk.

    The model may be on the meta device; `shapes` has the shape of each tensor of the checkpoint, by key. A parameter
    that is neither in `pieces` nor in `reasons` of the result is not on disk.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trace = TraceMode()
    steps, unused = _loading_steps(model, {key: trace.stand_in(key, shape) for key, shape in shapes.items()})
    pieces: dict[str, tuple[StoredPiece, ...]] = {}
    reasons: dict[str, str] = {}
    for step in steps:
        try:
            with trace, torch.no_grad():
                tensors = step.run()
        except Exception as e:  # a conversion raises all sorts on shapes that it was not made for
            reasons |= {name: f"{step.label}: {e}" for name in step.names if name in parameters}
            continue
        for name in tensors.keys() & parameters.keys():
            shape, expected = tuple(tensors[name].shape), tuple(parameters[name].shape)
            try:
                if shape != expected:
                    raise Untraceable(f"gives shape {shape}, but the model's parameter has shape {expected}")
                pieces[name] = tuple(trace.pieces(tensors[name]))
            except Untraceable as e:
                reasons[name] = f"{step.label}: {e}"
    tied = {id(parameters[name]): name for name in [*reasons, *pieces]}
    for name in [n for n in parameters if n not in pieces and n not in reasons]:
        other = tied.get(id(parameters[name]), "")
        if other in pieces:
            pieces[name] = pieces[other]
        if other in reasons:
            reasons[name] = reasons[other]
    return WeightMap({name: pieces[name] for name in parameters if name in pieces}, reasons, unused)


# --- transformers' rules ---


class _LoadingStep(NamedTuple):
    """One step of transformers' loader."""

    label: str
    """The name of the step in errors."""
    names: list[str]
    """The parameters that it fills."""
    run: Callable[[], Mapping[str, Tensor]]


def _loading_steps(model: nn.Module, stand_ins: Mapping[str, Tensor]) -> tuple[list[_LoadingStep], dict[str, str]]:
    """Return the steps of transformers' loader for these tensors, and the unused keys (see WeightMap)."""
    state = model.state_dict()
    rules: Any = None
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key
    except ImportError:
        pass
    else:
        rules = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else None
    if rules is None:
        steps = [_LoadingStep(key, [key], {key: t}.copy) for key, t in stand_ins.items() if key in state]
        return steps, {key: key for key in stand_ins if key not in state}

    prefix: Any = model.base_model_prefix
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    plain: dict[str, str] = {}
    converted: dict[str, Any] = {}
    unused: dict[str, str] = {}
    for key in sorted(stand_ins, key=dot_natural_key):  # experts in order; some renamings depend on earlier keys
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state or name in plain:
            unused[key] = name
        elif pattern is None:
            plain[name] = key
        else:
            if name not in converted:
                converted[name] = copy.deepcopy(by_pattern[pattern])
            converted[name].add_tensor(name, key, pattern, stand_ins[key])
    steps = [_LoadingStep(key, [name], {name: stand_ins[key]}.copy) for name, key in plain.items()]
    return steps + [_conversion_step(model, *item) for item in converted.items()], unused


def _conversion_step(model: nn.Module, name: str, converter: Any) -> _LoadingStep:
    """Return the step of one converter, with the tensors that it collected for its first target, `name`."""
    operations = ", ".join(type(operation).__name__ for operation in converter.operations)
    names = [name.replace(converter.target_patterns[0], target) for target in converter.target_patterns]

    def run() -> dict[str, Tensor]:
        results = converter.convert(name, model=model, config=model.config)
        return {k: t[0] if isinstance(t, list) else t for k, t in results.items()}

    return _LoadingStep(f"{operations} of {min(converter.layer_targets[name])}", names, run)


# --- which element went where ---


UNEVEN = "the elements are not evenly spaced on disk"


class Untraceable(Exception):
    """Elements that no strided views of tensors on disk describe; the message says why."""


class TraceMode(TorchDispatchMode):
    """Notes for every storage what fills it: a tensor on disk, copies of other tensors, or computed values."""

    def __init__(self) -> None:
        super().__init__()
        self.contents: dict[int, str | Untraceable | list[tuple[Tensor, Tensor]]] = {}
        """For each storage a key on disk, why there is none, or pairs (view of the storage, tensor copied there)."""
        self.alive: list[Tensor] = []  # so that no storage's address is used again

    def stand_in(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """Return a meta tensor that stands for the tensor on disk."""
        t = torch.empty(shape, device="meta")
        self._note(t, key)
        return t

    def _note(self, t: Tensor, content: str | Untraceable | list[tuple[Tensor, Tensor]]) -> None:
        self.contents[_storage_id(t)] = content
        self.alive.append(t)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        dim = args[1] if len(args) > 1 else 0
        if name in ("clone", "_to_copy"):
            self._note(out, [(out, args[0])])
        elif name == "stack":
            self._note(out, list(zip(out.unbind(dim), args[0], strict=True)))
        elif name == "cat":
            self._note(out, list(zip(out.split([t.shape[dim] for t in args[0]], dim), args[0], strict=True)))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (func._schema.is_mutable or _storage_id(t) not in self.contents):
                self._note(t, Untraceable(f"{name} computes new values"))
        return out

    def pieces(self, t: Tensor) -> Iterator[StoredPiece]:
        """Yield the pieces of a tensor that was made under this mode. Raise Untraceable if there are none."""
        return self._follow(_storage_id(t), _view_of(t), _row_major(t.shape)) if t.numel() else iter(())

    def _follow(self, storage: int, stored: StridedView, memory: StridedView) -> Iterator[StoredPiece]:
        """Yield the pieces of these elements, which are `stored` in this storage and `memory` in the parameter."""
        content = self.contents[storage]
        if isinstance(content, Untraceable):
            raise content
        if isinstance(content, str):
            if 0 in stored.strides:
                raise Untraceable("one element on disk fills several of the parameter")
            yield StoredPiece(content, stored, memory)
            return
        for part, source in content:
            if len(content) == 1:  # the part fills the storage: `stored` lies within it
                positions, target = _select(_in_storage_order(_view_of(part), _row_major(part.shape)), stored, memory)
                origin, target = _select(_view_of(source), positions, target)
            else:  # `stored` fills the storage: the part lies within it
                target, origin = _select(_in_storage_order(stored, memory), _view_of(part), _view_of(source))
            yield from self._follow(_storage_id(source), origin, target)


def _select(space: StridedView, positions: StridedView, twin: StridedView) -> tuple[StridedView, StridedView]:
    """Return the elements of `space` at these positions, counted row by row, as a view of the storage of `space`.

    An axis of `positions` that crosses rows of `space` is split in two. The same axis of `twin` is split likewise, so
    that both views keep equal sizes. Raise Untraceable if no strides describe the selection.
    """
    rows = _row_major(space.sizes).strides
    axes = [axis for axis in zip(space.sizes, rows, space.strides, strict=True) if axis[0] > 1]
    last = [positions.offset // row % size for size, row, _ in axes]  # of the first element; moved to the last below
    start = space.offset + sum(i * stride for i, (_, _, stride) in zip(last, axes, strict=True))
    split: list[tuple[int, int, int]] = []
    for count, step, twin_stride in zip(positions.sizes, positions.strides, twin.strides, strict=True):
        end = len(split)
        while count > 1:
            d = next((d for d, (_, row, _) in enumerate(axes) if row <= step), None)
            if d is None:
                raise Untraceable(UNEVEN)
            size, row, stride = axes[d]
            n = min(count, size // (step // row))
            if n < 2 or step % row or count % n:
                raise Untraceable(UNEVEN)
            last[d] += (n - 1) * (step // row)
            split.insert(end, (n, step // row * stride, twin_stride))
            count, step, twin_stride = count // n, step * n, twin_stride * n
    if positions.offset >= math.prod(space.sizes) or any(i >= size for i, (size, _, _) in zip(last, axes, strict=True)):
        raise Untraceable(UNEVEN)
    sizes, strides, twin_strides = tuple(zip(*split, strict=True)) or ((), (), ())
    return StridedView(start, sizes, strides), StridedView(twin.offset, sizes, twin_strides)


def _in_storage_order(stored: StridedView, other: StridedView) -> StridedView:
    """Return `other` with its axes in the order in which `stored` has them in the storage, the longest stride first.

    Raise Untraceable if there are gaps between the elements of `stored`.
    """
    axes = sorted((d for d, size in enumerate(stored.sizes) if size > 1), key=lambda d: -stored.strides[d])
    sizes = tuple(stored.sizes[d] for d in axes)
    if tuple(stored.strides[d] for d in axes) != _row_major(sizes).strides:
        raise Untraceable("only a part of a tensor that was joined from several is used")
    return StridedView(other.offset, sizes, tuple(other.strides[d] for d in axes))


def _row_major(sizes: tuple[int, ...]) -> StridedView:
    return StridedView(0, tuple(sizes), tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes))))


def _view_of(t: Tensor) -> StridedView:
    return StridedView(int(t.storage_offset()), tuple(t.shape), t.stride())


def _storage_id(t: Tensor) -> int:
    return t.untyped_storage()._cdata
