"""The adapters of one weight, by name.

A grafted module has one child per weight that carries adapters: `lora` for `weight`, `lora_down_proj` for `down_proj`,
`lora[q]` for a slice. The child is an `AdapterDict` with one `LoraAdapter` per adapter name. Which of them are active
is not decided here: all modules of a model share one `AdapterState` (active.py).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from ..numerics.delta import Strength
from .active import AdapterState, StateDictLoad
from .adapter import LoraAdapter
from .guards import warn_if_saved_as_base
from .kernels.terms import TERMS
from .weight_kinds import Kind


class AdapterDict(nn.Module):
    """All adapters of one weight, or of one slice of it, by name.

    Args:
        state: The state that all modules of the model share.
        kind: The kind of the weight.
        parameter: The name of the weight in its module.
        label: The slice of a fused weight ("q", "0:768"). Empty for the whole weight.
        site: The name of the site in the model (plan.site_name).
        named: True if the weight itself was named as a target, so that all modules that contain it count as readers.
    """

    def __init__(
        self, state: AdapterState, kind: Kind, parameter: str = "weight", label: str = "", *, site: str,
        named: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.state, self.kind, self.site = state, kind, site
        self.parameter, self.label, self.named = parameter, label, named
        self.is_read, self.merge_record = False, None
        self.fallbacks = Counter()

    state: AdapterState
    kind: Kind
    merge_record: object | None
    """What merge leaves on the weight, for unmerge (merging/adapted_weight.py); None while nothing is merged."""
    parameter: str
    label: str
    site: str
    """The name under which the weight was injected."""
    named: bool
    is_read: bool
    """True if other code reads the weight (weight graft), False if it is applied by calling its module (forward
    graft)."""
    is_head: bool = False
    """True if the weight is that of an output head, which fused losses read (head_graft.ReadFromOutside)."""
    fallbacks: Counter[str]
    """How often the dense sum had to be formed, by the torch function that needed it (lazy_weight.py)."""

    def __getitem__(self, name: str) -> LoraAdapter:
        return cast(LoraAdapter, self._modules[name])

    def __setitem__(self, name: str, adapter: LoraAdapter) -> None:
        vars(adapter)["site"] = self.site
        self._modules[name] = adapter  # add_module refuses names such as "train" and "half"

    def __delitem__(self, name: str) -> None:
        del self._modules[name]

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    @property
    def active(self) -> list[tuple[LoraAdapter, Strength]]:
        """The active adapters that this weight has, each with its strength."""
        choice = self.state.choice
        return [(self[name], choice.strengths[i]) for i, name in enumerate(choice.active) if name in self._modules]

    def forward(self, x: Tensor, y: Tensor, y_is_ours: bool = False) -> Tensor:
        """Return y plus the low-rank terms of the active adapters.

        Args:
            x: The input of the layer, shape (..., in), or token ids for an embedding.
            y: The output of the base layer, shape (..., out).
            y_is_ours: True if terms may be added in place, because no one else holds y.
        """
        assert self.kind.form is not None
        term = TERMS[self.kind.form]
        choice = self.state.choice
        if choice.rows is not None:
            adapters = cast("dict[str | None, LoraAdapter]", self._modules)
            return choice.rows.add_terms(adapters, term, y, x, y_is_ours)
        for i, name in enumerate(choice.active):
            if name in self._modules:
                y, y_is_ours = self[name](term, y, x, y_is_ours, choice.strengths[i]), True
        return y

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        original = self.state.members.get(self.site, lambda: None)()
        if original is None or original.state is not self.state:  # a shallow copy has the state of its original
            self.state.members[self.site] = weakref.ref(self)

    def _replicate_for_data_parallel(self) -> AdapterDict:
        """Return the replica for another GPU, which DataParallel runs in a thread that has none of the caller's
        contexts."""
        replica = cast(AdapterDict, super()._replicate_for_data_parallel())
        replica.state = AdapterState(default=self.state.choice, merged=self.state.merged)
        return replica

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
        """Accept a checkpoint of the base, which has no adapter keys; report missing keys of one that has some."""
        if self.state.loading is None or self.state.loading.missing_keys is not missing:
            self.state.loading = StateDictLoad(missing)
        loading = self.state.loading
        found = {key[len(prefix) :].split(".")[0] for key in state_dict if key.startswith(prefix)}
        if strict:
            unexpected += [k for k in state_dict if k.startswith(prefix) and k[len(prefix) :].split(".")[0] not in self]
        if found and found.isdisjoint(self):
            errors.append(
                f"{prefix[:-1]}: the state dict has the adapter {', '.join(map(repr, sorted(found)))}, and the model"
                f" {', '.join(map(repr, self))}: inject with the name of the state dict"
            )
        for name in self:
            keys = [f"{prefix}{name}.{parameter}" for parameter, _ in self[name].named_parameters()]
            if any(key in state_dict for key in keys):
                loading.has_adapter_keys = True  # torch itself reports which of these keys are missing
            else:
                loading.absent += keys
        if loading.has_adapter_keys:
            missing += loading.absent
            loading.absent = []

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return no keys while adapters are merged: the weights of the base already hold them. Warn within
        save_pretrained, whose file does not restore the adapters."""
        if self.state.merged:
            return kwargs.get("destination", {})
        if self.site == next(iter(self.state.members), None):  # once per model
            warn_if_saved_as_base(self.state.before)
        return super().state_dict(*args, **kwargs)


def child_name(parameter: str, label: str) -> str:
    """Return the name of a weight's AdapterDict among the children of its module."""
    return "lora" + (f"_{parameter}" if parameter != "weight" else "") + (f"[{label}]" if label else "")


def adapters_of(module: nn.Module, parameter: str = "weight", label: str = "") -> AdapterDict | None:
    """Return the adapters on a weight or slice of the module; None if there are none."""
    child = module._modules.get(child_name(parameter, label))
    return child if isinstance(child, AdapterDict) else None
