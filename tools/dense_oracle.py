"""A dense oracle for adapted models: what their outputs and gradients must be, computed without the library.

The oracle is a copy of the base whose weights are W0 + s B A, formed here. Its outputs must be those of the adapted
model, and the gradients of A and B must be the derivatives of <dL/dW, s B A>, where dL/dW is the gradient of the
oracle's weight.

`observe` watches a forward and tells which parameters are weights of a matrix product or a convolution, so that a
report can say how much of a model is adapted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lorainject as li

from feed import tensors

EXACT, CLOSE = 5e-6, 1e-5
"""Tolerances, relative to the largest number of an output: where only the order of sums may differ, and where rounding
may. By how memory is aligned, EfficientLoFTR right after inject differs by 1.6e-6 in float32, and by 0 in float64."""
Inputs = Mapping[str, Any]


class Wrong(Exception):
    """Raised if a check does not hold; the message is the reason."""


# --- running and comparing --------------------------------------------------------------------------------------------


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return all floating tensors of the model's output. What the model draws at random is the same each time."""
    torch.manual_seed(0)
    return list(tensors(model(**copy.deepcopy(dict(inputs)))))


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the outputs of `run`, without gradients."""
    return run(model, inputs)


def apart(got: list[Tensor], want: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest number of its tensor.

    It is infinite if the shapes differ, or the places of infinities and NaN.
    """
    if [t.shape for t in got] != [t.shape for t in want]:
        return math.inf
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        finite = a.isfinite() & b.isfinite()
        if not torch.equal(a.nan_to_num(0, 1, -1)[~finite], b.nan_to_num(0, 1, -1)[~finite]):
            return math.inf
        if finite.any():
            largest = max(float(b.double()[finite].abs().max()), 1e-6)
            worst = max(worst, float((a.double() - b.double())[finite].abs().max()) / largest)
    return worst


def loss(out: list[Tensor]) -> Tensor:
    """Return a random linear function of all outputs, the same one for the same shapes."""
    g = torch.Generator().manual_seed(7)
    weighted = [(t.double() * torch.randn(t.shape, generator=g)).nan_to_num(0, 0, 0) for t in out if t.requires_grad]
    return sum((w.sum() / max(w.numel(), 1) ** 0.5 for w in weighted), torch.zeros((), dtype=torch.double))


def clone(model: nn.Module) -> nn.Module:
    """Return a deep copy. A state that a forward with gradients left on a module is detached from its graph before."""
    for module in model.modules():
        for key, value in module.__dict__.items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                module.__dict__[key] = value.detach()
    return copy.deepcopy(model)


def flat(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of the base by its name, each once."""
    return {name: t for name, t in [*model.named_parameters(), *model.named_buffers()] if ".lora" not in f".{name}"}


def changed_tensors(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors whose dtype or bits differ, or that are gone."""

    def as_bytes(t: Tensor) -> Tensor:
        return t.contiguous().flatten().view(torch.uint8)

    return [
        name
        for name, t in before.items()
        if name not in after or t.dtype != after[name].dtype or not torch.equal(as_bytes(t), as_bytes(after[name]))
    ]


# --- which parameters are weights of a matrix product -----------------------------------------------------------------


class Products(TorchDispatchMode):
    """Watches a forward for the parameters that get into a matrix product (`matmul`) or a convolution (`conv`).

    A parameter is followed through views, which share its storage, and through operators that only move or cast it. If
    both factors of a product come from parameters (learned queries under a projection), the second one is the weight.
    """

    MOVES = (
        "clone", "_to_copy", "copy", "cat", "stack", "index", "index_select", "gather", "take_along_dim", "contiguous",
        "permute", "repeat", "flip", "roll", "constant_pad_nd", "_reshape_copy", "view_copy", "transpose_copy",
        "expand_copy", "detach_copy", "unsqueeze_copy",
    )  # fmt: skip
    MATMUL = (
        "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "_grouped_mm", "_scaled_mm", "linear", "matmul",
        "_addmm_activation", "mkldnn_rnn_layer", "lstm", "gru", "rnn_tanh", "rnn_relu", "_thnn_fused_lstm_cell",
    )  # fmt: skip
    PLUS = ("addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation")  # the first argument is only added

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.origin: dict[int, set[str]] = {}
        self.kept: list[Tensor] = []  # kept alive, so that no other tensor gets their storage
        self.matmul: set[str] = set()
        self.conv: set[str] = set()
        self.shapes = {name: p.ndim for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            self.origin.setdefault(p.untyped_storage()._cdata, set()).add(name)

    def sources(self, value: object) -> set[str]:
        """Return the names of the parameters that a tensor consists of."""
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return set()
        return self.origin.get(value.untyped_storage()._cdata, set())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in self.MATMUL:
            factors = [names for t in tensors[name in self.PLUS :] if (names := self.sources(t))]
            is_recurrent = "rnn" in name or "lstm" in name or "gru" in name
            weights = set().union(*factors if is_recurrent else factors[-1:])
            self.matmul |= {n for n in weights if self.shapes[n] >= 2}
        elif "convolution" in name:
            self.conv |= {n for n in self.sources(tensors[1]) if self.shapes[n] >= 2}
        elif name in self.MOVES:
            floating = [t for t in tensors if t.is_floating_point()]
            if floating and all(self.sources(t) for t in floating):
                for t in tree_leaves(out):
                    if isinstance(t, Tensor) and t.is_floating_point() and not self.sources(t):
                        self.origin[t.untyped_storage()._cdata] = set().union(*map(self.sources, floating))
                        self.kept.append(t)
        return out


def observe(model: nn.Module, inputs: Inputs) -> Products:
    """Watch one forward. Gradients are on, because without them torch runs some layers as a single operator."""
    with Products(model) as seen:
        run(model, inputs)
    return seen


# --- the dense oracle -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """One adapted weight: its module and name in the base, A and B, and the delta in the weight's shape as a function
    of them."""

    paths: tuple[str, ...]
    """The paths of all modules that hold the adapter: one, or those that share the weight."""
    parameter: str
    A: Tensor
    B: Tensor
    delta: Callable[[], Tensor]

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def name(self) -> str:
        return f"{self.path}.{self.parameter}".lstrip(".")


def adapted_sites(model: nn.Module, name: str = "default") -> list[Site]:
    """Return the weights that carry an adapter, as the modules themselves show it.

    s B A is formed here. Only the layout is taken from the library's own deltas.
    """
    containers: dict[int, tuple[list[str], str, nn.Module]] = {}
    for path, module in model.named_modules():
        for key, child in module._modules.items():
            if key.split("[")[0].startswith("lora") and type(child).__name__ == "AdapterDict" and name in child:
                paths, *_ = containers.setdefault(id(child), ([], getattr(child, "parameter", "weight"), child[name]))
                paths.append(path)
    deltas = [delta for *_, delta in li.deltas(model)]
    if len(deltas) != len(containers):
        raise Wrong(f"li.deltas yields {len(deltas)} sites, but {len(containers)} modules carry adapters")
    return [
        Site(tuple(paths), parameter, adapter.A, adapter.B, _delta(adapter, delta))
        for (paths, parameter, adapter), delta in zip(containers.values(), deltas, strict=True)
    ]


def _delta(adapter: nn.Module, library_delta: Tensor) -> Callable[[], Tensor]:
    """Return a function that forms s B A in the layout of the library's delta: as it is or transposed, with the axes of
    a kernel."""

    def dense(transposed: bool) -> Tensor:
        d = adapter.scale * (adapter.B @ adapter.A)
        return (d.mT if transposed else d).reshape(library_delta.shape)

    for transposed in (False, True):
        if dense(transposed).sub(library_delta).abs().max() <= 1e-5 * library_delta.abs().max():
            return lambda: dense(transposed)
    shapes = f"A {tuple(adapter.A.shape)}, B {tuple(adapter.B.shape)}"
    raise Wrong(f"li.deltas is not s B A: {tuple(library_delta.shape)} from {shapes}")


def oracle(base: nn.Module, deltas: list[tuple[Sequence[str], str, Tensor]]) -> tuple[nn.Module, list[nn.Parameter]]:
    """Return a copy of the base with dense weights W0 + delta, and these weights, none of which is tied to another.

    Each delta comes with the paths of the modules that use it: those that share a weight share the sum.
    """
    dense = clone(base).requires_grad_(False)
    weights = []
    for paths, parameter, delta in deltas:
        W0 = dense.get_submodule(paths[0])._parameters[parameter].detach()
        W = nn.Parameter(W0 + delta.detach().to(W0.dtype))
        for path in paths:
            dense.get_submodule(path)._parameters[parameter] = W
        weights.append(W)
    return dense, weights


def gradients(model: nn.Module, inputs: Inputs, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the outputs, and the gradients of `loss` with respect to these tensors."""
    out = run(model, inputs)
    value = loss(out)
    grads = torch.autograd.grad(value, tensors, allow_unused=True) if value.requires_grad else [None] * len(tensors)
    return [t.detach() for t in out], list(grads)


def alive(gradient: Tensor | None) -> bool:
    """True if there is a gradient, and it is not zero."""
    return gradient is not None and bool(gradient.ne(0).any())


@torch.no_grad()
def randomize(sites: list[Site], base: nn.Module) -> None:
    """Give A and B large values, as if they were trained: B has about 0.2 of the standard deviation of the weight."""
    g = torch.Generator().manual_seed(3)
    for site in sites:
        W = base.get_submodule(site.path)._parameters[site.parameter]
        site.A.copy_(torch.randn(site.A.shape, generator=g) * 0.5)
        std = float(W.float().std()) if W.numel() > 1 else 0.0
        site.B.copy_(torch.randn(site.B.shape, generator=g) * (0.2 * std if math.isfinite(std) and std else 0.02))


def doubled(inputs: Inputs) -> dict[str, Any]:
    """Return inputs whose floating tensors are float64."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def against_oracle(
    base: nn.Module, model: nn.Module, sites: list[Site], inputs: Inputs, noise: float
) -> dict[str, Any]:
    """Compare outputs and gradients with the dense oracle's.

    If they differ in float32, where rounding may change which experts are chosen, float64 decides.
    """
    try:
        return _against_oracle(base, model, sites, inputs, max(CLOSE, 3 * noise), 1e-3)
    except Wrong as e:
        if "UNREACHED" in str(e):
            raise
        first = e
    try:
        wide = clone(model).double()
        columns = _against_oracle(clone(base).double(), wide, adapted_sites(wide), doubled(inputs), 1e-8, 1e-6)
        return columns | {"float64": str(first)}
    except Wrong as e:
        raise Wrong(f"{first} (float64: {e})") from None
    except Exception:  # many models need float32 somewhere
        raise first from None


def _against_oracle(
    base: nn.Module, model: nn.Module, sites: list[Site], inputs: Inputs, close: float, gradient_close: float
) -> dict[str, Any]:
    dense, weights = oracle(base, [(s.paths, s.parameter, s.delta()) for s in sites])
    want, by_weight = gradients(dense, inputs, weights)
    got, by_factor = gradients(model, inputs, [t for s in sites for t in (s.A, s.B)])
    largest = max((float(g.nan_to_num(0, 0, 0).abs().max()) for g in by_weight if g is not None), default=0.0)
    dead, wrong, unreached = 0, [], []
    for i, (site, gradient) in enumerate(zip(sites, by_weight, strict=True)):
        for_A, for_B = by_factor[2 * i : 2 * i + 2]
        if not alive(gradient):
            dead += 1
            if alive(for_B) and float(for_B.abs().max()) > gradient_close * largest:
                wrong.append(f"{site.name}: its B has a gradient, the dense weight none")
            continue
        if not gradient.isfinite().all():  # the base's own gradients overflow
            continue
        expected = torch.autograd.grad((gradient.detach() * site.delta().to(gradient.dtype)).sum(), [site.A, site.B])
        if not alive(for_B) and float(expected[1].abs().max()) > 1e-6 * largest:
            unreached.append(site.name)
            continue
        for letter, gradient, right in zip("AB", (for_A, for_B), expected, strict=True):
            scale = max(float(right.abs().max()), 1e-4 * largest)
            difference = float(((torch.zeros_like(right) if gradient is None else gradient) - right).abs().max())
            if scale and not difference / scale <= gradient_close:
                wrong.append(f"{site.name}: dL/d{letter} is off by {difference / scale:.1g}")
    if unreached:
        raise Wrong(f"SILENTLY UNREACHED: {len(unreached)} sites, as {unreached[0]}")
    if (d := apart(got, want)) > close:
        raise Wrong(f"output differs from the dense oracle's by {d:.1g}")
    if wrong:
        raise Wrong(f"gradient: {wrong[0]} ({len(wrong)} in all)")
    return {"dead": dead}
