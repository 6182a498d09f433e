"""The adapters that sit on one weight, and which of them are on.

A grafted module has a child for each weight of its that carries adapters (`lora` for `weight`, `lora_down_proj` for `down_proj`,
`lora[q]` for a slice): an `Adapters`, which holds a LowRank for each adapter name. Which names are on is not the module's business:
all modules of a model share one `Routing`, so switching is one assignment however many adapters and layers there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .active import AdapterState, StateDictLoad
from .adapter import LoraAdapter
from .hooks import HookAware
from .kernels.shared_input import SharedInput
from .kernels.terms import TERMS
from .weight_kinds import Kind


class AdapterDict(HookAware):
    """All adapters of one weight (or slice), by name; `forward(x, y)` adds the terms of those that are on to the base's output y (see Term)."""

    def __init__(
        self, state: AdapterState, kind: Kind, parameter: str = "weight", label: str = "", *, named: bool = False
    ) -> None:
        super().__init__()
        vars(self).update(  # nothing of it is a tensor: nn.Module's way takes 10 us each
            state=state, kind=kind, parameter=parameter, label=label, named=named, read=False, merge_record=None, fallbacks=Counter(), siblings=None,
        )  # fmt: skip

    state: AdapterState
    kind: Kind
    merge_record: object | None
    """What merge leaves on the weight, for unmerge (merging/adapted_weight.py); None while nothing is merged."""
    parameter: str
    """The name of the weight in its module."""
    label: str
    """Which slice of a fused weight ("q", "0:768"); empty for the whole."""
    read: bool
    """Whether the weight is read by somebody's own code (the weight graft), or applied by calling its module (the forward graft)."""
    named: bool
    """Whether the weight itself was named as a target, so that all modules it lies in read it."""
    fallbacks: Counter[str]
    """By torch function: how often the dense sum had to be formed (see LowRankSum)."""
    siblings: SharedInput | None
    """With those of other weights that read the same input."""

    def __getitem__(self, name: str) -> LoraAdapter:
        return cast(LoraAdapter, self._modules[name])

    def __setitem__(self, name: str, adapter: LoraAdapter) -> None:
        self._modules[name] = adapter  # not add_module, which reserves names such as "train" and "half"
        self._mark(adapter)

    def __delitem__(self, name: str) -> None:
        del self._modules[name]

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    @property
    def active(self) -> list[LoraAdapter]:
        """The active adapters that this weight has."""
        return [self[name] for name in self.state.active if name in self._modules]

    def forward(self, x: Tensor, y: Tensor, own: bool = False, given: Tensor | None = None) -> Tensor:
        """y (..., out) and the terms of x (..., in), in y's memory if that is our `own`. `given` is what the module was called with, by which
        siblings know their input."""
        assert self.kind.form is not None
        state, term, lows = self.state, TERMS[self.kind.form], cast("dict[str | None, LoraAdapter]", self._modules)
        if state.rows is not None:
            return state.rows.add(lows, term, y, x, own)
        made: Mapping[LoraAdapter, Tensor] = {}
        if self.siblings is not None and given is not None and not torch.compiler.is_compiling():
            made = self.siblings.lowered(self, state.active, y, x, given)
        for name in state.active:
            if (low := lows.get(name)) is not None:
                y, own = low(term, y, x, own, made[low]) if low in made else low(term, y, x, own), True
        return y

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for adapter in self._modules.values():
            self._mark(cast(LoraAdapter, adapter))  # a copied Parameter loses its attributes

    def _mark(self, adapter: LoraAdapter) -> None:
        """Let the optimiser's guard ask whether A and B are merged (by an attribute of theirs, since it sees nothing else)."""
        for p in adapter._parameters.values():
            if p is not None:
                p._lora_routing = self.state  # type: ignore[attr-defined]

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
        """The base's own checkpoint has no A and B, and nothing is missing then; one that has some must have all."""
        if self.state.merged:
            errors.append(f"{prefix}: cannot load while merged; call unmerge(model) first")
        if self.state.loading is None or self.state.loading.missing is not missing:
            self.state.loading = StateDictLoad(missing)
        loading = self.state.loading
        for keys in ([f"{prefix}{name}.{p}" for p, _ in self[name].named_parameters()] for name in self):
            if any(key in state_dict for key in keys):
                loading.some = True  # what is missing of these, torch finds itself
            else:
                loading.absent += keys
        if loading.some:
            missing += loading.absent
            loading.absent = []

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """While merged a model's state dict is the base's keys alone: its weights already hold A and B."""
        if self.state.merged:
            return kwargs.get("destination", {})
        return super().state_dict(*args, **kwargs)


def child_name(parameter: str, label: str) -> str:
    """What the Adapters of a weight is called among its module's children."""
    return "lora" + (f"_{parameter}" if parameter != "weight" else "") + (f"[{label}]" if label else "")


def adapters_of(module: nn.Module, parameter: str = "weight", label: str = "") -> AdapterDict | None:
    """The adapters on this weight of the module; None if there are none."""
    child = module._modules.get(child_name(parameter, label))
    return child if isinstance(child, AdapterDict) else None
