"""A LoRA from a full fine-tune, or from a checkpoint that was merged: `extract`.

    D = W_tuned - W_base is about s B A        the truncated SVD of D, the best approximation of its rank

Both checkpoints are read from disk, one matrix at a time. A large matrix is decomposed with random vectors
(numerics/low_rank.py). What is not low-rank (norms, biases, a matrix whose change needs as many numbers as it has
itself) is listed, or comes along as whole tensors.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.copying import Meter, Progress
from ..checkpoint.shards import fingerprint, read_shards
from ..errors import FileError, SpecError
from ..files.io.regular_file import as_path
from ..files.origin import made_by
from ..files.record import BasePrint, StoredSite
from ..files.save_load import why_not_peft
from ..lora.model_index import ModelIndex
from ..lora.weight_kinds import weight_shape
from ..numerics.fingerprint import sample_positions
from ..numerics.modes import in_default_modes
from ..targets.model_weights import ModelWeight, model_weights
from .pairs import Pair, opened
from .rank_search import LowRankPart, Rank, find_low_rank
from .reduce import Approximation, ReducedSite
from .stored_weights import StoredModel, build_model, full_name, keys_of

SAME_MODEL = "give two checkpoints of one model: the base, and what was trained or merged from it"


@in_default_modes
def extract(base: str | Path, tuned: str | Path, r: Rank = "auto", *, error: float | None = None, whole: bool = False,
            name: str = "default", progress: Progress | None = None) -> Approximation:  # fmt: skip
    """Return the adapter that makes a base into a tuned checkpoint, as far as the change is low-rank.

    Args:
        base: The directory of the base.
        tuned: The directory of a full fine-tune of it, or of a merged checkpoint.
        r: The rank of every site, or "auto": what stands above the noise that rounding to the stored dtype leaves. The
            notes of the result say how sure each rank is.
        error: Instead of `r`, the highest relative error of a site, |D - B A| / |D|; each gets the lowest rank for it.
        whole: Take what changed and is not low-rank along as whole tensors, instead of listing it in `left_out`.
        name: The name of the adapter.
        progress: Called with the bytes done and the bytes in total.

    Returns:
        A record with a site per changed weight, its errors, and a fingerprint of the base. Unchanged weights have none.

    Raises:
        SpecError: The rank is impossible, or both `r` and `error` are set.
        FileError: A checkpoint cannot be read, or the two are not of one model; what does not fit is listed.
    """
    rank = _checked_rank(r, error)
    folder = as_path(base)
    shards = read_shards(folder), read_shards(as_path(tuned))
    with opened(*shards) as pair:
        found = _Extraction(folder, pair, rank, error, whole, progress).run(name)
    prints = {"base": {"fingerprint": fingerprint(shards[0])}, "tuned": {"fingerprint": fingerprint(shards[1])}}
    return replace(found, origin=made_by("extract", rank=r if error is None else f"error {error:g}", **prints))


def _checked_rank(r: Rank, error: float | None) -> Rank:
    problems = []
    if r != "auto" and (not isinstance(r, int) or isinstance(r, bool) or r < 1):
        problems.append(f'r must be an integer of at least 1, or "auto", not {r!r}')
    if error is not None and not 0 <= error < 1:
        problems.append(f"error must be a number of at least 0 and below 1, not {error!r}")
    if error is not None and r != "auto":
        problems.append(f"r={r} and error={error} exclude each other")
    if problems:
        raise SpecError("no rank can be chosen:", problems, "write, for instance, extract(base, tuned, r=16)")
    return r if error is None else None


class _Extraction:
    """One call of `extract`."""

    def __init__(self, folder: Path, pair: Pair, r: Rank, error: float | None, whole: bool,
                 progress: Progress | None) -> None:  # fmt: skip
        self.folder, self.pair, self.r, self.error, self.whole = folder, pair, r, error, whole
        self.meter = Meter(sum(map(pair.base.size, pair.base.entries)), progress)
        self.model = build_model(folder, pair.base.entries)
        self.base, self.tuned = (StoredModel(self.model, shards) for shards in pair)
        self.replaced: dict[str, Tensor] = {}
        self.left_out: list[str] = []
        self.prints = BasePrint(dtype={}, sample={})

    def run(self, name: str) -> Approximation:
        """Return the adapter."""
        weights = {full_name(w): w for w in model_weights(ModelIndex(self.model))}
        parameters = dict(self.model.named_parameters())
        self._require_one_model(parameters)
        readable = {n: tuple(parameters[n].shape) for n in parameters if n in self.base.pieces}
        if isinstance(self.r, int):
            self._require_possible_rank([weights[n] for n in readable if n in weights])
        sites, reduced = list[StoredSite](), list[ReducedSite]()
        for full, shape in readable.items():
            if full in weights and (extracted := self._site(full, weights[full])) is not None:
                sites.append(extracted[0])
                reduced.append(extracted[1])
            elif full not in weights:
                self._keep_whole(full, shape, "no weight that can carry A and B")
            self.meter.add(sum(self.pair.base.size(key) for key in {p.key for p in self.base.pieces[full]}))
        for key in self.pair.base.entries.keys() - keys_of(self.base.pieces):
            if why := self.pair.difference(key):
                self.left_out.append(f"{key}: {why}, and no parameter of the model is stored there")
        return Approximation(
            path=self.folder, format="lorainject", sites=tuple(sites), name=name, replaced=self.replaced,
            base=self.prints if sites else None, config={"base_model_name_or_path": str(self.folder)},
            reduced=tuple(reduced), left_out=tuple(self.left_out),
        )  # fmt: skip

    def _require_one_model(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Raise FileError unless both checkpoints hold the same parameters as numbers."""
        problems = []
        for full in parameters:
            reasons = [stored.why_unreadable(full) for stored in (self.base, self.tuned)]
            if reasons[0] != reasons[1] or (reasons[0] and full in self.base.reasons):
                where = ("in the base", "in the tuned checkpoint")
                problems += [f"{full}: {why} ({w})" for why, w in zip(reasons, where, strict=True) if why]
        if not problems and not self.base.pieces:
            problems = ["the base holds no parameter of the model in its config.json"]
        if problems:
            raise FileError(f"{self.folder} and the tuned checkpoint do not fit together:", problems, SAME_MODEL)

    def _require_possible_rank(self, weights: list[ModelWeight]) -> None:
        highest = max((min(w.kind.sizes(weight_shape(w.module, w.parameter))[1:]) for w in weights), default=0)
        if isinstance(self.r, int) and self.r > highest:
            way_out = "give a lower rank"
            raise SpecError(f"r={self.r} is higher than the rank of every weight (up to {highest})", way_out=way_out)

    def _site(self, full: str, w: ModelWeight) -> tuple[StoredSite, ReducedSite] | None:
        """Return the site of one weight; None if it did not change, or is listed or taken along as a whole."""
        shape, stacked = weight_shape(w.module, w.parameter), w.kind.stacked
        pairs = zip(*(stored.matrices(full, shape, stacked) for stored in (self.base, self.tuned)), strict=True)
        parts: list[LowRankPart | None] = []
        samples, total = list[Tensor](), 0
        positions = sample_positions(torch.Size(shape).numel())
        for w0, m in pairs:
            inside = [p - total for p in positions if total <= p < total + w0.numel()]
            samples.append(w0.view(-1)[inside].float())
            total += w0.numel()
            if not bool(m.isfinite().all()) and bool(w0.isfinite().all()):
                self._leave_out(full, "holds NaN or infinity")
                return None
            is_same = torch.equal(w0.to(m.dtype), m)
            rows, width = w0.shape
            parts.append(LowRankPart(torch.zeros(rows, 0), torch.zeros(0, width), 0.0, 0.0) if is_same
                         else find_low_rank(w0, m, self.r, self.error))  # fmt: skip
            if parts[-1] is None:
                self._keep_whole(full, shape, "its change has full rank, or is no more than rounding noise")
                return None
        known = [part for part in parts if part is not None]
        if not any(part.r for part in known):
            return None
        self.prints.dtype[w.names[0]], self.prints.sample[w.names[0]] = self.base.dtype(full), torch.cat(samples)
        return _stored_site(w, shape, known)

    def _keep_whole(self, full: str, shape: tuple[int, ...], why: str) -> None:
        """Take a changed parameter along as a whole, or list it."""
        w0, m = (stored.whole(full, shape) for stored in (self.base, self.tuned))
        if torch.equal(w0.to(m.dtype), m):
            return
        if self.whole:
            self.replaced[full.removesuffix(".weight")] = m
        else:
            self._leave_out(full, why)

    def _leave_out(self, full: str, why: str) -> None:
        self.left_out.append(f"{full}: {why}")


def _stored_site(w: ModelWeight, shape: tuple[int, ...], parts: list[LowRankPart]) -> tuple[StoredSite, ReducedSite]:
    """Return the site of a weight, and its error, from the low-rank part of each of its matrices."""
    r = max(part.r for part in parts)
    P = torch.stack([torch.nn.functional.pad(part.P.float(), (0, r - part.r)) for part in parts])
    Q = torch.stack([torch.nn.functional.pad(part.Q.float(), (0, 0, 0, r - part.r)) for part in parts])
    B, A = (Q.mT, P.mT) if w.kind.transposed else (P, Q)
    if not w.kind.stacked:
        A, B = A[0], B[0]
    site = StoredSite(
        path=w.paths[0], parameter=w.parameter, kind=w.kind.name, shape=shape, A=A.contiguous(), B=B.contiguous(),
        alpha=float(r), parts=w.parts if w.kind.stacked else {}, peft=why_not_peft(w) is None, aliases=w.paths[1:],
    )  # fmt: skip
    square = sum(part.norm**2 for part in parts)
    notes = dict.fromkeys(part.note for part in parts if part.note)
    entry = ReducedSite(path=site.name, full_rank=min(parts[0].P.shape[0], parts[0].Q.shape[1]), r=r, norm=square**0.5,
                        error=(sum(part.lost for part in parts) / square) ** 0.5 if square else 0.0,
                        note=next(iter(notes), "") if len(notes) < 2 else f"{next(iter(notes))}, ...")  # fmt: skip
    return site, entry
