"""A row of the table, its figures, and their results."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from .measure import Setup, Spread, in_fresh_process


@dataclass(frozen=True)
class Goal:
    """What a figure must not exceed, and what it aims at. None if nothing was set."""

    must: float | None = None
    aim: float | None = None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a row, as it was measured. Less is always better."""

    case: str
    """What was measured: the dtype, the size."""
    metric: str
    """The kind of figure: a key of the goals of the row, or a figure without a goal."""
    value: Spread
    beside: str = ""
    """The times or bytes that the figure was made of."""
    limit: str = ""
    """What the figure, or its times, could be at best."""
    differ: float | None = None
    """The relative difference between the outputs and gradients of ours and PEFT's, before anything was timed."""
    why: Callable[[], str] | None = None
    """What takes a profile if the aim is missed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is measured, why, and how."""

    name: str
    """The name that --only takes."""
    what: str
    """The row in a few words."""
    limit: str
    """What bounds the row from below, in words."""
    goals: Mapping[str, Goal]
    measure: Callable[[Setup], Iterator[Figure]]
    bound: str = ""
    """What bounds us where we miss the aim."""
    cuda: bool = False
    """True if --cuda runs the row too."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A figure with its goal, as it is printed and stored."""

    row: str
    case: str
    metric: str
    value: float
    low: float
    high: float
    must: float | None = None
    aim: float | None = None
    beside: str = ""
    limit: str = ""
    differ: float | None = None
    profile: str = ""
    error: str = ""
    """Why there is no figure; empty if there is one."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies the same figure in another run."""
        return self.row, self.case, self.metric

    @property
    def verdict(self) -> str:
        """ "met", "aim missed", "must MISSED", "not seen" or "failed"; empty without a goal."""
        if self.error:
            return "failed"
        if self.must is None and self.aim is None:
            return ""
        if self.metric.startswith("rho") and not (0 < self.value < math.inf and self.high - self.low <= self.value):
            return "not seen"  # one of the two overheads, or the size of their quotient
        if self.must is not None and not self.value <= self.must:
            return "must MISSED"
        if self.aim is not None and not self.value <= self.aim:
            return "aim missed"
        return "met"


def result(row: Row, figure: Figure) -> Result:
    """Return a figure with the row's goal for it, and its profile if the goal was missed."""
    goal, value = row.goals.get(figure.metric, Goal()), figure.value
    judged = Result(
        row=row.name,
        case=figure.case,
        metric=figure.metric,
        value=value.value,
        low=value.low,
        high=value.high,
        must=goal.must,
        aim=goal.aim,
        beside=figure.beside,
        limit=figure.limit,
        differ=figure.differ,
    )
    if figure.why is None or judged.verdict in ("", "met"):
        return judged
    return replace(judged, profile=figure.why())


def failure(row: Row, error: BaseException) -> Result:
    """Return what stands in place of the figures of a row that failed."""
    return Result(
        row=row.name,
        case="",
        metric="",
        value=math.nan,
        low=math.nan,
        high=math.nan,
        error=f"{type(error).__name__}: {error}",
    )


def exact_value(value: float) -> Spread:
    """Return the spread of a value that does not vary: bytes, counts."""
    return Spread(value, value, value)


def figures_in_fresh_process(measure: Callable[..., Iterable[Figure]], *args: object) -> list[Figure]:
    """Return the figures that measure(*args) takes in a fresh process.

    How long temporaries of the size of the weights take depends on what a process has mapped and given back before.
    """
    return in_fresh_process(_take_figures, measure, args)  # type: ignore[no-any-return]


def _take_figures(measure: Callable[..., Iterable[Figure]], args: tuple[object, ...]) -> list[Figure]:
    """Take the figures, and their profiles as text, which can be pickled."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return [replace(figure, why=figure.why and partial(str, figure.why())) for figure in measure(*args)]
