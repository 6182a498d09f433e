"""What the code of a class does with weights, read from its source, without running it.

`self.q_proj.weight` in a method is a read of that weight; `F.linear(x, self.gate_up_proj[i])` is a product with it.
Names are dotted and start at `self`: "q_proj.weight", "layers.*.weight", where * stands for an index.

Only the methods that can be part of a forward are read, statement by statement, through local variables, views and
casts. A weight that is reached in another way (getattr, a function that is passed the layer) is not seen. This module
knows nothing of LoRA; model_weights.py draws the conclusions.
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

PRODUCTS = frozenset({
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "bilinear", "grouped_mm", "_grouped_mm",
    "conv1d", "conv2d", "conv3d", "multi_head_attention_forward", "gru_cell", "lstm_cell", "rnn_tanh_cell",
    "rnn_relu_cell",
})  # fmt: skip
"""Functions and methods that multiply their operands."""
NOT_FORWARD = ("init", "reset", "tie", "get_", "set_", "load", "resize", "prune", "convert")
"""First words of the names of methods that are no part of a forward."""
NO_WRITES = frozenset({"requires_grad_", "detach_", "share_memory_"})
"""Methods of a tensor whose names end like those that write to it."""
METADATA = frozenset({
    "dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda", "itemsize",
})  # fmt: skip
"""Attributes of a tensor whose use does not read its value."""
READ_FROM_SOURCE = (
    nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.Bilinear, nn.GRUCell, nn.LSTMCell, nn.RNNCell
)  # fmt: skip
"""The classes of torch.nn whose source is read. Every other layer of torch.nn reads nothing but its own weight."""
FRAMEWORK = ("transformers.modeling_utils", "transformers.generation", "transformers.integrations")
"""Modules whose classes are no layers: where one of them appears among the bases, the reading ends."""


@dataclass(frozen=True)
class WeightUse:
    """What the code of one class does with weights, as dotted names from `self`."""

    reads: frozenset[str] = frozenset()
    """The names whose value is used: "q_proj.weight", "gate_up_proj", "layers.*.weight"."""
    maintained: frozenset[str] = frozenset()
    """Those of `reads` that are only in methods under torch.no_grad that `forward` does not call, and in no product:
    such methods maintain a module, as diffusers' fuse_projections."""
    products: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """For each name that is an operand of products, the functions that multiply it: "linear", "einsum", "@"."""
    calls: frozenset[str] = frozenset()
    """The names that are called: "q_proj"."""
    writes: frozenset[str] = frozenset()
    """The names that `forward`, or a method that it calls, writes to: "blocks.*.attention.output.weight"."""

    @functools.cached_property
    def split_reads(self) -> tuple[tuple[str, list[str]], ...]:
        """Each read of a child's weight, and of an own weight in a product, with the parts of its name.

        Most reads are of another kind, those of a module's own parameters, and say nothing new.
        """
        names = (name for name in self.reads if "." in name or name in self.products)
        return tuple((name, name.split(".")) for name in names)


_CACHE: dict[type[nn.Module], WeightUse] = {}


def weight_use(cls: type[nn.Module]) -> WeightUse:
    """Return what the methods of a class and of its bases do with weights. Cached, since parsing takes milliseconds."""
    if cls not in _CACHE:
        _CACHE[cls] = _analyze(cls)
    return _CACHE[cls]


def _analyze(cls: type[nn.Module]) -> WeightUse:
    if issubclass(cls, nn.TransformerEncoder):  # it asks its first layer's weights whether the fused kernel may run
        return WeightUse(frozenset(f"layers.*.{name}" for name in weight_use(nn.TransformerEncoderLayer).reads))
    is_container = issubclass(cls, nn.ModuleList | nn.ModuleDict | nn.Sequential)
    if is_container or (cls.__module__.startswith("torch.nn.") and cls not in READ_FROM_SOURCE):
        return WeightUse()
    visitor = _MethodVisitor()
    for base in cls.__mro__:
        if base is nn.Module or base.__module__.startswith(FRAMEWORK):
            break
        for method in _forward_methods(base):
            visitor.visit_method(method)
    products = {name: frozenset(functions) for name, functions in visitor.products.items()}
    return WeightUse(
        frozenset(visitor.reads), frozenset(visitor.maintained_reads()), products, frozenset(visitor.calls),
        frozenset(visitor.forward_writes()),
    )  # fmt: skip


def _forward_methods(cls: type) -> list[ast.FunctionDef]:
    """Return the methods of a class that can be part of a forward."""
    return [f for f in class_methods(cls) if not f.name.strip("_").startswith(NOT_FORWARD)]


@functools.cache
def class_methods(cls: type) -> list[ast.FunctionDef]:
    """Return the methods that a class defines itself; empty if there is no source."""
    body = _class_bodies(cls.__module__).get(cls.__qualname__) or _methods_one_by_one(cls)
    return [f for f in body if isinstance(f, ast.FunctionDef)]


@functools.cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    """Return the body of each class of a module by its qualified name; empty if the module has no source.

    The file is parsed once. inspect.getsource(cls) would parse it for each class.
    """
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, SyntaxError, KeyError):
        return {}
    bodies: dict[str, list[ast.stmt]] = {}

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                bodies[prefix + node.name] = node.body
                collect(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                collect(node.body, f"{prefix}{node.name}.<locals>.")
            elif isinstance(node, ast.If | ast.Try):  # a class that is defined only if a package is installed
                collect(node.body, prefix)

    collect(tree.body, "")
    return bodies


def _methods_one_by_one(cls: type) -> list[ast.stmt]:
    """Return the methods of a class whose module has no source, such as a notebook, where each cell has its own."""
    methods: list[ast.stmt] = []
    for function in vars(cls).values():
        with contextlib.suppress(OSError, TypeError, SyntaxError):
            methods += ast.parse(textwrap.dedent(inspect.getsource(function))).body
    return methods


class _MethodVisitor(ast.NodeVisitor):
    """Collects the weights that methods read, multiply and call, directly or through local variables."""

    def __init__(self) -> None:
        self.reads: set[str] = set()
        self.products: dict[str, set[str]] = {}
        self.calls: set[str] = set()
        self.by_method: dict[str, tuple[set[str], set[str]]] = {}  # what each method calls, and what it writes to
        self.reads_by_method: dict[str, set[str]] = {}
        self.without_grad: set[str] = set()  # the methods under torch.no_grad
        self.local_names: dict[str, str] = {}  # local variable -> dotted name from `self`

    def forward_writes(self) -> set[str]:
        """Return what is written to by `forward` and the methods that it calls."""
        return {name for method in self._reached() for name in self.by_method[method][1]}

    def maintained_reads(self) -> set[str]:
        """Return what only methods under torch.no_grad read that `forward` does not call, and nothing multiplies."""
        maintenance = self.without_grad - self._reached()
        elsewhere = (reads for method, reads in self.reads_by_method.items() if method not in maintenance)
        return self.reads - set().union(self.products, *elsewhere)

    def _reached(self) -> set[str]:
        """Return `forward` and the methods that it calls."""
        reached, waiting = set(), ["forward"]
        while waiting:
            if (name := waiting.pop()) in self.by_method and name not in reached:
                reached.add(name)
                waiting += self.by_method[name][0]
        return reached

    def visit_method(self, method: ast.FunctionDef) -> None:
        """Read one method, whose first argument is the module."""
        arguments = [*method.args.posonlyargs, *method.args.args]
        self.local_names = {arguments[0].arg: ""} if arguments else {}
        self.method_calls, self.writes = self.by_method.setdefault(method.name, (set(), set()))
        self.method_reads = self.reads_by_method.setdefault(method.name, set())
        if any("no_grad" in ast.unparse(decorator) for decorator in method.decorator_list):
            self.without_grad.add(method.name)
        for statement in method.body:
            self.visit(statement)

    def dotted_name(self, node: ast.expr) -> str | None:
        """Return "a.b.*.weight" for self.a.b[i].weight, through views and casts; None for other expressions."""
        if isinstance(node, ast.Name):
            return self.local_names.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.dotted_name(node.value)
            if owner is None or node.attr in ("T", "mT", "data"):
                return owner
            return f"{owner}.{node.attr}".removeprefix(".")
        if isinstance(node, ast.Subscript):
            owner = self.dotted_name(node.value)
            return owner if not owner or owner.endswith("weight") else f"{owner}.*"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return self.dotted_name(node.func.value) or None  # self.weight.to(...), .view(...), .transpose(...)
        return None

    def add_write(self, target: ast.expr) -> None:
        if not isinstance(target, ast.Name) and (name := self.dotted_name(target)):
            self.writes.add(name.removesuffix(".*"))

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.generic_visit(node)
        self.add_write(node.target)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self.add_write(target)
            if isinstance(target, ast.Name):
                self.local_names.pop(target.id, None)
                if name := self.dotted_name(node.value):
                    self.local_names[target.id] = name

    def visit_For(self, node: ast.For | ast.comprehension) -> None:
        self._bind_loop_variable(node.target, node.iter)
        self.generic_visit(node)

    visit_comprehension = visit_For

    def visit_ListComp(self, node: ast.ListComp) -> None:
        for generator in node.generators:  # before the element, which uses their variables
            self.visit(generator)
        self.visit(node.elt)

    def _bind_loop_variable(self, target: ast.expr, iterable: ast.expr) -> None:
        """Bind the variable of `for layer in self.layers` or `for i, layer in enumerate(self.layers)`."""
        function = getattr(getattr(iterable, "func", None), "id", "")
        if (
            function == "enumerate"
            and isinstance(target, ast.Tuple)
            and isinstance(iterable, ast.Call)
            and iterable.args
        ):
            target, iterable = target.elts[-1], iterable.args[0]
        if isinstance(target, ast.Name) and (name := self.dotted_name(iterable)):
            self.local_names[target.id] = f"{name}.*"

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in METADATA:
            return
        if isinstance(node.ctx, ast.Load) and (name := self.dotted_name(node)):
            self._add_read(name)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.MatMult):
            self._add_product((node.left, node.right), "@")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Read a call: self.q_proj(x) calls a layer; F.linear(x, w), x.matmul(w) and f(weight=w) are products."""
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name := self.dotted_name(node.func):
            self.calls.add(name)
            self.method_calls.add(name)
        if isinstance(node.func, ast.Attribute) and function.endswith("_") and function not in NO_WRITES:
            self.add_write(node.func.value)
        if function == "isinstance":  # it reads no value
            return
        if function in PRODUCTS:
            owner = [node.func.value] if isinstance(node.func, ast.Attribute) else []
            self._add_product((*owner, *node.args, *(keyword.value for keyword in node.keywords)), function)
        self.generic_visit(node)

    def _add_product(self, operands: Sequence[ast.expr], function: str) -> None:
        for operand in operands:
            if not (name := self.dotted_name(operand)):
                continue
            for read in {name, name.removesuffix(".*")}:  # an index takes a part of a parameter, or a member of a list
                self._add_read(read)
                self.products.setdefault(read, set()).add(function)

    def _add_read(self, name: str) -> None:
        self.reads.add(name)
        self.method_reads.add(name)
