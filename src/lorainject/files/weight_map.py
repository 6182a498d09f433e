"""Where each weight of a model in memory lies on disk: an index map, found without reading or holding a single element.

transformers 5 gives many checkpoints other names and shapes in memory: per-expert matrices are stacked, a fused qkv is split,
matrices are transposed, rotary halves are sorted apart. Its own rules, run on tensors of the meta device, tell which
element goes where: views keep their offset and strides there, and what copies (`contiguous`, `reshape`, `stack`, `cat`) is
watched and undone by arithmetic on strides. So whatever only moves elements is known exactly, by whichever operation, and
what computes new ones is refused by name. Both views of a place have the same sizes:

    parameter.as_strided(place.memory.sizes, place.memory.strides, place.memory.offset)     a contiguous parameter
      == tensor.as_strided(place.disk.sizes, place.disk.strides, place.disk.offset)         the tensor on disk named place.key

The places of a parameter cover each of its elements once. Parameters may share a tensor on disk, in parts (q, k and v) or as a
whole (tied weights: each name has the place).

All contact with transformers' internals is here: its rules for names and conversions (PEFT uses them too), and which keys it
ignores. Where they can't be imported (another version), and for modules that are not its models, names and shapes on disk are
taken to be those in memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class View:
    """Elements of a contiguous tensor, as torch.as_strided takes them."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Elements of a parameter and where they are on disk: element i of one view is element i of the other."""

    key: str
    disk: View
    memory: View


def meta_model(folder: Path) -> nn.Module | None:
    """The model that a checkpoint's config.json describes, on the meta device; None if there is none, or none that transformers has.

    Code that comes with a checkpoint is never run. What the model's class raises while it is built is passed on.
    """
    import transformers

    if not (folder / "config.json").is_file():
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        name = (getattr(config, "architectures", None) or [""])[0]
        build: Any = getattr(transformers, name, None) or transformers.AutoModel._model_mapping[type(config)]
    except (ValueError, KeyError):  # a model type that it does not know, or one without a model
        return None
    with (
        torch.device("meta"),
        torch.random.fork_rng(devices=[]),
    ):  # some classes draw numbers in real memory nevertheless
        return build(config)


def places(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[Place, ...]], dict[str, str], list[str]]:
    """Each parameter's places, given the shapes of all tensors on disk; why others have none; what is left over on either side.

    Parameters have their names of `model.named_parameters(remove_duplicate=False)`. What is left over: a line for each key on disk that leads
    nowhere, and for each parameter that is not on disk; keys that transformers ignores don't count.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    watch = _Watch()
    rules, left = _rules(model, {key: watch.on_disk(key, shape) for key, shape in shapes.items()})
    found: dict[str, tuple[Place, ...]] = {}
    reasons: dict[str, str] = {}
    for rule in rules:
        try:
            with watch, torch.no_grad():
                results = rule.results()
        except Exception as e:  # whatever an operation raises on shapes that it was not made for
            reasons |= {name: f"{rule.what}: {e}" for name in rule.names if name in parameters}
            continue
        for name in results.keys() & parameters.keys():
            given, wanted = tuple(results[name].shape), tuple(parameters[name].shape)
            try:
                if given != wanted:
                    raise _NoView(f"gives {given}, the model has {wanted}")
                found[name] = tuple(watch.origin(results[name]))
            except _NoView as e:
                reasons[name] = f"{rule.what}: {e}"
    tied = {id(parameters[name]): name for name in [*reasons, *found]}
    for name, parameter in parameters.items():
        if name not in found and name not in reasons and (other := tied.get(id(parameter))):
            found |= {name: found[other]} if other in found else {}
            reasons |= {name: reasons[other]} if other in reasons else {}
    lost = [name for name in parameters if name not in found and name not in reasons]
    return {name: found[name] for name in parameters if name in found}, reasons, _problems(model, left, lost)


# --- transformers' rules -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    """A step of loading: what it is called in a reason, the parameters it fills, and how."""

    what: str
    names: list[str]
    results: Callable[[], Mapping[str, Tensor]]


def _rules(model: nn.Module, disk: Mapping[str, Tensor]) -> tuple[list[_Rule], dict[str, str]]:
    """What transformers' loader would do with these tensors; and the new names of the keys that it would not use."""
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
        return [_Rule(key, [key], {key: t}.copy) for key, t in disk.items() if key in state], {
            key: key for key in disk if key not in state
        }

    prefix: Any = model.base_model_prefix
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    plain: dict[str, str] = {}
    converted: dict[str, Any] = {}
    left: dict[str, str] = {}
    for key in sorted(disk, key=dot_natural_key):  # experts in order; some renamings go by what came before
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state or name in plain:
            left[key] = name
        elif pattern is None:
            plain[name] = key
        else:
            if name not in converted:
                converted[name] = copy.deepcopy(by_pattern[pattern])
            converted[name].add_tensor(name, key, pattern, disk[key])
    return [_Rule(key, [name], {name: disk[key]}.copy) for name, key in plain.items()] + [
        _conversion(model, *item) for item in converted.items()
    ], left


def _conversion(model: nn.Module, name: str, converter: Any) -> _Rule:
    """One converter, with the tensors that it collected for its first target, `name`."""
    what = f"{', '.join(type(operation).__name__ for operation in converter.operations)} of {min(converter.layer_targets[name])}"
    names = [name.replace(converter.target_patterns[0], target) for target in converter.target_patterns]

    def results() -> dict[str, Tensor]:
        given = converter.convert(name, model=model, config=model.config)
        return {k: t[0] if isinstance(t, list) else t for k, t in given.items()}

    return _Rule(what, names, results)


def _problems(model: nn.Module, left: Mapping[str, str], lost: list[str]) -> list[str]:
    """A line for each that transformers does not ignore: keys by their new names, and parameters."""
    info = SimpleNamespace(unexpected_keys=set(left.values()), missing_keys=set(lost))
    if adjust := getattr(model, "_adjust_missing_and_unexpected_keys", None):
        adjust(info)
    leads = [f"{key}: leads nowhere in the model" for key, name in left.items() if name in info.unexpected_keys]
    return leads + [f"{name}: not on disk" for name in lost if name in info.missing_keys]


# --- which element went where ------------------------------------------------------------------------------------------


UNEVEN = "the elements are not evenly spaced on disk"


class _NoView(Exception):
    """The elements are not places on disk; the message says of what."""


class _Watch(TorchDispatchMode):
    """Remembers of every storage what it is made of: a tensor on disk, copies of other tensors, or something computed."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, str | _NoView | list[tuple[Tensor, Tensor]]] = {}
        """By storage: a key on disk, why there is none, or parts (views of the storage) with what was copied there."""
        self.alive: list[Tensor] = []  # lest a storage's number be given again

    def on_disk(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """A stand-in for the tensor on disk."""
        return self._note(torch.empty(shape, device="meta"), key)

    def _note(self, t: Tensor, what: str | _NoView | list[tuple[Tensor, Tensor]]) -> Tensor:
        self.made[_storage(t)] = what
        self.alive.append(t)
        return t

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
            if isinstance(t, Tensor) and (func._schema.is_mutable or _storage(t) not in self.made):
                self._note(t, _NoView(f"{name} computes new values"))
        return out

    def origin(self, t: Tensor) -> Iterator[Place]:
        """The places of a tensor that was made under watch."""
        return self._follow(_storage(t), _view(t), _rows(t.shape)) if t.numel() else iter(())

    def _follow(self, storage: int, stored: View, memory: View) -> Iterator[Place]:
        """Elements that are `memory` in the parameter, `stored` in this storage: back to the disk."""
        made = self.made[storage]
        if isinstance(made, str):
            if 0 in stored.strides:
                raise _NoView("one element on disk for several")
            yield Place(made, stored, memory)
            return
        if isinstance(made, _NoView):
            raise made
        for part, source in made:
            if len(made) == 1:  # it fills the storage: what is stored lies in it
                counted, target = _through(_in_order(_view(part), _rows(part.shape)), stored, memory)
                origin, target = _through(_view(source), counted, target)
            else:  # what is stored fills the storage: the part lies in it
                target, origin = _through(_in_order(stored, memory), _view(part), _view(source))
            yield from self._follow(_storage(source), origin, target)


def _through(space: View, steps: View, other: View) -> tuple[View, View]:
    """`steps` count the elements of `space` row by row: the same steps in what `space` views. One that crosses rows is split, in `other` too."""
    axes = [axis for axis in zip(space.sizes, _rows(space.sizes).strides, space.strides, strict=True) if axis[0] > 1]
    at = [steps.offset // row % size for size, row, _ in axes]
    start = space.offset + sum(i * stride for i, (_, _, stride) in zip(at, axes, strict=True))
    split: list[tuple[int, int, int]] = []
    for count, step, twin in zip(steps.sizes, steps.strides, other.strides, strict=True):
        end = len(split)
        while count > 1:
            d = next((d for d, (_, row, _) in enumerate(axes) if row <= step), None)
            if d is None:
                raise _NoView(UNEVEN)
            size, row, stride = axes[d]
            n = min(count, size // (step // row))
            if n < 2 or step % row or count % n:
                raise _NoView(UNEVEN)
            at[d] += (n - 1) * (step // row)
            split.insert(end, (n, step // row * stride, twin))
            count, step, twin = count // n, step * n, twin * n
    if steps.offset >= math.prod(space.sizes) or any(i >= size for i, (size, _, _) in zip(at, axes, strict=True)):
        raise _NoView(UNEVEN)
    sizes, strides, twins = tuple(zip(*split, strict=True)) or ((), (), ())
    return View(start, sizes, strides), View(other.offset, sizes, twins)


def _in_order(stored: View, other: View) -> View:
    """`other`, with its dimensions in the order that they have in the storage, which `stored` fills from its start."""
    axes = sorted(
        (axis for axis in range(len(stored.sizes)) if stored.sizes[axis] > 1), key=lambda axis: -stored.strides[axis]
    )
    sizes = tuple(stored.sizes[axis] for axis in axes)
    if tuple(stored.strides[axis] for axis in axes) != _rows(sizes).strides:
        raise _NoView("a part of what was put together")
    return View(other.offset, sizes, tuple(other.strides[axis] for axis in axes))


def _rows(sizes: tuple[int, ...]) -> View:
    return View(0, tuple(sizes), tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes))))


def _view(t: Tensor) -> View:
    return View(int(t.storage_offset()), tuple(t.shape), t.stride())


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata
