"""A file's names in a model's words: `named_as`.

An adapter may have been made on the model inside this one (`encoder` and `bert.encoder`), by a tool that writes its own names (kohya's
`lora_unet_down_blocks_0`), or on an older transformers, where each expert was a linear of its own and a fused qkv was one weight. What
transformers' loader would do to the weights of that name (places.py), is done to the rows of B; A stays. That is exact.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import FileError
from ..lora.adapter_dict import walk
from ..plan import site_name
from ..targets.matcher import parts_of
from ..targets.model_weights import Weight, weights
from . import transforms
from .formats import dialects
from .record import AdapterFile, StoredSite
from .weight_map import StoredPiece, StridedView, locate_weights

ORIGINAL = "diffusion_model."
EXPERT = re.compile(r"(?P<before>.*\.experts)\.(?P<n>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj|w1|w2|w3)")
LEAVES = {"gate_proj": ("gate_proj", "up_proj", "down_proj"), "w1": ("w1", "w3", "w2")}  # gate, up, down
# For each of kohya's prefixes the part of a pipeline that it may mean, as diffusers calls it; the longer prefixes first.
PREFIXES = {"lora_prior_unet_": ("prior",), "lora_unet_": ("unet", "transformer"), "lora_transformer_": ("transformer",),
            "lora_te1_": ("text_encoder",), "lora_te2_": ("text_encoder_2",), "lora_te3_": ("text_encoder_3",), "lora_te_": ("text_encoder",),
            "lycoris_": ("unet", "transformer")}  # fmt: skip


def of_component(file: AdapterFile, component: str) -> AdapterFile:
    """What belongs to one part of a pipeline; where the parts have names of their own, under the part's."""
    if file.namespace == "kohya":
        return replace(file, sites=tuple(s for s in file.sites if component in PREFIXES.get(prefix_of(s.path), ())))
    if file.namespace == "pipeline":
        sites = tuple(
            replace(s, path=s.path.partition(".")[2]) for s in file.sites if s.path.startswith(f"{component}.")
        )
        return replace(file, sites=sites, namespace="hf")
    return file


def named_as(file: AdapterFile, model: nn.Module) -> AdapterFile:
    """The file with the paths that its sites have in this model, as far as they can be found; our own files are not touched.

    Raises FileError where two names of the file mean one weight, or a name means two.
    """
    if file.format == "lorainject" and file.namespace == "hf":
        return file
    there = dict(walk(model))
    if all(
        s.path in there and s.parameter in there[s.path]._parameters and (s.kind == "embedding" or not s.shape)
        for s in file.sites
    ):
        return replace(file, namespace="hf")
    by_name = {n: w for w in weights(model) for n in w.names}
    if all(s.path.startswith(ORIGINAL) and s.path.removeprefix(ORIGINAL) not in by_name for s in file.sites):
        flat = tuple(
            replace(s, path="lora_unet_" + s.path.removeprefix(ORIGINAL).replace(".", "_")) for s in file.sites
        )
        file = replace(
            file, sites=flat, namespace="kohya"
        )  # ComfyUI's, with the dots of the names that kohya has without
    if file.namespace == "kohya":
        file = replace(file, sites=tuple(part for s in file.sites for part in _unfused(s, by_name)))
    change = _flat(file, model) if file.namespace == "kohya" else _inside(file, model, by_name)
    sites = tuple(replace(s, path=change(s.path), aliases=tuple(map(change, s.aliases))) for s in file.sites)
    replaced, tokens = {change(p): t for p, t in file.replaced.items()}, {change(p): t for p, t in file.tokens.items()}
    if strange := [s for s in sites if _name(s) not in by_name]:
        known = tuple(s for s in sites if _name(s) in by_name)
        sites = known + tuple(_converted(strange, model, by_name))
    return replace(
        file,
        sites=tuple(_of_kind(s, by_name.get(_name(s))) for s in sites),
        replaced=replaced,
        tokens=tokens,
        namespace="hf",
    )


def _name(s: StoredSite) -> str:
    return site_name(s.path, s.parameter)


def _of_kind(s: StoredSite, w: Weight | None) -> StoredSite:
    """Other libraries' files don't tell a linear from one that is stored (in, out), or from a convolution of a single point."""
    if w is not None and s.kind == "conv" and w.kind.name == "linear" and set(s.shape[2:]) == {1}:
        return replace(s, kind="linear", shape=())
    if w is not None and s.kind == "linear" and w.kind.name == "linear^T" and s.shape:
        return replace(s, kind="linear^T", shape=s.shape[::-1])
    return s


def _inside(file: AdapterFile, model: nn.Module, by_name: Mapping[str, Weight]) -> Callable[[str], str]:
    """The change of prefix under which the most sites are there; none, if none helps."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    changes: list[Callable[[str], str]] = [lambda path: path]
    if prefix != ".":
        changes += [lambda path: prefix + path, lambda path: path.removeprefix(prefix)]
    if file.namespace == "pipeline":
        changes += [lambda path: path.partition(".")[2]]
    changes += [
        lambda path: path.removeprefix("text_model."),
        lambda path: f"text_model.{path}",
    ]  # CLIP's, in transformers 4 and not in 5
    if file.namespace == "pipeline":
        changes += [
            lambda path: path.partition(".")[2].removeprefix("text_model."),
            lambda path: f"text_model.{path.partition('.')[2]}",
        ]
    missing = [sum(site_name(change(s.path), s.parameter) not in by_name for s in file.sites) for change in changes]
    return changes[missing.index(min(missing))]


def _flat(file: AdapterFile, model: nn.Module) -> Callable[[str], str]:
    """By a table of the model's own paths, since an underscore may have been a dot or not."""
    table: dict[str, set[str]] = {}
    for path, _ in walk(model):
        table.setdefault(path.replace(".", "_"), set()).add(path)
    found: dict[str, str] = {}
    for s in file.sites:
        bare = s.path[len(prefix_of(s.path)) :]
        tries = (bare, bare.removeprefix("text_model_"), f"text_model_{bare}", dialects.unet(bare))
        known = next((table[flat] for flat in tries if flat in table), {s.path})
        if len(known) > 1:
            raise FileError(
                f"{file.path}: {s.path} may mean {' or '.join(sorted(known))}", way_out="rename one of the modules"
            )
        found[s.path] = next(iter(known))
    return lambda path: found.get(path, path)


def _unfused(s: StoredSite, by_name: Mapping[str, Weight]) -> list[StoredSite]:
    """A site under one of Flux's own names as sites on diffusers' modules, which have the rows of the fused weight apart; as it is otherwise."""
    paths = dialects.flux(s.path[len(prefix_of(s.path)) :])
    if not paths or not all(path in by_name for path in paths):
        return [s]
    ends = [0, *itertools.accumulate(by_name[path].module._parameters["weight"].shape[0] for path in paths)]  # type: ignore[union-attr]
    if ends[-1] != s.B.shape[0]:
        return [s]
    return transforms.split_rows(
        s, {path: [range(start, end)] for path, start, end in zip(paths, ends, ends[1:], strict=False)}
    )


def prefix_of(flat: str) -> str:
    """What kohya's names begin with: lora_unet_, lora_te1_, ...; empty if with none of them."""
    return next((p for p in PREFIXES if flat.startswith(p)), "")


# --- what transformers would convert -----------------------------------------------------------------------------------


def _converted(sites: list[StoredSite], model: nn.Module, by_name: Mapping[str, Weight]) -> Iterator[StoredSite]:
    """Sites under a checkpoint's names as sites on the parameters in memory; as they were, where the way is not known."""
    movable = {
        f"{s.path}.weight": s
        for s in sites
        if s.parameter == "weight" and s.kind == "linear" and s.A.ndim == 2 and s.magnitude is None
    }
    shapes = {key: (s.B.shape[0], s.A.shape[1]) for key, s in movable.items()}
    found, _, _ = locate_weights(model, _with_siblings(shapes, model))
    moved: dict[tuple[str, range], dict[int, StoredSite]] = {}
    for name, at in found.items():
        weight = by_name.get(name.removesuffix(".weight"))
        for place in at:
            if weight is None or place.key not in movable or (where := _rows(place, weight, shapes[place.key])) is None:
                continue
            expert, mine, its = where
            moved.setdefault((weight.names[0], mine), {})[expert] = replace(
                movable[place.key], B=movable[place.key].B[its.start : its.stop]
            )
    for (name, rows), experts in moved.items():
        yield _site(by_name[name], rows, experts)
    done = {id(movable[place.key]) for at in found.values() for place in at if place.key in movable}
    yield from (s for s in sites if id(s) not in done)


def _with_siblings(shapes: Mapping[str, tuple[int, int]], model: nn.Module) -> dict[str, tuple[int, int]]:
    """With the experts and parts that the file has no adapter for: transformers stacks what it is given."""
    whole = dict(shapes)
    count = max((p.shape[0] for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name), default=0)
    for key, (out, in_) in shapes.items():
        if (at := EXPERT.fullmatch(key.removesuffix(".weight"))) is None:
            continue
        leaves = LEAVES["w1" if at["leaf"].startswith("w") else "gate_proj"]
        narrow = (out, in_) if at["leaf"] != leaves[2] else (in_, out)  # gate's and up's
        for n in range(max(count, int(at["n"]) + 1)):
            for leaf in leaves:
                whole.setdefault(f"{at['before']}.{n}.{leaf}.weight", narrow if leaf != leaves[2] else narrow[::-1])
    return whole


def _rows(place: StoredPiece, w: Weight, shape: tuple[int, int]) -> tuple[int, range, range] | None:
    """Which expert (0 if there are none) and rows of the weight are which rows of the tensor; None if it isn't rows that move."""
    whole = tuple(w.module._parameters[w.parameter].shape)  # type: ignore[union-attr]
    n, width = math.prod(place.disk.sizes), shape[1]
    if (
        whole[-1] != width
        or w.kind.transposed
        or not (_dense(place.disk) and _dense(place.memory))
        or n % width
        or place.disk.offset % width
    ):
        return None
    one = math.prod(whole[-2:])
    first, its = place.memory.offset % one // width, place.disk.offset // width
    return place.memory.offset // one, range(first, first + n // width), range(its, its + n // width)


def _dense(view: StridedView) -> bool:
    return all(stride == math.prod(view.sizes[i + 1 :]) for i, stride in enumerate(view.strides))


def _site(w: Weight, rows: range, experts: Mapping[int, StoredSite]) -> StoredSite:
    """One site on these rows of the weight; of a stack, with zeros for the experts that have no adapter."""
    shape = tuple(w.module._parameters[w.parameter].shape)  # type: ignore[union-attr]
    first, r = next(iter(experts.values())), max(s.r for s in experts.values())
    alike = {e: transforms.with_scale_folded(transforms.with_rank(s, r), first.scale) for e, s in experts.items()}
    label = (
        ""
        if len(rows) == shape[-2]
        else next((k for k, v in parts_of(w).items() if v == (rows,)), f"{rows.start}:{rows.stop}")
    )
    stack = len(shape) == 3
    A, B = (_stacked([getattr(alike.get(e), half, None) for e in range(shape[0] if stack else 1)]) for half in "AB")
    one = next(iter(alike.values()))
    return replace(one, path=w.paths[0], parameter=w.parameter, label=label, rows=(rows,) if label else None, kind=w.kind.name, shape=shape,
                   A=A if stack else A[0], B=B if stack else B[0])  # fmt: skip


def _stacked(parts: list[Tensor | None]) -> Tensor:
    like = next(p for p in parts if p is not None)
    transforms.checked_shape("a stack of experts", len(parts), *like.shape)
    return torch.stack([torch.zeros_like(like) if p is None else p.to(like.dtype) for p in parts])
