"""The lazy weight: what a model's code computes with it equals the dense sum, in values and gradients.

Products and views do not form the dense sum; any other function does, and is counted.
"""

from __future__ import annotations

import operator
import types
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorainject.lora.lazy_weight import ANSWERS, LazyWeight
from lorainject.numerics.delta import Factors

from example_count import examples

R = 3
laws = settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.too_slow])


def lazy_weight(*shape: int, stack: int = 0, count: int = 1, seed: int = 0) -> LazyWeight:
    """Return a random lazy weight of this stored shape, in float64, with `count` adapters."""
    g = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64, requires_grad=True)

    scale = torch.tensor(0.5)
    factors = tuple(
        Factors(randn(*shape[: stack + 1], R), randn(*shape[:stack], R, *shape[stack + 1 :]), scale)
        for _ in range(count)
    )
    return LazyWeight(randn(*shape), factors, stack, Counter())


def check_function(w: LazyWeight, function) -> None:
    """Check values and gradients of a function of the lazy weight against the dense sum, which must not be formed."""
    leaves = [w.W0, *(t for f in w.factors for t in (f.P, f.Q))]
    output = function(w)
    assert not w.fallbacks, w.fallbacks
    expected = function(w.dense("here"))
    assert isinstance(output, Tensor)
    tolerance = 1e-9 if output.dtype is torch.float64 else 1e-5  # grouped_mm has no float64
    assert torch.allclose(output, expected, rtol=tolerance, atol=tolerance)
    g = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad(output, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        assert torch.allclose(a, b, rtol=10 * tolerance, atol=10 * tolerance)


def x(*shape: int) -> Tensor:
    """Return a random input in float64, the same at each call."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


IDS = torch.tensor([2, 0, 2])
FEW_OFFSETS = torch.tensor([1, 1, 2], dtype=torch.int32)
OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)  # the second expert gets no token
PRODUCTS = {
    "linear": ((5, 4), 0, lambda w: F.linear(x(2, 7, 4), w, x(5))),
    "linear, by keyword": ((5, 4), 0, lambda w: F.linear(input=x(7, 4), weight=w)),
    "x @ W": ((4, 5), 0, lambda w: x(2, 7, 4) @ w),
    "W @ x": ((5, 4), 0, lambda w: w @ x(4, 7)),
    "W @ vector": ((5, 4), 0, lambda w: w @ x(4)),
    "torch.matmul": ((4, 5), 0, lambda w: torch.matmul(x(7, 4), w)),
    "Tensor.matmul": ((4, 5), 0, lambda w: x(7, 4).matmul(w)),
    "mm": ((4, 5), 0, lambda w: torch.mm(x(7, 4), w)),
    "addmm": ((4, 5), 0, lambda w: torch.addmm(x(5), x(7, 4), w)),
    "addmm with alpha and beta": ((4, 5), 0, lambda w: torch.addmm(x(5), x(7, 4), w, beta=2, alpha=3)),
    "baddbmm": ((3, 4, 5), 1, lambda w: torch.baddbmm(x(3, 1, 5), x(3, 7, 4), w)),
    "bmm, W right": ((3, 4, 5), 1, lambda w: torch.bmm(x(3, 7, 4), w)),
    "bmm, W left": ((3, 4, 5), 1, lambda w: torch.bmm(w, x(3, 5, 2))),
    "one expert": ((3, 4, 5), 1, lambda w: F.linear(x(7, 5), w[1])),
    "one expert, by a tensor": ((3, 4, 5), 1, lambda w: F.linear(x(7, 5), w[torch.tensor(1)])),
    "gathered experts": ((3, 4, 5), 1, lambda w: torch.bmm(w[IDS], x(3, 5, 1))),
    "all experts": ((3, 4, 5), 1, lambda w: torch.stack([F.linear(x(7, 5), e) for e in w])),
    "unbound experts": ((3, 4, 5), 1, lambda w: torch.stack([F.linear(x(7, 5), e) for e in torch.unbind(w)])),
    "transposed experts": ((3, 4, 5), 1, lambda w: x(3, 7, 5) @ w.transpose(1, 2)),
    "mT": ((3, 4, 5), 1, lambda w: x(3, 7, 5) @ w.mT),
    "T": ((4, 5), 0, lambda w: x(7, 5) @ w.T),
    "t()": ((4, 5), 0, lambda w: x(7, 5) @ w.t()),
    "permute": ((3, 4, 5), 1, lambda w: x(3, 7, 5) @ w.permute(0, 2, 1)),
    "grouped_mm": ((3, 4, 8), 1, lambda w: F.grouped_mm(x(5, 4).float(), w.float(), offs=OFFSETS)),
    "grouped_mm, few tokens": ((3, 4, 8), 1, lambda w: F.grouped_mm(x(2, 4).float(), w.float(), offs=FEW_OFFSETS)),
    "a new axis in the stack": ((3, 4, 5), 1, lambda w: w[:, None] @ x(3, 2, 5, 6)),
    "chunks of rows": ((6, 4), 0, lambda w: torch.cat([F.linear(x(7, 4), part) for part in w.chunk(3)], -1)),
    "split rows": ((6, 4), 0, lambda w: torch.cat([F.linear(x(7, 4), part) for part in torch.split(w, [2, 4])], -1)),
    "columns": ((6, 4), 0, lambda w: F.linear(x(7, 2), w[:, 1:3])),
    "rows and columns": ((6, 4), 0, lambda w: F.linear(x(7, 2), w[1:5, 1:3])),
    "picked rows": ((6, 4), 0, lambda w: F.linear(x(7, 4), w[IDS])),
    "narrow": ((6, 4), 0, lambda w: F.linear(x(7, 4), w.narrow(0, 2, 3))),
    "rows as a stack": ((6, 4), 0, lambda w: F.linear(x(7, 4), w.view(3, 2, 4)[2])),
    "reshaped and transposed": ((6, 4), 0, lambda w: x(3, 7, 4) @ w.reshape(3, 2, 4).transpose(1, 2)),
    "cast": ((5, 4), 0, lambda w: F.linear(x(7, 4), w.to(torch.float64))),
    "einsum over all axes": ((4, 2, 3), 0, lambda w: torch.einsum("ibh,hnd->ibnd", x(7, 2, 4), w)),
    "einsum from the right": ((4, 2, 3), 0, lambda w: torch.einsum("ibnd,hnd->ibh", x(7, 2, 2, 3), w)),
    "einsum with a stack": ((3, 4, 5), 1, lambda w: torch.einsum("ebi,eio->ebo", x(3, 7, 4), w)),
    "conv1d": ((6, 4, 3), 0, lambda w: F.conv1d(x(2, 4, 9), w, x(6), stride=2, padding=1)),
    "conv2d": ((6, 4, 3, 3), 0, lambda w: F.conv2d(x(2, 4, 9, 9), w, x(6), dilation=2)),
    "conv2d in groups": ((6, 2, 3, 3), 0, lambda w: F.conv2d(x(2, 4, 9, 9), w, None, groups=2)),
    "conv3d": ((6, 4, 3, 1, 3), 0, lambda w: F.conv3d(x(2, 4, 5, 5, 5), w, padding="same")),
    "depthwise from a matrix": ((4, 3), 0, lambda w: F.conv1d(x(2, 4, 9), w.unsqueeze(1), groups=4)),
    "1x1 from a linear": ((6, 4), 0, lambda w: F.conv2d(x(2, 4, 5, 5), w.unsqueeze(-1).unsqueeze(-1))),
    "a matrix from a depthwise": ((4, 1, 3), 0, lambda w: F.linear(x(7, 3), w.squeeze(1))),
    "conv_transpose1d": ((4, 6, 3), 0, lambda w: F.conv_transpose1d(x(2, 4, 9), w, x(6), stride=2, output_padding=1)),
    "conv_transpose2d in groups": ((4, 3, 3, 3), 0,
                                   lambda w: F.conv_transpose2d(x(2, 4, 5, 5), w, None, 2, 1, 1, 2, 1)),
    "embedding": ((9, 4), 0, lambda w: F.embedding(torch.tensor([[1, 3], [8, 1]]), w, padding_idx=2)),
    "attention": ((12, 4), 0, lambda w: F.multi_head_attention_forward(
        x(5, 2, 4), x(5, 2, 4), x(5, 2, 4), 4, 2, w, x(12), None, None, False, 0.0, x(4, 4), x(4))[0]),
}  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("shape", "stack", "function"), [pytest.param(*case, id=name) for name, case in PRODUCTS.items()]
)
def test_products_and_views(shape, stack, function, count):
    """Products of views, as models take them, need no dense sum, with one adapter and with two."""
    check_function(lazy_weight(*shape, stack=stack, count=count), function)


VIEWS = {
    "transpose": lambda w: w.transpose(-2, -1),
    "rows": lambda w: w[..., 1:, :] if w.stack else w[1:],
    "columns": lambda w: w[..., :-1],
    "first half": lambda w: w.chunk(2, -1)[0],
    "cast": lambda w: w.to(torch.float64),
    "unsqueezed and back": lambda w: w.unsqueeze(-1).squeeze(-1),
}


@laws
@given(st.booleans(), st.lists(st.sampled_from(sorted(VIEWS)), max_size=4), st.booleans(), st.integers(0, 100))
def test_chains_of_views(stacked, names, right, seed):
    """The product with a view of a view is that with the same view of the dense sum."""
    w = lazy_weight(*((2, 6, 7) if stacked else (6, 7)), stack=int(stacked), seed=seed)

    def function(v):
        for name in names:
            v = VIEWS[name](v) if isinstance(v, LazyWeight) else VIEWS[name](_WithStack(v, int(stacked)))
        rows, columns = v.shape[-2:]
        return x(*v.shape[:-2], 3, rows) @ v if right else v @ x(*v.shape[:-2], columns, 3)

    check_function(w, function)


class _WithStack(torch.Tensor):
    """A plain tensor with the attribute `stack`, so that the same views can be taken of it."""

    def __new__(cls, t: Tensor, stack: int) -> Tensor:
        t.stack = stack  # type: ignore[attr-defined]
        return t


@pytest.mark.parametrize("function", [
    lambda w: torch.cat([w, w]).sum(), lambda w: (w * 2).sum(), lambda w: (1 - w).sum(),
    lambda w: (w / w.norm()).sum(), lambda w: w[0].sum(), lambda w: F.softmax(w, -1)[0, 0],
    lambda w: torch.stack([w, w]).sum(), lambda w: w.reshape(4, 6).sum(), lambda w: (-w).sum(),
    lambda w: w.abs().sum(), lambda w: F.linear(w, w).sum(),
    lambda w: F.bilinear(x(2, 2), x(2, 3), w.reshape(4, 2, 3)).sum(),
])  # fmt: skip
def test_the_dense_fallback_is_exact_and_counted(function):
    """A function without an answer gets the dense sum, with its gradients, and is counted."""
    w = lazy_weight(6, 4)
    output = function(w)
    assert sum(w.fallbacks.values()) >= 1
    leaves = [w.factors[0].P, w.factors[0].Q]
    expected = function(w.dense("here"))
    assert torch.allclose(output, expected)
    for a, b in zip(torch.autograd.grad(output, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert torch.allclose(a, b)


def test_metadata_needs_no_dense_sum():
    """Shape, dtype, device and the like are those of W0; an attribute that no tensor has raises AttributeError."""
    w = lazy_weight(6, 4)
    assert (w.shape, w.size(0), len(w)) == (w.W0.shape, 6, 6)
    assert (w.ndim, w.dim()) == (2, 2)
    assert (w.dtype, w.device) == (torch.float64, torch.device("cpu"))
    assert w.numel() == 24
    assert w.is_floating_point()
    assert w.stride() == (4, 1)
    assert w.requires_grad
    assert not w.fallbacks
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = w.nonsense


def test_dropout_acts_on_the_adapters_input():
    """Every product drops the adapter's input only; the mean over many masks is the output without dropout."""
    torch.manual_seed(0)
    w = lazy_weight(5, 4)
    w = LazyWeight(w.W0, tuple(f._replace(dropout=0.5) for f in w.factors), 0, Counter())
    plain = LazyWeight(w.W0, tuple(f._replace(dropout=0.0) for f in w.factors), 0, Counter())
    many = x(1, 4).expand(20000, 4)
    for product in (
        lambda v: F.linear(many, v),
        lambda v: many @ v.T,
        lambda v: (v @ many.T).T,
        lambda v: torch.einsum("bi,oi->bo", many, v),
    ):
        output = product(w)
        assert output.std(0).min() > 0.1  # masks differ from row to row
        assert torch.allclose(output.mean(0), product(plain)[0], atol=0.1)


class LargestNewTensor(TorchDispatchMode):
    """Records the largest number of elements of a new tensor; views are not new."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inputs:
                self.elements = max(self.elements, t.numel())
        return result


@pytest.mark.parametrize("product", [
    lambda w: torch.stack([F.linear(x(2, 64).float(), w[e]) for e in range(16)]),
    lambda w: F.linear(x(2, 64).float(), w[3]),
    lambda w: F.grouped_mm(x(20, 64).float(), w.transpose(1, 2), offs=torch.arange(1, 17, dtype=torch.int32)),
])  # fmt: skip
def test_products_form_no_tensor_of_the_weights_size(product):
    """Neither forward nor backward forms a tensor much larger than A and B; the dense sum is as large as the stack."""
    w = lazy_weight(16, 48, 64, stack=1)
    w.W0.requires_grad_(False)
    w = LazyWeight(w.W0.float(), w.factors, 1, w.fallbacks)
    with LargestNewTensor() as largest:
        product(w).square().sum().backward()
    assert largest.elements < 16 * 64 * 8  # A and B of all experts, padded; the stack is six times that
    with LargestNewTensor() as largest:
        w.dense("here")
    assert largest.elements == 16 * 48 * 64


def test_every_answer_is_tested():
    """Every function with an answer occurs in the cases above, except views and aliases."""
    called: set[object] = set()
    original = LazyWeight.__torch_function__.__func__

    def record(cls, function, types, args=(), kwargs=None):
        called.add(function)
        return original(cls, function, types, args, kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LazyWeight, "__torch_function__", classmethod(record))
        for shape, stack, function in PRODUCTS.values():
            function(lazy_weight(*shape, stack=stack))
    aliases = {operator.matmul, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm, torch.mv, torch.addmv,
               Tensor.__rmatmul__, Tensor.__matmul__, F.grouped_mm, F.conv_transpose3d}  # fmt: skip
    views = {
        function
        for function, answer in ANSWERS.items()
        if isinstance(answer, types.LambdaType) and answer.__name__ == "<lambda>"
    }
    assert not set(ANSWERS) - called - aliases - views
