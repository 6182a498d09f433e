"""Give the sites of an adapter file the names that a model has for the same weights.

A file's names can differ from the model's in four ways:

    the adapter was made on a module inside this model, or around it    encoder, bert.encoder (see also parts.py)
    the tool writes flat names of its own                               lora_unet_down_blocks_0 (kohya)
    the names are those of an image model's original code               double_blocks.0.img_attn.qkv (Flux)
    the names are those of a checkpoint, or of an older transformers    one linear per expert, a fused qkv

In the last two cases the weights are also cut in another way. What the name table says (image_model_names.py), or what
transformers' loader would do with the rows of a checkpoint's weights (checkpoint_sites.py), is then done with the rows
of B. A does not change. The update of every weight is exactly the same.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from ..errors import FileError
from ..lora.model_index import ModelIndex
from ..lora.weight_kinds import weight_shape
from ..plan import site_name
from ..targets.model_weights import ModelWeight, model_weights
from . import transforms
from .checkpoint_sites import EXPERT, convert_checkpoint_sites
from .formats.image_model_names import flux_paths, kohya_prefix, unet_name
from .parts import component_names, components, prefix_changes
from .record import AdapterFile, BasePrint, StoredSite

COMFYUI_PREFIX = "diffusion_model."


def rename_for_model(file: AdapterFile, index: ModelIndex) -> AdapterFile:
    """Return the file with the model's names for its sites. A site without a counterpart in the model keeps its name.

    Stacks of experts get the parts that the model's stacks have.

    Raises:
        FileError: If one name can mean two modules, if the file fits several parts of the model, or if it has adapters
            for several components of a pipeline.
    """
    model, modules = index.model, index.modules
    is_native = file.format == "lorainject" and file.namespace == "hf"
    if all(
        s.path in modules
        and s.parameter in modules[s.path]._parameters
        and s.A.ndim < 3
        and (is_native or s.kind == "embedding" or not s.shape)
        for s in file.sites
    ):
        return replace(file, namespace="hf")
    by_name = {name: w for w in model_weights(index) for name in w.names}
    _require_one_component(file, index, by_name)
    if all(
        s.path.startswith(COMFYUI_PREFIX) and s.path.removeprefix(COMFYUI_PREFIX) not in by_name for s in file.sites
    ):
        file = _from_comfyui(file)
    if file.namespace == "kohya":
        file = replace(file, sites=tuple(part for s in file.sites for part in _split_flux(s, by_name)))
        change = _flat_name_change(file, index)
    else:
        change = _prefix_change(file, model, by_name)
    renamed = _renamed(file, change, model, by_name)
    if is_native and not all(_weight_name(s) in by_name for s in renamed.sites):
        renamed = file
    if any(_weight_name(s) in by_name for s in renamed.sites):
        return renamed
    return _on_a_part(file, model, by_name) or renamed


def _renamed(
    file: AdapterFile, change: Callable[[str], str], model: nn.Module, by_name: Mapping[str, ModelWeight]
) -> AdapterFile:
    """Return the file with changed paths, and with the sites of a checkpoint's weights on the model's."""
    sites = [replace(s, path=change(s.path), aliases=tuple(map(change, s.aliases))) for s in file.sites]
    base = file.base
    if file.format == "lorainject" and file.namespace == "hf":  # whose names are a model's, never a checkpoint's
        new_names = {old.name: s.name for old, s in zip(file.sites, sites, strict=True)}
        base = base and BasePrint(
            dtype={new_names[name]: dtype for name, dtype in base.dtype.items()},
            sample={new_names[name]: sample for name, sample in base.sample.items()},
        )
    elif unknown := [s for s in sites if _weight_name(s) not in by_name]:
        known = [s for s in sites if _weight_name(s) in by_name]
        sites = known + convert_checkpoint_sites(unknown, model, by_name)
    return replace(
        file,
        sites=tuple(_with_model_kind(s, by_name.get(_weight_name(s))) for s in sites),
        base=base,
        replaced={change(path): t for path, t in file.replaced.items()},
        tokens={change(path): t for path, t in file.tokens.items()},
        namespace="hf",
    )


def _on_a_part(file: AdapterFile, model: nn.Module, by_name: Mapping[str, ModelWeight]) -> AdapterFile | None:
    """Return the file with the names of the part of the model that it was made for; None if it fits no part.

    Raises:
        FileError: If it fits several parts.
    """
    plain = [s for s in file.sites if not EXPERT.fullmatch(s.path)]  # transformers' rules place the experts
    changes = prefix_changes(plain, by_name) if plain else []
    if len(changes) > 1:
        raise FileError(
            f"{file.path} was made for a part of this model, or for a larger model; the shapes fit several parts:",
            [f"{plain[0].path} may be {change(plain[0].path)}" for change in changes],
            f"load it onto the part that it was made for, as in"
            f" load(model.get_submodule({changes[0].new.removesuffix('.')!r}), path)",
        )
    if not changes:
        return None
    (change,) = changes
    note = (
        f"the file has no names of this model, but those of a part of it or of a larger model: {plain[0].path} was"
        f" taken for {change(plain[0].path)}, and so on"
    )
    paths = {path for path, _ in model.named_modules()}
    part = change.new if len(change.new) > len(change.old) else ""
    renamed = _renamed(file, lambda path: path if path in paths else change(path), model, by_name)
    return replace(renamed, part=part, notes=(*file.notes, note))


def _require_one_component(file: AdapterFile, index: ModelIndex, by_name: Mapping[str, ModelWeight]) -> None:
    """Raise FileError if the file has adapters for several components of a pipeline, of which a model can be one."""
    parts = components(file)
    if len(parts) < 2:
        return
    fitting = []
    for part, sites in parts.items():
        with contextlib.suppress(FileError):
            renamed = rename_for_model(replace(file, sites=tuple(sites)), index)
            fitting += [part] * all(_weight_name(s) in by_name for s in renamed.sites)
    names = {part: " or ".join(component_names(part)) or "modules without a component's name" for part in parts}
    raise FileError(
        f"{file.path} holds adapters for several components of a pipeline, but the model is one of them at most:",
        [
            f"{names[part]}: {len(sites)} sites" + ", all of which this model has" * (part in fitting)
            for part, sites in parts.items()
        ],
        f"take those of this model: hints=Hints(component={component_names((fitting or [*parts])[0])[0]!r})",
    )


def _weight_name(s: StoredSite) -> str:
    return site_name(s.path, s.parameter)


def _with_model_kind(s: StoredSite, w: ModelWeight | None) -> StoredSite:
    """Return the site with the model's kind of weight, where other libraries' files cannot tell kinds apart.

    A convolution with a kernel of one point may be a linear, and a linear may be stored transposed.
    """
    if w is not None and s.kind == "conv" and w.kind.name == "linear" and set(s.shape[2:]) == {1}:
        return replace(s, kind="linear", shape=())
    if w is not None and s.kind == "linear" and w.kind.name == "linear^T" and s.shape:
        return replace(s, kind="linear^T", shape=s.shape[::-1])
    return _with_parts(s, w)


def _with_parts(s: StoredSite, w: ModelWeight | None) -> StoredSite:
    """Return a stack of experts with the kind and the parts that the model's stack has, if the file tells neither."""
    if w is None or s.A.ndim != 3 or not w.kind.stacked or s.label:
        return s
    if s.shape:
        return replace(s, parts=w.parts) if s.kind == w.kind.name else s
    return replace(s, kind=w.kind.name, shape=weight_shape(w.module, w.parameter), parts=w.parts)


# --- changes of names alone -------------------------------------------------------------------------------------------


def _prefix_change(file: AdapterFile, model: nn.Module, by_name: Mapping[str, ModelWeight]) -> Callable[[str], str]:
    """Return the change of the paths' prefix under which the most sites are in the model."""
    base = f"{getattr(model, 'base_model_prefix', '')}."

    def without_component(path: str) -> str:
        return path.partition(".")[2]

    changes: list[Callable[[str], str]] = [lambda p: p]
    if base != ".":
        changes += [lambda p: base + p, lambda p: p.removeprefix(base)]
    if file.namespace == "pipeline":
        changes.append(without_component)
    # transformers 4 has a level text_model in CLIP, transformers 5 has not.
    changes += [lambda p: p.removeprefix("text_model."), lambda p: f"text_model.{p}"]
    if file.namespace == "pipeline":
        changes.append(lambda p: without_component(p).removeprefix("text_model."))
        changes.append(lambda p: f"text_model.{without_component(p)}")

    def missing(change: Callable[[str], str]) -> int:
        return sum(site_name(change(s.path), s.parameter) not in by_name for s in file.sites)

    return min(changes, key=missing)


def _flat_name_change(file: AdapterFile, index: ModelIndex) -> Callable[[str], str]:
    """Return the change from kohya's flat names to the model's paths, whose dots became underscores."""
    by_flat_name: dict[str, set[str]] = {}
    for path, _ in index.walked:
        by_flat_name.setdefault(path.replace(".", "_"), set()).add(path)
    new_paths: dict[str, str] = {}
    for s in file.sites:
        name = s.path.removeprefix(kohya_prefix(s.path))
        candidates = (name, name.removeprefix("text_model_"), f"text_model_{name}", unet_name(name))
        paths = next((by_flat_name[flat] for flat in candidates if flat in by_flat_name), {s.path})
        if len(paths) > 1:
            raise FileError(
                f"{file.path}: {s.path} may mean {' or '.join(sorted(paths))}",
                way_out="rename one of these modules, or convert the file to a format whose names have dots",
            )
        (new_paths[s.path],) = paths
    return lambda path: new_paths.get(path, path)


def _from_comfyui(file: AdapterFile) -> AdapterFile:
    """Return a file of ComfyUI, which has the original code's names with dots, under kohya's flat names."""
    sites = [replace(s, path="lora_unet_" + s.path.removeprefix(COMFYUI_PREFIX).replace(".", "_")) for s in file.sites]
    return replace(file, sites=tuple(sites), namespace="kohya")


def _split_flux(s: StoredSite, by_name: Mapping[str, ModelWeight]) -> list[StoredSite]:
    """Split a site on a fused weight of the original Flux into sites on diffusers' modules; keep any other site."""
    paths = flux_paths(s.path.removeprefix(kohya_prefix(s.path)))
    if not paths or not all(path in by_name for path in paths):
        return [s]
    sizes = [by_name[path].module._parameters["weight"].shape[0] for path in paths]  # type: ignore[union-attr]
    if sum(sizes) != s.B.shape[0]:
        return [s]
    ends = itertools.accumulate(sizes)
    return transforms.split_rows(
        s, {path: [range(end - n, end)] for path, n, end in zip(paths, sizes, ends, strict=True)}
    )
