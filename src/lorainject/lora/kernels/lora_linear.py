"""A linear layer with its low-rank term: added in place in inference, and one node of the graph in training.

    y = x W0^T + bias + s (m * x) A^T B^T        m: dropout's mask, 1 in inference

**Inference.** `add_linear_term` adds the term into the output of the base layer. The formula of adapter.py would
allocate the term, which is as large as y, and write the sum to a third tensor; the peak memory of the row `forward`
would be 3 times the base's, instead of 1.00 in float32 and 1.05 in bfloat16. Up to FEW_TOKENS tokens the term is
allocated all the same: for one token the three calls take 37 instead of 56 us in float32 and 66 instead of 85 in
bfloat16 (d 512, r 8, Zen 3).

**Training.** `FusedLinear` is the step of a frozen nn.Linear with a single adapter. Its backward adds dh A into the
base's own dx = dy W0, where autograd would hold both and their sum. It saves x, h (rank wide), A and B, and of dropout
the seed, not the mask and the dropped x. That keeps the row `train` at 1.03 times the peak memory of a frozen layer
(the must is 1.05), and takes 0.7 of the overhead of the formula at r 8 and 64 (float32, Zen 3).

Everything else gets the formula of adapter.py: several adapters, a trained base, autocast and hooks in training;
torch.compile, which fuses by itself; and function transforms (vmap, jvp), tracing and dispatch modes, which need plain
operators.

Suffixes name axes: M tokens, I input features, O output features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, float32, float64, nn
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling
from torch.nn.functional import linear
from torch.nn.modules.module import _has_any_global_hook

from ...numerics.delta import Strength
from ..adapter import LoraAdapter, Parts, add_term, lora_term
from .gemm import FEW_TOKENS, add_up_projection, compute_dtype, down_project, grad_B, grad_h, grad_x_and_A


def add_linear_term(adapter: LoraAdapter, y: Tensor, x: Tensor, y_is_ours: bool, strength: Strength = None) -> Tensor:
    """Return y + t s (x A^T) B^T in the dtype of y, for x of shape (..., in) and y of shape (..., out).

    The term is added in place if `y_is_ours`: y was allocated just now, and no one else holds it.
    """
    if is_compiling() or not is_plain_inference(adapter, y):
        return add_term(adapter, y, lora_term, x.to(torch.promote_types(x.dtype, y.dtype)), strength)
    assert not isinstance(strength, Tensor)
    s = adapter.scale if strength is None else adapter.scale * strength
    return add_in_place(adapter, y if y_is_ours else y.clone(memory_format=torch.contiguous_format), x, s)


def is_plain_inference(adapter: LoraAdapter, tensor: Tensor) -> bool:
    """True if `add_in_place` may add the term of, or to, this tensor. Must not be called while torch.compile traces."""
    A = adapter._parameters["A"]
    return not (
        torch.is_grad_enabled()
        or active_dropout(adapter)
        or adapter.parts is None
        or A is None
        or A.device != tensor.device
        or needs_plain_operators(tensor)
    )


def add_in_place(adapter: LoraAdapter, y: Tensor, x: Tensor, s: float) -> Tensor:
    """Add s (x A^T) B^T to y in place, and return y; or a copy, if y is not contiguous."""
    A, B = adapter._parameters["A"], adapter._parameters["B"]  # adapter.A takes longer
    assert A is not None
    assert B is not None
    tokens = x.numel() // x.shape[-1]
    if tokens <= FEW_TOKENS and A.dtype == B.dtype == float32 and y.dtype != float64 and not adapter.parts:
        return y.add_(linear(linear(x.float(), A), B), alpha=s)
    if not y.is_contiguous():
        y = y.clone(memory_format=torch.contiguous_format)
    dtype = compute_dtype(y, tokens)
    h_RM = down_project(x.reshape(-1, x.shape[-1]), A.to(dtype))
    add_up_projection(y.view(-1, y.shape[-1]), h_RM, B.to(dtype), s, adapter.parts or ())
    return y


def needs_plain_operators(x: Tensor) -> bool:
    """True if x must go through the formula: it is not a plain tensor, or something rewrites or records operators."""
    return (
        type(x) is not Tensor
        or _is_tracing()
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled(x.device.type)
    )


def has_plain_factors(adapter: LoraAdapter, device: torch.device) -> bool:
    """True if A and B may be used without calling the adapter: no hook or subclass supplies them, and they are whole.

    FSDP leaves empty shards in their place outside of a call, and accelerate leaves them on another device.
    """
    A = adapter._parameters["A"]
    return (
        type(adapter) is LoraAdapter
        and not is_hooked(adapter)
        and type(A) is nn.Parameter
        and A.shape[:-1] == (adapter.r,)
        and A.device == device
        and adapter.parts is not None
    )


def is_hooked(*modules: nn.Module) -> bool:
    """True if a call of one of the modules would run a hook, or a forward that was stored on the instance."""
    for module in modules:
        d = module.__dict__
        if d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"]:
            return True
        if "forward" in d:
            return True
    return bool(_has_any_global_hook())


def active_dropout(adapter: LoraAdapter) -> float:
    """Return the dropout probability of a forward now: 0 in evaluation mode."""
    return adapter.dropout if adapter.training else 0.0


def can_fuse(adapter: LoraAdapter, x: Tensor, layer: nn.Module) -> bool:
    """True if the base and the low-rank products may share one node of the graph.

    The layer is frozen, no one may see either product alone, and A trains (for another A, x need not be saved).
    """
    parameters = [p for p in layer._parameters.values() if p is not None]
    if any(p.requires_grad or type(p) is not nn.Parameter for p in parameters) or needs_plain_operators(x):
        return False
    W0 = parameters[0]
    takes_x = x.dtype == W0.dtype and x.ndim > 0 and x.shape[-1] == W0.shape[-1]  # else the layer itself complains
    return takes_x and adapter.A.requires_grad and has_plain_factors(adapter, x.device)


class FusedLinear(Function):
    """y = x W0^T + bias + s (m * x) A^T B^T for a frozen linear layer. Only x, A and B get gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        W0: Tensor,
        bias: Tensor | None,
        s: float,
        dropout: float,
        seed: int,
        parts: Parts,
    ) -> Tensor:
        x_MI = x.reshape(-1, x.shape[-1])
        dtype = compute_dtype(x, len(x_MI))
        h_RM = down_project(x_MI, A.to(dtype), dropout, seed)
        y = linear(x, W0, bias)
        if y._is_view():  # as torch returns it with a bias; no one could write to a view afterwards
            y = y.detach()
        add_up_projection(y.view(-1, y.shape[-1]), h_RM, B.to(dtype), s, parts)
        # An alias keeps the memory of W0 where hooks give the parameter other data afterwards (diffusers' casts).
        ctx.save_for_backward(x, h_RM, A, B, W0.detach() if ctx.needs_input_grad[0] else None)
        ctx.settings = s, dropout, seed, parts
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x, h_RM, A, B, W0), (s, dropout, seed, parts) = ctx.saved_tensors, ctx.settings
        needs_x, needs_A, needs_B, *_ = ctx.needs_input_grad
        x_MI, dy_MO, A_RI = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), A.to(h_RM.dtype)
        if torch.is_grad_enabled():  # this backward will be differentiated, so h must be a function of x and A
            h_RM = down_project(x_MI, A_RI, dropout, seed)
        dh_RM = grad_h(dy_MO, B.to(h_RM.dtype), s, parts)
        dx = dy @ W0 if needs_x else None  # no view of it is returned: autograd sums the dx of several layers in place
        dx_MI = None if dx is None else dx.view(x_MI.shape)
        dA = grad_x_and_A(dx_MI, dh_RM, x_MI, A_RI, dropout, seed, needs_A)
        dB = grad_B(dy_MO, h_RM, s, parts) if needs_B else None
        return (dx, None if dA is None else dA.to(A.dtype), None if dB is None else dB.to(B.dtype), *[None] * 6)


def fused_linear(adapter: LoraAdapter, x: Tensor, W0: Tensor, bias: Tensor | None, s: float) -> Tensor:
    """Return the output of a linear layer with an adapter that `can_fuse`, whose delta is s B A."""
    dropout = active_dropout(adapter)
    seed = int(torch.empty((), dtype=torch.int64).random_()) if dropout else 0
    return FusedLinear.apply(x, adapter.A, adapter.B, W0, bias, s, dropout, seed, adapter.parts)
