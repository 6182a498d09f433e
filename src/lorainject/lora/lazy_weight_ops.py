"""What torch's products do with a lazy weight W0 + s P Q: the product with W0, and two products of rank r.

    linear, matmul, mm, bmm, addmm, baddbmm, grouped_mm, einsum, conv, conv_transpose, embedding,
    multi_head_attention_forward

Each answer is exact, runs the base's own product, and forms nothing of the weight's size. LoRA dropout (with
probability p) acts on the other operand, which is the weight's input. A function that is not answered here gets the
dense sum (lazy_weight.py).
"""

from __future__ import annotations

import functools
import operator
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .lazy_weight import ANSWERS_BY_NAME, LazyWeight, answers


@answers(F.linear)
def _linear(function: Any, input: Any, weight: Any, bias: Tensor | None = None) -> Any:
    x, w = input, weight
    if not isinstance(x, Tensor) or not isinstance(w, LazyWeight) or not w.is_matrix:
        return NotImplemented
    y = function(x, w.W0, bias)
    for P, Q, s, p, *_ in w.factors:
        h_R = function(F.dropout(x, p, p > 0), Q.to(x.dtype)) * s
        y = y + function(h_R, P.to(h_R.dtype)).to(y.dtype)
    return y


@answers(torch.matmul, torch.mm, torch.bmm, torch.mv, operator.matmul)
@answers(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)
def _matmul(function: Any, input: Any, other: Any) -> Any:
    a, b = input, other
    w, x = (b, a) if isinstance(b, LazyWeight) else (a, b)
    if not isinstance(x, Tensor) or not w.is_matrix or (x.ndim == 1 and w.stack):
        return NotImplemented
    return _product(torch.matmul(a, w.W0) if w is b else torch.matmul(w.W0, b), w, x, right=w is b)


@answers(Tensor.__rmatmul__)
def _rmatmul(function: Any, b: Any, a: Any) -> Any:
    return _matmul(function, a, b)


@answers(torch.addmm, torch.baddbmm, torch.addmv, Tensor.addmm, Tensor.baddbmm)
def _addmm(function: Any, c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    w, x = (b, a) if isinstance(b, LazyWeight) else (a, b)
    if isinstance(c, LazyWeight) and isinstance(w, LazyWeight):  # the bias has a replacement
        c = c.dense("addmm")
    if not isinstance(x, Tensor) or not isinstance(c, Tensor) or not isinstance(w, LazyWeight) or not w.is_matrix:
        return NotImplemented
    y = function(c, a, w.W0, beta=beta, alpha=alpha) if w is b else function(c, w.W0, b, beta=beta, alpha=alpha)
    return _product(y, w, x, right=w is b, alpha=alpha)


def _product(y: Tensor, w: LazyWeight, x: Tensor, *, right: bool, alpha: Any = 1) -> Tensor:
    """Return y plus the low-rank terms of x @ W (if `right`) or W @ x."""
    for P, Q, s, p, *_ in w.factors:
        dropped = F.dropout(x, p, p > 0)
        P, Q = P.to(x.dtype), Q.to(x.dtype)
        if right:
            term = torch.matmul(torch.matmul(dropped, P) * (s * alpha), Q)
        else:
            term = torch.matmul(P, torch.matmul(Q, dropped) * (s * alpha))
        y = y + term.to(y.dtype)
    return y


@answers(F.grouped_mm, torch._grouped_mm)
def _grouped_mm(function: Any, x: Any, w: Any, offs: Any = None, **kwargs: Any) -> Any:
    """Answer for x (tokens, in), sorted by expert, w (experts, in, out), and offs (experts,), where each expert's
    tokens end."""
    if not isinstance(w, LazyWeight) or w.stack != 1 or any(v is not None for v in kwargs.values()):
        return NotImplemented
    y = function(x, w.W0, offs=offs)
    for P, Q, s, p, *_ in w.factors:
        dropped = F.dropout(x, p, p > 0)
        if len(x) < len(P):  # with fewer tokens than experts, only the factors of used experts are cast
            tokens = torch.arange(len(x), dtype=offs.dtype, device=offs.device)
            expert = torch.searchsorted(offs, tokens, right=True).clamp(max=len(P) - 1)
            h_R = torch.bmm(dropped.unsqueeze(1), P[expert].to(x.dtype)) * s
            y = y + torch.bmm(h_R, Q[expert].to(x.dtype)).squeeze(1)
        else:
            P, Q = _aligned(P.to(x.dtype), Q.to(x.dtype))
            y = y + function(function(dropped, P, offs=offs) * s, Q, offs=offs)
    return y


ANSWERS_BY_NAME["grouped_mm_fallback"] = _grouped_mm  # transformers' operator for cases that torch's cannot compile


@functools.cache
def teach_dynamo() -> None:
    """Add grouped_mm to the list of functions with `__torch_function__`, by which torch.compile decides.

    In eager mode grouped_mm calls `__torch_function__`, but torch's list lacks it.
    """
    functions = (F.grouped_mm, torch._grouped_mm)
    torch.overrides.get_overridable_functions()[F].extend(functions)
    if (dynamo := sys.modules.get("torch._dynamo.variables.torch")) is not None:  # it may have copied the list already
        dynamo.get_overridable_functions().update(functions)


def _aligned(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Pad the rank with zeros to a multiple of 16 bytes: the grouped kernel requires it of every stride."""
    lacking = -P.shape[-1] % (16 // P.element_size())
    return (F.pad(P, (0, lacking)) if lacking else P), (F.pad(Q, (0, 0, 0, lacking)) if lacking else Q).contiguous()


@answers(torch.einsum)
def _einsum(function: Any, equation: Any, *operands: Any) -> Any:
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    positions = [i for i, o in enumerate(operands) if isinstance(o, LazyWeight)]
    if not isinstance(equation, str) or len(positions) != 1 or "->" not in equation or len(operands) > 2:
        return NotImplemented
    position = positions[0]
    w = operands[position]
    n = w.stack
    inputs, output = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    letters = terms[position]
    if len(letters) != w.W0.ndim or "." in letters:
        return NotImplemented
    R = next(c for c in "zyxwvutsrqponmlkjihgfedcba" if c not in inputs)
    terms[position : position + 1] = [letters[: n + 1] + R, letters[:n] + R + letters[n + 1 :]]
    y = function(equation, *(o.W0 if o is w else o for o in operands))
    for P, Q, s, p, *_ in w.factors:
        parts: list[Tensor] = []
        for o in operands:
            parts += [P.to(y.dtype) * s, Q.to(y.dtype)] if o is w else [F.dropout(o, p, p > 0)]
        y = y + function(f"{','.join(terms)}->{output}", *parts)
    return y


CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the number of axes of the weight


@answers(*CONVOLUTIONS.values())
def _conv(function: Any, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
          dilation: Any = 1, groups: int = 1) -> Any:  # fmt: skip
    """Answer for W (out, in/groups, *kernel): all groups share Q (r, in/groups, *kernel), and each has its rows of
    P."""
    x, w = input, weight
    if not isinstance(w, LazyWeight) or w.stack:
        return NotImplemented
    y = function(x, w.W0, w.updated_bias(bias), stride, padding, dilation, groups)
    for P, Q, s, p, *_ in w.factors:
        Q = Q.to(x.dtype).repeat(groups, *[1] * (Q.ndim - 1))
        h = function(F.dropout(x, p, p > 0), Q, None, stride, padding, dilation, groups) * s
        y = y + function(h, P.to(h.dtype).reshape(*P.shape, *[1] * (Q.ndim - 2)), groups=groups)
    return y


@answers(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _conv_transpose(function: Any, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
                    output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Any:  # fmt: skip
    """Answer for W (in, out/groups, *kernel): x is multiplied with P (in, r) first, then with Q (r, out/groups,
    *kernel)."""
    x, w = input, weight
    if not isinstance(w, LazyWeight) or w.stack:
        return NotImplemented
    y = function(x, w.W0, bias, stride, padding, output_padding, groups, dilation)
    for P, Q, s, p, *_ in w.factors:
        rows, r = P.shape
        P = P.to(x.dtype).reshape(groups, rows // groups, r).mT.reshape(groups * r, rows // groups, *[1] * (Q.ndim - 2))
        h = CONVOLUTIONS[Q.ndim](F.dropout(x, p, p > 0), P, groups=groups) * s
        Q = Q.to(h.dtype).repeat(groups, *[1] * (Q.ndim - 1))
        y = y + function(h, Q, None, stride, padding, output_padding, groups, dilation)
    return y


@answers(F.embedding)
def _embedding(function: Any, input: Any, weight: Any, padding_idx: int | None = None, max_norm: Any = None, *rest: Any,
               **options: Any) -> Any:  # fmt: skip
    """Answer for W (tokens, width). Options for W0's gradient (scale_grad_by_freq, sparse) do not apply to the
    factors."""
    ids, w = input, weight
    if not isinstance(w, LazyWeight) or not w.is_matrix or max_norm is not None:
        return NotImplemented
    y = function(ids, w.W0, padding_idx, max_norm, *rest, **options)
    for P, Q, s, p, *_ in w.factors:
        h_R = function(ids, P, padding_idx) * s
        h_R = h_R * F.dropout(
            h_R.new_ones(*ids.shape, 1), p, p > 0
        )  # the input is one-hot, so whole tokens are dropped
        y = y + (h_R @ Q).to(y.dtype)
    return y


# The first lines of torch's function hand the call to `__torch_function__`. Without them, its body needs only functions
# that are answered above.
_MHA_BODY = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)  # fmt: skip


@answers(F.multi_head_attention_forward)
def _multi_head_attention(function: Any, *args: Any, **kwargs: Any) -> Any:
    return _MHA_BODY(*args, **kwargs)
