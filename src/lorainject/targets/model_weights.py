"""The weights of a model that could carry an adapter, and the modules that read each.

Most weights are applied by calling their module. A weight that another module's code reads instead
(`self.q_proj.weight` in an attention block) is found in the source of the classes (source_analysis.py). A class without
source, or one that reaches a weight in a way that its source does not show, is found by `probe` when the model runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn

from ..lora.adapter_dict import AdapterDict
from ..lora.graft import base_class
from ..lora.model_index import ModelIndex
from ..lora.weight_kinds import MATRIX, STACKS, Kind, has_standard_forward, is_quantized, kind_of, weight_shape
from ..plan import site_name
from .fused_layouts import STORED_UNMARKED, Parts, class_name, fused_parts
from .source_analysis import weight_use

WeightKey = tuple[int, str]
"""The identity of a weight: the id of its module and the name of the parameter."""


@dataclass(frozen=True)
class ModelWeight:
    """A weight that could carry an adapter, under all of its paths."""

    paths: tuple[str, ...]
    """The paths of the weight's module."""
    module: nn.Module
    """The module that has the parameter."""
    parameter: str
    """Name of the parameter in the module."""
    kind: Kind
    """How the weight is stored and applied."""
    multiplies: bool
    """True if the weight multiplies activations, so that "all-linear" and roles include it."""
    readers: tuple[nn.Module, ...] = ()
    """The modules whose own code reads the weight; empty if it is applied by calling its module (the forward graft)."""
    written_by: str = ""
    """The class whose forward writes to the weight; empty if none does."""
    bypassed: bool = False
    """True if a reader computes with the weight and never calls the module, so that an adapter on its forward alone,
    as PEFT's, does nothing."""
    named: bool = False
    """True if a target named the weight itself ("q_proj.weight"), so that all of `owners` count as readers."""
    owners: tuple[nn.Module, ...] = field(default=(), repr=False)
    """The modules on the way to the weight: the model first, the weight's own module last."""
    tied: tuple[ModelWeight, ...] = field(default=(), repr=False)
    """The same parameter in further modules, which use it in the same way. `paths` and `readers` include theirs."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names that a target can match, one for each path."""
        return tuple(site_name(path, self.parameter) for path in self.paths)

    @property
    def key(self) -> WeightKey:
        """The identity of the weight."""
        return id(self.module), self.parameter

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules that have the parameter and use it in the same way."""
        return (self.module, *(w.module for w in self.tied))

    @property
    def keys(self) -> tuple[WeightKey, ...]:
        """The identities of the weight in each of these modules."""
        return tuple((id(module), self.parameter) for module in self.modules)

    @property
    def surroundings(self) -> tuple[nn.Module, ...]:
        """The modules on all ways to the weight."""
        return tuple(dict.fromkeys([*self.owners, *(owner for w in self.tied for owner in w.owners)]))

    @cached_property
    def location(self) -> tuple[tuple[nn.Module, ...], str]:
        """The modules on the way to the layer (or to a bare parameter), and its name in the last of them."""
        if kind_of(self.module, self.parameter) is None:
            return self.owners, self.parameter
        return self.owners[:-1], self.paths[0].rsplit(".", 1)[-1]

    @property
    def out_features(self) -> int:
        """The rows of W (out, in); for a stack, of each of its matrices."""
        return self.kind.sizes(weight_shape(self.module, self.parameter))[1]

    @cached_property
    def parts(self) -> Parts:
        """The rows of each part of a fused weight; empty if the weight is not fused or its layout is not known."""
        owners, leaf = self.location
        if not owners or class_name(base_class(type(owners[-1]))) in STORED_UNMARKED:
            return {}
        return fused_parts(getattr(owners[0], "config", None), owners[-1], leaf, self.out_features) or {}


def model_weights(index: ModelIndex) -> list[ModelWeight]:
    """Return every weight that could carry an adapter, once, in the model's order.

    These are the weights of layers, and bare parameters with two axes or more. A parameter that several modules use in
    the same way is one weight.
    """
    return _join_tied(separate_weights(index))


def separate_weights(index: ModelIndex) -> list[ModelWeight]:
    """Return what `model_weights` returns, with a weight for each module that has a shared parameter."""
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    owners_by_path: dict[str, tuple[nn.Module, ...]] = {}
    for path, module in index.walked:
        owners = owners_by_path.get(path.rpartition(".")[0], ()) if path else ()
        if not isinstance(module, torch.jit.ScriptModule):  # its code is not Python's
            paths.setdefault(id(module), []).append(path)
            modules[id(module)] = module
            owners = (*owners, module)
        owners_by_path[path] = owners
    reads = _Reads(list(modules.values()))
    weights = []
    for key, module in modules.items():
        is_layer = kind_of(module) is not None
        if not is_layer and not module._parameters:
            continue
        standard = has_standard_forward(module)
        owners = owners_by_path[paths[key][0]]
        for name, kind in _parameter_kinds(module):
            readers = reads.readers.get((key, name), [])
            if kind.form is None or readers or id(module) in reads.reading_others or not standard:
                readers = [*readers, module]  # for a direct call of the module
            if isinstance(module, nn.ParameterList | nn.ParameterDict):  # it has no forward
                readers = list(owners[-2:-1])
            in_product = (key, name) in reads.multiplied
            if is_layer:
                multiplies = kind.form == "linear" or (kind.form == "embedding" and in_product and not standard)
            else:
                multiplies = in_product or "expert" in type(module).__name__.lower()
            weights.append(ModelWeight(
                tuple(paths[key]), module, name, kind, multiplies, tuple(dict.fromkeys(readers)),
                written_by=reads.writers.get((key, name), ""), bypassed=(key, name) in reads.bypassed, owners=owners,
            ))  # fmt: skip
    return weights


def _join_tied(weights: Sequence[ModelWeight]) -> list[ModelWeight]:
    """Join the weights that are one parameter, used in one way: by modules of one class, as weights of one kind.

    An embedding and the output embeddings that are tied to it stay two weights. So do modules that carry different
    adapters already, from a file that has one for each.
    """
    same: dict[tuple[object, ...], list[ModelWeight]] = {}
    for w in weights:
        children = w.module._modules.values()
        adapters = tuple(id(c) for c in children if isinstance(c, AdapterDict) and c.parameter == w.parameter)
        use = base_class(type(w.module)), w.parameter, w.kind, vars(w.module).get("padding_idx"), adapters
        stored = None if is_quantized(w.module) else w.module._parameters.get(w.parameter)
        same.setdefault((w.key if stored is None else id(stored), *use), []).append(w)
    return [_as_one(users) for users in same.values()]


def _as_one(users: Sequence[ModelWeight]) -> ModelWeight:
    first, *others = users
    if not others:
        return first
    # A module that reads a weight reads it through a shadow, so that all of them do.
    readers_themselves = [w.module for w in users] if any(w.readers for w in users) else []
    return replace(
        first,
        paths=tuple(path for w in users for path in w.paths),
        multiplies=any(w.multiplies for w in users),
        readers=tuple(dict.fromkeys([*(reader for w in users for reader in w.readers), *readers_themselves])),
        bypassed=any(w.bypassed for w in users),
        tied=tuple(others),
    )


def towers(index: ModelIndex) -> tuple[str, ...]:
    """Return the paths of the models that a model is composed of, such as vision_tower and language_model, or encoder
    and decoder. Empty if there are not several."""
    paths = [p for p, m in index.walked if p and hasattr(type(m), "base_model_prefix") and hasattr(m, "config")]
    innermost = [path for path in paths if not any(other.startswith(f"{path}.") for other in paths)]
    return tuple(dict.fromkeys(innermost)) if len(innermost) > 1 else ()


def _parameter_kinds(module: nn.Module) -> Iterator[tuple[str, Kind]]:
    """Yield the weights of one module with their kinds: that of a layer, or the parameters with two axes or more."""
    if (kind := kind_of(module)) is not None:
        yield "weight", kind
        return
    if type(module).__name__ == "ParametrizationList":
        return
    for name, parameter in module._parameters.items():
        if parameter is None or parameter.ndim < 2 or "bias" in name or "position" in name:
            continue  # SAM's positional_embedding multiplies, but is fixed
        if parameter.ndim == 3 and not _is_one_operand(module, name):
            transposed = getattr(module, "is_transposed", False)  # transformers' mark on experts stored as (E, in, out)
            yield name, STACKS[bool(transposed)]
        else:
            yield name, MATRIX


def _is_one_operand(module: nn.Module, name: str) -> bool:
    """True if one product (einsum, convolution) uses all axes of the parameter, so that it is no stack of matrices."""
    functions = weight_use(base_class(type(module))).products.get(name, ())
    return any(function == "einsum" or function.startswith("conv") for function in functions)


class _Reads:
    """Which modules read which weights, by the source of their classes."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.readers: dict[WeightKey, list[nn.Module]] = {}
        """For each weight, the modules other than its own that read it."""
        self.multiplied: set[WeightKey] = set()
        """The weights that are operands of products."""
        self.bypassed: set[WeightKey] = set()
        """The weights whose reader computes with them and never calls their module."""
        self.writers: dict[WeightKey, str] = {}
        """For each weight that a forward writes to, the name of the class with that forward."""
        for reader in modules:
            self._add(reader)
        self.reading_others = {id(reader) for readers in self.readers.values() for reader in readers}

    def _add(self, reader: nn.Module) -> None:
        use = weight_use(base_class(type(reader)))
        for name, parts in use.split_reads:
            for owner, parameter in _named_weights(reader, parts):
                key = id(owner), parameter
                if owner is not reader:
                    self.readers.setdefault(key, []).append(reader)
                    is_called = name.rpartition(".")[0] in use.calls
                    if "@" in use.products.get(name, ()) or not (is_called or name in use.maintained):
                        self.bypassed.add(key)
                if name in use.products:
                    self.multiplied.add(key)
        for name in use.writes:
            for owner, parameter in _named_weights(reader, name.split(".")):
                self.writers[id(owner), parameter] = base_class(type(reader)).__name__
        if isinstance(reader, nn.RNNBase):
            self.multiplied |= {(id(reader), name) for name in reader._parameters}


def _named_weights(reader: nn.Module, parts: list[str]) -> Iterator[tuple[nn.Module, str]]:
    """Yield the weights (module, parameter) that `self.<parts>` means in `reader`. A part * stands for every child."""
    name, *rest = parts
    if not rest:
        names = list(reader._parameters) if name == "*" else [name]
        yield from ((reader, n) for n in names if reader._parameters.get(n) is not None)
        return
    for child in reader._modules.values() if name == "*" else [reader._modules.get(name)]:
        if child is not None and not isinstance(child, torch.jit.ScriptModule):
            yield from _named_weights(child._modules.get("_orig_mod") or child, rest)  # the child may be compiled
