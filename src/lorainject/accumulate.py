"""y += s (x A^T) B^T: the low-rank term of a linear layer, accumulated into the output that the base has just made.

One product of width r, and one GEMM that adds (beta = 1), instead of a product of the output's size that is scaled, cast and added: nothing of
the output's size is allocated, and 4 M O elements less are moved.

    forward    h_RM = A_RI x_MI^T                y_MO += s h_RM^T B_OR^T
    backward   dh_RM = s B_OR^T dy_MO^T          dB_OR = s (h_RM dy_MO)^T          dx_MI += dh_RM^T A_RI      dA_RI = dh_RM x_MI

h has few rows rather than few columns: for products with eight columns a CPU's library takes two to four times as long as for those with eight rows.

Saved for the backward are x itself, which sibling projections share, h, A and B. With dropout the seed is saved, not the mask nor the dropped x.
y passes its gradient on as it is.

In training a frozen nn.Linear and the only adapter that is on are one step of the graph, so that the way back accumulates as well: dh^T A into the
base's own dx_MI = dy_MO W0_OI, of which autograd would make a third tensor of x's size. Projections that share x A^T (siblings.py) sum theirs anyway.

A and B, kept in float32, are cast down to y's dtype, which is small beside casting x up. A CPU without instructions for half precision computes
in float32 instead, some rows of x and y at a time, so that what is cast stays in the cache and hardly takes memory (bfloat16 costs it 18 times as
much).

torch.compile fuses, and function transforms (vmap, jvp), tracing and modes that watch operators need plain ones: they get the formula
as it stands (lowrank.project).

Legend: M tokens, I in, O out, R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, float32, is_grad_enabled, mv, nn  # by their own names: torch's dictionary has left the cache since the last token
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling
from torch.nn.functional import linear

from .lowrank import HOOKED, LowRank, Parts, add, project

FEW = 16  # tokens up to which a term of its own costs less than the calls that save it
FEW_HALF = 64  # the same in half precision, whose products with so few cost any CPU more than those in float32
CAST = 1 << 17  # elements that are cast at a time: their copies shall lie in the cache
LITTLE, SHARE = 1 << 13, 50  # and hardly take memory: of what is larger a fiftieth at most, or this many
SOME, LARGE, THIN = 16, 1 << 20, range(2, 9)  # tokens that are added to at a time, of how many elements on, and for which ranks
HALVES = (torch.bfloat16, torch.float16)


def accumulate(adapter: LowRank, y: Tensor, x: Tensor, own: bool, h_RM: Tensor | None = None) -> Tensor:
    """y + s (x A^T) B^T for x (..., in) and y (..., out), in y's dtype; in y's memory if it is our `own`, made just now and seen by nobody.
    `h_RM` is A x^T, where siblings have it already."""
    return add(adapter, y, project, x) if is_compiling() else accumulate_eagerly(adapter, y, x, own, h_RM)


def accumulate_eagerly(adapter: LowRank, y: Tensor, x: Tensor, own: bool, h_RM: Tensor | None = None) -> Tensor:
    """The same where torch.compile does not look on."""
    of = adapter.__dict__  # an attribute of a module takes longer
    parts, factors, s = of["parts"], of["_parameters"], of["scale"]
    if parts is None or is_watched(y):
        return add(adapter, y, project, x)
    B: Tensor = factors["B"]
    if h_RM is None:
        A: Tensor = factors["A"]
        p = of["dropout"] if of["training"] else 0.0
        bare = own and not (parts or p or is_grad_enabled())  # in inference, as it mostly is, the same as below in fewer calls
        if bare and y.numel() == of["out"] and A.dtype == B.dtype == float32 == computed_in(y, 1):  # one token: every line counts beside its products
            h_R = mv(A, x.reshape(-1).float())
            if y.dtype != float32 or not y.is_contiguous():  # a term that small may take memory
                return y.add_(mv(B, h_R), alpha=s)
            y.view(-1).addmv_(B, h_R, alpha=s)
            return y
        tokens = x.numel() // (x.shape[-1] or 1)
        dtype = computed_in(y, tokens)
        if bare:
            if tokens <= FEW_HALF and A.dtype == B.dtype == float32 == dtype and (tokens <= FEW or y.dtype in HALVES):
                return y.add_(linear(linear(x.float(), A), B), alpha=s)
            if x.dtype == y.dtype == dtype and y.is_contiguous():
                add_product(y.view(-1, y.shape[-1]), torch.mm(A.to(dtype), x.reshape(-1, x.shape[-1]).t()), B.to(dtype), s)
                return y
        h_RM = lowered(x.reshape(-1, x.shape[-1]), A.to(dtype), p)
    if B.dtype != h_RM.dtype:
        B = B.to(h_RM.dtype)
    grad = is_grad_enabled() and (h_RM.requires_grad or y.requires_grad or B.requires_grad)
    own = own and y.is_contiguous() and not (grad and y._is_view())  # autograd would copy the gradient of a view that is written to
    return Accumulate.apply(y, h_RM, B, s, parts, own) if grad else accumulated(y, h_RM, B, s, parts, own)


def lowered(x_MI: Tensor, A: Tensor, p: float = 0.0) -> Tensor:
    """A (m * x)^T in A's dtype, for autograd, and no view; m is dropout's mask."""
    if not is_grad_enabled():
        return projected(x_MI, A, p, _seed() if p else 0)
    return Project.apply(x_MI, A, p, _seed() if p else 0) if p or x_MI.dtype != A.dtype else torch.mm(A, x_MI.t())


def together(adapter: LowRank, x: Tensor, W0: Tensor, bias: Tensor | None) -> Tensor:
    """x W0^T + bias + s (x A^T) B^T, where the adapter `joins`."""
    p, factors = _dropout(adapter), adapter._parameters
    return Together.apply(x, factors["A"], factors["B"], W0, bias, adapter.scale, p, _seed() if p else 0, adapter.parts)


def joins(adapter: LowRank, x: Tensor, layer: nn.Module) -> bool:
    """Whether its term may be taken together with the linear layer's product: that is frozen, and nobody must see either by itself. (For an A that
    does not train x need not be saved, which `Together` does.)"""
    for p in layer._parameters.values():
        if p is not None and (p.requires_grad or type(p) is not nn.Parameter):
            return False
    A: Tensor = adapter._parameters["A"]  # type: ignore[assignment]
    return A.requires_grad and is_plain(adapter, x.device) and not is_watched(x) and not torch.is_autocast_enabled(x.device.type)


def _dropout(adapter: LowRank) -> float:
    return adapter.__dict__["dropout"] if adapter.__dict__["training"] else 0.0


def _seed() -> int:
    return int(torch.empty((), dtype=torch.int64).random_())


def is_watched(y: Tensor) -> bool:
    """Whether somebody but torch.compile must see plain operators, or y is not memory that can be written to."""
    return (_is_tracing() or _are_functorch_transforms_active() or _len_torch_dispatch_stack() > 0
            or forward_ad._current_level >= 0 or type(y) is not Tensor)  # fmt: skip


def computed_in(y: Tensor, tokens: int) -> torch.dtype:
    """The dtype of the products."""
    if y.dtype in HALVES and y.is_cpu and (tokens <= FEW_HALF or not _has_instructions(y.dtype)):
        return float32
    return y.dtype


@functools.cache
def _has_instructions(half: torch.dtype) -> bool:
    """Whether this CPU multiplies in half precision."""
    asked = torch.ops.mkldnn._is_mkldnn_bf16_supported if half == torch.bfloat16 else torch.ops.mkldnn._is_mkldnn_fp16_supported
    return bool(asked())


def accumulated(y: Tensor, h_RM: Tensor, B: Tensor, s: float, parts: Parts, own: bool) -> Tensor:
    """The same without autograd, from h = A x^T."""
    same = y.dtype == B.dtype
    if same and not parts:  # as it mostly is: every line counts beside products of few tokens
        if not own:
            return torch.addmm(y.reshape(-1, y.shape[-1]), h_RM.t(), B.t(), alpha=s).view(y.shape)
        add_product(y.view(-1, y.shape[-1]), h_RM, B, s)
        return y
    out = y if own else y.clone(memory_format=torch.contiguous_format)
    for out_MO, B_OR in _pairs(out.view(-1, out.shape[-1]), B, parts):
        (add_product if same else _add_cast)(out_MO, h_RM, B_OR, s)
    return out


def add_product(y_MO: Tensor, h_RM: Tensor, B_OR: Tensor, s: float) -> None:
    """y += s h^T B^T.

    Where y is larger than a core's cache, a CPU's library adds with few ranks in 0.45 to 0.95 of the time if it is given some rows at a time; where
    it is smaller, or for one rank, or for many, it takes as long or longer so.
    """
    (tokens, out), r = y_MO.shape, B_OR.shape[1]
    many, rest = tokens // SOME, tokens % SOME
    if y_MO.numel() < LARGE or r not in THIN or not many or y_MO.dtype != float32 or not y_MO.is_cpu or is_grad_enabled():
        y_MO.t().addmm_(B_OR, h_RM, alpha=s)
        return
    y, h = (t.narrow(0, 0, tokens - rest).view(many, SOME, t.shape[1]) for t in (y_MO, h_RM.t()))
    y.baddbmm_(h, B_OR.t().expand(many, r, out), alpha=s)
    if rest:
        add_product(y_MO.narrow(0, tokens - rest, rest), h_RM.narrow(1, tokens - rest, rest), B_OR, s)


def _add_cast(y_MO: Tensor, h_RM: Tensor, B_OR: Tensor, s: float) -> None:
    """The same for y of another dtype, in the wider of the two: some rows of y are cast, added to and rounded once."""
    wide = torch.promote_types(y_MO.dtype, B_OR.dtype)
    n, B_RO = _at_a_time(y_MO, SHARE), B_OR.to(wide).t()
    for i, h in enumerate(h_RM.to(wide).split(n, 1)):
        rows = y_MO.narrow(0, i * n, h.shape[1])
        rows.copy_(rows.to(wide).addmm_(h.t(), B_RO, alpha=s))


def _pairs(y_MO: Tensor, B: Tensor, parts: Parts) -> list[tuple[Tensor, Tensor]]:
    """The columns of y, and their rows of B."""
    return [(y_MO[:, columns], B[rows]) for columns, rows in parts] if parts else [(y_MO, B)]


def _at_a_time(matrix: Tensor, share: int = 1) -> int:
    """As many rows as are cast at a time, of many no more than 1/share."""
    elements = matrix.numel()
    if not matrix.is_cpu or elements <= CAST:
        return max(1, len(matrix))
    return max(1, min(CAST, max(LITTLE, elements // share)) // matrix.shape[1])


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
        dh = _to_h(dy_MO, B, ctx.s, ctx.parts) if wants_h else None
        dB = _to_B(dy_MO, h_RM, ctx.s, ctx.parts) if wants_B else None
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
        dx = dh_RM.new_zeros(x_MI.shape, dtype=x_MI.dtype) if wants_x else None  # of dh: there may be many at once (is_grads_batched)
        return dx, _to_x_and_A(dx, dh_RM, x_MI, A, ctx.p, ctx.seed, wants_A), None, None


class Together(Function):
    """x W0^T + bias + s (m * x) A^T B^T for a frozen linear layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, W0: Tensor, bias: Tensor | None, s: float, p: float, seed: int, parts: Parts) -> Tensor:
        x_MI = x.reshape(-1, x.shape[-1])
        dtype = computed_in(x, x_MI.shape[0])
        y, h_RM = linear(x, W0, bias), projected(x_MI, A.to(dtype), p, seed)
        ctx.save_for_backward(x, h_RM, A, B, W0 if ctx.needs_input_grad[0] else None)
        ctx.how = s, p, seed, parts
        y = y.detach() if y._is_view() else y  # what is returned can't be written to afterwards, if it is a view
        return accumulated(y, h_RM, B.to(dtype), s, parts, own=y.is_contiguous())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """dx = dy W0 + m * (dh^T A), dA = dh (m * x) and dB = s (h dy)^T, with dh = s B^T dy^T: each as far as it is wanted."""
        (x, h_RM, A, B, W0), (s, p, seed, parts) = ctx.saved_tensors, ctx.how
        wants_x, wants_A, wants_B, *_ = ctx.needs_input_grad
        x_MI, dy_MO, A_RI = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), A.to(h_RM.dtype)
        if is_grad_enabled():  # what is computed here will be differentiated, and h with it
            h_RM = Project.apply(x_MI, A_RI, p, seed)
        dx = dy @ W0 if wants_x else None  # of x's shape at once: autograd copies a view before it adds another layer's to it
        dA = _to_x_and_A(dx if dx is None else dx.view(x_MI.shape), _to_h(dy_MO, B.to(h_RM.dtype), s, parts), x_MI, A_RI, p, seed, wants_A)
        dB = _to_B(dy_MO, h_RM, s, parts) if wants_B else None
        return dx, dA if dA is None else dA.to(A.dtype), dB if dB is None else dB.to(B.dtype), None, None, None, None, None, None


def projected(x_MI: Tensor, A: Tensor, p: float = 0.0, seed: int = 0) -> Tensor:
    """A (m * x)^T in A's dtype."""
    if p:
        return torch.cat([thin(A, x) for x, _ in _dropped(x_MI, A.dtype, p, seed)], 1)
    if x_MI.dtype == A.dtype:
        return thin(A, x_MI)
    return torch.cat([thin(A, x.to(A.dtype)) for x in x_MI.split(_at_a_time(x_MI, SHARE))], 1)


def thin(A: Tensor, x_MI: Tensor) -> Tensor:
    """A x^T (R, M); of few tokens by way of x A^T, which is as fast or faster then."""
    return torch.mm(A, x_MI.t()) if x_MI.shape[0] >= FEW else linear(x_MI, A).t()


def _dropped(x_MI: Tensor, dtype: torch.dtype, p: float, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """m * x in this dtype, and m, some rows at a time."""
    generator = torch.Generator(x_MI.device).manual_seed(seed)
    for x in x_MI.split(_at_a_time(x_MI)):
        mask = torch.empty_like(x, dtype=dtype).bernoulli_(1 - p, generator=generator).div_(1 - p)
        yield x.to(dtype) * mask, mask


def _to_h(dy_MO: Tensor, B: Tensor, s: float, parts: Parts) -> Tensor:
    """s B^T dy^T."""
    return functools.reduce(torch.add, (projected(dy, B_OR.t()) for dy, B_OR in _pairs(dy_MO, B, parts))) * s


def _to_B(dy_MO: Tensor, h_RM: Tensor, s: float, parts: Parts) -> Tensor:
    """s (h dy)^T."""
    found = torch.cat([_gathered(h_RM, dy_MO[:, columns]) for columns, _ in parts], 1) if parts else _gathered(h_RM, dy_MO)
    return found.t() * s


def _to_x_and_A(dx: Tensor | None, dh_RM: Tensor, x_MI: Tensor, A: Tensor, p: float, seed: int, wants_A: bool) -> Tensor | None:
    """dh (m * x); m * (dh^T A) is added into dx."""
    if not p:
        if dx is not None:
            accumulated(dx, dh_RM, A.t(), 1.0, (), own=True)
        return _gathered(dh_RM, x_MI) if wants_A else None
    dA, n = None, _at_a_time(x_MI)
    for i, (x, mask) in enumerate(_dropped(x_MI, A.dtype, p, seed)):
        dh = dh_RM.narrow(1, i * n, len(x))
        if dx is not None:
            dx.narrow(0, i * n, len(x)).add_((dh.t() @ A) * mask)
        if wants_A:
            dA = dh @ x if dA is None else dA + dh @ x
    return dA


def _gathered(h_RM: Tensor, dy_MO: Tensor) -> Tensor:
    """h dy (R, O), in h's dtype."""
    if dy_MO.dtype == h_RM.dtype:
        return h_RM @ dy_MO
    n = _at_a_time(dy_MO, SHARE)
    (h, dy), *more = zip(h_RM.split(n, 1), dy_MO.split(n), strict=True)
    total = h @ dy.to(h.dtype)
    for h, dy in more:
        total.addmm_(h, dy.to(h.dtype))
    return total


def is_plain(adapter: LowRank, device: torch.device) -> bool:
    """Whether A and B may be used before the layer is called: nothing brings, gathers or exchanges them then, and the outputs are in runs."""
    A: Tensor | None = adapter._parameters.get("A")
    return (type(adapter) is LowRank and type(A) is nn.Parameter and A.shape[:-1] == (adapter.r,) and A.device == device
            and HOOKED not in adapter.__dict__ and "forward" not in adapter.__dict__ and adapter.parts is not None)  # fmt: skip


def is_shareable(adapter: LowRank, device: torch.device) -> bool:
    """Whether A and B may be used together with others': nothing is dropped."""
    return is_plain(adapter, device) and not _dropout(adapter)
