"""What a class's own code does with weights, read from its source: `self.q_proj.weight` in a method is a read of that weight, and
`F.linear(x, self.gate_up_proj[i])` a product with it.

Only the methods that a forward may consist of are read, statement by statement, through local names, views and casts. What is reached
in a way that no source shows (getattr, a function that is handed the layer) is not seen. This file knows nothing of LoRA.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

MULTIPLY = frozenset({
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "bilinear", "grouped_mm", "_grouped_mm", "conv1d", "conv2d", "conv3d",
    "multi_head_attention_forward", "gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell",
})  # fmt: skip
ASIDE = (
    "init",
    "reset",
    "tie",
    "get_",
    "set_",
    "load",
    "resize",
    "prune",
    "convert",
)  # methods that are no part of a forward
FACTS = frozenset(
    {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda", "itemsize"}
)  # of a weight, not its value


@dataclass(frozen=True)
class Source:
    """What a class's own code does with weights, as dotted names from `self`."""

    reads: frozenset[str] = frozenset()
    """Whose value is used at all: "q_proj.weight", "gate_up_proj", "layers.*.weight"."""
    products: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Of these, the operands of products: in which functions ("linear", "einsum", "@")."""
    calls: frozenset[str] = frozenset()
    """What is called: "q_proj"."""

    @functools.cached_property
    def ways(self) -> tuple[tuple[str, list[str]], ...]:
        """The reads of others' weights, and of own ones in products; each also part by part. (Most reads are a module's of its own weight.)"""
        return tuple((dotted, dotted.split(".")) for dotted in self.reads if "." in dotted or dotted in self.products)


_SOURCES: dict[type[nn.Module], Source] = {}


def source_of(cls: type[nn.Module]) -> Source:
    """What the methods of a class and of its bases do; read once, since it takes milliseconds."""
    if cls not in _SOURCES:
        _SOURCES[cls] = _read(cls)
    return _SOURCES[cls]


def _read(cls: type[nn.Module]) -> Source:
    if issubclass(cls, nn.TransformerEncoder):  # asks its first layer's weights whether the fused kernel may run
        return Source(frozenset(f"layers.*.{name}" for name in source_of(nn.TransformerEncoderLayer).reads))
    if issubclass(cls, nn.ModuleList | nn.ModuleDict | nn.Sequential) or _kind_class(cls):
        return Source()
    reading = _Reading()
    for base in cls.__mro__:
        if base is nn.Module or base.__module__.startswith(
            ("transformers.modeling_utils", "transformers.generation", "transformers.integrations")
        ):
            break
        for method in _methods(base):
            reading.of(method)
    return Source(
        frozenset(reading.reads),
        {name: frozenset(by) for name, by in reading.products.items()},
        frozenset(reading.calls),
    )


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
        self.products: dict[str, set[str]] = {}
        self.calls: set[str] = set()

    def of(self, method: ast.FunctionDef) -> None:
        """Take in one method, whose first argument is the module."""
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
        if (
            isinstance(over, ast.Call)
            and getattr(over.func, "id", "") == "enumerate"
            and isinstance(target, ast.Tuple)
            and over.args
        ):
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
        """self.q_proj(x) calls a layer; F.linear(x, w), x.matmul(w) and f(weight=w) multiply; isinstance(w, ...) reads no value."""
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
        for dotted in filter(None, map(self.dotted, nodes)):
            for name in {
                dotted,
                dotted.removesuffix(".*"),
            }:  # an index takes a part of a parameter, or a member of a list
                self.reads.add(name)
                self.products.setdefault(name, set()).add(function)
