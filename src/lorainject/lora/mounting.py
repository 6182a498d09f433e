"""Attach adapters to the modules of a model and graft these modules, and take both off again.

A module gets the graft that its weight needs: the forward graft if the weight is applied by calling the module, the
weight graft if code reads it, and in either case that of a head if the module is the model's output embeddings.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from .adapter_dict import AdapterDict, child_name
from .forward_graft import LoraForward
from .graft import Graft, base_class, change_class, graft_obstacle, grafted_class
from .guards import refuse_to_load
from .head_graft import LoraHead, LoraHeadReader
from .lazy_weight_ops import teach_dynamo
from .model_index import ModelIndex
from .weight_graft import READS, LoraReader, adapters_on, owner_of, remove_stale_shadows


def mount(
    paths: Sequence[str], module: nn.Module, adapters: AdapterDict, readers: Sequence[tuple[str, nn.Module]]
) -> None:
    """Attach the adapters of a weight to the module that owns it, and graft the module, or the readers of the weight.

    Args:
        paths: All paths of the module.
        module: The module that owns the weight.
        adapters: The adapters. They may be attached already, in which case only the readers are new.
        readers: The modules whose code reads the weight, with their paths. Empty for a weight that is applied by
            calling
            its module.
    """
    if adapters.kind.stacked:
        teach_dynamo()
    child = child_name(adapters.parameter, adapters.label)
    if child not in module._modules:
        vars(adapters)["training"] = module.training  # train() takes 5 us per module
        module._modules[child] = adapters
        adapters.state.members[adapters.site] = weakref.ref(adapters)
    # A module that reads one of its weights reads all of them: its grafted forward is LoraReader's.
    if READS in module.__dict__ or any(reader is module for _, reader in readers):
        readers = list(dict.fromkeys([*readers, (paths[0], module)]))
        adapters.is_read = True
        for other in module._modules.values():
            if isinstance(other, AdapterDict) and not other.is_read and other is not adapters:
                mount(paths, module, other, [(paths[0], module)])
    adapters.is_read = adapters.is_read or bool(readers)
    for reader_path, reader in readers:
        reads = reader.__dict__.setdefault(READS, [])
        owner_path = next(p for p in paths if reader_path in ("", p) or p.startswith(f"{reader_path}."))
        entry = (tuple(filter(None, owner_path.removeprefix(reader_path).split("."))), adapters.parameter)
        if entry not in reads:
            reads.append(entry)
        _set_class(reader, True)
    if not readers:
        _set_class(module, True)


def mount_all(
    modules: Mapping[str, nn.Module], paths: Sequence[str], adapters: AdapterDict, readers: Sequence[str]
) -> None:
    """Call `mount` for each module that owns a weight: one, or several that are tied.

    Args:
        modules: The modules of the model by path.
        paths: The paths of all modules that own the weight.
        adapters: The adapters of the weight.
        readers: The paths of the modules whose code reads the weight.
    """
    owners = list(dict.fromkeys(modules[path] for path in paths))
    if len(owners) > 1 and any(READS in owner.__dict__ for owner in owners):
        readers = [*readers, *paths]
    for owner in owners:
        owner_paths = [path for path in paths if modules[path] is owner]
        around = [r for r in readers if any(r in ("", path) or path.startswith(f"{r}.") for path in owner_paths)]
        mount(owner_paths, owner, adapters, [(path, modules[path]) for path in around])


def unmount(index: ModelIndex, names: Sequence[str]) -> None:
    """Take the AdapterDicts of these sites off the model, and the grafts of modules that have nothing left to do.

    The AdapterDicts go last: where an interrupt leaves one, the next eject finds it and finishes.
    """
    leaving = {id(index.sites[name].adapters) for name in names}

    def any_stays(adapters: Iterable[AdapterDict]) -> bool:
        return any(id(a) not in leaving for a in adapters)

    for module in grafted_modules(index).values():
        if READS in module.__dict__:
            reads = module.__dict__[READS]
            remaining = [(path, name) for path, name in reads if any_stays(adapters_on(owner_of(module, path), name))]
            if remaining:
                module.__dict__[READS] = remaining
            else:
                change_class(module, base_class(type(module)))
                del module.__dict__[READS]
        elif not any_stays(child for child in module._modules.values() if isinstance(child, AdapterDict)):
            change_class(module, base_class(type(module)))
    for name in names:
        site = index.sites.pop(name)
        for module in site.modules:
            remove_stale_shadows(module)
            del module._modules[child_name(site.adapters.parameter, site.adapters.label)]
        site.adapters.state.members.pop(site.adapters.site, None)


def grafted_modules(index: ModelIndex) -> dict[str, nn.Module]:
    """Return every module that is grafted, or was before a merge, by its first path."""
    called = {id(m) for site in index.sites.values() if not site.adapters.is_read for m in site.modules}
    grafted: dict[int, tuple[str, nn.Module]] = {}
    for path, module in index.walked:
        if READS in module.__dict__ or id(module) in called:
            grafted.setdefault(id(module), (path, module))
    return dict(grafted.values())


def graft_obstacles(index: ModelIndex) -> list[str]:
    """Return one line for every grafted module whose class cannot be changed, with the reason."""
    reasons = {path: graft_obstacle(module) for path, module in grafted_modules(index).items()}
    return [f"{path}: {reason}" for path, reason in reasons.items() if reason is not None]


def set_grafted(index: ModelIndex, on: bool) -> None:
    """Give every grafted module the grafted class, or, if not `on`, the class that it had before: it is merged then,
    and loads no state dict."""
    for site in index.sites.values():
        for module in site.modules:
            remove_stale_shadows(module)
            hooks = module._load_state_dict_pre_hooks
            for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is refuse_to_load]:
                del hooks[key]
            if not on:
                module.register_load_state_dict_pre_hook(refuse_to_load)
    for module in grafted_modules(index).values():
        _set_class(module, on)


def _set_class(module: nn.Module, grafted: bool) -> None:
    cls = base_class(type(module))
    is_head = any(isinstance(child, AdapterDict) and child.is_head for child in module._modules.values())
    if READS in module.__dict__:
        mixin: type[Graft] = LoraHeadReader if is_head else LoraReader
    else:
        mixin = LoraHead if is_head else LoraForward
    change_class(module, grafted_class(mixin, cls) if grafted else cls)
