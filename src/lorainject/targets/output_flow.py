"""Which weights a module's output comes from directly: the flow of data through the source of its forward.

The forward of a module is interpreted without being run. Where it calls a submodule that has weights, the result is an
`Output` of that submodule, and the outputs that went in are *consumed*. Everything else (functions, activations, norms,
indices of tensors) passes outputs on, except what no gradient passes: comparisons, argmax, detach, the indices of topk.
An output that is returned, and that nothing consumes, leaves the module. A loss passes outputs on, too, so that what
feeds the loss alone leaves the module as well.

Both branches of an `if` are taken, and loops are run twice, so that a layer whose output goes into the next layer
consumes it. A forward without source has no outputs. This module knows nothing of LoRA and of heads (heads.py).
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from ..lora.graft import base_class
from .source_analysis import FRAMEWORK, METADATA, PRODUCTS, class_methods

NO_FLOW = frozenset({
    "detach", "argmax", "argmin", "argsort", "item", "tolist", "isinstance", "len", "hasattr", "range", "print", "str",
    "int", "bool", "type", "numel", "no_grad", "is_tracing",
})  # fmt: skip
"""Functions whose result carries no gradient of their arguments."""
WITH_INDICES = frozenset({"topk", "max", "min", "sort", "kthvalue"})
"""Functions that return values and indices."""
MAX_DEPTH = 12  # of methods that call each other


class Output(NamedTuple):
    """What a submodule computes, or a product with a bare parameter."""

    module: nn.Module
    parameter: str | None = None
    """The parameter, if the module around it multiplies it; None for the result of calling the module."""


PRODUCT = Output(nn.Identity())
"""What stands for a product of two outputs."""


class _Weight(NamedTuple):
    """A parameter itself."""

    module: nn.Module
    name: str


class _Method(NamedTuple):
    """A method of a module, with the class that defines it."""

    owner: nn.Module
    cls: type
    function: ast.FunctionDef


Value = frozenset[Output | _Weight | _Method | nn.Module]
"""What an expression may stand for: outputs, parameters, methods and modules."""
NOTHING: Value = frozenset()


class OutputFlow(NamedTuple):
    """Where the outputs inside one module go."""

    leaving: frozenset[Output]
    """The outputs that leave the module, and that nothing in it consumes."""
    consumers: Mapping[Output, frozenset[Output]]
    """For each output that is consumed, the outputs that are computed from it."""
    computed: frozenset[Output]
    """All outputs."""


def output_flow(module: nn.Module) -> OutputFlow:
    """Return where the outputs of submodules go in the forward of a module; nothing if it has no source."""
    flow = _Flow()
    if isinstance(module, nn.Sequential):
        returned = NOTHING
        for child in module:
            returned = flow.call(frozenset({child}), [returned])
    else:
        forward = _method(module, "forward")
        returned = flow.run(forward, [], {}) if forward is not None else NOTHING
    consumers = {output: frozenset(others) for output, others in flow.consumers.items()}
    return OutputFlow(_outputs(returned) - consumers.keys(), consumers, frozenset(flow.computed))


def _method(module: nn.Module, name: str, after: type | None = None) -> _Method | None:
    """Return a method of a module's class or of a base of it, or of the bases behind the class `after`."""
    mro = base_class(type(module)).__mro__
    for cls in mro[mro.index(after) + 1 if after in mro else 0 :]:
        if cls is nn.Module or cls.__module__.startswith((*FRAMEWORK, "torch.nn.")):
            return None
        for function in class_methods(cls):
            if function.name == name:
                return _Method(module, cls, function)
    return None


def _has_weights(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters())


class _Flow(ast.NodeVisitor):
    """Interprets methods. `env` holds the values of the local variables of the method that is interpreted now."""

    def __init__(self) -> None:
        self.consumers: dict[Output, set[Output]] = {}
        self.computed: set[Output] = set()
        self.env: dict[str, Value] = {}
        self.returned: Value = NOTHING
        self.stack: list[_Method] = []

    # --- methods and calls --------------------------------------------------------------------------------------------

    def run(self, method: _Method, args: Sequence[Value], keywords: dict[str | None, Value]) -> Value:
        """Interpret a method and return what it returns. Recursion passes the arguments on."""
        if method in self.stack or len(self.stack) >= MAX_DEPTH:
            return _union([*args, *keywords.values()])
        outer = self.env, self.returned
        signature = method.function.args
        names = [a.arg for a in (*signature.posonlyargs, *signature.args)]
        self.env = dict(zip(names, [frozenset({method.owner}), *args], strict=False))
        self.env |= {name: value for name, value in keywords.items() if name is not None}
        rest = [*args[max(len(names) - 1, 0) :], *(v for k, v in keywords.items() if k is None or k not in names)]
        self.env |= {a.arg: _union(rest) for a in (signature.vararg, signature.kwarg) if a is not None}
        self.returned = NOTHING
        self.stack.append(method)
        self.block(method.function.body)
        self.stack.pop()
        returned = self.returned
        self.env, self.returned = outer
        return returned

    def call(self, function: Value, args: Sequence[Value]) -> Value:
        """Return the result of calling modules with these arguments."""
        passed = _outputs(_union(args))
        result = _outputs(function)  # a method of a tensor
        for module in function:
            if isinstance(module, nn.Module) and _has_weights(module):
                result |= self.consume(passed, {Output(module)})
            else:
                result |= passed
        return frozenset(result)

    def visit_Call(self, node: ast.Call) -> Value:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        args = [self.value(a.value if isinstance(a, ast.Starred) else a) for a in node.args]
        keywords = {k.arg: self.value(k.value) for k in node.keywords}
        receiver = self.value(node.func.value) if isinstance(node.func, ast.Attribute) else NOTHING
        every = [receiver, *args, *keywords.values()]
        if name in NO_FLOW:
            return NOTHING
        if name in ("getattr", "iter", "next", "list", "tuple", "reversed", "enumerate", "zip", "values", "items"):
            return _union(every)
        if isinstance(node.func, ast.Attribute) and _is_super(node.func.value):
            current = self.stack[-1]
            method = _method(current.owner, name, after=current.cls)
            return self.run(method, args, keywords) if method else _union(map(_outputs, every))
        function = self.value(node.func)
        methods = [f for f in function if isinstance(f, _Method)]
        modules = [f for f in function if isinstance(f, nn.Module)]
        if methods:
            return _union(self.run(method, args, keywords) for method in methods)
        if not modules and name in PRODUCTS:
            return self.product(every)
        if not modules:  # a function that is passed a module calls it, as torch.utils.checkpoint does
            modules = [v for v in _union(args[:1]) if isinstance(v, nn.Module) and v is not self.stack[-1].owner]
        return self.call(frozenset(modules) | _outputs(receiver), every) if modules else _outputs(_union(every))

    def product(self, operands: Iterable[Value]) -> Value:
        """Return the result of a product: it consumes outputs, and is the output of the parameters in it."""
        values = _union(operands)
        weights = [w for w in values if isinstance(w, _Weight)]
        by_weights = {Output(w.module, None if w.name == "weight" else w.name) for w in weights}
        return self.consume(_outputs(values), by_weights)

    def consume(self, inputs: Iterable[Output], computed: set[Output]) -> frozenset[Output]:
        """Note that outputs are computed from others, and return them."""
        for output in inputs:
            self.consumers.setdefault(output, set()).update(computed or {PRODUCT})
        self.computed |= computed
        return frozenset(computed)

    # --- expressions --------------------------------------------------------------------------------------------------

    def value(self, node: ast.expr | None) -> Value:
        """Return what an expression may stand for."""
        return NOTHING if node is None else self.visit(node) or NOTHING

    def visit_Name(self, node: ast.Name) -> Value:
        return self.env.get(node.id, NOTHING)

    def visit_Attribute(self, node: ast.Attribute) -> Value:
        owners = self.value(node.value)
        if node.attr in METADATA or node.attr in ("indices", "logits_to_keep"):
            return NOTHING
        members: set[Output | _Weight | _Method | nn.Module] = set()
        for owner in owners:
            members |= self.member(owner, node.attr) if isinstance(owner, nn.Module) else {owner}
        return frozenset(members)

    def member(self, owner: nn.Module, name: str) -> Value:
        """Return what an attribute of a module may stand for."""
        if (child := owner._modules.get(name)) is not None:
            return frozenset({child})
        if owner._parameters.get(name) is not None:
            return frozenset({_Weight(owner, name)})
        method = _method(owner, name)
        if method is None:
            return NOTHING
        is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in method.function.decorator_list)
        return self.run(method, [], {}) if is_property else frozenset({method})

    def visit_Subscript(self, node: ast.Subscript) -> Value:
        if isinstance(node.value, ast.Call) and _takes_indices(node.value) and _constant(node.slice) == 1:
            self.value(node.value)
            return NOTHING
        return _elements(self.value(node.value))

    def visit_BinOp(self, node: ast.BinOp) -> Value:
        operands = [self.value(node.left), self.value(node.right)]
        return self.product(operands) if isinstance(node.op, ast.MatMult) else _union(operands)

    def visit_Compare(self, node: ast.Compare) -> Value:
        return NOTHING

    visit_Lambda = visit_JoinedStr = visit_FunctionDef = visit_Compare  # type: ignore[assignment]

    def visit_NamedExpr(self, node: ast.NamedExpr) -> Value:
        value = self.value(node.value)
        self.assign(node.target, value, node.value)
        return value

    def visit_IfExp(self, node: ast.IfExp) -> Value:
        return self.value(node.body) | self.value(node.orelse)

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> Value:
        for generator in node.generators:
            self.bind_loop(generator.target, generator.iter)
        return self.value(node.value if isinstance(node, ast.DictComp) else node.elt)

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp

    def generic_visit(self, node: ast.AST) -> Value:
        """Return the union of the parts of any other expression, such as a tuple, a dict or -x."""
        return _union(self.value(c) for c in ast.iter_child_nodes(node) if isinstance(c, ast.expr | ast.Starred))

    # --- statements ---------------------------------------------------------------------------------------------------

    def block(self, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            self.visit(statement)

    def branches(self, *blocks: Sequence[ast.stmt]) -> None:
        """Interpret blocks of which one is run, and join what the variables are afterwards."""
        before, after = self.env, []
        for statements in blocks:
            self.env = dict(before)
            self.block(statements)
            after.append(self.env)
        names = dict.fromkeys(name for env in after for name in env)
        self.env = {name: _union(env.get(name, NOTHING) for env in after) for name in names}

    def assign(self, target: ast.expr, value: Value, node: ast.expr | None = None) -> None:
        """Assign a value to a variable, or to each variable of a tuple; an element of a list is added to the list."""
        if isinstance(target, ast.Name):
            self.env[target.id] = value
        elif isinstance(target, ast.Starred):
            self.assign(target.value, value)
        elif isinstance(target, ast.Tuple | ast.List):
            if isinstance(node, ast.Tuple | ast.List) and len(node.elts) == len(target.elts):
                for inner, part in zip(target.elts, [self.value(e) for e in node.elts], strict=True):
                    self.assign(inner, part)
                return
            for i, inner in enumerate(target.elts):
                is_indices = i == 1 and isinstance(node, ast.Call) and _takes_indices(node)
                self.assign(inner, NOTHING if is_indices else value)
        elif isinstance(target, ast.Subscript | ast.Attribute):
            owner: ast.expr = target
            while isinstance(owner, ast.Subscript | ast.Attribute):
                owner = owner.value
            if isinstance(owner, ast.Name) and not any(isinstance(v, nn.Module) for v in self.value(owner)):
                self.env[owner.id] = self.value(owner) | value

    def visit_Assign(self, node: ast.Assign) -> None:
        value = self.value(node.value)
        for target in node.targets:
            self.assign(target, value, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.assign(node.target, self.value(node.value), node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        before: ast.expr = node.target
        self.assign(node.target, self.value(before) | self.value(node.value))

    def visit_Expr(self, node: ast.Expr) -> None:
        """Interpret a call; what is appended to a list is in the list from now on."""
        call = node.value
        value = self.value(call)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            owner = call.func.value
            if call.func.attr in ("append", "extend", "insert", "update", "copy_") and isinstance(owner, ast.Name):
                self.env[owner.id] = self.value(owner) | _outputs(value)

    def visit_Return(self, node: ast.Return) -> None:
        self.returned |= self.value(node.value)

    visit_Yield = visit_Return  # type: ignore[assignment]

    def visit_If(self, node: ast.If) -> None:
        self.value(node.test)
        self.branches(node.body, node.orelse)

    def visit_Try(self, node: ast.Try) -> None:
        self.branches([*node.body, *node.orelse], *(handler.body for handler in node.handlers))
        self.block(node.finalbody)

    def visit_With(self, node: ast.With) -> None:
        self.block(node.body)

    def visit_While(self, node: ast.While) -> None:
        for _ in range(2):
            self.branches(node.body, [])

    def visit_For(self, node: ast.For) -> None:
        for _ in range(2):
            self.bind_loop(node.target, node.iter)
            self.branches(node.body, [])
        self.block(node.orelse)

    def bind_loop(self, target: ast.expr, iterable: ast.expr) -> None:
        """Bind the variables of a loop; those over zip and enumerate each to their own iterable."""
        function = getattr(getattr(iterable, "func", None), "id", "")
        if isinstance(iterable, ast.Call) and isinstance(target, ast.Tuple) and function in ("zip", "enumerate"):
            iterables = iterable.args if function == "zip" else [ast.Constant(0), *iterable.args[:1]]
            if len(iterables) == len(target.elts):
                for inner, one in zip(target.elts, iterables, strict=True):
                    self.bind_loop(inner, one)
                return
        self.assign(target, _elements(self.value(iterable)))


def _union(values: Iterable[Value]) -> Value:
    return frozenset().union(*values)


def _outputs(value: Iterable[object]) -> frozenset[Output]:
    return frozenset(v for v in value if isinstance(v, Output))


def _elements(value: Value) -> Value:
    """Return the elements of containers among the values, and all other values as they are."""
    elements: set[Output | _Weight | _Method | nn.Module] = set()
    for v in value:
        if isinstance(v, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            elements |= set(v.children())
        else:
            elements.add(v)
    return frozenset(elements)


def _takes_indices(call: ast.Call) -> bool:
    return (call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")) in WITH_INDICES


def _constant(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "super"
