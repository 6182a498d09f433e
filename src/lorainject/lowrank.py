"""The value W0 + s B A that is never computed, and the one place where its formula stands.

    y = x W0^T + s (x A^T) B^T        A_RI (r, in)   B_OR (out, r)   W0 (out, in)   s = alpha / r, or alpha / sqrt(r)

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, eq. 3; the second scaling is
Kalajdzievski 2023, "rsLoRA", arXiv 2312.03732. A stack of experts has one A and one B each: A (E, r, in), B (E, out, r).

A and B are kept in float32 by default and cast *down* to the activations' dtype where they are used: they are small, the
activations are not, and the optimiser needs the precision.

Legend of the suffixes: R rank, I in, O out, and for embeddings V vocabulary (= in), D width (= out).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

Term = Callable[["LowRank", Tensor, Tensor, bool], Tensor]
"""(adapter, output y, input x, whether y may be written to) -> y with the low-rank term of x added."""
Parts = tuple[tuple[slice, slice], ...]
"""Of a slice: runs of the outputs, and the rows of B that stand for them; empty for the whole weight."""


class Factors(NamedTuple):
    """s P Q with P (*stack, rows, r) and Q (*stack, r, *rest): a delta in the shape (*stack, rows, *rest) of the weight as stored."""

    P: Tensor
    Q: Tensor
    s: Tensor
    dropout: float = 0.0
    """Probability of dropping an element of the weight's input; 0 outside training."""
    gain: Tensor | None = None
    """What W0 itself is multiplied with (DoRA, see payload.py), in a shape that expands to the weight's; P Q has it already. None: 1."""
    update: Tensor | None = None
    """s b (out,), what comes with it for the layer's bias; None: nothing."""

    value: tuple[Tensor, Tensor | None] | None = None
    """What stands in W0's place (see replaced.py): a tensor, and which rows it is, if not all. None: W0."""

    @property
    def beside(self) -> bool:
        """Whether there is more to it than P Q."""
        return self.gain is not None or self.update is not None or self.value is not None


HOOKED = "_lora_hooked"  # among a module's attributes once somebody has put a hook on it


def _noting(register: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(register)
    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        vars(self)[HOOKED] = True
        return register(self, *args, **kwargs)

    return noted


class Asked(nn.Module):
    """A module that every token asks: it notes when it gets hooks, since to look through the four dictionaries of them, which have left the cache
    since the last token, takes as long as a product with one."""

    register_forward_pre_hook = _noting(nn.Module.register_forward_pre_hook)
    register_forward_hook = _noting(nn.Module.register_forward_hook)
    register_backward_hook = _noting(nn.Module.register_backward_hook)
    register_full_backward_hook = _noting(nn.Module.register_full_backward_hook)
    register_full_backward_pre_hook = _noting(nn.Module.register_full_backward_pre_hook)

    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args) if is_hooked(self) else self.forward(*args)


def is_hooked(module: Asked) -> bool:
    """Whether a call of the module has to go through torch, for somebody's hooks."""
    return HOOKED in module.__dict__ or bool(_has_any_global_hook())


class LowRank(Asked):
    """One adapter on one weight: parameters A (*stack, r, in) and B (*stack, out, r), and the scale s as a 0-d buffer.

    s is in float32, or float64 beside such an A. It is a buffer, since a Python float would make torch.compile build anew whenever it
    changes, and it follows from `alpha`, `r` and `scaling`, so that neither `.to(bfloat16)` nor `.to_empty()` can harm it. So is `rows`
    (int64), which follows from `slices`: those of the full weight's outputs that B's rows stand for, where only a slice of a fused weight
    is adapted.

    A and B are used by calling the module, `adapter(function, ...)` -> function(adapter, ...), never read around it, so that
    hooks which bring weights to the right device (accelerate) or gather them (FSDP) do so for A and B as well.
    """

    def __init__(self, A: Tensor, B: Tensor, *, alpha: float, scaling: str, dropout: float, init: str,
                 padding_idx: int | None = None, slices: tuple[range, ...] | None = None, out: int | None = None) -> None:  # fmt: skip
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        vars(self).update(  # what is no tensor: nn.Module's way takes 10 us each
            r=A.shape[-2], alpha=alpha, scaling=scaling, dropout=dropout, init=init, padding_idx=padding_idx,
            out=B.shape[-2] if out is None else out, slices=slices, parts=_parts(slices),
        )  # fmt: skip
        self.register_buffer("s", None, persistent=False)
        self.register_buffer("rows", None, persistent=False)
        self._rebuild()

    r: int
    alpha: float
    scaling: str
    dropout: float
    init: str
    padding_idx: int | None
    out: int
    """Outputs of the whole weight."""
    slices: tuple[range, ...] | None
    s: Tensor
    scale: float
    """The same as a Python float."""
    rows: Tensor | None
    parts: Parts | None
    """The same in runs; None if it has none."""

    def forward(self, use: Callable[..., Any], *args: Any) -> Any:
        return use(self, *args)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A ~ Kaiming uniform (as in loralib and PEFT) or Gaussian of deviation 1/r; B = 0, so the output is the base's."""
        for A_RI in self.A if self.A.ndim == 3 else [self.A]:
            if self.init == "gaussian":
                nn.init.normal_(A_RI, std=1 / self.r)
            else:
                nn.init.kaiming_uniform_(A_RI, a=math.sqrt(5))
        if self.padding_idx is not None:  # the padding token keeps its vector: its column of A gets no gradient
            self.A[:, self.padding_idx] = 0
        nn.init.zeros_(self.B)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRank:
        super()._apply(fn, recurse)
        self._rebuild()
        return self

    @torch.no_grad()
    def rescale(self, alpha: float, scaling: str) -> None:
        """Another s in the memory of the old one, where what was compiled looks for it."""
        vars(self).update(alpha=alpha, scaling=scaling, scale=scale(alpha, self.r, scaling))
        self.s.copy_(torch.tensor(self.scale, dtype=torch.float64))  # fill_ refuses what float32 does not hold

    def _rebuild(self) -> None:
        """What follows from Python values, on the device that A is on."""
        vars(self)["scale"] = scale(self.alpha, self.r, self.scaling)
        dtype = torch.float64 if self.A.dtype == torch.float64 else torch.float32  # float8 has no promotion
        self.s = torch.tensor(self.scale, dtype=dtype, device=self.A.device)
        if self.slices is not None:
            self.rows = torch.tensor([i for part in self.slices for i in part], device=self.A.device)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if any(
            key.startswith(prefix) for key in state_dict
        ):  # else it may be the base's own checkpoint: Adapters decides
            super()._load_from_state_dict(state_dict, prefix, *args)
            self._rebuild()  # assign=True may have brought A to another device

    def extra_repr(self) -> str:
        return f"in={self.A.shape[-1]}, out={self.B.shape[-2]}, r={self.r}, alpha={self.alpha:g}, scale={self.scale:g}, dropout={self.dropout:g}"


def is_finite(t: Tensor) -> bool:
    """Whether every element is. (The sum tells, unless it overflows, in a third of the time.)"""
    return math.isfinite(float(t.detach().sum())) or bool(t.isfinite().all())


def scale(alpha: float, r: int, scaling: str) -> float:
    """s = alpha / r ("standard", arXiv 2106.09685 section 4.1) or alpha / sqrt(r) ("rslora", arXiv 2312.03732)."""
    return alpha / math.sqrt(r) if scaling == "rslora" else alpha / r


def _parts(slices: tuple[range, ...] | None) -> Parts | None:
    if any(part.step != 1 for part in slices or ()):
        return None
    ends = list(itertools.accumulate(map(len, slices or ())))
    return tuple(
        (slice(part.start, part.stop), slice(end - len(part), end))
        for part, end in zip(slices or (), ends, strict=True)
    )


def add(adapter: LowRank, y: Tensor, term: Callable[[LowRank, Tensor], Tensor], x: Tensor) -> Tensor:
    """y + term(x), in y's dtype; a slice's term goes to the outputs that are its rows."""
    t = term(adapter, x).to(y.dtype)
    return y + t if adapter.rows is None else y.index_add(-1, adapter.rows, t)


def project(adapter: LowRank, x: Tensor) -> Tensor:
    """s (x A^T) B^T for x (..., in) -> (..., out), in x's dtype."""
    x = F.dropout(x, adapter.dropout, adapter.training)
    h_R = F.linear(x, adapter.A.to(x.dtype)) * adapter.s
    return F.linear(h_R, adapter.B.to(h_R.dtype))


def look_up(adapter: LowRank, ids: Tensor) -> Tensor:
    """The same for an embedding, whose x is one-hot: column `id` of A. ids (...) -> (..., width), in A's dtype.

    Dropout on a one-hot row drops or keeps its single 1, so it acts on whole tokens.
    """
    h_R = F.embedding(ids, adapter.A.t(), padding_idx=adapter.padding_idx) * adapter.s
    h_R = h_R * F.dropout(h_R.new_ones(*ids.shape, 1), adapter.dropout, adapter.training)
    return F.linear(h_R, adapter.B)


def add_looked_up(adapter: LowRank, y: Tensor, ids: Tensor, own: bool) -> Tensor:
    """y plus what `look_up` finds."""
    return add(adapter, y, look_up, ids)


def factors(adapter: LowRank, transposed: bool, rest: tuple[int, ...]) -> Factors:
    """The delta as factors in the stored orientation: rows are `out`, or `in` where the weight is stored transposed.

    `rest` is the stored shape after the rows' axis: (in,), (in, kernel, kernel), or (out,) if transposed. A slice's missing rows
    are zeros.
    """
    A: Tensor = adapter.A
    B: Tensor = adapter.B
    if adapter.rows is not None:
        B = B.new_zeros(*B.shape[:-2], adapter.out, adapter.r).index_copy(-2, adapter.rows, B)
    P, Q = (A.mT, B.mT) if transposed else (B, A)
    return Factors(P, Q.reshape(*Q.shape[:-1], *rest), adapter.s, adapter.dropout if adapter.training else 0.0)


def delta(P: Tensor, Q: Tensor, s: Tensor | float) -> Tensor:
    """s P Q, the delta itself: (*stack, rows, all of rest as one axis)."""
    return (P * s) @ Q.flatten(P.ndim - 1)


def flattened(f: Factors) -> Factors:
    """Detached, with Q (*stack, r, width)."""
    return f._replace(P=f.P.detach(), Q=f.Q.detach().flatten(f.P.ndim - 1), s=f.s.detach())


def copied(f: Factors) -> Factors:
    """The same, as a copy that no training, replacing or moving of A and B changes."""
    gain, update = (None if t is None else t.detach().clone() for t in (f.gain, f.update))
    value = None if f.value is None else (f.value[0].detach().clone(), f.value[1])
    P, Q, s, *_ = flattened(f)
    return Factors(
        P.clone(memory_format=torch.contiguous_format), Q.clone(), s.clone(), gain=gain, update=update, value=value
    )


def norm(P: Tensor, Q: Tensor) -> float:
    """|P Q|, Frobenius, without forming it: its square is <P^T P, Q Q^T>, both (r, r), in float64."""
    return float((_gram(P.mT) * _gram(Q)).sum().clamp(min=0)) ** 0.5


def _gram(Q: Tensor) -> Tensor:
    Q = Q.double()
    return Q @ Q.mT


def joined(parts: Iterable[Factors]) -> tuple[Tensor, Tensor]:
    """P (*stack, rows, R) and Q (*stack, R, width), float64, with P Q the sum of all s P Q: one product however many there are.

    In float64, so that it comes out the same to float32's last bit whatever the tile, the BLAS library and the machine.
    """
    P, Q = zip(*((f.P.double() * f.s.double(), f.Q.double()) for f in parts), strict=True)
    return torch.cat(P, -1), torch.cat(Q, -2)


def gain(parts: Iterable[Factors]) -> Tensor | None:
    """What W0 is multiplied with in W0 + the sum of all (W - W0); None if that is 1."""
    gains = [f.gain for f in parts if f.gain is not None]
    return None if not gains else sum((g - 1 for g in gains[1:]), start=gains[0])
