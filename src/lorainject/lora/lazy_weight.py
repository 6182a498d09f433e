"""W0 + s P Q as an object that a model's own code can compute with, without the sum ever being formed.

A `LazyWeight` stands where a model reads a weight itself: experts[i], weight.chunk(3),
F.multi_head_attention_forward(..., in_proj_weight), einsum. torch hands every function that meets one to
`__torch_function__` (torch.overrides). Two kinds of functions are answered exactly and cheaply:

- views (indexing, transposing, splitting), which return another lazy weight;
- products (lazy_weight_ops.py), which cost the product with W0 and two products of rank r.

Any other function gets the dense sum. It is exact, too, but takes memory of the weight's size; `fallbacks` counts it,
so that `probe` can name the function.

The stored shape is (*stack, rows, *rest): the experts of a stack, or nothing; the rows; and columns, or the channels
and kernel of a convolution. The delta is P (*stack, rows, r) times Q (*stack, r, *rest), whatever the axes mean: W
stored as (out, in) and W stored as (in, out) are handled alike.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..errors import StateError
from ..numerics.delta import Factors, delta

Handler = Callable[..., Any]
ANSWERS: dict[Any, Handler] = {}
"""The answer of a lazy weight to each torch function."""
ANSWERS_BY_NAME: dict[str, Handler] = {}
"""Answers to operators that exist only if the library that defines them is installed."""


class LazyWeight:
    """The sum of W0 and all s P Q of `factors`. It is no Tensor, and lives as long as one forward.

    Args:
        W0: The base weight, shape (*stack, rows, *rest).
        factors: The factors of every active adapter. Without any, the sum is W0.
        stack: The number of axes before the axis of the rows.
        fallbacks: Counts how often the dense sum was formed, by the name of the function that needed it.
    """

    def __init__(self, W0: Tensor, factors: tuple[Factors, ...], stack: int, fallbacks: Counter[str]) -> None:
        self.W0, self.factors, self.stack, self.fallbacks = W0, factors, stack, fallbacks

    W0: Tensor
    factors: tuple[Factors, ...]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", str(function))
        if (answer := ANSWERS.get(function) or ANSWERS_BY_NAME.get(name)) is not None:
            with contextlib.suppress(TypeError):  # arguments in a form that the answer does not expect
                result = answer(function, *args, **(kwargs or {}))
                if result is not NotImplemented:
                    return result
        args, kwargs = tree_map_only(cls, lambda w: w.dense(name), (args, kwargs or {}))
        return function(*args, **kwargs)

    def dense(self, function_name: str) -> Tensor:
        """Return the sum, differentiable. LoRA dropout does not act, since the input of the weight is not known
        here."""
        factors, W = self.factors, self.W0
        if factors and not torch.compiler.is_compiling():
            self.fallbacks[function_name] += 1
        for P, Q, s, *_ in factors:
            W = W + delta(P, Q, s).reshape(W.shape).to(W.dtype)
        return W

    def updated_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return the bias that belongs to the weight, from the layer's bias."""
        return bias

    @property
    def is_matrix(self) -> bool:
        """True if exactly one axis follows the axis of the rows."""
        return self.W0.ndim == self.stack + 2

    def view_of(
        self, W: Tensor, on_P: Callable[[Tensor], Tensor], on_Q: Callable[[Tensor], Tensor], rest: int
    ) -> LazyWeight:
        """Return a view of the sum, from a view W of W0 and the matching views of P and Q; `rest` axes follow the
        rows."""
        factors = tuple(f._replace(P=on_P(f.P), Q=on_Q(f.Q)) for f in self.factors)
        return LazyWeight(W, factors, W.ndim - 1 - rest, self.fallbacks)

    # Views

    def __getitem__(self, index: Any) -> LazyWeight | Tensor:
        where = index if isinstance(index, tuple) else (index,)
        if (split := _split_index(where, self.W0.ndim, self.stack)) is None:
            return self.dense("__getitem__")[index]
        on_P, on_Q, rest = split
        return self.view_of(self.W0[where], lambda P: P[on_P], lambda Q: Q[on_Q], rest)

    def __len__(self) -> int:
        return len(self.W0)

    def __iter__(self) -> Iterator[LazyWeight | Tensor]:
        return iter(self.unbind())

    def transpose(self, a: int, b: int) -> LazyWeight | Tensor:
        n = self.W0.ndim
        if self.is_matrix and {a % n, b % n} == {n - 2, n - 1}:
            swapped = tuple(f._replace(P=f.Q.mT, Q=f.P.mT) for f in self.factors)
            return LazyWeight(self.W0.mT, swapped, self.stack, self.fallbacks)
        return self.dense("transpose").transpose(a, b)

    swapaxes = transpose

    def t(self) -> LazyWeight | Tensor:
        return self.transpose(0, 1)

    @property
    def T(self) -> LazyWeight | Tensor:
        return self.transpose(0, 1) if self.W0.ndim == 2 else self.dense("T").T

    @property
    def mT(self) -> LazyWeight | Tensor:
        return self.transpose(-2, -1)

    def permute(self, *dims: Any) -> LazyWeight | Tensor:
        n = self.W0.ndim
        order = tuple(d % n for d in (dims[0] if isinstance(dims[0], list | tuple) else dims))
        if order == (*range(n - 2), n - 1, n - 2):
            return self.transpose(-2, -1)
        return self if order == tuple(range(n)) else self.dense("permute").permute(order)

    def split(self, size: int | list[int], dim: int = 0) -> tuple[LazyWeight | Tensor, ...]:
        return self._parts(self.W0.split(size, dim), dim)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[LazyWeight | Tensor, ...]:
        return self._parts(self.W0.chunk(chunks, dim), dim)

    def unbind(self, dim: int = 0) -> tuple[LazyWeight | Tensor, ...]:
        return tuple(self[_at(dim % self.W0.ndim, i)] for i in range(self.W0.shape[dim]))

    def narrow(self, dim: int, start: int, length: int) -> LazyWeight | Tensor:
        start %= self.W0.shape[dim]
        return self[_at(dim % self.W0.ndim, slice(start, start + length))]

    def select(self, dim: int, index: int) -> LazyWeight | Tensor:
        return self[_at(dim % self.W0.ndim, index)]

    def index_select(self, dim: int, index: Tensor) -> LazyWeight | Tensor:
        return self[_at(dim % self.W0.ndim, index.reshape(-1))]

    def unsqueeze(self, dim: int) -> LazyWeight | Tensor:
        return self[_at(dim % (self.W0.ndim + 1), None)]

    def squeeze(self, dim: int) -> LazyWeight | Tensor:
        W, dim, rest = self.W0.squeeze(dim), dim % self.W0.ndim, self.W0.ndim - self.stack - 1
        if dim <= self.stack or (rest == 1 and W.ndim < self.W0.ndim):
            return self.dense("squeeze").squeeze(dim)
        # Q has the ranks where W has the rows, so that `dim` is the same axis in both.
        return self.view_of(W, lambda P: P, lambda Q: Q.squeeze(dim), W.ndim - self.stack - 1)

    def reshape(self, *shape: Any) -> LazyWeight | Tensor:
        W, n = self.W0.reshape(*shape), self.stack
        rest = self.W0.shape[n + 1 :]
        if W.ndim > n + 1 and W.shape[: n + 1] == self.W0.shape[: n + 1]:  # only `rest` changes its shape
            new_rest = W.shape[n + 1 :]
            return self.view_of(W, lambda P: P, lambda Q: Q.reshape(*Q.shape[: n + 1], *new_rest), len(new_rest))
        if n == 0 and W.ndim > len(rest) and W.shape[-len(rest) :] == rest:  # the rows become a stack of rows (dbrx)
            rows = W.shape[: -len(rest)]
            return self.view_of(
                W, lambda P: P.reshape(*rows, P.shape[-1]), lambda Q: Q.expand(*rows[:-1], *Q.shape), len(rest)
            )
        return self.dense("reshape").reshape(*shape)

    view = reshape

    def flatten(self, start: int = 0, end: int = -1) -> LazyWeight | Tensor:
        return self.reshape(self.W0.flatten(start, end).shape)

    def view_as(self, other: Tensor) -> LazyWeight | Tensor:
        return self.reshape(other.shape)

    def _parts(self, parts: tuple[Tensor, ...], dim: int) -> tuple[LazyWeight | Tensor, ...]:
        """Return the lazy weights of these parts of W0, which follow each other along an axis."""
        lazy_parts, start, dim = [], 0, dim % self.W0.ndim
        for part in parts:
            lazy_parts.append(self[_at(dim, slice(start, start + part.shape[dim]))])
            start += part.shape[dim]
        return tuple(lazy_parts)

    # Metadata and casts are those of W0. The factors are cast where they are used, to the dtype of the other operand.

    shape = property(lambda self: self.W0.shape)
    dtype = property(lambda self: self.W0.dtype)
    device = property(lambda self: self.W0.device)
    ndim = property(lambda self: self.W0.ndim)
    requires_grad = property(lambda self: self.W0.requires_grad or any(f.P.requires_grad for f in self.factors))

    def size(self, dim: int | None = None) -> Any:
        return self.W0.shape if dim is None else self.W0.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> LazyWeight | Tensor:
        W = self.W0.to(*args, **kwargs)
        if W.is_meta:  # accelerate offloads a parameter while it is shadowed
            return W
        factors = tuple(Factors(f.P.to(W.device), f.Q.to(W.device), f.s.to(W.device), f.dropout) for f in self.factors)
        return LazyWeight(W, factors, self.stack, self.fallbacks)

    def type(self, dtype: torch.dtype) -> LazyWeight | Tensor:
        return self.to(dtype)

    def type_as(self, other: Tensor) -> LazyWeight | Tensor:
        return self.to(other.dtype)

    def float(self) -> LazyWeight | Tensor:
        return self.to(torch.float32)

    def contiguous(self) -> LazyWeight:
        return self

    def __matmul__(self, x: Tensor) -> Any:
        return torch.matmul(self, x)  # type: ignore[arg-type]

    def __rmatmul__(self, x: Tensor) -> Any:
        return torch.matmul(x, self)  # type: ignore[arg-type]

    def __neg__(self) -> Tensor:
        return -self.dense("__neg__")

    def __abs__(self) -> Tensor:
        return self.dense("__abs__").abs()

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name in METADATA:
            return getattr(self.W0, name)
        if name.endswith("_") and not name.startswith("_"):
            raise StateError(
                f"the model's own code changes an adapted weight in place ({name})",
                way_out="inject the adapters without this weight: exclude=[...]",
            )
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.dense(name), name)


METADATA = frozenset({
    "dim", "numel", "nelement", "stride", "element_size", "itemsize", "nbytes", "data_ptr", "storage_offset",
    "untyped_storage", "layout", "is_contiguous", "is_floating_point", "is_complex", "is_cuda", "is_cpu", "is_meta",
    "is_sparse", "is_nested", "is_quantized", "is_mkldnn", "is_leaf", "is_inference", "get_device",
})  # fmt: skip
"""Attributes and methods that are the same for the sum as for W0."""


def _dense_operator(name: str) -> Callable[[LazyWeight, Any], Any]:
    """Return an operator method that computes with the dense sum."""
    return lambda self, other: getattr(self.dense(name), name)(other)


for _operator in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    for _name in (f"__{_operator}__", f"__r{_operator}__"):
        setattr(LazyWeight, _name, _dense_operator(_name))
for _operator in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(LazyWeight, f"__{_operator}__", _dense_operator(f"__{_operator}__"))


def _at(dim: int, index: Any) -> tuple[Any, ...]:
    """Return a full index that applies `index` to axis `dim` and keeps all axes before it whole."""
    return (*[slice(None)] * dim, index)


def _split_index(index: tuple[Any, ...], ndim: int, stack: int) -> tuple[tuple[Any, ...], tuple[Any, ...], int] | None:
    """Split an index of the weight into one of P and one of Q.

    Return both and the number of axes that then follow the rows. Return None if the result is not a sum W0 + s P Q (a
    single row, or picked columns).
    """
    if any(i is Ellipsis for i in index):
        position = next(n for n, i in enumerate(index) if i is Ellipsis)
        missing = ndim - sum(i is not None and i is not Ellipsis for i in index)
        index = (*index[:position], *[slice(None)] * missing, *index[position + 1 :])
    on_P: list[Any] = []
    on_Q: list[Any] = []
    axis, rest = 0, ndim - stack - 1
    for i in index:
        if i is None and axis > stack:
            on_Q.append(None)
            rest += 1
            continue
        if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) and i.ndim > 1:
            return None
        if i is None or axis < stack:
            on_P.append(i)
            on_Q.append(i)
        elif axis == stack:
            picks_rows = isinstance(i, Tensor) and i.ndim == 1 and stack == 0 and len(index) == 1
            if not isinstance(i, slice) and not picks_rows:
                return None
            on_P.append(i)
            on_Q.append(slice(None))
        elif isinstance(i, slice):
            on_Q.append(i)
        else:
            return None
        axis += i is not None
    return tuple(on_P), tuple(on_Q), rest


def answers(*functions: Any) -> Callable[[Handler], Handler]:
    """Register an answer to these torch functions. It is called as handler(function, *args, **kwargs)."""

    def register(handler: Handler) -> Handler:
        ANSWERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


VIEWS = (
    "transpose", "swapaxes", "t", "permute", "split", "chunk", "unbind", "narrow", "select", "index_select",
    "unsqueeze", "squeeze", "reshape", "view", "flatten", "type", "contiguous",
)  # fmt: skip
"""Methods that return lazy weights, and the torch functions of the same names."""


def _or_dense(name: str, method: Handler) -> Handler:
    """Return the method with a fallback to the dense sum, for calls in a form that the method does not expect."""

    def call(self: LazyWeight, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except (TypeError, IndexError):
            return getattr(self.dense(name), name)(*args, **kwargs)

    return call


for _view in VIEWS:
    setattr(LazyWeight, _view, _or_dense(_view, getattr(LazyWeight, _view)))
    if hasattr(torch, _view):
        answers(getattr(torch, _view))(
            lambda function, w, *args, _view=_view, **kwargs: getattr(w, _view)(*args, **kwargs)
        )
