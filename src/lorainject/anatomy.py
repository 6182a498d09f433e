"""What the parts of a model are to each other: its weights, who reads each, which multiply, and which layers are the output head.

A weight that is not applied by calling its module is found by the source of the classes: a method that says `self.q_proj.weight`
reads that weight, and `F.linear(x, self.gate_up_proj[i])` multiplies with it. A class without source, or one that reaches a weight in a
way not seen here, is found by `probe`, when the model runs.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .adapters import walk
from .graft import bare
from .kinds import MATRIX, STACKS, Kind, is_plain, kind_of
from .spec import site_name

MULTIPLY = frozenset({
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "bilinear", "grouped_mm", "_grouped_mm", "conv1d", "conv2d", "conv3d",
    "multi_head_attention_forward", "gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell",
})  # fmt: skip
ASIDE = ("init", "reset", "tie", "get_", "set_", "load", "resize", "prune", "convert")  # methods that are no part of a forward
FACTS = frozenset({"dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda", "itemsize"})  # of a weight, not its value


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

    @property
    def names(self) -> tuple[str, ...]:
        """What targets may call it."""
        return tuple(site_name(path, self.parameter) for path in self.paths)

    @property
    def key(self) -> tuple[int, str]:
        """Which weight: the module's id and the parameter's name."""
        return id(self.module), self.parameter


def weights(model: nn.Module) -> list[Weight]:
    """Every weight that could carry an adapter, each once, in the model's order: of layers, and bare parameters with two axes or more."""
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in walk(model):
        if not isinstance(module, torch.jit.ScriptModule):  # its code is not Python's
            paths.setdefault(id(module), []).append(path)
            modules[id(module)] = module
    at = {path: modules[key] for key, own in paths.items() for path in own}
    read, multiplied, bypassed = _read(list(modules.values()))
    read_by = {id(reader) for readers in read.values() for reader in readers}
    found = []
    for key, module in modules.items():
        first = paths[key][0]
        owners = tuple(at[p] for p in _upward(first) if p in at)
        for name, kind in _kinds(module):
            readers = tuple(dict.fromkeys(read.get((key, name), ())))
            if kind.term is None or readers or key in read_by or not is_plain(module):
                readers = tuple(dict.fromkeys((*readers, module)))  # for a direct call of the module
            found_to = (key, name) in multiplied and (kind_of(module, name) is None or (kind.name == "embedding" and not is_plain(module)))
            linear = kind.name in ("linear", "linear^T") or found_to or (kind_of(module, name) is None and _is_experts(module))
            if isinstance(module, nn.ParameterList | nn.ParameterDict):  # it has no forward
                readers = owners[-2:-1]
            found.append(Weight(tuple(paths[key]), module, name, kind, linear, readers, (key, name) in bypassed, owners=owners))
    return found


def heads(model: nn.Module) -> set[int]:
    """The layers of the output head, by id: what transformers calls output embeddings, and every layer or ...Head that stands
    beside a base model (classifier, score, qa_outputs), wherever in the tree that is."""
    found: list[nn.Module | None] = []
    for _, part in walk(model):
        if isinstance(part, torch.jit.ScriptModule):
            continue
        get = getattr(part, "get_output_embeddings", None)
        with contextlib.suppress(NotImplementedError, AttributeError):  # the DETR family has none, and says so by raising
            found.append(get() if callable(get) else None)
        if (base := part._modules.get(getattr(part, "base_model_prefix", None) or "")) is not None:
            beside = [child for child in part.children() if child is not base]
            found += [child for child in beside if kind_of(child) is not None or (type(child).__name__.endswith("Head") and not _is_decoder(child))]
    return {id(m) for head in found if head is not None for m in head.modules()}


def _is_decoder(head: nn.Module) -> bool:
    """A head with attention or a recurrent cell of its own (SLANet's) is more than an output layer."""
    return any(isinstance(m, nn.RNNBase | nn.RNNCellBase) or "Attention" in type(m).__name__ for m in head.modules())


def towers(model: nn.Module) -> tuple[str, ...]:
    """The paths of the models that a model is made of (vision_tower, language_model; encoder, decoder); none if it is made of one."""
    parts = [(path, m) for path, m in walk(model) if path and hasattr(m, "config") and hasattr(m, "base_model_prefix")]
    inner = [path for path, _ in parts if not any(other.startswith(f"{path}.") for other, _ in parts)]
    return tuple(dict.fromkeys(inner)) if len(inner) > 1 else ()


def _upward(path: str) -> Iterator[str]:
    """The paths from the model to the module: "", "model", "model.layers", ..."""
    parts = path.split(".") if path else []
    return (".".join(parts[:n]) for n in range(len(parts) + 1))


def _kinds(module: nn.Module) -> Iterator[tuple[str, Kind]]:
    """The weights of one module: that of a layer, or the parameters that have two axes or more."""
    if (kind := kind_of(module)) is not None:
        yield "weight", kind
        return
    if type(module).__name__ == "ParametrizationList":
        return
    for name, p in module._parameters.items():
        if p is not None and p.ndim >= 2 and "bias" not in name and "position" not in name:  # SAM's positional_embedding multiplies, but is fixed
            transposed = bool(getattr(module, "is_transposed", False))  # transformers' mark on experts stored (E, in, out)
            yield name, STACKS[transposed] if p.ndim == 3 and not _sums_over(module, name) else MATRIX


def _is_experts(module: nn.Module) -> bool:
    return "expert" in type(module).__name__.lower()


def _sums_over(module: nn.Module, name: str) -> bool:
    """Whether all axes of this parameter take part in one product (an einsum, a convolution): then it is no stack of matrices."""
    return name in _source_of(bare(type(module))).whole


Keys = set[tuple[int, str]]


def _read(modules: Sequence[nn.Module]) -> tuple[dict[tuple[int, str], list[nn.Module]], Keys, Keys]:
    """For each weight (owner's id, parameter) the modules whose forward reads it; those weights that multiply; those that are bypassed."""
    read: dict[tuple[int, str], list[nn.Module]] = {}
    multiplied: Keys = set()
    bypassed: Keys = set()
    for reader in modules:
        source = _source_of(bare(type(reader)))
        for dotted in source.reads:
            for owner, name in _resolve(reader, dotted.split(".")):
                if owner is not reader:
                    read.setdefault((id(owner), name), []).append(reader)
                    if dotted in source.at or dotted.rpartition(".")[0] not in source.calls:
                        bypassed.add((id(owner), name))
                if dotted in source.multiplies:
                    multiplied.add((id(owner), name))
        if isinstance(reader, nn.RNNBase):
            multiplied |= {(id(reader), name) for name in reader._parameters}
    return read, multiplied, bypassed


def _resolve(reader: nn.Module, parts: list[str]) -> Iterator[tuple[nn.Module, str]]:
    """The weights that `self.<parts>` means in this reader; `*` stands for any child (self.layers[i].weight)."""
    name, *more = parts
    if not more:
        yield from ((reader, n) for n in (reader._parameters if name == "*" else [name]) if reader._parameters.get(n) is not None)
        return
    for child in reader._modules.values() if name == "*" else [reader._modules.get(name)]:
        if child is not None and not isinstance(child, torch.jit.ScriptModule):
            yield from _resolve(child._modules.get("_orig_mod") or child, more)  # a part may be compiled


@dataclass(frozen=True)
class Source:
    """What a class's own code does with weights, as dotted names from `self`."""

    reads: frozenset[str] = frozenset()
    """Whose value is used at all: "q_proj.weight", "gate_up_proj", "layers.*.weight"."""
    multiplies: frozenset[str] = frozenset()
    """Of these, the operands of products."""
    whole: frozenset[str] = frozenset()
    """Of these, the operands of einsum and convolutions."""
    at: frozenset[str] = frozenset()
    """Of these, the operands of @."""
    calls: frozenset[str] = frozenset()
    """What is called: "q_proj"."""


_SOURCES: dict[type, Source] = {}  # reading a source takes milliseconds


def _source_of(cls: type[nn.Module]) -> Source:
    if cls not in _SOURCES:
        _SOURCES[cls] = _by_source(cls)
    return _SOURCES[cls]


def _by_source(cls: type[nn.Module]) -> Source:
    if issubclass(cls, nn.TransformerEncoder):  # asks its first layer's weights whether the fused kernel may run
        layer = _source_of(nn.TransformerEncoderLayer)
        return Source(frozenset(f"layers.*.{name}" for name in layer.reads))
    if issubclass(cls, nn.ModuleList | nn.ModuleDict | nn.Sequential) or _kind_class(cls):
        return Source()
    reading = _Reading()
    for base in cls.__mro__:
        if base is nn.Module or base.__module__.startswith(("transformers.modeling_utils", "transformers.generation", "transformers.integrations")):
            break
        for method in _methods(base):
            reading.of(method)
    return Source(*map(frozenset, (reading.reads, reading.multiplies, reading.whole, reading.at, reading.calls)))


def _kind_class(cls: type[nn.Module]) -> bool:
    """A layer of torch's own: its forward reads its own weight alone."""
    return cls.__module__.startswith("torch.nn.") and cls not in (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.Bilinear, nn.GRUCell,
                                                                nn.LSTMCell, nn.RNNCell)  # fmt: skip


@functools.cache
def _methods(cls: type) -> list[ast.FunctionDef]:
    """The methods that a forward may consist of."""
    body = _classes(cls.__module__).get(cls.__qualname__) or _one_by_one(cls)
    return [f for f in body if isinstance(f, ast.FunctionDef) and not f.name.strip("_").startswith(ASIDE)]


def _one_by_one(cls: type) -> list[ast.stmt]:
    """The methods of a class whose module has no source: of a notebook, say, where each cell has its own."""
    found: list[ast.stmt] = []
    for function in vars(cls).values():
        with contextlib.suppress(OSError, TypeError, SyntaxError):
            found += ast.parse(textwrap.dedent(inspect.getsource(function))).body
    return found


@functools.cache
def _classes(module: str) -> dict[str, list[ast.stmt]]:
    """The bodies of a module's classes by qualified name, from one parse: inspect.getsource parses the file anew for each class."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, SyntaxError, KeyError):
        return {}
    found: dict[str, list[ast.stmt]] = {}

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[prefix + node.name] = node.body
                collect(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                collect(node.body, f"{prefix}{node.name}.<locals>.")
            elif isinstance(node, ast.If | ast.Try):  # a class that is defined only if something is installed
                collect(node.body, prefix)

    collect(tree.body, "")
    return found


class _Reading(ast.NodeVisitor):
    """Methods: which weights do they read, directly or by a local name?"""

    def __init__(self) -> None:
        self.reads: set[str] = set()
        self.multiplies: set[str] = set()
        self.whole: set[str] = set()
        self.at: set[str] = set()
        self.calls: set[str] = set()

    def of(self, method: ast.FunctionDef) -> None:
        """Take one method in."""
        arguments = [*method.args.posonlyargs, *method.args.args]
        self.local = {arguments[0].arg: ""} if arguments else {}  # local name -> dotted name from self
        for statement in method.body:
            self.visit(statement)

    def dotted(self, node: ast.expr) -> str | None:
        """self.a.b[i].weight -> "a.b.*.weight", through views and casts; None for anything else."""
        if isinstance(node, ast.Name):
            return self.local.get(node.id)
        if isinstance(node, ast.Attribute):
            if (inner := self.dotted(node.value)) is None:
                return None
            return inner if node.attr in ("T", "mT", "data") else f"{inner}.{node.attr}".removeprefix(".")
        if isinstance(node, ast.Subscript):
            inner = self.dotted(node.value)
            return inner if not inner or inner.endswith("weight") else f"{inner}.*"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return self.dotted(node.func.value) or None  # self.weight.to(...), .view(...), .transpose(...)
        return None

    def operand(self, node: ast.expr) -> str | None:
        name = self.dotted(node)
        return name.removesuffix(".*") if name else None

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.local.pop(target.id, None)
                if name := self.dotted(node.value):
                    self.local[target.id] = name

    def visit_For(self, node: ast.For) -> None:
        self._each(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._each(node.target, node.iter)
        self.generic_visit(node)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        for generator in node.generators:  # before the element, which uses their names
            self.visit(generator)
        self.visit(node.elt)

    def _each(self, target: ast.expr, over: ast.expr) -> None:
        """for layer in self.layers, for i, layer in enumerate(self.layers)"""
        if isinstance(over, ast.Call) and getattr(over.func, "id", "") == "enumerate" and isinstance(target, ast.Tuple) and over.args:
            target, over = target.elts[-1], over.args[0]
        if isinstance(target, ast.Name) and (name := self.dotted(over)):
            self.local[target.id] = f"{name}.*"

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in FACTS:
            return
        if isinstance(node.ctx, ast.Load) and (name := self.dotted(node)):
            self.reads.add(name)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.MatMult):
            self._multiply((node.left, node.right), "@")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name := self.dotted(node.func):
            self.calls.add(name)
        if function == "isinstance":
            return
        if function in MULTIPLY:
            method_of = [node.func.value] if isinstance(node.func, ast.Attribute) else []
            self._multiply((*method_of, *node.args, *(k.value for k in node.keywords)), function)
        self.generic_visit(node)

    def _multiply(self, nodes: Sequence[ast.expr], function: str) -> None:
        for name in filter(None, map(self.operand, nodes)):
            self.reads.add(name)
            self.multiplies.add(name)
            if function == "einsum" or function.startswith("conv"):
                self.whole.add(name)
            if function == "@":
                self.at.add(name)
