"""y += s (x A^T) B^T: the low-rank term of a linear layer, accumulated into its output.

One product of width r, and one GEMM that adds (beta = 1), instead of a product of the output's size that is scaled, cast and added: nothing of
the output's size is allocated, and 4 M O elements less are moved. Where both products are ours to make, a CPU adds the large one
to the small one instead, in full precision. (The products themselves, and those of the gradients, are in term.py.)

Saved for the backward are x itself, which sibling projections share, h, A and B. With dropout the seed is saved, not the mask nor the dropped x.
y passes its gradient on as it is.

In training a frozen nn.Linear and the only adapter that is on are one step of the graph, so that the way back accumulates as well: dh^T A and
the base's own dx_MI = dy_MO W0_OI, of which autograd would make a third tensor of x's size. Projections that share x A^T (siblings.py) sum theirs
anyway.

torch.compile fuses, and function transforms (vmap, jvp), tracing and modes that watch operators need plain ones: they get the formula
as it stands (lowrank.project).

Legend: M tokens, I in, O out, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import (
    Tensor,
    float32,
    is_grad_enabled,
    mv,
    nn,
)  # by their own names: torch's dictionary has left the cache since the last token
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling
from torch.nn.functional import linear

from ..adapter import LoraAdapter, Parts, add_term, lora_term
from ..hooks import HOOKED
from .gemm import FEW, FEW_HALF, HALVES, accumulated, applied, computed_in, projected, to_B, to_h, to_x_and_A


def accumulate(adapter: LoraAdapter, y: Tensor, x: Tensor, own: bool, h_RM: Tensor | None = None) -> Tensor:
    """y + s (x A^T) B^T for x (..., in) and y (..., out), in y's dtype; in y's memory if it is our `own`, made just now and seen by nobody.
    `h_RM` is A x^T, where siblings have it already."""
    return add_term(adapter, y, lora_term, x) if is_compiling() else accumulate_eagerly(adapter, y, x, own, h_RM)


def accumulate_eagerly(adapter: LoraAdapter, y: Tensor, x: Tensor, own: bool, h_RM: Tensor | None = None) -> Tensor:
    """The same where torch.compile does not look on."""
    of = adapter.__dict__  # an attribute of a module takes longer
    parts, factors, s = of["parts"], of["_parameters"], of["scale"]
    if parts is None or is_watched(y):
        return add_term(adapter, y, lora_term, x)
    B: Tensor = factors["B"]
    if h_RM is None:
        A: Tensor = factors["A"]
        p = of["dropout"] if of["training"] else 0.0
        bare = own and not (
            parts or p or is_grad_enabled()
        )  # in inference, as it mostly is, the same as below in fewer calls
        if (
            bare and y.numel() == of["out"] and A.dtype == B.dtype == float32 == computed_in(y, 1)
        ):  # one token: every line counts beside its products
            h_R = mv(A, x.reshape(-1).float())
            if y.dtype != float32 or not y.is_contiguous():  # a term that small may take memory
                return y.add_(mv(B, h_R), alpha=s)
            y.view(-1).addmv_(B, h_R, alpha=s)
            return y
        tokens = x.numel() // (x.shape[-1] or 1)
        dtype = computed_in(y, tokens)
        if bare and tokens <= (FEW_HALF if y.dtype in HALVES else FEW) and A.dtype == B.dtype == float32 == dtype:
            return y.add_(linear(linear(x.float(), A), B), alpha=s)
        h_RM = lowered(x.reshape(-1, x.shape[-1]), A.to(dtype), p)
    if B.dtype != h_RM.dtype:
        B = B.to(h_RM.dtype)
    grad = is_grad_enabled() and (h_RM.requires_grad or y.requires_grad or B.requires_grad)
    own = (
        own and y.is_contiguous() and not (grad and y._is_view())
    )  # autograd would copy the gradient of a view that is written to
    return Accumulate.apply(y, h_RM, B, s, parts, own) if grad else accumulated(y, h_RM, B, s, parts, own)


def lowered(x_MI: Tensor, A: Tensor, p: float = 0.0) -> Tensor:
    """A (m * x)^T in A's dtype, for autograd, and no view; m is dropout's mask."""
    if not is_grad_enabled():
        return projected(x_MI, A, p, _seed() if p else 0)
    return Project.apply(x_MI, A, p, _seed() if p else 0) if p or x_MI.dtype != A.dtype else torch.mm(A, x_MI.t())


def in_inference(adapter: LoraAdapter, x: Tensor, W0: Tensor, bias: Tensor | None) -> Tensor:
    """x W0^T + bias + s (x A^T) B^T of many tokens in inference, of a linear layer of torch's own with this adapter alone."""
    if (
        adapter.parts is not None
        and _takes(W0, x)
        and not (_dropout(adapter) or is_watched(x) or torch.is_autocast_enabled(x.device.type))
    ):
        factors, dtype = adapter.__dict__["_parameters"], computed_in(x, x.numel() // x.shape[-1])
        if dtype == x.dtype:
            h_RM = projected(x.reshape(-1, x.shape[-1]), factors["A"].to(dtype))
            return applied(x, W0, bias, h_RM, factors["B"].to(dtype), adapter.scale, adapter.parts)
    return accumulate_eagerly(adapter, linear(x, W0, bias), x, True)


def together(adapter: LoraAdapter, x: Tensor, W0: Tensor, bias: Tensor | None) -> Tensor:
    """x W0^T + bias + s (x A^T) B^T, where the adapter `joins`."""
    p, factors = _dropout(adapter), adapter._parameters
    return Together.apply(x, factors["A"], factors["B"], W0, bias, adapter.scale, p, _seed() if p else 0, adapter.parts)


def joins(adapter: LoraAdapter, x: Tensor, layer: nn.Module) -> bool:
    """Whether its term may be taken together with the linear layer's product: that is frozen, and nobody must see either by itself. (For an A that
    does not train x need not be saved, which `Together` does.)"""
    for p in layer._parameters.values():
        if p is not None and (p.requires_grad or type(p) is not nn.Parameter):
            return False
    A, W0 = adapter.__dict__["_parameters"]["A"], layer.__dict__["_parameters"]["weight"]
    if not (A.requires_grad and _takes(W0, x) and is_plain(adapter, x.device)):
        return False
    return not is_watched(x) and not torch.is_autocast_enabled(x.device.type)


def _takes(W0: Tensor, x: Tensor) -> bool:
    """Whether the layer does: another input is its own to refuse."""
    return x.dtype == W0.dtype and x.ndim > 0 and x.shape[-1] == W0.shape[-1]


def _dropout(adapter: LoraAdapter) -> float:
    return adapter.__dict__["dropout"] if adapter.__dict__["training"] else 0.0


def _seed() -> int:
    return int(torch.empty((), dtype=torch.int64).random_())


def is_watched(y: Tensor) -> bool:
    """Whether somebody but torch.compile must see plain operators, or y is not memory that can be written to."""
    return (_is_tracing() or _are_functorch_transforms_active() or _len_torch_dispatch_stack() > 0
            or forward_ad._current_level >= 0 or type(y) is not Tensor)  # fmt: skip


class Accumulate(Function):
    """y + s h^T B^T."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h_RM: Tensor, B: Tensor, s: float, parts: Parts, own: bool) -> Tensor:
        if own:
            ctx.mark_dirty(y)
        ctx.save_for_backward(h_RM, B)
        ctx.s, ctx.parts = s, parts
        return accumulated(y, h_RM, B, s, parts, own)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # in differentiable operators, so that it can be differentiated again
        _, wants_h, wants_B, *_ = ctx.needs_input_grad
        (h_RM, B), dy_MO = ctx.saved_tensors, dy.reshape(-1, dy.shape[-1])
        dh = to_h(dy_MO, B, ctx.s, ctx.parts) if wants_h else None
        dB = to_B(dy_MO, h_RM, ctx.s, ctx.parts) if wants_B else None
        return dy, dh, dB, None, None, None


class Project(Function):
    """A (m * x)^T in A's dtype, with dropout's mask m of zeros and 1 / (1 - p), which is drawn anew from its seed when the backward needs it."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, A: Tensor, p: float, seed: int) -> Tensor:
        ctx.save_for_backward(x_MI, A)
        ctx.p, ctx.seed = p, seed
        return projected(x_MI, A, p, seed)

    @staticmethod
    def backward(ctx: Any, dh_RM: Tensor) -> Any:
        x_MI, A = ctx.saved_tensors
        wants_x, wants_A, *_ = ctx.needs_input_grad
        dx = (
            dh_RM.new_zeros(x_MI.shape, dtype=x_MI.dtype) if wants_x else None
        )  # of dh: there may be many at once (is_grads_batched)
        return dx, to_x_and_A(dx, dh_RM, x_MI, A, ctx.p, ctx.seed, wants_A), None, None


class Together(Function):
    """x W0^T + bias + s (m * x) A^T B^T for a frozen linear layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        W0: Tensor,
        bias: Tensor | None,
        s: float,
        p: float,
        seed: int,
        parts: Parts,
    ) -> Tensor:
        x_MI = x.reshape(-1, x.shape[-1])
        dtype = computed_in(x, x_MI.shape[0])
        h_RM = projected(x_MI, A.to(dtype), p, seed)
        ctx.save_for_backward(x, h_RM, A, B, W0 if ctx.needs_input_grad[0] else None)
        ctx.how = s, p, seed, parts
        return applied(x, W0, bias, h_RM, B.to(dtype), s, parts)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """dx = dy W0 + m * (dh^T A), dA = dh (m * x) and dB = s (h dy)^T, with dh = s B^T dy^T: each as far as it is wanted."""
        (x, h_RM, A, B, W0), (s, p, seed, parts) = ctx.saved_tensors, ctx.how
        wants_x, wants_A, wants_B, *_ = ctx.needs_input_grad
        x_MI, dy_MO, A_RI = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), A.to(h_RM.dtype)
        if is_grad_enabled():  # what is computed here will be differentiated, and h with it
            h_RM = Project.apply(x_MI, A_RI, p, seed)
        dh = to_h(dy_MO, B.to(h_RM.dtype), s, parts)
        if p and wants_x:
            dx = dy @ W0
            dA = to_x_and_A(dx.view(x_MI.shape), dh, x_MI, A_RI, p, seed, wants_A)
        else:
            dx = applied(dy, W0.t(), None, dh, A_RI.t(), 1.0) if wants_x else None
            dA = to_x_and_A(None, dh, x_MI, A_RI, p, seed, wants_A)
        dB = to_B(dy_MO, h_RM, s, parts) if wants_B else None
        return (
            dx,
            dA if dA is None else dA.to(A.dtype),
            dB if dB is None else dB.to(B.dtype),
            None,
            None,
            None,
            None,
            None,
            None,
        )


def is_plain(adapter: LoraAdapter, device: torch.device) -> bool:
    """Whether A and B may be used before the layer is called: nothing brings, gathers or exchanges them then, and the outputs are in runs."""
    A: Tensor | None = adapter._parameters.get("A")
    return (type(adapter) is LoraAdapter and type(A) is nn.Parameter and A.shape[:-1] == (adapter.r,) and A.device == device
            and HOOKED not in adapter.__dict__ and "forward" not in adapter.__dict__ and adapter.parts is not None)  # fmt: skip


def is_shareable(adapter: LoraAdapter, device: torch.device) -> bool:
    """Whether A and B may be used together with others': nothing is dropped."""
    return is_plain(adapter, device) and not _dropout(adapter)
