"""Whether A and B get gradients: what is noticed when an adapter goes onto a model, and when an optimizer steps.

A low-rank term is only as trainable as the graph around it. Quantized layers exist whose output has no graph
(`graph_cutters`): adapters before them get no gradient. Code exists that goes around an adapted layer after inject.
Whatever the reason, such an adapter has no gradient when the optimizer takes its first step, and a warning names it.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .active import STATES, AdapterState
from .graft import base_class
from .model_index import ModelIndex
from .weight_kinds import DTYPES, is_opaque_linear, stored_tensor, weight_shape


def graph_cutters(index: ModelIndex) -> list[str]:
    """Return the paths of quantized layers through which no gradient flows.

    Of all layers that are quantized alike, one is run on a row of zeros.
    """
    cuts: dict[Any, bool] = {}
    paths = []
    for path, module in index.walked:
        weight = module._parameters.get("weight")
        scheme: tuple[object, ...] | None = None
        if is_opaque_linear(module):
            scheme = (base_class(type(module)),)
        elif weight is not None and not weight.is_meta and type(weight).__module__.startswith("torchao."):
            settings = {key: value for key, value in vars(weight).items() if not isinstance(value, Tensor)}
            scheme = (base_class(type(module)), type(weight), repr(settings))
        if scheme is not None:
            if scheme not in cuts:
                cuts[scheme] = _cuts_graph(module)
            if cuts[scheme]:
                paths.append(path)
    return paths


def warn_of_cut_graphs(index: ModelIndex) -> None:
    """Warn of layers through which no gradient flows."""
    if cutters := graph_cutters(index):
        shown = ", ".join(cutters[:5]) + f", and {len(cutters) - 5} more" * (len(cutters) > 5)
        warnings.warn(
            f"no gradient flows through these quantized layers: {shown}. Adapters before them cannot be trained, but"
            " inference is right. To train, quantize the weights only (torchao: Int8WeightOnlyConfig), or by a scheme"
            " whose layers have a backward",
            stacklevel=4,
        )


@torch.enable_grad()
def _cuts_graph(layer: nn.Module) -> bool:
    """True if the layer's output does not depend on its input, as far as autograd knows."""
    stored, in_features = stored_tensor(layer), weight_shape(layer, "weight")[1]
    assert stored is not None
    dtype = stored.dtype if stored.dtype in DTYPES else torch.get_default_dtype()
    x = torch.zeros(1, in_features, dtype=dtype, device=stored.device, requires_grad=True)
    with contextlib.suppress(RuntimeError, NotImplementedError, AssertionError, ValueError):  # it needs other inputs
        y = base_class(type(layer)).forward(layer, x)
        return not y.requires_grad or torch.autograd.grad(y.sum(), x, allow_unused=True)[0] is None
    return False


_CHECKED: weakref.WeakKeyDictionary[AdapterState, tuple[str, ...]] = weakref.WeakKeyDictionary()
"""The adapters that were active when the gradients of a model were last checked."""


def _warn_of_missing_gradients(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """Warn at the first step with gradients of the active adapters that have none.

    Experts are left out: one that got no token has no gradient.
    """
    unchecked = [state for state in list(STATES) if _CHECKED.get(state) != state.default.active]
    stepping = {id(p) for group in optimizer.param_groups for p in group["params"]} if unchecked else set()
    for state in unchecked:
        missing, has_gradients, idle = [], False, set()
        for site, adapters in ((site, adapters) for site, member in state.members.items() if (adapters := member())):
            idle |= {
                name
                for name in adapters
                if any(id(p) in stepping and not p.requires_grad for p in adapters[name].parameters())
            }
            trained = [p for p in adapters.parameters() if id(p) in stepping]
            if any(p.grad is not None for p in trained):
                has_gradients = True
            elif any(p.requires_grad for p in trained) and "experts" not in site.split("."):
                missing.append(site)
        if idle - {*state.default.active}:
            _CHECKED[state] = state.default.active
            warnings.warn(
                f"the optimizer has parameters of {', '.join(map(repr, sorted(idle)))}, which is not active and does"
                f" not train; active is {', '.join(map(repr, state.default.active)) or 'no adapter'}",
                stacklevel=3,
            )
        if has_gradients:
            _CHECKED[state] = state.default.active
            if missing:
                warnings.warn(
                    "these adapters got no gradient in the first step, and do not train: "
                    + ", ".join(missing[:20])
                    + ". The forward does not use their layers, or other code reads their weights; probe says which",
                    stacklevel=3,
                )


register_optimizer_step_pre_hook(_warn_of_missing_gradients)
