"""Everything that lorainject raises on a user's mistake.

    LoraError
    ├── SpecError      a value that can't be meant: r = 0, alpha = NaN, a pattern that does not compile
    ├── TargetError    targets that match nothing, or modules that can't carry an adapter
    ├── StateError     a verb at the wrong time: merging twice, training while merged, an unknown adapter name
    ├── GraftError     the module is no longer as we left it, so its class can't be changed back
    ├── UnreachedAdapter   probe found adapters that do nothing
    ├── MergeError     a fold that would lose or spoil a weight: tied, overflowing, changed since
    └── FileError      an adapter file that can't be read, written, or does not fit this model

    SurvivalWarning    the one warning: a merge whose result is right, but coarse

An error lists *all* that is wrong, ends with the next step, and leaves the model as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class LoraError(Exception):
    """Root of the tree. `problems` holds one line for each thing that is wrong."""

    LISTED = 20  # problems shown in the message; a wrong checkpoint can have thousands

    def __init__(self, what: str, problems: Iterable[str] = (), way_out: str = "") -> None:
        self.problems = tuple(problems)
        alike: dict[str, list[str]] = {}  # one line for all layers
        for problem in self.problems:
            alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", problem), []).append(problem)
        shown = [f"  - {starred} ({len(of)} times)" if len(of) > 1 else f"  - {of[0]}" for starred, of in alike.items()]
        lines = [what, *shown[: self.LISTED]]
        if len(shown) > self.LISTED:
            lines.append(f"  - ... and {len(shown) - self.LISTED} more (see .problems)")
        if way_out:
            lines.append(f"=> {way_out}")
        super().__init__("\n".join(lines))


class SpecError(LoraError, ValueError):
    """A setting that can't be meant."""


class TargetError(LoraError, ValueError):
    """Targets that match nothing, or modules that can't carry an adapter."""


class StateError(LoraError, RuntimeError):
    """The verb does not fit the state that the model is in."""


class GraftError(LoraError, RuntimeError):
    """A module's class can't be changed (back)."""


class UnreachedAdapter(LoraError, RuntimeError):
    """Adapters that a forward and backward do not reach."""


class MergeError(LoraError, RuntimeError):
    """Folding, or taking out again, would lose or spoil a weight."""


class FileError(LoraError, OSError):
    """An adapter file can't be read or written, or does not fit the model."""


@contextmanager
def system_errors(what: str, problems: Iterable[str] = (), way_out: str = "") -> Iterator[None]:
    """Within it, what the operating system raises becomes a FileError that says `what` can't be done."""
    try:
        yield
    except FileError:
        raise
    except OSError as e:
        raise FileError(f"{what}: {e.strerror or e}", problems, way_out) from e


class SurvivalWarning(UserWarning):
    """The storage dtype is too coarse for a delta: less than 0.9 of it is in the merged weight."""
