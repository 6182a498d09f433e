"""What the parts of a model are to each other: its weights, who reads each, which multiply, and which layers are the output head.

A weight that is not applied by calling its module is found by the source of the classes (source_analysis.py). A class without source, or one
that reaches a weight in a way not seen there, is found by `probe`, when the model runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from ..lora.graft import base_class
from ..lora.model_index import ModelIndex
from ..lora.weight_kinds import MATRIX, STACKS, Kind, has_standard_forward, kind_of
from ..plan import site_name
from .source_analysis import weight_use


@dataclass(frozen=True)
class Weight:
    """A weight of the model that could carry an adapter, under all of its paths."""

    paths: tuple[str, ...]
    """Of the module that owns it."""
    module: nn.Module
    parameter: str
    kind: Kind
    multiplies: bool
    """Whether "all-linear" means it."""
    readers: tuple[nn.Module, ...] = ()
    """Modules whose own forward reads it; none if it is applied by calling its module, which takes the forward graft."""
    bypassed: bool = False
    """Whether a reader never calls the layer, so that what is put on its forward alone (by PEFT) does nothing."""
    named: bool = False
    """Whether the target was the weight itself ("q_proj.weight"), so that all modules it lies in read it."""
    owners: tuple[nn.Module, ...] = field(default=(), repr=False)
    """The modules on the way to it, the model first, its own module last."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What targets may call it."""
        return tuple(site_name(path, self.parameter) for path in self.paths)

    @property
    def key(self) -> tuple[int, str]:
        """Which weight: the module's id and the parameter's name."""
        return id(self.module), self.parameter


def weights(index: ModelIndex) -> list[Weight]:
    """Every weight that could carry an adapter, each once, in the model's order: of layers, and bare parameters with two axes or more."""
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    way: dict[str, tuple[nn.Module, ...]] = {}  # by path: the modules down to it
    for path, module in index.walked:
        above = way.get(path.rpartition(".")[0], ()) if path else ()
        way[path] = above
        if not isinstance(module, torch.jit.ScriptModule):  # its code is not Python's
            paths.setdefault(id(module), []).append(path)
            modules[id(module)] = module
            way[path] = (*above, module)
    read, multiplied, bypassed = _read(list(modules.values()))
    read_by = {id(reader) for readers in read.values() for reader in readers}
    found = []
    for key, module in modules.items():
        is_layer = kind_of(module) is not None
        if not is_layer and not module._parameters:
            continue
        owners, plain = way[paths[key][0]], has_standard_forward(module)
        for name, kind in _kinds(module):
            readers = tuple(dict.fromkeys(read.get((key, name), ())))
            if kind.form is None or readers or key in read_by or not plain:
                readers = tuple(dict.fromkeys((*readers, module)))  # for a direct call of the module
            found_to = (key, name) in multiplied and (not is_layer or (kind.name == "embedding" and not plain))
            linear = kind.name in ("linear", "linear^T") or found_to or (not is_layer and _is_experts(module))
            if isinstance(module, nn.ParameterList | nn.ParameterDict):  # it has no forward
                readers = owners[-2:-1]
            found.append(
                Weight(tuple(paths[key]), module, name, kind, linear, readers, (key, name) in bypassed, owners=owners)
            )
    return found


def heads(index: ModelIndex) -> set[int]:
    """The layers of the output head, by id: what transformers calls output embeddings, and every layer or ...Head that stands
    beside a base model (classifier, score, qa_outputs), wherever in the tree that is."""
    found: list[nn.Module | None] = []
    for _, part in index.walked:
        if isinstance(part, torch.jit.ScriptModule):
            continue
        get = getattr(part, "get_output_embeddings", None)
        with contextlib.suppress(
            NotImplementedError, AttributeError
        ):  # the DETR family has none, and says so by raising
            found.append(get() if callable(get) else None)
        if (base := part._modules.get(getattr(part, "base_model_prefix", None) or "")) is not None:
            beside = [child for child in part.children() if child is not base]
            found += [
                child
                for child in beside
                if kind_of(child) is not None or (type(child).__name__.endswith("Head") and not _is_decoder(child))
            ]
    return {id(m) for head in found if head is not None for m in head.modules()}


def _is_decoder(head: nn.Module) -> bool:
    """A head with attention or a recurrent cell of its own (SLANet's) is more than an output layer."""
    return any(isinstance(m, nn.RNNBase | nn.RNNCellBase) or "Attention" in type(m).__name__ for m in head.modules())


def towers(index: ModelIndex) -> tuple[str, ...]:
    """The paths of the models that a model is made of (vision_tower, language_model; encoder, decoder); none if it is made of one."""
    parts = [
        (path, m) for path, m in index.walked if path and hasattr(type(m), "base_model_prefix") and hasattr(m, "config")
    ]
    inner = [path for path, _ in parts if not any(other.startswith(f"{path}.") for other, _ in parts)]
    return tuple(dict.fromkeys(inner)) if len(inner) > 1 else ()


def _kinds(module: nn.Module) -> Iterator[tuple[str, Kind]]:
    """The weights of one module: that of a layer, or the parameters that have two axes or more."""
    if (kind := kind_of(module)) is not None:
        yield "weight", kind
        return
    if type(module).__name__ == "ParametrizationList":
        return
    for name, p in module._parameters.items():
        if (
            p is not None and p.ndim >= 2 and "bias" not in name and "position" not in name
        ):  # SAM's positional_embedding multiplies, but is fixed
            transposed = bool(
                getattr(module, "is_transposed", False)
            )  # transformers' mark on experts stored (E, in, out)
            yield name, STACKS[transposed] if p.ndim == 3 and not _sums_over(module, name) else MATRIX


def _is_experts(module: nn.Module) -> bool:
    return "expert" in type(module).__name__.lower()


def _sums_over(module: nn.Module, name: str) -> bool:
    """Whether all axes of this parameter take part in one product (an einsum, a convolution): then it is no stack of matrices."""
    return any(
        f == "einsum" or f.startswith("conv") for f in weight_use(base_class(type(module))).products.get(name, ())
    )


Keys = set[tuple[int, str]]


def _read(modules: Sequence[nn.Module]) -> tuple[dict[tuple[int, str], list[nn.Module]], Keys, Keys]:
    """For each weight (owner's id, parameter) the modules whose forward reads it; those weights that multiply; those that are bypassed."""
    read: dict[tuple[int, str], list[nn.Module]] = {}
    multiplied: Keys = set()
    bypassed: Keys = set()
    for reader in modules:
        use = weight_use(base_class(type(reader)))
        for dotted, parts in use.split_reads:
            for owner, name in _resolve(reader, parts):
                if owner is not reader:
                    read.setdefault((id(owner), name), []).append(reader)
                    if "@" in use.products.get(dotted, ()) or dotted.rpartition(".")[0] not in use.calls:
                        bypassed.add((id(owner), name))
                if dotted in use.products:
                    multiplied.add((id(owner), name))
        if isinstance(reader, nn.RNNBase):
            multiplied |= {(id(reader), name) for name in reader._parameters}
    return read, multiplied, bypassed


def _resolve(reader: nn.Module, parts: list[str]) -> Iterator[tuple[nn.Module, str]]:
    """The weights that `self.<parts>` means in this reader; `*` stands for any child (self.layers[i].weight)."""
    name, *more = parts
    if not more:
        yield from (
            (reader, n)
            for n in (reader._parameters if name == "*" else [name])
            if reader._parameters.get(n) is not None
        )
        return
    for child in reader._modules.values() if name == "*" else [reader._modules.get(name)]:
        if child is not None and not isinstance(child, torch.jit.ScriptModule):
            yield from _resolve(child._modules.get("_orig_mod") or child, more)  # a part may be compiled
