"""A row of the table, and what comes of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from .measure import Setup, Spread, alone


@dataclass(frozen=True)
class Goal:
    """What a figure must not exceed, and what it aims at; None: nothing was set."""

    must: float | None = None
    aim: float | None = None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a row, as its function measured it. Less is better, always."""

    case: str
    """Of what: the dtype, the size."""
    metric: str
    """What it is: a key of the row's goals, or a figure without a goal."""
    value: Spread
    beside: str = ""
    """The times or bytes that it was made of."""
    limit: str = ""
    """What it, or what stands beside it, could be at best."""
    differ: float | None = None
    """How far ours and PEFT's outputs and gradients were apart, relatively, before anything was timed."""
    why: Callable[[], str] | None = None
    """A profile, taken if the aim is missed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is measured, what for, and how."""

    name: str
    """For --only."""
    what: str
    """In a few words."""
    limit: str
    """What bounds it from below, in words."""
    goals: Mapping[str, Goal]
    measure: Callable[[Setup], Iterator[Figure]]
    bound: str = ""
    """What bounds ours where it misses its aim."""
    cuda: bool = False
    """Whether --cuda runs it too."""


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
    """Why there is no figure."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes it the same figure in another run."""
        return self.row, self.case, self.metric

    @property
    def verdict(self) -> str:
        """Said plainly."""
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
    """A figure beside the row's goal for it; the profile is taken now, if it is needed."""
    goal, value = row.goals.get(figure.metric, Goal()), figure.value
    found = Result(row=row.name, case=figure.case, metric=figure.metric, value=value.value, low=value.low, high=value.high, must=goal.must,
                   aim=goal.aim, beside=figure.beside, limit=figure.limit, differ=figure.differ)  # fmt: skip
    if figure.why is None or found.verdict in ("", "met"):
        return found
    return replace(found, profile=figure.why())


def failed(row: Row, error: BaseException) -> Result:
    """In place of a row's figures."""
    return Result(
        row=row.name,
        case="",
        metric="",
        value=math.nan,
        low=math.nan,
        high=math.nan,
        error=f"{type(error).__name__}: {error}",
    )


def exactly(value: float) -> Spread:
    """Of what does not vary: bytes, counts."""
    return Spread(value, value, value)


def fresh(measure: Callable[..., Iterable[Figure]], *args: object) -> list[Figure]:
    """The figures that measure(*args) takes in a process of its own: how long temporaries of the weights' size take depends on what the process
    has mapped and given back before."""
    return alone(_taken, measure, args)  # type: ignore[no-any-return]


def _taken(measure: Callable[..., Iterable[Figure]], args: tuple[object, ...]) -> list[Figure]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return [replace(figure, why=figure.why and partial(str, figure.why())) for figure in measure(*args)]
