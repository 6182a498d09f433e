"""What a sweep is told of each adapter, and what it says of it: values without a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SpecError
from ..spec import LoraSpec


@dataclass(frozen=True, kw_only=True)
class Run:
    """One adapter of a sweep.

    Raises:
        SpecError: A value is invalid. The error lists every invalid value.
    """

    spec: LoraSpec
    """Targets, rank, and all other settings of the adapter."""
    lr: float
    """Learning rate."""
    seed: int = 0
    """Seed with which A is drawn: the adapter begins as after torch.manual_seed(seed) and inject(model, spec=spec)."""

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.spec, LoraSpec):
            problems.append(f"spec must be a LoraSpec, not {self.spec!r}")
        if not (isinstance(self.lr, int | float) and 0 < self.lr < math.inf):
            problems.append(f"lr must be a finite number above 0, not {self.lr!r}")
        if not isinstance(self.seed, int):
            problems.append(f"seed must be a whole number, not {self.seed!r}")
        if problems:
            raise SpecError("invalid settings of a run:", problems, "correct them and call again")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What became of one run."""

    run: Run
    parameters: int
    """Number of elements that trained."""
    losses: tuple[float, ...]
    """The loss of each step that was taken."""
    stopped: str | None = None
    """Why the run ended before the last step. None if it did not."""
    score: float | None = None
    """What `score` returned. None without it, and for a run that diverged."""
    path: Path | None = None
    """Where the adapter was saved. None without `save_to`, and for a run that diverged."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepResult(Mapping[str, RunResult]):
    """The results of a sweep by the names of the runs. It prints as a table."""

    results: Mapping[str, RunResult]
    mode: str
    """ "batch" or "alternate"."""
    reason: str = ""
    """Why mode="auto" let the runs take turns. Empty if it did not."""
    turns: int = 0
    """The number of steps in which the runs took turns: all of them, or those whose batch could not be shared."""
    seconds: float
    """Time of the whole call."""

    def __getitem__(self, name: str) -> RunResult:
        return self.results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def as_json(self) -> dict[str, Any]:
        """Return the results as values of JSON."""
        runs = {
            name: {
                "r": result.run.spec.r, "lr": result.run.lr, "seed": result.run.seed, "parameters": result.parameters,
                "losses": result.losses, "score": result.score, "stopped": result.stopped,
                "path": None if result.path is None else str(result.path),
            } for name, result in self.items()
        }  # fmt: skip
        return {"runs": runs, "mode": self.mode, "reason": self.reason, "turns": self.turns, "seconds": self.seconds}

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [
            ("run", "r", "lr", "seed", "parameters", "steps", "first loss", "last loss", "score", "")
        ]
        for name, result in self.items():
            ends = [f"{x:.4g}" for x in (result.losses[:1] + result.losses[-1:])] or ["-", "-"]
            table.append((
                name, str(result.run.spec.r), f"{result.run.lr:g}", str(result.run.seed), f"{result.parameters:,}",
                str(len(result.losses)), *ends, "-" if result.score is None else f"{result.score:.4g}",
                result.stopped or "",
            ))  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        formats = "  ".join(f"{{:{'>' if 0 < i < 9 else '<'}{width}}}" for i, width in enumerate(widths))
        lines = [formats.format(*row).rstrip() for row in table]
        how = f"{self.mode}, {self.turns} steps in turns, {self.seconds:.1f} s"
        return "\n".join([*lines, how, *filter(None, [self.reason])])
