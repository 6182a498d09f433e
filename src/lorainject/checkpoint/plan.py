"""Plan a merge on disk: read the adapters and the checkpoint's headers, and check everything before a byte is written.

The model is built on the meta device from its config, and takes the adapters as a model in memory would. Which bytes on
disk belong to which of its weights is found by transformers' own loading rules (files/weight_map.py).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FileError, SpecError
from ..files.convert import read_source
from ..files.io.open_adapter import Hints, open_source
from ..files.io.regular_file import open_regular
from ..files.io.safetensors_file import TORCH_DTYPES, TensorEntry
from ..files.match_model import match_sites, missing_targets, warn_of_missing
from ..files.origin import adapter_origins
from ..files.record import AdapterFile, BasePrint, Problem, StoredSite, next_steps
from ..files.rename import rename_for_model
from ..files.weight_map import StoredPiece, build_meta_model, locate_weights
from ..lora.adapter import LoraAdapter, factors_at
from ..lora.model_index import ModelIndex
from ..lora.weight_kinds import DTYPES, weight_shape
from ..numerics.delta import Factors, flatten_factors
from ..numerics.fingerprint import sample_positions, samples_agree
from ..plan import Site, site_name
from ..targets.model_weights import ModelWeight, model_weights
from .byte_runs import locate_element
from .shard_writer import MergePlan, WeightUpdate
from .shards import Shard, read_shards

UNQUANTIZED = "merge into the checkpoint as it was before quantization, and quantize the result"
IN_MEMORY = "merge in memory: load the model and the adapter, then merge(reversible=False), eject, save_pretrained"


def plan_merge(
    base: Path, adapters: Any, weights: Sequence[float] | None, check_base: bool, allow_missing: bool
) -> MergePlan:
    """Return what a merge of these adapters (see merge_checkpoint) writes, after checking that everything fits.

    Warn, in the name of the caller's caller, of what had to be assumed.
    """
    sources = [adapters] if isinstance(adapters, str | Path | AdapterFile) else list(adapters)
    files = [a if isinstance(a, AdapterFile) else read_source(open_source(a, spool=True)) for a in sources]
    multipliers = [1.0] * len(files) if weights is None else [float(w) for w in weights]
    if not files or len(multipliers) != len(files) or not all(map(math.isfinite, multipliers)):
        raise SpecError(
            f"{len(files)} adapters cannot be merged with the weights {multipliers}",
            way_out="give at least one adapter, and one finite weight for each (or no weights, which means 1 each)",
        )
    checkpoint = _Checkpoint(base, files)
    updates: dict[tuple[int, str], WeightUpdate] = {}
    problems, mismatches = list[str](), list[str]()
    for number, (source, file, multiplier) in enumerate(zip(sources, files, multipliers, strict=True)):
        if file.notes and not isinstance(source, AdapterFile):  # what the file leaves open, the model tells
            hints, index = Hints(model=checkpoint.model), checkpoint.index
            file = read_source(open_source(source, spool=True), hints=hints, index=index)
        file, sites, missing = checkpoint.fit(file, allow_missing)
        known = source.notes if isinstance(source, AdapterFile) else ()
        for note in (note for note in file.notes if note not in known):
            warnings.warn(f"{file.path}: {note}", stacklevel=5)
        warn_of_missing(file, missing, stacklevel=5)
        for stored, site in zip(file.sites, sites, strict=True):
            weight = checkpoint.weights[site_name(site.path, site.parameter)]
            if reason := checkpoint.why_unwritable(weight):
                problems.append(Problem(f"{site.name}: {reason}", getattr(reason, "step", IN_MEMORY)))
                continue
            if check_base and file.base is not None and not checkpoint.has_base(weight, file.base, stored.name):
                mismatches.append(f"{site.name}: differs from the base weight that this adapter was made for")
            if weight.key not in updates:
                updates[weight.key] = checkpoint.update(weight, site_name(site.path, site.parameter))
            updates[weight.key].deltas += (_delta(stored, site, weight, multiplier),)
            updates[weight.key].sources += (number,)
    if problems:
        raise FileError(
            f"{base} cannot be merged on disk, because some of the adapted weights cannot be changed there:",
            problems,
            next_steps(problems, IN_MEMORY),
        )
    if mismatches:
        raise FileError(
            f"{base} is not the base that the adapter was made for:",
            mismatches,
            "give the checkpoint that the adapter was trained on, or accept this one: check_base=False",
        )
    origins = adapter_origins(files, multipliers)
    names = tuple(file.name for file in files)
    return MergePlan(names, tuple(multipliers), checkpoint.shards, list(updates.values()), origins)


class _Checkpoint:
    """A checkpoint on disk: its tensors, its model on the meta device, and where the model's weights are stored."""

    def __init__(self, base: Path, files: Sequence[AdapterFile]) -> None:
        self.shards = read_shards(base)
        self.tensors = {key: entry for shard in self.shards for key, entry in shard.tensors.items()}
        self.shard_of: dict[str, Shard] = {key: shard for shard in self.shards for key in shard.tensors}
        try:
            self.model = build_meta_model(base) or _build_adapted_layers(files, self.tensors)
        except Exception as e:  # whatever a model's class raises: for a missing package, or an impossible config
            raise FileError(
                f"the model of {base} cannot be built from its config.json: {e}",
                way_out="correct config.json, or install the packages that the model needs",
            ) from e
        shapes = {key: entry.shape for key, entry in self.tensors.items()}
        self._pieces, self._reasons, _ = locate_weights(self.model, shapes)
        self.index = ModelIndex(self.model)
        self.weights = {name: weight for weight in model_weights(self.index) for name in weight.names}

    def pieces(self, weight: ModelWeight) -> tuple[StoredPiece, ...]:
        """Return where the weight is stored; () if it cannot be located."""
        return self._pieces.get(_full_name(weight), ())

    def read(self, key: str) -> Tensor:
        """Read a tensor."""
        entry = self.tensors[key]
        with open_regular(self.shard_of[key].path) as f:
            f.seek(entry.start)
            raw = bytearray(f.read(entry.stop - entry.start))
        return torch.frombuffer(raw, dtype=TORCH_DTYPES[entry.dtype]).view(entry.shape)

    def read_elements(self, elements: Sequence[tuple[str, int]]) -> Tensor:
        """Read elements, each a key and a position in the flattened tensor of this key, in float32."""
        values = []
        with ExitStack() as stack:
            files = {
                key: stack.enter_context(open_regular(self.shard_of[key].path)) for key in {k for k, _ in elements}
            }
            for key, position in elements:
                dtype = TORCH_DTYPES[self.tensors[key].dtype]
                files[key].seek(self.tensors[key].start + dtype.itemsize * position)
                values.append(torch.frombuffer(bytearray(files[key].read(dtype.itemsize)), dtype=dtype).float())
        return torch.cat(values)

    def fit(self, file: AdapterFile, allow_missing: bool) -> tuple[AdapterFile, list[Site], list[str]]:
        """Return the file under the model's names, the site in the model for each of its sites, and what it lacks.

        Raise FileError with all that does not fit.
        """
        renamed = rename_for_model(file, self.index)
        problems = [f"{line}; only A and B can be merged on disk" for line in file.beside]
        problems += [
            f"{path}: the file replaces this base weight, which cannot be merged on disk"
            for path, tensor in renamed.replaced.items()
            if not self._holds(path, tensor)
        ]
        missing = missing_targets(renamed, self.weights)
        sites = match_sites(self.index, renamed, self.weights, None, problems, () if allow_missing else missing)
        return renamed, sites, missing

    def _holds(self, path: str, tensor: Tensor) -> bool:
        """True if the checkpoint already holds these values of a weight: PEFT's files may bring base weights along."""
        weight = self.weights.get(path)
        pieces = () if weight is None else self.pieces(weight)
        if len(pieces) != 1:
            return False
        entry = self.tensors[pieces[0].key]
        if entry.shape != tuple(tensor.shape) or not _is_float(entry):
            return False
        return torch.equal(self.read(pieces[0].key).to(tensor.dtype), tensor)

    def why_unwritable(self, weight: ModelWeight) -> str | None:
        """Return why the bytes of this weight cannot be changed; None if they can."""
        entries = [self.tensors[piece.key] for piece in self.pieces(weight)]
        if not entries or not all(map(_is_float, entries)):
            if quantization := self._quantization(weight):
                return Problem(f"is quantized{quantization}", UNQUANTIZED)
            return self._reasons.get(_full_name(weight), "is not in the checkpoint")
        names = {".".join(filter(None, (path, weight.parameter))) for path in weight.paths}
        parameter = weight.module._parameters[weight.parameter]
        everything = self.model.named_parameters(remove_duplicate=False)
        if tied := [name for name, p in everything if p is parameter and name not in names]:
            return Problem(f"is tied to {', '.join(tied)}, which would change too", f"{IN_MEMORY} with untie=True")
        return None

    def _quantization(self, weight: ModelWeight) -> str:
        """Return how a weight is quantized on disk, for an error; empty if it does not seem to be."""
        settings = getattr(getattr(self.model, "config", None), "quantization_config", None)
        method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
        prefix = f"{weight.paths[0]}."
        stored = {key.removeprefix(prefix): e for key, e in self.tensors.items() if key.startswith(prefix)}
        codes = [f"{key} {entry.dtype}" for key, entry in sorted(stored.items()) if not _is_float(entry)]
        return f" by {method}" * bool(method) + f", stored as {', '.join(codes)}" * bool(codes)

    def has_base(self, weight: ModelWeight, base: BasePrint, name: str) -> bool:
        """True if the weight agrees with the fingerprint that the adapter has of its base under this site name."""
        numel = math.prod(weight_shape(weight.module, weight.parameter))
        positions = sample_positions(numel, len(base.sample[name]))
        elements = [locate_element(self.pieces(weight), i) for i in positions]
        dtype = TORCH_DTYPES[self.tensors[elements[0][0]].dtype]
        return samples_agree(self.read_elements(elements), base.sample[name], dtype, base.dtype[name])

    def update(self, weight: ModelWeight, name: str) -> WeightUpdate:
        """Return the update of a weight, still without deltas."""
        pieces, shape = self.pieces(weight), weight_shape(weight.module, weight.parameter)
        return WeightUpdate(name, self.tensors[pieces[0].key].dtype, shape, weight.kind.stacked, pieces, ())


def _full_name(weight: ModelWeight) -> str:
    """Return the weight's name in model.named_parameters()."""
    return ".".join(filter(None, (weight.paths[0], weight.parameter)))


def _is_float(entry: TensorEntry) -> bool:
    return TORCH_DTYPES.get(entry.dtype) in DTYPES


def _delta(stored: StoredSite, site: Site, weight: ModelWeight, multiplier: float) -> Factors:
    """Return the delta of a site, times the multiplier, in the orientation in which the weight is stored in memory."""
    _, out, _ = weight.kind.sizes(site.shape)
    adapter = LoraAdapter(stored.A, stored.B, alpha=stored.alpha, scaling=stored.scaling, dropout=0.0,
                          init="kaiming", slices=stored.rows, out=out)  # fmt: skip
    rest = tuple(site.shape[weight.kind.stacked + 1 :])
    return flatten_factors(factors_at(adapter, multiplier, weight.kind.transposed, rest))


def _build_adapted_layers(files: Sequence[AdapterFile], tensors: Mapping[str, TensorEntry]) -> nn.Module:
    """Build the adapted layers of a model whose code transformers does not have, by the names and shapes on disk.

    Only linears and embeddings are built. With PEFT's `fan_in_fan_out` some layers may be stored (in, out); which ones,
    only the model's code could tell, so no layer is built.
    """
    model = nn.Module()
    for s in (s for file in files if not file.config.get("fan_in_fan_out") for s in file.sites):
        entry = tensors.get(f"{s.path}.weight")
        if entry is None or len(entry.shape) != 2 or s.parameter != "weight" or s.A.ndim != 2:
            continue
        if s.kind == "embedding":
            layer: nn.Module = nn.Embedding(*entry.shape, device="meta")
        elif s.kind == "linear":
            layer = nn.Linear(entry.shape[1], entry.shape[0], bias=False, device="meta")
        else:
            continue
        *parents, name = s.path.split(".")
        parent = model
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name, layer)
    return model
