"""One walk over a model, and everything a verb asks about it: the modules by path, and the sites that carry adapters.

A walk over a large model takes longer than most verbs, so each verb builds one `ModelIndex` and hands it down:

    index = ModelIndex(model)
    index.require_adapters("save", "default")     # raises StateError if the verb is not possible now
    for name, site in index.sites.items(): ...

The index is a snapshot. Changing a module's class or its parameters does not invalidate it; a verb that removes
adapters keeps `sites` up to date (mounting.unmount). Adapters that a verb adds are not in its index.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import StateError, TargetError
from ..plan import site_name
from .active import ALL_CONTEXTS, ROOTS, AdapterState, ModuleStructure, open_context, open_contexts
from .adapter import LoraAdapter
from .adapter_dict import AdapterDict
from .replacement import ReplacementTensor
from .weight_kinds import is_opaque_linear, stored_tensor, superseded_layers, weight_shape

WeightKey = tuple[int, str]
"""The id of a module and the name of a parameter in it."""


WRAPPERS = ("DistributedDataParallel", "DataParallel", "AveragedModel")
"""Classes of torch that hold a model as `module`, and do what it does."""


class AdaptedSite(NamedTuple):
    """A weight of the base model, or a slice of one, that carries adapters."""

    module: nn.Module
    """The module that owns the weight."""
    adapters: AdapterDict
    tied: tuple[nn.Module, ...] = ()
    """Further modules that own the weight, and hold the same adapters."""

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules that own the weight."""
        return (self.module, *self.tied)

    @property
    def weight(self) -> Tensor:
        """The whole weight as stored."""
        weight = stored_tensor(self.module, self.adapters.parameter)
        assert weight is not None
        return weight

    @property
    def key(self) -> WeightKey:
        """The weight's identity. Slices of one weight share it."""
        return id(self.module), self.adapters.parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole weight as stored; of a quantized weight, the shape before it was quantized."""
        return weight_shape(self.module, self.adapters.parameter)

    def fits(self, adapter: LoraAdapter) -> bool:
        """True if the adapter's factors have the shapes that the weight needs now (resize_token_embeddings changes
        it)."""
        if isinstance(adapter, ReplacementTensor):
            return adapter.shape == self.shape
        stack, out_features, in_features = self.adapters.kind.sizes(self.shape)
        rows = out_features if adapter.slices is None else sum(map(len, adapter.slices))
        A, B = adapter._parameters["A"], adapter._parameters["B"]
        assert A is not None
        assert B is not None
        shapes = (*stack, adapter.r, in_features), (*stack, rows, adapter.r)
        return adapter.out == out_features and (A.shape, B.shape) == shapes


class ModelIndex:
    """The modules of a model and the sites that carry adapters, found in one walk.

    Args:
        model: Any module. It may be wrapped by torch.compile or DistributedDataParallel, whose additions to paths are
            left out.

    Raises:
        TargetError: The model is not an nn.Module.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TargetError(
                f"the model must be an nn.Module, not {model!r}",
                way_out="load it first, as with AutoModel.from_pretrained",
            )
        self.model = model
        self.walked = list(iter_modules(model))
        sites: dict[int, tuple[str, AdaptedSite]] = {}
        for path, module in self.walked:
            for child in module._modules.values():
                if isinstance(child, AdapterDict):
                    name = site_name(path, child.parameter, child.label)
                    name, site = sites.setdefault(id(child), (name, AdaptedSite(module, child)))
                    if module not in site.modules:
                        sites[id(child)] = name, site._replace(tied=(*site.tied, module))
        self.sites = dict(sites.values())

    walked: list[tuple[str, nn.Module]]
    """Every path with its module, in the model's order. A module that stands at several paths is listed under each of
    them."""
    sites: dict[str, AdaptedSite]
    """Every weight or slice that carries adapters, once, by the first of its names."""

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module by path."""
        return dict(self.walked)

    @cached_property
    def first_paths(self) -> dict[int, str]:
        """The first path of every module, by the module's id."""
        return {id(module): path for path, module in reversed(self.walked)}

    @property
    def states(self) -> list[AdapterState]:
        """The adapter states of the model: one, unless its parts were injected one by one."""
        return list({id(site.adapters.state): site.adapters.state for site in self.sites.values()}.values())

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names of the adapters on the model, in the order in which they were added."""
        return tuple(dict.fromkeys(name for site in self.sites.values() for name in site.adapters))

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the active adapters."""
        return tuple(self.active_strengths)

    @property
    def default(self) -> tuple[str, ...]:
        """The names of the adapters that are active where a caller has not chosen otherwise."""
        return tuple(self.default_strengths)

    @property
    def active_strengths(self) -> dict[str, float]:
        """The strength of each active adapter, by name."""
        return {name: t for state in self.states for name, t in state.choice.by_name.items()}

    @property
    def default_strengths(self) -> dict[str, float]:
        """The strength of each adapter that is active where a caller has not chosen otherwise, by name."""
        return {name: t for state in self.states for name, t in state.default.by_name.items()}

    def adapters_named(self, name: str) -> list[LoraAdapter]:
        """Return the adapters of this name on all sites."""
        return [site.adapters[name] for site in self.sites.values() if name in site.adapters]

    @property
    def merged(self) -> list[str]:
        """The names of the adapters that are merged into the weights, sorted."""
        return list(self.merged_strengths)

    @property
    def merged_strengths(self) -> dict[str, float]:
        """The strength of each adapter that is merged into the weights, by name, sorted."""
        return dict(sorted({name: t for state in self.states for name, t in state.merged.items()}.items()))

    @cached_property
    def whole_states(self) -> list[AdapterState]:
        """The states of models that were injected as a whole and are in this model, or are this model."""
        injected = [state for root, state in ROOTS.items() if id(root) in self.first_paths]
        states = dict.fromkeys((*self.states, *injected))
        return [state for state in states if state.root and id(state.root()) in self.first_paths]

    @cached_property
    def lost(self) -> list[str]:
        """The names of the sites that were injected and are not in the model any more, because a module was replaced or
        removed since."""
        found = {id(site.adapters) for site in self.sites.values()}
        members = [member for state in self.whole_states for member in state.members.items()]
        return [name for name, member in members if id(member()) not in found]

    @cached_property
    def computed(self) -> list[str]:
        """The names of the sites whose weight is computed from other parameters since inject: prune, spectral_norm and
        weight_norm take the parameter out of the module."""
        return [
            name
            for name, site in self.sites.items()
            if site.adapters.parameter not in site.module._parameters and not is_opaque_linear(site.module)
        ]

    def note_change(self) -> None:
        """Note that adapters have other values than the forwards used whose backward may still come."""
        for state in self.states:
            state.revision += 1

    def require_ready(
        self,
        verb: str,
        *,
        merged: bool = False,
        nested: bool = False,
        part: bool = False,
        lost: bool = False,
        computed: bool = False,
        superseded: bool = False,
    ) -> None:
        """Raise StateError if `verb` must not act on the model now.

        Args:
            verb: What is about to be done, as the message says it ("cannot <verb> ...").
            merged: Allow adapters to be merged. Most verbs would otherwise act on W0 + s B A instead of W0.
            nested: Allow the caller to have a `using`, `disabled` or `rows` context open.
            part: Allow the model to be a part of a larger model that was injected as a whole.
            lost: Allow sites that were injected to be missing.
            computed: Allow weights that are computed from other parameters.
            superseded: Allow layers that diffusers has replaced by a fused one.
        """
        if self.computed and not computed:
            raise StateError(
                f"cannot {verb}: these weights are computed from other parameters since inject (by pruning,"
                " spectral_norm or weight_norm):",
                self.computed,
                'undo that first, as by torch.nn.utils.prune.remove(module, "weight")',
            )
        idle = [] if superseded else self._superseded()
        if idle:
            raise StateError(
                f"cannot {verb}: fuse_qkv_projections() has put one layer in the place of these layers, which nothing"
                " calls any more:",
                idle,
                "call unfuse_qkv_projections() first. To fuse a model with its adapters, call merge(model) before",
            )
        if self.lost and not lost:
            raise StateError(
                f"cannot {verb}: weights that were injected are not in the model any more, because their modules were"
                " replaced or removed since:",
                self.lost,
                "put these modules back; or save what is left, eject(model), and load or inject again",
            )
        for state in self.states:
            root = state.root and state.root()
            if root is not None and not part and root is not self.model and id(root) not in self.first_paths:
                raise StateError(
                    f"cannot {verb}: this is a part of a model that was injected as a whole",
                    way_out=f"call it on the whole {type(root).__name__}",
                )
            if not nested and (context := open_context(state)) is not None:
                raise StateError(f"cannot {verb} inside {context.verb}(...)", way_out="leave the context first")
        if not merged and self.merged:
            raise StateError(
                f"cannot {verb} while {', '.join(map(repr, self.merged))} is merged",
                way_out="call unmerge(model) first",
            )

    def _superseded(self) -> list[str]:
        """Return the names of the sites on layers that diffusers has replaced by a fused one."""
        idle = {id(layer) for _, module in self.walked for layer in superseded_layers(module)}
        return [name for name, site in self.sites.items() if id(site.module) in idle]

    def require_idle(self, verb: str, names: Collection[str] | None = None) -> None:
        """Raise StateError if anybody has a context open that `verb` would make wrong.

        Args:
            verb: What is about to be done, as the message says it.
            names: The adapters that the verb takes off. None if it changes what every forward computes.
        """
        for context in list(ALL_CONTEXTS):
            is_open = not context.has_ended and any(state in context.states for state in self.states)
            if context.is_merge and context.counts and context in open_contexts():
                continue  # the caller may change what it has merged itself
            if is_open and (names is None or not set(names).isdisjoint(context.choice.names)):
                raise StateError(
                    f"cannot {verb} while another thread, task or generator is inside {context.verb}(...)",
                    way_out="wait until it has left the context, or close the generator",
                )

    @property
    def is_inside_merged(self) -> bool:
        """True if the caller has a `merged` context open for this model."""
        return any(c.is_merge and any(state in c.states for state in self.states) for c in open_contexts())

    def require_adapters(self, verb: str, *names: str, **allowed: bool) -> None:
        """Raise StateError if `verb` must not act on the model now, or if the model has no adapters, or not these
        `names`.

        Args:
            verb: As for `require_ready`.
            names: Adapter names that the verb needs.
            allowed: The keyword arguments of `require_ready`.
        """
        self.require_ready(verb, **allowed)
        if not self.sites:
            raise StateError(
                "this model carries no adapter", way_out="call inject(model, targets) or load(model, path) first"
            )
        known = self.adapter_names
        if unknown := [name for name in names if name not in known]:
            raise StateError(
                f"no adapter named {', '.join(map(repr, unknown))}",
                way_out=f"this model has {', '.join(map(repr, known))}",
            )


def iter_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every path with its module, adapters left out; a shared module is yielded under each of its paths.

    The parts that torch.compile (`_orig_mod`) and, on top, `WRAPPERS` (`module`) add to the paths are left out.
    """
    hidden = ("module", "_orig_mod") if type(model).__name__ in WRAPPERS else ("_orig_mod",)
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        yield path, module
        for name, child in reversed(module._modules.items()):
            if child is not None and not isinstance(child, AdapterDict):
                stack.append((path if name in hidden else f"{path}.{name}" if path else name, child))
        hidden = ("_orig_mod",)


def adapted_sites(model: nn.Module) -> Mapping[str, AdaptedSite]:
    """Return the sites of a model that carry adapters, by name; empty if there are none."""
    return ModelIndex(model).sites


def states_to_switch(model: nn.Module, verb: str, *names: str, nested: bool = False) -> list[AdapterState]:
    """Return the adapter states by which the adapters `names` are switched.

    A model that was injected as a whole is remembered in ROOTS, so that switching takes no walk however many layers it
    has, as long as its modules are the same. Otherwise the model is indexed, and StateError is raised as by
    `ModelIndex.require_adapters`.
    """
    state = ROOTS.get(model)
    if state is not None and not state.merged and (nested or open_context(state) is None):
        has_names = state.before and state.before.keys() >= set(names)
        if has_names and state.structure is not None and state.structure.is_current():
            return [state]
    index = ModelIndex(model)
    index.require_adapters(verb, *names, nested=nested, computed=True)
    if state is not None and index.states == [state]:
        state.structure = ModuleStructure({id(module): module for _, module in index.walked}.values())
    return index.states


def execution_device(module: nn.Module, parameter: str) -> torch.device:
    """Return the device on which a weight is used: the device that it is on, or that accelerate brings an offloaded
    weight to."""
    weight = stored_tensor(module, parameter)
    assert weight is not None
    execution = getattr(vars(module).get("_hf_hook"), "execution_device", None)
    return torch.device(execution) if weight.is_meta and execution is not None else weight.device


def is_offloaded(module: nn.Module, parameter: str) -> bool:
    """True if accelerate keeps the values of a weight elsewhere, and brings them when the module is called."""
    weight = stored_tensor(module, parameter)
    return weight is not None and weight.is_meta and execution_device(module, parameter).type != "meta"
