"""Which part of a model, or which component of an image pipeline, the sites of an adapter file are for.

A file of an image pipeline may hold adapters for several components, each of which is a model. Hints(component=...)
takes the sites of one.

A language model may be a part of a larger one: a vision-language model has `model.language_model.layers` where the text
model has `model.layers`. The two names differ by levels that were inserted or left out in front of one part of the
paths, the same for all sites. `prefix_changes` finds the places in a model to which all sites of a file can go in this
way. If there are several, the shapes of A and B decide; if they do not, the file is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..lora.weight_kinds import weight_shape
from ..plan import site_name
from ..targets.model_weights import ModelWeight
from .formats.image_model_names import PREFIXES, kohya_prefix
from .record import AdapterFile, Problem, StoredSite

COMFYUI = "diffusion_model"  # what ComfyUI calls the unet or the transformer of any pipeline
FLUX_T5 = {"text_encoder_2": "lora_te3_"}  # Flux's T5, the third text encoder for kohya, is diffusers' second one


def components(file: AdapterFile) -> dict[str, list[StoredSite]]:
    """Return the sites by component, as the file calls it: by kohya's prefix, or by the first part of the path."""
    parts: dict[str, list[StoredSite]] = {}
    for s in file.sites if file.namespace in ("kohya", "pipeline") else ():
        part = kohya_prefix(s.path) if file.namespace == "kohya" else s.path.partition(".")[0]
        parts.setdefault(part, []).append(s)
    return parts


def component_names(part: str) -> tuple[str, ...]:
    """Return diffusers' names for a component of `components`."""
    return PREFIXES.get(part) or (("unet", "transformer") if part == COMFYUI else (part,))


def select_component(file: AdapterFile, component: str, problems: list[str]) -> AdapterFile:
    """Return the file with only the sites on one component of a pipeline, such as "unet" or "text_encoder".

    Paths then start below the component, except for kohya's flat names and ComfyUI's names, which keep their prefix.
    A line in `problems` says which components the file has if it lacks this one.
    """
    parts = components(file)
    if not parts:
        return file
    chosen = [part for part in parts if component in (part, *component_names(part))]
    chosen = chosen or [part for part in parts if FLUX_T5.get(component) == part]
    if not chosen:
        held = ", ".join(f"{' or '.join(component_names(part)) or 'no name'}" for part in parts)
        line = f"it holds no A and B of {component}: its components are {held}"
        first = component_names(next(iter(parts)))[0]
        step = f"pass hints=Hints(component={first!r}), or no component" if first else "pass no component"
        problems.append(Problem(line, step))
    sites = [s for part in chosen for s in parts[part]]
    if file.namespace == "kohya" or COMFYUI in chosen:
        return replace(file, sites=tuple(sites))
    sites = [replace(s, path=s.path.removeprefix(f"{component}.")) for s in sites]
    return replace(file, sites=tuple(sites), namespace="hf")


class PrefixChange(NamedTuple):
    """What is put in the place of the first part of every path."""

    old: str
    """What the paths begin with, with a dot at the end; or empty."""
    new: str

    def __call__(self, path: str) -> str:
        """Return the changed path."""
        return self.new + path.removeprefix(self.old) if path.startswith(self.old) else path


def prefix_changes(sites: Sequence[StoredSite], weights: Mapping[str, ModelWeight]) -> list[PrefixChange]:
    """Return the changes of a prefix under which every site fits a weight of the model.

    A change inserts levels into the beginning of the paths or leaves levels out. Layer numbers stay, and as much of the
    paths as possible. Several changes are returned only if each leads to other weights.
    """
    paths = [s.path.split(".") for s in sites]
    levels_of_all = zip(*(path[:-1] for path in paths), strict=False)
    common = [level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels_of_all)]
    first = site_name(sites[0].path, sites[0].parameter)
    for n in range(len(common) + 1):
        if n and common[n - 1].isdigit():
            break
        old = "".join(f"{part}." for part in common[:n])
        tail = first.removeprefix(old)
        fronts = [name.removesuffix(tail) for name in weights if name == tail or name.endswith(f".{tail}")]
        changes: dict[tuple[object, ...], PrefixChange] = {}
        for new in fronts:
            change, levels = PrefixChange(old, new), new.split(".")[:-1]
            if _contains(levels, common[:n]) or _contains(common[:n], levels):
                fitting = [_fitting_weight(change, s, weights) for s in sites]
                if all(w is not None for w in fitting):
                    changes.setdefault(tuple(w.key for w in fitting if w is not None), change)
        if changes:
            return list(changes.values())
    return []


def _contains(longer: Sequence[str], shorter: Sequence[str]) -> bool:
    """True if the levels of `shorter` are among those of `longer`, in the same order."""
    rest = iter(longer)
    return all(level in rest for level in shorter)


def _fitting_weight(change: PrefixChange, s: StoredSite, weights: Mapping[str, ModelWeight]) -> ModelWeight | None:
    """Return the weight that a site has after the change, if there is one of the shape for which A and B are made."""
    weight = weights.get(site_name(change(s.path), s.parameter))
    if weight is None or min(s.A.ndim, s.B.ndim) < 2:
        return None
    *_, out, in_ = weight.kind.sizes(weight_shape(weight.module, weight.parameter))
    return weight if s.A.shape[-1] == in_ and (s.rows is not None or s.B.shape[-2] == out) else None
