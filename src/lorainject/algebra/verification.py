"""Does a merged checkpoint hold exactly base + adapters? `verify` reads both checkpoints once, tile by tile.

The merge is planned as `merge_checkpoint` plans it (checkpoint/plan.py), so it is known which bytes each adapter
changes, and how. A tensor that is not the sum up to rounding (agreement.py) is read again, to say what it is instead:

    missing, double, wrong scale    W0 + sum_i c_i d_i for other c_i, found by least squares
    another tensor's update         the update that belongs to another failing tensor of the same shape
    changed otherwise               none of these

All other tensors must have the base's bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.copying import Meter, Progress
from ..checkpoint.plan import plan_merge
from ..checkpoint.shards import read_shards
from ..files.io.regular_file import as_path
from ..files.record import AdapterFile
from ..numerics.modes import in_default_modes
from ..numerics.threads import thread_pool
from ..spec import explains_settings
from .judgement import RIGHT, VERDICTS, AdaptedTensor, VerifiedTensor, find_swapped
from .pairs import RECAST, new_tensors, opened
from .reduce import table
from .terms import Adapter

LISTED = 20  # lines of the printed report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found. Prints as a verdict, and a line per tensor that is wrong."""

    adapters: tuple[str, ...]
    tensors: tuple[VerifiedTensor, ...]
    """The tensors on disk that the adapters change."""
    untouched: int
    """The number of other tensors that have the base's bytes."""
    problems: tuple[str, ...]
    """What is wrong with the other tensors, one line each."""
    survival: float
    """The share of all updates together that is in the merged checkpoint."""
    recast: tuple[str, ...] = ()
    """Other tensors that hold the base's values in another dtype. They are problems, too, unless they were accepted."""

    @property
    def ok(self) -> bool:
        """True if every adapted tensor is the sum up to rounding, and every other tensor is the base's."""
        return not self.problems and all(t.verdict in RIGHT for t in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON can hold."""
        return dataclasses.asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        wrong = [t for t in self.tensors if t.verdict not in RIGHT]
        exact = sum(t.verdict == "exact" for t in self.tensors)
        lines = [
            f"{'correct' if self.ok else 'WRONG'}: {len(self.tensors) - len(wrong)} of {len(self.tensors)} adapted"
            f" tensors are base + {' + '.join(self.adapters)} ({exact} to the bit, others within one rounding step);"
            f" {self.untouched} of {self.untouched + len(self.problems)} others are the base's",
            f"{self.survival:.4f} of the update is in the merged checkpoint",
        ]
        counts = {v: n for v in VERDICTS if (n := sum(t.verdict == v for t in wrong))}
        if counts:
            lines += table([(f"  {n}", VERDICTS[v]) for v, n in counts.items()], left=(1,))
        details = [*map(str, wrong), *self.problems]
        lines += [f"  - {line}" for line in details[:LISTED]]
        return "\n".join([*lines, *[f"  - ... and {len(details) - LISTED} more"] * (len(details) > LISTED)])


@explains_settings
@in_default_modes
def verify(base: str | Path, adapters: Adapter | Sequence[Adapter], merged: str | Path, *,
           weights: Sequence[float] | None = None, check_base: bool = True, allow_missing: bool = False,
           accept_dtype: bool = False, progress: Progress | None = None) -> Verification:  # fmt: skip
    """Tell whether a merged checkpoint holds exactly base + adapters, whichever tool merged it.

    Both checkpoints are read from disk, a few tiles at a time. The merged one may be cut into other shards.

    Args:
        base: The directory of the checkpoint that was merged into.
        adapters: One adapter or several, as paths or records.
        merged: The directory of the merged checkpoint.
        weights: What each adapter's update was to be multiplied with; 1 each by default.
        check_base: Raise FileError if an adapter's fingerprint says that it was made for another base.
        allow_missing: As in `load`.
        accept_dtype: Accept tensors that no adapter changes, and that hold the base's values in another dtype.
        progress: Called with the bytes done and the bytes in total.

    Returns:
        A verdict per tensor, the survival, and what is wrong with the others.

    Raises:
        SpecError: The weights are not one finite number per adapter.
        FileError: A checkpoint or an adapter cannot be read, or the adapters do not fit the base.
    """
    sources = [adapters] if isinstance(adapters, str | Path | AdapterFile) else list(adapters)
    plan = plan_merge(as_path(base), sources, weights, check_base, allow_missing)
    names = _labels([str(a.path if isinstance(a, AdapterFile) else a) for a in sources])
    shards = read_shards(as_path(merged))
    with opened(plan.shards, shards) as pair, thread_pool() as for_each:
        meter = Meter(sum(map(pair.base.size, pair.base.entries)), progress)
        adapted = [AdaptedTensor(key, updates, names, pair, for_each) for key, updates in plan.updates_of.items()]
        for tensor in adapted:
            tensor.judge()
            meter.add(pair.base.size(tensor.key))
        find_swapped(adapted)
        differences = {}
        for key in [key for key in pair.base.entries if key not in plan.updates_of]:
            differences[key] = pair.difference(key)
            meter.add(pair.base.size(key))
        problems = new_tensors(pair, pair.base.entries)
    recast = tuple(key for key, why in differences.items() if why == RECAST)
    accepted = {"", RECAST} if accept_dtype else {""}
    problems += [f"{key}: {why}" for key, why in differences.items() if why not in accepted]
    asked = sum(t.agreement.asked for t in adapted)
    return Verification(
        adapters=tuple(names), tensors=tuple(t.report() for t in adapted),
        untouched=sum(why in accepted for why in differences.values()), problems=tuple(problems), recast=recast,
        survival=sum(t.agreement.dot for t in adapted) / asked if asked else 1.0,
    )  # fmt: skip


def _labels(paths: Sequence[str]) -> list[str]:
    """Return the last parts of the paths, or the whole paths if some of the last parts are the same."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else [f"{i + 1}: {path}" for i, path in enumerate(paths)]
