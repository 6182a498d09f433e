"""What trains besides A and B, and belongs to the adapter: modules_to_save, biases, rows of tokens.

The base's own values stay where they are. A `ReplacementTensor` stands in the place of each of these tensors while the
adapter is active (lora/replacement.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..lora.model_index import ModelIndex, is_offloaded
from ..lora.replacement import ReplacementTensor
from ..lora.weight_kinds import is_quantized, why_unsupported
from ..plan import TrainedTensor, site_name
from ..spec import LoraSpec
from .matcher import Matcher, WeightMatch
from .model_weights import ModelWeight, WeightKey


class PlannedReplacement(NamedTuple):
    """A tensor of the base model that an adapter replaces."""

    paths: tuple[str, ...]
    """All paths of the module that owns the tensor."""
    parameter: str
    readers: tuple[tuple[str, nn.Module], ...]
    """Other modules whose code reads the tensor, with their paths."""
    adapter: ReplacementTensor


def resolve_trained_tensors(spec: LoraSpec, matcher: Matcher) -> list[TrainedTensor]:
    """Return the tensors that `modules_to_save` and `trainable_tokens` of a spec mean; add what is wrong to the
    matcher's problems."""
    chosen: dict[WeightKey, TrainedTensor] = {}
    for entry in spec.modules_to_save:
        modules = matcher.modules(entry)
        inside = dict.fromkeys(m for module in modules for m in module.modules() if id(m) in matcher.index.first_paths)
        parameters = [(m, name) for m in inside for name, p in m._parameters.items() if p is not None]
        if not parameters:
            what = "has no parameters" if modules else "matches no module"
            matcher.problems.append(f"modules_to_save {entry!r} {what}")
        for module, parameter in parameters:
            chosen[id(module), parameter] = _tensor(spec, matcher, module, parameter, "modules_to_save")
    for name, ids in spec.trainable_tokens:
        embeddings = [m for m in dict.fromkeys(matcher.modules(name)) if isinstance(m, nn.Embedding)]
        if not embeddings:
            matcher.problems.append(f"trainable_tokens {name!r} matches no embedding")
        for module in embeddings:
            if max(ids) >= module.num_embeddings:
                path, last = matcher.index.first_paths[id(module)], module.num_embeddings - 1
                matcher.problems.append(f"trainable_tokens: {path} has the rows 0 to {last}, but not {max(ids)}")
            if (id(module), "weight") in chosen:
                path = matcher.index.first_paths[id(module)]
                matcher.problems.append(f"{path} is in modules_to_save and in trainable_tokens")
            chosen[id(module), "weight"] = _tensor(spec, matcher, module, "weight", "trainable_tokens", ids)
    return list(chosen.values())


def resolve_biases(
    spec: LoraSpec, matcher: Matcher, matches: Sequence[WeightMatch], others: Sequence[TrainedTensor]
) -> list[TrainedTensor]:
    """Return the biases that `spec.bias` means, without those that train anyway."""
    taken = {(t.path, t.parameter) for t in others}
    adapted = {id(module) for match in matches for module in match.weight.modules}
    return [
        _tensor(spec, matcher, module, name, "bias")
        for path, module in {id(m): (path, m) for path, m in reversed(matcher.index.walked)}.values()
        if spec.bias == "all" or (spec.bias == "lora_only" and id(module) in adapted)
        for name, p in module._parameters.items()
        if p is not None and "bias" in name.split("_") and (path, name) not in taken
    ]


def within_trained_modules(spec: LoraSpec, matcher: Matcher) -> set[WeightKey]:
    """Return the keys of the weights that train whole, or some rows of them, and carry no A and B therefore."""
    entries = [*spec.modules_to_save, *(name for name, _ in spec.trainable_tokens)]
    inside = {id(inner) for entry in entries for module in matcher.modules(entry) for inner in module.modules()}
    return {key for w in matcher.weights for key in w.keys if key[0] in inside}


def _tensor(spec: LoraSpec, matcher: Matcher, module: nn.Module, parameter: str, field: str,
            ids: tuple[int, ...] | None = None) -> TrainedTensor:  # fmt: skip
    """Return one trained tensor; add why it cannot train to the matcher's problems."""
    weight, path = module._parameters[parameter], matcher.index.first_paths[id(module)]
    assert weight is not None
    name = site_name(path, parameter)
    tied = [site_name(matcher.index.first_paths[id(m)], n) for m, n in tied_parameters(matcher.index, module, weight)]
    if (reason := why_unsupported(module, parameter)) is not None:
        matcher.problems.append(f"{field}: {name}: {reason}")
    elif is_offloaded(module, parameter):
        matcher.problems.append(f"{field}: {name} is offloaded, so that its values cannot be copied")
    elif is_quantized(module):
        matcher.problems.append(f"{field}: {name} is quantized, so that it cannot train")
    elif tied and ids is None:
        matcher.problems.append(
            f"{field}: {name} is tied to {', '.join(tied)}, and would no longer be: adapt it with A and B, train rows"
            f" of it (trainable_tokens), or untie the model first"
        )
    return TrainedTensor(
        path=path, parameter=parameter, shape=tuple(weight.shape), ids=ids, field=field,
        dtype=spec.dtype or torch.promote_types(weight.dtype, torch.float32),
    )  # fmt: skip


def tied_parameters(index: ModelIndex, module: nn.Module, weight: Tensor) -> list[tuple[nn.Module, str]]:
    """Return the other modules that have this weight, with its name in each."""
    others = {id(m): m for _, m in index.walked if m is not module}
    return [(m, name) for m in others.values() for name, p in m._parameters.items() if p is weight]


def replacements(
    index: ModelIndex, weights: Mapping[str, ModelWeight], module: nn.Module, parameter: str, value: Tensor,
    ids: tuple[int, ...] | None,
) -> list[PlannedReplacement]:  # fmt: skip
    """Return how a tensor is put in the place of a parameter; rows of one that is tied are put into all of its places.

    Args:
        index: The index of the model.
        weights: The weights of the model by name.
        module: The module that has the parameter.
        parameter: Its name.
        value: What stands in its place, on the device where it is used.
        ids: The rows that it replaces. None for all.
    """
    W0, tensor = module._parameters[parameter], nn.Parameter(value)
    assert W0 is not None
    planned = []
    for owner, name in [(module, parameter), *(tied_parameters(index, module, W0) if ids is not None else [])]:
        paths = tuple(path for path, m in index.walked if m is owner)
        readers = weights[paths[0]].readers if paths[0] in weights else ()
        planned.append(
            PlannedReplacement(
                paths, name, tuple((index.first_paths[id(r)], r) for r in readers if r is not owner),
                ReplacementTensor(tensor, tuple(W0.shape), ids, is_tied_copy=owner is not module),
            )
        )  # fmt: skip
    return planned
