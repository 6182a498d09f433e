"""Every error that lorainject raises on a user's mistake.

    LoraError
    ├── SpecError          a setting is invalid: r = 0, alpha = NaN, a pattern that does not compile
    ├── TargetError        a target matches nothing, or a weight that cannot carry an adapter
    ├── StateError         a verb at the wrong time: merging twice, training while merged, an unknown adapter name
    ├── GraftError         a module was changed since inject, so that its class cannot be changed back
    ├── UnreachedAdapter   probe found adapters that do nothing
    ├── MergeError         a merge or unmerge would lose or spoil a weight: tied, overflowing, changed since
    └── FileError          an adapter file cannot be read or written, or does not fit the model

    SurvivalWarning        the one warning: a merge whose result is right, but coarse

An error lists everything that is wrong, ends with the next step, and leaves the model as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class LoraError(Exception):
    """The root of all errors of lorainject.

    Args:
        what: What cannot be done.
        problems: One line per thing that is wrong. Lines that differ only in layer numbers are shown once.
        way_out: The next step.
    """

    LISTED = 20  # problems in the message; a wrong checkpoint can have thousands

    def __init__(self, what: str, problems: Iterable[str] = (), way_out: str = "") -> None:
        self.what, self.problems, self.way_out = what, tuple(problems), way_out
        groups: dict[str, list[str]] = {}
        for problem in self.problems:
            groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", problem), []).append(problem)
        lines = [
            f"  - {name} ({len(group)} times)" if len(group) > 1 else f"  - {group[0]}"
            for name, group in groups.items()
        ]
        more = [f"  - ... and {len(lines) - self.LISTED} more (see .problems)"] if len(lines) > self.LISTED else []
        step = [f"=> {way_out}"] if way_out else []
        super().__init__("\n".join([what, *lines[: self.LISTED], *more, *step]))


class SpecError(LoraError, ValueError):
    """A setting is invalid."""


class TargetError(LoraError, ValueError):
    """A target matches nothing, or matches a weight that cannot carry an adapter."""


class StateError(LoraError, RuntimeError):
    """The verb is not possible in the state that the model is in."""


class GraftError(LoraError, RuntimeError):
    """The class of a module cannot be changed, or changed back."""


class UnreachedAdapter(LoraError, RuntimeError):
    """A forward and backward do not reach some adapters."""


class MergeError(LoraError, RuntimeError):
    """A merge or unmerge would lose or spoil a weight."""


class FileError(LoraError, OSError):
    """An adapter file cannot be read or written, or does not fit the model."""


@contextmanager
def system_errors(what: str, problems: Iterable[str] = (), way_out: str = "") -> Iterator[None]:
    """Turn an error of the operating system within the context into a FileError that says what cannot be done."""
    try:
        yield
    except FileError:
        raise
    except OSError as e:
        raise FileError(f"{what}: {e.strerror or e}", problems, way_out) from e


class SurvivalWarning(UserWarning):
    """Less than 0.9 of a delta is in the merged weight, because the dtype of the weight is too coarse for it."""
