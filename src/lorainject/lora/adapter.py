"""One LoRA adapter on one weight: the factors A and B, and the scale s.

    y = x W0^T + s (x A^T) B^T        A: (r, in_features)    B: (out_features, r)    W0: (out_features, in_features)

    s = alpha / r    or, rank-stabilized,    s = alpha / sqrt(r)

A stack of experts has one A and one B per expert: A (experts, r, in), B (experts, out, r). An adapter on a slice of a
fused weight has a B with the rows of the slice alone.

A and B are kept in float32 by default and cast to the dtype of the activations where they are used: they are small, and
the optimizer needs the precision. This module holds the plain formula; `kernels/` computes the same faster.

Sources: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3. The scale
alpha / sqrt(r) is from Kalajdzievski 2023, arXiv 2312.03732.

Suffixes name axes: R rank, I input features, O output features.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import StateError
from ..numerics.delta import Factors, Strength, scale, scaled
from ..spec import Init
from .guards import LostGradient, RequireWritten, remove_requirement, require_usable
from .initial_values import as_matrices, initialize, starts_at_zero
from .weight_kinds import Kind

Term = Callable[["LoraAdapter", Tensor, Tensor, bool, Strength], Tensor]
"""(adapter, y, x, y_is_ours, strength) -> y plus the low-rank term of x times the strength. The term may be added in
place if `y_is_ours`."""
Parts = tuple[tuple[slice, slice], ...]
"""The contiguous runs of a slice: a run of the layer's outputs, and the rows of B that belong to it. Empty for a whole
weight."""


class LoraAdapter(nn.Module):
    """The factors A and B of one adapter on one weight.

    Args:
        A: Shape (*stack, r, in_features). Trainable.
        B: Shape (*stack, out_features, r). Trainable. Zero at the start, so that the layer's output does not change.
        alpha: Numerator of the scale.
        scaling: "standard" for alpha / r, or "rslora" for alpha / sqrt(r).
        dropout: Probability of dropping an element of the adapter's input in training mode.
        init: How `reset_parameters` draws A and B, as in LoraSpec.
        padding_idx: Of an embedding, the token whose vector is not adapted.
        slices: The rows of the fused weight that B stands for. None for a whole weight.
        out: Number of output features of the whole weight. None if B has all of them.

    The scale is a 0-d buffer, not a Python float, because torch.compile recompiles whenever a float changes. It follows
    from alpha, r and scaling, so that neither `.to(bfloat16)` nor `.to_empty()` can change it: it is float64 beside a
    float64 A, and float32 otherwise. So does the buffer `rows` follow from `slices`. A state dict holds the scale, and
    does not load into an adapter with another one: A and B alone would mean another update there.

    A and B are used by calling the module with a function, `adapter(function, *args)`, which returns function(adapter,
    *args). A call runs the hooks that move weights to the right device (accelerate) or gather them (FSDP), for A and B
    as well.
    """

    def __init__(self, A: Tensor, B: Tensor, *, alpha: float, scaling: str, dropout: float, init: Init,
                 padding_idx: int | None = None, slices: tuple[range, ...] | None = None,
                 out: int | None = None) -> None:  # fmt: skip
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.r, self.alpha, self.scaling = A.shape[-2], alpha, scaling
        self.dropout, self.init, self.padding_idx = dropout, init, padding_idx
        self.out = B.shape[-2] if out is None else out
        self.slices, self.parts = slices, _runs(slices or ())
        self.register_buffer("s", None)
        self.register_buffer("rows", None, persistent=False)
        self._rebuild()

    r: int
    alpha: float
    scaling: str
    dropout: float
    init: Init
    padding_idx: int | None
    out: int
    """Number of output features of the whole weight."""
    slices: tuple[range, ...] | None
    s: Tensor
    """The scale as a 0-d buffer."""
    scale: float
    """The scale as a Python float."""
    rows: Tensor | None
    """Outputs of the whole weight, int64, that the rows of B stand for. None for a whole weight."""
    parts: Parts | None
    """`rows` as contiguous runs. None if the slice has a step (interleaved layouts)."""

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return function(self, *args)."""
        require_usable(self, self.site, args)
        return function(self, *args)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to set what the scale depends on: the buffers, and a compiled or merged model, hold the scale too."""
        if name in ("alpha", "scale", "scaling", "r") and name in vars(self):
            raise StateError(
                f"{name} of an adapter cannot be set",
                way_out="call rescale(model, name, alpha=...) or rescale(model, name, scale=...)",
            )
        super().__setattr__(name, value)

    site: str = ""
    """The name of the site in the model."""
    keeps_dtype: bool = False
    """True once the factors were to be cast to float8: from then on they keep their dtype, whatever the layer is cast
    to. diffusers' layerwise casting casts each layer to float8 and back in every forward."""

    @property
    def is_undrawn(self) -> bool:
        """True if A and B hold whatever was in memory, after `to_empty`."""
        hooks = self._forward_pre_hooks.values()
        return any(isinstance(hook, RequireWritten) and not hook.is_met(self) for hook in hooks)

    frozen: tuple[str, ...] = ()
    """The parameters that `set_trainable(False)` froze."""

    def set_trainable(self, trainable: bool) -> None:
        """Freeze the parameters that require a gradient, or let those that were frozen by this method require one
        again."""
        frozen = [] if trainable else [*self.frozen]
        for name, p in self._parameters.items():
            if p is not None and trainable and name in self.frozen:
                p.requires_grad_(True)
            elif p is not None and not trainable and p.requires_grad:
                if not any(type(hook) is LostGradient for hook in (p._backward_hooks or {}).values()):
                    p.register_hook(LostGradient(self, name))
                p.requires_grad_(False)
                frozen.append(name)
        vars(self)["frozen"] = tuple(frozen)  # nn.Module's own way to set an attribute takes 2 us

    @torch.no_grad()
    def reset_parameters(self, weight: Tensor, kind: Kind) -> None:
        """Give A and B, and whatever else trains, the values with which training begins.

        Args:
            weight: The base weight as stored.
            kind: Its kind.
        """
        W0 = None if starts_at_zero(self.init) else as_matrices(weight, kind, self.rows)
        initialize(self.A, self.B, W0, init=self.init, s=self.scale)
        if self.padding_idx is not None:  # its column of A gets no gradient, so the padding token keeps its vector
            self.A[:, self.padding_idx] = 0
        remove_requirement(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraAdapter:
        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            if moved.dtype == t.dtype or not t.is_floating_point():
                return moved
            if moved.dtype.itemsize == 1:
                self.keeps_dtype = True
            return t.to(moved.device) if self.keeps_dtype else moved

        super()._apply(move, recurse)
        self._rebuild()
        if ".to_empty." in getattr(fn, "__qualname__", "") and not any(p.is_meta for p in self.parameters()):
            self.register_forward_pre_hook(RequireWritten(self))
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if any(isinstance(hook, RequireWritten) for hook in self._forward_pre_hooks.values()):
            remove_requirement(self)
            self.register_forward_pre_hook(RequireWritten(self))  # copied parameters count their writes anew

    @torch.no_grad()
    def rescale(self, alpha: float, scaling: str) -> None:
        """Change the scale in place: compiled code reads it from where it is."""
        vars(self).update(alpha=alpha, scaling=scaling, scale=scale(alpha, self.r, scaling))
        self.s.copy_(torch.tensor(self.scale, dtype=torch.float64))  # fill_ refuses what float32 does not hold

    def _rebuild(self) -> None:
        """Compute the buffers from the settings, on the device of A."""
        vars(self)["scale"] = scale(self.alpha, self.r, self.scaling)
        dtype = torch.float64 if self.A.dtype == torch.float64 else torch.float32  # float8 has no promotion
        self.s = torch.tensor(self.scale, dtype=dtype, device=self.A.device)
        if self.slices is not None:
            self.rows = torch.tensor([i for part in self.slices for i in part], device=self.A.device)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        # A checkpoint of the base alone has none of these keys. AdapterDict decides whether that is an error.
        if not any(key.startswith(prefix) for key in state_dict):
            return
        s = state_dict.get(f"{prefix}s")
        if s is not None and not s.is_meta and s.cpu() != torch.tensor(self.scale, dtype=s.dtype):
            errors.append(
                f"{prefix[:-1]}: the state dict has the scale {float(s):g}, and the model {self.scale:g}, so that A"
                " and B would mean another update: inject with the alpha, r and scaling of the state dict, or call"
                f" rescale(model, name, scale={float(s):g}) first"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if s is None and f"{prefix}s" in missing:  # written before the scale was in the state dict
            missing.remove(f"{prefix}s")
        self._rebuild()  # assign=True may have moved A to another device
        if all(f"{prefix}{name}" in state_dict for name, _ in self.named_parameters()):
            remove_requirement(self)

    def extra_repr(self) -> str:
        sizes = f"in={self.A.shape[-1]}, out={self.B.shape[-2]}, r={self.r}"
        return f"{sizes}, alpha={self.alpha:g}, scale={self.scale:g}, dropout={self.dropout:g}"


def _runs(slices: tuple[range, ...]) -> Parts | None:
    """Return each run of outputs with the rows of B that belong to it; None if a slice has a step."""
    if any(rows.step != 1 for rows in slices):
        return None
    ends = itertools.accumulate(map(len, slices))
    return tuple(
        (slice(rows.start, rows.stop), slice(end - len(rows), end)) for rows, end in zip(slices, ends, strict=True)
    )


def add_term(
    adapter: LoraAdapter,
    y: Tensor,
    term: Callable[[LoraAdapter, Tensor, Strength], Tensor],
    x: Tensor,
    strength: Strength,
) -> Tensor:
    """Return y + term(adapter, x, strength) in the dtype of y. The term of a slice is added to the outputs of the
    slice."""
    t = term(adapter, x, strength).to(y.dtype)
    return y + t if adapter.rows is None else y.index_add(-1, adapter.rows, t)


def lora_term(adapter: LoraAdapter, x: Tensor, strength: Strength = None) -> Tensor:
    """Return t s (x A^T) B^T, shape (..., out), for x of shape (..., in), in the dtype of x."""
    x = F.dropout(x, adapter.dropout, adapter.training)
    h_R = F.linear(x, adapter.A.to(x.dtype)) * scaled(adapter.s, strength)
    return F.linear(h_R, adapter.B.to(h_R.dtype))


def embedding_term(adapter: LoraAdapter, ids: Tensor, strength: Strength = None) -> Tensor:
    """Return the term of an embedding, shape (*ids.shape, width), in the dtype of A.

    The input of an embedding is one-hot, so x A^T is column `id` of A. Dropout on a one-hot row drops or keeps its
    single 1, so it acts on whole tokens.
    """
    h_R = F.embedding(ids, adapter.A.t(), padding_idx=adapter.padding_idx) * scaled(adapter.s, strength)
    h_R = h_R * F.dropout(h_R.new_ones(*ids.shape, 1), adapter.dropout, adapter.training)
    return F.linear(h_R, adapter.B)


def add_embedding_term(
    adapter: LoraAdapter, y: Tensor, ids: Tensor, y_is_ours: bool, strength: Strength = None
) -> Tensor:
    """Return y plus the term of an embedding. y is never written to."""
    return add_term(adapter, y, embedding_term, ids, strength)


def delta_factors(adapter: LoraAdapter, transposed: bool, rest: tuple[int, ...]) -> Factors:
    """Return the delta s B A as factors s P Q in the orientation in which the weight is stored.

    Args:
        adapter: The adapter.
        transposed: True if the weight is stored as (in, out), as in transformers' Conv1D.
        rest: The stored shape behind the axis of the rows: (in,), (in, kernel, kernel), or (out,) if transposed.

    Rows that a slice does not have are zero in P (or in Q if transposed).
    """
    A: Tensor = adapter.A
    B: Tensor = adapter.B
    if adapter.rows is not None:
        B = B.new_zeros(*B.shape[:-2], adapter.out, adapter.r).index_copy(-2, adapter.rows, B)
    P, Q = (A.mT, B.mT) if transposed else (B, A)
    return Factors(P, Q.reshape(*Q.shape[:-1], *rest), adapter.s, adapter.dropout if adapter.training else 0.0)


def factors_at(adapter: LoraAdapter, strength: Strength, transposed: bool, rest: tuple[int, ...]) -> Factors:
    """Return the factors of t times the delta: of W0 + t (W - W0), where the adapter makes W of W0."""
    f: Factors = adapter(delta_factors, transposed, rest)
    if strength is None:
        return f
    f = f.times(strength)
    if isinstance(strength, Tensor) or f.value is not None:
        return f
    product = torch.full_like(f.s, adapter.scale * strength, dtype=torch.float64)
    return f._replace(s=product.to(f.s.dtype))  # rounded once, as by `rescale`
