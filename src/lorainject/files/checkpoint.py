"""Merge into a checkpoint on disk, shard by shard, without loading the model: `merge_checkpoint`.

dtype, shape and header of every tensor stay the same, so a shard is copied, and only the bytes of adapted tensors take a way through
memory, one tile at a time. A new directory is built beside the place where it shall be, and renamed at the end; nothing else
is ever to be seen there.
"""

from __future__ import annotations

import errno
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Weight
from ..anatomy import weights as weights_of
from ..blocks import Product, double, quick
from ..errors import FileError, MergeError, SpecError
from ..fingerprint import agree
from ..fingerprint import places as sample_places
from ..fold import Desk, Fold, Measured
from ..lowrank import Factors, LowRank, factors, flattened
from ..merge import MergeReport, judge, merged_site
from ..spec import Site, site_name
from ..workers import workers
from .adapter import fitted
from .convert import understood
from .naming import named_as
from .patches import Patch, find, patches
from .places import Place, meta_model, places
from .record import AdapterFile, BasePrint, StoredSite
from .shards import BYTES, DTYPES, INDEX, OTHER_WEIGHTS, Shard, Stored, scan
from .source import Hints, open_source
from .transaction import Meter, Progress, building, copy, hasten, new, opened


def merge_checkpoint(base_dir: str | Path, adapters: str | Path | AdapterFile | Sequence[str | Path | AdapterFile], out_dir: str | Path, *,
                     weights: Sequence[float] | None = None, strict: bool = False, check_base: bool = True,
                     progress: Progress | None = None) -> MergeReport:  # fmt: skip
    """Write a copy of the checkpoint in `base_dir` with W0 + s B A in it to `out_dir`, which must not exist or be empty.

    The bits of every tensor are those that load, merge and save_pretrained give; memory is one tile's, whatever the model's size. Names,
    order, dtypes, headers, index, config and all files beside the weights stay as they are. Several adapters are added with these
    `weights` (1 each), and rounded once. `progress(done, total)` is called with bytes.

    Raises FileError with all that does not fit, MergeError where a sum is not finite, or with `strict=True` where less than 0.9
    of a delta survives the rounding (else a SurvivalWarning). In any case, and if killed, `out_dir` is as it was.
    """
    base, out = Path(base_dir), Path(out_dir)
    plan = plan_merge(base, adapters, weights, check_base)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out} already exists", way_out="name a directory that does not, or is empty")
    if out.resolve().is_relative_to(base.resolve()):
        raise FileError(f"{out} lies in the checkpoint that is to be merged", way_out="name a directory outside of it")
    beside = list(_beside(base, plan.shards))
    meter = Meter(sum(s.size for s in plan.shards) + sum(p.stat().st_size for p in beside), progress)
    with building(out) as folder:
        for path in beside:
            target = folder / path.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as source, new(target) as f:
                copy(source.fileno(), f, 0, os.fstat(source.fileno()).st_size, meter)
        for shard in plan.shards:
            with opened(shard) as source, new(folder / shard.path.name) as f:
                plan.write(shard, source, f, meter)
        report = plan.report()
        judge(report.sites, strict, stacklevel=3)
    return report


@dataclass
class Sum:
    """A parameter's deltas, where it lies on disk, and what the fold measures."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stacked: bool
    places: tuple[Place, ...]
    parts: tuple[Factors, ...]
    measured: Measured = field(default_factory=lambda: Measured.total(()))
    """Of what has been folded."""
    norm: float = 0.0
    """Of all of it, once all of it has been written."""
    written: set[str] = field(default_factory=set)
    """Keys on disk."""

    def patches(self, key: str) -> Iterator[Patch]:
        """Of one tensor on disk."""
        return (patch for place in self.places if place.key == key for patch in patches(place, self.shape, self.stacked, self.parts))

    def close(self, key: str) -> None:
        """This tensor is written; after the last one A and B are not needed any more."""
        self.written.add(key)
        if self.written == {place.key for place in self.places}:
            self.norm, self.parts = double(self.parts).norm, ()


@dataclass
class MergePlan:
    """All that a merge will write, checked; nothing has been read but headers and a few values."""

    names: tuple[str, ...]
    shards: list[Shard]
    sums: list[Sum]

    def write(self, shard: Shard, source: int, target: int | None, meter: Meter, keep: Callable[[str, Patch, Fold], None] | None = None) -> None:
        """Copy a shard, with the sums in it. Without a target they are only measured; `keep` takes each patch's journal."""
        done, by_key, problems, desk = 0, self._by_key(), [], Desk()
        with workers() as each:
            for key, stored in shard.tensors.items():
                if key not in by_key:
                    continue
                found = [(s, patch) for s in by_key[key] for patch in s.patches(key)]
                streamed = all(p.whole for _, p in found) and sum(p.width * len(p.starts) for _, p in found) == math.prod(stored.shape)
                if target is not None:
                    copy(source, target, done, stored.start if streamed else stored.stop, meter)
                for s, patch in found:
                    tally = Fold(desk)
                    cut = patch.factors()
                    of = double(cut) if keep else quick(cut, DTYPES[stored.dtype])
                    try:
                        each(partial(_fold, tally, patch, stored, source, target, of, keep is not None), enumerate(of.tiles()))
                    except MergeError as e:
                        problems.append(f"{s.name}: {e}")
                        continue
                    s.measured = Measured.total((s.measured, tally.measured))
                    if keep is not None:
                        keep(key, patch, tally)
                    if streamed and target is not None:
                        meter.add(patch.width * len(patch.starts) * BYTES[stored.dtype])
                for s in by_key[key] if target is not None else ():
                    s.close(key)
                done = stored.stop
        if target is not None:
            copy(source, target, done, shard.size, meter)
        if problems:
            raise MergeError("nothing was merged:", problems, "lower alpha or the weights, or merge into a copy of the model in a wider dtype")

    def _by_key(self) -> dict[str, list[Sum]]:
        found: dict[str, list[Sum]] = {}
        for s in self.sums:
            for key in dict.fromkeys(place.key for place in s.places):
                found.setdefault(key, []).append(s)
        return found

    def touches(self, shard: Shard) -> bool:
        """Whether anything in it changes."""
        return not self._by_key().keys().isdisjoint(shard.tensors)

    def forget(self) -> None:
        """What was measured."""
        for s in self.sums:
            s.measured = Measured.total(())

    def report(self) -> MergeReport:
        """What became of the deltas."""
        sites = (merged_site(s.name, double(s.parts).norm if s.parts else s.norm, s.measured, math.prod(s.shape) * BYTES[s.dtype]) for s in self.sums)
        return MergeReport(names=self.names, sites=tuple(sites))


# --- planning


def plan_merge(base: Path, adapters: Any, weights: Sequence[float] | None, check_base: bool) -> MergePlan:
    """Read the adapters and the checkpoint's headers, and find each delta's bytes. Raises FileError with all that does not fit."""
    asked = [adapters] if isinstance(adapters, str | Path | AdapterFile) else list(adapters)
    files = [a if isinstance(a, AdapterFile) else understood(open_source(a, spool=True)) for a in asked]
    factor = [1.0] * len(files) if weights is None else [float(w) for w in weights]
    if not files or len(factor) != len(files) or not all(map(math.isfinite, factor)):
        raise SpecError(f"{len(files)} adapters and the weights {factor}", way_out="give each adapter one weight, a finite number")
    found = scan(base)
    disk = Disk(found)
    try:
        model = meta_model(base) or _skeleton(files, disk)
    except Exception as e:  # whatever a model's class raises: a package that it needs is missing, a config it can't be built from
        raise FileError(f"the model of {base} can't be built from its config.json: {e}", way_out="mend it, or install what it asks for") from e
    at, reasons, _ = places(model, {key: t.shape for key, t in disk.tensors.items()})
    by_name = {n: w for w in weights_of(model) for n in w.names}
    sums: dict[tuple[int, str], Sum] = {}
    problems, strange = [], []
    for given, file, times in zip(asked, files, factor, strict=True):
        if file.notes and not isinstance(given, AdapterFile):  # what was taken for granted, the model tells
            file = understood(open_source(given, spool=True), hints=Hints(model=model))
        own = file.format == "lorainject"  # whose fingerprint goes by its own names
        named = _named_as(file, model, by_name) if own else named_as(file, model)
        wrong = [f"{line}; merging does not put it on yet" for line in file.beside]
        wrong += [f"{path}: {reason}" for path, t in named.replaced.items() if (reason := _replaced(by_name.get(path), t, at, disk))]
        for ours, site in zip((file if own else named).sites, fitted(model, named, by_name, None, wrong), strict=True):
            weight = by_name[site_name(site.path, site.parameter)]
            lies = at.get(full_name(weight), ())
            if reason := reasons.get(full_name(weight)) or _unwritable(weight, model, lies, disk):
                problems.append(f"{site.name}: {reason}")
                continue
            if check_base and file.base is not None and not _same(disk, lies, weight, file.base, ours.name):
                strange.append(f"{site.name}: another base weight than the one this adapter was made for")
            if weight.key not in sums:
                shape = tuple(weight.module._parameters[weight.parameter].shape)  # type: ignore[union-attr]
                sums[weight.key] = Sum(site_name(site.path, site.parameter), disk.tensors[lies[0].key].dtype, shape, weight.kind.stacked, lies, ())
            sums[weight.key].parts += (_factors(ours, site, weight, times),)
    if problems:
        raise FileError(f"{base} can't be merged into on disk:", problems, "load the model and merge in memory: load, merge(reversible=False), eject,"
                        " save_pretrained")  # fmt: skip
    if strange:
        raise FileError(f"{base} is not the base that the adapter was made for:", strange, "give its own base, or accept this one: check_base=False")
    return MergePlan(tuple(f.name for f in files), found, list(sums.values()))


class Disk:
    """The tensors of all shards."""

    def __init__(self, found: Sequence[Shard]) -> None:
        self.tensors = {key: t for shard in found for key, t in shard.tensors.items()}
        self.shard = {key: shard.path for shard in found for key in shard.tensors}

    def read(self, key: str, element: int | None = None) -> Tensor:
        """A tensor, or one element of it."""
        t = self.tensors[key]
        size, start = (t.stop - t.start, t.start) if element is None else (BYTES[t.dtype], t.start + BYTES[t.dtype] * element)
        with self.shard[key].open("rb") as f:
            f.seek(start)
            return torch.frombuffer(bytearray(f.read(size)), dtype=DTYPES[t.dtype]).view(t.shape if element is None else (1,))


def full_name(w: Weight) -> str:
    """As in model.named_parameters()."""
    return ".".join(filter(None, (w.paths[0], w.parameter)))


def _factors(ours: StoredSite, site: Site, w: Weight, times: float) -> Factors:
    _, out, _ = w.kind.sizes(site.shape)
    low = LowRank(ours.A, ours.B, alpha=ours.alpha * times, scaling=ours.scaling, dropout=0.0, init="kaiming", slices=ours.rows, out=out)
    return flattened(factors(low, w.kind.transposed, tuple(site.shape[w.kind.stacked + 1 :])))


def _unwritable(w: Weight, model: nn.Module, lies: Sequence[Place], disk: Disk) -> str | None:
    """Why this weight's bytes can't be written; None if they can."""
    if not lies:
        return "is nowhere in the checkpoint"
    if odd := {disk.tensors[p.key].dtype for p in lies} - DTYPES.keys():
        return f"is stored as {', '.join(sorted(odd))}, quantised: merge into the checkpoint that this one was made from"
    mine = {".".join(filter(None, (path, w.parameter))) for path in w.paths}
    parameter = w.module._parameters[w.parameter]
    if tied := [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter and n not in mine]:
        return f"is tied to {', '.join(tied)}, which the fold would change as well (in memory, merge(model, untie=True) parts them)"
    return None


def _same(disk: Disk, lies: Sequence[Place], w: Weight, base: BasePrint, name: str) -> bool:
    found = [find(lies, i) for i in sample_places(w.module._parameters[w.parameter].numel())]  # type: ignore[union-attr]
    mine = torch.cat([disk.read(key, i).float() for key, i in found])
    return agree(mine, base.sample[name], DTYPES[disk.tensors[found[0][0]].dtype], base.dtype[name])


def _replaced(w: Weight | None, tensor: Tensor, at: Mapping[str, Sequence[Place]], disk: Disk) -> str | None:
    """PEFT lets whole base weights come along: fine where they are what is there already."""
    lies = at.get(full_name(w), ()) if w is not None else ()
    alike = len(lies) == 1 and disk.tensors[lies[0].key].shape == tuple(tensor.shape) and disk.tensors[lies[0].key].dtype in DTYPES
    if alike and torch.equal(disk.read(lies[0].key).to(tensor.dtype), tensor):
        return None
    return "the file brings a whole base weight that is not this checkpoint's; adapters that replace weights are not supported"


def _named_as(file: AdapterFile, model: nn.Module, by_name: Mapping[str, Weight]) -> AdapterFile:
    """With its paths as in this model, if it was made on the model inside this one (or the other way round): `bert.encoder` and `encoder`."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def renamed(change: Callable[[str], str]) -> AdapterFile:
        sites = tuple(replace(s, path=change(s.path), aliases=tuple(map(change, s.aliases))) for s in file.sites)
        return replace(file, sites=sites, replaced={change(p): t for p, t in file.replaced.items()})

    candidates = [lambda path: path, lambda path: prefix + path, lambda path: path.removeprefix(prefix)] if prefix != "." else []
    fits = (f for f in map(renamed, candidates) if all(site_name(s.path, s.parameter) in by_name for s in f.sites))
    return next(fits, file)


def _skeleton(files: Sequence[AdapterFile], disk: Disk) -> nn.Module:
    """For a checkpoint whose code is its own: the adapted layers, as far as a matrix of the file's name and shape is on disk.

    PEFT's `fan_in_fan_out` may mean some of the layers: which are stored (in, out), only their code could tell.
    """
    root = nn.Module()
    for s in (s for file in files if not file.config.get("fan_in_fan_out") for s in file.sites):
        stored = disk.tensors.get(f"{s.path}.weight")
        if stored is None or len(stored.shape) != 2 or s.parameter != "weight" or s.A.ndim != 2 or s.kind not in ("linear", "embedding"):
            continue
        layer: Any = nn.Linear(stored.shape[1], stored.shape[0], bias=False, device="meta")
        if s.kind == "embedding":
            layer = nn.Embedding(*stored.shape, device="meta")
        *parents, leaf = s.path.split(".")
        at = root
        for part in parents:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]  # type: ignore[assignment]
        at.add_module(leaf, layer)
    return root


# --- bytes


def get(desk: Desk, source: int, stored: Stored, patch: Patch, rows: slice) -> Tensor:
    """A tile's elements (runs, width). This thread's next call overwrites them."""
    values = desk.room("read", (rows.stop - rows.start, patch.width), DTYPES[stored.dtype])
    for offset, run in _extents(stored, patch, rows, values):
        if os.preadv(source, [run], offset) != len(run):
            raise OSError(errno.EIO, "a shard became shorter while it was read")
    return values


def _fold(tally: Fold, patch: Patch, stored: Stored, source: int, target: int | None, of: Product, keep: bool, i: int, rows: slice) -> None:
    w0 = get(tally.desk, source, stored, patch, rows)
    m = tally.keep(i, w0, of.at(rows)) if keep else tally.sum(i, w0, of.at(rows))
    if target is not None:
        put(target, stored, patch, rows, m)


def put(target: int, stored: Stored, patch: Patch, rows: slice, values: Tensor) -> None:
    """Write a tile back."""
    for offset, run in _extents(stored, patch, rows, values.contiguous()):
        while run:
            n = os.pwrite(target, run, offset)
            if patch.whole:
                hasten(target, offset, n)
            run, offset = run[n:], offset + n


def _extents(stored: Stored, patch: Patch, rows: slice, values: Tensor) -> Iterator[tuple[int, memoryview]]:
    """Where the tile's bytes are in the file, with the memory that holds them: all at once if they follow each other there."""
    raw = memoryview(values.view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]
    starts, size = patch.starts[rows], values.itemsize
    step = len(raw) if patch.whole else patch.width * size
    for i, start in enumerate(starts[:1] if patch.whole else starts):
        yield stored.start + int(start) * size, raw[i * step : (i + 1) * step]


def _beside(base: Path, found: Sequence[Shard]) -> Iterator[Path]:
    """All other files of the model; warns of weights in other formats, which would be the unmerged ones."""
    mine, left = {shard.path for shard in found}, []
    for path in sorted(base.rglob("*")):
        if path in mine or not path.is_file() or any(part.startswith(".") for part in path.relative_to(base).parts):
            continue
        if path.name.endswith((*OTHER_WEIGHTS, ".index.json")) and path.name != INDEX:
            left.append(str(path.relative_to(base)))
        else:
            yield path
    if left:
        warnings.warn(f"{', '.join(left[:5])}{', ...' * (len(left) > 5)}: not copied, since nothing was merged into these weights", stacklevel=4)
